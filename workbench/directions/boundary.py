"""Boundaries between samples with and without an attribute, in x_t or h_t at one timestep (Zhu et al. 2023).

A boundary is a hyperplane n.z + b = 0 with a unit normal n that points to the samples with the attribute; z is x_t or
h_t, flattened. There are far fewer samples than dimensions, so everything is fitted through the n x n matrix of their
inner products, which is computed once for all folds of the cross-validation and all attributes.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from scipy.stats import norm
from sklearn.covariance import LedoitWolf
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from workbench.analysis.geometry import check_samples, gram
from workbench.analysis.intervals import Estimate, share_of
from workbench.diffusion.images import fingerprint
from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Trajectory
from workbench.diffusion.schedule import index_of
from workbench.directions.direction import NEGLIGIBLE, Direction, bracketed, origin_of
from workbench.directions.supervised import Labels, check_classes, digest_of, matched, name_of
from workbench.formats.tensors import load_tensors, save_tensors
from workbench.hspace.store import HStore

METHODS = ("svm", "mean", "lda", "logistic")
MODES = ("absolute", "shift", "mirror")
SPACES = ("h", "x")

Samples = HStore | Trajectory | np.ndarray | torch.Tensor
Points = np.ndarray | torch.Tensor


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
        What z is: h_t or x_t.
    name : str
    provenance : dict
        As of a `Direction`; "model" is None for a boundary in plain arrays.
    means, deviations : (float, float), optional
        Of the signed distances of held-out samples, (without, with) the attribute. Not of the samples that it was
        fitted on: with fewer samples than dimensions these lie at the margin, all at the same distance.
    accuracy, balanced_accuracy : Estimate, optional
        Share of held-out samples on their side of the boundary, and the mean of both classes' shares, with 95% Wilson
        intervals; of a fit by cross-validation, and then the intervals are wider (`intervals.CROSS_VALIDATED`).
    extras : dict of str -> float
        Of a fit: `weight_norm`, the length of the normal before it was scaled; `training_accuracy`; `class_distance`
        and `dimensions`, the law's delta and d (see `expected_accuracy`).
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
        _check_space(self.space)
        object.__setattr__(self, "normal", normal)

    @property
    def sigma(self) -> float:
        """Standard deviation of the held-out samples' distance within their class, pooled over both: the unit "sd".

        Raises
        ------
        ValueError
            If no held-out samples were measured.
        """
        if self.deviations is None:
            raise ValueError(
                f"the deviations of {self.name} are not known; measure them with boundary.measured(samples, labels)"
            )
        return math.sqrt(sum(s**2 for s in self.deviations) / 2)

    def coordinate(self, z: Points) -> np.ndarray:
        """n.z, the position along the normal.

        Parameters
        ----------
        z : array or Tensor of shape (n, C, h, w) or (n, C*h*w)

        Returns
        -------
        ndarray of shape (n,), float64

        Raises
        ------
        ValueError
            If the samples have another number of values than the boundary.
        """
        normal = self._wide()
        # Row by row: the same bits for a sample whatever the batch it is in.
        return np.array([row @ normal for row in _rows(z, self)])

    def distance(self, z: Points) -> np.ndarray:
        """n.z + b, the signed Euclidean distance from the boundary, positive on the side with the attribute.

        Parameters and errors as `coordinate`.
        """
        return self.coordinate(z) + self.intercept

    def move(self, z: Points, *, to: float | np.ndarray, mode: str = "absolute", keep_norm: bool = False) -> Points:
        """Move samples along the normal; see `move_jointly`, of which this is the case of one boundary.

        Parameters
        ----------
        z : array or Tensor of shape (n, C, h, w) or (n, C*h*w)
        to : float, or array of shape (n,)
        mode, keep_norm
            As there.

        Returns
        -------
        As z
        """
        to = np.asarray(to, dtype=np.float64)
        return move_jointly(z, [self], to=to[..., None], mode=mode, keep_norm=keep_norm)

    def orthogonal_to(self, *others: Boundary) -> Boundary:
        """The conditional boundary: moving along its normal leaves all the others' distances as they are.

        n' is the part of n outside of the span of the other normals, n - sum c_j n_j, scaled to length 1 by 1/s. The
        distance is combined alike, (distance - sum c_j distance_j) / s, so that where the others are 0 the boundary
        stays the same. What it measures of held-out samples is not known until `measured` is called.

        Parameters
        ----------
        *others : Boundary

        Returns
        -------
        Boundary

        Raises
        ------
        ValueError
            If a boundary is of another model, space or timestep, or nothing is left.
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
        """The same boundary with means, deviations and accuracies of these samples.

        Parameters
        ----------
        samples : HStore, Trajectory with records, or array of shape (n, ...)
            Others than it was fitted on.
        labels : Series, or array of shape (n,), values 0 or 1
            Matched as in `fit_boundary`.

        Returns
        -------
        Boundary

        Raises
        ------
        ValueError
            If the samples are of another model or shape, or the labels don't fit them or have fewer than 2 of a class.
        """
        source = _source_of(samples, self.t, self.space)
        self._refuse_other_model(source.origin["model"], "these samples")
        y = check_classes(matched(source, labels, f"the labels {self.name!r}"), self.name)
        return replace(self, **_held_out(self.distance(source.values), y))

    def as_direction(self, store: HStore, *, every_step: bool = False) -> Direction:
        """The normal as a `Direction`, in units of one standard deviation of a population.

        Parameters
        ----------
        store : HStore
            The population, of other samples than the boundary was fitted to (`Direction.calibrated` warns), and the
            timesteps.
        every_step : bool, default False
            Act at every timestep, along the same normal; by default at the boundary's alone.

        Returns
        -------
        Direction

        Raises
        ------
        ValueError
            If the boundary is not in h, or the store is of another model or tap or did not visit its timestep.
        """
        if self.space != "h":
            raise ValueError(f"{self.name} is a boundary in x_t; a direction edits h")
        self._refuse_other_model(store.provenance["model"], str(store.path))
        index_of(self.t, store.timesteps)
        acts = torch.tensor([every_step or t == self.t for t in store.timesteps])
        unit = acts.view(-1, 1, 1, 1) * self.normal
        source = {"name": self.name, **{k: v for k, v in self.provenance.items() if k != "model"}}
        parameters = {"every_step": every_step, "of": [source]}
        provenance = {**origin_of(store), "method": "boundary", "parameters": parameters}
        plain = Direction(unit, acts.float(), store.timesteps, self.name, provenance)
        return plain.calibrated(store, progress=False)

    def check_fits(self, model: Model, *, t: int | None = None, space: str | None = None) -> None:
        """Refuse a model, timestep or space that the boundary was not made for.

        Parameters
        ----------
        model : Model
        t : int, optional
        space : {"h", "x"}, optional

        Raises
        ------
        ValueError
            Naming what differs: weights, tap, shape, space or timestep. A boundary in plain arrays knows no model, and
            only its shape is compared.
        """
        self._refuse_other_model(model.provenance(), "this model")
        if space is not None and space != self.space:
            raise ValueError(f"{self.name} is a boundary in {self.space}_t, not in {space}_t; fit one there")
        if t is not None and t != self.t:
            raise ValueError(f"{self.name} was fitted at timestep {self.t}, not at {t}; fit one there")
        shape = model.h_shape if self.space == "h" else model.image_shape
        if self.normal.numel() != math.prod(shape):
            raise ValueError(
                f"{self.name} has a normal of {self.normal.numel()} values; {self.space}_t of {model.name} has shape "
                f"{shape}"
            )

    def save(self, path: str | Path) -> Path:
        """Write the boundary to a safetensors file with all else in the header; whole or not at all.

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
        held_out = "" if self.accuracy is None else f", held-out accuracy {self.accuracy}, 1 sd is {self.sigma:.3g}"
        return f"Boundary({self.name!r} in {self.space} at t={self.t}, {self.provenance['method']}, {where}{held_out})"

    def _wide(self) -> np.ndarray:
        """n in float64, flat."""
        return self.normal.flatten().double().numpy()

    def _check_same_space(self, other: Boundary) -> None:
        if (self.space, self.t, self.normal.numel()) != (other.space, other.t, other.normal.numel()):
            raise ValueError(
                f"{self.name} is in {self.space} at t={self.t}, {other.name} in {other.space} at t={other.t}; "
                "boundaries combine within one space and timestep"
            )
        if other.provenance["model"] is not None:
            self._refuse_other_model(other.provenance["model"], other.name)

    def _refuse_other_model(self, model: dict | None, whose: str) -> None:
        refuse_other_model(self.name, self.provenance["model"], model, whose=whose, tap=self.space == "h")


def move_jointly(
    z: Points,
    boundaries: Sequence[Boundary],
    *,
    to: np.ndarray | Sequence[float],
    mode: str = "absolute",
    keep_norm: bool = False,
) -> Points:
    """Move samples to wanted distances from several boundaries at once, by the shortest way.

    With the normals as the rows of N and the wanted changes of the distances as l, the shift of minimal norm is
    N' (N N')^-1 l. A sample that has nothing to change stays the same to the bit.

    Parameters
    ----------
    z : array or Tensor of shape (n, C, h, w) or (n, C*h*w)
    boundaries : sequence of m Boundary
        Of one space and timestep.
    to : array of shape (m,) or (n, m)
        "absolute": signed distance afterwards. "shift": change of the distance. "mirror": change as a multiple of
        the distance itself, so that -1 leads onto the boundary and -2 to its other side, as far away.
    mode : {"absolute", "shift", "mirror"}
    keep_norm : bool, default False
        Shorten what is orthogonal to the normals, so that each sample keeps its length: a move on a great circle. The
        wanted distances are still reached.

    Returns
    -------
    As z

    Raises
    ------
    ValueError
        If shapes don't match, normals lie in each other's span, or a sample is shorter than a move that keeps its norm
        would make it.
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
        raise ValueError(f"the normals of {names} lie in each other's span; no move reaches distances that differ")
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
            raise ValueError(
                f"a sample has length {length:.4g}, and where it is to go there is no "
                "point of that length; ask for smaller distances, or keep_norm=False"
            )
        with np.errstate(invalid="ignore", divide="ignore"):
            factor = np.sqrt(room / (outside**2).sum(axis=1))
        moved = inside + factor[:, None] * outside
    moved[~change.any(axis=1)] = rows[~change.any(axis=1)]
    if torch.is_tensor(z):
        return torch.from_numpy(moved).to(z).view_as(z)
    return moved.astype(np.asarray(z).dtype).reshape(np.shape(z))


def change_of(distances: np.ndarray, to: np.ndarray | Sequence[float], mode: str) -> np.ndarray:
    """By how much a move changes distances.

    Parameters
    ----------
    distances : ndarray of shape (n, m)
    to : array of shape (m,) or (n, m)
    mode : {"absolute", "shift", "mirror"}
        As in `move_jointly`.

    Returns
    -------
    ndarray of shape (n, m)
    """
    if mode not in MODES:
        raise ValueError(f"mode {mode!r} is not known; it is one of {', '.join(MODES)}")
    wanted = np.asarray(to, dtype=np.float64)
    n, m = distances.shape
    if wanted.shape not in ((m,), (n, m)) or not np.isfinite(wanted).all():
        raise ValueError(
            f"distances to move {n} samples to from {m} boundaries are finite and of shape ({m},) or ({n}, {m}), not "
            f"{wanted.shape}"
        )
    if mode == "absolute":
        return wanted - distances
    return wanted * distances if mode == "mirror" else np.broadcast_to(wanted, distances.shape)


def _rows(z: Points, boundary: Boundary) -> np.ndarray:
    """The samples, (n, d), float64."""
    values = z.detach().cpu().numpy() if torch.is_tensor(z) else np.asarray(z)
    if values.ndim < 2 or math.prod(values.shape[1:]) != boundary.normal.numel():
        shape = ", ".join(map(str, boundary.normal.shape))
        raise ValueError(
            f"samples of shape {values.shape} don't fit {boundary.name}, whose {boundary.space}_t have shape "
            f"(n, {shape})"
        )
    return values.reshape(len(values), -1).astype(np.float64)


# Fitting


@dataclass(frozen=True, eq=False)
class _Source:
    """Samples at a timestep, what they are known by, and where they come from."""

    values: np.ndarray
    shape: tuple[int, ...]
    origin: dict
    seeds: tuple[int, ...] | None = None
    names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.values)


def fit_boundary(
    source: Samples,
    labels: Labels,
    *,
    t: int,
    space: str = "h",
    method: str = "svm",
    C: float = 1.0,
    balance: bool = False,
    cv: int = 5,
    seed: int = 0,
    wanted: float | None = None,
    name: str | None = None,
) -> Boundary:
    """The hyperplane between the samples with and without an attribute (Zhu et al. 2023, boundary search).

    "svm" is their linear support vector machine: `SVC(kernel="linear", C=C)`, fitted through the inner products. With
    fewer samples than dimensions the classes can be separated, the margin is hard and a larger C changes nothing.
    "mean" has the difference of the classes' means as its normal and the point halfway between them on the boundary;
    the squared lengths of the means are taken without each sample's product with itself, which would put the boundary
    too near to the larger class. "lda" is Fisher's discriminant with Ledoit-Wolf shrinkage, "logistic" is logistic
    regression; both work in the samples' principal components, "logistic" with the first scaled to variance 1.
    Of many samples "svm", "lda" and "logistic" tell classes apart best, by whatever is least noisy; "mean" points to
    what differs most, which is the better way to move when editing.

    Means, deviations and accuracies come from cross-validation: each sample is measured against a boundary that was
    fitted without it. For those of a set of its own see `Boundary.measured`.

    Parameters
    ----------
    source : HStore, Trajectory with records, or array of shape (n, ...)
        The samples. Of an array neither model nor timestep can be checked.
    labels : Series, or array of shape (n,), values 0 or 1
        A Series is matched by its index: the seeds of the samples, or the file names of inverted images where a store
        knows them. An array, or a Series numbered 0..n-1 where these are not the seeds, is in the order of the samples.
    t : int
        Timestep; the paper's mixing step.
    space : {"h", "x"}
    method : {"svm", "mean", "lda", "logistic"}
    C : float, default 1
        For "svm" and "logistic": inverse strength of the regularisation.
    balance : bool, default False
        Give both classes the same total weight in the fit, and put the boundary halfway between the means of their
        held-out samples. Where the margin is hard the weights change nothing, and of a rare class almost all new
        samples fall on the other side.
    cv : int, default 5
        Folds, at most as many as the smaller class has samples.
    seed : int, default 0
        Of the folds.
    wanted : float in (0.5, 1), optional
        Warn if the held-out accuracy stays below, with the number of samples that `expected_accuracy` asks for.
    name : str, optional
        By default that of the Series.

    Returns
    -------
    Boundary

    Raises
    ------
    ValueError
        If the timestep was not visited (the nearest two are named) or not recorded, the method or space is not known,
        or labels are of another length or index than the samples, missing, not 0 or 1, or have fewer than 3 samples of
        a class.
    """
    name = name or name_of(labels, "label")
    found = _fit_all(source, {name: labels}, t=t, space=space, method=method, C=C, balance=balance, cv=cv, seed=seed)
    _warn_if_below(found[name], wanted)
    return found[name]


def fit_boundaries(
    source: Samples,
    labels: pd.DataFrame,
    *,
    t: int,
    space: str = "h",
    method: str = "svm",
    C: float = 1.0,
    balance: bool = False,
    cv: int = 5,
    seed: int = 0,
    wanted: float | None = None,
) -> dict[str, Boundary]:
    """The boundaries of many attributes, each as `fit_boundary` finds it, from one matrix of inner products.

    Parameters
    ----------
    source : HStore, Trajectory with records, or array of shape (n, ...)
    labels : DataFrame of shape (n, attributes), values 0 or 1
        Matched by its index, as there.
    t, space, method, C, balance, cv, seed, wanted
        As there.

    Returns
    -------
    dict of attribute -> Boundary

    Raises
    ------
    ValueError
        As `fit_boundary`, naming the attribute.
    """
    if not isinstance(labels, pd.DataFrame) or labels.columns.empty or not labels.columns.is_unique:
        raise ValueError("fit_boundaries takes a DataFrame with one column an attribute, each of its own name")
    columns = {str(attribute): labels[attribute] for attribute in labels.columns}
    found = _fit_all(source, columns, t=t, space=space, method=method, C=C, balance=balance, cv=cv, seed=seed)
    for boundary in found.values():
        _warn_if_below(boundary, wanted)
    return found


def load_boundary(
    path: str | Path, *, model: Model | None = None, t: int | None = None, space: str | None = None
) -> Boundary:
    """Read a boundary that `Boundary.save` wrote.

    Parameters
    ----------
    path : path
    model : Model, optional
        Refuse a boundary of other weights or another tap.
    t : int, optional
        Refuse one of another timestep.
    space : {"h", "x"}, optional
        Refuse one of another space.

    Returns
    -------
    Boundary

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the file is corrupt, is not a boundary, or is one of another model, tap, timestep or space.
    """
    tensors, about = load_tensors(path, kind="boundary")
    rates = {key: None if about[key] is None else Estimate(**about[key]) for key in ("accuracy", "balanced_accuracy")}
    pairs = {key: None if about[key] is None else tuple(about[key]) for key in ("means", "deviations")}
    found = Boundary(**{**tensors, **about, **rates, **pairs})
    if model is not None:
        found.check_fits(model)
    for what, own, asked in (("timestep", found.t, t), ("space", found.space, space)):
        if asked is not None and own != asked:
            raise ValueError(f"{path} holds a boundary of {what} {own}, asked for is {asked}; fit one there")
    return found


def random_boundary(boundary: Boundary, *, seed: int) -> Boundary:
    """A boundary with a random normal and all else the same: the control of any found boundary.

    Moves along it are compared at the same length (mode "shift"); its distances mean nothing.

    Parameters
    ----------
    boundary : Boundary
    seed : int

    Returns
    -------
    Boundary
    """
    values = torch.from_numpy(np.random.default_rng(seed).standard_normal(boundary.normal.shape))
    return replace(
        boundary,
        normal=values / values.norm(),
        name=f"random {seed} like {bracketed(boundary.name)}",
        provenance={**boundary.provenance, "method": "random", "parameters": {"seed": seed}},
        accuracy=None,
        balanced_accuracy=None,
        extras={},
    )


def _fit_all(
    source: Samples,
    labels: dict[str, Labels],
    *,
    t: int,
    space: str,
    method: str,
    C: float,
    balance: bool,
    cv: int,
    seed: int,
) -> dict[str, Boundary]:
    if method not in METHODS:
        raise ValueError(f"method {method!r} is not known; it is one of {', '.join(METHODS)}")
    if cv < 2 or not C > 0:
        raise ValueError(f"cv is {cv} and C is {C}; there are 2 folds or more, and C is above 0")
    samples = _source_of(source, t, space)
    classes = {
        name: check_classes(matched(samples, values, f"the labels {name!r}"), name) for name, values in labels.items()
    }
    for name, y in classes.items():
        if min(y.sum(), (~y).sum()) < 3:
            raise ValueError(
                f"{name!r} has {y.sum()} positives and {(~y).sum()} negatives; a boundary needs at least 3 of each, "
                "so that 2 are left when one is held out"
            )
    products = gram(samples.values)
    mean = samples.values.mean(axis=0, dtype=np.float64)
    found = {}
    for name, y in classes.items():
        duals, offset = _duals(products, y, method, C, balance)
        weights = sum(duals[i] * row.astype(np.float64) for i, row in enumerate(samples.values) if duals[i])
        length = float(np.linalg.norm(weights))
        if not length > 0.0:
            raise ValueError(f"the classes of {name!r} have the same mean; there is no boundary between them")
        separation, d = class_separation(products, y)
        distances, middle = _cross_validated(products, y, method, C, balance, cv, seed)
        parameters = {
            "C": C,
            "balance": balance,
            "cv": cv,
            "seed": seed,
            "positives": int(y.sum()),
            "negatives": int((~y).sum()),
            "labels": digest_of(y),
        }
        found[name] = Boundary(
            normal=torch.from_numpy(weights / length).view(samples.shape),
            intercept=(offset - float(weights @ mean)) / length - middle,
            t=int(t),
            space=space,
            name=name,
            provenance={**samples.origin, "method": method, "parameters": parameters},
            **_held_out(distances, y, cross_validated=True),
            extras={
                "weight_norm": length,
                "training_accuracy": float(((products @ duals + offset > middle * length) == y).mean()),
                "class_distance": separation,
                "dimensions": d,
            },
        )
    return found


def _source_of(source: Samples, t: int, space: str) -> _Source:
    _check_space(space)
    if isinstance(source, HStore):
        values, shape, seeds, names = source.at(t, space=space), source.shape_of(space), source.seeds, source.names
        origin = {**origin_of(source), "timesteps": list(source.timesteps)}
    elif isinstance(source, Trajectory):
        if space == "h" and source.h is None:
            raise ValueError("this run has no h; sample or invert with record_h=True")
        values = source.h.at(t) if space == "h" else source.x_at(t).numpy()
        shape = source.model.h_shape if space == "h" else source.model.image_shape
        seeds, names = source.seeds, None
        inverted = None if seeds is not None else {"fingerprint": fingerprint(source.x0), "n": len(source)}
        origin = {
            "model": source.model.provenance(),
            "etas": list(source.etas),
            "seeds": None if seeds is None else list(seeds),
            **({"images": inverted} if inverted else {}),
            "timesteps": list(source.timesteps),
        }
    else:
        array = source.detach().cpu().numpy() if torch.is_tensor(source) else np.asarray(source)
        values, shape, seeds, names = array, array.shape[1:], None, None
        origin = {"model": None, "etas": None, "seeds": None}
    return _Source(check_samples(values, t=t), shape, origin, seeds, names)


def _check_space(space: str) -> None:
    if space not in SPACES:
        raise ValueError(f'space {space!r} is not known; it is "h" or "x"')


def _duals(products: np.ndarray, y: np.ndarray, method: str, C: float, balance: bool) -> tuple[np.ndarray, float]:
    """Weights a of the samples and offset b of a linear classifier, f(z) = sum a_i z_i.z + b, from products z_i.z_j.

    The weights sum to 0, so that the same hold for samples that are all moved by the same.
    """
    a = np.zeros(len(y))
    if method == "svm":
        machine = SVC(kernel="precomputed", C=C, class_weight="balanced" if balance else None).fit(products, y)
        a[machine.support_] = machine.dual_coef_[0]
        return a, float(machine.intercept_[0])
    if method == "mean":
        a = y / y.sum() - ~y / (~y).sum()
        squares = [_mean_square(products, side) for side in (~y, y)]
        return a, (squares[0] - squares[1]) / 2
    row = products.mean(axis=0)
    values, vectors = np.linalg.eigh(products - row - row[:, None] + row.mean())
    kept = values > 1e-10 * values[-1]
    scale = np.sqrt(values[kept])
    unit = 1.0
    if method == "lda":
        priors = [0.5, 0.5] if balance else None
        estimator = LinearDiscriminantAnalysis(solver="lsqr", covariance_estimator=LedoitWolf(), priors=priors)
    else:
        unit = scale[-1] / np.sqrt(len(y))
        estimator = LogisticRegression(C=C, max_iter=1000, class_weight="balanced" if balance else None)
    estimator.fit(vectors[:, kept] * (scale / unit), y)
    a = vectors[:, kept] @ (estimator.coef_[0] / unit / scale)
    a -= a.mean()
    return a, float(estimator.intercept_[0] - row @ a)


def _mean_square(products: np.ndarray, side: np.ndarray) -> float:
    """Squared length of a class' mean, without bias: from the products of different samples alone."""
    m = side.sum()
    inner = products[np.ix_(side, side)]
    return float((inner.sum() - np.trace(inner)) / (m * (m - 1)))


def _cross_validated(
    products: np.ndarray, y: np.ndarray, method: str, C: float, balance: bool, cv: int, seed: int
) -> tuple[np.ndarray, float]:
    """Signed distances from the boundaries that are fitted to the other folds, (n,), and what was taken off.

    Balanced, the middle of the classes' means is taken off: in the distances of a fold, that of the other folds.
    """
    folds = StratifiedKFold(min(cv, int(y.sum()), int((~y).sum())), shuffle=True, random_state=seed)
    splits, distances = list(folds.split(products, y)), np.empty(len(y))
    for train, test in splits:
        inner = products[np.ix_(train, train)]
        a, b = _duals(inner, y[train], method, C, balance)
        distances[test] = (products[np.ix_(test, train)] @ a + b) / np.sqrt(a @ inner @ a)
    if not balance:
        return distances, 0.0
    middles = np.empty(len(y))
    for train, test in splits:
        middles[test] = _middle(distances[train], y[train])
    return distances - middles, _middle(distances, y)


def _middle(distances: np.ndarray, y: np.ndarray) -> float:
    return float(distances[y].mean() + distances[~y].mean()) / 2


def _held_out(distances: np.ndarray, y: np.ndarray, *, cross_validated: bool = False) -> dict:
    """What a boundary says of samples that it was not fitted on."""
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


# How many samples


def expected_accuracy(delta: float, d: int, n: int) -> float:
    """Accuracy that a linear boundary reaches from n samples in d dimensions.

    Two classes of n/2 samples each have isotropic noise of deviation 1, and means at a distance delta. The difference
    of the sample means has the cosine delta / sqrt(delta^2 + 4 d / n) to the true one, which gives

    accuracy = Phi(delta^2 / (2 sqrt(delta^2 + 4 d / n))),

    and Phi(delta / 2) for n -> infinity. It holds for "mean", and for "svm" nearly, where the noise is isotropic; where
    it is not, machines that learn its covariance ("svm", "lda") pass it with many samples.

    Parameters
    ----------
    delta : float
        Distance of the means over the noise's deviation along one axis.
    d : int
        Number of dimensions.
    n : int
        Number of samples, both classes together.

    Returns
    -------
    float in [0.5, 1]
    """
    return float(norm.cdf(delta**2 / (2 * math.sqrt(delta**2 + 4 * d / n)))) if delta > 0 else 0.5


def samples_needed(accuracy: float, *, delta: float, d: int) -> float:
    """The n at which `expected_accuracy` reaches an accuracy.

    Parameters
    ----------
    accuracy : float in (0.5, 1)
    delta : float
    d : int

    Returns
    -------
    float
        inf if no number of samples does.
    """
    q = float(norm.ppf(accuracy))
    rest = delta**4 / (4 * q**2) - delta**2
    return 4 * d / rest if rest > 0 else math.inf


def class_separation(products: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """delta and d of `expected_accuracy` for samples whose noise is not isotropic, from their inner products.

    With D the difference of the true means and S the covariance within the classes, the difference v of the sample
    means separates new samples by |D|^2 with the variance v'Sv = D'SD + (1/n+ + 1/n-) tr S^2, on average. That is the
    law for delta = |D| / s and d = tr S^2 / s^4, where s^2 = D'SD / |D|^2 is the noise along D; isotropic noise has
    d dimensions. |D|^2, D'SD and tr S^2 are estimated without bias, as for Gaussian noise; s^2 is taken as at least a
    tenth of tr S^2 / tr S, below which few samples can't tell it from 0.

    Parameters
    ----------
    products : ndarray of shape (n, n)
        Of at least 4 samples.
    y : ndarray of shape (n,), bool
        At least 2 of each class.

    Returns
    -------
    delta, d : float
        delta is 0 where the means are not farther apart than noise puts them.
    """
    n, share = len(y), 1 / y.sum() + 1 / (~y).sum()
    a = y / y.sum() - ~y / (~y).sum()
    average = np.where(y[:, None] == y, 1.0, 0.0)
    average /= average.sum(axis=1, keepdims=True)
    centre = np.eye(n) - average
    within, dof = centre @ products @ centre, n - 2
    trace, square = np.trace(within) / dof, (within**2).sum() / dof**2
    # tr S^2 of a sample covariance is too large by what its noise adds (Gaussian, `dof` degrees of freedom).
    square = dof**2 / ((dof - 1) * (dof + 2)) * (square - trace**2 / dof)
    square = max(square, trace**2 * 1e-12)
    distance = a @ products @ a - share * trace
    if distance <= 0.0:
        return 0.0, trace**2 / square
    along = ((centre @ products @ a) ** 2).sum() / dof - share * square
    s2 = max(along / distance, 0.1 * square / trace)
    return float(np.sqrt(distance / s2)), float(square / s2**2)


def _warn_if_below(boundary: Boundary, wanted: float | None) -> None:
    if wanted is None:
        return
    if not 0.5 < wanted < 1.0:
        raise ValueError(f"wanted is {wanted}; an accuracy to ask for lies between 0.5 and 1")
    if boundary.accuracy.value >= wanted:
        return
    delta, d = boundary.extras["class_distance"], boundary.extras["dimensions"]
    needed = samples_needed(wanted, delta=delta, d=d)
    law = f"the sample-size law asks for about {needed:.0f}" if needed < math.inf else "the law says no number does"
    if needed <= boundary.accuracy.n:
        law = f"the sample-size law expects {expected_accuracy(delta, d, boundary.accuracy.n):.0%} from that many"
    warnings.warn(
        f"{boundary.name} in {boundary.space} at t={boundary.t} has a held-out accuracy of {boundary.accuracy}, below "
        f"the {wanted:.0%} asked for; {law}",
        stacklevel=3,
    )
