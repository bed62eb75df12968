"""What an edit does: to the scores of attributes, to the rest of the image, and to how real the images are.

Scores are DataFrames of shape (n, attributes), probabilities in [0, 1]; rows are samples, in the same order before and
after. Images are arrays of shape (n, C, H, W) in [-1, 1], features of shape (n, d); whoever computes them is not here.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats

from workbench.analysis.intervals import QUANTILES, Estimate, bootstrap_counts, share_of


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
    counts = bootstrap_counts(n, resamples=resamples, seed=seed)
    draws = np.tensordot(counts, changes, axes=1) / n
    low, high = np.quantile(draws, QUANTILES, axis=0)

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
        bounds = np.quantile(index(effects.draws), QUANTILES, axis=0, method="lower")
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
    (leak_low, leak_high), (fall_low, fall_high) = (
        np.quantile(values, QUANTILES, axis=0) for values in (drawn, fallen)
    )
    columns = {"leak": leak, "leak_low": leak_low, "leak_high": leak_high}
    columns |= {"fall": fall, "fall_low": fall_low, "fall_high": fall_high}
    return pd.DataFrame(columns, index=part.mean.index)


def success_rate(before: pd.DataFrame, after: pd.DataFrame, attribute: str, *, threshold: float = 0.5) -> Estimate:
    """Share of the samples without an attribute that have it afterwards, with its Wilson interval.

    Parameters
    ----------
    before, after : DataFrame of shape (n, attributes)
    attribute : str
    threshold : float, default 0.5
        A sample has the attribute if its score is above.

    Returns
    -------
    Estimate

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
    return share_of(share, n)


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


def linearity(scores: np.ndarray | pd.DataFrame, scales: Sequence[float]) -> np.ndarray:
    """Share of the variance of a sample's scores over scales that a straight line explains (R squared).

    Parameters
    ----------
    scores : array of shape (n, scales)
        Of one attribute; take logits, since probabilities bend where they come near 0 or 1.
    scales : sequence of float
        At least 3: two points lie on a line.

    Returns
    -------
    ndarray of shape (n,), values in [0, 1]
        NaN where the score is the same at all scales.

    Raises
    ------
    ValueError
        If the scores have another number of columns than there are scales, or fewer than three.
    """
    values, x = np.asarray(scores, dtype=float), np.asarray(scales, dtype=float)
    if values.ndim != 2 or values.shape[1] != len(x) or len(x) < 3:
        raise ValueError(f"scores of {len(x)} scales (3 or more) have shape (n, {len(x)}), not {values.shape}")
    same = np.ptp(values, axis=1) == 0  # whatever rounding leaves of them
    values, x = values - values.mean(axis=1, keepdims=True), x - x.mean()
    with np.errstate(invalid="ignore"):
        return np.where(same, np.nan, (values @ x) ** 2 / ((values**2).sum(axis=1) * (x @ x)))


def peak_signal_to_noise(images: np.ndarray, others: np.ndarray, *, mask: np.ndarray | None = None) -> np.ndarray:
    """10 log10(4 / mean squared difference) of images in [-1, 1], pair by pair; dB, inf for equal ones.

    Parameters
    ----------
    images, others : array of shape (n, ...)
    mask : bool array that broadcasts to their shape, optional
        Only these values count; NaN for an image of which none does.

    Returns
    -------
    ndarray of shape (n,)
    """
    a, b = (np.asarray(values, dtype=float) for values in (images, others))
    squares = ((a - b) ** 2).reshape(len(a), -1)
    counted = np.ones_like(squares) if mask is None else np.broadcast_to(mask, a.shape).reshape(len(a), -1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return 10.0 * np.log10(4.0 / ((squares * counted).sum(axis=1) / counted.sum(axis=1)))


def perceptual_distance(maps: Sequence[np.ndarray], others: Sequence[np.ndarray]) -> np.ndarray:
    """Distance of a network's feature maps, pair by pair (Zhang et al. 2018, eq. 1, with all channel weights 1).

    At every pixel of every layer both feature vectors are scaled to length 1; their squared difference is averaged
    over the pixels, and summed over the layers. LPIPS has channel weights that were fitted to human judgement; there
    are none for other networks than its own.

    Parameters
    ----------
    maps, others : sequence of arrays of shape (n, C_l, H_l, W_l)
        One a layer.

    Returns
    -------
    ndarray of shape (n,), values in [0, 2 * layers] for maps that are not negative
    """
    total = 0.0
    for a, b in zip(maps, others, strict=True):
        a, b = (np.asarray(m, dtype=float) for m in (a, b))
        a, b = (m / (np.linalg.norm(m, axis=1, keepdims=True) + 1e-10) for m in (a, b))
        total = total + ((a - b) ** 2).sum(axis=1).mean(axis=(1, 2))
    return total


def outside(images: np.ndarray, edited: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The edited images with the masked pixels taken back: what an edit does where it should do nothing.

    Parameters
    ----------
    images, edited : array of shape (n, C, H, W)
    mask : bool array of shape (H, W) or (n, 1, H, W)

    Returns
    -------
    ndarray of shape (n, C, H, W)
    """
    return np.where(mask, images, edited)


def cosine_similarity(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosine of the angle between feature vectors, pair by pair: identity, if a network of faces gives them.

    Parameters
    ----------
    features, others : array of shape (n, d)

    Returns
    -------
    ndarray of shape (n,), values in [-1, 1]
        NaN where one of both is zero.
    """
    a, b = (np.asarray(values, dtype=float) for values in (features, others))
    with np.errstate(invalid="ignore"):
        return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


def directional_similarity(
    images: np.ndarray, edited: np.ndarray, *, source: np.ndarray, target: np.ndarray
) -> np.ndarray:
    """S_dir: whether images moved in CLIP's space as the text did (Kim et al. 2022, DiffusionCLIP).

    cos(E_I(edited) - E_I(image), E_T(target) - E_T(source)), of embeddings that are scaled to length 1 first.

    Parameters
    ----------
    images, edited : array of shape (n, d)
        Embeddings of the images before and after.
    source, target : array of shape (d,) or (templates, d)
        Embeddings of the two texts; those of several templates are averaged.

    Returns
    -------
    ndarray of shape (n,), values in [-1, 1]
        NaN where an image did not move.
    """
    before, after, first, second = (_scaled(np.atleast_2d(e)) for e in (images, edited, source, target))
    text = _scaled((second.mean(axis=0) - first.mean(axis=0))[None])
    return cosine_similarity(after - before, np.broadcast_to(text, after.shape))


def segmentation_consistency(maps: np.ndarray, others: np.ndarray) -> np.ndarray:
    """SC: mean intersection over union of two segmentations, over the classes that either has.

    An image that was not edited has 1, so it says nothing without a measure of success beside it.

    Parameters
    ----------
    maps, others : int array of shape (n, H, W)
        Class of every pixel.

    Returns
    -------
    ndarray of shape (n,), values in [0, 1]
    """
    found = []
    for a, b in zip(maps, others, strict=True):
        classes = np.union1d(a, b)
        found.append(np.mean([((a == c) & (b == c)).sum() / ((a == c) | (b == c)).sum() for c in classes]))
    return np.array(found)


def diversity(features: np.ndarray) -> float:
    """Root mean square distance of pairs of different samples.

    Parameters
    ----------
    features : array of shape (n, d)
        At least 2 samples.

    Returns
    -------
    float
    """
    return float(np.sqrt(2.0 * np.var(np.asarray(features, dtype=float), axis=0, ddof=1).sum()))


def frechet_distance(features: np.ndarray, others: np.ndarray, *, groups: int = 1) -> float:
    """Frechet distance of the Gaussians with the means and covariances of two sets of features (FID, Heusel 2017).

    ||m_1 - m_2||^2 + tr(S_1 + S_2 - 2 (S_1 S_2)^(1/2)). With S = A'A, tr (S_1 S_2)^(1/2) is the nuclear norm of A_1
    A_2', which holds for singular covariances too. Of fewer samples than features it is too large, the more so the
    fewer there are: compare it with that of two sets of real images of the same sizes.

    Parameters
    ----------
    features, others : array of shape (groups * n, d), (m, d)
        n and m at least 2.
    groups : int, default 1
        The same n samples in several versions, one after the other. The distance is then that of n samples, each in one
        of its versions: the mean over sets in which every version of every sample comes once.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there are fewer than 2 of one, they have other numbers of features, or the groups are not of one size.
    """
    a, b = _two_sets(features, others, groups)
    return float(_frechet_distances(a, b, [np.ones(a.shape[1], bool)])[0])


def frechet_distance_interval(
    features: np.ndarray, others: np.ndarray, *, groups: int = 1, folds: int = 16
) -> tuple[float, float]:
    """95% interval of `frechet_distance` over the samples of the first set, by the grouped jackknife.

    Each fold of the samples is left out in turn. The sets that stay are of one size, so what their size adds to the
    distance does not spread; it is in the interval as it is in the distance.

    Parameters
    ----------
    features, others : array of shape (groups * n, d), (m, d)
    groups : int
        As of `frechet_distance`; all versions of a sample are left out together.
    folds : int
        At most n.

    Returns
    -------
    (float, float)
        NaN of fewer than 3 samples.
    """
    a, b = _two_sets(features, others, groups)
    n = a.shape[1]
    if n < 3:
        return float("nan"), float("nan")
    folds = min(folds, n)
    fold = np.arange(n) % folds
    whole, *parts = _frechet_distances(a, b, [fold != k for k in range(-1, folds)])
    error = np.sqrt((folds - 1) * np.var(parts))
    half = stats.t.ppf(QUANTILES[1], folds - 1) * error
    return float(whole - half), float(whole + half)


def _frechet_distances(a: np.ndarray, b: np.ndarray, kept: Sequence[np.ndarray]) -> list[float]:
    """`frechet_distance` of some samples of a (groups, n, d) from all of b, for every mask of samples in `kept`."""

    def gaussian(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Mean, and a triangle with the covariance as its A'A, of at most d rows."""
        return x.mean(axis=0), np.linalg.qr((x - x.mean(axis=0)) / np.sqrt(len(x) - 1), mode="r")

    def distance(x: np.ndarray) -> float:
        mean, root = gaussian(x)
        traces = (root**2).sum() + (target_root**2).sum()
        return ((mean - target_mean) ** 2).sum() + traces - 2 * np.linalg.norm(root @ target_root.T, "nuc")

    groups, n, _ = a.shape
    target_mean, target_root = gaussian(b)
    sets = [a[(np.arange(n) + turn) % groups, np.arange(n)] for turn in range(groups)]
    return [np.mean([distance(each[mask]) for each in sets]) for mask in kept]


def kernel_distance(features: np.ndarray, others: np.ndarray, *, groups: int = 1) -> float:
    """Squared maximum mean discrepancy of two sets of features, without bias (KID, Binkowski et al. 2018, eq. 4).

    The kernel is (x.y / d + 1)^3. Of two samples of one distribution it is 0 on average, and can be negative.

    Parameters
    ----------
    features, others : array of shape (groups * n, d), (m, d)
        n and m at least 2.
    groups : int, default 1
        The same n samples in several versions, one after the other. Two versions of one sample are no pair of samples,
        and are not counted as one.

    Returns
    -------
    float

    Raises
    ------
    ValueError
        If there are fewer than 2 of one, they have other numbers of features, or the groups are not of one size.
    """
    a, b = _two_sets(features, others, groups)
    return float(_kernel_distances(a, b, np.ones((1, a.shape[1])))[0])


def kernel_distance_interval(
    features: np.ndarray, others: np.ndarray, *, groups: int = 1, resamples: int = 200, seed: int = 0
) -> tuple[float, float]:
    """95% interval of `kernel_distance` over the samples of the first set.

    The samples are drawn with replacement and each drawn one is taken once, since one that is taken twice would be its
    own neighbour. Of such subsets, a share f of the samples, a mean varies (1 - f) / f times as much as that of n new
    samples would; their spread is scaled to it.

    Parameters
    ----------
    features, others : array of shape (groups * n, d), (m, d)
    groups : int
        As of `kernel_distance`; all versions of a sample are drawn together.
    resamples, seed : int

    Returns
    -------
    (float, float)
    """
    a, b = _two_sets(features, others, groups)
    drawn = bootstrap_counts(a.shape[1], resamples=resamples, seed=seed) > 0
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


def _two_sets(features: np.ndarray, others: np.ndarray, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """Features as (groups, n, d) and (m, d)."""
    a, b = np.asarray(features, dtype=float), np.asarray(others, dtype=float)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1] or min(len(a) // groups, len(b)) < 2:
        raise ValueError(f"features have shapes {a.shape} and {b.shape}; give at least 2 rows each, of one length")
    if len(a) % groups:
        raise ValueError(f"{len(a)} rows are not {groups} versions of the same samples; give as many of each")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError("features are NaN or infinite; the network that they come from gave no finite value")
    return a.reshape(groups, -1, a.shape[1]), b


def _scaled(vectors: np.ndarray) -> np.ndarray:
    """Rows of length 1."""
    vectors = np.asarray(vectors, dtype=float)
    with np.errstate(invalid="ignore"):
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _listed(names: pd.Index) -> str:
    return ", ".join(map(str, names))


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
