"""The process of Asyrp (Kwon et al. 2023): where along the chain to edit, where to add noise, and the whole edit.

    T .. t_edit       edit P_t, keep D_t; eta 0
    t_edit .. t_boost plain DDIM
    below t_boost     plain, with noise (eta 1): "quality boosting"

t_edit is the smallest timestep at which the perceptual distance of P_t from the image reaches a threshold times the
cosine between the texts of source and target; t_boost the smallest at which that of x_t reaches a second threshold.
Asyrp's thresholds are 0.33 and 1.2 of LPIPS, averaged over 100 images.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pandas as pd
import torch

from workbench.datasets.classifiers import Classifier
from workbench.diffusion.models import Model
from workbench.diffusion.noise import check_seeds, step_noise
from workbench.diffusion.sampling import Trajectory
from workbench.directions.asyrp import DeltaFunction
from workbench.directions.direction import Direction
from workbench.editing.mixing_search import Distance, distance_of, prediction_errors
from workbench.editing.render import edit

LEVELS = {"lpips": (0.33, 1.2), "features": (0.5, 1.0), "clip": (0.5, 0.8)}
"""Thresholds of P_t and of x_t. Those of "features" and "clip" are ours, in units of the distance of two images."""


@dataclass(frozen=True, eq=False)
class EditingInterval:
    """Where along the chain Asyrp edits and where it adds noise.

    Attributes
    ----------
    t_edit : int
        The edit acts at t >= t_edit.
    t_boost : int
        Noise is added at t < t_boost.
    curves : pandas.DataFrame, optional
        Mean distance from the image of "P_t" and of "x_t"; index: t.
    """

    t_edit: int
    t_boost: int
    curves: pd.DataFrame | None = field(default=None, repr=False)


def find_interval(
    run: Trajectory,
    *,
    classifier: Classifier | None = None,
    distance: str | Distance = "features",
    levels: tuple[float, float] | None = None,
    cosine: float = 1.0,
    progress: bool = True,
) -> EditingInterval:
    """Find the editing interval of a model from inverted images.

    Parameters
    ----------
    run : Trajectory
        Inverted with `record_x=True`; Asyrp takes 100 images.
    classifier, distance
        As in `mixing_step`: "features" of a classifier work offline, "lpips" is the distance of the paper.
    levels : (float, float), optional
        Thresholds of P_t and of x_t; by default `LEVELS`. Required for a distance of your own.
    cosine : float in (0, 1], default 1
        Between the embeddings of the source's and the target's text: the more they differ, the longer the edit acts.
    progress : bool

    Returns
    -------
    EditingInterval

    Raises
    ------
    ValueError
        If a distance never reaches its level, the cosine is outside of (0, 1], or levels or a classifier are missing.
    """
    if levels is None and distance not in ("features", "lpips"):
        raise ValueError("a distance of your own needs levels=, the thresholds of P_t and of x_t")
    if distance == "features" and classifier is None:
        raise ValueError('distance "features" needs classifier=, such as load_classifier("avataaars-judge")')
    measure = distance_of(distance, classifier, run.images)
    predicted = prediction_errors(run, run.timesteps, measure, progress).mean(axis=1)
    noisy = [measure(run.model.to_images(run.x_at(t)), run.images).mean() for t in run.timesteps]
    curves = pd.DataFrame({"P_t": predicted, "x_t": noisy}, index=pd.Index(run.timesteps, name="t")).sort_index()
    return _read_off(curves, levels or LEVELS[distance], cosine)


def boosted(run: Trajectory, t_boost: int, *, seed: int = 0) -> Trajectory:
    """The same run with noise at t < t_boost: Asyrp's quality boosting.

    Parameters
    ----------
    run : Trajectory
        Deterministic: sampled with eta 0, or inverted.
    t_boost : int
    seed : int, default 0
        Of an inverted run: the noise of the image at position p comes from seed + p.

    Returns
    -------
    Trajectory
        Not run again yet: its x0 is that of `run`.

    Raises
    ------
    ValueError
        If the run has noise of its own.
    """
    if any(run.etas):
        raise ValueError("this run adds noise already; boosting is for deterministic runs (eta 0)")
    etas = tuple(float(t < t_boost) for t in run.timesteps)
    if run.seeds is not None:
        return replace(run, etas=etas, h=None, x=None)
    seeds, shape = check_seeds(range(seed, seed + len(run))), run.x_T.shape[1:]
    noise = torch.zeros(run.steps, *run.x_T.shape)
    for i, (t, eta) in enumerate(zip(run.timesteps, etas, strict=True)):
        if eta > 0.0:
            noise[i] = step_noise(seeds, shape, t=t)
    return replace(run, etas=etas, stored_noise=noise, residual=None, h=None, x=None)


def edit_asyrp(
    model: Model,
    run: Trajectory,
    direction: DeltaFunction | Direction,
    *,
    interval: EditingInterval,
    scale: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> Trajectory:
    """Asyrp's whole edit: asymmetric down to t_edit, plain to t_boost, with noise below.

    Parameters
    ----------
    model : Model
    run : Trajectory
        Deterministic: inverted images, or samples with eta 0.
    direction : DeltaFunction or Direction
    interval : EditingInterval
    scale : float, default 1
        1 is the strength that a DeltaFunction was trained at: each step is rescaled by the number of steps in its
        training (`DeltaFunction.steps`) over that of the run. 0 gives quality boosting without an edit. A Direction
        takes the scale of `edit`, not rescaled.
    seed : int, default 0
        Seed of the noise, see `boosted`.
    progress : bool

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        If the direction does not fit the model or the run.
    """
    factor = direction.steps / run.steps if isinstance(direction, DeltaFunction) else 1.0
    return edit(
        model,
        boosted(run, interval.t_boost, seed=seed),
        direction,
        scale=scale * factor,
        asymmetric=True,
        t_range=(model.schedule.T - 1, interval.t_edit),
        progress=progress,
    )


def _read_off(curves: pd.DataFrame, levels: tuple[float, float], cosine: float) -> EditingInterval:
    """The interval of curves by ascending t."""
    if not 0.0 < cosine <= 1.0:
        raise ValueError(f"cosine is {cosine}; it lies in (0, 1]")
    found = []
    for name, level in zip(("P_t", "x_t"), (levels[0] * cosine, levels[1]), strict=True):
        reached = curves.index[curves[name] >= level]
        if not len(reached):
            most = curves[name].max()
            raise ValueError(f"{name} reaches a distance of {most:.3g} from the image, never {level:.3g}")
        found.append(int(reached.min()))
    return EditingInterval(found[0], found[1], curves)
