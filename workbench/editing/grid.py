"""Grids of edits: samples and directions down, scales across, all cells computed together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, batches, check_batch_size, check_residual, denoise, progress_bar
from workbench.directions.direction import Direction, finite
from workbench.editing.edit import active_steps, check_run, pairs_of, step_gains
from workbench.io import written
from workbench.paths import local


@dataclass(frozen=True, eq=False)
class EditGrid:
    """Images of edits and what they are.

    Attributes
    ----------
    images : Tensor of shape (rows, columns, C, H, W), float32, nominally in [-1, 1]
    row_labels : tuple of str
        Sample, or direction and sample.
    column_labels : tuple of str
        Scale, in standard deviations of the population's projection (sigma).
    provenance : dict
        Model, seeds, timesteps, etas, directions, scales.
    """

    images: torch.Tensor = field(repr=False)
    row_labels: tuple[str, ...]
    column_labels: tuple[str, ...]
    provenance: dict = field(repr=False)

    def save(self, path: str | Path) -> Path:
        """Write images, labels and provenance to a safetensors file."""
        header = {"rows": self.row_labels, "columns": self.column_labels, "provenance": self.provenance}
        with written(path) as partial:
            save_file({"images": self.images}, partial, metadata={"edit_grid": json.dumps(header)})
        return local(path)

    @classmethod
    def load(cls, path: str | Path) -> EditGrid:
        """Read a grid that `save` wrote; ValueError if the file holds something else."""
        path = local(path)
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {}).get("edit_grid", "{}"))
            if not header:
                raise ValueError(f"{path} is a safetensors file but not a saved edit grid")
            return cls(file.get_tensor("images"), tuple(header["rows"]), tuple(header["columns"]), header["provenance"])

    def __repr__(self) -> str:
        rows, columns = self.images.shape[:2]
        return f"EditGrid({rows} x {columns} images, scales {', '.join(self.column_labels)})"


def edit_grid(
    model: Model,
    runs: Trajectory,
    directions: Direction | Sequence[Direction],
    *,
    scales: Sequence[float] = (-3.0, -1.5, 0.0, 1.5, 3.0),
    asymmetric: bool = False,
    gain: str | None = None,
    t_range: tuple[int, int] | None = None,
    residual: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> EditGrid:
    """Edit several samples along one or several directions at several scales.

    All cells run in shared batches; the steps before the edit begins are computed once a sample. A cell of scale 0 is
    the sample itself.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The samples, not edited yet.
    directions : Direction or sequence of Direction
    scales : sequence of float
        In standard deviations of the population's projection; one column each.
    asymmetric, gain, t_range
        As in `edit`.
    residual : bool
        Of inverted images: add to every cell what the reconstruction lacks. A cell of scale 0 is then the image itself.
    batch_size : int, optional
        Cells a pass; chosen by the model if not given.
    progress : bool

    Returns
    -------
    EditGrid
        One row a direction and sample, the samples of a direction together.

    Raises
    ------
    ValueError
        If there is no direction or scale, or one that does not fit the runs; or a residual is asked for that they do
        not have.
    """
    check_run(model, runs)
    directions = list(directions) if isinstance(directions, Sequence) else [directions]
    scales = [finite(s, "a scale") for s in scales]
    if not directions or not scales:
        raise ValueError("an edit grid needs at least one direction and one scale")
    for direction in directions:
        if not isinstance(direction, Direction):
            raise ValueError(
                f"an edit grid takes directions, not a {type(direction).__name__}; a DeltaFunction's mean is one"
            )
        direction.check_fits(model, runs.timesteps)
    if residual:
        check_residual(runs)
    factors = torch.tensor(active_steps(runs, t_range)) * step_gains(runs, asymmetric, gain)
    deltas = torch.stack([d.delta() for d in directions]) * factors[:, None, None, None]
    moves = deltas.flatten(2).any(dim=2).any(dim=0)
    first = int(moves.nonzero()[0]) if moves.any() else runs.steps

    cells = [(d, s, scale) for d in range(len(directions)) for s in range(len(runs)) for scale in scales]
    direction_of, sample_of, scale_of = (torch.tensor(column) for column in zip(*cells, strict=True))
    # A sample is its own cell of scale 0, but for an inverted one whose reconstruction shows its error.
    todo = torch.arange(len(cells)) if runs.seeds is None and not residual else scale_of.nonzero().flatten()
    images = runs.x0[sample_of]
    size = check_batch_size(batch_size, model, len(cells))
    prefix, rest = range(first), range(first, runs.steps)
    with progress_bar(len(todo), max(len(rest), 1), "editing", show=progress) as bar:
        samples = torch.arange(len(runs))
        x_t = torch.cat([_advance(runs, samples[b], runs.x_T[b], prefix) for b in batches(len(runs), size)])
        for batch in batches(len(todo), size):
            cell = todo[batch]
            delta_h = scale_of[cell, None, None, None, None] * deltas[direction_of[cell]]
            images[cell] = _advance(
                runs, sample_of[cell], x_t[sample_of[cell]], rest, delta_h=delta_h, asymmetric=asymmetric, bar=bar
            )
    if residual:
        images[todo] += runs.residual[sample_of[todo]]
    return EditGrid(
        images.unflatten(0, (-1, len(scales))),
        row_labels=tuple(_row_label(d, s, runs) for d in directions for s in range(len(runs))),
        column_labels=tuple(f"{s:+g} sigma" if s else "0" for s in scales),
        provenance={
            "model": model.provenance(),
            "seeds": None if runs.seeds is None else list(runs.seeds),
            "timesteps": list(runs.timesteps),
            "etas": list(runs.etas),
            "directions": [{"name": d.name, **d.provenance} for d in directions],
            "scales": scales,
            "asymmetric": asymmetric,
            "gain": gain,
            "t_range": None if t_range is None else list(t_range),
            "residual": residual,
        },
    )


def _advance(
    runs: Trajectory,
    samples: torch.Tensor,
    x_t: torch.Tensor,
    span: range,
    *,
    delta_h: torch.Tensor | None = None,
    asymmetric: bool = False,
    bar=None,
) -> torch.Tensor:
    """Steps `span` of the samples at positions `samples`, from x_t, with delta_h (n, steps, C, h, w) added to h."""
    model = runs.model
    add = None if delta_h is None else lambda i, h: h + delta_h[:, span[i]].to(h)
    with torch.inference_mode():
        return denoise(
            model,
            x_t.to(model.device),
            pairs=[pairs_of(runs)[i] for i in span],
            etas=[runs.etas[i] for i in span],
            noise=lambda i: runs.noise_at(span[i], samples).to(model.device),
            edit_h=add,
            asymmetric=asymmetric,
            on_step=None if bar is None else lambda *_: bar.update(len(samples)),
        ).cpu()


def _row_label(direction: Direction, sample: int, runs: Trajectory) -> str:
    name = f"image {sample}" if runs.seeds is None else f"seed {runs.seeds[sample]}"
    return f"{direction.name}\n{name}"
