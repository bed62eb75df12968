"""Sampling, replay, edits of h and inversion, against loops that are written out here."""

from __future__ import annotations

import math
import warnings
from dataclasses import fields
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import workbench as wb
from workbench.diffusion import sampling
from workbench.diffusion.noise import initial_noise, step_noise
from workbench.diffusion.sampling import Injection, progress_bar

STEPS = 4


def sample(model, seeds=range(3), **options):
    return wb.sample(model, seeds, **{"steps": STEPS, "progress": False, **options})


def sample_adding(model, delta, *, record_x=False, **options):
    """Samples with a change (steps, 1 or 3, C, h, w) of h at every step."""
    edit = Injection.adding(delta)
    return wb.replay(sample(model, **options), edit=edit, record_h=record_x, record_x=record_x, progress=False)


@pytest.fixture(scope="module")
def run(tiny):
    return sample(tiny, record_h=True, record_x=True)


def naive(model, run, *, delta=None, asymmetric=False):
    """The reverse process with two whole passes a step, the equations written out."""
    x_t, schedule = run.x_T.clone(), model.schedule
    with torch.inference_mode():
        for i, (t, t_prev) in enumerate(schedule.pairs(run.timesteps)):
            plain = model(x_t, t)
            eps = plain if delta is None else model.decode(model.encode(x_t, t), delta[i])
            a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
            sigma = run.etas[i] * math.sqrt((1 - a_prev) / (1 - a) * (1 - a / a_prev))
            p_t = (x_t - math.sqrt(1 - a) * eps) / math.sqrt(a)
            d_t = math.sqrt(1 - a_prev - sigma**2) * (plain if asymmetric else eps)
            x_t = math.sqrt(a_prev) * p_t + d_t + sigma * step_noise(run.seeds, run.x_T.shape[1:], t=t)
    return x_t


def close(a, b):
    # Untrained networks leave images with values in the tens.
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


# A seed is a sample


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0, [1.0, 0.5, 0.0, 0.0]])
def test_a_run_is_the_equation(tiny, eta):
    run = sample(tiny, eta=eta)
    assert run.etas == ((float(eta),) * STEPS if isinstance(eta, float) else tuple(eta))
    assert torch.equal(run.x_T, initial_noise(range(3), tiny.image_shape))
    close(run.x0, naive(tiny, run))


def test_a_sample_does_not_depend_on_its_batch_nor_on_the_order_of_seeds(tiny, run, model):
    for batch_size in (1, 2, 3, 50):
        close(sample(tiny, batch_size=batch_size).x0, run.x0)
    close(sample(tiny, [2]).x0[0], run.x0[2])
    shuffled = sample(tiny, [2, 0, 1], record_h=True)
    close(shuffled.x0, run.x0[[2, 0, 1]])
    close(shuffled.h.values, run.h.values[:, [2, 0, 1]])
    together = sample(model, [3, 8, 1], steps=3)
    torch.testing.assert_close(sample(model, [8], steps=3).x0[0], together.x0[1], atol=1e-4, rtol=0)


def test_different_seeds_and_different_eta_are_different_images(tiny, run):
    assert (run.x0[0] - run.x0[1]).abs().max() > 0.1
    assert (sample(tiny, eta=0.0).x0 - run.x0).abs().max() > 0.1
    noise = sample(tiny, eta=[1.0, 0.0, 1.0, 1.0]).noise
    assert [z.abs().sum().item() > 0 for z in noise] == [True, False, True, False], "nor does the last step add any"


def test_samples_that_diverge_are_said_with_their_range(tiny, monkeypatch):
    """The untrained network's own, and then none of those that it would have if its range were usual."""
    with pytest.warns(UserWarning, match=r"the samples diverge: they lie in \[-\d.*; tiny was not trained"):
        values = wb.sample(tiny, [0, 1], steps=20, progress=False).x0
    monkeypatch.setattr(sampling, "DIVERGED", float(values.abs().max()))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wb.sample(tiny, [0, 1], steps=20, progress=False)


def test_no_noise_is_kept(run):
    """Memory must not grow with steps unless h or x_t is asked for."""
    bare = sample(run.model)
    kept = {f.name: getattr(bare, f.name) for f in fields(bare)}
    assert sum(v.numel() for v in kept.values() if torch.is_tensor(v)) == 2 * bare.x0.numel()
    assert bare.h is bare.x is None


# Replay


def test_replay_is_exact_to_the_bit(tiny, run):
    again = wb.replay(run, record_h=True, record_x=True, progress=False)
    assert torch.equal(again.x0, run.x0)
    assert torch.equal(again.h.values, run.h.values)
    assert torch.equal(again.x.values, run.x.values)
    edited = sample_adding(tiny, torch.ones(STEPS, 1, *tiny.h_shape))
    for other in (sample(tiny, range(5), batch_size=2), edited):
        assert torch.equal(wb.replay(other, progress=False).x0, other.x0)


def test_a_part_of_a_run_is_a_run_of_these_samples(tiny):
    delta = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(STEPS, 3, *tiny.h_shape)
    run = sample_adding(tiny, delta, record_x=True)
    for index, positions in (
        *((0, [0]), (-1, [2]), (np.int64(1), [1]), (slice(1, None), [1, 2]), (slice(None, None, -1), [2, 1, 0])),
        *(([2, 0], [2, 0]), ([1], [1]), (range(2), [0, 1])),
    ):
        part = run[index]
        assert len(part) == len(positions)
        assert part.seeds == tuple(positions)
        assert torch.equal(part.x0, run.x0[positions])
        assert torch.equal(part.x_T, run.x_T[positions])
        assert torch.equal(part.h.values, run.h.values[:, positions])
        assert torch.equal(part.x.values, run.x.values[:, positions])
        close(wb.replay(part, progress=False).x0, part.x0)
    with pytest.raises(IndexError):
        run[3]
    for none in (slice(3, None), []):
        with pytest.raises(IndexError, match="no sample is chosen; there are 3"):
            run[none]
    assert [r.seeds for r in run] == [(0,), (1,), (2,)]
    t = run.timesteps[1]
    for i in (0, -1, np.int64(1)):
        np.testing.assert_array_equal(run.h[i].at(t), run.h.at(t)[[i]])


def test_records_are_in_the_order_of_samples_and_timesteps(tiny, run):
    assert tuple(run.h.values.shape) == (STEPS, 3, *tiny.h_shape)
    assert tuple(run.x.values.shape) == (STEPS, 3, *tiny.image_shape)
    assert run.h.timesteps == run.timesteps == tiny.schedule.timesteps(STEPS)
    assert torch.equal(run.x.values[0], run.x_T)
    for i, t in enumerate(run.timesteps):
        close(tiny.encode(run.x.values[i], t).h, run.h.values[i])
        assert np.array_equal(run.h.at(t), run.h.values[i].reshape(3, -1).numpy())
        assert run.h.at(t).dtype == np.float32


def test_x_t_is_the_same_kept_or_computed_again(tiny, run):
    for add in (0.0, 1.0):
        delta = torch.full((STEPS, 1, *tiny.h_shape), add)
        kept, bare = sample_adding(tiny, delta, record_x=True), sample_adding(tiny, delta)
        for t in run.timesteps:
            assert torch.equal(bare.x_at(t), kept.x_at(t))


def test_an_unvisited_timestep_is_refused_with_its_neighbours(run):
    for ask in (run.h.at, run.x.at, run.x_at):
        with pytest.raises(ValueError, match=r"timestep 610 was not visited; 4 steps .*nearest 750 or 500"):
            ask(610)


def test_results_can_be_differentiated_by_their_user(tiny, run):
    """Inference mode stays inside: its tensors could not enter a Jacobian."""
    assert not run.x0.is_inference()
    assert not run.h.values.is_inference()
    assert not run.x_at(500).is_inference()


# Edits of h


def test_a_change_of_h_by_zero_changes_nothing_to_the_bit_and_it_can_differ_from_sample_to_sample(tiny, run):
    assert torch.equal(sample_adding(tiny, torch.zeros(STEPS, 1, *tiny.h_shape)).x0, run.x0)
    delta = torch.zeros(STEPS, 3, *tiny.h_shape)
    delta[:, 1] = 1.0
    edited = sample_adding(tiny, delta).x0
    close(edited[[0, 2]], run.x0[[0, 2]])
    for other in (run.x0, sample_adding(tiny, -delta).x0):
        assert (edited[1] - other[1]).abs().max() > 1e-3
    close(sample_adding(tiny, delta, batch_size=1).x0, edited)


@pytest.mark.parametrize("asymmetric", [False, True])
@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("tap", ["before", "middle", "after"])
def test_an_edit_is_the_equation(tiny, tap, eta, asymmetric):
    """Symmetric: Haas et al. eq. 6. Asymmetric: Asyrp eq. 5, here with two full passes a step."""
    model = tiny.tapped(tap)
    run = sample(model, eta=eta)
    delta = torch.randn(STEPS, *model.h_shape, generator=torch.Generator().manual_seed(0))
    edited = wb.replay(run, edit=Injection.adding(delta[:, None], asymmetric=asymmetric), progress=False).x0
    close(edited, naive(model, run, delta=delta, asymmetric=asymmetric))
    assert (edited - naive(model, run, delta=delta, asymmetric=not asymmetric)).abs().max() > 1e-3


def test_an_injection_leaves_h_where_it_adds_nothing(tiny, run):
    delta = torch.zeros(STEPS, 1, *tiny.h_shape)
    delta[1] = 1.0
    edited = wb.replay(run, edit=Injection.adding(delta), record_x=True, progress=False)
    assert torch.equal(edited.x.values[:2], run.x.values[:2])
    assert (edited.x.values[2] - run.x.values[2]).abs().max() > 1e-4
    assert Injection.adding(delta).change(0, torch.zeros(1, *tiny.h_shape), slice(0, 1)) is None


def test_an_injection_of_many_samples_takes_those_of_the_batch():
    values = torch.arange(1.0, 4.0).view(1, 3, 1, 1, 1).expand(1, 3, 2, 1, 1)
    h, injection = torch.zeros(1, 2, 1, 1), Injection.adding(values)
    assert injection.change(0, h, slice(2, 3)).flatten().tolist() == [3.0, 3.0]
    assert injection.of(np.array([2, 0])).change(0, h, slice(0, 1)).flatten().tolist() == [3.0, 3.0]
    twice = torch.cat([values, 2 * values])
    assert Injection.adding(twice).after(1).change(0, h, slice(0, 1)).flatten().tolist() == [2.0, 2.0]


def test_the_tail_of_a_run_ends_in_its_image_bit_for_bit(tiny, run):
    for first in range(STEPS):
        tail = run.tail(first)
        assert len(tail.timesteps) == STEPS - first
        assert torch.equal(wb.replay(tail, progress=False).x0, run.x0)


def test_a_state_is_reached_once(tiny, monkeypatch):
    run, passes, encode = sample(tiny), [], type(tiny).encode
    again = wb.replay(run, progress=False)
    monkeypatch.setattr(type(tiny), "encode", lambda self, x, t: passes.append(t) or encode(self, x, t))
    assert torch.equal(again.reached(2), again.reached(2)) and len(passes) == 2


# Inversion


def test_a_linear_model_is_inverted_exactly_by_fixed_points(tiny, monkeypatch):
    """eps = c x_t: the step is a multiplication, so that inverse and reconstruction are known."""
    c = 0.3
    monkeypatch.setattr(type(tiny), "decode", lambda self, b, delta_h=None: c * b.skips)
    monkeypatch.setattr(type(tiny), "encode", lambda self, x, t: SimpleNamespace(skips=x, h=x))
    monkeypatch.setattr(type(tiny), "__call__", lambda self, x, t: c * x)
    images = some_images(tiny)
    inverted = wb.invert(tiny, images, steps=50, method="fixed-point", iterations=60, progress=False)
    factor = 1.0
    for t, t_prev in tiny.schedule.pairs(50):
        a, a_prev = tiny.schedule.alpha_bar(t), tiny.schedule.alpha_bar(t_prev)
        factor *= math.sqrt(a_prev) * (1 - c * math.sqrt(1 - a)) / math.sqrt(a) + c * math.sqrt(1 - a_prev)
    torch.testing.assert_close(inverted.x_T * factor, images, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(wb.replay(inverted, progress=False).x0, images, atol=1e-4, rtol=1e-3)


def some_images(model):
    return torch.rand(2, *model.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


def test_inversion_is_the_ddim_equation_backwards(tiny):
    images, schedule = some_images(tiny), tiny.schedule
    x_t = images
    with torch.inference_mode():
        for t, t_prev in reversed(schedule.pairs(STEPS)):
            eps = tiny(x_t, max(t_prev, 0))
            a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
            x_t = math.sqrt(a) * (x_t - math.sqrt(1 - a_prev) * eps) / math.sqrt(a_prev) + math.sqrt(1 - a) * eps
    close(wb.invert(tiny, images, steps=STEPS, progress=False).x_T, x_t)


@pytest.mark.parametrize("method", ["ddim", "fixed-point"])
def test_the_recorded_h_is_the_networks_at_the_recorded_x_t(tiny, run, method):
    images = run.x0.clamp(-1, 1)
    inverted = wb.invert(tiny, images, steps=STEPS, method=method, record_h=True, record_x=True, progress=False)
    assert torch.equal(inverted.x.values[0], inverted.x_T)
    for i, t in enumerate(inverted.timesteps):
        assert torch.equal(tiny.encode(inverted.x.values[i], t).h, inverted.h.values[i])
        assert torch.equal(inverted.x_at(t), inverted.x.values[i])


def test_an_inverted_run_knows_what_it_is(tiny, run):
    inverted = wb.invert(tiny, run.x0.clamp(-1, 1), steps=STEPS, progress=False)
    assert inverted.seeds is None
    assert inverted.etas == (0.0,) * STEPS
    assert torch.equal(inverted.x0, run.x0.clamp(-1, 1))
    assert "inverted" in repr(inverted)
    assert inverted.noise.abs().sum() == 0
    assert len(inverted[:2]) == 2
    with pytest.raises(ValueError, match="record_x=True"):
        inverted.x_at(500)


def test_images_of_every_kind_are_inverted_alike(tiny, tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (2, 10, 8, 3), dtype=np.uint8)
    pictures = [Image.fromarray(each) for each in values]
    for i, each in enumerate(pictures):
        each.save(tmp_path / f"{i}.png")
    labelled = wb.load_images(tmp_path)
    tensor = torch.from_numpy(values[:, 1:9]).permute(0, 3, 1, 2) / 127.5 - 1
    plain = wb.invert(tiny, tensor, steps=2, progress=False).x_T
    kinds = (
        labelled,
        pictures,
        list(tensor),
        tuple(tensor.split(1)),
        tensor.numpy(),
        [labelled.at_size(8)[0], pictures[1]],
    )
    for images in kinds:
        torch.testing.assert_close(wb.invert(tiny, images, steps=2, progress=False).x_T, plain)
    torch.testing.assert_close(wb.invert(tiny, pictures[0], steps=2, progress=False).x_T, plain[:1])


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 16, 16), r"\(2, 3, 16, 16\); tiny takes \(n, 3, 8, 8\)"),
        (torch.zeros(3, 8, 8), r"tiny takes \(n, 3, 8, 8\)"),
        (torch.zeros(0, 3, 8, 8), r"\(0, 3, 8, 8\)"),
        (torch.zeros(1, 3, 8, 8, dtype=torch.uint8), "x / 127.5 - 1"),
        (torch.full((1, 3, 8, 8), 255.0), "x / 127.5 - 1"),
        (torch.full((1, 3, 8, 8), math.nan), "finite floats"),
        ("photo.png", "a str; .*LabelledImages"),
        (None, "a NoneType"),
        ([], r"\(0,\)"),
        ([torch.zeros(3, 8, 8), torch.zeros(3, 8, 9)], r"\(1, 3, 8, 9\)"),
        ([torch.zeros(3, 8, 8), torch.full((3, 8, 8), math.nan)], "finite floats"),
    ],
)
def test_what_is_no_image_of_the_models_is_refused_before_it_is_inverted(tiny, images, message):
    with pytest.raises(ValueError, match=message):
        wb.invert(tiny, images, progress=False)
    with pytest.raises(ValueError, match="'null-text' .*one of ddim, fixed-point"):
        wb.invert(tiny, torch.zeros(1, *tiny.image_shape), method="null-text")


def test_images_between_0_and_1_are_warned_of(tiny, recwarn):
    images = torch.rand(2, *tiny.image_shape, generator=torch.Generator().manual_seed(0))
    light = Image.new("RGB", (8, 8), "white")
    light.putpixel((0, 0), (200, 200, 200))
    wb.invert(tiny, [2 * images[0] - 1, images[1]], steps=1, progress=False)
    wb.invert(tiny, light, steps=1, progress=False)
    wb.invert(tiny, torch.zeros(1, *tiny.image_shape), steps=1, progress=False)
    assert not recwarn
    with pytest.warns(UserWarning, match=r"images in \[0, 1\].*2 \* x - 1") as said:
        wb.invert(tiny, images, steps=1, progress=False)
    assert said[0].filename == __file__


# Batches and bars


def test_a_bar_counts_images_not_steps(tiny, capsys):
    with progress_bar(3, STEPS, "sampling", show=True) as bar:
        sample(tiny, progress=bar)
        assert bar.n == bar.total == 3 * STEPS
    assert capsys.readouterr().out == ""


def test_both_ways_to_decode_an_edited_and_a_plain_h_agree(tiny, run):
    """On an accelerator both go through the decoder in one batch; which comes first decides what P_t and D_t get."""
    bottleneck = tiny.encode(run.x_T, 750)
    edited = bottleneck.h + 1
    elsewhere = SimpleNamespace(h=SimpleNamespace(device=torch.device("cuda")), repeat=bottleneck.repeat)
    for got, h in zip(sampling._decode_both(tiny, elsewhere, edited), (edited, bottleneck.h), strict=True):
        close(got, tiny.decode(bottleneck.with_h(h)))


LATE = [(1, True), (2, True), ([400, 200, 0], True), (4, False), ([999, 0], False)]


@pytest.mark.parametrize(("steps", "late"), LATE)
def test_sampling_that_starts_where_x_t_is_no_noise_says_so(tiny, steps, late):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wb.sample(tiny, [0], steps=steps, progress=False)
    assert any("sampling starts from noise at t = " in str(each.message) for each in said) == late
