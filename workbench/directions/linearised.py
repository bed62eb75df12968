"""Products with a network's Jacobian at one point, J v and J'u."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from workbench.diffusion.parallel import count_passes, in_threads

_KERNELS = threading.Lock()


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
            # A fused attention kernel has no second derivative. The choice of kernels is the process's, not a thread's.
            with _KERNELS, torch.inference_mode(False), torch.enable_grad(), sdpa_kernel([SDPBackend.MATH]):
                start = x.detach().repeat_interleave(width, dim=0).contiguous(memory_format=torch.channels_last)
                self._x = start.requires_grad_()
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
