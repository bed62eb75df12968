"""Metrics of images and of sets of them, against loops, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import linalg

from workbench.analysis.image_metrics import (
    attribute_frequencies,
    cosine_similarity,
    directional_similarity,
    diversity,
    frechet_distance,
    frechet_distance_interval,
    joint_frequencies,
    kernel_distance,
    kernel_distance_interval,
    memorisation,
    nearest_neighbours,
    peak_signal_to_noise,
    perceptual_distance,
    precision_recall,
    segmentation_consistency,
)


def test_psnr_is_its_definition_infinite_for_equal_images_and_within_a_mask_sees_nothing_else():
    images = np.zeros((2, 3, 4, 4))
    found = peak_signal_to_noise(images, images + np.array([0.2, 0.0])[:, None, None, None])
    assert found[0] == pytest.approx(20.0) and found[1] == np.inf
    images, others = np.random.default_rng(0).random((2, 3, 3, 4, 4))
    none, mask, own = np.zeros((4, 4), bool), np.zeros((4, 4), bool), np.zeros((3, 1, 4, 4), bool)
    mask[:2], own[1] = True, True
    expected = peak_signal_to_noise(images[:, :, :2], others[:, :, :2])
    assert np.allclose(peak_signal_to_noise(images, others, mask=mask), expected)
    assert np.isnan(peak_signal_to_noise(images, others, mask=none)).all()
    assert np.isfinite(peak_signal_to_noise(images, others, mask=own)).tolist() == [False, True, False]


def test_the_kernel_distance_is_unbiased_and_sees_a_difference():
    rng = np.random.default_rng(0)
    same = [kernel_distance(rng.standard_normal((30, 4)), rng.standard_normal((40, 4))) for _ in range(200)]
    assert abs(np.mean(same)) < 3 * np.std(same) / np.sqrt(200)
    assert kernel_distance(rng.standard_normal((30, 4)), 1 + rng.standard_normal((40, 4))) > 3 * np.std(same)
    a, b = rng.standard_normal((2, 3)), rng.standard_normal((2, 3))
    k = [[(x @ y / 3 + 1) ** 3 for y in (*a, *b)] for x in (*a, *b)]
    assert kernel_distance(a, b) == pytest.approx(k[0][1] + k[2][3] - (k[0][2] + k[0][3] + k[1][2] + k[1][3]) / 2)
    with pytest.raises(ValueError, match=r"\(1, 3\) and \(2, 3\)"):
        kernel_distance(a[:1], b)


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


@pytest.mark.parametrize(
    ("distance", "interval", "n", "target"),
    [(kernel_distance, kernel_distance_interval, 40, 200), (frechet_distance, frechet_distance_interval, 48, 400)],
)
def test_intervals_of_distances_are_as_wide_as_new_samples_vary(distance, interval, n, target):
    rng = np.random.default_rng(0)
    target = rng.standard_normal((target, 4))
    widths, values = [], []
    for _ in range(40):
        features = 0.5 + rng.standard_normal((n, 4))
        low, high = interval(features, target)
        widths.append((high - low) / (2 * 1.96))
        values.append(distance(features, target))
        assert low <= values[-1] <= high
    assert 0.6 < np.mean(widths) / np.std(values) < 1.6
    if distance is frechet_distance:
        assert np.isnan(interval(target[:2], target)).all()


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


def test_diversity_and_nearest_neighbours_are_those_of_a_loop():
    a, b = points(20), points(30, seed=1)
    squares = [((x - y) ** 2).sum() for i, x in enumerate(a) for y in a[:i]]
    assert diversity(a) == pytest.approx(np.sqrt(np.mean(squares)))
    distances, positions = nearest_neighbours(a, b, k=2)
    for x, distance, position in zip(a, distances, positions, strict=True):
        each = np.linalg.norm(b - x, axis=1)
        assert list(position) == list(np.argsort(each)[:2])
        np.testing.assert_allclose(distance, np.sort(each)[:2])


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


def test_segmentation_consistency_and_cosine_similarity_by_hand():
    maps = np.array([[[0, 0], [1, 1]], [[0, 0], [0, 0]]])
    others = np.array([[[0, 1], [1, 1]], [[0, 0], [0, 0]]])
    np.testing.assert_allclose(segmentation_consistency(maps, others), [(1 / 2 + 2 / 3) / 2, 1.0])
    np.testing.assert_allclose(cosine_similarity([[1, 0], [1, 1]], [[0, 2], [-1, -1]]), [0, -1], atol=1e-12)
    assert np.isnan(cosine_similarity([[0.0, 0.0]], [[1.0, 0.0]])).all()


def points(n=300, d=6, *, seed=0, shift=0.0, scale=1.0):
    return shift + scale * np.random.default_rng(seed).standard_normal((n, d))


def test_precision_and_recall_are_those_of_a_loop():
    generated, real = points(60, 3), points(80, 3, seed=1, shift=0.7)

    def inside(x, others, k):
        for y in others:
            radius = sorted(np.linalg.norm(others - y, axis=1))[k]
            if np.linalg.norm(x - y) <= radius:
                return True
        return False

    found = precision_recall(generated, real, k=2)
    assert found.precision.value == np.mean([inside(x, real, 2) for x in generated])
    assert found.recall.value == np.mean([inside(x, generated, 2) for x in real])
    assert (found.precision.n, found.recall.n) == (60, 80)


def test_a_model_that_has_lost_a_half_has_precision_without_recall():
    real = np.concatenate([points(200, shift=-8.0), points(200, seed=1, shift=8.0)])
    found = precision_recall(points(400, seed=2, shift=8.0), real)
    assert found.precision.value > 0.8
    assert found.recall.value < 0.6


def test_copies_of_the_training_set_are_memorised_and_new_points_are_not():
    training, held_out, new = points(400), points(300, seed=1), points(400, seed=2)
    assert memorisation(training + 1e-3, training[:300], held_out).value == pytest.approx(0.875, abs=0.05)
    fair = memorisation(new, training, held_out)
    assert fair.low < 0.5 < fair.high
    assert memorisation(held_out, training, held_out).value == 0.0


def test_frequencies_are_shares_and_joint_ones_see_a_correlation_that_the_single_ones_do_not():
    found = attribute_frequencies(pd.DataFrame({"A": [1, 1, 1, 0], "B": [0, 0, 0, 0]}), {"A": 0.5})
    assert list(found.index) == ["A"]
    assert found.loc["A", ["expected", "found", "distance"]].tolist() == [0.5, 0.75, 0.25]
    assert found.loc["A", "low"] < 0.75 < found.loc["A", "high"]
    labels = pd.DataFrame({"A": [1, 1, 0, 0], "B": [1, 1, 0, 0]})
    found = joint_frequencies(labels, {("A", "B"): (0.25, 0.25, 0.25, 0.25)})
    assert found.loc[("A", "B"), "found"].tolist() == [0.5, 0.0, 0.0, 0.5]
    assert found.loc[("A", "B"), ("distance", "")] == 0.5


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: precision_recall(points(3), points(9)), "k is 3; with 3 and 9 points give 1 to 2"),
        (lambda: nearest_neighbours(points(3), points(2), k=3), "k is 3; of 2 points give 1 to 2"),
        (lambda: attribute_frequencies(pd.DataFrame({"A": [1]}), {"B": 0.5}), "no labels for B; there are for A"),
        (lambda: joint_frequencies(pd.DataFrame({"A": [1]}), {("A", "B"): (1, 0, 0, 0)}), "no labels for B"),
    ],
)
def test_what_does_not_fit_is_refused_with_a_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()
