"""From samples that were selected by hand to a direction and a boundary, with what there is to say about them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
from scipy import stats
from tqdm.auto import tqdm

from workbench.analysis.intervals import holm
from workbench.directions.boundary import Boundary, SamplesAt
from workbench.directions.boundary_fit import fit_boundary
from workbench.directions.direction import Direction, origin_of
from workbench.directions.supervised import find_from_labels
from workbench.hspace.store import HStore

EXPLAINED = 0.85
"""Area under the curve from which on one attribute is said to explain a selection."""
_MOST = 2000
"""Samples of a side that a boundary is fitted to."""


@dataclass(frozen=True, eq=False)
class Selection:
    """Two groups of samples as a direction and a boundary.

    Attributes
    ----------
    direction : Direction
        Difference of the means of h_t at every timestep, A less B, in sigma. Its provenance lists the selected samples.
    boundary : Boundary or None
        Between both at one timestep, with its held-out accuracy; None with fewer than 3 samples in a group.
    counts : (int, int)
        Samples in A and in B.
    cosines : Series
        Of the angles to other directions, over all timesteps, largest first; values in [-1, 1].
    attributes : DataFrame
        One row an attribute, most telling first: `auc`, the probability that its score is higher for a sample of A than
        for one of B, and `p`, of a two-sided rank test, adjusted by Holm's rule.
    """

    direction: Direction
    boundary: Boundary | None
    counts: tuple[int, int]
    cosines: pd.Series = field(repr=False)
    attributes: pd.DataFrame = field(repr=False)

    def named(self, name: str) -> Selection:
        """The same under another name."""
        boundary = None if self.boundary is None else replace(self.boundary, name=name)
        return replace(self, direction=replace(self.direction, name=name), boundary=boundary)

    @property
    def warning(self) -> str:
        """A sentence, where one attribute by itself tells A from B; empty otherwise."""
        for name, (auc, p) in self.attributes.iterrows():
            if max(auc, 1 - auc) >= EXPLAINED and p < 0.05:
                return (
                    f"{name} alone tells A from B (area under the curve {max(auc, 1 - auc):.2f}): this is likely a "
                    f"direction of {name}"
                )
        return ""


def find_from_selection(
    store: HStore,
    a: Iterable[int],
    b: Iterable[int] | None = None,
    *,
    t: int,
    method: str = "mean",
    scores: pd.DataFrame | None = None,
    known: Sequence[Direction] = (),
    name: str = "selection",
    timesteps: Sequence[int] | None = None,
    most: int | None = None,
    seed: int = 0,
    progress: bool | tqdm = True,
) -> Selection:
    """Find the direction from some samples to others that were selected, on a map for instance.

    A group that was selected on a map of h is separated in h by construction: the held-out accuracy says how sharply,
    not whether the group means anything. Only edits of other samples show that, compared with a random direction.

    Parameters
    ----------
    store : HStore
    a, b : iterable of int
        Positions in the store, at least 2 of each; without `b`, all others.
    t : int
        Timestep of the boundary.
    method : {"mean", "svm", "lda", "logistic"}
        Of the boundary; as in `fit_boundary`.
    scores : DataFrame of shape (n, attributes), optional
        In the order of the store; may lack values. To see whether one attribute explains the selection.
    known : sequence of Direction, optional
        Of the same model and timesteps, to compare with.
    name : str
    timesteps : sequence of int, optional
        Visited ones of the direction; by default all. `known` is compared with only if they are all.
    most : int, optional
        Approximate number of samples for a quick first estimate: those of the store's chunks that hold most of A
        and of B, so that nothing else is read. By default all.
    seed : int
        Of the folds, and of the samples that a boundary is fitted to where there are more than 2000 in a group.
    progress : bool or tqdm
        As of `find_from_labels`.

    Returns
    -------
    Selection

    Raises
    ------
    ValueError
        If a group has fewer than 2 samples, they overlap, or a position is not in the store.
    """
    sides = _sides(a, b, len(store))
    counts = (len(sides[0]), len(sides[1]))
    labels = pd.Series(np.zeros(len(store), dtype=int))
    labels[sides[0]] = 1
    options = {"timesteps": timesteps, "chunks": most and _fullest(store, sides, most), "progress": progress}
    found = find_from_labels(store, labels.to_numpy(), among=np.concatenate(sides), name=name, seed=seed, **options)
    ids = store.seeds or store.names or range(len(store))
    chosen = {"t": int(t), "a": [ids[i] for i in sides[0]], "b": "rest" if b is None else [ids[i] for i in sides[1]]}
    parameters = found.provenance["parameters"] | {"selection": chosen}
    found = replace(found, provenance=found.provenance | {"parameters": parameters})
    comparable = [each for each in known if each.timesteps == found.timesteps]
    cosines = pd.Series({each.name: found.cosine(each) for each in comparable}, dtype=float)
    return Selection(
        found,
        None if timesteps is not None else _boundary(store, sides, t, method, name, chosen, seed),
        counts,
        cosines.sort_values(key=abs, ascending=False),
        _explained(scores, sides),
    )


def _sides(a: Iterable[int], b: Iterable[int] | None, n: int) -> tuple[np.ndarray, np.ndarray]:
    first = np.unique(np.array(list(a), dtype=int))
    second = np.setdiff1d(np.arange(n), first) if b is None else np.unique(np.array(list(b), dtype=int))
    for letter, side in (("A", first), ("B", second)):
        if len(side) < 2:
            some = f"{len(side)} sample{'s' * (len(side) != 1)}"
            raise ValueError(f"{letter} has {some}; a direction needs at least 2 on each side, so select more")
        if side[0] < 0 or side[-1] >= n:
            raise ValueError(f"there is no sample {side[-1] if side[-1] >= n else side[0]}; there are 0 to {n - 1}")
    if len(both := np.intersect1d(first, second)):
        raise ValueError(f"sample {both[0]} is in A and in B; take it out of one")
    return first, second


def _fullest(store: HStore, sides: tuple[np.ndarray, np.ndarray], most: int) -> list[int]:
    """Chunks of about so many samples, by turns the one that holds most of A and of B; at least two of each."""
    size, n = store.provenance["chunk"], len(store)
    held = [np.bincount(side // size, minlength=-(-n // size)) for side in sides]
    by_turns = np.stack([np.argsort(-counts, kind="stable") for counts in held], axis=1).ravel()
    return sorted(list(dict.fromkeys(by_turns.tolist()))[: max(4, most // size)])


def _boundary(store, sides, t: int, method: str, name: str, chosen: dict, seed: int) -> Boundary | None:
    if min(map(len, sides)) < 3:
        return None
    rng = np.random.default_rng(seed)
    kept = [np.sort(rng.permutation(side)[:_MOST]) for side in sides]
    rows, y = np.concatenate(kept), np.repeat([1, 0], [len(side) for side in kept])
    samples = SamplesAt(store.at(t)[rows], store.h_shape, origin_of(store))
    found = fit_boundary(samples, y, t=t, method=method, balance=True, seed=seed, name=name)
    parameters = found.provenance["parameters"] | {"selection": chosen}
    return replace(found, provenance=found.provenance | {"parameters": parameters})


def _explained(scores: pd.DataFrame | None, sides: tuple[np.ndarray, np.ndarray]) -> pd.DataFrame:
    rows = {}
    for name in [] if scores is None else scores.columns:
        groups = [scores[name].to_numpy(dtype=float)[side] for side in sides]
        a, b = (group[np.isfinite(group)] for group in groups)
        if len(a) and len(b):
            test = stats.mannwhitneyu(a, b, method="asymptotic")
            rows[str(name)] = (test.statistic / (len(a) * len(b)), test.pvalue)
    table = pd.DataFrame.from_dict(rows, orient="index", columns=["auc", "p"], dtype=float)
    table["p"] = holm(np.nan_to_num(table["p"].to_numpy(), nan=1.0))
    return table.sort_values("auc", key=lambda auc: -(auc - 0.5).abs(), kind="stable")
