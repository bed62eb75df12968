"""Networks of other code bases, written as diffusers' `UNet2DModel`.

Two families of pixel-space DDPMs are published as single files:

- "ddpm": the PyTorch port of the original DDPM (Ho et al. 2020) that DDIM, SDEdit, DiffusionCLIP, Asyrp and
  BoundaryDiffusion use;
- "guided": improved-diffusion (Nichol & Dhariwal 2021), guided-diffusion (Dhariwal & Nichol 2021) and what was trained
  with them, such as P2 weighting (Choi et al. 2022).

`UNet2DModel` computes the same functions; only names and the order of some rows differ. Which family a file belongs to,
its widths, depth and levels with attention follow from names and shapes; the size of its images and of its attention
heads do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from numbers import Integral
from pathlib import Path

import numpy as np
import torch
import yaml

from workbench.io import one_of


def _read_yaml(name: str) -> dict:
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


NAMES = _read_yaml("names.yaml")
"""Names of weights in the files, and here: patterns by layout, and the weights by which a layout is known."""

ORDERS = ("legacy", "new")
"""Rows of guided-diffusion's qkv: [head][q, k, v][channel], or [q, k, v][head][channel]."""

GROUPS = 32
"""Groups of every normalisation, fixed in both code bases."""

SCHEDULES = ("linear", "cosine", "sigmoid")
FEWEST = 21
"""Timesteps that a schedule has at least: with fewer, the linear one's betas reach 1."""


def noise_schedule(name: str = "linear", T: int = 1000, *, rescaled: bool = False) -> dict:
    """A noise schedule of these code bases, as settings of a diffusers scheduler.

    Parameters
    ----------
    name : {"linear", "cosine", "sigmoid"}
        "sigmoid", the default of denoising-diffusion-pytorch, is Jabri et al. 2022 with start -3, end 3 and tau 1.
    T : int
        Timesteps that the network was trained on. The linear schedule's betas, 1e-4 to 0.02 for 1000 of them, are
        scaled by 1000 / T, as in guided-diffusion.
    rescaled : bool
        The network is told t * 1000 / T (`rescale_timesteps`, the default of improved-diffusion alone). The schedule is
        then that of the timesteps which are told as whole numbers, every fourth of 4000: the same network at the same
        noise levels.
    """
    one_of("schedule", name, SCHEDULES)
    least = 1000 if rescaled else FEWEST
    if not isinstance(T, Integral) or T < least or (rescaled and T % 1000):
        raise ValueError(f"timesteps is {T}; give {'a multiple of 1000' if rescaled else f'{least} or more'}")
    settings = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": int(T)}
    if name == "linear":
        settings |= {"beta_schedule": "linear", "beta_start": 0.1 / T, "beta_end": 20 / T}
    if name != "sigmoid" and (not rescaled or T == 1000):
        return settings
    time = np.arange(T + 1) / T
    alpha_bar = np.cos((time + 0.008) / 1.008 * np.pi / 2) ** 2
    if name == "sigmoid":
        alpha_bar = 1 / (1 + np.exp(6 * time - 3)) - 1 / (1 + np.exp(3))
    betas = np.minimum(1.0 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    if name == "linear":
        betas = np.linspace(0.1 / T, 20 / T, T)
    if rescaled and T > 1000:
        kept = np.cumprod(1.0 - betas)[:: T // 1000]
        betas = 1.0 - kept / np.concatenate([[1.0], kept[:-1]])
    return {"trained_betas": betas.tolist(), "num_train_timesteps": len(betas)}


LINEAR, COSINE = map(noise_schedule, SCHEDULES[:2])


@dataclass(frozen=True)
class Architecture:
    """Settings of `UNet2DModel` for one of these networks.

    Attributes
    ----------
    layout : {"ddpm", "guided"}
    image_size : int
        Side of the images in pixels.
    channels : tuple of int
        At every level, finest first.
    layers : int
        Residual blocks a level.
    attention : tuple of int
        Levels with attention, 0 the finest.
    head_channels : int, optional
        Of an attention head; None for a single head.
    heads : int, optional
        Number of heads at every level, where their channels differ by level; `head_channels` is then None.
    num_classes : int, optional
        Of a network that is conditioned on a class.
    in_channels, out_channels : int
        A network with learned variance has twice as many outputs as inputs.
    scale_shift : bool
        The timestep scales and shifts the second normalisation, instead of being added before it.
    residual_resampling : bool
        Residual blocks change the resolution, instead of convolutions.
    attention_order : {"legacy", "new"}
        Order of the rows of qkv in the file; see `ORDERS`.
    """

    layout: str
    image_size: int
    channels: tuple[int, ...]
    layers: int
    attention: tuple[int, ...]
    head_channels: int | None = None
    heads: int | None = None
    num_classes: int | None = None
    in_channels: int = 3
    out_channels: int = 3
    scale_shift: bool = False
    residual_resampling: bool = False
    attention_order: str = "legacy"

    def __post_init__(self) -> None:
        one_of("attention_order", self.attention_order, ORDERS)
        for name in ("head_channels", "heads"):
            given = getattr(self, name)
            if given is not None and (given < 1 or any(width % given for width in self.attention_widths)):
                widths = " and ".join(map(str, self.attention_widths))
                raise ValueError(f"{name} is {given}; attention here is {widths} channels wide, which it must divide")
        if self.heads is not None and len(self.attention_widths) == 1:
            # One width has heads of one size, and is `UNet2DModel` itself.
            object.__setattr__(self, "head_channels", self.attention_widths[0] // self.heads)
            object.__setattr__(self, "heads", None)

    @property
    def attention_widths(self) -> list[int]:
        """Numbers of channels where there is attention, which the mid block always has."""
        return sorted({self.channels[-1], *(self.channels[level] for level in self.attention)})

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the bottleneck."""
        side = self.image_size >> (len(self.channels) - 1)
        return (self.channels[-1], side, side)

    def config(self) -> dict:
        """Config of a `UNet2DModel`, or of a `MultiheadUNet2DModel` where the channels of heads differ by level."""
        ddpm, resampling = self.layout == "ddpm", "resnet" if self.residual_resampling else "conv"
        plain = "Resnet{}sampleBlock2D" if self.residual_resampling else "{}Block2D"
        blocks = ["Attn{}Block2D" if i in self.attention else plain for i in range(len(self.channels))]
        own = {"_class_name": "UNet2DModel"}
        if self.heads is not None:
            own = {"_class_name": "MultiheadUNet2DModel", "num_attention_heads": self.heads}
        return own | {
            "sample_size": self.image_size,
            "in_channels": self.in_channels,
            "out_channels": self.out_channels,
            "block_out_channels": self.channels,
            "layers_per_block": self.layers,
            "down_block_types": tuple(block.format("Down") for block in blocks),
            "up_block_types": tuple(block.format("Up") for block in reversed(blocks)),
            "downsample_type": resampling,
            "upsample_type": resampling,
            "downsample_padding": 0 if ddpm else 1,
            "attention_head_dim": self.head_channels,
            "norm_num_groups": GROUPS,
            # Without it, diffusers leaves out the mid attention's normalisation where scale and shift are used.
            "attn_norm_num_groups": None if ddpm else GROUPS,
            "norm_eps": 1e-6 if ddpm else 1e-5,
            "resnet_time_scale_shift": "scale_shift" if self.scale_shift else "default",
            "freq_shift": 1 if ddpm else 0,
            "flip_sin_to_cos": not ddpm,
            "num_class_embeds": self.num_classes,
        }


_EXAMPLES = {"image_size": "image_size=256", "head_channels": "head_channels=64 or heads=4"}
_ANY_SIZE = 1024  # which all networks can halve: sizes are not in the shapes


@dataclass(frozen=True)
class Preset:
    """A published checkpoint.

    Attributes
    ----------
    architecture : Architecture
    about : str
    files : tuple of str
        Names that its file is published under; a file of such a name needs no preset.
    schedule : dict
        Settings of a diffusers scheduler.
    """

    architecture: Architecture
    about: str
    files: tuple[str, ...] = ()
    schedule: dict = field(default_factory=lambda: LINEAR, repr=False)


def _published() -> tuple[dict[str, Preset], dict[str, Architecture]]:
    content = _read_yaml("published.yaml")
    networks = {
        name: Architecture(**{key: tuple(value) if isinstance(value, list) else value for key, value in each.items()})
        for name, each in content["architectures"].items()
    }
    presets = {
        name: Preset(
            networks[each["architecture"]],
            each["about"],
            tuple(each.get("files", ())),
            noise_schedule(**each.get("schedule", {})),
        )
        for name, each in content["presets"].items()
    }
    return presets, {name: networks[each] for name, each in content["hub"].items()}


PRESETS, HUB = _published()
"""Published checkpoints by name, and repositories of the hub, which hold diffusers folders."""


def find_preset(name: str | None, file: str) -> str | None:
    """The given preset, else the preset of a published file of this name, else None."""
    if name is not None:
        return one_of("preset", name, PRESETS)
    return next((name for name, preset in PRESETS.items() if file in preset.files), None)


def by_our_names(state: Mapping[str, torch.Tensor], layout: str) -> dict[str, torch.Tensor]:
    """Weights by their names in `UNet2DModel`, of those by their names in a file, without prefixes.

    qkv stays one matrix (`split_attention` divides it), and a name that `UNet2DModel` does not have stays as it is.
    """
    levels, layers = 1 + max(numbers(state, r"down\.(\d+)\."), default=0), 0
    if layout == "guided":
        # Down-sampling blocks look like all others where the width stays; up-sampling ones come second in their block.
        levels = 1 + len(numbers(state, r"output_blocks\.(\d+)\.[12]\.(?:in_layers\.0|conv)\.weight"))
        layers = (1 + max(numbers(state, r"output_blocks\.(\d+)\."), default=-1)) // levels - 1
        if layers < 1:
            raise ValueError("there are too few output_blocks, so the network is not complete")
    return {rename(_in_levels(name, levels, layers), layout): tensor for name, tensor in state.items()}


def rename(name: str, layout: str, *, last: int = 0) -> str:
    """A name by the patterns of `NAMES`, one after the other; `last` is the number of the last level."""
    for pattern, replacement in NAMES[layout]:
        name = re.sub(pattern, replacement.replace("{last}", str(last)), name)
    return name


def _in_levels(name: str, levels: int, layers: int) -> str:
    """A name with the number of its level as diffusers counts, by the order of the blocks on the way down or up.

    The original DDPM counts levels from the finest on the way up, too; guided-diffusion counts the blocks of a way
    through all levels.
    """
    if found := re.match(r"up\.(\d+)(.*)", name):
        return f"up.{levels - 1 - int(found[1])}{found[2]}"
    found = re.match(r"(in|out)put_blocks\.(\d+)\.(\d)\.(.*)", name)
    if found is None or name.startswith("input_blocks.0."):  # the first convolution
        return name
    way, part, rest = {"in": "down", "out": "up"}[found[1]], found[3], found[4]
    level, j = divmod(int(found[2]) - (way == "down"), layers + 1)
    kind = "attentions" if re.match(r"norm|qkv|proj_out", rest) else "resnets"
    resamples = j == layers if way == "down" else kind == "resnets" and part != "0"
    return f"{way}_blocks.{level}." + (f"{way}samplers.0.{rest}" if resamples else f"{kind}.{j}.{rest}")


def infer(
    state: Mapping[str, torch.Tensor],
    layout: str,
    *,
    image_size: int | None = None,
    head_channels: int | None = None,
    heads: int | None = None,
    attention_order: str = "legacy",
) -> Architecture:
    """The architecture of a network, from the names (`by_our_names`) and shapes of its weights.

    `image_size`, `head_channels` or `heads`, and `attention_order` are what no shape tells, as the attributes of
    `Architecture`; where the first two are missing, a ValueError names presets with these shapes. The layout "ddpm" has
    a single head.
    """
    if heads is not None and head_channels is not None:
        raise ValueError(f"heads is {heads} and head_channels is {head_channels}; give one of the two")
    shapes = _settings(state)
    asked = {"image_size": image_size}
    if layout == "guided":
        asked |= {"head_channels": head_channels} if heads is None else {"heads": heads}
    missing = [name for name, given in asked.items() if given is None]
    if missing:
        ask_for(missing, Architecture(layout, _ANY_SIZE, **shapes))
    return Architecture(layout, **asked, attention_order=attention_order, **shapes)


def ask_for(missing: list[str], found: Architecture | None = None) -> None:
    """Raise a ValueError that asks for what no shape tells, and names the presets with the shapes found."""
    unknown = {"image_size": _ANY_SIZE, "head_channels": None, "heads": None, "attention_order": "legacy"}
    alike = [name for name, preset in PRESETS.items() if replace(preset.architecture, **unknown) == found]
    also = f", or preset={' or '.join(map(repr, alike))}, which have these shapes" if alike else ""
    example = ", ".join(_EXAMPLES[name] for name in missing)
    raise ValueError(f"the weights don't tell {' and '.join(missing)}; give them (such as {example}){also}")


def refuse_unknown_schedule(architecture: Architecture) -> None:
    """Weights do not tell their schedule: refuse to guess where a published network has another than the linear one."""
    for name, preset in PRESETS.items():
        if preset.architecture == architecture and preset.schedule != LINEAR:
            raise ValueError(
                f"the weights don't tell the noise schedule, and {name}, which has these shapes, does not have the "
                f"linear one; give preset={name!r}, or schedule= {' or '.join(map(repr, SCHEDULES))}"
            )


def _settings(state: Mapping[str, torch.Tensor]) -> dict:
    """Settings of an `Architecture` that names and shapes tell."""
    levels = 1 + max(numbers(state, r"down_blocks\.(\d+)\."), default=0)
    channels = tuple(shape(state, f"down_blocks.{i}.resnets.0.conv1.weight")[0] for i in range(levels))
    if levels > 1 and not any(name.startswith("down_blocks.0.downsamplers.") for name in state):
        raise ValueError("the network resamples without convolutions (resamp_with_conv is off), which is not supported")
    return {
        "channels": channels,
        "layers": 1 + max(numbers(state, r"down_blocks\.0\.resnets\.(\d+)\.")),
        "attention": tuple(sorted(numbers(state, r"down_blocks\.(\d+)\.attentions\."))),
        "in_channels": shape(state, "conv_in.weight")[1],
        "out_channels": shape(state, "conv_out.weight")[0],
        "scale_shift": shape(state, "down_blocks.0.resnets.0.time_emb_proj.weight")[0] == 2 * channels[0],
        "residual_resampling": "down_blocks.0.downsamplers.0.conv1.weight" in state,
        "num_classes": shape(state, "class_embedding.weight")[0] if "class_embedding.weight" in state else None,
    }


def numbers(state: Mapping[str, torch.Tensor], pattern: str) -> set[int]:
    """What a pattern's group finds in the names."""
    return {int(found[1]) for found in (re.match(pattern, name) for name in state) if found}


def shape(state: Mapping[str, torch.Tensor], name: str, least: int = 2) -> tuple[int, ...]:
    """Shape of a weight of so many dimensions at least; ValueError if there is none."""
    if name not in state or state[name].ndim < least:
        raise ValueError(f"{name} is missing or no weight of images, so the network is not complete")
    return tuple(state[name].shape)


def split_attention(state: Mapping[str, torch.Tensor], architecture: Architecture) -> dict[str, torch.Tensor]:
    """Weights of `UNet2DModel`, of those `by_our_names`: q, k and v of one matrix apart, and linear maps for attention.

    The files have convolutions of size 1 in place of these.
    """
    converted = {}
    for name, rows in state.items():
        if ".attentions." in name and rows.ndim > 1:
            rows = rows.flatten(1)
        if ".qkv." in name:
            names = [name.replace(".qkv.", f".to_{part}.") for part in "qkv"]
            converted |= zip(names, _split(rows, architecture), strict=True)
        else:
            converted[name] = rows
    return converted


def _split(rows: torch.Tensor, architecture: Architecture) -> tuple[torch.Tensor, ...]:
    """q, k and v of one matrix, each with the rows [head][channel]."""
    if architecture.attention_order == "new":
        return rows.chunk(3)
    by_head = rows.unflatten(0, (architecture.heads or -1, 3, architecture.head_channels or -1))
    return tuple(part.flatten(0, 1) for part in by_head.unbind(1))
