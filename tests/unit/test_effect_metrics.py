"""Metrics of edits in scores, against loops, closed forms and scipy."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from workbench.analysis.effect_metrics import (
    EffectMatrix,
    at_equal_change,
    effect_matrix,
    first_reached,
    leakage,
    linearity,
    monotonicity,
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


@pytest.mark.parametrize("n", [5, 8])
def test_the_intervals_of_a_matrix_of_few_samples_are_as_sure_as_they_say(n):
    """Planted: mean changes of .3 and -.1 of normal samples; the quantiles of the draws hold them in 84% (n 5)."""
    rng, holds = np.random.default_rng(n), []
    plain = pd.DataFrame(np.zeros((n, 2)), columns=["A", "B"])
    for _ in range(150):
        edited = plain + [0.3, -0.1] + 0.1 * rng.standard_normal((n, 2))
        found = effect_matrix(plain, {"A": edited}, resamples=200)
        reduction = leakage(found, ["A", "B"])
        holds += [((found.low < [0.3, -0.1]) & (found.high > [0.3, -0.1])).to_numpy().mean()]
        holds += [float(reduction.leak_low.item() < 0.4 < reduction.leak_high.item())]
    assert 0.91 < np.mean(holds) < 0.99


def test_leakage_and_its_reduction_by_hand():
    """Two directions, of which the second leaks a quarter; the draws are the means doubled for the first alone."""
    mean = pd.DataFrame([[0.9, 0.5, -0.3], [0.8, -0.1, 0.1]], index=["A", "A projected"], columns=ATTRIBUTES)
    draws = np.stack([mean.to_numpy(), mean.to_numpy() * [[2.0], [1.0]]] * 50)
    found = leakage(EffectMatrix(mean, mean, mean, draws, n=10), ["B", "C"])
    np.testing.assert_allclose(found["leak"], [0.8, 0.2])
    np.testing.assert_allclose(found["reduction"], [0.0, 0.75])
    wider = np.sqrt(10 / 9) * stats.t.ppf(0.975, 9) / stats.norm.ppf(0.975)
    np.testing.assert_allclose(found.loc["A", ["leak_low", "leak_high"]], [0.8, 0.8 + 0.8 * wider])
    projected = found.loc["A projected", ["reduction_low", "reduction_high"]]
    np.testing.assert_allclose(projected, [0.75, 0.75 + 0.125 * wider])
    np.testing.assert_allclose(found.loc["A", ["reduction_low", "reduction_high"]], 0.0)


def test_the_interval_of_the_reduction_knows_that_the_samples_are_the_same(before, after):
    """Half of each sample's change leaves half of the leak, whatever samples are drawn."""
    halved = before + 0.5 * (after["A"] - before)
    found = leakage(effect_matrix(before, {"A": after["A"], "half": halved}), ["A", "B"])
    assert found.loc["half", ["reduction", "reduction_low", "reduction_high"]].tolist() == pytest.approx([0.5] * 3)
    assert found.loc["A", "leak_low"] < found.loc["A", "leak"] < found.loc["A", "leak_high"]
    with pytest.raises(ValueError, match="no attribute 'hat'"):
        leakage(effect_matrix(before, after), ["hat"])


def test_edits_are_compared_where_they_change_the_image_alike():
    """One is twice as strong per unit of scale, the other twice as good per change: only the second one matters."""
    scales = {"strong": np.array([0.0, 1.0, 2.0]), "good": np.array([0.0, 1.0, 4.0])}
    change = {"strong": np.outer([0.9, 1.1], 2.0 * scales["strong"]), "good": np.outer([1.0, 1.0], scales["good"])}
    values = {"strong": 1.0 * change["strong"], "good": 2.0 * change["good"]}
    found, at = at_equal_change(values, change)
    assert at == pytest.approx(4.0)
    np.testing.assert_allclose(found["strong"], [3.6, 4.4])
    np.testing.assert_allclose(found["good"], [8.0, 8.0])


def test_an_edit_that_turns_back_is_read_where_it_first_gets_there():
    x = np.array([[0.0, 1.0, 0.5, 2.0], [0.0, 1.5, 1.6, 1.7], [0.0, 0.4, 0.3, 0.2]])
    y = np.broadcast_to([0.0, 1.0, 2.0, 3.0], x.shape)
    np.testing.assert_allclose(first_reached(x, y, 0.75), [0.75, 0.5, 1.0])


def test_the_success_rate_counts_samples_without_the_attribute():
    before = pd.DataFrame({"A": [0.1, 0.2, 0.9, 0.5, 0.3]})
    after = pd.DataFrame({"A": [0.8, 0.4, 0.1, 0.51, 0.9]})
    rate = success_rate(before, after, "A")
    assert (rate.value, rate.n) == (0.75, 4)
    none = success_rate(before + 1, after, "A")
    assert none.n == 0 and np.isnan([none.value, none.low, none.high]).all(), "all have it, so none can gain it"


def test_monotonicity_is_spearmans_correlation():
    rng = np.random.default_rng(0)
    values, scales = rng.random((5, 7)).round(1), [-3, -2, -1, 0, 1, 2, 3]
    expected = [stats.spearmanr(row, scales).statistic for row in values]
    np.testing.assert_allclose(monotonicity(values, scales), expected)
    np.testing.assert_allclose(monotonicity([[1, 2, 30], [3, 2, 1]], [-1, 0, 5]), [1, -1])
    assert np.isnan(monotonicity([[1, 1, 1]], [-1, 0, 1])).all()


def test_linearity_is_the_squared_correlation():
    rng, scales = np.random.default_rng(0), [-2, 0, 1, 3]
    values = rng.random((5, 4))
    expected = [stats.pearsonr(row, scales).statistic ** 2 for row in values]
    np.testing.assert_allclose(linearity(values, scales), expected)
    assert linearity([[1, 3, 4, 6]], scales)[0] == pytest.approx(1.0)
    assert np.isnan(linearity(np.ones((1, 4)), scales)).all()
    assert np.isnan(linearity(np.full((1, 7), 0.1), range(7))).all(), "also where their mean is rounded"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda b: effect_matrix(b, {}), "at least one direction"),
        (lambda b: effect_matrix(b, {"A": b[:5]}), "other samples or attributes"),
        (lambda b: effect_matrix(b, {"A": b.rename(columns={"B": "D"})}), "other samples or attributes"),
        (lambda b: effect_matrix(b, {"A": b.replace(b.iloc[0, 0], np.nan)}), "not finite"),
        (lambda b: success_rate(b, b, "Hat"), "no attribute 'Hat'; the scores have A, B, C"),
        (lambda b: monotonicity(b, [1, 2]), r"shape \(n, 2\), not \(40, 3\)"),
        (lambda b: monotonicity(b[["A"]], [1]), r"\(n, 1\)"),
        (lambda b: linearity(b[["A", "B"]], [1, 2]), "3 or more"),
    ],
)
def test_bad_input_is_a_sentence(before, call, message):
    with pytest.raises(ValueError, match=message):
        call(before)
