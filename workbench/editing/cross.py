"""Edits that cross a boundary once, at one timestep, and then continue the reverse process (Zhu et al. 2023)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.diffusion.models import Model
from workbench.diffusion.noise import check_seeds
from workbench.diffusion.sampling import Injection, Trajectory, in_batches, to_device
from workbench.diffusion.schedule import index_of
from workbench.directions.boundary import Boundary, change_of, move_jointly, random_boundaries
from workbench.directions.direction import finite
from workbench.editing.edits import Edit, check_run
from workbench.editing.render import EditGrid, render, sample_labels
from workbench.io import one_of

OPTIONS = {
    "unit": ("sd", "distance"),
    "h_policy": ("first", "offset", "offset-asymmetric", "none", "stale"),
    "h_align": ("exact", "lagged"),
    "multi": ("sequential", "joint", "conditional"),
}

Boundaries = Boundary | Sequence[Boundary]
Distances = Sequence[float] | np.ndarray


@dataclass(frozen=True, eq=False)
class Cross(Edit):
    """One move across a boundary at its timestep t, in x_t, h_t or both (Zhu et al. 2023, Algorithm 1 and Fig. 3).

    Each run gives its x_t; the network gives h_t at exactly (x_t, t). Both are moved to a distance from their
    boundaries, and x_0 is decoded from there with the step noise of eta. The scales of this edit are distances.

    Attributes
    ----------
    h, x : Boundary or sequence of Boundary, optional
        Boundaries in h_t and in x_t; without one, that space is not moved. A sequence has one boundary per
        attribute, in the same order in both spaces unless distances are given by space.
    unit : {"sd", "distance"}
        "sd": each boundary's standard deviation of held-out samples within their class (`Boundary.sigma`).
        "distance": Euclidean distance, the same number for h and x.
    mode : {"absolute", "shift", "mirror"}
        Meaning of the distances: signed distances from the boundary after the move, lengths of the move, or multiples
        of the sample's own distance; see `move_jointly`.
    eta : float, or one per step, values in [0, 1]; default 1
        eta from t on; the paper uses 1. None keeps the run's own etas and noise; the noise of an edit-friendly
        inversion preserves the image.
    h_policy : {"first", "offset", "offset-asymmetric", "none", "stale"}
        "first" decodes the first step from the moved h and later steps from the network's h (the paper's single step).
        "offset" adds the difference of the moved and the plain h at every step (as Haas et al. do),
        "offset-asymmetric" to P_t alone (Asyrp). "none" moves x alone. "stale" reproduces the released code: the first
        step takes the moved h, each later step the network's own h of the previous step.
    h_align : {"exact", "lagged"}
        "lagged" also reproduces the released code: h_t and its boundary come from the next cleaner timestep of the
        inversion.
    keep_norm : bool, default False
        Keep the lengths of x_t and h_t, moving them on a great circle.
    multi : {"sequential", "joint", "conditional"}
        How to combine attributes: one move after the other (only the last reaches its distance exactly); the shortest
        move that reaches all distances; or a move along the part of each normal orthogonal to all others
        (`Boundary.orthogonal_to`), with the length of the plain move.
    seed : int, optional
        Sample i has the step noise of seed + i. By default generated samples use their own seeds, and inverted images
        use seed 0.
    control : int, optional
        Seed of random normals for a control: moves of the same lengths along these normals, which have the same angles
        to each other as those of the boundaries.
    name : str, optional
        By default the name of the first boundary.

    Raises
    ------
    ValueError
        If there is no boundary or an option is unknown; with a run, if a boundary belongs to another model, tap,
        space or timestep, the run did not visit t or does not know its x_t, or distances have the wrong shape.
    """

    h: Boundaries | None = field(default=None, repr=False)
    x: Boundaries | None = field(default=None, repr=False)
    unit: str = "sd"
    mode: str = "absolute"
    eta: float | Sequence[float] | None = 1.0
    h_policy: str = "first"
    h_align: str = "exact"
    keep_norm: bool = False
    multi: str = "sequential"
    seed: int | None = None
    control: int | None = None
    name: str = ""

    def __post_init__(self) -> None:
        for option, known in OPTIONS.items():
            one_of(option, getattr(self, option), known)
        found = self._boundaries
        if not found["h"] and not found["x"]:
            raise ValueError('there is no boundary to cross; give one in h (h_policy "none" ignores it) or one in x')
        object.__setattr__(self, "name", self.name or (found["x"] or found["h"])[0].name)

    def plan(self, run: Trajectory, distances: Distances | Mapping[str, Distances]) -> list[Trajectory]:
        """One plan per column of distances: (k,), (k, m) for m attributes, (n, k, m) for n samples; or by space."""
        targets = self.targets(run, distances)
        rest, own = self._rest(run), {"x": run.x_at(self._timesteps(run)[0]), "h": self._own_h(run)}
        plans = []
        for column in range(self._columns(targets)):
            moved = {
                space: z if targets[space] is None else self._moved(z, space, targets[space][:, column])
                for space, z in own.items()
            }
            injection = None if own["h"] is None else self._injection(moved["h"], own["h"])
            plans.append(replace(rest, x_T=moved["x"], edit=injection))
        return plans

    def plain(self, run: Trajectory) -> Trajectory:
        """Decode from t on without a move; with h_policy "stale", from the same stale h."""
        rest = self._rest(run)
        if self.h_policy != "stale":
            return rest
        own = self._own_h(run)
        return replace(rest, edit=self._injection(own, own))

    def _rest(self, run: Trajectory) -> Trajectory:
        """The steps from t on, with the noise of eta, from the run's own x_t."""
        t, _ = self._timesteps(run)
        rest = run.tail(index_of(t, run.timesteps), run.x_at(t))
        if self.eta is None:
            if self.seed is not None:
                raise ValueError(f"eta=None keeps the run's own noise, and seed is {self.seed}; leave out the seed")
            return rest
        seed = self.seed or 0
        seeds = run.seeds if self.seed is None and run.seeds is not None else range(seed, seed + len(run))
        return replace(
            rest,
            etas=run.model.schedule.etas(self.eta, rest.steps),
            seeds=check_seeds(seeds),
            stored_noise=None,
        )

    def labels(self, distances: Distances | Mapping[str, Distances]) -> tuple[str, ...]:
        if isinstance(distances, Mapping):
            distances = distances["x" if self._boundaries["x"] else "h"]
        given = np.asarray(distances, dtype=float)
        found = self._boundaries["x"] or self._boundaries["h"]
        if given.ndim == 3:
            given = np.where((given == given[:1]).all(axis=0), given[0], np.nan)
        return tuple(self._label(found, np.atleast_1d(column)) for column in given)

    def about(self) -> dict:
        options = {name: value for name, value in vars(self).items() if name not in ("h", "x")}
        found = [b for boundaries in self._boundaries.values() for b in boundaries]
        return options | {"boundaries": [{"name": b.name, "space": b.space, "t": b.t, **b.provenance} for b in found]}

    def targets(self, run: Trajectory, distances: Distances | Mapping[str, Distances]) -> dict[str, np.ndarray | None]:
        """Signed distances to move to in each space, (n, k, m), Euclidean; for mode "mirror" multiples."""
        found, t, t_h = self._boundaries, *self._timesteps(run)
        if not isinstance(distances, Mapping) and found["h"] and found["x"] and len(found["h"]) != len(found["x"]):
            counts = f"{len(found['h'])} boundaries in h and {len(found['x'])} in x"
            raise ValueError(f"there are {counts}; give both for each attribute, or distances by space")
        for space, at in (("h", t_h), ("x", t)):
            for boundary in found[space]:
                boundary.check_fits(run.model, t=at, space=space)
        return {space: self._targets(distances, space, len(run)) if found[space] else None for space in found}

    @property
    def _boundaries(self) -> dict[str, list[Boundary]]:
        h = None if self.h_policy == "none" else self.h
        return {
            space: [] if given is None else [given] if isinstance(given, Boundary) else list(given)
            for space, given in {"h": h, "x": self.x}.items()
        }

    def _timesteps(self, run: Trajectory) -> tuple[int, int]:
        """Timestep of the move, and the one that h is taken at."""
        found, visited, trained = self._boundaries, run.timesteps, run.model.schedule.T
        i = index_of((found["x"] or found["h"])[0].t, visited, trained=trained)
        if self.h_align == "exact":
            return visited[i], visited[i]
        if not found["x"]:
            i -= 1
        if not 0 <= i < len(visited) - 1:
            raise ValueError("a lagged h needs a next cleaner timestep; the run did not visit one")
        return visited[i], visited[i + 1]

    def _targets(self, distances: Distances | Mapping[str, Distances], space: str, n: int) -> np.ndarray:
        if isinstance(distances, Mapping):
            if space not in distances:
                raise ValueError(f"distances are given for {', '.join(distances)}, and a boundary is in {space!r}")
            distances = distances[space]
        boundaries = self._boundaries[space]
        m, given = len(boundaries), np.asarray(distances, dtype=np.float64)
        for distance in given.flat:
            finite(distance, "a distance")
        values = given[:, None] if given.ndim == 1 else given
        if values.ndim == 2 and values.shape[1] in (1, m):
            values = np.broadcast_to(values, (n, len(values), m))
        if values.ndim != 3 or values.shape != (n, values.shape[1], m) or values.size == 0:
            allowed = f"(k,), (k, {m}) or ({n}, k, {m}) for k columns, {m} boundaries and {n} samples"
            raise ValueError(f"distances have shape {given.shape}; give {allowed}")
        if self.unit == "sd" and self.mode != "mirror":
            values = values * [boundary.sigma for boundary in boundaries]
        return values

    def _columns(self, targets: Mapping[str, np.ndarray | None]) -> int:
        columns = {wanted.shape[1] for wanted in targets.values() if wanted is not None}
        if len(columns) != 1:
            given = " and ".join(map(str, sorted(columns)))
            raise ValueError(f"distances have {given} columns for h and x; give as many for both")
        return columns.pop()

    def _own_h(self, run: Trajectory) -> torch.Tensor | None:
        """h_t of every sample, one encoder pass each; on the CPU. None if h is left alone."""
        if not self._boundaries["h"] and self.h_policy != "stale":
            return None
        model, (_, t_h) = run.model, self._timesteps(run)
        x_t, h = run.x_at(t_h), torch.empty(len(run), *model.h_shape)

        def encode(batch: slice) -> None:
            h[batch] = model.encode(to_device(x_t[batch], model.device), t_h).h.cpu()

        with torch.inference_mode():
            in_batches(encode, len(run), model.batch_size())
        return h

    def _moved(self, z: torch.Tensor, space: str, to: np.ndarray) -> torch.Tensor:
        """Samples (n, ...) moved to distances (n, m), or as far along random normals."""
        boundaries = self._boundaries[space]
        moved = self._crossed(z, boundaries, to)
        if self.control is None:
            return moved
        change = _distances(moved, boundaries) - _distances(z, boundaries)
        random = random_boundaries(boundaries, seed=self.control)
        return move_jointly(z, random, to=change, mode="shift", keep_norm=self.keep_norm)

    def _crossed(self, z: torch.Tensor, boundaries: Sequence[Boundary], to: np.ndarray) -> torch.Tensor:
        if self.multi == "joint" or len(boundaries) == 1:
            return move_jointly(z, boundaries, to=to, mode=self.mode, keep_norm=self.keep_norm)
        if self.multi == "sequential":
            for boundary, wanted in zip(boundaries, to.T, strict=True):
                z = boundary.move(z, to=wanted, mode=self.mode, keep_norm=self.keep_norm)
            return z
        lengths = change_of(_distances(z, boundaries), to, self.mode)
        for i, boundary in enumerate(boundaries):
            alone = boundary.orthogonal_to(*boundaries[:i], *boundaries[i + 1 :])
            z = alone.move(z, to=lengths[:, i], mode="shift", keep_norm=self.keep_norm)
        return z

    def _injection(self, moved: torch.Tensor, own: torch.Tensor) -> Injection:
        """Injection to decode with, given the moved and the plain h_t of the samples."""
        if self.h_policy == "first":
            return Injection(lambda i, h, samples: moved[samples].to(h) if i == 0 else None)
        if self.h_policy != "stale":
            offset = moved - own
            asymmetric = self.h_policy == "offset-asymmetric"
            return Injection(lambda i, h, samples: h + offset[samples].to(h), asymmetric)
        before = torch.empty_like(moved)

        def stale(i: int, h: torch.Tensor, samples: slice | torch.Tensor) -> torch.Tensor:
            used = (moved if i == 0 else before)[samples].to(h, copy=True)  # a slice would change with `before`
            before[samples] = h.to(before)
            return used

        return Injection(stale)

    def _label(self, boundaries: Sequence[Boundary], column: np.ndarray) -> str:
        """Caption of a column of distances (m,)."""
        if np.isnan(column).any():
            return "own"
        unit = " times" if self.mode == "mirror" else " sd" if self.unit == "sd" else ""
        captions = [f"{_signed(to)}{unit}" for to in np.broadcast_to(column, len(boundaries))]
        if len(captions) == 1:
            return captions[0]
        return "\n".join(f"{boundary.name} {to}" for boundary, to in zip(boundaries, captions, strict=True))


def cross_boundary(
    model: Model,
    runs: Trajectory,
    boundary_h: Boundaries | None = None,
    boundary_x: Boundaries | None = None,
    *,
    distances: Distances | Mapping[str, Distances] = (-3.0, -1.5, 0.0, 1.5, 3.0),
    batch_size: int | None = None,
    progress: bool | tqdm = True,
    **options: object,
) -> EditGrid:
    """Edit samples by one move across a boundary at its timestep: `render` of a `Cross`.

    All distances of a sample share the same x_t and noise, and all cells run in shared batches.

    - A real image: `runs = invert(model, images, steps=..., record_x=True)`, or an inversion that ends at t
      (`steps=[t, ..., 0]`), which costs less and records nothing.
    - A generated sample: `runs = sample(model, seeds, eta=0)`. The run's own process leads to t; the paper's is
      deterministic there.

    Parameters
    ----------
    model : Model
        Model of the runs, at the tap of boundary_h.
    runs : Trajectory
        The unedited samples.
    boundary_h, boundary_x : Boundary or sequence of Boundary, optional
        `Cross.h` and `Cross.x`.
    distances : array of shape (k,), (k, m) or (n, k, m)
        One per column: shared by all m attributes, one per attribute, or one per sample and attribute. A mapping with
        "h" and "x" gives each space its own.
    batch_size, progress
        As in `render`.
    **options
        Options of `Cross`.

    Returns
    -------
    EditGrid
        One row per sample, one column per distance.

    Raises
    ------
    ValueError
        As `Cross`.
    """
    check_run(model, runs)
    cross = Cross(boundary_h, boundary_x, **options)
    grid = render(runs, cross, distances, batch_size=batch_size, progress=progress)
    return replace(grid, row_labels=sample_labels(runs))


def _distances(z: torch.Tensor, boundaries: Sequence[Boundary]) -> np.ndarray:
    return np.stack([boundary.distance(z) for boundary in boundaries], axis=1)


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"
