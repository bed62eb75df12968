"""Latents x_t and h_t as ensembles and as trajectories: shells, angles, normality; turns of steps.

The ensembles to compare are *sampled* (from x_T ~ N(0, I)), *inverted* (DDIM inversion of images, whose result depends
on the number of steps) and *forward-diffused*; see Zhu et al. 2023 (BoundaryDiffusion) for the claims about them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import gammaln

from workbench.analysis.image_metrics import cosine_similarity
from workbench.analysis.samples import check_samples, distances_of, gram, over_timesteps

TRIPLES = 10_000


def gaussian_reference(n: int, d: int) -> dict[str, float]:
    """Expected `latent_statistics` of n samples of N(0, I_d), d > 10 or so.

    Parameters
    ----------
    n : int
    d : int

    Returns
    -------
    dict of str -> float
        radius (exact: sqrt(2) Gamma((d+1)/2) / Gamma(d/2), about sqrt(d - 1/2)), distance (sqrt(2) times the radius,
        exact), angle (90 degrees), vertex_angle (60 degrees), centroid (sqrt(d / n)), coordinate_mean (0),
        coordinate_variance (1), "KS tests failed" (0) and autocorrelation (0).
    """
    radius = float(np.sqrt(2.0) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)))
    return {
        "radius": radius,
        "distance": float(np.sqrt(2.0) * radius),
        "angle": 90.0,
        "vertex_angle": 60.0,
        "centroid": float(np.sqrt(d / n)),
        "coordinate_mean": 0.0,
        "coordinate_variance": 1.0,
        "KS tests failed": 0.0,
        "autocorrelation": 0.0,
    }


def latent_statistics(ensemble: Any, *, tests: int = 64, seed: int = 0) -> pd.Series:
    """Radii, distances, angles and normality of an ensemble of x_t or h_t: n points in d dimensions.

    Parameters
    ----------
    ensemble : array of shape (n, d) or (n, C, H, W)
        At least 3 samples. An image-shaped one gets the lag-1 autocorrelation too.
    tests : int, default 64
        Number of projections that are tested against N(0, 1); at most d.
    seed : int, default 0

    Returns
    -------
    Series
        Named as in `gaussian_reference`.

        - `radius`: mean length of the samples.
        - `distance`: mean of pairs.
        - `angle`: mean between pairs, seen from the origin; degrees.
        - `vertex_angle`: mean at the first corner of 10,000 random triples of samples; degrees.
        - `centroid`: the length of the mean sample.
        - `coordinate_mean`, `coordinate_variance`: over all samples and coordinates.
        - `KS tests failed`: share of projections on random unit vectors that a Kolmogorov-Smirnov test distinguishes
          from N(0, 1) at level 0.05, corrected by Bonferroni.
        - `autocorrelation`: of neighbouring pixels (lag 1, mean of both directions), of an image-shaped ensemble.

    Raises
    ------
    ValueError
        If there are fewer than 3 samples, one is 0, or a value is not finite.
    """
    images = np.asarray(ensemble)
    x = check_samples(images, fewest=3)
    n, d = x.shape
    rng = np.random.default_rng(seed)
    products = gram(x, centred=False)
    radii = np.sqrt(np.diag(products))
    if (radii == 0).any():
        raise ValueError(f"sample {int(np.argmin(radii))} is 0 throughout; it has no angle, leave it out")
    angles = np.degrees(np.arccos(np.clip(products / np.outer(radii, radii), -1.0, 1.0)))
    pairs, mean = np.triu_indices(n, k=1), x.mean(axis=0, dtype=np.float64)
    values = {
        "radius": radii.mean(),
        "distance": distances_of(products)[pairs].mean(),
        "angle": angles[pairs].mean(),
        "vertex_angle": _vertex_angles(products, TRIPLES, rng).mean(),
        "centroid": np.linalg.norm(mean),
        "coordinate_mean": mean.mean(),
        "coordinate_variance": (radii**2).mean() / d - mean.mean() ** 2,
        "KS tests failed": _tests_failed(x, min(tests, d), rng),
    }
    if images.ndim == 4:
        values["autocorrelation"] = _autocorrelation(images)
    return pd.Series(values, dtype=float)


def _vertex_angles(products: np.ndarray, triples: int, rng: np.random.Generator) -> np.ndarray:
    """Angles at i between j - i and k - i, degrees, for random i, j, k that differ."""
    n = len(products)
    i = rng.integers(n, size=triples)
    j = (i + rng.integers(1, n, size=triples)) % n
    k = rng.integers(n - 2, size=triples)
    for other in (np.minimum(i, j), np.maximum(i, j)):
        k += k >= other
    g = products
    inner = g[j, k] - g[i, j] - g[i, k] + g[i, i]
    lengths = np.sqrt((g[i, i] + g[j, j] - 2 * g[i, j]) * (g[i, i] + g[k, k] - 2 * g[i, k]))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = inner / lengths
    return np.degrees(np.arccos(np.clip(cosines[np.isfinite(cosines)], -1.0, 1.0)))


def _tests_failed(x: np.ndarray, tests: int, rng: np.random.Generator) -> float:
    """Share of projections on random unit vectors that are not N(0, 1)."""
    directions = rng.standard_normal((tests, x.shape[1]), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    projections = (x @ directions.T).astype(np.float64)
    p = np.array([stats.kstest(projection, "norm").pvalue for projection in projections.T])
    return float((p * tests < 0.05).mean())


def _autocorrelation(images: np.ndarray) -> float:
    """Correlation of horizontally and vertically neighbouring pixels, mean of both, over all samples and channels."""
    x = images.astype(np.float64) - images.mean(dtype=np.float64)
    down = (x[:, :, 1:] * x[:, :, :-1]).mean()
    across = (x[..., 1:] * x[..., :-1]).mean()
    return float((down + across) / 2 / (x**2).mean())


def step_geometry(by_t: Any) -> tuple[np.ndarray, np.ndarray]:
    """Turns and cosines of the steps of n trajectories of x_t or h_t, in one pass over S states.

    Parameters
    ----------
    by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
        At least 3 states, in the order in which they are visited.

    Returns
    -------
    angles : ndarray of shape (S-2, n), degrees in [0, 180]
        Between a step and the next; 0 is straight on. NaN where a step has length 0.
    centred_cosines : ndarray of shape (S-1, n), in [-1, 1]
        Between a state and the next, after the mean of the samples at each is taken off: what the samples have in
        common makes the plain cosine large.

    Raises
    ------
    ValueError
        If there are fewer than 3 states, their shapes differ, or a value is not finite.
    """
    angles, cosines = [], []
    state = step = None
    for _, x in over_timesteps(by_t, fewest=3, samples=1):
        before, state = state, x.astype(np.float64)
        if before is None:
            continue
        step_before, step = step, state - before
        cosines.append(cosine_similarity(before - before.mean(axis=0), state - state.mean(axis=0)))
        if step_before is not None:
            angles.append(np.degrees(np.arccos(np.clip(cosine_similarity(step_before, step), -1.0, 1.0))))
    return np.stack(angles), np.stack(cosines)
