"""Estimate the memory of a network from its shapes, and keep freed memory between its passes."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from dataclasses import dataclass

import psutil
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from workbench.diffusion.unet import SplitUNet

KEPT = 2**30
"""Bytes of freed memory that a process may hold on a CPU."""

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_LARGEST_IN_HEAP = 2**25
_OWN_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES")


@dataclass(frozen=True)
class MemoryNeed:
    """Memory of a network in float32, estimated, in bytes.

    Attributes
    ----------
    weights : int
    activations : int
        Most that one pass over one image holds beside the weights. Working space of libraries is not in it; whole
        matrices of attention are, which some kernels never make.
    """

    weights: int
    activations: int

    @property
    def total(self) -> int:
        return self.weights + self.activations


class _LiveBytes(TorchDispatchMode):
    """Adds up the tensors that are made inside of it for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = id(storage), storage.nbytes()
        if key in self._alive:
            return
        self._alive.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.now -= size


def estimate_memory(network: SplitUNet) -> MemoryNeed:
    """Memory of the weights of a network on the device "meta" and of one pass over one image.

    The pass runs on tensors without values, and the sizes of all live tensors are added up.
    """
    live = _LiveBytes()
    with torch.no_grad(), live:
        network(torch.empty(1, *network.x_shape, device="meta"), 0)
    return MemoryNeed(4 * sum(p.numel() for p in network.unet.parameters()), live.peak)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on a device; those of the machine where the device has none of its own."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # torch keeps it for reuse
        return torch.cuda.mem_get_info(device)[0] + cached
    return psutil.virtual_memory().available


def keep_freed_memory() -> bool:
    """Let this process keep up to a GiB of freed memory, if it uses glibc (most Linux machines).

    For scripts that sample on a CPU; the command line and the kernels of reports call it. A pass of a network frees its
    activations, and the next pass allocates as much again. In between, glibc returns large buffers to the system, which
    clears them page by page: a sixth of the time of a pass on a CPU. Settings of glibc in the environment take
    precedence.

    Returns
    -------
    bool
        Whether freed memory is kept now.
    """
    if sys.platform != "linux" or any(name in os.environ for name in _OWN_SETTINGS):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    settings = ((_M_MMAP_THRESHOLD, _LARGEST_IN_HEAP), (_M_TRIM_THRESHOLD, KEPT))
    return all([mallopt(*setting) == 1 for setting in settings])
