"""Directions from labels and scores (Haas et al., supervised directions), and linear probes on the same footing.

A difference of means is a weighted sum of samples, so the directions of many attributes are one matrix product
W'H with one column of W per attribute.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
from tqdm.auto import tqdm

from workbench.analysis.probes import Span, balanced_weight, fit_probe, folds_of
from workbench.analysis.samples import Labels, check_classes, check_table, digest_of, matched, matched_column, name_of
from workbench.directions.direction import Direction, origin_of, projections, rotated
from workbench.hspace.store import HStore
from workbench.io import one_of

METHODS = ("mean", "logistic", "lda")
PROBE_RANK = 512  # principal components that a probe is fitted in, at most
FOLDS = 10  # parts that a probe's sigma is cross-fitted in, at most; each class has at least as many samples
IN_MEMORY_BYTES = 2**30  # the h of one timestep up to this size is read once, a larger one twice


@dataclass(frozen=True, eq=False)
class _Contrast:
    """Weights of the samples of two classes: those of the positives sum to 1, of the negatives to -1, others are 0."""

    name: str
    weights: np.ndarray = field(repr=False)
    parameters: dict = field(repr=False)


def find_from_labels(
    store: HStore,
    labels: Labels,
    *,
    method: str = "mean",
    balance: pd.DataFrame | pd.Series | None = None,
    among: Sequence[int] | None = None,
    name: str | None = None,
    timesteps: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
    seed: int = 0,
    progress: bool | tqdm = True,
) -> Direction:
    """Find the direction from the samples without an attribute to those with it.

    "mean": v_t = mean of h_t over the positives - mean over the negatives (Haas et al. eq. 11; with one positive and
    one negative per pair, this equals the mean of the pairs' differences). The other methods take the normal of a
    linear probe, fitted at each timestep to both classes with equal weight, in the leading principal components of h_t
    (at most 512): "logistic" regression, or "lda", Fisher's discriminant with Ledoit-Wolf shrinkage (see
    `analysis.probes`).

    Each timestep has length 1, and sigma is the standard deviation of all samples' projections, so that scale is in
    standard deviations. Samples spread too widely along a direction found from them, so each is projected on a
    direction found without it: the difference of means without this sample, or the probe of the other nine tenths (with
    fewer than 10 samples of a class, as many parts as samples). `extras["class_gap"]` is the distance of the two means
    along the direction, measured in the same way and unit, averaged over timesteps.

    Parameters
    ----------
    store : HStore
    labels : Series, or array of shape (n,), values 0 or 1
        A Series is matched by its index: the seeds of the samples, or the file names of inverted images. An array, or
        a Series with index 0..n-1 that are not the seeds, follows the order of the store.
    method : {"mean", "logistic", "lda"}
    balance : DataFrame or Series, matched as labels, optional
        Other attributes, with few values each. Both classes are reweighted to have the same joint distribution of them:
        stratum s gets a share proportional to n_s+ n_s- / (n_s+ + n_s-), which costs least precision. Not for "lda".
    among : sequence of int, optional
        Positions in the store of the samples to compare, by default all. The labels of the others do not count; sigma
        is over all samples.
    name : str, optional
        By default the name of the Series.
    timesteps : sequence of int, optional
        Some that the store visited, decreasing, where fewer are enough; `Direction.resampled` fills the gaps.
    chunks : sequence of int, optional
        Some of the store's, where their samples (`HStore.rows_of`) are enough; nothing else is read.
    seed : int
        Seed of the folds of a probe.
    progress : bool or tqdm
        A bar that is given is updated by timesteps.

    Returns
    -------
    Direction

    Raises
    ------
    ValueError
        If labels differ from the store in length or index, are missing, not 0 or 1, or have fewer than 2 samples of a
        class; or a stratum has samples of one class only.
    """
    name = name or name_of(labels, "label")
    y = matched_column(store, labels, f"the labels {name!r}")
    others = _balance_of(store, balance)
    if among is not None and (np.asarray(among).dtype == bool or not {*among} <= {*range(len(y))}):
        raise ValueError(
            f"among lists positions of samples, from 0 to {len(y) - 1}; np.flatnonzero gives those of a mask"
        )
    used = np.ones(len(y), dtype=bool) if among is None else np.isin(np.arange(len(y)), among)
    if chunks is not None:
        rows = store.rows_of(chunks)
        y, others, used = y.iloc[rows], None if others is None else others.iloc[rows], used[rows]
    contrast = _from_labels(y, name, others, used)
    options = {"timesteps": timesteps, "chunks": chunks, "seed": seed, "progress": progress}
    return _find(store, [contrast], method=method, source="labels", **options)[0]


def find_many(
    store: HStore,
    labels: pd.DataFrame,
    *,
    method: str = "mean",
    seed: int = 0,
    progress: bool = True,
) -> dict[str, Direction]:
    """Find directions of many attributes as `find_from_labels` does, in one pass over the store.

    Parameters
    ----------
    store : HStore
    labels : DataFrame of shape (n, attributes), values 0 or 1
        Matched by its index, as in `find_from_labels`.
    method, seed, progress
        As in `find_from_labels`.

    Returns
    -------
    dict of attribute -> Direction

    Raises
    ------
    ValueError
        As `find_from_labels`, naming the attribute.
    """
    check_table(labels, "find_many")
    table = matched(store, labels, "the labels")
    contrasts = [_from_labels(table[attribute], str(attribute), None) for attribute in table.columns]
    found = _find(store, contrasts, method=method, source="labels", seed=seed, progress=progress)
    return {direction.name: direction for direction in found}


def find_from_scores(
    store: HStore,
    scores: Labels,
    *,
    k: int = 100,
    method: str = "mean",
    balance: pd.DataFrame | pd.Series | None = None,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Direction:
    """Find the direction from the k samples of lowest score to the k of highest score (Haas et al., eq. 11).

    Parameters
    ----------
    store : HStore
    scores : Series, or array of shape (n,)
        Real values, such as probabilities; matched as labels.
    k : int, default 100
        Samples on each side, at least 2 and at most half of all.
    method
        As in `find_from_labels`.
    balance : DataFrame or Series, matched as scores, optional
        Other attributes, with few values each. The k highest and the k lowest are drawn from every stratum in
        proportion to its size.
    name, seed, progress
        As in `find_from_labels`.

    Returns
    -------
    Direction

    Raises
    ------
    ValueError
        If scores differ from the store in length or index, are not finite or constant, or k is so large that the two
        sides share a sample or a score.
    """
    name = name or name_of(scores, "score")
    values = matched_column(store, scores, f"the scores {name!r}").to_numpy(dtype=float)
    if not np.isfinite(values).all():
        raise ValueError(f"{int((~np.isfinite(values)).sum())} of {len(values)} scores {name!r} are not finite")
    if np.ptp(values) == 0:
        raise ValueError(f"all scores {name!r} are {values[0]:g}; they can't order the samples")
    if not 2 <= k <= len(values) // 2:
        raise ValueError(f"k is {k}; {len(values)} samples have 2 to {len(values) // 2} on a side")
    contrast = _from_scores(values, name, k, _balance_of(store, balance))
    return _find(store, [contrast], method=method, source="scores", seed=seed, progress=progress)[0]


@dataclass(frozen=True, eq=False)
class FewExamples:
    """Directions from a few examples of each class, each beside a reference: the direction from all samples not drawn.

    Attributes
    ----------
    table : DataFrame, one row per direction
        `draw`; `count`, the examples of each class, where 0 is a random direction that changes over time as the
        reference does (`random_like`), and inf the draw's reference; and `cosine` of the angle to the reference, over
        all timesteps.
    deltas : Tensor of shape (directions, T, C, h, w), or (directions, 1, C, H, W) for x_T; float32
        What one unit of scale adds to h_t at every timestep, or to x_T. All directions of a draw have the length of
        the reference at every timestep, whose unit is one standard deviation of the samples' projections on it, and in
        x_T 1.
    """

    table: pd.DataFrame
    deltas: torch.Tensor = field(repr=False)


def few_shot_directions(
    store: HStore,
    labels: Labels,
    *,
    counts: Sequence[int],
    draws: int = 5,
    x_T: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> FewExamples:
    """Differences of the means of a few examples (Haas et al. Fig. 8a).

    Parameters
    ----------
    store : HStore
    labels : Series, or array of shape (n,), values 0 or 1
        As in `find_from_labels`.
    counts : sequence of int
        Examples of each class, drawn without replacement; the larger draws hold the smaller ones. The reference takes
        what the largest leaves, at least 2 samples of each class.
    draws : int, default 5
    x_T : Tensor of shape (n, C, H, W), optional
        The noise that the samples start from, to find directions in it instead of in h.
    seed : int
        Of the draws and the random directions.
    progress : bool

    Returns
    -------
    FewExamples

    Raises
    ------
    ValueError
        If the labels are refused by `find_from_labels`, a count is below 1 or too large, or `draws` is below 1.
    """
    name = name_of(labels, "label")
    positive = check_classes(matched_column(store, labels, f"the labels {name!r}"), name)
    counts, most = sorted({int(c) for c in counts}), int(min(positive.sum(), (~positive).sum())) - 2
    if not counts or counts[0] < 1 or counts[-1] > most:
        raise ValueError(f"counts are {counts}; draw 1 to {most} examples of each class of {name!r}, to leave 2")
    if draws < 1:
        raise ValueError(f"draws is {draws}; give 1 or more")
    rng = np.random.default_rng(seed)
    weights = np.concatenate([_examples(positive, counts, rng) for _ in range(draws)], axis=1)
    shape = store.h_shape if x_T is None else tuple(x_T.shape[1:])
    noise = None if x_T is None else [x_T.flatten(1).numpy()]
    visited, deltas = store.timesteps if noise is None else store.timesteps[:1], []
    for t in tqdm(visited, desc="directions", unit=" timesteps", disable=not progress, delay=2, leave=False):
        batches = _reader(store, t) if noise is None else lambda: noise
        found = _mean_difference(batches(), weights).reshape(draws, len(counts) + 1, -1)
        units = found / np.linalg.norm(found, axis=2, keepdims=True)
        # x_T is standard normal; measured where its dimensions outnumber the samples, its spread would seem larger.
        reference = weights[:, len(counts) :: len(counts) + 1]
        sigma = np.ones(draws) if noise is not None else _spread(_differences(batches, reference)[1])
        deltas.append((sigma[:, None, None] * units).astype(np.float32))
    values = np.stack(deltas, axis=2)
    random = [rotated(torch.from_numpy(each[-1]).double(), seed=seed + i).float() for i, each in enumerate(values)]
    values = np.concatenate([np.stack(random)[:, None], values], axis=1)
    flat = values.reshape(draws, len(counts) + 2, -1)
    lengths = np.linalg.norm(flat[:, -1:], axis=2)
    cells = pd.MultiIndex.from_product([range(draws), [0.0, *counts, np.inf]], names=["draw", "count"])
    table = cells.to_frame(index=False).assign(cosine=((flat * flat[:, -1:]).sum(axis=2) / lengths**2).ravel())
    return FewExamples(table, torch.from_numpy(values.reshape(len(table), len(visited), *shape)))


def _examples(positive: np.ndarray, counts: Sequence[int], rng: np.random.Generator) -> np.ndarray:
    """Weights of the samples, one column a count, and in the last those of all that the largest count leaves."""
    weights = np.zeros((len(positive), len(counts) + 1))
    for side, sign in ((positive, 1.0), (~positive, -1.0)):
        order = rng.permutation(np.flatnonzero(side))
        parts = [*(order[:count] for count in counts), order[counts[-1] :]]
        for column, members in zip(weights.T, parts, strict=True):
            column[members] = sign / len(members)
    return weights


def _balance_of(store: HStore, balance: pd.DataFrame | pd.Series | None) -> pd.DataFrame | None:
    if balance is None:
        return None
    table = matched(store, balance, "the attributes to balance")
    table = table.to_frame() if isinstance(table, pd.Series) else table
    if table.isna().any(axis=None):
        raise ValueError(f"{int(table.isna().any(axis=1).sum())} samples lack a value of the attributes to balance")
    return table


def _strata(table: pd.DataFrame | None, n: int) -> tuple[np.ndarray, list[str]]:
    """Number of each sample's stratum, and the names of the strata."""
    if table is None:
        return np.zeros(n, dtype=int), ["all"]
    groups = table.groupby(list(table.columns), sort=True, observed=True)
    names = [", ".join(f"{c}={v}" for c, v in zip(table.columns, key, strict=True)) for key, _ in groups]
    return groups.ngroup().to_numpy(), names


def _from_labels(
    y: pd.Series, name: str, others: pd.DataFrame | None, used: np.ndarray | slice = slice(None)
) -> _Contrast:
    """Weights that give a stratum the same share of both classes; 0 of the samples that are not used."""
    stratum, names = _strata(None if others is None else others[used], len(y[used]))
    positive = check_classes(y[used], name)
    counts = np.stack([np.bincount(stratum[side], minlength=len(names)) for side in (positive, ~positive)])
    if (counts == 0).any():
        side, s = np.argwhere(counts == 0)[0]
        lacking = f"no sample with {name}={1 - side} has {names[s]}, but {counts[1 - side, s]} with {name}={side} do"
        raise ValueError(f"{lacking}; take more samples or balance other attributes")
    share = counts.prod(axis=0) / counts.sum(axis=0)
    weight = share / share.sum() / counts
    weights = np.zeros(len(y))
    weights[used] = np.where(positive, weight[0, stratum], -weight[1, stratum])
    balanced = [] if others is None else [str(c) for c in others.columns]
    return _Contrast(name, weights, {"balance": balanced, **_counts(weights), "labels": digest_of(y)})


def _from_scores(values: np.ndarray, name: str, k: int, others: pd.DataFrame | None) -> _Contrast:
    stratum, names = _strata(others, len(values))
    weights, k = np.zeros(len(values)), int(k)
    for s, size in enumerate(_shares(np.bincount(stratum), k)):
        members = np.flatnonzero(stratum == s)
        ranked = members[np.argsort(values[members], kind="stable")]
        if size == 0:
            continue
        if values[ranked[size - 1]] == values[ranked[-size]]:
            where = "" if len(names) == 1 else f" with {names[s]}"
            ends = f"the {size} highest and the {size} lowest of {len(members)} scores {name!r}{where}"
            raise ValueError(f"{ends} share the value {values[ranked[-size]]:g}; take a smaller k")
        weights[ranked[-size:]], weights[ranked[:size]] = 1.0 / k, -1.0 / k
    balanced = [] if others is None else [str(c) for c in others.columns]
    return _Contrast(name, weights, {"k": k, "balance": balanced, "scores": digest_of(values)})


def _shares(sizes: np.ndarray, k: int) -> np.ndarray:
    """k split in proportion to the sizes, at most half of each (method of largest remainders)."""
    most = sizes // 2
    if k > most.sum():
        raise ValueError(f"k is {k}; balanced, these samples have at most {most.sum()} on a side")
    exact = k * sizes / sizes.sum()
    shares = np.floor(exact).astype(int)
    while shares.sum() < k:  # again where a group has no room for what it was to take
        room = np.flatnonzero(shares < most)
        shares[room[np.argsort(shares[room] - exact[room], kind="stable")][: k - shares.sum()]] += 1
    return shares


def _counts(weights: np.ndarray) -> dict[str, int]:
    return {"positives": int((weights > 0).sum()), "negatives": int((weights < 0).sum())}


def _find(
    store: HStore,
    contrasts: list[_Contrast],
    *,
    method: str,
    source: str,
    seed: int,
    progress: bool | tqdm,
    timesteps: Sequence[int] | None = None,
    chunks: Sequence[int] | None = None,
) -> list[Direction]:
    one_of("method", method, METHODS)
    weights = np.stack([contrast.weights for contrast in contrasts], axis=1)
    if method == "lda" and any(len(np.unique(column[column != 0])) > 2 for column in weights.T):
        raise ValueError('"lda" takes no weights, so no balance; use "mean" or "logistic"')
    units, sigmas, gaps = [], [], []
    timesteps = store.timesteps if timesteps is None else tuple(timesteps)
    told = {"desc": "directions", "unit": " timesteps", "delay": 2, "leave": False}
    given = isinstance(progress, tqdm)
    for t in timesteps if given else tqdm(timesteps, disable=not progress, **told):
        if given:
            progress.update()
        batches = _reader(store, t, chunks)
        found, along = _differences(batches, weights) if method == "mean" else _probe(batches, weights, method, seed)
        if not np.isfinite(found).all():
            raise ValueError(f"h at timestep {t} is not finite; extract the store again")
        length = np.linalg.norm(found, axis=1, keepdims=True)
        sigma = _spread(along)
        units.append((found / np.where(length > 0, length, 1.0)).astype(np.float32))
        sigmas.append(sigma)
        gaps.append((weights * along).sum(axis=0) / np.where(sigma > 0, sigma, 1.0))
    shape, gap = (len(units), *store.h_shape), np.mean(gaps, axis=0)
    return [
        Direction(
            unit=torch.from_numpy(np.stack([unit[j] for unit in units]).reshape(shape)),
            sigma=torch.from_numpy(np.array([sigma[j] for sigma in sigmas])),
            timesteps=timesteps,
            name=contrast.name,
            provenance=origin_of(store)
            | {"method": source, "parameters": {"estimator": method, **contrast.parameters, "seed": seed}},
            extras={"class_gap": float(gap[j])},
        )
        for j, contrast in enumerate(contrasts)
    ]


def _reader(store: HStore, t: int, chunks: Sequence[int] | None = None) -> Callable[[], Iterable[np.ndarray]]:
    """The batches of h_t as often as they are needed, read from disk once if they fit in memory."""
    n = len(store) if chunks is None else len(store.rows_of(chunks))
    if 4 * n * int(np.prod(store.h_shape)) > IN_MEMORY_BYTES:
        return lambda: store.batches(t, chunks=chunks)
    kept = list(store.batches(t, chunks=chunks))
    return lambda: kept


def _mean_difference(batches: Iterable[np.ndarray], weights: np.ndarray) -> np.ndarray:
    """W'H: the difference of class means of every column of weights, (m, d), float64."""
    total, start = np.zeros(1), 0
    for batch in batches:
        rows = weights[start : start + len(batch)]
        total, start = total + (rows.T.astype(np.float32) @ batch).astype(np.float64), start + len(batch)
    return total


def _differences(reader: Callable[[], Iterable[np.ndarray]], weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Differences of means, (m, d), and every centred sample's projection on the unit one without it: (n, m), float64.

    Along a direction that it helped to find, a sample lies too far out: with fewer samples than dimensions, by much.
    Without sample i, of the share a of its side's mean o, the difference is v + a / (1 - a) (o - h_i) (for a negative,
    v less that), so that all of them together cost one pass.
    """
    n, m = weights.shape
    columns = np.hstack([np.full((n, 1), 1 / n), weights.clip(min=0), (-weights).clip(min=0)])
    mean, above, below = np.split(_mean_difference(reader(), columns), [1, 1 + m])
    above, below, mean = above - mean, below - mean, mean.astype(np.float32)
    found = above - below
    parts = []
    for batch in reader():
        centred = batch - mean
        sides = projections([centred], np.concatenate([above, below]))
        parts.append(np.hstack([sides, np.einsum("ij,ij->i", centred, centred, dtype=np.float64)[:, None]]))
    to_above, to_below, squares = np.split(np.concatenate(parts), [m, 2 * m], axis=1)

    def own(positive: np.ndarray, negative: np.ndarray) -> np.ndarray:
        return np.where(weights > 0, positive, negative)

    along, at_own, share = to_above - to_below, own(to_above, to_below), weights / (1 - np.abs(weights))
    shift = own((above * found).sum(axis=1), (below * found).sum(axis=1)) - along
    apart = own((above**2).sum(axis=1), (below**2).sum(axis=1)) - 2 * at_own + squares
    length = np.sqrt(((found**2).sum(axis=1) + 2 * share * shift + share**2 * apart).clip(min=0))
    left_out = along + share * (at_own - squares)
    return found, np.divide(left_out, length, out=np.zeros_like(along), where=length > 0)


def _spread(along: np.ndarray) -> np.ndarray:
    """Standard deviation of projections on directions that left their sample out; each is centred already."""
    return np.sqrt((along**2).sum(axis=0) / (len(along) - 1))


def _probe(reader: Callable[[], Iterable[np.ndarray]], weights: np.ndarray, method: str, seed: int):
    """Normals of linear probes, one per column of weights, (m, d), pointing to the positives; and projections (n, m).

    A sample is projected on the unit normal that the folds without it give; one of weight 0, which no fit sees, on that
    of all folds.
    """
    h = np.concatenate(list(reader()))
    if not np.isfinite(h).all():
        return np.full((weights.shape[1], h.shape[1]), np.nan), np.zeros(weights.shape)
    h -= h.mean(axis=0)  # float32 holds the small normals better beside a small h
    span = Span.of(h, rank=PROBE_RANK)
    n, products = len(h), span.products
    duals, along = np.empty(weights.shape), np.empty(weights.shape)
    for j, column in enumerate(weights.T):
        used, y = np.flatnonzero(column), column > 0
        weight = balanced_weight(np.abs(column), y)
        whole = fit_probe(span, y, method, rows=used, weight=weight)
        duals[:, j] = whole.a
        along[:, j] = products @ whole.a / whole.length(products)
        for train, test in folds_of(y[used], min(FOLDS, *_counts(column).values()), seed):
            probe = fit_probe(span, y, method, rows=used[train], weight=weight)
            rest = np.delete(np.arange(n), used[test])
            projected = products @ probe.a / probe.length(products)
            # A sample is farther from the mean of others than from that of all by as much as theirs is uncertain.
            step = np.sqrt((1 - 1 / n) / (1 + 1 / len(rest)))
            along[used[test], j] = step * (projected[used[test]] - projected[rest].mean())
    return duals.T.astype(np.float32) @ h, along
