"""Inversion with kept noise: every x_t is visited again, and nothing of the image is lost."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from exact import exact_model
from planted import planted

import workbench as wb
from workbench.analysis.spectra import linear_gaussian_inversion, radius_ratio
from workbench.diffusion.noise import FORWARD, normal
from workbench.editing.render import edit, edit_grid

STEPS = 6


@pytest.fixture(scope="module")
def images(tiny):
    return torch.rand(3, *tiny.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def inverted(model, images, **options):
    options = {"steps": STEPS, "method": "edit-friendly", "progress": False, **options}
    return wb.invert(model, images, **options)


@pytest.mark.parametrize("eta", [0.3, 0.7, 1.0, np.linspace(0.2, 1.0, STEPS)])
def test_an_edit_friendly_replay_visits_every_x_t_to_the_bit(tiny, images, eta):
    run = inverted(tiny, images, eta=eta, record_h=True, record_x=True)
    again = wb.replay(run, record_h=True, record_x=True, progress=False)
    assert torch.equal(again.x.values, run.x.values)
    assert torch.equal(again.h.values, run.h.values)
    assert torch.equal(again.x_T, run.x.values[0])


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_an_image_comes_back_where_the_last_step_adds_noise(tiny, images, eta):
    """Stable Diffusion's schedule: alpha_bar of the clean image is that of t = 0, and the steps end at t = 1."""
    schedule = replace(tiny.schedule, offset=1, clean=tiny.schedule.alpha_bar(0))
    model = replace(tiny, schedule=schedule)
    run = inverted(model, images, eta=eta)
    assert run.timesteps[-1] == 1 and schedule.sigma(1, -1, eta) > 0
    assert run.residual.abs().max() < 1e-5
    torch.testing.assert_close(wb.replay(run, progress=False).x0, images, atol=1e-5, rtol=0)
    assert run.stored_noise[-1].abs().max() > 0


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_every_x_t_is_the_forward_process_with_noise_of_its_own(tiny, images, eta):
    run = inverted(tiny, images, eta=eta, seed=7, record_x=True)
    for i, t in enumerate(run.timesteps):
        a = tiny.schedule.alpha_bar(t)
        n_t = normal([7, 8, 9], tiny.image_shape, stream=FORWARD, t=t)
        torch.testing.assert_close(run.x.values[i], a**0.5 * images + (1 - a) ** 0.5 * n_t, atol=1e-4, rtol=1e-4)
    n = torch.stack([normal(range(64), tiny.image_shape, stream=FORWARD, t=t).flatten() for t in run.timesteps])
    assert (torch.corrcoef(n) - torch.eye(STEPS)).abs().max() < 0.05


def test_the_stored_noise_is_the_equation(tiny, images):
    run = inverted(tiny, images, eta=0.7, record_x=True)
    with torch.inference_mode():
        for i, (t, t_prev) in enumerate(tiny.schedule.pairs(STEPS)[:-1]):
            a, a_prev = tiny.schedule.alpha_bar(t), tiny.schedule.alpha_bar(t_prev)
            sigma = 0.7 * ((1 - a_prev) / (1 - a) * (1 - a / a_prev)) ** 0.5
            x_t, eps = run.x.values[i], tiny(run.x.values[i], t)
            mu = a_prev**0.5 * (x_t - (1 - a) ** 0.5 * eps) / a**0.5 + (1 - a_prev - sigma**2) ** 0.5 * eps
            torch.testing.assert_close(run.noise[i], (run.x.values[i + 1] - mu) / sigma, atol=1e-3, rtol=1e-3)
    assert run.noise[-1].abs().sum() == 0


def test_an_image_is_inverted_alike_in_any_batch(tiny, images):
    whole, halves = inverted(tiny, images), inverted(tiny, images, batch_size=1)
    torch.testing.assert_close(whole.noise, halves.noise, atol=1e-3, rtol=1e-3)
    assert not torch.equal(inverted(tiny, images, seed=1).x_T, whole.x_T)


def test_a_part_of_an_inversion_is_the_inversion_of_a_part(tiny, images):
    run = inverted(tiny, images, batch_size=1)
    part = run[[2, 0]]
    assert torch.equal(part.noise, run.noise[:, [2, 0]])
    assert torch.equal(part.residual, run.residual[[2, 0]])
    assert torch.equal(wb.replay(part, progress=False).x0, wb.replay(run, progress=False).x0[[2, 0]])
    assert torch.equal(run[1].noise_at(0), run.noise_at(0, [1]))


def test_x_t_can_be_asked_for(tiny, images):
    run, bare = inverted(tiny, images, record_x=True), inverted(tiny, images)
    for i, t in enumerate(run.timesteps):
        assert torch.equal(bare.x_at(t), run.x.values[i])


def test_edits_and_grids_use_the_stored_noise(tiny, images):
    run = inverted(tiny, images, record_h=True)
    direction = planted(tiny, run, 1, "v")
    grid = edit_grid(tiny, run, direction, scales=[0, 1], batch_size=4, progress=False)
    torch.testing.assert_close(grid.images[:, 0], wb.replay(run, progress=False).x0, atol=1e-4, rtol=1e-4)
    edited = edit(tiny, run, direction, progress=False).x0
    torch.testing.assert_close(grid.images[:, 1], edited, atol=1e-4, rtol=1e-4)
    assert (grid.images[:, 1] - grid.images[:, 0]).abs().max() > 1e-3


@pytest.mark.parametrize("method", ["ddim", "fixed-point", "edit-friendly"])
def test_a_residual_makes_any_reconstruction_exact(tiny, images, method):
    run = inverted(tiny, images, method=method, residual=True)
    assert (run.stored_noise is None) == (method != "edit-friendly")
    plain = wb.replay(run, progress=False).x0
    assert torch.equal(images - plain, run.residual) and run.residual.abs().max() > 1e-4
    torch.testing.assert_close(wb.replay(run, residual=True, progress=False).x0, images, atol=1e-5, rtol=0)


@pytest.mark.parametrize("method", ["ddim", "edit-friendly"])
def test_the_round_trip_error_is_a_psnr_in_decibels(tiny, images, method):
    run = inverted(tiny, images, method=method)
    wrong = (wb.replay(run, progress=False).x0 - images).double().numpy()
    expected = [20 * np.log10(2 / np.sqrt(np.mean(e**2))) for e in wrong]
    np.testing.assert_allclose(run.round_trip_error(), expected, rtol=1e-6)
    assert "round trip" in repr(inverted(tiny, images, residual=True))
    assert np.isinf(wb.sample(tiny, [0, 1], steps=3, progress=False).round_trip_error()).all()


def test_the_bundled_model_reconstructs_a_held_out_image_better_with_steps_and_iterations(model):
    held_out = wb.load_images("avataaars", size=32)[:1]

    def psnr(method, **options):
        return wb.invert(model, held_out, method=method, progress=False, **options).round_trip_error().item()

    few, more = psnr("ddim", steps=12), psnr("ddim", steps=48)
    once, often = (psnr("fixed-point", steps=12, iterations=n) for n in (1, 3))
    assert few + 5 < more
    assert few + 5 < once < often and often >= 38
    assert psnr("edit-friendly", steps=5) >= 38


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eta": 0.0}, r'eta in \(0, 1\].*method="ddim"'),
        ({"eta": 1.5}, r"eta must lie in \[0, 1\]"),
        ({"seed": -1}, "seeds must be integers"),
        ({"noise_repair": True}, "noise_repair is for"),
        ({"method": "fixed-point", "iterations": -1}, "iterations is -1"),
    ],
)
def test_options_that_cannot_be_are_refused(tiny, images, options, message):
    with pytest.raises(ValueError, match=message):
        inverted(tiny, images, **options)


def test_a_residual_that_is_not_there_is_refused(tiny, images):
    with pytest.raises(ValueError, match=r"invert\(\.\.\., residual=True\)"):
        wb.replay(inverted(tiny, images, method="ddim"), residual=True, progress=False)


def test_a_repaired_start_lies_on_the_marginal_and_a_clean_one_inside(tiny, images):
    """x at the least noisy timestep is drawn from the forward process, and the rest is the same inversion."""
    runs = [wb.invert(tiny, images, steps=STEPS, noise_repair=r, record_x=True, seed=4, progress=False) for r in (0, 1)]
    t, a = runs[0].timesteps[-1], tiny.schedule.alpha_bar(runs[0].timesteps[-1])
    n = normal([4, 5, 6], tiny.image_shape, stream=FORWARD, t=t)
    torch.testing.assert_close(runs[1].x_at(t), a**0.5 * images + (1 - a) ** 0.5 * n)
    assert not torch.equal(runs[0].x_at(t), runs[1].x_at(t))
    assert torch.equal(runs[1].x_T, runs[1].x.values[0]) and torch.equal(runs[1].x0, images)


def test_noise_repair_gives_what_the_linear_gaussian_model_predicts():
    """Images of low variance, by many steps: without the repair the radius stays short of the shell for good."""
    s = torch.full((3, 8, 8), 0.005)
    model = exact_model(torch.zeros(3, 8, 8), s)
    x0 = s * torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    steps = range(999, -1, -3)
    spectrum = pd.DataFrame({"power": [0.005**2], "weight": [1.0]})
    for repair in (False, True):
        run = wb.invert(model, x0, steps=list(steps), noise_repair=repair, progress=False)
        start = "first" if repair else "clean"
        variance = linear_gaussian_inversion(spectrum, model.schedule.alpha_bars, steps, start=start)
        if repair:
            a = model.schedule.alpha_bar(0)
            variance = variance * (a * 0.005**2 + 1 - a) / 0.005**2
        expected = radius_ratio(spectrum, model.schedule.alpha_bars, variance)[999]
        measured = run.x_T.square().mean().sqrt().item()
        assert measured == pytest.approx(expected, abs=0.01)
        assert (measured > 0.9) == repair
