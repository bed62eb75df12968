"""Effects of edits, with a classifier that is a known function of the pixels."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pandas as pd
import pytest
import torch
from planted import planted, random_tensor

import workbench as wb
from workbench.analysis.image_metrics import segmentation_consistency
from workbench.diffusion.sampling import Injection
from workbench.directions.supervised import few_shot_directions
from workbench.editing import disentangle
from workbench.editing import measure as module
from workbench.editing.disentangle import (
    DisentanglingTable,
    cancel_effects,
    disentangling_table,
    few_examples,
)
from workbench.editing.edits import Edit, MoveX, Shift
from workbench.editing.measure import Effects, measure
from workbench.editing.render import edit

STEPS = 4
IMAGE = ["rms", "psnr", "psnr_image", "psnr_outside"]


@pytest.fixture(scope="module")
def run(tiny):
    return wb.sample(tiny, [4, 9, 2, 7, 5, 0], steps=STEPS, record_h=True, progress=False)


@pytest.fixture(scope="module")
def directions(tiny, run):
    """Two random directions, each as long as h itself, with a part in common."""
    one, two = random_tensor(1, 2, STEPS, *tiny.h_shape)
    deltas = {"red": one, "green": two + 0.5 * one}
    return {name: planted(tiny, run, 0, name, delta=delta) for name, delta in deltas.items()}


def brightness(images):
    """Mean of the red and of the green channel, and a constant: linear in the pixels."""
    means = images.double().mean(dim=(2, 3)).numpy()
    return pd.DataFrame({"red": means[:, 0], "green": means[:, 1], "none": 0.25})


def test_effects_are_the_scores_of_the_edits_one_by_one(tiny, run, directions):
    found = measure(run, directions, classifier=brightness, scales=[-1, 2], progress=False)
    assert found.edits == ["red", "green"] and found.scales == [-1.0, 2.0]
    assert len(found.table) == 2 * 2 * 6 * 3
    assert list(found.table.columns) == ["edit", "scale", "seed", "attribute", "before", "after", *IMAGE]
    for name, direction in directions.items():
        for scale in (-1, 2):
            before, after = found.scores(name, scale)
            assert list(before.index) == list(run.seeds)
            np.testing.assert_allclose(before, brightness(run.x0), atol=1e-6)
            edited = edit(tiny, run, direction, scale=scale, progress=False).x0
            np.testing.assert_allclose(after, brightness(edited), atol=1e-4)
            assert (after["red"] - before["red"]).abs().max() > 1e-3


def test_the_result_does_not_depend_on_how_many_samples_are_edited_at_once(tiny, run, directions, monkeypatch):
    options = {"scales": [1], "progress": False}
    whole = measure(run, directions, classifier=brightness, **options)
    sizes = []
    monkeypatch.setattr(module, "IMAGE_BYTES", 4 * 2 * 2 * int(np.prod(tiny.image_shape)))

    def counted(images):
        sizes.append(len(images))
        return brightness(images)

    parts = measure(run, directions, classifier=counted, **options)
    assert max(sizes) == 2
    order = ["edit", "scale", "seed", "attribute"]
    pd.testing.assert_frame_equal(
        parts.table.sort_values(order, ignore_index=True), whole.table.sort_values(order, ignore_index=True), atol=1e-5
    )
    pd.testing.assert_frame_equal(parts.scores("red", 1.0)[1], whole.scores("red", 1.0)[1], atol=1e-5)


def test_every_kind_of_edit_is_measured_in_one_table(tiny, run, directions):
    """The images' own measures too, against naive ones of what is seen; outside of a mask only where one is given."""
    mask = np.zeros(tiny.image_shape[1:], dtype=bool)
    mask[:4] = True
    vector = torch.randn(tiny.image_shape, generator=torch.Generator().manual_seed(0))
    edits = {"h": Shift(directions["red"], asymmetric=True), "x": MoveX(vector, run.timesteps[1], "x")}
    found = measure(run, edits, [-1.0, 2.0], classifier=brightness, masks={"red": mask.astype(int)}, progress=False)
    images = wb.render(run, edits, [-1.0, 2.0], progress=False).images.unflatten(0, (2, -1))
    table = found.table.set_index(["edit", "scale", "attribute"]).sort_index()
    for e, name in enumerate(edits):
        for c, scale in enumerate((-1.0, 2.0)):
            rows = table.loc[name, scale, "red"]
            error = ((images[e, :, c].clamp(-1, 1) - run.x0.clamp(-1, 1)) ** 2).numpy()
            np.testing.assert_allclose(rows["rms"], np.sqrt(error.mean(axis=(1, 2, 3))), rtol=1e-3)
            np.testing.assert_allclose(rows["psnr"], 10 * np.log10(4 / error.mean(axis=(1, 2, 3))), rtol=1e-3)
            out = error[:, :, ~mask].mean(axis=(1, 2))
            np.testing.assert_allclose(rows["psnr_outside"], 10 * np.log10(4 / out), rtol=1e-3)
            assert table.loc[name, scale, "green"]["psnr_outside"].isna().all()
    summary, curves = found.summary("red"), found.curves("red")
    change = found.change("x", 2.0)["red"]
    assert summary.loc[summary.edit.eq("x") & summary.scale.eq(2.0), "change"].item() == pytest.approx(change.mean())
    assert curves.loc[curves.edit.eq("x") & curves.scale.eq(2.0), "value"].item() == pytest.approx(change.mean())
    assert (curves.low <= curves.value).all() and (curves.value <= curves.high).all() and set(curves.n) == {len(run)}
    assert set(found.monotonicity("red").index) == {"h", "x"}


def test_an_edit_is_compared_with_its_own_process_without_the_change(tiny, run):
    class Elsewhere(Edit):
        """Sampled with other noise throughout; scale 0 of it is what it is compared with."""

        name, unit = "elsewhere", "none"

        def plain(self, run):
            return dataclasses.replace(run, seeds=tuple(s + 100 for s in run.seeds))

        def plan(self, run, scales):
            return [dataclasses.replace(self.plain(run), x_T=run.x_T + s) for s in scales]

    found = measure(run, Elsewhere(), [0.0, 1.0], classifier=brightness, progress=False)
    before, after = found.scores("elsewhere", 0.0)
    np.testing.assert_allclose(before, after, atol=1e-5)
    assert (before["red"] - brightness(run.x0)["red"].to_numpy()).abs().max() > 1e-3
    assert found.change("elsewhere", 1.0)["red"].abs().max() > 1e-3
    assert found.table["psnr_image"].lt(100).all()


def test_distance_to_real_images_is_measured_where_they_are_given(tiny, run, directions):
    class Judge:
        def __call__(self, images):
            return brightness(images)

        def features(self, images):
            return images.flatten(2).mean(dim=2).numpy()

    real = torch.rand(6, *tiny.image_shape, generator=torch.Generator().manual_seed(0))
    found = measure(run, directions["red"], [1.0, 2.0], classifier=Judge(), real=real, progress=False)
    assert found.realism["scale"].tolist() == [1.0, 2.0] and found.realism["kid"].notna().all()
    assert "kid" in found.summary("red")


def test_texts_and_segments_are_measured_where_they_are_given(tiny, run, directions, squares):
    """S_dir, CLIP score and SC of the table are those of the images, one by one."""
    clip, pair = wb.load_clip(squares[1], device="cpu"), ("a red square", "a blue square")

    def segmenter(images):
        return (images.mean(dim=1) > 0).long().numpy()

    options = {"clip": clip, "prompts": {"red": pair}, "segmenter": segmenter, "progress": False}
    found = measure(run, {"one": directions["red"]}, [1.0, 3.0], classifier=brightness, **options)
    own = found.table[found.table.attribute == "red"].pivot(index="seed", columns="scale").loc[list(run.seeds)]
    target, source = clip.texts(pair)
    for scale in (1.0, 3.0):
        edited = edit(tiny, run, directions["red"], scale=scale, progress=False).x0
        moved = clip.images(edited) - clip.images(run.x0)
        expected = moved @ (target - source) / np.linalg.norm(moved, axis=1) / np.linalg.norm(target - source)
        np.testing.assert_allclose(own["s_dir"][scale], expected, atol=1e-2)
        np.testing.assert_allclose(own["clip_score"][scale], clip.images(edited) @ target, atol=1e-4)
        both = (segmenter(images.clamp(-1, 1)) for images in (edited, run.x0))
        np.testing.assert_allclose(own["consistency"][scale], segmentation_consistency(*both), atol=1e-6)
    assert found.table[found.table.attribute == "green"]["s_dir"].isna().all()
    assert {"s_dir", "clip_score", "consistency"} <= set(found.summary("red"))
    with pytest.raises(ValueError, match="prompts"):
        measure(run, directions, [1.0], classifier=brightness, clip=clip)


def test_an_inverted_image_is_compared_with_its_reconstruction(tiny, run, directions):
    inverted = wb.invert(tiny, run.x0[:2].clamp(-1, 1), steps=STEPS, progress=False)
    found = measure(inverted, directions["red"], classifier=brightness, scales=[1], progress=False)
    before, _ = found.scores("red", 1)
    np.testing.assert_allclose(before, brightness(wb.replay(inverted, progress=False).x0), atol=1e-5)
    assert list(before.index) == [0, 1]
    assert np.abs(before["red"] - brightness(inverted.x0)["red"].to_numpy()).max() > 1e-5


def test_the_matrix_is_the_mean_change_of_the_table(tiny, run, directions):
    found = measure(run, directions, classifier=brightness, scales=[1, 2], progress=False)
    matrix = found.matrix({"red": 1.0, "green": 2.0}).mean
    for name, scale in (("red", 1.0), ("green", 2.0)):
        rows = found.table[(found.table["edit"] == name) & (found.table["scale"] == scale)]
        for attribute, part in rows.groupby("attribute"):
            assert matrix.loc[name, attribute] == pytest.approx((part["after"] - part["before"]).mean())
    assert matrix["none"].eq(0).all()


def test_what_a_direction_drags_along_is_cancelled_by_its_effect(tiny, run, directions, monkeypatch):
    options = {"classifier": brightness, "progress": False}

    def effect(direction):
        return measure(run, {"it": direction}, scales=[2.0], **options).matrix(2.0).mean.loc["it"]

    red, others = directions["red"], {"green": directions["green"]}
    often = cancel_effects(tiny, run, red, others=others, **options)
    monkeypatch.setattr(disentangle, "ROUNDS", 1)
    once = cancel_effects(tiny, run, red, others=others, **options)
    assert often.name == "red without green"
    assert abs(effect(red).green) > 1e-3
    assert abs(effect(often).green) < 0.1 * abs(effect(once).green) or abs(effect(often).green) < 1e-5
    assert abs(effect(once).green) < 0.5 * abs(effect(red).green)
    # What was added is a multiple of the other direction, and nothing else.
    added = (often - red).delta().flatten()
    along = others["green"].delta().flatten()
    assert torch.cosine_similarity(added, along, dim=0).abs() == pytest.approx(1.0, abs=1e-4)
    about = often.provenance["parameters"]
    assert often.provenance["method"] == "cancelled" and [part["name"] for part in about["of"]] == ["red", "green"]
    assert (about["scale"], about["rounds"], about["n"], about["samples"]) == (2.0, 3, len(run), list(run.seeds))
    factor = about["others"]["green"]
    torch.testing.assert_close((red + factor * others["green"]).delta(), often.delta(), rtol=1e-4, atol=1e-6)
    assert json.loads(json.dumps(often.provenance)) == often.provenance


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ([], "at least one other direction"),
        (["green", "blue"], "there is no attribute 'blue'; the scores have red, green, none"),
        (["green", "none"], "direction of none changes none at scale 2 by .*not distinguishable from 0"),
        (["green", "again"], "too similar"),
    ],
)
def test_effects_that_can_not_be_cancelled_are_refused(tiny, run, directions, names, message):
    others = {name: directions["green"] for name in names}
    options = {"classifier": twice if "again" in names else brightness, "progress": False}
    with pytest.raises(ValueError, match=message):
        cancel_effects(tiny, run, directions["red"], others=others, **options)


def twice(images):
    """A classifier with the same attribute under two names."""
    return brightness(images).assign(again=lambda scores: scores["green"])


def test_labelled_images_give_a_direction_that_edits_samples(model, tmp_path):
    """Held-out images with their true labels, inverted; edits of generated samples, scored by the judge."""
    images = wb.load_images("avataaars", size=32).select(slice(32))
    store = wb.extract(model, images=images, steps=4, out=tmp_path / "inverted.zarr", progress=False)
    found = wb.find_from_labels(store, images.label("Long_Hair"), progress=False)
    run = wb.sample(model, range(8), steps=4, progress=False)
    pair = {"found": found, "random": wb.random_like(found, seed=0)}
    judge = wb.load_classifier("avataaars-judge")
    measured = measure(run, pair, classifier=judge, scales=[2.0], progress=False)
    rates = {name: measured.success("Long_Hair", edit=name)[2.0] for name in pair}
    assert rates["found"].value > 0.6 > 0.2 > rates["random"].value


def effects_of(after_by_scale):
    """Effects of one direction on ten samples without the attribute: so many of them have it after each scale."""
    rows = [
        {"edit": "A", "scale": scale, "seed": seed, "attribute": "A", "before": 0.1, "after": float(seed < hits)}
        for scale, hits in after_by_scale.items()
        for seed in range(10)
    ]
    return Effects(pd.DataFrame(rows))


def test_success_is_the_share_of_the_samples_without_the_attribute_that_gain_it():
    effects = effects_of({3.0: 10, -4.0: 10, 1.0: 5, 2.0: 8})
    assert [rate.value for rate in effects.success("A").values()] == [1.0, 0.5, 0.8, 1.0]


def test_a_table_of_disentangling_is_both_matrices_over_repeats(tiny, run, directions):
    options = {"scales": [1.0, 2.0], "progress": False}
    table = disentangling_table(tiny, run, directions, classifier=brightness, repeats=3, **options)
    apart = {"red": directions["red"].orthogonal_to(directions["green"])}
    apart["green"] = directions["green"].orthogonal_to(directions["red"])
    for variant, used in (("original", directions), ("disentangled", apart)):
        for name, direction in used.items():
            edited = edit(tiny, run, direction, progress=False).x0
            change = (
                (brightness(edited) - brightness(run.x0))[["red", "green"]].to_numpy().reshape(3, 2, 2).mean(axis=1)
            )
            np.testing.assert_allclose(table.matrix(variant).loc[name], change.mean(axis=0), atol=1e-4)
            stds = table.table.query("variant == @variant and direction == @name")["std"]
            np.testing.assert_allclose(stds, change.std(axis=0, ddof=1), atol=1e-4)
    whole = {}
    for variant in table.effects:
        sizes = table.matrix(variant).abs().to_numpy()
        whole[variant] = (sizes.sum() - np.trace(sizes)) / np.trace(sizes)
    fall = table.fall()
    assert (
        fall.value == pytest.approx(whole["original"] - whole["disentangled"]) and fall.low <= fall.value <= fall.high
    )


def test_the_fall_at_equal_effect_takes_the_first_scale_as_effective_as_found():
    """Planted: the projected direction is half as strong and a fifth as entangled, at any scale."""
    rows = {"original": [], "disentangled": []}
    for variant, own, other in (("original", 0.2, 0.2), ("disentangled", 0.1, 0.02)):
        for name, of in (("A", "B"), ("B", "A")):
            for scale in (1.0, 2.0, 3.0):
                for attribute, change in sorted([(name, own * scale), (of, other * scale**2)]):
                    for seed in range(6):
                        row = {"edit": name, "scale": scale, "seed": seed, "attribute": attribute}
                        rows[variant].append(row | {"before": 0.1, "after": 0.1 + change})
    table = pd.DataFrame(
        {"variant": v, "direction": name, "attribute": name, "effect": 0.0, "std": 0.0, "scale": 1.0}
        for v in rows
        for name in "AB"
    )
    effects = {variant: Effects(pd.DataFrame(listed)) for variant, listed in rows.items()}
    found = DisentanglingTable(table, effects)
    assert found.fall().value == pytest.approx(1.0 - 0.2)
    assert found.fall(equal_effect=True).value == pytest.approx(1.0 - 0.02 * 4 / 0.2)


@pytest.fixture(scope="module")
def deterministic(tiny, tmp_path_factory):
    """Samples at eta 0 to draw examples from, their labels by the red of their pixels, and others to edit."""
    options = {"steps": STEPS, "eta": 0.0, "progress": False}
    store = wb.extract(tiny, 40, out=tmp_path_factory.mktemp("few") / "store.zarr", dtype="float32", **options)
    red = brightness(torch.from_numpy(store.images[:]))["red"].set_axis(store.seeds)
    return store, (red > red.median()).astype(int), wb.sample(tiny, range(100, 105), **options)


def test_the_effect_of_a_few_examples_is_that_of_edits_of_equal_length(tiny, deterministic):
    store, labels, run = deterministic
    options = {"counts": [2, 8], "draws": 2, "seed": 1, "progress": False}
    found = few_examples(tiny, run, store, labels=labels, classifier=brightness, **options)
    assert list(found.columns) == ["space", "draw", "count", "cosine", "effect"] and len(found) == 2 * 2 * 4
    noise = torch.cat([wb.sample(tiny, [s], steps=STEPS, eta=0.0, progress=False).x_T for s in store.seeds])
    before = brightness(run.x0)["red"].mean()
    for space, x_T in (("h", None), ("x_T", noise)):
        few = few_shot_directions(store, labels, x_T=x_T, **options)
        effects = []
        for delta in few.deltas:
            if space == "h":
                edited = wb.replay(run, edit=Injection.adding(2 * delta[:, None]), progress=False)
            else:
                edited = wb.replay(dataclasses.replace(run, x_T=run.x_T + 10 * delta[0]), progress=False)
            effects.append(brightness(edited.x0)["red"].mean() - before)
        rows = found[found["space"] == space]
        np.testing.assert_allclose(rows["effect"], effects, atol=1e-4)
        np.testing.assert_allclose(rows["cosine"], few.table["cosine"])
        assert np.abs(effects).max() > 1e-3


def test_an_inverted_store_knows_its_x_T(tiny, deterministic, tmp_path):
    store, labels, run = deterministic
    images = torch.from_numpy(store.images[:]).clamp(-1, 1)
    inverted = wb.extract(tiny, images=images, steps=STEPS, out=tmp_path / "inverted.zarr", progress=False)
    options = {"counts": [4], "draws": 1, "progress": False}
    named = pd.Series(labels.to_numpy(), name="red")
    found = few_examples(tiny, run, inverted, labels=named, classifier=brightness, **options)
    few = few_shot_directions(inverted, named, x_T=torch.from_numpy(inverted.x_T[:]), **options)
    np.testing.assert_allclose(found.loc[found["space"] == "x_T", "cosine"], few.table["cosine"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, r, y: {"labels": y.rename("hat")}, "'hat'"),
        (lambda m, r, y: {"runs": wb.sample(m, [1], steps=STEPS, eta=1.0, progress=False)}, "eta=0"),
        (lambda m, r, y: {"runs": wb.sample(m, [1], steps=3, eta=0.0, progress=False)}, "timesteps than"),
        (lambda m, r, y: {"runs": dataclasses.replace(r, edit=nothing_added(m))}, "edited already"),
    ],
)
def test_a_few_examples_refuse_what_does_not_fit(tiny, deterministic, change, message):
    store, labels, run = deterministic
    given = {"runs": run, "labels": labels, "counts": [2], "draws": 1, **change(tiny, run, labels)}
    with pytest.raises(ValueError, match=message):
        few_examples(tiny, given.pop("runs"), store, classifier=brightness, progress=False, **given)


def nothing_added(model):
    return Injection.adding(torch.zeros(STEPS, 1, *model.h_shape))


def measured(model, run, edits, classifier=brightness, scales=(1.0,)):
    return measure(run, edits, scales, classifier=classifier, progress=False)


def table_of(model, run, directions, **options):
    return disentangling_table(model, run, directions, classifier=brightness, **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, r, d: measured(m, r, []), "at least one edit"),
        (lambda m, r, d: measured(m, r, d, scales=[]), "one edit and one scale"),
        (lambda m, r, d: measured(m, r, [d["red"], d["red"]]), "two edits are named 'red'"),
        (lambda m, r, d: measured(m, r, d, lambda x: x.mean(1)), "DataFrame with one row"),
        (lambda m, r, d: measured(m, r, d, lambda x: brightness(x[:1])), "for 6 images"),
        (lambda m, r, d: table_of(m.tapped("before"), r, d, repeats=2), "tap"),
        (lambda m, r, d: measured(m, wb.sample(m, [1], steps=3, progress=False), d), "resampled"),
        (lambda m, r, d: table_of(m, r, {"red": d["red"]}), "1 direction given"),
        (lambda m, r, d: table_of(m, r, d, repeats=4), "6 samples can't be split in 4"),
        (lambda m, r, d: table_of(m, r, d | {"hat": d["red"]}, repeats=2), "'hat'"),
        *(
            (lambda m, r, d, read=read: getattr(effects_of({1.0: 5}), read)("a"), "attribute 'a' is not known")
            for read in ("summary", "curves", "monotonicity")
        ),
        (
            lambda m, r, d: measure(r, Shift(d["red"]), [1.0], classifier=brightness, asymmetric=True),
            "asymmetric: options of directions, and 'red'",
        ),
        (lambda m, r, d: effects_of({1.0: 5}).scores("A", 2.0), "no edit 'A' at scale 2; measured are A at 1"),
    ],
)
def test_bad_input_is_a_sentence(tiny, run, directions, call, message):
    with pytest.raises(ValueError, match=message):
        call(tiny, run, directions)
