"""The command line: what reaches the library, what is printed, and that a mistake is one sentence and status 2."""

from __future__ import annotations

import importlib
import inspect
import math
import os
import pickle
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import typer
from notebook_files import write_notebook
from originals import Guided, randomised
from PIL import Image
from planted import planted
from safetensors.torch import load_file
from sklearn.svm import SVC
from tqdm import tqdm

import workbench as wb
from workbench import cli, paths
from workbench.benchmark import methods
from workbench.directions.boundary import load_boundary
from workbench.formats import golden, layouts
from workbench.report import figures
from workbench.studio.recipe import save_recipe
from workbench.studio.session import EditSession


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


def refused(capsys, *arguments) -> str:
    """The one sentence that a mistake is answered with."""
    status, out, err = run(capsys, *arguments)
    assert (status, out, err.count("\n")) == (2, "", 1), err
    assert err.startswith("workbench: ")
    return err


def commands(group=None, words=()) -> dict[str, typer.core.TyperCommand]:
    """All commands by their words, such as "find pca", and the sets of them, such as "find"."""
    found = {}
    for name, command in (group or typer.main.get_command(cli.app)).commands.items():
        found[" ".join((*words, name))] = command
        if hasattr(command, "commands"):
            found |= commands(command, (*words, name))
    return found


@pytest.fixture
def no_traces(tmp_path, monkeypatch, cache):
    """An empty working folder; the test fails if a failed command leaves anything in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []
    assert not list(cache.glob("*.zarr"))


# Help


def test_help_of_every_command_loads_no_heavy_package():
    words = [["--help"], *([*command.split(), "--help"] for command in commands())]
    code = f"import sys, workbench.cli as c\nfor words in {words}: assert c.main(words) == 0\n"
    code += "assert not {'torch', 'diffusers', 'zarr', 'numpy', 'pandas', 'matplotlib', 'papermill'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown and "workbench extract" in shown
    for command in commands():
        assert re.search(rf"\n  example:\n    workbench {command}\b", shown), command


def test_every_parameter_has_a_help_and_short_names_are_those_of_old():
    for name, command in commands().items():
        for parameter in command.params:
            assert parameter.help or getattr(parameter, "is_flag", False), (name, parameter.name)
            assert not any(option.startswith("--no-") for option in getattr(parameter, "secondary_opts", ()))
    assert {opt for c in commands().values() for p in c.params for opt in p.opts if re.fullmatch("-.", opt)} == {
        "-o",
        "-p",
    }


# What reaches the library


class Arrived(Exception):
    """Raised in place of a function of the library, with what it was given."""


def arrived(monkeypatch, target: str, words) -> dict[str, object]:
    """What a command gives a function, which is not run."""
    module, _, name = target.rpartition(".")
    signature = inspect.signature(getattr(importlib.import_module(module), name))

    def stop(*args, **options):
        given = signature.bind(*args, **options).arguments
        others = [name for name, parameter in signature.parameters.items() if parameter.kind is parameter.VAR_KEYWORD]
        raise Arrived(given | {key: value for name in others for key, value in given.get(name, {}).items()})

    monkeypatch.setattr(target, stop)
    with pytest.raises(Arrived) as caught:
        cli.main([str(word) for word in words])
    return caught.value.args[0]


CHAIN = "--steps 3 --eta 0.5 --batch-size 2"
OWN = wb.TrainingSettings(size=16, widths=(16, 32), attention=(), head_channels=16, gamma=math.inf, flips=True)
STUDIO = {
    **{"model": "m", "condition": {"label": 3, "guidance_scale": 2.0, "negative_prompt": ""}, "directions": ["a", "b"]},
    **{"seeds": [2, 5], "steps": 50, "eta": 1.0, "classifier": "", "clip": "", "device": None},
}
ARRIVES = {
    f"sample TINY --seeds 0-2,7 {CHAIN}": (
        "workbench.sample",
        {"seeds": [0, 1, 2, 7], "steps": 3, "eta": 0.5, "batch_size": 2},
    ),
    "sample x --device cpu --precision bfloat16 --compile": (
        "workbench.load_model",
        {"source": "x", "device": "cpu", "dtype": "bfloat16", "compile": True},
    ),
    f"extract TINY --n 5 --seed 7 {CHAIN} --dtype float32 --record-x -o memory://a/b": (
        "workbench.extract",
        {"n": 5, "seed": 7, "steps": 3, "eta": 0.5, "dtype": "float32", "record_x": True, "out": "memory://a/b"},
    ),
    "convert a.pt out --image-size 8 --head-channels 16 --schedule cosine --timesteps 4000 --rescale-timesteps": (
        "workbench.convert_checkpoint",
        {"file": "a.pt", "out": "out", "image_size": 8, "head_channels": 16, "schedule": "cosine", "timesteps": 4000}
        | {"preset": None, "rescale_timesteps": True, "attention_order": None},
    ),
    "train FACES --out made --size 16 --widths 16 32 --head-channels 16 --attention 0 --gamma inf --flips": (
        "workbench.train_model",
        {"settings": OWN, "out": Path("made"), "resume": False, "minutes": 10.0, "previews": 16},
    ),
    "train-classifier FACES --out made --steps 5 --design judge": (
        "workbench.train_classifier",
        {"out": Path("made"), "seed": 0, "steps": 5, "design": "judge", "flips": False, "turns": False},
    ),
    f"evaluate-model TINY --n 6 {CHAIN} --training FACES FACES --classifiers avataaars --inverted 2": (
        "workbench.evaluate_model",
        {"n": 6, "steps": 3, "eta": 0.5, "batch_size": 2, "seed": 0, "n_inverted": 2},
    ),
    "data avataaars --n 5 --part 12": (
        "workbench.datasets.avataaars.build",
        {"n": 5, "part": 12, "out": Path("avataaars-part12")},
    ),
    "data celeba64 FACES --part 1": ("workbench.datasets.celeba.build", {"part": 1, "out": Path("celeba64-part1")}),
    "data eurosat FACES --part 1": ("workbench.datasets.eurosat.build", {"part": 1, "out": Path("eurosat-part1")}),
    "find scores avataaars32 --n 6 --steps 2 --attributes Smiling --k 2": (
        "workbench.find_from_scores",
        {"k": 2, "name": "Smiling"},
    ),
    "boundary fit TINY --t 500 --steps 4 --n 12 --attributes Smiling --method lda --balance --wanted 0.9": (
        "workbench.fit_boundaries",
        {"t": 500, "space": "x", "method": "lda", "balance": True, "wanted": 0.9},
    ),
    "benchmark TINY --quick --methods PCA 'random h' --held-out 8 --attributes Smiling --workers 3": (
        "workbench.run_benchmark",
        {"protocol": wb.Protocol(("PCA", "random h"), ("Smiling",), held_out=8), "workers": 3, "scheduler": None},
    ),
    "explore a.zarr --classifier c --methods pca umap --port 8 --theme dark": (
        "workbench.studio.server.serve",
        {
            "function": "open_explorer",
            "options": {
                **{"store": "a.zarr", "model": None, "directions": None, "classifier": "c"},
                **{"methods": ["pca", "umap"], "device": None},
            },
            **{"port": 8, "theme": "dark"},
        },
    ),
    "explore a.zarr --directions d -o x.html": (
        "workbench.studio.server.open_explorer",
        {"store": "a.zarr", "model": None, "directions": ["d"]},
    ),
    "explore a.zarr -o x.html": ("workbench.studio.server.open_explorer", {"model": "", "directions": None}),
    "studio --model m --directions a b --seeds 2,5 --label 3 --guidance-scale 2 --port 8 --theme dark": (
        "workbench.studio.server.serve_studio",
        {"options": STUDIO, "port": 8, "theme": "dark"},
    ),
    "run 10 -p n 512 -p tap=before -p images_name a=b -o x.ipynb": (
        "workbench.report.notebooks.run_notebook",
        {"name": "10", "parameters": {"n": 512, "tap": "before", "images_name": "a=b"}, "out": "x.ipynb"},
    ),
    "figure haas-fig4 zhu-e3 -p n=128 -p steps 10 --profile quick -o made": (
        "workbench.report.figures.draw_figure",
        {"name": ["haas-fig4", "zhu-e3"], "out": Path("made"), "parameters": {"n": "128", "steps": "10"}}
        | {"profile": "quick"},
    ),
    "report --profile full --only 00 10 --jobs 2": (
        "workbench.report.reports.report",
        {"profile": "full", "only": ["00", "10"], "jobs": 2},
    ),
    "sweep a.yaml --workers 2": ("workbench.report.sweep.sweep", {"source": "a.yaml", "workers": 2, "scheduler": None}),
}


@pytest.mark.parametrize("line", ARRIVES)
def test_what_is_given_arrives(line, tiny_folder, faces, cache, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    target, wanted = ARRIVES[line]
    made = {"TINY": tiny_folder, "FACES": faces}
    given = arrived(monkeypatch, target, [made.get(word, word) for word in shlex.split(line)])
    assert {name: given[name] for name in wanted} == wanted


@pytest.fixture
def faces(tmp_path):
    """Eight images of one colour each, with labels."""
    return paint(tmp_path / "faces", [(255 * (k % 2), k, 90) for k in range(8)], ["Smiling"])


def paint(folder, colors, names=()):
    """Images of one colour each, and under the names the labels 0, 1, 0, 1, ..."""
    folder.mkdir()
    for k, color in enumerate(colors):
        Image.new("RGB", (16, 16), color).save(folder / f"{k}.png")
    table = pd.DataFrame({name: [k % 2 for k in range(len(colors))] for name in names})
    if names:
        table.rename("{}.png".format).to_csv(folder / "attributes.csv", index_label="file")
    return folder


# One real run a family


def test_models_lists_bundled_ones_by_the_name_they_load_by_and_public_ones(tiny_folder, tmp_path, capsys, monkeypatch):
    tiny_folder.rename(tmp_path / "my (new) model")
    name = "google/ddpm-ema-celebahq-256"
    monkeypatch.setattr(paths, "models", lambda: tmp_path)
    monkeypatch.setattr(layouts, "HUB", {name: layouts.HUB[name]})
    monkeypatch.setattr(layouts, "PRESETS", {})
    status, out, _ = run(capsys, "models")
    assert status == 0 and "my (new) model" in out and "3 x 8 x 8" in out
    assert wb.load_model("my (new) model", device="cpu").name == "my (new) model"
    line = next(line for line in out.splitlines() if line.startswith(name))
    assert "3 x 256 x 256" in line and "h 512 x 8 x 8" in line


def test_convert_then_load(tmp_path, capsys):
    network = randomised(Guided(ch=32, mult=(1, 2), layers=1, attention=(2,), head_channels=16))
    torch.save({"ema": network.state_dict()}, tmp_path / "dogs.pt")
    sizes = ("--image-size", 8, "--head-channels", 16)
    status, out, _ = run(capsys, "convert", tmp_path / "dogs.pt", tmp_path / "dogs", *sizes)
    assert status == 0 and "images (3, 8, 8)" in out
    assert wb.load_model(tmp_path / "dogs", device="cpu").h_shape == (64, 4, 4)
    for wrong in (("--preset", "nope"), ("--preset", "afhq_dog"), ()):
        refused(capsys, "convert", tmp_path / "dogs.pt", tmp_path / "other", *wrong)
    assert not (tmp_path / "other").exists()


def test_import_a_boundary_then_load(tiny_folder, tmp_path, capsys):
    z = np.random.default_rng(0).normal(size=(30, 16 * 4 * 4))
    fitted = SVC(kernel="linear").fit(z, np.where(z[:, 0] > 0, 1, -1))
    (tmp_path / "smile.sav").write_bytes(pickle.dumps(fitted))
    where = ("--model", tiny_folder, "--t", 500, "-o", tmp_path / "out")
    status, out, _ = run(capsys, "boundary", "import", tmp_path / "smile.sav", *where, "--space", "h")
    assert status == 0 and "Boundary('smile' in h at t=500, svm of BoundaryDiffusion" in out
    path = tmp_path / "out" / "tiny-smile-h-t500.safetensors"
    boundary = load_boundary(path, model=wb.load_model(tiny_folder, device="cpu"))
    assert np.abs(boundary.distance(z) - fitted.decision_function(z) / np.linalg.norm(fitted.coef_)).max() < 1e-5
    (tmp_path / "evil.sav").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for file, space in (("smile.sav", "x"), ("evil.sav", "h"), ("none.sav", "h")):
        refused(capsys, "boundary", "import", tmp_path / file, *where, "--space", space)
    assert list((tmp_path / "out").iterdir()) == [path]


def test_verify_tells_one_network_from_another(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(layouts, "HUB", {"a/ddpm": layouts.Architecture("ddpm", 8, (32, 64), 1, (1,))})
    monkeypatch.setattr(golden, "COUNT", 2)
    eps = wb.load_model(tiny_folder, device="cpu")(golden.noise((3, 8, 8)), 10)[0, 0, 0, :2].tolist()
    for values, status, word in ((eps, 0, "is the network"), ([7.0, 7.0], 1, "is not the network")):
        monkeypatch.setattr(golden, "EPS", {"a/ddpm": values})
        found, out, _ = run(capsys, "verify", tiny_folder, "--against", "a/ddpm", "--device", "cpu")
        assert found == status and f"{word} of a/ddpm" in out


@pytest.mark.parametrize(("name", "kind"), [("x.jpg", "JPEG"), ("new/x.PNG", "PNG"), ("x", "PNG"), ("x.webp", "WEBP")])
def test_samples_are_a_picture_of_the_format_that_its_name_says(name, kind, tiny_folder, tmp_path, capsys):
    status, out, _ = run(capsys, "sample", tiny_folder, "--seeds", "0", "--steps", 2, "-o", tmp_path / name)
    assert status == 0 and "1 samples" in out
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind and picture.width > 100
    assert [p.name for p in (tmp_path / name).parent.glob("*partial*")] == []


def test_extract_is_made_once_and_takes_addresses_and_images(tiny_folder, tmp_path, capsys, monkeypatch):
    """As a path, "//" would become "/", and the store a folder here."""
    monkeypatch.chdir(tmp_path)
    common = ("extract", tiny_folder, "--n", 2, "--steps", 2)
    address = ("-o", "memory://of-the-command/h.zarr", "--tap", "before")
    status, out, _ = run(capsys, *common, *address)
    assert status == 0 and "from the cache" not in out and "'before' the mid block" in out
    assert "from the cache" in run(capsys, *common, *address)[1] and list(tmp_path.iterdir()) == [tiny_folder]
    status, out, _ = run(capsys, *common, "--images", "avataaars", "-o", "h.zarr")
    assert status == 0 and "2 inverted images" in out and len(wb.open_store("h.zarr")) == 2


def test_directions_found_in_different_ways_are_different_files_that_load(tiny_folder, tmp_path, capsys, cache):
    out = tmp_path / "found"
    common = (tiny_folder, "--n", 40, "--steps", 2, "-o", out)
    for words in (
        ("find", "pca", *common, "--k", 2),
        ("find", "pca", *common, "--k", 1, "--joint"),
        ("find", "pca", *common, "--k", 1, "--tap", "before"),
        ("find", "jacobian", *common, "--k", 1, "--t", 500, "--region", "mouth"),
        ("find", "labels", *common, "--attributes", "Smiling"),
        # An untrained network's images are no images, so scores are those of the bundled model.
        ("find", "scores", "avataaars32", "--n", 6, "--steps", 2, "-o", out, "--attributes", "Beard", "--k", 2),
        *(
            ("boundary", "fit", *common, "--t", 500, "--attributes", "Smiling", *kind)
            for kind in ((), ("--method", "mean"), ("--tap", "before"))
        ),
    ):
        assert run(capsys, *words)[0] == 0
    names = {path.name.removeprefix("tiny-").removesuffix(".safetensors") for path in out.iterdir()}
    assert names == {
        *("PC1", "PC2", "PC1-joint", "PC1-before"),
        *("Smiling-labels", "mouth-jacobian-1-t500-seed0", "avataaars32-Beard"),
        *("Smiling-h-t500", "Smiling-x-t500", "Smiling-h-t500-mean", "Smiling-x-t500-mean", "Smiling-h-t500-before"),
    }
    found = [wb.load_direction(path) for path in out.iterdir() if not re.search("-[hx]-t500", path.name)]
    assert {direction.provenance["method"] for direction in found} == {"pca", "jacobian", "labels", "scores"}


def test_boundaries_are_fitted_saved_and_crossed(tiny_folder, tmp_path, capsys, cache, monkeypatch):
    out, common = tmp_path / "found", (tiny_folder, "--steps", 4)
    status, said, _ = run(capsys, "boundary", "fit", *common, "--t", 500, "-o", out, "--n", 60)
    files = sorted(path for path in out.iterdir() if "Smiling" in path.name)
    # Of all labels of two classes; the bundled ones hold an angle as well.
    assert status == 0 and "held-out balanced accuracy" in said and len(files) == 2
    assert re.search("left out .*Tilt", said) and not list(out.glob("*Tilt*"))
    before = {path: path.read_bytes() for path in files}
    by_network = ("--classifier", "avataaars", "--attributes", "Smiling", "--n", 12)
    run(capsys, "boundary", "fit", *common, "--t", 500, "-o", out, *by_network)
    assert before == {path: path.read_bytes() for path in files}, "those of labelled images stay"
    few = ("boundary", "fit", *common, "--t", 500, "-o", tmp_path / "few", "--n")
    status, _, said = run(capsys, *few, 2)
    assert status == 2 and "no attribute has 3 of 2 samples in both classes; raise --n" in said
    picture = tmp_path / "edits.png"
    edit = ("boundary", "edit", *common, "-o", picture, "--distances", -1, 0, 1, "--boundaries", *files)
    status, said, _ = run(capsys, *edit, "--images", "avataaars", "--n", 2)
    assert status == 0 and "EditGrid(2 x 3 images" in said and Image.open(picture).width > 100
    options = ("--unit", "distance", "--mode", "shift", "--eta", "0.3", "--h-policy", "offset", "--keep-norm")
    given = arrived(monkeypatch, "workbench.cross_boundary", [*edit, "--seeds", "3,5", *options])
    assert given["runs"].seeds == (3, 5) and [given[f"boundary_{s}"][0].space for s in "hx"] == ["h", "x"]
    crossing = {"distances": [-1.0, 0.0, 1.0], "unit": "distance", "mode": "shift", "eta": 0.3, "h_policy": "offset"}
    assert given.items() >= (crossing | {"keep_norm": True, "batch_size": None}).items()


def test_images_are_taken_in_an_order_that_the_seed_draws_or_those_of_class_folders_are_of_one(
    tiny_folder, tmp_path, monkeypatch
):
    sides = tmp_path / "sides"
    sides.mkdir()
    for name, red in (("dark", 60), ("red", 200)):
        paint(sides / name, [(red + i, i, 0) for i in range(10)])
    taken = wb.load_images(sides, labels="folders").shuffled(3).select(slice(8)).labels
    assert 0 < taken["red"].sum() < 8
    chosen = ("--images", sides, "--labels", "folders", "--attributes", "red", "--n", 8, "--seed", 3, "--steps", 4)
    for command in (("find", "labels", tiny_folder), ("boundary", "fit", tiny_folder, "--t", 500)):
        assert arrived(monkeypatch, "workbench.extract", [*command, *chosen])["images"].labels.equals(taken)


def test_boundaries_come_from_a_classifier(tmp_path, capsys, cache, monkeypatch):
    bundled = ("boundary", "fit", "avataaars32", "--steps", 4, "--t", 500, "--n", 12, "--classifier", "avataaars")
    monkeypatch.setattr(paths, "boundaries", lambda: tmp_path / "boundaries")  # not among directions
    status, said, _ = run(capsys, *bundled, "--attributes", "Long_Hair")
    assert status == 0 and "'Long_Hair' in x" in said
    assert len(list((tmp_path / "boundaries").iterdir())) == 2


def test_edit_renders_a_recipe_bit_for_bit_and_says_when_the_bits_differ(tiny_folder, tmp_path, capsys):
    model = wb.load_model(tiny_folder, device="cpu")
    samples = wb.sample(model, [3, 4], steps=4, record_h=True, progress=False)
    session = EditSession(model, samples, planted(model, samples, 1, "smile"))
    session.set_scale("smile", 0.1)
    path = save_recipe(session, tmp_path / "edit.json")
    edit = ("edit", path, "--model", tiny_folder, "-o")
    status, out, _ = run(capsys, *edit, tmp_path / "again.safetensors")
    assert status == 0 and "seed 3: smile +0.1 sigma" in out and "bit for bit" in out
    assert torch.equal(load_file(tmp_path / "again.safetensors")["after"], session.render().after)
    path.write_text(path.read_text().replace('"scale": 0.1', '"scale": 0.2'))
    status, out, _ = run(capsys, *edit, tmp_path / "figure.png")
    assert status == 0 and "not the same bits as when it was saved" in out
    assert (tmp_path / "figure.png").is_file() and (tmp_path / "figure.pdf").is_file()


def test_a_report_says_how_many_extractions_it_made(cache, capsys, monkeypatch):
    cache.mkdir()
    monkeypatch.setattr("workbench.report.reports.report", lambda profile, **_: (cache / f"{profile}.zarr").touch())
    assert f"extractions: 1 made, and kept in {cache}" in run(capsys, "report")[1]
    assert f"extractions: all from {cache}" in run(capsys, "report")[1]


def test_run_and_figure_list_what_there_is(capsys):
    assert "00_quickstart" in run(capsys, "run", "--list")[1]
    assert "model_name" in run(capsys, "run", "10_extract", "--list")[1]
    assert [line.split()[0] for line in run(capsys, "figure", "--list")[1].splitlines()] == list(figures.list_figures())


def test_a_failing_notebook_is_status_1(tmp_path, monkeypatch, capsys):
    source = write_notebook(tmp_path / "broken.ipynb", "1 / 0")
    monkeypatch.setattr(paths, "reports", lambda: tmp_path / "reports")
    status, _, err = run(capsys, "run", source)
    assert status == 1 and "ZeroDivisionError" in err
    assert list((tmp_path / "reports" / "failed").glob("broken*.ipynb"))


@pytest.mark.slow
def test_a_method_of_ones_own_is_benchmarked_as_its_page_says(tmp_path, capsys, cache):
    before = dict(methods.METHODS)
    page = paths.home() / "docs" / "how-to" / "new-method.md"
    blocks = re.findall(r"```python\n(.*?)```", page.read_text(), re.S)
    (block,) = [block for block in blocks if "register_method" in block]
    assert len(block.strip().splitlines()) <= 10
    plugin, out = tmp_path / "mine.py", tmp_path / "out"
    plugin.write_text(block)
    sizes = ("--population", 32, "--held-out", 8, "--steps", 6, "--eta", 0, "--attributes", "Smiling")
    chosen = ("--methods", "two a side", "random h", "--plugin", plugin)
    try:
        status, text, _ = run(capsys, "benchmark", "--quick", *sizes, *chosen, "-o", out)
    finally:
        methods.METHODS.clear()
        methods.METHODS.update(before)
    assert status == 0 and "two a side" in text
    tables = {"edits.parquet", "edits.csv", "leaderboard.csv", "realism.csv", "costs.csv"}
    assert tables | {"pareto.pdf", "strips-Smiling.png"} <= {path.name for path in out.iterdir()}
    table = pd.read_parquet(out / "edits.parquet")
    assert set(table.method) == {"two a side", "random h"} and set(table.attribute) == {"Smiling"}
    assert wb.load_benchmark(out).protocol.eta == 0


# Mistakes

MISTAKES = [
    ("sampel avataaars32", "'sampel'. Did you mean 'sample'"),
    ("sample nope", "bundled: avataaars32"),
    ("sample avataaars32 --steps many", "'many'"),
    *((f"sample avataaars32 --seeds={text}", text[-3:]) for text in ("a", "3-", "1,5-3")),
    ("sample avataaars32 -o x.gif", ".gif; it can be written as .png"),
    ("extract avataaars32 --n -5", "equal to 1 (given: '-5')"),
    ("find pca avataaars32 --n 5", "--k is 5; 5 samples have up to 4"),
    ("find scores avataaars32 --n 50 --attributes Smiling", "--k is 100; 50 samples have 2 to 25"),
    ("find scores avataaars32 --attributes", "--attributes"),
    ("find jacobian avataaars32 --t 500 --region nose", "nose"),
    ("boundary fit avataaars32 --t 510 --n 4 --attributes Beard", "nearest 520 or 500"),
    ("boundary edit avataaars32 --boundaries b --seeds 1", "there is no boundary at b"),
    ("boundary edit avataaars32 --boundaries b", "--images or --seeds"),
    ("evaluate-model avataaars32 --card nothing", "no model folder nothing"),
    ("benchmark --plugin missing.py -o none", "missing.py: No such file"),
    ("benchmark --methods magic -o none", "method 'magic'"),
    ("benchmark avataaars64 --records -o none", "there is no recorded benchmark of 'avataaars64'"),
    ("benchmark --records --judge mine -o none", "--judge is given, and --records takes it from the record"),
    ("run 40_pca -p seed -1,0", "seed"),
    ("boundary edit avataaars32 --seeds 1 --boundaries b --distances 1 -inf", "'-inf' is not a finite number"),
    ("studio --port 99999", "port 99999 is invalid"),
    ("explore nope.zarr --out page.pdf", "ends in .pdf"),
    ("edit nope.json", "there is no recipe nope.json"),
    ("sample avataaars32 --prompt cat", "prompt is 'cat', and avataaars32 has no text encoder"),
    ("sample avataaars32 --negative-prompt cat", "--negative-prompt"),
    ("figure", "name a figure, or `all`"),
    ("run", "workbench run --list"),
    ("report --jobs 1 --profile nope", "nope"),
]  # fmt: skip


@pytest.mark.parametrize(("line", "words"), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_sentence_and_leaves_nothing(line, words, no_traces, capsys):
    assert words in refused(capsys, *line.split(" "))


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", "nope", "--debug"])


def test_an_interrupt_is_a_line_and_who_stops_reading_is_told_nothing(capsys, monkeypatch):
    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(wb, "list_models", interrupted)
        assert run(capsys, "models") == (130, "", "workbench: interrupted\n")
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert cli.main(["run", "--list"]) == 141
    assert capsys.readouterr().err == ""


def test_a_warning_is_a_line_above_a_progress_bar(capsys, monkeypatch):
    def warned():
        with tqdm(total=2) as bar:
            bar.update()
            warnings.warn("it rains", stacklevel=1)
            bar.update()
        return {}

    monkeypatch.setattr(wb, "list_models", warned)
    assert "\rworkbench: it rains\n" in run(capsys, "models")[2]


def test_what_is_left_out_of_images_and_labels_is_said_in_a_line_each(tiny_folder, tmp_path, capsys):
    faces = paint(tmp_path / "faces", [(40 * i, 0, 0) for i in range(6)])
    (faces / "6.png").write_bytes(b"nothing")
    table = tmp_path / "table.csv"
    table.write_text("file;A;Age\n" + "".join(f"{i}.png;{i % 2};{i}\n" for i in range(8)))
    fit = ("boundary", "fit", tiny_folder, "--steps", 2, "--t", 500, "--images", faces, "--labels", table)
    status, _, said = run(capsys, *fit, "-o", tmp_path / "found")
    assert status == 2 and "6.png cannot be decoded" in said and "--skip-broken" in said
    status, out, said = run(capsys, *fit, "--skip-broken", "-o", tmp_path / "found")
    assert status == 0 and "3 samples of a class): Age" in out
    assert all(line.startswith("workbench: ") for line in said.splitlines())
    assert re.search(r"rows without image.* 1 of 8 .*7\.png", said) and re.search(r"cannot be decoded.*6\.png", said)
