"""Maps of the same samples at several timesteps, in several spaces and by several methods, turned alike; neighbours.

The axes of two maps are arbitrary up to sign (principal components) or rotation (UMAP), which makes them hard to
compare by eye. Each map is therefore turned to agree with the one before it in time; distances in it stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from sklearn.decomposition import PCA
from sklearn.neighbors import NearestNeighbors

from workbench.analysis.embedding import Embedding, embed
from workbench.analysis.samples import check_neighbours, check_samples
from workbench.io import one_of

MOST = 2000
"""Samples that a map is fitted to; others are placed in it."""
EXACT = 4000
"""Samples up to which neighbours are found by all coordinates; of more, by the leading principal components."""

METHODS = {"pca": "PCA", "umap": "UMAP", "paths": "PCA of all timesteps"}

Batches = Callable[[int], Iterable[np.ndarray]]
"""Samples of a timestep, in batches of shape (b, d)."""


@dataclass(frozen=True, eq=False)
class Map:
    """Samples in the plane.

    Attributes
    ----------
    name : str
    points : ndarray of shape (n, 2), or (frames, n, 2) for a map that moves; float64
    axes : (str, str)
    timesteps : tuple of int
        One, or that of each frame; none for a map that is given.
    note : str
        What it keeps, and how it was made.
    place : callable (samples of shape (m, d)) -> ndarray of shape (m, 2), optional
    """

    name: str
    points: np.ndarray = field(repr=False)
    axes: tuple[str, str]
    timesteps: tuple[int, ...] = ()
    note: str = ""
    place: Callable[[np.ndarray], np.ndarray] | None = field(default=None, repr=False)


def make_maps(
    spaces: Mapping[str, Batches],
    *,
    n: int,
    timesteps: Sequence[int],
    visited: Sequence[int] = (),
    methods: Sequence[str] = ("pca",),
    seed: int = 0,
) -> list[Map]:
    """Maps of n samples: one a space, method and timestep, or for "paths" one a space that moves through those visited.

    ValueError if there are fewer than 4 samples, a method is unknown, or a value is not finite.
    """
    if n < 4:
        raise ValueError(f"a map takes at least 4 samples, and there {'is' if n == 1 else 'are'} {n}; extract more")
    for method in methods:
        one_of("method", method, METHODS)
    made = []
    for space, read in spaces.items():
        for method in methods:
            if method == "paths":
                made.append(_moving(space, read, n, visited or timesteps, seed))
                continue
            before = None
            for t in timesteps:
                before, found = _still(space, read, n, t, method, seed, before)
                made.append(found)
    return made


def _still(space: str, read: Batches, n: int, t: int, method: str, seed: int, before: np.ndarray | None):
    """Points of the fitted samples, and the map, turned to agree with the points of the same samples before."""
    fitted = _some(read, t, n)
    options = {} if method == "pca" else {"neighbours": min(15, len(fitted) - 1)}
    if method == "umap" and before is not None:
        options["init"] = before.astype(np.float32)
    fit = embed(fitted, method=method, seed=seed, **options)
    centre = fit.points.mean(axis=0)
    turn = np.eye(2) if before is None else _turn(fit.points - centre, before, rotate=method != "pca")

    def place(h: np.ndarray) -> np.ndarray:
        return (fit.place(h) - centre) @ turn

    own = (fit.points - centre) @ turn
    points = own if len(fitted) == n else np.concatenate([place(batch) for batch in read(t)])
    return own, Map(f"{space}, t = {t}, {METHODS[method]}", points, _axes(fit), (t,), _note(fit, len(fitted), n), place)


def _moving(space: str, read: Batches, n: int, timesteps: Sequence[int], seed: int) -> Map:
    """All timesteps in one plane, each less its mean and scaled: as they drift and grow, nothing else would be seen."""
    parts, scaled = [], {}
    for t in timesteps:
        fitted = _some(read, t, n, most=max(4, MOST // len(timesteps)))
        centre, length = fitted.mean(axis=0), np.sqrt(max(fitted.var(axis=0).sum(), np.finfo(np.float32).tiny))
        scaled[t] = centre, length
        parts.append((fitted - centre) / length)
    fit, fitted = embed(np.concatenate(parts), seed=seed), len(parts[0])
    if fitted == n:
        points = fit.points.reshape(len(timesteps), n, 2)
    else:
        frames = [[fit.place((batch - centre) / length) for batch in read(t)] for t, (centre, length) in scaled.items()]
        points = np.stack([np.concatenate(frame) for frame in frames])
    note = f"{_note(fit, fitted, n)}; h of each timestep less its mean and scaled, in one plane"
    return Map(f"{space}, {METHODS['paths']}", points, _axes(fit), tuple(timesteps), note)


def _some(read: Batches, t: int, n: int, *, most: int | None = None) -> np.ndarray:
    """At most so many of n samples, evenly spread over all of them."""
    rows, start, chosen = np.linspace(0, n - 1, min(n, most or MOST)).round().astype(int), 0, []
    for batch in read(t):
        chosen.append(batch[rows[(rows >= start) & (rows < start + len(batch))] - start])
        start += len(batch)
    return check_samples(np.concatenate(chosen), t=t)


def _turn(points: np.ndarray, to: np.ndarray, *, rotate: bool) -> np.ndarray:
    """The orthogonal matrix (2, 2) that brings centred points nearest to others; or else of signs alone."""
    product = points.T @ (to - to.mean(axis=0))
    if not rotate:
        return np.diag(np.where(np.diag(product) < 0, -1.0, 1.0))
    u, _, vt = np.linalg.svd(product)
    return u @ vt


def _axes(fit: Embedding) -> tuple[str, str]:
    if fit.explained_variance_ratio is None:
        across, up = fit.axes
    else:
        shares = zip(fit.axes, fit.explained_variance_ratio, strict=True)
        across, up = (f"{axis} ({share:.0%})" for axis, share in shares)
    return across, up


def _note(fit: Embedding, fitted: int, n: int) -> str:
    if fit.explained_variance_ratio is None:
        kept = f"of {fit.parameters['n_pcs']} principal components, {fit.variance_kept:.0%} of the variance"
    else:
        kept = f"keeps {fit.variance_kept:.0%} of the variance"
    return kept if fitted == n else f"{kept}; fitted to {fitted} of {n} samples"


def nearest(read: Batches, t: int, *, n: int, k: int = 8, what: str = "h", seed: int = 0) -> tuple[np.ndarray, str]:
    """The nearest neighbours of every sample in the space itself, not on a map.

    Parameters
    ----------
    read : callable (t) -> iterable of arrays of shape (b, d)
    t : int
    n : int
        Number of samples.
    k : int
        Neighbours, at least 1 and fewer than samples.
    what : str
        Name of the space.
    seed : int
        Of the principal components.

    Returns
    -------
    ndarray of shape (n, k), int
        Positions, the nearest first.
    str
        How distances were measured.
    """
    check_neighbours(k, most=n - 1)
    if n <= EXACT:
        values, words = np.concatenate(list(read(t))), f"by distance in {what} at t = {t}"
    else:
        fitted = _some(read, t, n)
        pca = PCA(min(50, *fitted.shape), random_state=seed).fit(fitted)
        kept = pca.explained_variance_ratio_.sum()
        values = np.concatenate([pca.transform(batch) for batch in read(t)])
        words = f"by {pca.n_components_} principal components of {what} at t = {t}, {kept:.0%} of its variance"
    found = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(values)
    return found.kneighbors(return_distance=False), words
