"""Sampling and replay, with all noise stored or reproducible.

A seed is a sample: x_T and the step noises of sample i come from seed i alone (see `noise`), so replaying, editing,
slicing or resuming a run keeps the same images.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.diffusion.models import Model
from workbench.diffusion.noise import check_seeds, initial_noise, step_noise
from workbench.diffusion.schedule import CLEAN, index_of
from workbench.diffusion.unet import Bottleneck

DIVERGED = 10.0
"""Values of samples beyond which they are no images, which lie in [-1, 1], and no latents of a few times that."""

NOISE_UP_TO = 0.05
"""alpha_bar of the first visited timestep up to which x_t may be replaced by noise."""


@dataclass(frozen=True, eq=False)
class StepRecord:
    """A quantity of every sample at every visited timestep: h_t or x_t.

    Attributes
    ----------
    values : Tensor of shape (steps, n, C, h, w), float32, on the CPU
    timesteps : tuple of int
        Noisiest first.
    """

    values: torch.Tensor
    timesteps: tuple[int, ...]

    @classmethod
    def empty(cls, model: Model, timesteps: Sequence[int], n: int, shape: Sequence[int]) -> StepRecord:
        """A record to fill by `keep`. A GPU writes into its pinned memory while it computes the next step."""
        pinned = model.device.type == "cuda"
        return cls(torch.empty(len(timesteps), n, *shape, pin_memory=pinned), tuple(timesteps))

    def at(self, t: int) -> np.ndarray:
        """The samples at timestep `t`, flattened.

        Returns
        -------
        ndarray of shape (n, C*h*w), float32

        Raises
        ------
        ValueError
            If `t` was not visited.
        """
        return self.values[index_of(t, self.timesteps)].flatten(1).numpy()

    def __getitem__(self, samples) -> StepRecord:
        one = isinstance(samples, (int, np.integer))
        return replace(self, values=self.values[:, [samples] if one else samples])

    def __repr__(self) -> str:
        return f"StepRecord({tuple(self.values.shape)}, t={self.timesteps[0]}..{self.timesteps[-1]})"


def keep(record: StepRecord | None, i: int, samples: slice, values: torch.Tensor) -> None:
    """Record step `i` of some samples. Complete once the caller has copied a later result from the device."""
    if record is not None:
        record.values[i, samples].copy_(values, non_blocking=record.values.is_pinned())


@dataclass(frozen=True, eq=False)
class Injection:
    """A change of h during the reverse process.

    Attributes
    ----------
    change : callable (i, h, samples) -> Tensor of shape (n, C, h, w) or None
        The edited h of step `i` for the samples at positions `samples` (slice or Tensor), given the network's own h of
        shape (n, C, h, w). None leaves h as it is.
    asymmetric : bool
        If true, the edited eps enters P_t alone and D_t keeps the plain one (Asyrp eq. 5); else both (Haas et al.).
    timesteps : tuple of int, optional
        Those of the runs that it is for; None fits all.
    calibration : float, optional
        omega of InjectFusion: the edit moves x_t, by `NoiseSchedule.calibrated`, and the step goes on from there
        without it.
    """

    change: Callable[[int, torch.Tensor, slice | torch.Tensor], torch.Tensor | None] = field(repr=False)
    asymmetric: bool = False
    timesteps: tuple[int, ...] | None = field(default=None, repr=False)
    calibration: float | None = field(default=None, repr=False)

    @classmethod
    def adding(
        cls, values: torch.Tensor, *, asymmetric: bool = False, timesteps: tuple[int, ...] | None = None
    ) -> Injection:
        """h_t + values[i], for values of shape (steps, 1 or n, C, h, w); a step of zeros leaves h (Haas eq. 6)."""
        acts = values.flatten(1).any(dim=1).tolist()
        return cls(
            lambda i, h, samples: h + at_step(values, i, samples).to(h) if acts[i] else None, asymmetric, timesteps
        )

    def of(self, positions: np.ndarray) -> Injection:
        """The same change for some of the samples."""
        rows = torch.as_tensor(positions)
        return replace(self, change=lambda i, h, samples: self.change(i, h, rows[samples]))

    def after(self, first: int) -> Injection:
        """The same change for a run that begins with step `first`."""
        left = None if self.timesteps is None else self.timesteps[first:]
        return replace(self, change=lambda i, h, samples: self.change(first + i, h, samples), timesteps=left)


def process_of(edit: Injection | None) -> dict:
    """How `denoise` lets an injection act; the same for none as for a symmetric one."""
    if edit is None:
        return {"asymmetric": False, "calibration": None}
    return {"asymmetric": edit.asymmetric, "calibration": edit.calibration}


def at_step(values: torch.Tensor, i: int, samples: slice | torch.Tensor) -> torch.Tensor:
    """Step `i` of values of shape (steps, 1 or n, ...), for all samples alike or for those at some positions."""
    return values[i] if values.shape[1] == 1 else values[i, samples]


@dataclass(frozen=True, eq=False)
class Trajectory:
    """A batch of samples and everything needed to reproduce them.

    Attributes
    ----------
    model : Model
    x_T : Tensor of shape (n, C, H, W), float32, on the CPU
        Starting noise of the run.
    x0 : Tensor of shape (n, C, H, W), float32, on the CPU
        x_0 of the run: the images, nominally in [-1, 1], or latents of them. For an inversion, what was inverted;
        `replay` gives its reconstruction.
    timesteps : tuple of int
        Visited timesteps, noisiest first.
    etas : tuple of float
        One per step.
    seeds : tuple of int, optional
        None if the run comes from inversion.
    h, x : StepRecord, optional
        The network's own h_t (before any edit) and x_t, if they were recorded.
    edit : Injection, optional
        The edit of h.
    stored_noise : Tensor of shape (steps, n, C, H, W), float32, on the CPU, optional
        z_t of an edit-friendly inversion, which no seed reproduces.
    residual : Tensor of shape (n, C, H, W), float32, on the CPU, optional
        Inverted images less their reconstruction.
    batch_size : int
        Samples per pass; replay in the same batches is exact to the bit.
    """

    model: Model = field(repr=False)
    x_T: torch.Tensor = field(repr=False)
    x0: torch.Tensor = field(repr=False)
    timesteps: tuple[int, ...]
    etas: tuple[float, ...]
    seeds: tuple[int, ...] | None = None
    h: StepRecord | None = None
    x: StepRecord | None = None
    edit: Injection | None = None
    stored_noise: torch.Tensor | None = field(default=None, repr=False)
    residual: torch.Tensor | None = field(default=None, repr=False)
    batch_size: int = 1
    _reached: dict[int, torch.Tensor] = field(default_factory=dict, init=False, repr=False)

    def __len__(self) -> int:
        return len(self.x_T)

    def __getitem__(self, samples: int | slice | Sequence[int]) -> Trajectory:
        """The samples at these positions, as a Trajectory."""
        if isinstance(samples, (int, np.integer)):
            samples = range(len(self))[samples]
            samples = slice(samples, samples + 1)
        elif not isinstance(samples, slice) or (samples.step or 1) < 0:  # which torch does not take
            samples = torch.tensor(range(len(self))[samples] if isinstance(samples, slice) else list(samples))
        # As a list: numpy takes a tensor of one position for a number.
        positions = np.arange(len(self))[samples if isinstance(samples, slice) else samples.tolist()]
        if len(positions) == 0:
            raise IndexError(f"no sample is chosen; there are {len(self)}")
        return replace(
            self,
            x_T=self.x_T[samples],
            x0=self.x0[samples],
            seeds=None if self.seeds is None else tuple(self.seeds[p] for p in positions),
            h=None if self.h is None else self.h[samples],
            x=None if self.x is None else self.x[samples],
            edit=None if self.edit is None else self.edit.of(positions),
            stored_noise=None if self.stored_noise is None else self.stored_noise[:, samples],
            residual=None if self.residual is None else self.residual[samples],
        )

    @cached_property
    def images(self) -> torch.Tensor:
        """x0 as images of shape (n, C, H, W), float32, nominally in [-1, 1]; decoded, once, for a latent model."""
        return self.model.to_images(self.x0)

    @property
    def steps(self) -> int:
        """Number of visited timesteps."""
        return len(self.timesteps)

    @property
    def noise(self) -> torch.Tensor:
        """z_t of every step, regenerated from the seeds; shape (steps, n, C, H, W), zero where a step adds none."""
        return torch.stack([self.noise_at(i) for i in range(self.steps)])

    def noise_at(self, i: int, samples: slice | Sequence[int] | torch.Tensor = slice(None)) -> torch.Tensor:
        """z_t of step `i` for the samples at these positions: stored by an inversion, or regenerated from the seeds.

        Returns
        -------
        Tensor of shape (len(samples), C, H, W), float32, on the CPU
            Zero where the step adds none.
        """
        if self.stored_noise is not None:
            return self.stored_noise[i, samples]
        t_prev = (*self.timesteps, CLEAN)[i + 1]
        if self.seeds is None or self.model.schedule.sigma(self.timesteps[i], t_prev, self.etas[i]) == 0.0:
            return torch.zeros_like(self.x_T[samples])
        seeds = [self.seeds[p] for p in torch.arange(len(self))[samples].tolist()]
        return step_noise(seeds, self.x_T.shape[1:], t=self.timesteps[i])

    def x_at(self, t: int) -> torch.Tensor:
        """x_t of every sample: recorded by the run, or recomputed.

        Returns
        -------
        Tensor of shape (n, C, H, W), float32, on the CPU

        Raises
        ------
        ValueError
            If `t` was not visited.
        """
        i = index_of(t, self.timesteps, trained=self.model.schedule.T)
        if self.x is not None:
            return self.x.values[i]
        if i > 0 and self.seeds is None and self.stored_noise is None:
            raise ValueError("an inverted run does not know its x_t; call invert(..., record_x=True)")
        return self.reached(i)

    def reached(self, i: int) -> torch.Tensor:
        """x_t at step `i` of the run's own reverse process (of the reconstruction, for an inversion), computed once.

        Returns
        -------
        Tensor of shape (n, C, H, W), float32, on the CPU
        """
        if i == 0:
            return self.x_T
        if self.x is not None and self.seeds is not None:
            return self.x.values[i]
        if i not in self._reached:
            self._reached[i] = _run(self, stop=i, progress=False).x0
        return self._reached[i]

    @property
    def is_sampled(self) -> bool:
        """Whether the seeds give x_T; a run that was moved in x_t keeps them for the noise of its steps alone."""
        return self.seeds is not None and torch.equal(self.x_T, initial_noise(self.seeds, self.model.x_shape))

    def tapped(self, tap: str) -> Trajectory:
        """The same samples, with h read and edited at another tap; see `SplitUNet`."""
        return replace(self, model=self.model.tapped(tap), h=None)

    def tail(self, first: int, x_t: torch.Tensor | None = None) -> Trajectory:
        """The steps from `first` on, not run yet: from the run's own x_t there, or from another."""
        if first == 0 and x_t is None:
            return self
        return replace(
            self,
            x_T=self.reached(first) if x_t is None else x_t,
            timesteps=self.timesteps[first:],
            etas=self.etas[first:],
            stored_noise=None if self.stored_noise is None else self.stored_noise[first:],
            h=None,
            x=None,
            edit=None if self.edit is None else self.edit.after(first),
        )

    def round_trip_error(self) -> np.ndarray:
        """PSNR of an inversion's reconstruction.

        Returns
        -------
        ndarray of shape (n,), float64, dB
            Peak signal-to-noise ratio 10 log10(4 / mean squared error) of each image, the peak-to-peak range being 2;
            inf for an exact reconstruction. Without a `residual` it takes one replay.
        """
        residual = self.x0 - replay(self, progress=False).x0 if self.residual is None else self.residual
        if self.model.latent:
            residual = self.images - self.model.to_images(self.x0 - residual)
        with np.errstate(divide="ignore"):
            return 10.0 * np.log10(4.0 / residual.double().square().flatten(1).mean(dim=1).numpy())

    def __repr__(self) -> str:
        origin = "inverted" if self.seeds is None else f"seeds {_shorten(self.seeds)}"
        kept = ", ".join(name for name in ("h", "x") if getattr(self, name) is not None)
        return (
            f"Trajectory({self.model.name!r}, {len(self)} samples, {origin}, {self.steps} steps "
            f"t={self.timesteps[0]}..{self.timesteps[-1]}, eta {_shorten(self.etas)}"
            f"{', records ' + kept if kept else ''}{f', {self.edit}' if self.edit else ''}"
            f"{'' if self.residual is None else f', round trip {np.median(self.round_trip_error()):.1f} dB'})"
        )


def _shorten(values: Sequence) -> str:
    first, last = (f"{v:g}" if isinstance(v, float) else str(v) for v in (values[0], values[-1]))
    return first if len(set(values)) == 1 else f"{first}..{last}"


def sample(
    model: Model,
    seeds: int | Iterable[int],
    *,
    steps: int | Sequence[int] = 50,
    eta: float | Sequence[float] = 1.0,
    record_h: bool = False,
    record_x: bool = False,
    batch_size: int | None = None,
    progress: bool | tqdm = True,
) -> Trajectory:
    """Generate images, and keep everything needed to reproduce and edit them.

    Parameters
    ----------
    model : Model
    seeds : iterable of int
        One per sample. A seed gives the same sample for any batch size, order or device, up to rounding.
    steps : int or sequence of int, default 50
        Number of visited timesteps, or these timesteps, decreasing.
    eta : float or sequence of float (one per step), values in [0, 1]
        0 is deterministic DDIM; 1 (default, as in Haas et al.) has the variance of DDPM.
    record_h, record_x : bool
        Keep h_t, x_t of every step; takes n * steps * (their size) * 4 bytes of memory.
    batch_size : int, optional
        Samples per pass; chosen by the model if not given.
    progress : bool or tqdm
        Show a bar, or update the given one by image-steps.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        If a seed is negative or repeated, or steps or eta don't fit the model.

    Warns
    -----
    UserWarning
        If the first timestep is so late that x_t is no noise there, as with one or two steps; if samples reach far
        outside of [-1, 1], as from an undertrained model.
    """
    seeds = check_seeds(seeds)
    visited = model.schedule.timesteps(steps)
    if (signal := model.schedule.alpha_bars[visited[0]]) > NOISE_UP_TO:
        warnings.warn(
            f"sampling starts from noise at t = {visited[0]}, where x_t should be {signal**0.5:.0%} image; take more "
            f"steps, or a list of timesteps that begins near {model.schedule.T - 1}",
            stacklevel=2,
        )
    plan = Trajectory(
        model=model,
        x_T=initial_noise(seeds, model.x_shape),
        x0=torch.empty(0),
        timesteps=visited,
        etas=model.schedule.etas(eta, len(visited)),
        seeds=seeds,
        batch_size=check_batch_size(batch_size, model, len(seeds)),
    )
    run = _run(plan, record_h=record_h, record_x=record_x, progress=progress)
    low, high = (float(bound) for bound in run.x0.aminmax())
    if not max(-low, high) <= DIVERGED:
        warnings.warn(
            f"the samples diverge: they lie in [{low:.4g}, {high:.4g}], and {'latents' if model.latent else 'images'} "
            f"around [-1, 1]; {model.name} was not trained for long enough, or with another noise schedule",
            stacklevel=2,
        )
    return run


def replay(
    run: Trajectory,
    *,
    edit: Injection | None = None,
    residual: bool = False,
    record_h: bool = False,
    record_x: bool = False,
    progress: bool | tqdm = True,
) -> Trajectory:
    """Run a trajectory again, with the same x_T and the same noise; bit for bit on the same machine.

    Parameters
    ----------
    run : Trajectory
        For an inversion, the replay's x0 is the reconstruction.
    edit : Injection, optional
        Replaces the run's own edit.
    residual : bool
        Add the inversion's residual: without an edit x0 is then the inverted image itself, up to one rounding.
    record_h, record_x, progress
        As in `sample`.

    Returns
    -------
    Trajectory

    Raises
    ------
    ValueError
        If the edit is for other timesteps, or the run lacks the requested residual.
    """
    if residual:
        check_residual(run)
    if edit is not None and edit.timesteps not in (None, run.timesteps):
        raise ValueError("this edit was planned for other timesteps than the run's own; plan it for this run")
    plan = run if edit is None else replace(run, edit=edit)
    again = _run(plan, record_h=record_h, record_x=record_x, progress=progress)
    return replace(again, x0=again.x0 + run.residual) if residual else again


def denoise(
    model: Model,
    x_t: torch.Tensor,
    *,
    pairs: Sequence[tuple[int, int]],
    etas: Sequence[float],
    noise: Callable[[int], torch.Tensor],
    edit_h: Callable[[int, torch.Tensor], torch.Tensor | None] | None = None,
    asymmetric: bool = False,
    calibration: float | None = None,
    on_step: Callable[[int, torch.Tensor, torch.Tensor], None] | None = None,
) -> torch.Tensor:
    """The reverse process over some visited timesteps (Haas et al. eqs. 2-6; Asyrp eq. 5 if asymmetric).

    Parameters
    ----------
    model : Model
    x_t : Tensor of shape (n, C, H, W), on the model's device
        At the first pair's timestep.
    pairs : sequence of (t, t_prev)
    etas : sequence of float
        One per pair.
    noise : callable (i) -> Tensor of shape (n, C, H, W)
        z_t of the i-th pair; asked only where the step adds noise.
    edit_h : callable (i, h) -> Tensor of shape (n, C, h, w) or None, optional
        The h to decode from instead of the network's own; None leaves it.
    asymmetric : bool
        Use the edited eps for P_t alone. The encoder runs once for both decoders.
    calibration : float, optional
        Use the edited eps to move x_t, by `NoiseSchedule.calibrated`, and a second pass from there.
    on_step : callable (i, x_t, h), optional
        Called at every step with the state and the network's own h.

    Returns
    -------
    Tensor of shape (n, C, H, W)
        x at the last pair's t_prev.
    """
    for i, (pair, eta) in enumerate(zip(pairs, etas, strict=True)):
        bottleneck = model.encode(x_t, pair[0])
        if on_step is not None:
            on_step(i, x_t, bottleneck.h)
        edited = None if edit_h is None else edit_h(i, bottleneck.h)
        eps_plain = None
        if edited is None:
            eps = model.decode(bottleneck)
        elif calibration is not None:
            x_t = model.schedule.calibrated(x_t, *_decode_both(model, bottleneck, edited), pair[0], omega=calibration)
            eps = model(x_t, pair[0])
        elif asymmetric:
            eps, eps_plain = _decode_both(model, bottleneck, edited)
        else:
            eps = model.decode(bottleneck.with_h(edited))
        z = noise(i) if model.schedule.sigma(*pair, eta) > 0.0 else None
        x_t = model.schedule.ddim_step(x_t, eps, pair, eta=eta, noise=z, eps_direction=eps_plain)
    return x_t


def _decode_both(model: Model, bottleneck: Bottleneck, edited: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """eps decoded from an edited h and from the network's own.

    One batch on a GPU, where a second launch of every kernel would be the cost; one after the other on a CPU, where it
    would be the copy of the skips (measured: 2.1 instead of 1.7 passes a step).
    """
    if bottleneck.h.device.type == "cpu":
        return model.decode(bottleneck.with_h(edited)), model.decode(bottleneck)
    both = bottleneck.repeat(2)
    both.h[0::2] = edited
    first, second = model.decode(both).unflatten(0, (-1, 2)).unbind(1)
    return first, second


def _run(
    plan: Trajectory,
    *,
    record_h: bool = False,
    record_x: bool = False,
    stop: int | None = None,
    progress: bool | tqdm = True,
) -> Trajectory:
    """Carry out a trajectory in batches, all of it or its first `stop` steps."""
    model, n, device = plan.model, len(plan), plan.model.device
    pairs = model.schedule.pairs(plan.timesteps)[:stop]
    x0, visited = torch.empty_like(plan.x_T), plan.timesteps[: len(pairs)]
    h = StepRecord.empty(model, visited, n, model.h_shape) if record_h else None
    x = StepRecord.empty(model, visited, n, model.x_shape) if record_x else None
    with progress_bar(n, len(pairs), "sampling", show=progress) as bar, torch.inference_mode():

        def run(batch: slice) -> None:
            def on_step(i: int, x_t: torch.Tensor, h_t: torch.Tensor) -> None:
                keep(h, i, batch, h_t)
                keep(x, i, batch, x_t)
                bar.update(batch.stop - batch.start)

            x0[batch] = denoise(
                model,
                to_device(plan.x_T[batch], device),
                pairs=pairs,
                etas=plan.etas[: len(pairs)],
                noise=lambda i: to_device(plan.noise_at(i, batch), device),
                edit_h=None if plan.edit is None else lambda i, h_t: plan.edit.change(i, h_t, batch),
                **process_of(plan.edit),
                on_step=on_step,
            ).cpu()

        size = in_batches(run, n, plan.batch_size)
    return replace(plan, x0=x0, h=h, x=x, batch_size=size)


def check_residual(run: Trajectory) -> None:
    """Raise if a run has no residual."""
    if run.residual is None:
        raise ValueError("this run has no residual; invert(..., residual=True) keeps it")


def check_batch_size(batch_size: int | None, model: Model, n: int) -> int:
    """Samples per pass: as given, or chosen by the model, and at most n."""
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
    return min(n, batch_size or model.batch_size())


def batches(n: int, size: int) -> list[slice]:
    """0..n-1 in slices of at most `size`."""
    return [slice(start, min(start + size, n)) for start in range(0, n, size)]


def in_batches(function: Callable[[slice], None], n: int, size: int) -> int:
    """Call `function` with 0..n-1 in batches of `size`, halved as often as the memory of the device is too small.

    After a halving all batches run again, so that they have one size: the returned one, at which a replay is exact.
    """
    fits = size
    while True:
        try:
            for batch in batches(n, fits):
                function(batch)
            return fits
        except torch.OutOfMemoryError:
            if fits == 1:
                raise
        if fits == size:
            text = f"the device's memory is too small for batches of {size}; they are halved until they fit"
            warnings.warn(f"{text} (batch_size= chooses a smaller number from the start)", stacklevel=4)
        fits = math.ceil(min(fits, n) / 2)


def to_device(x: torch.Tensor, device: torch.device) -> torch.Tensor:
    """A copy on the device; from pinned memory, so that a GPU goes on computing while it is made."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def progress_bar(n: int, steps: float, verb: str, *, show: bool | tqdm) -> contextlib.AbstractContextManager[tqdm]:
    """A bar over n images of some steps each, updated by image-steps; shown only for work of more than two seconds."""
    if isinstance(show, tqdm):
        return contextlib.nullcontext(show)
    form = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total:.0f} images [{elapsed}<{remaining}, {rate_fmt}]"
    unit = {"unit": " images", "unit_scale": 1 / steps, "bar_format": form}
    return tqdm(desc=verb, total=n * steps, **unit, disable=not show, delay=2, leave=False)
