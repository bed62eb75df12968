"""Asyrp: its DeltaBlocks as functions of h and t, their mean as a direction, its interval and its boosting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler
from originals import DDPMDelta, GuidedDelta, randomised
from planted import planted

import workbench as wb
from workbench.directions.asyrp import DeltaFunction, load_asyrp
from workbench.editing.asyrp import LEVELS, EditingInterval, _read_off, boosted, edit_asyrp, find_interval

LAYOUTS = {"ddpm": DDPMDelta, "guided": GuidedDelta}
CHANNELS, EMB = 64, 32


def save(block: torch.nn.Module, path, **more):
    """As Asyrp's training saves: the block, its optimiser and its scheduler."""
    optimizer = torch.optim.SGD(block.parameters(), lr=0.5)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=20, gamma=0.9)
    states = {"0": block.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    torch.save(states | more, path)
    return path


@pytest.fixture(scope="module")
def wide(make_unet):
    """A tiny network whose h has two channels in each of the 32 groups: alone, a channel loses the timestep's shift."""
    return wb.wrap(make_unet(block_out_channels=(8, CHANNELS)), DDPMScheduler(), name="wide", device="cpu")


@pytest.fixture(params=LAYOUTS)
def block(request):
    return randomised(LAYOUTS[request.param](CHANNELS, EMB))


@pytest.fixture
def function(block, wide, tmp_path) -> DeltaFunction:
    return load_asyrp(save(block, tmp_path / "smiling_LC_CelebA_HQ_t999_ninv40_ngen40_0.pth"), wide)


@pytest.fixture
def run(wide):
    return wb.sample(wide, range(3), steps=5, eta=0.0, record_h=True, record_x=True, progress=False)


# Delta h


def test_a_delta_block_computes_what_the_original_does(block, function, wide):
    h = torch.randn(2, *wide.h_shape, generator=torch.Generator().manual_seed(0))
    for t in (0, 500, 980):
        expected = block(h, wide.unet.embed(t, 2))
        torch.testing.assert_close(function(h, t), expected, atol=1e-5, rtol=1e-5)
    emb = torch.randn(2, EMB, generator=torch.Generator().manual_seed(1))
    ((_, ours),) = function.terms
    torch.testing.assert_close(ours(h, emb), block(h, emb), atol=1e-5, rtol=1e-5)
    assert (ours(h, emb) - ours(h, -emb)).abs().max() > 0.1
    assert function.name == "smiling"


def test_several_blocks_add_up(function, wide):
    h = torch.randn(2, *wide.h_shape, generator=torch.Generator().manual_seed(0))
    both = 2 * function + -function
    torch.testing.assert_close(both(h, 500), function(h, 500), atol=1e-5, rtol=1e-5)
    assert both.name == "2 smiling + -smiling"
    assert len(both.sources) == 2


def test_the_mean_over_samples_is_an_ordinary_direction(function, wide, tmp_path):
    store = wb.extract(wide, n=5, steps=4, dtype="float32", out=tmp_path / "h.zarr", progress=False)
    found = function.mean(store, progress=False)
    for t, unit in zip(store.timesteps, found.unit, strict=True):
        mean = function(torch.from_numpy(store.at(t)).unflatten(1, wide.h_shape), t).mean(0)
        torch.testing.assert_close(unit, mean / mean.norm(), atol=1e-5, rtol=1e-4)
    projected = store.at(store.timesteps[0]) @ found.unit[0].flatten().numpy()
    assert found.sigma[0].item() == pytest.approx(projected.std(ddof=1), rel=1e-4)
    path = found.save(tmp_path / "smile.safetensors")
    assert wb.load_direction(path, model=wide).provenance["method"] == "calibrated"


def test_the_mean_takes_the_samples_of_the_model_by_another_name_and_refuses_those_of_another_tap(
    function, wide, tmp_path
):
    options = {"n": 2, "steps": 2, "progress": False}
    renamed = wb.extract(replace(wide, name="mine"), out=tmp_path / "h.zarr", **options)
    assert function.mean(renamed, progress=False).timesteps == renamed.timesteps
    with pytest.raises(ValueError, match="'before'"):
        function.mean(wb.extract(wide.tapped("before"), out=tmp_path / "b.zarr", **options), progress=False)


# Edits


def test_an_edit_adds_delta_h_of_the_edited_runs_own_h_asymmetrically(function, wide, run):
    """Against the loop written out: P_t from the edited eps, D_t from the plain one, at t >= t_edit."""
    edited = wb.edit(wide, run, function, scale=0.7, asymmetric=True, t_range=(999, 400), progress=False)
    x_t = run.x_T
    for t, t_prev in wide.schedule.pairs(run.timesteps):
        plain = wide.encode(x_t, t)
        h = plain.h + (0.7 * function(plain.h, t) if t >= 400 else 0.0)
        eps, eps_edited = wide.decode(plain), wide.decode(plain.with_h(h))
        a, a_prev = wide.schedule.alpha_bar(t), wide.schedule.alpha_bar(t_prev)
        p_t = (x_t - (1 - a) ** 0.5 * eps_edited) / a**0.5
        x_t = a_prev**0.5 * p_t + (1 - a_prev) ** 0.5 * eps
    torch.testing.assert_close(edited.x0, x_t, atol=1e-3, rtol=1e-3)
    assert (edited.x0 - run.x0).abs().max() > 1e-2
    assert "Injection(asymmetric=True)" in repr(edited)


def test_scale_0_is_the_unedited_image_to_the_bit_signs_differ_and_a_grid_is_its_edits(function, wide, run):
    options = {"asymmetric": True, "progress": False}
    grid = wb.edit_grid(wide, run, function, scales=[0.0, 0.5], **options).images
    still, more, less = (wb.edit(wide, run, function, scale=s, **options).x0 for s in (0.0, 0.5, -0.5))
    assert torch.equal(still, run.x0) and torch.equal(grid[:, 0], run.x0)
    assert (more - less).abs().max() > 1e-2
    # Another size of batch rounds differently.
    torch.testing.assert_close(wb.edit(wide, run[1], function, scale=0.5, **options).x0, more[1:2], atol=1e-3, rtol=0)
    torch.testing.assert_close(grid[:, 1], more, atol=1e-3, rtol=0)


def test_an_edit_refuses_another_model_and_other_timesteps(function, wide, run, make_unet):
    other = wb.wrap(make_unet(seed=3, block_out_channels=(8, CHANNELS)), DDPMScheduler(), name="other", device="cpu")
    foreign = wb.sample(other, [0], steps=5, eta=0.0, progress=False)
    with pytest.raises(ValueError, match="smiling belongs to the model 'wide' .* 'other'"):
        wb.edit(other, foreign, function)
    edited = wb.edit(wide, run, function, progress=False)
    longer = wb.sample(wide, [0], steps=6, eta=0.0, progress=False)
    with pytest.raises(ValueError, match="other timesteps"):
        wb.replay(longer, edit=edited.edit)


# Interval and boosting


def test_boosting_adds_noise_below_t_boost_alone(wide, run):
    noisy = wb.replay(boosted(run, 400), record_x=True, progress=False)
    assert noisy.etas == (0.0, 0.0, 0.0, 1.0, 1.0)
    assert torch.equal(noisy.x.values[:4], run.x.values[:4])
    assert not torch.equal(noisy.x0, run.x0)
    with pytest.raises(ValueError, match="adds noise already"):
        boosted(noisy, 400)


def test_boosting_of_inverted_images_at_no_timestep_changes_nothing(wide, run):
    images = run.x0.clamp(-1, 1)
    inverted = wb.invert(wide, images, steps=5, progress=False)
    assert torch.equal(boosted(inverted, 0).x0, images)
    plain = wb.replay(inverted, progress=False).x0
    assert torch.equal(wb.replay(boosted(inverted, 0), progress=False).x0, plain)


def test_the_whole_edit_rescales_by_the_steps_that_blocks_were_trained_with(function, wide, run):
    interval = EditingInterval(400, 200)
    whole = edit_asyrp(wide, run, function, interval=interval, scale=0.1, progress=False)
    parts = wb.edit(
        wide, boosted(run, 200), function, scale=0.1 * 40 / 5, asymmetric=True, t_range=(999, 400), progress=False
    )
    assert torch.equal(whole.x0, parts.x0)
    unedited = edit_asyrp(wide, run, function, interval=interval, scale=0.0, progress=False)
    assert torch.equal(unedited.x0, wb.replay(boosted(run, 200), progress=False).x0)


def test_a_block_that_was_trained_here_is_rescaled_by_its_own_steps(function, wide, run, tmp_path):
    """At full strength where it edits with as many steps as it was trained with; so is each part of a sum."""
    interval, ours = EditingInterval(400, 200), replace(function, training={"steps": run.steps})
    window = {"asymmetric": True, "t_range": (999, 400), "progress": False}
    whole = edit_asyrp(wide, run, ours, interval=interval, progress=False)
    assert torch.equal(whole.x0, wb.edit(wide, boosted(run, 200), ours, **window).x0)
    again = load_asyrp(ours.save(tmp_path / "block.safetensors"), wide)
    assert torch.equal(edit_asyrp(wide, run, again, interval=interval, progress=False).x0, whole.x0)
    published = 40 / run.steps * function
    for both in (ours + function, function + ours):
        found = edit_asyrp(wide, run, both, interval=interval, scale=0.1, progress=False)
        parts = wb.edit(wide, boosted(run, 200), ours + replace(published, training=ours.training), scale=0.1, **window)
        torch.testing.assert_close(found.x0, parts.x0)


def test_an_interval_starts_at_the_first_timestep_that_reaches_the_level_times_the_cosine():
    t = np.arange(1, 999)
    curves = pd.DataFrame({"P_t": (t + 0.5) / 1000, "x_t": (t + 0.5) / 200}, index=t)
    for cosine, t_edit in ((1.0, 330), (0.9, 297)):
        found = _read_off(curves, LEVELS["lpips"], cosine)
        assert (found.t_edit, found.t_boost) == (t_edit, 240)
    for wrong in (0.0, 1.5):
        with pytest.raises(ValueError, match=r"it lies in \(0, 1\]"):
            _read_off(curves, LEVELS["lpips"], wrong)


def test_the_noise_of_an_inverted_run_is_that_of_the_seed_and_a_direction_is_not_rescaled(wide, run):
    inverted = wb.invert(wide, run.x0.clamp(-1, 1), steps=5, record_x=True, progress=False)
    interval = EditingInterval(t_edit=400, t_boost=400)
    sampled = wb.sample(wide, [0, 1], steps=5, record_h=True, progress=False)
    direction = planted(wide, sampled, 1, "d")
    options = {"interval": interval, "progress": False}
    one, again, other = (edit_asyrp(wide, inverted, direction, seed=s, **options).x0 for s in (3, 3, 4))
    assert torch.equal(one, again) and (one - other).abs().max() > 1e-3
    boosting = boosted(inverted, 400, seed=3)
    window = {"asymmetric": True, "t_range": (999, 400), "progress": False}
    torch.testing.assert_close(one, wb.edit(wide, boosting, direction, **window).x0)


def test_the_interval_of_a_model_is_that_of_its_distances(wide, run):
    inverted = wb.invert(wide, run.x0.clamp(-1, 1), steps=5, record_x=True, progress=False)

    def distance(a, b):
        return (a - b).flatten(1).norm(dim=1).numpy()

    interval = find_interval(inverted, distance=distance, levels=(1e-6, 1e-6), progress=False)
    assert interval.t_edit == interval.t_boost == 0
    curve = interval.curves["x_t"]
    level = (curve.iloc[1] + curve.iloc[2]) / 2
    assert find_interval(inverted, distance=distance, levels=(1e-6, level), progress=False).t_boost == curve.index[2]
    unit = distance(inverted.x0, inverted.x0.roll(1, 0)).mean()
    expected = distance(inverted.x_at(curve.index[2]).clamp(-1, 1), inverted.x0).mean() / unit
    assert curve.iloc[2] == pytest.approx(expected, rel=1e-4)
    p = interval.curves["P_t"]
    for t in inverted.timesteps:
        x_t = inverted.x_at(t)
        p_t = wide.schedule.predict_x0(x_t, wide(x_t, t), t).clamp(-1, 1)
        assert p[t] == pytest.approx(distance(p_t, inverted.x0).mean() / unit, rel=1e-4)
    level = (p.iloc[1] + p.iloc[2]) / 2
    assert find_interval(inverted, distance=distance, levels=(level, 1e-6), progress=False).t_edit == p.index[2]
    with pytest.raises(ValueError, match="P_t reaches .* from the image, never 1e"):
        find_interval(inverted, distance=distance, levels=(1e6, 1.0), progress=False)
    with pytest.raises(ValueError, match="needs levels="):
        find_interval(inverted, distance=distance)
    with pytest.raises(ValueError, match="needs classifier="):
        find_interval(inverted)


# Files that are none of Asyrp's


def test_files_of_something_else_and_weights_that_do_not_fit_are_refused(wide, tmp_path, block):
    with pytest.raises(FileNotFoundError, match="none.pth"):
        load_asyrp(tmp_path / "none.pth", wide)
    path = save(block, tmp_path / "smile.pth")
    state = block.state_dict()
    last = list(state)[-1]
    for content, message in (
        (torch.zeros(32, 4, 4), "no DeltaBlock '0'; it holds a plain Delta h"),
        ({"weight": torch.zeros(2)}, "neither conv1 nor in_layers.2, but weight"),
        ({name: weight for name, weight in state.items() if name != last}, f"Missing .*{last}"),
        (state | {last: torch.zeros(3)}, rf"{last}.*\[3\]"),
        (state | {"more": torch.zeros(1)}, "Unexpected .*more"),
    ):
        torch.save({"0": content}, path)
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_asyrp(path, wide)
    save(block, path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="can't be read as weights"):
        load_asyrp(path, wide)


def test_a_block_of_other_widths_is_refused(tmp_path, wide):
    path = save(randomised(DDPMDelta(96, 128)), tmp_path / "smile.pth")
    with pytest.raises(ValueError, match="takes h of 96 channels and an embedding of 128; wide has 64 and 32"):
        load_asyrp(path, wide)
    path = save(randomised(DDPMDelta(CHANNELS, EMB)), tmp_path / "smile.pth")
    with pytest.raises(ValueError, match='edits h "after" the mid block'):
        load_asyrp(path, wide.tapped("before"))


# Published files, beside the project where they are: `../shared/data/asyrp`

SHARED = Path(__file__).parents[3] / "shared" / "data" / "asyrp"
published = pytest.mark.skipif(not SHARED.is_dir(), reason="Asyrp's published files are not here")


@published
@pytest.mark.parametrize(
    "name", [path.name for path in sorted(SHARED.glob("*.pth"))] if SHARED.is_dir() else ["smiling"]
)
def test_published_delta_blocks_compute_what_the_original_does(make_unet, name):
    weights = torch.load(SHARED / name, map_location="cpu", weights_only=True)["0"]
    original = next(
        block
        for block in (layout(512, 512) for layout in LAYOUTS.values())
        if block.state_dict().keys() == weights.keys()
    )
    original.load_state_dict(weights)
    unet = make_unet(block_out_channels=(128, 512), norm_num_groups=32)
    model = wb.wrap(unet, DDPMScheduler(), name="wide", device="cpu")
    function = load_asyrp(SHARED / name, model)
    h = torch.randn(2, 512, 8, 8, generator=torch.Generator().manual_seed(0))
    ((_, ours),) = function.terms
    for emb in torch.randn(2, 2, 512, generator=torch.Generator().manual_seed(1)):
        with torch.no_grad():
            torch.testing.assert_close(ours(h, emb), original(h, emb), atol=1e-6, rtol=1e-5)
    assert function.name == name.split("_LC_")[0]


@published
def test_the_published_tables_give_the_published_interval():
    tables = {"P_t": "celeba_LPIPS_distance_x0_t.tsv", "x_t": "celeba_LPIPS_distance_x.tsv"}
    curves = pd.DataFrame(
        {name: pd.read_csv(SHARED / file, sep="\t", header=None, index_col=0)[1] for name, file in tables.items()}
    )
    found = _read_off(curves.dropna().sort_index(), LEVELS["lpips"], 1.0)
    assert (found.t_edit, found.t_boost) == (538, 167)
    # The published t_edit of "smiling" is 513; the cosine of its texts is about 0.9.
    assert {_read_off(curves.dropna(), LEVELS["lpips"], c).t_edit for c in np.linspace(0.89, 0.92, 31)} >= {513}
