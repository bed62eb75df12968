"""Dimension of h-space by three estimators: participation ratio, TwoNN and Levina-Bickel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.samples import (
    centre,
    check_neighbours,
    check_samples,
    distances_of,
    gram,
    half_interval,
    half_samples,
    over_timesteps,
)

FEWEST = 20  # samples that a dimension takes


def dimensions(h: Any, *, neighbours: int = 10, resamples: int = 50, seed: int = 0) -> pd.DataFrame:
    """Dimension of one timestep's h by three estimators: participation ratio, TwoNN and Levina-Bickel.

    Parameters
    ----------
    h : array of shape (n, ...)
        At least `FEWEST` samples, none of them twice.
    neighbours : int, default 10
        Of Levina-Bickel.
    resamples : int, default 50
        Half-samples for the intervals.
    seed : int, default 0

    Returns
    -------
    DataFrame
        One row an estimator: `estimator`, `value`, `low`, `high` (95% interval) and `n`.

    Raises
    ------
    ValueError
        If two samples are the same, a value is not finite, or there are too few samples or too many neighbours.
    """
    h = check_samples(h, fewest=FEWEST)
    n = len(h)
    check_neighbours(neighbours, fewest=2, most=n // 2 - 1)
    products = gram(h)
    distances = distances_of(products)

    def measure(rows: np.ndarray) -> dict[str, float]:
        block = np.ix_(rows, rows)
        return {
            "participation ratio": participation_ratio(centre(products[block])),
            "TwoNN": two_nn(distances[block]),
            "Levina-Bickel": levina_bickel(distances[block], neighbours),
        }

    values = measure(np.arange(n))
    halves = [measure(rows) for rows in half_samples(n, resamples, np.random.default_rng(seed))]
    rows = [(name, value, *half_interval(value, [half[name] for half in halves]), n) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["estimator", "value", "low", "high", "n"])


def dimensions_over_time(h_by_t: Any, **options: Any) -> pd.DataFrame:
    """`dimensions` at every timestep.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
    **options
        Of `dimensions`.

    Returns
    -------
    DataFrame
        One row per timestep and estimator: `t`, `estimator`, `value`, `low`, `high`, `n`.
    """
    by_t = over_timesteps(h_by_t, samples=FEWEST, progress="dimension")
    tables = {t: dimensions(h, **options) for t, h in by_t}
    return pd.concat(tables, names=["t"]).droplevel(1).reset_index()


def participation_ratio(products: np.ndarray) -> float:
    """Number of directions that carry the variance, (tr S)^2 / tr S^2 of the covariance S, from centred products.

    Of n samples the plain ratio can't exceed n - 1, and it underestimates by far where n is not much larger than it.
    So both traces are replaced by their unbiased estimates under a Gaussian (Srivastava 2005): with m = n - 1, tr S^2
    by m^2 / ((m - 1)(m + 2)) (tr S^2 - (tr S)^2 / m), and (tr S)^2 by itself less 2/m of that.
    It is infinite where the samples can't tell the estimate of tr S^2 from 0.
    """
    m = len(products) - 1
    trace, squares = np.trace(products) / m, (products**2).sum() / m**2
    if trace <= 0:
        raise ValueError("all samples are the same; they have no dimension")
    top = trace**2
    squares = m**2 / ((m - 1) * (m + 2)) * (squares - top / m)
    top -= 2 * squares / m
    return float(top / squares) if squares > 0 else float("inf")


def two_nn(distances: np.ndarray) -> float:
    """Intrinsic dimension by the two nearest neighbours (Facco et al. 2017, TwoNN), from distances.

    The ratio mu of the distances to the second and the first neighbour has P(mu > x) = x^-d whatever the density, so
    d is the slope of -log(1 - F(mu)) against log(mu), fitted through the origin without the tenth of largest
    ratios. Where d is large it underestimates, unless n grows exponentially with d.
    """
    nearest = _nearest(distances, 2)
    n = len(nearest)
    log_mu = np.sort(np.log(nearest[:, 1] / nearest[:, 0]))
    kept = int(0.9 * n)
    cumulative = np.arange(1, kept + 1) / (n + 1)
    return float(log_mu[:kept] @ -np.log(1 - cumulative) / (log_mu[:kept] ** 2).sum())


def levina_bickel(distances: np.ndarray, neighbours: int = 10) -> float:
    """Intrinsic dimension by maximum likelihood (Levina & Bickel 2004), averaged as MacKay & Ghahramani (2005) do.

    1/d is the mean over samples and their neighbours j < k of log(T_k / T_j), T_j the distance to the j-th neighbour
    (Levina & Bickel eq. 8 gives d of one sample; averaging the inverses instead of d removes most of its bias).
    """
    nearest = _nearest(distances, neighbours)
    return float(1.0 / np.log(nearest[:, -1:] / nearest[:, :-1]).mean())


def _nearest(distances: np.ndarray, k: int) -> np.ndarray:
    """Distances to the k nearest neighbours, ascending: (n, k)."""
    others = distances.copy()
    np.fill_diagonal(others, np.inf)
    nearest = np.sort(np.partition(others, k - 1, axis=1)[:, :k], axis=1)
    same = nearest[:, 0] <= 1e-6 * np.median(distances)
    if same.any():
        i = int(np.argmax(same))
        raise ValueError(f"samples {i} and {int(np.argmin(others[i]))} are the same; leave one of them out")
    return nearest
