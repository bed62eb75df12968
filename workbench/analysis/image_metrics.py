"""How images differ, and how real generated ones are.

Images are arrays of shape (n, C, H, W) in [-1, 1], features of shape (n, d), one row an image: what a classifier's last
layer sees, or the pixels themselves; whoever computes them is not here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats
from sklearn.metrics import pairwise_distances
from sklearn.neighbors import NearestNeighbors

from workbench.analysis.intervals import QUANTILES, Estimate, bootstrap_counts, share_of

# Pair by pair


def peak_signal_to_noise(images: np.ndarray, others: np.ndarray, *, mask: np.ndarray | None = None) -> np.ndarray:
    """10 log10(4 / mean squared difference) of images in [-1, 1], pair by pair; dB, inf for equal ones.

    Only the values of a bool `mask` that broadcasts to the images count; NaN for an image of which none does.
    """
    a, b = (np.asarray(values, dtype=float) for values in (images, others))
    squares = ((a - b) ** 2).reshape(len(a), -1)
    counted = np.ones_like(squares) if mask is None else np.broadcast_to(mask, a.shape).reshape(len(a), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10.0 * np.log10(4.0 / ((squares * counted).sum(axis=1) / counted.sum(axis=1)))


def perceptual_distance(maps: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """Distance of a network's feature maps (n, C_l, H_l, W_l), one per layer, pair by pair (Zhang et al. 2018, eq. 1).

    At every pixel of every layer both feature vectors are scaled to length 1; their squared difference is averaged
    over the pixels, and summed over the layers. All channel weights are 1: LPIPS has weights that were fitted to human
    judgement; there are none for other networks than its own.
    """
    total = np.zeros(len(maps[0]))
    for a, b in zip(maps, others, strict=True):
        a, b = (np.asarray(m, dtype=float) for m in (a, b))
        a, b = (m / (np.linalg.norm(m, axis=1, keepdims=True) + 1e-10) for m in (a, b))
        total = total + ((a - b) ** 2).sum(axis=1).mean(axis=(1, 2))
    return total


def cosine_similarity(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of the angle between feature vectors, pair by pair: identity, if a network of faces gives them.

    NaN where one of both is zero.
    """
    a, b = (np.asarray(values, dtype=float) for values in (features, others))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def directional_similarity(
    images: np.ndarray, edited: np.ndarray, *, source: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """S_dir: whether images moved in CLIP's space as the text did (Kim et al. 2022, DiffusionCLIP).

    cos(E_I(edited) - E_I(image), E_T(target) - E_T(source)), of embeddings (n, d) of the images and (d,) or
    (templates, d) of the texts, scaled to length 1 first; templates are averaged. NaN where an image did not move.
    """
    before, after, first, second = (_scaled(np.atleast_2d(e)) for e in (images, edited, source, target))
    text = _scaled((second.mean(axis=0) - first.mean(axis=0))[None])
    return cosine_similarity(after - before, np.broadcast_to(text, after.shape))


def segmentation_consistency(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """SC: mean intersection over union of two segmentations (n, H, W), over the classes that either has.

    An image that was not edited has 1, so it says nothing without a measure of success beside it.
    """
    found = []
    for a, b in zip(maps, others, strict=True):
        classes = np.union1d(a, b)
        found.append(np.mean([((a == c) & (b == c)).sum() / ((a == c) | (b == c)).sum() for c in classes]))
    return np.array(found)


# Sets


def diversity(features: np.ndarray) -> float:
    """Root mean square distance of pairs of different samples, of features (n, d)."""
    return float(np.sqrt(2.0 * np.var(np.asarray(features, dtype=float), axis=0, ddof=1).sum()))


def frechet_distance(features: np.ndarray, others: np.ndarray, *, groups: int = 1) -> float:
    """Frechet distance of the Gaussians with the means and covariances of two sets of features (FID, Heusel 2017).

    ||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). With S = A'A, tr (S_1 S_2)^(1/2) is the nuclear norm of A_1
    A_2', which holds for singular covariances too. Of fewer samples than features it is too large, the more so the
    fewer there are: compare it with that of two sets of real images of the same sizes.

    `features` may be the same n samples in several versions, one after the other, as `groups` says. The distance is
    then that of n samples, each in one of its versions: the mean over sets in which every version of every sample comes
    once.
    """
    a, b = _features(features, others, groups)
    return float(_frechet_distances(a, b, [np.ones(a.shape[1], bool)])[0])


def frechet_distance_interval(features: np.ndarray, others: np.ndarray, *, groups: int = 1) -> tuple[float, float]:
    """95% interval of `frechet_distance` over the samples of the first set, by the jackknife of 16 folds.

    Each fold of the samples, all versions together, is left out in turn. The sets that stay are of one size, so what
    their size adds to the distance does not spread; it is in the interval as it is in the distance. NaN of fewer than
    3 samples.
    """
    a, b = _features(features, others, groups)
    n = a.shape[1]
    if n < 3:
        return float("nan"), float("nan")
    folds = min(16, n)
    fold = np.arange(n) % folds
    whole, *parts = _frechet_distances(a, b, [fold != k for k in range(-1, folds)])
    error = np.sqrt((folds - 1) * np.var(parts))
    half = stats.t.ppf(QUANTILES[1], folds - 1) * error
    return float(whole - half), float(whole + half)


def _frechet_distances(a: np.ndarray, b: np.ndarray, kept: Sequence[np.ndarray]) -> list[float]:
    """`frechet_distance` of some samples of a (groups, n, d) from all of b, for every mask of samples in `kept`."""

    def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean, and a triangle with the covariance as its A'A, of at most d rows."""
        root = np.asarray(np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(len(x) - 1), mode="r"))
        return x.mean(axis=0), root

    def distance(x: np.ndarray) -> float:
        mean, root = gaussian(x)
        traces = (root**2).sum() + (target_root**2).sum()
        return ((mean - target_mean) ** 2).sum() + traces - 2 * np.linalg.norm(root @ target_root.T, "nuc")

    groups, n, _ = a.shape
    target_mean, target_root = gaussian(b)
    sets = [a[(np.arange(n) + turn) % groups, np.arange(n)] for turn in range(groups)]
    return [float(np.mean([distance(each[mask]) for each in sets])) for mask in kept]


def kernel_distance(features: np.ndarray, others: np.ndarray, *, groups: int = 1) -> float:
    """Squared maximum mean discrepancy of two sets of features, without bias (KID, Binkowski et al. 2018, eq. 4).

    The kernel is (x.y / d + 1)^3. Of two samples of one distribution it is 0 on average, and can be negative. `groups`
    as of `frechet_distance`; two versions of one sample are no pair of samples.
    """
    a, b = _features(features, others, groups)
    return float(_kernel_distances(a, b, np.ones((1, a.shape[1])))[0])


def kernel_distance_interval(features: np.ndarray, others: np.ndarray, *, groups: int = 1) -> tuple[float, float]:
    """95% interval of `kernel_distance` over the samples of the first set, all versions of one drawn together.

    The samples are drawn with replacement and each drawn one is taken once, since one that is taken twice would be its
    own neighbour. Of such subsets, a share f of the samples, a mean varies (1 - f) / f times as much as that of n new
    samples would; their spread is scaled to it.
    """
    a, b = _features(features, others, groups)
    drawn = bootstrap_counts(a.shape[1], resamples=200, seed=0) > 0
    drawn = drawn[drawn.sum(axis=1) > 1]
    whole, *parts = _kernel_distances(a, b, np.vstack([np.ones(a.shape[1]), drawn]))
    share = drawn.mean()
    spread = (np.array(parts) - np.mean(parts)) * np.sqrt(share / (1.0 - share))
    low, high = whole + np.quantile(spread, QUANTILES)
    return float(low), float(high)


def _kernel_distances(a: np.ndarray, b: np.ndarray, taken: np.ndarray) -> np.ndarray:
    """`kernel_distance` of some samples of a (groups, n, d) from all of b, for every row of `taken`, of 0 and 1."""

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    def within(k: np.ndarray, taken: np.ndarray) -> np.ndarray:
        m = taken.sum(axis=1)
        return (np.einsum("ij,ij->i", taken @ k, taken) - taken @ np.diagonal(k)) / (m * (m - 1))

    groups, n, d = a.shape
    rows = a.reshape(groups * n, d)
    # Means over the versions of either sample; the diagonal, which is left out, has all those of one.
    pairs = kernel(rows, rows).reshape(groups, n, groups, n).mean(axis=(0, 2))
    target = within(kernel(b, b), np.ones((1, len(b))))
    between = taken @ kernel(rows, b).reshape(groups, n, -1).mean(axis=(0, 2)) / taken.sum(axis=1)
    return within(pairs, taken) + target - 2.0 * between


@dataclass(frozen=True)
class PrecisionRecall:
    """How much of what is generated is real, and how much of what is real is generated."""

    precision: Estimate
    recall: Estimate


def precision_recall(generated: np.ndarray, real: np.ndarray, *, k: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019, eq. 1 and 2), with Wilson intervals.

    A point lies in a set if it is within the distance from one of its points to that one's k-th neighbour in the set.
    Precision is the share of generated points in the set of real ones, recall that of real ones in the generated set.
    Both depend on the numbers of points: compare at equal ones.
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
    a, b = _features(points, others, fewest=1)
    if not 1 <= k <= len(b):
        raise ValueError(f"k is {k}; of {len(b)} points give 1 to {len(b)}")
    return NearestNeighbors(n_neighbors=k, algorithm="brute").fit(b).kneighbors(a)


def memorisation(generated: np.ndarray, training: np.ndarray, held_out: np.ndarray, *, seed: int = 0) -> Estimate:
    """Share of generated points that are nearer to a training point than to a held-out one, at equal numbers of both.

    A model that has learned the distribution and not its training set gives a half; one that repeats its training
    images gives 1. This is the data-copying test of Meehan et al. 2020 in its simplest form. Of the larger one of the
    two sets as many points are drawn as the smaller one has.
    """
    rng, m = np.random.default_rng(seed), min(len(training), len(held_out))
    near = [
        nearest_neighbours(generated, points[rng.choice(len(points), m, replace=False)])[0][:, 0]
        for points in (np.asarray(training), np.asarray(held_out))
    ]
    closer = (near[0] < near[1]) + 0.5 * (near[0] == near[1])
    return share_of(float(closer.mean()), len(closer))


def attribute_frequencies(labels: pd.DataFrame, expected: Mapping[str, float]) -> pd.DataFrame:
    """How often samples have an attribute (labels 0 or 1), against how often they should.

    One row an attribute of `expected`: `expected`, `found` with its Wilson interval `low`, `high`, and `distance`, the
    total variation, |found - expected| for two outcomes.
    """
    _check_labelled(labels, expected)
    rows = {}
    for name, share in expected.items():
        found = share_of(float(labels[name].mean()), len(labels))
        ends = {"found": found.value, "low": found.low, "high": found.high}
        rows[name] = {"expected": share} | ends | {"distance": abs(found.value - share)}
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("attribute")


def joint_frequencies(labels: pd.DataFrame, expected: Mapping[tuple[str, str], Sequence[float]]) -> pd.DataFrame:
    """The same for pairs of attributes (a, b): the joint frequencies of neither, b alone, a alone, and both.

    One row per pair: `expected` and `found`, each four times (second level of columns: `00`, `01`, `10`, `11`), and
    `distance`, the total variation, half the sum of the absolute differences.
    """
    rows = []
    for (a, b), probabilities in expected.items():
        _check_labelled(labels, (a, b))
        p = np.asarray(probabilities, dtype=float)
        cells = 2 * labels[a].to_numpy().astype(int) + labels[b].to_numpy().astype(int)
        q = np.bincount(cells, minlength=4) / len(cells)
        rows.append([*p, *q, 0.5 * np.abs(p - q).sum()])
    columns = pd.MultiIndex.from_product([("expected", "found"), ("00", "01", "10", "11")]).append(
        pd.MultiIndex.from_tuples([("distance", "")])
    )
    return pd.DataFrame(rows, index=pd.MultiIndex.from_tuples(list(expected), names=("a", "b")), columns=columns)


def _check_labelled(labels: pd.DataFrame, names: Iterable[str]) -> None:
    missing = [name for name in names if name not in labels]
    if missing:
        raise ValueError(f"there are no labels for {', '.join(missing)}; there are for {', '.join(labels)}")


def _inside(points: np.ndarray, others: np.ndarray, k: int) -> np.ndarray:
    """Which points lie within the k-th neighbour's distance of any of the others."""
    # A point is its own nearest neighbour: k + 1.
    radii = nearest_neighbours(others, others, k=k + 1)[0][:, -1]
    inside = np.zeros(len(points), dtype=bool)
    for start in range(0, len(points), 1000):
        rows = slice(start, start + 1000)
        inside[rows] = (pairwise_distances(points[rows], others) <= radii).any(axis=1)
    return inside


def _features(
    features: np.ndarray, others: np.ndarray, groups: int | None = None, *, fewest: int = 2
) -> tuple[np.ndarray, np.ndarray]:
    """Two sets of features, (n, d) and (m, d); of `groups` versions of the same samples the first is (groups, n, d)."""
    a, b = np.asarray(features, dtype=float), np.asarray(others, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a) // (groups or 1), len(b)) < fewest:
        raise ValueError(
            f"features have shapes {a.shape} and {b.shape}; give {fewest} or more rows each, of one length"
        )
    if len(a) % (groups or 1):
        raise ValueError(f"{len(a)} rows are not {groups} versions of the same samples; give as many of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features are NaN or infinite; check the images and the network that they come from")
    return a if groups is None else a.reshape(groups, -1, a.shape[1]), b


def _scaled(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    vectors = np.asarray(vectors, dtype=float)
    with np.errstate(invalid="ignore"):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
