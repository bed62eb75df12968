"""The explorer without a browser: what its script is given, and what a selection leads to."""

from __future__ import annotations

import atexit
import base64
import io
import json
import re
import threading

import nbformat
import numpy as np
import pandas as pd
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output
from PIL import Image
from planted import planted
from stores import make_store

import workbench as wb
from workbench.analysis.maps import Map
from workbench.editing.render import EditGrid, render
from workbench.report import alive
from workbench.report.pages import export_html
from workbench.studio import payload
from workbench.studio.explorer import Explorer
from workbench.studio.worker import Worker

STEPS, N = 4, 12


@pytest.fixture(scope="module")
def store(tiny, tmp_path_factory):
    return wb.extract(tiny, N, steps=STEPS, record_x=True, out=tmp_path_factory.mktemp("s") / "a.zarr", progress=False)


@pytest.fixture(scope="module")
def scores(store):
    values = np.linspace(0, 1, N)
    table = pd.DataFrame({"bright": values, "dark_hair": values < 0.5}, index=list(store.seeds))
    return table.assign(some=np.where(np.arange(N) < 3, np.nan, values))


@pytest.fixture
def live(store, scores, tiny, tmp_path):
    made = wb.explore(store, scores=scores, model=tiny)
    made.folder = tmp_path / "directions"
    assert made.wait()
    return made


def numbers(text, dtype):
    return np.frombuffer(base64.b64decode(text), dtype=dtype)


def pixels(address):
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


# What the script is given


def test_points_keep_their_shape_within_a_square():
    points = np.array([[0.0, 0.0], [10.0, 1.0], [4.0, 5.0], [2.0, 2.0]])
    made = Explorer([Map("one", points, ("x", "y"))], names=[7, 8, 9, 300_000])
    (packed,) = json.loads(made.data)["maps"]
    within = numbers(packed["points"], np.uint16).reshape(4, 2) / 32767.5 - 1
    np.testing.assert_allclose(within * packed["half"] + packed["centre"], points, atol=1e-3)
    np.testing.assert_allclose(made.within("one", points), within, atol=1e-4)
    assert numbers(json.loads(made.data)["ids"], np.uint32).tolist() == [7, 8, 9, 300_000]
    huge = json.loads(Explorer([Map("one", points, ("x", "y"))], names=[0, 1, 2, 2**63]).data)
    assert huge["ids"] is None and huge["names"][-1] == f"seed {2**63}"


def test_colours_are_numbers_or_categories_and_what_is_missing_is_told(store, scores):
    colours = {each["name"]: each for each in json.loads(wb.explore(store, scores=scores).data)["colours"]}
    bright, dark, some = (colours[name] for name in ("bright", "dark hair", "some"))
    np.testing.assert_allclose(numbers(bright["values"], np.uint16) / 65534, scores.bright, atol=1e-4)
    assert (bright["low"], bright["high"], bright["note"]) == (0, 1, "")
    assert dark["categories"] == ["False", "True"] and numbers(dark["values"], np.uint16).tolist() == [1] * 6 + [0] * 6
    assert (numbers(some["values"], np.uint16) == 65535).tolist() == [True] * 3 + [False] * 9
    assert some["note"] == "grey: 3 of 12 samples have no value"
    norms = next(each for name, each in colours.items() if name.startswith("norm of h"))
    t = int(re.search(r"t = (\d+)", norms["name"])[1])
    np.testing.assert_allclose([norms["low"], norms["high"]], np.quantile(np.linalg.norm(store.at(t), axis=1), [0, 1]))


def test_projections_and_distances_are_those_of_directions_and_boundaries(store, tiny):
    run = wb.sample(tiny, [0, 1], steps=STEPS, record_h=True, progress=False)
    direction = planted(tiny, run, 1, "smile")
    boundary = wb.fit_boundary(store, np.arange(N) % 2, t=store.timesteps[1])
    colours = json.loads(wb.explore(store, directions=[direction], boundaries=[boundary]).data)["colours"]
    along, apart = colours[-2:]
    t = int(re.search(r"t = (\d+)", along["name"])[1])
    i = direction.timesteps.index(t)
    expected = store.at(t) @ direction.unit[i].flatten().numpy() / float(direction.sigma[i])
    assert along["high"] - along["low"] == pytest.approx(np.ptp(expected), rel=1e-3)
    distances = boundary.distance(store.at(boundary.t))
    assert (apart["low"], apart["high"]) == pytest.approx((distances.min(), distances.max()), rel=1e-3)


def test_thumbnails_are_the_images_each_in_its_place(monkeypatch):
    monkeypatch.setattr(payload, "_SHEET", 32)  # four pictures a row, so that there are several sheets
    shades = np.linspace(-1, 1, 20, dtype=np.float32)
    images = np.broadcast_to(shades[:, None, None, None], (20, 3, 8, 8))
    made = payload.thumbnails(lambda rows: images[rows], 20)
    assert (made["width"], made["columns"], made["per"], len(made["sheets"])) == (8, 4, 16, 2)
    for i, shade in enumerate(shades):
        sheet, k = pixels(made["sheets"][i // 16]), i % 16
        assert sheet[k // 4 * 8 + 4, k % 4 * 8 + 4] == pytest.approx([(shade + 1) * 127.5] * 3, abs=4)
    monkeypatch.setattr(payload, "_PICTURE_BYTES", 2000)
    noise = np.random.default_rng(0).uniform(-1, 1, (200, 3, 64, 64)).astype(np.float32)
    assert payload.thumbnails(lambda rows: noise[rows], 200)["width"] < 64


def test_a_strip_holds_an_edit_and_the_random_control(tiny):
    run = wb.sample(tiny, [3, 4], steps=STEPS, record_h=True, progress=False)
    smile = planted(tiny, run, 1, "smile")
    edits = {"smile": smile, "hair": planted(tiny, run, 2, "hair"), "random": wb.random_like(smile, seed=0)}
    grid = render(run, edits, [-1, 0, 1], progress=False)
    first, second = payload.strips_of(grid)
    assert first["lines"] == ["smile", "random"] and second["lines"] == ["hair", "random"]
    assert (first["samples"], first["start"]) == (["seed 3", "seed 4"], 1)
    sheet = pixels(first["sheet"])
    assert sheet.shape == (4 * 8, 3 * 8, 3)
    assert not np.array_equal(sheet[:8, 16:], sheet[:8, 8:16])
    other = EditGrid(grid.images.flip(1), grid.row_labels, grid.column_labels, {})
    assert np.array_equal(pixels(payload.strips_of(other)[0]["sheet"])[:8, :8], sheet[:8, 16:])


# From a selection to a direction


def test_a_selection_leads_to_a_picture_and_to_what_there_is_to_say(live, tiny, store):
    live.select(range(6))
    assert live.wait() and live.status == ""
    found = live.selection
    expected = wb.find_from_selection(store, range(6), t=live.t, progress=False)
    assert np.array_equal(found.direction.unit, expected.direction.unit)
    rows = dict(live.found["rows"])
    assert rows["samples"] == "A 6, B 6" and f"t = {live.t}, n = 12" in rows["held-out separability"]
    assert live.found["warning"].startswith("dark_hair alone") or live.found["warning"].startswith("bright alone")
    before, after = (pixels(address) for address, _ in live.found["pictures"])
    np.testing.assert_array_equal(before, wb.plots.to_pixels(live.desk.runs.images[:1])[0])
    assert (before != after).any()
    assert not set(live.desk.runs.seeds) & set(store.seeds)


def test_another_selection_stops_the_one_that_is_being_measured(live, monkeypatch):
    find, started = live.desk.find, threading.Event()

    def slow(a, b, progress, **options):
        if len(a) == 6:
            started.set()
            progress.wait(60)
        return find(a, b, progress, **options)

    monkeypatch.setattr(live.desk, "find", slow)
    live.select(range(6))
    assert started.wait(20)
    live.select(range(5))
    assert live.wait(20) and dict(live.found["rows"])["samples"] == "A 5, B 7"


def test_pictures_are_rendered_while_a_direction_is_measured_and_clearing_ends_it(live, monkeypatch):
    started = threading.Event()

    def slow(a, b, progress, **options):
        started.set()
        progress.wait(60)

    monkeypatch.setattr(live.desk, "find", slow)
    live.select(range(6))
    assert started.wait(20) and not live.wait(0.01)
    live.view = {**live.view, "pinned": 2}
    live._on_message(live, {"ask": "predict"}, [])
    assert live._worker.wait(20) and len(live.strips) == 1
    live.say("finding the direction")
    live.select([])
    assert live.wait(20) and live.status == "" and live.selection is None


def test_a_worker_stops_before_the_interpreter_ends(monkeypatch):
    ends, started, stopped = [], threading.Event(), threading.Event()
    monkeypatch.setattr(atexit, "register", ends.append)

    def task(progress):
        started.set()
        try:
            progress.wait(60)
        finally:
            stopped.set()

    worker = Worker(lambda part: None, lambda sentence: None)
    worker.submit(task)
    assert started.wait(20)
    ends[0]()
    assert stopped.is_set() and worker.wait(0)


def test_a_button_renders_beside_a_control_saves_and_predicts(live, tiny):
    live.select(range(6), [7, 8, 9, 10])
    live.view = {**live.view, "pinned": 2}
    for what in ("render", "predict", "save"):
        live._on_message(live, {"ask": what}, [])
    assert live.wait()
    edited, predicted = live.strips
    assert edited["lines"] == ["selection", "random control"] and edited["columns"][edited["start"]] == "0"
    assert predicted["columns"] == [f"t = {t}" for t in live.desk.store.timesteps]
    again = wb.sample(tiny, [live.names[2]], steps=STEPS, record_x=True, progress=False)
    last = tiny.schedule.predict_x0(again.x_at(0), tiny(again.x_at(0), 0), 0)
    np.testing.assert_array_equal(pixels(predicted["sheet"])[:, -8:], wb.plots.to_pixels(last)[0])
    (file,) = live.folder.iterdir()
    saved = wb.load_direction(file, model=tiny)
    assert saved.provenance["parameters"]["selection"]["b"] == [7, 8, 9, 10] and live.status == f"saved {file}"
    live.method = "svm"
    live._on_message(live, {"ask": "save"}, [])
    live._on_message(live, {"ask": "render"}, [])
    assert live.wait() and not live.problem
    assert len(list(live.folder.iterdir())) == 2 and len(live.strips) == 3
    live._on_message(live, {"ask": "save"}, [])
    assert live.wait() and live.status.startswith("replaced ")
    live.name, live.method = "later", "mean"  # a name that is given after the direction was found
    live._on_message(live, {"ask": "save"}, [])
    assert live.wait() and live.status.endswith("tiny-later.safetensors")
    assert wb.load_direction(live.folder / "tiny-later.safetensors").name == "later"


def test_what_can_not_be_done_is_a_sentence_at_the_bottom(live):
    live._on_message(live, {"ask": "render"}, [])
    assert live.wait() and live.problem and "select at least 2" in live.status
    live.select([3])
    assert live.wait() and live.problem and "A has 1 sample" in live.status
    live.view = {**live.view, "pinned": -1}
    live._on_message(live, {"ask": "predict"}, [])
    assert live.wait() and "click one first" in live.status
    live.method = "svm"
    live.select([3, 4])
    live._on_message(live, {"ask": "render"}, [])
    assert live.wait() and live.problem and "at least 3 samples" in live.status
    live.select(range(5))
    assert live.wait() and not live.problem


def test_bad_input_is_refused_in_a_sentence(store, scores, tiny, make_unet, tmp_path):
    rng = np.random.default_rng(0)
    few = make_store(tmp_path / "few.zarr", rng.standard_normal((3, 2, 4, 2, 2)))
    bare = make_store(tmp_path / "bare.zarr", rng.standard_normal((6, 2, 4, 2, 2)))
    for message, call in (
        ("there are 3", lambda: wb.explore(few)),
        ("all 12 values of 'none' are NaN", lambda: wb.explore(store, scores=scores.assign(none=np.nan))),
        ("12 categories", lambda: wb.explore(store, scores=scores.assign(name=[f"n{i}" for i in range(N)]))),
        ("the scores are 5", lambda: wb.explore(store, scores=pd.DataFrame({"a": np.ones(5)}).to_numpy()[:, 0])),
        ("timestep 3 was not visited", lambda: wb.explore(store, timesteps=[3])),
        ("'other' has other samples", lambda: wb.explore({"h": store, "other": few})),
        ("bare.zarr belongs to the model", lambda: wb.explore(bare, model=tiny)),
        ("no x", lambda: wb.explore(bare, with_x=True)),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    (note,) = json.loads(wb.explore(bare).data)["notes"]
    assert "keeps no images" in note


def test_a_page_that_nobody_would_wait_for_is_refused(monkeypatch, store):
    monkeypatch.setattr(payload, "MOST_BYTES", 1000)
    with pytest.raises(ValueError, match="maps of 12 samples take"):
        wb.explore(store)


# In a page without a kernel


def test_a_report_keeps_the_widgets_that_it_shows_and_that_need_no_kernel():
    def model(**state):
        return {"state": state}

    output = new_output("display_data", data={alive.VIEW: {"model_id": "shown"}})
    other = new_output("display_data", data={alive.VIEW: {"model_id": "bar"}})
    notebook = new_notebook(cells=[new_code_cell("", outputs=[output, other])])
    states = {"shown": model(offline=True, data="1"), "hidden": model(offline=True), "bar": model(value=3)}
    notebook.metadata["widgets"] = {alive._STATE: {"state": states}}
    alive.keep_shown(notebook)
    assert alive.widgets_of(notebook) == {"shown": {"offline": True, "data": "1"}}
    notebook.cells[0].outputs = [other]
    alive.keep_shown(notebook)
    assert "widgets" not in notebook.metadata


def test_explorers_beyond_what_a_page_holds_are_a_sentence(monkeypatch, tmp_path):
    cells, states = [], {}
    for name in ("first", "second", "third"):
        cells.append(new_code_cell("", outputs=[new_output("display_data", data={alive.VIEW: {"model_id": name}})]))
        states[name] = {"state": {"offline": True, "_esm": "script", "data": name * (1 if name == "third" else 10_000)}}
    notebook = new_notebook(cells=cells)
    notebook.metadata["widgets"] = {alive._STATE: {"state": states}}
    nbformat.write(notebook, tmp_path / "three.ipynb")
    monkeypatch.setattr(alive, "MOST_BYTES", 80_000)
    page = export_html(tmp_path / "three.ipynb", tmp_path / "three.html", footer={}).read_text(encoding="utf-8")
    assert "firstfirst" in page and '"data": "third"' in page and "secondsecond" not in page
    assert "Maps of 0 MB are left out" in page and "save_html" in page


def test_a_saved_page_asks_for_nothing_and_no_text_in_it_ends_a_script(store, tmp_path):
    made = Explorer([Map("</script><b>", np.random.default_rng(0).normal(size=(N, 2)), ("x", "y"))], names=range(N))
    page = made.save_html(tmp_path / "page.html").read_text(encoding="utf-8")
    assert "</script><b>" not in page and not re.search(r"<(script|link|img)[^>]*\s(src|href)=.(https?:)?//", page)
    state = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page, re.S)[1])
    assert state["data"] == made.data and "class Explorer" in state["_esm"]
