"""Maps of h-space in two or three dimensions, and how far they can be trusted."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits

from workbench.analysis.samples import (
    check_labels,
    check_neighbours,
    check_samples,
    distances_of,
    gram,
    half_interval,
    half_samples,
)
from workbench.io import one_of

# Methods that `embed` takes, and the names of their axes.
METHODS = {"pca": "PC", "umap": "UMAP", "tsne": "t-SNE"}
PCS = 50  # principal components that UMAP and t-SNE are given
MOST = 2000  # samples that the quality of a map is measured on


@dataclass(frozen=True, eq=False)
class Embedding:
    """A map of n samples.

    Attributes
    ----------
    points : ndarray of shape (n, k), float64
    method : {"pca", "umap", "tsne"}
    explained_variance_ratio : ndarray of shape (k,) or None
        Share of the variance along each axis; None for the methods that are not linear.
    variance_kept : float
        Share of the variance in the principal components that the method was given; for "pca" that of the map.
    parameters : dict
    """

    points: np.ndarray = field(repr=False)
    method: str
    explained_variance_ratio: np.ndarray | None = field(repr=False)
    variance_kept: float
    parameters: dict = field(default_factory=dict)
    _transform: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)

    def place(self, h: Any) -> np.ndarray:
        """Where other samples (m, ...) of the same timestep lie in this map, (m, k); of PCA and UMAP alone."""
        if self._transform is None:
            name = METHODS[self.method]
            raise ValueError(f"{name} can't map new samples; use PCA or UMAP")
        return np.asarray(self._transform(check_samples(h, fewest=1)), dtype=np.float64)

    @property
    def axes(self) -> list[str]:
        """Names of the axes, such as "UMAP 1"."""
        return [f"{METHODS[self.method]} {i + 1}" for i in range(self.points.shape[1])]


def embed(h: Any, *, method: str = "pca", k: int = 2, seed: int = 0, neighbours: int = 15, **options: Any) -> Embedding:
    """Map the samples of one timestep to k dimensions.

    UMAP and t-SNE are given the first 50 principal components. All are seeded and run in one thread where
    threads would change the result, so that the same call gives the same map.

    Parameters
    ----------
    h : array of shape (n, ...)
    method : {"pca", "umap", "tsne"}
    k : int, default 2
        At most n - 1.
    seed : int, default 0
    neighbours : int, default 15
        Size of the neighbourhood that the map tries to keep; for t-SNE the perplexity. Fewer than n.
    **options
        For the method's estimator, such as `min_dist` of UMAP.

    Returns
    -------
    Embedding

    Raises
    ------
    ValueError
        If there are fewer samples than components or neighbours, a value is not finite, or the method is not known.
    """
    h = check_samples(h)
    n, d = h.shape
    one_of("method", method, METHODS)
    if not 1 <= k <= min(n - 1, d):
        raise ValueError(f"k is {k}; {n} samples of {d} values have 1 to {min(n - 1, d)} components")
    parameters = {"k": k, "seed": seed, **options}
    if method == "pca":
        pca = PCA(k, random_state=seed, **options)
        points, transform = pca.fit_transform(h), pca.transform
        ratio = pca.explained_variance_ratio_.astype(np.float64)
    else:
        check_neighbours(neighbours, most=n - 1)
        n_pcs = min(max(PCS, k), n - 1, d)
        pca, ratio = PCA(n_pcs, random_state=seed), None
        scores = pca.fit_transform(h)
        estimator = _estimator(method, k, seed, neighbours, options)
        # numba, which umap-learn starts, sets the threads of the whole process to its own number: put them back.
        with threadpool_limits(None):
            points = estimator.fit_transform(scores)
        transform = (lambda other: estimator.transform(pca.transform(other))) if method == "umap" else None
        parameters |= {"n_pcs": n_pcs, "neighbours": neighbours}
    kept = float(pca.explained_variance_ratio_.sum())
    return Embedding(np.asarray(points, dtype=np.float64), method, ratio, kept, parameters, transform)


def _estimator(method: str, k: int, seed: int, neighbours: int, options: dict[str, Any]) -> Any:
    common = {"n_components": k, "random_state": seed}
    if method == "tsne":
        barnes_hut = {"perplexity": neighbours, "init": "pca", "method": "barnes_hut" if k <= 3 else "exact"}
        return TSNE(**common | barnes_hut | options)
    return _umap().UMAP(**common | {"n_neighbors": neighbours, "n_jobs": 1} | options)


def _umap() -> Any:
    """umap-learn, with what numba compiles of it (15 seconds' worth) kept on disk beside the package."""
    umap = importlib.import_module("umap")  # takes seconds to import
    for name in ("umap_", "layouts", "utils", "distances"):
        module = importlib.import_module(f"umap.{name}")
        for function in vars(module).values():
            if getattr(function, "__module__", "") == module.__name__ and hasattr(function, "enable_caching"):
                function.enable_caching()
    return umap


def map_quality(
    h: Any,
    points: Any,
    *,
    labels: Any = None,
    neighbours: int = 15,
    resamples: int = 50,
    seed: int = 0,
) -> pd.DataFrame:
    """How far a map can be trusted: whether neighbours in it are neighbours in h-space, and whether groups are apart.

    - trustworthiness (Venna & Kaski 2001; scikit-learn): 1 where no neighbour in the map is a stranger in h-space.
    - neighbourhood preservation: share of a sample's neighbours in h-space that are its neighbours in the map.
    - silhouette by attribute (Rousseeuw 1987), in the map and in h-space itself: a group that is apart in the map alone
      is the map's doing. Groups of one sample are left out.

    Distances in h-space are those of all coordinates, not of principal components. Intervals are of half-samples with
    half the neighbours (see `samples.half_samples`). Of more than 2000 samples, so many random ones are used.

    Parameters
    ----------
    h : array of shape (n, ...)
    points : Embedding or array of shape (n, k)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays, optional
    neighbours : int, default 15
        Fewer than n/2; in half-samples half of them, or as many as those have.
    resamples : int, default 50
    seed : int, default 0

    Returns
    -------
    DataFrame
        One row per measure: `measure`, `attribute`, `space` ("map" or "h"), `value`, `low` and `high` (95% interval),
        `chance` (its exact expectation for a map without any relation to h) and `n`.

    Raises
    ------
    ValueError
        If labels are constant, a value is not finite, or there are too many neighbours.
    """
    h, points = check_samples(h, fewest=6), check_samples(getattr(points, "points", points))
    if len(h) != len(points):
        raise ValueError(f"the map has {len(points)} points and h {len(h)} samples; they must be the same samples")
    by_name = {} if labels is None else check_labels(labels, len(h))
    rng = np.random.default_rng(seed)
    if len(h) > MOST:
        rows = np.sort(rng.permutation(len(h))[:MOST])
        h, points, by_name = h[rows], points[rows], {name: values[rows] for name, values in by_name.items()}
    n = len(h)
    check_neighbours(neighbours, most=(n - 1) // 2)
    far, near = distances_of(gram(h)), distances_of(gram(points))

    def measure(rows: np.ndarray, k: int) -> dict[tuple[str, str, str], float]:
        block = np.ix_(rows, rows)
        trust = trustworthiness(far[block], points[rows], n_neighbors=k, metric="precomputed")
        shared = _neighbour_mask(far[block], k) & _neighbour_mask(near[block], k)
        values = {
            ("trustworthiness", "", "map"): trust,
            ("neighbourhood preservation", "", "map"): float(shared.sum() / (k * len(rows))),
        }
        for name, groups in by_name.items():
            for space, distances in (("map", near), ("h", far)):
                values["silhouette", name, space] = _silhouette(distances[block], groups[rows])
        return values

    values = measure(np.arange(n), neighbours)
    for (_, name, _), value in values.items():
        if np.isnan(value):
            raise ValueError(f"the labels {name!r} have fewer than two groups of two samples; there is no silhouette")
    fewer = max(1, min(round(neighbours / 2), (n // 2 - 1) // 2))
    halves = [measure(rows, fewer) for rows in half_samples(n, resamples, rng, progress="half-samples")]
    chance = {
        # Expectation for neighbours drawn at random.
        "trustworthiness": 1.0 - (n - 1 - neighbours) * (n - neighbours) / ((n - 1) * (2 * n - 3 * neighbours - 1)),
        "neighbourhood preservation": neighbours / (n - 1),
        "silhouette": 0.0,
    }
    rows = []
    for key, value in values.items():
        low, high = half_interval(value, [half[key] for half in halves])
        rows.append((*key, value, max(low, -1.0), min(high, 1.0), chance[key[0]], n))
    return pd.DataFrame(rows, columns=["measure", "attribute", "space", "value", "low", "high", "chance", "n"])


def _neighbour_mask(distances: np.ndarray, k: int) -> np.ndarray:
    """Which samples are among the k nearest of each: (n, n) bool."""
    distances = distances.copy()
    np.fill_diagonal(distances, np.inf)
    mask = np.zeros(distances.shape, dtype=bool)
    np.put_along_axis(mask, np.argpartition(distances, k - 1, axis=1)[:, :k], True, axis=1)
    return mask


def _silhouette(distances: np.ndarray, groups: np.ndarray) -> float:
    """Mean silhouette over the groups of at least two samples; NaN with fewer than two such groups."""
    _, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    kept = sizes[member] >= 2
    if (sizes >= 2).sum() < 2:
        return float("nan")
    return float(silhouette_score(distances[np.ix_(kept, kept)], member[kept], metric="precomputed"))
