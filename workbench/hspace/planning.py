"""The cost of an extraction, before it is started: disk, memory, passes and hours.

Sizes follow from shapes and are exact or bounds. Time is passes x FLOPs / rate, with a rate that is measured here, or,
for a GPU that is not here, comes from a table: measured elsewhere, or a share of the maker's peak.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.utils.flop_counter import FlopCounterMode

from workbench.diffusion.memory import estimate_memory
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import sample
from workbench.diffusion.unet import SplitUNet
from workbench.hspace.extract import WRITERS, chunk_size
from workbench.hspace.store import DTYPES
from workbench.io import duration, one_of

RATES = Path(__file__).with_name("rates.csv")
"""Table of cards: peaks of dense products by the makers' data sheets (for float32, of TF32 where there is such; for
bfloat16, of float32 where there is none), and rates that networks reached, in the rows that `tests/gpu/run.sh` writes.
The names of CPUs begin with "cpu"."""

UTILISATION = 0.25
"""Share of the peak that a U-Net of convolutions is assumed to reach while none is measured."""

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
        Floating-point operations a second: of one of the GPUs (`card_rate`), or of all cores.
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
    # A chunk is recorded in float32 while others are converted and written; pinned memory comes in powers of two.
    writers, record = WRITERS["cuda" if on_gpu else "cpu"], 4 * chunk * int(values)
    recorded = 2 ** (record - 1).bit_length() if on_gpu else record
    buffers = (1 + writers) * recorded + writers * record * np.dtype(dtype).itemsize // 4
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


def card_rate(
    card: str, *, flops: float, dtype: str = "float32", utilisation: float | None = None
) -> tuple[float, str]:
    """Floating-point operations a second of one card of `RATES`, and in words where they come from.

    They are those measured on the card with the network of most similar `flops` a pass; without such a row, or with
    `utilisation`, a share of its peak: as given, or the median share that measured cards reach, or else `UTILISATION`.
    """
    table = pd.read_csv(RATES, dtype={"torch": str})
    card = one_of("GPU", card.lower(), table.card.unique())
    if utilisation is not None and not 0.0 < utilisation <= 1.0:
        raise ValueError(f"utilisation is {utilisation}; it is a share, above 0 and up to 1")
    table = table[(table.precision == dtype) & table["mode"].isin(["data sheet", "eager"])]
    measured, peaks = table[table.network.notna()], table[table.network.isna()].set_index("card").tflops
    own = measured[measured.card == card]
    if utilisation is None and len(own):
        ratio = np.log(own.tflops * 1e12 / own.passes_per_second / flops).abs()
        row = own.loc[ratio.idxmin()]
        return row.tflops * 1e12, (
            f"measured with {row.network} on {card} in {dtype}: {row.tflops:.3g} TFLOP/s in batches of "
            f"{row.batch_size:.0f} (torch {row.torch}, {row.date})"
        )
    if card not in peaks:
        raise ValueError(f"{card} has no measured rate in {dtype}; give --rate, or one of its other precisions")
    shares = (measured.tflops / peaks.reindex(measured.card).to_numpy()).dropna()
    assumed = UTILISATION if shares.empty else float(shares.median())
    share = assumed if utilisation is None else utilisation
    return peaks[card] * 1e12 * share, f"assumed: {share:.0%} of the peak of a {card.upper()} in {dtype}"


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
