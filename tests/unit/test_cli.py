"""The command line: what it prints, and that a mistake is one sentence and exit status 2."""

from __future__ import annotations

import os
import pickle
import re
import subprocess
import sys
import warnings

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from originals import Guided, randomised
from PIL import Image
from safetensors.torch import load_file
from sklearn.svm import SVC
from test_session import planted

import workbench as wb
from workbench import cli, paths
from workbench.benchmark import methods
from workbench.datasets.classifiers import load_classifier
from workbench.datasets.labelled import load_images
from workbench.diffusion.models import load_model
from workbench.diffusion.sampling import sample
from workbench.directions.boundary import load_boundary
from workbench.directions.direction import load_direction
from workbench.formats import golden, layouts
from workbench.hspace.store import open_store
from workbench.report import figures
from workbench.studio.recipe import save_recipe
from workbench.studio.server import find_editables
from workbench.studio.session import EditSession


def run(capsys, *arguments) -> tuple[int, str, str]:
    status = cli.main([str(a) for a in arguments])
    out, err = capsys.readouterr()
    return status, out, err


@pytest.fixture
def no_traces(tmp_path, monkeypatch, cache):
    """An empty working folder; the test fails if a failed command leaves anything in it."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    yield folder
    assert list(folder.iterdir()) == []
    assert not list(cache.glob("*.zarr"))


def test_help_shows_examples_and_loads_no_heavy_package():
    code = "import sys, workbench.cli as c\ntry: c.main(['--help'])\nexcept SystemExit: pass\n"
    code += "assert not {'torch', 'diffusers', 'zarr', 'matplotlib', 'papermill'} & set(sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "examples:" in shown and "workbench extract" in shown


@pytest.mark.parametrize(
    "command",
    "models|sample|extract|store|geometry|mixing-step|boundary|boundary fit|boundary edit|data|params|run|report|"
    "train-classifier|convert|convert-boundary|verify|studio|edit|benchmark|figure".split("|"),
)
def test_every_command_has_help_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([*command.split(), "--help"])
    assert stop.value.code == 0
    assert f"example:\n  workbench {command}" in capsys.readouterr().out


def test_models_lists_the_bundled_one(capsys):
    status, out, _ = run(capsys, "models")
    assert status == 0
    assert "avataaars32" in out and "3 x 32 x 32" in out


def test_every_model_that_is_listed_as_bundled_loads_by_its_name(tiny_folder, tmp_path, capsys, monkeypatch):
    tiny_folder.rename(tmp_path / "my (new) model")
    monkeypatch.setattr(paths, "models", lambda: tmp_path)
    assert "my (new) model" in run(capsys, "models")[1]
    assert load_model("my (new) model", device="cpu").name == "my (new) model"


def test_who_stops_reading_the_output_is_told_nothing(capsys, monkeypatch):
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert cli.main(["models"]) == 141
    assert capsys.readouterr().err == ""


def test_models_says_what_public_ones_need(capsys):
    out = run(capsys, "models")[1]
    assert "memory for one image is estimated" in out
    line = next(line for line in out.splitlines() if line.startswith("google/ddpm-ema-celebahq-256"))
    assert "114 M weights" in line and "0.8 GiB" in line and "h 512 x 8 x 8" in line
    assert any("adm_lsun" in line and "h 1024 x 8 x 8" in line for line in out.splitlines())


def test_convert_then_load(tmp_path, capsys):
    network = randomised(Guided(ch=32, mult=(1, 2), layers=1, attention=(2,), head_channels=16))
    torch.save({"ema": network.state_dict()}, tmp_path / "dogs.pt")
    sizes = ("--image-size", 8, "--head-channels", 16, "--schedule", "cosine")
    status, out, _ = run(capsys, "convert", tmp_path / "dogs.pt", tmp_path / "dogs", *sizes)
    assert status == 0 and "images (3, 8, 8)" in out
    assert load_model(tmp_path / "dogs", device="cpu").h_shape == (64, 4, 4)
    for wrong in (("--preset", "nope"), ("--preset", "afhq_dog"), ()):
        status, out, err = run(capsys, "convert", tmp_path / "dogs.pt", tmp_path / "other", *wrong)
        assert status == 2 and out == "" and err.count("\n") == 1
    assert not (tmp_path / "other").exists()
    assert run(capsys, "convert", tmp_path / "dogs", tmp_path / "other")[2].count("dogs is a folder") == 1
    sizes = (*sizes[:4], "--timesteps", 4000)
    for rescaled, trained in (((), "T=4000"), (("--rescale-timesteps",), "T=1000")):
        status, out, err = run(capsys, "convert", tmp_path / "dogs.pt", tmp_path / trained, *sizes, *rescaled)
        assert status == 0 and trained in out and "assumed" not in err


def test_convert_boundary_then_load(tiny_folder, tmp_path, capsys):
    z = np.random.default_rng(0).normal(size=(30, 16 * 4 * 4))
    fitted = SVC(kernel="linear").fit(z, np.where(z[:, 0] > 0, 1, -1))
    (tmp_path / "smile.sav").write_bytes(pickle.dumps(fitted))
    where = ("--model", tiny_folder, "--t", 500, "-o", tmp_path / "out")
    status, out, _ = run(capsys, "convert-boundary", tmp_path / "smile.sav", *where, "--space", "h")
    assert status == 0 and "Boundary('smile' in h at t=500, svm of BoundaryDiffusion" in out
    path = tmp_path / "out" / "tiny-smile-h-t500.safetensors"
    boundary = load_boundary(path, model=load_model(tiny_folder, device="cpu"), t=500, space="h")
    assert np.abs(boundary.distance(z) - fitted.decision_function(z) / np.linalg.norm(fitted.coef_)).max() < 1e-5
    (tmp_path / "evil.sav").write_bytes(b"cos\nsystem\n(S'true'\ntR.")
    for wrong in (("smile.sav", "--space", "x"), ("evil.sav", "--space", "h"), ("none.sav", "--space", "h")):
        status, out, err = run(capsys, "convert-boundary", tmp_path / wrong[0], *where, *wrong[1:])
        assert status == 2 and out == "" and err.count("\n") == 1
    assert list((tmp_path / "out").iterdir()) == [path]


def test_verify_is_a_sentence_where_the_files_are_absent(capsys):
    status, out, err = run(capsys, "verify", "google/ddpm-ema-cat-256", "--device", "cpu")
    if status == 0:
        assert "is the network of google/ddpm-ema-cat-256" in out
    else:
        assert status == 2 and "hf download google/ddpm-ema-cat-256" in err and err.count("\n") == 1


def test_verify_tells_one_network_from_another(tiny_folder, capsys, monkeypatch):
    monkeypatch.setattr(layouts, "HUB", {"a/ddpm": layouts.Architecture("ddpm", 8, (32, 64), 1, (1,))})
    monkeypatch.setattr(golden, "COUNT", 2)
    eps = load_model(tiny_folder, device="cpu")(golden.noise((3, 8, 8)), 10)[0, 0, 0, :2].tolist()
    for values, status, word in ((eps, 0, "is the network"), ([7.0, 7.0], 1, "is not the network")):
        monkeypatch.setattr(golden, "EPS", {"a/ddpm": values})
        found, out, _ = run(capsys, "verify", tiny_folder, "--against", "a/ddpm", "--device", "cpu")
        assert found == status and f"{word} of a/ddpm" in out


def test_sample_writes_a_picture(tiny_folder, tmp_path, capsys):
    picture = tmp_path / "new" / "samples.png"
    status, out, _ = run(capsys, "sample", tiny_folder, "--seeds", "0-2,7", "--steps", 2, "-o", picture)
    assert status == 0 and "4 samples" in out
    assert Image.open(picture).width > 100


@pytest.mark.parametrize(("name", "kind"), [("x.jpg", "JPEG"), ("new/x.PNG", "PNG"), ("x", "PNG"), ("x.webp", "WEBP")])
def test_a_picture_is_of_the_format_that_its_name_says(name, kind, tiny_folder, tmp_path, capsys):
    assert run(capsys, "sample", tiny_folder, "--seeds", "0", "--steps", 2, "-o", tmp_path / name)[0] == 0
    with Image.open(tmp_path / name) as picture:
        assert picture.format == kind
    assert [p.name for p in (tmp_path / name).parent.glob("*partial*")] == []


def test_extract_then_store(tiny_folder, tmp_path, capsys):
    path = tmp_path / "h.zarr"
    arguments = ("extract", tiny_folder, "--n", 3, "--steps", 2, "--tap", "before", "-o", path)
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "from the cache" not in out
    assert len(open_store(path)) == 3
    assert "from the cache" in run(capsys, *arguments)[1]
    status, out, _ = run(capsys, "store", path)
    assert status == 0 and "'before' the mid block" in out and "float16" in out


def test_extract_to_an_address_then_store(tiny_folder, tmp_path, capsys, monkeypatch):
    """As a path, "//" would become "/", and the store a folder here."""
    monkeypatch.chdir(tmp_path)
    address = "memory://of-the-command/h.zarr"
    assert run(capsys, "extract", tiny_folder, "--n", 2, "--steps", 2, "-o", address)[0] == 0
    assert run(capsys, "store", address)[0] == 0 and list(tmp_path.iterdir()) == [tiny_folder]


def test_what_is_found_in_another_way_does_not_replace_a_direction_of_the_same_name(
    tiny_folder, tmp_path, capsys, cache
):
    out = tmp_path / "found"
    common = (tiny_folder, "--n", 40, "--steps", 2, "-o", out)
    for words in (
        ("pca", *common, "--k", 1),
        ("pca", *common, "--k", 1, "--joint"),
        ("pca", *common, "--k", 1, "--tap", "before"),
        ("labels", *common, "--attributes", "Smiling"),
    ):
        assert run(capsys, "find", *words)[0] == 0
    fit = ("boundary", "fit", *common, "--t", 500, "--attributes", "Smiling")
    for words in ((), ("--method", "mean"), ("--tap", "before")):
        assert run(capsys, *fit, *words)[0] == 0
    names = {path.name.removeprefix("tiny-").removesuffix(".safetensors") for path in out.iterdir()}
    assert names >= {"PC1", "PC1-joint", "PC1-before", "Smiling-labels", "Smiling-h-t500", "Smiling-h-t500-before"}
    assert len(names) == 4 + 5  # a boundary in x has no tap


def test_a_figure_is_drawn_with_the_parameters_given(tmp_path, capsys, monkeypatch):
    given = {}
    monkeypatch.setattr(figures, "draw_figure", lambda names, **options: given.update(names=names, **options) or [])
    words = ("haas-fig4", "zhu-e3", "-p", "n=128", "-p", "steps=10", "--profile", "quick", "-o", tmp_path)
    assert run(capsys, "figure", *words)[0] == 0
    expected = {"out": tmp_path, "parameters": {"n": "128", "steps": "10"}, "profile": "quick"}
    assert given == {"names": ["haas-fig4", "zhu-e3"], **expected}


def test_boundaries_are_of_all_labels_of_two_classes_unless_told_otherwise(tiny_folder, tmp_path, capsys, cache):
    """The bundled labels hold an angle as well."""
    assert "Tilt" in load_images("avataaars").names
    fit = ("boundary", "fit", tiny_folder, "--steps", 4, "--t", 500, "--n", 60, "-o", tmp_path / "found")
    assert run(capsys, *fit)[0] == 0
    found = {path.name.split("-")[1] for path in (tmp_path / "found").iterdir()}
    assert "Smiling" in found and "Tilt" not in found


def test_extract_takes_its_options(tiny_folder, tmp_path, capsys):
    path = tmp_path / "h.zarr"
    options = ("--dtype", "float32", "--record-x", "--eta", "0.5", "--seed", 7)
    assert run(capsys, "extract", tiny_folder, "--n", 2, "--steps", 3, *options, "-o", path)[0] == 0
    store = open_store(path)
    assert store.provenance["dtype"] == "float32" and "x" in store.provenance["keeps"]
    assert store.provenance["etas"] == [0.5] * 3 and list(store.seeds) == [7, 8]


def test_extract_of_real_images(tiny_folder, tmp_path, capsys):
    path = tmp_path / "h.zarr"
    status, out, _ = run(capsys, "extract", tiny_folder, "--images", "avataaars", "--n", 2, "--steps", 2, "-o", path)
    assert status == 0 and "2 inverted images" in out


TAKE_IMAGES = "extract|mixing-step|benchmark|find labels|boundary fit|boundary edit|evaluate-model"


@pytest.mark.parametrize("command", [*TAKE_IMAGES.split("|"), "train-classifier", "train"])
def test_every_command_that_takes_images_takes_their_labels_and_skips_broken_ones(command, capsys):
    with pytest.raises(SystemExit):
        cli.main([*command.split(), "--help"])
    shown = capsys.readouterr().out
    assert "--skip-broken" in shown and ("--labels FILE" in shown or command == "train")


def test_what_is_left_out_of_images_and_labels_is_said_in_a_line_each(tiny_folder, tmp_path, capsys, monkeypatch):
    def show(*given):  # as Python does where no test records it
        print(warnings.formatwarning(*given), end="", file=sys.stderr)

    monkeypatch.setattr(warnings, "showwarning", show)
    faces = tmp_path / "faces"
    faces.mkdir()
    for i in range(6):
        Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(faces / f"{i}.png")
    (faces / "6.png").write_bytes(b"nothing")
    table = tmp_path / "table.csv"
    table.write_text("file;A;Age\n" + "".join(f"{i}.png;{i % 2};{i}\n" for i in range(8)))
    fit = ("boundary", "fit", tiny_folder, "--steps", 2, "--t", 500, "--images", faces, "--labels", table)
    status, _, said = run(capsys, *fit, "-o", tmp_path / "found")
    assert status == 2 and "6.png cannot be decoded" in said and "--skip-broken" in said
    status, out, said = run(capsys, *fit, "--skip-broken", "-o", tmp_path / "found")
    assert status == 0 and "for lack of two classes or of labels: Age" in out
    assert all(line.startswith("workbench: ") for line in said.splitlines())
    assert "rows without image, 1 of 8 (7.png)" in said and "cannot be decoded as an image: " in said


@pytest.mark.parametrize("number", ["nan", "inf", "-inf"])
def test_numbers_of_edits_are_finite(number, capsys):
    edit = ("boundary", "edit", "avataaars32", "--boundaries", "b", "--seeds", "0")
    for arguments in ((*edit, f"--eta={number}"), (*edit, "--distances", "0", number)):
        with pytest.raises(SystemExit) as stop:
            run(capsys, *arguments)
        assert stop.value.code == 2
        if arguments[-1] != "-inf":  # which argparse takes for an option
            assert f"'{number}' is not a finite number" in capsys.readouterr().err


def test_find_saves_directions_that_load_again(tiny_folder, tmp_path, capsys, cache):
    common = (tiny_folder, "--n", 6, "--steps", 2, "-o", tmp_path / "found")
    assert run(capsys, "find", "pca", *common, "--k", 2)[0] == 0
    assert run(capsys, "find", "jacobian", *common, "--k", 1, "--t", 500, "--region", "mouth")[0] == 0
    assert run(capsys, "find", "labels", *common, "--attributes", "Smiling")[0] == 0
    # An untrained network's images are no images, so scores are those of the bundled model.
    bundled = ("avataaars32", *common[1:])
    assert run(capsys, "find", "scores", *bundled, "--attributes", "Beard", "--k", 2)[0] == 0
    files = sorted(path.name for path in (tmp_path / "found").iterdir())
    tiny = [f"tiny-{name}.safetensors" for name in ("PC1", "PC2", "Smiling-labels", "mouth-jacobian-1-t500")]
    assert files == ["avataaars32-Beard.safetensors", *tiny]
    directions = [load_direction(tmp_path / "found" / name) for name in files]
    assert {direction.provenance["method"] for direction in directions} == {"pca", "scores", "labels", "jacobian"}


def test_directions_of_any_attribute_are_saved_where_the_studio_finds_them(tiny_folder, tmp_path, capsys, cache):
    (tmp_path / "faces").mkdir()
    for k in range(8):
        Image.new("RGB", (8, 8), (30 * k, 0, 90)).save(tmp_path / "faces" / f"{k}.png")
    names = ["Hair/Long", "Hair-Long", "../Smile", "50% grey"]
    table = pd.DataFrame({name: [k % 2 for k in range(8)] for name in names}, index=[f"{k}.png" for k in range(8)])
    table.to_csv(tmp_path / "faces" / "attributes.csv", index_label="file")
    where = ("--images", tmp_path / "faces", "--steps", 2, "-o", tmp_path / "found")
    for command in (("find", "labels", tiny_folder), ("boundary", "fit", tiny_folder, "--t", 500, "--n", 8)):
        status, _, err = run(capsys, *command, *where, "--attributes", *names)
        assert status == 0, err
    model = load_model(tiny_folder, device="cpu")
    found = find_editables(model, [str(tmp_path / "found")], model.schedule.timesteps(2))
    assert sorted(each.name for each in found) == sorted([*names, *names, *names]), (
        "a direction, and boundaries in x and h"
    )
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "faces", "found", "tiny"]


@pytest.mark.slow
def test_geometry_writes_maps_and_numbers(tmp_path, capsys, cache):
    out = tmp_path / "maps"
    status, printed, _ = run(
        capsys, "geometry", "avataaars32", "--n", 21, "--steps", 2, "--t", 400, "--attributes", "Long_Hair", "-o", out
    )
    assert status == 0 and "trustworthiness" in printed and "TwoNN" in printed
    quality, dimensions = (pd.read_csv(out / f"{name}.csv") for name in ("quality", "dimensions"))
    assert set(quality["map"]) == {"PCA", "UMAP", "t-SNE"} and set(dimensions["t"]) == {500, 0}
    for method in ("pca", "umap", "tsne"):
        assert Image.open(out / f"map-{method}.png").width > 300


def test_mixing_step_prints_a_table_and_draws(tmp_path, capsys, cache):
    common = ("mixing-step", "avataaars32", "--n", 24, "--steps", 3, "--attributes", "Long_Hair")
    status, printed, _ = run(capsys, *common, "--criterion", "separability", "perceptual", "-o", tmp_path / "m.png")
    assert status == 0 and "agrees_with" in printed and "perceptual" in printed
    assert {path.suffix for path in tmp_path.glob("m.*")} == {".pdf", ".svg", ".png"}
    status, printed, _ = run(capsys, *common, "--criterion", "radius_gap", "--images", "avataaars")
    assert status == 0 and "radius_gap" in printed


def test_boundaries_are_fitted_saved_and_crossed(tiny_folder, tmp_path, capsys, cache, monkeypatch):
    out, common = tmp_path / "found", (tiny_folder, "--steps", 4)
    fit = ("boundary", "fit", *common, "--t", 500, "-o", out)
    status, said, _ = run(capsys, *fit, "--n", 12, "--attributes", "Smiling", "Long_Hair")
    assert status == 0 and said.count("held-out accuracy") == 4
    files = sorted(path.name for path in out.iterdir())
    assert files == [f"tiny-{name}-{s}-t500.safetensors" for name in ("Long_Hair", "Smiling") for s in "hx"]
    picture = tmp_path / "edits.png"
    edit = ("boundary", "edit", *common, "-o", picture, "--distances", -1, 0, 1, "--boundaries")
    status, said, _ = run(capsys, *edit, *(out / name for name in files[:2]), "--images", "avataaars", "--n", 2)
    assert status == 0 and "EditGrid(2 x 3 images" in said and Image.open(picture).width > 100
    given, cross = {}, wb.cross_boundary
    monkeypatch.setattr(wb, "cross_boundary", lambda *a, **k: given.update(k) or cross(*a, **k), raising=False)
    options = ("--unit", "distance", "--mode", "shift", "--eta", "0.3", "--h-policy", "offset", "--keep-norm")
    status, said, _ = run(capsys, *edit, out / files[1], "--seeds", "3,5", *options)
    assert status == 0 and "EditGrid(2 x 3 images" in said
    assert [given[key] for key in ("unit", "mode", "eta", "h_policy", "keep_norm")] == [
        "distance",
        "shift",
        0.3,
        "offset",
        True,
    ]


def test_boundaries_come_from_two_folders_and_from_a_classifier(tiny_folder, tmp_path, capsys, cache, monkeypatch):
    for side, shade in (("with", 200), ("without", 60)):
        (tmp_path / side).mkdir()
        for i in range(5):
            Image.new("RGB", (16, 16), (shade + i, i, 0)).save(tmp_path / side / f"{i}.png")
    fit = ("boundary", "fit", tiny_folder, "--steps", 4, "--t", 500, "-o", tmp_path / "found")
    pair = ("--positive", tmp_path / "with", "--negative", tmp_path / "without")
    assert run(capsys, *fit, *pair, "--attributes", "Red", "--n", 8)[0] == 0
    found = load_boundary(tmp_path / "found" / "tiny-Red-x-t500.safetensors")
    assert (found.provenance["parameters"]["positives"], found.provenance["parameters"]["negatives"]) == (4, 4)
    status, _, err = run(capsys, *fit, *pair[:2])
    assert status == 2 and "both --positive and --negative" in err
    status, _, err = run(capsys, *fit, *pair[:2], "--negative", tmp_path / "found")
    assert status == 2 and "holds no images" in err
    bundled = ("boundary", "fit", "avataaars32", "--steps", 4, "--t", 500, "--n", 12, "--classifier", "avataaars")
    monkeypatch.setattr(paths, "boundaries", lambda: tmp_path / "boundaries")  # not among directions
    status, said, _ = run(capsys, *bundled, "--attributes", "Long_Hair")
    assert status == 0 and "'Long_Hair' in x" in said
    assert len(list((tmp_path / "boundaries").iterdir())) == 2


def test_train_classifier_writes_one_that_loads(tmp_path, capsys):
    for i in range(8):
        Image.new("RGB", (16, 16), (255 * (i % 2), 0, 0)).save(tmp_path / f"{i}.png")
    rows = "".join(f"{i}.png,{i % 2}\n" for i in range(8))
    (tmp_path / "attributes.csv").write_text("file,Red\n" + rows)
    arguments = ("train-classifier", tmp_path, "--out", tmp_path / "made", "--steps", 1)
    status, out, _ = run(capsys, *arguments)
    assert status == 0 and "1 attributes Red" in out
    assert load_classifier(tmp_path / "made").attributes == ("Red",)


def test_params_lists_notebooks_and_their_parameters(capsys):
    assert "00_quickstart" in run(capsys, "params")[1]
    assert "model_name" in run(capsys, "params", "10_extract")[1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("sample", "nope"), "bundled: avataaars32"),
        (("sample", "avataaars32", "--steps", 1001), "1 to 1000 steps"),
        (("sample", "avataaars32", "--steps", 0), "1 to 1000 steps"),
        (("sample", "avataaars32", "--eta", 2), "eta"),
        (("extract", "avataaars32", "--n", -5), "--n is -5; give 1 or more"),
        (("extract", "avataaars32", "--n", 0), "--n is 0; give 1 or more"),
        (("find", "labels", "avataaars32", "--n", -3, "--attributes", "Smiling"), "--n is -3"),
        (("benchmark", "--plugin", "missing.py"), "missing.py: No such file"),
        (("extract", "avataaars32", "--n", 5, "--seed", -1), "seeds"),
        (("extract", "avataaars32", "--images", "missing"), "missing"),
        (("store", "missing.zarr"), "there is no store"),
        (("sample", "avataaars32", "-o", "x.gif"), "x.gif ends in .gif; it can be written as .png"),
        (("mixing-step", "avataaars32", "-o", "x.jpg"), "x.jpg ends in .jpg; figures are written as .pdf"),
        (("mixing-step", "avataaars32", "--n", 9), "--n is 9; give 10 or more"),
        (("geometry", "avataaars32", "--n", 12, "--steps", 5), "--n is 12; the dimension takes 20"),
        (("geometry", "avataaars32", "--steps", 1), "--steps is 1"),
        (("find", "pca", "avataaars32", "--n", 5), "--k is 5; 5 samples have up to 4"),
        (("find", "pca", "avataaars32", "--k", 0), "--k is 0; give 1 or more"),
        (
            ("find", "scores", "avataaars32", "--n", 50, "--attributes", "Smiling"),
            "--k is 100; 50 samples have 2 to 25",
        ),
        (("find", "jacobian", "avataaars32", "--t", 510), "nearest 520 or 500"),
        (("find", "jacobian", "avataaars32", "--t", 500, "--region", "nose"), "nose"),
        (("evaluate-model", "avataaars32", "--card", "nothing"), "there is no model folder nothing"),
        (("evaluate-model", "avataaars32", "--inverted", -1), "n_inverted is -1"),
        (("figure", "zhu-e4", "--attributes", "Wings", "Smiling"), "has no attribute 'Wings'"),
        (("convert", paths.models(), "made"), "is a folder, and convert takes a file"),
        (("convert", paths.models() / "avataaars32" / "unet", "made"), "diffusion_pytorch_model.safetensors in it"),
        (("studio", "--port", 99999), "port 99999 is none"),
        (("find", "labels", "avataaars32", "--attributes", "Wings"), "Smiling, Mouth_Open"),
        (("geometry", "avataaars32", "--attributes", "Wings"), "Smiling, Mouth_Open"),
        (("mixing-step", "avataaars32", "--labeller", "nobody"), "nobody"),
        (("boundary", "fit", "avataaars32", "--t", 510, "--n", 4, "--attributes", "Beard"), "nearest 520 or 500"),
        (("boundary", "fit", "avataaars32", "--t", 500, "--attributes", "Wings"), "Smiling, Mouth_Open"),
        (("boundary", "edit", "avataaars32", "--boundaries", "b", "--seeds", "1"), "there is no boundary at b"),
        (("boundary", "edit", "avataaars32", "--boundaries", "b"), "--images or --seeds"),
        (("train-classifier", "missing", "--out", "made"), "missing"),
        (("params", "99_nothing"), "99_nothing"),
        (("run", "10_extract", "-p", "stepss", 4), "steps"),
        (("run", "10_extract", "-p", "n", "many"), "n"),
        (("report", "--profile", "nope"), "nope"),
        (("report", "--only", "99_nothing"), "99_nothing"),
    ],
)
def test_a_mistake_is_one_sentence_and_leaves_nothing(arguments, words, no_traces, capsys):
    status, out, err = run(capsys, *arguments)
    assert status == 2
    assert out == ""
    assert err.startswith("workbench: ") and words in err
    assert err.count("\n") == 1 and "Traceback" not in err


def test_debug_shows_the_traceback():
    with pytest.raises(FileNotFoundError):
        cli.main(["sample", "nope", "--debug"])


@pytest.mark.parametrize("text", ["a", "-1", "3-", "1,,2", "5-3", "1,5-3"])
def test_a_list_of_seeds_that_is_none_is_refused(text):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sample", "avataaars32", f"--seeds={text}"])
    assert stop.value.code == 2


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    """A saved edit of an untrained network, and the session that it comes from."""
    model = load_model(tiny_folder, device="cpu")
    samples = sample(model, [3, 4], steps=4, record_h=True, progress=False)
    session = EditSession(model, samples, planted(model, samples, 1, "smile"))
    session.set_scale("smile", 0.1)
    return save_recipe(session, tmp_path / "edit.json"), session, tiny_folder


def test_edit_renders_a_recipe_bit_for_bit(recipe, tmp_path, capsys):
    path, session, folder = recipe
    status, out, _ = run(capsys, "edit", path, "--model", folder, "-o", tmp_path / "again.safetensors")
    assert status == 0 and "seed 3: smile +0.1 sigma" in out and "bit for bit" in out
    assert torch.equal(load_file(tmp_path / "again.safetensors")["after"], session.render().after)
    assert run(capsys, "edit", path, "--model", folder, "-o", tmp_path / "figure.png")[0] == 0
    assert (tmp_path / "figure.png").is_file() and (tmp_path / "figure.pdf").is_file()


def test_edit_says_when_the_bits_differ(recipe, tmp_path, capsys):
    path, _, folder = recipe
    path.write_text(path.read_text().replace('"scale": 0.1', '"scale": 0.2'))
    status, out, _ = run(capsys, "edit", path, "--model", folder, "-o", tmp_path / "again.png")
    assert status == 0 and "not the same bits as when it was saved" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["studio", "--model", "nope"], "no model 'nope'"),
        (["studio", "--directions", "nope.safetensors"], "there is no direction at nope.safetensors"),
        (["studio", "--directions", "."], "there is no direction in ."),
        (["edit", "nope.json"], "there is no recipe nope.json"),
    ],
)
def test_studio_and_edit_say_what_is_missing_before_anything_opens(no_traces, capsys, arguments, words):
    status, _, err = run(capsys, *arguments)
    assert status == 2 and words in err and err.count("\n") == 1


def test_a_failing_notebook_is_status_1(tmp_path, monkeypatch, capsys):
    notebook = nbformat.v4.new_notebook(
        cells=[
            nbformat.v4.new_code_cell("seed: int = 0  # a seed", metadata={"tags": ["parameters"]}),
            nbformat.v4.new_code_cell("1 / 0"),
        ],
        metadata={"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}},
    )
    source = tmp_path / "broken.ipynb"
    nbformat.write(notebook, source)
    monkeypatch.setattr(paths, "reports", lambda: tmp_path / "reports")
    status, _, err = run(capsys, "run", source)
    assert status == 1 and "ZeroDivisionError" in err
    assert list((tmp_path / "reports" / "failed").glob("broken*.ipynb"))


def test_the_figures_are_listed_and_an_unknown_one_is_a_sentence(capsys, no_traces):
    status, out, _ = run(capsys, "figure", "--list")
    assert status == 0
    assert [line.split()[0] for line in out.splitlines()] == list(figures.list_figures())
    status, _, err = run(capsys, "figure", "haas-fig99")
    assert (status, err.count("\n")) == (2, 1) and "there is no figure 'haas-fig99'" in err
    status, _, err = run(capsys, "figure")
    assert status == 2 and "name a figure, or `all`" in err


@pytest.mark.slow
def test_a_method_of_ones_own_is_benchmarked_as_the_readme_says(tmp_path, capsys, cache):
    before = dict(methods.METHODS)
    blocks = re.findall(r"```python\n(.*?)```", (paths.home() / "README.md").read_text(), re.S)
    (block,) = [block for block in blocks if "register_method" in block]
    assert len(block.strip().splitlines()) <= 10
    plugin, out = tmp_path / "mine.py", tmp_path / "out"
    plugin.write_text(block)
    sizes = ("--population", 32, "--held-out", 8, "--steps", 6, "--attributes", "Smiling")
    chosen = ("--methods", "two a side", "random h", "--plugin", plugin)
    try:
        status, text, _ = run(capsys, "benchmark", "--quick", *sizes, *chosen, "-o", out)
    finally:
        methods.METHODS.clear()
        methods.METHODS.update(before)
    assert status == 0 and "two a side" in text
    assert {
        "edits.parquet",
        "edits.csv",
        "leaderboard.csv",
        "realism.csv",
        "costs.csv",
        "pareto.pdf",
        "strips-Smiling.png",
    } <= {path.name for path in out.iterdir()}
    table = pd.read_parquet(out / "edits.parquet")
    assert set(table.method) == {"two a side", "random h"} and set(table.attribute) == {"Smiling"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--methods", "magic"), "there is no method 'magic'"),
        (("--attributes", "Hat"), "there is no attribute 'Hat'"),
        (("--plugin", "absent.py"), "No such file"),
    ],
)
def test_a_benchmark_of_what_there_is_not_is_a_sentence(arguments, words, no_traces, capsys):
    status, _, err = run(capsys, "benchmark", *arguments, "-o", "none")
    assert (status, err.count("\n")) == (2, 1) and words in err
