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
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import yaml

from workbench.io import one_of


def _read_yaml(name: str) -> dict:
    return yaml.safe_load((Path(__file__).parent / name).read_text(encoding="utf-8"))


NAMES = _read_yaml("names.yaml")
"""Names of weights in the files, and here."""

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
    if not isinstance(T, int) or T < least or (rescaled and T % 1000):
        raise ValueError(f"timesteps is {T}; give {'a multiple of 1000' if rescaled else f'{least} or more'}")
    settings = {"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": T}
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
        halvings = len(self.channels) - 1
        if self.image_size < 1 or self.image_size % 2**halvings:
            allowed = f"a network of {halvings + 1} levels takes multiples of {2**halvings}"
            raise ValueError(f"image_size is {self.image_size}; {allowed}")
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


_EXAMPLES = {"image_size": 256, "head_channels": 64}
_FIRST = {"ddpm": "conv_in.weight", "guided": "input_blocks.0.0.weight"}
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


def _published() -> tuple[dict[str, Preset], dict[str, Architecture], list[dict]]:
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
    return presets, {name: networks[each] for name, each in content["hub"].items()}, content["kinds"]


PRESETS, HUB, KINDS = _published()
"""Published checkpoints by name, repositories of the hub, which hold diffusers folders, and kinds of models."""


def find_preset(name: str | None, file: str) -> str | None:
    """The given preset, else the preset of a published file of this name, else None."""
    if name is not None:
        return one_of("preset", name, PRESETS)
    return next((name for name, preset in PRESETS.items() if file in preset.files), None)


def infer(
    state: Mapping[str, torch.Tensor],
    layout: str,
    *,
    image_size: int | None = None,
    head_channels: int | None = None,
    heads: int | None = None,
    attention_order: str = "legacy",
) -> Architecture:
    """The architecture of a network, from the names and shapes of its weights.

    `image_size`, `head_channels` or `heads`, and `attention_order` are what no shape tells, as the attributes of
    `Architecture`; where the first two are missing, a ValueError names presets with these shapes. The layout "ddpm" has
    a single head.
    """
    if heads is not None and head_channels is not None:
        raise ValueError(f"heads is {heads} and head_channels is {head_channels}; give one of the two")
    shapes = (_shapes_of_ddpm if layout == "ddpm" else _shapes_of_guided)(state)
    first, level = _rows(state, _FIRST[layout]), shapes["channels"][0]
    if first != level:  # which diffusers' UNet2DModel can't have
        raise ValueError(f"its first level has {level} channels and its first convolution {first}; they must be equal")
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
    example = ", ".join(f"{name}={_EXAMPLES[name]}" for name in missing)
    options = " ".join(f"--{name.replace('_', '-')} {_EXAMPLES[name]}" for name in missing)
    if "head_channels" in missing:
        also = f", or heads=4, their number, in place of head_channels{also}"
    command = f"on the command line to `workbench convert FILE FOLDER {options}`"
    raise ValueError(f"the weights don't tell {' and '.join(missing)}; give them (such as {example}; {command}){also}")


def refuse_unknown_schedule(architecture: Architecture) -> None:
    """Weights do not tell their schedule: refuse to guess where a published network has another than the linear one."""
    for name, preset in PRESETS.items():
        if preset.architecture == architecture and preset.schedule != LINEAR:
            raise ValueError(
                f"the weights don't tell the noise schedule, and {name}, which has these shapes, does not have the "
                f"linear one; give preset={name!r}, or schedule= {' or '.join(map(repr, SCHEDULES))}"
            )


def _shapes_of_ddpm(state: Mapping[str, torch.Tensor]) -> dict:
    levels = 1 + max(_numbers(state, r"down\.(\d+)\."), default=-1)
    layers = 1 + max(_numbers(state, r"down\.0\.block\.(\d+)\."), default=-1)
    if levels == 0 or layers == 0:
        raise ValueError("there are no blocks (down.0.block.0 ...), so the network is not complete")
    if levels > 1 and "down.0.downsample.conv.weight" not in state:
        raise ValueError("the network resamples without convolutions (resamp_with_conv is off), which is not supported")
    return {
        "channels": tuple(_rows(state, f"down.{i}.block.0.conv1.weight") for i in range(levels)),
        "layers": layers,
        "attention": tuple(i for i in range(levels) if f"down.{i}.attn.0.norm.weight" in state),
        "in_channels": _shape(state, _FIRST["ddpm"])[1],
        "out_channels": _rows(state, "conv_out.weight"),
    }


def _shapes_of_guided(state: Mapping[str, torch.Tensor]) -> dict:
    # Down-sampling blocks look like all others where the width stays; up-sampling ones come second in their block.
    upsamplers = _numbers(state, r"output_blocks\.(\d+)\.[12]\.(?:in_layers\.0|conv)\.weight")
    levels = 1 + len(upsamplers)
    layers = (1 + max(_numbers(state, r"output_blocks\.(\d+)\."), default=-1)) // levels - 1
    if layers < 1:
        raise ValueError("there are too few output_blocks, so the network is not complete")
    first = [1 + i * (layers + 1) for i in range(levels)]
    channels = tuple(_rows(state, f"input_blocks.{k}.0.out_layers.3.weight") for k in first)
    return {
        "channels": channels,
        "layers": layers,
        "attention": tuple(i for i, k in enumerate(first) if f"input_blocks.{k}.1.qkv.weight" in state),
        "in_channels": _shape(state, _FIRST["guided"])[1],
        "out_channels": _rows(state, "out.2.weight"),
        "scale_shift": _rows(state, "input_blocks.1.0.emb_layers.1.weight") == 2 * channels[0],
        "residual_resampling": levels > 1 and f"input_blocks.{layers + 1}.0.op.weight" not in state,
        "num_classes": _rows(state, "label_emb.weight") if "label_emb.weight" in state else None,
    }


def _numbers(state: Mapping[str, torch.Tensor], pattern: str) -> set[int]:
    return {int(found[1]) for found in (re.match(pattern, name) for name in state) if found}


def _shape(state: Mapping[str, torch.Tensor], name: str) -> tuple[int, ...]:
    if name not in state or state[name].ndim < 2:
        raise ValueError(f"{name} is missing, so the network is not complete")
    return tuple(state[name].shape)


def _rows(state: Mapping[str, torch.Tensor], name: str) -> int:
    return _shape(state, name)[0]


def convert(state: Mapping[str, torch.Tensor], architecture: Architecture) -> dict[str, torch.Tensor]:
    """Weights by their names in `UNet2DModel`, of those by their names in the file, without prefixes.

    A ValueError names the first weight of the file that has no place.
    """
    converted, used = {}, set()
    for source, targets in _layers(architecture):
        for part in ("weight", "bias"):
            if (name := f"{source}.{part}") in state:  # what is missing shows when the network is loaded
                used.add(name)
                rows = state[name]
                if ".attention" in targets[0] and rows.ndim > 1:
                    rows = rows.flatten(1)  # their attention is made of convolutions of size 1, ours of linear maps
                names = [f"{target}.{part}" for target in targets]
                converted |= zip(names, _split(rows, len(names), architecture), strict=True)
    extra = next((name for name in state if name not in used), None)
    if extra is not None:
        raise ValueError(f"{extra} {tuple(state[extra].shape)} of the file has no place in the network")
    return converted


def _split(rows: torch.Tensor, parts: int, architecture: Architecture) -> tuple[torch.Tensor, ...]:
    """q, k and v of one matrix, each with the rows [head][channel]; what is no qkv stays whole."""
    if parts == 1:
        return (rows,)
    if architecture.attention_order == "new":
        return rows.chunk(parts)
    by_head = rows.unflatten(0, (architecture.heads or -1, parts, architecture.head_channels or -1))
    return tuple(part.flatten(0, 1) for part in by_head.unbind(1))


def _layers(a: Architecture) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Names of layers in the file and in `UNet2DModel`, in the order of the network; of qkv, three of the latter."""
    outside = [(source, (target,)) for source, target in NAMES["outside"][a.layout].items()]
    yield from outside[:3]
    for kind, source, target in _blocks(a):
        if kind == "layer":
            yield source, (target,)
        else:
            for theirs, ours in NAMES[kind][a.layout].items():
                yield f"{source}.{theirs}", tuple(f"{target}.{name}" for name in ours.split())
    yield from outside[3:]


def _blocks(a: Architecture) -> Iterator[tuple[str, str, str]]:
    """Kind of each block ("resnet", "attention", or "layer" for a convolution), its name in the file and in ours."""
    last = len(a.channels) - 1
    for way in ("down", "up"):
        if way == "up":
            middle = NAMES["middle"]
            yield from zip(("resnet", "attention", "resnet"), middle[a.layout], middle["diffusers"], strict=True)
        for i in range(last + 1) if way == "down" else reversed(range(last + 1)):
            ours = f"{way}_blocks.{i if way == 'down' else last - i}"
            for j in range(a.layers + (way == "up")):
                yield "resnet", _theirs(a, "resnet", way, i, j), f"{ours}.resnets.{j}"
                if i in a.attention:
                    yield "attention", _theirs(a, "attention", way, i, j), f"{ours}.attentions.{j}"
            if i != (last if way == "down" else 0):
                source, target = _theirs(a, "resampler", way, i, a.layers), f"{ours}.{way}samplers.0"
                if a.residual_resampling:
                    yield "resnet", source, target
                else:
                    layer = "op" if a.layout == "guided" and way == "down" else "conv"
                    yield "layer", f"{source}.{layer}", f"{target}.conv"


def _theirs(a: Architecture, kind: str, way: str, i: int, j: int) -> str:
    """Name in the file of the j-th block at level i on the way down or up."""
    if a.layout == "ddpm":
        return f"{way}.{i}." + {"resnet": f"block.{j}", "attention": f"attn.{j}", "resampler": f"{way}sample"}[kind]
    # guided-diffusion counts the blocks of a way through all levels; the first on the way down is the input.
    level, first, blocks = (i, 1, "input_blocks") if way == "down" else (len(a.channels) - 1 - i, 0, "output_blocks")
    resampler = 0 if way == "down" else 1 + (i in a.attention)
    place = {"resnet": 0, "attention": 1, "resampler": resampler}[kind]
    return f"{blocks}.{first + level * (a.layers + 1) + j}.{place}"
