"""U-Nets as a sequence of stages: down blocks, the mid block, up blocks.

Only the top level of diffusers' `forward` is written out here; every block is diffusers' own, so that the stages in a
row are that `forward`, bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial
from typing import cast

import torch
from diffusers import UNet2DConditionModel, UNet2DModel
from torch._subclasses.fake_tensor import FakeTensorMode

from workbench.diffusion.foreign import LucidrainsUNet

Stage = Callable[..., tuple[torch.Tensor, tuple[torch.Tensor, ...]]]
"""(x, skips, emb, context) -> (x, skips): a down block appends to the skips, an up block takes from their end."""

TOKENS = 77
"""Length of a text in Stable Diffusion and DeepFloyd IF, for passes without a text."""

_CLASSES = (UNet2DModel, UNet2DConditionModel)


class Stages:
    """A network in parts, in the order of its forward pass: `embed`, `begin`, every one of `stages`, `finish`.

    Attributes
    ----------
    module : torch.nn.Module
    x_shape : (int, int, int)
        (C, H, W) of x_t.
    stages : dict of str to Stage
        "down.0", ..., "mid", "up.0", ...
    conditioned_on : {None, "label", "text"}
    classes : int or None
        Number of labels; None where any number is one.
    token_width : int or None
        D of the tokens (n, L, D) of a text.
    blocks : tuple of torch.nn.Module
        What is compiled.
    taps : tuple of str
        Taps inside of the mid block or beside it; all others are names of `shapes`.
    """

    module: torch.nn.Module
    x_shape: tuple[int, int, int]
    stages: dict[str, Stage]
    blocks: tuple[torch.nn.Module, ...] = ()
    conditioned_on: str | None = None
    classes: int | None = None
    token_width: int | None = None
    taps: tuple[str, ...] = ("before", "after")

    def embed(self, t: torch.Tensor, labels: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
        """Embedding of timesteps (n,) and of what the network is conditioned on: labels (n,) or tokens (n, L, D)."""
        raise NotImplementedError

    def context(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        """Tokens as the blocks' cross-attention takes them."""
        return tokens

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        """The first convolution, and the skips that it makes."""
        raise NotImplementedError

    def finish(self, x: torch.Tensor, skips: tuple[torch.Tensor, ...]) -> torch.Tensor:
        """Output of the network: prediction, and variance if it is learned; `skips` are what the stages left."""
        raise NotImplementedError

    def whole(
        self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        """Output of the network's own forward pass, which the stages in a row equal bit for bit."""
        return self.module(x, t)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, int, int]]:
        """(C, h, w) of every stage's output and of every skip connection, "skip.0" being the first that is made."""
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            device = next(self.module.parameters()).device
            labels = torch.zeros(1, dtype=torch.long, device=device)
            tokens = None if self.token_width is None else torch.empty(1, TOKENS, self.token_width, device=device)
            emb, context = self.embed(labels, labels, tokens), self.context(tokens)
            x, skips = self.begin(torch.empty(1, *self.x_shape, device=device))
            found: dict[str, tuple[int, int, int]] = {}
            names: dict[str, tuple[int, int, int]] = {}
            for name, stage in self.stages.items():
                if name == "mid":
                    names = {f"skip.{k}": _chw(skip) for k, skip in enumerate(skips)}
                x, skips = stage(x, skips, emb, context)
                found[name] = _chw(x)
        return found | names


def _chw(x: torch.Tensor) -> tuple[int, int, int]:
    channels, height, width = x.shape[1:]
    return channels, height, width


def stages_of(network: torch.nn.Module) -> Stages:
    """A network of a known class in parts; ValueError if the workbench can't split it."""
    return LucidrainsStages(network) if isinstance(network, LucidrainsUNet) else DiffusersStages(network)


class LucidrainsStages(Stages):
    """`LucidrainsUNet` in parts."""

    def __init__(self, unet: LucidrainsUNet) -> None:
        self.module, self.blocks = unet, unet.blocks
        self.x_shape = _x_shape(unet.config, halvings=len(unet.down_blocks) - 1)
        down, up = (enumerate(blocks) for blocks in (unet.down_blocks, unet.up_blocks))
        self.stages = {f"down.{i}": block for i, block in down}
        self.stages |= {"mid": unet.mid_block, **{f"up.{i}": block for i, block in up}}

    def embed(self, t: torch.Tensor, labels: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
        return self.module.embed(t)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        x = self.module.conv_in(x)
        return x, (x,)

    def finish(self, x: torch.Tensor, skips: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return self.module.conv_out(x)


class DiffusersStages(Stages):
    """`UNet2DModel` or `UNet2DConditionModel` in parts."""

    taps = ("before", "middle", "after")

    def __init__(self, unet: torch.nn.Module) -> None:
        if getattr(unet, "mid_block", None) is None or not getattr(unet.mid_block, "resnets", None):
            raise ValueError(f"{type(unet).__name__} has no middle block, so it has no bottleneck to read h from")
        if not isinstance(unet, _CLASSES):
            known = " and ".join(each.__name__ for each in _CLASSES)
            raise ValueError(f"{type(unet).__name__} is not supported; the workbench takes diffusers' {known}")
        self.module = unet
        _refuse_other_kinds(unet.config)
        self.x_shape = _x_shape(unet.config, halvings=sum(bool(block.downsamplers) for block in unet.down_blocks))
        down = {f"down.{i}": partial(self._down, block) for i, block in enumerate(unet.down_blocks)}
        up = {f"up.{i}": partial(self._up, block) for i, block in enumerate(unet.up_blocks)}
        self.stages = {**down, "mid": self._mid, **up}

    @property
    def blocks(self) -> tuple[torch.nn.Module, ...]:
        blocks = (*self.module.down_blocks, self.module.mid_block, *self.module.up_blocks)
        return cast(tuple[torch.nn.Module, ...], blocks)

    @property
    def conditioned_on(self) -> str | None:
        if isinstance(self.module, UNet2DConditionModel):
            return "text"
        return None if self.module.class_embedding is None else "label"

    @property
    def classes(self) -> int | None:
        return cast(int, self.module.config.num_class_embeds) if self.conditioned_on == "label" else None

    @property
    def token_width(self) -> int | None:
        config = self.module.config
        if self.conditioned_on != "text":
            return None
        return cast(int, config.encoder_hid_dim or config.cross_attention_dim)

    def embed(self, t: torch.Tensor, labels: torch.Tensor | None, tokens: torch.Tensor | None) -> torch.Tensor:
        unet = self.module
        emb = unet.time_embedding(unet.time_proj(t).to(unet.dtype))
        if self.conditioned_on == "label":
            given = unet.time_proj(labels) if unet.config.class_embed_type == "timestep" else labels
            emb = emb + unet.class_embedding(given).to(unet.dtype)
        if self.conditioned_on == "text":
            if unet.config.addition_embed_type == "text":
                emb = emb + unet.add_embedding(tokens)
            if unet.time_embed_act is not None:
                emb = unet.time_embed_act(emb)
        return emb

    def context(self, tokens: torch.Tensor | None) -> torch.Tensor | None:
        project = getattr(self.module, "encoder_hid_proj", None)
        return tokens if project is None else project(tokens)

    def begin(self, x: torch.Tensor) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
        x = self.module.conv_in(2 * x - 1.0 if self.module.config.center_input_sample else x)
        return x, (x,)

    def finish(self, x: torch.Tensor, skips: tuple[torch.Tensor, ...]) -> torch.Tensor:
        unet = self.module
        if unet.conv_norm_out is not None:
            x = unet.conv_act(unet.conv_norm_out(x))
        return unet.conv_out(x)

    def whole(
        self, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor | None, tokens: torch.Tensor | None
    ) -> torch.Tensor:
        given = {"text": {"encoder_hidden_states": tokens}, "label": {"class_labels": labels}, None: {}}
        return self.module(x, t, **given[self.conditioned_on]).sample

    def mid_head(self, x: torch.Tensor, emb: torch.Tensor, context: torch.Tensor | None) -> torch.Tensor:
        """The mid block up to its last residual block."""
        mid = self.module.mid_block
        if len(mid.resnets) == 1:
            return x
        x = mid.resnets[0](x, emb)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                given = {"encoder_hidden_states": context} if _crosses(mid) else {"temb": emb}
                x = attention(x, **given)
                x = x if torch.is_tensor(x) else x[0]
            if resnet is not mid.resnets[-1]:
                x = resnet(x, emb)
        return x

    def mid_normalised(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """The last residual block of the mid block up to its second non-linearity (`ResnetBlock2D.forward`)."""
        resnet = self.module.mid_block.resnets[-1]
        x = resnet.conv1(resnet.nonlinearity(resnet.norm1(x)))
        emb = resnet.time_emb_proj(emb if resnet.skip_time_act else resnet.nonlinearity(emb))[:, :, None, None]
        if resnet.time_embedding_norm == "scale_shift":
            scale, shift = torch.chunk(emb, 2, dim=1)
            return resnet.norm2(x) * (1 + scale) + shift
        return resnet.norm2(x + emb)

    def mid_tail(self, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """The last residual block of the mid block from its second non-linearity on."""
        resnet = self.module.mid_block.resnets[-1]
        x = resnet.conv2(resnet.dropout(resnet.nonlinearity(x)))
        if resnet.conv_shortcut is not None:
            residual = resnet.conv_shortcut(residual)
        return (residual + x) / resnet.output_scale_factor

    def _down(self, block, x, skips, emb, context):
        given = {"encoder_hidden_states": context} if _crosses(block) else {}
        x, outputs = block(hidden_states=x, temb=emb, **given)
        return x, (*skips, *outputs)

    def _mid(self, x, skips, emb, context):
        mid = self.module.mid_block
        return (mid(x, emb, encoder_hidden_states=context) if _crosses(mid) else mid(x, emb)), skips

    def _up(self, block, x, skips, emb, context):
        given = {"encoder_hidden_states": context} if _crosses(block) else {}
        k = len(block.resnets)
        return block(x, skips[-k:], emb, **given), skips[:-k]


def _crosses(block: torch.nn.Module) -> bool:
    return getattr(block, "has_cross_attention", False)


def _refuse_other_kinds(config) -> None:
    """Networks of diffusers' two classes that are conditioned on something else, or are no DDPMs."""
    if config.get("time_embedding_type") == "fourier" or any("Skip" in block for block in config.down_block_types):
        raise ValueError("score-SDE U-Nets (Fourier embedding, skip blocks) are not DDPMs and are not supported")
    added, hidden = config.get("addition_embed_type"), config.get("encoder_hid_dim_type")
    if added == "text_time":
        raise ValueError("this U-Net is of the kind of SDXL, conditioned on sizes too, which is not supported")
    if added not in (None, "text") or hidden not in (None, "text_proj"):
        raise ValueError(f"this U-Net is conditioned on images ({added or hidden}), which is not supported")
    text = "cross_attention_dim" in config
    if (text and (config.class_embed_type or config.num_class_embeds)) or config.class_embed_type not in (
        None,
        "timestep",
    ):
        kind = config.class_embed_type or f"one of {config.num_class_embeds} classes beside the text"
        raise ValueError(f"this U-Net is conditioned on {kind}, which is not supported")
    if text and not isinstance(config.cross_attention_dim, int):
        raise ValueError("this U-Net has cross-attention of several widths, which is not supported")


def _x_shape(config, *, halvings: int) -> tuple[int, int, int]:
    """(C, H, W) of x_t; refuses sizes that can be built, and that torch fails at in the first pass or step."""
    size = config.sample_size
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"sample_size is {size!r}; it is the side of the images in pixels, or their height and width")
    if any(side % 2**halvings for side in sides):
        raise ValueError(f"sample_size is {size}; this U-Net takes multiples of {2**halvings}")
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        given = f"in_channels is {config.in_channels} and out_channels is {config.out_channels}"
        raise ValueError(f"{given}; the workbench takes as many, or twice as many outputs for a learned variance")
    return (config.in_channels, *sides)
