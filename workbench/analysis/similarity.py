"""Similarity of h-space between timesteps and attributes: principal angles of subspaces, and linear CKA."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import linalg

from workbench.analysis.samples import centre, check_labels, check_samples, gram, over_timesteps


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
    axes, within = {}, []
    for t, h in over_timesteps(h_by_t, progress="principal components"):
        n, d = h.shape
        if not 1 <= k <= min(n // 2 - 1, d):
            raise ValueError(f"k is {k}; halves of {n} samples of {d} values have 1 to {min(n // 2 - 1, d)} components")
        products = gram(h)
        axes[t] = _principal_axes(h, products, k)
        order = np.random.default_rng(seed).permutation(n)
        halves = [
            _principal_axes(h[rows], centre(products[np.ix_(rows, rows)]), k)
            for rows in (order[: n // 2], order[n // 2 :])
        ]
        within.append(principal_angles(*halves))
    return _angles(axes, np.stack(within), seed=seed)


def attribute_angles(h: Any, labels: Any, *, seed: int = 0) -> Angles:
    """Angles between the attributes' difference directions at one timestep.

    The directions have a sign, but here only the line counts: 90 degrees is unrelated. With few samples noise brings
    any two to 90 degrees; `within` says how close to it the noise alone brings an attribute and itself.

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
        raise ValueError(f"angles need at least two attributes, not only {next(iter(by_name))!r}")
    axes = difference_directions(h, by_name)
    within = []
    for name, values in by_name.items():
        rng = np.random.default_rng(seed)
        groups = [rng.permutation(np.flatnonzero(values == group)) for group in np.unique(values)]
        if min(map(len, groups)) < 2:
            raise ValueError(f"the labels {name!r} have a group of one sample, which can't be halved")
        halves = [np.concatenate([group[i::2] for group in groups]) for i in (0, 1)]
        within.append(principal_angles(*(difference_directions(h[r], {name: values[r]})[name][None] for r in halves)))
    return _angles({name: axis[None] for name, axis in axes.items()}, np.stack(within), seed=seed)


def difference_directions(h: Any, labels: Any) -> dict[str, np.ndarray]:
    """Unit vectors (d,) by attribute, from the mean of the samples with the smaller label to that with the larger."""
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


def principal_angles(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Principal angles between the spans of the rows of a and of b (Bjorck and Golub 1973), by scipy.

    They compare spaces: vectors of similar singular values that mix, as they do between timesteps, leave them the same,
    while the cosines of single vectors fall.

    Parameters
    ----------
    a, b : array or Tensor of shape (k, ...) and (l, ...)
        Linearly independent rows, of any length.

    Returns
    -------
    ndarray of shape (min(k, l),), degrees, ascending
        90 is orthogonal.
    """
    flat = (np.asarray(each, dtype=np.float64).reshape(len(each), -1).T for each in (a, b))
    return np.degrees(linalg.subspace_angles(*flat))[::-1]


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
    chance = np.mean([principal_angles(*rng.standard_normal((2, k, d))) for _ in range(8)])
    return Angles(names, angles, within, float(chance))


def cka_over_time(h_by_t: Any) -> pd.DataFrame:
    """Linear CKA between every two timesteps: similarity of two representations of the same samples.

    Debiased (Nguyen et al. 2021, eq. 3, with the HSIC of Song et al. 2012): 0 on average for unrelated representations,
    and slightly negative at times; 1 for those that agree but for a rotation, a scale and a shift. The plain CKA
    (Kornblith et al. 2019) is up to 1 for unrelated ones where n is not much larger than d.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
        At least 4 samples. Takes 4 n^2 bytes a timestep.

    Returns
    -------
    DataFrame of shape (T, T)
        Timesteps as index and columns.

    Raises
    ------
    ValueError
        If the numbers of samples differ, a value is not finite, all samples are the same, or there is one timestep.
    """
    vectors = {
        t: _similarity_vector(h).astype(np.float32) for t, h in over_timesteps(h_by_t, samples=4, progress="CKA")
    }
    stacked = np.stack(list(vectors.values()))
    return pd.DataFrame(stacked @ stacked.T, index=list(vectors), columns=list(vectors)).astype(float)


def _similarity_vector(h: np.ndarray) -> np.ndarray:
    """The U-centred inner products as a vector of length 1, so that CKA is a dot product."""
    products = _u_centre(gram(h))
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
