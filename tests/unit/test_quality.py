"""Distances between sets of images against scipy, closed forms and loops."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest

from workbench.analysis.quality import (
    attribute_frequencies,
    joint_frequencies,
    memorisation,
    nearest_neighbours,
    precision_recall,
)


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


def test_nearest_neighbours_are_those_of_a_loop():
    a, b = points(20), points(30, seed=1)
    distances, positions = nearest_neighbours(a, b, k=2)
    for x, distance, position in zip(a, distances, positions, strict=True):
        each = np.linalg.norm(b - x, axis=1)
        assert list(position) == list(np.argsort(each)[:2])
        np.testing.assert_allclose(distance, np.sort(each)[:2])


def test_copies_of_the_training_set_are_memorised_and_new_points_are_not():
    training, held_out, new = points(400), points(300, seed=1), points(400, seed=2)
    assert memorisation(training + 1e-3, training[:300], held_out).value == pytest.approx(0.875, abs=0.05)
    fair = memorisation(new, training, held_out)
    assert fair.low < 0.5 < fair.high
    assert memorisation(held_out, training, held_out).value == 0.0


def test_attribute_frequencies_are_shares_and_their_distance_to_the_recipe():
    labels = pd.DataFrame({"A": [1, 1, 1, 0], "B": [0, 0, 0, 0]})
    found = attribute_frequencies(labels, {"A": 0.5})
    assert list(found.index) == ["A"]
    assert found.loc["A", ["expected", "found", "distance"]].tolist() == [0.5, 0.75, 0.25]
    assert found.loc["A", "low"] < 0.75 < found.loc["A", "high"]


def test_joint_frequencies_see_a_correlation_that_the_single_ones_do_not():
    labels = pd.DataFrame({"A": [1, 1, 0, 0], "B": [1, 1, 0, 0]})
    found = joint_frequencies(labels, {("A", "B"): (0.25, 0.25, 0.25, 0.25)})
    assert found.loc[("A", "B"), "found"].tolist() == [0.5, 0.0, 0.0, 0.5]
    assert found.loc[("A", "B"), ("distance", "")] == 0.5
    assert attribute_frequencies(labels, {"A": 0.5, "B": 0.5})["distance"].tolist() == [0.0, 0.0]
    table = joint_frequencies(pd.DataFrame({"A": [1, 0], "B": [0, 0]}), {("A", "B"): (0.5, 0.0, 0.5, 0.0)})
    assert table.loc[("A", "B"), ("distance", "")] == 0.0


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
