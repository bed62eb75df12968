"""Latents: Gaussians have the known geometry, straight paths no turns, circles the curvature of their radius."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from scipy.spatial.distance import pdist

from workbench.analysis.latents import gaussian_reference, latent_statistics, statistics_over_time, step_geometry
from workbench.analysis.spectra import marginal_radius

ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))  # the linear schedule of both papers' models


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def numbers(x, **options):
    return latent_statistics(x, **options).values


@pytest.mark.parametrize("d", [3 * 32 * 32, 3 * 64 * 64])
def test_a_standard_normal_ensemble_has_the_known_geometry(d):
    n = 200
    statistics = latent_statistics(np.random.default_rng(d).standard_normal((n, d), dtype=np.float32))
    found = statistics.values
    pairs = n * (n - 1) / 2
    assert found.radius == pytest.approx(np.sqrt(d - 0.5), abs=3 * 0.7071 / np.sqrt(n))
    assert found.radius_sd == pytest.approx(0.7071, abs=3 * 0.7071 / np.sqrt(2 * n))
    assert found.distance == pytest.approx(np.sqrt(2 * d - 1), abs=3 / np.sqrt(n))
    assert found.angle == pytest.approx(90, abs=3 * 57.3 / np.sqrt(d * pairs))
    assert found.angle_sd == pytest.approx(57.3 / np.sqrt(d), rel=3 / np.sqrt(2 * pairs))
    assert found.vertex_angle == pytest.approx(60, abs=3 * found.vertex_angle_sd / np.sqrt(n))
    assert found.centroid == pytest.approx(np.sqrt(d / n), rel=3 / np.sqrt(2 * d))
    assert found.centroid_expected == pytest.approx(np.sqrt(d / n), rel=1e-3)
    assert found.coordinate_mean == pytest.approx(0, abs=3 / np.sqrt(n * d))
    assert found.coordinate_variance == pytest.approx(1, abs=3 * np.sqrt(2 / (n * d)))
    assert min(found.ks_coordinates_p, found.ks_projections_p) > 0.01
    np.testing.assert_allclose(statistics.table().loc["radius"], np.sqrt(d - 0.5), atol=0.2)


def test_the_references_are_those_of_the_notes():
    """443.40, 110.85, 55.42 for radii, sqrt(2d) for distances and 57.3/sqrt(d) degrees at the origin."""
    for size, radius, distance, angle in (
        (256, 443.40, 627.07, 0.129),
        (64, 110.85, 156.8, 0.52),
        (32, 55.42, 78.4, 1.03),
    ):
        reference = gaussian_reference(100, 3 * size**2)
        assert reference["radius"] == pytest.approx(radius, abs=0.01)
        assert reference["radius_sd"] == pytest.approx(0.707, abs=1e-3)
        assert reference["distance"] == pytest.approx(distance, abs=0.06)
        assert reference["angle_sd"] == pytest.approx(angle, abs=0.005)


def test_a_forward_diffused_ensemble_lies_on_the_marginal_radius(rng):
    x0 = rng.uniform(-1, 1, (100, 3, 16, 16))
    noise = rng.standard_normal(x0.shape)
    m2 = (x0**2).mean()
    diffused = {t: np.sqrt(ALPHA_BARS[t]) * x0 + np.sqrt(1 - ALPHA_BARS[t]) * noise for t in (900, 400, 50)}
    table = statistics_over_time(diffused | {-1: x0}, alpha_bars=ALPHA_BARS, mean_square=m2)
    assert table.index.tolist() == [900, 400, 50, -1] and table.index.name == "t"
    np.testing.assert_allclose(table["radius_ratio"], 1, atol=0.01)
    assert table.loc[900, "reference_radius"] == marginal_radius(ALPHA_BARS[900], mean_square=m2, d=768)


def test_pairs_and_triples_are_those_of_a_naive_computation(rng):
    x = rng.standard_normal((12, 5)) + [3, 0, 0, 0, 1]
    found = numbers(x, triples=200_000)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    i, j = np.triu_indices(12, 1)
    angles = np.degrees(np.arccos((unit[i] * unit[j]).sum(axis=1)))
    assert found.distance == pytest.approx(pdist(x).mean()) and found.distance_sd == pytest.approx(pdist(x).std(ddof=1))
    assert found.angle == pytest.approx(angles.mean()) and found.angle_sd == pytest.approx(angles.std(ddof=1))
    without = np.array([pdist(np.delete(x, a, axis=0)).mean() for a in range(12)])
    assert found.distance_se == pytest.approx(np.sqrt(11 / 12 * ((without - without.mean()) ** 2).sum()))
    corners = []
    for a in range(12):
        to = np.delete(x, a, axis=0) - x[a]
        to /= np.linalg.norm(to, axis=1, keepdims=True)
        corners.append(np.degrees(np.arccos(np.clip(to @ to.T, -1, 1)))[np.triu_indices(11, 1)])
    assert found.vertex_angle == pytest.approx(np.mean(corners), abs=4 * np.std(corners) / np.sqrt(200_000))
    assert found.centroid == pytest.approx(np.linalg.norm(x.mean(axis=0)))
    assert found.radius_q25 == pytest.approx(np.quantile(np.linalg.norm(x, axis=1), 0.25))


def test_standard_errors_of_pair_means_are_the_spread_between_ensembles(rng):
    """Pairs share samples: their naive standard error would be far too small."""
    runs = [numbers(rng.standard_normal((40, 20)) * [2.0] * 20, tests=1, triples=10) for _ in range(150)]
    assert np.mean([run.distance_se for run in runs]) == pytest.approx(np.std([run.distance for run in runs]), rel=0.25)
    shifted = [numbers(rng.standard_normal((40, 20)) + 1, tests=1, triples=10) for _ in range(150)]
    assert np.mean([run.angle_se for run in shifted]) == pytest.approx(np.std([run.angle for run in shifted]), rel=0.25)


def test_an_ensemble_off_centre_shows_it(rng):
    """The follow-up paper's signs of it: the angle at the origin below 90 degrees and a long centroid."""
    off = numbers(rng.standard_normal((100, 3072)) + 0.2)
    assert off.centroid > 1.5 * off.centroid_expected
    assert off.angle == pytest.approx(np.degrees(np.arccos(0.04 / 1.04)), abs=0.2)


def test_kolmogorov_smirnov_tests_are_scipys_with_bonferroni(rng):
    x = rng.standard_normal((80, 10)) * 1.4
    found = latent_statistics(x, tests=99)
    assert len(found.ks_coordinates) == 10
    for row in found.ks_coordinates.itertuples():
        test = stats.kstest(x[:, row.coordinate], "norm")
        assert row.statistic == pytest.approx(test.statistic)
        assert row.p == pytest.approx(min(1.0, 10 * test.pvalue))
    assert (found.ks_coordinates.p < 0.05).any()


def test_corrected_tests_rarely_reject_a_normal_ensemble(rng):
    rejected = [numbers(rng.standard_normal((30, 40)), tests=10).ks_coordinates_p < 0.05 for _ in range(40)]
    assert np.mean(rejected) < 0.15


def test_autocorrelation_is_zero_for_noise_and_that_of_a_known_filter(rng):
    white = rng.standard_normal((50, 1, 32, 32))
    assert numbers(white).autocorrelation == pytest.approx(0, abs=0.02)
    smooth = (white + np.roll(white, 1, axis=2) + np.roll(white, 1, axis=3) + np.roll(white, (1, 1), axis=(2, 3))) / 2
    assert numbers(smooth).autocorrelation == pytest.approx(0.5, abs=0.02)
    assert "autocorrelation" not in numbers(smooth.reshape(50, -1))


def test_a_straight_path_has_no_turns_and_its_lengths(rng):
    start, step = rng.standard_normal((2, 6, 20))
    path = np.stack([start + k * step for k in (0, 1, 3, 4)])
    found = step_geometry(path, timesteps=[900, 600, 300, 0])
    np.testing.assert_allclose(found.lengths, np.outer([1, 2, 1], np.linalg.norm(step, axis=1)))
    np.testing.assert_allclose(found.angles, 0, atol=1e-5)
    np.testing.assert_allclose(found.straightness, 1)


def test_a_circle_has_the_inverse_of_its_radius_as_curvature():
    turn = np.arange(40) * 0.05
    radii = np.array([1.0, 4.0])
    path = np.stack([np.cos(turn), np.sin(turn)], axis=1)[:, None, :] * radii[None, :, None]
    found = step_geometry(iter(path))
    np.testing.assert_allclose(found.angles, np.degrees(0.05), rtol=1e-6)
    np.testing.assert_allclose(found.curvatures, np.broadcast_to(1 / radii, (38, 2)), rtol=1e-3)
    np.testing.assert_allclose(found.cosines, np.cos(0.05))
    np.testing.assert_allclose(found.straightness, np.sin(39 * 0.025) / (39 * np.sin(0.025)))


def test_centred_cosines_do_not_see_what_the_samples_share(rng):
    h = {t: rng.standard_normal((30, 50)) + 20 for t in (2, 1, 0)}
    found = step_geometry(h)
    assert found.cosines.min() > 0.9 and abs(found.centred_cosines.mean()) < 0.1
    assert found.timesteps == (2, 1, 0)
    same = step_geometry([h[2], 3 * (h[2] - h[2].mean(axis=0)) - 50, h[2]])
    np.testing.assert_allclose(same.centred_cosines, 1)


def test_bad_input_is_refused(rng):
    x = rng.standard_normal((10, 6))
    broken = np.where(np.arange(60).reshape(10, 6) == 25, np.inf, x)
    for call, message in (
        (lambda: latent_statistics(broken), "sample 4 has NaN or infinite"),
        (lambda: statistics_over_time({60: x, 30: broken}), "sample 4 at timestep 30"),
        (lambda: latent_statistics(x[:2]), r"shape \(2, 6\); give at least 3"),
        (lambda: latent_statistics(np.where(np.arange(10)[:, None] == 1, 0.0, x)), "sample 1 is 0"),
        (lambda: statistics_over_time({5: x}, mean_square=0.3), "alpha_bars and mean_square"),
        (lambda: statistics_over_time({}), "no ensemble"),
        (lambda: step_geometry(rng.standard_normal((2, 5, 3))), "2 timesteps given .* at least 3"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
