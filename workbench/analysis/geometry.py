"""Geometry of h-space: maps and how far to trust them, dimension, subspaces, similarity between timesteps.

Everything takes arrays of shape (n, d), one row a sample; trailing axes such as (C, h, w) are flattened. What spans
several timesteps is a store (or anything else with `timesteps` and `at(t)`), a mapping t -> array, or an iterable of
(t, array) pairs, which is read once and one timestep at a time.

Intervals come from half-samples: a statistic of n/2 samples drawn without replacement deviates from that of all n by
as much as that of n samples deviates from the truth (the variances are s^2 (2/n - 1/n) and s^2/n), so the quantiles of
the deviations, around their own mean, give a 95% interval. A bootstrap with replacement is no use here: a sample drawn
twice is its own nearest neighbour.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import linalg
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE, trustworthiness
from sklearn.metrics import silhouette_score
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from workbench.analysis.intervals import QUANTILES

METHODS = {"pca": "PC", "umap": "UMAP", "pacmap": "PaCMAP", "tsne": "t-SNE"}
"""Names of the methods that `embed` takes, and of the axes of their maps."""

CHUNK = 4096
FEWEST = 20  # samples that a dimension takes


@dataclass(frozen=True, eq=False)
class Embedding:
    """A map of n samples.

    Attributes
    ----------
    points : ndarray of shape (n, k), float64
    method : {"pca", "umap", "pacmap", "tsne"}
    backend : str
        The package that made it.
    explained_variance_ratio : ndarray of shape (k,) or None
        Share of the variance along each axis; None for the methods that are not linear.
    variance_kept : float
        Share of the variance in the principal components that the method was given; for "pca" that of the map.
    parameters : dict
    """

    points: np.ndarray = field(repr=False)
    method: str
    backend: str
    explained_variance_ratio: np.ndarray | None
    variance_kept: float
    parameters: dict = field(default_factory=dict)
    _transform: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)

    def place(self, h: Any) -> np.ndarray:
        """Where other samples lie in this map, which stays as it is.

        Parameters
        ----------
        h : array of shape (m, ...)
            Of the timestep of the map.

        Returns
        -------
        ndarray of shape (m, k), float64

        Raises
        ------
        ValueError
            If the method can't place samples that it was not fitted on.
        """
        if self._transform is None:
            raise ValueError(
                f"{METHODS[self.method]} has no place for samples that it was not fitted on; take PCA or UMAP"
            )
        return np.asarray(self._transform(check_samples(h, fewest=1)), dtype=np.float64)

    @property
    def axes(self) -> list[str]:
        """Names of the axes, such as "UMAP 1"."""
        return [f"{METHODS[self.method]} {i + 1}" for i in range(self.points.shape[1])]

    def frame(self, **columns) -> pd.DataFrame:
        """One row a sample: `sample`, the axes, and `columns` (arrays of length n, to colour by)."""
        points = pd.DataFrame(self.points, columns=self.axes)
        points.insert(0, "sample", np.arange(len(points)))
        return points.assign(**{name: np.asarray(values) for name, values in columns.items()})

    def __repr__(self) -> str:
        n, k = self.points.shape
        return (
            f"Embedding({METHODS[self.method]} by {self.backend}, {n} samples in {k} dimensions, "
            f"{self.variance_kept:.0%} of the variance kept, {self.parameters})"
        )


@dataclass(frozen=True, eq=False)
class JointEmbedding(Mapping):
    """One map of the same n samples at several timesteps: a mapping t -> ndarray of shape (n, k).

    Attributes
    ----------
    points : dict of int -> ndarray of shape (n, k), float64
    fit : Embedding
        The shared fit; its points are those of all timesteps, one timestep after the other.
    """

    points: dict[int, np.ndarray] = field(repr=False)
    fit: Embedding

    def __getitem__(self, t: int) -> np.ndarray:
        return self.points[t]

    def __iter__(self) -> Iterator[int]:
        return iter(self.points)

    def __len__(self) -> int:
        return len(self.points)

    @property
    def timesteps(self) -> tuple[int, ...]:
        return tuple(self.points)

    @property
    def paths(self) -> np.ndarray:
        """Trajectories of the samples: ndarray of shape (n, T, k)."""
        return np.stack(list(self.points.values()), axis=1)

    def frame(self, **columns) -> pd.DataFrame:
        """One row a sample and timestep: `sample`, `t`, the axes, and `columns` (arrays of length n)."""
        frames = []
        for t, points in self.points.items():
            frame = pd.DataFrame(points, columns=self.fit.axes).assign(**{k: np.asarray(v) for k, v in columns.items()})
            frame.insert(0, "t", t)
            frame.insert(0, "sample", np.arange(len(frame)))
            frames.append(frame)
        return pd.concat(frames, ignore_index=True)

    def __repr__(self) -> str:
        t = self.timesteps
        return f"JointEmbedding({len(t)} timesteps t={t[0]}..{t[-1]}, {self.fit!r})"


@dataclass(frozen=True, eq=False)
class Angles:
    """Principal angles between subspaces, in degrees.

    Attributes
    ----------
    names : tuple
        Of the subspaces: timesteps or attributes.
    angles : ndarray of shape (m, m, k), degrees, ascending along the last axis
    within : ndarray of shape (m, k), degrees
        Angles between a subspace found in one random half of the samples and in the other. An angle between two
        subspaces means something where it exceeds these.
    chance : float
        Mean principal angle of two random subspaces, in degrees.
    """

    names: tuple
    angles: np.ndarray = field(repr=False)
    within: np.ndarray = field(repr=False)
    chance: float

    @property
    def mean(self) -> pd.DataFrame:
        """Mean principal angle of every pair, in degrees."""
        return pd.DataFrame(self.angles.mean(axis=2), index=list(self.names), columns=list(self.names))

    @property
    def geodesic(self) -> pd.DataFrame:
        """Length of the geodesic between every pair on the Grassmann manifold, in radians: sqrt(sum angle^2)."""
        lengths = np.sqrt((np.radians(self.angles) ** 2).sum(axis=2))
        return pd.DataFrame(lengths, index=list(self.names), columns=list(self.names))

    def __repr__(self) -> str:
        m, k = len(self.names), self.angles.shape[2]
        off = self.angles.mean(axis=2)[~np.eye(m, dtype=bool)]
        return (
            f"Angles({m} subspaces of dimension {k}: mean {off.min():.1f} to {off.max():.1f} degrees between them, "
            f"{self.within.mean():.1f} between halves of the samples, {self.chance:.1f} by chance)"
        )


def check_samples(h: Any, *, t: int | None = None, fewest: int = 2) -> np.ndarray:
    """The samples as a finite matrix.

    Parameters
    ----------
    h : array-like of shape (n, ...)
    t : int, optional
        Timestep, for the message.
    fewest : int, default 2

    Returns
    -------
    ndarray of shape (n, d), float32 or float64

    Raises
    ------
    ValueError
        If there are fewer than `fewest` samples or a value is NaN or infinite; the message names sample and timestep.
    """
    h = np.asarray(h)
    at = "" if t is None else f" at timestep {t}"
    if h.ndim < 2 or len(h) < fewest:
        raise ValueError(f"the samples{at} have shape {h.shape}; give at least {fewest} of them, one a row")
    h = h.reshape(len(h), -1)
    if h.dtype not in (np.float32, np.float64):
        h = h.astype(np.float32 if h.dtype == np.float16 else np.float64)
    finite = np.isfinite(h).all(axis=1)
    if not finite.all():
        first = int(np.argmin(finite))
        raise ValueError(
            f"sample {first}{at} has NaN or infinite values ({int((~finite).sum())} of {len(h)} samples do); "
            "leave these out"
        )
    return h


def pairs_of(by_t: Any) -> Iterable[tuple[int, Any]]:
    """(t, array) pairs of a store (or what has `timesteps` and `at(t)`), a mapping, or an iterable of such pairs."""
    if hasattr(by_t, "timesteps") and hasattr(by_t, "at"):
        return ((t, by_t.at(t)) for t in by_t.timesteps)
    return by_t.items() if isinstance(by_t, Mapping) else by_t


def over_timesteps(
    h_by_t: Any, *, fewest: int = 2, samples: int = 2, progress: str | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """The timesteps of a store, a mapping or an iterable of pairs, one at a time.

    Parameters
    ----------
    h_by_t : object with `timesteps` and `at(t)`, mapping t -> array, or iterable of (t, array)
    fewest : int, default 2
        A curve has at least 2 timesteps.
    samples : int, default 2
        The same number of samples is required of every timestep, and at least this.
    progress : str, optional
        Name of a progress bar, shown for work of more than two seconds.

    Yields
    ------
    (int, ndarray of shape (n, d))

    Raises
    ------
    ValueError
        If there are too few timesteps, their numbers of samples differ, or a sample is not finite.
    """
    seen, n = 0, None
    for t, h in tqdm(pairs_of(h_by_t), desc=progress, disable=progress is None, delay=2, leave=False):
        h = check_samples(h, t=t, fewest=samples)
        n = len(h) if n is None else n
        if len(h) != n:
            raise ValueError(f"timestep {t} has {len(h)} samples and the one before {n}; give the same at every one")
        seen += 1
        yield int(t), h
    if seen < fewest:
        raise ValueError(f"{seen} timestep{'s' * (seen != 1)} given where a curve needs at least {fewest}")


def check_labels(labels: Any, n: int) -> dict[str, np.ndarray]:
    """Labels by attribute.

    Parameters
    ----------
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays
    n : int

    Returns
    -------
    dict of str -> ndarray of shape (n,)

    Raises
    ------
    ValueError
        If an attribute has another length, a missing value, or one value alone.
    """
    if isinstance(labels, (Mapping, pd.DataFrame)):
        by_name = {str(name): np.asarray(values) for name, values in labels.items()}
    else:
        by_name = {str(getattr(labels, "name", None) or "label"): np.asarray(labels)}
    for name, values in by_name.items():
        if values.shape != (n,):
            raise ValueError(f"the labels {name!r} have shape {values.shape}; there are {n} samples")
        if pd.isna(values).any():
            raise ValueError(f"the label {name!r} of sample {int(np.argmax(pd.isna(values)))} is missing; leave it out")
        if len(np.unique(values)) < 2:
            raise ValueError(f"all labels {name!r} are {values[0]!s}; give two groups at least")
    return by_name


def gram(h: np.ndarray, *, centred: bool = True) -> np.ndarray:
    """Inner products of all pairs of samples, accumulated in float64 over blocks of coordinates.

    Parameters
    ----------
    h : ndarray of shape (n, d)
    centred : bool, default True
        Subtract the mean sample first.

    Returns
    -------
    ndarray of shape (n, n), float64
    """
    total = np.zeros((len(h), len(h)))
    for start in range(0, h.shape[1], CHUNK):
        block = h[:, start : start + CHUNK].astype(np.float64)
        if centred:
            block -= block.mean(axis=0)
        total += block @ block.T
    return total


def distances_of(products: np.ndarray) -> np.ndarray:
    """Euclidean distances from inner products: both of shape (n, n)."""
    squares = np.diag(products)
    squared = squares[:, None] + squares[None, :] - 2 * products
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(np.maximum(squared, 0.0))


def embed(
    h: Any,
    *,
    method: str = "pca",
    k: int = 2,
    seed: int = 0,
    n_pcs: int = 50,
    neighbours: int = 15,
    **options,
) -> Embedding:
    """Map the samples of one timestep to k dimensions.

    UMAP, PaCMAP and t-SNE are given the first `n_pcs` principal components. All are seeded and run in one thread where
    threads would change the result, so that the same call gives the same map. UMAP runs on the GPU where cuml is
    installed.

    Parameters
    ----------
    h : array of shape (n, ...)
    method : {"pca", "umap", "pacmap", "tsne"}
        "pacmap" needs the package of that name.
    k : int, default 2
        At most n - 1.
    seed : int, default 0
    n_pcs : int, default 50
        As many of them as there are.
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
        If there are fewer samples than components or neighbours, a value is not finite, the method is not known or
        its package not installed.
    """
    return _embed(check_samples(h), method, k=k, seed=seed, n_pcs=n_pcs, neighbours=neighbours, options=options)


def embed_jointly(
    h_by_t: Any,
    *,
    centre: str = "shared",
    method: str = "pca",
    k: int = 2,
    seed: int = 0,
    n_pcs: int = 50,
    neighbours: int = 15,
    **options,
) -> JointEmbedding:
    """Map the same samples at several timesteps to one plane, with one fit.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
    centre : {"shared", "timestep"}
        "shared": h as it is, so that the samples travel together as their mean moves with t. "timestep": each timestep
        is centred and divided by the root of its total variance, so that only differences between samples are left.
    method, k, seed, n_pcs, neighbours, **options
        As in `embed`.

    Returns
    -------
    JointEmbedding
        A mapping t -> ndarray of shape (n, k), in the order given.

    Raises
    ------
    ValueError
        As in `embed`, and if there is only one timestep or their numbers of samples differ.
    """
    if centre not in ("shared", "timestep"):
        raise ValueError(f'centre {centre!r} is not known; it is "shared" or "timestep"')
    by_t = {}
    for t, h in over_timesteps(h_by_t):
        if centre == "timestep":
            h = h - h.mean(axis=0)
            h = h / np.sqrt(max(h.var(axis=0).sum(), np.finfo(np.float32).tiny))
        by_t[t] = h
    fit = _embed(
        np.concatenate(list(by_t.values())),
        method,
        k=k,
        seed=seed,
        n_pcs=n_pcs,
        neighbours=neighbours,
        options=options,
    )
    return JointEmbedding(dict(zip(by_t, np.split(fit.points, len(by_t)), strict=True)), fit)


def _embed(
    h: np.ndarray, method: str, *, k: int, seed: int, n_pcs: int, neighbours: int, options: dict[str, Any]
) -> Embedding:
    n, d = h.shape
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; it is one of {', '.join(METHODS)}")
    if not 1 <= k <= min(n - 1, d):
        raise ValueError(f"k is {k}; {n} samples of {d} values have 1 to {min(n - 1, d)} components")
    if method != "pca":
        _check_neighbours(neighbours, n)
        n_pcs = min(max(n_pcs, k), n - 1, d)
    linear = method == "pca"
    pca = PCA(k if linear else n_pcs, random_state=seed, **(options if linear else {}))
    scores = pca.fit_transform(h)
    parameters = {"k": k, "seed": seed, **options}
    transform = pca.transform
    if linear:
        points, backend, ratio = scores, "scikit-learn", pca.explained_variance_ratio_.astype(np.float64)
    else:
        make = {"umap": _umap, "pacmap": _pacmap, "tsne": _tsne}[method]
        estimator, backend = make(k, seed, neighbours, options)
        # numba, which umap-learn starts, sets the threads of the whole process to its own number: put them back.
        with threadpool_limits(None):
            points, ratio = estimator.fit_transform(scores), None
        transform = (lambda other: estimator.transform(pca.transform(other))) if method == "umap" else None
        parameters |= {"n_pcs": n_pcs, "neighbours": neighbours}
    points = np.asarray(points, dtype=np.float64)
    kept = float(pca.explained_variance_ratio_.sum())
    return Embedding(points, method, backend, ratio, kept, parameters, transform)


def _umap(k: int, seed: int, neighbours: int, options: dict[str, Any]) -> tuple[Any, str]:
    try:
        manifold = importlib.import_module("cuml.manifold")
        return manifold.UMAP(n_components=k, n_neighbors=neighbours, random_state=seed, **options), "cuml"
    except ImportError:
        umap = importlib.import_module("umap")
        one_job = {"n_jobs": 1}
        return umap.UMAP(n_components=k, n_neighbors=neighbours, random_state=seed, **one_job | options), "umap-learn"


def _pacmap(k: int, seed: int, neighbours: int, options: dict[str, Any]) -> tuple[Any, str]:
    try:
        pacmap = importlib.import_module("pacmap")
    except ImportError as error:
        raise ValueError(
            'method "pacmap" needs the package pacmap, which is not installed; install it or use "umap" or "tsne"'
        ) from error
    return pacmap.PaCMAP(n_components=k, n_neighbors=neighbours, random_state=seed, **options), "pacmap"


def _tsne(k: int, seed: int, neighbours: int, options: dict[str, Any]) -> tuple[Any, str]:
    settings = {"perplexity": neighbours, "init": "pca", "method": "barnes_hut" if k <= 3 else "exact"}
    return TSNE(n_components=k, random_state=seed, **settings | options), "scikit-learn"


def _check_neighbours(neighbours: int, n: int, *, fewest: int = 1, most: int | None = None) -> None:
    most = n - 1 if most is None else most
    if not fewest <= neighbours <= most:
        raise ValueError(f"neighbours is {neighbours}; with {n} samples it is {fewest} to {most}")


def quality(
    h: Any,
    points: Any,
    *,
    labels: Any = None,
    neighbours: int = 15,
    resamples: int = 50,
    most: int = 2000,
    seed: int = 0,
) -> pd.DataFrame:
    """How far a map can be trusted: whether neighbours in it are neighbours in h-space, and whether groups are apart.

    - trustworthiness (Venna & Kaski 2001; scikit-learn): 1 where no neighbour in the map is a stranger in h-space.
    - neighbourhood preservation: share of a sample's neighbours in h-space that are its neighbours in the map.
    - silhouette by attribute (Rousseeuw 1987), in the map and in h-space itself: a group that is apart in the map alone
      is the map's doing. Groups of one sample are left out.

    Distances in h-space are those of all coordinates, not of principal components. Intervals are of half-samples with
    half the neighbours (see the head of this module).

    Parameters
    ----------
    h : array of shape (n, ...)
    points : Embedding or array of shape (n, k)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays, optional
    neighbours : int, default 15
        Fewer than n/2; in half-samples half of them, or as many as those have.
    resamples : int, default 50
    most : int, default 2000
        Of more samples, that many random ones are used.
    seed : int, default 0

    Returns
    -------
    DataFrame
        One row a measure: `measure`, `attribute`, `space` ("map" or "h"), `value`, `low` and `high` (95% interval),
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
    if len(h) > most:
        rows = np.sort(rng.permutation(len(h))[:most])
        h, points, by_name = h[rows], points[rows], {name: values[rows] for name, values in by_name.items()}
    n = len(h)
    _check_neighbours(neighbours, n, most=(n - 1) // 2)
    far, near = distances_of(gram(h)), distances_of(gram(points))

    def measure(rows: np.ndarray, k: int) -> dict[tuple[str, str, str], float]:
        block = np.ix_(rows, rows)
        values = {
            ("trustworthiness", "", "map"): trustworthiness(
                far[block], points[rows], n_neighbors=k, metric="precomputed"
            ),
            ("neighbourhood preservation", "", "map"): _overlap(far[block], near[block], k),
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
    chance = {"trustworthiness": _chance_trustworthiness(n, neighbours), "silhouette": 0.0}
    chance["neighbourhood preservation"] = neighbours / (n - 1)
    rows = []
    for key, value in values.items():
        low, high = _interval(value, [half[key] for half in halves])
        rows.append((*key, value, max(low, -1.0), min(high, 1.0), chance[key[0]], n))
    return pd.DataFrame(rows, columns=["measure", "attribute", "space", "value", "low", "high", "chance", "n"])


def _overlap(far: np.ndarray, near: np.ndarray, k: int) -> float:
    shared = _neighbour_mask(far, k) & _neighbour_mask(near, k)
    return float(shared.sum() / (k * len(far)))


def _neighbour_mask(distances: np.ndarray, k: int) -> np.ndarray:
    nearest = np.argpartition(_without_self(distances), k - 1, axis=1)[:, :k]
    mask = np.zeros(distances.shape, dtype=bool)
    np.put_along_axis(mask, nearest, True, axis=1)
    return mask


def _without_self(distances: np.ndarray) -> np.ndarray:
    distances = distances.copy()
    np.fill_diagonal(distances, np.inf)
    return distances


def _silhouette(distances: np.ndarray, groups: np.ndarray) -> float:
    """Mean silhouette over the groups of at least two samples; NaN with fewer than two such groups."""
    names, member, sizes = np.unique(groups, return_inverse=True, return_counts=True)
    kept = sizes[member] >= 2
    if (sizes >= 2).sum() < 2:
        return float("nan")
    return float(silhouette_score(distances[np.ix_(kept, kept)], member[kept], metric="precomputed"))


def _chance_trustworthiness(n: int, k: int) -> float:
    """Expectation of trustworthiness for neighbours drawn at random."""
    return 1.0 - (n - 1 - k) * (n - k) / ((n - 1) * (2 * n - 3 * k - 1))


def half_samples(
    n: int, resamples: int, rng: np.random.Generator, *, progress: str | None = None
) -> Iterator[np.ndarray]:
    for _ in tqdm(range(resamples), desc=progress, disable=progress is None, delay=2, leave=False):
        yield np.sort(rng.permutation(n)[: n // 2])


def _interval(value: float, halves: Iterable[float]) -> tuple[float, float]:
    halves = np.asarray(list(halves), dtype=float)
    halves = halves[np.isfinite(halves)]
    if len(halves) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(halves - halves.mean(), QUANTILES)
    return value + float(low), value + float(high)


def participation_ratio(h: Any, *, corrected: bool = True) -> float:
    """Number of directions that carry the variance: (tr S)^2 / tr S^2 of the covariance S.

    Of n samples the plain ratio can't exceed n - 1, and it underestimates by far where n is not much larger than it.
    Corrected, both traces are replaced by their unbiased estimates under a Gaussian (Srivastava 2005): with
    m = n - 1, tr S^2 by m^2 / ((m - 1)(m + 2)) (tr S^2 - (tr S)^2 / m), and (tr S)^2 by itself less 2/m of that.

    Parameters
    ----------
    h : array of shape (n, ...)
    corrected : bool, default True

    Returns
    -------
    float
        Between 1 and d; corrected, infinite where the samples can't tell the estimate of tr S^2 from 0.

    Raises
    ------
    ValueError
        If all samples are the same, a value is not finite, or there are fewer than 3 samples.
    """
    return _participation(gram(check_samples(h, fewest=3)), corrected=corrected)


def _participation(products: np.ndarray, *, corrected: bool = True) -> float:
    m = len(products) - 1
    trace, squares = np.trace(products) / m, (products**2).sum() / m**2
    if trace <= 0:
        raise ValueError("all samples are the same; they have no dimension")
    top = trace**2
    if corrected:
        squares = m**2 / ((m - 1) * (m + 2)) * (squares - top / m)
        top -= 2 * squares / m
    return float(top / squares) if squares > 0 else float("inf")


def two_nn(h: Any, *, discard: float = 0.1) -> float:
    """Intrinsic dimension by the two nearest neighbours (Facco et al. 2017, TwoNN).

    The ratio mu of the distances to the second and the first neighbour has P(mu > x) = x^-d whatever the density, so
    d is the slope of -log(1 - F(mu)) against log(mu), fitted through the origin without the largest ratios. Where d
    is large it underestimates, unless n grows exponentially with d.

    Parameters
    ----------
    h : array of shape (n, ...)
    discard : float, default 0.1
        Share of the largest ratios that is left out.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If two samples are the same, a value is not finite, or there are fewer than 10 samples.
    """
    return _two_nn(distances_of(gram(check_samples(h, fewest=10))), discard)


def _two_nn(distances: np.ndarray, discard: float = 0.1) -> float:
    nearest = _sorted_neighbours(distances, 2)
    n = len(nearest)
    log_mu = np.sort(np.log(nearest[:, 1] / nearest[:, 0]))
    kept = int(n * (1 - discard))
    cumulative = np.arange(1, kept + 1) / (n + 1)
    return float(log_mu[:kept] @ -np.log(1 - cumulative) / (log_mu[:kept] ** 2).sum())


def levina_bickel(h: Any, *, neighbours: int = 10) -> float:
    """Intrinsic dimension by maximum likelihood (Levina & Bickel 2004), averaged as MacKay & Ghahramani (2005) do.

    1/d is the mean over samples and their neighbours j < k of log(T_k / T_j), T_j the distance to the j-th neighbour
    (Levina & Bickel eq. 8 gives d of one sample; averaging the inverses instead of d removes most of its bias).

    Parameters
    ----------
    h : array of shape (n, ...)
    neighbours : int, default 10
        k, fewer than n and at least 2. More of them vary less and look at a coarser scale.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If two samples are the same, a value is not finite, or there are too many neighbours.
    """
    return _levina_bickel(distances_of(gram(check_samples(h, fewest=4))), neighbours)


def _levina_bickel(distances: np.ndarray, neighbours: int) -> float:
    _check_neighbours(neighbours, len(distances), fewest=2)
    nearest = _sorted_neighbours(distances, neighbours)
    return float(1.0 / np.log(nearest[:, -1:] / nearest[:, :-1]).mean())


def _sorted_neighbours(distances: np.ndarray, k: int) -> np.ndarray:
    """Distances to the k nearest neighbours, ascending: (n, k)."""
    others = _without_self(distances)
    nearest = np.sort(np.partition(others, k - 1, axis=1)[:, :k], axis=1)
    same = nearest[:, 0] <= 1e-6 * np.median(distances)
    if same.any():
        i = int(np.argmax(same))
        raise ValueError(
            f"samples {i} and {int(np.argmin(others[i]))} are the same; leave one out, the dimension needs distances"
        )
    return nearest


def dimensions(h: Any, *, neighbours: int = 10, resamples: int = 50, seed: int = 0) -> pd.DataFrame:
    """Dimension of one timestep's h by three estimators: participation ratio, TwoNN and Levina-Bickel.

    Parameters
    ----------
    h : array of shape (n, ...)
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
        As `participation_ratio`, `two_nn` and `levina_bickel`.
    """
    return _dimensions(check_samples(h, fewest=FEWEST), neighbours=neighbours, resamples=resamples, seed=seed)


def dimensions_over_time(h_by_t: Any, *, neighbours: int = 10, resamples: int = 50, seed: int = 0) -> pd.DataFrame:
    """`dimensions` at every timestep.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
    neighbours, resamples, seed
        As in `dimensions`.

    Returns
    -------
    DataFrame
        One row a timestep and estimator: `t`, `estimator`, `value`, `low`, `high`, `n`.

    Raises
    ------
    ValueError
        As in `dimensions`, and if there is only one timestep.
    """
    frames = [
        _dimensions(h, neighbours=neighbours, resamples=resamples, seed=seed).assign(t=t)
        for t, h in over_timesteps(h_by_t, samples=FEWEST, progress="dimension")
    ]
    return pd.concat(frames, ignore_index=True)[["t", "estimator", "value", "low", "high", "n"]]


def _dimensions(h: np.ndarray, *, neighbours: int, resamples: int, seed: int) -> pd.DataFrame:
    products = gram(h)
    distances = distances_of(products)

    def measure(rows: np.ndarray) -> dict[str, float]:
        block = np.ix_(rows, rows)
        return {
            "participation ratio": _participation(_centre(products[block])),
            "TwoNN": _two_nn(distances[block]),
            "Levina-Bickel": _levina_bickel(distances[block], neighbours),
        }

    n = len(h)
    _check_neighbours(neighbours, n, fewest=2, most=n // 2 - 1)
    values = measure(np.arange(n))
    halves = [measure(rows) for rows in half_samples(n, resamples, np.random.default_rng(seed))]
    rows = [(name, value, *_interval(value, [half[name] for half in halves]), n) for name, value in values.items()]
    return pd.DataFrame(rows, columns=["estimator", "value", "low", "high", "n"])


def _centre(products: np.ndarray) -> np.ndarray:
    """Inner products of the samples less their mean."""
    rows = products.mean(axis=0)
    return products - rows[:, None] - rows[None, :] + rows.mean()


def subspace_angles(a: Any, b: Any) -> np.ndarray:
    """Principal angles between two subspaces (Bjorck & Golub 1973; scipy).

    Parameters
    ----------
    a : array of shape (k, d)
        Its rows span the subspace; they need not be orthogonal.
    b : array of shape (l, d)

    Returns
    -------
    ndarray of shape (min(k, l),), degrees in [0, 90], ascending

    Raises
    ------
    ValueError
        If the dimensions differ or a value is not finite.
    """
    a, b = (check_samples(basis, fewest=1).astype(np.float64) for basis in (a, b))
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"the subspaces lie in spaces of dimension {a.shape[1]} and {b.shape[1]}; give the same one")
    return np.degrees(linalg.subspace_angles(a.T, b.T))[::-1]


def angles_over_time(h_by_t: Any, *, k: int = 10, seed: int = 0) -> Angles:
    """Angles between the subspaces of the k first principal components at every two timesteps.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
    k : int, default 10
        Less than n/2.
    seed : int, default 0
        Of the halves and of the random subspaces.

    Returns
    -------
    Angles
        With the timesteps as names.

    Raises
    ------
    ValueError
        If there are fewer samples than components, only one timestep, or a value is not finite.
    """
    axes, within, d = {}, [], 0
    for t, h in over_timesteps(h_by_t, progress="principal components"):
        n, d = h.shape
        if not 1 <= k <= min(n // 2 - 1, d):
            raise ValueError(f"k is {k}; halves of {n} samples of {d} values have 1 to {min(n // 2 - 1, d)} components")
        products = gram(h)
        axes[t] = _principal_axes(h, products, k)
        order = np.random.default_rng(seed).permutation(n)
        halves = [
            _principal_axes(h[rows], _centre(products[np.ix_(rows, rows)]), k)
            for rows in (order[: n // 2], order[n // 2 :])
        ]
        within.append(subspace_angles(*halves))
    return _angles(axes, np.stack(within), seed=seed)


def attribute_angles(h: Any, labels: Any, *, seed: int = 0) -> Angles:
    """Angles between the attributes' difference directions at one timestep.

    The directions have a sign, but here only the line counts: 90 degrees is unrelated. With few samples noise brings
    any two to 90 degrees, `within` says how close to it the noise alone brings an attribute and itself.

    Parameters
    ----------
    h : array of shape (n, ...)
    labels : mapping or DataFrame of attribute -> array of shape (n,), of two values each
    seed : int, default 0

    Returns
    -------
    Angles
        With the attributes as names and k = 1.

    Raises
    ------
    ValueError
        If labels are constant or of more than two values, there is one attribute alone, or a value is not finite.
    """
    h = check_samples(h, fewest=4)
    by_name = check_labels(labels, len(h))
    if len(by_name) < 2:
        raise ValueError(f"angles between attributes need two of them at least, not only {next(iter(by_name))!r}")
    axes = difference_directions(h, by_name)
    within = []
    for name, values in by_name.items():
        rng = np.random.default_rng(seed)
        groups = [rng.permutation(np.flatnonzero(values == group)) for group in np.unique(values)]
        if min(map(len, groups)) < 2:
            raise ValueError(f"the labels {name!r} have a group of one sample, which can't be halved")
        halves = [np.concatenate([group[i::2] for group in groups]) for i in (0, 1)]
        within.append(subspace_angles(*(difference_directions(h[r], {name: values[r]})[name][None] for r in halves)))
    return _angles({name: axis[None] for name, axis in axes.items()}, np.stack(within), seed=seed)


def difference_directions(h: Any, labels: Any) -> dict[str, np.ndarray]:
    """Unit vectors from the mean of the samples with the smaller label to that of those with the larger.

    Parameters
    ----------
    h : array of shape (n, ...)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays, of two values each

    Returns
    -------
    dict of str -> ndarray of shape (d,), float64

    Raises
    ------
    ValueError
        If labels are constant or of more than two values, or both means are the same.
    """
    h = check_samples(h)
    found = {}
    for name, values in check_labels(labels, len(h)).items():
        groups = np.unique(values)
        if len(groups) != 2:
            raise ValueError(f"the labels {name!r} have {len(groups)} values; a difference direction needs two")
        low, high = (h[values == group].mean(axis=0, dtype=np.float64) for group in groups)
        length = np.linalg.norm(high - low)
        if length == 0:
            raise ValueError(f"the means of the two groups of {name!r} are the same; there is no direction")
        found[name] = (high - low) / length
    return found


def _principal_axes(h: np.ndarray, products: np.ndarray, k: int) -> np.ndarray:
    """The k first principal axes, exact, from the centred inner products: (k, d), orthonormal."""
    n = len(h)
    values, vectors = linalg.eigh(products, subset_by_index=[n - k, n - 1])
    if values[0] <= 1e-10 * values[-1]:
        raise ValueError(f"the samples lie in fewer than {k} dimensions; ask for fewer components")
    # The vectors are orthogonal to the constant, so that h need not be centred.
    return (vectors / np.sqrt(values)).T @ h


def _angles(axes: dict[Any, np.ndarray], within: np.ndarray, *, seed: int) -> Angles:
    names, bases = tuple(axes), np.stack(list(axes.values()))
    m, k, d = bases.shape
    angles = np.zeros((m, m, k))
    for i in range(m):
        # The bases are orthonormal, so their cosines are singular values; scipy would factorise both for every pair.
        cosines = np.linalg.svd(bases[i] @ bases[i + 1 :].transpose(0, 2, 1), compute_uv=False)
        angles[i, i + 1 :] = angles[i + 1 :, i] = np.degrees(np.arccos(np.minimum(cosines, 1.0)))
    rng = np.random.default_rng(seed)
    chance = np.mean([subspace_angles(*rng.standard_normal((2, k, d))) for _ in range(8)])
    return Angles(names, angles, within, float(chance))


def linear_cka(a: Any, b: Any, *, debiased: bool = True) -> float:
    """Similarity of two representations of the same samples: linear CKA (Kornblith et al. 2019).

    Plain (eq. 3 with a linear kernel; equal to ||B^T A||^2 / (||A^T A|| ||B^T B||) of the centred features): biased
    upwards where n is not much larger than d, up to 1 for unrelated representations. Debiased (Nguyen et al. 2021,
    eq. 3, with the HSIC of Song et al. 2012): 0 on average for unrelated ones, and slightly negative at times.

    Parameters
    ----------
    a : array of shape (n, ...)
    b : array of shape (n, ...)
        Of another dimension if need be.
    debiased : bool, default True
        Needs at least 4 samples.

    Returns
    -------
    float
        1 for representations that agree but for a rotation, a scale and a shift.

    Raises
    ------
    ValueError
        If the numbers of samples differ, a value is not finite, or all samples are the same.
    """
    a, b = check_samples(a, fewest=4), check_samples(b, fewest=4)
    if len(a) != len(b):
        raise ValueError(f"CKA compares the same samples; these are {len(a)} and {len(b)}")
    if not debiased and max(a.shape[1], b.shape[1]) < len(a):
        a, b = (x - x.mean(axis=0, dtype=np.float64) for x in (a, b))
        bottom = np.linalg.norm(a.T @ a) * np.linalg.norm(b.T @ b)
        if bottom == 0:
            raise ValueError("all samples are the same; CKA needs samples that differ")
        return float(np.linalg.norm(a.T @ b) ** 2 / bottom)
    return float(_similarity_vector(a, debiased=debiased) @ _similarity_vector(b, debiased=debiased))


def cka_over_time(h_by_t: Any, *, debiased: bool = True) -> pd.DataFrame:
    """Linear CKA between every two timesteps.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
        Takes 4 n^2 bytes a timestep.
    debiased : bool, default True
        See `linear_cka`.

    Returns
    -------
    DataFrame of shape (T, T)
        Timesteps as index and columns.

    Raises
    ------
    ValueError
        As in `linear_cka`, and if there is only one timestep.
    """
    vectors = {
        t: _similarity_vector(h, debiased=debiased).astype(np.float32)
        for t, h in over_timesteps(h_by_t, samples=4, progress="CKA")
    }
    stacked = np.stack(list(vectors.values()))
    return pd.DataFrame(stacked @ stacked.T, index=list(vectors), columns=list(vectors)).astype(float)


def _similarity_vector(h: np.ndarray, *, debiased: bool) -> np.ndarray:
    """The centred inner products as a vector of length 1, so that CKA is a dot product."""
    products = _u_centre(gram(h)) if debiased else gram(h)
    length = np.linalg.norm(products)
    if length == 0:
        raise ValueError("all samples are the same; CKA needs samples that differ")
    return products.ravel() / length


def _u_centre(products: np.ndarray) -> np.ndarray:
    """U-centring (Szekely & Rizzo 2014): the dot product of two such matrices is n (n - 3) times the unbiased HSIC."""
    n = len(products)
    products = products.copy()
    np.fill_diagonal(products, 0.0)
    rows = products.sum(axis=0)
    products += rows.sum() / ((n - 1) * (n - 2)) - (rows[:, None] + rows[None, :]) / (n - 2)
    np.fill_diagonal(products, 0.0)
    return products
