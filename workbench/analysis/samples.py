"""Samples and their labels: checked, matched, read timestep by timestep, multiplied and halved.

Samples are arrays of shape (n, d), one row each; trailing axes such as (C, h, w) are flattened. What spans several
timesteps is a store (or anything else with `timesteps` and `at(t)`), a mapping t -> array, or an iterable of (t, array)
pairs, which is read once and one timestep at a time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from workbench.analysis.intervals import QUANTILES

CHUNK = 4096  # coordinates that are multiplied at once

Labels = pd.Series | np.ndarray | Sequence


def check_samples(h: Any, *, t: int | None = None, fewest: int = 2) -> np.ndarray:
    """The samples as a finite (n, d) matrix of float32 or float64; an error names the sample and timestep at fault."""
    h = np.asarray(h)
    at = "" if t is None else f" at timestep {t}"
    if h.ndim < 2 or len(h) < fewest:
        raise ValueError(f"the samples{at} have shape {h.shape}; give at least {fewest}, one per row")
    h = h.reshape(len(h), -1)
    if h.dtype not in (np.float32, np.float64):
        h = h.astype(np.float32 if h.dtype == np.float16 else np.float64)
    finite = np.isfinite(h).all(axis=1)
    if not finite.all():
        bad = f"{int((~finite).sum())} of {len(h)} samples"
        raise ValueError(f"sample {int(np.argmin(finite))}{at} has NaN or infinite values ({bad} do); leave these out")
    return h


def over_timesteps(
    h_by_t: Any, *, fewest: int = 2, samples: int = 2, progress: str | None = None
) -> Iterator[tuple[int, np.ndarray]]:
    """Checked samples of every timestep: at least `fewest` timesteps, each with the same number of samples.

    `progress` names a progress bar, shown for work of more than two seconds.
    """
    if hasattr(h_by_t, "timesteps") and hasattr(h_by_t, "at"):
        pairs = ((t, h_by_t.at(t)) for t in h_by_t.timesteps)
    else:
        pairs = h_by_t.items() if isinstance(h_by_t, Mapping) else h_by_t
    seen, n = 0, None
    for t, h in tqdm(pairs, desc=progress, disable=progress is None, delay=2, leave=False):
        h = check_samples(h, t=t, fewest=samples)
        n = len(h) if n is None else n
        if len(h) != n:
            raise ValueError(f"timestep {t} has {len(h)} samples and the one before {n}; give the same at every one")
        seen += 1
        yield int(t), h
    if seen < fewest:
        raise ValueError(f"{seen} timestep{'s' * (seen != 1)} given where a curve needs at least {fewest}")


def gram(h: np.ndarray, *, centred: bool = True) -> np.ndarray:
    """Inner products (n, n) of all pairs of samples, less their mean if `centred`; summed in float64 over blocks."""
    total = np.zeros((len(h), len(h)))
    for start in range(0, h.shape[1], CHUNK):
        block = h[:, start : start + CHUNK].astype(np.float64)
        if centred:
            block -= block.mean(axis=0)
        total += block @ block.T
    return total


def centre(products: np.ndarray) -> np.ndarray:
    """Inner products of the samples less their mean."""
    rows = products.mean(axis=0)
    return products - rows[:, None] - rows[None, :] + rows.mean()


def distances_of(products: np.ndarray) -> np.ndarray:
    """Euclidean distances from inner products: both of shape (n, n)."""
    squares = np.diag(products)
    squared = squares[:, None] + squares[None, :] - 2 * products
    np.fill_diagonal(squared, 0.0)
    return np.sqrt(np.maximum(squared, 0.0))


def check_neighbours(neighbours: int, *, fewest: int = 1, most: int) -> None:
    """ValueError if a number of neighbours is out of range."""
    if not fewest <= neighbours <= most:
        raise ValueError(f"neighbours is {neighbours}; with these samples it is {fewest} to {most}")


# Half-samples


def half_samples(
    n: int, resamples: int, rng: np.random.Generator, *, progress: str | None = None
) -> Iterator[np.ndarray]:
    """Positions of n/2 samples, drawn without replacement.

    A statistic of a half-sample deviates from that of all n samples by as much as the latter deviates from the truth
    (variances s^2 (2/n - 1/n) and s^2/n). A bootstrap with replacement is no use where distances matter: a sample
    drawn twice is its own nearest neighbour.
    """
    for _ in tqdm(range(resamples), desc=progress, disable=progress is None, delay=2, leave=False):
        yield np.sort(rng.permutation(n)[: n // 2])


def half_interval(value: float, halves: Iterable[float]) -> tuple[float, float]:
    """95% interval of a statistic from those of half-samples; NaN of fewer than two finite ones."""
    halves = np.asarray(list(halves), dtype=float)
    halves = halves[np.isfinite(halves)]
    if len(halves) < 2:
        return float("nan"), float("nan")
    low, high = np.quantile(halves - halves.mean(), QUANTILES)
    return value + float(low), value + float(high)


# Labels


def check_labels(labels: Any, n: int) -> dict[str, np.ndarray]:
    """Labels by attribute, each of n values of two groups or more, none missing; one array is one attribute."""
    if not isinstance(labels, (Mapping, pd.DataFrame)):
        labels = {name_of(labels, "label"): labels}
    by_name = {str(name): np.asarray(values) for name, values in labels.items()}
    for name, values in by_name.items():
        if values.shape != (n,):
            raise ValueError(f"the labels {name!r} have shape {values.shape}; there are {n} samples")
        if pd.isna(values).any():
            raise ValueError(f"the label {name!r} of sample {int(np.argmax(pd.isna(values)))} is missing; leave it out")
        if len(np.unique(values)) < 2:
            raise ValueError(f"all labels {name!r} are {values[0]!s}; give two groups at least")
    return by_name


def check_classes(y: pd.Series, name: str) -> np.ndarray:
    """Labels 0 and 1 as booleans, at least 2 of each."""
    if y.isna().any():
        raise ValueError(f"{int(y.isna().sum())} of {len(y)} labels {name!r} are missing; label every sample")
    if not y.isin([0, 1]).all():
        other = y[~y.isin([0, 1])].iloc[0]
        remedy = "use astype(int) on texts, and find_from_scores with real values"
        shown = repr(other) if isinstance(other, str) else other
        raise ValueError(f"labels are 0 or 1, but {name!r} has {shown}; {remedy}")
    positive = y.to_numpy().astype(bool)
    n, m = int(positive.sum()), int((~positive).sum())
    if min(n, m) == 0:
        raise ValueError(f"all {len(y)} labels {name!r} are {int(positive[0])}; a direction needs both classes")
    if min(n, m) < 2:
        raise ValueError(f"{name!r} has {n} positives and {m} negatives; a direction needs at least 2 of each")
    return positive


def check_table(labels: pd.DataFrame, function: str) -> None:
    """ValueError if labels of many attributes are not a DataFrame with a column for each."""
    if not isinstance(labels, pd.DataFrame) or labels.columns.empty or not labels.columns.is_unique:
        raise ValueError(f"{function} takes a DataFrame with one uniquely named column per attribute")


def matched(store: Any, values: Labels | pd.DataFrame, what: str) -> pd.Series | pd.DataFrame:
    """Values in the order of the samples of a store, or of what has its length, seeds and names; numbered 0..n-1.

    A Series or DataFrame is matched by its index: seeds, or file names where the store knows them. An array, or an
    index 0..n-1 that can't mean seeds, is in the order of the samples.
    """
    n, ids = len(store), None
    if isinstance(values, (pd.Series, pd.DataFrame)):
        table, seeds = values, store.seeds  # of a store, this reads the disk
        ids = seeds if seeds is not None else getattr(store, "names", None)
    else:
        table = pd.Series(np.asarray(values))
    numbered = table.index.equals(pd.RangeIndex(n))
    if ids is None:
        if len(table) != n:
            raise ValueError(f"{what} are {len(table)} for {n} samples; give one per sample")
        if numbered:
            return table
        raise ValueError(
            f"{what} are indexed ({_first(table.index)}), but the samples are not known by name; "
            "put them in the order of the images and pass .to_numpy()"
        )
    own, known = set(table.index), set(ids)
    if numbered and known != own:
        return table
    if numbered and isinstance(table.index, pd.RangeIndex) and list(ids) != list(range(n)):
        raise ValueError(
            f"{what} are numbered 0 to {n - 1}, which may be positions or seeds, and the seeds come in another "
            f"order ({_first(ids)}); index them by seed, .set_axis(list(run.seeds)), or pass .to_numpy() for the "
            "order of the samples"
        )
    if not table.index.is_unique:
        raise ValueError(f"{what} name sample {table.index[table.index.duplicated()][0]} more than once")
    if own != known:
        raise ValueError(
            f"{what} do not match the {n} samples: {len(known - own)} of them have none and {len(own - known)} of "
            f"{len(table)} belong to no sample; index them by seed or file name ({_first(ids)})"
        )
    return table.reindex(ids).reset_index(drop=True)


def _first(ids: Iterable) -> str:
    ids = list(ids)
    return ", ".join(map(str, ids[:3])) + (", ..." if len(ids) > 3 else "")


def matched_column(store: Any, values: Labels, what: str) -> pd.Series:
    """`matched`, of one value a sample; ValueError for a table."""
    found = matched(store, values, what)
    if isinstance(found, pd.DataFrame):
        raise ValueError(f"{what} are a table; give one of its columns: {', '.join(map(str, found.columns))}")
    return found


def name_of(values: Labels, default: str) -> str:
    """Name of a Series, or the default."""
    return str(getattr(values, "name", None) or default)


def digest_of(values: pd.Series | np.ndarray) -> str:
    """Digest of labels or scores for the provenance."""
    return hashlib.sha256(np.ascontiguousarray(np.asarray(values, dtype=np.float64)).data).hexdigest()[:16]
