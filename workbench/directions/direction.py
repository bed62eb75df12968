"""Directions in h-space: a vector to add to h_t at every timestep, and the length of one unit."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.schedule import NoiseSchedule, index_of, within
from workbench.formats.tensors import load_tensors, save_tensors
from workbench.hspace.store import HStore

FOUND = ("labels", "scores", "text", "pca", "svm", "mean", "lda", "logistic")
"""Methods whose directions, or boundaries, are sums of samples of h."""

NEGLIGIBLE = 1e-6
"""Part of a length below which float32 can't tell a difference from zero."""


def finite(value: float, what: str) -> float:
    """The number; ValueError if it is NaN or infinite."""
    if not math.isfinite(value):
        raise ValueError(f"{what} is {value}; give a finite number")
    return float(value)


@dataclass(frozen=True, eq=False)
class Direction:
    """An edit of h: one unit vector per timestep and the length of its step.

    For every method, one unit of scale moves h_t by one standard deviation of the population's projection on the
    direction, so methods are comparable. Sums and projections change lengths; `calibrated` measures them again.

    Attributes
    ----------
    unit : Tensor of shape (T, C, h, w), float32, on the CPU
        Each unit[i] has length 1, or 0 where the direction does nothing.
    sigma : Tensor of shape (T,), float32, not negative
        Length of one unit of scale at each timestep.
    timesteps : tuple of int
        Visited timesteps, noisiest first.
    name : str
    provenance : dict
        JSON values of its origin: "model" (`Model.provenance()`), "etas", "method", "parameters" and "seeds".
    extras : dict of str -> float
        Measurements of its method, such as a singular value.
    """

    unit: torch.Tensor = field(repr=False)
    sigma: torch.Tensor = field(repr=False)
    timesteps: tuple[int, ...]
    name: str
    provenance: dict = field(repr=False)
    extras: dict[str, float] = field(default_factory=dict, repr=False)

    __array_ufunc__ = None  # numpy numbers leave the product to __rmul__

    def __post_init__(self) -> None:
        unit = torch.as_tensor(self.unit, dtype=torch.float32).detach().cpu()
        sigma = torch.as_tensor(self.sigma, dtype=torch.float32).detach().cpu()
        timesteps = tuple(int(t) for t in self.timesteps)
        if unit.ndim != 4 or len(unit) != len(timesteps) or sigma.shape != (len(timesteps),):
            shapes = f"{tuple(unit.shape)} and {sigma.numel()} sigmas, not one of each at {len(timesteps)} timesteps"
            raise ValueError(f"a direction has units of shape {shapes}")
        if not timesteps or any(a <= b for a, b in zip(timesteps, timesteps[1:], strict=False)):
            raise ValueError(f"the timesteps of a direction are decreasing, not {list(timesteps)[:8]}")
        lengths = unit.flatten(1).norm(dim=1)
        if not (((lengths - 1).abs() < 1e-3) | (lengths == 0)).all():
            raise ValueError("the unit vectors of a direction have length 1 or 0; use Direction.from_delta for others")
        if not torch.isfinite(sigma).all() or (sigma < 0).any():
            raise ValueError("the sigmas of a direction are finite and not negative")
        for name, value in (("unit", unit), ("sigma", sigma), ("timesteps", timesteps)):
            object.__setattr__(self, name, value)

    @classmethod
    def from_delta(cls, delta: torch.Tensor, *, timesteps: Sequence[int], name: str, provenance: dict) -> Direction:
        """Direction whose unit of scale adds `delta` to h.

        Parameters
        ----------
        delta : Tensor of shape (T, C, h, w)
        timesteps, name, provenance
            As the attributes.

        Returns
        -------
        Direction
        """
        delta = torch.as_tensor(delta).cpu().double()
        length = delta.flatten(1).norm(dim=1)
        unit = delta / torch.where(length > 0, length, 1.0).view(-1, 1, 1, 1)
        return cls(unit, length, tuple(timesteps), name, provenance)

    def delta(self, scale: float = 1.0) -> torch.Tensor:
        """The change of h at every timestep for `scale` units, for `sample(delta_h=...)`.

        Returns
        -------
        Tensor of shape (T, C, h, w), float32
        """
        return (finite(scale, "scale") * self.sigma).view(-1, 1, 1, 1) * self.unit

    def at(self, t: int) -> torch.Tensor:
        """The change of h_t for one unit of scale.

        Returns
        -------
        Tensor of shape (C, h, w), float32

        Raises
        ------
        ValueError
            If the direction has no timestep `t`.
        """
        i = index_of(t, self.timesteps)
        return self.sigma[i] * self.unit[i]

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the edited h_t."""
        channels, height, width = self.unit.shape[1:]
        return channels, height, width

    def __neg__(self) -> Direction:
        return self._derived("product", f"-{bracketed(self.name)}", {"factor": -1.0}, unit=-self.unit)

    def __mul__(self, factor: float) -> Direction:
        """The direction whose unit of scale is `factor` units of this one."""
        if not isinstance(factor, Real):
            return NotImplemented
        factor = finite(factor, "the factor")
        return self._moved(self._wide() * factor, "product", f"{factor:g} {bracketed(self.name)}", {"factor": factor})

    __rmul__ = __mul__

    def __add__(self, other: Direction) -> Direction:
        """Sum of two directions, unit for unit of scale."""
        return self._combined(other, "sum", "+", torch.add)

    def __sub__(self, other: Direction) -> Direction:
        return self._combined(other, "difference", "-", torch.sub)

    def orthogonal_to(self, *others: Direction, per_step: bool = False) -> Direction:
        """Project out the span of all the others (Haas et al. eq. 12).

        v_perp = (I - V (V'V)^-1 V') v, with the others as the columns of V. All are removed at once: removing them one
        by one leaves a part of the first if the others are not orthogonal to each other.
        Inner products are not effects, though; `cancel_effects` uses the measured effects of edits.

        Parameters
        ----------
        *others : Direction
        per_step : bool, default False
            Project each timestep separately. By default inner products run over all timesteps, as in the paper. Here
            one unit of each direction is projected, sigma_t along ``v_t / |v_t|``; the paper projects eq. 11's
            difference of means v_t. ``|v_t|`` over sigma_t varies along t, so the weights of the
            timesteps differ slightly. With `per_step` both give the same direction.

        Returns
        -------
        Direction
            One unit is the projection of one unit of v; `calibrated` makes it one sigma again.

        Raises
        ------
        ValueError
            If a direction belongs to another model, tap or timesteps, or nothing is left.
        """
        if not others:
            raise ValueError("orthogonal_to needs at least one other direction")
        for other in others:
            self._check_same_space(other)
        layout = (len(self.timesteps), -1) if per_step else (1, -1)
        v = self._wide().reshape(*layout)
        rest = _outside(v, torch.stack([other._wide().reshape(*layout) for other in others], dim=1))
        names = ", ".join(bracketed(other.name) for other in others)
        if not rest.any():
            raise ValueError(f"nothing is left of {self.name}: it lies in the span of {names}")
        name = f"{bracketed(self.name)} ⟂ {names}"
        return self._moved(rest.reshape(self.unit.shape), "orthogonal", name, {"per_step": per_step}, *others)

    def restricted_to(self, t_range: tuple[int, int]) -> Direction:
        """The direction within a range of timesteps, and 0 outside of it.

        Parameters
        ----------
        t_range : (t_high, t_low)
            Both included, the noisier first.

        Raises
        ------
        ValueError
            If no timestep of the direction is in that range.
        """
        t_high, t_low = t_range
        inside = torch.tensor(within(t_range, self.timesteps))
        return self._derived(
            "restricted",
            f"{bracketed(self.name)} [{t_high}..{t_low}]",
            {"t_range": [int(t_high), int(t_low)]},
            unit=self.unit * inside.view(-1, 1, 1, 1),
            sigma=self.sigma * inside,
        )

    def resampled(self, steps: int | Sequence[int]) -> Direction:
        """The direction for another number of steps.

        Each new timestep takes the unit vector of the nearest old one (of two, the noisier) and a linearly
        interpolated sigma, constant beyond both ends. A direction that acts on part of the timesteps acts on the new
        ones within that part, from its first to its last, or on the nearest one if there is none: a direction that
        acts at one timestep still does.

        Parameters
        ----------
        steps : int or sequence of int
            As in `sample`: their number, placed by the model's schedule, or the timesteps, decreasing.

        Returns
        -------
        Direction
        """
        about = self.provenance["model"]["schedule"]
        # Only its timesteps mean something.
        levels = np.linspace(1.0, 0.5, about["T"])
        timesteps = NoiseSchedule(levels, spacing=about["spacing"], offset=about["offset"]).timesteps(steps)
        old, new = np.array(self.timesteps), np.array(timesteps)
        unit, sigma = torch.zeros(len(new), *self.h_shape), np.zeros(len(new))
        acting = np.flatnonzero(self.unit.flatten(1).any(dim=1))
        for part in np.split(acting, np.flatnonzero(np.diff(acting) > 1) + 1) if len(acting) else []:
            high = old[part[0]] if part[0] > 0 else np.inf
            low = old[part[-1]] if part[-1] < len(old) - 1 else -np.inf
            inside = np.flatnonzero((low <= new) & (new <= high))
            if not len(inside):
                inside = np.abs(new - old[part].mean()).argmin(keepdims=True)
            unit[inside] = self.unit[part[np.abs(old[part] - new[inside, None]).argmin(axis=1)]]
            sigma[inside] = np.interp(new[inside], old[part][::-1], self.sigma.numpy()[part][::-1])
        parameters, sigma = {"from": list(self.timesteps)}, torch.from_numpy(sigma)
        return self._derived("resampled", self.name, parameters, unit=unit, sigma=sigma, timesteps=timesteps)

    def cosine(self, other: Direction) -> float:
        """Cosine of the angle to another direction, over all timesteps, of which longer steps weigh more.

        Returns
        -------
        float in [-1, 1]
            NaN if either is zero.
        """
        self._check_same_space(other)
        a, b = self._wide().flatten(), other._wide().flatten()
        return float(((a * b).sum() / (a.norm() * b.norm())).clamp(-1.0, 1.0))

    def calibrated(self, store: HStore, *, like: Direction | None = None, progress: bool = True) -> Direction:
        """The same direction with one unit of scale equal to one sigma of a population.

        Parameters
        ----------
        store : HStore
            The population: sigma becomes the standard deviation (n - 1 in the denominator) of the projection of its
            h_t on the unit vector. Read chunk by chunk. Use other samples than those the direction was found from:
            these spread too widely along it.
        like : Direction, optional
            If there are no other samples: a direction found from this store's samples, such as the original of a
            projected one. The overestimation of sigma measured for it is applied here.
        progress : bool

        Returns
        -------
        Direction

        Raises
        ------
        ValueError
            If the store has another model or tap, lacks a timestep, or has fewer than two samples.

        Warns
        -----
        UserWarning
            If the direction was found from the samples of the store and `like` is not given.
        """
        self._refuse_other_model(store.provenance["model"], str(store.path))
        if like is not None:
            self._check_same_space(like)
        elif found_from(store, self.provenance):
            warnings.warn(
                f"{self.name} was found from the samples of this store, which spread too widely along it: sigma is too "
                "large; calibrate with other samples, or with like=, a direction that was found from these",
                stacklevel=2,
            )
        if len(store) < 2:
            raise ValueError("a store of one sample has no standard deviation; calibrate with at least two")
        units = torch.stack([each.unit.flatten(1) for each in (self, like) if each is not None], dim=1).numpy()
        sigma = deviations(store, dict(zip(self.timesteps, units, strict=True)), progress=progress)
        if like is not None:
            sigma[0] *= torch.where(sigma[1] > 0, like.sigma / sigma[1], 1.0)
        population = {"n": len(store), **{k: v for k, v in origin_of(store).items() if k != "model"}}
        parameters = {"population": population, "like": like and like.name}
        return self._derived("calibrated", self.name, parameters, sigma=sigma[0])

    def check_fits(self, model: Model, timesteps: Sequence[int] | None = None) -> None:
        """Raise unless the direction was made for this model and these timesteps.

        Parameters
        ----------
        model : Model
        timesteps : sequence of int, optional
            Timesteps of the run to edit.

        Raises
        ------
        ValueError
            Names the difference: weights, tap or timesteps.
        """
        self._refuse_other_model(model.provenance(), "this model")
        if timesteps is not None and tuple(timesteps) != self.timesteps:
            own, given = _visits(self.timesteps), _visits(tuple(timesteps))
            raise ValueError(f"{self.name} has {own}, the run has {given}; use direction.resampled(run.timesteps)")

    def save(self, path: str | Path) -> Path:
        """Write the direction atomically to a safetensors file, with its provenance in the header.

        Parameters
        ----------
        path : path
            The suffix is usually `.safetensors`.

        Returns
        -------
        Path
        """
        about = {key: getattr(self, key) for key in ("name", "timesteps", "provenance", "extras")}
        return save_tensors(path, {"unit": self.unit, "sigma": self.sigma}, about, kind="direction")

    def __repr__(self) -> str:
        model, method = self.provenance["model"], self.provenance["method"]
        return (
            f"Direction({self.name!r}, {method}, {model['name']!r}, {_visits(self.timesteps)}, "
            f"h {self.h_shape} {model['tap']!r} the mid block, sigma {self.sigma[0]:.3g}..{self.sigma[-1]:.3g})"
        )

    def _wide(self) -> torch.Tensor:
        """delta of scale 1 in float64."""
        return self.sigma.double().view(-1, 1, 1, 1) * self.unit.double()

    def _derived(self, method: str, name: str, parameters: dict, *others: Direction, **changes) -> Direction:
        """This direction with changes, its provenance in that of the result, without its measurements (extras)."""
        provenance = derived(method, parameters, self, *others)
        return replace(self, name=name, provenance=provenance, extras={}, **changes)

    def _moved(self, delta: torch.Tensor, method: str, name: str, parameters: dict, *others: Direction) -> Direction:
        provenance = derived(method, parameters, self, *others)
        return Direction.from_delta(delta, timesteps=self.timesteps, name=name, provenance=provenance)

    def _combined(self, other: Direction, method: str, sign: str, combine: Callable) -> Direction:
        if not isinstance(other, Direction):
            return NotImplemented
        self._check_same_space(other)
        name = f"{bracketed(self.name)} {sign} {bracketed(other.name)}"
        return self._moved(combine(self._wide(), other._wide()), method, name, {}, other)

    def _refuse_other_model(self, model: dict, whose: str) -> None:
        refuse_other_model(self.name, self.provenance["model"], model, whose=whose, condition=False)

    def _check_same_space(self, other: Direction) -> None:
        if not isinstance(other, Direction):
            raise TypeError(f"a {type(other).__name__} is no Direction; give each Direction as an argument of its own")
        self._refuse_other_model(other.provenance["model"], other.name)
        if other.timesteps != self.timesteps:
            own, theirs = (f"{d.name} has {_visits(d.timesteps)}" for d in (self, other))
            raise ValueError(f"{own}, {theirs}; resample one to the other's, with resampled")


def load_direction(path: str | Path, *, model: Model | None = None) -> Direction:
    """Read a direction written by `Direction.save`.

    Parameters
    ----------
    path : path
    model : Model, optional
        Refuse a direction with other weights or another tap.

    Returns
    -------
    Direction

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is corrupt, is not a direction, or belongs to another model or tap.
    """
    tensors, about = load_tensors(path, kind="direction")
    found = Direction(**tensors, **about)
    if model is not None:
        found.check_fits(model)
    return found


def random_like(direction: Direction, *, seed: int) -> Direction:
    """A random direction that changes over time as another one does, as a control.

    It has the lengths of `direction`, its zeros, and all cosines between its vectors of any two timesteps. Vectors
    drawn independently at every timestep would be a weaker control: the changes that a direction makes along the chain
    add up where its vectors are alike (up to T times one of them), and those of independent vectors partly cancel (the
    root of T times).

    Parameters
    ----------
    direction : Direction
    seed : int

    Returns
    -------
    Direction
    """
    unit, acts = direction.unit.flatten(1).double(), direction.unit.flatten(1).any(dim=1)
    unit[acts] = rotated(unit[acts], seed=seed)
    name = f"random {seed} like {bracketed(direction.name)}"
    return direction._derived("random", name, {"seed": seed}, unit=unit.view_as(direction.unit))


def rotated(vectors: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Random vectors with the lengths of others and all angles between them; (m, d), float64.

    The vectors are L B with orthonormal rows B and a triangular L; a random orthonormal basis takes the place of B.
    """
    m, d = vectors.shape
    drawn = torch.from_numpy(np.random.default_rng(seed).standard_normal((min(m, d), d)))
    return _factors(vectors)[0] @ _factors(drawn)[1]


def _factors(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L, lower triangular with a diagonal that is not negative, and B of orthonormal rows, whose product is (m, d)."""
    basis, triangle = torch.linalg.qr(vectors.T)
    signs = torch.where(triangle.diagonal() < 0, -1.0, 1.0).to(vectors)
    return triangle.T * signs, (basis * signs).T


def origin_of(store: HStore) -> dict:
    """Provenance of the samples that a direction was found from.

    Returns
    -------
    dict
        "model", "etas" and "seeds"; of inverted images "seeds" is None and "images" has their fingerprint.
    """
    known = {key: store.provenance[key] for key in ("model", "etas")} | {"seeds": store.provenance.get("seeds")}
    return known | {key: store.provenance[key] for key in ("images",) if key in store.provenance}


def found_from(store: HStore, provenance: dict) -> bool:
    """Whether a direction, or one that it was made from, was found from samples of a store, be it a part of them."""
    own = provenance.get("seeds") or provenance.get("images")
    if provenance.get("method") in FOUND and own is not None and _overlap(own, store):
        return True
    made_from = [] if provenance.get("method") == "random" else provenance.get("parameters", {}).get("of", [])
    return any(found_from(store, source) for source in made_from)


def _overlap(samples: dict, store: HStore) -> bool:
    """Whether a provenance's seeds or images are in a store; a part is known of seeds in a row alone."""
    if "first" in samples:
        first, n = samples["first"], samples["n"]
        return any(first <= seed < first + n for seed in store.seeds or ())
    return samples in (store.provenance.get("seeds"), store.provenance.get("images"))


def projections(batches: Iterable[np.ndarray], units: np.ndarray) -> np.ndarray:
    """How far samples, in batches of shape (b, d), lie along unit vectors (m, d); (n, m).

    The products are in float32, the result in float64: the mean of a projection may be long against its spread, whose
    sums of squares float32 would lose.
    """
    return np.concatenate([batch @ units.T.astype(np.float32) for batch in batches]).astype(np.float64)


def deviations(store: HStore, units: dict[int, np.ndarray], *, progress: bool = True) -> torch.Tensor:
    """Standard deviations of a population's projections on unit vectors, (m, d) at each timestep; (m, T), float64."""
    bar = tqdm(units.items(), desc="measuring sigma", disable=not progress, delay=2, leave=False)
    sigma = [projections(store.batches(t), at_t).std(axis=0, ddof=1) for t, at_t in bar]
    return torch.from_numpy(np.stack(sigma, axis=1))


def _outside(v: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The part of each v outside of the span of its others; exactly zero where float32 holds nothing more.

    v : (m, d), others : (m, k, d), float64.
    """
    lengths = others.norm(dim=2, keepdim=True)
    scaled = others / torch.where(lengths > 0, lengths, 1.0)
    basis, singular, _ = torch.linalg.svd(scaled.transpose(1, 2), full_matrices=False)
    basis = basis * (singular > NEGLIGIBLE * singular[:, :1]).unsqueeze(1)
    rest = v.unsqueeze(2)
    for _ in range(2):  # the second pass removes what rounding left
        rest = rest - basis @ (basis.transpose(1, 2) @ rest)
    rest = rest.squeeze(2)
    return rest * (rest.norm(dim=1) > NEGLIGIBLE * v.norm(dim=1)).unsqueeze(1)


def derived(method: str, parameters: dict, *operands: Direction) -> dict:
    """Provenance of a direction made from others, with theirs inside."""
    sources = [{"name": d.name, **{k: v for k, v in d.provenance.items() if k != "model"}} for d in operands]
    first = operands[0].provenance
    shared = {
        key: first.get(key) if all(d.provenance.get(key) == first.get(key) for d in operands) else None
        for key in ("etas", "seeds")
    }
    return {"model": first["model"], "method": method, "parameters": {**parameters, "of": sources}, **shared}


def _visits(timesteps: tuple[int, ...]) -> str:
    if len(timesteps) == 1:
        return f"1 step t={timesteps[0]}"
    return f"{len(timesteps)} steps t={timesteps[0]}..{timesteps[-1]}"


def bracketed(name: str) -> str:
    """A name as a part of another."""
    return f"({name})" if " " in name else name
