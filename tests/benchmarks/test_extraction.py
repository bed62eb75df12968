"""What extraction costs over the network itself, and whether its plan says so."""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.diffusion.loading import load_shapes
from workbench.hspace import planning
from workbench.hspace.extract import chunk_size

STEPS, ROUNDS = 10, 3
CHUNKS = 4
"""A chunk is written while the next is computed, so of one alone nothing would be hidden."""


def bare_loop(model, x_T, batch_size: int) -> float:
    """Seconds of the network alone: the same passes, nothing kept."""
    unet, start = model.unet.unet, time.perf_counter()
    with torch.inference_mode():
        for x_t in x_T.split(batch_size):
            for t in model.schedule.timesteps(STEPS):
                unet(x_t, t)
    return time.perf_counter() - start


@pytest.mark.slow
def test_extraction_is_about_as_fast_as_the_network(model, tmp_path, record):
    batch_size = model.batch_size()
    n = CHUNKS * chunk_size(model.h_shape, model.image_shape, steps=STEPS, n=10**6, record_x=False)
    x_T = wb.sample(model, range(n), steps=1, progress=False).x_T
    bare_loop(model, x_T[:batch_size], batch_size)
    bare, whole = [], []
    for i in range(ROUNDS):
        bare.append(bare_loop(model, x_T, batch_size))
        start = time.perf_counter()
        store = wb.extract(model, n, steps=STEPS, batch_size=batch_size, out=tmp_path / f"{i}.zarr", progress=False)
        whole.append(time.perf_counter() - start)
    speed = statistics.median(b / w for b, w in zip(bare, whole, strict=True))
    record("extraction against the bare U-Net", speed, "of the speed", goal="at least 0.95")
    record(f"extraction in batches of {batch_size}", n * STEPS / statistics.median(whole), "passes a second")
    run = wb.sample(model, range(3), steps=STEPS, record_h=True, progress=False)
    t = store.timesteps[1]
    np.testing.assert_allclose(store.at(t)[:3], run.h.at(t), rtol=2e-3, atol=2e-3)


@pytest.mark.slow
def test_the_planned_time_against_the_measured(model, tmp_path, record):
    n, steps = 2 * model.batch_size(), 10
    rate = planning.measure_pass_rate(model)
    flop_rate = rate * planning.count_flops(load_shapes(model.name))
    planned = planning.plan_extraction(load_shapes(model.name), n=n, steps=steps, flop_rate=flop_rate, on_gpu=False)
    start = time.perf_counter()
    store = wb.extract(model, n, steps=steps, out=tmp_path / "a.zarr", progress=False)
    measured = time.perf_counter() - start
    assert len(store) * steps == planned.passes
    record("planned time against the measured", planned.seconds / measured, "times as long", goal="0.75 to 1.25")
