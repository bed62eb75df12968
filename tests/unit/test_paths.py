"""What is meant by a path that a user gives: the same in every function and every option that takes one."""

from __future__ import annotations

import inspect
import os
import re
import types
from pathlib import Path

import pytest
import torch
import typer
from planted import planted, planted_boundary

import workbench as wb
from workbench import cli, paths
from workbench.directions.direction import load_direction
from workbench.io import written
from workbench.studio.server import find_editables
from workbench.studio.session import EditSession

ODD = ("a b", "50%", "a%20b", "x#y", "x::y", "größe", "a?b*[c]", "~draft", "-o", "what's")
ADDRESSES = ("memory://a/b.zarr", "s3://bucket/name", "https://host/x.png", "simplecache::s3://bucket/x", "S3://b/x")


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a file `taken`, below which nothing can be found or made, in an empty working folder."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "taken").write_bytes(b"mine")
    (tmp_path / "work").mkdir()
    monkeypatch.setenv("HOME", str(folder))
    monkeypatch.chdir(tmp_path / "work")
    yield folder
    assert sorted(p.name for p in folder.iterdir()) == ["taken"]
    assert not list((tmp_path / "work").iterdir())


def test_a_tilde_is_the_home_folder_and_a_file_address_a_file(home):
    for given in ("~/a b", home / "a b", Path("~/a b"), f"file://{home}/a b", (home / "a b").as_uri()):
        assert paths.place(given) == paths.local(given) == home / "a b", given
    assert paths.local(f"file://localhost{home}/x") == paths.local(f"FILE://{home}/x") == home / "x"
    assert paths.local("~") == home and paths.local("./~/x") == Path("~/x")
    for name in ODD:
        assert paths.place(name) == Path(name) and paths.place(f"~/{name}") == home / name
        assert paths.local((home / name).as_uri()) == home / name


def test_an_address_stays_one_and_is_refused_where_only_files_make_sense():
    for address in ADDRESSES:
        assert paths.is_address(address) and paths.place(address) == address
        with pytest.raises(ValueError, match=re.escape(repr(address))):
            paths.local(address)
        with pytest.raises(ValueError, match="give it as text"):
            paths.place(Path(address.rpartition("::")[2]))
    for text in ("", " ", "file://"):
        with pytest.raises(ValueError, match="is empty"):
            paths.place(text)


def test_an_output_that_cannot_be_written_is_refused_and_nothing_made(home, tmp_path, monkeypatch):
    assert paths.writable("~/new/folder/x.png", suffixes=(".png",)) == home / "new/folder/x.png"
    assert paths.writable("~/taken") == home / "taken", "a file is replaced"
    assert paths.writable("x.PNG", suffixes=(".png",)) == Path("x.PNG")
    for path, options, words in (
        ("~/x.gif", {"suffixes": (".png",)}, "ends in .gif; it can be written as .png"),
        ("~/x", {"suffixes": (".png",)}, "has no suffix"),
        ("~", {}, "is a folder; give the file"),
        ("~/taken", {"folder": True}, "is a file; give the folder"),
        ("~/taken/x", {}, f"since {home}/taken is a file"),
        ("~/taken/x/y", {"folder": True}, f"since {home}/taken is a file"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            paths.writable(path, **options)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(PermissionError, match="read-only"):
        paths.writable("~/new/x")


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    for content in ("first", "second"):
        with written(tmp_path / "new" / "x") as partial:
            partial.write_text(content)
        assert (tmp_path / "new" / "x").read_text() == content
    with pytest.raises(RuntimeError), written(tmp_path / "new" / "x") as partial:
        partial.write_text("ha")
        raise RuntimeError
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["x"] and (tmp_path / "new" / "x").read_text() == "second"


# Every function that takes a path. A new one has to be entered here: the parameters are found by their annotations.


@pytest.fixture(scope="module")
def calls(tiny):
    run = wb.sample(tiny, [0], steps=2, record_h=True, progress=False)
    direction = planted(tiny, run, 1, "d")
    session = EditSession(tiny, run, direction)
    session.set_scale("d", 0.1)
    images = torch.zeros(1, 3, 8, 8)
    picture = wb.plots.image_grid(images)
    return {
        "Benchmark.save.folder": lambda path: wb.Benchmark.save(None, path),
        "Boundary.save.path": lambda path: planted_boundary(tiny, "h", 500).save(path),
        "Direction.save.path": direction.save,
        "DeltaFunction.save.path": lambda path: wb.DeltaFunction(tiny, ((1.0, None),), "a", ()).save(f"{path}.pth"),
        "EditGrid.load.path": wb.EditGrid.load,
        "EditGrid.save.path": wb.EditGrid(images, ("a",), ("b",), {}).save,
        "EditSession.add_image.image": session.add_image,
        "EditStudio.__init__.folder": lambda path: wb.EditStudio(tiny, run, direction, folder=path),
        "Explorer.save_html.path": lambda path: wb.Explorer.save_html(None, f"{path}.html"),
        "Evaluation.write.folder": lambda path: wb.Evaluation.write(None, path),
        "boundary_from_text.generator": lambda path: wb.boundary_from_text("a", source="b", model=tiny, generator=path),
        "convert_checkpoint.file": lambda path: wb.convert_checkpoint(path, "out"),
        "convert_checkpoint.out": lambda path: wb.convert_checkpoint("x.ckpt", path),
        "extract.out": lambda path: wb.extract(tiny, 1, steps=2, out=path),
        "find_from_text.clip": lambda path: wb.find_from_text(None, "a", against="b", clip=path),
        "load_asyrp.path": lambda path: wb.load_asyrp(path, tiny),
        "load_benchmark.folder": wb.load_benchmark,
        "load_boundary.path": wb.load_boundary,
        "load_classifier.source": wb.load_classifier,
        "load_clip.source": wb.load_clip,
        "load_direction.path": wb.load_direction,
        "load_image.path": wb.load_image,
        "load_images.source": wb.load_images,
        "load_images.labels": lambda path: wb.load_images("avataaars", labels=path),
        "load_model.source": wb.load_model,
        "open_recipe.path": wb.open_recipe,
        "open_store.path": wb.open_store,
        "read_facts.notebook": wb.read_facts,
        "run_notebook.name": lambda path: wb.run_notebook(f"{path}.ipynb"),
        "run_notebook.out": lambda path: wb.run_notebook("00_quickstart", out=f"{path}.ipynb"),
        "save_recipe.path": lambda path: wb.save_recipe(session, f"{path}.json"),
        "sweep.source": wb.sweep,
        "train_asyrp.clip": lambda path: wb.train_asyrp(tiny, "a", source="b", clip=path),
        "train_classifier.images": lambda path: wb.train_classifier(path, out="out"),
        "train_classifier.out": lambda path: wb.train_classifier("avataaars", out=path),
        "train_clip.out": lambda path: wb.train_clip(None, out=path),
        "train_model.out": lambda path: wb.train_model(images, out=path),
        "save_figure.folder": lambda path: wb.save_figure(
            "a", picture, title="", caption="", table=None, numbers={}, sources={}, folder=path
        ),
        "plots.animate.path": lambda path: wb.plots.animate(images[None], f"{path}.gif"),
        "plots.figure_files.path": wb.plots.figure_files,
        "plots.save_figure.path": lambda path: wb.plots.save_figure(picture, path),
    }


INSIDE = {"HStore.__init__.path"}  # what open_store made of one


FUNCTIONS = (types.FunctionType, types.MethodType)


def parameters_that_take_a_path() -> list[str]:
    found = []
    for name in wb.__all__:
        public = getattr(wb, name)
        functions = {name: public} if inspect.isfunction(public) else {}
        if inspect.isclass(public) or inspect.ismodule(public):
            members = {key: getattr(public, key) for key in dir(public) if key == "__init__" or key[0] != "_"}
            if inspect.ismodule(public):
                own = [key for key, f in members.items() if getattr(f, "__module__", None) == public.__name__]
                members = {key: members[key] for key in getattr(public, "__all__", own)}
            functions = {
                f"{name}.{key}": f for key, f in members.items() if inspect.isfunction(f) or inspect.ismethod(f)
            }
        for key, function in functions.items():
            parameters = inspect.signature(function).parameters.values()
            found += [f"{key}.{p.name}" for p in parameters if "Path" in str(p.annotation)]
    return [name for name in found if not name.startswith("paths.") and name not in INSIDE]


PARAMETERS = parameters_that_take_a_path()


@pytest.mark.parametrize("parameter", PARAMETERS)
def test_every_function_takes_a_home_folder_and_a_file_address_and_refuses_others(parameter, calls, home):
    call = calls[parameter]
    for given in ("~/taken/absent", f"file://{home}/taken/absent"):
        with pytest.raises((OSError, ValueError)) as caught:
            call(given)
        assert f"{home}/taken" in str(caught.value) and "~" not in str(caught.value)
    if parameter not in ("extract.out", "open_store.path"):
        with pytest.raises(ValueError, match="memory://there/absent[^ ]* is an address"):
            call("memory://there/absent")


def test_no_function_is_left_in_the_table_that_there_is_no_more(calls):
    assert set(calls) == set(PARAMETERS)


# Every option that takes a path, likewise; those that take other texts are named, so that a new one can't be forgotten.

OTHER = set(
    "--preset --name --device --gpu --region --attributes --methods --scheduler --parameter --profile --only --against "
    "--prompt --negative-prompt --tap --text --source text names".split()
)
COMMANDS = {
    "convert": "x.ckpt out",
    "verify": "MODEL",
    "sample": "MODEL",
    "taps": "MODEL",
    "extract": "MODEL",
    "plan": "",
    "find pca": "MODEL",
    "find jacobian": "MODEL --t 5",
    "find scores": "MODEL --attributes Smiling",
    "find labels": "MODEL --attributes Smiling",
    "find text": "MODEL --text face",
    "boundary fit": "MODEL --t 500",
    "boundary text": "face --model MODEL",
    "boundary import": "x.sav --model MODEL --t 5 --space h",
    "boundary edit": "MODEL --boundaries BOUNDARY --images IMAGES",
    "benchmark": "MODEL",
    "figure": "haas-fig2a",
    "studio": "--model MODEL",
    "explore": "STORE --model MODEL",
    "edit": "RECIPE --model MODEL",
    "train": "IMAGES -o out",
    "evaluate-model": "MODEL",
    "train-classifier": "IMAGES -o out",
    "train-clip": "IMAGES -o out",
    "data": "eurosat IMAGES",
    "run": "00_quickstart",
    "sweep": "x.yaml",
}
"""Commands that take texts, with arguments that make sense but for the one that is tried."""

BESIDE = {"extract --labels": ("--images", "IMAGES")}
"""What an option needs beside it."""


def texts_of(group, command: tuple[str, ...] = ()) -> list[tuple[str, str, int]]:
    """Command, name and place of every argument and option that takes a text; options have no place."""
    found = []
    for name, inside in group.commands.items():
        words = (*command, name)
        if hasattr(inside, "commands"):
            found += texts_of(inside, words)
            continue
        places = [parameter for parameter in inside.params if parameter.param_type_name == "argument"]
        for parameter in inside.params:
            kind = parameter.type_descriptor
            if kind.annotation in (str, list[str]) and kind.parameter_info.parser is None:
                place = places.index(parameter) if parameter in places else -1
                found.append((" ".join(words), parameter.opts[-1], place))
    return found


TEXTS = [text for text in texts_of(typer.main.get_command(cli.app)) if text[1] not in OTHER]


@pytest.mark.parametrize(("command", "option", "place"), TEXTS)
def test_every_option_takes_a_home_folder_and_says_in_one_sentence_what_is_wrong_there(
    command, option, place, home, capsys, tiny, tiny_folder, tmp_path
):
    arguments = COMMANDS[command].split()
    absent = "~/taken/absent" + (".ipynb" if command == "run" else "")
    if place >= 0:
        arguments[place] = absent
    else:
        arguments += [*BESIDE.get(option, BESIDE.get(f"{command} {option}", ())), option, absent]
    made = {"MODEL": tiny_folder, "IMAGES": paths.data() / "avataaars"}
    if "BOUNDARY" in arguments:
        made["BOUNDARY"] = planted_boundary(tiny, "h", 500).save(tmp_path / "b.safetensors")
    if "STORE" in arguments:
        made["STORE"] = wb.extract(wb.load_model(tiny_folder), 2, steps=2, out=tmp_path / "s", progress=False).path
    if "RECIPE" in arguments:
        run = wb.sample(tiny, [0], steps=2, record_h=True, progress=False)
        session = EditSession(tiny, run, planted(tiny, run, 1, "d"))
        session.set_scale("d", 0.1)
        made["RECIPE"] = wb.save_recipe(session, tmp_path / "r.json")
    status = cli.main([*command.split(), *(str(made.get(word, word)) for word in arguments)])
    out, err = capsys.readouterr()
    assert (status, out, err.count("\n")) == (2, "", 1), (out, err)
    assert err.startswith("workbench: ") and f"{home}/taken" in err


def test_no_command_is_left_in_the_table_that_there_is_no_more():
    assert set(COMMANDS) == {command for command, *_ in TEXTS}


# Odd characters, and names that become those of files.


def test_files_and_stores_of_odd_names_are_written_and_read_again(tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = wb.sample(tiny, [0], steps=2, record_h=True, progress=False)
    direction = planted(tiny, run, 1, "d")
    for name in ODD:
        store = wb.extract(tiny, 1, steps=2, out=f"{name}.zarr", progress=False)
        assert store.path == Path(f"{name}.zarr") and len(wb.open_store(store.path)) == 1
        assert wb.extract(tiny, 1, steps=2, out=f"{name}.zarr", progress=False).cached
        path = direction.save(f"{name}/{name}.safetensors")
        assert path == Path(name, f"{name}.safetensors") and load_direction(str(path)).name == "d"
        assert len(find_editables(tiny, [name], run.timesteps)) == 1


def test_a_name_is_one_part_of_a_file_name_and_two_names_are_two():
    for name in ("Smiling", "PC-1-(a)", "größe", "a_b.c"):
        assert paths.file_name(name) == name
    assert paths.file_name("PC 1 t=500") == "PC-1-t500"
    assert re.fullmatch(r"Hair-Long-[0-9a-f]{6}", paths.file_name("Hair/Long"))
    names = [
        "Hair/Long",
        "Hair-Long",
        "Hair\\Long",
        "Hair:Long",
        "..",
        ".",
        "",
        "/",
        "../../x",
        "\0",
        "a\nb",
        "é" * 300,
    ]
    made = [paths.file_name(name) for name in names]
    assert len(set(made)) == len(names)
    for each in made:
        assert each == Path(each).name and not each.startswith(".") and len(each.encode()) < 120 and each.isprintable()


def test_a_recipe_of_any_names_is_written_beside_and_opens_again(tiny, tmp_path):
    run = wb.sample(tiny, [0], steps=2, record_h=True, progress=False)
    names = ["Hair/Long", "../x", "é" * 300]
    session = EditSession(tiny, run, [planted(tiny, run, k, name) for k, name in enumerate(names)])
    for name in session.directions:
        session.set_scale(name, 0.1)
    path = wb.save_recipe(session, tmp_path / "50% é.json")
    assert {p.parent for p in tmp_path.rglob("*.safetensors")} == {tmp_path / "50% é.parts"}
    assert len(wb.open_recipe(path, model=tiny).state.scales) == 3
