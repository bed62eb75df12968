"""Effects of an edit on the scores of attributes: mean changes, entanglement, leakage, success, shape of the response.

Scores are DataFrames of shape (n, attributes), probabilities in [0, 1]; rows are samples, in the same order before and
after.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from workbench.analysis.intervals import Estimate, bootstrap_counts, bootstrap_interval, share_of


@dataclass(frozen=True, eq=False)
class EffectMatrix:
    """Mean change of every attribute's score under every direction.

    Attributes
    ----------
    mean, low, high : DataFrame of shape (directions, attributes)
        Mean change over the samples and its 95% `bootstrap_interval`.
    draws : ndarray of shape (resamples, directions, attributes)
        Means of the samples drawn again, for the interval of anything that follows from the matrix.
    n : int
        Number of samples.
    """

    mean: pd.DataFrame = field(repr=False)
    low: pd.DataFrame = field(repr=False)
    high: pd.DataFrame = field(repr=False)
    draws: np.ndarray = field(repr=False)
    n: int

    def of(self, attributes: Sequence[str]) -> EffectMatrix:
        """The matrix of some attributes alone, in this order; ValueError if one is missing."""
        columns = self.mean.columns.get_indexer(list(attributes))
        if (columns < 0).any():
            missing = list(attributes)[int(np.argmin(columns))]
            raise ValueError(f"there is no attribute {missing!r}; the scores have {_listed(self.mean)}")
        mean, low, high = (frame.iloc[:, columns] for frame in (self.mean, self.low, self.high))
        return replace(self, mean=mean, low=low, high=high, draws=self.draws[:, :, columns])


def effect_matrix(
    before: pd.DataFrame | Mapping[str, pd.DataFrame],
    after: Mapping[str, pd.DataFrame],
    *,
    resamples: int = 1000,
) -> EffectMatrix:
    """Mean change of the scores, E_ab = mean over samples of score_b(edited along a) - score_b(plain).

    `before` are the scores of the plain samples, or one table a direction where they are not the same for all. The
    bootstrap draws the same samples for every direction, so that differences between directions have intervals too.
    """
    if not after:
        raise ValueError("an effect matrix needs the scores after an edit along at least one direction")
    plain = before if isinstance(before, Mapping) else dict.fromkeys(after, before)
    changes = np.stack([_change(plain[name], scores, name) for name, scores in after.items()], axis=1)
    n = len(changes)
    counts = bootstrap_counts(n, resamples=resamples, seed=0)
    mean, draws = changes.mean(axis=0), np.tensordot(counts, changes, axes=1) / n
    low, high = bootstrap_interval(mean, draws, n, bounds=(-1.0, 1.0))

    def frame(values: np.ndarray) -> pd.DataFrame:
        columns = next(iter(after.values())).columns
        return pd.DataFrame(values, index=pd.Index(list(after), name="direction"), columns=columns)

    return EffectMatrix(frame(mean), frame(low), frame(high), draws, n)


def leakage(effects: EffectMatrix, attributes: Sequence[str]) -> pd.DataFrame:
    """How much the directions change attributes that they should leave: the sum of |E_ab| over these b.

    Parameters
    ----------
    effects : EffectMatrix
        The other directions are compared with its first.
    attributes : sequence of str

    Returns
    -------
    DataFrame, one row per direction
        `leak`, and `reduction`, the share of the first direction's leak that is gone, in (-inf, 1]; each with its 95%
        bootstrap interval (`leak_low`, `leak_high`, `reduction_low`, `reduction_high`). The absolute values of noise
        don't cancel: with few samples a small leak is too large and its reduction too small.

    Raises
    ------
    ValueError
        If an attribute is not in the matrix.
    """
    part = effects.of(attributes)
    leak, drawn = (np.abs(values).sum(axis=-1) for values in (part.mean.to_numpy(), part.draws))
    with np.errstate(divide="ignore", invalid="ignore"):
        reduction, reduced = 1 - leak / leak[0], 1 - drawn / drawn[:, :1]
    measures = {"leak": (leak, drawn, (0.0, np.inf)), "reduction": (reduction, reduced, (-np.inf, 1.0))}
    columns = {}
    for name, (value, draws, bounds) in measures.items():
        low, high = bootstrap_interval(value, draws, part.n, bounds=bounds)
        columns |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return pd.DataFrame(columns, index=part.mean.index)


def at_equal_change(values: Mapping[str, np.ndarray], changes: Mapping[str, np.ndarray]) -> tuple[pd.DataFrame, float]:
    """Values of several edits, sample by sample, where all of them change the images by the same amount on average.

    That is the largest mean change that all edits reach.

    Parameters
    ----------
    values, changes : mapping of edit -> array of shape (n, scales)
        What is compared, and the change of each image. The scales rise from 0, where nothing is edited; every edit may
        have scales of its own.

    Returns
    -------
    values : DataFrame of shape (n, edits)
        Linear between the two scales between which an edit's mean change first reaches this change.
    change : float
    """
    means = {name: np.asarray(found, dtype=float).mean(axis=0) for name, found in changes.items()}
    change = min(float(mean.max()) for mean in means.values())
    at = {}
    for name, mean in means.items():
        known = np.asarray(values[name], dtype=float)
        at[name] = first_reached(np.broadcast_to(mean, known.shape), known, change)
    return pd.DataFrame(at), change


def first_reached(x: np.ndarray, y: np.ndarray, target: float) -> np.ndarray:
    """y where x first reaches the target, row by row, linear between two points; at the largest x where it does not.

    x, y : (rows, points), x from 0.
    """
    top = np.maximum.accumulate(x, axis=1)
    rows = np.arange(len(x))
    last = np.where(top[:, -1] >= target, (top < target).sum(axis=1), top.argmax(axis=1))
    last = last.clip(1, x.shape[1] - 1)
    before, after = x[rows, last - 1], x[rows, last]
    with np.errstate(invalid="ignore", divide="ignore"):
        share = np.clip((target - before) / (after - before), 0.0, 1.0)
    share = np.where(after > before, share, 1.0)
    return (1 - share) * y[rows, last - 1] + share * y[rows, last]


def success_rate(before: pd.DataFrame, after: pd.DataFrame, attribute: str) -> Estimate:
    """Share of the samples without an attribute that have it afterwards, with its Wilson interval.

    Parameters
    ----------
    before, after : DataFrame of shape (n, attributes)
    attribute : str
        A sample has it if its score is above 0.5.

    Returns
    -------
    Estimate
        NaN, of no samples, if every one has it already.

    Raises
    ------
    ValueError
        If the attribute is not there.
    """
    _change(before, after, "this edit")
    if attribute not in before.columns:
        raise ValueError(f"there is no attribute {attribute!r}; the scores have {_listed(before)}")
    without = before[attribute].to_numpy() <= 0.5
    if not without.any():
        return Estimate(float("nan"), float("nan"), float("nan"), 0)
    share = float((after[attribute].to_numpy()[without] > 0.5).mean())
    return share_of(share, int(without.sum()))


def monotonicity(scores: np.ndarray | pd.DataFrame, scales: Sequence[float]) -> np.ndarray:
    """Spearman's rank correlation of score and scale, sample by sample, of scores (n, scales) of one attribute.

    1 where the score rises from scale to scale; NaN where all are the same.
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


def linearity(scores: np.ndarray | pd.DataFrame, scales: Sequence[float]) -> np.ndarray:
    """Share of the variance of a sample's scores over 3 or more scales that a straight line explains (R squared).

    Take logits: probabilities bend where they come near 0 or 1. NaN where the score is the same at all scales.
    """
    values, x = np.asarray(scores, dtype=float), np.asarray(scales, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(x) or len(x) < 3:
        raise ValueError(f"scores of {len(x)} scales (3 or more) have shape (n, {len(x)}), not {values.shape}")
    same = np.ptp(values, axis=1) == 0  # whatever rounding leaves of them
    values, x = values - values.mean(axis=1, keepdims=True), x - x.mean()
    with np.errstate(invalid="ignore"):
        return np.where(same, np.nan, (values @ x) ** 2 / ((values**2).sum(axis=1) * (x @ x)))


def _listed(scores: pd.DataFrame) -> str:
    return ", ".join(map(str, scores.columns))


def _change(before: pd.DataFrame, after: pd.DataFrame, name: str) -> np.ndarray:
    if before.shape != after.shape or list(before.columns) != list(after.columns) or not len(before):
        shapes = f"{before.shape} with columns {list(before.columns)[:4]}, {after.shape} with {list(after.columns)[:4]}"
        raise ValueError(f"the scores before and after {name} are of other samples or attributes: {shapes}")
    change = after.to_numpy(dtype=float) - before.to_numpy(dtype=float)
    if not np.isfinite(change).all():
        raise ValueError(f"a score before or after {name} is not finite; check the classifier's output")
    return change
