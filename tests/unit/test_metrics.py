"""Metrics of edits against loops, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import linalg, stats

from workbench.analysis.metrics import (
    EffectMatrix,
    cosine_similarity,
    directional_similarity,
    diversity,
    effect_matrix,
    entanglement_index,
    frechet_distance,
    frechet_distance_interval,
    kernel_distance,
    kernel_distance_interval,
    leakage,
    linearity,
    monotonicity,
    outside,
    peak_signal_to_noise,
    perceptual_distance,
    segmentation_consistency,
    success_rate,
)

ATTRIBUTES = ["A", "B", "C"]


def scores(n=40, *, seed=0):
    return pd.DataFrame(np.random.default_rng(seed).random((n, 3)), columns=ATTRIBUTES)


@pytest.fixture
def before():
    return scores()


@pytest.fixture
def after():
    return {"A": scores(seed=1), "B": scores(seed=2)}


def test_the_effect_matrix_is_the_mean_change(before, after):
    found = effect_matrix(before, after)
    assert list(found.mean.index) == ["A", "B"]
    for a in after:
        for b in ATTRIBUTES:
            change = [after[a][b][i] - before[b][i] for i in range(len(before))]
            assert found.mean.loc[a, b] == pytest.approx(sum(change) / len(change))
    assert ((found.low <= found.mean) & (found.mean <= found.high)).all(axis=None)


def test_its_interval_is_that_of_a_mean(before, after):
    found = effect_matrix(before, after, resamples=4000)
    change = after["A"] - before
    half = 1.96 * change.std() / np.sqrt(len(change))
    np.testing.assert_allclose((found.high - found.low).loc["A"] / 2, half, rtol=0.1)
    assert found.draws.shape == (4000, 2, 3)


def test_the_interval_is_the_same_for_the_same_seed_and_another_for_another(before, after):
    one, same, other = (effect_matrix(before, after, seed=s).low for s in (0, 0, 1))
    pd.testing.assert_frame_equal(one, same)
    assert not one.equals(other)


def test_a_direction_may_have_samples_of_its_own(before, after):
    own = {"A": before, "B": before + 0.1}
    assert effect_matrix(own, after).mean.loc["B", "A"] == pytest.approx(
        effect_matrix(before, after).mean.loc["B", "A"] - 0.1
    )


def test_a_part_of_the_matrix_is_the_matrix_of_a_part(before, after):
    whole = effect_matrix(before, after)
    part = effect_matrix(before[["C", "A"]], {name: table[["C", "A"]] for name, table in after.items()})
    pd.testing.assert_frame_equal(whole.of(["C", "A"]).low, part.low)
    np.testing.assert_allclose(whole.of(["C", "A"]).draws, part.draws)
    with pytest.raises(ValueError, match="no attribute 'Hat'; the scores have A, B, C"):
        whole.of(["A", "Hat"])


def test_the_entanglement_index_by_hand():
    matrix = pd.DataFrame([[0.5, -0.25, 0.25], [0.0, -2.0, 0.0]], index=["A", "B"], columns=ATTRIBUTES)
    np.testing.assert_allclose(entanglement_index(matrix)["index"], [1.0, 0.0])
    named = matrix.rename(index={"A": "A projected"})
    assert entanglement_index(named, own={"A projected": "A", "B": "B"})["index"]["A projected"] == 1.0


def test_the_entanglement_index_of_no_effect_of_its_own_is_infinite():
    matrix = pd.DataFrame([[0.0, 1.0]], index=["A"], columns=["A", "B"])
    assert np.isinf(entanglement_index(matrix)["index"]["A"])


def test_the_entanglement_index_has_the_interval_of_its_draws(before, after):
    effects = effect_matrix(before, after, resamples=300)
    found = entanglement_index(effects)
    draws = [
        sum(abs(draw[i, j]) for j in range(3) if j != i) / abs(draw[i, i]) for draw in effects.draws for i in range(2)
    ]
    low = np.quantile(np.reshape(draws, (-1, 2)), 0.025, axis=0, method="lower")
    np.testing.assert_allclose(found["low"], low)
    assert (found["low"] <= found["index"]).all() and (found["index"] <= found["high"]).all()


def test_the_entanglement_index_needs_to_know_whose_attribute_is_whose(before, after):
    with pytest.raises(ValueError, match="'smile' is not among A, B, C"):
        entanglement_index(effect_matrix(before, {"smile": after["A"]}))


def test_leakage_and_its_fall_by_hand():
    """Two directions, of which the second leaks a quarter; the draws are the means doubled for the first alone."""
    mean = pd.DataFrame([[0.9, 0.5, -0.3], [0.8, -0.1, 0.1]], index=["A", "A projected"], columns=ATTRIBUTES)
    draws = np.stack([mean.to_numpy(), mean.to_numpy() * [[2.0], [1.0]]] * 50)
    found = leakage(EffectMatrix(mean, mean, mean, draws, n=10), ["B", "C"])
    np.testing.assert_allclose(found["leak"], [0.8, 0.2])
    np.testing.assert_allclose(found["fall"], [0.0, 0.75])
    np.testing.assert_allclose(found.loc["A", ["leak_low", "leak_high"]], [0.8, 1.6])
    np.testing.assert_allclose(found.loc["A projected", ["fall_low", "fall_high"]], [0.75, 0.875])
    np.testing.assert_allclose(found.loc["A", ["fall_low", "fall_high"]], 0.0)


def test_the_interval_of_the_fall_knows_that_the_samples_are_the_same(before, after):
    """Half of each sample's change leaves half of the leak, whatever samples are drawn."""
    halved = before + 0.5 * (after["A"] - before)
    found = leakage(effect_matrix(before, {"A": after["A"], "half": halved}), ["A", "B"])
    assert found.loc["half", ["fall", "fall_low", "fall_high"]].tolist() == pytest.approx([0.5] * 3)
    assert found.loc["A", "leak_low"] < found.loc["A", "leak"] < found.loc["A", "leak_high"]
    with pytest.raises(ValueError, match="no attribute 'hat'"):
        leakage(effect_matrix(before, after), ["hat"])


def test_the_success_rate_counts_samples_without_the_attribute():
    before = pd.DataFrame({"A": [0.1, 0.2, 0.9, 0.5, 0.3]})
    after = pd.DataFrame({"A": [0.8, 0.4, 0.1, 0.51, 0.9]})
    rate = success_rate(before, after, "A")
    assert (rate.value, rate.n) == (0.75, 4)
    assert success_rate(before, after, "A", threshold=0.85).value == 0.25


@pytest.mark.parametrize("successes", [0, 7, 20])
def test_its_interval_is_wilsons(successes):
    before = pd.DataFrame({"A": np.zeros(20)})
    after = pd.DataFrame({"A": np.arange(20) < successes}, dtype=float)
    rate = success_rate(before, after, "A")
    expected = stats.binomtest(successes, 20).proportion_ci(method="wilson")
    assert (rate.low, rate.high) == pytest.approx((expected.low, expected.high))


def test_monotonicity_is_spearmans_correlation():
    rng = np.random.default_rng(0)
    values, scales = rng.random((5, 7)).round(1), [-3, -2, -1, 0, 1, 2, 3]
    expected = [stats.spearmanr(row, scales).statistic for row in values]
    np.testing.assert_allclose(monotonicity(values, scales), expected)
    np.testing.assert_allclose(monotonicity([[1, 2, 30], [3, 2, 1]], [-1, 0, 5]), [1, -1])
    assert np.isnan(monotonicity([[1, 1, 1]], [-1, 0, 1])).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: effect_matrix(b, {}), "at least one direction"),
        (lambda b: effect_matrix(b, {"A": b[:5]}), "other samples or attributes"),
        (lambda b: effect_matrix(b, {"A": b.rename(columns={"B": "D"})}), "other samples or attributes"),
        (lambda b: effect_matrix(b, {"A": b.replace(b.iloc[0, 0], np.nan)}), "not finite"),
        (lambda b: success_rate(b, b, "Hat"), "no attribute 'Hat'; the scores have A, B, C"),
        (lambda b: success_rate(b + 1, b, "A"), "all 40 samples have A already"),
        (lambda b: monotonicity(b, [1, 2]), r"shape \(n, 2\), not \(40, 3\)"),
        (lambda b: monotonicity(b[["A"]], [1]), r"\(n, 1\)"),
    ],
)
def test_bad_input_is_a_sentence(before, call, message):
    with pytest.raises(ValueError, match=message):
        call(before)


def test_psnr_is_its_definition_and_infinite_for_equal_images():
    images = np.zeros((2, 3, 4, 4))
    others = images.copy()
    others[0] += 0.2
    found = peak_signal_to_noise(images, others)
    assert found[0] == pytest.approx(20.0) and found[1] == np.inf


def test_the_kernel_distance_is_unbiased_and_sees_a_difference():
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.standard_normal((30, 4)), rng.standard_normal((40, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert kernel_distance(rng.standard_normal((30, 4)), 1 + rng.standard_normal((40, 4))) > 3 * np.std(same)
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    k = [[(x @ y / 3 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)]
    assert kernel_distance(a, b) == pytest.approx(k[0][1] + k[2][3] - (k[0][2] + k[0][3] + k[1][2] + k[1][3]) / 2)
    with pytest.raises(ValueError, match="at least 2 rows"):
        kernel_distance(a[:1], b)


def test_psnr_within_a_mask_sees_nothing_else():
    rng = np.random.default_rng(0)
    images, others = rng.random((2, 3, 3, 4, 4))
    mask = np.zeros((4, 4), bool)
    mask[:2] = True
    assert np.allclose(
        peak_signal_to_noise(images, others, mask=mask),
        peak_signal_to_noise(images[:, :, :2], others[:, :, :2]),
    )
    assert np.isnan(peak_signal_to_noise(images, others, mask=np.zeros((4, 4), bool))).all()
    own = np.zeros((3, 1, 4, 4), bool)
    own[1] = True
    assert np.isfinite(peak_signal_to_noise(images, others, mask=own)).tolist() == [False, True, False]


def test_linearity_is_the_squared_correlation():
    rng, scales = np.random.default_rng(0), [-2, 0, 1, 3]
    values = rng.random((5, 4))
    expected = [stats.pearsonr(row, scales).statistic ** 2 for row in values]
    np.testing.assert_allclose(linearity(values, scales), expected)
    assert linearity([[1, 3, 4, 6]], scales)[0] == pytest.approx(1.0)
    assert np.isnan(linearity(np.ones((1, 4)), scales)).all()
    assert np.isnan(linearity(np.full((1, 7), 0.1), range(7))).all(), "also where their mean is rounded"
    with pytest.raises(ValueError, match=r"3 or more"):
        linearity(values[:, :2], scales[:2])


def test_the_perceptual_distance_by_a_loop():
    rng = np.random.default_rng(0)
    a, b = ([rng.random((2, 3, 4, 4)), rng.random((2, 5, 2, 2))] for _ in range(2))
    expected = []
    for i in range(2):
        total = 0.0
        for x, y in zip(a, b, strict=True):
            _, _, height, width = x.shape
            for r in range(height):
                for c in range(width):
                    u, v = (m[i, :, r, c] / np.linalg.norm(m[i, :, r, c]) for m in (x, y))
                    total += ((u - v) ** 2).sum() / (height * width)
        expected.append(total)
    np.testing.assert_allclose(perceptual_distance(a, b), expected, rtol=1e-6)
    assert (perceptual_distance(a, a) == 0).all()
    assert np.allclose(perceptual_distance([3 * m for m in a], a), 0), "the length of a feature vector means nothing"


def test_outside_a_mask_the_edit_stays_and_inside_it_is_taken_back():
    images, edited = np.zeros((2, 3, 4, 4)), np.ones((2, 3, 4, 4))
    mask = np.eye(4, dtype=bool)
    found = outside(images, edited, mask)
    assert (found[:, :, mask] == 0).all() and (found[:, :, ~mask] == 1).all()


def test_the_frechet_distance_is_its_formula_also_for_singular_covariances():
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((50, 4)), 1 + rng.standard_normal((60, 4)) @ np.diag([1, 2, 3, 0.5])
    s, t = np.cov(a.T), np.cov(b.T)
    expected = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real)
    assert frechet_distance(a, b) == pytest.approx(expected)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-9)
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet_distance(a, np.full_like(b, np.nan))
    few = rng.standard_normal((3, 10))
    assert frechet_distance(few, few + 2.0) == pytest.approx(40.0)
    # Of N(0, 1) and N(m, s): m^2 + (1 - s)^2.
    one, two = rng.standard_normal((20_000, 1)), 1 + 3 * rng.standard_normal((20_000, 1))
    assert frechet_distance(one, two) == pytest.approx(5.0, rel=0.05)


def test_the_interval_of_the_kernel_distance_is_as_wide_as_new_samples_vary():
    rng = np.random.default_rng(0)
    target = rng.standard_normal((200, 3))
    widths, values = [], []
    for _ in range(30):
        features = 0.3 + rng.standard_normal((40, 3))
        low, high = kernel_distance_interval(features, target, resamples=100)
        widths.append((high - low) / (2 * 1.96))
        values.append(kernel_distance(features, target))
        assert low <= values[-1] <= high
    assert 0.6 < np.mean(widths) / np.std(values) < 1.6


@pytest.mark.parametrize("interval", [kernel_distance_interval, frechet_distance_interval])
def test_samples_in_several_versions_are_drawn_together(interval):
    """Twice the same samples tell no more than once: the interval does not shrink."""
    rng = np.random.default_rng(0)
    features, target = 0.5 + rng.standard_normal((30, 3)), rng.standard_normal((200, 3))
    twice = np.tile(features, (2, 1))
    np.testing.assert_allclose(interval(twice, target, groups=2), interval(features, target), rtol=1e-9)
    assert np.diff(interval(twice, target)) < 0.85 * np.diff(interval(features, target))


def test_versions_of_a_sample_are_no_pair_of_samples():
    """The distances of n samples in one version each, by loops; copies of the samples change nothing."""
    rng = np.random.default_rng(0)
    versions, target = rng.standard_normal((3, 5, 4)), rng.standard_normal((40, 4))
    rows = versions.reshape(15, 4)
    pairs = [(v[i], w[j]) for v in versions for w in versions for i in range(5) for j in range(5) if i != j]
    within = np.mean([(x @ y / 4 + 1) ** 3 for x, y in pairs])
    between = np.mean([(x @ y / 4 + 1) ** 3 for x in rows for y in target])
    others = np.mean([(x @ y / 4 + 1) ** 3 for i, x in enumerate(target) for j, y in enumerate(target) if i != j])
    assert kernel_distance(rows, target, groups=3) == pytest.approx(within + others - 2 * between)
    sets = [np.stack([versions[(i + turn) % 3, i] for i in range(5)]) for turn in range(3)]
    each = [frechet_distance(one, target) for one in sets]
    assert frechet_distance(rows, target, groups=3) == pytest.approx(np.mean(each))
    copies = np.tile(versions[0], (6, 1))
    for distance in (kernel_distance, frechet_distance):
        assert distance(copies, target, groups=6) == pytest.approx(distance(versions[0], target))
    with pytest.raises(ValueError, match="15 rows are not 4 versions"):
        kernel_distance(rows, target, groups=4)


def test_the_frechet_interval_is_as_wide_as_the_distance_varies():
    rng = np.random.default_rng(0)
    target = rng.standard_normal((400, 4))
    widths, values = [], []
    for _ in range(60):
        features = 0.5 + rng.standard_normal((48, 4))
        low, high = frechet_distance_interval(features, target)
        widths.append((high - low) / (2 * stats.t.ppf(0.975, 15)))
        values.append(frechet_distance(features, target))
        assert low <= values[-1] <= high
    assert 0.7 < np.mean(widths) / np.std(values) < 1.4


def test_the_frechet_interval_of_two_samples_is_not_known():
    features = np.random.default_rng(0).standard_normal((30, 3))
    assert np.isnan(frechet_distance_interval(features[:2], features)).all()


def test_diversity_is_the_distance_of_pairs():
    features = np.random.default_rng(0).random((6, 3))
    squares = [((a - b) ** 2).sum() for i, a in enumerate(features) for b in features[:i]]
    assert diversity(features) == pytest.approx(np.sqrt(np.mean(squares)))


def test_directional_similarity_is_one_where_images_move_as_the_text_did():
    rng = np.random.default_rng(0)
    source, target = rng.standard_normal((2, 3, 8))
    mean = [(e / np.linalg.norm(e, axis=1, keepdims=True)).mean(axis=0) for e in (source, target)]
    text = mean[1] - mean[0]
    images = rng.standard_normal((4, 8))
    images /= np.linalg.norm(images, axis=1, keepdims=True)
    moved = images + 1e-4 * (text - (images @ text)[:, None] * images)
    found = directional_similarity(images, moved, source=source, target=target)
    across = text - (images @ text)[:, None] * images
    np.testing.assert_allclose(found, np.linalg.norm(across, axis=1) / np.linalg.norm(text), rtol=1e-3)
    swapped = directional_similarity(images, moved, source=target, target=source)
    np.testing.assert_allclose(swapped, -found, rtol=1e-6)
    # The length of an embedding means nothing.
    np.testing.assert_allclose(directional_similarity(3 * images, moved, source=source, target=5 * target), found)
    assert np.isnan(directional_similarity(images, images, source=source, target=target)).all()


def test_segmentation_consistency_by_hand():
    maps = np.array([[[0, 0], [1, 1]], [[0, 0], [0, 0]]])
    others = np.array([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    np.testing.assert_allclose(segmentation_consistency(maps, others), [(1 / 2 + 2 / 3) / 2, 1.0])


def test_cosine_similarity_is_by_pairs():
    np.testing.assert_allclose(cosine_similarity([[1, 0], [1, 1]], [[0, 2], [-1, -1]]), [0, -1], atol=1e-12)
    assert np.isnan(cosine_similarity([[0.0, 0.0]], [[1.0, 0.0]])).all()
