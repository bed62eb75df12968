"""The mixing step: how far x_t is from its limit or from the image, and the timestep that a criterion reads off it.

A criterion is a curve over the visited timesteps and a rule that picks one of them. Intervals are those of `geometry`:
curve and rule are evaluated for half-samples, whose deviations from their own mean are those of the whole sample from
the truth.

Zhu et al. 2023 (BoundaryDiffusion) define the mixing step in analogy to the mixing time of a Markov chain and search it
automatically, but neither the formula nor the search is in the released code: the criteria are the workbench's own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy import stats

from workbench.analysis.intervals import CROSS_VALIDATED, QUANTILES
from workbench.analysis.probes import separabilities
from workbench.analysis.samples import check_labels, check_samples, half_samples, over_timesteps

STATISTICS = 64  # of one dimension each, of which a total variation is the mean

# From a curve (noisiest timestep first) to the position of the mixing step, the threshold, and whether it was met.
Rule = Callable[[np.ndarray], tuple[int, float, bool]]


@dataclass(frozen=True, eq=False)
class MixingStep:
    """A timestep that separates mixed from unmixed, and where it comes from.

    Attributes
    ----------
    t : int
        A visited timestep.
    interval : (int, int)
        95% interval of t, of visited timesteps.
    criterion : str
    curve : DataFrame
        Indexed by `t`, noisiest first: `value`, `low` and `high` (95% interval), and further measurements.
    threshold : float
        Value that the curve is compared with; of the criterion "edit" its maximum less a standard error.
    reached : bool
        Whether the curve meets the threshold at all, and a threshold below its maximum exceeds chance. If not, t is
        where it comes closest.
    quantity : str
        Meaning of `value`, with its unit.
    n : int
        Number of samples.
    alpha_bars : ndarray of shape (T,)
        The noise schedule of t.
    """

    t: int
    interval: tuple[int, int]
    criterion: str
    curve: pd.DataFrame = field(repr=False)
    threshold: float
    reached: bool
    quantity: str
    n: int
    alpha_bars: np.ndarray = field(repr=False)

    @property
    def log_snr(self) -> float:
        """log(alpha_bar / (1 - alpha_bar)) at t."""
        return float(log_snr(self.alpha_bars)[self.t])

    def on_schedule(self, alpha_bars: Sequence[float]) -> int:
        """The timestep of another noise schedule with the same log-SNR, or the nearest there is.

        What x_t shows of an image depends on the signal-to-noise ratio alone, so a mixing step is carried from one
        schedule to another at equal log-SNR, not at equal t.
        """
        return int(np.abs(log_snr(alpha_bars) - self.log_snr).argmin())

    def row(self) -> dict[str, object]:
        """For a table with one row per criterion."""
        low, high = self.interval
        row = {"criterion": self.criterion, "t": self.t, "low": low, "high": high, "log_snr": self.log_snr}
        return row | {name: getattr(self, name) for name in ("reached", "threshold", "quantity", "n")}

    def __repr__(self) -> str:
        low, high = self.interval
        missed = "" if self.reached else ", threshold not reached: the closest timestep"
        return (
            f"MixingStep(t={self.t} [{low}, {high}] by {self.criterion!r}, threshold {self.threshold:.3g}, "
            f"n={self.n}{missed})"
        )


def log_snr(alpha_bars: Sequence[float]) -> np.ndarray:
    """log(alpha_bar / (1 - alpha_bar)) of every timestep; shape (T,)."""
    a = np.asarray(alpha_bars, dtype=np.float64)
    return np.log(a) - np.log1p(-a)


def agreement(steps: Iterable[MixingStep]) -> pd.DataFrame:
    """Compare the results of the criteria.

    Parameters
    ----------
    steps : iterable of MixingStep
        Of different criteria.

    Returns
    -------
    DataFrame
        One row per criterion, as `MixingStep.row`, and `agrees_with`: the other criteria whose 95% intervals overlap.
    """
    steps, agreeing = list(steps), []
    for a in steps:
        others = [b for b in steps if b is not a and a.interval[0] <= b.interval[1] and b.interval[0] <= a.interval[1]]
        agreeing.append(", ".join(b.criterion for b in others))
    return pd.DataFrame([step.row() for step in steps]).set_index("criterion").assign(agrees_with=agreeing)


def stays(threshold: float | np.ndarray, *, above: bool = False, from_noise: bool = False) -> Rule:
    """The largest timestep from which on, down to the image, the curve stays at or below the threshold.

    With `above` at or above it; with `from_noise` the smallest timestep from which on, up to the noise, it does so.
    """

    def rule(values: np.ndarray) -> tuple[int, float, bool]:
        excess = threshold - values if above else values - threshold
        if from_noise:
            excess = excess[::-1]
        met = np.logical_and.accumulate((excess <= 0)[::-1])[::-1]
        i = int(met.argmax() if met.any() else excess.argmin())
        i = len(values) - 1 - i if from_noise else i
        return i, float(np.broadcast_to(threshold, values.shape)[i]), bool(met.any())

    return rule


def largest_near_best(tolerance: float, *, chance: float = 0.0) -> Rule:
    """The largest timestep at which the curve is within a tolerance of its maximum, which must exceed chance by it."""

    def rule(values: np.ndarray) -> tuple[int, float, bool]:
        level = float(values.max()) - tolerance
        return int((values >= level).argmax()), level, level > chance

    return rule


def read_off(
    timesteps: Sequence[int],
    curve: np.ndarray | Callable[[np.ndarray], np.ndarray],
    rule: Rule,
    *,
    alpha_bars: Sequence[float],
    criterion: str,
    quantity: str,
    n: int | None = None,
    more: Mapping[str, np.ndarray] | None = None,
    resamples: int = 200,
    seed: int = 0,
    widened: float = 1.0,
) -> MixingStep:
    """The mixing step of a curve over timesteps (noisiest first), with the intervals of both from half-samples.

    `curve` are values (timesteps, n), whose mean over samples is the curve, or a function of the positions of some of n
    samples. `more` are further columns. The deviations of the half-samples are multiplied by `widened`, where the curve
    varies by more than these show.
    """
    if isinstance(curve, np.ndarray):
        values_of, n = (lambda rows: curve[:, rows].mean(axis=1)), curve.shape[1]
    else:
        values_of = curve
    timesteps = np.asarray(timesteps)
    if len(timesteps) < 2:
        raise ValueError(f"{len(timesteps)} timestep given where a curve needs at least 2")
    values = values_of(np.arange(n))
    halves = np.stack([values_of(rows) for rows in half_samples(n, resamples, np.random.default_rng(seed))])
    drawn = values + widened * (halves - halves.mean(axis=0))
    low, high = np.quantile(drawn, QUANTILES, axis=0)
    found = timesteps[[rule(each)[0] for each in drawn]]
    i, threshold, reached = rule(values)
    table = pd.DataFrame({"value": values, "low": low, "high": high, **(more or {})}, index=timesteps)
    return MixingStep(
        t=int(timesteps[i]),
        interval=tuple(int(t) for t in np.quantile(found, QUANTILES, method="nearest")),
        criterion=criterion,
        curve=table.rename_axis("t"),
        threshold=threshold,
        reached=reached,
        quantity=quantity,
        n=n,
        alpha_bars=np.asarray(alpha_bars),
    )


def radius_gap(
    sampled: object,
    inverted: object,
    alpha_bars: Sequence[float],
    *,
    tolerance: float = 0.005,
    resamples: int = 200,
    seed: int = 0,
) -> MixingStep:
    """The largest timestep from which on, down to the image, sampled and inverted x_t have the same mean radius.

    The gap is |R_sampled(t) - R_inverted(t)| / sqrt(d), R the mean length of the samples; it may be `tolerance` and two
    standard errors of the difference. Zhu et al. observe that inverted x_T lie inside of the shell of sampled ones, and
    look for the timestep where that does not yet hurt.

    Parameters
    ----------
    sampled, inverted : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
        At the same timesteps, noisiest first. Of two numbers of samples the smaller is used. Samples at equal positions
        are kept together by the half-samples, so pairs may (and should) be images and their own inversions.
    alpha_bars : array of shape (T,)
    tolerance : float, default 0.005
        As a share of sqrt(d).
    resamples, seed
        As in `read_off`.

    Returns
    -------
    MixingStep
        Its curve has the columns `sampled` and `inverted`: mean radii over sqrt(d).

    Raises
    ------
    ValueError
        If the timesteps differ, or a value is not finite.
    """
    radii, visited = [], []
    for ensemble in (sampled, inverted):
        by_t = {t: np.linalg.norm(x, axis=1) / np.sqrt(x.shape[1]) for t, x in over_timesteps(ensemble, samples=3)}
        radii.append(np.stack(list(by_t.values())))
        visited.append(list(by_t))
    if visited[0] != visited[1]:
        first, second = (f"{each[:3]}..." for each in visited)
        raise ValueError(f"the ensembles visit different timesteps, {first} and {second}; make both alike")
    n = min(each.shape[1] for each in radii)
    a, b = (each[:, :n] for each in radii)
    paired = (a - b).std(axis=1, ddof=1) / np.sqrt(n)
    return read_off(
        visited[0],
        lambda rows: np.abs(a[:, rows].mean(axis=1) - b[:, rows].mean(axis=1)),
        stays(tolerance + 2 * paired),
        n=n,
        alpha_bars=alpha_bars,
        criterion="radius_gap",
        quantity="radius gap / sqrt(d)",
        more={"sampled": a.mean(axis=1), "inverted": b.mean(axis=1)},
        resamples=resamples,
        seed=seed,
    )


def total_variation(
    ensemble: object,
    alpha_bars: Sequence[float],
    *,
    x0: object,
    labels: object = None,
    level: float = 0.25,
    resamples: int = 50,
    seed: int = 0,
) -> MixingStep:
    """The smallest timestep from which on, up to the noise, x_t is close to N(0, I) in one-dimensional statistics.

    Total variation 1/2 integral |p - q| is the distance of the mixing time of Markov chains, with 1/4 as the customary
    level. Between distributions in thousands of dimensions it is near 1 almost up to T (`radius_total_variation`), so
    here it is the mean over 64 statistics of one dimension each: the radius, the projections on differences of class
    means (at most 8), on the 15 principal components of the clean images, and random ones. Each is estimated from a
    histogram against the exact law of N(0, I), cross-fitted so that it is 0 on average for samples of that law.

    Parameters
    ----------
    ensemble : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
        Noisiest first.
    alpha_bars : array of shape (T,)
    x0 : array of shape (n, ...)
        The clean images, for the directions.
    labels : array of shape (n,), or mapping or DataFrame of such, optional
        Of two values each, for the differences of class means.
    level : float, default 0.25
    resamples : int, default 50
    seed : int, default 0
        Of the random directions and the half-samples.

    Returns
    -------
    MixingStep

    Raises
    ------
    ValueError
        If labels are constant, or a value is not finite.
    """
    x0 = check_samples(x0, fewest=8)
    rng = np.random.default_rng(seed)
    directions = _directions(x0, labels, STATISTICS - 1, rng)
    d = x0.shape[1]

    def reduce(x: np.ndarray) -> np.ndarray:
        """Statistics whose law under N(0, I) is uniform on [0, 1]: (n, statistics)."""
        radius = stats.chi.cdf(np.linalg.norm(x, axis=1), d)[:, None]
        return np.concatenate([radius, stats.norm.cdf(x @ directions.T)], axis=1)

    reduced = {t: reduce(x) for t, x in over_timesteps(ensemble, samples=3)}
    return read_off(
        list(reduced),
        lambda rows: np.array([_tv_uniform(u[rows]).mean() for u in reduced.values()]),
        stays(level, from_noise=True),
        n=len(next(iter(reduced.values()))),
        alpha_bars=alpha_bars,
        criterion="tv",
        quantity="total variation to N(0, I), mean of 1-D statistics",
        resamples=resamples,
        seed=seed,
    )


def separability_step(
    x_by_t: object,
    labels: object,
    alpha_bars: Sequence[float],
    *,
    errors: float = 1.0,
    folds: int = 5,
    resamples: int = 200,
    seed: int = 0,
) -> MixingStep:
    """The largest timestep at which a linear probe still finds the attributes as well as anywhere.

    The curve is the held-out balanced accuracy of `probes.separabilities`, mean over attributes; "as well" is `errors`
    standard errors of the best. Up to there the semantics are decided, and the decoder has most freedom left. It tells
    something for x_t of stochastic runs and of forward diffusion, where noise hides the attribute. A deterministic run
    (eta 0, DDIM inversion) is a smooth map of the image, whose attributes can stay separable up to T.

    The half-samples of the intervals keep the predictions of the probes, which are not fitted again; that these were
    learned from the same samples is allowed for by widening the intervals (`intervals.CROSS_VALIDATED`). The standard
    error of the rule is that of the predictions alone.

    Parameters
    ----------
    x_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
        x_t or h_t, noisiest first.
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays
    alpha_bars : array of shape (T,)
    errors : float, default 1
    folds : int, default 5
    resamples, seed
        As in `read_off`.

    Returns
    -------
    MixingStep
        Its curve has a column for each attribute, and `chance`.

    Raises
    ------
    ValueError
        If labels are constant or missing, a group is smaller than `folds`, there is one timestep alone, or a value is
        not finite.
    """
    timesteps, correct = [], []
    for t, x in over_timesteps(x_by_t, progress="separability"):
        timesteps.append(t)
        correct.append([probe.correct for probe in separabilities(x, labels, folds=folds, seed=seed).values()])
    correct = np.array(correct, dtype=float)  # timestep, attribute, sample
    by_name = check_labels(labels, correct.shape[2])
    groups = {name: np.unique(values, return_inverse=True)[1] for name, values in by_name.items()}
    weights = np.stack([_balanced(values) for values in groups.values()])
    n = correct.shape[2]

    def accuracies(rows: np.ndarray) -> np.ndarray:
        w = weights[:, rows]
        return (correct[:, :, rows] * w).sum(axis=2) / w.sum(axis=1)

    curves, chance = accuracies(np.arange(n)), float(np.mean([1 / len(np.unique(v)) for v in groups.values()]))
    best = curves.mean(axis=1).argmax()
    missed = weights * (correct[best] - _group_means(correct[best], groups.values()))
    standard_error = max(float(np.sqrt((missed.mean(axis=0) ** 2).sum())), 1 / n)

    return read_off(
        timesteps,
        lambda rows: accuracies(rows).mean(axis=1),
        largest_near_best(errors * standard_error, chance=chance),
        n=n,
        alpha_bars=alpha_bars,
        criterion="separability",
        quantity="balanced accuracy of a linear probe",
        more=dict(zip(groups, curves.T, strict=True)) | {"chance": np.full(len(timesteps), chance)},
        resamples=resamples,
        seed=seed,
        widened=CROSS_VALIDATED,
    )


def kl_to_limit(alpha_bar: float, *, mean_square: float, d: int) -> float:
    """KL(q(x_t | x_0) || N(0, I)) in nats: 1/2 [alpha_bar (|x_0|^2 - d) - d ln(1 - alpha_bar)].

    `mean_square` is |x_0|^2 / d for an image of d values. Pinsker's inequality sqrt(KL / 2) bounds the total variation,
    and says nothing where it exceeds 1.
    """
    return 0.5 * d * (alpha_bar * (mean_square - 1.0) - np.log1p(-alpha_bar))


def radius_total_variation(alpha_bar: float, *, d: int) -> float:
    """Total variation between the law of |x_t| and that of |N(0, I)|, for images of mean square 0.3 +- 0.1.

    A lower bound of the total variation of x_t itself. |x_t|^2 / (1 - alpha_bar) of an image is non-central chi-squared
    with d degrees of freedom; its root is taken as normal, which it is up to 1/d; |x_0|^2 / d as normal and cut
    at 0.
    """
    quantiles = (np.arange(400) + 0.5) / 400
    m2 = np.maximum(stats.norm.ppf(quantiles, 0.3, 0.1), 0.0)
    noise, signal = 1.0 - alpha_bar, alpha_bar * m2 * d
    mean_of_squares, variance = noise * d + signal, 2 * noise**2 * d + 4 * noise * signal
    radius = np.sqrt(mean_of_squares - variance / (4 * mean_of_squares))
    sd = np.sqrt(variance / (4 * mean_of_squares))
    limit, limit_sd = np.sqrt(d - 0.5), np.sqrt(0.5)
    ends = [min(radius.min() - 6 * sd.max(), limit - 6), max(radius.max() + 6 * sd.max(), limit + 6)]
    r = np.arange(*ends, min(sd.min(), limit_sd) / 30)
    law = np.mean([stats.norm.pdf(r, mean, deviation) for mean, deviation in zip(radius, sd, strict=True)], axis=0)
    return float(0.5 * np.trapezoid(np.abs(law - stats.norm.pdf(r, limit, limit_sd)), r))


def _directions(x0: np.ndarray, labels: object, k: int, rng: np.random.Generator) -> np.ndarray:
    """Unit directions of the one-dimensional statistics: (k, d)."""
    found = []
    if labels is not None:
        for values in list(check_labels(labels, len(x0)).values())[:8]:
            low, high = (x0[values == group].mean(axis=0) for group in np.unique(values)[[0, -1]])
            found.append(high - low)
    centred = x0 - x0.mean(axis=0)
    components = min(max(k // 4, 1), len(x0) - 1, x0.shape[1], k - len(found))
    found.extend(np.linalg.svd(centred, full_matrices=False)[2][:components])
    found.extend(rng.standard_normal((k - len(found), x0.shape[1])))
    directions = np.stack(found)
    return (directions / np.linalg.norm(directions, axis=1, keepdims=True)).astype(np.float32)


def _tv_uniform(u: np.ndarray) -> np.ndarray:
    """Total variation of every column of u to the uniform law on [0, 1]: (columns,)."""
    even, odd = (_histogram(half, _bins(len(u))) for half in (u[::2], u[1::2]))
    return _cross_fitted(even - 1 / even.shape[1], odd - 1 / odd.shape[1])


def _cross_fitted(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """sup_A (P(A) - Q(A)) from two halves of the samples: the bins of A are chosen on one and counted on the other.

    1/2 sum |P - Q| of one histogram is positive by noise alone; this is 0 on average where P is Q.
    """
    return ((np.sign(a) * b).sum(axis=1) + (np.sign(b) * a).sum(axis=1)) / 4


def _bins(n: int) -> int:
    """Bins of [0, 1] for each half of n samples, of the width of Freedman & Diaconis for a uniform law.

    That is 2 IQR m^(-1/3) of m samples, and the IQR is 1/2.
    """
    return max(2, round((n // 2) ** (1 / 3)))


def _histogram(u: np.ndarray, bins: int) -> np.ndarray:
    """Shares of equal bins of [0, 1], for every column of u: (columns, bins)."""
    index = np.minimum((u * bins).astype(int), bins - 1) + bins * np.arange(u.shape[1])
    return np.bincount(index.ravel(), minlength=bins * u.shape[1]).reshape(-1, bins) / len(u)


def _balanced(groups: np.ndarray) -> np.ndarray:
    """Weights that give every group the same share; they sum to 1."""
    sizes = np.bincount(groups)
    return 1 / (len(sizes) * sizes[groups])


def _group_means(values: np.ndarray, groups: Iterable[np.ndarray]) -> np.ndarray:
    """Mean of each sample's own group, for every row of values and its grouping: (rows, n)."""
    return np.stack([(np.bincount(g, row) / np.bincount(g))[g] for row, g in zip(values, groups, strict=True)])
