"""Edits: an edit turns a run into one plan per scale.

A plan is a `Trajectory` that has not been run: it starts at the first edited step, from the edited x_t, with the
edit's noise and injection. `render` runs plans without knowing the kinds of edits.

| edit | changes |
|---|---|
| `Shift` | h_t along a direction, at every step (Haas et al.; Asyrp) |
| `Swap` | h_t, towards that of another run (Haas et al.; InjectFusion) |
| `AtTap` | what another edit changes, at another place of the network than h |
| `Cross` (cross.py) | x_t and h_t across boundaries, at one step (Zhu et al.) |
| `MoveX` | x_t along a vector, at one step (LOCO-Edit; Park et al.) |
| `Transport` | x_t along a vector of each sample's own, at one step (Park et al.) |
| `MoveNoise` | x_T and the noise of every step |
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Injection, Trajectory, at_step
from workbench.diffusion.schedule import NoiseSchedule, index_of, within
from workbench.directions.asyrp import DeltaFunction
from workbench.directions.direction import Direction, finite
from workbench.directions.jacobian import Spectrum
from workbench.formats.tensors import digest
from workbench.io import one_of


class NotApplicable(ValueError):
    """A method or an edit has nothing to offer here, for the reason that it says."""


class Edit:
    """Base class of edits of runs; a subclass defines the change.

    Attributes
    ----------
    name : str
    unit : str
        Unit of the scale: "sigma" is one standard deviation of the population's projection on the direction.
    """

    name: str
    unit: str = "sigma"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        """Edited runs, not run yet, one per scale; the run itself where a scale changes nothing.

        Raises
        ------
        ValueError
            If the edit does not fit the run, or a scale is not finite.
        """
        raise NotImplementedError

    def plain(self, run: Trajectory) -> Trajectory:
        """Reference run for comparisons: the same process without the change."""
        return run

    def labels(self, scales: Sequence[float]) -> tuple[str, ...]:
        """Caption of each scale."""
        return tuple(f"{scale:+g} {self.unit}" if scale else "0" for scale in scales)

    def about(self) -> dict:
        """Describe the edit by JSON values."""
        return {"name": self.name, "unit": self.unit}

    def __neg__(self) -> Edit:
        return Turned(self)


@dataclass(frozen=True, eq=False)
class Wrapped(Edit):
    """Base class of edits that are made from another one."""

    edit: Edit

    def __post_init__(self) -> None:
        object.__setattr__(self, "edit", as_edit(self.edit))

    @property
    def unit(self) -> str:
        return self.edit.unit

    def plain(self, run: Trajectory) -> Trajectory:
        return self.edit.plain(run)


class Turned(Wrapped):
    """An edit with the sign of its scales turned."""

    @property
    def name(self) -> str:
        return f"-{self.edit.name}"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        return self.edit.plan(run, [-scale for scale in scales])

    def about(self) -> dict:
        return self.edit.about() | {"name": self.name, "turned": True}


class InjectionEdit(Edit):
    """An edit of h alone, by an injection that acts from some step on."""

    def injection(self, run: Trajectory, scale: float) -> Injection:
        """Injection into h at every step of the run."""
        raise NotImplementedError

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        first = self._first(run)
        injections = [self.injection(run, scale) if finite(scale, "a scale") else None for scale in scales]
        return [run if one is None else replace(run.tail(first), edit=one.after(first)) for one in injections]

    def _first(self, run: Trajectory) -> int:
        """The first step that the edit changes; 0 if there is none."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Shift(InjectionEdit):
    """h_t <- h_t + scale * sigma_t * v_t (Haas et al. eq. 6), or h_t + scale * f(h_t, t) (Asyrp).

    Attributes
    ----------
    direction : Direction or DeltaFunction
    asymmetric : bool
        Edit P_t alone (Asyrp eq. 5); by default P_t and D_t (symmetric, Haas et al.).
    t_range : (int, int), optional
        (from, to): the edit acts at from >= t >= to. By default at all timesteps.
    gain : {None, "match"}
        "match" scales an asymmetric edit, step by step, to the first-order effect of the symmetric one.
    """

    direction: Direction | DeltaFunction
    asymmetric: bool = False
    t_range: tuple[int, int] | None = None
    gain: str | None = None

    @property
    def name(self) -> str:
        return self.direction.name

    def injection(self, run: Trajectory, scale: float) -> Injection:
        scale, weights = finite(scale, "scale"), self._weights(run)
        if isinstance(self.direction, DeltaFunction):
            self.direction.check_fits(run.model)
            weights = (scale * weights).tolist()

            def change(i: int, h: torch.Tensor, samples: slice | torch.Tensor) -> torch.Tensor | None:
                return h + weights[i] * self.direction(h, run.timesteps[i]) if weights[i] else None

            return Injection(change, self.asymmetric, run.timesteps)
        self.direction.check_fits(run.model, run.timesteps)
        values = self.direction.delta(scale) * weights.view(-1, 1, 1, 1)
        return Injection.adding(values[:, None], asymmetric=self.asymmetric, timesteps=run.timesteps)

    def about(self) -> dict:
        about = {"asymmetric": self.asymmetric, "t_range": self.t_range and list(self.t_range), "gain": self.gain}
        return super().about() | getattr(self.direction, "provenance", {}) | about

    def _weights(self, run: Trajectory) -> torch.Tensor:
        """Factor of the edit at every step: 0 outside of t_range, else `match_gain` if asked for, else 1."""
        one_of("gain", self.gain, (None, "match"))
        weights = torch.tensor(within(self.t_range, run.timesteps)).float()
        if self.gain is None or not self.asymmetric:
            return weights
        schedule = run.model.schedule
        steps = zip(schedule.pairs(run.timesteps), run.etas, strict=True)
        return weights * torch.tensor([match_gain(schedule, pair, eta=eta) for pair, eta in steps])

    def _first(self, run: Trajectory) -> int:
        acts = self._weights(run) != 0
        if isinstance(self.direction, Direction):
            self.direction.check_fits(run.model, run.timesteps)
            acts &= self.direction.delta().flatten(1).any(dim=1)
        return int(acts.int().argmax())


@dataclass(frozen=True, eq=False)
class Swap(InjectionEdit):
    """Replace a run's h with another run's (Haas et al. Fig. 2a), or blend them (InjectFusion).

    Attributes
    ----------
    donor : Trajectory with recorded h
        One sample, or as many as in the run.
    mode : {"replace", "slerp"}
        "replace": any scale but 0 uses the donor's h. "slerp": the scale is the donor's weight in [0, 1] on the sphere,
        at the norm of the run's own h.
    asymmetric, t_range
        As in `Shift`.
    mask : bool array of shape (h, w), optional
        Positions at which the donor's h is used; elsewhere the run keeps its own. How InjectFusion normalises a part
        of h is inferred.
    calibration : float, optional
        omega of InjectFusion's calibration (.3 in the paper): the edit is applied to x_t before the step instead of in
        it; see `Injection`.
    """

    donor: Trajectory
    mode: str = "replace"
    asymmetric: bool = False
    t_range: tuple[int, int] | None = None
    mask: np.ndarray | None = field(default=None, repr=False)
    calibration: float | None = None
    unit: str = "weight"

    @property
    def name(self) -> str:
        return f"h of another sample ({self.mode})"

    def injection(self, run: Trajectory, scale: float) -> Injection:
        one_of("mode", self.mode, ("replace", "slerp"))
        if self.asymmetric and self.calibration is not None:
            raise ValueError("a calibrated swap changes x_t before the step, so it can't be asymmetric; choose one")
        values, active = self._donor_h(run), within(self.t_range, run.timesteps)
        if self.mode == "slerp" and not 0.0 <= scale <= 1.0:
            raise ValueError(f"slerp takes a weight in [0, 1] as its scale, not {scale}")
        mask = None if self.mask is None else torch.as_tensor(self.mask, dtype=torch.bool)
        if mask is not None and mask.shape != values.shape[-2:]:
            raise ValueError(f"the mask has shape {tuple(mask.shape)}; h has {tuple(values.shape[-2:])}")

        def change(i: int, h: torch.Tensor, samples: slice | torch.Tensor) -> torch.Tensor | None:
            if not active[i] or (self.mode == "slerp" and scale == 0.0):
                return None
            donor = at_step(values, i, samples).to(h).expand_as(h)
            if mask is not None:
                donor = torch.where(mask.to(h.device), donor, h)
            return donor if self.mode == "replace" else slerp(h, donor, scale)

        return Injection(change, self.asymmetric, run.timesteps, self.calibration)

    def about(self) -> dict:
        donor = None if self.donor.seeds is None else list(self.donor.seeds)
        about = {"donor": donor, "asymmetric": self.asymmetric, "t_range": self.t_range and list(self.t_range)}
        about |= {
            "mode": self.mode,
            "calibration": self.calibration,
            "mask": None if self.mask is None else np.asarray(self.mask).tolist(),
        }
        return super().about() | about

    def _first(self, run: Trajectory) -> int:
        return within(self.t_range, run.timesteps).index(True)

    def _donor_h(self, run: Trajectory) -> torch.Tensor:
        donor = self.donor
        h = donor.h if isinstance(donor, Trajectory) else None
        if h is None:
            raise ValueError('"replace" and "slerp" take a run with recorded h as donor (sample with record_h=True)')
        refuse_other_model("the donor", donor.model.provenance(), run.model.provenance())
        if donor.timesteps != run.timesteps or len(donor) not in (1, len(run)):
            needed = f"it needs 1 or {len(run)} samples and the run's own {run.steps} timesteps"
            raise NotApplicable(f"the donor has {len(donor)} samples at {donor.steps} timesteps; {needed}")
        return h.values


@dataclass(frozen=True, eq=False)
class AtTap(Wrapped):
    """Another edit, at a tap of the network that is not the run's own.

    Attributes
    ----------
    edit : Edit or Direction
        Of what the tap reads, such as a direction found in a store of `model.tapped(tap)`.
    tap : str
    """

    tap: str

    @property
    def name(self) -> str:
        return f"{self.edit.name} at {self.tap}"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        tapped = run.tapped(self.tap)
        return [run if plan is tapped else plan for plan in self.edit.plan(tapped, scales)]

    def plain(self, run: Trajectory) -> Trajectory:
        plain = self.edit.plain(tapped := run.tapped(self.tap))
        return run if plain is tapped else plain

    def about(self) -> dict:
        return self.edit.about() | {"tap": self.tap}


@dataclass(frozen=True, eq=False)
class MoveX(Edit):
    """x_t <- x_t + scale * vector at one timestep, then continue the run's own process (LOCO-Edit; Park et al.).

    Attributes
    ----------
    vector : Tensor of shape (C, H, W), or (n, C, H, W) with one per sample
    t : int
        A visited timestep.
    name, unit : str
    """

    vector: torch.Tensor = field(repr=False)
    t: int
    name: str
    unit: str = "length in x_t"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        first = index_of(self.t, run.timesteps, trained=run.model.schedule.T)
        x_t = run.reached(first)  # of an inverted image not the inversion's own, which scale 0 does not decode
        vector = self.vector.to(x_t)
        return [run.tail(first, x_t + s * vector) if finite(s, "scale") else run for s in scales]

    def about(self) -> dict:
        return super().about() | {"t": int(self.t), "vector": _hash(self.vector)}


@dataclass(frozen=True, eq=False)
class Transport(Edit):
    """x_t along each sample's own vector: a vector of h, carried to x_t by the sample's pullback (Park et al. 2023).

    With V and U the right and left singular vectors of d h / d x_t at the sample, the vector u of h becomes V U'u,
    of length 1. The released code's transport does not run, so this follows the description.

    Attributes
    ----------
    u : Tensor of shape (C, h, w)
        Such as a left singular vector of another sample's pullback.
    t : int
        A visited timestep.
    pullbacks : callable (run) -> sequence of Spectrum
        One per sample of the run, of "x->h" at `t`.
    name, unit : str
    """

    u: torch.Tensor = field(repr=False)
    t: int
    pullbacks: Callable[[Trajectory], Sequence[Spectrum]] = field(repr=False)
    name: str
    unit: str = "length in x_t"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        return MoveX(self.vectors(run), self.t, self.name, self.unit).plan(run, scales)

    def vectors(self, run: Trajectory) -> torch.Tensor:
        """V U'u of every sample, of length 1; (n, C, H, W)."""
        carried = [
            torch.einsum("k,kchw->chw", found.left.flatten(1) @ self.u.flatten(), found.right)
            for found in self.pullbacks(run)
        ]
        return F.normalize(torch.stack(carried).flatten(1)).view(-1, *run.model.x_shape)

    def about(self) -> dict:
        return super().about() | {"t": int(self.t), "u": _hash(self.u)}


@dataclass(frozen=True, eq=False)
class MoveNoise(Edit):
    """Move x_T and every z_t along its own direction; z_t of a step that adds no noise stays 0.

    Attributes
    ----------
    units : Tensor of shape (1 + steps, C, H, W)
        One for x_T, then one per step.
    timesteps : tuple of int
        Timesteps of the runs to edit.
    name, unit : str
    """

    units: torch.Tensor = field(repr=False)
    timesteps: tuple[int, ...] = field(repr=False)
    name: str
    unit: str = "sd of each noise"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        if run.timesteps != self.timesteps:
            raise NotApplicable("this move was found at other timesteps than the run's; find it at the run's own")
        noise = run.noise
        stochastic = noise.flatten(1).any(dim=1).view(-1, 1, 1, 1, 1)
        moved = [(run.x_T + s * self.units[0], noise + s * stochastic * self.units[1:, None]) for s in scales]
        return [
            replace(run, x_T=x_T, stored_noise=z, seeds=None) if finite(s, "scale") else run
            for s, (x_T, z) in zip(scales, moved, strict=True)
        ]

    def about(self) -> dict:
        return super().about() | {"timesteps": list(self.timesteps), "units": _hash(self.units)}


def as_edit(found: Edit | Direction | DeltaFunction, **options: Any) -> Edit:
    """An edit as it is, without options; a direction as a `Shift` with these."""
    if isinstance(found, Edit):
        if given := [name for name, value in options.items() if value]:
            raise ValueError(f"{', '.join(given)}: options of directions, and {found.name!r} is an edit with its own")
        return found
    if not isinstance(found, Direction | DeltaFunction):
        raise ValueError(f"an edit is a Direction, a DeltaFunction or an Edit, not a {type(found).__name__}")
    return Shift(found, **options)


def _hash(vector: torch.Tensor) -> str:
    return digest({"vector": vector.contiguous()})[:16]


def check_run(model: Model, run: Trajectory) -> None:
    """Refuse a run of another model, or one that is edited already."""
    refuse_other_model("the run", run.model.provenance(), model.provenance())
    if run.edit is not None:
        raise ValueError("this run is edited already; edit the plain run, with the sum of both directions")


def eps_effects(schedule: NoiseSchedule, pair: tuple[int, int], *, eta: float) -> tuple[float, float]:
    """By how much a change of eps moves x_prev, through P_t and through D_t, at the step from t to t_prev.

    c_P = -sqrt(alpha_bar_prev (1 - alpha_bar) / alpha_bar), c_D = sqrt(1 - alpha_bar_prev - sigma^2); from DDIM eq. 12.
    """
    t, t_prev = pair
    a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    c_p = -((a_prev * (1.0 - a) / a) ** 0.5)
    c_d = (1.0 - a_prev - schedule.sigma(t, t_prev, eta) ** 2) ** 0.5
    return c_p, c_d


def match_gain(schedule: NoiseSchedule, pair: tuple[int, int], *, eta: float) -> float:
    """Factor |c_P + c_D| / |c_P| in (0, 1] that gives an asymmetric edit the first-order effect of the symmetric one.

    A change of eps moves x_prev by c_P + c_D (`eps_effects`) if it enters P_t and D_t, and by c_P if it enters P_t
    alone. The two have opposite signs, so the asymmetric edit is the stronger one, the more so the smaller the step
    (Asyrp, Theorem 1).
    """
    c_p, c_d = eps_effects(schedule, pair, eta=eta)
    return abs(c_p + c_d) / abs(c_p)


def slerp(h: torch.Tensor, other: torch.Tensor, weight: float) -> torch.Tensor:
    """Spherical interpolation of each sample from h to `other` at the norm of h (InjectFusion, arXiv 2303.15403)."""
    a, b = h.flatten(1), other.flatten(1)
    norm = a.norm(dim=1, keepdim=True)
    a, b = F.normalize(a), F.normalize(b)
    angle = torch.arccos((a * b).sum(1, keepdim=True).clamp(-1.0, 1.0))
    small = angle < 1e-4
    sine = torch.where(small, torch.ones_like(angle), torch.sin(angle))
    u = torch.where(small, torch.full_like(angle, 1.0 - weight), torch.sin((1.0 - weight) * angle) / sine)
    v = torch.where(small, torch.full_like(angle, weight), torch.sin(weight * angle) / sine)
    return ((u * a + v * b) * norm).view_as(h)
