"""Rankings of edits on tables whose curves are planted."""

from __future__ import annotations

import re
from functools import partial

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench import paths
from workbench.analysis.effect_metrics import first_reached
from workbench.benchmark.leaderboard import by_attribute, difference, leaderboard, pareto
from workbench.benchmark.methods import METHODS
from workbench.benchmark.records import record_folder

SCALES, N = (1.0, 2.0, 4.0), 40


def edits(*, populations=1, seed=0, **powers):
    """One row an edit: each method succeeds with probability min(1, power * scale) and changes the image by scale / 10.

    The other attribute changes by a tenth of the power, whatever the method.
    """
    rows, rng = [], np.random.default_rng(seed)
    luck = rng.random((2, N, populations))
    for method, power in powers.items():
        for a, attribute in enumerate(("A", "B")):
            for repeat in range(populations):
                for s in range(N):
                    for scale in SCALES:
                        gains = luck[a, s, repeat] < power * scale
                        change = {"change A": 0.1 * power * scale, "change B": 0.1 * power * scale}
                        change[f"change {attribute}"] = 0.8 * gains
                        rows.append(
                            {
                                "method": method,
                                "attribute": attribute,
                                "repeat": repeat,
                                "scale": scale,
                                "seed": s,
                                "before": 0.1 if s % 4 else 0.9,
                                "after": 0.9 if gains or s % 4 == 0 else 0.1,
                                "logit": 2.0 if gains else -2.0,
                                "rms": scale / 10,
                                "psnr_outside": 40.0 - 10 * np.log10(scale),
                                "identity": 1 - scale / 10,
                                "perceptual": scale / 10,
                                **change,
                            }
                        )
    return pd.DataFrame(rows)


@pytest.fixture(scope="module")
def table():
    return edits(good=0.2, fair=0.1, **{"random h": 0.01})


def test_methods_are_ranked_at_equal_change_and_the_numbers_are_means(table):
    found = leaderboard(table, change=0.2, resamples=200)
    assert list(found.index) == ["good", "fair", "random h"]
    part = table[(table.method == "good") & (table.scale == 2.0) & (table.before < 0.5)]
    by_hand = part.assign(gains=part.after > 0.5).groupby("attribute").gains.mean().mean()
    assert found.loc["good", "success"] == pytest.approx(by_hand)
    assert found.loc["good", "leakage"] == pytest.approx(0.1 * 0.2 * 2)
    assert found.loc["good", "precision"] == pytest.approx(found.loc["good", "effect"] / 0.04)
    assert found.loc["good", "change"] == pytest.approx(0.2)
    assert (found.success_low <= found.success).all() and (found.success <= found.success_high).all()
    assert found.loc["good", ["attributes", "n"]].tolist() == [2, 30]


def test_a_judge_of_one_attribute_has_nothing_to_leak_to(table):
    found = leaderboard(table[table.attribute == "A"].drop(columns="change B"), resamples=50)
    assert (found["leakage"] == 0).all() and found["precision"].isna().all() and (found["success"] > 0).any()


def test_between_two_strengths_the_curve_is_a_line_and_beyond_the_last_it_ends(table):
    one, two, between = (leaderboard(table, change=c, resamples=20).effect["good"] for c in (0.1, 0.2, 0.15))
    assert between == pytest.approx((one + two) / 2)
    last = leaderboard(table, change=5.0, resamples=20).loc["good"]
    assert last["change"] == pytest.approx(0.4)


def test_what_never_succeeds_as_often_has_no_number_at_equal_success(table):
    found = leaderboard(table, resamples=100)
    assert found.loc["good", "reached"] == 1.0 and found.loc["random h", "reached"] == 0.0
    assert np.isnan(found.loc["random h", "entanglement"])
    assert found.loc["good", "psnr_outside"] > found.loc["good", "psnr_outside_low"]


def test_p_values_are_against_the_control_and_corrected_for_the_number_of_methods(table):
    found = leaderboard(table, resamples=400)
    assert found.p_random["good"] < 0.05 and np.isnan(found.p_random["random h"])
    many = edits(**{f"good {i}": 0.2 for i in range(40)}, **{"random h": 0.01})
    assert leaderboard(many, resamples=100).p_random["good 0"] < 0.01, "however many methods there are"
    null = leaderboard(edits(one=0.1, two=0.1, **{"random h": 0.1}), resamples=400)
    assert (null.p_random.dropna() > 0.5).all()


def test_a_method_that_skips_an_attribute_is_compared_with_the_control_on_the_others():
    """Else skipping the hard attribute would count as beating chance."""
    table = edits(**{"masked": 0.2, "random h": 0.2})
    hard = (table.method == "random h") & (table.attribute == "B")
    table.loc[hard, "after"] = table.loc[hard, "before"]
    skipping = table[(table.method != "masked") | (table.attribute == "A")]
    assert leaderboard(skipping, resamples=100).p_random["masked"] == 1.0
    apart = skipping[(skipping.method == "masked") | (skipping.attribute == "B")]
    assert np.isnan(leaderboard(apart, resamples=20).p_random["masked"])
    other = table[(table.method == "masked") & (table.attribute == "A")].assign(method="random x")
    for both in (pd.concat([apart, other]), pd.concat([other, apart])):
        assert leaderboard(both, resamples=20).p_random["masked"] == 1.0, "by the control that it can be compared with"


def test_draws_without_the_control_are_no_evidence_against_it():
    table = edits(populations=3, **{"worse": 0.02, "random h": 0.2})
    once = table[(table.method == "worse") | (table.repeat == 0)]
    assert leaderboard(once, resamples=100).p_random["worse"] == 1.0


def test_a_curve_is_read_where_it_first_reaches_the_point_also_after_a_dip():
    x = np.array([[0.0, 0.15, 0.05, 0.3]])
    assert first_reached(x, x, 0.2) == pytest.approx(0.2) and first_reached(x, x, 0.1) == pytest.approx(0.1)
    assert first_reached(x, 10 * x, 9.0) == pytest.approx(3.0), "at the largest where it is never reached"


def test_a_sample_without_a_region_leaves_the_others_error_as_it_is(table):
    """Seed 0 has the attribute and does not count, seed 1 does; neither may blank the mean."""
    for seeds in ([0], [0, 1]):
        holes = table.copy()
        holes.loc[holes.seed.isin(seeds), "psnr_outside"] = np.nan
        assert pareto(holes, resamples=20).psnr_outside.tolist() == pytest.approx(
            pareto(table, resamples=20).psnr_outside.tolist()
        )


def test_the_interval_covers_the_truth_and_populations_count():
    hits, truth = 0, 0.4
    for seed in range(40):
        found = leaderboard(edits(m=0.2, seed=seed), change=0.2, resamples=200).loc["m"]
        hits += found.success_low <= truth <= found.success_high
    assert hits >= 33
    table = edits(m=0.2, populations=2)
    table["after"] = np.where(table.repeat == 0, 0.9, np.where(table.before > 0.5, table.before, 0.1))
    found = leaderboard(table, change=0.2, resamples=200).loc["m"]
    assert found.success == 0.5 and found.success_low < 0.1 and found.success_high > 0.9


def test_a_difference_is_paired(table):
    found = difference(table, "good", "fair", resamples=200)
    assert found.low > 0 and found.n == 30
    assert found.value == pytest.approx(leaderboard(table).success["good"] - leaderboard(table).success["fair"])
    same = difference(table, "good", "good", resamples=50)
    assert (same.value, same.n) == (0.0, 30) and same.low == pytest.approx(-same.high)
    assert same.high < 0.15, "what never differs is still known from 30 samples only"
    apart = table[(table.method == "good") == (table.attribute == "A")]
    assert difference(apart, "good", "fair").n == 0
    with pytest.raises(ValueError, match="'best' .*good, fair, random h"):
        difference(table, "best", "good")


def test_pareto_has_a_row_a_strength_and_by_attribute_one_an_attribute(table):
    curve = pareto(table, resamples=50)
    assert len(curve) == 9 and curve.groupby("method").success.apply(lambda s: s.is_monotonic_increasing).all()
    # Of the mean squared error: 40 dB at scale 1, and 10 log10 of the scale less after that.
    assert curve.psnr_outside[:3].tolist() == pytest.approx([40.0 - 10 * np.log10(s) for s in SCALES])
    each = by_attribute(table, resamples=50)
    assert len(each) == 6 and (each.n == 30).all()


def test_an_attribute_that_all_samples_have_does_not_count(table):
    everyone = table.assign(before=np.where(table.attribute == "B", 0.9, table.before))
    assert leaderboard(everyone, resamples=20).loc["good", "attributes"] == 1
    for of in (leaderboard, pareto, by_attribute, partial(difference, first="good", second="fair")):
        with pytest.raises(ValueError, match="held-out samples without it.*take more"):
            of(table.assign(before=0.9), resamples=20)


def test_the_bundled_record_is_whole_and_the_readme_tells_its_numbers(model):
    record = wb.load_benchmark(model=model)
    assert set(record.protocol.methods) == set(METHODS)
    skipped = set(zip(record.skipped.method, record.skipped.attribute, strict=True))
    assert skipped == {("CASL", "Smiling"), ("LOCO", "Dark_Skin"), ("Jacobian, masked", "Dark_Skin")}
    folder = record_folder(model)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5e6
    table = leaderboard(record.edits)
    readme = (paths.home() / "README.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| ([^|]+) \| [^|]+ \| (\d.*?) \|$", readme, re.MULTILINE))
    assert len(told) >= 5
    for method, success in told.items():
        row = table.loc[method]
        assert success == f"{row.success:.2f} ({row.success_low:.2f} to {row.success_high:.2f})", method
