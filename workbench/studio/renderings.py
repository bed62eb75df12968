"""Render edits of single samples: images, previews, predictions, grids and paths.

A sample is always rendered by itself, from the same x_T and the same noise, so that its image is the same to the bit in
every session. Its plain x_t are kept: an edit is computed from the step on at which it begins. While a slider moves, a
preview stands in for the image. It takes few steps along the sample's own x_t, with the noise that leads from one to
the next (as an edit-friendly inversion finds it), and its edit has the first-order effect of the whole one.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np
import pandas as pd
import torch
from PIL import Image

from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import load_image
from workbench.diffusion.images import check_images
from workbench.diffusion.inversion import invert
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Injection, Trajectory, replay, sample
from workbench.diffusion.schedule import index_of, within
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction, finite
from workbench.editing.cross import Cross
from workbench.editing.edits import Edit, Shift, check_run
from workbench.editing.preview import abridged, predicted_images, same_effect
from workbench.editing.render import EditGrid, run_plans
from workbench.studio.state import EditState, Predictions, Progress, Rendering

_Named = TypeVar("_Named")

PREVIEW_STEPS = 8
MOST_SAMPLES = 48
"""Samples that a session holds; more would not be told apart on a screen."""

_KEPT = 8
_PATH = (0.0, 0.25, 0.5, 0.75, 1.0)


class Renderings:
    """Render edits of some samples: images, previews, predictions, grids, paths through h-space.

    Without a state, `render` and `direction` take the current one, `self.state`, as the other methods do. `EditSession`
    has one, and adds controls.
    """

    state: EditState
    preview_steps = PREVIEW_STEPS

    def __init__(self, model: Model, runs: Trajectory) -> None:
        self.model, self.timesteps, self.etas = model, runs.timesteps, runs.etas
        self.samples: list[Trajectory] = []
        self.add_samples(runs)
        self.directions: dict[str, Direction] = {}
        self.boundaries: dict[str, Boundary] = {}
        self.classifier: Classifier | None = None
        self.notes: list[str] = []
        self._plains: dict[tuple, Trajectory] = {}
        self._rests: dict[tuple, Trajectory] = {}
        self._projected: dict[tuple, Direction] = {}

    # What there is to edit, and to edit with.

    def add(self, each: Direction | Boundary) -> str:
        """Take in a direction or a boundary; returns the name that it has here.

        Raises
        ------
        ValueError
            If it is something else, or belongs to another model or tap, or the samples don't visit its timestep.
        """
        if isinstance(each, Direction):
            each.check_fits(self.model)
            if each.timesteps != self.timesteps:
                self.notes.append(
                    f"{each.name} was found with {len(each.timesteps)} steps and is resampled to the samples' "
                    f"{len(self.timesteps)}"
                )
                each = each.resampled(self.timesteps)
            name = _unused(each.name, self.directions)
            self.directions[name] = each
        elif isinstance(each, Boundary):
            each.check_fits(self.model)
            index_of(each.t, self.timesteps, trained=self.model.schedule.T)
            name = _unused(f"{each.name} ({each.space}, t={each.t})", self.boundaries)
            self.boundaries[name] = each
        else:
            raise ValueError(f"a studio takes directions and boundaries, not a {type(each).__name__}")
        return name

    def add_samples(self, runs: Trajectory) -> int:
        """Take in more samples; returns the position of the first of them.

        Raises
        ------
        ValueError
            If they are of another model or visit other timesteps, or the session is full.
        """
        check_run(self.model, runs)
        if runs.timesteps != self.timesteps:
            raise ValueError(f"the samples visit {runs.steps} timesteps, this session's visit {len(self.timesteps)}")
        first = len(self.samples)
        self._refuse_more(len(runs))
        self.samples += [replace(runs[k], h=None, x=None, batch_size=1) for k in range(len(runs))]
        return first

    def add_seeds(
        self, seeds: Iterable[int], *, eta: float | Sequence[float] | None = None, progress: Progress | None = None
    ) -> list[int]:
        """Sample seeds that are not there yet, by default with the eta of the first samples; returns all positions."""
        if eta is None:
            eta = self.etas if self.samples[0].stored_noise is None else 1.0
        etas = self.model.schedule.etas(eta, len(self.timesteps))
        seeds = list(dict.fromkeys(int(seed) for seed in seeds))
        known = {run.seeds[0]: k for k, run in enumerate(self.samples) if run.is_sampled and run.etas == etas}
        new = [seed for seed in seeds if seed not in known]
        if new:
            progress = progress or Progress()
            progress.expect(len(new) * len(self.timesteps))
            first = self.add_samples(sample(self.model, new, steps=self.timesteps, eta=etas, progress=progress))
            known |= {seed: first + k for k, seed in enumerate(new)}
        return [known[seed] for seed in seeds]

    def add_image(
        self, image: str | Path | bytes | torch.Tensor | Image.Image, *, progress: Progress | None = None
    ) -> int:
        """Invert an image by "fixed-point", to edit it like a sample; returns its position, an old one if it is there.

        Parameters
        ----------
        image : path, bytes, PIL.Image.Image, or Tensor of shape (C, H, W), values in [-1, 1]
            A file, its content or a picture is cropped and resized to the model's size.
        progress : Progress, optional

        Returns
        -------
        int

        Raises
        ------
        FileNotFoundError, ValueError
            If there is no such file, it is not an image, or the session is full.
        """
        if isinstance(image, str | Path | bytes):
            image = load_image(image, self.model.image_shape)
        image, progress = check_images([image], self.model), progress or Progress()
        latent = self.model.to_latents(image)
        for k, run in enumerate(self.samples):
            if run.seeds is None and run.stored_noise is None and torch.equal(run.x0, latent):
                return k
        self._refuse_more(1)
        progress.expect(2 * len(self.timesteps))  # it makes two passes a step
        options = {"steps": self.timesteps, "method": "fixed-point", "progress": progress}
        return self.add_samples(invert(self.model, image, **options))

    def _refuse_more(self, n: int) -> None:
        if len(self.samples) + n > MOST_SAMPLES:
            raise ValueError(f"a session holds {MOST_SAMPLES} samples; it has {len(self.samples)}, and {n} were given")

    def label(self, k: int) -> str:
        """Name of a sample: its seed, or its position if it is an image."""
        seeds = self.samples[k].seeds
        return f"image {k}" if seeds is None else f"seed {seeds[0]}"

    # What comes of it.

    def render(
        self, *, preview: bool = False, state: EditState | None = None, progress: Progress | None = None
    ) -> Rendering:
        """The image before and after.

        Parameters
        ----------
        preview : bool
            In `preview_steps` steps instead of all.
        state : EditState, optional
            By default the session's.
        progress : Progress, optional

        Returns
        -------
        Rendering
            Without an edit `after` is `before`, bit for bit.

        Raises
        ------
        Cancelled
            If `progress` was cancelled.
        """
        state = state or self.state
        before = self._plain(state, progress).images[0]
        if not state.edits:
            return Rendering(before, before, state, preview)
        plan = self._preview(state, progress) if preview else self._plan(state, progress)
        return Rendering(before, _run(plan, progress).images[0], state, preview)

    def direction(self, state: EditState | None = None) -> Direction:
        """All that is pulled as one direction, of scale 1, within the window of timesteps.

        `wb.edit(model, run, direction)` with the sample gives the image of this session, bit for bit, if the process is
        symmetric and the eta the sample's own; of an inverted image with `residual=True`.

        Raises
        ------
        ValueError
            If nothing is pulled, or boundaries are crossed instead.
        """
        state = state or self.state
        if state.process == "single-step" or not state.scales:
            raise ValueError("no direction is pulled; set a scale other than 0, in a process other than single-step")
        parts = [scale * self._project(name, state.against.get(name, ())) for name, scale in state.scales.items()]
        combined = functools.reduce(operator.add, parts)
        if all(within(state.t_range, self.timesteps)):
            return combined
        return combined.restricted_to(state.t_range)

    def read_out(self, rendering: Rendering) -> pd.DataFrame | None:
        """The classifier's probabilities before and after: one row an attribute; None without a classifier."""
        if self.classifier is None:
            return None
        both = torch.stack([rendering.before, rendering.after]).clamp(-1, 1)
        return self.classifier(both, progress=False).set_axis(["before", "after"]).T

    def distances(self, *, progress: Progress | None = None) -> dict[str, float]:
        """Signed Euclidean distance of the unedited sample from every boundary."""
        plain, found = self._plain(self.state, progress), {}
        for name, boundary in self.boundaries.items():
            x_t = plain.x.values[index_of(boundary.t, plain.timesteps)]
            found[name] = float(boundary.distance(x_t if boundary.space == "x" else self._h(x_t, boundary.t))[0])
        return found

    def predictions(self, timesteps: Sequence[int] | None = None, *, progress: Progress | None = None) -> Predictions:
        """P_t, the predicted image, with and without the edit.

        Parameters
        ----------
        timesteps : sequence of int, optional
            Visited ones; by default all.
        progress : Progress, optional

        Returns
        -------
        Predictions

        Raises
        ------
        ValueError
            If a timestep was not visited.
        """
        state, timesteps = self.state, self.timesteps if timesteps is None else tuple(timesteps)
        positions = [index_of(t, self.timesteps, trained=self.model.schedule.T) for t in timesteps]
        plain, plan = self._plain(state, progress), self._plan(state, progress)
        before = predicted_images(plain, positions)
        if plan is plain:
            return Predictions(timesteps, before, before)
        run, first = _run(plan, progress, record_x=True), plain.steps - plan.steps
        later = [k for k, p in enumerate(positions) if p >= first]
        after = before.clone()
        if later:
            after[later] = predicted_images(run, [positions[k] - first for k in later])
        return Predictions(timesteps, before, after)

    def grid(self, controls: Mapping[str, Sequence[float]], *, progress: Progress | None = None) -> EditGrid:
        """The edit with one or two of its controls at several values.

        Parameters
        ----------
        controls : mapping of str to sequence of float
            Scales in sigma by direction, or, for the process "single-step", signed Euclidean distances by boundary.
        progress : Progress, optional

        Returns
        -------
        EditGrid
            One column a value of the last control; one row, or one per value of the first of two.

        Raises
        ------
        ValueError
            If a control is unknown or has no values, or there are more than two.
        """
        state, progress = self.state, progress or Progress()
        single = state.process == "single-step"
        what, among, unit = ("distances", self.boundaries, "") if single else ("scales", self.directions, " sigma")
        if not 1 <= len(controls) <= 2:
            raise ValueError(f"a grid has one or two controls, not {len(controls)}")
        for name, values in controls.items():
            known(name, among, "boundary" if single else "direction")
            if not len(values):
                raise ValueError(f"there are no values of {name} to show; give some")
            for value in values:
                finite(value, name)
        plain, plans = self._plain(state, progress), []
        for cell in itertools.product(*controls.values()):
            pulled = {**getattr(state, what), **dict(zip(controls, cell, strict=True))}
            plans.append(self._plan(replace(state, **{what: pulled}), progress))
        progress.expect(sum(plan.steps for plan in plans if plan is not plain))
        images = run_plans(plain, [plans], residual=plain.residual is not None, progress=progress)[0, 0]
        labels = [tuple(f"{name}\n{value:+g}{unit}" for value in values) for name, values in controls.items()]
        rows, columns = labels if len(labels) == 2 else ((self.label(state.sample),), labels[0])
        seeds = self.samples[state.sample].seeds
        about = {"model": self.model.provenance(), "seeds": None if seeds is None else list(seeds)}
        about |= {"timesteps": list(self.timesteps), "process": state.process, "t_range": list(state.t_range)}
        return EditGrid(images.unflatten(0, (len(rows), len(columns))), rows, columns, about)

    def path(self, t: int, *, progress: Progress | None = None) -> np.ndarray:
        """h_t of the sample while the edit grows from nothing to all of it in five steps, for a map of h-space.

        Parameters
        ----------
        t : int
            A visited timestep.
        progress : Progress, optional

        Returns
        -------
        ndarray of shape (5, C*h*w), float32
            Inputs of the decoder: the network's own h plus the edit's change.
        """
        state = self.state
        own = self.distances() if state.distances else {}
        i = index_of(t, self.timesteps, trained=self.model.schedule.T)
        plain, found = self._plain(state, progress), []
        for part in _PATH:
            plan = self._plan(state.scaled(part, own), progress) if part else plain
            j = i - (plain.steps - plan.steps)
            if plan is plain or j < 0:
                found.append(self._h(plain.x.values[i], t))
                continue
            run = _run(plan, progress, record_h=True)
            h = run.h.values[j]
            edited = None if run.edit is None else run.edit.change(j, h, slice(None))
            found.append(h if edited is None else edited)
        return torch.cat(found).flatten(1).numpy()

    def _project(self, name: str, others: tuple[str, ...]) -> Direction:
        if not others:
            return self.directions[name]
        if (name, others) not in self._projected:
            found = self.directions[name].orthogonal_to(*(self.directions[other] for other in others))
            self._projected[name, others] = found
        return self._projected[name, others]

    def _plain(self, state: EditState, progress: Progress | None) -> Trajectory:
        """The unedited sample with its x_t at every step. Of an inverted image, x0 is the image itself."""
        key = (state.sample, state.eta)
        if key not in self._plains:
            run, progress = self.samples[state.sample], progress or Progress()
            if state.eta is not None and run.seeds is not None:
                run = replace(run, etas=self.model.schedule.etas(state.eta, run.steps))
            progress.expect(run.steps)
            again = replay(run, record_x=True, progress=progress)
            if run.seeds is None:
                again = replace(again, x0=run.x0, residual=run.x0 - again.x0)
            _keep(self._plains, key, again)
        return self._plains[key]

    def _edit(self, state: EditState) -> tuple[Edit, list[float] | dict[str, list[list[float]]]]:
        """The edit of a state, and its one scale: a direction's, or the distances in each space."""
        if state.process != "single-step":
            return Shift(self.direction(state), asymmetric=state.process == "asymmetric"), [1.0]
        self._refuse_two_timesteps(state.distances)
        moved = {space: [k for k in state.distances if self.boundaries[k].space == space] for space in "hx"}
        crossed = {space: [self.boundaries[name] for name in names] for space, names in moved.items()}
        distances = {space: [[state.distances[name] for name in names]] for space, names in moved.items()}
        return Cross(**crossed, unit="distance", multi="joint", eta=None), distances

    def _refuse_two_timesteps(self, names: Iterable[str]) -> None:
        (t, first), *others = {self.boundaries[name].t: name for name in names}.items()
        if others:
            other = f"{first} is at t={t} and {others[0][1]} at t={others[0][0]}"
            raise ValueError(f"a single step is at one timestep; {other}, so move to one of them")

    def _plan(self, state: EditState, progress: Progress | None) -> Trajectory:
        """The edited sample from the first step on that is edited, not run yet; the plain sample without an edit."""
        plain = self._plain(state, progress)
        if not state.edits:
            return plain
        edit, scales = self._edit(state)
        return edit.plan(plain, scales)[0]

    def _preview(self, state: EditState, progress: Progress | None) -> Trajectory:
        """The plan in few steps, whose changes of h have the first-order effect of all of the plan's."""
        plain, plan = self._plain(state, progress), self._plan(state, progress)
        if plan.steps <= self.preview_steps:
            return plan
        first = plain.steps - plan.steps
        key = (state.sample, state.eta, first, self.preview_steps)
        if key not in self._rests:
            _keep(self._rests, key, abridged(plain, first, self.preview_steps))
        rest, asymmetric = self._rests[key], state.process == "asymmetric"
        delta = torch.zeros(plain.steps, 1, *self.model.h_shape)
        # What a direction adds is the same for every h.
        own = self._h(plan.x_T, plan.timesteps[0]) if state.process == "single-step" else torch.zeros_like(delta[0])
        for i in range(plan.steps):
            edited = None if plan.edit is None else plan.edit.change(i, own, slice(None))
            if edited is not None:
                delta[first + i] = edited - own
        delta = same_effect(plain, delta, rest, asymmetric=asymmetric)
        return replace(rest, x_T=plan.x_T, edit=Injection.adding(delta, asymmetric=asymmetric))

    @torch.inference_mode()
    def _h(self, x_t: torch.Tensor, t: int) -> torch.Tensor:
        return self.model.encode(x_t.to(self.model.device), t).h.cpu().contiguous()


def _run(plan: Trajectory, progress: Progress | None, **recorded: bool) -> Trajectory:
    """Carry out a plan; of an image, with what its reconstruction lacks."""
    progress = progress or Progress()
    progress.expect(plan.steps)
    return replay(plan, residual=plan.residual is not None, progress=progress, **recorded)


def _keep(cache: dict, key: tuple, value) -> None:
    """Store a value; the oldest goes when there are too many."""
    cache[key] = value
    while len(cache) > _KEPT:
        cache.pop(next(iter(cache)), None)


def _unused(name: str, taken: Mapping[str, object]) -> str:
    if name not in taken:
        return name
    return next(f"{name} ({k})" for k in range(2, len(taken) + 3) if f"{name} ({k})" not in taken)


def known(name: str, among: Mapping[str, _Named], what: str) -> _Named:
    if name not in among:
        raise ValueError(f"there is no {what} {name!r}; there is {', '.join(among) or 'none'}")
    return among[name]
