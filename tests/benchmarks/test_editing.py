"""What edits cost, as ratios of times that are taken in turn in one run. Recorded, never asserted: `make bench`."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.directions.direction import Direction, random_like

pytestmark = pytest.mark.slow

STEPS = 10


@pytest.fixture(scope="module")
def run(model):
    return wb.sample(model, range(8), steps=STEPS, progress=False)


@pytest.fixture(scope="module")
def direction(model, run):
    provenance = {
        "model": model.provenance(),
        "etas": list(run.etas),
        "method": "benchmark",
        "parameters": {},
        "seeds": [],
    }
    plain = Direction.from_delta(
        torch.ones(STEPS, *model.h_shape), timesteps=run.timesteps, name="ones", provenance=provenance
    )
    return random_like(plain, seed=0)


def test_an_asymmetric_edit_in_unet_passes_a_step(model, run, direction, medians, record):
    plain, symmetric, asymmetric = medians(
        lambda: wb.replay(run, progress=False),
        lambda: wb.edit(model, run, direction, progress=False),
        lambda: wb.edit(model, run, direction, asymmetric=True, progress=False),
    )
    record("symmetric edit", symmetric / plain, "U-Net passes a step")
    record("asymmetric edit", asymmetric / plain, "U-Net passes a step", goal="at most 1.75")


@pytest.mark.parametrize("share", [1, 2])
def test_a_grid_against_its_cells_one_by_one(model, run, direction, medians, record, share):
    """Edited in all steps, where a batch is what a grid gains, and in the last half, where it also shares the first."""
    scales, window = [-3.0, -1.5, 0.0, 1.5, 3.0], (run.timesteps[STEPS - STEPS // share], 0)
    options = {"t_range": window, "progress": False}

    def grid():
        return wb.edit_grid(model, run[:4], direction, scales=scales, **options).images

    def cells():
        edited = [wb.edit(model, run[s], direction, scale=c, **options).x0 for s in range(4) for c in scales]
        return torch.cat(edited).unflatten(0, (4, len(scales)))

    torch.testing.assert_close(grid(), cells(), atol=1e-3, rtol=1e-3)
    batched, one_by_one = medians(grid, cells, repeats=3)
    name = f"edit grid of 4 samples at 5 scales in {STEPS // share} of {STEPS} steps, against its cells one by one"
    record(name, one_by_one / batched, "times as fast", goal="at least 3")


def test_steps_before_the_edit_cost_once(model, run, direction, medians, record):
    last = run.timesteps[-2:]
    scales = [-2.0, -1.0, 1.0, 2.0]
    everywhere, late = medians(
        lambda: wb.edit_grid(model, run[:4], direction, scales=scales, progress=False),
        lambda: wb.edit_grid(model, run[:4], direction, scales=scales, t_range=last, progress=False),
        repeats=3,
    )
    passes = (4 * (STEPS - 2) + 16 * 2) / (16 * STEPS)
    record(f"grid edited in the last 2 of {STEPS} steps ({passes:.2f} of the passes)", late / everywhere, "of the time")
