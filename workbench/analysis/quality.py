"""How close generated images are to held-out ones: distances between sets of features, precision, recall, memorisation.

Features are arrays of shape (n, d), one row an image: what a classifier's last layer sees, or the pixels themselves.
The Frechet and the kernel distance are in `metrics`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from workbench.analysis.intervals import Estimate, share_of


@dataclass(frozen=True)
class PrecisionRecall:
    """How much of what is generated is real, and how much of what is real is generated.

    Attributes
    ----------
    precision, recall : Estimate
    """

    precision: Estimate
    recall: Estimate


def precision_recall(generated: np.ndarray, real: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2).

    A point lies in a set if it is within the distance from one of its points to that one's k-th neighbour in the set.
    Precision is the share of generated points in the set of real ones, recall that of real ones in the generated set.

    Parameters
    ----------
    generated, real : array of shape (n, d), (m, d)
        The measure depends on their numbers: compare at equal n and m.
    k : int, default 3

    Returns
    -------
    PrecisionRecall
        With Wilson intervals.

    Raises
    ------
    ValueError
        If a set has not more than `k` points, or they have other numbers of features, or are not finite.
    """
    a, b = _features(generated, real)
    if not 1 <= k < min(len(a), len(b)):
        raise ValueError(f"k is {k}; with {len(a)} and {len(b)} points give 1 to {min(len(a), len(b)) - 1}")
    return PrecisionRecall(*(share_of(float(_inside(x, y, k).mean()), len(x)) for x, y in ((a, b), (b, a))))


def nearest_neighbours(points: np.ndarray, others: np.ndarray, *, k: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """The nearest of other points to each point, by Euclidean distance.

    Parameters
    ----------
    points, others : array of shape (n, d), (m, d)
    k : int, default 1

    Returns
    -------
    distances : ndarray of shape (n, k), ascending
    positions : ndarray of int, shape (n, k)

    Raises
    ------
    ValueError
        If there are fewer than `k` others, or the arrays don't match.
    """
    a, b = _features(points, others, least=1)
    if not 1 <= k <= len(b):
        raise ValueError(f"k is {k}; of {len(b)} points give 1 to {len(b)}")
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(b).kneighbors(a)


def memorisation(generated: np.ndarray, training: np.ndarray, held_out: np.ndarray, *, seed: int = 0) -> Estimate:
    """Share of generated points that are nearer to a training point than to a held-out one, at equal numbers of both.

    A model that has learned the distribution and not its training set gives a half; one that repeats its training
    images gives 1. This is the data-copying test of Meehan et al. 2020 in its simplest form.

    Parameters
    ----------
    generated, training, held_out : array of shape (n, d), (m, d), (k, d)
        Of the larger one of the last two as many points are drawn as the smaller one has.
    seed : int

    Returns
    -------
    Estimate
        With its Wilson interval over the generated points.
    """
    rng, m = np.random.default_rng(seed), min(len(training), len(held_out))
    near = [
        nearest_neighbours(generated, points[rng.choice(len(points), m, replace=False)])[0][:, 0]
        for points in (np.asarray(training), np.asarray(held_out))
    ]
    closer = (near[0] < near[1]) + 0.5 * (near[0] == near[1])
    return share_of(float(closer.mean()), len(closer))


def attribute_frequencies(labels: pd.DataFrame, expected: Mapping[str, float]) -> pd.DataFrame:
    """How often samples have an attribute, against how often they should.

    Parameters
    ----------
    labels : DataFrame of shape (n, attributes), values 0 or 1
    expected : mapping of attribute to its probability

    Returns
    -------
    DataFrame
        One row an attribute of `expected`: `expected`, `found`, `low`, `high` (its Wilson interval) and `distance`, the
        total variation, |found - expected| for two outcomes.

    Raises
    ------
    ValueError
        If an attribute is not labelled.
    """
    missing = [name for name in expected if name not in labels]
    if missing:
        raise ValueError(f"there are no labels for {', '.join(missing)}; there are for {', '.join(labels)}")
    rates = {name: share_of(float(labels[name].mean()), len(labels)) for name in expected}
    return pd.DataFrame(
        [
            {"expected": expected[name], "found": r.value, "low": r.low, "high": r.high}
            | {"distance": abs(r.value - expected[name])}
            for name, r in rates.items()
        ],
        index=pd.Index(list(expected), name="attribute"),
    )


def joint_frequencies(labels: pd.DataFrame, expected: Mapping[tuple[str, str], Sequence[float]]) -> pd.DataFrame:
    """The same for pairs of attributes: the four joint frequencies of each pair.

    Parameters
    ----------
    labels : DataFrame of shape (n, attributes), values 0 or 1
    expected : mapping of (a, b) to 4 probabilities
        Of neither, b alone, a alone, and both.

    Returns
    -------
    DataFrame
        One row a pair: `expected` and `found`, each four times (second level of columns: `00`, `01`, `10`, `11`), and
        `distance`, the total variation, half the sum of the absolute differences.
    """
    rows = []
    for (a, b), probabilities in expected.items():
        missing = [name for name in (a, b) if name not in labels]
        if missing:
            raise ValueError(f"there are no labels for {', '.join(missing)}; there are for {', '.join(labels)}")
        p = np.asarray(probabilities, dtype=float)
        cells = 2 * labels[a].to_numpy().astype(int) + labels[b].to_numpy().astype(int)
        q = np.bincount(cells, minlength=4) / len(cells)
        rows.append([*p, *q, 0.5 * np.abs(p - q).sum()])
    columns = [(kind, cell) for kind in ("expected", "found") for cell in _CELLS]
    return pd.DataFrame(
        rows,
        index=pd.MultiIndex.from_tuples(list(expected), names=("a", "b")),
        columns=pd.MultiIndex.from_tuples([*columns, ("distance", "")]),
    )


_CELLS = ("00", "01", "10", "11")


def _features(features: np.ndarray, others: np.ndarray, *, least: int = 2) -> tuple[np.ndarray, np.ndarray]:
    a, b = np.asarray(features, dtype=float), np.asarray(others, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < least:
        raise ValueError(f"features have shapes {a.shape} and {b.shape}; give {least} rows or more each, of one length")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features hold NaN or infinite values; check the images")
    return a, b


def _inside(points: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Which points lie within the k-th neighbour's distance of any of the others."""
    # A point is its own nearest neighbour: k + 1.
    radii = nearest_neighbours(others, others, k=k + 1)[0][:, -1]
    inside = np.zeros(len(points), dtype=bool)
    for start in range(0, len(points), 1000):
        rows = slice(start, start + 1000)
        inside[rows] = (pairwise_distances(points[rows], others) <= radii).any(axis=1)
    return inside
