"""Boundaries between samples with and without an attribute, in x_t or h_t at one timestep (Zhu et al. 2023).

A boundary is a hyperplane n.z + b = 0 with a unit normal n that points to the samples with the attribute; z is x_t or
h_t, flattened. `boundary_fit` fits it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TypeVar, cast

import numpy as np
import torch

from workbench.analysis.intervals import Estimate, share_of
from workbench.analysis.probes import Span
from workbench.analysis.samples import Labels, check_classes, check_samples, matched_column
from workbench.diffusion.images import fingerprint
from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Trajectory
from workbench.directions.direction import NEGLIGIBLE, bracketed, origin_of, rotated
from workbench.formats.tensors import load_tensors, save_tensors
from workbench.hspace.store import HStore
from workbench.io import one_of

MODES = ("absolute", "shift", "mirror")
SPACES = ("h", "x")

Samples = HStore | Trajectory | np.ndarray | torch.Tensor
Points = np.ndarray | torch.Tensor
Moved = TypeVar("Moved", np.ndarray, torch.Tensor)


@dataclass(frozen=True, eq=False)
class Boundary:
    """A hyperplane between the samples with and without an attribute, at one timestep.

    Attributes
    ----------
    normal : Tensor of shape (C, h, w), float32, on the CPU
        n, of length 1, pointing to the samples with the attribute.
    intercept : float
        b; the signed Euclidean distance of z is n.z + b.
    t : int
        Timestep.
    space : {"h", "x"}
        Space of z: h_t or x_t.
    name : str
    provenance : dict
        As of a `Direction`; "model" is None for a boundary in plain arrays.
    means, deviations : (float, float), optional
        Of the signed distances of held-out samples, (without, with) the attribute. The fitted samples would mislead:
        with fewer samples than dimensions they all lie at the margin, at the same distance.
    accuracy, balanced_accuracy : Estimate, optional
        Share of held-out samples on their side of the boundary, and the mean of both classes' shares, with 95% Wilson
        intervals; those of a fit by cross-validation are wider (`intervals.CROSS_VALIDATED`).
    extras : dict of str -> float
        From the fit: `weight_norm`, the length of the normal before scaling; `class_distance` and `dimensions`, delta
        and d of `expected_accuracy`.
    """

    normal: torch.Tensor = field(repr=False)
    intercept: float
    t: int
    space: str
    name: str
    provenance: dict = field(repr=False)
    means: tuple[float, float] | None = None
    deviations: tuple[float, float] | None = None
    accuracy: Estimate | None = None
    balanced_accuracy: Estimate | None = None
    extras: dict[str, float] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        normal = torch.as_tensor(self.normal, dtype=torch.float32).detach().cpu()
        if not abs(normal.norm().item() - 1.0) <= 1e-3 or not math.isfinite(self.intercept):
            raise ValueError("the normal of a boundary has length 1, and its intercept is finite")
        one_of("space", self.space, SPACES)
        object.__setattr__(self, "normal", normal)

    @property
    def sigma(self) -> float:
        """Within-class standard deviation of the held-out samples' distance, pooled over both classes: the unit "sd".

        Raises
        ------
        ValueError
            If no held-out samples were measured.
        """
        if self.deviations is None:
            raise ValueError(f"the deviations of {self.name} are not known; measure them with boundary.measured(...)")
        return math.sqrt(sum(s**2 for s in self.deviations) / 2)

    def distance(self, z: Points) -> np.ndarray:
        """n.z + b, the signed Euclidean distance from the boundary, positive on the side with the attribute.

        Parameters
        ----------
        z : array or Tensor of shape (n, C, h, w) or (n, C*h*w)

        Returns
        -------
        ndarray of shape (n,), float64

        Raises
        ------
        ValueError
            If the samples and the boundary differ in size.
        """
        normal = self._wide()
        # Row by row: the same bits for a sample whatever the batch it is in.
        return np.array([row @ normal for row in _rows(z, self)]) + self.intercept

    def move(self, z: Moved, *, to: float | np.ndarray, mode: str = "absolute", keep_norm: bool = False) -> Moved:
        """Move samples along the normal: `move_jointly` for one boundary.

        Parameters
        ----------
        z : array or Tensor of shape (n, C, h, w) or (n, C*h*w)
        to : float, or array of shape (n,)
        mode, keep_norm
            As in `move_jointly`.

        Returns
        -------
        As z
        """
        to = np.asarray(to, dtype=np.float64)
        return move_jointly(z, [self], to=to[..., None], mode=mode, keep_norm=keep_norm)

    def orthogonal_to(self, *others: Boundary) -> Boundary:
        """The conditional boundary: moving along its normal leaves all the others' distances as they are.

        n' is the part of n orthogonal to the other normals, n - sum c_j n_j, scaled to length 1 by 1/s. The distance
        combines in the same way, (distance - sum c_j distance_j) / s, so the boundary stays the same where the other
        distances are 0. Its means, deviations and accuracies are unknown until `measured` is called.

        Parameters
        ----------
        *others : Boundary

        Returns
        -------
        Boundary

        Raises
        ------
        ValueError
            If a boundary belongs to another model, space or timestep, or n lies in the span of the others.
        """
        if not others:
            raise ValueError("orthogonal_to needs at least one other boundary")
        for other in others:
            self._check_same_space(other)
        n, span = self._wide(), np.stack([other._wide() for other in others])
        c = np.linalg.lstsq(span.T, n, rcond=None)[0]
        rest = n - c @ span
        s = float(np.linalg.norm(rest))
        names = ", ".join(bracketed(other.name) for other in others)
        if s < NEGLIGIBLE:
            raise ValueError(f"nothing is left of {self.name}: its normal lies in the span of {names}")
        sources = [{"name": b.name, **{k: v for k, v in b.provenance.items() if k != "model"}} for b in (self, *others)]
        parameters = {"of": sources, "length": s}
        return Boundary(
            normal=torch.from_numpy(rest / s).view_as(self.normal),
            intercept=(self.intercept - float(c @ [other.intercept for other in others])) / s,
            t=self.t,
            space=self.space,
            name=f"{bracketed(self.name)} ⟂ {names}",
            provenance={**self.provenance, "method": "orthogonal", "parameters": parameters},
        )

    def cosine(self, other: Boundary) -> float:
        """Cosine of the angle between both normals, in [-1, 1]."""
        self._check_same_space(other)
        return float(np.clip(self._wide() @ other._wide(), -1.0, 1.0))

    def measured(self, samples: Samples, labels: Labels) -> Boundary:
        """The same boundary with means, deviations and accuracies measured on these samples.

        Parameters
        ----------
        samples : HStore, Trajectory with records, or array of shape (n, ...)
            Not those that it was fitted on.
        labels : Series, or array of shape (n,), values 0 or 1
            Matched as in `fit_boundary`.

        Returns
        -------
        Boundary

        Raises
        ------
        ValueError
            If the samples have another model or shape, or the labels don't fit them or have fewer than 2 of a class.
        """
        source = samples_at(samples, self.t, self.space)
        self._refuse_other_model(source.origin["model"], "these samples")
        y = check_classes(matched_column(source, labels, f"the labels {self.name!r}"), self.name)
        return replace(self, **held_out(self.distance(source.values), y))

    def check_fits(self, model: Model, *, t: int | None = None, space: str | None = None) -> None:
        """Raise unless the boundary was made for this model, timestep and space.

        Parameters
        ----------
        model : Model
        t : int, optional
        space : {"h", "x"}, optional

        Raises
        ------
        ValueError
            Names the difference: weights, tap, shape, space or timestep. A boundary in plain arrays is checked by shape
            alone.
        """
        self._refuse_other_model(model.provenance(), "this model")
        if space is not None and space != self.space:
            raise ValueError(f"{self.name} is a boundary in {self.space}_t, not in {space}_t; fit one there")
        if t is not None and t != self.t:
            raise ValueError(f"{self.name} was fitted at timestep {self.t}, not at {t}; fit one there")
        shape = model.h_shape if self.space == "h" else model.x_shape
        if self.normal.numel() != math.prod(shape):
            normal = f"{self.name} has a normal of {self.normal.numel()} values"
            raise ValueError(f"{normal}; {self.space}_t of {model.name} has shape {shape}")

    def save(self, path: str | Path) -> Path:
        """Write the boundary atomically to a safetensors file, with all other attributes in the header.

        Parameters
        ----------
        path : path
            The suffix is usually `.safetensors`.

        Returns
        -------
        Path
        """
        about = {key: value for key, value in vars(self).items() if key != "normal"}
        about |= {key: None if about[key] is None else asdict(about[key]) for key in ("accuracy", "balanced_accuracy")}
        return save_tensors(path, {"normal": self.normal}, about, kind="boundary")

    def __repr__(self) -> str:
        model = self.provenance["model"]
        where = "arrays" if model is None else repr(model["name"])
        held_out = ""
        if self.accuracy is not None:
            right = self.balanced_accuracy.value
            held_out = f", held-out balanced accuracy {right:.1%} of {self.accuracy.n}, 1 sd is {self.sigma:.3g}"
        return f"Boundary({self.name!r} in {self.space} at t={self.t}, {self.provenance['method']}, {where}{held_out})"

    def _wide(self) -> np.ndarray:
        """n in float64, flat."""
        return self.normal.flatten().double().numpy()

    def _check_same_space(self, other: Boundary) -> None:
        if not isinstance(other, Boundary):
            raise TypeError(f"a {type(other).__name__} is no Boundary; give each Boundary as an argument of its own")
        if (self.space, self.t, self.normal.numel()) != (other.space, other.t, other.normal.numel()):
            own, theirs = (f"{b.name} is in {b.space} at t={b.t}" for b in (self, other))
            raise ValueError(f"{own}, {theirs}; boundaries combine within one space and timestep")
        if other.provenance["model"] is not None:
            self._refuse_other_model(other.provenance["model"], other.name)

    def _refuse_other_model(self, model: dict | None, whose: str) -> None:
        own, tap = self.provenance["model"], self.space == "h"
        refuse_other_model(self.name, own, model, whose=whose, tap=tap, condition=False)


def move_jointly(
    z: Moved,
    boundaries: Sequence[Boundary],
    *,
    to: np.ndarray | Sequence[float],
    mode: str = "absolute",
    keep_norm: bool = False,
) -> Moved:
    """Move samples to given distances from several boundaries at once, by the shortest move.

    With the normals as the rows of N and the changes of the distances as l, the shift of minimal norm is
    N' (N N')^-1 l. A sample without a change stays the same, bit for bit.

    Parameters
    ----------
    z : array or Tensor of shape (n, C, h, w) or (n, C*h*w)
    boundaries : sequence of m Boundary
        Of one space and timestep.
    to : array of shape (m,) or (n, m)
        "absolute": signed distance after the move. "shift": change of the distance. "mirror": change as a multiple of
        the distance itself: -1 moves onto the boundary, -2 to the same distance on the other side.
    mode : {"absolute", "shift", "mirror"}
    keep_norm : bool, default False
        Shorten the part orthogonal to the normals, so that each sample keeps its length: a move on a great circle. The
        given distances are still reached.

    Returns
    -------
    As z

    Raises
    ------
    ValueError
        If shapes don't match, the normals are linearly dependent, or a sample is too short to reach its distance with
        its norm kept.
    """
    boundaries = list(boundaries)
    if not boundaries:
        raise ValueError("there is no boundary to move along; give at least one")
    for other in boundaries[1:]:
        boundaries[0]._check_same_space(other)
    rows = _rows(z, boundaries[0])
    normals = np.stack([boundary._wide() for boundary in boundaries])
    products = normals @ normals.T
    if np.linalg.cond(products) > 1e8:
        names = ", ".join(boundary.name for boundary in boundaries)
        raise ValueError(f"the normals of {names} are linearly dependent; no move reaches different distances")
    distances = np.stack([boundary.distance(z) for boundary in boundaries], axis=1)
    change = change_of(distances, to, mode)
    shift = np.linalg.solve(products, change.T).T @ normals
    moved = rows + shift
    if keep_norm:
        inside = np.linalg.solve(products, normals @ moved.T).T @ normals
        outside = moved - inside
        room = (rows**2).sum(axis=1) - (inside**2).sum(axis=1)
        if (room < 0).any():
            length = np.linalg.norm(rows[room.argmin()])
            raise ValueError(f"length {length:.4g}: no point of that length has these distances; move less")
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = np.sqrt(room / (outside**2).sum(axis=1))
        moved = inside + factor[:, None] * outside
    moved[~change.any(axis=1)] = rows[~change.any(axis=1)]
    if torch.is_tensor(z):
        return torch.from_numpy(moved).to(z).view_as(z)
    return cast(Moved, moved.astype(np.asarray(z).dtype).reshape(np.shape(z)))


def change_of(distances: np.ndarray, to: np.ndarray | Sequence[float], mode: str) -> np.ndarray:
    """Change of the distances (n, m) that a move to `to`, (m,) or (n, m), makes in a mode of `move_jointly`."""
    one_of("mode", mode, MODES)
    wanted = np.asarray(to, dtype=np.float64)
    n, m = distances.shape
    if wanted.shape not in ((m,), (n, m)) or not np.isfinite(wanted).all():
        raise ValueError(f"distances must be finite, of shape ({m},) or ({n}, {m}), not {wanted.shape}")
    if mode == "absolute":
        return wanted - distances
    return wanted * distances if mode == "mirror" else np.broadcast_to(wanted, distances.shape)


def _rows(z: Points, boundary: Boundary) -> np.ndarray:
    """The samples, (n, d), float64."""
    values = z.detach().cpu().numpy() if torch.is_tensor(z) else np.asarray(z)
    if values.ndim < 2 or math.prod(values.shape[1:]) != boundary.normal.numel():
        shape = ", ".join(map(str, boundary.normal.shape))
        wanted = f"{boundary.space}_t of shape (n, {shape})"
        raise ValueError(f"samples of shape {values.shape} don't fit {boundary.name}, which takes {wanted}")
    return values.reshape(len(values), -1).astype(np.float64)


def load_boundary(path: str | Path, *, model: Model | None = None) -> Boundary:
    """Read a boundary written by `Boundary.save`.

    Parameters
    ----------
    path : path
    model : Model, optional
        Refuse a boundary with other weights or another tap.

    Returns
    -------
    Boundary

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is corrupt, is not a boundary, or belongs to another model or tap.
    """
    tensors, about = load_tensors(path, kind="boundary")
    about |= {key: about[key] and Estimate(**about[key]) for key in ("accuracy", "balanced_accuracy")}
    about |= {key: about[key] and tuple(about[key]) for key in ("means", "deviations")}
    found = Boundary(**tensors, **about)
    if model is not None:
        found.check_fits(model)
    return found


def random_boundaries(boundaries: Sequence[Boundary], *, seed: int) -> list[Boundary]:
    """Boundaries of one space with random normals, which have the same angles to each other as the given ones."""
    normals = rotated(torch.stack([boundary.normal.flatten().double() for boundary in boundaries]), seed=seed)
    return [
        replace(
            boundary,
            normal=normal.view_as(boundary.normal),
            name=f"random {seed} like {bracketed(boundary.name)}",
            provenance={**boundary.provenance, "method": "random", "parameters": {"seed": seed}},
            accuracy=None,
            balanced_accuracy=None,
            extras={},
        )
        for boundary, normal in zip(boundaries, normals, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class SamplesAt:
    """Samples at a timestep, with seeds or names, and origin."""

    values: np.ndarray
    shape: tuple[int, ...]
    origin: dict
    seeds: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)

    @cached_property
    def span(self) -> Span:
        return Span.of(self.values)

    @cached_property
    def mean(self) -> np.ndarray:
        return self.values.mean(axis=0, dtype=np.float64)


def samples_at(source: Samples | SamplesAt, t: int, space: str) -> SamplesAt:
    """The h_t or x_t of a store, a run with records, or an array, of which neither model nor timestep is known."""
    one_of("space", space, SPACES)
    if isinstance(source, SamplesAt):
        return source
    if isinstance(source, HStore):
        origin = {**origin_of(source), "timesteps": list(source.timesteps)}
        values = check_samples(source.at(t, space=space), t=t)
        return SamplesAt(values, source.shape_of(space), origin, source.seeds, source.names)
    if isinstance(source, Trajectory):
        model, seeds = source.model, source.seeds
        if space == "h" and source.h is None:
            raise ValueError("this run has no h; sample or invert with record_h=True")
        values = source.h.at(t) if space == "h" else source.x_at(t).numpy()
        origin = {"model": model.provenance(), "etas": list(source.etas), "seeds": seeds and list(seeds)}
        if seeds is None:
            origin["images"] = {"fingerprint": fingerprint(source.x0), "n": len(source)}
        origin["timesteps"] = list(source.timesteps)
        shape = model.h_shape if space == "h" else model.x_shape
        return SamplesAt(check_samples(values, t=t), shape, origin, seeds)
    array = source.detach().cpu().numpy() if torch.is_tensor(source) else np.asarray(source)
    return SamplesAt(check_samples(array, t=t), array.shape[1:], {"model": None, "etas": None, "seeds": None})


def held_out(distances: np.ndarray, y: np.ndarray, *, cross_validated: bool = False) -> dict:
    """Means, deviations and accuracies of a boundary on held-out samples."""
    sides = [distances[~y], distances[y]]
    right = (distances > 0) == y
    recalls = [right[~y].mean(), right[y].mean()]
    effective = round(4 / (1 / y.sum() + 1 / (~y).sum()))
    return {
        "means": tuple(float(side.mean()) for side in sides),
        "deviations": tuple(float(side.std(ddof=1)) for side in sides),
        "accuracy": share_of(float(right.mean()), len(y), cross_validated=cross_validated),
        "balanced_accuracy": share_of(float(np.mean(recalls)), effective, cross_validated=cross_validated),
    }
