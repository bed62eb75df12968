"""Edits give the images that they gave before the renderer was rewritten.

`golden_edits.safetensors` holds the images of every kind of edit, made with the code that had a loop of its own for
each. On the machine that made them the comparison was exact; another one rounds differently, so it is close here.
Run this file as a script to write them again, after a change that is meant to change images.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from planted import planted_boundary
from safetensors.torch import load_file, save_file

import workbench as wb
from workbench.diffusion.sampling import Injection
from workbench.directions.direction import Direction

GOLDEN = Path(__file__).parent / "golden_edits.safetensors"
VISITED = (750, 500, 250, 0)
T = 500


def direction(model, seed, sigma=2.0):
    delta = torch.randn(len(VISITED), *model.h_shape, generator=torch.Generator().manual_seed(seed))
    delta *= sigma / delta.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    about = {"model": model.provenance(), "etas": [1.0] * 4, "method": "planted", "parameters": {}, "seeds": []}
    return Direction.from_delta(delta, timesteps=VISITED, name=f"direction {seed}", provenance=about)


def boundary(model, seed, space):
    return planted_boundary(model, space, T, seed=seed, intercept=0.5, name=f"boundary {seed}")


def edits_of_h(model, run, donors):
    d, e = direction(model, 1), direction(model, 2)
    ways = {
        "symmetric": {},
        "asymmetric": {"asymmetric": True},
        "matched": {"asymmetric": True, "gain": "match"},
        "window": {"t_range": (500, 250)},
    }
    for name, way in ways.items():
        yield f"edit, {name}", wb.edit(model, run, d, scale=1.5, progress=False, **way).x0
        scales = [-1.0, 0.0, 2.0]
        yield f"grid, {name}", wb.edit_grid(model, run, [d, e], scales=scales, progress=False, **way).images
    yield "replaced", wb.edit(model, run, donors, mode="replace", progress=False).x0
    yield "slerp", wb.edit(model, run, donors, mode="slerp", scale=0.4, progress=False).x0
    own = wb.sample(model, [5, 6], steps=VISITED, progress=False)
    yield "sampled with delta_h", wb.replay(own, edit=Injection.adding(d.delta(2.0)[:, None]), progress=False).x0
    yield "replayed", wb.replay(run, progress=False).x0


def crossings(model, runs, real):
    h, x = ([boundary(model, seed, space) for seed in (3, 4)] for space in "hx")
    options = {"distances": [-2.0, 0.0, 3.0], "unit": "distance", "progress": False}
    ways = {
        "h": (h[0], None, {}),
        "x": (None, x[0], {}),
        "both": (h[0], x[0], {}),
        "shift": (h[0], x[0], {"mode": "shift"}),
        "mirror": (h[0], x[0], {"mode": "mirror"}),
        "eta 0": (h[0], x[0], {"eta": 0.0}),
        "every step": (h[0], x[0], {"h_policy": "offset"}),
        "every step, asymmetric": (h[0], x[0], {"h_policy": "offset-asymmetric"}),
        "stale": (h[0], x[0], {"h_policy": "stale"}),
        "without h": (h[0], x[0], {"h_policy": "none"}),
        "lagged": (None, x[0], {"h_align": "lagged"}),
        "no intercept": (replace(h[0], intercept=0.0), replace(x[0], intercept=0.0), {}),
        "great circle": (h[0], x[0], {"keep_norm": True}),
        "two": (h, x, {}),
        "two, joint": (h, x, {"multi": "joint"}),
        "two, conditional": (h, x, {"multi": "conditional"}),
    }
    for name, (in_h, in_x, way) in ways.items():
        yield f"crossing, {name}", wb.cross_boundary(model, real, in_h, in_x, **options, **way).images
    own = wb.cross_boundary(model, runs, h[0], x[0], **{**options, "eta": None}).images
    yield "crossing, the run's own noise", own


def renderings(model, run, real):
    session = wb.EditSession(model, run, [direction(model, 1), direction(model, 2), boundary(model, 3, "h")])
    session.add(boundary(model, 4, "x"))
    for image in real:
        session.add_image(image)
    for k in (0, len(run)):
        session.pick(k)
        for process in ("symmetric", "asymmetric"):
            session.set_process(process)
            session.set_scale("direction 1", 1.5)
            session.set_against("direction 1", ["direction 2"])
            session.set_window(500, 0)
            name = f"session, sample {k}, {process}"
            yield name, session.render().after
            yield f"{name}, strip", session.grid({"direction 2": [-1.0, 0.0, 1.0]}).images
            yield f"{name}, predictions", session.predictions().after
            yield f"{name}, path", torch.from_numpy(np.array(session.path(T)))
        session.set_process("single-step")
        session.set_distance("boundary 3 (h, t=500)", 2.0)
        session.set_distance("boundary 4 (x, t=500)", -1.0)
        yield f"session, sample {k}, single step", session.render().after
        yield f"session, sample {k}, single step, path", torch.from_numpy(np.array(session.path(250)))


def previews(model):
    run = wb.sample(model, [7], steps=12, progress=False)
    found = direction(model, 1).resampled(12)
    session = wb.EditSession(model, run, [found])
    session.preview_steps = 4
    session.set_scale(next(iter(session.directions)), 1.0)
    for process in ("symmetric", "asymmetric"):
        session.set_process(process)
        yield f"preview, {process}", session.render(preview=True).after


def outputs(model):
    run = wb.sample(model, range(3), steps=VISITED, record_h=True, record_x=True, progress=False)
    donors = wb.sample(model, range(3, 6), steps=VISITED, record_h=True, progress=False)
    still = wb.sample(model, range(2), steps=VISITED, eta=0.0, progress=False)
    images = torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    real = wb.invert(model, images, steps=VISITED, record_x=True, residual=True, progress=False)
    yield from edits_of_h(model, run, donors)
    yield from ((f"image, {name}", x) for name, x in edits_of_h(model, real, donors[:2]) if "delta_h" not in name)
    grid = wb.edit_grid(model, real, direction(model, 1), scales=[0.0, 2.0], residual=True, progress=False)
    yield "image, grid, residual", grid.images
    yield from crossings(model, still, real)
    yield from renderings(model, run, images)
    yield from previews(model)


def test_edits_give_the_images_that_they_gave_before(tiny):
    expected, seen = load_file(GOLDEN), set()
    for name, images in outputs(tiny):
        seen.add(name)
        torch.testing.assert_close(images, expected[name], atol=1e-4, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")
    assert seen == set(expected)


@pytest.mark.parametrize("name", ["edit, symmetric", "crossing, both", "session, sample 0, symmetric"])
def test_golden_images_are_edited(name):
    """What is compared is not the plain sample."""
    golden = load_file(GOLDEN)
    plain = golden["replayed"] if "crossing" not in name else golden["crossing, h"][:, 1]
    image = golden[name][:, 2] if "crossing" in name else golden[name]
    assert (image - (plain[0] if image.ndim == 3 else plain)).abs().max() > 1e-2


if __name__ == "__main__":
    from diffusers import DDPMScheduler

    from tests.conftest import random_unet

    made = outputs(wb.wrap(random_unet(), DDPMScheduler(), name="tiny", device="cpu"))
    save_file({name: images.contiguous() for name, images in made}, GOLDEN)
