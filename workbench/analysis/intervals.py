"""Estimates with 95% intervals, of shares (Wilson), means and ratios (bootstrap); Holm's rule for several tests."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import NormalDist

import numpy as np
from scipy import stats

LEVEL = 0.95
QUANTILES = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)  # between which an interval lies

# How much wider the interval of a cross-validated share is than that of as many independent trials. The folds share
# most of their training samples, so their errors are correlated. Measured as the deviation of the accuracy from that of
# the machine fitted to all samples, for two planted Gaussian classes of 30 to 100 samples each: 1.1 to 1.4 times that
# of independent trials, least for differences of means and most for support vectors.
CROSS_VALIDATED = 1.3


@dataclass(frozen=True)
class Estimate:
    """A measured value with its 95% interval.

    Attributes
    ----------
    value, low, high : float
        The ends are NaN if there are too few samples for an interval.
    n : int
        Number of samples.
    """

    value: float
    low: float
    high: float
    n: int

    def __repr__(self) -> str:
        return f"Estimate({self.value:.4g}, {self.low:.4g}..{self.high:.4g}, n={self.n})"


def share_of(share: float, n: int, *, cross_validated: bool = False) -> Estimate:
    """A share of n trials with its Wilson interval, widened where cross-validation predicted the trials."""
    return Estimate(share, *wilson_interval(share, n / CROSS_VALIDATED**2 if cross_validated else n), n)


def mean_of(
    values: np.ndarray | Sequence[float], *, bounds: tuple[float, float] = (-np.inf, np.inf), seed: int = 0
) -> Estimate:
    """Mean of one value a sample with its `mean_interval`; leaves out samples whose value is not finite.

    `bounds` are the lowest and highest value that is possible, such as -1 and 1 of a correlation. The mean of booleans
    is their share, with Wilson's interval.
    """
    values = np.asarray(values).ravel()
    if values.dtype == bool and len(values):
        return share_of(float(values.mean()), len(values))
    values = values.astype(float)
    values = values[np.isfinite(values)]
    mean = float(values.mean()) if len(values) else float("nan")
    return Estimate(mean, *mean_interval(values, bounds=bounds, seed=seed), len(values))


def ratio_of(above: np.ndarray | Sequence[float], below: np.ndarray | Sequence[float]) -> Estimate:
    """Ratio of two means over the same samples, with its bootstrap interval."""
    a, b = (np.asarray(values, dtype=float).ravel() for values in (above, below))
    ratio, low, high = a.mean() / b.mean(), float("nan"), float("nan")
    if len(a) > 1:
        counts = bootstrap_counts(len(a), resamples=1000, seed=0)
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = bootstrap_interval(ratio, (counts @ a) / (counts @ b), len(a))
    return Estimate(float(ratio), float(low), float(high), len(a))


def difference_of(one: Estimate, other: Estimate) -> Estimate:
    """Difference of two independent estimates: errors add in squares.

    Estimates of the same samples rise and fall together: this is too wide for them; see `paired_difference_of`.
    """
    gap = one.value - other.value
    down = np.hypot(one.value - one.low, other.high - other.value)
    up = np.hypot(one.high - one.value, other.value - other.low)
    return Estimate(float(gap), float(gap - down), float(gap + up), min(one.n, other.n))


def paired_difference_of(one: np.ndarray | Sequence[float], other: np.ndarray | Sequence[float]) -> Estimate:
    """Difference of two means over the same samples, each with two values: errors that both share cancel.

    Of booleans it is the difference of two shares. Its interval is Wilson's, carried over to a range of -1 to 1, with
    the variance of the samples' differences; where no sample differs it is Tango's (1998). Other values have the
    interval of `mean_of`.
    """
    one, other = np.asarray(one).ravel(), np.asarray(other).ravel()
    gaps = one.astype(float) - other.astype(float)
    if not (one.dtype == other.dtype == bool and len(one)):
        return mean_of(gaps)
    gap, n = float(gaps.mean()), len(gaps)
    low, high = _wilson(gap, n, gaps.var() / n, bounds=(-1.0, 1.0))
    return Estimate(gap, float(low), float(high), n)


def mean_of_draws(values: np.ndarray | Sequence[float], share: float) -> Estimate:
    """Mean over draws from one pool of samples, each of this share of the pool, with its interval for other pools.

    Two draws have samples in common, so that their mean varies more from pool to pool than that of as many independent
    ones: by 1 / draws + share / (1 - share) in place of 1 / draws of the variance between the draws (Nadeau & Bengio
    2003, of repeated splits into training and test samples).
    """
    found = mean_of(values)
    wider = (1.0 + found.n * share / (1.0 - share)) ** 0.5
    return replace(
        found,
        low=found.value + wider * (found.low - found.value),
        high=found.value + wider * (found.high - found.value),
    )


def bootstrap_counts(n: int, *, resamples: int, seed: int) -> np.ndarray:
    """How often each of n samples is drawn when n are drawn with replacement: ints of shape (resamples, n)."""
    drawn = np.random.default_rng(seed).integers(n, size=(resamples, n))
    cells = drawn + n * np.arange(resamples)[:, None]
    return np.bincount(cells.ravel(), minlength=n * resamples).reshape(resamples, n)


def bootstrap_interval(
    value: float | np.ndarray,
    draws: np.ndarray,
    n: int,
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    share: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """95% interval of a statistic of n samples, from its values for the samples drawn again.

    The quantiles of the draws are moved away from the value by what a bootstrap of n samples lacks: it divides by n
    where the variance takes n - 1, and has the quantiles of a normal where those of t with n - 1 degrees are due
    (Hesterberg 2015, section 3.2).

    Where all samples have an attribute, or none, all draws are the same, which does not say that others would be. So
    the interval of a `share` is Wilson's with the variance of the draws in place of p (1 - p) / n. Of n trials it is
    Wilson's own; of the difference of two shares of the same samples that never differ it is Tango's (1998).

    Parameters
    ----------
    value : float or array of shape (...)
    draws : array of shape (resamples, ...)
        Those that are not finite are left out.
    n : int
        Number of samples.
    bounds : (float, float)
        Lowest and highest value that is possible; the interval ends there.
    share : bool, default False
        The statistic is a mean over samples each of which is at one of the bounds, or between them: a share, of bounds
        0 and 1, or a difference of two, of bounds -1 and 1.

    Returns
    -------
    low, high : array of shape (...)
        The value lies between them. NaN of fewer than two samples, or without a finite draw.
    """
    value, draws = np.asarray(value, dtype=float), np.asarray(draws, dtype=float)
    if n < 2:
        return np.full(value.shape, np.nan), np.full(value.shape, np.nan)
    draws = np.where(np.isfinite(draws), draws, np.nan)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # without a finite draw
        if share:
            return _wilson(value, n, np.nanvar(draws, axis=0), bounds=bounds)
        wider = np.sqrt(n / (n - 1)) * stats.t.ppf(QUANTILES[1], n - 1) / stats.norm.ppf(QUANTILES[1])
        low, high = value + wider * np.nanquantile(draws - value, QUANTILES, axis=0)
    return np.minimum(value, low.clip(*bounds)), np.maximum(value, high.clip(*bounds))


def mean_interval(
    values: np.ndarray | Sequence[float],
    *,
    bounds: tuple[float, float] = (-np.inf, np.inf),
    resamples: int = 1000,
    seed: int = 0,
) -> tuple[float, float]:
    """95% `bootstrap_interval` of a mean of values that lie within the bounds; (NaN, NaN) of fewer than two values."""
    values = np.asarray(values, dtype=float)
    n = len(values)
    if n < 2:
        return float("nan"), float("nan")
    draws = bootstrap_counts(n, resamples=resamples, seed=seed) @ values / n
    low, high = bootstrap_interval(values.mean(), draws, n, bounds=bounds)
    return float(low), float(high)


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95% interval of a share of n trials (Wilson 1927); n may be an effective number, not whole."""
    low, high = _wilson(share, n, share * (1 - share) / n, bounds=(0.0, 1.0))
    return float(low), float(high)


def _wilson(value, n, variance, *, bounds: tuple[float, float]):
    """Ends of Wilson's interval of a share of n trials with this variance, carried over to these bounds."""
    z, width = NormalDist().inv_cdf(QUANTILES[1]), bounds[1] - bounds[0]
    share, variance = (value - bounds[0]) / width, variance / width**2
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (variance + z**2 / (4 * n**2)) ** 0.5
    low, high = (np.clip(bounds[0] + width * end, *bounds) for end in (centre - half, centre + half))
    # The value lies inside in exact arithmetic; rounding must not put 1 above the upper end, nor 0 below the lower.
    return np.minimum(value, low), np.maximum(value, high)


def holm(p_values: np.ndarray | Sequence[float]) -> np.ndarray:
    """p-values of several tests, adjusted to bound the chance of any false rejection (Holm 1979); NaN of no test."""
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")[: np.isfinite(p).sum()]
    adjusted = np.full_like(p, np.nan)
    adjusted[order] = np.maximum.accumulate(p[order] * np.arange(len(order), 0, -1)).clip(max=1.0)
    return adjusted
