"""Edits and grids: one noise, one edit, all cells alike."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from planted import planted, planted_boundary
from test_sampling import naive

import workbench as wb
from workbench.diffusion.schedule import NoiseSchedule
from workbench.directions.direction import random_like
from workbench.directions.jacobian import find_pullback
from workbench.editing.edits import AtTap, MoveX, Shift, Swap, Transport, match_gain, slerp
from workbench.editing.render import EditGrid, cells_bar, edit, edit_grid, render, run_plans

STEPS = 5


@pytest.fixture(scope="module")
def run(tiny):
    return wb.sample(tiny, range(3), steps=STEPS, record_h=True, progress=False)


@pytest.fixture(scope="module")
def direction(tiny, run):
    return planted(tiny, run, 1, "planted")


def test_scale_zero_is_the_unedited_image_and_a_negative_scale_changes_it_otherwise(tiny, run, direction):
    still, plus, minus = (edit(tiny, run, direction, scale=scale, progress=False).x0 for scale in (0.0, 2.0, -2.0))
    assert torch.equal(still, run.x0)
    assert (plus - run.x0).abs().max() > 1e-3
    assert (plus - minus).abs().max() > (plus - run.x0).abs().max()


@pytest.mark.parametrize("asymmetric", [False, True])
def test_an_edit_is_the_equation(tiny, run, direction, asymmetric):
    got = edit(tiny, run, direction, scale=1.5, asymmetric=asymmetric, progress=False).x0
    expected = naive(tiny, run, delta=direction.delta(1.5), asymmetric=asymmetric)
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_the_recorded_h_is_the_networks_own_not_the_edited_one(tiny, run, direction):
    edited = edit(tiny, run, direction, scale=1.0, record_h=True, progress=False)
    assert torch.equal(edited.h.values[0], run.h.values[0])
    assert not torch.equal(edited.h.values[1], run.h.values[1])


def test_t_range_limits_the_edit_to_its_timesteps(tiny, run, direction):
    t = run.timesteps
    late = edit(tiny, run, direction, t_range=(t[3], t[4]), record_h=True, progress=False)
    assert torch.equal(late.h.values[:4], run.h.values[:4])
    assert (late.x0 - run.x0).abs().max() > 1e-4
    by_direction = edit(tiny, run, direction.restricted_to((t[3], t[4])), progress=False)
    torch.testing.assert_close(by_direction.x0, late.x0)


def test_replacing_h_by_its_own_changes_nothing_and_by_anothers_does(tiny, run):
    itself = edit(tiny, run, run, mode="replace", progress=False).x0
    torch.testing.assert_close(itself, run.x0, atol=1e-5, rtol=1e-5)
    assert (edit(tiny, run, run[0], mode="replace", progress=False).x0[1] - run.x0[1]).abs().max() > 1e-3
    assert torch.equal(edit(tiny, run, run[0], mode="slerp", scale=0.0, progress=False).x0, run.x0)


@pytest.mark.parametrize(
    ("steps", "eta", "median"), [(10, 0, 2.0), (10, 1, 1.3), (50, 0, 7.9), (50, 1, 4.2), (100, 0, 15), (1000, 1, 74)]
)
def test_the_gain_is_the_table_of_symmetric_against_asymmetric_effects(steps, eta, median):
    schedule = wb.NoiseSchedule.linear()
    ratios = [1 / match_gain(schedule, pair, eta=eta) for pair in schedule.pairs(steps)[:-1]]
    assert np.median(ratios) == pytest.approx(median, rel=0.06)


def test_matched_gain_brings_an_asymmetric_edit_to_the_symmetric_ones_size(tiny, run, direction):
    def size(**options):
        return (edit(tiny, run, direction, scale=0.05, progress=False, **options).x0 - run.x0).norm().item()

    symmetric, asymmetric, matched = size(), size(asymmetric=True), size(asymmetric=True, gain="match")
    assert abs(math.log(matched / symmetric)) < abs(math.log(asymmetric / symmetric))


@pytest.mark.parametrize(
    "options", [{}, {"asymmetric": True}, {"asymmetric": True, "gain": "match"}, {"t_range": (500, 0)}]
)
def test_a_grid_is_its_cells_one_by_one(tiny, run, direction, options):
    other = random_like(direction, seed=3)
    grid = edit_grid(tiny, run, [direction, other], scales=[-1, 0, 2], batch_size=4, progress=False, **options)
    assert grid.images.shape == (6, 3, *tiny.image_shape)
    for d, chosen in enumerate((direction, other)):
        for c, scale in enumerate((-1, 0, 2)):
            alone = edit(tiny, run, chosen, scale=scale, progress=False, **options).x0
            torch.testing.assert_close(grid.images[3 * d : 3 * d + 3, c], alone, atol=1e-4, rtol=1e-4)


def test_steps_before_the_edit_are_shared(tiny, run, direction, monkeypatch):
    passes = []
    encode = type(tiny).encode
    monkeypatch.setattr(type(tiny), "encode", lambda self, x, t: passes.append((t, len(x))) or encode(self, x, t))
    last = run.timesteps[-1]
    edit_grid(tiny, run, direction, scales=[1, 2, 3, 4], t_range=(last, last), batch_size=64, progress=False)
    samples_at = {t: sum(n for visited, n in passes if visited == t) for t in run.timesteps}
    assert samples_at == {**dict.fromkeys(run.timesteps[:-1], 3), last: 12}


def test_the_middle_column_is_the_sample_itself_and_of_an_inverted_image_its_reconstruction(tiny, run, direction):
    grid = edit_grid(tiny, run, direction, scales=[-1, 0, 1], progress=False)
    assert torch.equal(grid.images[:, 1], run.x0)
    inverted = wb.invert(tiny, run.x0.clamp(-1, 1), steps=STEPS, progress=False)
    grid = edit_grid(tiny, inverted, direction, scales=[0], progress=False)
    torch.testing.assert_close(grid.images[:, 0], wb.replay(inverted, progress=False).x0, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("method", ["ddim", "edit-friendly"])
def test_a_residual_makes_scale_zero_the_image_itself_and_moves_every_other_cell_alike(tiny, run, direction, method):
    image = run.x0.clamp(-1, 1)
    inverted = wb.invert(tiny, image, steps=STEPS, method=method, residual=True, progress=False)
    plain = edit_grid(tiny, inverted, direction, scales=[0, 2], progress=False).images
    grid = edit_grid(tiny, inverted, direction, scales=[0, 2], residual=True, progress=False)
    assert torch.equal(grid.images[:, 0], image)
    assert (plain[:, 0] - image).abs().max() > 1e-3
    torch.testing.assert_close(grid.images[:, 1], plain[:, 1] + inverted.residual, atol=1e-4, rtol=1e-4)
    alone = edit(tiny, inverted, direction, scale=2, residual=True, progress=False).x0
    torch.testing.assert_close(grid.images[:, 1], alone, atol=1e-4, rtol=1e-4)
    assert (grid.images[:, 1] - image).abs().max() > 1e-2
    assert grid.provenance["residual"] is True


def test_a_grid_survives_its_file(tiny, run, direction, tmp_path):
    grid = edit_grid(tiny, run[:1], direction, scales=[0, 1], progress=False)
    again = EditGrid.load(grid.save(tmp_path / "grid.safetensors"))
    assert torch.equal(again.images, grid.images)
    for name in ("row_labels", "column_labels", "provenance"):
        assert getattr(again, name) == getattr(grid, name)
    with pytest.raises(ValueError, match="no edit grid"):
        EditGrid.load(direction.save(tmp_path / "direction.safetensors"))


def rescheduled(model):
    """The same weights for another course of the noise."""
    return wb.wrap(model.unet.unet, NoiseSchedule(model.schedule.alpha_bars**1.1), name=model.name, device="cpu")


def tapped_run(model):
    return wb.sample(model.tapped("before"), [5], steps=STEPS, record_h=True, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, r, d: edit(m, r, d, t_range=(0, 500)), "noisier end first"),
        (lambda m, r, d: edit(m, r, d, mode="sharpen"), "'sharpen'"),
        (lambda m, r, d: edit(m, r, d, gain="big", asymmetric=True), "gain"),
        (lambda m, r, d: edit(m, r, d, mode="replace"), "donor"),
        (lambda m, r, d: edit(m, r, r[:2], mode="replace"), "donor has 2"),
        (lambda m, r, d: edit(m, r, r, mode="slerp", scale=2), "weight"),
        (lambda m, r, d: edit(m, r, tapped_run(m), mode="replace"), "tap"),
        (lambda m, r, d: edit(rescheduled(m), r, d), "another noise schedule"),
        (lambda m, r, d: edit_grid(m, r, d, batch_size=-1), "batch_size is -1"),
        (lambda m, r, d: edit(m.tapped("before"), r, d), "tap"),
        (lambda m, r, d: edit(m, edit(m, r, d, progress=False), d), "edited already"),
        (lambda m, r, d: edit(m, wb.sample(m, [1], steps=4, progress=False), d), "steps|timesteps"),
        (lambda m, r, d: edit_grid(m, r, []), "at least one edit"),
        (lambda m, r, d: edit_grid(m, r, d, scales=[]), "at least one"),
        (lambda m, r, d: edit_grid(m, r, d, scales=[0.0, math.nan]), "a scale is nan"),
        (lambda m, r, d: edit(m, r, d, scale=math.nan), "scale is nan"),
        (lambda m, r, d: edit_grid(m, r, d, residual=True), r"invert\(\.\.\., residual=True\)"),
        (lambda m, r, d: edit(m, r, d, residual=True), r"invert\(\.\.\., residual=True\)"),
        (lambda m, r, d: edit(m, r, r, mode="slerp", gain="match"), "gain is 'match', and 'slerp' has none"),
        (lambda m, r, d: render(r, Swap(r[0], calibration=0.3, asymmetric=True), [1.0]), "can't be asymmetric"),
    ],
)
def test_bad_input_is_a_sentence(tiny, run, direction, change, message):
    with pytest.raises(ValueError, match=message):
        change(tiny, run, direction)


def test_a_plan_is_a_run_that_has_not_run(tiny, run, direction):
    late = Shift(direction, t_range=(run.timesteps[2], 0))
    still, plan = late.plan(run, [0.0, 2.0])
    assert still is run
    assert plan.timesteps == run.timesteps[2:] and torch.equal(plan.x_T, run.reached(2))
    h = torch.zeros(1, *tiny.h_shape)
    torch.testing.assert_close(plan.edit.change(0, h, slice(0, 1))[0], direction.delta(2.0)[2])
    alone = edit(tiny, run, direction, scale=2.0, t_range=(run.timesteps[2], 0), progress=False).x0
    assert torch.equal(wb.replay(plan, progress=False).x0, alone)


def test_a_grid_of_different_edits_is_each_of_them(tiny, run, direction):
    vector = torch.randn(tiny.image_shape, generator=torch.Generator().manual_seed(4))
    t = run.timesteps[2]
    edits = {"shift": direction, "asymmetric": Shift(direction, asymmetric=True), "x": MoveX(vector, t, "x")}
    edits |= {"swap": Swap(run[0]), "turned": -Shift(direction)}
    grid = render(run, edits, [1.0], batch_size=4, progress=False).images[:, 0].unflatten(0, (5, 3))
    expected = [
        edit(tiny, run, direction, progress=False).x0,
        edit(tiny, run, direction, asymmetric=True, progress=False).x0,
        wb.replay(run.tail(2, run.x_at(t) + vector), progress=False).x0,
        edit(tiny, run, run[0], mode="replace", progress=False).x0,
        edit(tiny, run, direction, scale=-1.0, progress=False).x0,
    ]
    for images, alone in zip(grid, expected, strict=True):
        torch.testing.assert_close(images, alone, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("method", ["ddim", "edit-friendly"])
def test_a_move_of_x_begins_at_the_reconstruction_of_an_inverted_image(tiny, run, method):
    """So that a small one is a small change of what scale 0 shows, and of the image with its residual."""
    image = run.x0.clamp(-1, 1)
    inverted = wb.invert(tiny, image, steps=STEPS, method=method, record_x=True, residual=True, progress=False)
    move = MoveX(torch.ones(tiny.x_shape), inverted.timesteps[2], "x")
    for residual in (False, True):
        still, moved = render(inverted, move, [0.0, 1e-7], residual=residual, progress=False).images.unbind(1)
        torch.testing.assert_close(moved, still, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(moved, image, atol=1e-4, rtol=1e-4)
    assert (render(inverted, move, [1.0], residual=True, progress=False).images[:, 0] - image).abs().max() > 1e-2


def test_a_residual_of_another_process_is_refused(tiny, run):
    inverted = wb.invert(tiny, run.x0.clamp(-1, 1), steps=STEPS, record_x=True, residual=True, progress=False)
    cross = wb.Cross(x=planted_boundary(tiny, "x", inverted.timesteps[2]))
    for call in (
        lambda: render(inverted, cross, [1.0], residual=True),
        lambda: edit(tiny, inverted, cross, residual=True),
    ):
        with pytest.raises(ValueError, match="has another residual"):
            call()


def test_edits_that_differ_have_provenances_that_differ(tiny, run, direction):
    t, ones = run.timesteps, torch.ones(tiny.x_shape)
    donor = wb.sample(tiny, [9], steps=STEPS, record_h=True, progress=False)
    noise = torch.ones(1 + run.steps, *tiny.x_shape)
    edits = [MoveX(ones, t[1], "m"), MoveX(-ones, t[1], "m"), MoveX(ones, t[2], "m"), -MoveX(ones, t[1], "m")]
    edits += [wb.MoveNoise(noise, t, "m"), wb.MoveNoise(2 * noise, t, "m"), Swap(donor), Swap(donor, "slerp")]
    edits += [Shift(direction), -Shift(direction), Transport(torch.ones(tiny.h_shape), t[1], len, "m")]
    edits += [Transport(torch.zeros(tiny.h_shape), t[1], len, "m"), Transport(torch.ones(tiny.h_shape), t[2], len, "m")]
    about = [json.dumps(each.about() | {"name": ""}, sort_keys=True) for each in edits]
    assert len({*about}) == len(edits)


def test_the_progress_bar_expects_the_steps_that_are_made(tiny, run, direction):
    """One step too many, and tqdm knows no total any more, which its format needs."""
    last = run.timesteps[-1]
    edits = [Shift(direction, t_range=(last, last)), Shift(direction), MoveX(torch.ones(tiny.image_shape), last, "x")]
    images = run.x0.clamp(-1, 1)
    for each in (run, wb.invert(tiny, images, steps=STEPS, record_x=True, progress=False)):
        plans = [edit.plan(each, [0.0, 1.0]) for edit in edits]
        with cells_bar(each, plans, True) as bar:
            run_plans(each, plans, progress=bar)
            assert bar.n == pytest.approx(bar.total)


def test_any_edit_runs_by_itself(tiny, run):
    """As a trajectory from its timestep on; scale 0 is the sample."""
    t, vector = run.timesteps[2], torch.ones(tiny.image_shape)
    move = MoveX(vector, t, "x")
    edited = edit(tiny, run, move, scale=0.5, progress=False)
    assert edited.timesteps == run.timesteps[2:] and torch.equal(edited.x_T, run.x_at(t) + 0.5 * vector)
    grid = render(run, move, [0.5], progress=False).images[:, 0]
    torch.testing.assert_close(edited.x0, grid, atol=1e-4, rtol=1e-4)
    assert torch.equal(edit(tiny, run, move, scale=0.0, progress=False).x0, run.x0)


def test_slerp_keeps_the_norm_and_is_whole_between_equal_and_opposite():
    a = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0))
    b = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(1)) * 7
    for weight in (0.0, 0.3, 1.0):
        torch.testing.assert_close(slerp(a, b, weight).flatten(1).norm(dim=1), a.flatten(1).norm(dim=1))
        torch.testing.assert_close(slerp(a, 3 * a, weight), a)
    # Half-way from (1, 0) to the direction of (0, 2), at the norm of (1, 0).
    half = slerp(torch.tensor([1.0, 0.0]).view(1, 2, 1, 1), torch.tensor([0.0, 2.0]).view(1, 2, 1, 1), 0.5)
    assert half.flatten().tolist() == pytest.approx([math.sqrt(0.5), math.sqrt(0.5)], abs=1e-6)
    assert torch.isfinite(slerp(a, a + 1e-6 * b, 0.5)).all()
    assert torch.isfinite(slerp(0 * a, b, 0.5)).all() and torch.isfinite(slerp(a, 0 * b, 0.5)).all()


def injected(model, run, donor, *, weight, omega, t_edit, mask):
    """InjectFusion step by step: the passes of its code, in the workbench's words."""
    schedule, x = model.schedule, run.x_T
    for i, pair in enumerate(schedule.pairs(run.timesteps)):
        t, a = pair[0], schedule.alpha_bar(pair[0])
        state = model.encode(x, t)
        eps = model.decode(state)
        if t >= t_edit:
            other = torch.where(mask, donor.h.values[i].expand_as(state.h), state.h)
            mixed = model.decode(state.with_h(slerp(state.h, other, weight)))
            P, new = ((x - (1 - a) ** 0.5 * e) / a**0.5 for e in (eps, mixed))
            for s in range(len(x)):  # the new image with the deviation of the old
                new[s] = new[s].mean() + (new[s] - new[s].mean()) * P[s].std() / new[s].std()
            x = x + a**0.5 * (new - P) + omega * (1 - a) ** 0.5 * (mixed - eps)
            eps = model(x, t)
        x = schedule.ddim_step(x, eps, pair, eta=run.etas[i], noise=run.noise_at(i))
    return x


def test_injection_with_calibration_is_the_released_codes_passes_and_a_mask_keeps_the_rest_of_h(tiny, run):
    donor, t_edit = run[0], run.timesteps[2]
    mask = torch.zeros(tiny.h_shape[1:], dtype=torch.bool)
    mask[:, : tiny.h_shape[2] // 2] = True
    options = {"t_range": (run.timesteps[0], t_edit), "calibration": 0.3}
    swaps = [Swap(donor, "slerp", mask=m, **options) for m in (mask, ~mask & mask, None, mask | ~mask)]
    half, none, without, whole = run_plans(run, [swap.plan(run, [0.7]) for swap in swaps], progress=False)[:, :, 0]
    with torch.no_grad():
        expected = injected(tiny, run, donor, weight=0.7, omega=0.3, t_edit=t_edit, mask=mask)
    torch.testing.assert_close(half, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(none, run.x0, atol=1e-4, rtol=1e-4)
    assert torch.equal(without, whole) and (whole - half).abs().max() > 1e-3
    plain = run_plans(run, [Swap(donor, "slerp", t_range=options["t_range"]).plan(run, [0.7])], progress=False)[0, :, 0]
    assert (plain - whole).abs().max() > 1e-3, "the calibration does something"
    about = json.loads(json.dumps(swaps[0].about()))
    assert about["donor"] == [0] and about["calibration"] == 0.3 and about["mask"] == mask.tolist()
    with pytest.raises(ValueError, match=r"shape \(3, 3\)"):
        Swap(donor, "slerp", mask=np.ones((3, 3), bool)).plan(run, [1.0])


def test_an_edit_at_another_tap_is_that_edit_of_the_run_at_that_tap(tiny, run):
    """Also in one grid with edits of h, and with scale 0 as the sample."""
    tapped = run.tapped("skip.0")
    length = run.h.values.flatten(2).norm(dim=2).mean()
    delta = torch.ones(run.steps, *tapped.model.h_shape) * length / 20
    there = AtTap(Shift(planted(tapped.model, wb.replay(tapped, record_h=True), 0, "skip", delta=delta)), "skip.0")
    here = Shift(planted(tiny, run, 1, "here"))
    both = render(run, [there, here], [0.0, 1.0], progress=False).images.view(2, len(run), 2, *run.x0.shape[1:])
    alone = render(tapped, there.edit, [1.0], progress=False).images[:, 0]
    torch.testing.assert_close(both[0, :, 1], alone)
    torch.testing.assert_close(both[1, :, 1], render(run, here, [1.0], progress=False).images[:, 0])
    assert torch.equal(both[:, :, 0], run.x0.expand(2, *run.x0.shape)) and (alone - run.x0).abs().max() > 1e-3
    assert there.about()["tap"] == "skip.0" and there.name == "skip at skip.0"


def test_an_edit_at_another_tap_is_compared_with_what_it_is_compared_with_there(run):
    seen = []

    class Decoded(Shift):
        def plain(self, run):
            seen.append(run.model.tap)
            return run

    assert AtTap(Decoded(None), "skip.0").plain(run) is run
    assert seen == ["skip.0"]


def test_a_direction_at_another_tap_is_its_shift(tiny, run, direction):
    one, other = (AtTap(each, tiny.tap).plan(run, [1.0]) for each in (direction, Shift(direction)))
    assert torch.equal(*(run_plans(run, [plan], progress=False) for plan in (one, other)))


def test_options_that_do_not_fit_are_a_sentence(tiny, run, direction):
    for options, message in (
        ({"t_range": 500}, "t_range is 500; give two timesteps"),
        ({"t_range": (500, None)}, "give two timesteps"),
        ({"mode": "Add"}, "'Add' is not known; it is one of add, replace, slerp"),
    ):
        with pytest.raises(ValueError, match=message):
            edit(tiny, run, direction, progress=False, **options)
    for call in (render, lambda *args, **options: edit(tiny, *args[:2], **options)):
        with pytest.raises(ValueError, match="t_range: options of directions, and 'planted' is an edit with its own"):
            call(run, Shift(direction), [1.0], t_range=(500, 250))


def test_a_vector_of_h_is_carried_to_its_own_sample_as_it_was_and_to_others_as_their_own(tiny, run):
    t = run.timesteps[2]
    pullbacks = [find_pullback(tiny, run[i], t=t, k=3, map="x->h", progress=False) for i in range(len(run))]
    carried = Transport(pullbacks[0].left[1], t, lambda run: pullbacks, "vector 2")
    vectors = carried.vectors(run)
    torch.testing.assert_close(vectors[0], pullbacks[0].right[1], atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(vectors.flatten(1).norm(dim=1), torch.ones(len(run)))
    assert abs(float((vectors[1] * vectors[0]).sum())) < 0.999
    own = MoveX(pullbacks[0].right[1], t, "own")
    got, expected = (
        run_plans(run[:1], [e.plan(run[:1], [5.0])], progress=False)
        for e in (Transport(pullbacks[0].left[1], t, lambda run: pullbacks[:1], "vector 2"), own)
    )
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)
