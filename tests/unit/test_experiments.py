"""Experiments about boundaries: tables of what was measured, on a network whose edits can be computed again."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch

import workbench as wb
from workbench.analysis.image_metrics import peak_signal_to_noise
from workbench.directions.boundary import random_boundary
from workbench.directions.boundary_fit import fit_boundary
from workbench.editing import experiments
from workbench.editing.cross import cross_boundary

T_M, VISITED, N = 500, (750, 500, 250, 0), 40
pytestmark = pytest.mark.filterwarnings("ignore:Mean of empty slice", "ignore:invalid value")


class Judge:
    """Reads how bright an image is, and how red."""

    def __call__(self, images):
        bright, red = images.mean(dim=(1, 2, 3)), (images[:, 0] - images[:, 1]).mean(dim=(1, 2))
        return pd.DataFrame({"Bright": torch.sigmoid(40 * bright).numpy(), "Red": torch.sigmoid(40 * red).numpy()})

    def features(self, images):
        return images.mean(dim=(2, 3)).numpy()


@pytest.fixture(scope="module")
def images(tiny):
    generator = torch.Generator().manual_seed(0)
    shade = torch.randn(N, 1, 1, 1, generator=generator).clamp(-2, 2) / 5
    return (shade + 0.2 * torch.randn(N, *tiny.image_shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def labels(images):
    return pd.Series((images.mean(dim=(1, 2, 3)) > 0).int().numpy(), name="Bright")


@pytest.fixture(scope="module")
def inverted(tiny, images):
    return wb.invert(tiny, images, steps=VISITED, record_h=True, record_x=True, progress=False)


@pytest.fixture(scope="module")
def runs(inverted):
    return inverted[30:]


@pytest.fixture(scope="module")
def b(inverted, labels):
    return {s: fit_boundary(inverted[:30], labels[:30].to_numpy(), t=T_M, space=s, name="Bright") for s in "hx"}


def test_crossings_are_measured_as_by_hand(tiny, runs, b):
    variants = {"x": {"boundary_x": b["x"]}, "x at eta 0": {"boundary_x": b["x"], "eta": 0.0}}
    judge = Judge()
    found = experiments.measure_crossings(
        tiny, runs, variants, classifier=judge, distances=[-2.0, 2.0], real=runs.x0, progress=False
    )
    table = found.summary("Bright").set_index(["variant", "distance"])
    plain = cross_boundary(tiny, runs, None, b["x"], distances=[0.0], mode="shift", progress=False).images[:, 0]
    edited = cross_boundary(tiny, runs, None, b["x"], distances=[2.0], progress=False).images[:, 0]
    change = judge(edited)["Bright"] - judge(plain)["Bright"]
    row = table.loc["x", 2.0]
    assert row["change"] == pytest.approx(change.mean(), abs=1e-4) and row["n"] == 10
    assert row["low"] < row["change"] < row["high"]
    assert row["psnr"] == pytest.approx(np.median(peak_signal_to_noise(edited, plain)), rel=1e-3)
    assert row["psnr_image"] == pytest.approx(np.median(peak_signal_to_noise(edited, runs.x0)), rel=1e-3)
    assert {"kid", "gained", "lost", "others"} <= set(table.columns)
    assert table.loc["x at eta 0", 2.0].psnr_image > row["psnr_image"]
    assert table.loc["x", 2.0].change > table.loc["x", -2.0].change
    assert found.monotonicity("Bright")["x at eta 0"] > 0.9


def test_a_control_moves_as_far_along_a_random_normal(tiny, runs, b, monkeypatch):
    starts = {}
    encode = type(tiny).encode
    monkeypatch.setattr(
        type(tiny), "encode", lambda self, x, t: starts.setdefault((t, len(x)), []).append(x) or encode(self, x, t)
    )
    given = {"found": {"boundary_x": b["x"]}, "random": {"boundary_x": b["x"], "control": 3}}
    experiments.measure_crossings(
        tiny, runs, given, classifier=Judge(), distances=[-2.0, 2.0], batch_size=64, progress=False
    )
    found, random = (start - runs.x_at(T_M).repeat_interleave(2, dim=0) for start in starts[T_M, 20])
    torch.testing.assert_close(found.flatten(1).norm(dim=1), random.flatten(1).norm(dim=1), atol=1e-4, rtol=1e-4)
    axis = random_boundary(b["x"], seed=3).normal.flatten()
    cosines = random.flatten(1) @ axis / random.flatten(1).norm(dim=1)
    torch.testing.assert_close(cosines.abs(), torch.ones(20), atol=1e-4, rtol=0)


def test_variants_are_what_their_names_say(b):
    found = experiments.spaces(b["h"], b["x"])
    assert set(found["both"]) == {"boundary_h", "boundary_x"} and set(found["x"]) == {"boundary_x"}
    assert found["h, every step"]["h_policy"] == "offset" and found["random"]["control"] == 0
    assert "random" not in experiments.spaces(b["h"], b["x"], control=None)
    assert [v["eta"] for v in experiments.etas(b["h"], None).values()] == [0.0, 0.3, 1.0]
    assert experiments.norms(None, b["x"])["random, great circle"] == {
        "boundary_h": None,
        "boundary_x": b["x"],
        "control": 0,
        "keep_norm": True,
    }


def test_timesteps_are_compared_with_boundaries_of_their_own(tiny, inverted, labels, runs):
    table = experiments.compare_timesteps(
        tiny,
        inverted[:30],
        labels[:30],
        runs=runs,
        timesteps=[500, 250],
        classifier=Judge(),
        distances=[2.0],
        eta=0.0,
        progress=False,
    )
    assert list(table.t) == [500, 500, 250, 250] and list(table.variant) == ["found", "random"] * 2
    found = table[table.variant == "found"]
    assert (found.change > table[table.variant == "random"].change.to_numpy()).all()
    assert found.accuracy_x.between(0.5, 1).all()


def test_both_signs_begin_at_the_same_noise(tiny, b):
    table = experiments.control_both_signs(
        tiny,
        range(12),
        None,
        b["x"],
        classifier=Judge(),
        attribute="Bright",
        steps=VISITED,
        distance=6.0,
        eta=0.0,
        real=torch.zeros(4, *tiny.image_shape),
        progress=False,
    )
    assert list(table.sign) == [-1, 0, 1] and table.share.is_monotonic_increasing
    assert (table.n == 12).all() and (table.diversity > 0).all() and table.kid.notna().all()


def test_rules_for_two_attributes_and_each_alone(tiny, inverted, runs, b):
    redder = inverted.x0[:30, 0].mean(dim=(1, 2)) > inverted.x0[:30, 1].mean(dim=(1, 2))
    red = fit_boundary(inverted[:30], redder.int().numpy(), t=T_M, space="x", name="Red")
    table = experiments.compare_rules(
        tiny, runs, None, [b["x"], red], distances=[3.0, -3.0], classifier=Judge(), eta=0.0, progress=False
    )
    assert set(table.rule) == {"sequential", "joint", "conditional", "Bright alone", "Red alone"}
    change = table.set_index(["rule", "attribute"]).change
    assert change["Bright alone", "Bright"] > 0 > change["Red alone", "Red"]
    plain = cross_boundary(tiny, runs, None, b["x"], distances=[0.0], mode="shift", eta=0.0, progress=False)
    alone = cross_boundary(tiny, runs, None, b["x"], distances=[3.0], eta=0.0, progress=False)
    expected = (Judge()(alone.images[:, 0]) - Judge()(plain.images[:, 0]))["Red"].mean()
    assert change["Bright alone", "Red"] == pytest.approx(expected, abs=1e-4)


def test_examples_are_chosen_by_the_seed_alone(tiny, images, b):
    options = {"steps": VISITED[1:], "n": 3, "progress": False}
    grid = experiments.random_examples(tiny, images, None, b["x"], seed=4, **options)
    again = experiments.random_examples(tiny, images, None, b["x"], seed=4, **options)
    chosen = [int(label.split()[1]) for label in grid.row_labels]
    assert torch.equal(grid.images, again.images) and grid.images.shape[:2] == (3, 3)
    assert torch.equal(grid.images[:, 0], images[chosen])
    assert experiments.random_examples(tiny, images, None, b["x"], seed=5, **options).row_labels != grid.row_labels


def test_costs_count_passes_and_take_time(tiny, images, labels):
    table = experiments.costs(tiny, images[:12], labels[:12].to_numpy(), t=T_M, steps=3, strengths=4).set_index("task")
    assert table.passes["inversion"] == 36 and table.passes["sweep"] == table.passes["sweep, one by one"] == 12
    assert (table.seconds > 0).all() and table.passes["boundary"] == 0


def test_reconstruction_gets_better_with_steps(model):
    images = wb.load_images("avataaars", size=32)[:2]
    table = experiments.reconstruction_over_steps(model, images, steps=(3, 12), t=T_M)
    assert list(table.steps) == [3, 12] and table.psnr.is_monotonic_increasing and (table.low <= table.psnr).all()


def test_defects_of_the_released_code_are_compared_with_the_clean_edit(tiny, inverted, labels, runs):
    table = experiments.compare_defects(
        tiny,
        inverted[:30],
        labels[:30],
        runs=runs,
        t=T_M,
        other_t=250,
        classifier=Judge(),
        distance=2.0,
        eta=0.0,
        progress=False,
    ).set_index("variant")
    assert list(table.index) == [
        "clean",
        "lagged h",
        "stale h",
        "no intercept",
        "h not normalised",
        "boundary of another t",
        "h ignored",
        "as released",
    ]
    assert table.change["clean"] > 0
    assert (table.change.drop("clean") != table.change["clean"]).all()

    def change(*boundaries, **options):
        moves = ({"distances": [0.0], "mode": "shift"}, {"distances": [2.0]})
        shared = {"eta": 0.0, "progress": False}
        images = [
            cross_boundary(tiny, runs, *boundaries, **shared, **{**options, **move}).images[:, 0] for move in moves
        ]
        before, after = (Judge()(x)["Bright"] for x in images)
        return (after - before).mean()

    h, x, late = (
        fit_boundary(inverted[:30], labels[:30], t=t, space=s) for t, s in ((T_M, "h"), (T_M, "x"), (250, "h"))
    )
    released = {"h_align": "lagged", "h_policy": "stale", "legacy_origin": True}
    for name, value in {
        "clean": change(h, x),
        "stale h": change(h, x, h_policy="stale"),
        "lagged h": change(late, x, h_align="lagged"),
        "no intercept": change(h, x, legacy_origin=True),
        "h ignored": change(None, x),
        "as released": change(late, x, **released),
    }.items():
        assert table.change[name] == pytest.approx(value, abs=1e-4), name
