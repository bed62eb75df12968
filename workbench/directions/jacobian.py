"""Spectra of the denoiser's Jacobians: directions that one image at one timestep is most sensitive to.

All maps go through one block iteration. It takes the products of Algorithms 1 and 2 of Haas et al. (arXiv 2303.11073),
J V with all tangents in one batch and then J' (J V), but keeps every block that it has seen: the Rayleigh-Ritz step
runs over all of them, and the next block holds the residuals of its vectors. That is the block Krylov method (Golub,
Luk and Overton 1981; Musco and Musco 2015, arXiv 1504.05477), in Davidson's form, which survives new starts. It takes
about half the products of the plain subspace iteration for the same accuracy, and narrow blocks take fewer still.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from tqdm.auto import tqdm

from workbench.datasets.domain import find_region
from workbench.diffusion.models import Model
from workbench.diffusion.parallel import PIECES, count_passes, in_threads
from workbench.diffusion.sampling import Trajectory, replay
from workbench.directions.direction import Direction, finite, origin_of
from workbench.hspace.store import HStore
from workbench.io import provenance_mismatch

OUTPUTS = ("eps", "x0")
MAPS = ("x->h", "x->x0")

CPU_WIDTH = 2
"""Vectors in a block on a CPU: one alone converges in the fewest products, but can take two close values for one."""

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
    products : int
        Vectors that were multiplied with J or J', those of a null space included.
    change : tuple of float
        Largest relative change of the top singular values, one an iteration; NaN where there is nothing to compare.
    angle : tuple of float
        Largest angle in radians between the spaces of the top right singular vectors before and after an iteration.
    residuals : tuple of float
        ||J'J v_i - sigma_i^2 v_i|| / sigma_i^2 of each vector: some sigma^2 of J lies within this relative distance.
    converged : bool
    """

    iterations: int
    products: int
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

    def edit(self, run: Trajectory, i: int = 0, *, scale: float) -> torch.Tensor:
        """The single-timestep edit of LOCO-Edit: x_t + scale * v_i, denoised from there with the run's own noise.

        Parameters
        ----------
        run : Trajectory
            One or more samples, also others than the one that the vectors were found on; not edited yet.
        i : int, default 0
        scale : float
            Length of the step in the units of x_t.

        Returns
        -------
        Tensor of shape (n, C, H, W)
            The edited images; of scale 0 the unedited ones, bit for bit.

        Raises
        ------
        ValueError
            If the run did not visit `t`, or the scale is not finite.
        """
        x_t = run.x_at(self.t)
        x_t = x_t + finite(scale, "scale") * self.vectors[i].to(x_t)
        return replay(run.tail(run.timesteps.index(self.t), x_t), progress=False).x0

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
    mask: np.ndarray | torch.Tensor | str | None = None,
    output: str = "eps",
    population: HStore | None = None,
    oversample: int | None = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
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
    mask : bool array of shape (H, W), (1, H, W) or (C, H, W), or str, optional
        Only these pixels of the output count (Haas et al. eqs. 9-10). A name is that of a region of
        the bundled domain (`datasets.domain`), upright: mouth, eyes, brows, hair, beard or glasses.
    output : {"eps", "x0"}
        The predicted noise or the predicted image. Both have the same right singular vectors (Haas et al., SM C).
    population : HStore, optional
        With it, one unit of scale of each direction is one sigma of the population's projection, timestep by timestep,
        as for every other method. Without it, there is no population to measure: one unit is the root mean square of
        the entries of the sample's own h_t, an order-of-magnitude stand-in. `provenance["parameters"]["sigma"]` says
        which.
    oversample : int, optional
        Take k + oversample tangents in a batch. By default there are k of them on an accelerator, which takes them in
        the time of one, and two on a CPU, where each costs the same and narrow blocks need fewer of them in all. A
        value that is repeated more often than a block is wide can be missed.
    tol : float, default 1e-6
        Relative error of the singular values. Stop when the residuals r show it to be smaller, by r^2 / (2 gap) with
        the gap to the next value, when the last iteration changed the values by less than sqrt(tol), and when it turned
        their space by less than tol^(1/4) radians. The error of the vectors is about sqrt(2 tol / gap) radians.
    max_iterations : int, default 100
    block : int, optional
        Algorithm 2: find the vectors in batches of this size, each from a new start orthogonal to all that came before,
        with this many tangents at a time. It needs less memory, and finds repeated values whatever the size.
    warm_start : JacobianSpectrum or Tensor of shape (m, C, h, w), optional
        Start from the vectors of e.g. a neighbouring timestep, given as what was found there, or as vectors of h.
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

    left, right = (warm_start.left, None) if isinstance(warm_start, JacobianSpectrum) else (None, warm_start)
    found = _find_spectrum(
        _Linearised(decode, bottleneck.h, width=_width(k, oversample, block, x_t.device)),
        k,
        rows=rows,
        block=block,
        left=_check_warm_start(left, model.image_shape),
        right=_check_warm_start(right, model.h_shape),
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
        "mask": None if rows is None else _mask_record(mask, rows),
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
    mask: np.ndarray | torch.Tensor | str | None = None,
    nullspace: int = 0,
    oversample: int | None = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
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
    mask : bool array or str, optional
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
    linear = _Linearised(forward, x_t, width=_width(k, oversample, block, x_t.device))
    warm_start = _check_warm_start(warm_start, model.image_shape)
    found = _find_spectrum(linear, k, rows=rows, right=warm_start, **settings)
    vectors, convergence = found.right, found.convergence
    if nullspace:
        avoided = _find_spectrum(linear, nullspace, rows=~rows, **settings)
        convergence = replace(convergence, products=convergence.products + avoided.convergence.products)
        outside = avoided.right
        vectors = vectors - (vectors @ outside.T) @ outside
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
    return XSpectrum(
        found.singular_values.numpy(),
        vectors.float().view(-1, *model.image_shape),
        found.left.float().view(-1, *linear.y.shape[1:]),
        int(t),
        map,
        convergence,
    )


class _Linearised:
    """A map at one point, as products with its Jacobian J there; the map itself runs once, and its graph is kept.

    J' U is reverse mode. J V is reverse mode too, through the graph of J' u, which is linear in u: forward mode has no
    rule for fused attention, none for group norm in the memory format that convolutions are fastest in, and is slower.
    On a CPU the vectors of a product are split over its cores.

    Parameters
    ----------
    f : callable, Tensor of shape (b, *in) -> Tensor of shape (b, *out)
        Treats each of the b alone.
    x : Tensor of shape (1, *in)
    width : int
        Number of vectors in a product.

    Attributes
    ----------
    x, y : Tensor of shape (1, *in), (1, *out)
        The point, and f there.
    """

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, width: int) -> None:
        self.width = width
        count = min(width, PIECES) if x.device.type == "cpu" else 1
        ends = [width * (i + 1) // count for i in range(count)]
        self._columns = [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]
        # A fused attention kernel has no second derivative. Which kernel runs is one setting for all threads.
        with sdpa_kernel([SDPBackend.MATH]):
            self._parts = in_threads(lambda rows: _Columns(f, x, width=rows.stop - rows.start), self._columns)
        self.x, self.y = self._parts[0].x[:1], self._parts[0].y[:1]

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J' u for each row; (b, n) -> (b, d), float64, on the CPU."""
        return self._product(_Columns.vjp, u)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v for each row; (b, d) -> (b, n), float64, on the CPU."""
        return self._product(_Columns.jvp, v)

    def _product(self, product: Callable[[_Columns, torch.Tensor], torch.Tensor], rows: torch.Tensor) -> torch.Tensor:
        products = []
        count_passes(2 * len(rows))  # a product with a Jacobian takes about as long as two passes
        for block in rows.split(self.width):
            taken = [columns for columns in self._columns if columns.start < len(block)]
            products += in_threads(lambda c, b=block: product(self._parts[self._columns.index(c)], b[c]), taken)
        return torch.cat(products)


class _Columns:
    """The graph of a map at one point, for the vectors that one thread multiplies with its Jacobian."""

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, width: int) -> None:
        with torch.inference_mode(False), torch.enable_grad(), _Lean():
            self.x = _channels_last(x.detach().repeat_interleave(width, dim=0)).requires_grad_()
            self.y = f(self.x)
        self.u, self.w = None, None

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        if self.w is not None:
            return self._product(self.y, self.x, u)
        with torch.inference_mode(False), torch.enable_grad():
            self.u = self._padded(u, self.y).requires_grad_()
            (self.w,) = torch.autograd.grad(self.y, self.x, self.u, create_graph=True)
        return _rows(self.w.detach()[: len(u)])

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        if self.w is None:
            self.vjp(torch.zeros(1, self.y[0].numel()))
        return self._product(self.w, self.u, v)

    def _product(self, output: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        (product,) = torch.autograd.grad(output, at, self._padded(rows, output), retain_graph=True)
        return _rows(product[: len(rows)])

    def _padded(self, rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Rows in the shape and memory format of a batch; what is missing is zero."""
        padded = torch.zeros_like(like)
        padded[: len(rows)] = rows.float().view(-1, *like.shape[1:]).to(padded)
        return padded


def _rows(x: torch.Tensor) -> torch.Tensor:
    return x.flatten(1).cpu().double()


def _channels_last(x: torch.Tensor) -> torch.Tensor:
    """The same values with unambiguous channels_last strides, also for a batch of one."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).reshape(-1).view(n, h, w, c).permute(0, 3, 1, 2)


class _Lean(TorchFunctionMode):
    """Within it, costly operations enter the graph as the linear maps that their derivatives at this point are.

    Torch's own second derivatives are those of the non-linear operations: of a convolution they compute the gradient of
    the weights even if unused, and of group norm a dozen products of tensors.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        named = any(isinstance(a, str) for a in [*args, *kwargs.values()])  # padding="same"
        if func not in LEAN or named or not args or args[0].ndim != 4:
            return func(*args, **kwargs)
        with torch.no_grad():
            y, product, adjoint = LEAN[func](args[0].detach(), *args[1:], **kwargs)
        return _Tangent.apply(args[0], product, adjoint, y)


class _Tangent(torch.autograd.Function):
    """A linear map, as its product and its adjoint's; or an operation of value y with that derivative."""

    @staticmethod
    def forward(ctx, x, product, adjoint, y=None):
        ctx.maps = product, adjoint
        return product(x) if y is None else y

    @staticmethod
    def backward(ctx, gradient):
        product, adjoint = ctx.maps
        return _Tangent.apply(gradient, adjoint, product), None, None, None


def _convolution(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1):
    stride, padding, dilation = ((s, s) if isinstance(s, int) else s for s in (stride, padding, dilation))
    y = torch.conv2d(x, weight, bias, stride, padding, dilation, groups)
    reach = [p * 2 - d * (n - 1) - 1 for p, d, n in zip(padding, dilation, weight.shape[2:], strict=True)]
    unseen = [(size + r) % s for size, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    return (
        y,
        lambda v: torch.conv2d(v, weight, None, stride, padding, dilation, groups),
        lambda u: torch.conv_transpose2d(u, weight, None, stride, padding, unseen, groups, dilation),
    )


def _group_norm(x, groups, weight=None, bias=None, eps=1e-5):
    """y = weight * z + bias; the derivative of the standardised z is symmetric."""
    x = _channels_last(x)
    (n, c, *_), size = x.shape, x[0, 0].numel()
    y, mean, rstd = torch.native_group_norm(x, weight, bias, n, c, size, groups, eps)
    gain = 1.0 if weight is None else weight[:, None, None]

    def standardised(v):
        wanted = [True, False, False]
        settings = (_channels_last(v), x, mean, rstd, None, n, c, size, groups, wanted)
        return torch.ops.aten.native_group_norm_backward(*settings)[0]

    return y, lambda v: gain * standardised(v), lambda u: standardised(gain * u)


def _silu(x, inplace=False):
    gate = x.sigmoid()
    slope = gate * (1.0 + x * (1.0 - gate))
    return gate * x, slope.mul, slope.mul


LEAN = {torch.conv2d: _convolution, F.group_norm: _group_norm, F.silu: _silu}


@dataclass(frozen=True)
class _Spectrum:
    """Top of a spectrum: right (k, d), singular_values (k,), left (k, n), inside (k,); float64, on the CPU."""

    right: torch.Tensor
    singular_values: torch.Tensor
    left: torch.Tensor
    convergence: Convergence
    inside: torch.Tensor | None = None


def _find_spectrum(
    linear: _Linearised,
    k: int,
    *,
    rows: torch.Tensor | None,
    seed: int,
    left: torch.Tensor | None = None,
    right: torch.Tensor | None = None,
    **settings,
) -> _Spectrum:
    """Top of the spectrum of those rows of J that a mask keeps, started from left or right vectors or at random."""
    n, d = linear.y[0].numel(), linear.x[0].numel()
    kept = torch.ones(n, dtype=torch.bool) if rows is None else rows
    if k < 1 or k > min(int(kept.sum()), d):
        of = "" if rows is None else " inside the mask"
        raise ValueError(f"k is {k}; with {int(kept.sum())} outputs{of} it lies in 1..{min(int(kept.sum()), d)}")
    rng = torch.Generator().manual_seed(seed)
    if right is None:
        # The first product with J' builds the graph that the others need, so it costs nothing.
        right = linear.vjp(_mixed(left, linear.width, n, rng) * kept)
    found = _block_svd(
        lambda v: linear.jvp(v) * kept,
        lambda u: linear.vjp(u * kept),
        _mixed(right, linear.width, d, rng),
        k,
        rng=rng,
        **settings,
    )
    inside = torch.ones(k, dtype=torch.double)
    if rows is not None:
        effect = linear.jvp(found.right).square()
        inside = (effect * kept).sum(1) / effect.sum(1).clamp_min(torch.finfo(effect.dtype).tiny)
    return replace(found, inside=inside)


def _block_svd(
    jvp: Callable[[torch.Tensor], torch.Tensor],
    vjp: Callable[[torch.Tensor], torch.Tensor],
    start: torch.Tensor,
    k: int,
    *,
    rng: torch.Generator,
    block: int | None = None,
    tol: float = 1e-6,
    max_iterations: int = 100,
    progress: bool = False,
) -> _Spectrum:
    """Top k singular triplets of a linear map J from its products.

    Parameters
    ----------
    jvp : callable, (b, d) -> (b, n)
        J v of each row, float64, on the CPU.
    vjp : callable, (b, n) -> (b, d)
    start : Tensor of shape (width, d), float64
        The first block.
    k : int
    rng : torch.Generator
        Of new starts.
    block : int, optional
        Ask for the first `block` triplets, then for `block` more from a new start, and so on up to k.
    tol, max_iterations, progress
        As in `find_jacobian`.

    Returns
    -------
    _Spectrum
    """
    if tol <= 0 or max_iterations < 1:
        raise ValueError(f"tol ({tol}) must be positive and max_iterations ({max_iterations}) at least 1")
    width, d = start.shape
    if max_iterations * width < k:
        raise ValueError(f"{max_iterations} iterations of {width} vectors can't find {k}; raise max_iterations")
    target = k if block is None else min(block, k)
    basis = torch.empty(0, d, dtype=torch.double)
    images, pulled = None, None  # J q and J'J q of every q in the basis
    candidates, before, since = start, None, 0
    change, angle = [], []
    converged = False
    with tqdm(
        total=max_iterations, desc="jacobian", unit=" iterations", disable=not progress, delay=2, leave=False
    ) as bar:
        while not converged and len(change) < max_iterations:
            q = _orthonormal(candidates[: d - len(basis)], basis, rng)
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
            settled = (
                _largest_error(squares, residuals[:target]) <= tol and change[-1] <= tol**0.5 and angle[-1] <= tol**0.25
            )
            converged = len(basis) == d or (settled and target == k)
            candidates, before = errors[residuals.argsort(descending=True)[:width]], now
            if settled and target < k:
                target, candidates, since = min(target + block, k), _mixed(None, width, d, rng), 0
            bar.update()
    squares, mixing = squares[:k], mixing[:, :k]
    _, residuals = _residuals(squares, mixing, basis, pulled)
    products = 2 * width * len(change)
    record = Convergence(len(change), products, tuple(change), tuple(angle), tuple(residuals.tolist()), converged)
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


def _mixed(vectors: torch.Tensor | None, width: int, d: int, rng: torch.Generator) -> torch.Tensor:
    """A block to start from, (width, d), in which every given vector has a part; random where there is none."""
    block = torch.randn(width, d, dtype=torch.double, generator=rng)
    for i in range(0 if vectors is None else min(width, len(vectors))):
        block[i] = vectors[i::width].sum(0)
    return block


def _orthonormal(block: torch.Tensor, basis: torch.Tensor, rng: torch.Generator) -> torch.Tensor:
    """Rows orthonormal to each other and to the basis (Algorithm 2's deflation); what vanishes is drawn anew."""
    lengths = block.norm(dim=1).max()
    for _ in range(2):
        block = block - (block @ basis.T) @ basis
    _, remaining, block = torch.linalg.svd(block, full_matrices=False)
    lost = remaining <= VANISHED * lengths
    if lost.any():
        block = torch.where(lost[:, None], _mixed(None, *block.shape, rng), block)
    for _ in range(2):
        block = torch.linalg.qr((block - (block @ basis.T) @ basis).T).Q.T
    return block


def _residuals(squares: torch.Tensor, mixing: torch.Tensor, basis: torch.Tensor, pulled: torch.Tensor) -> tuple:
    """J'J v - sigma^2 v of each Ritz vector v, and its length relative to sigma^2."""
    errors = mixing.T @ pulled - squares[:, None] * (mixing.T @ basis)
    return errors, errors.norm(dim=1) / _divisor(squares)


def _largest_error(squares: torch.Tensor, residuals: torch.Tensor) -> float:
    """Bound of the relative error of the top singular values by their residuals r and the gap to the next one.

    Some sigma^2 lies within r of each value, and within r^2 / gap where the others are further away than the gap (Kato
    and Temple; Parlett 1998, chapter 10); the error of sigma is half of that.
    """
    top, rest = squares[: len(residuals)], squares[len(residuals) :]
    if not len(rest):
        return float("inf")
    gap = 1.0 - rest[0] / _divisor(top)
    return float((residuals * (residuals / gap.clamp_min(VANISHED)).clamp(max=1.0)).max() / 2)


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


def _width(k: int, oversample: int | None, block: int | None, device: torch.device) -> int:
    if k < 1 or (oversample or 0) < 0 or (block is not None and block < 1):
        raise ValueError(f"k ({k}) and block ({block}) must be at least 1 and oversample ({oversample}) at least 0")
    if block is not None:
        return block
    return CPU_WIDTH if oversample is None and device.type == "cpu" else k + (oversample or 0)


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
    if model.compiled:
        raise ValueError(f"{model.name} is compiled, which keeps no derivatives; load it with compile=False")


def _check_population(population: HStore, model: Model, run: Trajectory) -> None:
    other = population.provenance["model"]
    if (other["hash"], other["tap"]) != (model.hash, model.tap):
        raise ValueError(
            f"{population.path} holds h {other['tap']!r} the mid block of {other['name']!r} (weights {other['hash']}); "
            f"this is {model.name!r} (weights {model.hash}), tapped {model.tap!r}"
        )
    if different := provenance_mismatch(other, model.provenance()):
        raise ValueError(f"{population.path} is of a model with another {different} than {model.name!r} has")
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
    channels, height, width = image_shape
    if isinstance(mask, str):
        if height != width:
            raise ValueError(f"regions of a domain are square, and images here are {height} x {width}")
        mask = find_region(mask, size=height)
    mask = torch.as_tensor(mask).cpu()
    allowed = [(height, width), (1, height, width), (channels, height, width)]
    if tuple(mask.shape) not in allowed:
        raise ValueError(f"the mask has shape {tuple(mask.shape)}; this model takes {', '.join(map(str, allowed))}")
    if mask.dtype != torch.bool and not ((mask == 0) | (mask == 1)).all():
        raise ValueError("a mask is boolean, or of zeros and ones; threshold yours first, e.g. mask > 0.5")
    if not mask.any():
        raise ValueError("the mask is empty; set at least one pixel to True")
    return mask.bool().expand(image_shape).flatten()


def _mask_record(mask, rows: torch.Tensor) -> dict:
    """What a provenance says of a mask: its name if it has one, how many outputs it keeps, and which."""
    digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16]
    return {"name": mask if isinstance(mask, str) else None, "outputs": int(rows.sum()), "sha256": digest}


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
