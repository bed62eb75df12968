"""Operations of the workbench that are compared between two devices, and those that repeat to the bit on one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest import mock

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, UNet2DConditionModel

import workbench as wb
from workbench.diffusion import training
from workbench.diffusion.noise import normal
from workbench.directions.direction import Direction
from workbench.hspace import extract as extraction

FLOAT32 = 1e-4
"""Largest relative error ||a - b|| / ||b|| of float32 without TF32, times an operation's own factor."""

BFLOAT16 = 0.25
"""The same of a network in bfloat16 against float32. It rounds by 0.4% dozens of times a pass: one is held to a tenth
of it, a chain of passes, which moves every image a little, to all of it."""

QUIET = {"progress": False}
STEPS, N, MANY = 10, 4, 24


class Inputs:
    """What the operations start from, computed once: by the reference, so that errors of one do not enter another."""

    def __init__(self, model: wb.Model) -> None:
        self.run = wb.sample(model, range(N), steps=STEPS, record_h=True, record_x=True, **QUIET)
        self.images = wb.sample(model, range(100, 100 + MANY), steps=STEPS, **QUIET).x0.clamp(-1, 1)
        self.t = self.run.timesteps[STEPS // 2]
        unit = normal([7], (STEPS, *model.h_shape), stream=0)[0]
        size = self.run.h.values.flatten(1).square().mean(dim=1).sqrt().view(-1, 1, 1, 1)
        about = {"model": model.provenance(), "etas": list(self.run.etas), "method": "random", "parameters": {}}
        kept = {"timesteps": self.run.timesteps, "name": "random", "provenance": about | {"seeds": []}}
        self.direction = Direction.from_delta(0.3 * size * unit, **kept)
        inverted = wb.invert(model, self.images, steps=self.timesteps, record_h=True, **QUIET)
        scores = inverted.h.at(self.t) @ unit[0].flatten().numpy()
        self.scores, self.labels = scores, (scores > np.median(scores)).astype(int)
        self.boundaries = [wb.fit_boundary(inverted, self.labels, t=self.t, space=space) for space in "hx"]

    @property
    def timesteps(self) -> tuple[int, ...]:
        """From t on."""
        return self.run.timesteps[STEPS // 2 :]


Results = dict[str, torch.Tensor | np.ndarray]
Operation = Callable[[wb.Model, Inputs, Path], Results]


def own_run(model: wb.Model, **options) -> wb.Trajectory:
    return wb.sample(model, range(N), steps=STEPS, **options, **QUIET)


def sample(model, inputs, folder) -> Results:
    run = own_run(model, record_h=True, record_x=True)
    if model.device.type == "cuda":  # copied while the next step is computed
        assert run.h.values.is_pinned() and run.x.values.is_pinned() and run.x0.device.type == "cpu"
    return {"x_T": run.x_T, "x0": run.x0, "first h": run.h.values[0], "last h": run.h.values[-1], "x": run.x.values}


def one_pass(model, inputs, folder) -> Results:
    x_t = inputs.run.x.values[STEPS // 2].to(model.device)
    with torch.inference_mode():
        return {"h": model.encode(x_t, inputs.t).h.cpu(), "eps": model(x_t, inputs.t).cpu()}


def invert(model, inputs, folder, *, method: str) -> Results:
    run = wb.invert(model, inputs.images[:N], steps=STEPS, method=method, record_h=True, **QUIET)
    return {"x_T": run.x_T, "h": run.h.values, "reconstruction": wb.replay(run, **QUIET).x0}


def edit(model, inputs, folder, **options) -> Results:
    return {"x0": wb.edit(model, own_run(model), inputs.direction, **options, **QUIET).x0}


def swap(model, inputs, folder) -> Results:
    return {"x0": wb.edit(model, own_run(model)[:2], inputs.run[2:3], mode="slerp", scale=0.5, **QUIET).x0}


def grid(model, inputs, folder) -> Results:
    edits = {"symmetric": inputs.direction, "asymmetric": wb.Shift(inputs.direction, asymmetric=True)}
    edits["in x"] = wb.MoveX(inputs.images[0] * 0.1, inputs.t, "an image")
    return {"images": wb.render(own_run(model), edits, scales=[-1.0, 0.0, 2.0], **QUIET).images}


def store_of(model, folder: Path, **options) -> wb.HStore:
    return wb.extract(model, MANY, steps=STEPS, dtype="float32", out=folder / "h.zarr", **options, **QUIET)


def extract(model, inputs, folder) -> Results:
    store = store_of(model, folder)
    return {"h": store.at(inputs.t), "images": store.images[:]}


def pca(model, inputs, folder) -> Results:
    found = wb.find_pca(store_of(model, folder), k=3, **QUIET)
    return {"explained": found.explained_variance_ratio, "first": found[0].delta(), "energy": found.scores**2}


def supervised(model, inputs, folder) -> Results:
    return {"delta": wb.find_from_scores(store_of(model, folder), inputs.scores, k=8, **QUIET).delta()}


def jacobian(model, inputs, folder) -> Results:
    found = wb.find_jacobian(model, own_run(model)[:1], t=inputs.t, k=2, tol=1e-8, **QUIET)
    return {"values": found.singular_values, "right": found.right}


def pullback(model, inputs, folder) -> Results:
    upper = torch.arange(model.image_shape[1])[:, None].expand(model.image_shape[1:]) < model.image_shape[1] // 2
    options = {"k": 1, "mask": upper, "nullspace": 1, "tol": 1e-6}
    found = wb.find_pullback(model, own_run(model)[:1], t=inputs.t, **options, **QUIET)
    return {"values": found.singular_values, "right": found.right}


def guided_latents(model, inputs, folder) -> Results:
    """A latent network with a condition and guidance: samples, images, their inversion, an edit of h."""
    blocks = {"block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    cross = {"cross_attention_dim": 8, "attention_head_dim": 2, "sample_size": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        unet, vae, texts = (
            UNet2DConditionModel(
                down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
                **blocks,
                **cross,
            ),
            AutoencoderKL(
                down_block_types=("DownEncoderBlock2D",) * 2,
                up_block_types=("UpDecoderBlock2D",) * 2,
                latent_channels=4,
                sample_size=16,
                **blocks,
            ),
            torch.randn(2, 1, 7, 8),
        )
    condition = {"condition": texts[0], "negative": texts[1], "guidance_scale": 2.0}
    schedule = wb.NoiseSchedule.linear()
    latent = wb.wrap(unet, schedule, name="latent", vae=vae, device=model.device, **condition)
    run = own_run(latent, record_h=True)
    images = latent.to_images(run.x0)
    back = wb.invert(latent, images.clamp(-1, 1), steps=STEPS, record_h=True, **QUIET)
    swapped = wb.edit(latent, run[:2], back[2:3], mode="replace", scale=1.0, **QUIET)
    return {"h": run.h.values, "images": images, "x_T": back.x_T, "swapped": latent.to_images(swapped.x0)}


def boundary(model, inputs, folder) -> Results:
    run = wb.invert(model, inputs.images, steps=inputs.timesteps, record_h=True, **QUIET)
    found = {space: wb.fit_boundary(run, inputs.labels, t=inputs.t, space=space) for space in "hx"}
    return {"h": found["h"].distance(run.h.values[0]), "x": found["x"].distance(run.x_T)}


def cross(model, inputs, folder) -> Results:
    run = wb.invert(model, inputs.images[:N], steps=inputs.timesteps, **QUIET)
    return {"images": wb.cross_boundary(model, run, *inputs.boundaries, distances=[-3.0, 3.0], **QUIET).images}


def studio(model, inputs, folder) -> Results:
    session = wb.EditSession(model, own_run(model), [inputs.direction, *inputs.boundaries])
    session.set_scale(inputs.direction.name, 1.5)
    rendered, preview = session.render(), session.render(preview=True)
    session.set_process("single-step")
    for name in session.boundaries:
        session.set_distance(name, 2.0)
    return {"after": rendered.after, "preview": preview.after, "crossed": session.render().after}


def losses(model, inputs, folder, *, precision: str = "float32", stopped: bool = False) -> Results:
    """Of a short training; with `stopped`, one that was interrupted after half of its steps and resumed."""
    size, steps = model.image_shape[1], 8
    settings = wb.TrainingSettings(
        size=size,
        widths=(16, 32),
        attention=(size // 2,),
        head_channels=16,
        steps=steps,
        batch_size=8,
        warmup=2,
        learning_rate=1e-3,
        precision=precision,
    )
    options = {"out": folder / "trained", "log_every": 1, "minutes": 0, "previews": 0, **QUIET}
    take_step = training._take_step

    def interrupted(run, *args, **kwargs):
        if run.step == steps // 2:
            raise KeyboardInterrupt
        return take_step(run, *args, **kwargs)

    AcceleratorState._reset_state(reset_partial_state=True)  # it holds the device of the process's first training
    there = mock.patch.dict(os.environ, ACCELERATE_TORCH_DEVICE=str(model.device))
    with there, mock.patch.object(training, "Accelerator", lambda cpu: Accelerator()):
        if stopped:
            with mock.patch.object(training, "_take_step", interrupted):
                try:
                    wb.train_model(inputs.images, settings, **options)
                except KeyboardInterrupt:
                    settings, options["resume"] = None, True
        wb.train_model(inputs.images, settings, **options)
    return {"loss": training.read_log(folder / "trained").loss.to_numpy()}


OPERATIONS: list[tuple[str, Operation, float, bool]] = [
    # name, function, factor of the bound, also in bfloat16
    ("one pass", one_pass, 0.1, True),
    ("sample", sample, 1, True),
    ("invert, ddim", partial(invert, method="ddim"), 3, True),  # the reconstruction is a chain of two
    ("invert, fixed-point", partial(invert, method="fixed-point"), 1, False),  # need not converge in bfloat16
    ("invert, edit-friendly", partial(invert, method="edit-friendly"), 1, False),  # its z_t divide by small sigmas
    ("edit, symmetric", edit, 1, True),
    ("edit, asymmetric", partial(edit, asymmetric=True, gain="match"), 1, True),
    ("edit, another sample's h", swap, 1, True),
    ("grid", grid, 3, True),  # an asymmetric edit of two units enlarges what it starts from
    ("extract", extract, 1, True),
    ("PCA", pca, 10, False),  # a component moves by the error over the gap between two variances
    ("supervised direction", supervised, 10, True),
    ("Jacobian", jacobian, 10, False),  # needs float32
    ("pullback", pullback, 100, False),  # its values lie close together
    ("latents with guidance", guided_latents, 10, False),
    ("boundary", boundary, 10, False),
    ("crossing", cross, 1, True),
    ("studio", studio, 1, True),
    ("training", losses, 1, False),
    ("training in bfloat16", partial(losses, precision="bfloat16"), 100, False),
    ("resumed training", partial(losses, stopped=True), 1, False),
]


def replayed(model, inputs, folder) -> Iterator[torch.Tensor]:
    run = own_run(model, batch_size=3)
    yield from (run.x0, wb.replay(run, **QUIET).x0)


def unedited(model, inputs, folder) -> Iterator[torch.Tensor]:
    run = own_run(model)
    yield from (run.x0, wb.edit(model, run, inputs.direction, scale=0.0, **QUIET).x0)


def resumed(model, inputs, folder) -> Iterator[torch.Tensor]:
    """An extraction that was stopped after a chunk, against one that was not."""
    write, written = extraction.write_chunk, []

    def dying(*args):
        if written:
            raise KeyboardInterrupt
        written.append(write(*args))

    with mock.patch.object(extraction, "chunk_size", lambda *_, **__: MANY // 4):
        yield torch.from_numpy(store_of(model, folder / "whole").group["h"][:])
        with mock.patch.object(extraction, "write_chunk", dying):
            with suppress(KeyboardInterrupt):
                store_of(model, folder)
        yield torch.from_numpy(store_of(model, folder).group["h"][:])


EXACT = [("replay", replayed), ("edit of scale 0", unedited), ("resumed extraction", resumed)]


def relative_error(found: torch.Tensor | np.ndarray, expected: torch.Tensor | np.ndarray) -> float:
    """||found - expected|| / ||expected||, infinite if a value is not finite."""
    found, expected = (torch.tensor(np.asarray(each), dtype=torch.double) for each in (found, expected))
    error = float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(torch.double).tiny))
    return error if np.isfinite(error) else float("inf")


def compare(reference: wb.Model, models: dict[str, wb.Model], inputs: Inputs) -> Iterator[tuple[str, dict]]:
    """Compare every operation of `models` with that of `reference`; yields the name and errors, bounds and verdict."""
    for name, function, factor, low in OPERATIONS:
        expected, found = run(function, reference, inputs), {}
        for label, model in models.items():
            if model.dtype == torch.float32 or low:
                bound = factor * (FLOAT32 if model.dtype == torch.float32 else BFLOAT16)
                errors = {
                    key: relative_error(value, expected[key]) for key, value in run(function, model, inputs).items()
                }
                found[label] = {"errors": errors, "bound": bound, "passed": max(errors.values()) <= bound}
        yield name, found
    for name, function in EXACT:
        found = {}
        for label, model in models.items():
            first, second = run(lambda *given, f=function: tuple(f(*given)), model, inputs)
            found[label] = {"errors": {"bits": float(not torch.equal(first, second))}, "bound": 0.0}
            found[label]["passed"] = torch.equal(first, second)
        yield name, found


def run(function, model: wb.Model, inputs: Inputs):
    with TemporaryDirectory() as folder:
        return function(model, inputs, Path(folder))
