"""The edit studio without its widgets: state, images, previews, recipes."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from planted import planted, planted_boundary

import workbench as wb
from workbench.diffusion.schedule import NoiseSchedule
from workbench.directions.direction import Direction, load_direction, random_like
from workbench.editing.cross import Cross
from workbench.editing.edits import Shift
from workbench.studio.recipe import apply_recipe, open_recipe, read_recipe, result_of, save_recipe
from workbench.studio.session import EditSession
from workbench.studio.state import Cancelled, EditState, Progress, Rendering

STEPS = 12
T = 498  # visited by 6 steps and by 12


def same(rendering, expected, **tolerance):
    """To the bit, or within what is given."""
    torch.testing.assert_close(rendering.after, expected, **(tolerance or {"atol": 0, "rtol": 0}))


NEAR = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(scope="module")
def run(tiny):
    return wb.sample(tiny, range(3), steps=STEPS, record_h=True, progress=False)


@pytest.fixture(scope="module")
def smile(tiny, run):
    return planted(tiny, run, 1, "smile")


@pytest.fixture(scope="module")
def hair(tiny, run):
    return planted(tiny, run, 2, "hair")


@pytest.fixture(scope="module")
def boundaries(tiny):
    return [planted_boundary(tiny, space, T, seed=seed, intercept=0.5) for seed, space in enumerate("hx")]


def classify(images):
    return torch.stack([images.mean(dim=(1, 2, 3)), images.amax(dim=(1, 2, 3))], dim=1).sigmoid()


@pytest.fixture
def session(tiny, run, smile, hair, boundaries):
    classifier = wb.load_classifier(classify, attributes=["bright", "peak"], device="cpu")
    return EditSession(tiny, run, [smile, hair, *boundaries], classifier=classifier)


# Images


def test_without_an_edit_after_is_before_and_that_is_the_sample(session, run):
    rendering = session.render()
    same(rendering, rendering.before)
    same(rendering, wb.replay(run[0], progress=False).x0[0])
    assert not rendering.difference.any()
    white, brighter = torch.ones(3, 2, 2), torch.full((3, 2, 2), 3.0)  # the difference is of what is shown
    assert (Rendering(white, brighter, EditState((999, 0)), False).difference == 0).all()


@pytest.mark.parametrize("process", ["symmetric", "asymmetric"])
@pytest.mark.parametrize("window", [None, (600, 200)])
def test_the_image_is_that_of_wb_edit_bit_for_bit(session, tiny, run, process, window, tmp_path):
    """Also of the combined direction that is saved and loaded."""
    session.pick(1)
    session.set_scale("smile", 1.5)
    session.set_scale("hair", -0.5)
    session.set_process(process)
    if window is not None:
        session.set_window(*window)
    rendering, combined = session.render(), session.direction()
    loaded = load_direction(combined.save(tmp_path / "combined.safetensors"), model=tiny)
    for direction in (combined, loaded):
        same(rendering, wb.edit(tiny, run[1], direction, asymmetric=process == "asymmetric", progress=False).x0[0])
    assert (rendering.after - rendering.before).abs().max() > 1e-3


def test_steps_before_the_edit_are_computed_once(session, tiny, monkeypatch):
    session.set_scale("smile", 1.0)
    session.set_window(200, 0)
    session.render()
    visited, encode = [], type(tiny).encode
    monkeypatch.setattr(type(tiny), "encode", lambda self, x, t: visited.append(t) or encode(self, x, t))
    session.set_scale("smile", 2.0)
    session.render()
    assert visited == [t for t in session.timesteps if t <= 200]


def test_a_single_step_is_cross_boundary(session, tiny, run, boundaries):
    """And a move to where the sample is changes nothing."""
    session.set_process("single-step")
    for name, own in session.distances().items():
        session.set_distance(name, own)
    same(session.render(), session.render().before, atol=1e-5, rtol=1e-5)
    distances = {"h": 4.0, "x": 2.0}
    for name, distance in zip(session.boundaries, distances.values(), strict=True):
        session.set_distance(name, distance)
    options = {"distances": {s: [d] for s, d in distances.items()}, "unit": "distance", "eta": None, "progress": False}
    rendering = session.render()
    same(rendering, wb.cross_boundary(tiny, run[:1], *boundaries, **options).images[0, 0], **NEAR)
    (plan,) = Cross(*boundaries, unit="distance", eta=None).plan(run[0], options["distances"])
    same(rendering, wb.replay(plan, progress=False).x0[0])
    assert (rendering.after - rendering.before).abs().max() > 1e-3


def test_a_projected_direction_is_what_the_others_leave(session, tiny, run, smile, hair):
    session.set_scale("smile", 2.0)
    session.set_against("smile", ["hair"])
    expected = wb.edit(tiny, run[0], 2.0 * smile.orthogonal_to(hair), progress=False).x0[0]
    same(session.render(), expected)
    assert abs(session.direction().cosine(hair)) < 1e-5
    session.set_against("smile", [])
    assert not torch.equal(session.render().after, expected)


def test_eta_samples_the_seed_anew(session, tiny, run):
    session.set_eta(0.0)
    expected = wb.sample(tiny, run.seeds[:1], steps=STEPS, eta=0.0, progress=False).x0[0]
    assert torch.equal(session.render().before, expected)
    session.set_eta(None)
    assert not torch.equal(session.render().before, expected)


def test_the_read_out_is_the_classifiers(session):
    session.set_scale("smile", 1.0)
    rendering = session.render()
    table = session.read_out(rendering)
    assert list(table.index) == ["bright", "peak"] and list(table.columns) == ["before", "after"]
    expected = session.classifier(torch.stack([rendering.before, rendering.after]).clamp(-1, 1), progress=False)
    np.testing.assert_array_equal(table.to_numpy(), expected.to_numpy().T)
    session.classifier = None
    assert session.read_out(rendering) is None


def test_predictions_are_p_t_with_and_without_the_edit(session, tiny, run):
    session.set_scale("smile", 1.0)
    session.set_window(run.timesteps[4], 0)
    predictions = session.predictions()
    plain = wb.replay(run[0], record_x=True, progress=False)
    change = Shift(session.direction()).injection(run[0], 1.0)
    edited = wb.replay(run[0], edit=change, record_x=True, progress=False)
    nothing = torch.zeros_like(session.direction().delta())
    with torch.inference_mode():
        for i, t in enumerate(run.timesteps):
            for found, record, delta in (
                (predictions.before, plain, nothing),
                (predictions.after, edited, session.direction().delta()),
            ):
                x_t = record.x.values[i]
                eps = tiny.decode(tiny.encode(x_t, t), delta[i])
                torch.testing.assert_close(found[i], tiny.schedule.predict_x0(x_t, eps, t)[0], **NEAR)
    assert torch.equal(predictions.after[:4], predictions.before[:4])
    assert (predictions.after[4] - predictions.before[4]).abs().max() > 1e-3
    torch.testing.assert_close(predictions.after[-1], edited.x0[0], **NEAR)
    some = session.predictions(run.timesteps[::4])
    torch.testing.assert_close(some.after, predictions.after[::4], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="timestep 3 was not visited"):
        session.predictions([3])


def test_a_strip_and_a_grid_are_their_cells(session):
    session.set_scale("hair", 0.5)
    session.set_window(600, 0)
    values = (-1.0, 0.0, 2.0)
    strip, grid = session.grid({"smile": values}), session.grid({"hair": values, "smile": values})
    assert strip.images.shape[:2] == (1, 3) and grid.images.shape[:2] == (3, 3)
    assert session.grid({"hair": values[:2], "smile": values}).images.shape[:2] == (2, 3)
    assert grid.column_labels == ("smile\n-1 sigma", "smile\n+0 sigma", "smile\n+2 sigma")
    for column, scale in enumerate(values):
        session.set_scale("smile", scale)
        for hair, cell in ((0.5, strip.images[0, column]), *zip(values, grid.images[:, column], strict=True)):
            session.set_scale("hair", hair)
            same(session.render(), cell, **NEAR)
    with pytest.raises(ValueError, match="one or two controls"):
        session.grid({})


def test_a_path_begins_at_the_samples_own_h_and_ends_at_the_edited_one(session, run):
    session.set_scale("smile", 2.0)
    t = run.timesteps[3]
    path = session.path(t)
    np.testing.assert_allclose(path[0], run[:1].h.at(t)[0], atol=1e-4)
    assert (np.diff(np.linalg.norm(path - path[0], axis=1)) > 0).all()
    session.set_process("single-step")
    name = next(iter(session.boundaries))
    session.set_distance(name, 7.0)
    boundary = session.boundaries[name]
    ends = session.path(boundary.t)[[0, -1]]
    np.testing.assert_allclose(boundary.distance(ends), [session.distances()[name], 7.0], atol=1e-3)


# Previews


@pytest.mark.slow
@pytest.mark.parametrize(("eta", "process"), [(0.0, "symmetric"), (1.0, "asymmetric")])
def test_a_preview_takes_few_passes_and_resembles_the_image(model, eta, process):
    """On the bundled model, halfway between the samples of 16 pairs: it errs by less than half of the change."""
    run = wb.sample(model, range(3, 20), steps=24, eta=eta, record_h=True, progress=False)
    missed, changed = [], []
    for i in range(16):
        pair = run[[i, i + 1]]
        between, about = pair.h.values[:, 1] - pair.h.values[:, 0], planted(model, pair, 5, "random").provenance
        direction = Direction.from_delta(between, timesteps=run.timesteps, name="to the other", provenance=about)
        session = EditSession(model, pair, direction)
        session.set_process(process)
        session.set_scale("to the other", 0.5)
        whole, preview = session.render(), session.render(preview=True)
        assert preview.preview and not whole.preview
        missed.append(preview.after - whole.after)
        changed.append(whole.after - whole.before)
    assert torch.stack(missed).norm() < 0.5 * torch.stack(changed).norm()
    parts = []
    session.render(preview=True, progress=Progress(parts.append))
    assert len(parts) == session.preview_steps and parts[-1] == 1.0


def test_a_preview_of_nothing_is_the_sample_and_one_of_a_late_window_takes_all_of_its_steps(session):
    session.set_scale("smile", 1e-7)
    preview = session.render(preview=True)
    same(preview, preview.before, **NEAR)
    session.set_scale("smile", 1.0)
    session.set_window(session.timesteps[-4], 0)
    same(session.render(preview=True), session.render().after)


@pytest.mark.parametrize("offset", [0, 1])
def test_a_preview_ends_at_the_image_where_the_last_step_adds_noise_too(make_unet, offset):
    """As on the schedule of Stable Diffusion, whose clean image has alpha_bar(0)."""
    schedule = NoiseSchedule.linear()
    schedule = replace(schedule, clean=float(schedule.alpha_bars[0]), offset=offset)
    model = wb.wrap(make_unet(), schedule, name="like SD", device="cpu")
    run = wb.sample(model, range(2), steps=STEPS, record_h=True, progress=False)
    session = EditSession(model, run, planted(model, run, 1, "smile"))
    session.set_scale("smile", 1e-7)
    preview = session.render(preview=True)
    same(preview, preview.before, **NEAR)
    session.set_scale("smile", 1.0)
    whole, preview = session.render(), session.render(preview=True)
    assert 0 < (preview.after - whole.after).norm() < 0.5 * (whole.after - whole.before).norm()


# History


def test_undo_and_redo_walk_through_the_changes(session):
    states = [session.state]
    for change, *values in (
        (session.set_scale, "smile", 1.0),
        (session.set_scale, "hair", 2.0),
        (session.set_window, 500, 100),
        (session.pick, 2),
        (session.set_process, "asymmetric"),
    ):
        change(*values)
        states.append(session.state)
    assert not session.can_redo
    for state in reversed(states[:-1]):
        session.undo()
        assert session.state == state
    assert not session.can_undo
    session.undo()
    for state in states[1:]:
        session.redo()
        assert session.state == state
    session.reset()
    assert session.state.sample == 2 and not session.state.edits
    session.undo()
    assert session.state == states[-1]


def test_a_pull_of_one_slider_is_one_change_until_it_rests(session):
    for scale in (0.5, 1.0, 1.5):
        session.set_scale("smile", scale)
    session.rest()
    session.set_scale("smile", 2.0)
    session.undo()
    assert session.state.scales == {"smile": 1.5}
    session.set_scale("hair", 2.0)
    assert not session.can_redo
    session.set_scale("hair", 0.0)  # pulled back, it leaves nothing to undo
    assert session.state.scales == {"smile": 1.5}
    session.undo()
    assert session.state.scales == {}


# Cancelling


def test_cancelled_work_stops_at_the_next_step_and_leaves_nothing_half_done(session):
    session.set_scale("smile", 1.0)
    seen = []
    progress = Progress(lambda part: (seen.append(part), progress.cancel() if len(seen) == 3 else None))
    with pytest.raises(Cancelled):
        session.render(progress=progress)
    assert seen == [pytest.approx(k / STEPS) for k in (1, 2, 3)]
    again = session.render()
    fresh = EditSession(session.model, session.samples[0], session.directions["smile"])
    fresh.set_scale("smile", 1.0)
    assert torch.equal(again.after, fresh.render().after)


# Samples and images


def test_a_dropped_image_is_inverted_and_scale_zero_gives_it_back(session, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    for source in (tmp_path / "photo.png", (tmp_path / "photo.png").read_bytes()):
        k = session.add_image(source)
    assert session.label(k) == f"image {k}" and len(session.samples) == k + 1, "it was inverted once"
    session.pick(k)
    expected = torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1
    torch.testing.assert_close(session.render().before, expected)
    session.set_scale("smile", 1e-7)
    same(session.render(), expected, **NEAR)
    with pytest.raises(ValueError, match="eta of its inversion"):
        session.set_eta(0.5)
    samples = len(session.samples)
    (tmp_path / "text.png").write_text("not a picture")
    for source in (tmp_path / "text.png", b"nor this", "none.png"):
        with pytest.raises(FileNotFoundError if source == "none.png" else ValueError, match="image"):
            session.add_image(source)
    assert len(session.samples) == samples


@pytest.mark.parametrize("method", ["ddim", "edit-friendly"])
def test_other_inversions_are_edited_and_previewed_too(session, tiny, run, method):
    session.pick(
        session.add_samples(wb.invert(tiny, run.x0[:1].clamp(-1, 1), steps=STEPS, method=method, progress=False))
    )
    session.set_scale("smile", 0.5)
    whole, preview = session.render(), session.render(preview=True)
    assert torch.isfinite(preview.after).all() and (whole.after - whole.before).abs().max() > 1e-3


def test_seeds_are_added_once_and_are_those_of_sample(session, tiny):
    assert session.add_seeds([2, 7]) == [2, 3]
    assert session.add_seeds([7]) == [3]
    session.pick(3)
    expected = wb.sample(tiny, [7], steps=STEPS, progress=False).x0[0]
    assert torch.equal(session.render().before, expected)
    assert session.add_seeds([7, 2], eta=0.0) == [4, 5] and session.add_seeds([7]) == [3]
    with pytest.raises(ValueError, match="holds 48 samples"):
        session.add_seeds(range(100, 150))


# What is refused


def test_what_cannot_be_edited_with_is_refused(tiny, run, smile, boundaries):
    model = {**tiny.provenance(), "hash": "0" * 16, "name": "other"}
    for given, message in (
        ([], "no direction and no boundary"),
        (replace(smile, provenance={**smile.provenance, "model": model}), "belongs to the model 'other'"),
        (["smile"], "not a str"),
        (replace(boundaries[0], t=501), "timestep 501 was not visited"),
    ):
        with pytest.raises(ValueError, match=message):
            EditSession(tiny, run, given)
    with pytest.raises(ValueError, match="no boundary for the process single-step; possible is symmetric, asymmetric"):
        EditSession(tiny, run, smile).set_process("single-step")
    alone = EditSession(tiny, run, boundaries)
    assert alone.state.process == "single-step"
    with pytest.raises(ValueError, match="no direction for the process symmetric; possible is single-step"):
        alone.set_process("symmetric")


def test_directions_of_other_steps_are_resampled_and_those_of_one_name_get_two(tiny, run, smile):
    session = EditSession(tiny, run, smile.resampled(5))
    assert session.directions["smile"].timesteps == run.timesteps
    assert session.notes == [f"smile was found with 5 steps and is resampled to the samples' {STEPS}"]
    session = EditSession(tiny, run, [smile, random_like(smile, seed=1), replace(smile, sigma=2 * smile.sigma)])
    assert list(session.directions) == ["smile", "random 1 like smile", "smile (2)"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda s: s.set_scale("beard", 1.0), "'beard'; there is smile, hair"),
        (lambda s: s.set_scale("smile", math.nan), "finite"),
        (lambda s: s.grid({"smile": [0.0, math.inf], "hair": [0.0]}), "smile is inf"),
        (lambda s: s.set_distance("smile", 1.0), "no boundary 'smile'"),
        (lambda s: s.set_against("smile", ["smile"]), "against itself"),
        (lambda s: s.set_window(100, 500), "the noisier end first"),
        (lambda s: s.set_process("both"), "one of symmetric, asymmetric, single-step"),
        (lambda s: s.set_eta(2.0), "eta must lie in"),
        (lambda s: s.pick(9), "no sample 9; there are 0 to 2"),
        (lambda s: s.direction(), "no direction is pulled"),
        (lambda s: save_recipe(s, "edit.json"), "nothing is edited"),
    ],
)
def test_a_mistake_is_a_sentence_and_changes_nothing(session, call, message):
    before = session.state
    with pytest.raises(ValueError, match=message):
        call(session)
    assert session.state == before


# Recipes


def edited(session):
    session.pick(1)
    session.set_scale("smile", 1.5)
    session.set_scale("hair", -0.5)
    session.set_against("smile", ["hair"])
    session.set_window(700, 100)
    session.set_eta(0.5)
    session.set_process("asymmetric")
    return session


def test_a_recipe_renders_again_bit_for_bit_and_is_reloaded_as_one_change(session, tiny, tmp_path):
    path, wanted = save_recipe(edited(session), tmp_path / "edit.json"), session.state
    again = open_recipe(path, model=tiny).render()
    same(again, session.render().after)
    assert result_of(again) == read_recipe(path)["result"]
    session.reset()
    session.pick(0)
    apply_recipe(session, path)
    assert session.state == wanted and len(session.samples) == 3 and len(session.directions) == 2
    session.undo()
    assert not session.state.edits


def test_a_recipe_of_a_moved_sample_holds_what_its_seed_does_not_give(tiny, run, smile, tmp_path):
    """Its seed gives the noise of the steps alone; x_T is another's."""
    light = wb.MoveX(torch.ones(tiny.x_shape), run.timesteps[0], "light")
    session = EditSession(tiny, wb.edit(tiny, run[:1], light, scale=2.0, progress=False), [smile])
    session.set_scale("smile", 1.0)
    again = open_recipe(save_recipe(session, tmp_path / "edit.json"), model=tiny)
    same(again.render(), session.render().after)
    same(again.render(preview=True), session.render(preview=True).after)
    (k,) = session.add_seeds([run.seeds[0]])
    assert k == 1
    torch.testing.assert_close(session.samples[k].x0, run.x0[:1], **NEAR)


def test_a_recipe_that_is_replaced_leaves_nothing_of_the_old_one_behind(session, tmp_path):
    path, folder = tmp_path / "edit.json", tmp_path / "edit.parts"
    (folder / "notes.safetensors").parent.mkdir()
    (folder / "notes.safetensors").write_bytes(b"the user's own")
    for name in ("smile", "hair"):
        session.reset()
        session.set_scale(name, 1.0)
        save_recipe(session, path)
    (part,) = read_recipe(path)["directions"]
    assert {file.name for file in folder.iterdir()} == {part["file"], "notes.safetensors"}
    same(open_recipe(path, model=session.model).render(), session.render().after)


def test_a_recipe_whose_sample_finds_no_place_adds_nothing(session, run, tiny, tmp_path):
    path = save_recipe(edited(session), tmp_path / "edit.json")
    full = EditSession(tiny, wb.sample(tiny, range(100, 148), steps=STEPS, progress=False), session.directions["hair"])
    with pytest.raises(ValueError, match="holds 48 samples"):
        apply_recipe(full, path)
    assert list(full.directions) == ["hair"]


def test_a_recipe_of_an_image_and_of_a_single_step_comes_back(session, tiny, run, tmp_path):
    inverted = wb.invert(tiny, run.x0[2:].clamp(-1, 1), steps=STEPS, method="edit-friendly", progress=False)
    session.pick(session.add_samples(inverted))
    session.set_process("single-step")
    for name in session.boundaries:
        session.set_distance(name, 3.0)
    again = open_recipe(save_recipe(session, tmp_path / "edit.json"), model=tiny)
    same(again.render(), session.render().after)


def test_boundaries_of_two_timesteps_are_not_crossed_in_one_step(tiny, run, boundaries):
    """Whichever way the grid is turned; also not in a state that was put together by hand."""
    h, x = boundaries
    session = EditSession(tiny, run, [h, replace(x, t=249)])
    names = list(session.boundaries)
    session.set_distance(names[0], 2.0)
    for call in (
        lambda: session.grid({names[1]: [-1.0, 1.0]}),
        lambda: session.grid(dict.fromkeys(names, [-1.0, 1.0])),
        lambda: session.grid(dict.fromkeys(names[::-1], [-1.0, 1.0])),
    ):
        with pytest.raises(ValueError, match=f"is at t={T} and .* at t=249, so move to one of them"):
            call()


def test_a_recipe_keeps_two_of_the_same_direction_and_boundaries_of_two_timesteps_apart(
    tiny, run, smile, boundaries, tmp_path
):
    twins, late = [boundaries[1], replace(boundaries[1], t=249)], {}
    for given in ([smile, smile], twins):
        session, other = (EditSession(tiny, run, given) for _ in range(2))
        for name, scale in zip(session.directions, (1.0, 2.0), strict=False):
            session.set_scale(name, scale)
        for name in [name for name, each in session.boundaries.items() if each.t == 249]:
            session.set_distance(name, 3.0)
            late = {name: 3.0}
        path = save_recipe(session, tmp_path / "edit.json")
        apply_recipe(other, path)
        assert (other.state.scales, other.state.distances) == (session.state.scales, session.state.distances)
        same(other.render(), session.render().after)
        same(open_recipe(path, model=tiny).render(), session.render().after)
    assert other.state.distances == late


def test_bad_recipes_are_refused(session, tiny, model, run, smile, tmp_path):
    path, bad = save_recipe(edited(session), tmp_path / "edit.json"), tmp_path / "bad.json"
    recipe = json.loads(path.read_text())
    elsewhere = [{**recipe["directions"][0], "file": "../elsewhere.safetensors"}, *recipe["directions"][1:]]
    for content, message in (
        ("{", "not JSON"),
        ('{"format": "other"}', "not a recipe"),
        (json.dumps({key: value for key, value in recipe.items() if key != "process"}), "it lacks process"),
        (json.dumps({**recipe, "result": {}}), "it lacks sha256, threads, torch"),
        (json.dumps({**recipe, "directions": elsewhere}), "parts lie in bad.parts itself"),
    ):
        bad.write_text(content)
        with pytest.raises(ValueError, match=message):
            open_recipe(bad, model=tiny)
    with pytest.raises(ValueError, match="the model 'tiny'"):
        open_recipe(path, model=model)
    with pytest.raises(ValueError, match="has 12 steps and this session 6"):
        apply_recipe(EditSession(tiny, wb.sample(tiny, [0], steps=6, progress=False), smile), path)
    with pytest.raises(ValueError, match="is a .json file"):
        save_recipe(session, tmp_path / "edit.txt")
    for part in (tmp_path / "edit.parts").iterdir():
        part.unlink()
    for lost, message in ((path, "no direction at"), (tmp_path / "none.json", "none.json")):
        with pytest.raises(FileNotFoundError, match=message):
            open_recipe(lost, model=tiny)
