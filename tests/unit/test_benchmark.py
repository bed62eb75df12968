"""The benchmark on a network of a few thousand weights: cells, cache, resumption, new methods."""

from __future__ import annotations

import contextlib
import json
import sys
import threading
from dataclasses import replace
from functools import partial

import cloudpickle
import distributed
import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler
from PIL import Image
from small_models import COLOURS

import workbench as wb
from workbench.analysis.image_metrics import cosine_similarity, perceptual_distance, segmentation_consistency
from workbench.benchmark import field_methods, leaderboard
from workbench.benchmark.bench import Bench, _counted, backdrop
from workbench.benchmark.methods import METHODS, register_method
from workbench.benchmark.protocol import HELD_OUT, Protocol
from workbench.benchmark.run import run_benchmark
from workbench.benchmark.study import Study, TextModels, found_edit
from workbench.datasets.labelled import load_images
from workbench.diffusion.foreign import LucidrainsUNet
from workbench.directions.supervised import find_from_labels
from workbench.editing.edits import Edit, NotApplicable
from workbench.editing.render import render

NAMES = ("Bright", "Red")
USUAL = -0.17  # what splits the tiny network's samples in halves


class Network:
    """Reads how bright an image is, and how red; with the parts of a classifier that the benchmark uses."""

    attributes, device = NAMES, torch.device("cpu")

    def __init__(self, name, gain):
        self.name, self.hash, self.gain = name, name, gain

    def scores(self, images, **_):
        images = torch.as_tensor(np.asarray(images)).clamp(-1, 1)
        bright, red = images.mean(dim=(1, 2, 3)), (images[:, 0] - images[:, 1]).mean(dim=(1, 2))
        return pd.DataFrame({"Bright": (self.gain * bright).numpy(), "Red": (self.gain * (red - USUAL)).numpy()})

    def __call__(self, images, **_):
        return 1 / (1 + np.exp(-self.scores(images)))

    def features(self, images, **_):
        return torch.as_tensor(np.asarray(images)).clamp(-1, 1).flatten(2).mean(dim=2).numpy() + 2.0

    def maps(self, images, **_):
        return [np.asarray(images) + 2.0]


def test_passes_are_counted_in_samples_whatever_the_mid_block_gives(tiny):
    """That of lucidrains' network gives the skips as well."""
    network = LucidrainsUNet(
        sample_size=8, time_channels=8, widths=(8, 8), heads=(1,), head_channels=(4,), full=(True,)
    )
    for model in (tiny, wb.wrap(network, wb.NoiseSchedule.linear(), name="l", device="cpu")):
        with _counted(model) as passes:
            model(torch.zeros(5, 3, 8, 8), 100)
        assert passes == [5]


class Brighter(Edit):
    """Adds the same to every pixel of the image itself."""

    def __init__(self, by):
        self.by, self.name = by, f"{by}"

    def plan(self, run, scales):
        return [run.tail(run.steps, run.x0 + s * self.by) if s else run for s in scales]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    rows = []
    for i in range(60):
        shade = rng.integers(60, 200, 3)
        picture = (shade + rng.normal(0, 20, (8, 8, 3))).clip(0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{i:03d}.png")
        rows.append({"file": f"{i:03d}.png", "Bright": int(shade.mean() > 128), "Red": int(shade[0] > shade[1])})
    pd.DataFrame(rows).to_csv(folder / "attributes.csv", index=False)
    return load_images(folder, size=8)


def draw(prompt, n, seed):
    """A text-to-image model of coloured squares."""
    colour = torch.tensor(COLOURS[next(name for name in COLOURS if name in prompt)]) / 127.5 - 1
    noise = torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
    return (colour[:, None, None] + 0.1 * noise).clamp(-1, 1)


@pytest.fixture
def setting(tiny, images, cache, squares, monkeypatch):
    for name, value in {"LEARNED": {"k": 3, "steps": 4, "batch_size": 6}, "CODED": {"steps": 40}, "CARRIED": 2}.items():
        monkeypatch.setattr(field_methods, name, value)  # as short as they can be
    prompts = {"Bright": ("a white square", "a blue square"), "Red": ("a red square", "a green square")}
    texts = TextModels(wb.load_clip(squares[1], device="cpu"), prompts, draw)
    parts = {"labeller": Network("labels", 30.0), "judge": Network("judges", 25.0), "images": images}
    return parts | {
        "texts": texts,
        "model": tiny,
        "progress": False,
        "masks": {"Bright": np.arange(64).reshape(8, 8) < 24},
    }


def protocol(*names, **sizes):
    sizes = {"population": 40, "labelled": 30, "held_out": 12, "steps": 4, "shown": 2, **sizes}
    return Protocol(names or ("random h", "PCA", "mean difference", "boundary in x"), NAMES, **sizes)


def run(setting, plan):
    parts = dict(setting)
    return run_benchmark(parts.pop("model"), plan, **parts)


def bench_of(setting, plan=None):
    parts = {name: setting[name] for name in ("labeller", "judge", "images", "masks", "texts")}
    return Bench(setting["model"], plan or protocol(), **parts)


def cells(cache):
    return list((cache / "benchmark").iterdir())


def test_every_registered_method_is_measured_on_the_same_samples(setting):
    result = run(setting, protocol(*METHODS, steps=2))
    counts = result.edits.groupby(["method", "attribute"]).size()
    assert set(result.edits.method) == set(METHODS)
    assert (counts == 12 * 4).all()
    # Only where a method needs a region, and none is known, is there none.
    assert result.edits.s_dir.notna().all() and result.edits.s_dir.abs().max() <= 1.0 + 1e-6
    assert result.edits.clip_gain.abs().between(0, 2).all()
    assert set(result.skipped.method) == {"Jacobian, masked", "LOCO"} and set(result.skipped.attribute) == {"Red"}
    seeds = result.edits.groupby("method").seed.unique()
    assert all(list(s) == list(seeds.iloc[0]) and min(s) >= HELD_OUT for s in seeds)
    before = result.edits.groupby(["attribute", "seed"]).before.nunique()
    assert (before == 1).all()
    assert {"population", "other steps"} == set(result.transfer.kind)
    assert set(result.realism.method) == {"real", "plain", *METHODS}
    assert set(result.realism.space) == {"judge", "pixels"}
    assert set(result.realism.n) == {12}, "distances depend on the number of samples"
    assert (result.realism.kernel_low <= result.realism.kernel_high).all()
    assert (result.realism.frechet_low < result.realism.frechet).all()
    assert (result.realism.frechet < result.realism.frechet_high).all()


@pytest.mark.slow
def test_workers_measure_the_same_with_methods_that_they_never_saw_registered(setting, added, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.setenv("WORKBENCH_HOME", str(tmp_path))
    monkeypatch.setattr("workbench.paths.cache", lambda: tmp_path / "data" / "cache")

    @register_method("of a test")
    def of_a_test(study, attribute):
        """Difference of means, once more."""
        return find_from_labels(study.store, study.labels(attribute))

    plan = protocol("random h", "mean difference", "of a test", repeats=2)
    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    try:
        result = run(setting | {"workers": 2}, plan)
    finally:
        cloudpickle.unregister_pickle_by_value(sys.modules[__name__])
    with monkeypatch.context() as patch:
        patch.setattr(Bench, "_measured", lambda *_: pytest.fail("the workers left a cell out"))
        assert run(setting, plan).edits.equals(result.edits)
    # Last bits depend on the number of threads; a cache of its own makes this one measure anew.
    monkeypatch.setattr("workbench.paths.cache", lambda: tmp_path / "another")
    alone = run(setting, plan)
    pd.testing.assert_frame_equal(result.edits, alone.edits, rtol=1e-3, atol=1e-4)


def test_costs_are_means_with_intervals():
    costs = pd.DataFrame({"method": ["a"] * 4 + ["b"] * 2, "passes": [10, 10, 10, 10, 1, 3], "scored": 0, "labels": 2})
    costs = costs.assign(seconds=[1.0, 2.0, 3.0, 4.0, 1.0, 1.0], edit_passes=8.0)
    table = leaderboard.cost_table(costs)
    assert table.loc["a", ["passes", "passes_low", "passes_high"]].tolist() == [10, 10, 10]
    assert table.loc["b", ["passes", "passes_low"]].tolist() == [2, 0] and table.loc["b", "passes_high"] > 3
    assert table.loc["a", "seconds_low"] < 2.5 == table.loc["a", "seconds"] < table.loc["a", "seconds_high"]


def halves(images):
    """A segmenter: bright or dark."""
    return (torch.as_tensor(images).mean(dim=1) > 0).long().numpy()


def test_a_row_is_what_the_edit_does(setting):
    """The difference of means, found and applied here, gives the recorded scores."""
    result = run({**setting, "segmenter": halves}, protocol("mean difference"))
    bench = bench_of(setting, result.protocol)
    found = METHODS["mean difference"].find(bench.study(0), "Bright")
    held_out = wb.sample(setting["model"], range(HELD_OUT, HELD_OUT + 12), steps=4, progress=False)
    scale = result.costs.set_index("attribute").scale["Bright"]
    edited = wb.edit_grid(setting["model"], held_out, found, scales=[scale], progress=False).images[:, 0].clamp(-1, 1)
    rows = result.edits.query("attribute == 'Bright' and scale == @scale").sort_values("seed")
    np.testing.assert_allclose(rows.after, setting["judge"](edited).Bright, rtol=1e-5)
    np.testing.assert_allclose(rows.before, setting["judge"](held_out.x0).Bright, rtol=1e-5)
    plain = held_out.x0.clamp(-1, 1)
    np.testing.assert_allclose(rows.rms, (edited - plain).square().mean(dim=(1, 2, 3)).sqrt(), rtol=1e-5)
    inside = torch.from_numpy(setting["masks"]["Bright"])
    error = (edited - plain).square()[:, :, ~inside].mean(dim=(1, 2))
    np.testing.assert_allclose(rows.psnr_outside, 10 * torch.log10(4 / error), rtol=1e-4)
    change = setting["judge"](edited) - setting["judge"](held_out.x0)
    for name in NAMES:
        np.testing.assert_allclose(rows[f"change {name}"], change[name], atol=1e-5)
    judge = setting["judge"]
    kept = cosine_similarity(judge.features(edited), judge.features(plain))
    np.testing.assert_allclose(rows.identity, kept, atol=1e-5)
    maps = judge.maps(held_out.x0)
    np.testing.assert_allclose(rows.perceptual, perceptual_distance(judge.maps(edited), maps), rtol=1e-3)
    np.testing.assert_allclose(rows.consistency, segmentation_consistency(halves(edited), halves(plain)), rtol=1e-5)
    clip, (text, _) = setting["texts"].clip, setting["texts"].prompts["Bright"]
    gained = (clip.images(edited) - clip.images(plain)) @ clip.texts([text])[0]
    np.testing.assert_allclose(rows.clip_gain, gained, atol=1e-5)
    at_rest = leaderboard.leaderboard(result.edits, change=1e-9, resamples=2).loc["mean difference"]
    assert at_rest.consistency == pytest.approx(1, abs=1e-4) and at_rest.clip_gain == pytest.approx(0, abs=1e-4)


def test_nothing_is_measured_twice_and_a_cut_is_resumed(setting, monkeypatch, cache):
    plan = protocol("PCA", "mean difference")
    calls = []
    measured = Bench._measured

    def counted(self, method, attribute, repeat):
        calls.append((method.name, attribute))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return measured(self, method, attribute, repeat)

    monkeypatch.setattr(Bench, "_measured", counted)
    with pytest.raises(KeyboardInterrupt):
        run(setting, plan)
    assert len(list((cache / "benchmark").glob("*.safetensors"))) == 2
    first = run(setting, plan)
    assert len(calls) == 5
    again = run(setting, plan)
    assert len(calls) == 5
    pd.testing.assert_frame_equal(first.edits, again.edits)
    run(setting, protocol("PCA", "mean difference", "random h"))
    assert calls[5:] == [("random h", "Bright"), ("random h", "Red")]


def test_the_cache_knows_all_that_a_cell_depends_on(setting, cache):
    labels = setting["images"].labels
    relabelled = replace(setting["images"], labels=labels.assign(Red=1 - labels["Red"]))
    assert relabelled.fingerprint == setting["images"].fingerprint
    changes = [({}, sizes) for sizes in ({}, {"seed": 1}, {"t": 250}, {"population": 41}, {"held_out": 13})]
    changes += [({"judge": Network("another", 25.0)}, {}), ({"images": relabelled}, {})]
    for k, (changed, sizes) in enumerate(changes, start=1):
        run(setting | changed, protocol("mean difference", transfer=False, **sizes))
        assert len(cells(cache)) == 2 * k


def test_what_a_function_labels_is_not_read_from_the_cache(setting, cache):
    """Two functions can't be told apart; neither may be given the other's measurements."""
    one, other = Network("labels", 30.0), Network("labels", -30.0)
    one.hash = other.hash = None
    plan = protocol("mean difference", transfer=False)
    first = run(setting | {"labeller": one, "workers": 2}, plan)
    second = run(setting | {"labeller": other}, plan)
    assert not (cache / "benchmark").exists() and not first.edits.equals(second.edits)


def test_a_damaged_cell_is_refused(setting, cache):
    plan = protocol("mean difference", transfer=False)
    run(setting, plan)
    for path in cells(cache):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="is damaged"):
        run(setting, plan)


def test_anyone_can_add_a_method_by_registering_one_function(setting, added):
    @register_method("brighter pixels", scale=0.02, family="x and noise", unit="pixel value")
    def brighter(study, attribute):
        if attribute != "Bright":
            raise NotApplicable("more light is all that this can do")
        return Brighter(1.0)

    result = run(setting, protocol("brighter pixels", "random h"))
    rows = result.edits[result.edits.method == "brighter pixels"]
    assert set(rows.attribute) == {"Bright"} and (rows.after > rows.before).mean() > 0.9
    strengths = [rows[rows.scale == scale].rms.to_numpy() for scale in sorted(rows.scale.unique())]
    assert (np.diff([0 * strengths[0], *strengths], axis=0) > 0).all()
    assert result.skipped.reason.tolist() == ["more light is all that this can do"]
    for name, options, message in (
        ("brighter pixels", {}, "'brighter pixels' already"),
        ("mine", {"family": "mine"}, "'mine' .*one of control"),
        ("mine", {"scale": 0}, "scale is 0"),
        ("mine", {"scale": 2.0, "limit": 1.0}, "scale is 2.0; .*1.0"),
    ):
        with pytest.raises(ValueError, match=message):
            register_method(name, **options)


@pytest.mark.slow
def test_a_chain_of_fewer_timesteps_is_measured_at_the_same_part_of_it(setting, make_unet):
    setting["model"] = wb.wrap(make_unet(), DDPMScheduler(num_train_timesteps=200), name="short", device="cpu")
    plan = protocol("InjectFusion", "random h")
    assert bench_of(setting, plan).study(0).t == 100
    assert {"InjectFusion", "random h"} == set(run(setting, plan).edits.method)


def test_scores_that_tie_leave_a_method_out_and_stop_nothing(setting, monkeypatch):
    plan = protocol("mean difference", "mean difference, projected", "mean difference, skip", "random h")
    tied = lambda self, attribute, store: (_ for _ in ()).throw(NotApplicable("they tie"))  # noqa: E731
    monkeypatch.setattr(Study, "difference", tied)
    result = run(setting, plan)
    assert set(result.edits.method) == {"random h"} and (result.skipped.reason == "they tie").all()
    monkeypatch.undo()
    study = bench_of(setting, plan).study(0)
    study.__dict__["_scores"] = study.scores.gt(study.scores.quantile(0.8)).astype(float)
    with pytest.raises(NotApplicable, match="share the value 0"):
        study.difference("Bright", study.store)


def test_scale_0_is_the_sample_for_every_method_and_the_noise_moves_towards_the_attribute(setting):
    """So that curves start where nothing is done."""
    bench = bench_of(setting, protocol(steps=2))
    study = bench.study(0)
    for name, method in METHODS.items():
        edit = found_edit(method.find(study, "Bright"))
        still = render(bench.held_out, edit, [0.0], progress=False).images[:, 0]
        assert (still - bench.held_out.x0).abs().max() < 1e-5, name
    (plan,) = METHODS["noise"].find(study, "Red").plan(bench.held_out, [2.0])
    moved = (plan.x_T - bench.held_out.x_T).flatten(1)
    x_T = wb.sample(setting["model"], study.store.seeds, steps=2, progress=False).x_T.flatten(1)
    has = torch.as_tensor(np.asarray(study.labels("Red")) == 1)
    v = x_T[has].mean(dim=0) - x_T[~has].mean(dim=0)
    assert (torch.nn.functional.cosine_similarity(moved, v[None]) > 0.5).all()


def test_every_method_is_measured_where_it_changes_the_image_alike(setting, added):
    """Whatever strength a method names as typical; and no more than its edits take."""

    @register_method("weak pixels", scale=1e-3)
    def weak(study, attribute):
        """Far from visible."""
        return Brighter(1.0)

    @register_method("strong pixels", scale=100.0)
    def strong(study, attribute):
        """Far too much."""
        return Brighter(0.1)

    @register_method("limited pixels", scale=0.01, limit=0.1)
    def limited(study, attribute):
        """Never enough."""
        return Brighter(1.0)

    names = ["weak pixels", "strong pixels", "limited pixels"]
    result = run(setting, protocol(*names, "mean difference", "random x", transfer=False))
    found = result.costs.groupby("method").scale.max()[names]
    assert found.iloc[1] == pytest.approx(10 * found.iloc[0], rel=0.6) and found.iloc[2] == 0.05
    table = leaderboard.leaderboard(result.edits, resamples=10)
    assert table.drop("limited pixels").change.tolist() == pytest.approx([0.2] * 4, rel=1e-3)
    per_method = result.edits.groupby(["method", "attribute"]).scale.unique()
    for scales in per_method:
        assert np.sort(scales) / np.sort(scales)[2] == pytest.approx([0.25, 0.5, 1, 2])


def test_each_sample_has_a_random_vector_of_its_own_and_each_attribute_others(setting):
    bench = bench_of(setting)
    study = bench.study(0)
    for name in ("random h", "random x"):
        moved = {}
        for attribute in NAMES:
            edit = METHODS[name].find(study, attribute)
            moved[attribute] = render(bench.held_out, edit, [20.0], progress=False).images[:, 0] - bench.held_out.x0
        directions = torch.cat([torch.nn.functional.normalize(m.flatten(1)) for m in moved.values()])
        assert (directions @ directions.T - torch.eye(len(directions))).abs().max() < 0.95, name
        few = render(bench.held_out[:3], METHODS[name].find(study, "Bright"), [20.0], progress=False).images[:, 0]
        torch.testing.assert_close(few - bench.held_out.x0[:3], moved["Bright"][:3], rtol=1e-5, atol=1e-4)  # of 20


def test_a_trained_block_is_as_strong_at_other_timesteps(setting):
    bench = bench_of(setting)
    edit = METHODS["Asyrp"].find(bench.study(0), "Bright")
    still, finer = bench.held_out, bench._finer
    for run in (still, finer):
        weights = edit.injection(run, 1.0).change(0, torch.zeros(1, *run.model.h_shape), slice(0, 1))
        assert (weights is None) == (edit.direction(torch.zeros(1, *run.model.h_shape), run.timesteps[0]).norm() == 0)
    first, second = (edit.injection(run, 1.0) for run in (still, finer))
    h = torch.zeros(1, *still.model.h_shape)
    assert torch.allclose(first.change(0, h, slice(0, 1)) * 4, second.change(0, h, slice(0, 1)) * 7)


def test_pick_takes_the_candidate_that_raises_the_score_most_either_way_round(setting):
    """What components, Jacobians and pullbacks offer has no sign of its own."""
    shades = [Brighter(by) for by in (0.01, -0.1, 0.05)]
    assert bench_of(setting).study(0).pick("planted", shades, "Bright", scale=1.0).name == "--0.1"


def test_costs_do_not_depend_on_the_cache(setting):
    first = run(setting, protocol("PCA", "mean difference, labels", transfer=False)).costs
    known = {40 * 4 + 18 * 8 * 4}  # and what the search for strengths takes, which is some times that of all candidates
    assert all((passes - sum(known)) % (8 * 4) == 0 for passes in first.passes[first.method == "PCA"])
    assert set(first.labels) == {0, 30}
    assert first.edit_passes.tolist() == [4.0] * 4
    later = run(setting, protocol("mean difference, labels", "PCA", transfer=False, shown=1)).costs
    both = (t.set_index(["method", "attribute"]).passes.sort_index() for t in (first, later))
    pd.testing.assert_series_equal(*both)


def test_shown_samples_are_drawn_and_their_strips_begin_with_the_sample_and_tables_are_saved(setting, tmp_path):
    result = run(setting, protocol("mean difference", transfer=False))
    strip = result.strips["mean difference", "Red"]
    assert strip.shape == (2, 5, 3, 8, 8)
    held_out = wb.sample(setting["model"], result.provenance["shown"], steps=4, progress=False).x0.clamp(-1, 1)
    np.testing.assert_allclose(strip[:, 0], held_out, atol=1e-5)
    other = run(setting, protocol("mean difference", transfer=False, seed=1)).provenance["shown"]
    assert [s - 1 for s in other] != result.provenance["shown"]
    folder = result.save(tmp_path / "out")
    pd.testing.assert_frame_equal(pd.read_parquet(folder / "edits.parquet"), result.edits, check_dtype=False)
    assert len(pd.read_csv(folder / "edits.csv")) == len(result.edits)
    assert json.loads((folder / "provenance.json").read_text())["judge"][0] == "judges"


def test_transfer_is_of_the_same_samples_at_timesteps_that_hold_those_of_the_others(setting):
    """With 8 steps, 16 evenly spaced ones would miss the boundary's timestep."""
    result = run(setting, protocol("boundary in x", "mean difference", steps=8))
    bench = bench_of(setting, result.protocol)
    assert set(bench.held_out.timesteps) < set(bench._finer.timesteps) and len(bench._finer.timesteps) == 15
    assert bench._finer.seeds == bench.held_out.seeds[:6]
    rows = result.edits.query("method == 'mean difference' and attribute == 'Red'")
    scale = result.transfer.query("method == 'mean difference' and attribute == 'Red'").scale.iloc[0]
    rows = rows[rows.scale == scale].sort_values("seed")
    halves = {"population": rows, "other steps": rows[:6]}
    moved = result.transfer.query("method == 'mean difference' and attribute == 'Red'").set_index("kind")
    for kind, part in halves.items():
        part = part[part.before <= 0.5]
        assert moved.held_out[kind] == pytest.approx((part.after - part.before).mean(), rel=1e-5)
    assert (moved.n <= 6).all()


def test_bad_input_is_a_sentence(setting):
    for changed, plan, message in (
        ({}, protocol("magic"), "'magic' .*random h, "),
        ({}, replace(protocol(), attributes=("Hat",)), "'Hat' .*Bright, Red"),
        ({}, protocol(held_out=4), "population is 40, held_out 4"),
        ({}, protocol(labelled=50), "labelled is 50; keep half of 60 images"),
        ({"judge": setting["labeller"]}, protocol(), "the judge is the labeller"),
        ({"workers": 0}, protocol("random h"), "workers is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            run(setting | changed, plan)
    with pytest.raises(ValueError, match="not a str"):
        found_edit("smile")


def test_the_backdrop_is_what_has_the_colour_of_the_corners():
    picture = np.zeros((1, 3, 8, 8))
    picture[:, :, 4:, :] = 0.8
    picture[:, :, 0, 5] = 0.1
    assert backdrop(picture)[0, 0].sum() == 32


def test_what_workers_share_does_not_change_by_its_use(setting, monkeypatch):
    """Dask drops copies that no task waits for and may fetch one from a worker that has used its own."""
    shared = []

    @contextlib.contextmanager
    def here(n, *, scheduler=None):
        with distributed.Client(processes=False, n_workers=1, threads_per_worker=1, dashboard_address=None) as client:
            yield client
            (worker,) = client.cluster.workers.values()
            shared.extend(value for value in worker.data.values() if value is not None)

    monkeypatch.setattr("workbench.benchmark.run.start_workers", here)
    result = run(setting | {"workers": 2}, protocol("boundary of text", "text direction", steps=2))
    assert set(result.edits.method) == {"boundary of text", "text direction"}
    assert [type(each) for each in shared] == [bytes]


def test_a_method_is_known_by_its_source_and_by_the_values_around_it(added):
    def registered(k, *, default=1):
        METHODS.pop("mine", None)

        @register_method("mine")
        def mine(study, attribute, default=default):
            return (k, default)

        return METHODS["mine"].code

    assert registered(2) == registered(2)
    assert len({registered(2), registered(3), registered(2, default=5)}) == 3
    METHODS.pop("mine")
    register_method("mine")(partial(registered, 2))  # callable, and no function
    METHODS.pop("mine")
    lock = threading.Lock()  # that can't be written
    register_method("mine")(lambda study, attribute: lock)
    assert METHODS["mine"].code
