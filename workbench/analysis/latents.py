"""Latents x_t and h_t as ensembles and as trajectories: shells, angles, normality; lengths and turns of steps.

The ensembles to compare are *sampled* (from x_T ~ N(0, I)), *inverted* (DDIM inversion of images, whose result depends
on the number of steps) and *forward-diffused*; see Zhu et al. 2023 (BoundaryDiffusion) for the claims about them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from scipy.special import gammaln

from workbench.analysis.samples import check_samples, distances_of, gram, over_timesteps, pairs_of
from workbench.analysis.spectra import marginal_radius

RADIUS_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


def gaussian_reference(n: int, d: int) -> dict[str, float]:
    """Expected `latent_statistics` of n samples of N(0, I_d), d > 10 or so.

    Parameters
    ----------
    n : int
    d : int

    Returns
    -------
    dict of str -> float
        radius (exact: sqrt(2) Gamma((d+1)/2) / Gamma(d/2), about sqrt(d - 1/2)) and its sd (about 0.707, whatever d),
        distance (sqrt(2) times the radius, exact) and its sd (1), angle (90 degrees) and its sd
        (about 57.3 / sqrt(d) degrees), vertex_angle (60 degrees), centroid (sqrt(d / n)), autocorrelation (0),
        coordinate_mean (0) and coordinate_variance (1).
    """
    radius = float(np.sqrt(2.0) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)))
    return {
        "radius": radius,
        "radius_sd": float(np.sqrt(d - radius**2)),
        "distance": float(np.sqrt(2.0) * radius),
        "distance_sd": float(np.sqrt(2.0 * (d - radius**2))),
        "angle": 90.0,
        "angle_sd": float(np.degrees(1.0 / np.sqrt(d))),
        "vertex_angle": 60.0,
        "centroid": float(np.sqrt(d / n)),
        "coordinate_mean": 0.0,
        "coordinate_variance": 1.0,
        "autocorrelation": 0.0,
    }


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Geometry and distribution of an ensemble of n points in d dimensions.

    Attributes
    ----------
    values : Series
        - `n`, `d`
        - `radius`, `radius_sd`, `radius_se`, and quantiles `radius_q05` to `radius_q95`: lengths of the samples.
        - `reference_radius` and `radius_ratio`, the mean radius over it, where a reference was given.
        - `distance`, `distance_sd`, `distance_se`: of pairs. Standard errors of pair means are jackknifed over samples,
          since pairs are not independent.
        - `angle`, `angle_sd`, `angle_se`: between pairs, seen from the origin; degrees.
        - `vertex_angle`, `vertex_angle_sd`: at the first corner of random triples of samples; degrees.
        - `centroid`, the length of the mean sample, and `centroid_expected`, what it would be for independent samples
          around the origin: root mean square radius / sqrt(n).
        - `coordinate_mean`, `coordinate_variance`: over all samples and coordinates.
        - `ks_coordinates`, `ks_projections`: mean statistics of the tests below, with their smallest `..._p`.
        - `autocorrelation`: of neighbouring pixels (lag 1, mean of both directions), of an image-shaped ensemble.
    ks_coordinates, ks_projections : DataFrame
        Kolmogorov-Smirnov tests against N(0, 1) of random coordinates (`coordinate`) and of projections on random unit
        vectors (`projection`): `statistic` and `p`, corrected by Bonferroni.
    """

    values: pd.Series
    ks_coordinates: pd.DataFrame = field(repr=False)
    ks_projections: pd.DataFrame = field(repr=False)

    def table(self) -> pd.DataFrame:
        """The numbers beside those of N(0, I_d): columns `value` and `gaussian`, one row per number."""
        reference = pd.Series(gaussian_reference(int(self.values.n), int(self.values.d)))
        values = self.values.reindex(reference.index).dropna()
        return pd.DataFrame({"value": values, "gaussian": reference[values.index]})


def latent_statistics(
    ensemble: Any,
    *,
    reference_radius: float | None = None,
    tests: int = 64,
    triples: int = 10_000,
    seed: int = 0,
) -> LatentStatistics:
    """Radii, distances, angles and normality of an ensemble of x_t or h_t.

    Parameters
    ----------
    ensemble : array of shape (n, d) or (n, C, H, W)
        At least 3 samples. An image-shaped one gets the lag-1 autocorrelation too.
    reference_radius : float, optional
        r(t) to compare the radius with; see `spectra.marginal_radius`.
    tests : int, default 64
        Number of coordinates, and of projections, that are tested against N(0, 1); at most d.
    triples : int, default 10000
        Random triples of samples for the angle at a vertex.
    seed : int, default 0

    Returns
    -------
    LatentStatistics

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
    values = {"n": n, "d": d, "radius": radii.mean(), "radius_sd": radii.std(ddof=1)}
    values["radius_se"] = values["radius_sd"] / np.sqrt(n)
    values |= {f"radius_q{100 * q:02.0f}": np.quantile(radii, q) for q in RADIUS_QUANTILES}
    if reference_radius is not None:
        values |= {"reference_radius": reference_radius, "radius_ratio": values["radius"] / reference_radius}
    angles = np.degrees(np.arccos(np.clip(products / np.outer(radii, radii), -1.0, 1.0)))
    for name, pairs in {"distance": distances_of(products), "angle": angles}.items():
        values |= {f"{name}{part}": value for part, value in _pair_statistics(pairs).items()}
    vertex = _vertex_angles(products, triples, rng)
    mean = x.mean(axis=0, dtype=np.float64)
    values |= {
        "vertex_angle": vertex.mean(),
        "vertex_angle_sd": vertex.std(ddof=1),
        "centroid": np.linalg.norm(mean),
        "centroid_expected": np.sqrt((radii**2).mean() / n),
        "coordinate_mean": mean.mean(),
        "coordinate_variance": (radii**2).mean() / d - mean.mean() ** 2,
    }
    tests = min(tests, d)
    chosen = np.sort(rng.choice(d, size=tests, replace=False))
    coordinates = _ks_tests(x[:, chosen], "coordinate", chosen)
    directions = rng.standard_normal((tests, d), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    projections = _ks_tests(x @ directions.T, "projection", np.arange(tests))
    for name, table in {"ks_coordinates": coordinates, "ks_projections": projections}.items():
        values |= {name: table.statistic.mean(), f"{name}_p": table.p.min()}
    if images.ndim == 4:
        values["autocorrelation"] = _autocorrelation(images)
    return LatentStatistics(pd.Series(values, dtype=float), coordinates, projections)


def _pair_statistics(pairs: np.ndarray) -> dict[str, float]:
    """Mean, standard deviation and jackknife standard error of the mean over the pairs i < j of an (n, n) matrix."""
    n = len(pairs)
    above = pairs[np.triu_indices(n, k=1)]
    rows = pairs.sum(axis=1) - np.diag(pairs)
    without = (above.sum() - rows) / ((n - 1) * (n - 2) / 2)
    se = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return {"": above.mean(), "_sd": above.std(ddof=1), "_se": se}


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


def _ks_tests(columns: np.ndarray, kind: str, names: np.ndarray) -> pd.DataFrame:
    results = [stats.kstest(column.astype(np.float64), "norm") for column in columns.T]
    p = np.minimum(1.0, np.array([result.pvalue for result in results]) * len(results))
    return pd.DataFrame({kind: names, "statistic": [result.statistic for result in results], "p": p})


def _autocorrelation(images: np.ndarray) -> float:
    """Correlation of horizontally and vertically neighbouring pixels, mean of both, over all samples and channels."""
    x = images.astype(np.float64) - images.mean(dtype=np.float64)
    down = (x[:, :, 1:] * x[:, :, :-1]).mean()
    across = (x[..., 1:] * x[..., :-1]).mean()
    return float((down + across) / 2 / (x**2).mean())


def statistics_over_time(
    ensembles: Any,
    *,
    alpha_bars: Sequence[float] | None = None,
    mean_square: float | None = None,
    **options: Any,
) -> pd.DataFrame:
    """`latent_statistics` of every ensemble, one row each.

    Parameters
    ----------
    ensembles : mapping t -> array of shape (n, d) or (n, C, H, W), store, or iterable of (t, array)
    alpha_bars : array of shape (T,), optional
        With `mean_square`, gives r(t); then the keys are timesteps, and -1 is the clean image.
    mean_square : float, optional
        m2 of the clean images in [-1, 1].
    **options
        Of `latent_statistics`.

    Returns
    -------
    DataFrame
        Indexed by `t`; columns as `LatentStatistics.values`.

    Raises
    ------
    ValueError
        As in `latent_statistics` (naming the timestep), or if only one of `alpha_bars` and `mean_square` is given.
    """
    if (alpha_bars is None) != (mean_square is None):
        raise ValueError("r(t) needs both alpha_bars and mean_square; give both or neither")
    rows = {}
    for t, ensemble in pairs_of(ensembles):
        x = check_samples(ensemble, t=t, fewest=3)
        radius = None
        if alpha_bars is not None:
            alpha_bar = 1.0 if t == -1 else float(np.asarray(alpha_bars)[t])
            radius = marginal_radius(alpha_bar, mean_square=mean_square, d=x.shape[1])
        rows[t] = latent_statistics(ensemble, reference_radius=radius, **options).values
    if not rows:
        raise ValueError("there is no ensemble; give at least one")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("t")


@dataclass(frozen=True, eq=False)
class StepGeometry:
    """Lengths and turns of n trajectories of S states.

    Attributes
    ----------
    timesteps : tuple of int
        Of the states; 0..S-1 where they are not known.
    lengths : ndarray of shape (S-1, n)
        Of the steps.
    angles : ndarray of shape (S-2, n), degrees in [0, 180]
        Between a step and the next; 0 is straight on. NaN where a step has length 0.
    cosines : ndarray of shape (S-1, n), in [-1, 1]
        Between a state and the next, from the origin.
    centred_cosines : ndarray of shape (S-1, n), in [-1, 1]
        The same after the mean of the samples at each step is taken off: what the samples have in common makes the
        plain cosine large.
    straightness : ndarray of shape (n,), in [0, 1]
        Distance of the ends over the length of the path.
    """

    timesteps: tuple[int, ...]
    lengths: np.ndarray = field(repr=False)
    angles: np.ndarray = field(repr=False)
    cosines: np.ndarray = field(repr=False)
    centred_cosines: np.ndarray = field(repr=False)
    straightness: np.ndarray = field(repr=False)


def step_geometry(trajectory: Any, *, timesteps: Sequence[int] | None = None) -> StepGeometry:
    """Lengths, turns and cosines of the steps of trajectories of x_t or h_t, in one pass.

    Parameters
    ----------
    trajectory : array of shape (S, n, ...), iterable of arrays of shape (n, ...), store, or mapping t -> array
        At least 3 states, in the order in which they are visited.
    timesteps : sequence of int, optional
        Of an array's or iterable's states.

    Returns
    -------
    StepGeometry

    Raises
    ------
    ValueError
        If there are fewer than 3 states, their shapes differ, or a value is not finite.
    """
    if isinstance(trajectory, Mapping) or (hasattr(trajectory, "timesteps") and hasattr(trajectory, "at")):
        pairs = pairs_of(trajectory)
    elif timesteps is None:
        pairs = enumerate(trajectory)
    else:
        pairs = zip(timesteps, trajectory, strict=True)
    visited, lengths, angles, cosines, centred = [], [], [], [], []
    begin = state = step = None
    for t, x in over_timesteps(pairs, fewest=3, samples=1):
        before, state = state, x.astype(np.float64)
        visited.append(t)
        if before is None:
            begin = state
            continue
        step_before, step = step, state - before
        lengths.append(np.linalg.norm(step, axis=1))
        cosines.append(_cosine(before, state))
        centred.append(_cosine(before - before.mean(axis=0), state - state.mean(axis=0)))
        if step_before is not None:
            turn = np.arccos(np.clip(_cosine(step_before, step), -1.0, 1.0))
            angles.append(np.degrees(turn))
    path = np.sum(lengths, axis=0)
    chord = np.linalg.norm(state - begin, axis=1)
    return StepGeometry(
        tuple(visited),
        np.stack(lengths),
        np.stack(angles),
        np.stack(cosines),
        np.stack(centred),
        np.divide(chord, path, out=np.ones_like(path), where=path > 0),
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row; NaN where one is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
