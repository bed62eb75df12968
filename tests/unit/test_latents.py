"""Latents: Gaussians have the known geometry, straight paths no turns, circles the same everywhere."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy.spatial.distance import pdist

from workbench.analysis.latents import gaussian_reference, latent_statistics, step_geometry
from workbench.analysis.spectra import marginal_radius

ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))  # the linear schedule of both papers' models


@pytest.fixture
def rng():
    return np.random.default_rng(11)


@pytest.mark.parametrize("d", [3 * 32 * 32, 3 * 64 * 64])
def test_a_standard_normal_ensemble_has_the_known_geometry(d):
    n = 200
    found = latent_statistics(np.random.default_rng(d).standard_normal((n, d), dtype=np.float32))
    pairs = n * (n - 1) / 2
    assert found.radius == pytest.approx(np.sqrt(d - 0.5), abs=3 * 0.7071 / np.sqrt(n))
    assert found.distance == pytest.approx(np.sqrt(2 * d - 1), abs=3 / np.sqrt(n))
    assert found.angle == pytest.approx(90, abs=3 * 57.3 / np.sqrt(d * pairs))
    assert found.vertex_angle == pytest.approx(60, abs=3 * 57.3 / np.sqrt(d * n))
    assert found.centroid == pytest.approx(np.sqrt(d / n), rel=3 / np.sqrt(2 * d))
    assert found.coordinate_mean == pytest.approx(0, abs=3 / np.sqrt(n * d))
    assert found.coordinate_variance == pytest.approx(1, abs=3 * np.sqrt(2 / (n * d)))
    assert found["KS tests failed"] == 0
    reference = pd.Series(gaussian_reference(n, d))
    assert list(reference.index) == [*found.index, "autocorrelation"]
    np.testing.assert_allclose(reference.radius, np.sqrt(d - 0.5), atol=0.001)


def test_a_forward_diffused_ensemble_lies_on_the_marginal_radius(rng):
    x0 = rng.uniform(-1, 1, (100, 3, 16, 16))
    noise = rng.standard_normal(x0.shape)
    m2 = (x0**2).mean()
    for t in (900, 400, 50):
        x = np.sqrt(ALPHA_BARS[t]) * x0 + np.sqrt(1 - ALPHA_BARS[t]) * noise
        expected = marginal_radius(ALPHA_BARS[t], mean_square=m2, d=768)
        assert latent_statistics(x).radius == pytest.approx(expected, rel=0.01)
    assert latent_statistics(x0).radius == pytest.approx(marginal_radius(1.0, mean_square=m2, d=768), rel=0.01)


def test_pairs_and_triples_are_those_of_a_naive_computation(rng):
    x = rng.standard_normal((12, 5)) + [3, 0, 0, 0, 1]
    found = latent_statistics(x)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(12, 1)
    angles = np.degrees(np.arccos((unit[i] * unit[j]).sum(axis=1)))
    assert found.distance == pytest.approx(pdist(x).mean())
    assert found.angle == pytest.approx(angles.mean())
    corners = []
    for a in range(12):
        to = np.delete(x, a, axis=0) - x[a]
        to /= np.linalg.norm(to, axis=1, keepdims=True)
        corners.append(np.degrees(np.arccos(np.clip(to @ to.T, -1, 1)))[np.triu_indices(11, 1)])
    assert found.vertex_angle == pytest.approx(np.mean(corners), abs=4 * np.std(corners) / np.sqrt(10_000))
    assert found.centroid == pytest.approx(np.linalg.norm(x.mean(axis=0)))


def test_all_tests_of_a_wide_ensemble_fail_and_few_of_a_normal_one(rng):
    """Bonferroni: of 40 normal ensembles, about one in twenty fails any of its tests."""
    assert latent_statistics(rng.standard_normal((300, 10)) * 2, tests=99)["KS tests failed"] == 1
    failed = [latent_statistics(rng.standard_normal((30, 60)), tests=20)["KS tests failed"] > 0 for _ in range(40)]
    assert np.mean(failed) < 0.15


def test_autocorrelation_is_zero_for_noise_and_that_of_a_known_filter(rng):
    white = rng.standard_normal((50, 1, 32, 32))
    assert latent_statistics(white).autocorrelation == pytest.approx(0, abs=0.02)
    smooth = (white + np.roll(white, 1, axis=2) + np.roll(white, 1, axis=3) + np.roll(white, (1, 1), axis=(2, 3))) / 2
    assert latent_statistics(smooth).autocorrelation == pytest.approx(0.5, abs=0.02)
    assert "autocorrelation" not in latent_statistics(smooth.reshape(50, -1))


def test_a_straight_path_has_no_turns(rng):
    start, step = rng.standard_normal((2, 6, 20))
    angles, _ = step_geometry({t: start + k * step for t, k in {900: 0, 600: 1, 300: 3, 0: 4}.items()})
    np.testing.assert_allclose(angles, np.zeros((2, 6)), atol=1e-5)


def test_a_circle_turns_by_the_same_angle_at_every_step():
    turn = np.arange(40) * 0.05
    radii = np.array([1.0, 4.0])
    path = np.stack([np.cos(turn), np.sin(turn)], axis=1)[:, None, :] * radii[None, :, None]
    angles, _ = step_geometry(enumerate(path))
    np.testing.assert_allclose(angles, np.full((38, 2), np.degrees(0.05)), rtol=1e-6)


def test_centred_cosines_do_not_see_what_the_samples_share(rng):
    h = {t: rng.standard_normal((30, 50)) + 20 for t in (2, 1, 0)}
    _, cosines = step_geometry(h)
    assert cosines.shape == (2, 30) and abs(cosines.mean()) < 0.1
    _, cosines = step_geometry({2: h[2], 1: 3 * (h[2] - h[2].mean(axis=0)) - 50, 0: h[2]})
    np.testing.assert_allclose(cosines, 1)


def test_bad_input_is_refused(rng):
    x = rng.standard_normal((10, 6))
    broken = np.where(np.arange(60).reshape(10, 6) == 25, np.inf, x)
    for call, message in (
        (lambda: latent_statistics(broken), "sample 4 has NaN or infinite"),
        (lambda: latent_statistics(x[:2]), r"shape \(2, 6\); give at least 3"),
        (lambda: latent_statistics(np.where(np.arange(10)[:, None] == 1, 0.0, x)), "sample 1 is 0"),
        (lambda: step_geometry(enumerate(rng.standard_normal((2, 5, 3)))), "2 timesteps given .* at least 3"),
        (lambda: step_geometry({60: x, 30: broken, 0: x}), "sample 4 at timestep 30"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
