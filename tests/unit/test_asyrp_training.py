"""Training of DeltaBlocks by texts: the published loss, the asymmetric process, and the files."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.directions.asyrp import load_asyrp
from workbench.editing import asyrp_training
from workbench.editing.asyrp import EditingInterval
from workbench.editing.asyrp_training import asyrp_loss, clip_interval, train_asyrp

QUIET = {"progress": False}
TEXTS = {"source": "a blue square", "interval": EditingInterval(400, 100)}


@pytest.fixture(scope="module")
def clip(squares):
    return wb.load_clip(squares[1], device="cpu")


@pytest.fixture(scope="module")
def run(tiny):
    return wb.sample(tiny, range(6), steps=5, eta=0.0, record_x=True, **QUIET)


@pytest.fixture(scope="module")
def trained(tiny, clip, run):
    return train_asyrp(
        tiny, "a red square", clip=clip, run=run, epochs=6, batch_size=3, learning_rate=1e-2, **TEXTS, **QUIET
    )


def test_the_loss_is_asyrps(clip, squares):
    """-log((2 - L_dir) / 2) of the mean direction of each image, and L1, written out image by image."""
    images, _ = squares
    plain, edited = images[:3], images[4:7] * 0.9
    first, second = torch.from_numpy(clip.texts(["a blue square", "a red square"]))
    along = (second - first) / (second - first).norm()
    expected = []
    for a, b in zip(plain, edited, strict=True):
        moved = (clip.differentiable(b[None]) - clip.differentiable(a[None]))[0]
        L_dir = 1 - float(moved @ along / moved.norm())
        expected.append(-math.log((2 - L_dir) / 2))
    loss, (directional, l1) = asyrp_loss(edited, plain, clip=clip, along=along, weights=(0.8, 2.5))
    assert directional == pytest.approx(np.mean(expected), rel=1e-3)
    assert l1 == pytest.approx(float((edited - plain).abs().mean()), rel=1e-5)
    assert float(loss) == pytest.approx(0.8 * directional + 2.5 * l1, rel=1e-5)


def test_the_directional_loss_falls(trained):
    losses = np.array(trained.training["losses"])
    assert losses.shape == (6, 2) and losses[-1, 0] < losses[0, 0]
    assert losses[0, 1] < losses[-1, 1]  # it begins at the unedited image


def test_the_process_that_it_is_trained_in_is_the_one_that_edits(tiny, clip, run, monkeypatch):
    """P_t alone is edited, down to t_edit: the images that training ends at are those of the asymmetric edit."""
    seen, step = {}, asyrp_training._step

    def watch(function, x, pair, **options):
        (plain, edited), *rest = step(function, x, pair, **options)
        seen[pair[0]] = plain, edited
        return ((plain, edited), *rest)

    monkeypatch.setattr(asyrp_training, "_step", watch)
    options = {"clip": clip, "run": run, "epochs": 1, "batch_size": len(run), "learning_rate": 0.0} | TEXTS | QUIET
    function = train_asyrp(tiny, "a red square", **options)
    torch.nn.init.normal_(function.terms[0][1].conv2.weight, std=0.3)
    monkeypatch.setattr(torch.nn.init, "zeros_", lambda weight: weight)
    monkeypatch.setattr(asyrp_training, "DeltaBlock", lambda *_: function.terms[0][1].requires_grad_(True))
    train_asyrp(tiny, "a red square", seed=0, **options)
    order, t = np.random.default_rng(0).permutation(len(run)), min(seen)
    assert t >= 400 and max(seen) == run.timesteps[0]
    edited = wb.edit(tiny, run, replace(function), asymmetric=True, t_range=(999, 400), **QUIET)
    edited = wb.replay(edited, record_x=True, **QUIET)
    after = edited.timesteps[edited.timesteps.index(t) + 1]
    torch.testing.assert_close(seen[t][1], edited.x_at(after)[order], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(seen[t][0], run.x_at(after)[order], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ending", ["pth", "safetensors"])
def test_a_file_gives_the_function_back(trained, tiny, tmp_path, ending):
    found = load_asyrp(trained.save(tmp_path / f"red.{ending}"), tiny)
    h = torch.randn(2, *tiny.h_shape)
    assert torch.equal(found(h, 700), trained(h, 700))
    assert found.name == ("red" if ending == "pth" else "a red square")
    if ending == "pth":
        assert set(torch.load(tmp_path / "red.pth", weights_only=True)["0"]) == set(trained.terms[0][1].state_dict())


def test_an_interval_without_a_visited_timestep_is_refused(tiny, clip, run):
    with pytest.raises(ValueError, match=r"no visited timestep lies in 999\.\.900"):
        options = TEXTS | QUIET | {"interval": EditingInterval(900, 200)}
        train_asyrp(tiny, "a red square", clip=clip, run=run, **options)


def test_a_file_of_ours_is_refused_by_another_model(trained, make_unet, tiny, tmp_path):
    path = trained.save(tmp_path / "red.safetensors")
    other = wb.wrap(make_unet(seed=1), tiny.schedule, name="other", device="cpu")
    with pytest.raises(ValueError, match="other"):
        load_asyrp(path, other)
    with pytest.raises(ValueError, match="combination"):
        (2 * trained).save(tmp_path / "twice.pth")


def test_texts_that_differ_more_are_edited_for_longer(clip, run, monkeypatch):
    monkeypatch.setitem(asyrp_training.LEVELS, "clip", (0.1, 0.1))
    near, far = (clip_interval(run, clip, cosine=cosine, **QUIET).t_edit for cosine in (1.0, 0.2))
    assert far <= near
    monkeypatch.setitem(asyrp_training.LEVELS, "clip", (99.0, 99.0))
    with pytest.warns(UserWarning, match="never 99"):
        assert clip_interval(run, clip, cosine=1.0, **QUIET).t_edit == 0


def test_what_can_not_be_trained_is_refused(tiny, clip, run):
    with pytest.raises(ValueError, match="a red square"):
        train_asyrp(tiny, "a red square", source="a red square", clip=clip, run=run, **QUIET)
    with pytest.raises(ValueError, match="deterministic"):
        train_asyrp(
            tiny, "a red square", clip=clip, run=wb.sample(tiny, [0], steps=3, eta=1.0, **QUIET), **TEXTS, **QUIET
        )
