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

SUCCESS = 0.5  # share of the samples without an attribute that have it after the edit, at which they are compared
OPTIONAL = {"s_dir": 0.0, "clip_gain": 0.0, "consistency": 1.0}
"""Columns that may be missing, with their values at scale 0."""

CONTROLS = ("random h", "random h, picked", "random x", "random x, picked")  # that any method must beat

BOUNDS = {name: (0.0, 1.0) for name in ("success", "reached")} | {
    name: (0.0, np.inf) for name in ("change", "leakage", "leak", "rms", "perceptual")
}
"""Lowest and highest value, of what has any."""

FEWEST = 3  # held-out samples without an attribute, at least, for it to count


@dataclass(frozen=True, eq=False)
class _Curves:
    """Means over the samples without the attribute, draw by draw; arrays of shape (1 + resamples, 1 + strengths).

    The first row is of the samples as they are, the first column of scale 0.
    """

    method: str
    attribute: str
    n: int
    others: int
    scales: np.ndarray  # means over populations, each of which may have its own strengths
    rms: np.ndarray = field(repr=False)
    effect: np.ndarray = field(repr=False)
    success: np.ndarray = field(repr=False)
    leak: np.ndarray = field(repr=False)
    error_outside: np.ndarray = field(repr=False)
    identity: np.ndarray = field(repr=False)
    perceptual: np.ndarray = field(repr=False)
    optional: dict[str, np.ndarray] = field(default_factory=dict, repr=False)


def leaderboard(
    edits: pd.DataFrame,
    *,
    change: float = CHANGE,
    success: float = SUCCESS,
    controls: Sequence[str] = CONTROLS,
    resamples: int = 500,
    seed: int = 0,
) -> pd.DataFrame:
    """Rank methods by their success at equal change of the image, means over attributes.

    Parameters
    ----------
    edits : DataFrame
        As of a `Benchmark`.
    change : float
        Root mean square change of the image at which `success` and `effect` are read.
    success : float in (0, 1)
        Success at which `entanglement`, `psnr_outside` and `identity` are read.
    controls : sequence of str
        Methods that the others must beat. Random vectors that are picked as principal components are stand for the
        part of a success that is due to picking; for methods that pick nothing they are strict.
    resamples, seed : int

    Returns
    -------
    DataFrame, one row per method, best first
        `success` and `effect` (mean change of the attribute's probability, on samples without it) at equal change;
        with text models `s_dir` there, the cosine of the changes of images and texts in CLIP's space, and `clip_gain`,
        the rise of the image's own cosine with the text; with a segmenter `consistency`, the overlap of segmentations;
        `change`, how far the measured strengths reached that point; `leakage` there, the sum of the sizes of the mean
        changes of all other attributes, and `precision`, the effect by the mean of these sizes (the editing precision
        ratio of CASL, arXiv 2601.15441, whose exact form is inferred); `reached`, the share of attributes whose edits
        succeed as often as asked for at any strength, and over these `entanglement` (leakage by effect), `psnr_outside`
        (of the mean squared error, dB) and `identity`; each with its 95% interval, `..._low` and `..._high`.
        `p_random`, one-sided, that success is no higher than a control's over the attributes that both have, of the
        control for which that is likeliest, adjusted for the number of methods by Holm's rule; NaN without an attribute
        in common. `monotonicity` and `linearity` of the logit in the scale. `attributes`, and `n`, the mean number of
        samples without one.

    Raises
    ------
    ValueError
        If hardly any sample is without any of the attributes.
    """
    curves = _curves(edits, resamples, seed)
    methods = list(dict.fromkeys(c.method for c in curves))
    rows, draws = {}, {}
    for method in methods:
        own = [c for c in curves if c.method == method]
        draws[method] = {c.attribute: first_reached(c.rms, c.success, change) for c in own}
        values = {
            "success": _mean(draws[method].values()),
            "change": _mean(first_reached(c.rms, c.rms, change) for c in own),
            "effect": _mean(first_reached(c.rms, c.effect, change) for c in own),
            "leakage": _mean(first_reached(c.rms, c.leak, change) for c in own),
            "precision": _mean(_precision(c, change) for c in own),
            "reached": _mean((c.success.max(axis=1) >= success).astype(float) for c in own),
            "entanglement": _mean(_succeeding(c, c.leak, success) / _succeeding(c, c.effect, success) for c in own),
            "psnr_outside": _decibel(_mean(_succeeding(c, c.error_outside, success) for c in own)),
            "identity": _mean(_succeeding(c, c.identity, success) for c in own),
        }
        for name in dict.fromkeys(name for c in own for name in c.optional):
            values[name] = _mean(first_reached(c.rms, c.optional[name], change) for c in own if name in c.optional)
        rows[method] = _with_intervals(values, own) | {"attributes": len(own), "n": np.mean([c.n for c in own])}
    table = pd.DataFrame(rows).T.rename_axis("method")
    against = [name for name in controls if name in draws]
    if against:
        found = [name for name in methods if name not in controls]
        n = min(c.n for c in curves)
        chances = {name: [_chance(draws[name], draws[control], n) for control in against] for name in found}
        p = [max(filter(np.isfinite, chances[name]), default=float("nan")) for name in found]
        table["p_random"] = pd.Series(dict(zip(found, holm(p), strict=True)), dtype=float)
    table = table.join(_shape_of_response(edits))
    return table.astype(float).sort_values("success", ascending=False)


def pareto(edits: pd.DataFrame, *, resamples: int = 500, seed: int = 0) -> pd.DataFrame:
    """Success against what is left of the rest of the image, strength by strength; means over attributes.

    Methods have strengths of their own for each attribute, of which the i-th ones are taken together.

    Parameters
    ----------
    edits : DataFrame
        As of a `Benchmark`.
    resamples, seed : int

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
    curves, rows = _curves(edits, resamples, seed), []
    for method in dict.fromkeys(c.method for c in curves):
        own = [c for c in curves if c.method == method]
        for i in range(1, len(own[0].scales)):
            values = {
                "success": _mean(c.success[:, i] for c in own),
                "psnr_outside": _decibel(_mean(c.error_outside[:, i] for c in own)),
                "identity": _mean(c.identity[:, i] for c in own),
                "perceptual": _mean(c.perceptual[:, i] for c in own),
                "leakage": _mean(c.leak[:, i] for c in own),
                "rms": _mean(c.rms[:, i] for c in own),
            }
            scale = float(np.mean([c.scales[i] for c in own]))
            rows.append({"method": method, "scale": scale} | _with_intervals(values, own))
    return pd.DataFrame(rows)


def by_attribute(
    edits: pd.DataFrame, *, change: float = CHANGE, value: str = "success", resamples: int = 500, seed: int = 0
) -> pd.DataFrame:
    """Success of each method for each attribute at equal change.

    Parameters
    ----------
    edits : DataFrame
    change : float
    value : {"success", "effect", "leak"}
    resamples, seed : int

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
    for c in _curves(edits, resamples, seed):
        drawn = first_reached(c.rms, getattr(c, value), change)
        low, high = _interval(drawn, c.n, value)
        key = {"method": c.method, "attribute": c.attribute}
        rows.append(key | {"value": drawn[0], "low": low, "high": high, "n": c.n})
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


def difference(
    edits: pd.DataFrame,
    first: str,
    second: str,
    *,
    value: str = "success",
    change: float = CHANGE,
    resamples: int = 500,
    seed: int = 0,
) -> Estimate:
    """By how much one method exceeds another, over the attributes that both have, on the same samples.

    Parameters
    ----------
    edits : DataFrame
    first, second : str
        Methods.
    value : {"success", "effect", "leak", "identity"}
    change : float
        Root mean square change of the image at which both are read.
    resamples, seed : int

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
        if name not in measured:
            raise ValueError(f"{name!r} was not measured; there are {', '.join(measured)}")
    drawn, n = {name: {} for name in (first, second)}, {}
    for c in _curves(edits[edits["method"].isin([first, second])], resamples, seed):
        drawn[c.method][c.attribute] = first_reached(c.rms, getattr(c, value), change)
        n[c.attribute] = c.n
    shared = [name for name in drawn[first] if name in drawn[second]]
    if not shared:
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    mean, fewest = _mean(drawn[first][name] - drawn[second][name] for name in shared), min(n[name] for name in shared)
    return Estimate(float(mean[0]), *_interval(mean, fewest, value, signed=True), fewest)


def _curves(edits: pd.DataFrame, resamples: int, seed: int) -> list[_Curves]:
    changes = [name for name in edits if name.startswith("change ")]
    samples = np.sort(edits["seed"].unique())
    counts = np.vstack([np.ones(len(samples), int), bootstrap_counts(len(samples), resamples=resamples, seed=seed)])
    populations = max(edits["repeat"]) + 1
    repeats = np.vstack([np.ones(populations, int), bootstrap_counts(populations, resamples=resamples, seed=seed + 1)])
    curves = []
    for (method, attribute), part in edits.groupby(["method", "attribute"], sort=False):
        part = part.sort_values(["repeat", "seed", "scale"])
        there = part["repeat"].unique()
        shape = (len(there), len(samples), len(part) // (len(there) * len(samples)))
        scales = part["scale"].to_numpy().reshape(shape).mean(axis=(0, 1))
        without = part["before"].to_numpy().reshape(shape)[0, :, 0] <= 0.5
        if without.sum() < FEWEST:
            continue
        weights = counts * without

        def mean(values: np.ndarray, shape=shape, weights=weights, there=there) -> np.ndarray:
            """Mean of (populations, n, scales) over samples and populations, with scale 0 in front."""
            values = values.reshape(shape)
            known = np.isfinite(values)  # a region without a pixel has no error
            drawn, seen = (
                np.einsum("br,bn,rns->bs", repeats[:, there], weights, each, optimize=True)
                for each in (np.where(known, values, 0.0), known.astype(float))
            )
            with np.errstate(invalid="ignore"):
                means = drawn / seen
            return np.hstack([np.zeros((len(means), 1)), means])

        def of(name: str, part=part) -> np.ndarray:
            return part[name].to_numpy(dtype=float)

        others = [name for name in changes if name != f"change {attribute}"]
        curves.append(
            _Curves(
                str(method),
                str(attribute),
                int(without.sum()),
                len(others),
                np.concatenate([[0.0], scales]),
                rms=mean(of("rms")),
                effect=mean(of("after") - of("before")),
                success=mean((of("after") > 0.5).astype(float)),
                leak=sum(np.abs(mean(of(name))) for name in others),
                error_outside=mean(4.0 * 10.0 ** (-of("psnr_outside") / 10.0)),
                identity=1.0 + mean(of("identity") - 1.0),
                perceptual=mean(of("perceptual")),
                optional={
                    name: at_rest + mean(of(name) - at_rest)
                    for name, at_rest in OPTIONAL.items()
                    if name in part and part[name].notna().any()
                },
            )
        )
    if not curves:
        raise ValueError(f"no attribute has {FEWEST} held-out samples without it to measure success by; take more")
    return curves


def _succeeding(curves: _Curves, values: np.ndarray, success: float) -> np.ndarray:
    """Values where the edit first succeeds as often as asked for; NaN where it never does."""
    reached = curves.success.max(axis=1) >= success
    return np.where(reached, first_reached(curves.success, values, success), np.nan)


def _precision(curves: _Curves, change: float) -> np.ndarray:
    """Effect at a change of the image, by the mean size of the changes of the other attributes; NaN without others."""
    leak = first_reached(curves.rms, curves.leak, change)  # 0 without others
    return curves.others * first_reached(curves.rms, curves.effect, change) / np.where(leak > 0, leak, np.nan)


def _mean(drawn: Iterable[np.ndarray]) -> np.ndarray:
    """Mean over attributes, of those that are known; NaN where none is."""
    values = np.array(list(drawn))
    known = np.isfinite(values)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(known, values, 0.0).sum(axis=0) / known.sum(axis=0)


def _chance(first: dict[str, np.ndarray], second: dict[str, np.ndarray], n: int) -> float:
    """Share of the draws in which the first is no higher than the second, over the attributes that both have.

    Where no draw has it so, by the distance from 0 in the draws' standard deviations (Student's t for n samples): the
    draws alone could give no value that is still small when corrected for many methods.
    """
    shared = [first[attribute] - second[attribute] for attribute in first if attribute in second]
    if not shared:
        return float("nan")
    gap, *gaps = _mean(shared)
    gaps = np.array(gaps)[np.isfinite(gaps)]
    below, spread = (gaps <= 0).sum(), gaps.std()
    # One more than the draws in each count: a p-value of 0 is none that draws can give.
    p = (1 + below) / (1 + len(gaps))
    return p if below or not spread else min(p, float(student.sf(gap / spread, n - 1)))


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
