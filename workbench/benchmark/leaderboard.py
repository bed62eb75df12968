"""A benchmark's edits as curves, rankings and intervals.

An edit that does more leaks more, so methods are compared at two points of their curves: where they change the image
alike, and where they succeed alike. Curves run through scale 0, where nothing changes, and are interpolated linearly
between the measured strengths. Intervals are of a bootstrap over the held-out samples, the same draws for all methods,
and over populations if there are several.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.stats import t as student

from workbench.analysis.effect_metrics import first_reached, linearity, monotonicity
from workbench.analysis.intervals import Estimate, bootstrap_counts, bootstrap_interval, holm, mean_interval
from workbench.benchmark.protocol import CHANGE
from workbench.io import one_of

SUCCESS = 0.5  # share of the samples without an attribute that have it after the edit, at which they are compared
AT_REST = {"rms": 0.0, "perceptual": 0.0, "identity": 1.0, "s_dir": 0.0, "clip_gain": 0.0, "consistency": 1.0}
"""Columns of edits that curves are made of, with their values at scale 0."""

OPTIONAL = ("s_dir", "clip_gain", "consistency")  # columns that may be missing

CONTROLS = ("random h", "random h, picked", "random x", "random x, picked")  # that any method must beat

BOUNDS = {name: (0.0, 1.0) for name in ("success", "reached")} | {
    name: (0.0, np.inf) for name in ("change", "leakage", "rms", "perceptual")
}
"""Lowest and highest value, of what has any."""

FEWEST = 3  # held-out samples without an attribute, at least, for it to count


@dataclass(frozen=True, eq=False)
class _Curves:
    """Means over the n samples without the attribute, draw by draw, by their names.

    Arrays of shape (1 + resamples, 1 + strengths): the first row is of the samples as they are, the first column of
    scale 0.
    """

    method: str
    attribute: str
    n: int
    others: int
    scales: np.ndarray  # means over populations, each of which may have its own strengths
    means: dict[str, np.ndarray] = field(repr=False)

    def at_change(self, name: str, change: float) -> np.ndarray:
        """Values where the edit changes the image by so much."""
        return first_reached(self.means["rms"], self.means[name], change)

    def at_success(self, name: str) -> np.ndarray:
        """Values where the edit first succeeds as often as `SUCCESS`; NaN where it never does."""
        success = self.means["success"]
        values = first_reached(success, self.means[name], SUCCESS)
        return np.where(success.max(axis=1) >= SUCCESS, values, np.nan)


def leaderboard(edits: pd.DataFrame, *, change: float = CHANGE, resamples: int = 500) -> pd.DataFrame:
    """Rank methods by their success at equal change of the image, means over attributes.

    Parameters
    ----------
    edits : DataFrame
        As of a `Benchmark`.
    change : float
        Root mean square change of the image at which `success` and `effect` are read.
    resamples : int

    Returns
    -------
    DataFrame, one row per method, best first
        `success` and `effect` (mean change of the attribute's probability, on samples without it) at equal change;
        with text models `s_dir` there, the cosine of the changes of images and texts in CLIP's space, and `clip_gain`,
        the rise of the image's own cosine with the text; with a segmenter `consistency`, the overlap of segmentations;
        `change`, how far the measured strengths reached that point; `leakage` there, the sum of the sizes of the mean
        changes of all other attributes, and `precision`, the effect by the mean of these sizes (the editing precision
        ratio of CASL, arXiv 2601.15441, whose exact form is inferred); `reached`, the share of attributes whose edits
        succeed on half of the samples at any strength, and over these, where they do, `entanglement` (leakage by
        effect), `psnr_outside` (of the mean squared error, dB) and `identity`; each with its 95% interval, `..._low`
        and `..._high`. `p_random`, one-sided, that success is no higher than that of a control (`CONTROLS`; random
        vectors that are picked as principal components are stand for the part of a success that is due to picking, and
        are strict for methods that pick nothing) over the attributes that both have, of the control for which that is
        likeliest, adjusted for the number of methods by Holm's rule; NaN without an attribute in common.
        `monotonicity` and `linearity` of the logit in the scale. `attributes`, and `n`, the mean number of samples
        without one.

    Raises
    ------
    ValueError
        If hardly any sample is without any of the attributes.
    """
    curves = _curves(edits, resamples)
    rows, draws = {}, {}
    for method, own in _by_method(curves).items():
        draws[method] = {c.attribute: c.at_change("success", change) for c in own}
        values = {
            "success": _mean(draws[method].values()),
            "change": _at_change(own, "rms", change),
            "effect": _at_change(own, "effect", change),
            "leakage": _at_change(own, "leakage", change),
            "precision": _mean(_precision(c, change) for c in own),
            "reached": _mean((c.means["success"].max(axis=1) >= SUCCESS).astype(float) for c in own),
            "entanglement": _mean(c.at_success("leakage") / c.at_success("effect") for c in own),
            "psnr_outside": _decibel(_mean(c.at_success("error_outside") for c in own)),
            "identity": _mean(c.at_success("identity") for c in own),
        }
        for name in OPTIONAL:
            if any(name in c.means for c in own):
                values[name] = _at_change(own, name, change)
        rows[method] = _with_intervals(values, own) | {"attributes": len(own), "n": np.mean([c.n for c in own])}
    table = pd.DataFrame(rows).T.rename_axis("method")
    controls = [draws[name] for name in CONTROLS if name in draws]
    if controls:
        found, n = [name for name in draws if name not in CONTROLS], min(c.n for c in curves)
        p = [_chance(draws[name], controls, n) for name in found]
        table["p_random"] = pd.Series(dict(zip(found, holm(p), strict=True)), dtype=float)
    table = table.join(_shape_of_response(edits))
    return table.astype(float).sort_values("success", ascending=False)


def pareto(edits: pd.DataFrame, *, resamples: int = 500) -> pd.DataFrame:
    """Success against what is left of the rest of the image, strength by strength; means over attributes.

    Methods have strengths of their own for each attribute, of which the i-th ones are taken together.

    Parameters
    ----------
    edits : DataFrame
        As of a `Benchmark`.
    resamples : int

    Returns
    -------
    DataFrame, one row per method and strength
        `method`, `scale` (mean over attributes), `success`, `psnr_outside` (dB, of the mean squared error outside of
        the attribute's region), `identity`, `perceptual`, `leakage`, `rms`, these with `..._low` and `..._high`.

    Raises
    ------
    ValueError
        If hardly any sample is without any of the attributes.
    """
    rows = []
    for method, own in _by_method(_curves(edits, resamples)).items():
        for i in range(1, len(own[0].scales)):
            values = {"psnr_outside": _decibel(_mean(c.means["error_outside"][:, i] for c in own))}
            for name in ("success", "identity", "perceptual", "leakage", "rms"):
                values[name] = _mean(c.means[name][:, i] for c in own)
            scale = float(np.mean([c.scales[i] for c in own]))
            rows.append({"method": method, "scale": scale} | _with_intervals(values, own))
    return pd.DataFrame(rows)


def by_attribute(edits: pd.DataFrame, *, resamples: int = 500) -> pd.DataFrame:
    """Success of each method for each attribute at equal change.

    Parameters
    ----------
    edits : DataFrame
    resamples : int

    Returns
    -------
    DataFrame
        One row per method and attribute: `value`, `low`, `high` (95%), `n`.

    Raises
    ------
    ValueError
        If hardly any sample is without any of the attributes.
    """
    rows = []
    for c in _curves(edits, resamples):
        drawn = c.at_change("success", CHANGE)
        low, high = _interval(drawn, c.n, "success")
        rows.append(
            {"method": c.method, "attribute": c.attribute, "value": drawn[0], "low": low, "high": high, "n": c.n}
        )
    return pd.DataFrame(rows)


def cost_table(costs: pd.DataFrame) -> pd.DataFrame:
    """Cost of each method, means over attributes and populations.

    Parameters
    ----------
    costs : DataFrame
        As of a `Benchmark`.

    Returns
    -------
    DataFrame, one row per method
        `passes`, `scored`, `labels` and `seconds` to find an edit, and `edit_passes` of one, each with its 95% interval
        over attributes and populations, `..._low` and `..._high`. Of what is learned once for all attributes, the
        passes are charged to each, the seconds to the first.
    """
    rows = {}
    for method, part in costs.groupby("method", sort=False):
        row = {}
        for name in ("passes", "scored", "labels", "seconds", "edit_passes"):
            low, high = mean_interval(part[name])
            row |= {name: float(part[name].mean()), f"{name}_low": max(low, 0.0), f"{name}_high": high}
        rows[method] = row
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("method")


def difference(edits: pd.DataFrame, first: str, second: str, *, resamples: int = 500) -> Estimate:
    """By how much the success of one method at equal change exceeds another's, on the attributes that both have.

    Parameters
    ----------
    edits : DataFrame
    first, second : str
        Methods; both are read on the same samples.
    resamples : int

    Returns
    -------
    Estimate
        Its n is the smallest number of samples without an attribute; NaN without an attribute in common.

    Raises
    ------
    ValueError
        If a method was not measured, or hardly any sample is without any of the attributes.
    """
    measured = edits["method"].unique()
    for name in (first, second):
        one_of("measured method", name, measured)
    success, n = {first: {}, second: {}}, {}
    for c in _curves(edits[edits["method"].isin([first, second])], resamples):
        success[c.method][c.attribute], n[c.attribute] = c.at_change("success", CHANGE), c.n
    drawn = _gap(success[first], success[second])
    if drawn is None:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    fewest = min(n[name] for name in success[first] if name in success[second])
    return Estimate(float(drawn[0]), *_interval(drawn, fewest, "success", signed=True), fewest)


def _curves(edits: pd.DataFrame, resamples: int) -> list[_Curves]:
    counts = _draws(edits["seed"].nunique(), resamples, seed=0)
    repeats = _draws(max(edits["repeat"]) + 1, resamples, seed=1)
    found = (_curve(part, counts, repeats) for _, part in edits.groupby(["method", "attribute"], sort=False))
    curves = [curve for curve in found if curve.n >= FEWEST]
    if not curves:
        raise ValueError(f"no attribute has {FEWEST} held-out samples without it to measure success by; take more")
    return curves


def _draws(n: int, resamples: int, *, seed: int) -> np.ndarray:
    """How often each of n is drawn, (1 + resamples, n); in the first row once."""
    return np.vstack([np.ones(n, int), bootstrap_counts(n, resamples=resamples, seed=seed)])


def _curve(part: pd.DataFrame, counts: np.ndarray, repeats: np.ndarray) -> _Curves:
    """Of one method and attribute; draws of the samples and of the populations."""
    part = part.sort_values(["repeat", "seed", "scale"])
    method, attribute = part.iloc[0][["method", "attribute"]]
    there, values = part["repeat"].unique(), part.select_dtypes("number").astype(float)
    shape = (len(there), counts.shape[1], -1)
    without = values["before"].to_numpy().reshape(shape)[0, :, 0] <= 0.5

    def mean(column: pd.Series) -> np.ndarray:
        """Over samples and populations, with scale 0 in front."""
        each = column.to_numpy().reshape(shape)
        known = np.isfinite(each)  # a region without a pixel has no error
        drawn, seen = (
            np.einsum("br,bn,rns->bs", repeats[:, there], counts * without, kept, optimize=True)
            for kept in (np.where(known, each, 0.0), known.astype(float))
        )
        with np.errstate(invalid="ignore"):
            means = drawn / seen
        return np.hstack([np.zeros((len(means), 1)), means])

    others = [name for name in values if name.startswith("change ") and name != f"change {attribute}"]
    means = {
        name: at_rest + mean(values[name] - at_rest)
        for name, at_rest in AT_REST.items()
        if name in values and values[name].notna().any()
    }
    effect = mean(values["after"] - values["before"])
    means |= {
        "effect": effect,
        "success": mean((values["after"] > 0.5).astype(float)),
        "leakage": sum((np.abs(mean(values[name])) for name in others), start=np.zeros_like(effect)),
        "error_outside": mean(4.0 * 10.0 ** (-values["psnr_outside"] / 10.0)),
    }
    scales = np.concatenate([[0.0], values["scale"].to_numpy().reshape(shape).mean(axis=(0, 1))])
    return _Curves(method, attribute, int(without.sum()), len(others), scales, means)


def _by_method(curves: Sequence[_Curves]) -> dict[str, list[_Curves]]:
    methods: dict[str, list[_Curves]] = {}
    for curve in curves:
        methods.setdefault(curve.method, []).append(curve)
    return methods


def _at_change(curves: Sequence[_Curves], name: str, change: float) -> np.ndarray:
    return _mean(c.at_change(name, change) for c in curves if name in c.means)


def _precision(curves: _Curves, change: float) -> np.ndarray:
    """Effect at a change of the image, by the mean size of the changes of the other attributes; NaN without others."""
    leak = curves.at_change("leakage", change)  # 0 without others
    return curves.others * curves.at_change("effect", change) / np.where(leak > 0, leak, np.nan)


def _mean(drawn: Iterable[np.ndarray]) -> np.ndarray:
    """Mean over attributes, of those that are known; NaN where none is."""
    values = np.array(list(drawn))
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _gap(first: dict[str, np.ndarray], second: dict[str, np.ndarray]) -> np.ndarray | None:
    """By how much the first exceeds the second, over the attributes that both have, if there are any."""
    shared = [first[attribute] - second[attribute] for attribute in first if attribute in second]
    return _mean(shared) if shared else None


def _chance(own: dict[str, np.ndarray], controls: Sequence[dict[str, np.ndarray]], n: int) -> float:
    """Share of the draws in which a method's success is no higher than a control's, the likeliest one's.

    Where no draw has it so, by the distance from 0 in the draws' standard deviations (Student's t for n samples): the
    draws alone could give no value that is still small when corrected for many methods.
    """
    found = []
    for control in controls:
        drawn = _gap(own, control)
        if drawn is None:
            continue
        gap, gaps = drawn[0], drawn[1:][np.isfinite(drawn[1:])]
        below, spread = (gaps <= 0).sum(), gaps.std()
        # One more than the draws in each count: a p-value of 0 is none that draws can give.
        p = (1 + below) / (1 + len(gaps))
        found.append(p if below or not spread else min(p, float(student.sf(gap / spread, n - 1))))
    return max(found, default=float("nan"))


def _interval(drawn: np.ndarray, n: int, name: str, *, signed: bool = False) -> tuple[float, float]:
    """95% interval of a named value of n samples; a signed one is the difference of two."""
    low, high = BOUNDS.get(name, (-np.inf, np.inf))
    bounds = (low - high, high - low) if signed else (low, high)
    ends = bootstrap_interval(drawn[0], drawn[1:], n, bounds=bounds, share=name == "success")
    return float(ends[0]), float(ends[1])


def _with_intervals(values: dict[str, np.ndarray], curves: Sequence[_Curves]) -> dict[str, float]:
    """Each value with its 95% interval, `..._low` and `..._high`."""
    row, n = {}, min(c.n for c in curves)
    for name, drawn in values.items():
        row[name] = drawn[0]
        row[f"{name}_low"], row[f"{name}_high"] = _interval(drawn, n, name)
    return row


def _decibel(error: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(4.0 / error)


def _shape_of_response(edits: pd.DataFrame) -> pd.DataFrame:
    """How a sample's logit follows the scale: mean rank correlation and share explained by a line."""
    p = edits["before"].clip(1e-6, 1 - 1e-6)
    plain = edits.assign(logit=np.log(p / (1 - p)), scale=0.0)
    both = pd.concat([plain, edits])[["method", "attribute", "repeat", "seed", "scale", "logit", "before"]]
    both, found = both[both["before"] <= 0.5], []
    for (method, _, _), part in both.groupby(["method", "attribute", "repeat"], sort=False):
        wide = part.pivot_table(index="seed", columns="scale", values="logit")
        scales = list(wide.columns)
        each = {"method": method, "monotonicity": monotonicity(wide, scales), "linearity": np.nan}
        if len(scales) > 2:
            each["linearity"] = linearity(wide, scales)
        found.append(pd.DataFrame(each))
    return pd.concat(found).groupby("method").mean()
