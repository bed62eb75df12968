"""The renderer: runs the plans of edits in shared batches, and lays the images out as a grid."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.diffusion.models import Model
from workbench.diffusion.sampling import (
    Trajectory,
    check_batch_size,
    check_residual,
    denoise,
    in_batches,
    process_of,
    progress_bar,
    replay,
    to_device,
)
from workbench.directions.asyrp import DeltaFunction
from workbench.directions.direction import Direction, finite
from workbench.editing.edits import Edit, InjectionEdit, Swap, as_edit, check_run
from workbench.formats.tensors import load_tensors, save_tensors
from workbench.io import one_of

Edits = Edit | Direction | Sequence[Edit | Direction] | Mapping[str, Edit | Direction]


@dataclass(frozen=True, eq=False)
class EditGrid:
    """Images of edits, with labels and provenance.

    Attributes
    ----------
    images : Tensor of shape (rows, columns, C, H, W), float32, nominally in [-1, 1]
    row_labels : tuple of str
        Sample, or edit and sample, of each row.
    column_labels : tuple of str
        Scale of each column, in the edits' unit.
    provenance : dict
        Model, seeds, timesteps, etas, edits, scales.
    """

    images: torch.Tensor = field(repr=False)
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    provenance: dict = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write images, labels and provenance to a safetensors file."""
        header = {"rows": self.row_labels, "columns": self.column_labels, "provenance": self.provenance}
        return save_tensors(path, {"images": self.images}, header, kind="edit_grid")

    @classmethod
    def load(cls, path: str | Path) -> EditGrid:
        """Read a grid that `save` wrote; ValueError if the file holds something else."""
        tensors, header = load_tensors(path, kind="edit_grid")
        return cls(tensors["images"], tuple(header["rows"]), tuple(header["columns"]), header["provenance"])

    def __repr__(self) -> str:
        rows, columns = self.images.shape[:2]
        return f"EditGrid({rows} x {columns} images, {', '.join(self.column_labels)})"


def render(
    run: Trajectory,
    edits: Edits,
    scales: Sequence[float],
    *,
    residual: bool = False,
    batch_size: int | None = None,
    progress: bool | tqdm = True,
    **options: object,
) -> EditGrid:
    """Edit several samples in one or several ways at several scales.

    All cells run in shared batches; the steps before the edit are computed once per sample. Where a scale changes
    nothing, the cell is the sample itself.

    Parameters
    ----------
    run : Trajectory
        The unedited samples.
    edits : Edit or Direction, a sequence or a mapping of them
        A Direction is a `Shift`. The names of a mapping label the rows.
    scales : sequence of float
        One per column, in the unit of the edit.
    residual : bool
        Add the residual of inverted images (image less reconstruction) to every cell. An unedited cell is then the
        image itself.
    batch_size : int, optional
        Cells per pass; chosen by the model if not given.
    progress : bool or tqdm
    **options
        `asymmetric`, `gain` and `t_range` of `edit`, for Directions.

    Returns
    -------
    EditGrid
        One row per edit and sample, grouped by edit.

    Raises
    ------
    ValueError
        If there is no edit or scale, an edit does not fit the run, the run is already edited, or it lacks the requested
        residual.
    """
    named = name_edits(edits, **options)
    check_run(run.model, run)
    if residual:
        for _, each in named:
            _check_own_residual(each, run)
    plans = [edit.plan(run, scales) for _, edit in named]
    if not plans or not plans[0]:
        raise ValueError("an edit grid needs at least one edit and one scale")
    images = run_plans(run, plans, residual=residual, batch_size=batch_size, progress=progress)
    return EditGrid(
        images.flatten(0, 1),
        row_labels=tuple(f"{name}\n{sample}" for name, _ in named for sample in sample_labels(run)),
        column_labels=named[0][1].labels(scales),
        provenance={
            "model": run.model.provenance(),
            "seeds": None if run.seeds is None else list(run.seeds),
            "timesteps": list(run.timesteps),
            "etas": list(run.etas),
            "edits": [edit.about() | {"name": name} for name, edit in named],
            "scales": _as_json(scales),
            "residual": residual,
        },
    )


def run_plans(
    run: Trajectory,
    plans: Sequence[Sequence[Trajectory]],
    *,
    residual: bool = False,
    batch_size: int | None = None,
    progress: bool | tqdm = True,
) -> torch.Tensor:
    """The images of plans of one run, one list of them an edit; shape (edits, n, scales, C, H, W).

    Cells of equal timesteps, etas, tap and process share batches. A plan that is the run itself is not run again,
    unless it is an inversion, whose reconstruction is what its edits are to be compared with.
    """
    if residual:
        check_residual(run)
    n, k = len(run), len(plans[0])
    images = run.x0.repeat(len(plans), k, 1, 1, 1, 1).transpose(1, 2).contiguous()
    cells = [(e, s, c) for e in range(len(plans)) for s in range(n) for c in range(k)]
    groups: dict[tuple, list[tuple[int, int, int]]] = {}
    for e, s, c in cells:
        plan = plans[e][c]
        if plan is not run:
            key = plan.model.tap, plan.timesteps, plan.etas, *process_of(plan.edit).values()
            groups.setdefault(key, []).append((e, s, c))
    size = check_batch_size(batch_size, run.model, len(cells))
    with cells_bar(run, plans, progress) as bar:
        for group in groups.values():

            def edit_cells(batch: slice, group=group) -> None:
                e, s, c = (torch.tensor(column) for column in zip(*group[batch], strict=True))
                images[e, s, c] = _run_cells([(plans[i][j], k) for i, k, j in group[batch]], bar)
                if residual:
                    images[e, s, c] += run.residual[s]

            size = in_batches(edit_cells, len(group), size)
        if run.seeds is None and not residual and any(plan is run for row in plans for plan in row):
            plain = replay(run, progress=bar).x0
            for e, row in enumerate(plans):
                for c, plan in enumerate(row):
                    if plan is run:
                        images[e, :, c] = plain
    return run.model.to_images(images)


def _check_own_residual(edit: Edit, run: Trajectory) -> None:
    """The residual is that of the run's reconstruction from x_T; ValueError for an edit of another process."""
    check_residual(run)
    plain = edit.plain(run)
    if plain is not run and plain.stored_noise is None:
        raise ValueError(
            f"{edit.name} decodes the inversion's x_t, whose reconstruction has another residual; leave it out"
        )


def cells_bar(
    run: Trajectory, plans: Sequence[Sequence[Trajectory]], progress: bool | tqdm
) -> contextlib.AbstractContextManager[tqdm]:
    """A progress bar over the cells of plans, each as long as its own steps."""
    unedited = run.seeds is None and any(plan is run for row in plans for plan in row)
    lengths = [len(plan.timesteps) for row in plans for plan in row if plan is not run] + [run.steps] * unedited
    n, steps = len(run) * len(lengths), sum(lengths) / max(len(lengths), 1)
    return progress_bar(n, max(steps, 1), "editing", show=progress)


def _run_cells(cells: Sequence[tuple[Trajectory, int]], bar: tqdm) -> torch.Tensor:
    """One batch: plans of one group, each with the position of a sample; (cells, C, H, W)."""
    plan, model = cells[0][0], cells[0][0].model
    rows_of: dict[int, list[int]] = {}
    sources: dict[tuple, list[int]] = {}  # cells that draw from the same noise
    for row, (each, _) in enumerate(cells):
        rows_of.setdefault(id(each), []).append(row)
        sources.setdefault((each.seeds, id(each.stored_noise)), []).append(row)
    samples = torch.tensor([sample for _, sample in cells])

    def noise(i: int) -> torch.Tensor:
        z = torch.empty(len(cells), *model.x_shape)
        for rows in sources.values():
            different, inverse = torch.unique(samples[rows], return_inverse=True)
            z[rows] = cells[rows[0]][0].noise_at(i, different)[inverse]
        return to_device(z, model.device)

    def edit_h(i: int, h: torch.Tensor) -> torch.Tensor | None:
        edited = None
        for rows in rows_of.values():
            edit = cells[rows[0]][0].edit
            own = None if edit is None else edit.change(i, h[rows], samples[rows])
            if own is not None:
                edited = h.clone() if edited is None else edited  # in the memory format of the network's own
                edited[rows] = own
        return edited

    with torch.inference_mode():
        return denoise(
            model,
            to_device(torch.stack([each.x_T[sample] for each, sample in cells]), model.device),
            pairs=model.schedule.pairs(plan.timesteps) if plan.timesteps else [],  # none: an edit of the image itself
            etas=plan.etas,
            noise=noise,
            edit_h=edit_h,
            **process_of(plan.edit),
            on_step=lambda *_: bar.update(len(cells)),
        ).cpu()


def name_edits(edits: Edits, **options: object) -> list[tuple[str, Edit]]:
    """Edits with their names, or with those of a mapping; the options are those of `Shift`, for directions."""
    if isinstance(edits, Mapping):
        return [(name, as_edit(edit, **options)) for name, edit in edits.items()]
    listed = [as_edit(edit, **options) for edit in (edits if isinstance(edits, Sequence) else [edits])]
    return [(edit.name, edit) for edit in listed]


def sample_labels(run: Trajectory) -> tuple[str, ...]:
    """Names of the samples: their seeds, or positions of inverted images."""
    return tuple(f"image {s}" if run.seeds is None else f"seed {run.seeds[s]}" for s in range(len(run)))


def _as_json(scales: Sequence[float] | Mapping[str, Sequence[float]]) -> list | dict:
    if isinstance(scales, Mapping):
        return {space: _as_json(values) for space, values in scales.items()}
    return np.asarray(scales, dtype=float).tolist()


def edit(
    model: Model,
    run: Trajectory,
    direction: Direction | DeltaFunction | Edit | Trajectory,
    *,
    scale: float = 1.0,
    mode: str = "add",
    asymmetric: bool = False,
    t_range: tuple[int, int] | None = None,
    gain: str | None = None,
    residual: bool = False,
    record_h: bool = False,
    progress: bool = True,
) -> Trajectory:
    """Run a trajectory again with its h edited: same x_T, same noise.

    h_t <- h_t + scale * sigma_t * v_t (Haas et al. eq. 6)

    Parameters
    ----------
    model : Model
        Model of the run, at the tap of the direction.
    run : Trajectory
        Not edited yet.
    direction : Direction, DeltaFunction, Edit, or Trajectory with recorded h
        For "replace" and "slerp" the donor of h: a run of one sample, or of as many as `run`. An Edit has its own
        options; one that begins at a later timestep (`Cross`, `MoveX`) gives the trajectory from there on.
    scale : float, default 1
        In standard deviations of the population's projection; a factor of Delta h for a DeltaFunction; for "slerp"
        the weight of the donor, in [0, 1]. Not used by "replace".
    mode : {"add", "replace", "slerp"}
        "replace" is the swap of Haas et al. Fig. 2a, "slerp" the normalised interpolation of InjectFusion.
    asymmetric : bool
        Edit P_t alone (Asyrp eq. 5); by default P_t and D_t (symmetric, Haas et al.).
    t_range : (int, int), optional
        (from, to): the edit acts at from >= t >= to. By default at all timesteps.
    gain : {None, "match"}
        "match" scales an asymmetric edit, step by step, to the first-order effect of the symmetric one.
    residual : bool
        Add the residual of an inverted image, as `replay` does.
    record_h : bool
        Keep the network's own h_t of the edited run.
    progress : bool

    Returns
    -------
    Trajectory
        x0 holds the edited images. Scale 0 gives the unedited images, bit for bit, but for "replace".

    Raises
    ------
    ValueError
        If the direction belongs to another model, tap or number of steps, the run is already edited, or it lacks the
        requested residual.
    """
    check_run(model, run)
    one_of("mode", mode, ("add", "replace", "slerp"))
    if gain is not None and mode != "add":
        raise ValueError(f"gain is {gain!r}, and {mode!r} has none; leave it out")
    if mode == "add":
        change = as_edit(direction, asymmetric=asymmetric, t_range=t_range, gain=gain)
    else:
        change = Swap(direction, mode, asymmetric=asymmetric, t_range=t_range)
    scale = finite(scale, "scale")
    if not isinstance(change, InjectionEdit):
        if residual:
            _check_own_residual(change, run)
        (plan,) = change.plan(run, [scale])
        return replay(plan, residual=residual, record_h=record_h, progress=progress)
    injection = change.injection(run, scale)
    return replay(run, edit=injection, residual=residual, record_h=record_h, progress=progress)


def edit_grid(
    model: Model,
    runs: Trajectory,
    directions: Direction | Sequence[Direction],
    *,
    scales: Sequence[float] = (-3.0, -1.5, 0.0, 1.5, 3.0),
    **options: object,
) -> EditGrid:
    """Edit several samples along one or several directions at several scales: `render` with one `Shift` per direction.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The unedited samples.
    directions : Direction or DeltaFunction, or a sequence of them
    scales : sequence of float
        In standard deviations of the population's projection, one per column.
    **options
        `asymmetric`, `gain` and `t_range` of `edit`; `residual`, `batch_size` and `progress` of `render`.

    Returns
    -------
    EditGrid
        One row per direction and sample, grouped by direction.

    Raises
    ------
    ValueError
        As `render`.
    """
    check_run(model, runs)
    return render(runs, directions, scales, **options)
