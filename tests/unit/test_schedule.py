"""The noise schedule against diffusers' DDIMScheduler, the papers' tables, and its own promises."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler

from workbench.diffusion.schedule import NoiseSchedule, index_of

SHAPE = (2, 3, 4, 4)


@pytest.fixture(scope="module")
def linear() -> NoiseSchedule:
    return NoiseSchedule.linear()


def oracle(spacing: str, steps: int, *, betas: str = "linear") -> tuple[NoiseSchedule, DDIMScheduler]:
    scheduler = DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, beta_schedule=betas, clip_sample=False, timestep_spacing=spacing
    )
    scheduler.set_timesteps(steps)
    # Both compute in float64, so that they can be compared to the last digits.
    scheduler.alphas_cumprod = scheduler.alphas_cumprod.double()
    return NoiseSchedule(scheduler.alphas_cumprod.numpy(), spacing=spacing), scheduler


def draw(seed: int) -> torch.Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("steps", [1, 5, 10, 50, 250, 1000])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_every_step_is_diffusers_ddim_step(spacing, steps, eta):
    schedule, scheduler = oracle(spacing, steps)
    pairs = schedule.pairs(steps)
    assert [t for t, _ in pairs] == scheduler.timesteps.tolist()
    x_t, eps, noise = draw(0).double(), draw(1).double(), draw(2).double()
    for t, t_prev in pairs[:: max(1, steps // 25)] + pairs[-1:]:
        expected = scheduler.step(eps, t, x_t, eta=eta, variance_noise=noise if eta else None)
        ours = schedule.ddim_step(x_t, eps, (t, t_prev), eta=eta, noise=noise)
        torch.testing.assert_close(ours, expected.prev_sample, atol=1e-8, rtol=1e-8)
        torch.testing.assert_close(schedule.predict_x0(x_t, eps, t), expected.pred_original_sample)


@pytest.mark.parametrize("steps", [2, 7, 50, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_t_prev_is_the_next_visited_timestep_whatever_the_spacing(spacing, steps):
    schedule, scheduler = oracle(spacing, steps)
    visited = schedule.timesteps(steps)
    assert list(visited) == scheduler.timesteps.tolist()
    assert [p for _, p in schedule.pairs(steps)] == [*visited[1:], -1]


def test_steps_offset_shifts_the_leading_spacing_as_in_diffusers():
    scheduler = DDIMScheduler(steps_offset=1)
    scheduler.set_timesteps(50)
    schedule = NoiseSchedule(scheduler.alphas_cumprod.double().numpy(), offset=1)
    assert list(schedule.timesteps(50)) == scheduler.timesteps.tolist()
    with pytest.raises(ValueError, match="1000 steps with the offset 1 begin at timestep 1000 of 1000; give fewer"):
        schedule.timesteps(1000)


@pytest.mark.parametrize("betas", ["linear", "scaled_linear", "squaredcos_cap_v2"])
def test_the_noise_of_a_step_is_real_and_its_parts_add_up_to_the_marginal(betas):
    """sigma^2 + D^2 = 1 - alpha_bar_prev, for any schedule, number of steps and eta."""
    schedule, _ = oracle("trailing", 10, betas=betas)
    one = torch.ones(1)
    for steps in (1, 3, 10, 77, 1000):
        for t, t_prev in schedule.pairs(steps):
            for eta in (0.0, 0.5, 1.0):
                sigma = schedule.sigma(t, t_prev, eta)
                direction = schedule.direction_to_xt(one, t, t_prev, eta=eta).item()
                assert 0.0 <= sigma <= 1.0
                assert sigma**2 + direction**2 == pytest.approx(1 - schedule.alpha_bar(t_prev), abs=1e-6)


def test_the_asymmetric_step_splits_the_change_between_p_and_d(linear):
    """A change of eps moves P_t by c_P and D_t by c_D; the symmetric step by their sum (Asyrp, theorem 1)."""
    t, t_prev = 500, 480
    x_t, eps, change = draw(0).double(), draw(1).double(), draw(2).double()
    a, a_prev = linear.alpha_bar(t), linear.alpha_bar(t_prev)
    c_p, c_d = -math.sqrt(a_prev * (1 - a) / a), math.sqrt(1 - a_prev)
    plain = linear.ddim_step(x_t, eps, (t, t_prev))
    asymmetric = linear.ddim_step(x_t, eps + change, (t, t_prev), eps_direction=eps)
    symmetric = linear.ddim_step(x_t, eps + change, (t, t_prev))
    torch.testing.assert_close(asymmetric - plain, c_p * change)
    torch.testing.assert_close(symmetric - plain, (c_p + c_d) * change)


def test_the_linear_schedule_is_that_of_ddpm(linear):
    np.testing.assert_allclose(linear.alpha_bars, DDIMScheduler().alphas_cumprod, rtol=1e-4)
    assert linear.alpha_bar(500) == pytest.approx(0.0778, abs=5e-5) and linear.alpha_bar(-1) == 1.0


def test_adding_noise_and_predicting_the_image_which_is_not_clipped_are_inverse(linear):
    x0, noise = 100 * draw(0).double(), draw(1).double()
    for t in (0, 300, 999):
        torch.testing.assert_close(linear.predict_x0(linear.add_noise(x0, noise, t), noise, t), x0)


def test_the_last_step_needs_no_noise_and_a_step_that_does_says_so(linear):
    x_t, eps = draw(0), draw(1)
    assert linear.sigma(20, -1, 1.0) == 0.0
    assert torch.equal(linear.ddim_step(x_t, eps, (20, -1), eta=1.0), linear.predict_x0(x_t, eps, 20))
    with pytest.raises(ValueError, match="500 -> 480 with eta 0.5"):
        linear.ddim_step(x_t, eps, (500, 480), eta=0.5)


def test_a_list_of_timesteps_is_taken_as_it_is(linear):
    assert linear.timesteps([900, 450, 3]) == (900, 450, 3)
    assert linear.pairs((900, 3)) == [(900, 3), (3, -1)]
    assert linear.timesteps(np.array([7, 2])) == (7, 2)


@pytest.mark.parametrize(
    ("words", "all_steps"),
    [
        ("takes 1 to 1000 steps", [0, -1, 1001]),
        ("strictly decreasing within 999..0", [[1, 2], [500, 500], [1000, 0], [5, -1], []]),
        ("a whole number or a list of whole timesteps", [50.0, True, "50", None, [900.5, 3]]),
    ],
)
def test_steps_that_no_run_can_take_are_refused(linear, words, all_steps):
    for steps in all_steps:
        with pytest.raises(ValueError, match=words):
            linear.timesteps(steps)


def test_there_is_one_eta_a_step_and_within_0_and_1(linear):
    assert linear.etas([1, 0.5, 0], 3) == (1.0, 0.5, 0.0)
    assert linear.etas(1, 3) == (1.0, 1.0, 1.0)
    with pytest.raises(ValueError, match="2 values for 3 steps"):
        linear.etas([0, 1], 3)
    for eta in (-0.1, 1.5, float("nan"), [0.0, 0.5, 2.0]):
        with pytest.raises(ValueError, match=r"eta must lie in \[0, 1\]"):
            linear.etas(eta, 3)


def test_an_unvisited_timestep_names_its_neighbours(linear):
    with pytest.raises(ValueError) as error:
        index_of(610, linear.timesteps(50), trained=linear.T)
    assert str(error.value) == (
        "timestep 610 was not visited; 50 steps of 1000 visit 980, 960, ..., 0 (nearest 620 or 600)"
    )
    with pytest.raises(ValueError, match=r"\(nearest 980\)"):
        index_of(999, linear.timesteps(50))
    with pytest.raises(ValueError, match="timestep 600.5"):
        index_of(600.5, linear.timesteps(50))
    assert index_of(600, linear.timesteps(50)) == 19


def test_a_schedule_that_is_not_one_is_refused_and_none_can_be_changed(linear):
    for alpha_bars in ([0.5, 0.9], [0.5], [1.2, 0.5], [0.5, -0.1], [[0.9, 0.5]], [0.9, float("nan")]):
        with pytest.raises(ValueError, match="decreasing"):
            NoiseSchedule(np.array(alpha_bars))
    with pytest.raises(ValueError, match="read-only"):
        linear.alpha_bars[0] = 0.5
    with pytest.raises(ValueError, match="leading, trailing, linspace"):
        NoiseSchedule(linear.alpha_bars, spacing="karras")


def test_a_schedule_copies_the_array_that_it_is_given():
    alpha_bars = np.array([0.9, 0.5, 0.1])
    schedule = NoiseSchedule(alpha_bars)
    alpha_bars[0] = 0.95
    assert schedule.alpha_bars[0] == 0.9


@pytest.mark.parametrize("eta", [[0.0, 1.0], (0.0, 1.0), np.array([0.0, 1.0]), torch.tensor([0.0, 1.0])])
def test_etas_may_be_any_list_of_numbers(linear, eta):
    assert linear.etas(eta, 2) == (0.0, 1.0)
