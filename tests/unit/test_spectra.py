"""Spectra: waves and noise have the known ones, and inversion shrinks Gaussian data by the ratios of the notes."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.analysis.spectra import data_spectrum, linear_gaussian_inversion, marginal_radius, radius_ratio

ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))  # the linear schedule of both papers' models


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def power_law(size, gamma, *, mean_square=0.3):
    """Spectrum of size^2 pixels that falls as frequency^-gamma: a model of photographs for gamma 2 to 3."""
    along = np.fft.fftfreq(size) * size
    frequency, weight = np.unique(np.hypot(along[:, None], along[None, :]).ravel(), return_counts=True)
    power = np.maximum(frequency, 1.0) ** -gamma
    power *= mean_square * weight.sum() / (weight @ power)
    return pd.DataFrame({"power": power, "weight": weight.astype(float)}, index=frequency)


def ratio(spectrum, grid, *, noise_repair=False, **options):
    """Radius over r(t) at the last timestep; the repair starts on the marginal of the first."""
    variance = linear_gaussian_inversion(spectrum, ALPHA_BARS, grid, **options)
    if noise_repair:
        a = ALPHA_BARS[min(grid)]
        variance = variance * (a + (1 - a) / spectrum["power"])
    return radius_ratio(spectrum, ALPHA_BARS, variance).iloc[-1]


def inversion_grid(t, steps):
    """Timesteps of BoundaryDiffusion's inversion to t."""
    return tuple(int(v) for v in np.linspace(0, 1, steps) * t)


@pytest.mark.parametrize(("t", "radius"), [(999, 443.4), (500, 431.2), (200, 326.0)])
def test_marginal_radius_is_that_of_the_notes(t, radius):
    assert marginal_radius(ALPHA_BARS[t], mean_square=0.3, d=3 * 256**2) == pytest.approx(radius, abs=0.06)


def test_the_power_spectrum_of_noise_is_flat_and_of_a_wave_a_single_line(rng):
    white = data_spectrum(rng.standard_normal((200, 3, 32, 32)))
    np.testing.assert_allclose(white.power, 1, atol=5 / np.sqrt(600 * white.weight.min()))
    wave = np.tile(np.cos(2 * np.pi * 5 * np.arange(32) / 32), (2, 1, 32, 1))
    found = data_spectrum(wave)
    assert found.power.idxmax() == 5
    assert found.power @ found.weight == pytest.approx(32 * 32 / 2)
    assert found.power.drop(5).max() < 1e-20


def test_a_spectrum_holds_the_mean_square_of_the_images(rng):
    images = rng.uniform(-1, 1, (7, 3, 8, 6)) + 0.2
    found = data_spectrum(images)
    assert found.weight @ found.power / 48 == pytest.approx((images**2).mean())
    assert found.weight.sum() == 48 and found.index.name == "frequency"


# Inverted over marginal radius at 256 x 256 pixels, m2 0.3, for 10, 20, 40, 100, 200, 500 and all steps.
RATIOS = [
    (500, 2, (0.756, 0.875, 0.937, 0.974, 0.986, 0.994, 0.994)),
    (999, 2, (0.571, 0.762, 0.876, 0.948, 0.973, 0.989, 0.993)),
    (500, 3, (0.509, 0.642, 0.770, 0.875, 0.921, 0.950, 0.950)),
    (999, 3, (0.381, 0.501, 0.637, 0.793, 0.872, 0.928, 0.947)),
]


@pytest.mark.parametrize(("t", "gamma", "expected"), RATIOS)
def test_the_linear_gaussian_model_gives_the_table_of_radius_ratios(t, gamma, expected):
    """To half a unit of its last digit; "all steps" is `inversion_grid(t, t + 1)`, as the paper's code makes it."""
    spectrum = power_law(256, gamma)
    grids = [inversion_grid(t, steps) for steps in (10, 20, 40, 100, 200, 500, t + 1)]
    found = [ratio(spectrum, grid) for grid in grids]
    np.testing.assert_allclose(found, expected, atol=6e-4)


@pytest.mark.parametrize(
    ("t", "gamma", "plain", "repaired"), [(500, 3, 0.950, 0.978), (999, 3, 0.947, 0.977), (500, 4, 0.578, 0.984)]
)
def test_noise_repair_mends_what_more_steps_do_not(t, gamma, plain, repaired):
    spectrum, grid = power_law(256, gamma), inversion_grid(t, t + 1)
    assert ratio(spectrum, grid) == pytest.approx(plain, abs=1e-3)
    assert ratio(spectrum, grid, noise_repair=True) == pytest.approx(repaired, abs=1e-3)


@pytest.mark.parametrize("start", ["first", "clean"])
def test_the_recursion_is_ddim_inversion_of_samples_with_the_exact_network(start, rng):
    """The oracle inverts samples of an uncorrelated Gaussian, step by step as `invert` does."""
    s2 = np.array([2.0, 0.3, 0.01, 0.0])
    timesteps = (20, 300, 700)

    def eps(x, t):
        return np.sqrt(1 - ALPHA_BARS[t]) / (ALPHA_BARS[t] * s2 + 1 - ALPHA_BARS[t]) * x

    x0 = rng.standard_normal((50, 4)) * np.sqrt(s2)
    moments = (x0**2).mean(axis=0)
    levels = {t: ALPHA_BARS[t] for t in timesteps} | {-1: 1.0}
    pairs = list(zip((-1, *timesteps[:-1]), timesteps, strict=True))
    x, after = x0, []
    for t_prev, t in pairs if start == "clean" else pairs[1:]:
        before, e = x, eps(x, max(t_prev, 0))
        p = (before - np.sqrt(1 - levels[t_prev]) * e) / np.sqrt(levels[t_prev])
        x = np.sqrt(levels[t]) * p + np.sqrt(1 - levels[t]) * e
        after.append((x**2).mean(axis=0))
    spectrum = pd.DataFrame({"power": s2, "weight": 1.0})
    found = linear_gaussian_inversion(spectrum, ALPHA_BARS, timesteps[::-1], start=start)
    assert found.index.tolist() == list(timesteps)
    gains = found.to_numpy()[-len(after) :] / np.where(s2 > 0, s2, 1)
    np.testing.assert_allclose(gains * moments, after, rtol=1e-10)
    marginal = ALPHA_BARS[700] * s2.mean() + 1 - ALPHA_BARS[700]
    assert radius_ratio(spectrum, ALPHA_BARS, found)[700] == pytest.approx(np.sqrt(found.loc[700].mean() / marginal))


def test_white_data_of_unit_variance_stays_on_the_shell():
    """Its marginal is N(0, I) at every timestep and eps moves nothing along it but by Euler's error."""
    white = power_law(8, 0, mean_square=1.0)
    assert ratio(white, range(1000)) == pytest.approx(1, abs=5e-3)


def test_bad_input_is_refused(rng):
    spectrum = power_law(4, 2)
    for call, message in (
        (lambda: data_spectrum(rng.standard_normal((10, 6))), r"\(10, 6\)"),
        (lambda: linear_gaussian_inversion(spectrum, ALPHA_BARS, [0, 1000]), r"0..999, not \[0, 1000\]"),
        (lambda: linear_gaussian_inversion(spectrum, ALPHA_BARS, [0, 9], start="last"), "'last'"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
