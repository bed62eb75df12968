"""The cost of an extraction, before it is started: disk, memory, passes and hours.

Sizes follow from shapes and are exact or bounds. Time is passes x FLOPs / rate, with a rate that is measured here, or,
for a GPU that is not here, a share of the maker's peak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.diffusion.memory import estimate_memory
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import sample
from workbench.diffusion.unet import SplitUNet
from workbench.hspace.extract import WRITERS, chunk_size
from workbench.hspace.store import DTYPES
from workbench.io import one_of

PEAKS = {
    "h200": {"float32": 494, "bfloat16": 989},
    "h100": {"float32": 494, "bfloat16": 989},
    "a100": {"float32": 156, "bfloat16": 312},
    "l40s": {"float32": 183, "bfloat16": 362},
    "l4": {"float32": 60, "bfloat16": 121},
    "rtx4090": {"float32": 82.6, "bfloat16": 165},
    "rtx3090": {"float32": 35.6, "bfloat16": 71},
    "v100": {"float32": 15.7, "bfloat16": 15.7},
    "t4": {"float32": 8.1, "bfloat16": 8.1},
}
"""TFLOP/s of dense products by the makers' data sheets: for float32, of TF32 where there is such; for bfloat16, of
float32 where there is none."""

LIBRARIES = 0.7 * 2**30
"""Bytes of a process with torch, diffusers and Zarr in it (measured)."""


@dataclass(frozen=True)
class Plan:
    """Needs of one extraction.

    Attributes
    ----------
    passes : int
        Samples through the U-Net, n x steps; twice as many with guidance.
    flops : float
        Floating-point operations of one pass of one sample (a multiplication and an addition are two).
    disk : int
        Bytes of the arrays without compression; images take less.
    ram : float
        Bytes, at most, of one process beside a GPU; without one, the U-Net's are in it.
    gpu_memory : float
        Bytes of weights and of a batch's activations, estimated.
    rate : float
        Passes a second, of all processes together.
    """

    passes: int
    flops: float
    disk: int
    ram: float
    gpu_memory: float
    rate: float

    @property
    def seconds(self) -> float:
        return self.passes / self.rate


def plan_extraction(
    network: SplitUNet,
    *,
    n: int,
    steps: int = 50,
    flop_rate: float,
    processes: int = 1,
    batch_size: int = 64,
    dtype: str = "float16",
    record_x: bool = False,
    on_gpu: bool = True,
    guided: bool = False,
    image_shape: tuple[int, int, int] | None = None,
) -> Plan:
    """Needs of `extract(model, n, steps=steps, ...)`.

    Parameters
    ----------
    network : SplitUNet
        On the device "meta" (`load_shapes`), so that no weights are needed.
    n, steps, processes, batch_size, dtype, record_x
        As of `extract`.
    flop_rate : float
        Floating-point operations a second: of one of the GPUs (`card_rate`), or of all cores.
    on_gpu : bool
        Whether the network is on a GPU; else its memory is RAM.
    guided : bool
        Whether each step takes two passes of a sample, as classifier-free guidance does.
    image_shape : (int, int, int), optional
        (C, H, W) of the images of a latent model, which are kept decoded; by default that of x_t.
    """
    for name, value in {"n": n, "steps": steps, "processes": processes, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    one_of("dtype", dtype, DTYPES)
    image, h = network.x_shape, network.h_shape
    values = steps * (np.prod(h) + record_x * np.prod(image))
    disk = n * (int(values) * np.dtype(dtype).itemsize + 4 * int(np.prod(image_shape or image)) + 8)
    chunk = chunk_size(h, image, steps=steps, n=n, record_x=record_x)
    need = estimate_memory(network)
    # A chunk is recorded in float32 while others are converted and written; pinned memory comes in powers of two.
    writers, record = WRITERS["cuda" if on_gpu else "cpu"], 4 * chunk * int(values)
    recorded = 2 ** (record - 1).bit_length() if on_gpu else record
    buffers = (1 + writers) * recorded + writers * record * np.dtype(dtype).itemsize // 4
    flops = count_flops(network)
    activations = batch_size * need.activations * (1 + guided)
    return Plan(
        passes=n * steps * (1 + guided),
        flops=flops,
        disk=disk,
        ram=LIBRARIES + need.weights + buffers + (0 if on_gpu else activations),
        gpu_memory=need.weights + activations if on_gpu else 0,
        # Processes on a CPU share its cores, which one alone uses as well.
        rate=(processes if on_gpu else 1) * flop_rate / flops,
    )


def count_flops(network: SplitUNet) -> int:
    """Floating-point operations of a pass of one sample: convolutions, matrix products and attention."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.empty(1, *network.x_shape, device="meta"), 0)
    return counter.get_total_flops()


def card_rate(card: str, *, dtype: str = "float32", utilisation: float = 0.25) -> float:
    """Floating-point operations a second of one card of `PEAKS`: a share of its peak, assumed for a U-Net."""
    peaks = PEAKS[one_of("GPU", card.lower(), PEAKS)]
    if not 0.0 < utilisation <= 1.0:
        raise ValueError(f"utilisation is {utilisation}; it is a share, above 0 and up to 1")
    return peaks[dtype] * 1e12 * utilisation


def measure_pass_rate(model: Model, *, batch_size: int | None = None, seconds: float = 3.0) -> float:
    """Samples through the U-Net a second, of sampling with h recorded, on the model's device; after a first batch."""
    batch_size = batch_size or model.batch_size()
    options = {"steps": 4, "record_h": True, "batch_size": batch_size, "progress": False}
    sample(model, range(batch_size), **options)
    passes, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        passes += 4 * len(sample(model, range(batch_size), **options))
    return passes / taken
