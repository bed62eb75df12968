"""Training: the same run whether it is stopped or not, and the loss, schedule and average that it says it has."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from importlib import metadata

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler
from filelock import FileLock
from PIL import Image
from processes import start_process
from safetensors.torch import load_file

import workbench as wb
from workbench import cli
from workbench.diffusion import training
from workbench.diffusion.networks import first_unet
from workbench.diffusion.training import TrainingSettings, make_batch, train_model

TINY = {"size": 4, "widths": (16, 16), "attention": (2,), "head_channels": 8, "batch_size": 4, "learning_rate": 3e-3}
QUIET = {"log_every": 5, "minutes": 0, "previews": 0, "progress": False}


def tiny(**settings) -> TrainingSettings:
    return TrainingSettings(**{**TINY, "steps": 20, **settings})


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return (torch.randint(0, 256, (18, 3, 4, 4), generator=generator)) / 127.5 - 1


@pytest.fixture(scope="module")
def trained(images, tmp_path_factory):
    """A tiny training from beginning to end."""
    out = tmp_path_factory.mktemp("trained") / "model"
    train_model(images, tiny(), out=out, **{**QUIET, "previews": 2})
    return out


def log_of(out) -> pd.DataFrame:
    return pd.read_csv(out / "log.csv").drop(columns="hours")


def assert_same_training(one, other):
    a, b = (load_file(folder / "checkpoint.safetensors") for folder in (one, other))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert wb.load_model(one, device="cpu").hash == wb.load_model(other, device="cpu").hash
    pd.testing.assert_frame_equal(log_of(one), log_of(other))


def batches(n: int, shape=(1, 1, 1), **settings):
    return [make_batch(tiny(**settings), step, n=18, shape=shape) for step in range(n)]


# Resuming


def train_until_stuck(*arguments, **options) -> None:
    """In a process of its own: it waits behind step 25, so that the kill comes in time on any machine."""
    step = training._take_step
    training._take_step = lambda run, *a, **k: time.sleep(600) if run.step >= 25 else step(run, *a, **k)
    train_model(*arguments, **options)


def test_a_training_that_was_killed_becomes_the_one_that_was_not(images, tmp_path):
    """With flips, dropout and cut skips, over several passes: order, noise, weights, average and log agree."""
    options = {**QUIET, "log_every": 10}
    settings = {**TINY, "steps": 40, "flips": True, "dropout": 0.1, "skips": 1, "ema": 0.9}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    train = partial(train_until_stuck, images, TrainingSettings(**settings), out=tmp_path / "killed", **options)
    # A build of torch with CUDA can't run backward in a fork, with a GPU or without.
    process = start_process(train, method="fork" if torch.version.cuda is None else "spawn")
    config = tmp_path / "killed" / "training.json"
    while not config.is_file() or json.loads(config.read_text())["step"] < 20:
        assert process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    reached = json.loads(config.read_text())["step"]
    assert 20 <= reached < 40

    try:
        train_model(images, out=tmp_path / "killed", resume=True, **options)
        train_model(images, TrainingSettings(**settings), out=tmp_path / "whole", **options)
    finally:
        torch.set_num_threads(threads)
    assert_same_training(tmp_path / "killed", tmp_path / "whole")
    assert log_of(tmp_path / "killed")["step"].tolist() == [10, 20, 30, 40]


@pytest.mark.parametrize("at", ["_take_step", "save_model"])
def test_a_kill_before_the_first_checkpoint_or_before_the_model_of_the_last_loses_nothing(
    at, images, trained, tmp_path, monkeypatch
):
    save, out = training._Run.save_model, tmp_path / "model"

    def killed(run, *args, **options):
        if at == "_take_step" or run.step == run.settings.steps:
            raise KeyboardInterrupt
        return save(run, *args, **options)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(training if at == "_take_step" else training._Run, at, killed)
        train_model(images, tiny(), out=out, **QUIET)
    assert (out / "checkpoint.safetensors").exists() == (at == "save_model")
    train_model(images, out=out, resume=True, **QUIET)
    assert_same_training(out, trained)


LAUNCHED = """
import sys, torch
from workbench.diffusion import training
torch.set_num_threads(1)
settings = training.TrainingSettings(**eval(sys.argv[1]))
training.train_model(torch.load(sys.argv[2]), settings, out=sys.argv[3], **eval(sys.argv[4]))
"""


@pytest.mark.slow
def test_two_processes_train_the_model_that_one_does(images, tmp_path):
    """On a CPU without a word of accelerate's, as docs/how-to/train.md launches them."""
    torch.save(images, tmp_path / "images.pt")
    (tmp_path / "train.py").write_text(LAUNCHED)
    settings = {**TINY, "steps": 20, "flips": True, "precision": "float32", "learning_rate": 3e-4}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*launcher, "train.py", str(settings), "images.pt", "two", str({**QUIET, "previews": 1})]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE")}
    subprocess.run(command, cwd=tmp_path, env={**environment, "CUDA_VISIBLE_DEVICES": ""}, check=True, timeout=300)
    train_model(images, TrainingSettings(**settings), out=tmp_path / "one", **QUIET)
    # Gradients that are not shared are 1e-2 away; a larger learning rate makes rounding grow.
    np.testing.assert_allclose(log_of(tmp_path / "two"), log_of(tmp_path / "one"), rtol=1e-5)


def test_another_seed_begins_with_other_weights_and_the_global_generators_are_left_alone(images, tmp_path):
    weights = [first_unet(tiny(seed=seed))[0].conv_in.weight for seed in (0, 0, 1)]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])
    torch.manual_seed(5)
    np.random.seed(5)  # noqa: NPY002
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    train_model(images, tiny(steps=1, dropout=0.5), out=tmp_path / "model", **{**QUIET, "previews": 1})
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])  # noqa: NPY002


# A step


def test_a_batch_depends_on_the_seed_and_the_step_alone():
    draws = [(0, 7), (0, 7), (0, 8), (1, 7)]
    one, same, *others = (make_batch(tiny(flips=True, seed=s), step, n=18, shape=(3, 4, 4)) for s, step in draws)
    for name in ("rows", "flipped", "t", "noise"):
        assert np.array_equal(getattr(one, name), getattr(same, name))
    for other in others:
        assert not np.array_equal(one.noise, other.noise)
        assert not np.array_equal(one.t, other.t)


def test_every_image_comes_once_before_any_comes_again_and_is_mirrored_only_where_asked_for():
    rows = np.concatenate([batch.rows for batch in batches(9)])
    assert sorted(rows[:18]) == sorted(rows[18:]) == list(range(18))
    assert list(rows[:18]) != list(rows[18:])
    for flips, share in ((False, 0.0), (True, 0.5)):
        flipped = [batch.flipped for batch in batches(500, flips=flips)]
        assert np.mean(flipped) == pytest.approx(share, abs=0.1 * share)


def test_timesteps_are_uniform_and_spread_within_a_batch():
    drawn = [batch.t for batch in batches(2000)]
    assert all(np.array_equal(t // 250, range(4)) for t in drawn)
    counts = np.bincount(np.concatenate(drawn) // 10, minlength=100)
    assert counts.sum() == 8000 and abs(counts - 80).max() < 5 * 80**0.5


def test_the_learning_rate_rises_to_its_largest_and_falls_to_nothing():
    settings = tiny(steps=100, warmup=8, learning_rate=1.0)
    rates = np.array([settings.rate(step) for step in range(100)])
    np.testing.assert_allclose(rates[:8], np.arange(1, 9) / 8)
    assert (np.diff(rates[8:]) < 0).all()
    assert rates[8 + 46] == pytest.approx(0.5) and rates[-1] < 1e-3
    assert tiny(steps=20, warmup=200).rate(2) == pytest.approx(TINY["learning_rate"])


# What comes of it


def test_a_single_image_is_learned(tmp_path):
    image = torch.tensor([0.9, -0.6, 0.2])[None, :, None, None].expand(1, 3, 4, 4)
    settings = tiny(steps=100, batch_size=8, ema=0.95, learning_rate=1e-2)
    model = train_model(image, settings, out=tmp_path / "model", **{**QUIET, "log_every": 25, "minutes": 9})
    losses = log_of(tmp_path / "model")["loss"].to_numpy()
    assert (np.diff(losses) < 0).all() and losses[-1] < 0.4 * losses[0]
    noise = torch.from_numpy(make_batch(settings, 0, n=1, shape=(3, 4, 4)).noise)
    x_t = model.schedule.add_noise(image, noise, 200)
    with torch.inference_mode():
        x0 = model.schedule.predict_x0(x_t, model(x_t, 200), 200)
    assert (x0 - image).abs().mean() < 0.3
    assert (x0 - image.roll(1, 1)).abs().mean() > 0.6


def test_the_folder_holds_the_averaged_weights_as_diffusers_reads_them_and_says_what_training_it_is_of(trained, images):
    model, state = wb.load_model(trained, device="cpu"), load_file(trained / "checkpoint.safetensors")
    weights = model.unet.unet.state_dict()
    assert all(torch.equal(state[f"average.{name}"], value) for name, value in weights.items())
    assert not all(torch.equal(state[f"weights.{name}"], value) for name, value in weights.items())
    pipeline = DDPMPipeline.from_pretrained(trained)
    assert pipeline.scheduler.config.prediction_type == "epsilon"
    x_t = torch.from_numpy(make_batch(tiny(), 0, n=18, shape=(3, 4, 4)).noise)
    with torch.no_grad():
        torch.testing.assert_close(model(x_t, 500), pipeline.unet(x_t, 500).sample, atol=1e-4, rtol=1e-4)
    about = json.loads((trained / "training.json").read_text())
    assert TrainingSettings(**about["settings"]) == tiny()
    assert about["images"]["n"] == len(images) and len(about["images"]["sha256"]) == 64
    assert about["hash"] == model.hash and about["hours"] > 0
    assert about["step"] == 20 and about["versions"]["torch"] == metadata.version("torch")
    assert [path.name for path in sorted((trained / "samples").iterdir())][-1] == "0000020.png"
    assert not list(trained.rglob("*partial*"))


def test_a_training_that_begins_with_a_model_begins_with_its_weights(images, trained, tmp_path):
    settings = TrainingSettings(start=str(trained), steps=1, batch_size=4, learning_rate=1e-12, dropout=0.3)
    model = train_model(images, settings, out=tmp_path / "model", **QUIET)
    parent = wb.load_model(trained, device="cpu")
    for name, weight in model.unet.unet.state_dict().items():
        torch.testing.assert_close(weight, parent.unet.unet.state_dict()[name], atol=1e-9, rtol=0)
    assert model.unet.unet.config.dropout == 0.3
    assert training.read_settings(tmp_path / "model").size == (3, 4, 4)


def test_a_grown_network_has_the_weights_of_its_start_and_a_finer_resolution_around_them(trained, tmp_path):
    settings = TrainingSettings(start=str(trained), grow=True, steps=1, batch_size=4, learning_rate=1e-12)
    larger = torch.rand(18, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    model = train_model(larger, settings, out=tmp_path / "model", **QUIET)
    parent = wb.load_model(trained, device="cpu").unet.unet
    grown = model.unet.unet
    assert model.image_shape == (3, 8, 8) and grown.config.block_out_channels == [16, *parent.config.block_out_channels]
    assert model.h_shape == wb.load_model(trained, device="cpu").h_shape
    # Blocks of the way down move on by one, those of the way up keep their numbers; the rate moves no weight.
    for inside, outside in ((grown.down_blocks[1:], parent.down_blocks), (grown.up_blocks, parent.up_blocks)):
        for block, of_parent in zip(inside, outside, strict=False):
            weights = block.state_dict()
            for name, weight in of_parent.state_dict().items():
                torch.testing.assert_close(weights[name], weight, atol=1e-9, rtol=0)
    for name in ("mid_block", "time_embedding", "conv_in", "conv_out"):
        pairs = zip(getattr(grown, name).parameters(), getattr(parent, name).parameters(), strict=True)
        assert all(torch.allclose(weight, of_parent, atol=1e-9, rtol=0) for weight, of_parent in pairs)
    resumed = train_model(larger, out=tmp_path / "model", resume=True, **QUIET)
    assert resumed.hash == model.hash


def test_what_is_coarser_than_the_skips_that_are_kept_passes_through_h_alone(images, tmp_path):
    """Three resolutions leave the first convolution, and a block and what halves it at each: 6 skip connections."""
    larger, deep = images.repeat(1, 1, 2, 2), {"size": 8, "widths": (16, 16, 16), "steps": 3}
    for kept, expected in ((None, 6), (6, 6), (3, 3), (0, 0)):
        model = train_model(larger, tiny(**deep, skips=kept), out=tmp_path / str(kept), **QUIET)
        with torch.inference_mode():
            state = model.encode(larger, 500)
            eps = model.decode(state)
            others = [[*state.skips[:i], -skip, *state.skips[i + 1 :]] for i, skip in enumerate(state.skips)]
            passes = [not torch.equal(model.decode(replace(state, skips=tuple(skips))), eps) for skips in others]
            assert not torch.equal(model.decode(state.with_h(-state.h)), eps)
        assert passes == [True] * expected + [False] * (6 - expected)


def test_nothing_is_written_before_a_training_is_known_to_work(images, tmp_path, make_unet):
    DDPMPipeline(make_unet(sample_size=4, out_channels=6), DDPMScheduler()).save_pretrained(tmp_path / "learned")
    settings = TrainingSettings(start=str(tmp_path / "learned"), steps=2, batch_size=2)
    with pytest.raises(ValueError, match="learned has 6 outputs"):
        train_model(images, settings, out=tmp_path / "new", **QUIET)
    for option in ({"log_every": 0}, {"previews": -1}, {"minutes": float("nan")}):
        with pytest.raises(ValueError, match=f"{next(iter(option))} is "):
            train_model(images, tiny(), out=tmp_path / "new", **{**QUIET, **option})
    with pytest.raises(ValueError, match="skips is 5; this network has 0 to 4"):
        train_model(images, tiny(skips=5), out=tmp_path / "new", **QUIET)
    assert not (tmp_path / "new").exists()


# Refusals


def test_a_folder_is_not_trained_over(images, trained, tiny_folder):
    (tiny_folder / "model_index.json").write_text("{}")
    for folder, message in ((trained, "a training already; resume it"), (tiny_folder, "a model already; give another")):
        with pytest.raises(FileExistsError, match=f"holds {message}"):
            train_model(images, tiny(), out=folder, **QUIET)


def test_a_model_whose_checkpoint_was_deleted_is_not_trained_over(images, trained, tmp_path):
    """As the docstring allows when a training is done, and as the bundled models are."""
    out = tmp_path / "done"
    shutil.copytree(trained, out)
    (out / "checkpoint.safetensors").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train_model(images, out=out, resume=True, **QUIET).hash == wb.load_model(trained, device="cpu").hash
    about = json.loads((out / "training.json").read_text())
    assert all(path.read_bytes() == content for path, content in before.items())
    (out / "training.json").write_text(json.dumps(about | {"step": 10}))
    with pytest.raises(FileNotFoundError, match="is at step 10 of 20 and its checkpoint is missing"):
        train_model(images, out=out, resume=True, **QUIET)
    assert wb.load_model(out, device="cpu").hash == about["hash"]


def test_one_process_trains_in_a_folder_and_clears_what_another_left(images, trained, tmp_path):
    out = tmp_path / "shared"
    shutil.copytree(trained, out)
    with FileLock(out / ".lock"), pytest.raises(RuntimeError, match="another process is training in"):
        train_model(images, out=out, resume=True, **QUIET)
    (out / "checkpoint.safetensors.partial-1").write_bytes(b"half")
    (out / ".partial-unet").mkdir()
    train_model(images, out=out, resume=True, **QUIET)
    assert not list(out.glob("*.partial-*"))
    assert (out / "training.json").read_bytes() == (trained / "training.json").read_bytes()


def test_nothing_is_resumed_that_is_not_there_or_damaged_or_not_the_same(images, trained, tmp_path):
    damaged = tmp_path / "damaged"
    damaged.mkdir()
    (damaged / "training.json").write_bytes((trained / "training.json").read_bytes())
    (damaged / "checkpoint.safetensors").write_bytes((trained / "checkpoint.safetensors").read_bytes()[:5000])
    for given, out, kind, words in (
        ([images], tmp_path / "none", FileNotFoundError, "no training to resume"),
        ([images, tiny()], trained, ValueError, "resumed with its own settings"),
        ([images.flip(0)], trained, ValueError, "used 18 images, and these 18 differ"),
        ([images], damaged, ValueError, "is no checkpoint of this training"),
    ):
        with pytest.raises(kind, match=words):
            train_model(*given, out=out, resume=True, **QUIET)


def test_a_loss_that_is_not_finite_ends_the_training_and_keeps_the_last_checkpoint(images, tmp_path):
    settings = tiny(steps=40, learning_rate=1e25, clip=1e30, warmup=0, precision="float32")
    with pytest.raises(RuntimeError, match="the loss is .* train again with a learning rate below 1e"):
        train_model(images, settings, out=tmp_path / "model", **QUIET)
    kept = load_file(tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(tensor.isfinite().all() for tensor in kept.values())


def test_images_are_of_one_or_several_sources_and_of_the_models_size(images):
    read = training._read_images
    assert torch.equal(read([images[:7], images[7:]], (3, 4, 4)), read(images, (3, 4, 4)))
    with pytest.raises(ValueError, match=r"finite floats in \[-1, 1\]"):
        read(torch.full((1, 3, 8, 8), 255.0), (3, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(3, 4, 4\) and the model takes \(3, 8, 8\); resize them"):
        train_model(images, tiny(size=8, attention=(4,)), out="nowhere", **QUIET)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"steps": 0}, "steps is 0; give 1 or more"),
        ({"ema": 1.0}, "ema is 1.0; give a number from 0 to below 1"),
        ({"gamma": 0.0}, "gamma is 0.0; give a number above 0"),
        ({"seed": -1}, "seed is -1; give 0 or more"),
        ({"skips": -1}, "skips is -1; give 0 or more"),
        ({"precision": "float16"}, "'float16' is not known; it is one of float32, bfloat16"),
        ({"widths": (20, 32)}, r"widths are \[20, 32\]; give multiples of 16"),
        ({"size": 30, "widths": (16, 32, 48)}, "30 pixels can't be halved 2 times"),
        ({"widths": (16, 32), "head_channels": 48}, "head_channels is 48, and attention here is 32 channels wide"),
        ({"attention": (4,), "widths": (16, 32), "head_channels": 32}, "is 16 channels wide; give 1 to 16"),
        ({"attention": (7,)}, "attention is at 7 pixels; .*has 4, 2"),
        ({"size": 28, "widths": (16, 48), "attention": (14, 8)}, "attention is at 8 pixels; .*has 28, 14"),
        ({"weight_decay": float("nan")}, "weight_decay is nan"),
        ({"grow": True}, "grow needs a model to grow"),
        ({"timesteps": 5}, "timesteps is 5; give 21 or more"),
        ({"prediction": "noise"}, "'noise' is not known; it is one of epsilon, v_prediction, sample"),
        ({"size": (4, 5)}, "images of 5 pixels can't be halved 1 times"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TrainingSettings(**{**TINY, **settings})


# The command


def test_the_command_trains_resumes_and_draws_the_curve(tmp_path, capsys, images):
    folder, out = tmp_path / "images", tmp_path / "model"
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(((image + 1) * 127.5).byte().permute(1, 2, 0).numpy()).save(folder / f"{i:02d}.png")

    def train(out, *options):
        status, said = cli.main(["train", str(folder), "--out", str(out), *options]), capsys.readouterr()
        return status, said.err if status else said.out

    network = ["--size", "4", "--widths", "16", "16", "--attention", "2", "--head-channels", "8"]
    status, said = train(out, *network, "--steps", "6", "--batch-size", "4")
    assert status == 0 and "0.0" in said and (out / "curve.png").is_file()
    assert training.read_settings(out) == TrainingSettings(**{**TINY, "steps": 6, "learning_rate": 4e-4})
    assert train(out, "--resume")[0] == 0
    for where, options, words in (
        (out, ["--resume", "--steps", "9"], "leave out --steps"),
        (tmp_path / "b", ["--from", str(out), "--size", "8"], "leave out --size"),
        (tmp_path / "b", ["--size", "16", "--widths", "16", "32"], "head_channels is 48"),
    ):
        status, said = train(where, *options)
        assert status == 2 and words in said
    assert not (tmp_path / "b").exists()
