"""Spectra of the denoiser's Jacobians: directions that one image at one timestep is most sensitive to.

All maps go through one block iteration. It takes the products of Algorithms 1 and 2 of Haas et al. (arXiv 2303.11073),
J V with all tangents in one batch and then J' (J V), but keeps every block that it has seen: the Rayleigh-Ritz step
runs over all of them, and the next block holds the residuals of its vectors. That is the block Krylov method (Golub,
Luk and Overton 1981; Musco and Musco 2015, arXiv 1504.05477), in Davidson's form, which survives new starts. It takes
about half the products of the plain subspace iteration for the same accuracy.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, replay
from workbench.directions.direction import Direction, origin_of
from workbench.hspace.store import HStore

OUTPUTS = ("eps", "x0")
MAPS = ("x->h", "x->x0")

VANISHED = 1e-12
"""Part of its length below which a vector that was orthogonalised in float64 is rounding noise."""

ROUNDING = 1e-6
"""Relative size below which a singular value is rounding noise of the network's float32."""


@dataclass(frozen=True)
class Convergence:
    """How a block iteration went.

    Attributes
    ----------
    iterations : int
        Each is one batched product with J and one with J'.
    change : tuple of float
        Largest relative change of the top singular values, one an iteration; NaN where there is nothing to compare.
    angle : tuple of float
        Largest angle in radians between the spaces of the top right singular vectors before and after an iteration.
    residuals : tuple of float
        ||J'J v_i - sigma_i^2 v_i|| / sigma_i^2 of each vector: some sigma^2 of J lies within this relative distance.
    converged : bool
    """

    iterations: int
    change: tuple[float, ...] = field(repr=False)
    angle: tuple[float, ...] = field(repr=False)
    residuals: tuple[float, ...] = field(repr=False)
    converged: bool

    def __repr__(self) -> str:
        state = "converged" if self.converged else "NOT converged"
        return f"Convergence({state} in {self.iterations} iterations, residual up to {max(self.residuals):.1g})"


@dataclass(frozen=True, eq=False)
class JacobianSpectrum(Sequence):
    """Top of the spectrum of d eps / d h at one x_t; a sequence of its directions, strongest first.

    Attributes
    ----------
    directions : tuple of Direction
        Each applies the vector that was found at `t` at all of the run's timesteps, as Haas et al. do.
    singular_values : ndarray of shape (k,), float64, decreasing
    right : Tensor of shape (k, C, h, w), float32
        Right singular vectors, of length 1, in h-space.
    left : Tensor of shape (k, C, H, W), float32
        Left singular vectors, of length 1: what each does to the output. Zero outside of a mask.
    inside_mask : ndarray of shape (k,), values in [0, 1]
        Share ||M J v||^2 / ||J v||^2 of each direction's effect that lies inside the mask; 1 without one.
    t : int
    convergence : Convergence
    """

    directions: tuple[Direction, ...] = field(repr=False)
    singular_values: np.ndarray
    right: torch.Tensor = field(repr=False)
    left: torch.Tensor = field(repr=False)
    inside_mask: np.ndarray
    t: int
    convergence: Convergence

    @property
    def residuals(self) -> np.ndarray:
        """||J'J v_i - sigma_i^2 v_i|| / sigma_i^2; shape (k,)."""
        return np.array(self.convergence.residuals)

    @property
    def warm_start(self) -> torch.Tensor:
        """Where to start at a neighbouring timestep, or for a similar mask: the right singular vectors."""
        return self.right

    def __len__(self) -> int:
        return len(self.directions)

    def __getitem__(self, index):
        return self.directions[index]

    def __repr__(self) -> str:
        values = ", ".join(f"{s:.3g}" for s in self.singular_values)
        return f"JacobianSpectrum(t={self.t}, singular values {values}, {self.convergence})"


@dataclass(frozen=True, eq=False)
class XSpectrum:
    """Top of the spectrum of a map from x_t, for edits of x_t at one timestep.

    Attributes
    ----------
    singular_values : ndarray of shape (k,), float64, decreasing
        Of the map itself, before any null-space projection.
    vectors : Tensor of shape (k, C, H, W), float32
        Directions in x-space, each of length 1: the right singular vectors, projected if that was asked for.
    left : Tensor of shape (k, ...), float32
        Left singular vectors, in the space that the map leads to.
    t : int
    map : {"x->h", "x->x0"}
    convergence : Convergence
    """

    singular_values: np.ndarray
    vectors: torch.Tensor = field(repr=False)
    left: torch.Tensor = field(repr=False)
    t: int
    map: str
    convergence: Convergence

    def edit(self, x_t: torch.Tensor, i: int, scale: float) -> torch.Tensor:
        """x_t + scale * v_i, the single-timestep edit of LOCO-Edit; to be denoised from timestep `t` on.

        Parameters
        ----------
        x_t : Tensor of shape (n, C, H, W)
        i : int
        scale : float
            Length of the step in the units of x_t.

        Returns
        -------
        Tensor of shape (n, C, H, W)
        """
        return x_t + scale * self.vectors[i].to(x_t)

    def __len__(self) -> int:
        return len(self.vectors)

    def __repr__(self) -> str:
        values = ", ".join(f"{s:.3g}" for s in self.singular_values)
        return f"XSpectrum({self.map!r}, t={self.t}, singular values {values}, {self.convergence})"


def find_jacobian(
    model: Model,
    run: Trajectory,
    *,
    t: int,
    k: int = 3,
    mask: np.ndarray | torch.Tensor | None = None,
    output: str = "eps",
    population: HStore | None = None,
    oversample: int = 0,
    tol: float = 1e-4,
    max_iterations: int = 40,
    block: int | None = None,
    warm_start: JacobianSpectrum | torch.Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> JacobianSpectrum:
    """The directions of h that change one sample's denoised image the most (Haas et al., Algorithms 1 and 2).

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
        With it, one unit of scale of each direction is one sigma of the population's projection, timestep by timestep,
        as for every other method. Without it, there is no population to measure: one unit is the root mean square of
        the entries of the sample's own h_t, an order-of-magnitude stand-in. `provenance["parameters"]["sigma"]` says
        which.
    oversample : int, default 0
        Vectors beyond k in a block. More of them need fewer but dearer iterations, which may pay on an accelerator. The
        plain subspace iteration needs them to converge; with all blocks kept they are not needed.
    tol : float, default 1e-4
        Stop when the singular values change by less than this, relatively, their space turns by less than sqrt(tol)
        radians and the residuals are below sqrt(tol), since an error of the vectors enters the values squared. The
        error that is left is smaller than the last change, by about one iteration's progress.
    max_iterations : int, default 40
    block : int, optional
        Take this many tangents at a time instead of k + oversample: Algorithm 2, which needs less memory. Vectors are
        found in batches of this size, each from a new start orthogonal to all that came before. It takes more
        iterations but, on a CPU, about as much time.
    warm_start : JacobianSpectrum or Tensor of shape (m, C, h, w), optional
        Start from these vectors, e.g. the ones of a neighbouring timestep.
    seed : int
        Of the random start.
    progress : bool

    Returns
    -------
    JacobianSpectrum
        Each vector's largest entry is positive; the sign of a singular vector means nothing else.

    Raises
    ------
    ValueError
        If the run is not one sample of this model, did not visit `t`, or an argument does not fit.

    Warns
    -----
    RuntimeWarning
        If it did not converge; the message states the residual.
    """
    _check_run(model, run)
    if output not in OUTPUTS:
        raise ValueError(f"output {output!r} is not known; it is one of {', '.join(OUTPUTS)}")
    if population is not None:
        _check_population(population, model, run)
    rows = _check_mask(mask, model.image_shape)
    x_t = run.x_at(t).to(model.device)
    with torch.no_grad():
        bottleneck = model.encode(x_t, t)

    def decode(h: torch.Tensor) -> torch.Tensor:
        eps = model.decode(bottleneck.repeat(len(h)).with_h(h))
        return eps if output == "eps" else model.schedule.predict_x0(x_t, eps, t)

    if isinstance(warm_start, JacobianSpectrum):
        warm_start = warm_start.warm_start
    found = _find_spectrum(
        _Linearised(decode, bottleneck.h, width=_width(k, oversample, block)),
        k,
        rows=rows,
        block=block,
        warm_start=_check_warm_start(warm_start, model.h_shape),
        tol=tol,
        max_iterations=max_iterations,
        seed=seed,
        progress=progress,
    )
    right = found.right.float().view(-1, *model.h_shape)
    kept = {} if population is None else {"n": len(population), **origin_of(population)}
    kept.pop("model", None)
    parameters = {
        "t": int(t),
        "k": k,
        "output": output,
        "mask": None if rows is None else int(rows.sum()),
        "oversample": oversample,
        "tol": tol,
        "max_iterations": max_iterations,
        "block": block,
        "warm_start": warm_start is not None,
        "seed": seed,
        "sigma": "rms of the sample's h" if population is None else "population",
        "population": kept,
    }
    provenance = {
        "model": model.provenance(),
        "etas": list(run.etas),
        "method": "jacobian",
        "parameters": parameters,
        "seeds": None if run.seeds is None else list(run.seeds),
    }
    sigmas = _rms_of_h(model, run, k, progress) if population is None else _spread(population, run, right, progress)
    directions = tuple(
        Direction(
            v.expand(run.steps, *v.shape),
            sigma,
            run.timesteps,
            f"jacobian {i + 1} t={t}",
            {**provenance, "parameters": {**parameters, "component": i}},
            {
                "singular_value": float(found.singular_values[i]),
                "residual": found.convergence.residuals[i],
                "inside_mask": float(found.inside[i]),
            },
        )
        for i, (v, sigma) in enumerate(zip(right, sigmas, strict=True))
    )
    return JacobianSpectrum(
        directions,
        found.singular_values.numpy(),
        right,
        found.left.float().view(-1, *model.image_shape),
        found.inside.numpy(),
        int(t),
        found.convergence,
    )


def find_pullback(
    model: Model,
    run: Trajectory,
    *,
    t: int,
    k: int = 3,
    map: str = "x->x0",
    mask: np.ndarray | torch.Tensor | None = None,
    nullspace: int = 0,
    oversample: int = 0,
    tol: float = 1e-4,
    max_iterations: int = 40,
    block: int | None = None,
    warm_start: torch.Tensor | None = None,
    seed: int = 0,
    progress: bool = True,
) -> XSpectrum:
    """Directions of x_t instead of h, for comparison: the pullback of Park et al., or LOCO-Edit.

    Parameters
    ----------
    model, run, t, k
        As in `find_jacobian`.
    map : {"x->h", "x->x0"}
        d h / d x_t (Park et al. 2023, arXiv 2307.12868), or d P_t / d x_t (LOCO-Edit, arXiv 2409.02374).
    mask : bool array, optional
        As in `find_jacobian`; only for "x->x0".
    nullspace : int, default 0
        Take out of each vector what lies in the top `nullspace` right singular vectors of the rows outside of the mask
        (LOCO-Edit: v_p = (I - V V') v, normalised).
    oversample, tol, max_iterations, block, warm_start, seed, progress
        As in `find_jacobian`; `warm_start` has shape (m, C, H, W).

    Returns
    -------
    XSpectrum

    Raises
    ------
    ValueError
        As `find_jacobian`; also for a mask of "x->h", and for `nullspace` without a mask.

    Warns
    -----
    RuntimeWarning
        If it did not converge; the message states the residual.
    """
    _check_run(model, run)
    if map not in MAPS:
        raise ValueError(f'map {map!r} is not known; it is one of {", ".join(MAPS)} ("h->eps" is find_jacobian)')
    rows = _check_mask(mask, model.image_shape)
    if rows is not None and map == "x->h":
        raise ValueError("a mask selects pixels of the output, and the output of x->h has none; leave it out")
    if nullspace < 0 or (nullspace and (rows is None or rows.all())):
        raise ValueError(f"nullspace is {nullspace}; it is 0, or the number of vectors to avoid outside of a mask")
    x_t = run.x_at(t).to(model.device)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return model.encode(x, t).h if map == "x->h" else model.schedule.predict_x0(x, model(x, t), t)

    settings = {"block": block, "tol": tol, "max_iterations": max_iterations, "seed": seed, "progress": progress}
    linear = _Linearised(forward, x_t, width=_width(k, oversample, block))
    warm_start = _check_warm_start(warm_start, model.image_shape)
    found = _find_spectrum(linear, k, rows=rows, warm_start=warm_start, **settings)
    vectors = found.right
    if nullspace:
        outside = _find_spectrum(linear, nullspace, rows=~rows, **settings).right
        vectors = vectors - (vectors @ outside.T) @ outside
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return XSpectrum(
        found.singular_values.numpy(),
        vectors.float().view(-1, *model.image_shape),
        found.left.float().view(-1, *linear.y.shape[1:]),
        int(t),
        map,
        found.convergence,
    )


class _Linearised:
    """A map at one point, as products with its Jacobian J there; the map itself runs once, and its graph is kept.

    J' U is reverse mode. J V is reverse mode too, through the graph of J' u, which is linear in u: forward mode has no
    rule for fused attention, none for group norm in the memory format that convolutions are fastest in, and is slower.

    Parameters
    ----------
    f : callable, Tensor of shape (b, *in) -> Tensor of shape (b, *out)
        Treats each of the b alone.
    x : Tensor of shape (1, *in)
    width : int
        Number of vectors in a product.
    """

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, width: int) -> None:
        # A fused attention kernel has no second derivative.
        with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]), _LeanConvolutions():
            self.x = x.detach().repeat_interleave(width, dim=0).requires_grad_()
            self.y = f(self.x)
            self.u = torch.zeros_like(self.y, requires_grad=True)
            (self.w,) = torch.autograd.grad(self.y, self.x, self.u, create_graph=True)

    @property
    def width(self) -> int:
        return len(self.x)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v for each row; (b, d) -> (b, n), float64, on the CPU."""
        return self._product(self.w, self.u, v)

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J' u for each row; (b, n) -> (b, d), float64, on the CPU."""
        return self._product(self.y, self.x, u)

    def _product(self, output: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        products = []
        for part in rows.split(self.width):
            weights = torch.zeros_like(output)
            weights[: len(part)] = part.float().view(-1, *output.shape[1:]).to(weights)
            (product,) = torch.autograd.grad(output, at, weights, retain_graph=True)
            products.append(product[: len(part)].flatten(1).cpu().double())
        return torch.cat(products)


class _LeanConvolutions(TorchFunctionMode):
    """Within it, convolutions skip the weights' gradient, which torch's second derivative computes even if unused."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.conv2d and not kwargs and len(args) == 7 and not isinstance(args[4], str):
            return _LeanConvolution.apply(*args)
        return func(*args, **(kwargs or {}))


class _LeanConvolution(torch.autograd.Function):
    """conv2d that is differentiable, twice, with respect to its input alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding, dilation, groups):
        ctx.save_for_backward(weight)
        ctx.settings = stride, padding, dilation, groups
        reach = [p * 2 - d * (n - 1) - 1 for p, d, n in zip(padding, dilation, weight.shape[2:], strict=True)]
        ctx.unseen = [(size + r) % s for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
        return torch.conv2d(x, weight, bias, stride, padding, dilation, groups)

    @staticmethod
    def backward(ctx, gradient):
        (weight,) = ctx.saved_tensors
        stride, padding, dilation, groups = ctx.settings
        gradient = torch.conv_transpose2d(gradient, weight, None, stride, padding, ctx.unseen, groups, dilation)
        return gradient, None, None, None, None, None, None


@dataclass(frozen=True)
class _Spectrum:
    """Top of a spectrum: right (k, d), singular_values (k,), left (k, n), inside (k,); float64, on the CPU."""

    right: torch.Tensor
    singular_values: torch.Tensor
    left: torch.Tensor
    convergence: Convergence
    inside: torch.Tensor | None = None


def _find_spectrum(linear: _Linearised, k: int, *, rows: torch.Tensor | None, **settings) -> _Spectrum:
    """Top of the spectrum of those rows of J that a mask keeps."""
    n, d = linear.y[0].numel(), linear.x[0].numel()
    kept = torch.ones(n, dtype=torch.bool) if rows is None else rows
    if k < 1 or k > min(int(kept.sum()), d):
        of = "" if rows is None else " inside the mask"
        raise ValueError(f"k is {k}; with {int(kept.sum())} outputs{of} it lies in 1..{min(int(kept.sum()), d)}")
    found = _block_svd(
        lambda v: linear.jvp(v) * kept, lambda u: linear.vjp(u * kept), d, k, width=linear.width, **settings
    )
    inside = torch.ones(k, dtype=torch.double)
    if rows is not None:
        effect = linear.jvp(found.right).square()
        inside = (effect * kept).sum(1) / effect.sum(1).clamp_min(torch.finfo(effect.dtype).tiny)
    return replace(found, inside=inside)


def _block_svd(
    jvp: Callable[[torch.Tensor], torch.Tensor],
    vjp: Callable[[torch.Tensor], torch.Tensor],
    d: int,
    k: int,
    *,
    width: int,
    block: int | None = None,
    warm_start: torch.Tensor | None = None,
    tol: float = 1e-4,
    max_iterations: int = 40,
    seed: int = 0,
    progress: bool = False,
) -> _Spectrum:
    """Top k singular triplets of a linear map J from its products.

    Parameters
    ----------
    jvp : callable, (b, d) -> (b, n)
        J v of each row, float64, on the CPU.
    vjp : callable, (b, n) -> (b, d)
    d : int
        Dimension that J takes.
    k : int
    width : int
        Vectors in a block.
    block : int, optional
        Ask for the first `block` triplets, then for `block` more from a new start, and so on up to k.
    warm_start : Tensor of shape (m, d), optional
        Used up before random vectors in every new start.
    tol, max_iterations, seed, progress
        As in `find_jacobian`.

    Returns
    -------
    _Spectrum
    """
    if tol <= 0 or max_iterations < 1:
        raise ValueError(f"tol ({tol}) must be positive and max_iterations ({max_iterations}) at least 1")
    if max_iterations * width < k:
        raise ValueError(f"{max_iterations} iterations of {width} vectors can't find {k}; raise max_iterations")
    starts = _starts(d, width, warm_start, torch.Generator().manual_seed(seed))
    target = k if block is None else min(block, k)
    basis = torch.empty(0, d, dtype=torch.double)
    images, pulled = None, None  # J q and J'J q of every q in the basis
    candidates, before, since = next(starts), None, 0
    change, angle = [], []
    converged = False
    with tqdm(
        total=max_iterations, desc="jacobian", unit=" iterations", disable=not progress, delay=2, leave=False
    ) as bar:
        while not converged and len(change) < max_iterations:
            q = _orthonormal(candidates[: d - len(basis)], basis, starts)
            u = jvp(q)
            w = vjp(u)
            basis = torch.cat([basis, q])
            images = u if images is None else torch.cat([images, u])
            pulled = w if pulled is None else torch.cat([pulled, w])
            # Rayleigh-Ritz: J restricted to the basis.
            squares, mixing = torch.linalg.eigh(images @ images.T)
            squares, mixing = squares.flip(0).clamp_min(0.0), mixing.flip(1)
            now = squares[:target].sqrt(), mixing[:, :target]
            since += 1
            change.append(_relative_change(before, now) if since > 1 else float("nan"))
            angle.append(_turned(before, now) if since > 1 else float("nan"))
            ritz = squares[: max(target, width)], mixing[:, : max(target, width)]
            errors, residuals = _residuals(*ritz, basis, pulled)
            # A start that has not met the next vector yet changes nothing either; the residual tells.
            settled = (
                change[-1] <= tol and max(angle[-1], residuals[:target].max()) <= tol**0.5 and len(basis) >= target
            )
            converged = len(basis) == d or (settled and target == k)
            candidates, before = errors[residuals.argsort(descending=True)[:width]], now
            if settled and target < k:
                target, candidates, since = min(target + block, k), next(starts), 0
            bar.update()
    squares, mixing = squares[:k], mixing[:, :k]
    _, residuals = _residuals(squares, mixing, basis, pulled)
    record = Convergence(len(change), tuple(change), tuple(angle), tuple(residuals.tolist()), converged)
    if not converged:
        warnings.warn(
            f"the top {k} singular values did not converge in {max_iterations} iterations: they still change by "
            f"{change[-1]:.1g} (tol {tol:g}) and their space by {angle[-1]:.1g} rad, and the residual "
            f"||J'Jv - sigma^2 v|| / sigma^2 is up to {max(record.residuals):.1g}; raise max_iterations or oversample",
            RuntimeWarning,
            stacklevel=4,
        )
    right, sign = _signed(mixing.T @ basis)
    left = sign * (mixing.T @ images) / _divisor(squares.sqrt())[:, None]
    return _Spectrum(right, squares.sqrt(), left, record)


def _starts(d: int, width: int, warm: torch.Tensor | None, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Blocks to start from: the given vectors first, then random ones; (width, d), float64."""
    left = torch.empty(0, d, dtype=torch.double) if warm is None else warm
    while True:
        given, left = left[:width], left[width:]
        yield torch.cat([given, torch.randn(width - len(given), d, dtype=torch.double, generator=rng)])


def _orthonormal(block: torch.Tensor, basis: torch.Tensor, starts: Iterator[torch.Tensor]) -> torch.Tensor:
    """Rows orthonormal to each other and to the basis (Algorithm 2's deflation); what vanishes is drawn anew."""
    lengths = block.norm(dim=1).max()
    for _ in range(2):
        block = block - (block @ basis.T) @ basis
    _, remaining, block = torch.linalg.svd(block, full_matrices=False)
    lost = remaining <= VANISHED * lengths
    if lost.any():
        block = torch.where(lost[:, None], next(starts)[: len(block)], block)
    for _ in range(2):
        block = torch.linalg.qr((block - (block @ basis.T) @ basis).T).Q.T
    return block


def _residuals(squares: torch.Tensor, mixing: torch.Tensor, basis: torch.Tensor, pulled: torch.Tensor) -> tuple:
    """J'J v - sigma^2 v of each Ritz vector v, and its length relative to sigma^2."""
    errors = mixing.T @ pulled - squares[:, None] * (mixing.T @ basis)
    return errors, errors.norm(dim=1) / _divisor(squares)


def _divisor(values: torch.Tensor) -> torch.Tensor:
    """Values to divide by: where J has no more than rounding noise, what that noise is relative to."""
    return values.clamp_min(ROUNDING * values[0]).clamp_min(torch.finfo(values.dtype).tiny)


def _relative_change(before: tuple, now: tuple) -> float:
    (old, _), (new, _) = before, now
    if len(old) < len(new):
        return float("nan")
    return float(((new - old).abs() / _divisor(new)).max())


def _turned(before: tuple, now: tuple) -> float:
    """Largest principal angle between two spaces, given in coordinates of a basis that has grown in between."""
    (_, old), (_, new) = before, now
    if old.shape[1] < new.shape[1]:
        return float("nan")
    outside = new.clone()
    outside[: len(old)] -= old @ (old.T @ new[: len(old)])
    return float(torch.linalg.matrix_norm(outside, 2).clamp(max=1.0).arcsin())


def _signed(vectors: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Vectors with the sign that makes the entry of largest size positive, and these signs (k, 1)."""
    sign = vectors.gather(1, vectors.abs().argmax(dim=1, keepdim=True)).sign()
    return sign * vectors, sign


def _width(k: int, oversample: int, block: int | None) -> int:
    if k < 1 or oversample < 0 or (block is not None and block < 1):
        raise ValueError(f"k ({k}) and block ({block}) must be at least 1 and oversample ({oversample}) at least 0")
    return k + oversample if block is None else block


def _check_run(model: Model, run: Trajectory) -> None:
    if len(run) != 1:
        raise ValueError(f"a Jacobian belongs to one sample, and this run has {len(run)}; give run[0]")
    if run.model.hash != model.hash:
        raise ValueError(
            f"the run was made with {run.model.name!r} (weights {run.model.hash}), not with {model.name!r} "
            f"(weights {model.hash}); sample or invert with the same model"
        )
    if model.dtype != torch.float32:
        raise ValueError(f"a Jacobian's spectrum needs float32, and {model.name} computes in {model.dtype}; load it so")


def _check_population(population: HStore, model: Model, run: Trajectory) -> None:
    other = population.provenance["model"]
    if (other["hash"], other["tap"]) != (model.hash, model.tap):
        raise ValueError(
            f"{population.path} holds h {other['tap']!r} the mid block of {other['name']!r} (weights {other['hash']}); "
            f"this is {model.name!r} (weights {model.hash}), tapped {model.tap!r}"
        )
    missing = sorted(set(run.timesteps) - set(population.timesteps), reverse=True)
    if missing:
        raise ValueError(
            f"{population.path} lacks {len(missing)} of the run's {run.steps} timesteps, such as {missing[0]}; "
            "extract it with the same steps as the run"
        )
    if len(population) < 2:
        raise ValueError("a store of one sample has no standard deviation; give at least two")


def _check_mask(mask, image_shape: tuple[int, int, int]) -> torch.Tensor | None:
    """The rows of J that a mask keeps: bool tensor of shape (C*H*W,)."""
    if mask is None:
        return None
    mask = torch.as_tensor(mask).cpu()
    channels, height, width = image_shape
    allowed = [(height, width), (1, height, width), (channels, height, width)]
    if tuple(mask.shape) not in allowed:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; this model takes {', '.join(map(str, allowed))}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask is boolean, or of zeros and ones; threshold yours first, e.g. mask > 0.5")
    if not mask.any():
        raise ValueError("the mask is empty; set at least one pixel to True")
    return mask.bool().expand(image_shape).flatten()


def _check_warm_start(start: torch.Tensor | None, shape: tuple[int, int, int]) -> torch.Tensor | None:
    if start is None:
        return None
    start = torch.as_tensor(start)
    if start.ndim != 4 or tuple(start.shape[1:]) != shape:
        expected = ", ".join(map(str, shape))
        raise ValueError(f"warm_start has shape {tuple(start.shape)}; it must be (m, {expected})")
    return start.flatten(1).cpu().double()


def _rms_of_h(model: Model, run: Trajectory, k: int, progress: bool) -> list[torch.Tensor]:
    """Root mean square of the entries of the sample's h_t, one a timestep, the same for each direction."""
    if run.h is None or run.model.tap != model.tap:
        run = replay(replace(run, model=model), record_h=True, progress=progress)
    return [run.h.values[:, 0].flatten(1).square().mean(dim=1).sqrt()] * k


def _spread(population: HStore, run: Trajectory, right: torch.Tensor, progress: bool) -> torch.Tensor:
    """Standard deviation of the population's projections on k vectors; shape (k, T)."""
    axes = right.flatten(1).numpy().T
    sigma = [
        np.concatenate([batch @ axes for batch in population.batches(t)]).std(axis=0, ddof=1, dtype=np.float64)
        for t in tqdm(run.timesteps, desc="measuring sigma", disable=not progress, delay=2, leave=False)
    ]
    return torch.from_numpy(np.stack(sigma, axis=1))
