"""Train a pixel-space DDPM on images; a training stopped or killed at any time resumes exactly.

The random numbers of a step (choice of images, flips, timesteps and noise) are a function of the seed and the step
number; checkpoints hold weights, their average and the optimiser's state. A resumed run therefore equals an
uninterrupted one. accelerate places the network on the device, or on several with `accelerate launch` (`torchrun` on a
CPU); each process then takes its rows of the same batch.
"""

from __future__ import annotations

import contextlib
import copy
import hashlib
import importlib.metadata
import itertools
import json
import math
import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from accelerate import Accelerator
from diffusers import DDPMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm.auto import tqdm

from workbench import paths
from workbench.diffusion.images import check_values, to_bytes, warn_of_unit_range
from workbench.diffusion.loading import has_unet, load_model, write_parts
from workbench.diffusion.models import Model, wrap
from workbench.diffusion.networks import (
    PRECISIONS,
    TrainingSettings,
    cut_skips,
    empty_unet,
    first_unet,
    seeded,
)
from workbench.diffusion.parallel import count_passes
from workbench.diffusion.sampling import sample
from workbench.diffusion.text import TextEncoder, copy_text_encoder
from workbench.diffusion.unet import SplitUNet
from workbench.formats.checkpoints import hash_weights, read_json
from workbench.io import as_json, commit, locked, write_text, written
from workbench.shapes import with_channels

CONFIG, STATE, LOG = "training.json", "checkpoint.safetensors", "log.csv"
"""Files of a training beside the model's own: what it is, where it stands, its losses."""

NOISE_LEVELS = (0.0, 0.05, 0.1, 0.2, 0.4, 0.6, 1.0)
"""Edges of the bins of timesteps that the loss is logged in, as shares of T."""

PREVIEW_STEPS, PREVIEW_GUIDANCE = 20, 3.0

_ORDER, _DROPOUT = 1, 3
"""Streams of a training's seed, beside that of the steps and that of new weights."""


@dataclass(frozen=True, eq=False)
class Batch:
    """Random choices of one step: rows of the images, mirrored rows, timesteps and noise (b, C, H, W).

    `caption` in [0, 1) says which of its captions an image has, if it has several, and `untold` that it has none.
    """

    rows: np.ndarray
    flipped: np.ndarray
    t: np.ndarray
    noise: np.ndarray
    caption: np.ndarray
    untold: np.ndarray


def make_batch(settings: TrainingSettings, step: int, *, n: int, shape: tuple[int, int, int]) -> Batch:
    """Draw the batch of a step, counted from 0; it depends on the seed and the step alone.

    Each of the n images comes once before any comes again. Timesteps are spread evenly over 0..T-1 from a random start
    (Kingma et al. 2021, section I.1): each is uniform, and a batch has few and many steps of noise in equal shares.
    """
    b = settings.batch_size
    places = range(step * b, (step + 1) * b)
    rng = np.random.default_rng([settings.seed, step])
    return Batch(
        rows=np.array([_order(settings.seed, place // n, n)[place % n] for place in places]),
        flipped=(rng.random(b) < 0.5) & settings.flips,
        t=((np.arange(b) + rng.random()) / b * settings.timesteps).astype(int),
        noise=rng.standard_normal((b, *shape), dtype=np.float32),
        caption=rng.random(b),
        untold=rng.random(b) < settings.text_dropout,
    )


@torch.enable_grad()
def train_model(
    images: Sequence[torch.Tensor] | torch.Tensor,
    settings: TrainingSettings | None = None,
    *,
    out: str | Path,
    resume: bool = False,
    minutes: float = 10.0,
    log_every: int = 50,
    previews: int = 16,
    progress: bool = True,
) -> Model:
    """Train a DDPM (Ho et al. 2020) with min-SNR weights (Hang et al. 2023).

    `out` becomes a model folder with the averaged weights that `load_model` and diffusers' `DDPMPipeline` read; it is
    usable from the first checkpoint on, during training. Beside the model it holds `training.json` (settings, images,
    versions, git commit, hours), `checkpoint.safetensors` (to resume from; delete it when you are done), `log.csv` and
    `samples/`. All files are written atomically.

    Parameters
    ----------
    images : LabelledImages or Tensor of shape (n, C, H, W) with values in [-1, 1], or a list of these
        Of the size of the settings, which LabelledImages are cropped and resized to. Kept in memory as bytes; labels
        are not used. With `settings.text`, all are LabelledImages with `captions`.
    settings : TrainingSettings, optional
        Not given when resuming: a training keeps its settings.
    out : str or Path
        Folder of the model.
    resume : bool, default False
        Continue the training in `out` from its last checkpoint: with the same images it becomes the same model, bit for
        bit on the same machine and number of threads. A training killed before its first checkpoint starts again, a
        finished one is left unchanged.
    minutes : float, default 10
        Time between checkpoints, the most that a kill costs.
    log_every : int, default 50
        Steps per row of the log; checkpoints follow such rows.
    previews : int, default 16
        Samples drawn at every checkpoint, with the same seeds each time; 0 for none.
    progress : bool
        Show a bar with images per second.

    Returns
    -------
    Model
        The model in `out`.

    Raises
    ------
    FileExistsError
        If `out` already holds a training or a model, without `resume`.
    FileNotFoundError
        If there is no training or checkpoint to resume.
    ValueError
        If tensors have another size, the images differ from those of the resumed training, `settings` are given with
        `resume`, the initial model can't be trained here, or the checkpoint is damaged.
    RuntimeError
        If the loss becomes infinite or NaN, or another process trains in `out`.
    """
    out = paths.writable(out, folder=True)
    for name, value, least in (("minutes", minutes, 0), ("log_every", log_every, 1), ("previews", previews, 0)):
        if not value >= least:
            raise ValueError(f"{name} is {value}; give {least} or more")
    if resume:
        if settings is not None:
            raise ValueError(f"the training in {out} is resumed with its own settings; give none, or another folder")
        settings, step = read_settings(out), read_json(out / CONFIG).get("step", 0)
        if step and not (out / STATE).is_file():
            if step == settings.steps:
                return load_model(out)
            raise FileNotFoundError(
                f"the training in {out} is at step {step} of {settings.steps} and its checkpoint is missing; continue "
                "from its model in another folder, with start="
            )
    elif (out / CONFIG).exists():
        raise FileExistsError(f"{out} holds a training already; resume it, or give another folder")
    elif has_unet(out) or (out / "model_index.json").exists():
        raise FileExistsError(f"{out} holds a model already; give another folder")
    elif settings is None:
        settings = TrainingSettings()
    # Left to find that there is no device, it would take each of several launched processes for one alone.
    accelerator = Accelerator(cpu=not torch.accelerator.is_available())
    if settings.batch_size % accelerator.num_processes:
        processes = accelerator.num_processes
        raise ValueError(
            f"batch_size is {settings.batch_size}; give a multiple of {processes}, the number of processes"
        )
    begun = resume and (out / STATE).is_file()
    if begun:
        about = read_json(out / CONFIG)
        unet, scheduler = empty_unet(about["network"]), DDPMScheduler.from_config(about.get("scheduler", {}))
    else:
        if settings.text is not None:
            _read_captions(images)  # before anything is written
        text = None if settings.text is None else copy_text_encoder(settings.text, out)
        unet, scheduler = first_unet(settings, token_width=text and text.width)
    shape = SplitUNet(unet).x_shape  # refuses what could not be loaded again
    noise = {"timesteps": scheduler.config.num_train_timesteps, "prediction": scheduler.config.prediction_type}
    settings = replace(settings, size=shape, **noise)
    pixels = _read_images(images, settings.size)
    captions = None if settings.text is None else _Captions(TextEncoder(out), _read_captions(images))
    if settings.skips is not None:
        cut_skips(unet, kept=settings.skips)
    description = _describe(settings, unet, scheduler, pixels, captions)
    if resume and (then := read_json(out / CONFIG)["images"]) != description["images"]:
        raise ValueError(f"the training in {out} used {then['n']} images, and these {len(pixels)} differ from them")
    run = _Run(unet, scheduler, description, settings=settings, captions=captions, device=accelerator.device)
    if begun:
        run.load(out / STATE)
    accelerator.wait_for_everyone()
    with _alone(out) if accelerator.is_main_process else contextlib.nullcontext():
        # One that is finished is left as it is, but for a model that a kill kept from following its checkpoint.
        standing = read_json(out / CONFIG).get("step") if begun else None
        if accelerator.is_main_process and (run.step < settings.steps or standing != run.step):
            run.save_model(out)
        network, run.optimiser = accelerator.prepare(unet, run.optimiser)
        network = torch.compile(network) if settings.compile else network
        seen, saved = [], time.monotonic()
        with tqdm(
            desc="training",
            total=settings.steps * settings.batch_size,
            initial=run.step * settings.batch_size,
            unit="image",
            smoothing=0.05,
            disable=not (progress and accelerator.is_main_process),
        ) as bar:
            while run.step < settings.steps:
                batch = make_batch(settings, run.step, n=len(pixels), shape=tuple(pixels.shape[1:]))
                seen.append(_take_step(run, network, batch, pixels=pixels, accelerator=accelerator))
                bar.update(settings.batch_size)
                finished = run.step == settings.steps
                if run.step % log_every and not finished:
                    continue
                row = _log_row(accelerator.gather(torch.cat(seen)).cpu().numpy(), run)
                seen = []
                bar.set_postfix(loss=f"{row['loss']:.4f}")
                if not math.isfinite(row["loss"]):
                    raise RuntimeError(
                        f"the loss is {row['loss']} after {run.step} steps; train again with a learning rate below "
                        f"{settings.learning_rate:g}, perhaps from the last checkpoint, which is a model (start=)"
                    )
                due = finished or time.monotonic() - saved >= 60 * minutes
                if accelerator.is_main_process:
                    run.log.append(row | {"hours": run.hours()})
                    with written(out / LOG) as partial:
                        pd.DataFrame(run.log).to_csv(partial, index=False)
                    if due:
                        run.save(out, previews=previews)
                if due:
                    saved = time.monotonic()
        accelerator.wait_for_everyone()
    return load_model(out, device=accelerator.device)


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """The folder is this process's inside, without what a killed one left half written."""
    with locked(out / ".lock", f"training in {out}"):
        for left in [*out.glob("*.partial-*"), *out.glob("samples/*.partial-*")]:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
        yield


def read_settings(out: str | Path) -> TrainingSettings:
    """Settings of the training in a folder."""
    path = paths.local(out) / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}, so there is no training to resume; start one")
    try:
        return TrainingSettings(**read_json(path)["settings"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} does not describe a training ({error}); train again") from error


def read_log(out: str | Path) -> pd.DataFrame:
    """Losses of the training in a folder.

    Returns
    -------
    DataFrame
        A row every `log_every` steps: `step`, `images` (trained on so far), `rate` (of learning), `loss` (mean squared
        error of eps since the last row), `weighted` (by min-SNR), the loss by noise level (`t 0-49`, ...; missing where
        no image had such a timestep) and `hours`.
    """
    path = paths.local(out) / LOG
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; give a folder that train_model wrote")
    return pd.read_csv(path)


def min_snr_weights(alpha_bar: torch.Tensor, gamma: float) -> torch.Tensor:
    """Weight of the loss of eps at every timestep, min(SNR(t), gamma) / SNR(t) (Hang et al. 2023, section 3.4).

    gamma is 5 in the paper; inf weighs all timesteps alike.
    """
    return (gamma * (1 - alpha_bar) / alpha_bar).clamp(max=1)


class _Run:
    """A training on its way. A checkpoint holds weights, their average, the optimiser's state, the step and the log."""

    def __init__(
        self,
        unet: UNet2DModel,
        scheduler: DDPMScheduler,
        description: dict,
        *,
        settings: TrainingSettings,
        captions: _Captions | None,
        device: torch.device,
    ) -> None:
        # channels_last makes convolutions faster on CUDA; in bfloat16 on a CPU, slower by a sixth to a quarter.
        memory_format = torch.channels_last if device.type == "cuda" else torch.contiguous_format
        self.unet = unet.to(device=device, memory_format=memory_format).train().requires_grad_(True)
        self.scheduler, self.description, self.settings, self.captions = scheduler, description, settings, captions
        self.average = EMAModel(unet.parameters(), decay=settings.ema)
        self.optimiser = torch.optim.AdamW(
            unet.parameters(), settings.learning_rate, betas=(0.9, 0.99), weight_decay=settings.weight_decay
        )
        alpha_bar = scheduler.alphas_cumprod.double()
        snr = alpha_bar / (1 - alpha_bar)
        # v and x_0 are off by eps' error over sqrt(alpha_bar) and over sqrt(SNR).
        share = {"epsilon": torch.ones_like(snr), "v_prediction": alpha_bar, "sample": snr}[settings.prediction]
        constants = alpha_bar, min_snr_weights(alpha_bar, settings.gamma), share
        self.alpha_bar, self.weight, self.share = (c.float().to(device) for c in constants)
        self.step, self.log = 0, []
        self._hours_before, self._since = 0.0, time.monotonic()

    def hours(self) -> float:
        """Time of the whole training, with that before it was resumed."""
        return self._hours_before + (time.monotonic() - self._since) / 3600

    def save(self, out: Path, *, previews: int) -> None:
        """Write a checkpoint, the model and some of its samples."""
        tensors = self._tensors()
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{key}": value for key, value in state.items()}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        standing = {"training": json.dumps({"step": self.step, "hours": self.hours(), "log": self.log})}
        with written(out / STATE) as partial:
            save_file(tensors, partial, standing)
        unet = self.save_model(out)
        if previews:
            model = wrap(unet, self.scheduler, name=out.name, device=self.unet.device)
            if self.captions is not None:
                shown, blank = (self.captions.encode([text]) for text in (self.captions.texts[0][0], ""))
                model = model.conditioned(condition=shown, negative=blank, guidance_scale=PREVIEW_GUIDANCE)
            images = sample(model, range(previews), steps=PREVIEW_STEPS, progress=False).images
            with written(out / "samples" / f"{self.step:07d}.png") as partial:
                _contact_sheet(images).save(partial, "PNG")

    def save_model(self, out: Path) -> UNet2DModel:
        """Write the network with the averaged weights, and a record of its training."""
        unet = copy.deepcopy(self.unet).eval().requires_grad_(False)
        self.average.copy_to(unet.parameters())
        with tempfile.TemporaryDirectory(dir=out, prefix=".partial-") as partial:
            write_parts(unet, self.scheduler, Path(partial))
            for file in filter(Path.is_file, Path(partial).rglob("*")):
                target = out / file.relative_to(partial)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
        standing = {"step": self.step, "hours": round(self.hours(), 6), "hash": hash_weights(unet)}
        write_text(out / CONFIG, as_json(self.description | standing, indent=2) + "\n")
        return unet

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The weights and their average, not copied."""
        named = dict(self.unet.named_parameters())
        averages = zip(named, self.average.shadow_params, strict=True)
        weights = {f"weights.{name}": weight for name, weight in named.items()}
        return weights | {f"average.{name}": average for name, average in averages}

    def load(self, path: Path) -> None:
        """Go back to a checkpoint."""
        try:
            with safe_open(path, framework="pt") as file:
                standing = json.loads(file.metadata()["training"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            with torch.no_grad():
                for name, tensor in self._tensors().items():
                    tensor.copy_(tensors[name])
            state: dict[int, dict] = {}
            for name in filter(lambda name: name.startswith("optimiser."), tensors):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = tensors[name]
            self.optimiser.load_state_dict({**self.optimiser.state_dict(), "state": state})
            self.average.optimization_step = self.step = standing["step"]
            self.log, self._hours_before = standing["log"], standing["hours"]
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"{path} is no checkpoint of this training ({error}); train again") from error


class _Captions:
    """Captions of the images, as tokens, with the text encoder that the network sees them through."""

    def __init__(self, encoder: TextEncoder, texts: list[list[str]]) -> None:
        self.encoder, self.texts = encoder, texts
        self._ids = encoder.tokenise([text for each in texts for text in each]).to(torch.int32)
        self._ends = np.cumsum([len(each) for each in texts])
        self._blank = encoder.tokenise([""])[0]

    def encode(self, texts: list[str]) -> torch.Tensor:
        return self.encoder.encode(self.encoder.tokenise(texts))

    def of(self, batch: Batch, own: slice, device: torch.device) -> dict[str, torch.Tensor]:
        """What the network takes for a process's rows of a batch: one caption of every image, or the empty text."""
        counts = np.array([len(self.texts[row]) for row in batch.rows[own]])
        chosen = self._ends[batch.rows[own]] - counts + (batch.caption[own] * counts).astype(int)
        ids = torch.where(torch.from_numpy(batch.untold[own])[:, None], self._blank, self._ids[chosen].long())
        return {"encoder_hidden_states": self.encoder.encode(ids).to(device)}


def _take_step(
    run: _Run, network: torch.nn.Module, batch: Batch, *, pixels: torch.Tensor, accelerator: Accelerator
) -> torch.Tensor:
    """Train one step; returns the timestep and the squared error of eps of each image of this process, shape (b, 2)."""
    settings, device = run.settings, accelerator.device
    b = settings.batch_size // accelerator.num_processes
    own = slice(accelerator.process_index * b, (accelerator.process_index + 1) * b)
    flipped, t, noise = (torch.from_numpy(each[own]).to(device) for each in (batch.flipped, batch.t, batch.noise))
    x0 = pixels[torch.from_numpy(batch.rows[own])].to(device).float() / 127.5 - 1
    x0 = torch.where(flipped[:, None, None, None], x0.flip(-1), x0)
    alpha_bar = run.alpha_bar[t][:, None, None, None]
    x_t = alpha_bar.sqrt() * x0 + (1 - alpha_bar).sqrt() * noise
    for group in run.optimiser.param_groups:
        group["lr"] = settings.rate(run.step)
    low = settings.precision != "float32" and device.type != "mps"
    dropout = seeded([settings.seed, _DROPOUT, run.step, accelerator.process_index])
    with (
        dropout if settings.dropout > 0 else contextlib.nullcontext(),
        torch.autocast(device.type, PRECISIONS[settings.precision], enabled=low),
    ):
        predicted = network(x_t, t, **({} if run.captions is None else run.captions.of(batch, own, device))).sample
    v = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x0
    target = {"epsilon": noise, "v_prediction": v, "sample": x0}[settings.prediction]
    losses = run.share[t] * (predicted.float() - target).square().mean(dim=(1, 2, 3))
    run.optimiser.zero_grad(set_to_none=True)
    accelerator.backward((run.weight[t] * losses).mean())
    accelerator.clip_grad_norm_(run.unet.parameters(), settings.clip)
    run.optimiser.step()
    run.average.step(run.unet.parameters())
    run.step += 1
    count_passes(3 * b)  # a backward pass takes about as long as two forward
    return torch.stack([t.float(), losses.detach()], dim=1)


def _log_row(seen: np.ndarray, run: _Run) -> dict:
    """Mean losses of the steps since the last row, of all timesteps and by noise level; `seen` has columns t, loss."""
    (t, losses), step, settings = seen.T, run.step, run.settings
    row = {"step": step, "images": step * settings.batch_size, "rate": settings.rate(step - 1), "loss": losses.mean()}
    row["weighted"] = (losses * run.weight.cpu().numpy()[t.astype(int)]).mean()
    for low, high in itertools.pairwise(round(share * settings.timesteps) for share in NOISE_LEVELS):
        inside = (t >= low) & (t < high)
        row[f"t {low}-{high - 1}"] = losses[inside].mean() if inside.any() else None
    return {key: value if value is None or isinstance(value, int) else float(value) for key, value in row.items()}


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, n: int) -> np.ndarray:
    return np.random.default_rng([seed, _ORDER, epoch]).permutation(n)


def _read_captions(images: Sequence[torch.Tensor] | torch.Tensor) -> list[list[str]]:
    """Captions of all images of one or several sources."""
    if isinstance(images, (list, tuple)):
        return [captions for part in images for captions in _read_captions(part)]
    if not hasattr(images, "captions"):
        raise ValueError("a network on texts is trained on images with captions, from `load_images`")
    if missing := sum(not each for each in images.captions):
        raise ValueError(f"{missing} of {len(images)} images have no caption; select the others")
    return images.captions


def _read_images(images: Sequence[torch.Tensor] | torch.Tensor, shape: tuple[int, int, int]) -> torch.Tensor:
    """All images of one or several sources in memory, 8 bits a value."""
    if isinstance(images, (list, tuple)):
        return torch.cat([_read_images(part, shape) for part in images])
    if not len(images):
        raise ValueError("there are no images; give 1 or more")
    images = torch.from_numpy(images) if isinstance(images, np.ndarray) else images
    if hasattr(images, "at_size"):
        images = images.at_size(shape)
    if tuple(images[:1].shape[1:]) != shape:
        raise ValueError(
            f"the images have shape {tuple(images[:1].shape[1:])} and the model takes {shape}; resize them, or train a "
            "model of their size"
        )
    if torch.is_tensor(images):
        check_values(images)
        warn_of_unit_range(*map(float, images.aminmax()))
    return to_bytes(images)


def _describe(
    settings: TrainingSettings,
    unet: torch.nn.Module,
    scheduler: DDPMScheduler,
    pixels: torch.Tensor,
    captions: _Captions | None,
) -> dict:
    """Content of `training.json`."""
    images = {"n": len(pixels), "sha256": hashlib.sha256(pixels.numpy()).hexdigest()}
    if captions is not None:
        images["captions"] = hashlib.sha256(json.dumps(captions.texts).encode()).hexdigest()
    packages = ("torch", "diffusers", "accelerate", "numpy")
    return {
        "settings": asdict(settings),
        "images": images,
        "network": {key: value for key, value in unet.config.items() if not key.startswith("_")},
        "scheduler": {key: value for key, value in scheduler.config.items() if not key.startswith("_")},
        "parameters": sum(p.numel() for p in unet.parameters()),
        "commit": commit(),
        "versions": {package: importlib.metadata.version(package) for package in packages},
    }


def _contact_sheet(images: torch.Tensor) -> Image.Image:
    """Images of shape (n, C, H, W), values in [-1, 1], in rows of about a square."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = math.ceil(len(images) / columns)
    height, width = images.shape[2:]
    tiles = torch.full((rows * columns, 3, height, width), 255, dtype=torch.uint8)
    tiles[: len(images)] = to_bytes(with_channels(images.cpu(), 3))
    sheet = tiles.view(rows, columns, 3, height, width).permute(0, 3, 1, 4, 2)
    return Image.fromarray(sheet.reshape(rows * height, columns * width, 3).numpy())
