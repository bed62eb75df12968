"""One move across a boundary, then the reverse process: what it is, what it is not, and what the released code does."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.diffusion.noise import step_noise
from workbench.diffusion.sampling import Injection
from workbench.directions.boundary_fit import fit_boundary
from workbench.editing.cross import Cross, cross_boundary

T_M = 500
VISITED = (750, 500, 250, 0)
N = 24


@pytest.fixture(scope="module")
def images(tiny):
    return torch.rand(N, *tiny.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@pytest.fixture(scope="module")
def inverted(tiny, images):
    return wb.invert(tiny, images, steps=VISITED, record_h=True, record_x=True, progress=False)


@pytest.fixture(scope="module")
def b(inverted):
    """Boundaries of two unrelated labels in both spaces: {"h": [A, B], "x": [A, B]}."""
    rng = np.random.default_rng(0)
    labels = {name: rng.permutation(np.arange(N) % 2) for name in ("A", "B")}
    return {s: [fit_boundary(inverted, y, t=T_M, space=s, name=name) for name, y in labels.items()] for s in "hx"}


@pytest.fixture(scope="module")
def three(tiny, images):
    """Three images, inverted as far as the boundary in one batch."""
    return wb.invert(tiny, images[:3], steps=VISITED[1:], record_h=True, record_x=True, progress=False)


NEAR = {"atol": 1e-4, "rtol": 1e-4}


def cross(model, runs, *boundaries, **options):
    return cross_boundary(model, runs, *boundaries, **{"progress": False, **options})


def naive(model, run, *, x_t, h, eta, seeds, offset=None, stale=False):
    """The reverse process from T_M step by step, by whole passes; h is decoded from at the first step."""
    schedule, own_before = model.schedule, None
    with torch.inference_mode():
        for i, (t, t_prev) in enumerate(schedule.pairs(VISITED[1:])):
            bottleneck = model.encode(x_t, t)
            used = h if i == 0 and h is not None else own_before if stale and i else bottleneck.h
            used = used if offset is None else bottleneck.h + offset
            own_before, noise = bottleneck.h, step_noise(seeds, run.x_T.shape[1:], t=t) if eta else None
            x_t = schedule.ddim_step(x_t, model.decode(bottleneck.with_h(used)), (t, t_prev), eta=eta, noise=noise)
    return x_t


# What it is


@pytest.mark.parametrize("spaces", ["hx", "h", "x"])
@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_an_edit_is_one_move_of_x_and_h_at_t_and_then_the_reverse_process(tiny, three, b, spaces, eta):
    given = {f"boundary_{s}": b[s][0] for s in spaces}
    grid = cross(tiny, three, **given, distances=[2.0], unit="distance", eta=eta, seed=7)
    x_t, h = three.x_at(T_M), torch.from_numpy(three.h.at(T_M)).view(3, *tiny.h_shape)
    x_t = b["x"][0].move(x_t, to=2.0) if "x" in spaces else x_t
    h = b["h"][0].move(h, to=2.0) if "h" in spaces else None
    torch.testing.assert_close(grid.images[:, 0], naive(tiny, three, x_t=x_t, h=h, eta=eta, seeds=[7, 8, 9]), **NEAR)


@pytest.mark.parametrize("spaces", ["hx", "h", "x"])
def test_at_the_samples_own_distance_and_eta_0_it_is_the_plain_reconstruction_bit_for_bit(tiny, three, b, spaces):
    plain = wb.replay(three, progress=False).x0
    own = {"h": b["h"][0].distance(three.h.at(T_M)), "x": b["x"][0].distance(three.x.at(T_M))}
    given = {f"boundary_{s}": b[s][0] for s in spaces}
    for options in (
        {"distances": {s: own[s][:, None, None] for s in spaces}, "unit": "distance"},
        {"distances": [0.0], "mode": "shift"},
        {"distances": [0.0], "mode": "mirror", "keep_norm": True},
        {"distances": [0.0], "mode": "shift", "h_policy": "offset"},
    ):
        assert torch.equal(cross(tiny, three, **given, eta=0.0, **options).images[:, 0], plain), options


def test_both_spaces_matter_and_both_signs(tiny, three, inverted, b):
    bh, bx = b["h"][0], b["x"][0]
    same = {"distances": [-4.0, 4.0], "mode": "shift", "unit": "distance", "eta": 0.0}
    plain = wb.replay(three, progress=False).x0[:, None]
    ways = {"both": (bh, bx), "h": (bh, None), "x": (None, bx)}
    changes = {name: cross(tiny, three, *way, **same).images - plain for name, way in ways.items()}
    for change in changes.values():
        assert change.abs().amax(dim=(1, 2, 3, 4)).min() > 1e-3
        assert ((change[:, 0] * change[:, 1]).sum(dim=(1, 2, 3)) < 0).all()
    assert (changes["both"] - changes["x"]).abs().max() > 1e-3
    labels = np.random.default_rng(0).permutation(np.arange(N) % 2)
    back = fit_boundary(inverted, 1 - labels, t=T_M, space="x")
    there = cross(tiny, three, None, bx, distances=[-2.0, 2.0], eta=0.0).images
    turned = cross(tiny, three, None, back, distances=[2.0, -2.0], eta=0.0).images
    torch.testing.assert_close(there, turned, atol=1e-3, rtol=1e-3)


def test_distances_in_sd_are_those_of_each_space(tiny, three, b):
    bh, bx = b["h"][0], b["x"][0]
    in_sd = cross(tiny, three, bh, bx, distances=[1.5])
    alike = cross(tiny, three, bh, bx, distances={"h": [1.5 * bh.sigma], "x": [1.5 * bx.sigma]}, unit="distance")
    assert torch.equal(in_sd.images, alike.images)
    doubled = replace(bx, deviations=tuple(2 * s for s in bx.deviations))
    other = cross(tiny, three, None, doubled, distances=[0.75])
    torch.testing.assert_close(other.images, cross(tiny, three, None, bx, distances=[1.5]).images)


# Noise and batches


def test_a_batch_of_edits_is_its_edits_one_by_one_of_the_same_x_and_noise(tiny, three, b):
    bounds, distances = [b[s][0] for s in "hx"], [-2.0, 2.0, -2.0]
    whole = cross(tiny, three, *bounds, distances=distances, batch_size=9).images
    # Equal cells of one batch may fall to different threads, whose sums are rounded differently.
    torch.testing.assert_close(whole[:, 0], whole[:, 2], atol=1e-5, rtol=1e-5)
    assert (whole[:, 0] - whole[:, 1]).abs().max() > 1e-3 and (whole[0, 0] - whole[1, 0]).abs().max() > 1e-3
    for s in range(3):
        for c, distance in enumerate(distances[:2]):
            one = cross(tiny, three[s], *bounds, distances=[distance], seed=s).images
            torch.testing.assert_close(whole[s, c], one[0, 0], **NEAR)
    for size in (1, 4):
        parts = cross(tiny, three, *bounds, distances=distances, batch_size=size).images
        torch.testing.assert_close(parts, whole, **NEAR)


def test_the_seed_gives_the_noise_of_eta_1_and_nothing_at_eta_0(tiny, three, b):
    still, again, noisy, other = (
        cross(tiny, three, None, b["x"][0], distances=[1.0], eta=eta, seed=seed).images
        for eta in (0.0, 1.0)
        for seed in (0, 50)
    )
    assert torch.equal(still, again)
    assert (noisy - other).abs().max() > 1e-2 and (noisy - still).abs().max() > 1e-2


def test_the_passes_are_one_encoder_a_sample_and_the_steps_of_every_cell(tiny, three, b, monkeypatch):
    passes = []
    encode = type(tiny).encode
    monkeypatch.setattr(type(tiny), "encode", lambda self, x, t: passes.append((t, len(x))) or encode(self, x, t))
    cross(tiny, three, *(b[s][0] for s in "hx"), distances=[-1.0, 0.0, 1.0, 2.0], batch_size=64)
    assert passes == [(500, 3), (500, 12), (250, 12), (0, 12)]


# Sources


def test_a_whole_inversion_and_one_that_ends_at_t_give_the_same_edit(tiny, inverted, three, b):
    bounds = [b[s][0] for s in "hx"]
    whole, short = (cross(tiny, runs, *bounds, distances=[1.0]).images for runs in (inverted[:3], three))
    torch.testing.assert_close(whole, short, **NEAR)
    forgetful = wb.invert(tiny, three.x0, steps=VISITED, progress=False)
    with pytest.raises(ValueError, match="record_x=True"):
        cross(tiny, forgetful, *bounds)


def test_generated_samples_come_down_to_t_by_their_own_process(tiny, b):
    run = wb.sample(tiny, [3, 8], steps=VISITED, eta=0.0, progress=False)
    grid = cross(tiny, run, None, b["x"][0], distances=[0.0, 2.0], mode="shift", eta=0.0)
    torch.testing.assert_close(grid.images[:, 0], run.x0, atol=1e-5, rtol=1e-5)
    assert grid.row_labels == ("seed 3", "seed 8")
    stochastic = cross(tiny, run, None, b["x"][0], distances=[0.0], mode="shift", eta=1.0)
    by_seed = cross(tiny, run[1], None, b["x"][0], distances=[0.0], mode="shift", eta=1.0, seed=8)
    torch.testing.assert_close(stochastic.images[1], by_seed.images[0], **NEAR)


def test_an_edit_friendly_inversion_keeps_its_noise(tiny, images, b):
    run = wb.invert(tiny, images[:3], steps=VISITED, method="edit-friendly", record_x=True, progress=False)
    grid = cross(tiny, run, None, b["x"][0], distances=[0.0, 3.0], mode="shift", eta=None)
    torch.testing.assert_close(grid.images[:, 0], run.x0 - run.residual, **NEAR)
    assert (grid.images[:, 1] - grid.images[:, 0]).abs().max() > 1e-3
    with pytest.raises(ValueError, match="seed is 3"):
        cross(tiny, run, None, b["x"][0], eta=None, seed=3)


def test_the_steps_of_the_released_code_have_its_sigmas():
    """The grid of 40 points from 500 down: sigma of 500 -> 487 at eta 1, of 12 -> 0, and of the last step."""
    schedule = wb.NoiseSchedule.linear()
    assert schedule.sigma(500, 487, 1.0) == pytest.approx(0.3469, abs=1e-4)
    a_prev = schedule.alpha_bar(487)
    assert (1 - a_prev - schedule.sigma(500, 487, 1.0) ** 2) ** 0.5 == pytest.approx(0.8894, abs=1e-4)
    assert schedule.sigma(12, 0, 1.0) == pytest.approx(0.0098, abs=1e-4)
    assert schedule.sigma(0, -1, 1.0) == 0.0


# What is done to h


def test_h_policies_are_what_they_are_said_to_be(tiny, three, b):
    bh, bx = b["h"][0], b["x"][0]
    x_t, h = bx.move(three.x_at(T_M), to=2.0), torch.from_numpy(three.h.at(T_M)).view(3, *tiny.h_shape)
    moved = bh.move(h, to=2.0)
    seeds = {"eta": 1.0, "seeds": [0, 1, 2]}
    expected = {
        "first": naive(tiny, three, x_t=x_t, h=moved, **seeds),
        "stale": naive(tiny, three, x_t=x_t, h=moved, stale=True, **seeds),
        "offset": naive(tiny, three, x_t=x_t, h=None, offset=moved - h, **seeds),
        "none": naive(tiny, three, x_t=x_t, h=None, **seeds),
    }
    for policy, images in expected.items():
        grid = cross(tiny, three, bh, bx, distances=[2.0], unit="distance", h_policy=policy)
        torch.testing.assert_close(grid.images[:, 0], images, atol=2e-4, rtol=1e-4, msg=policy)
    found = list(expected.values())
    assert all((p - q).abs().max() > 1e-3 for i, p in enumerate(found) for q in found[:i])
    assert torch.equal(
        cross(tiny, three, bh, bx, distances=[2.0], h_policy="none").images,
        cross(tiny, three, None, bx, distances=[2.0]).images,
    )


def test_an_asymmetric_offset_is_asyrps(tiny, three, b):
    bh = b["h"][0]
    direction_h = np.zeros((3, *tiny.h_shape), dtype=np.float32) + 3.0 * bh.normal.numpy()
    ours = cross(tiny, three, bh, distances=[3.0], mode="shift", unit="distance", h_policy="offset-asymmetric", eta=0.0)
    delta = torch.from_numpy(direction_h).expand(3, 3, *tiny.h_shape)
    theirs = wb.replay(three, edit=Injection.adding(delta.contiguous(), asymmetric=True), progress=False).x0
    torch.testing.assert_close(ours.images[:, 0], theirs, **NEAR)


def test_stale_without_a_boundary_in_h_still_lags(tiny, three, b):
    bx, same = b["x"][0], {"distances": [0.0], "mode": "shift", "eta": 0.0}
    stale = cross(tiny, three, None, bx, h_policy="stale", **same).images
    assert (stale - cross(tiny, three, None, bx, **same).images).abs().max() > 1e-3


def test_a_lagged_h_comes_from_the_next_cleaner_timestep(tiny, three, inverted, b):
    lagged = fit_boundary(inverted, np.arange(N) % 2, t=250)
    grid = cross(tiny, three, lagged, b["x"][0], distances=[2.0], unit="distance", h_align="lagged", eta=0.0).images
    h = torch.from_numpy(three.h.at(250)).view(3, *tiny.h_shape)
    x_t = b["x"][0].move(three.x_at(T_M), to=2.0)
    expected = naive(tiny, three, x_t=x_t, h=lagged.move(h, to=2.0), eta=0.0, seeds=[0, 1, 2])
    torch.testing.assert_close(grid[:, 0], expected, **NEAR)
    with pytest.raises(ValueError, match="fitted at timestep 250, not at 500"):
        cross(tiny, three, lagged, b["x"][0])
    with pytest.raises(ValueError, match="fitted at timestep 500, not at 250"):
        cross(tiny, three, b["h"][0], b["x"][0], h_align="lagged")


def test_a_network_with_learned_variance_decodes_the_edited_h(make_unet):
    """The released code hands h to such networks as a class label, which they ignore: its edits are of x alone."""
    unet = make_unet(out_channels=6, resnet_time_scale_shift="scale_shift")
    model = wb.wrap(unet, wb.NoiseSchedule.linear(), name="learned variance", device="cpu")
    run = wb.sample(model, range(12), steps=VISITED, eta=0.0, record_h=True, progress=False)
    bh = fit_boundary(run, np.arange(12) % 2, t=T_M)
    grid = cross(model, run[:3], bh, distances=[0.0, 5.0], mode="shift", unit="distance", eta=0.0)
    torch.testing.assert_close(grid.images[:, 0], run.x0[:3], atol=1e-5, rtol=1e-5)
    assert (grid.images[:, 1] - grid.images[:, 0]).abs().amax(dim=(1, 2, 3)).min() > 1e-3


# Several attributes


def coordinates(model, runs, boundaries, monkeypatch, **options):
    """Distances of the x_t that the decoder begins with, (cells, m)."""
    seen = []
    encode = type(model).encode
    with monkeypatch.context() as patch:
        patch.setattr(type(model), "encode", lambda self, x, t: seen.append(x) or encode(self, x, t))
        cross(model, runs, None, boundaries, batch_size=64, **options)
    return np.stack([boundary.distance(seen[0]) for boundary in boundaries], axis=1)


def test_rules_for_several_attributes(tiny, three, b, monkeypatch):
    first = b["x"][0]
    mixed = first.normal + b["x"][1].normal
    pair = [first, replace(b["x"][1], normal=mixed / mixed.norm())]
    cosine = pair[0].cosine(pair[1])
    assert cosine > 0.5
    plain = np.stack([boundary.distance(three.x_at(T_M)) for boundary in pair], axis=1)
    options = {"distances": [(3.0, -2.0)], "unit": "distance"}
    joint = coordinates(tiny, three, pair, monkeypatch, multi="joint", **options)
    np.testing.assert_allclose(joint, [[3.0, -2.0]] * 3, atol=1e-4)
    one_by_one = coordinates(tiny, three, pair, monkeypatch, multi="sequential", **options)
    np.testing.assert_allclose(one_by_one[:, 1], -2.0, atol=1e-4)
    np.testing.assert_allclose(
        one_by_one[:, 0], 3.0 + cosine * (-2.0 - (plain[:, 1] + cosine * (3.0 - plain[:, 0]))), atol=1e-4
    )
    conditional = coordinates(tiny, three, pair, monkeypatch, multi="conditional", **options)
    np.testing.assert_allclose(conditional - plain, np.sqrt(1 - cosine**2) * ([[3.0, -2.0]] - plain), atol=1e-4)


def test_a_pair_of_attributes_is_edited_in_both_spaces(tiny, three, b):
    grid = cross(tiny, three, b["h"], b["x"], distances=[(1.0, -1.0), (0.0, 0.0)], multi="joint")
    assert grid.images.shape == (3, 2, *tiny.image_shape)
    assert grid.column_labels == ("A +1 sd\nB -1 sd", "A 0 sd\nB 0 sd")
    with pytest.raises(ValueError, match="1 boundaries in h and 2 in x"):
        cross(tiny, three, b["h"][0], b["x"])
    apart = {"h": [3.0], "x": [(1.0, -1.0)]}
    assert cross(tiny, three, b["h"][0], b["x"], distances=apart, multi="joint").images.shape[:2] == (3, 1)


# What comes back


def test_a_grid_says_what_it_is(tiny, three, b):
    bx = b["x"][0]
    grid = cross(tiny, three, None, bx, distances=[-2.0, 0.0])
    assert grid.column_labels == ("-2 sd", "0 sd")
    assert cross(tiny, three, None, bx, distances=[5.0], unit="distance").column_labels == ("+5",)
    assert cross(tiny, three, *(b[s][0] for s in "hx"), distances=[1.0]).column_labels == ("+1 sd",)
    assert cross(tiny, three, None, bx, distances=[-2.0], mode="mirror").column_labels == ("-2 times",)
    assert grid.row_labels == ("image 0", "image 1", "image 2")
    assert grid.provenance["edits"][0]["boundaries"][0]["space"] == "x"


def refusals(b):
    """Boundaries in h and x, options, and what is named."""
    h, x = b["h"][0], b["x"][0]
    yield None, None, {}, "no boundary to cross"
    yield h, None, {"h_policy": "none"}, "no boundary to cross"
    yield x, None, {}, "boundary in x_t, not in h_t"
    yield None, h, {}, "boundary in h_t, not in x_t"
    yield None, replace(x, t=490), {}, "timestep 490 .*nearest 500 or 250"
    yield replace(h, t=250), x, {}, "fitted at timestep 250, not at 500"
    yield h, x, {"distances": {"h": [1.0], "x": [1.0, 2.0]}}, "1 and 2 columns"
    yield None, replace(x, deviations=None), {}, "deviations of A are not known"
    for options, words in (
        ({"distances": []}, "distances have shape"),
        ({"distances": 3.0}, r"distances have shape \(\)"),
        ({"distances": [(1.0, 2.0)]}, r"distances have shape \(1, 2\)"),
        ({"distances": [np.nan]}, "a distance is nan"),
        ({"distances": {"h": [1.0]}}, "a boundary is in 'x'"),
        *(({name: "often"}, f"{name} 'often'") for name in ("unit", "multi", "h_policy", "mode")),
        ({"eta": 2.0}, "eta must lie in"),
        ({"batch_size": -1}, "batch_size is -1"),
    ):
        yield None, x, options, words


def test_bad_input_is_a_sentence(tiny, three, b, make_unet):
    for in_h, in_x, options, words in refusals(b):
        with pytest.raises(ValueError, match=words):
            cross(tiny, three, in_h, in_x, **options)
    other = wb.wrap(make_unet(seed=1), tiny.schedule, name="other", device="cpu")
    edited = wb.replay(three, edit=Injection.adding(torch.zeros(3, 1, *tiny.h_shape)), progress=False)
    elsewhere = wb.invert(other, three.x0, steps=VISITED[1:], progress=False)
    for model, run, in_h, in_x, words in (
        (tiny.tapped("before"), three, b["h"][0], None, "tapped"),
        (tiny, edited, b["h"][0], None, "edited already"),
        (other, elsewhere, None, b["x"][0], "belongs to the model 'tiny'"),
    ):
        with pytest.raises(ValueError, match=words):
            cross(model, run, in_h, in_x)


def test_a_control_moves_as_far_along_a_random_normal(tiny, three, b):
    found, control = Cross(b["h"][0], b["x"][0]), Cross(b["h"][0], b["x"][0], control=1)
    x_t = three.x_at(T_M)
    moves = [[plan.x_T - x_t for plan in cross.plan(three, [-2.0, 3.0])] for cross in (found, control)]
    for own, random in zip(*moves, strict=True):
        torch.testing.assert_close(own.flatten(1).norm(dim=1), random.flatten(1).norm(dim=1), rtol=1e-4, atol=1e-5)
        assert (torch.cosine_similarity(own.flatten(1), random.flatten(1)).abs() < 0.5).all()


@pytest.mark.parametrize("space", ["h", "x"])
@pytest.mark.parametrize("multi", ["sequential", "joint", "conditional"])
def test_the_control_of_several_boundaries_has_as_many_normals_at_the_same_angles(tiny, three, b, multi, space):
    """So that all moves have the lengths, and the angles to each other, of those across the boundaries."""
    first, second = b[space]
    between = (first.normal + second.normal) / (first.normal + second.normal).norm()
    related = [first, replace(second, normal=between)]
    own = torch.from_numpy(three.h.at(T_M)).view(3, *tiny.h_shape) if space == "h" else three.x_at(T_M)
    moves = []
    for control in (None, 1):
        edit = Cross(**{space: related}, multi=multi, control=control, h_policy="first" if space == "h" else "none")
        to = edit.targets(three, [(2.0, -1.0), (0.0, 3.0)])[space]
        moves.append(torch.stack([edit._moved(own, space, to[:, i]) - own for i in range(2)], dim=1).flatten(2))
    found, random = moves
    torch.testing.assert_close(random @ random.mT, found @ found.mT, rtol=1e-3, atol=1e-3)
    assert (torch.cosine_similarity(found, random, dim=2).abs() < 0.5).all()


@pytest.mark.parametrize("h_policy", ["first", "stale", "offset", "offset-asymmetric"])
def test_an_edit_of_a_run_is_that_of_the_grid(tiny, three, b, h_policy):
    """`edit` gives an injection a slice of the samples, `render` their numbers."""
    cross = Cross(b["h"][0], b["x"][0], mode="shift", h_policy=h_policy)
    alone = wb.edit(tiny, three, cross, scale=2.0, progress=False).x0
    grid = wb.render(three, {"crossed": cross}, scales=[2.0], progress=False)
    torch.testing.assert_close(alone, grid.images.view_as(alone), **NEAR)


def test_a_crossing_is_compared_with_its_own_decoding(tiny, three, b):
    """`Cross.plain` has the eta and noise of the edit, so that a move of no length changes nothing."""
    for options in ({}, {"eta": 0.0}, {"h_policy": "stale"}, {"seed": 3}):
        cross = Cross(b["h"][0], b["x"][0], mode="shift", **options)
        still = wb.replay(cross.plan(three, [0.0])[0], progress=False).x0
        plain = wb.replay(cross.plain(three), progress=False).x0
        torch.testing.assert_close(still, plain, **NEAR)
