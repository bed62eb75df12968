"""Linear probes: discriminants, support vector machines, regressions, and the number of samples they need.

There are far fewer samples than dimensions, and a probe is the same in every orthonormal basis of the samples' span. So
all probes are fitted through the matrix of inner products, computed once for all attributes and folds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
import pandas as pd
from scipy import linalg
from scipy.stats import norm
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import recall_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC
from threadpoolctl import threadpool_limits

from workbench.analysis.intervals import Estimate, share_of
from workbench.analysis.samples import check_labels, check_samples, gram, over_timesteps


@dataclass(frozen=True, eq=False)
class Span:
    """n samples by their centred inner products.

    Attributes
    ----------
    products : ndarray of shape (n, n)
    d : int
        Dimensions of the samples themselves.
    rank : int, optional
        Principal components that coordinates are limited to.
    """

    products: np.ndarray
    d: int
    rank: int | None = None

    @classmethod
    def of(cls, h: np.ndarray, *, rank: int | None = None) -> Span:
        """The span of samples (n, d)."""
        return cls(gram(h), h.shape[1], rank)

    @cached_property
    def axes(self) -> tuple[np.ndarray, np.ndarray]:
        """Coordinates of the samples along their principal axes, (n, r), and the weights (n, r) that give the axes."""
        n = len(self.products)
        kept = min(self.rank or n, n, self.d)
        values, vectors = linalg.eigh(self.products, subset_by_index=[n - kept, n - 1])
        there = values > 1e-10 * max(values[-1], 0.0)
        if not there.any():
            raise ValueError("all samples are the same; no probe can tell them apart")
        scale = np.sqrt(values[there])
        return vectors[:, there] * scale, vectors[:, there] / scale


@dataclass(frozen=True, eq=False)
class Probe:
    """A linear function of samples z, f(z) = sum_i a_i z_i.z + b, as weights of the samples z_i that it was fitted to.

    Attributes
    ----------
    a : ndarray of shape (n,), or (n, groups) of a discriminant of several groups
        The weights sum to 0, so that they hold for samples that are all moved by the same.
    b : float, or ndarray of shape (groups,)
    """

    a: np.ndarray
    b: float | np.ndarray

    def length(self, products: np.ndarray) -> float:
        """Length of the normal sum a_i z_i."""
        return float(np.sqrt(self.a @ products @ self.a))


def fit_probe(
    span: Span,
    y: np.ndarray,
    method: str,
    *,
    rows: np.ndarray | None = None,
    weight: np.ndarray | None = None,
    C: float = 1.0,
) -> Probe:
    """The linear probe of samples with (y true) and without an attribute, by one of four methods.

    "svm" and "logistic" are scikit-learn's `SVC(kernel="linear")` and `LogisticRegression`; the regression sees
    principal components scaled so that the first has variance 1. "lda" is `discriminant`. "mean" is the
    difference of means, with 0 halfway between them; the squared lengths of the means are taken without each sample's
    product with itself, which would put the boundary too near to the larger class.

    `rows` are the samples to fit, all by default. `weight` (n,) weighs them in "svm" and "logistic"; for "lda"
    it means equal priors instead of the classes' frequencies.
    """
    n = len(y)
    rows = np.arange(n) if rows is None else rows
    y, weight = y[rows], None if weight is None else weight[rows]
    a = np.zeros(n)
    if method in ("svm", "mean"):
        inner = span.products[np.ix_(rows, rows)]
        if method == "svm":
            machine = SVC(kernel="precomputed", C=C).fit(inner, y, sample_weight=weight)
            a[rows[machine.support_]] = machine.dual_coef_[0]
            return Probe(a, float(machine.intercept_[0]))
        a[rows] = y / y.sum() - ~y / (~y).sum()
        below, above = (_mean_square(inner, side) for side in (~y, y))
        return Probe(a, (below - above) / 2)
    x, to_samples = span.axes
    if method == "lda":
        whole = discriminant(span, y.astype(int), rows=rows)
        prior = math.log(y.sum() / (~y).sum()) if weight is None else 0.0
        return Probe(whole.a[:, 1] - whole.a[:, 0], float(whole.b[1] - whole.b[0]) + prior)
    unit = np.linalg.norm(x[:, -1]) / np.sqrt(n)
    estimator = LogisticRegression(C=C, max_iter=1000).fit(x[rows] / unit, np.where(y, 1.0, -1.0), sample_weight=weight)
    a = to_samples @ (estimator.coef_.ravel() / unit)
    return Probe(a, float(np.ravel(estimator.intercept_)[0]))


def _mean_square(products: np.ndarray, side: np.ndarray) -> float:
    """Squared length of a class' mean, without bias: from the products of different samples alone."""
    m = side.sum()
    inner = products[np.ix_(side, side)]
    return float((inner.sum() - np.trace(inner)) / (m * (m - 1)))


def discriminant(span: Span, groups: np.ndarray, *, rows: np.ndarray) -> Probe:
    """Fisher's linear discriminant of the groups 0, 1, ... of some samples: the largest f is the sample's group.

    Groups count equally. The covariance within groups is shrunk towards a multiple of the identity as Ledoit & Wolf
    (2004) do, in all d dimensions of the samples. With few samples it comes close to the difference of the means.
    """
    x, to_samples = span.axes
    x = x[rows]
    means = np.stack([x[groups == group].mean(axis=0) for group in range(groups.max() + 1)])
    within = x - means[groups]
    n = len(within)
    covariance = within.T @ within / n
    trace, square = np.trace(covariance), (covariance**2).sum()
    # How far the covariance is from the truth, and from the multiple of the identity.
    error = ((within**2).sum(axis=1) ** 2).sum() / n**2 - square / n
    distance = square - trace**2 / span.d
    shrinkage = min(error / distance, 1.0) if distance > 0 else 1.0
    covariance *= 1.0 - shrinkage
    covariance[np.diag_indices_from(covariance)] += shrinkage * trace / span.d if trace > 0 else 1.0
    normals = linalg.solve(covariance, means.T, assume_a="pos")
    return Probe(to_samples @ normals, -(means.T * normals).sum(axis=0) / 2)


def balanced_weight(weight: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Weights scaled so that each class counts as half of the samples whose weight is not 0."""
    half = np.count_nonzero(weight) / 2
    return np.where(y, weight * half / weight[y].sum(), weight * half / weight[~y].sum())


def folds_of(groups: np.ndarray, count: int, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """(train, test) positions of a cross-validation whose folds share each group evenly."""
    return list(StratifiedKFold(count, shuffle=True, random_state=seed).split(groups, groups))


# Separability


@dataclass(frozen=True, eq=False)
class Separability:
    """How well a linear probe tells groups apart, on samples that it has not seen.

    Attributes
    ----------
    balanced_accuracy : Estimate
        Mean of the groups' recalls. Its n is the number of trials of a plain accuracy with the same sampling error,
        groups^2 / sum(1 / group size). The interval is Wilson's, widened by `intervals.CROSS_VALIDATED`: the folds
        share training samples, so their predictions are not independent.
    chance : float
        One over the number of groups.
    accuracy : float in [0, 1]
    correct : ndarray of shape (n,), bool
    shuffled : bool
        Whether the labels were permuted, as a control.
    """

    balanced_accuracy: Estimate
    chance: float
    accuracy: float
    correct: np.ndarray = field(repr=False)
    shuffled: bool = False

    def row(self) -> dict[str, Any]:
        """For a table with one row per probe."""
        found = self.balanced_accuracy
        row = {"balanced_accuracy": found.value, "low": found.low, "high": found.high, "chance": self.chance}
        counts = {"n": len(self.correct), "n_effective": found.n}
        return row | {"accuracy": self.accuracy} | counts | {"shuffled": self.shuffled}


def separabilities(
    h: Any, labels: Any, *, folds: int = 5, seed: int = 0, shuffled: bool = False
) -> dict[str, Separability]:
    """Cross-validated accuracy of a linear probe, attribute by attribute.

    The probe is the shrunk linear `discriminant`. A high accuracy says something beside the controls alone: shuffled
    labels, pixels, and forward-diffused images.

    Parameters
    ----------
    h : array of shape (n, ...)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays
        Of two values or more; each has at least `folds` samples.
    folds : int, default 5
    seed : int, default 0
        Of the folds and the shuffling.
    shuffled : bool, default False
        Permute the labels, the control that must come out at chance.

    Returns
    -------
    dict of attribute -> Separability

    Raises
    ------
    ValueError
        If labels are constant or missing, a group is smaller than `folds`, or a value is not finite.
    """
    h = check_samples(h)
    by_name, span = check_labels(labels, len(h)), Span.of(h)
    # Matrices of this size are faster in one thread, by far where other work shares the machine.
    with threadpool_limits(1, user_api="blas"):
        return {
            name: _separability(span, values, folds=folds, seed=seed, shuffled=shuffled)
            for name, values in by_name.items()
        }


def _separability(span: Span, labels: np.ndarray, *, folds: int, seed: int, shuffled: bool) -> Separability:
    names, groups, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= folds <= sizes.min():
        smallest = int(np.argmin(sizes))
        of = f"the group {names[smallest]!s} has {sizes[smallest]} samples"
        raise ValueError(f"folds is {folds}, and {of}; take 2 to {sizes.min()} folds, or more samples")
    if shuffled:
        groups = np.random.default_rng(seed).permutation(groups)
    predicted = np.empty_like(groups)
    for train, test in folds_of(groups, folds, seed):
        probe = discriminant(span, groups[train], rows=train)
        predicted[test] = (span.products[test] @ probe.a + probe.b).argmax(axis=1)
    correct = predicted == groups
    balanced = float(recall_score(groups, predicted, average="macro"))
    effective = float(len(sizes) ** 2 / (1 / sizes).sum())
    estimate = share_of(balanced, effective, cross_validated=True)
    return Separability(estimate, 1 / len(sizes), float(correct.mean()), correct, shuffled)


def separability_over_time(
    h_by_t: Any, labels: Any, *, folds: int = 5, seed: int = 0, control: bool = True
) -> pd.DataFrame:
    """`separabilities` of every attribute at every timestep.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays
    folds, seed
        As in `separabilities`; the folds are the same at every timestep.
    control : bool, default True
        Add rows of shuffled labels.

    Returns
    -------
    DataFrame
        One row per timestep, attribute and kind of labels: `t`, `attribute`, `balanced_accuracy`, `low`, `high`,
        `chance`, `accuracy`, `n`, `n_effective`, `shuffled`.

    Raises
    ------
    ValueError
        As in `separabilities`, and if there is only one timestep.
    """
    rows = []
    for t, h in over_timesteps(h_by_t, progress="separability"):
        for shuffled in (False, True) if control else (False,):
            probes = separabilities(h, labels, folds=folds, seed=seed, shuffled=shuffled)
            rows += [{"t": t, "attribute": name} | probe.row() for name, probe in probes.items()]
    return pd.DataFrame(rows)


# How many samples


def expected_accuracy(delta: float, d: int, n: int) -> float:
    """Expected accuracy of a linear boundary from n samples in d dimensions.

    Two classes of n/2 samples each have isotropic noise of deviation 1, and means at a distance delta. The difference
    of the sample means has the cosine delta / sqrt(delta^2 + 4 d / n) to the true one, which gives

    accuracy = Phi(delta^2 / (2 sqrt(delta^2 + 4 d / n))),

    and Phi(delta / 2) for n -> infinity. With isotropic noise it holds for "mean", and nearly for "svm"; otherwise
    probes that learn the noise's covariance ("svm", "lda") exceed it with many samples.

    Parameters
    ----------
    delta : float
        Distance of the means, divided by the noise's deviation along one axis.
    d : int
        Number of dimensions.
    n : int
        Number of samples, both classes together.

    Returns
    -------
    float in [0.5, 1]
    """
    return float(norm.cdf(delta**2 / (2 * math.sqrt(delta**2 + 4 * d / n)))) if delta > 0 else 0.5


def samples_needed(accuracy: float, *, delta: float, d: int) -> float:
    """Number of samples at which `expected_accuracy` reaches an accuracy.

    Parameters
    ----------
    accuracy : float in (0.5, 1)
    delta : float
    d : int

    Returns
    -------
    float
        inf if no number of samples is enough.
    """
    q = float(norm.ppf(accuracy))
    rest = delta**4 / (4 * q**2) - delta**2
    return 4 * d / rest if rest > 0 else math.inf


def class_separation(products: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """delta and d of `expected_accuracy` for samples whose noise is not isotropic, from their inner products.

    With D the difference of the true means and S the covariance within the classes, the difference v of the sample
    means separates new samples by |D|^2 with the variance v'Sv = D'SD + (1/n+ + 1/n-) tr S^2, on average. That is the
    law for delta = |D| / s and d = tr S^2 / s^4, where s^2 = D'SD / |D|^2 is the noise along D; isotropic noise has
    d dimensions. |D|^2, D'SD and tr S^2 are estimated without bias, as for Gaussian noise; s^2 is taken as at least a
    tenth of tr S^2 / tr S, below which few samples can't tell it from 0.

    Parameters
    ----------
    products : ndarray of shape (n, n)
        Of at least 4 samples.
    y : ndarray of shape (n,), bool
        At least 2 of each class.

    Returns
    -------
    delta, d : float
        delta is 0 where the means are not farther apart than noise puts them.
    """
    n, share = len(y), 1 / y.sum() + 1 / (~y).sum()
    a = y / y.sum() - ~y / (~y).sum()
    within, dof = _less_means(_less_means(products, y).T, y), n - 2
    trace, square = np.trace(within) / dof, (within**2).sum() / dof**2
    # tr S^2 of a sample covariance is too large by what its noise adds (Gaussian, `dof` degrees of freedom).
    square = dof**2 / ((dof - 1) * (dof + 2)) * (square - trace**2 / dof)
    square = max(square, trace**2 * 1e-12)
    distance = a @ products @ a - share * trace
    if distance <= 0.0:
        return 0.0, trace**2 / square
    along = (_less_means(products @ a, y) ** 2).sum() / dof - share * square
    s2 = max(along / distance, 0.1 * square / trace)
    return float(np.sqrt(distance / s2)), float(square / s2**2)


def _less_means(values: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Rows less the mean of their class."""
    means = np.stack([values[~y].mean(axis=0), values[y].mean(axis=0)])
    return values - means[y.astype(int)]
