"""What extraction costs over the network itself, and that memory does not grow with the number of samples."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.diffusion.models import load_shapes
from workbench.hspace import planning

STEPS, ROUNDS = 3, 3


def bare_loop(model, x_T, batch_size: int) -> float:
    """Seconds of the network alone: the same passes, nothing kept."""
    unet, start = model.unet.unet, time.perf_counter()
    with torch.inference_mode():
        for x_t in x_T.split(batch_size):
            for t in model.schedule.timesteps(STEPS):
                unet(x_t, t)
    return time.perf_counter() - start


@pytest.mark.slow
def test_extraction_is_about_as_fast_as_the_network(model, tmp_path):
    batch_size = model.batch_size()
    n = min(2 * batch_size, 64)
    x_T = wb.sample(model, range(n), steps=1, progress=False).x_T
    bare_loop(model, x_T[:batch_size], batch_size)
    bare, whole = [], []
    for i in range(ROUNDS):
        bare.append(bare_loop(model, x_T, batch_size))
        start = time.perf_counter()
        store = wb.extract(model, n, steps=STEPS, batch_size=batch_size, out=tmp_path / f"{i}.zarr", progress=False)
        whole.append(time.perf_counter() - start)
    speed = statistics.median(b / w for b, w in zip(bare, whole, strict=True))
    print(
        f"\nextraction at {speed:.0%} of the bare network's speed ({n} samples, {STEPS} steps, batch {batch_size}; "
        f"{n * STEPS / statistics.median(whole):.0f} passes a second)"
    )
    run = wb.sample(model, range(3), steps=STEPS, record_h=True, progress=False)
    t = store.timesteps[1]
    np.testing.assert_allclose(store.at(t)[:3], run.h.at(t), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_the_planned_time_against_the_measured(model, tmp_path):
    n, steps = 2 * model.batch_size(), 10
    rate = planning.measure_pass_rate(model)
    flop_rate = rate * planning.count_flops(load_shapes(model.name))
    planned = planning.plan_extraction(
        load_shapes(model.name), n=n, steps=steps, flop_rate=flop_rate, source="measured", on_gpu=False
    )
    start = time.perf_counter()
    store = wb.extract(model, n, steps=steps, out=tmp_path / "a.zarr", progress=False)
    measured = time.perf_counter() - start
    assert len(store) * steps == planned.passes
    print(f"\nplanned {planned.seconds:.1f} s, {planned.seconds / measured:.2f} of what {n} samples took")


MEMORY = """
import json, resource, sys
import torch
from diffusers import DDPMScheduler, UNet2DModel
import workbench as wb

unet = UNet2DModel(
    sample_size=8, block_out_channels=(8, 128), layers_per_block=1, norm_num_groups=4, add_attention=False,
    down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D"),
)
model = wb.wrap(unet, DDPMScheduler(), name="wide", device="cpu")
store = wb.extract(model, int(sys.argv[1]), steps=8, out=sys.argv[2], progress=False, batch_size=64)
size = 4 * len(store) * len(store.timesteps) * int(torch.tensor(store.h_shape).prod())
print(json.dumps([resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, size, store.complete]))
"""


def peak_memory(n: int, path) -> tuple[int, int]:
    out = subprocess.check_output([sys.executable, "-c", MEMORY, str(n), str(path)], text=True)
    peak, size, complete = json.loads(out)
    assert complete
    return peak, size


@pytest.mark.slow
def test_ten_times_the_samples_need_no_more_memory(tmp_path):
    few, _ = peak_memory(150, tmp_path / "few.zarr")
    many, size = peak_memory(1500, tmp_path / "many.zarr")
    print(f"\npeak memory of 1,500 samples over that of 150: {many / few:.3f} ({(many - few) / 1e6:.0f} MB more)")
    print(f"all of their h would be {size / 1e6:.0f} MB")
    assert many - few < 0.2 * size
