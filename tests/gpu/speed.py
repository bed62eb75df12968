"""Rates of networks, of extraction, of edits and of the Jacobian, beside what the card can do at most."""

from __future__ import annotations

import copy
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import torch
from diffusers import UNet2DModel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import workbench as wb
from workbench.diffusion.models import compile_blocks
from workbench.diffusion.noise import initial_noise, normal
from workbench.diffusion.sampling import StepRecord
from workbench.diffusion.unet import SplitUNet
from workbench.directions.direction import Direction
from workbench.formats import layouts
from workbench.hspace import planning
from workbench.hspace.extract import WRITERS, chunk_size

NETWORK = "google/ddpm-ema-celebahq-256"
"""A published architecture; its weights are random here, which cost the same."""


def network(
    name: str, *, device: torch.device, dtype: str = "float32", mode: str = "eager", batch: int = 1
) -> wb.Model:
    """A model of a published architecture with random weights, or a bundled one; compiled for one size of batch."""
    if name not in layouts.HUB:
        model = wb.load_model(name, device=device, dtype=dtype)
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            unet = UNet2DModel.from_config(layouts.HUB[name].config())
        model = wb.wrap(unet, wb.NoiseSchedule.linear(), name=name, device=device, dtype=dtype)
    if mode != "eager":
        compile_blocks(model, mode, n=batch)
    return model


def timed(function: Callable, device: torch.device) -> float:
    """Seconds of a call, with the work that it leaves to the device."""
    wait(device)
    start = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - start


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peaks(device: torch.device, *, side: int, megabytes: int) -> dict:
    """Rates of a large matrix product and of a large copy on the device; random values, medians."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    c = torch.randn(megabytes * 2**18, device=device)
    d = torch.empty_like(c)
    product, copy = lambda: torch.mm(a, b), lambda: d.copy_(c)
    for warm_up in (product, copy):
        warm_up()
    seconds = [statistics.median(timed(each, device) for _ in range(10)) for each in (product, copy)]
    return {"bfloat16 TFLOP/s": 2 * side**3 / seconds[0] / 1e12, "copy GB/s": 8 * c.numel() / seconds[1] / 1e9}


class Traffic(TorchDispatchMode):
    """Adds up the bytes that operations read and write; those that fused kernels save are in it."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if not func.is_view:
            tensors = [each for each in tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
            self.bytes += sum(each.numel() * each.element_size() for each in tensors)
        return out


class Utilisation:
    """Mean of what nvidia-smi shows while the block runs; empty without it."""

    def __enter__(self) -> Utilisation:
        query = ["nvidia-smi", "--query-gpu=utilization.gpu,utilization.memory,power.draw", "-lms", "200"]
        form = ["--format=csv,noheader,nounits"]
        found = shutil.which("nvidia-smi") and torch.cuda.is_available()
        self.process = subprocess.Popen([*query, *form], stdout=subprocess.PIPE, text=True) if found else None
        self.means = {}
        return self

    def __exit__(self, *_) -> None:
        if self.process is not None:
            self.process.terminate()
            lines = [line.split(",") for line in self.process.communicate()[0].splitlines()]
            seen = pd.DataFrame(lines, columns=["GPU busy %", "memory busy %", "W"])
            self.means = seen.apply(pd.to_numeric, errors="coerce").mean().dropna().to_dict()


def bare_loop(model: wb.Model, x_T: torch.Tensor, batch_size: int, timesteps: Sequence[int]) -> float:
    """Seconds of the network alone: the passes of sampling, nothing kept."""

    def passes() -> None:
        with torch.inference_mode():
            for x_t in x_T.split(batch_size):
                for t in timesteps:
                    model.unet(x_t, t)

    return timed(passes, model.device)


def network_rates(model: wb.Model, *, batch_size: int, steps: int, limits: dict) -> dict:
    """Passes a second of the network alone, and what share of the card's peaks that is."""
    x_t = initial_noise(range(batch_size), model.x_shape).to(model.device)
    timesteps = model.schedule.timesteps(steps)
    first = bare_loop(model, x_t, batch_size, timesteps[:2])
    with Utilisation() as busy:
        rate = steps * batch_size / bare_loop(model, x_t, batch_size, timesteps)
    flops = planning.count_flops(SplitUNet(copy.deepcopy(model.unet.unet).to("meta")))
    found = {"passes/s": rate, "images/s of 50 steps": rate / 50, "seconds of the first passes": first}
    found |= {"TFLOP/s": rate * flops / 1e12, "share of the product": rate * flops / 1e12 / limits["bfloat16 TFLOP/s"]}
    if not model.compiled:
        with torch.inference_mode(), Traffic() as traffic:
            model.unet(x_t, timesteps[0])
        found["GB/s"] = traffic.bytes / batch_size * rate / 1e9
        found["share of the copy"] = found["GB/s"] / limits["copy GB/s"]
    return found | busy.means


def extraction_share(model: wb.Model, *, chunks: int, steps: int, batch_size: int) -> dict:
    """Rate of an extraction to disk, as a share of the bare loop's; both of the same passes in the same batches."""
    size = chunk_size(model.h_shape, model.x_shape, steps=steps, n=10**6, record_x=False)
    n, timesteps = chunks * size, model.schedule.timesteps(steps)
    x_T = initial_noise(range(n), model.x_shape).to(model.device)
    bare_loop(model, x_T[:batch_size], batch_size, timesteps[:2])
    # The pinned memory that an extraction has after its first chunks, which torch keeps for reuse.
    held = [StepRecord.empty(model, timesteps, size, model.h_shape) for _ in range(WRITERS["cuda"] + 2)]
    del held
    with TemporaryDirectory() as folder:
        options = {"batch_size": batch_size, "progress": False}
        wb.extract(model, size, steps=2, out=Path(folder) / "warm.zarr", **options)
        bare = bare_loop(model, x_T, batch_size, timesteps)
        with Utilisation() as busy:
            whole = timed(
                lambda: wb.extract(model, n, steps=steps, out=Path(folder) / "h.zarr", **options), model.device
            )
    found = {"share": bare / whole, "goal": 0.95, "passes/s": n * steps / whole, "batch size": batch_size, "n": n}
    return found | busy.means


def grid_against_cells(model: wb.Model, *, steps: int) -> dict:
    """Seconds of a grid of 5 samples at 5 scales, and of the same cells one by one."""
    run = wb.sample(model, range(5), steps=steps, progress=False)
    about = {"model": model.provenance(), "etas": list(run.etas), "method": "random", "parameters": {}, "seeds": []}
    delta = normal([0], (steps, *model.h_shape), stream=0)[0]
    direction = Direction.from_delta(delta, timesteps=run.timesteps, name="random", provenance=about)
    scales = [-0.2, -0.1, 0.1, 0.2, 0.3]
    cells = [(s, scale) for s in range(5) for scale in scales]

    def one_by_one(cells=cells) -> None:
        for s, scale in cells:
            wb.edit(model, run[s], direction, scale=scale, progress=False)

    one_by_one(cells[:1])
    seconds = timed(lambda: wb.edit_grid(model, run, direction, scales=scales, progress=False), model.device)
    singly = timed(one_by_one, model.device)
    return {"grid, seconds": seconds, "cells, seconds": singly, "times as fast": singly / seconds, "goal": 3.0}


RELEASED = 3 * 50 * 2
"""Products of the released algorithm for three vectors at most: 50 iterations a vector, each with J and with J'."""


def jacobian(model: wb.Model, *, trained: wb.Model) -> dict:
    """Products of the top 3 of a trained network against the released algorithm's, and the time of one on this network.

    The spectrum of random weights says nothing about the products that a trained network needs.
    """
    run = wb.sample(trained, [0], steps=10, progress=False)
    found = wb.find_jacobian(trained, run, t=run.timesteps[5], k=3, tol=1e-3, progress=False)
    own = wb.sample(model, [0], steps=10, progress=False)
    options = {"t": own.timesteps[5], "k": 1, "tol": 0.1, "progress": False}
    wb.find_jacobian(model, own, **options)
    start = time.perf_counter()
    products = wb.find_jacobian(model, own, **options).products
    each = (time.perf_counter() - start) / products
    share = found.products / RELEASED
    return {"products": found.products, "of the released": share, "goal": 1 / 8, "ms a product": 1e3 * each}
