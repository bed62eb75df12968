"""Measure, project out or cancel the side effects of directions; count the examples that a direction needs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch

from workbench.analysis.effect_metrics import EffectMatrix
from workbench.analysis.intervals import Estimate, bootstrap_interval
from workbench.diffusion.models import Model
from workbench.diffusion.noise import initial_noise
from workbench.diffusion.sampling import Trajectory
from workbench.directions.direction import Direction, bracketed, derived
from workbench.directions.supervised import few_shot_directions
from workbench.editing.edits import MoveX, check_run
from workbench.editing.measure import Classifier, Effects, measure
from workbench.hspace.store import HStore

ROUNDS = 3
"""Number of measure-and-correct iterations."""

NOTHING = 1e-6
"""Change of a score that float32 can't tell from none."""


def cancel_effects(
    model: Model,
    runs: Trajectory,
    direction: Direction,
    *,
    others: Mapping[str, Direction],
    classifier: Classifier,
    scale: float = 2.0,
    progress: bool = True,
) -> Direction:
    """Correct a direction so that it no longer changes the other attributes.

    With E_va the mean change of attribute a when editing along v, v' = v + sum_b c_b v_b, where c solves
    E_va + sum_b c_b E_ba = 0 for all a. Effects add up only roughly, so v' is measured and corrected three times.
    Unlike the projection (`Direction.orthogonal_to`, Haas et al. eq. 12) this uses measured effects, not inner
    products: two directions that are not orthogonal need not change each other's attributes, and projecting one out
    then does harm.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        Unedited samples to measure effects on. Judge the result on other samples.
    direction : Direction
        v.
    others : mapping of attribute -> Direction
        v_b of each attribute b; the attributes are columns of the classifier's table.
    classifier
        As in `measure`. Judge the result with another classifier.
    scale : float, default 2
        Scale of all edits, in standard deviations.
    progress : bool

    Returns
    -------
    Direction
        v', not rescaled: one unit of v plus the corrections. `calibrated` makes a unit one sigma again.

    Raises
    ------
    ValueError
        If there is no other direction, the classifier lacks an attribute, another direction has no significant
        effect on its own attribute, or the effects of the others are too similar.
    """
    names = list(others)
    if not names:
        raise ValueError("effects are cancelled with at least one other direction")
    options = {"classifier": classifier, "scales": [scale], "progress": progress}

    def effects_of(directions: Mapping[str, Direction]) -> EffectMatrix:
        return measure(runs, directions, **options).matrix(scale).of(names)

    check_run(model, runs)
    matrix = effects_of(others)
    of_others = matrix.mean.to_numpy()
    for i, name in enumerate(names):
        low, high = matrix.low.iloc[i, i], matrix.high.iloc[i, i]
        if not (low > NOTHING or high < -NOTHING):  # also where one sample has no interval
            change = f"changes {name} at scale {scale:g} by {of_others[i, i]:.2g} ({low:.2g} to {high:.2g})"
            raise ValueError(f"the direction of {name} {change}, not distinguishable from 0; take a larger scale")
    if np.linalg.cond(of_others) > 100.0:
        raise ValueError(f"the effects of {', '.join(names)} are too similar, or small; take a larger scale")
    c, edited = np.zeros(len(names)), direction
    for _ in range(ROUNDS):
        c -= np.linalg.solve(of_others.T, effects_of({direction.name: edited}).mean.to_numpy()[0])
        edited = sum((float(factor) * others[name] for name, factor in zip(names, c, strict=True)), start=direction)
    parameters = {
        "classifier": [getattr(classifier, key, None) for key in ("name", "hash")],
        "samples": None if runs.seeds is None else list(runs.seeds),
        "n": len(runs),
        "scale": float(scale),
        "rounds": ROUNDS,
        "others": {name: float(factor) for name, factor in zip(names, c, strict=True)},
    }
    return replace(
        edited,
        name=f"{bracketed(direction.name)} without {', '.join(names)}",
        provenance=derived("cancelled", parameters, direction, *others.values()),
    )


@dataclass(frozen=True, eq=False)
class DisentanglingTable:
    """Effects of directions on each other's attributes, before and after they are made orthogonal.

    Attributes
    ----------
    table : DataFrame
        One row per variant ("original", "disentangled"), direction and attribute: the mean change of the score over the
        samples of a repeat, `effect` as its mean and `std` as its standard deviation over repeats, and the `scale`, in
        the unit of `scales` of `disentangling_table`.
    effects : dict of variant -> Effects
    """

    table: pd.DataFrame = field(repr=False)
    effects: dict[str, Effects] = field(repr=False)

    def matrix(self, variant: str = "disentangled") -> pd.DataFrame:
        """Directions x attributes: the effects of a variant."""
        rows = self.table[self.table["variant"] == variant]
        order = rows["direction"].unique()
        return rows.pivot(index="direction", columns="attribute", values="effect").loc[order, order]

    def fall(self, *, equal_effect: bool = False) -> Estimate:
        """Reduction by the projection of entanglement, sum of |E_ab| over a and b != a divided by that of |E_aa|.

        Parameters
        ----------
        equal_effect : bool
            Take each disentangled direction at the first scale at which its effect on its own attribute reaches that of
            the original one, or at the largest scale, instead of the scales of the table, at which the disentangled
            edits are shorter.

        Returns
        -------
        Estimate
            Original less disentangled: above 0 if the projection disentangles; bootstrap interval over samples.
        """
        names = list(self.table["direction"].unique())
        scales = self.table.drop_duplicates(["variant", "direction"]).set_index(["variant", "direction"])["scale"]
        chosen = {variant: scales[variant].to_dict() for variant in self.effects}
        if equal_effect:
            aim = self.effects["original"].matrix(chosen["original"]).mean
            for name in names:
                apart = self.effects["disentangled"]
                own = {scale: apart.matrix(scale).mean.loc[name, name] for scale in sorted(apart.scales)}
                reached = (scale for scale, effect in own.items() if effect >= aim.loc[name, name])
                chosen["disentangled"][name] = next(reached, max(own))
        totals = {}
        for variant, effects in self.effects.items():
            matrix = effects.matrix(chosen[variant]).of(names)
            sizes = np.abs(np.concatenate([matrix.mean.to_numpy()[None], matrix.draws]))
            own = np.trace(sizes, axis1=1, axis2=2)
            totals[variant] = (sizes.sum(axis=(1, 2)) - own) / own
        falls = totals["original"] - totals["disentangled"]
        return Estimate(float(falls[0]), *map(float, bootstrap_interval(falls[0], falls[1:], matrix.n)), matrix.n)


def disentangling_table(
    model: Model,
    runs: Trajectory,
    directions: Mapping[str, Direction],
    *,
    classifier: Classifier,
    scales: Sequence[float] = (1.5, 3.0, 4.5, 6.0),
    repeats: int = 5,
    per_step: bool = False,
    progress: bool = True,
) -> DisentanglingTable:
    """Edit along each direction, and along its part orthogonal to all the others (Haas et al. Table I).

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The samples of all repeats, one repeat after the other. The paper has 10 repeats of 100 samples.
    directions : mapping of attribute -> Direction
        At least two; each attribute is one of the classifier's. The paper has five.
    classifier
        As in `measure`.
    scales : sequence of float
        The table is of the first; `fall` with `equal_effect` takes the others too. One unit of an original direction is
        one sigma; one unit of a disentangled one is the projection of that, as in the paper: less than one sigma along
        itself, so that at equal scale it is the weaker edit.
    repeats : int, default 5
        At least 2, dividing the number of samples.
    per_step : bool
        Project each timestep separately, as in `Direction.orthogonal_to`.
    progress : bool

    Returns
    -------
    DisentanglingTable

    Raises
    ------
    ValueError
        If there are fewer than two directions, the samples can't be split, or an attribute is not the classifier's.
    """
    if len(directions) < 2:
        raise ValueError(f"{len(directions)} direction given; give at least two")
    if repeats < 2 or len(runs) % repeats:
        raise ValueError(
            f"{len(runs)} samples can't be split in {repeats} equal repeats; give 2 or more that divide them"
        )
    check_run(model, runs)
    unknown = set(directions) - set(classifier(runs.images[:1]).columns)
    if unknown:
        raise ValueError(f"the classifier has no attribute {sorted(unknown)[0]!r}, the name of a direction")
    apart = {
        name: direction.orthogonal_to(*(d for other, d in directions.items() if other != name), per_step=per_step)
        for name, direction in directions.items()
    }
    names, options = list(directions), {"scales": scales, "progress": progress}
    effects = {
        "original": measure(runs, directions, classifier=classifier, **options),
        "disentangled": measure(runs, apart, classifier=classifier, **options),
    }
    rows, scale = [], float(scales[0])
    for variant, measured in effects.items():
        for name in names:
            before, after = measured.scores(name, scale)
            change = (after - before)[names].to_numpy().reshape(repeats, -1, len(names)).mean(axis=1)
            rows += [
                {"variant": variant, "direction": name, "attribute": b, "effect": m, "std": s, "scale": scale}
                for b, m, s in zip(names, change.mean(axis=0), change.std(axis=0, ddof=1), strict=True)
            ]
    return DisentanglingTable(pd.DataFrame(rows), effects)


def few_examples(
    model: Model,
    runs: Trajectory,
    store: HStore,
    *,
    labels: pd.Series,
    classifier: Classifier,
    counts: Sequence[int] = (1, 2, 5, 10, 20, 50, 100),
    draws: int = 5,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """Measure how many examples a direction needs, in h and in x_T (Haas et al. Fig. 8a).

    Directions are differences of the means of a few examples. An edit in h adds the direction at every timestep; one in
    x_T adds it once, to the starting noise, which determines the image only at eta 0. Edits in h are 2 and those in x_T
    10 standard deviations long, of the samples not drawn, along the direction from all of these; the length of x_T is
    the square root of its dimensions in this unit.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        Unedited samples, at eta 0, that are not in the store.
    store : HStore
        Samples to draw examples from, at eta 0 and the timesteps of the runs; generated or inverted.
    labels : Series, values 0 or 1
        As in `find_from_labels`, named for one of the classifier's attributes.
    classifier
        As in `measure`.
    counts, draws
        As in `few_shot_directions`.
    seed : int
        Seed of the draws.
    progress : bool

    Returns
    -------
    DataFrame, one row per space and direction
        `space` ("h" or "x_T"), `draw`, `count` and `cosine` as in `FewExamples`, and `effect`, the mean change of the
        attribute's score over the runs.

    Raises
    ------
    ValueError
        If the store or the runs have an eta above 0 or differ in timesteps or model, the attribute is not the
        classifier's, or `few_shot_directions` refuses labels or counts.
    """
    check_run(model, runs)
    if any(store.provenance["etas"]) or any(runs.etas):
        raise ValueError("x_T decides the image at eta 0 alone; extract and sample with eta=0")
    origin = store.provenance["model"]
    if (origin["hash"], origin["tap"], store.timesteps) != (model.hash, model.tap, runs.timesteps):
        raise ValueError(f"{store} is of another model, tap or timesteps than {runs}; extract it as the runs")
    if labels.name not in classifier(runs.images[:1]):
        raise ValueError(f"the classifier has no attribute {labels.name!r}, the name of the labels")
    x_T = torch.from_numpy(store.x_T[:]) if store.seeds is None else initial_noise(store.seeds, model.x_shape)
    tables = []
    for space, scale in {"h": 2.0, "x_T": 10.0}.items():
        noise = None if space == "h" else x_T
        few = few_shot_directions(store, labels, counts=counts, draws=draws, x_T=noise, seed=seed, progress=progress)
        edits = {}
        for i, delta in enumerate(few.deltas):
            if space == "x_T":
                edits[str(i)] = MoveX(delta[0], runs.timesteps[0], space)
            else:
                about = {"model": origin}
                edits[str(i)] = Direction.from_delta(delta, timesteps=runs.timesteps, name=space, provenance=about)
        measured = measure(runs, edits, [scale], classifier=classifier, progress=progress)
        effects = [float(measured.change(name, scale)[labels.name].mean()) for name in edits]
        tables.append(few.table.assign(space=space, effect=effects))
    columns = ["space", "draw", "count", "cosine", "effect"]
    return pd.concat(tables, ignore_index=True).loc[:, columns]
