"""Dynamics: Gaussians have the known geometry, inversion the known shrinkage, and noise no separability."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from scipy.spatial.distance import pdist
from sklearn.covariance import ledoit_wolf
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold

from workbench.analysis.dynamics import (
    data_spectrum,
    gaussian_reference,
    inversion_grid,
    latent_statistics,
    linear_gaussian_inversion,
    marginal_radius,
    power_law_spectrum,
    separability,
    separability_over_time,
    statistics_over_time,
    step_geometry,
)
from workbench.analysis.intervals import CROSS_VALIDATED, wilson_interval

ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
"""The linear schedule of both papers' models."""


@pytest.fixture
def rng():
    return np.random.default_rng(11)


class Store:
    """What the module needs of a store."""

    def __init__(self, by_t):
        self.by_t, self.timesteps = by_t, tuple(by_t)

    def at(self, t):
        return self.by_t[t]


@pytest.mark.parametrize("d", [3 * 32 * 32, 3 * 64 * 64])
def test_a_standard_normal_ensemble_has_the_known_geometry(d):
    n = 200
    found = latent_statistics(np.random.default_rng(d).standard_normal((n, d), dtype=np.float32))
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
    assert found.ks_coordinates.p.min() > 0.01 and found.ks_projections.p.min() > 0.01


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


@pytest.mark.parametrize(
    ("t", "radius"),
    [(999, 443.4), (800, 443.2), (700, 442.3), (600, 439.4), (550, 436.3), (500, 431.2), (450, 423.4), (400, 412.3)]
    + [(300, 377.3), (200, 326.0)],
)
def test_marginal_radius_is_that_of_the_notes(t, radius):
    assert marginal_radius(ALPHA_BARS[t], mean_square=0.3, d=3 * 256**2) == pytest.approx(radius, abs=0.06)


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
    found = latent_statistics(x, triples=200_000)
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
    assert found.radius_quantiles[0.25] == pytest.approx(np.quantile(np.linalg.norm(x, axis=1), 0.25))


def test_standard_errors_of_pair_means_are_the_spread_between_ensembles(rng):
    """Pairs share samples: their naive standard error would be far too small."""
    runs = [latent_statistics(rng.standard_normal((40, 20)) * [2.0] * 20, tests=1, triples=10) for _ in range(150)]
    assert np.mean([run.distance_se for run in runs]) == pytest.approx(np.std([run.distance for run in runs]), rel=0.25)
    shifted = [latent_statistics(rng.standard_normal((40, 20)) + 1, tests=1, triples=10) for _ in range(150)]
    assert np.mean([run.angle_se for run in shifted]) == pytest.approx(np.std([run.angle for run in shifted]), rel=0.25)


def test_an_ensemble_off_centre_shows_it(rng):
    """The follow-up paper's signs of it: the angle at the origin below 90 degrees and a long centroid."""
    off = latent_statistics(rng.standard_normal((100, 3072)) + 0.2)
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
    rejected = [
        latent_statistics(rng.standard_normal((30, 60)), tests=40).ks_coordinates.p.min() < 0.05 for _ in range(60)
    ]
    assert np.mean(rejected) < 0.15


def test_identical_ensembles_give_identical_statistics(rng):
    x = rng.standard_normal((20, 3, 8, 8)).astype(np.float32)
    table = statistics_over_time({5: x, 3: x.copy()})
    pd.testing.assert_series_equal(table.loc[5], table.loc[3], check_names=False)


def test_the_power_spectrum_of_noise_is_flat_and_of_a_wave_a_single_line(rng):
    white = data_spectrum(rng.standard_normal((200, 3, 32, 32)))
    np.testing.assert_allclose(white.power, 1, atol=5 / np.sqrt(600 * white.weight.min()))
    wave = np.tile(np.cos(2 * np.pi * 5 * np.arange(32) / 32), (2, 1, 32, 1))
    found = data_spectrum(wave)
    assert found.frequency[np.argmax(found.power)] == 5
    assert found.power @ found.weight == pytest.approx(32 * 32 / 2)
    assert found.power[found.frequency != 5].max() < 1e-20


@pytest.mark.parametrize("basis", ["fourier", "pca"])
def test_a_spectrum_holds_the_mean_square_of_the_images(basis, rng):
    images = rng.uniform(-1, 1, (7, 3, 8, 6)) + 0.2
    found = data_spectrum(images, basis=basis)
    assert found.mean_square == pytest.approx((images**2).mean())
    assert found.weight.sum() == (48 if basis == "fourier" else 144)


def test_the_principal_spectrum_is_that_of_the_second_moments(rng):
    for n in (20, 100):
        images = rng.standard_normal((n, 1, 6, 6)) + 1
        flat = images.reshape(n, -1)
        expected = np.linalg.eigvalsh(flat.T @ flat / n)[::-1]
        np.testing.assert_allclose(data_spectrum(images, basis="pca").power, expected, atol=1e-10)


def test_autocorrelation_is_zero_for_noise_and_that_of_a_known_filter(rng):
    white = rng.standard_normal((50, 1, 32, 32))
    assert latent_statistics(white).autocorrelation == pytest.approx(0, abs=0.02)
    smooth = (white + np.roll(white, 1, axis=2) + np.roll(white, 1, axis=3) + np.roll(white, (1, 1), axis=(2, 3))) / 2
    assert latent_statistics(smooth).autocorrelation == pytest.approx(0.5, abs=0.02)
    assert latent_statistics(smooth.reshape(50, -1)).autocorrelation is None


RATIOS = [
    (500, 2, (0.756, 0.875, 0.937, 0.974, 0.986, 0.994, 0.994)),
    (999, 2, (0.571, 0.762, 0.876, 0.948, 0.973, 0.989, 0.993)),
    (500, 3, (0.509, 0.642, 0.770, 0.875, 0.921, 0.950, 0.950)),
    (999, 3, (0.381, 0.501, 0.637, 0.793, 0.872, 0.928, 0.947)),
]
"""Inverted over marginal radius at 256 x 256 pixels, m2 0.3, for 10, 20, 40, 100, 200, 500 and all steps."""


@pytest.mark.parametrize(("t", "gamma", "expected"), RATIOS)
def test_the_linear_gaussian_model_gives_the_table_of_radius_ratios(t, gamma, expected):
    """To half a unit of its last digit; "all steps" is `inversion_grid(t, t + 1)`, as the paper's code makes it."""
    spectrum = power_law_spectrum(256, gamma)
    grids = [inversion_grid(t, steps) for steps in (10, 20, 40, 100, 200, 500, t + 1)]
    found = [linear_gaussian_inversion(spectrum, ALPHA_BARS, grid).ratio for grid in grids]
    np.testing.assert_allclose(found, expected, atol=6e-4)


@pytest.mark.parametrize(
    ("t", "gamma", "plain", "repaired"), [(500, 3, 0.950, 0.978), (999, 3, 0.947, 0.977), (500, 4, 0.578, 0.984)]
)
def test_noise_repair_mends_what_more_steps_do_not(t, gamma, plain, repaired):
    spectrum, grid = power_law_spectrum(256, gamma), inversion_grid(t, t + 1)
    assert linear_gaussian_inversion(spectrum, ALPHA_BARS, grid).ratio == pytest.approx(plain, abs=1e-3)
    found = linear_gaussian_inversion(spectrum, ALPHA_BARS, grid, noise_repair=True)
    assert found.ratio == pytest.approx(repaired, abs=1e-3)


def test_the_grid_is_that_of_the_papers_code():
    assert inversion_grid(500, 40)[:7] == (0, 12, 25, 38, 51, 64, 76) and inversion_grid(500, 40)[-3:] == (
        474,
        487,
        500,
    )
    assert inversion_grid(400, 40)[:5] == (0, 10, 20, 30, 41)


@pytest.mark.parametrize("start", ["first", "clean"])
@pytest.mark.parametrize("iterations", [0, 3])
def test_the_recursion_is_ddim_inversion_of_samples_with_the_exact_network(start, iterations, rng):
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
        for i in range(iterations + 1):
            if i > 0:
                e = eps(x, t)
            p = (before - np.sqrt(1 - levels[t_prev]) * e) / np.sqrt(levels[t_prev])
            x = np.sqrt(levels[t]) * p + np.sqrt(1 - levels[t]) * e
        after.append((x**2).mean(axis=0))
    spectrum = type(power_law_spectrum(4, 2))(np.arange(4), s2, np.ones(4))
    found = linear_gaussian_inversion(spectrum, ALPHA_BARS, timesteps[::-1], start=start, iterations=iterations)
    gains = found.variance[-len(after) :] / np.where(s2 > 0, s2, 1)
    np.testing.assert_allclose(gains * moments, after, rtol=1e-10)
    marginal = ALPHA_BARS[700] * s2.mean() + 1 - ALPHA_BARS[700]
    assert found.ratio == pytest.approx(np.sqrt(found.variance[-1].mean() / marginal))
    assert found.timesteps == timesteps and len(found.frame()) == 3
    if start == "clean":
        with pytest.raises(ValueError, match='start "clean" has no noise to repair'):
            linear_gaussian_inversion(spectrum, ALPHA_BARS, timesteps, start=start, noise_repair=True)
        return
    noisy = ALPHA_BARS[20]
    repaired = linear_gaussian_inversion(spectrum, ALPHA_BARS, timesteps, iterations=iterations, noise_repair=True)
    np.testing.assert_allclose(repaired.variance[:, :3] / found.variance[:, :3], [noisy + (1 - noisy) / s2[:3]] * 3)


def test_white_data_of_unit_variance_stays_on_the_shell():
    """Its marginal is N(0, I) at every timestep and eps moves nothing along it but by Euler's error."""
    white = power_law_spectrum(8, 0, mean_square=1.0)
    assert linear_gaussian_inversion(white, ALPHA_BARS, range(1000)).ratio == pytest.approx(1, abs=5e-3)


def test_eulers_error_is_to_one_side_and_a_fixed_points_to_the_other_and_both_go():
    """Eps of the step's beginning leaves the radius too small, eps of its end too large."""
    spectrum = power_law_spectrum(32, 2)
    for steps, gap in ((40, 0.05), (1000, 0.02)):
        grid = np.linspace(0, 999, steps).astype(int)
        euler, fixed = (
            linear_gaussian_inversion(spectrum, ALPHA_BARS, grid, noise_repair=True, iterations=i).ratio
            for i in (0, 20)
        )
        assert euler < 1 < fixed
        assert (fixed - euler > gap) == (steps == 40)


def test_a_straight_path_has_no_turns_and_its_lengths(rng):
    start, step = rng.standard_normal((2, 6, 20))
    path = np.stack([start + k * step for k in (0, 1, 3, 4)])
    found = step_geometry(path, timesteps=[900, 600, 300, 0])
    np.testing.assert_allclose(found.lengths, np.outer([1, 2, 1], np.linalg.norm(step, axis=1)))
    np.testing.assert_allclose(found.angles, 0, atol=1e-5)
    np.testing.assert_allclose(found.straightness, 1)
    frame = found.frame()
    assert frame[frame["quantity"] == "length"]["t"].tolist() == [900, 600, 300]
    assert frame[frame["quantity"] == "angle"]["t"].tolist() == [600, 300]


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
    found = step_geometry(Store(h))
    assert found.cosines.min() > 0.9 and abs(found.centred_cosines.mean()) < 0.1
    assert found.timesteps == (2, 1, 0)
    same = step_geometry([h[2], 3 * (h[2] - h[2].mean(axis=0)) - 50, h[2]])
    np.testing.assert_allclose(same.centred_cosines, 1)


def planted(rng, n, d, delta):
    """Two groups of unit noise whose means are `delta` apart."""
    y = np.arange(n) % 2
    h = rng.standard_normal((n, d)).astype(np.float32)
    h[:, 3] += delta * y
    return h, y


def test_a_probe_has_the_accuracy_that_the_sample_size_allows():
    """Accuracy of the mean difference is Phi(delta^2 / 2 / sqrt(delta^2 + 4 d / n)), n the training samples."""
    n, d, delta = 240, 600, 3.5
    law = stats.norm.cdf(delta**2 / 2 / np.sqrt(delta**2 + 4 * d / (0.8 * n)))
    found = [separability(*planted(np.random.default_rng(s), n, d, delta), seed=s).balanced_accuracy for s in range(4)]
    assert np.mean(found) == pytest.approx(law, abs=0.04)


def test_random_labels_are_at_chance(rng):
    h, y = planted(rng, 200, 300, 8.0)
    found = [separability(h, y, seed=s, shuffled=True).balanced_accuracy for s in range(6)]
    assert np.mean(found) == pytest.approx(0.5, abs=2 * 0.5 / np.sqrt(200))
    assert separability(h, y).balanced_accuracy > 0.95
    noise = [
        separability(rng.standard_normal((100, 20)), rng.permutation(y[:100])).balanced_accuracy for _ in range(20)
    ]
    assert np.mean(noise) == pytest.approx(0.5, abs=3 * 0.0625 / np.sqrt(20))


@pytest.mark.parametrize("d", [12, 200])
def test_the_probe_is_the_discriminant_on_the_raw_coordinates_with_scikit_learns_shrinkage(d, rng):
    h, y = planted(rng, 90, d, 2.0)
    h = h * np.geomspace(2, 0.5, d)
    y = np.where(np.arange(90) < 20, 2, y)
    predicted = np.empty_like(y)
    for train, test in StratifiedKFold(5, shuffle=True, random_state=3).split(h, y):
        means = np.stack([h[train][y[train] == group].mean(axis=0) for group in range(3)])
        covariance, _ = ledoit_wolf(h[train] - means[y[train]], assume_centered=True)
        weights = np.linalg.solve(covariance, means.T)
        predicted[test] = np.argmax(h[test] @ weights - np.diag(means @ weights) / 2, axis=1)
    found = separability(h, y, seed=3)
    assert found.balanced_accuracy == pytest.approx(balanced_accuracy_score(y, predicted))
    np.testing.assert_array_equal(found.correct, predicted == y)
    assert found.chance == pytest.approx(1 / 3)


def test_the_interval_is_wilsons_of_fewer_samples_and_counts_unequal_groups_for_less(rng):
    h, y = planted(rng, 100, 20, 2.0)
    even = separability(h, y)
    assert even.n_effective == pytest.approx(100)
    fewer = wilson_interval(even.correct.mean(), 100 / CROSS_VALIDATED**2)
    np.testing.assert_allclose(even.interval, fewer)
    narrow = stats.binomtest(int(even.correct.sum()), 100).proportion_ci(method="wilson")
    assert even.interval[0] < narrow.low < narrow.high < even.interval[1]
    assert separability(h, np.arange(100) < 10).n_effective == pytest.approx(4 / (1 / 10 + 1 / 90))


def test_separability_over_time_has_a_row_for_every_probe_and_its_control(rng):
    strong, y = planted(rng, 80, 30, 6.0)
    by_t = {900: rng.standard_normal((80, 30)), 100: strong}
    labels = pd.DataFrame({"planted": y, "noise": rng.permutation(y)})
    table = separability_over_time(Store(by_t), labels, seed=5)
    assert len(table) == 2 * 2 * 2
    found = table.query("attribute == 'planted' and t == 100").set_index("shuffled")
    assert found.loc[False, "balanced_accuracy"] == separability(strong, y, seed=5).balanced_accuracy > 0.9
    assert found.loc[True, "low"] < 0.5 < found.loc[True, "high"]
    assert not separability_over_time(by_t, y, control=False)["shuffled"].any()


def test_bad_input_is_refused_in_a_sentence(rng):
    x = rng.standard_normal((10, 6))
    broken = x.copy()
    broken[4, 1] = np.inf
    with pytest.raises(ValueError, match=r"sample 4 has NaN or infinite"):
        latent_statistics(broken)
    with pytest.raises(ValueError, match="sample 4 at timestep 30 has NaN"):
        statistics_over_time({60: x, 30: broken})
    with pytest.raises(ValueError, match=r"shape \(2, 6\); give at least 3"):
        latent_statistics(x[:2])
    with pytest.raises(ValueError, match="sample 1 is 0 throughout"):
        latent_statistics(np.where(np.arange(10)[:, None] == 1, 0.0, x))
    with pytest.raises(ValueError, match="needs both alpha_bars and mean_square"):
        statistics_over_time({5: x}, mean_square=0.3)
    with pytest.raises(ValueError, match="a spectrum needs"):
        data_spectrum(x)
    with pytest.raises(ValueError, match='it is "fourier" or "pca"'):
        data_spectrum(x.reshape(10, 1, 2, 3), basis="wavelet")
    with pytest.raises(ValueError, match=r"must lie in 0..999, not \[0, 1000\]"):
        linear_gaussian_inversion(power_law_spectrum(4, 2), ALPHA_BARS, [0, 1000])
    with pytest.raises(ValueError, match='it is "first" or "clean"'):
        linear_gaussian_inversion(power_law_spectrum(4, 2), ALPHA_BARS, [0, 9], start="last")
    with pytest.raises(ValueError, match="at least 2 timesteps"):
        inversion_grid(500, 1)
    with pytest.raises(ValueError, match="2 timesteps given where a curve needs at least 3"):
        step_geometry(rng.standard_normal((2, 5, 3)))
    with pytest.raises(ValueError, match="all labels 'label' are 1"):
        separability(x, np.ones(10, dtype=int))
    with pytest.raises(ValueError, match="folds is 5, and the group 1 has 2 samples; take 2 to 2 folds"):
        separability(x, (np.arange(10) >= 8).astype(int))
    with pytest.raises(ValueError, match="all samples are the same"):
        separability(np.ones((10, 3)), np.arange(10) % 2)
    with pytest.raises(ValueError, match="1 timestep given where a curve needs at least 2"):
        separability_over_time({3: x}, np.arange(10) % 2)
