"""The edit studio without widgets: controls with a history, and renderings of their state."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

from workbench.datasets.classifiers import Classifier
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory
from workbench.diffusion.schedule import within
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction, finite
from workbench.io import one_of
from workbench.studio.renderings import Renderings, known
from workbench.studio.state import PROCESSES, EditState


class EditSession(Renderings):
    """Edits of samples along directions and across boundaries, one control at a time.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The unedited samples.
    directions : Direction, Boundary, or sequence of them
        Directions with another number of steps are resampled; `notes` say so.
    classifier : Classifier, optional
        Scores images before and after the edit.

    Attributes
    ----------
    state : EditState
    samples : list of Trajectory
        One trajectory per sample.
    directions : dict of str to Direction
    boundaries : dict of str to Boundary
    notes : list of str
        How directions were adapted to the run.
    preview_steps : int
        Network passes of a preview.

    Raises
    ------
    ValueError
        If there is no direction or boundary, or one belongs to another model, tap or timestep.
    """

    def __init__(
        self,
        model: Model,
        runs: Trajectory,
        directions: Direction | Boundary | Sequence[Direction | Boundary],
        *,
        classifier: Classifier | None = None,
    ) -> None:
        super().__init__(model, runs)
        self.classifier = classifier
        for each in [directions] if isinstance(directions, Direction | Boundary) else directions:
            self.add(each)
        if not self.processes:
            raise ValueError("there is no direction and no boundary to edit with; find one with wb.find_pca(store)")
        self._history = [EditState((self.timesteps[0], self.timesteps[-1]), process=self.processes[0])]
        self._position, self._control = 0, None

    # Controls. Each change is one entry of the history; further ones of the same control, until `rest`, belong to it.

    @property
    def state(self) -> EditState:
        return self._history[self._position]

    @property
    def processes(self) -> list[str]:
        """Processes that there are directions or boundaries for."""
        return [process for process in PROCESSES if (self.boundaries if process == "single-step" else self.directions)]

    def pick(self, k: int) -> None:
        """Edit another sample."""
        if not 0 <= k < len(self.samples):
            raise ValueError(f"there is no sample {k}; there are 0 to {len(self.samples) - 1}")
        self._change("sample", sample=k, distances={})
        self.rest()

    def set_scale(self, name: str, scale: float) -> None:
        """Set the scale of a direction in sigma; 0 leaves it out."""
        known(name, self.directions, "direction")
        self._change(f"scale {name}", scales={**self.state.scales, name: finite(scale, name)})

    def set_distance(self, name: str, distance: float | None) -> None:
        """Move to a signed distance from a boundary; None leaves the sample where it is.

        Raises
        ------
        ValueError
            If the boundary is unknown, or another boundary is set at another timestep.
        """
        known(name, self.boundaries, "boundary")
        distances = {k: v for k, v in self.state.distances.items() if k != name}
        if distance is not None:
            distances[name] = finite(distance, name)
            self._refuse_two_timesteps(distances)
        self._change(f"distance {name}", distances=distances)

    def set_against(self, name: str, others: Iterable[str]) -> None:
        """Project the span of the others out of a direction (Haas et al. eq. 12).

        Raises
        ------
        ValueError
            If a direction is unknown or the direction itself, or the projection is 0.
        """
        others = tuple(dict.fromkeys(others))
        for each in (name, *others):
            known(each, self.directions, "direction")
        if name in others:
            raise ValueError(f"{name} can't be projected against itself")
        self._project(name, others)
        against = {k: v for k, v in self.state.against.items() if k != name}
        self._change(f"against {name}", against=against | ({name: others} if others else {}))

    def set_window(self, high: int, low: int) -> None:
        """Let directions act at high >= t >= low only.

        Raises
        ------
        ValueError
            If the range has no visited timestep.
        """
        within((high, low), self.timesteps)
        self._change("window", t_range=(int(high), int(low)))

    def set_process(self, process: str) -> None:
        """Set the process of the edit: "symmetric", "asymmetric" or "single-step"; see `EditState`."""
        if one_of("process", process, PROCESSES) not in self.processes:
            what = "boundary" if process == "single-step" else "direction"
            raise ValueError(f"there is no {what} for the process {process}; possible is {', '.join(self.processes)}")
        self._change("process", process=process)

    def set_eta(self, eta: float | None) -> None:
        """Set eta: 0 is deterministic, 1 has the noise of DDPM; None keeps the samples' own.

        Raises
        ------
        ValueError
            If eta is outside [0, 1], or the sample is an inverted image.
        """
        if eta is not None:
            if self.samples[self.state.sample].seeds is None:
                raise ValueError("an inverted image keeps the eta of its inversion; pick a sample that has a seed")
            eta = self.model.schedule.etas(eta, 1)[0]
        self._change("eta", eta=eta, distances={})

    def reset(self) -> None:
        """Remove all edits of the sample, as one undoable change."""
        first = self._history[0]
        self._change("reset", **{**vars(first), "sample": self.state.sample})
        self.rest()

    def rest(self) -> None:
        """Mark the controls as released: the next change is a new entry of the history."""
        self._control = None

    @property
    def can_undo(self) -> bool:
        return self._position > 0

    @property
    def can_redo(self) -> bool:
        return self._position < len(self._history) - 1

    def undo(self) -> None:
        """Undo one change, if there is one."""
        self._position = max(self._position - 1, 0)
        self.rest()

    def redo(self) -> None:
        """Redo an undone change, if there is one."""
        self._position = min(self._position + 1, len(self._history) - 1)
        self.rest()

    def restore(self, state: EditState) -> None:
        """Set the whole state as one change."""
        self._change("restore", **vars(state))
        self.rest()

    def _change(self, control: str, **fields) -> None:
        changed = replace(self.state, **fields)
        if changed == self.state:
            return
        first = self._position if control == self._control else self._position + 1
        if first > 0 and changed == self._history[first - 1]:
            # Pulled back to where the gesture began: nothing to undo.
            del self._history[first:]
            self._position, self._control = first - 1, None
            return
        self._history[first:] = [changed]
        self._position, self._control = first, control
