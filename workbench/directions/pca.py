"""Principal components of h-space (Haas et al., unsupervised directions)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from sklearn.decomposition import PCA, IncrementalPCA
from tqdm.auto import tqdm

from workbench.analysis.intervals import bootstrap_counts
from workbench.directions.direction import Direction, origin_of
from workbench.hspace.store import HStore

IN_MEMORY_BYTES = 2**31
"""The h of one timestep up to this size is decomposed at once, a larger one `BLOCK_ROWS` samples at a time."""

BLOCK_ROWS = 1000

SPARE = 5
"""Components found beyond k: they keep the first k accurate, and one of them may be the match of a neighbour's."""

JOINT_RANK = 64
"""Components that stand for a timestep in a joint PCA, at least."""

RESAMPLES = 400


@dataclass(frozen=True, eq=False)
class PrincipalComponents(Sequence):
    """Principal components as a sequence of `Direction`, and how far they can be trusted.

    Attributes
    ----------
    directions : tuple of Direction, k of them
    explained_variance_ratio : ndarray of shape (T, k), values in [0, 1]
        Share of the variance of h_t that the component explains; of a joint PCA, by its shared scores.
    explained_variance_interval : ndarray of shape (T, k, 2)
        95% bootstrap interval of that share: the samples are drawn again, the axes stay.
    matched_cosine : ndarray of shape (T-1, k), values in [0, 1]
        ``|cos|`` between a component at neighbouring timesteps. Where it is low, the component is not the same one.
    mean : Tensor of shape (T, C, h, w), float32
    scores : ndarray of shape (n, T, k), float32
        Projections of the centred h_t; divided by sigma they are in units of scale, if a little too far out.
    shared_scores : ndarray of shape (n, k), float32, or None
        Of a joint PCA: one score per sample, in standard deviations.
    """

    directions: tuple[Direction, ...]
    explained_variance_ratio: np.ndarray = field(repr=False)
    explained_variance_interval: np.ndarray = field(repr=False)
    matched_cosine: np.ndarray = field(repr=False)
    mean: torch.Tensor = field(repr=False)
    scores: np.ndarray = field(repr=False)
    shared_scores: np.ndarray | None = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.directions)

    def __getitem__(self, which: int | slice) -> Direction | list[Direction]:
        return list(self.directions[which]) if isinstance(which, slice) else self.directions[which]

    def __repr__(self) -> str:
        t, shares = self.directions[0].timesteps, self.explained_variance_ratio.mean(axis=0)
        return (
            f"PrincipalComponents({len(self)} of {len(self.scores)} samples, {len(t)} steps t={t[0]}..{t[-1]}, "
            f"{'joint, ' if self.shared_scores is not None else ''}{shares.sum():.0%} of the variance, "
            f"the first {shares[0]:.0%})"
        )


@dataclass(frozen=True, eq=False)
class _Fit:
    """Decomposition of one timestep: components (m, d), scores (n, m), energy |h - mean|^2 (n,), mean (d,).

    A joint PCA keeps no components: those of all timesteps are larger than its scores, and it reads h again.
    """

    components: np.ndarray | None
    scores: np.ndarray
    energy: np.ndarray
    mean: np.ndarray


def find_pca(
    store: HStore,
    k: int = 10,
    *,
    joint: bool = False,
    seed: int = 0,
    progress: bool = True,
) -> PrincipalComponents:
    """Find principal components of h_t, one direction per component (Haas et al., section on unsupervised directions).

    By default every timestep has its own PCA, as in the paper. Order and signs are then aligned: from the noisiest
    timestep on, components are matched with those of the previous timestep by ``|cos|`` (Hungarian method) and signs
    flipped to agree; the chains that explain most variance, on average over timesteps, come first.

    With `joint`, one PCA over all timesteps together, each scaled to a total variance of 1, gives one set of scores;
    the direction at t is the regression of h_t on them. To find the scores, each timestep is represented by its leading
    components (64, or 2k if that is more), which is exact if there are no others.

    The direction has length 1 and sigma is the standard deviation of the population's projections, so that scale is in
    standard deviations. Sigma is smaller than the deviation of the scores, because an axis leans towards the samples it
    was found from: each score is reduced by its own sample's share in the axis, to first order. The remaining excess is
    a few per cent where the variances fall off, and half of it where hundreds of components share the variance evenly.
    The decomposition is scikit-learn's `PCA` (exact for small matrices, randomized with power iterations
    for large ones), or its `IncrementalPCA` if the h_t of all samples exceeds 2 GiB.

    Parameters
    ----------
    store : HStore
    k : int, default 10
        Number of components; at most n - 1 and C*h*w.
    joint : bool, default False
    seed : int, default 0
        Seed of the randomized decomposition and the bootstrap.
    progress : bool

    Returns
    -------
    PrincipalComponents
        A sequence of k directions.

    Raises
    ------
    ValueError
        If k is out of range, or h holds a NaN or does not vary; the message names timestep and sample.
    """
    n, d = len(store), int(np.prod(store.h_shape))
    if n < 2:
        raise ValueError(f"the store has {n} sample; principal components need 2 or more")
    if not 1 <= k <= min(n - 1, d):
        raise ValueError(f"k is {k}; {n} samples of {d} values have 1 to {min(n - 1, d)} components")
    m = min(max(JOINT_RANK, 2 * k) if joint else k + SPARE, n - 1, d)
    bar = tqdm(store.timesteps, desc="PCA", unit=" timesteps", disable=not progress, delay=2, leave=False)
    fits = [_fit(store, t, m, seed, keep=not joint) for t in bar]
    if joint:
        units, scores, sigma, shared = _joint(store, fits, k, seed, progress)
    else:
        units, scores, sigma = _per_timestep(fits, k)
        shared = None
    energy = np.stack([fit.energy for fit in fits], axis=1)
    spanned = [fit.scores for fit in fits]
    shares, intervals = _explained(scores, shared if joint else scores, energy, spanned, seed)
    shape = (len(fits), *store.h_shape)
    parameters = {"k": k, "joint": joint, "n": n, "seed": seed}
    directions = tuple(
        Direction(
            unit=torch.from_numpy(units[:, j].reshape(shape)),
            sigma=torch.from_numpy(sigma[:, j].copy()),
            timesteps=store.timesteps,
            name=f"PC{j + 1}",
            provenance=origin_of(store) | {"method": "pca", "parameters": {"component": j + 1, **parameters}},
            extras={"explained_variance_ratio": float(shares[:, j].mean())},
        )
        for j in range(k)
    )
    return PrincipalComponents(
        directions=directions,
        explained_variance_ratio=shares,
        explained_variance_interval=intervals,
        matched_cosine=np.abs((units[1:] * units[:-1]).sum(axis=2)).clip(max=1.0),
        mean=torch.from_numpy(np.stack([fit.mean for fit in fits]).astype(np.float32).reshape(shape)),
        scores=scores,
        shared_scores=shared,
    )


def _fit(store: HStore, t: int, m: int, seed: int, *, keep: bool = True) -> _Fit:
    """The leading m components of h_t; a second pass over the store gives their scores."""
    n = len(store)
    if 4 * n * int(np.prod(store.h_shape)) <= IN_MEMORY_BYTES:
        (h,) = _blocks(store, t, n)
        mean = h.mean(axis=0, dtype=np.float64)
        h -= mean.astype(np.float32)
        # Fitting in place: at this size a copy is most of the memory.
        components = PCA(m, copy=False, random_state=seed).fit(h).components_
        del h
    else:
        estimator = IncrementalPCA(m, copy=False)
        for block in _blocks(store, t, max(BLOCK_ROWS, m)):
            estimator.partial_fit(block)
        components, mean = estimator.components_, estimator.mean_
    components = components.astype(np.float32)
    scores, energy = [], []
    for block in _centred(store, t, mean):
        scores.append(block @ components.T)
        energy.append(np.einsum("ij,ij->i", block, block))
    if not np.concatenate(energy).any():
        raise ValueError(f"h at timestep {t} is the same for all {n} samples; there is no variance to decompose")
    return _Fit(components if keep else None, np.concatenate(scores), np.concatenate(energy), mean)


def _blocks(store: HStore, t: int, rows: int) -> Iterator[np.ndarray]:
    """The samples of h_t, `rows` at a time; each block is the caller's to change."""
    block, filled, start = None, 0, 0
    for batch in store.batches(t):
        while len(batch):
            if block is None:
                block, filled = np.empty((min(rows, len(store) - start), batch.shape[1]), dtype=np.float32), 0
            part = batch[: len(block) - filled]
            if not np.isfinite(part).all():
                sample = start + filled + int(np.argwhere(~np.isfinite(part))[0, 0])
                raise ValueError(f"h of sample {sample} at timestep {t} is not finite; extract the store again")
            block[filled : filled + len(part)] = part
            filled, batch = filled + len(part), batch[len(part) :]
            if filled == len(block):
                start += filled
                yield block
                block = None


def _centred(store: HStore, t: int, mean: np.ndarray) -> Iterator[np.ndarray]:
    """The samples of h_t without their mean, `BLOCK_ROWS` at a time."""
    mean = mean.astype(np.float32)
    for block in _blocks(store, t, BLOCK_ROWS):
        block -= mean
        yield block


def _per_timestep(fits: list[_Fit], k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units of shape (T, k, d), scores of shape (n, T, k) and sigmas of shape (T, k)."""
    order, signs = _chain([fit.components for fit in fits])
    chained = [fit.scores.var(axis=0)[o] / fit.energy.sum() for fit, o in zip(fits, order, strict=True)]
    first = np.argsort(-np.mean(chained, axis=0), kind="stable")
    order, signs = order[:, first], signs[:, first]
    leading = list(zip(fits, order[:, :k], signs[:, :k], strict=True))
    units = np.stack([fit.components[o] * s[:, None] for fit, o, s in leading])
    scores = np.stack([fit.scores[:, o] * s for fit, o, s in leading], axis=1)
    return units, scores, np.stack([_spread(fit)[o] for fit, o, _ in leading])


def _spread(fit: _Fit) -> np.ndarray:
    """Standard deviation of new samples along each component, (m,).

    A sample turns component j towards itself by its scores on the components below, each over the difference of both
    sums of squares, and by its rest alike. Where two hardly differ, the difference is taken as uncertain by sqrt(2/n).
    """
    squares = fit.scores.astype(np.float64) ** 2
    (n, m), sums = squares.shape, squares.sum(axis=0)
    rest = (fit.energy - squares.sum(axis=1)).clip(min=0)
    below = np.append(sums, rest.sum() / max(min(n - 1, len(fit.mean)) - m, 1))
    gap = (sums - below[:, None]).clip(min=0)
    own = np.column_stack([squares, rest]) @ (gap / (gap**2 + 2 / n * sums**2))
    return np.sqrt((squares / (1 + own) ** 2).sum(axis=0) / (n - 1))


def _chain(components: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Order and signs that make the components of neighbouring timesteps agree.

    Parameters
    ----------
    components : list of ndarray of shape (m, d), unit rows, noisiest timestep first

    Returns
    -------
    order : ndarray of shape (T, m), int
    signs : ndarray of shape (T, m), -1 or 1
    """
    order, signs = [np.arange(len(components[0]))], [_largest_positive(components[0])]
    for before, here in zip(components, components[1:], strict=False):
        cosines = (before[order[-1]] * signs[-1][:, None]) @ here.T
        _, matched = linear_sum_assignment(np.abs(cosines), maximize=True)
        order.append(matched)
        signs.append(np.where(cosines[np.arange(len(matched)), matched] < 0, -1.0, 1.0).astype(np.float32))
    return np.stack(order), np.stack(signs)


def _largest_positive(rows: np.ndarray) -> np.ndarray:
    """Sign of the largest coefficient of each row."""
    largest = rows[np.arange(len(rows)), np.abs(rows).argmax(axis=1)]
    return np.where(largest < 0, -1.0, 1.0).astype(np.float32)


def _joint(
    store: HStore, fits: list[_Fit], k: int, seed: int, progress: bool
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Units (T, k, d), scores (n, T, k), sigmas (T, k), and shared scores (n, k) with variance 1."""
    n = len(fits[0].scores)
    standardised = np.concatenate([fit.scores for fit in fits], axis=1)
    standardised /= np.repeat([np.sqrt(fit.energy.sum() / (n - 1)) for fit in fits], fits[0].scores.shape[1])
    shared = PCA(k, copy=False, random_state=seed).fit_transform(standardised)
    del standardised
    shared /= shared.std(axis=0, ddof=1)
    timesteps = tqdm(store.timesteps, desc="regression", unit=" timesteps", disable=not progress, delay=2, leave=False)
    regressed = [_regress(store, t, fit, shared) for t, fit in zip(timesteps, fits, strict=True)]
    units, sigma = (np.stack([each[part] for each in regressed]) for part in (0, 2))
    scores = np.stack([along for _, along, _ in regressed], axis=1)
    signs = _largest_positive(units[0])
    return units * signs[:, None], scores * signs, sigma, shared * signs


def _regress(store: HStore, t: int, fit: _Fit, shared: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Units (k, d) along the regression of h_t on the shared scores, scores (n, k) along them, and sigmas (k,).

    Sigma is of every sample's projection on the regression of the others, as far as they lie outside of all k.
    """
    n = len(shared)
    parts = zip(_centred(store, t, fit.mean), range(0, n, BLOCK_ROWS), strict=True)
    slopes = sum(shared[start : start + BLOCK_ROWS].T @ block for block, start in parts)
    lengths = np.linalg.norm(slopes, axis=1)
    units = slopes / lengths[:, None]
    scores = np.concatenate([block @ units.T for block in _centred(store, t, fit.mean)])
    along = scores.astype(np.float64)
    inside = (along @ np.linalg.pinv(units @ units.T.astype(np.float64)) * along).sum(axis=1)
    own, rest = shared * n / (n - 1) / lengths, (fit.energy - inside).clip(min=0)[:, None]
    left_out = (along - own * rest) ** 2 / (1 + own**2 * rest)
    return units, scores, np.sqrt(left_out.sum(axis=0) / (n - 1))


def _explained(
    scores: np.ndarray, factors: np.ndarray, energy: np.ndarray, spanned: list[np.ndarray], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Share of each timestep's variance that each factor explains, (T, k), and its bootstrap interval, (T, k, 2).

    The share is cov(s, z)^2 / var(z) of the total variance, for scores s of shape (n, T, k) along the direction of the
    regression of h_t on the factor z; a timestep's own component is its own factor, and then it is var(s). The total
    comes from the energies |h - mean|^2 of shape (n, T), so that the data are not needed again; that the mean of a draw
    is another one is taken off within the components that were found, of scores `spanned`, T of shape (n, m).
    """
    n = len(scores)
    s = scores.astype(np.float64)
    z = factors.astype(np.float64)
    if z.ndim == 2:
        z = z[:, None]

    def weighted(counts: np.ndarray, values: np.ndarray) -> np.ndarray:
        return np.tensordot(counts, values, axes=1) / n

    def share(counts: np.ndarray) -> np.ndarray:
        mean_s, mean_z = weighted(counts, s), weighted(counts, z)
        covariance = weighted(counts, s * z) - mean_s * mean_z
        variance = np.broadcast_to(weighted(counts, z**2) - mean_z**2, covariance.shape)
        # A draw of one sample alone, likely where there are few, explains nothing.
        explained = np.divide(covariance**2, variance, out=np.zeros_like(covariance), where=variance > 0)
        moved = [(weighted(counts, each) ** 2).sum(axis=1) for each in spanned]
        total = weighted(counts, energy) - np.stack(moved, axis=1)
        return np.divide(explained, total[:, :, None], out=np.zeros_like(explained), where=total[:, :, None] > 0)

    drawn = bootstrap_counts(n, resamples=RESAMPLES, seed=seed).astype(np.float64)
    return share(np.ones((1, n)))[0], np.moveaxis(np.quantile(share(drawn), (0.025, 0.975), axis=0), 0, -1)
