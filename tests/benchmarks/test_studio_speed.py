"""From a slider's move to the new image, in passes of the network and in time. Recorded, never asserted."""

from __future__ import annotations

import statistics
import time

import pytest
import torch

import workbench as wb
from workbench.directions.direction import Direction, random_like
from workbench.studio import widgets

pytestmark = pytest.mark.slow

STEPS, MOVES = 50, 9
PREVIEW_GOAL, IMAGE_GOAL = 0.25, 1.5
"""Seconds that a person waits at most, for one sample on 2 quiet cores."""


@pytest.fixture(scope="module")
def studio(model):
    run = wb.sample(model, [0], steps=STEPS, progress=False)
    about = {"model": model.provenance(), "etas": list(run.etas), "method": "benchmark", "parameters": {}, "seeds": []}
    ones = torch.ones(STEPS, *model.h_shape)
    plain = Direction.from_delta(ones, timesteps=run.timesteps, name="ones", provenance=about)
    made = wb.EditStudio(model, run, [random_like(plain, seed=seed) for seed in range(2)])
    made.wait()
    return made


def test_a_move_of_a_slider(studio, model, monkeypatch, record):
    """Both times are of the widget: from the change of the slider's value to that of the picture.

    The pause after which a slider counts as resting is left out: it is waited for on purpose.
    """
    monkeypatch.setattr(widgets, "REST", 0.0)
    previews, images, passes = [], [], []
    slider, x_t = next(iter(studio.scales.values())), studio.session.samples[0].x_T
    arrived = {}
    studio.after.observe(lambda change: arrived.setdefault("preview" in change["new"], time.perf_counter()), "value")
    for k in range(MOVES):
        arrived.clear()
        start = time.perf_counter()
        slider.value = 0.5 + 0.1 * k
        assert studio.wait()
        previews.append(arrived[True] - start)
        images.append(arrived[False] - start)
        start = time.perf_counter()
        with torch.inference_mode():
            model(x_t, 500)
        passes.append(time.perf_counter() - start)
    one, preview, image = (statistics.median(times) for times in (passes, previews, images))
    record("studio: from a move to the preview", preview, "s", goal=f"at most {PREVIEW_GOAL}")
    record("studio: from a move to the preview", preview / one, "U-Net passes")
    record(f"studio: from a move to the image of {STEPS} steps", image, "s", goal=f"at most {IMAGE_GOAL}")
    record(f"studio: from a move to the image of {STEPS} steps", image / one, "U-Net passes")


def test_steps_before_the_window_cost_nothing(studio, record):
    """An edit of the last fifth of the steps against one of all."""
    session, times = studio.session, {}
    session.reset()
    name = next(iter(session.directions))
    for window in ((session.timesteps[0], 0), (session.timesteps[-STEPS // 5], 0)):
        session.set_window(*window)
        taken = []
        for k in range(5):
            session.set_scale(name, 1.0 + 0.1 * k)
            start = time.perf_counter()
            session.render()
            taken.append(time.perf_counter() - start)
        times[window] = statistics.median(taken)
    everywhere, late = times.values()
    record(f"studio: image edited in the last {STEPS // 5} of {STEPS} steps", late / everywhere, "of the time of all")
