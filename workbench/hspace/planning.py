"""The cost of an extraction, before it is started: disk, memory, passes and hours.

Sizes follow from shapes and are exact or bounds. Time is passes x FLOPs / rate, with a rate that is measured here, or,
for a GPU that is not here, assumed: a share of the maker's peak.
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
from workbench.hspace.extract import chunk_size
from workbench.hspace.store import DTYPES
from workbench.io import duration, one_of

GPUS = {
    "h200": (494.0, 989.0),
    "h100": (494.0, 989.0),
    "a100": (156.0, 312.0),
    "l40s": (183.0, 362.0),
    "l4": (60.0, 121.0),
    "rtx4090": (82.6, 165.0),
    "rtx3090": (35.6, 71.0),
    "v100": (15.7, 15.7),
    "t4": (8.1, 8.1),
}
"""Peak TFLOP/s of dense products by the makers' data sheets: as float32 networks run (TF32 where there is such), and in
bfloat16 (float32 where there is none)."""

UTILISATION = 0.25
"""Share of the peak that a U-Net of convolutions is assumed to reach."""

LIBRARIES = 0.7 * 2**30
"""Bytes of a process with torch, diffusers and Zarr in it (measured)."""


@dataclass(frozen=True)
class Plan:
    """Needs of one extraction.

    Attributes
    ----------
    n, steps, processes, batch_size : int
    passes : int
        Samples through the U-Net, n x steps.
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
    source : str
        Where the rate comes from.
    """

    n: int
    steps: int
    processes: int
    batch_size: int
    passes: int
    flops: float
    disk: int
    ram: float
    gpu_memory: float
    rate: float
    source: str

    @property
    def seconds(self) -> float:
        return self.passes / self.rate

    def __str__(self) -> str:
        rows = {
            "samples x steps": f"{self.n:,} x {self.steps}, {self.processes} process{'es' * (self.processes > 1)}",
            "U-Net passes": f"{self.passes:,} of {self.flops / 1e9:,.3g} GFLOP",
            "disk": _bytes(self.disk),
            "RAM a process": f"{_bytes(self.ram)} (at most)",
            "GPU memory": f"{_bytes(self.gpu_memory)} (estimated, batches of {self.batch_size})",
            "time": f"{duration(self.seconds)} at {self.rate:,.3g} passes a second",
            "rate": self.source,
        }
        return "\n".join(f"{name:16s} {value}" for name, value in rows.items())


def plan_extraction(
    network: SplitUNet,
    *,
    n: int,
    steps: int = 50,
    flop_rate: float,
    source: str,
    processes: int = 1,
    batch_size: int = 64,
    dtype: str = "float16",
    record_x: bool = False,
    on_gpu: bool = True,
) -> Plan:
    """Needs of `extract(model, n, steps=steps, ...)`.

    Parameters
    ----------
    network : SplitUNet
        On the device "meta" (`load_shapes`), so that no weights are needed.
    n, steps, processes, batch_size, dtype, record_x
        As of `extract`.
    flop_rate : float
        Floating-point operations a second: of one of the GPUs (`peak_rate`), or of all cores.
    source : str
        Where that rate comes from, in words.
    on_gpu : bool
        Whether the network is on a GPU; else its memory is RAM.
    """
    for name, value in {"n": n, "steps": steps, "processes": processes, "batch_size": batch_size}.items():
        if value < 1:
            raise ValueError(f"{name} is {value}; give 1 or more")
    one_of("dtype", dtype, DTYPES)
    image, h = shapes_of(network)
    values = steps * (np.prod(h) + record_x * np.prod(image))
    disk = n * (int(values) * np.dtype(dtype).itemsize + 4 * int(np.prod(image)) + 8)
    chunk = chunk_size(h, image, steps=steps, n=n, record_x=record_x)
    need = estimate_memory(network)
    on_device = need.weights + batch_size * need.activations
    # A chunk is recorded in float32 while the last one is converted and written.
    buffers = chunk * int(values) * (4 + 4 + np.dtype(dtype).itemsize)
    flops = count_flops(network)
    return Plan(
        n=n,
        steps=steps,
        processes=processes,
        batch_size=batch_size,
        passes=n * steps,
        flops=flops,
        disk=disk,
        ram=LIBRARIES + need.weights + buffers + (0 if on_gpu else batch_size * need.activations),
        gpu_memory=on_device if on_gpu else 0,
        # Processes on a CPU share its cores, which one alone uses as well.
        rate=(processes if on_gpu else 1) * flop_rate / flops,
        source=source,
    )


def shapes_of(network: SplitUNet) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """(C, H, W) of x_t and (C, h, w) of h, of a network."""
    return network.x_shape, network.h_shape


def count_flops(network: SplitUNet) -> int:
    """Floating-point operations of a pass of one sample: convolutions, matrix products and attention."""
    counter = FlopCounterMode(display=False)
    with torch.no_grad(), counter:
        network(torch.empty(1, *network.x_shape, device="meta"), 0)
    return counter.get_total_flops()


def peak_rate(gpu: str, *, dtype: str = "float32", utilisation: float = UTILISATION) -> float:
    """Floating-point operations a second that one of `GPUS` is assumed to reach, in "float32" or "bfloat16"."""
    peaks = GPUS[one_of("GPU", gpu.lower(), GPUS)]
    if not 0.0 < utilisation <= 1.0:
        raise ValueError(f"utilisation is {utilisation}; it is a share, above 0 and up to 1")
    return peaks[dtype == "bfloat16"] * 1e12 * utilisation


def measure_pass_rate(model: Model, *, batch_size: int | None = None, seconds: float = 3.0) -> float:
    """Samples through the U-Net a second, of sampling with h recorded, on the model's device; after a first batch."""
    batch_size = batch_size or model.batch_size()
    options = {"steps": 4, "record_h": True, "batch_size": batch_size, "progress": False}
    sample(model, range(batch_size), **options)
    passes, start = 0, time.perf_counter()
    while (taken := time.perf_counter() - start) < seconds:
        passes += 4 * len(sample(model, range(batch_size), **options))
    return passes / taken


def _bytes(count: float) -> str:
    unit, name = next(((u, s) for u, s in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.1f} {name}" if count else "none"
