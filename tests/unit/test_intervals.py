"""Estimates with intervals: against scipy, against formulas, and how often the intervals hold the truth."""

import numpy as np
import pytest
from scipy import stats

from workbench.analysis.intervals import (
    CROSS_VALIDATED,
    Estimate,
    bootstrap_counts,
    bootstrap_interval,
    difference_of,
    holm,
    mean_interval,
    mean_of,
    mean_of_draws,
    paired_difference_of,
    ratio_of,
    share_of,
    wilson_interval,
)


@pytest.mark.parametrize("successes", [0, 5, 20])
def test_the_interval_of_a_share_is_wilsons(successes):
    expected = stats.binomtest(successes, 20).proportion_ci(method="wilson")
    found = share_of(successes / 20, 20)
    assert (found.low, found.high, found.n) == (pytest.approx(expected.low), pytest.approx(expected.high), 20)
    wider = share_of(successes / 20, 20, cross_validated=True)
    assert (wider.low, wider.high) == wilson_interval(successes / 20, 20 / CROSS_VALIDATED**2)
    assert wider.n == 20


def test_rounding_puts_no_share_outside_of_its_interval():
    for n in range(1, 200):
        for share in (0.0, 1.0, (n // 2) / n):
            low, high = wilson_interval(share, n)
            assert 0 <= low <= share <= high <= 1, (share, n)


def test_estimates_of_means_ratios_and_differences():
    rng = np.random.default_rng(0)
    values = rng.normal(1.0, 2.0, 200)
    found = mean_of([*values, np.nan])
    half = 1.96 * values.std() / np.sqrt(200)
    assert (found.value, found.n) == (pytest.approx(values.mean()), 200)
    assert found.high - found.low == pytest.approx(2 * half, rel=0.1)
    ratio = ratio_of(3 * np.abs(values), np.abs(values))
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((3.0, 3.0, 3.0))
    gap = difference_of(Estimate(5, 4, 7, 10), Estimate(1, 0, 1, 8))
    assert (gap.value, gap.low, gap.high, gap.n) == pytest.approx((4, 3, 4 + np.hypot(2, 1), 8))
    assert np.isnan(mean_of([np.nan]).value) and np.isnan(ratio_of([2.0], [1.0]).low)
    assert repr(Estimate(1 / 3, 0, 1, 9)) == "Estimate(0.3333, 0..1, n=9)"


def test_the_interval_of_a_mean_is_that_of_its_standard_error():
    values = np.random.default_rng(0).normal(2.0, 1.0, 400)
    low, high = mean_interval(values, resamples=4000)
    np.testing.assert_allclose([low, high], values.mean() + np.array([-1.96, 1.96]) * values.std() / 20, atol=0.01)
    assert np.isnan(mean_interval([])).all() and np.isnan(mean_interval([0.3])).all(), "one value does not tell"


@pytest.mark.parametrize("n", [4, 6, 16])
def test_the_interval_of_a_mean_of_few_values_is_as_sure_as_it_says(n):
    rng = np.random.default_rng(n)
    ends = np.array([mean_interval(rng.standard_normal(n), resamples=250) for _ in range(300)])
    assert 0.91 < ((ends[:, 0] < 0) & (ends[:, 1] > 0)).mean() < 0.99


def test_the_interval_of_a_ratio_of_few_values_is_as_sure_as_it_says():
    """The quantiles of the draws alone hold the ratio in 85% of the trials."""
    rng, holds = np.random.default_rng(5), []
    for _ in range(120):
        below = rng.uniform(0.5, 1.5, 5)
        found = ratio_of(2 * below + 0.5 * rng.standard_normal(5), below)
        holds.append(found.low < 2 < found.high)
    assert 0.91 < np.mean(holds) < 0.99


@pytest.mark.parametrize("successes", [0, 1, 17, 20])
def test_drawing_trials_again_gives_wilsons_interval_of_their_share(successes):
    trials = np.arange(20) < successes
    draws = bootstrap_counts(20, resamples=20_000, seed=0) @ trials / 20
    found = bootstrap_interval(trials.mean(), draws, 20, bounds=(0, 1), share=True)
    np.testing.assert_allclose(found, wilson_interval(successes / 20, 20), atol=0.003)


def test_two_shares_that_never_differ_have_tangos_interval():
    z2 = stats.norm.ppf(0.975) ** 2
    found = bootstrap_interval(0.0, np.zeros(100), 35, bounds=(-1, 1), share=True)
    np.testing.assert_allclose(found, [-z2 / (35 + z2), z2 / (35 + z2)])
    apart = bootstrap_interval(1.0, np.ones(100), 35, bounds=(-1, 1), share=True)
    np.testing.assert_allclose(apart, [2 * wilson_interval(1.0, 35)[0] - 1, 1.0])


@pytest.mark.parametrize(("share", "n"), [(0.9, 5), (0.9, 16), (0.6, 8)])
def test_the_interval_of_a_share_of_few_trials_is_as_sure_as_it_says(share, n):
    rng, holds = np.random.default_rng(n), []
    counts = bootstrap_counts(n, resamples=300, seed=0)
    for trials in rng.random((400, n)) < share:
        low, high = bootstrap_interval(trials.mean(), counts @ trials / n, n, bounds=(0, 1), share=True)
        holds.append(low < share < high)
    assert np.mean(holds) > 0.88


def test_the_interval_of_draws_from_one_pool_is_as_sure_as_it_says_for_other_pools():
    """Draws of 40 of 80 values: as independent means they would be taken for far surer than they are."""
    rng, errors = np.random.default_rng(0), []
    for _ in range(50):
        pool = rng.standard_normal(80)
        found = mean_of_draws([rng.choice(pool, 40, replace=False).mean() for _ in range(10)], 0.5)
        half = found.high - found.value if found.value < 0 else found.value - found.low
        errors.append(abs(found.value) / half)
    assert 0.9 < np.mean(np.array(errors) < 1) < 1
    assert np.mean(np.array(errors) < 1 / 11**0.5) < 0.75


def test_an_interval_holds_its_value_leaves_out_what_is_not_finite_and_ends_at_the_bounds():
    draws = np.array([[0.9, np.nan], [1.0, np.nan], [np.inf, np.nan], [0.8, np.nan]])
    low, high = bootstrap_interval(np.array([0.95, 0.5]), draws, 4, bounds=(-1, 1))
    assert low[0] < 0.8 and high[0] == 1.0
    assert np.isnan([low[1], high[1]]).all()
    assert bootstrap_interval(0.0, np.array([0.1, 0.2]), 9)[0] == 0.0, "draws may be biased"
    assert np.isnan(bootstrap_interval(0.5, np.array([0.4, 0.6]), 1)).all()


def test_the_difference_of_the_same_samples_is_as_sure_as_it_says_and_surer_than_of_independent_ones():
    """Planted: 60% are right in both, 15% in the first alone, 5% in the second alone; the difference is .1."""
    rng, holds, widths = np.random.default_rng(0), [], []
    for kind in rng.choice(4, p=[0.6, 0.15, 0.05, 0.2], size=(400, 60)):
        one, other = kind <= 1, (kind == 0) | (kind == 2)
        found = paired_difference_of(one, other)
        apart = difference_of(*(share_of(right.mean(), 60) for right in (one, other)))
        holds.append(found.low < 0.1 < found.high)
        widths.append([found.high - found.low, apart.high - apart.low])
    assert 0.93 < np.mean(holds) < 0.99
    paired, independent = np.mean(widths, axis=0)
    assert paired < 0.8 * independent


def test_the_difference_of_the_same_samples_by_hand():
    rng = np.random.default_rng(0)
    right = rng.random(40) < 0.7
    z2 = stats.norm.ppf(0.975) ** 2
    same = paired_difference_of(right, right)
    assert (same.value, same.low, same.high) == pytest.approx((0.0, -z2 / (40 + z2), z2 / (40 + z2)))
    apart = paired_difference_of(np.ones(9, bool), np.zeros(9, bool))
    assert (apart.value, apart.high) == (1.0, 1.0) and 0 < apart.low < 1
    values = rng.standard_normal((2, 12))
    assert paired_difference_of(*values) == mean_of(values[0] - values[1])
    assert np.isnan(paired_difference_of([], []).value)


def test_the_mean_of_booleans_is_a_share_and_of_bounded_values_no_more_than_is_possible():
    right = np.arange(12) < 11
    assert mean_of(right) == share_of(11 / 12, 12) and mean_of(right).high < 1.0
    cosines = [0.99, 1.0, 1.0, 0.97, 1.0]
    assert mean_of(cosines).high > 1.0 >= mean_of(cosines, bounds=(-1, 1)).high
    assert mean_of(cosines).low == mean_of(cosines, bounds=(-1, 1)).low
    assert np.isnan(mean_of(np.array([], dtype=bool)).value)


def test_bootstrap_counts_draw_n_of_n_and_repeat_with_the_seed():
    counts = bootstrap_counts(12, resamples=300, seed=1)
    assert counts.shape == (300, 12) and (counts.sum(axis=1) == 12).all()
    assert counts.mean(axis=0) == pytest.approx(np.ones(12), abs=0.25)
    np.testing.assert_array_equal(counts, bootstrap_counts(12, resamples=300, seed=1))


def test_holm_corrects_as_by_hand_and_keeps_the_order():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03]), [0.03, 0.06, 0.06])
    np.testing.assert_allclose(holm([0.9, 0.5]), [1.0, 1.0])
    np.testing.assert_allclose(holm([0.04, np.nan, 0.01]), [0.04, np.nan, 0.02])
    rng = np.random.default_rng(0)
    false = np.mean([(holm(rng.random(10)) < 0.05).any() for _ in range(2000)])
    assert false < 0.07
