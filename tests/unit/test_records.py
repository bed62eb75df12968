"""Benchmarks on disk: what was measured comes back, a record stays small, and new methods are ranked beside it."""

from __future__ import annotations

import ast
import json
import linecache
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import replace

import nbformat
import numpy as np
import pandas as pd
import pytest
import small_domain

import workbench as wb
from workbench import cli, paths
from workbench.benchmark import records
from workbench.benchmark.bench import _counted
from workbench.benchmark.leaderboard import difference, leaderboard
from workbench.benchmark.methods import METHODS
from workbench.benchmark.protocol import HELD_OUT
from workbench.benchmark.results import Benchmark
from workbench.benchmark.run import plan_benchmark
from workbench.benchmark.study import Study
from workbench.benchmark.tables import read_edits, read_strips, rounded, write_edits, write_strips
from workbench.report import claims, figures
from workbench.report.parameters import check_parameters

pytestmark = pytest.mark.filterwarnings("ignore:the samples diverge")

NAMES = small_domain.ATTRIBUTES
METHODS_RECORDED = ("random h", "PCA", "mean difference")


def planted(*, seed, populations) -> pd.DataFrame:
    """Edits whose probabilities are mostly near 0 or 1 and change as those of real edits do."""
    rng, attributes, k, n, parts = np.random.default_rng(seed), "ABC", 3, 32, []
    plain = (rng.choice([-1, 1], (n, k)) * np.abs(rng.normal(7.3, 2.8, (n, k)))).astype(np.float32)
    strengths, before = np.array([0.15, 0.8, 2.5, 6.0]), _probability(plain)
    for method in range(4):
        for own in range(k):
            for repeat in range(populations):
                gain, mean = rng.uniform(0.3, 1.2), rng.normal(0, 0.7, k) + (np.arange(k) == own)
                noise = rng.normal(0, 0.8, (n, 1, k)) + 0.3 * rng.normal(size=(n, 4, k))
                logits = (plain[:, None] + gain * strengths[:, None] * (mean + noise)).astype(np.float32)
                rms = np.array([0.02, 0.1, 0.23, 0.38]) * gain * np.exp(rng.normal(0, 0.4, (n, 4)))
                columns = {
                    "method": f"method {method}" if method else "random h",
                    "attribute": attributes[own],
                    "repeat": repeat,
                    "scale": np.tile([0.5, 1.0, 2.0, 4.0], n),
                    "seed": np.repeat(HELD_OUT + np.arange(n), 4),
                    "before": np.repeat(before[:, own], 4),
                    "after": _probability(logits[:, :, own]).ravel(),
                    "logit": logits[:, :, own].ravel(),
                    "rms": rms.ravel().astype(np.float32),
                    "psnr": 20 * np.log10(2 / rms.ravel().astype(np.float32)),
                    "psnr_outside": 20 * np.log10(2 / rms.ravel()) + rng.normal(1, 1, rms.size),
                    "perceptual": rms.ravel() * 12 * np.exp(rng.normal(0, 0.3, rms.size)),
                    "identity": 1 - rms.ravel() * np.exp(rng.normal(0, 0.3, rms.size)),
                    "s_dir": rng.normal(0.05, 0.1, rms.size),
                    "clip_gain": rng.normal(0.0, 0.05, rms.size),
                }
                changes = _probability(logits) - before[:, None]
                columns |= {f"change {name}": changes[:, :, i].ravel() for i, name in enumerate(attributes)}
                parts.append(pd.DataFrame(columns))
    return pd.concat(parts, ignore_index=True)


def _probability(logits):
    return 1.0 / (1.0 + np.exp(-np.asarray(logits, dtype=float)))


@pytest.fixture(scope="module")
def small(tmp_path_factory, make_unet):
    """Parameters of a small model with images and two classifiers, in a home of the workbench's own."""
    from diffusers import DDPMScheduler

    here, home = paths.home(), tmp_path_factory.mktemp("home")
    (home / "data" / "records").mkdir(parents=True)
    (home / "notebooks").symlink_to(here / "notebooks")
    make_unet().save_pretrained(home / "tiny" / "unet")
    DDPMScheduler().save_pretrained(home / "tiny" / "scheduler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(home))
        yield small_domain.build(home, {"model_name": str(home / "tiny")})


@pytest.fixture(scope="module")
def sources(small):
    model = wb.load_model(small["model_name"], device="cpu")
    labeller, judge = (wb.load_classifier(small[f"{name}_name"], device="cpu") for name in ("classifier", "judge"))
    images = wb.load_images(small["images_name"], size=model.image_shape)
    return {"model": model, "labeller": labeller, "judge": judge, "images": images}


def run(sources, protocol) -> Benchmark:
    return wb.run_benchmark(protocol=protocol, progress=False, **sources)


@pytest.fixture(scope="module")
def protocol():
    sizes = {"population": 32, "labelled": 32, "held_out": 32, "steps": 4, "shown": 4}
    return wb.Protocol(METHODS_RECORDED, tuple(NAMES), **sizes)


@pytest.fixture(scope="module")
def measured(sources, protocol):
    return run(sources, protocol)


@pytest.fixture(scope="module")
def record(measured, sources):
    """The same as a record of the model, where `--records` looks for it."""
    measured.save(records.record_folder(sources["model"]), small=True)
    return wb.load_benchmark(model=sources["model"])


# Saved and read again


def test_what_was_saved_comes_back(measured, tmp_path):
    found = wb.load_benchmark(measured.save(tmp_path / "out"))
    for name in ("edits", "transfer", "realism", "costs", "skipped"):
        pd.testing.assert_frame_equal(getattr(found, name), getattr(measured, name), check_dtype=False)
    assert found.protocol == measured.protocol and found.current
    assert found.provenance == json.loads(json.dumps(measured.provenance))
    assert found.provenance["what"]["PCA"].startswith("The principal component")
    assert found.strips.keys() == measured.strips.keys()
    for key, strip in measured.strips.items():
        np.testing.assert_allclose(found.strips[key], strip, atol=1 / 255)


def test_a_record_differs_from_what_was_measured_by_its_rounding_alone(measured, record):
    pd.testing.assert_frame_equal(record.edits, rounded(measured.edits))
    for name in ("transfer", "realism", "costs", "skipped"):
        pd.testing.assert_frame_equal(getattr(record, name), getattr(measured, name), check_dtype=False)
    _assert_ranked_alike(record.edits, measured.edits)
    folder = records.record_folder(wb.load_model(paths.home() / "tiny", device="cpu"))
    assert not (folder / "edits.csv").exists()
    assert record.strips.keys() == measured.strips.keys()
    assert {strip.shape for strip in record.strips.values()} == {(2, 5, 3, 8, 8)}


@pytest.mark.parametrize("channels", [1, 3])
def test_strips_are_exact_to_a_grey_level_or_of_two_samples_and_alike(channels, tmp_path):
    ramp = np.linspace(-1, 1, 32)[:, None] * np.linspace(0.2, 1, 32)
    shades = np.linspace(-1, 1, 4 * 3 * channels).reshape(4, 3, channels, 1, 1)
    strips = {("a", "A"): (ramp * shades).astype(np.float32), ("a", "B"): np.zeros((0, 3, channels, 32, 32), "f4")}
    for small, n, most in ((False, 4, 0.51 / 127.5), (True, 2, 0.2)):
        write_strips(strips, tmp_path / "strips.parquet", small=small)
        found = read_strips(tmp_path / "strips.parquet")
        assert found["a", "A"].shape == (n, 3, channels, 32, 32) and found["a", "B"].shape[0] == 0
        assert np.abs(found["a", "A"] - strips["a", "A"][:n]).max() < most


def _assert_ranked_alike(found, true) -> None:
    first, second = (leaderboard(edits, resamples=100) for edits in (found, true))
    first = first.loc[second.index]
    exact = ["reached", "attributes", "n"]
    pd.testing.assert_frame_equal(first[exact], second[exact])
    # The point at equal change moves with the rounded change of the image.
    for name in ("success", "effect", "leakage", "change", "identity", "monotonicity", "linearity"):
        np.testing.assert_allclose(first[name], second[name], atol=0.015, err_msg=name)
    if "p_random" in second:
        np.testing.assert_allclose(first.p_random, second.p_random, atol=0.05)  # a few of a hundred draws are ties
    np.testing.assert_allclose(first.psnr_outside, second.psnr_outside, atol=0.1)


@pytest.mark.parametrize("seed", range(4))
def test_a_rounded_table_ranks_as_the_table_and_success_is_exact(seed, tmp_path):
    edits = planted(seed=seed, populations=1 + seed % 2)
    rng = np.random.default_rng(seed)
    few = rng.choice(len(edits), 30, replace=False)
    edits.loc[few[:10], "psnr_outside"] = np.nan  # no pixel outside
    edits.loc[few[10:20], ["rms", "psnr", "psnr_outside"]] = 0.0, np.inf, np.inf  # nothing changed
    edits.loc[few[20:], "logit"] = np.float32(1e-4) * rng.choice([-1, 1], 10)
    edits["after"] = _probability(edits.logit)
    write_edits(edits, tmp_path / "edits.parquet", small=True)
    found = read_edits(tmp_path / "edits.parquet")
    true = edits.sort_values(["method", "attribute", "repeat", "seed", "scale"], ignore_index=True)
    assert list(found) == list(true)
    assert (found.before == true.before).all() and ((found.after > 0.5) == (true.after > 0.5)).all()
    for name in ("logit", "rms", "psnr_outside", "perceptual"):
        np.testing.assert_allclose(found[name], true[name], rtol=0.00501, err_msg=name)
    for name in ("identity", "s_dir", "clip_gain"):
        np.testing.assert_allclose(found[name], true[name], atol=0.000501)
    for name in (f"change {a}" for a in "ABC"):
        np.testing.assert_allclose(found[name], true[name], atol=0.00101)
    np.testing.assert_allclose(found.psnr, true.psnr, atol=0.05)
    _assert_ranked_alike(found, true)


def test_what_is_no_benchmark_or_of_another_model_is_refused(record, sources, tiny, tmp_path, home):
    with pytest.raises(FileNotFoundError, match="no recorded benchmark of 'tiny', only of no model"):
        wb.load_benchmark(model=tiny)
    with pytest.raises(FileNotFoundError, match=f"{tmp_path}.*edits.parquet"):
        wb.load_benchmark(tmp_path)
    with pytest.raises(ValueError, match="give the folder"):
        wb.load_benchmark()
    with pytest.raises(ValueError, match="weights"):
        wb.load_benchmark(record.save(tmp_path / "out"), model=replace(sources["model"], hash="0" * 16))


# Beside a record


def test_a_recorded_method_measured_anew_gets_its_own_row_again(sources, record, protocol):
    """On a quarter of the samples, the first ones, of the same seeds."""
    plan = records.protocol_against(record, ["mean difference"], **sources)
    assert (plan.held_out, plan.steps, plan.population, plan.transfer) == (8, 4, 32, False)
    both = records.against(record, run(sources, plan))
    assert both.provenance["new"] == ["mean difference (new)"]
    assert both.protocol.methods == (*METHODS_RECORDED, "mean difference (new)")
    assert set(both.edits.seed) == set(range(HELD_OUT, HELD_OUT + 8))
    table = leaderboard(both.edits, resamples=50)
    assert set(table.index) == set(both.protocol.methods)
    values = ["success", "effect", "leakage", "change"]
    new, old = table.loc["mean difference (new)", values], table.loc["mean difference", values]
    np.testing.assert_allclose(new.astype(float), old.astype(float), atol=0.01)
    restricted = leaderboard(record.edits[record.edits.seed < HELD_OUT + 8], resamples=50)
    pd.testing.assert_frame_equal(table.loc[restricted.index, values], restricted[values])
    assert {key[0] for key in both.strips} == {"mean difference (new)"}


def test_other_sources_and_protocols_are_refused(sources, record, protocol):
    judge, images = sources["judge"], sources["images"]
    for changed, options, message in (
        ({"judge": sources["labeller"]}, {}, "another judge"),
        ({"labeller": judge}, {}, "another labeller"),
        ({"images": images.select(slice(100))}, {}, "another images"),
        ({"model": replace(sources["model"], hash="0" * 16)}, {}, "the record belongs to"),
        ({}, {"held_out": 33}, "held_out is 33; the record has 32"),
        ({}, {"repeats": 2}, "repeats is 2; the record has 1"),
        ({}, {"attributes": ["Hat"]}, "'Hat'"),
    ):
        with pytest.raises(ValueError, match=message):
            records.protocol_against(record, ["PCA"], **sources | changed, **options)
    plan = records.protocol_against(record, ["random h"], attributes=["Top"], **sources)
    found = run(sources, plan)
    with pytest.raises(ValueError, match="steps is 5, and 4"):
        records.against(record, replace(found, protocol=replace(plan, steps=5)))
    with pytest.raises(ValueError, match="samples differ"):
        records.against(record, replace(found, edits=found.edits.assign(before=1 - found.edits.before)))


# The command and the notebook


def test_records_are_shown_without_images_or_classifiers(record, small, monkeypatch, capsys, tmp_path):
    given = {}
    monkeypatch.setattr(wb, "load_images", lambda *_, **__: pytest.fail("the images were loaded"))
    monkeypatch.setattr(wb, "run_benchmark", lambda *_, **__: pytest.fail("something was measured"))

    class Made:
        html = "the page"

    monkeypatch.setattr(wb, "run_notebook", lambda *words: given.update(zip("npo", words, strict=True)) or Made)
    assert cli.main(["benchmark", small["model_name"], "--records", "-o", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "3 methods, 3 attributes, 32 held-out samples" in shown and "mean difference" in shown
    assert given["n"] == "80_benchmark" and given["p"]["recorded"] is True
    # The check before a kernel starts looks for no images either.
    assert check_parameters("80", given["p"] | {"images_name": "nowhere"})["recorded"]
    with pytest.raises(ValueError, match="images_name of 80_benchmark is 'nowhere'"):
        check_parameters("80", given["p"] | {"images_name": "nowhere", "recorded": False})


def test_the_notebook_shows_the_record_whatever_its_other_parameters_are(record, small, monkeypatch):
    monkeypatch.setattr(wb, "run_benchmark", lambda *_, **__: pytest.fail("something was measured"))
    scope, captions = {}, []
    for cell in nbformat.read(paths.notebooks() / "80_benchmark.ipynb", as_version=4).cells:
        if cell.cell_type != "code":
            continue
        if "claims.compare" in cell.source:
            break  # of the bundled domains
        exec(cell.source, scope)
        if "parameters" in cell.metadata.get("tags", []):
            scope |= {"recorded": True, "model_name": small["model_name"], "images_name": "nowhere"}
        captions.append(scope.pop("caption", ""))
    said = " ".join(captions)
    assert "mean of 3 attributes, 32 held-out samples" in said and "Bright: 2 of 32 held-out" in said
    assert "Images are compressed" in said and "8 held-out samples" not in said
    assert set(scope["table"].index) == set(METHODS_RECORDED)


def test_claims_about_methods_are_judged_by_the_recorded_benchmark(record, sources, monkeypatch):
    claim = claims.Claim("a paper", "means beat chance", "success", figures.BENCHMARK, "mean difference less random h")
    monkeypatch.setattr(figures, "load_claims", lambda: (claim, replace(claim, number="LOCO less noise")))
    monkeypatch.setattr(claims, "load_claims", figures.load_claims)
    parts = {name: sources[name] for name in ("labeller", "judge", "images")}
    found = figures.read_records(model=sources["model"], **parts)
    expected = difference(wb.load_benchmark(model=sources["model"]).edits, "mean difference", "random h")
    judged = claims.verdicts(found)
    assert judged.value[0] == expected.value and judged.verdict[0] == claim.verdict(expected.low, expected.high)
    assert judged.verdict[1] == "not measured", "of methods that were not recorded"
    assert figures.BENCHMARK not in figures.read_records(
        model=sources["model"], **parts | {"judge": sources["labeller"]}
    )


PLUGIN = """
import workbench as wb

@wb.register_method("two a side", scale=1.0)
def two_a_side(study, attribute):
    study.labels(attribute)
    return wb.find_from_scores(study.store, study.scores[attribute], k=2, progress=False)
"""


def test_a_method_of_ones_own_is_ranked_among_the_recorded_ones(record, small, tmp_path, capsys, added):
    (tmp_path / "mine.py").write_text(PLUGIN)
    chosen = ["--images", small["images_name"], "--labeller", small["classifier_name"], "--judge", small["judge_name"]]
    words = ["benchmark", small["model_name"], *chosen, "--plugin", str(tmp_path / "mine.py"), "--workers", "1"]
    out = tmp_path / "out"
    assert cli.main([*words, "--against", "records", "--attributes", "Bright", "-o", str(out)]) == 0
    shown = capsys.readouterr().out
    assert "1 cell (" in shown and "passes at most" in shown
    table = pd.read_csv(out / "leaderboard.csv", index_col="method", keep_default_na=False)
    assert table.new.to_dict() == dict.fromkeys(METHODS_RECORDED, "") | {"two a side": "new"}
    assert set(pd.read_parquet(out / "edits.parquet").seed) == set(range(HELD_OUT, HELD_OUT + 8))
    assert (out / "strips-Bright.png").is_file() and (out / "pareto.pdf").is_file()
    assert wb.load_benchmark(out).protocol.methods == (*METHODS_RECORDED, "two a side")
    for more, message in (
        (["--against", "records", "--steps", "4"], "--steps is given, and --against takes it from the record"),
        (["--against", "records", "--eta", "0"], "--eta is given, and --against takes it from the record"),
        (["--against", str(tmp_path)], f"there is no benchmark in {tmp_path}"),
    ):
        METHODS.pop("two a side", None)
        assert cli.main([*words, *more, "-o", str(out)]) == 2
        assert message in capsys.readouterr().err
    assert cli.main(["benchmark", small["model_name"], "--records", "--methods", "PCA"]) == 2
    assert "--methods is given, and --records takes it from the record" in capsys.readouterr().err
    assert cli.main(["benchmark", small["model_name"], *chosen, "--against", "records", "-o", str(out)]) == 2
    assert "nothing to measure" in capsys.readouterr().err


@pytest.mark.parametrize("recorded", [True, False])
def test_the_template_ranks_its_method_with_a_record_and_without(request, recorded, small, tmp_path, monkeypatch):
    if recorded:
        request.getfixturevalue("record")
    else:
        monkeypatch.setattr(records, "record_folder", lambda model: tmp_path / "none")
    template = paths.notebooks() / "templates" / "new_method.ipynb"
    cells = [cell.source for cell in nbformat.read(template, as_version=4).cells if cell.cell_type == "code"]
    (method,) = [node for cell in cells for node in ast.parse(cell).body if isinstance(node, ast.FunctionDef)]
    assert method.end_lineno - method.lineno + len(method.decorator_list) < 15
    given = small | {"population": 32, "held_out": 8, "steps": 4, "attributes": ["Bright"]}
    assert check_parameters(template, given).keys() == given.keys()
    before, scope = dict(METHODS), {}
    try:
        for k, cell in enumerate(cells):
            # A method's source is read from its file, which in a kernel is the cell.
            linecache.cache[f"<cell {k}>"] = (len(cell), None, cell.splitlines(keepends=True), f"<cell {k}>")
            exec(compile(cell, f"<cell {k}>", "exec"), scope)
            if "model_name: str" in cell:
                scope |= given
    finally:
        METHODS.clear()
        METHODS.update(before)
    others = METHODS_RECORDED if recorded else ("mean difference", "random h")
    assert scope["table"].new.to_dict() == dict.fromkeys(others, "") | {"two a side": "new"}
    assert scope["strips"].keys() == {("two a side", "Bright")}
    assert len(scope["result"].edits.seed.unique()) == 8


# What is left to do


def test_the_estimate_bounds_the_passes_and_knows_what_is_cached(sources, protocol, cache, monkeypatch):
    """Those of edits: what finding an edit and its strength takes is not known before."""
    monkeypatch.setattr(Study, "strengths", lambda self, edits, **_: (np.ones(len(edits)), Counter()))
    plan = replace(protocol, methods=("random h", "mean difference"), held_out=8, shown=2)
    said = plan_benchmark(protocol=plan, seconds=0.1, **sources)
    assert (said.cells, said.left) == (6, 6) and said.rate > 0
    with _counted(sources["model"]) as passes:
        run(sources, plan)
    assert 0.8 * said.passes < passes[0] <= said.passes
    assert "6 cells" in str(said) and "0 of them cached" in str(said) and "Ctrl-C" in str(said)
    more = plan_benchmark(protocol=replace(plan, methods=(*plan.methods, "PCA")), seconds=0.1, **sources)
    assert (more.cells, more.left) == (9, 3)
    done = plan_benchmark(protocol=plan, **sources)
    assert (done.left, done.passes, done.rate) == (0, 0, 0) and "Ctrl-C" not in str(done)


@pytest.mark.slow
def test_ctrl_c_ends_workers_without_a_traceback_and_whole_cells_stay(small, sources):
    folder = paths.cache() / "benchmark"
    before = set(folder.glob("*.safetensors"))
    words = {"images": "images_name", "labeller": "classifier_name", "judge": "judge_name"}
    chosen = [word for option, name in words.items() for word in (f"--{option}", small[name])]
    chosen += ["--population", "32", "--held-out", "24", "--steps", "8", "--repeats", "3", "--workers", "2"]
    command = [sys.executable, "-m", "workbench.cli", "benchmark", small["model_name"], *chosen, "--no-report"]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    process, deadline = subprocess.Popen([*command, "-o", str(folder / "out")], **options), time.monotonic() + 240
    while len(set(folder.glob("*.safetensors")) - before) < 2 and time.monotonic() < deadline:
        assert process.poll() is None, process.communicate()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the workers, too
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130 and "workbench: interrupted" in errors and "Traceback" not in errors
    sizes = {"population": 32, "labelled": 32, "held_out": 24, "repeats": 3, "steps": 8}
    left = plan_benchmark(protocol=wb.Protocol(tuple(METHODS), tuple(NAMES), **sizes), seconds=0.1, **sources)
    assert 2 <= left.cells - left.left < left.cells
