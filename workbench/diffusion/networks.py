"""Settings of a training, its noise schedule, and its initial network: new, grown, or with fewer skip connections."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import cast

import numpy as np
import torch
from diffusers import DDPMScheduler, UNet2DConditionModel, UNet2DModel

from workbench.diffusion.loading import load_model
from workbench.diffusion.models import Model
from workbench.diffusion.schedule import PREDICTIONS
from workbench.formats.layouts import FEWEST, noise_schedule
from workbench.io import one_of
from workbench.shapes import shape_of

NORM_GROUPS = 16
_WEIGHTS = 2
"""Stream of a training's seed that new weights are drawn from."""

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16}

_BOUNDS = {
    "1 or more": (("layers", "head_channels", "steps", "batch_size"), lambda value: value >= 1),
    "a number above 0": (("learning_rate", "clip", "gamma"), lambda value: value > 0),
    "a number from 0 to below 1": (("dropout", "text_dropout", "ema"), lambda value: 0 <= value < 1),
    "0 or more": (("warmup", "weight_decay", "seed", "skips"), lambda value: value is None or value >= 0),
}
"""Ranges of the settings."""


@dataclass(frozen=True)
class TrainingSettings:
    """Settings of a training; the network is by default that of `avataaars32`.

    Attributes
    ----------
    size : int, (height, width) or (channels, height, width)
        Pixels of the images (one number: of both sides), and their channels if not 3; kept as all three numbers. With
        `start`, this and the next six are those of that model.
    timesteps : int
        T, the number of timesteps, 21 or more. The betas are linear, from 0.1 / T to 20 / T: for 1000, those of DDPM.
    prediction : {"epsilon", "v_prediction", "sample"}
        What the network predicts: eps, v or x_0, as in `schedule.PREDICTIONS`. The loss is that of eps for all three.
    widths : tuple of int
        Channels at every resolution, multiples of 16, finest resolution first; each resolution halves the previous one.
        The last width is that of the bottleneck, of `size / 2 ** (len(widths) - 1)` pixels.
    layers : int
        Residual blocks per resolution.
    attention : tuple of int
        Resolutions of the network with self-attention, in pixels of the shorter side; () or 0 is none. The mid block
        always has it.
    head_channels : int
        Channels of an attention head, no more than the widths with attention.
    start : str or None
        Name or folder of a model with the initial weights; random weights by default.
    grow : bool
        Put a resolution twice as fine around the network of `start`, as wide as its finest one, and train on images of
        twice its size; only the new blocks start from random weights (progressive growing, Karras et al. 2018).
    skips : int or None
        Number of skip connections to keep, counted from the input; the others have weights of 0 in the decoder, so that
        coarser features reach the image through h alone (except through the mean and variance of channel groups shared
        by both paths). By default all.
    text : str or None
        Folder or hub id of a CLIP: the network is conditioned on captions of the images, by cross-attention to the
        tokens of its text encoder, wherever it has self-attention. The blocks of attention are new, with `start` too,
        and give nothing at first.
    text_dropout : float in [0, 1)
        Share of captions that are replaced by the empty text, for guidance (Ho and Salimans 2022).
    dropout : float in [0, 1)
    steps, batch_size : int
        Optimiser steps, and images per step over all processes.
    learning_rate : float
        Peak rate, reached after `warmup` steps; a cosine then decays to 0.
    warmup : int
        Number of steps; a tenth of all steps if that is less.
    weight_decay : float
        Weight decay of AdamW, with betas (0.9, 0.99).
    clip : float
        Maximum norm of the gradient.
    ema : float in [0, 1)
        Decay of the moving average of the weights, which the model keeps; less in the first steps.
    gamma : float or inf
        gamma of the min-SNR weights (Hang et al. 2023); inf gives the plain loss of DDPM.
    flips : bool
        Mirror images with probability 0.5, drawn again every time.
    precision : {"bfloat16", "float32"}
        Precision of the passes; weights and their average are float32.
    compile : bool
        Compile the network (a minute at the start).
    seed : int
        Seed of the initial weights, the order of the images, flips, timesteps, noise and dropout.
    """

    size: int | tuple[int, ...] = 32
    timesteps: int = 1000
    prediction: str = "epsilon"
    widths: tuple[int, ...] = (48, 96, 144)
    layers: int = 1
    attention: tuple[int, ...] = (8,)
    head_channels: int = 48
    start: str | None = None
    grow: bool = False
    skips: int | None = None
    text: str | None = None
    text_dropout: float = 0.1
    dropout: float = 0.0
    steps: int = 10_000
    batch_size: int = 32
    learning_rate: float = 4e-4
    warmup: int = 200
    weight_decay: float = 1e-4
    clip: float = 1.0
    ema: float = 0.999
    gamma: float = 5.0
    flips: bool = False
    precision: str = "bfloat16"
    compile: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", shape_of(self.size))
        for name in ("widths", "attention"):
            object.__setattr__(self, name, tuple(int(value) for value in getattr(self, name) if int(value)))
        for allowed, (names, fits) in _BOUNDS.items():
            for name in names:
                if not fits(getattr(self, name)):
                    raise ValueError(f"{name} is {getattr(self, name)}; give {allowed}")
        one_of("precision", self.precision, PRECISIONS)
        one_of("prediction", self.prediction, PREDICTIONS)
        if self.start is None:
            noise_schedule(T=self.timesteps)  # refuses too few
            if self.grow:
                raise ValueError("grow needs a model to grow; give start")
            self._check_network()

    def _check_network(self) -> None:
        halvings = len(self.widths) - 1
        if not self.widths or any(width < 1 or width % NORM_GROUPS for width in self.widths):
            raise ValueError(f"widths are {list(self.widths)}; give multiples of {NORM_GROUPS}, the finest first")
        sides = self.size[1:]
        for side in sides:
            if side % 2**halvings:
                remedy = f"give fewer widths, or a multiple of {2**halvings}"
                raise ValueError(f"images of {side} pixels can't be halved {halvings} times; {remedy}")
        width_at = {min(sides) >> level: width for level, width in enumerate(self.widths)}
        for side in self.attention:
            if side not in width_at:
                there = ", ".join(map(str, width_at))
                raise ValueError(
                    f"attention is at {side} pixels; this network's shorter side has {there}; give some of these, or 0"
                )
        narrowest = min([width_at[side] for side in self.attention] + [self.widths[-1]])
        if self.head_channels > narrowest:
            reason = f"attention here is {narrowest} channels wide; give 1 to {narrowest}"
            raise ValueError(f"head_channels is {self.head_channels}, and {reason}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warmup = min(self.warmup, self.steps // 10)
        if step < warmup:
            return self.learning_rate * (step + 1) / warmup
        return self.learning_rate * (0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (self.steps - warmup)))


@contextlib.contextmanager
def seeded(seed: list[int]) -> Iterator[None]:
    """torch's own generators, which new weights and dropout draw from, start from a seed inside and are put back."""
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices=devices):
        torch.random.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> 1))
        yield


def empty_unet(config: dict) -> UNet2DModel | UNet2DConditionModel:
    """A network whose weights are read next."""
    kind = UNet2DConditionModel if "cross_attention_dim" in config else UNet2DModel
    with torch.device("meta"):
        unet = kind.from_config(config)
    return unet.to_empty(device="cpu")


def first_unet(
    settings: TrainingSettings, *, token_width: int | None = None
) -> tuple[UNet2DModel | UNet2DConditionModel, DDPMScheduler]:
    """The network that a training begins with, and its noise schedule with the kind of prediction.

    With `token_width` it is conditioned on texts of tokens of that width.
    """
    s = settings
    if s.start is not None:
        model = load_model(s.start, device="cpu")
        unet, scheduler = _network_of(model, grow=s.grow, dropout=s.dropout, seed=s.seed), _scheduler_of(model)
    else:
        unet, scheduler = _new_unet(s), DDPMScheduler(**noise_schedule(T=s.timesteps), prediction_type=s.prediction)
    if token_width is not None:
        unet = conditioned_unet(unet, token_width=token_width, seed=s.seed)
    return unet, scheduler


def _new_unet(s: TrainingSettings) -> UNet2DModel:
    channels, height, width = s.size
    attends = ["Attn" if min(height, width) >> level in s.attention else "" for level in range(len(s.widths))]
    with seeded([s.seed, _WEIGHTS]):
        return UNet2DModel(
            sample_size=height if height == width else (height, width),
            in_channels=channels,
            out_channels=channels,
            block_out_channels=s.widths,
            layers_per_block=s.layers,
            down_block_types=[f"{attn}DownBlock2D" for attn in attends],
            up_block_types=[f"{attn}UpBlock2D" for attn in reversed(attends)],
            attention_head_dim=s.head_channels,
            norm_num_groups=NORM_GROUPS,
            dropout=s.dropout,
        )


def conditioned_unet(unet: UNet2DModel, *, token_width: int, seed: int) -> UNet2DConditionModel:
    """A network on texts with the weights of an unconditional one, but for its attention.

    Where that has self-attention, this one has transformer blocks (self-attention and cross-attention to the tokens),
    whose last layers are 0 at first, so that each begins as the identity.
    """
    c = unet.config
    shared = {
        name: c[name]
        for name in inspect.signature(UNet2DConditionModel).parameters
        if name in c and name not in ("down_block_types", "up_block_types", "mid_block_type", "num_class_embeds")
    }
    heads = [max(1, width // (c.attention_head_dim or width)) for width in c.block_out_channels]  # None is one head
    with seeded([seed, _WEIGHTS]):
        conditioned = UNet2DConditionModel(
            **shared
            | {
                "down_block_types": tuple(name.replace("AttnDown", "CrossAttnDown") for name in c.down_block_types),
                "up_block_types": tuple(name.replace("AttnUp", "CrossAttnUp") for name in c.up_block_types),
                "attention_head_dim": heads,  # diffusers' name for the number of heads
                "cross_attention_dim": token_width,
            }
        )
    kept = {name: weight for name, weight in unet.state_dict().items() if ".attentions." not in name}
    missing, unexpected = conditioned.load_state_dict(kept, strict=False)
    if unexpected or any(".attentions." not in name for name in missing):
        raise ValueError(f"a network with {(unexpected or missing)[0]} can't be conditioned on texts")
    for name, module in conditioned.named_modules():
        if name.endswith("proj_out"):
            torch.nn.init.zeros_(module.weight)
            torch.nn.init.zeros_(module.bias)
    return conditioned


def _scheduler_of(model: Model) -> DDPMScheduler:
    """The noise schedule and the kind of prediction of a model, as diffusers has them."""
    schedule, T = model.schedule, model.schedule.T
    betas = noise_schedule(T=max(T, FEWEST))
    if T < FEWEST or not np.allclose(DDPMScheduler(**betas).alphas_cumprod, schedule.alpha_bars, rtol=1e-4):
        ratios = schedule.alpha_bars / np.append(1.0, schedule.alpha_bars[:-1])
        betas = {"num_train_timesteps": T, "trained_betas": (1 - ratios).tolist()}
    spacing = {"timestep_spacing": schedule.spacing, "steps_offset": schedule.offset}
    scheduler = DDPMScheduler(**betas, **spacing, prediction_type=model.prediction)
    if schedule.clean < 1.0:
        scheduler.register_to_config(set_alpha_to_one=False)  # as DDIM's scheduler reads it
    return scheduler


def _network_of(model: Model, *, grow: bool, dropout: float, seed: int) -> UNet2DModel:
    """The network of a model, with its weights; grown to twice the size of its images if asked for."""
    unet, (channels, height, width) = model.unet.unet, model.x_shape
    if model.latent or model.unet.stages.conditioned_on or type(unet) is not UNet2DModel:
        raise ValueError(f"{model.name} is conditional, latent or no UNet2DModel; begin with another, or with none")
    if unet.config.out_channels != channels:
        raise ValueError(f"{model.name} has {unet.config.out_channels} outputs, a learned variance; take another")
    config = {**unet.config, "sample_size": height if height == width else (height, width), "dropout": dropout}
    if grow:
        return _grown(config, unet.state_dict(), seed=seed)
    copied = empty_unet(config)
    copied.load_state_dict(unet.state_dict())
    return cast(UNet2DModel, copied)


def _grown(config: dict, weights: dict[str, torch.Tensor], *, seed: int) -> UNet2DModel:
    """The network with one more resolution outside, as wide as the finest; the other blocks have the weights."""
    size = config["sample_size"]
    outer = {
        "sample_size": 2 * size if isinstance(size, int) else (2 * size[0], 2 * size[1]),
        "block_out_channels": (config["block_out_channels"][0], *config["block_out_channels"]),
        "down_block_types": ("DownBlock2D", *config["down_block_types"]),
        "up_block_types": (*config["up_block_types"], "UpBlock2D"),
    }
    with seeded([seed, _WEIGHTS]):
        unet = cast(UNet2DModel, UNet2DModel.from_config({**config, **outer}))

    def moved(name: str) -> str:
        # Blocks are counted from the input: all on the way down move on by one, those on the way up stay.
        return re.sub(r"^down_blocks\.(\d+)", lambda found: f"down_blocks.{int(found[1]) + 1}", name)

    unet.load_state_dict(unet.state_dict() | {moved(name): weight for name, weight in weights.items()})
    return unet


def cut_skips(unet: UNet2DModel, *, kept: int) -> None:
    """Set the weights of all skip connections but the outermost ones to 0, where they stay."""
    widths, layers = unet.config.block_out_channels, unet.config.layers_per_block
    # What the way down leaves behind: the first convolution, and at each resolution the blocks and what halves it.
    carried = [widths[0], *(width for width in widths for _ in range(layers + 1))][:-1]
    ways = [resnet for block in reversed(unet.up_blocks) for resnet in reversed(block.resnets)]
    if kept > len(carried):
        raise ValueError(f"skips is {kept}; this network has 0 to {len(carried)}")
    for resnet, channels in list(zip(ways, carried, strict=True))[kept:]:
        for convolution in (resnet.conv1, resnet.conv_shortcut):
            convolution.weight.data = _without_last(convolution.weight.data, channels)
            convolution.weight.register_hook(partial(_without_last, channels=channels))


def _without_last(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """A copy of a convolution's weight, or of its gradient, with 0 for the last of the channels that it reads."""
    weight = weight.clone()
    weight[:, -channels:] = 0
    return weight
