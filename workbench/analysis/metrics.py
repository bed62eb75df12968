"""What an edit does to the scores of attributes: effects, entanglement, success, monotonicity.

Scores are DataFrames of shape (n, attributes), probabilities in [0, 1]; rows are samples, in the same order before and
after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import NormalDist

import numpy as np
import pandas as pd

LEVEL = 0.95


@dataclass(frozen=True, eq=False)
class EffectMatrix:
    """Mean change of every attribute's score under every direction.

    Attributes
    ----------
    mean, low, high : DataFrame of shape (directions, attributes)
        Mean change over the samples and its 95% bootstrap interval.
    draws : ndarray of shape (resamples, directions, attributes)
        Means of the samples drawn again, for the interval of anything that follows from the matrix.
    n : int
        Number of samples.
    """

    mean: pd.DataFrame
    low: pd.DataFrame = field(repr=False)
    high: pd.DataFrame = field(repr=False)
    draws: np.ndarray = field(repr=False)
    n: int

    def of(self, attributes: Sequence[str]) -> EffectMatrix:
        """The matrix of some attributes alone, in this order; ValueError if one is not there."""
        columns = self.mean.columns.get_indexer(list(attributes))
        if (columns < 0).any():
            missing = list(attributes)[int(np.argmin(columns))]
            raise ValueError(f"there is no attribute {missing!r}; the scores have {_listed(self.mean.columns)}")
        mean, low, high = (frame.iloc[:, columns] for frame in (self.mean, self.low, self.high))
        return replace(self, mean=mean, low=low, high=high, draws=self.draws[:, :, columns])

    def __repr__(self) -> str:
        return f"EffectMatrix({len(self.mean)} directions x {self.mean.shape[1]} attributes, {self.n} samples)"


@dataclass(frozen=True)
class Rate:
    """A share with its 95% Wilson interval.

    Attributes
    ----------
    value, low, high : float in [0, 1]
    n : int
        Number of samples that could succeed.
    """

    value: float
    low: float
    high: float
    n: int

    @classmethod
    def of(cls, share: float, n: int) -> Rate:
        """A share of n with its interval."""
        return cls(share, *_wilson(share, n), n)

    def __repr__(self) -> str:
        return f"Rate({self.value:.1%}, {self.low:.1%}..{self.high:.1%}, n={self.n})"


def effect_matrix(
    before: pd.DataFrame | Mapping[str, pd.DataFrame],
    after: Mapping[str, pd.DataFrame],
    *,
    resamples: int = 1000,
    seed: int = 0,
) -> EffectMatrix:
    """Mean change of the scores, E_ab = mean over samples of score_b(edited along a) - score_b(plain).

    Parameters
    ----------
    before : DataFrame of shape (n, attributes)
        Scores of the plain samples; or one DataFrame a direction, where they are not the same for all.
    after : mapping of direction's name -> DataFrame of shape (n, attributes)
    resamples : int, default 1000
        The samples are drawn again that often, the same ones for every direction, so that differences between
        directions have intervals too.
    seed : int

    Returns
    -------
    EffectMatrix

    Raises
    ------
    ValueError
        If there is no direction, tables differ in rows or columns, or a score is not finite.
    """
    if not after:
        raise ValueError("an effect matrix needs the scores after an edit along at least one direction")
    plain = before if isinstance(before, Mapping) else dict.fromkeys(after, before)
    changes = np.stack([_change(plain[name], scores, name) for name, scores in after.items()], axis=1)
    n = len(changes)
    rng = np.random.default_rng(seed)
    counts = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(resamples)])
    draws = np.tensordot(counts, changes, axes=1) / n
    low, high = np.quantile(draws, (0.5 - LEVEL / 2, 0.5 + LEVEL / 2), axis=0)

    def frame(values: np.ndarray) -> pd.DataFrame:
        columns = next(iter(after.values())).columns
        return pd.DataFrame(values, index=pd.Index(list(after), name="direction"), columns=columns)

    return EffectMatrix(frame(changes.mean(axis=0)), frame(low), frame(high), draws, n)


def entanglement_index(effects: EffectMatrix | pd.DataFrame, *, own: Mapping[str, str] | None = None) -> pd.DataFrame:
    """How much a direction changes besides its own attribute: sum over b != a of |E_ab| / |E_aa|.

    Parameters
    ----------
    effects : EffectMatrix, or DataFrame of shape (directions, attributes)
    own : mapping of direction -> attribute, optional
        By default a direction has the name of its attribute.

    Returns
    -------
    DataFrame, one row a direction
        Column `index`, 0 if nothing else changes and inf if its own attribute does not; of an EffectMatrix also `low`
        and `high`, its 95% bootstrap interval. The absolute values of noise don't cancel: with few samples the index
        is too large.

    Raises
    ------
    ValueError
        If a direction's attribute is not in the matrix.
    """
    mean = effects.mean if isinstance(effects, EffectMatrix) else effects
    own = {name: name for name in mean.index} if own is None else dict(own)
    strangers = [name for name in mean.index if own.get(name) not in mean.columns]
    if strangers:
        raise ValueError(
            f"the attribute of {strangers[0]!r} is not among {_listed(mean.columns)}; "
            "name it with own={direction: attribute}"
        )
    columns = mean.columns.get_indexer([own[name] for name in mean.index])

    def index(matrices: np.ndarray) -> np.ndarray:
        sizes = np.abs(matrices)
        aimed = sizes[..., np.arange(len(columns)), columns]
        with np.errstate(divide="ignore", invalid="ignore"):
            return np.where(aimed > 0, (sizes.sum(axis=-1) - aimed) / aimed, np.inf)

    found = pd.DataFrame({"index": index(mean.to_numpy())}, index=mean.index)
    if isinstance(effects, EffectMatrix):
        # "lower": neighbouring draws of inf have no mean.
        bounds = np.quantile(index(effects.draws), (0.5 - LEVEL / 2, 0.5 + LEVEL / 2), axis=0, method="lower")
        found["low"], found["high"] = bounds
    return found


def leakage(effects: EffectMatrix, attributes: Sequence[str]) -> pd.DataFrame:
    """How much the directions change attributes that they should leave: the sum of |E_ab| over these b.

    Parameters
    ----------
    effects : EffectMatrix
        Its first direction is what the others are compared with.
    attributes : sequence of str

    Returns
    -------
    DataFrame, one row a direction
        `leak`, and `fall`, the share of the first direction's leak that is gone, in (-inf, 1]; each with its 95%
        bootstrap interval (`leak_low`, `leak_high`, `fall_low`, `fall_high`). The absolute values of noise don't
        cancel: with few samples a small leak is too large and its fall too small.

    Raises
    ------
    ValueError
        If an attribute is not in the matrix.
    """
    part = effects.of(attributes)
    leak, drawn = (np.abs(values).sum(axis=-1) for values in (part.mean.to_numpy(), part.draws))
    with np.errstate(divide="ignore", invalid="ignore"):
        fall, fallen = 1 - leak / leak[0], 1 - drawn / drawn[:, :1]
    ends = (0.5 - LEVEL / 2, 0.5 + LEVEL / 2)
    (leak_low, leak_high), (fall_low, fall_high) = (np.quantile(values, ends, axis=0) for values in (drawn, fallen))
    columns = {"leak": leak, "leak_low": leak_low, "leak_high": leak_high}
    columns |= {"fall": fall, "fall_low": fall_low, "fall_high": fall_high}
    return pd.DataFrame(columns, index=part.mean.index)


def success_rate(before: pd.DataFrame, after: pd.DataFrame, attribute: str, *, threshold: float = 0.5) -> Rate:
    """Share of the samples without an attribute that have it afterwards, with its Wilson interval.

    Parameters
    ----------
    before, after : DataFrame of shape (n, attributes)
    attribute : str
    threshold : float, default 0.5
        A sample has the attribute if its score is above.

    Returns
    -------
    Rate

    Raises
    ------
    ValueError
        If the attribute is not there, or every sample has it already.
    """
    _change(before, after, "this edit")
    if attribute not in before.columns:
        raise ValueError(f"there is no attribute {attribute!r}; the scores have {_listed(before.columns)}")
    without = before[attribute].to_numpy() <= threshold
    n = int(without.sum())
    if n == 0:
        raise ValueError(f"all {len(before)} samples have {attribute} already; edit some that don't")
    share = float((after[attribute].to_numpy()[without] > threshold).mean())
    return Rate.of(share, n)


def monotonicity(scores: np.ndarray | pd.DataFrame, scales: Sequence[float]) -> np.ndarray:
    """Spearman's rank correlation of score and scale, sample by sample.

    Parameters
    ----------
    scores : array of shape (n, scales)
        Scores of one attribute.
    scales : sequence of float

    Returns
    -------
    ndarray of shape (n,), values in [-1, 1]
        1 where the score rises from scale to scale; NaN where it is the same at all.

    Raises
    ------
    ValueError
        If the scores have another number of columns than there are scales, or fewer than two.
    """
    values = np.asarray(scores, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(scales) or len(scales) < 2:
        raise ValueError(f"scores of {len(scales)} scales have shape (n, {len(scales)}), not {values.shape}")
    ranks = pd.DataFrame(values).rank(axis=1).to_numpy()
    ranks = ranks - ranks.mean(axis=1, keepdims=True)
    steps = pd.Series(list(scales)).rank().to_numpy()
    steps = steps - steps.mean()
    with np.errstate(invalid="ignore"):
        return ranks @ steps / (np.linalg.norm(ranks, axis=1) * np.linalg.norm(steps))


def peak_signal_to_noise(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """10 log10(4 / mean squared difference) of images in [-1, 1], pair by pair; dB, inf for equal ones.

    Parameters
    ----------
    images, others : array of shape (n, ...)

    Returns
    -------
    ndarray of shape (n,)
    """
    a, b = (np.asarray(values, dtype=float).reshape(len(values), -1) for values in (images, others))
    with np.errstate(divide="ignore"):
        return 10.0 * np.log10(4.0 / ((a - b) ** 2).mean(axis=1))


def kernel_distance(features: np.ndarray, others: np.ndarray) -> float:
    """Squared maximum mean discrepancy of two sets of features, without bias (KID, Binkowski et al. 2018, eq. 4).

    The kernel is (x.y / d + 1)^3. Of two samples of one distribution it is 0 on average, and can be negative.

    Parameters
    ----------
    features, others : array of shape (n, d), (m, d)
        At least 2 of each.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there are fewer than 2 of one, or they have other numbers of features.
    """
    a, b = np.asarray(features, dtype=float), np.asarray(others, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a), len(b)) < 2:
        raise ValueError(f"features have shapes {a.shape} and {b.shape}; give at least 2 rows each, of one length")

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x @ y.T / x.shape[1] + 1.0) ** 3

    within = [(k.sum() - np.trace(k)) / (len(k) * (len(k) - 1)) for k in (kernel(a, a), kernel(b, b))]
    return float(sum(within) - 2.0 * kernel(a, b).mean())


def _listed(names: pd.Index) -> str:
    return ", ".join(map(str, names))


def _wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's interval of a share of n (Wilson 1927)."""
    z = NormalDist().inv_cdf(0.5 + LEVEL / 2)
    centre = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z / (1 + z**2 / n) * (share * (1 - share) / n + z**2 / (4 * n**2)) ** 0.5
    return max(0.0, centre - half), min(1.0, centre + half)


def _change(before: pd.DataFrame, after: pd.DataFrame, name: str) -> np.ndarray:
    if before.shape != after.shape or list(before.columns) != list(after.columns) or not len(before):
        raise ValueError(
            f"the scores before and after {name} are of other samples or attributes: {before.shape} with columns "
            f"{list(before.columns)[:4]}, and {after.shape} with {list(after.columns)[:4]}"
        )
    change = after.to_numpy(dtype=float) - before.to_numpy(dtype=float)
    if not np.isfinite(change).all():
        raise ValueError(f"a score before or after {name} is not finite; check the classifier's output")
    return change
