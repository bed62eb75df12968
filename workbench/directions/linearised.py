"""Products with a network's Jacobian at one point, J v and J'u."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from workbench.diffusion.parallel import count_passes, in_threads


class Linearised:
    """A map at one point; the map itself runs once, and its graph is kept.

    J'u is reverse mode. J v is reverse mode too, through the graph of J'u, which is linear in u: forward mode has no
    rule for fused attention, none for group norm in the memory format that convolutions are fastest in, and is slower.

    Parameters
    ----------
    f : callable, Tensor of shape (b, *in) -> Tensor of shape (b, *out)
        Treats each of the b alone.
    x : Tensor of shape (1, *in)
    width : int
        Number of vectors that are multiplied in one batch.
    """

    def __init__(self, f: Callable[[torch.Tensor], torch.Tensor], x: torch.Tensor, *, width: int = 1) -> None:
        def build(_: slice) -> None:
            # A fused attention kernel has no second derivative.
            with torch.inference_mode(False), torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]), _Lean():
                self._x = _channels_last(x.detach().repeat_interleave(width, dim=0)).requires_grad_()
                self._y = f(self._x)
                self._u = torch.zeros_like(self._y).requires_grad_()
                (self._w,) = torch.autograd.grad(self._y, self._x, self._u, create_graph=True)

        _in_one_thread(build)
        self.shapes = self._y.shape[1:], self._x.shape[1:]

    def vjp(self, u: torch.Tensor) -> torch.Tensor:
        """J'u for each row; (b, n) -> (b, d), float64, on the CPU."""
        return self._product(self._y, self._x, u)

    def jvp(self, v: torch.Tensor) -> torch.Tensor:
        """J v for each row; (b, d) -> (b, n), float64, on the CPU."""
        return self._product(self._w, self._u, v)

    def _product(self, output: torch.Tensor, at: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        count_passes(2 * len(rows))  # a product with a Jacobian takes about as long as two passes

        def product(block: torch.Tensor) -> torch.Tensor:
            padded = torch.zeros_like(output)
            padded[: len(block)] = block.float().view(-1, *output.shape[1:]).to(padded)
            (found,) = torch.autograd.grad(output, at, padded, retain_graph=True)
            return found[: len(block)].flatten(1).cpu().double()

        return _in_one_thread(lambda _: torch.cat([product(block) for block in rows.split(len(output))]))


def _in_one_thread(function: Callable):
    """So that results don't depend on the number of threads, see `in_threads`."""
    return in_threads(function, [slice(None)])[0]


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
