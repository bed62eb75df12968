"""The edit studio's widgets without a browser: controls are traits, and so is all that shows."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from planted import planted, planted_boundary
from small_models import COLOURS
from test_session import T

import workbench as wb
from workbench.report import plots
from workbench.studio import widgets
from workbench.studio.recipe import read_recipe
from workbench.studio.widgets import EditStudio
from workbench.studio.worker import Worker

STEPS = 6


@pytest.fixture(scope="module")
def run(tiny):
    return wb.sample(tiny, range(4), steps=STEPS, record_h=True, progress=False)


@pytest.fixture(scope="module")
def parts(tiny, run):
    return [planted(tiny, run, 1, "smile"), planted(tiny, run, 2, "hair"), planted_boundary(tiny, "x", T)]


@pytest.fixture
def studio(tiny, run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(widgets, "REST", 0.0)
    classifier = wb.load_classifier(
        lambda images: images.mean(dim=(1, 2, 3))[:, None].sigmoid(), attributes=["bright"], device="cpu"
    )
    made = EditStudio(tiny, run, parts, classifier=classifier, folder=tmp_path / "edits")
    assert made.wait()
    return made


def pixels(words: str) -> np.ndarray:
    """The first picture in a piece of HTML."""
    data = base64.b64decode(re.search(r"data:image/png;base64,([^\"]+)", words)[1])
    return np.asarray(Image.open(io.BytesIO(data)))


def shown(studio) -> np.ndarray:
    assert studio.wait()
    return pixels(studio.after.value)


def expected(studio) -> np.ndarray:
    return plots.to_pixels(studio.session.render().after[None])[0]


def test_a_sentence_becomes_a_slider(tiny, run, parts, squares, tmp_path):
    """By the scores of the store's samples; what can't be found is said in the status."""
    store = wb.extract(tiny, 16, steps=STEPS, out=tmp_path / "store.zarr", progress=False)
    clip = wb.load_clip(squares[1], device="cpu")
    with pytest.raises(ValueError, match="store="):
        EditStudio(tiny, run, parts, clip=clip)
    studio = EditStudio(tiny, run, parts, store=store, clip=clip, folder=tmp_path / "edits")
    scores = clip.scores(store.images[:], [f"a {name} square" for name in COLOURS])
    order = dict(zip(COLOURS, scores.T, strict=True))
    text, against = next((a, b) for a in COLOURS for b in COLOURS if a != b and 2 <= (order[a] > order[b]).sum() <= 14)
    studio.words.text.value, studio.words.against.value = f"a {text} square", f"a {against} square"
    studio.words.find.click()
    assert studio.wait() and f"a {text} square" in studio.scales
    before = shown(studio)
    studio.scales[f"a {text} square"].value = 3.0
    assert (shown(studio) != before).any()
    studio.words.text.value = "zebra"
    studio.words.find.click()
    assert studio.wait() and "zebra" in studio.status.value and "alert" in studio.status.value


def test_a_slider_changes_the_image_to_what_the_session_renders(studio):
    before = shown(studio)
    np.testing.assert_array_equal(before, expected(studio))
    studio.scales["smile"].value = 1.5
    after = shown(studio)
    assert (after != before).any()
    np.testing.assert_array_equal(after, expected(studio))
    assert "smile +1.5 sigma" in studio.after.value and f"({STEPS} steps)" in studio.after.value
    assert "bright" in studio.read_out.shown.value


def test_every_control_reaches_the_session_and_has_a_name_for_those_who_do_not_see_it(studio):
    controls = [*studio.scales.values(), *studio.distances.values(), studio.window, studio.eta, *studio.leave.values()]
    controls += [*studio.samples.children, *studio.against.values(), studio.predictions.timestep]
    assert all(control.description for control in controls)
    studio.scales["hair"].value = -1.0
    studio.against["hair", "smile"].value = True
    studio.window.value = (studio.session.timesteps[1], studio.session.timesteps[4])
    studio.process.value = "asymmetric"
    studio.eta.value = 0.5
    studio.samples.children[2].click()
    state = studio.session.state
    assert state.scales == {"hair": -1.0} and state.against == {"hair": ("smile",)}
    assert state.t_range == (studio.session.timesteps[1], studio.session.timesteps[4])
    assert (state.process, state.eta, state.sample) == ("asymmetric", 0.5, 2)
    np.testing.assert_array_equal(shown(studio), expected(studio))


def test_the_controls_follow_undo_redo_reset_and_what_was_changed_in_python(studio):
    assert studio.undo.disabled and studio.redo.disabled
    studio.scales["smile"].value = 2.0
    assert studio.wait() and not studio.undo.disabled
    studio.undo.click()
    assert studio.scales["smile"].value == 0.0 and not studio.redo.disabled
    studio.redo.click()
    assert studio.scales["smile"].value == 2.0
    studio.reset.click()
    assert studio.scales["smile"].value == 0.0 and not studio.session.state.edits
    studio.session.set_scale("smile", 6.0)
    studio.session.set_window(700, 100)
    studio.refresh()
    assert studio.scales["smile"].value == 6.0
    high, low = studio.window.value
    assert high <= 700 and low >= 100
    np.testing.assert_array_equal(shown(studio), expected(studio))


def test_a_single_step_frees_the_boundaries_sliders_and_holds_the_others(studio):
    (name,) = studio.distances
    assert studio.distances[name].disabled and not studio.scales["smile"].disabled
    studio.process.value = "single-step"
    assert studio.wait() and studio.scales["smile"].disabled and not studio.distances[name].disabled
    assert studio.distances[name].value == pytest.approx(studio.session.distances()[name])
    studio.distances[name].value = 3.0
    assert studio.session.state.distances == {name: 3.0}
    np.testing.assert_array_equal(shown(studio), expected(studio))
    studio.leave[name].click()
    assert not studio.session.state.edits


def test_a_grid_of_a_single_step_reaches_as_far_as_each_boundarys_slider(tiny, run, parts, monkeypatch):
    both = [planted_boundary(tiny, space, 498, seed=seed) for seed, space in enumerate("hx")]
    studio = EditStudio(tiny, run, [parts[0], *both])
    studio.process.value = "single-step"
    assert studio.wait()
    grid, asked = studio.session.grid, []
    monkeypatch.setattr(studio.session, "grid", lambda controls, **on: asked.append(controls) or grid(controls, **on))
    for reach, slider in zip((20.0, 50.0), studio.distances.values(), strict=True):
        slider.min, slider.max = -reach, reach
    studio.views.selected_index = 2
    assert studio.wait()
    reaches = [slider.max for slider in studio.distances.values()]
    assert reaches == [20.0, 50.0] and [max(values) for values in asked[-1].values()] == [50.0, 20.0]


def test_views_are_computed_when_they_are_looked_at(studio):
    studio.scales["smile"].value = 1.0
    for view, widget in enumerate((studio.strip.shown, studio.grid.shown, studio.predictions.shown), start=1):
        assert widget.value == ""
        studio.views.selected_index = view
        assert studio.wait() and "<img" in widget.value
        assert widget.value.count("<img") == widget.value.count('alt="')
    assert studio.strip.shown.value.count("<img") == 7 and studio.grid.shown.value.count("<img") == 25
    t = studio.session.timesteps[1]
    studio.predictions.timestep.value = t
    predicted = studio.session.predictions([t])
    np.testing.assert_array_equal(pixels(studio.predictions.predicted.value), plots.to_pixels(predicted.before)[0])


def test_the_map_shows_the_samples_and_the_edits_path_and_selected_ones_are_edited(studio):
    studio.scales["smile"].value = 2.0
    studio.views.selected_index = 4
    assert studio.wait() and studio.map.explorer in studio.map.children
    explorer = studio.map.explorer
    (only,) = explorer.maps
    (path,) = explorer.paths.values()
    assert len(path) == 5
    assert path[0] == pytest.approx(explorer.within(only.name, only.points)[0], abs=1e-3)
    assert np.hypot(*np.subtract(path[-1], path[0])) > 1e-3
    explorer._on_message(explorer, {"ask": "take"}, [])
    assert studio.wait() and "no sample is selected" in explorer.status
    explorer.select([1, 3])
    explorer._on_message(explorer, {"ask": "take"}, [])
    assert studio.wait() and studio.session.state.sample == 1
    studio.session.add_seeds([50])
    studio.refresh()
    assert studio.wait() and studio.map.explorer is not explorer and explorer.comm is None, "the old one is closed"


def test_selected_samples_are_edited_as_the_store_has_them_also_beside_an_inverted_image(tiny, parts, tmp_path):
    store = wb.extract(tiny, 6, steps=STEPS, out=tmp_path / "a.zarr", progress=False)
    image = torch.from_numpy(store.images[5:]).clamp(-1, 1)
    studio = EditStudio(tiny, wb.invert(tiny, image, steps=STEPS, progress=False), parts[:2], store=store)
    studio.views.selected_index = 4
    assert studio.wait()
    studio.map.explorer.select([2, 3])
    studio.map.explorer._on_message(studio.map.explorer, {"ask": "take"}, [])
    assert studio.map.explorer.wait()
    before = studio.session.render().before.numpy()
    np.testing.assert_allclose(before, store.images[2], atol=1e-3)


def test_a_direction_of_the_map_gets_a_slider(tiny, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(widgets, "REST", 0.0)
    store = wb.extract(tiny, 10, steps=STEPS, out=tmp_path / "a.zarr", progress=False)
    runs = wb.sample(tiny, [20, 21], steps=STEPS, progress=False)
    studio = EditStudio(tiny, runs, parts[:2], store=store, folder=tmp_path)
    studio.views.selected_index = 4
    assert studio.wait()
    explorer = studio.map.explorer
    explorer.select(range(4))
    for ask in ("studio", "take"):
        explorer._on_message(explorer, {"ask": ask}, [])
    assert studio.wait() and list(studio.scales) == ["smile", "hair", "selection"]
    assert [studio.session.label(k) for k in range(2, 6)] == [f"seed {k}" for k in range(4)]
    studio.scales["selection"].value = 2.0
    np.testing.assert_array_equal(shown(studio), expected(studio))
    assert list(explorer.paths) == [explorer.maps[1].name]


def test_a_dropped_image_joins_the_samples_and_what_is_none_is_a_sentence(studio):
    data = io.BytesIO()
    Image.new("RGB", (8, 8), "teal").save(data, format="PNG")
    studio._on_drop(studio.drop, {"name": "<b>teal</b>.png"}, [data.getvalue()])
    assert studio.wait() and len(studio.samples.children) == 5 and studio.session.state.sample == 4
    assert "&lt;b&gt;teal" in studio.status.value and studio.eta.disabled
    studio._on_drop(studio.drop, {"name": "x.png"}, [b"not an image"])
    assert studio.wait() and 'role="alert"' in studio.status.value and "cannot be decoded" in studio.status.value
    assert len(studio.samples.children) == 5


def test_what_is_edited_is_saved_under_a_name_without_folders(studio):
    studio.save_recipe.click()
    assert studio.wait() and "nothing is edited" in studio.status.value
    studio.scales["smile"].value = 1.5
    for button in (studio.save_figure, studio.save_recipe, studio.save_direction):
        button.click()
    assert studio.wait()
    names = {path.name for path in studio.folder.iterdir()}
    assert names == {"edit.pdf", "edit.svg", "edit.png", "edit.json", "edit.parts", "edit.safetensors"}
    studio.file_name.value = "../edit"
    studio.save_recipe.click()
    assert studio.wait() and "without folders" in studio.status.value
    studio.folder, studio.file_name.value = studio.folder / "edit.json", "edit"
    studio.save_recipe.click()
    assert studio.wait() and "alert" in studio.status.value and "edit.json" in studio.status.value


def test_what_is_saved_is_decided_at_the_click(studio):
    """The worker may be inverting an image; sliders and the name stay alive."""
    busy, free = threading.Event(), threading.Event()
    studio.worker.submit(lambda _: (busy.set(), free.wait(30)))
    assert busy.wait(30)
    studio.scales["smile"].value = 1.0
    studio.file_name.value = "first"
    studio.save_recipe.click()
    studio.scales["smile"].value = -3.0
    studio.file_name.value = "second"
    free.set()
    assert studio.wait()
    assert [path.name for path in studio.folder.glob("*.json")] == ["first.json"]
    assert read_recipe(studio.folder / "first.json")["directions"][0]["scale"] == 1.0
    studio.file_name.value = "first"
    studio.save_recipe.click()
    assert studio.wait() and "replaced first.json" in studio.status.value


def test_a_preview_is_shown_though_the_slider_moves_on(studio, monkeypatch):
    """Else nothing would be seen while it is pulled."""
    seen, moves, render, show = [], [], studio.session.render, studio._show
    studio.session._plains.clear()  # as after another sample was picked: it has to be made first

    def moving(**options):
        if options.get("preview") and len(moves) < 3:
            moves.append(studio.scales["smile"].value)
            studio.scales["smile"].value += 0.1
        return render(**options)

    monkeypatch.setattr(studio.session, "render", moving)
    monkeypatch.setattr(studio, "_show", lambda rendering: (seen.append(rendering), show(rendering)))
    studio.scales["smile"].value = 1.0
    assert studio.wait()
    assert sum(rendering.preview for rendering in seen) == 4
    assert not seen[-1].preview and seen[-1].state.scales["smile"] == pytest.approx(1.3)


def test_a_preview_of_a_sample_that_was_left_is_stopped(studio, monkeypatch):
    seen, render = [], studio.session.render

    def leaving(**options):
        if options.get("preview") and studio.session.state.sample == 0:
            studio.session.pick(1)
        return render(**options)

    monkeypatch.setattr(studio.session, "render", leaving)
    monkeypatch.setattr(studio, "_show", seen.append)
    studio.scales["smile"].value = 1.0
    assert studio.wait() and not seen


def test_a_view_that_cannot_be_made_is_empty_and_its_sentence_goes_with_it(tiny, run, parts, tmp_path, monkeypatch):
    monkeypatch.setattr(widgets, "REST", 0.0)
    twins = [parts[2], replace(parts[2], t=166)]
    studio = EditStudio(tiny, run, twins, folder=tmp_path)
    first, second = studio.distances
    studio.distances[first].value = 2.0
    studio.views.selected_index = 1
    studio.strip.choosers["along"].value = first
    assert studio.wait() and "img" in studio.strip.shown.value
    studio.strip.choosers["along"].value = second
    assert studio.wait() and studio.strip.shown.value == "" and "is at one timestep" in studio.status.value
    studio.strip.choosers["along"].value = first
    assert studio.wait() and "img" in studio.strip.shown.value and "alert" not in studio.status.value


def test_a_store_of_other_samples_is_refused(tiny, run, parts, tmp_path, make_unet):
    options = {"steps": STEPS, "progress": False}
    own = wb.extract(tiny, 4, out=tmp_path / "own.zarr", **options)
    assert EditStudio(tiny, run, parts, store=own).wait()
    other = wb.wrap(make_unet(seed=1), tiny.schedule, name="tiny", device="cpu")
    for model, changed, message in (
        (other, {}, "another model, tap or schedule"),
        (tiny.tapped("before"), {}, "another model, tap or schedule"),
        (tiny, {"steps": STEPS + 1}, "other timesteps"),
        (tiny, {"eta": 0.0}, "another eta"),
    ):
        store = wb.extract(model, 4, out=tmp_path / f"{message}-{model.tap}.zarr", **(options | changed))
        with pytest.raises(ValueError, match=message):
            EditStudio(tiny, run, parts, store=store)


def test_a_recipe_is_loaded_and_brings_its_own_sliders(studio, tiny, run, parts):
    studio.scales["hair"].value = 5.0
    studio.scales["smile"].value = 1.0
    studio.save_recipe.click()
    assert studio.wait()
    other = EditStudio(tiny, run, parts[0], folder=studio.folder)
    assert list(other.scales) == ["smile"] and not other.against
    other.load_recipe.click()
    assert other.wait() and list(other.scales) == ["smile", "hair"]
    assert other.scales["hair"].value == 4.0 and other.against
    np.testing.assert_array_equal(shown(other), shown(studio))


def test_where_there_is_no_live_widget_a_picture_of_the_state_stands_in(studio, monkeypatch):
    studio.scales["smile"].value = 1.0
    bundle = studio._repr_mimebundle_()
    assert "application/vnd.jupyter.widget-view+json" in bundle
    picture = Image.open(io.BytesIO(base64.b64decode(bundle["image/png"])))
    assert min(picture.size) > 100
    studio.scales["smile"].value = 3.0
    assert studio._repr_mimebundle_()["image/png"] != bundle["image/png"]
    monkeypatch.setattr(studio.session, "render", lambda **_: (_ for _ in ()).throw(ValueError("no such edit")))
    assert "image/png" not in studio._repr_mimebundle_()


def test_two_studios_are_independent(studio, tiny, run, parts):
    other = EditStudio(tiny, run, parts)
    assert other.wait()
    untouched = other.after.value
    studio.scales["smile"].value = 2.0
    assert studio.wait() and other.wait()
    assert other.scales["smile"].value == 0.0 and other.after.value == untouched
    assert "Give a classifier" in other.read_out.shown.value


def test_a_newer_move_stops_an_older_one_and_nothing_queues():
    started, stopped, finished = [], [], []
    worker = Worker(lambda part: None, lambda sentence: None)

    def work(k: int):
        def run(progress):
            started.append(k)
            try:
                progress.wait(30.0 if k < 5 else 0.0)
            except Exception:
                stopped.append(k)
                raise
            finished.append(k)

        return run

    for k in range(6):
        worker.show(work(k))
        time.sleep(0.02)
    assert worker.wait(5.0)
    assert finished == [5] and set(stopped) == set(started) - {5}


def test_tasks_all_run_and_their_errors_are_told():
    told, done, release = [], [], threading.Event()
    worker = Worker(lambda part: None, told.append)

    def fail(progress):
        release.wait(5.0)
        raise ValueError("a sentence")

    worker.submit(fail)
    worker.submit(lambda progress: done.append(1))
    assert not worker.wait(0.05)
    release.set()
    assert worker.wait(5.0) and told == ["a sentence"] and done == [1]
