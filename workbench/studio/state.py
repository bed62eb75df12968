"""State of an edit, its rendering, and its progress."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from workbench.formats.tensors import save_tensors

PROCESSES = {
    "symmetric": "P_t and D_t change (Haas et al.)",
    "asymmetric": "P_t alone changes (Asyrp)",
    "single-step": "x_t and h_t cross boundaries, once (BoundaryDiffusion)",
}


class Cancelled(Exception):
    """The work was stopped because its result is not wanted any more."""


class Progress(tqdm):
    """A progress bar that nobody sees: it tells a listener how far the work is, and stops it when asked to.

    Parameters
    ----------
    listener : callable (float) -> None, optional
        Called after every step with the part that is done, in [0, 1].
    """

    def __init__(self, listener: Callable[[float], None] | None = None) -> None:
        super().__init__(disable=True)
        self._listener, self._stop = listener, threading.Event()
        self._expected, self._done = 1, 0

    def __bool__(self) -> bool:
        return True  # a bar without a total has no truth value of its own

    def expect(self, image_steps: int) -> None:
        """A piece of work begins that takes so many steps, summed over its images."""
        self._expected, self._done = max(image_steps, 1), 0

    def cancel(self) -> None:
        """Stop the work at its next step."""
        self._stop.set()

    def wait(self, seconds: float) -> None:
        """Let some time pass; raises `Cancelled` as soon as the work is stopped."""
        if self._stop.wait(seconds):
            raise Cancelled

    def update(self, n: float = 1) -> None:
        """`n` steps are done; raises `Cancelled` if the work was stopped."""
        self.wait(0.0)
        self._done += n
        if self._listener is not None:
            self._listener(min(self._done / self._expected, 1.0))


@dataclass(frozen=True)
class EditState:
    """Everything that decides the edited image.

    Attributes
    ----------
    t_range : (int, int)
        (from, to): directions act at from >= t >= to.
    sample : int
        Position among the session's samples.
    scales : dict of str to float
        Of each direction, in sigma; one that is not named has scale 0.
    distances : dict of str to float
        Signed Euclidean distance from each boundary after the move; one that is not named is not moved to.
    against : dict of str to tuple of str
        Projected directions, and the directions projected out of each.
    process : {"symmetric", "asymmetric", "single-step"}
        Directions change P_t and D_t (Haas et al.), or P_t alone (Asyrp); or x_t and h_t are moved across boundaries,
        once (BoundaryDiffusion).
    eta : float, optional
        Of every step; None is the sample's own.
    """

    t_range: tuple[int, int]
    sample: int = 0
    scales: Mapping[str, float] = field(default_factory=dict)
    distances: Mapping[str, float] = field(default_factory=dict)
    against: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    process: str = "symmetric"
    eta: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "scales", {name: scale for name, scale in self.scales.items() if scale})

    @property
    def edits(self) -> bool:
        """Whether anything is changed."""
        return bool(self.distances if self.process == "single-step" else self.scales)

    def scaled(self, part: float, own: Mapping[str, float]) -> EditState:
        """A part of the edit; `own` are the sample's distances, where it begins."""
        return replace(
            self,
            scales={name: part * scale for name, scale in self.scales.items()},
            distances={name: own[name] + part * (to - own[name]) for name, to in self.distances.items()},
        )


@dataclass(frozen=True, eq=False)
class Rendering:
    """A sample before and after an edit.

    Attributes
    ----------
    before, after : Tensor of shape (C, H, W), float32, nominally in [-1, 1]
    state : EditState
    preview : bool
        Whether `after` was computed in few steps.
    """

    before: torch.Tensor = field(repr=False)
    after: torch.Tensor = field(repr=False)
    state: EditState
    preview: bool

    @property
    def difference(self) -> torch.Tensor:
        """after - before as both are shown, half of it, so that it lies in [-1, 1]; 0 is grey."""
        return (self.after.clamp(-1, 1) - self.before.clamp(-1, 1)) / 2

    def save(self, path: str | Path) -> Path:
        """Write both images as tensors "before" and "after" of a safetensors file."""
        return save_tensors(path, {"before": self.before, "after": self.after}, {}, kind="rendering")


@dataclass(frozen=True, eq=False)
class Predictions:
    """P_t along the chain, with and without the edit.

    Attributes
    ----------
    timesteps : tuple of int
    before, after : Tensor of shape (len(timesteps), C, H, W), float32
    """

    timesteps: tuple[int, ...]
    before: torch.Tensor = field(repr=False)
    after: torch.Tensor = field(repr=False)


def describe(state: EditState) -> str:
    """An edit in a line, as captions have it."""
    if not state.edits:
        return "no edit"
    if state.process == "single-step":
        pulled = [f"{name} at distance {to:+.3g}" for name, to in state.distances.items()]
        return f"{', '.join(pulled)}, single-step"
    pulled = [
        f"{name}{' ⟂ ' + ', '.join(state.against[name]) if name in state.against else ''} {scale:+.3g} sigma"
        for name, scale in state.scales.items()
    ]
    return f"{', '.join(pulled)}, {state.process}, t = {state.t_range[0]}..{state.t_range[1]}"
