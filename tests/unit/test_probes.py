"""Probes: each method is that of scikit-learn, accuracies are held out, and noise is at chance."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats
from sklearn.covariance import ledoit_wolf
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import balanced_accuracy_score
from sklearn.model_selection import StratifiedKFold
from sklearn.svm import SVC

from workbench.analysis.intervals import CROSS_VALIDATED, wilson_interval
from workbench.analysis.probes import (
    Span,
    balanced_weight,
    fit_probe,
    separabilities,
    separability_over_time,
)


@pytest.fixture
def rng():
    return np.random.default_rng(11)


def separability(h, labels, **options):
    return separabilities(h, labels, **options)["label"]


def accuracy(h, labels, **options):
    return separability(h, labels, **options).balanced_accuracy.value


def planted(rng, n, d, delta):
    """Two groups of unit noise whose means are `delta` apart."""
    y = np.arange(n) % 2
    h = rng.standard_normal((n, d)).astype(np.float32)
    h[:, 3] += delta * y
    return h, y


@pytest.mark.parametrize("d", [12, 200])
@pytest.mark.parametrize("method", ["svm", "mean", "lda", "logistic"])
def test_a_probe_of_weighted_samples_is_that_on_the_raw_coordinates(method, d, rng):
    h, y = planted(rng, 90, d, 2.0)
    y, rows = y == 1, np.flatnonzero(rng.random(90) < 0.8)
    weight = np.zeros(90)
    weight[rows] = rng.uniform(0.5, 2, len(rows))
    weight = balanced_weight(weight, y)
    assert weight[y].sum() == pytest.approx(len(rows) / 2) and weight[~y].sum() == pytest.approx(len(rows) / 2)
    probe = fit_probe(Span.of(h), y, method, rows=rows, weight=weight)
    x = (h - h.mean(axis=0)).astype(float)
    unit = np.linalg.norm(x, 2) / np.sqrt(90)
    used, side = x[rows], y[rows].astype(int)
    means = np.stack([used[side == s].mean(axis=0) for s in (0, 1)])
    if method == "mean":
        normal = means[1] - means[0]
    elif method == "lda":
        normal = np.linalg.solve(ledoit_wolf(used - means[side], assume_centered=True)[0], means[1] - means[0])
    elif method == "svm":
        normal = SVC(kernel="linear").fit(used, side, sample_weight=weight[rows]).coef_[0]
    else:
        estimator = LogisticRegression(max_iter=1000)
        normal = estimator.fit(used / unit, 2 * side - 1, sample_weight=weight[rows]).coef_.ravel() / unit
    found = probe.a @ h
    np.testing.assert_allclose(found, normal, atol=0.01 * np.linalg.norm(normal))
    assert probe.length(Span.of(h).products) == pytest.approx(np.linalg.norm(found), rel=1e-4)
    assert probe.a.sum() == pytest.approx(0, abs=1e-9)


def test_a_probe_has_the_accuracy_that_the_sample_size_allows():
    """Accuracy of the mean difference is Phi(delta^2 / 2 / sqrt(delta^2 + 4 d / n)), n the training samples."""
    n, d, delta = 240, 600, 3.5
    law = stats.norm.cdf(delta**2 / 2 / np.sqrt(delta**2 + 4 * d / (0.8 * n)))
    found = [accuracy(*planted(np.random.default_rng(s), n, d, delta), seed=s) for s in range(4)]
    assert np.mean(found) == pytest.approx(law, abs=0.04)


def test_random_labels_are_at_chance(rng):
    h, y = planted(rng, 200, 300, 8.0)
    found = [accuracy(h, y, seed=s, shuffled=True) for s in range(6)]
    assert np.mean(found) == pytest.approx(0.5, abs=2 * 0.5 / np.sqrt(200))
    assert accuracy(h, y) > 0.95
    noise = [accuracy(rng.standard_normal((100, 20)), rng.permutation(y[:100])) for _ in range(20)]
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
    assert found.balanced_accuracy.value == pytest.approx(balanced_accuracy_score(y, predicted))
    np.testing.assert_array_equal(found.correct, predicted == y)
    assert found.chance == pytest.approx(1 / 3)


def test_the_interval_is_wilsons_of_fewer_samples_and_counts_unequal_groups_for_less(rng):
    h, y = planted(rng, 100, 20, 2.0)
    even = separability(h, y)
    assert even.balanced_accuracy.n == pytest.approx(100)
    fewer = wilson_interval(even.correct.mean(), 100 / CROSS_VALIDATED**2)
    np.testing.assert_allclose([even.balanced_accuracy.low, even.balanced_accuracy.high], fewer)
    narrow = stats.binomtest(int(even.correct.sum()), 100).proportion_ci(method="wilson")
    assert even.balanced_accuracy.low < narrow.low < narrow.high < even.balanced_accuracy.high
    assert separability(h, np.arange(100) < 10).balanced_accuracy.n == pytest.approx(4 / (1 / 10 + 1 / 90))


def test_separability_over_time_has_a_row_for_every_probe_and_its_control(rng):
    strong, y = planted(rng, 80, 30, 6.0)
    by_t = {900: rng.standard_normal((80, 30)), 100: strong}
    labels = pd.DataFrame({"planted": y, "noise": rng.permutation(y)})
    table = separability_over_time(by_t, labels, seed=5)
    assert len(table) == 2 * 2 * 2
    found = table.query("attribute == 'planted' and t == 100").set_index("shuffled")
    assert found.loc[False, "balanced_accuracy"] == separability(strong, y, seed=5).balanced_accuracy.value > 0.9
    assert found.loc[True, "low"] < 0.5 < found.loc[True, "high"]
    assert not separability_over_time(by_t, y, control=False)["shuffled"].any()


def test_bad_input_is_refused(rng):
    x = rng.standard_normal((10, 6))
    for call, message in (
        (lambda: separabilities(x, np.ones(10, dtype=int)), "all labels 'label' are 1"),
        (lambda: separabilities(x, (np.arange(10) >= 8).astype(int)), "folds is 5, and the group 1 has 2 samples"),
        (lambda: separabilities(np.ones((10, 3)), np.arange(10) % 2), "all samples are the same"),
        (lambda: separability_over_time({3: x}, np.arange(10) % 2), "1 timestep given .* at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            call()
