"""Edits that cross a boundary once, at one timestep, and then let the reverse process go on (Zhu et al. 2023)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from workbench.diffusion.models import Model
from workbench.diffusion.noise import check_seeds, step_noise
from workbench.diffusion.sampling import Trajectory, batches, check_batch_size, denoise, progress_bar
from workbench.diffusion.schedule import index_of
from workbench.directions.boundary import Boundary, change_of, move_jointly
from workbench.directions.direction import finite
from workbench.editing.edit import check_run
from workbench.editing.grid import EditGrid

UNITS = ("sd", "distance")
H_POLICIES = ("first", "offset", "offset-asymmetric", "none", "stale")
COMBINATIONS = ("sequential", "joint", "conditional")

Boundaries = Boundary | Sequence[Boundary]
Distances = Sequence[float] | np.ndarray


def cross_boundary(
    model: Model,
    runs: Trajectory,
    boundary_h: Boundaries | None = None,
    boundary_x: Boundaries | None = None,
    *,
    distances: Distances | Mapping[str, Distances] = (-3.0, -1.5, 0.0, 1.5, 3.0),
    unit: str = "sd",
    mode: str = "absolute",
    eta: float | Sequence[float] | None = 1.0,
    h_policy: str = "first",
    h_align: str = "exact",
    legacy_origin: bool = False,
    keep_norm: bool = False,
    multi: str = "sequential",
    steps: int | Sequence[int] | None = None,
    seed: int | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> EditGrid:
    """Edit samples by one move across a boundary at its timestep t (Zhu et al. 2023, Algorithm 1 and Fig. 3).

    x_t of every sample is taken from its run; h_t is the network's at exactly (x_t, t). Both are moved to a distance
    from their boundaries, and x_0 is decoded from there with the step noise of eta. All distances of a sample share the
    same x_t and noise, and all cells run in shared batches.

    - A real image: `runs = invert(model, images, steps=..., record_x=True)`, or an inversion that ends at t
      (`steps=[t, ..., 0]`), which costs less and records nothing.
    - A generated sample: `runs = sample(model, seeds, eta=0)`. The process up to t is the run's own; the paper's is
      deterministic there.

    Parameters
    ----------
    model : Model
        The model that the runs come from, at the tap of boundary_h.
    runs : Trajectory
        The samples, not edited yet.
    boundary_h, boundary_x : Boundary or sequence of Boundary, optional
        In h_t and in x_t; without one, nothing is moved in that space. Several are several attributes, in the same
        order in both spaces.
    distances : array of shape (k,), (k, m) or (n, k, m)
        One column each: for all m attributes alike, for each attribute, or for each of n samples too. A mapping with
        "h" and "x" has its own for each space.
    unit : {"sd", "distance"}
        "sd": standard deviations of held-out samples within their class (`Boundary.sigma`), of each boundary its own.
        "distance": Euclidean distance, the same number for h and x.
    mode : {"absolute", "shift", "mirror"}
        What the distances are: signed distances from the boundary after the move, lengths of the move, or multiples of
        the sample's own distance; see `move_jointly`.
    eta : float, or one a step, values in [0, 1]; default 1
        From t on; the paper has 1. None keeps the run's own etas and noise: that of an edit-friendly inversion holds
        on to the image.
    h_policy : {"first", "offset", "offset-asymmetric", "none", "stale"}
        "first" decodes the first step from the moved h and leaves the others free (the paper's single step). "offset"
        adds the difference of the moved and the plain h at every step (as Haas et al. do), "offset-asymmetric" to P_t
        alone (Asyrp). "none" moves x alone. "stale" is the released code: the first step takes the moved h, each later
        one the network's own h of the step before.
    h_align : {"exact", "lagged"}
        "lagged" is the released code too: h_t comes from the next cleaner timestep of the inversion, as does its
        boundary.
    legacy_origin : bool, default False
        Drop the intercepts, as the released code does: distances from the parallel hyperplane through 0.
    keep_norm : bool, default False
        Moved x_t and h_t keep their lengths (a great circle).
    multi : {"sequential", "joint", "conditional"}
        Several attributes: one move after the other, of which the last reaches its distance; the shortest move that
        reaches all distances; or each attribute's move along the part of its normal that is orthogonal to all others
        (`Boundary.orthogonal_to`), as long as the plain one.
    steps : int or sequence of int, optional
        Number of timesteps to decode from t to 0, evenly spaced, or these, beginning with t. By default the run's.
    seed : int, optional
        Sample i has the step noise of seed + i. By default generated samples have that of their own seeds, and seed is
        0 for others.
    batch_size : int, optional
        Cells a pass; chosen by the model if not given.
    progress : bool

    Returns
    -------
    EditGrid
        One row a sample, one column a distance.

    Raises
    ------
    ValueError
        If there is no boundary, one is of another model, tap, space or timestep, the run did not visit t or does not
        know its x_t, distances have another shape, or an option is not known.
    """
    check_run(model, runs)
    for what, value, known in (
        ("unit", unit, UNITS),
        ("h_policy", h_policy, H_POLICIES),
        ("h_align", h_align, ("exact", "lagged")),
        ("multi", multi, COMBINATIONS),
    ):
        if value not in known:
            raise ValueError(f"{what} {value!r} is not known; it is one of {', '.join(known)}")
    moves = {"h": _listed(boundary_h), "x": _listed(boundary_x)}
    if h_policy == "none":
        moves["h"] = []
    t, t_h = _timesteps(moves, runs, h_align)
    for space, at in (("h", t_h), ("x", t)):
        for boundary in moves[space]:
            boundary.check_fits(model, t=at, space=space)
    if moves["h"] and moves["x"] and len(moves["h"]) != len(moves["x"]):
        raise ValueError(
            f"there are {len(moves['h'])} boundaries in h and {len(moves['x'])} in x; give both for each attribute"
        )
    targets = {space: _targets(distances, space, found, len(runs), unit, mode) for space, found in moves.items()}
    used = {
        space: [replace(b, intercept=0.0) for b in found] if legacy_origin else found for space, found in moves.items()
    }
    columns = {len(wanted[0]) for wanted in targets.values() if wanted is not None}
    if len(columns) != 1:
        raise ValueError(f"distances have {' and '.join(map(str, sorted(columns)))} columns for h and x; give as many")
    k = columns.pop()
    pairs, etas, noise = _decoding(model, runs, t, steps, eta, seed)

    x_t = runs.x_at(t)
    size = check_batch_size(batch_size, model, len(runs) * k)
    stale = h_policy == "stale"
    plain_h = _plain_h(model, x_t if t_h == t else runs.x_at(t_h), t_h, size) if moves["h"] or stale else None
    images = torch.empty(len(runs) * k, *model.image_shape)
    sample_of, column_of = torch.arange(len(runs)).repeat_interleave(k), torch.arange(k).repeat(len(runs))

    def moved(values: torch.Tensor, space: str, cells: slice) -> torch.Tensor:
        values = values[sample_of[cells]]
        if not used[space]:
            return values
        to = targets[space][sample_of[cells], column_of[cells]]
        return _moved(values, used[space], to, mode=mode, keep_norm=keep_norm, multi=multi)

    with progress_bar(len(images), len(pairs), "editing", show=progress) as bar, torch.inference_mode():
        for cells in batches(len(images), size):
            h = None if plain_h is None else moved(plain_h, "h", cells).to(model.device)
            offset = None if h is None or stale else h - plain_h[sample_of[cells]].to(model.device)
            images[cells] = denoise(
                model,
                moved(x_t, "x", cells).to(model.device),
                pairs=pairs,
                etas=etas,
                noise=lambda i, c=cells: noise(i, sample_of[c]).to(model.device),
                edit_h=None if h is None else _edit_of(h_policy, h, offset),
                asymmetric=h_policy == "offset-asymmetric",
                on_step=lambda *_, c=cells: bar.update(c.stop - c.start),
            ).cpu()
    return EditGrid(
        images.unflatten(0, (-1, k)),
        row_labels=tuple(f"image {s}" if runs.seeds is None else f"seed {runs.seeds[s]}" for s in range(len(runs))),
        column_labels=_column_labels(moves, targets, unit, mode),
        provenance={
            "model": model.provenance(),
            "seeds": None if runs.seeds is None else list(runs.seeds),
            "timesteps": [t for t, _ in pairs],
            "etas": list(etas),
            "boundaries": [
                {"name": b.name, "space": b.space, "t": b.t, **b.provenance} for found in moves.values() for b in found
            ],
            "distances": {space: None if wanted is None else wanted.tolist() for space, wanted in targets.items()},
            "mode": mode,
            "h_policy": h_policy,
            "h_align": h_align,
            "legacy_origin": legacy_origin,
            "keep_norm": keep_norm,
            "multi": multi,
            "seed": seed,
        },
    )


def _listed(boundaries: Boundaries | None) -> list[Boundary]:
    if boundaries is None:
        return []
    return [boundaries] if isinstance(boundaries, Boundary) else list(boundaries)


def _timesteps(moves: Mapping[str, list[Boundary]], runs: Trajectory, h_align: str) -> tuple[int, int]:
    """Timestep of the move, and the one that h is taken at."""
    if not moves["h"] and not moves["x"]:
        raise ValueError('there is no boundary to cross; give boundary_h (h_policy "none" ignores it) or boundary_x')
    visited = runs.timesteps
    if h_align == "exact":
        t = (moves["x"] or moves["h"])[0].t
        index_of(t, visited, trained=runs.model.schedule.T)
        return t, t
    if moves["x"]:
        i = index_of(moves["x"][0].t, visited, trained=runs.model.schedule.T)
    else:
        i = index_of(moves["h"][0].t, visited, trained=runs.model.schedule.T) - 1
    if not 0 <= i < len(visited) - 1:
        raise ValueError("a lagged h comes from one visited timestep and moves at the one before; the run has no such")
    return visited[i], visited[i + 1]


def _targets(
    distances: Distances | Mapping[str, Distances], space: str, boundaries: list[Boundary], n: int, unit: str, mode: str
) -> np.ndarray | None:
    """Where to move to, (n, k, m), in Euclidean distance, or as multiples for mode "mirror"."""
    if not boundaries:
        return None
    if isinstance(distances, Mapping):
        if space not in distances:
            raise ValueError(f"distances are given for {', '.join(distances)}, and a boundary is in {space!r}")
        distances = distances[space]
    m, given = len(boundaries), np.asarray(distances, dtype=np.float64)
    for distance in given.flat:
        finite(distance, "a distance")
    values = given[:, None] if given.ndim == 1 else given
    if values.ndim == 2 and values.shape[1] in (1, m):
        values = np.broadcast_to(values, (n, len(values), m))
    if values.ndim != 3 or values.shape != (n, values.shape[1], m) or values.size == 0:
        raise ValueError(
            f"distances have shape {given.shape}; numbers of shape (k,), (k, {m}) or ({n}, k, {m}) are "
            f"distances of k columns for {m} boundaries and {n} samples"
        )
    if unit == "sd" and mode != "mirror":
        values = values * [boundary.sigma for boundary in boundaries]
    return values


def _moved(
    z: torch.Tensor, boundaries: list[Boundary], to: np.ndarray, *, mode: str, keep_norm: bool, multi: str
) -> torch.Tensor:
    """Samples (c, ...) moved to distances (c, m) by one of the rules for several attributes."""
    if multi == "joint" or len(boundaries) == 1:
        return move_jointly(z, boundaries, to=to, mode=mode, keep_norm=keep_norm)
    if multi == "sequential":
        for boundary, wanted in zip(boundaries, to.T, strict=True):
            z = boundary.move(z, to=wanted, mode=mode, keep_norm=keep_norm)
        return z
    lengths = change_of(np.stack([boundary.distance(z) for boundary in boundaries], axis=1), to, mode)
    for i, boundary in enumerate(boundaries):
        alone = boundary.orthogonal_to(*boundaries[:i], *boundaries[i + 1 :])
        z = alone.move(z, to=lengths[:, i], mode="shift", keep_norm=keep_norm)
    return z


def _plain_h(model: Model, x_t: torch.Tensor, t: int, size: int) -> torch.Tensor:
    """h_t of every sample, one encoder pass each; on the CPU."""
    with torch.inference_mode():
        return torch.cat([model.encode(x_t[batch].to(model.device), t).h.cpu() for batch in batches(len(x_t), size)])


def _edit_of(
    h_policy: str, h: torch.Tensor, offset: torch.Tensor | None
) -> Callable[[int, torch.Tensor], torch.Tensor | None]:
    """What `denoise` decodes from, step by step."""
    if h_policy == "first":
        # In the memory format of the network's own h, in which an unmoved one gives the same bits.
        return lambda i, own: torch.empty_like(own).copy_(h) if i == 0 else None
    if h_policy != "stale":
        return lambda i, own: own + offset
    before = [h]

    def stale(i: int, own: torch.Tensor) -> torch.Tensor:
        used, before[0] = before[0], own
        return used

    return stale


def _decoding(
    model: Model,
    runs: Trajectory,
    t: int,
    steps: int | Sequence[int] | None,
    eta: float | Sequence[float] | None,
    seed: int | None,
) -> tuple[list[tuple[int, int]], tuple[float, ...], Callable[[int, torch.Tensor], torch.Tensor]]:
    """The steps from t on: their pairs and etas, and the noise of the i-th for samples at some positions."""
    first = index_of(t, runs.timesteps)
    if steps is None:
        visited = runs.timesteps[first:]
    elif isinstance(steps, (int, np.integer)):
        if not 1 <= steps <= t + 1:
            raise ValueError(f"steps is {steps}; from t = {t} to 0 there are 1 to {t + 1}")
        visited = tuple(np.linspace(t, 0, steps).round().astype(int).tolist())
    else:
        visited = model.schedule.timesteps(steps)
    if visited[0] != t:
        raise ValueError(f"the steps to decode begin at {visited[0]}; the move is at t = {t}, begin there")
    pairs = model.schedule.pairs(visited)
    if eta is None:
        if steps is not None or seed is not None:
            raise ValueError("eta=None keeps the run's own steps and noise; leave out steps and seed")
        return pairs, runs.etas[first:], lambda i, samples: runs.noise_at(first + i, samples)
    own = runs.seeds if seed is None and runs.seeds is not None else None
    seeds = own or check_seeds(range(seed or 0, (seed or 0) + len(runs)))

    def noise(i: int, samples: torch.Tensor) -> torch.Tensor:
        different, inverse = torch.unique(samples, return_inverse=True)
        return step_noise([seeds[s] for s in different.tolist()], model.image_shape, t=visited[i])[inverse]

    return pairs, model.schedule.etas(eta, len(visited)), noise


def _column_labels(
    moves: Mapping[str, list[Boundary]], targets: Mapping[str, np.ndarray | None], unit: str, mode: str
) -> tuple[str, ...]:
    """What is done in each column; for one boundary in both units."""
    space = "x" if moves["x"] else "h"
    boundaries, wanted = moves[space], targets[space]
    alone = len(boundaries) == 1
    both = bool(moves["h"] and moves["x"])
    labels = []
    for column in wanted.transpose(1, 0, 2):
        if (column != column[:1]).any():
            labels.append("own")
            continue
        parts = []
        for boundary, to in zip(boundaries, column[0], strict=True):
            in_sd = "" if boundary.deviations is None else f"{_signed(to / boundary.sigma)} sd"
            first, second = (in_sd, _signed(to)) if unit == "sd" else (_signed(to), in_sd)
            if mode == "mirror":
                parts.append(f"{_signed(to)} times")
            elif alone and not both and second:
                parts.append(f"{first}\n({second})")
            else:
                parts.append(first if alone else f"{boundary.name} {first}")
        labels.append("\n".join(parts))
    return tuple(labels)


def _signed(value: float) -> str:
    return f"{value:+.3g}" if value else "0"
