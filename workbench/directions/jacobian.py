"""Spectra of the denoiser's Jacobians: directions that one image at one timestep is most sensitive to."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Trajectory, replay
from workbench.directions.direction import Direction, deviations, origin_of
from workbench.directions.linearised import Linearised
from workbench.directions.singular_vectors import top_singular_vectors
from workbench.hspace.store import HStore
from workbench.io import one_of


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Top of the spectrum of one Jacobian J at one x_t.

    Attributes
    ----------
    singular_values : ndarray of shape (k,), float64, decreasing
        Of LOCO-Edit, whose vectors are projected: the lengths ||M J v||, in the order of the vectors before that.
    right : Tensor of shape (k, ...), float32
        Right singular vectors, of length 1, in the space that the map starts from; of LOCO-Edit, projected.
    left : Tensor of shape (k, ...), float32
        Left singular vectors, of length 1: the change of the output along each. Zero outside of a mask.
    inside_mask : ndarray of shape (k,), values in [0, 1]
        Share ||M J v||^2 / ||J v||^2 of each vector's effect that lies inside the mask; 1 without one.
    residuals : ndarray of shape (k,)
        ||J'J v_i - sigma_i^2 v_i|| / sigma_i^2: some sigma^2 of J lies within this relative distance. NaN of LOCO-Edit.
    iterations, products : int
        How many batches were multiplied with J'J, and how many vectors with J or J' in all.
    map : {"h->eps", "h->x0", "x->h", "x->x0"}
    t : int
    """

    singular_values: np.ndarray
    right: torch.Tensor = field(repr=False)
    left: torch.Tensor = field(repr=False)
    inside_mask: np.ndarray
    residuals: np.ndarray
    iterations: int
    products: int
    map: str
    t: int

    def __repr__(self) -> str:
        values, worst = ", ".join(f"{s:.3g}" for s in self.singular_values), self.residuals.max()
        error = "projected" if np.isnan(worst) else f"residual up to {worst:.1g}"
        what = f"{self.map}, t={self.t}, singular values {values}"
        return f"{type(self).__name__}({what}, {self.products} products, {error})"


@dataclass(frozen=True, eq=False, repr=False)
class JacobianSpectrum(Spectrum, Sequence):
    """A spectrum of d eps / d h or d P_t / d h; a sequence of its directions, strongest first.

    Attributes
    ----------
    directions : tuple of Direction
        Each applies the vector that was found at `t` at all of the run's timesteps, as Haas et al. do.
    """

    directions: tuple[Direction, ...]

    def __len__(self) -> int:
        return len(self.directions)

    def __getitem__(self, index):
        return self.directions[index]


def find_jacobian(
    model: Model,
    run: Trajectory,
    *,
    t: int,
    k: int = 3,
    mask: np.ndarray | torch.Tensor | None = None,
    output: str = "eps",
    population: HStore | None = None,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> JacobianSpectrum:
    """Find the directions of h that change one sample's denoised image most (Haas et al., Algorithms 1 and 2).

    These are the top right singular vectors of J = d eps / d h at the sample's own x_t, with the skip connections held
    fixed (Haas et al. eq. 7). The encoder runs once; all products run through the decoder alone.

    Parameters
    ----------
    model : Model
    run : Trajectory
        One sample, e.g. `run[0]`, of any eta: J is taken at the x_t that this run visited.
    t : int
        A timestep that the run visited.
    k : int, default 3
    mask : bool array of shape (H, W), (1, H, W) or (C, H, W), optional
        Only these pixels of the output count (Haas et al. eqs. 9-10).
    output : {"eps", "x0"}
        The predicted noise or the predicted image. Both have the same right singular vectors (Haas et al., SM C).
    population : HStore, optional
        With a population, one unit of scale of each direction is one sigma of its projection, timestep by timestep, as
        for every other method. Without one, a unit is the root mean square of the entries of the sample's own h_t, an
        order-of-magnitude stand-in. `provenance["parameters"]["sigma"]` says which. The authors' released code weights
        the vector of t by the singular values of every timestep instead, which makes an edit act later in the chain: of
        `avataaars32`, relative to t = 600, 14 times as much at t = 0, where sigma is 2 times as large.
    tol : float, default 1e-6
        Relative error of the singular values. The search stops when the residuals r are below sqrt(tol) / 3: with a gap
        to the next value, the error of a value is r^2 / (2 gap), and that of a vector about r / gap radians.
    max_iterations : int, default 1000
        Restarts of the Lanczos method, or iterations of each block.
    block : int, optional
        By default the Lanczos method (ARPACK) finds the vectors with the fewest products. With a number, the subspace
        iteration of the paper does: in one block of at least k vectors by Algorithm 1, or in smaller blocks, each
        orthogonal to the previous ones, by Algorithm 2. A block is multiplied in one batch. Blocks beyond k converge
        faster, and blocks find repeated values, which the Lanczos method can miss.
    seed : int
        Seed of the random start.
    progress : bool

    Returns
    -------
    JacobianSpectrum
        Each vector's largest entry is positive; the sign of a singular vector means nothing else.

    Raises
    ------
    ValueError
        If the run is not one sample of this model, did not visit `t`, or an argument does not fit.
    RuntimeError
        If the search does not converge.
    """
    _check_run(model, run)
    one_of("output", output, ("eps", "x0"))
    if population is not None:
        _check_population(population, model, run)
    rows = _check_mask(mask, model)
    x_t = run.x_at(t).to(model.device)
    with torch.no_grad():
        bottleneck = model.encode(x_t, t)

    def decode(h: torch.Tensor) -> torch.Tensor:
        eps = model.decode(bottleneck.repeat(len(h)).with_h(h))
        return eps if output == "eps" else model.schedule.predict_x0(x_t, eps, t)

    settings = {"tol": tol, "max_iterations": max_iterations, "block": block, "seed": seed}
    linear = Linearised(decode, bottleneck.h, width=block or 1)
    found = _spectrum(linear, k, rows, progress=progress, **settings)
    mask_record, kept = None, {}
    if rows is not None:
        digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
        mask_record = {"outputs": int(rows.sum()), "sha256": digest}
    if population is not None:
        kept = {"n": len(population), **origin_of(population)}
        del kept["model"]
    parameters = {
        "t": int(t),
        "k": k,
        "output": output,
        "mask": mask_record,
        **settings,
        "sigma": "rms of the sample's h" if population is None else "population",
        "population": kept,
    }
    provenance = {
        "model": model.provenance(),
        "etas": list(run.etas),
        "method": "jacobian",
        "seeds": None if run.seeds is None else list(run.seeds),
    }
    right = found["right"]
    if population is None:
        sigmas = [_rms_of_h(model, run, progress)] * k
    else:
        units = right.flatten(1).numpy()
        sigmas = deviations(population, dict.fromkeys(run.timesteps, units), progress=progress)
    directions = tuple(
        Direction(
            v.expand(run.steps, *v.shape),
            sigma,
            run.timesteps,
            f"jacobian {i + 1} t={t}",
            {**provenance, "parameters": {**parameters, "component": i}},
            {
                "singular_value": float(found["singular_values"][i]),
                "residual": float(found["residuals"][i]),
                "inside_mask": float(found["inside_mask"][i]),
            },
        )
        for i, (v, sigma) in enumerate(zip(right, sigmas, strict=True))
    )
    return JacobianSpectrum(**found, map=f"h->{output}", t=int(t), directions=directions)


def find_pullback(
    model: Model,
    run: Trajectory,
    *,
    t: int,
    k: int = 3,
    map: str = "x->x0",
    mask: np.ndarray | torch.Tensor | None = None,
    nullspace: int = 0,
    tol: float = 1e-6,
    max_iterations: int = 1000,
    block: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Spectrum:
    """Find directions of x_t instead of h, for comparison: the pullback of Park et al., or LOCO-Edit.

    Edit along one with `wb.MoveX(found.right[0], t, "name")`.

    Parameters
    ----------
    model, run, t, k
        As in `find_jacobian`.
    map : {"x->h", "x->x0"}
        d h / d x_t (Park et al. 2023, arXiv 2307.12868), or d P_t / d x_t (LOCO-Edit, arXiv 2409.02374).
    mask : bool array, optional
        As in `find_jacobian`; only for "x->x0".
    nullspace : int, default 0
        Project the top `nullspace` right singular vectors of the rows outside of the mask out of each vector
        (LOCO-Edit: v_p = (I - V V') v, normalised).
    tol, max_iterations, block, seed, progress
        As in `find_jacobian`.

    Returns
    -------
    Spectrum

    Raises
    ------
    ValueError, RuntimeError
        As `find_jacobian`; also for a mask with "x->h", and for `nullspace` without a mask.
    """
    _check_run(model, run)
    one_of("map", map, ("x->h", "x->x0"))
    rows = _check_mask(mask, model)
    if rows is not None and map == "x->h":
        raise ValueError("a mask selects pixels of the output, and the output of x->h has none; leave it out")
    if nullspace < 0 or (nullspace and (rows is None or rows.all())):
        raise ValueError(f"nullspace is {nullspace}; it is 0, or the number of vectors to avoid outside of a mask")
    x_t = run.x_at(t).to(model.device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model.encode(x, t).h if map == "x->h" else model.schedule.predict_x0(x, model(x, t), t)

    settings = {"tol": tol, "max_iterations": max_iterations, "block": block, "seed": seed, "progress": progress}
    linear = Linearised(forward, x_t, width=block or 1)
    found = _spectrum(linear, k, rows, **settings)
    if nullspace:
        avoided = _spectrum(linear, nullspace, ~rows, **settings)
        v, outside = found["right"].flatten(1), avoided["right"].flatten(1)
        v = torch.nn.functional.normalize(v - (v @ outside.T) @ outside)
        effect = linear.jvp(v)
        inside = effect * rows
        lengths = inside.norm(dim=1)
        found |= {
            "right": v.view_as(found["right"]),
            "left": (inside / lengths[:, None]).float().view_as(found["left"]),
            "singular_values": lengths.numpy(),
            "inside_mask": (lengths.square() / effect.square().sum(dim=1)).numpy(),
            "residuals": np.full(k, np.nan),  # they are no singular vectors
            "products": found["products"] + avoided["products"] + k,
        }
    return Spectrum(**found, map=map, t=int(t))


def _spectrum(
    linear: Linearised,
    k: int,
    rows: torch.Tensor | None,
    *,
    block: int | None,
    **settings,
) -> dict:
    """Fields of a `Spectrum`: of the rows of J that a mask keeps."""
    n, d = (shape.numel() for shape in linear.shapes)
    kept = torch.ones(n, dtype=torch.bool) if rows is None else rows
    most = min(int(kept.sum()), d - 1)
    if not 1 <= k <= most or (block is not None and not 1 <= block < d):
        of = "" if rows is None else " inside the mask"
        raise ValueError(f"k is {k} and block {block}; with {int(kept.sum())} outputs{of} k lies in 1..{most}")
    found = top_singular_vectors(
        lambda v: linear.jvp(v) * kept, lambda u: linear.vjp(u * kept), k, d=d, block=block, **settings
    )
    inside, products = torch.ones(k, dtype=torch.double), found.products
    if rows is not None:
        effect = linear.jvp(found.right).square()
        inside, products = (effect * kept).sum(1) / effect.sum(1), products + k
    return {
        "singular_values": found.values.numpy(),
        "right": found.right.float().view(-1, *linear.shapes[1]),
        "left": found.left.float().view(-1, *linear.shapes[0]),
        "inside_mask": inside.numpy(),
        "residuals": found.residuals.numpy(),
        "iterations": found.iterations,
        "products": products,
    }


def _check_run(model: Model, run: Trajectory) -> None:
    if len(run) != 1:
        raise ValueError(f"a Jacobian belongs to one sample, and this run has {len(run)}; give run[0]")
    remedy = "sample or invert with the same model"
    refuse_other_model("the run", run.model.provenance(), model.provenance(), tap=False, remedy=remedy)
    if model.dtype != torch.float32:
        raise ValueError(f"a Jacobian's spectrum needs float32; load {model.name} in it, not in {model.dtype}")
    if model.compiled:
        raise ValueError(f"{model.name} is compiled, which keeps no derivatives; load it with compile=False")


def _check_population(population: HStore, model: Model, run: Trajectory) -> None:
    refuse_other_model(str(population.path), population.provenance["model"], model.provenance())
    missing = sorted(set(run.timesteps) - set(population.timesteps), reverse=True)
    if missing:
        lacks = f"{len(missing)} of the run's {run.steps} timesteps, such as {missing[0]}"
        raise ValueError(f"{population.path} lacks {lacks}; extract it with the same steps as the run")
    if len(population) < 2:
        raise ValueError("a store of one sample has no standard deviation; give at least two")


def _check_mask(mask: np.ndarray | torch.Tensor | None, model: Model) -> torch.Tensor | None:
    """The rows of J that a mask keeps: bool tensor of shape (C*H*W,). A latent is kept with any of its pixels."""
    if mask is None:
        return None
    mask, (channels, height, width) = torch.as_tensor(mask).cpu(), model.image_shape
    allowed = [(height, width), (1, height, width), (channels, height, width)]
    if tuple(mask.shape) not in allowed:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; this model takes {', '.join(map(str, allowed))}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask is boolean, or of zeros and ones; threshold yours first, e.g. mask > 0.5")
    if not mask.any():
        raise ValueError("the mask is empty; set at least one pixel to True")
    if model.latent:
        pixels = mask.float().expand(1, channels, height, width).amax(dim=1)
        mask = torch.nn.functional.adaptive_max_pool2d(pixels, model.x_shape[1:])
    return mask.bool().expand(model.x_shape).flatten()


def _rms_of_h(model: Model, run: Trajectory, progress: bool) -> torch.Tensor:
    """Root mean square of the entries of the sample's h_t, one per timestep."""
    if run.h is None or run.model.tap != model.tap:
        run = replay(replace(run, model=model), record_h=True, progress=progress)
    return run.h.values[:, 0].flatten(1).square().mean(dim=1).sqrt()
