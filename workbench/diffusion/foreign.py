"""Networks of other projects that diffusers has no class for."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.attention_processor import Attention
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from torch import nn


class MultiheadUNet2DModel(UNet2DModel):
    """diffusers' `UNet2DModel` with a fixed number of attention heads, whose width then differs by level.

    improved-diffusion's default (`num_heads`); `UNet2DModel` itself has heads of one width (`attention_head_dim`).

    Parameters
    ----------
    num_attention_heads : int
    **settings
        Settings of `UNet2DModel`.
    """

    def __init__(self, *, num_attention_heads: int, **settings) -> None:
        super().__init__(**settings)
        self.register_to_config(num_attention_heads=num_attention_heads)
        for attention in self.modules():
            if isinstance(attention, Attention):
                attention.heads = num_attention_heads
                attention.scale = (attention.inner_dim // num_attention_heads) ** -0.5

    @classmethod
    def from_config(cls, config: dict, **kwargs: Any) -> MultiheadUNet2DModel:
        """The network of a config; the base class would drop the setting that is not its own."""
        config = dict(config)
        heads = config.pop("num_attention_heads")
        settings, _, _ = UNet2DModel.extract_init_dict(config, **kwargs)
        return cls(num_attention_heads=heads, **settings)


class LucidrainsUNet(ModelMixin, ConfigMixin):
    """The `Unet` of lucidrains' denoising-diffusion-pytorch, in its layout of today.

    A level has two residual blocks and an attention, and both ways have a skip connection after the first block and
    after the attention; the first convolution's output is a further skip connection, to a residual block at the end.

    Parameters
    ----------
    sample_size : int or (int, int)
        Side of the images in pixels, or their height and width.
    in_channels, out_channels : int
    time_channels : int
        Of the sinusoidal embedding, whose two layers have four times as many outputs.
    widths : tuple of int
        Channels after the first convolution, and after every level.
    heads, head_channels : tuple of int
        Of the attention at every level; the mid block has those of the last.
    full : tuple of bool
        Whether a level has softmax attention between pixels, as the mid block has; the others have linear attention.
    memory : int
        Number of keys and values that every attention has beside those of the pixels.
    """

    @register_to_config
    def __init__(
        self,
        sample_size: int | tuple[int, int],
        in_channels: int = 3,
        out_channels: int = 3,
        time_channels: int = 64,
        widths: tuple[int, ...] = (64, 64, 128, 256, 512),
        heads: tuple[int, ...] = (4, 4, 4, 4),
        head_channels: tuple[int, ...] = (32, 32, 32, 32),
        full: tuple[bool, ...] = (False, False, False, True),
        memory: int = 4,
    ) -> None:
        super().__init__()
        emb, last = 4 * time_channels, len(widths) - 2
        attentions = [(heads[i], head_channels[i], memory, full[i]) for i in range(last + 1)]
        self.conv_in = nn.Conv2d(in_channels, widths[0], 7, padding=3)
        self.time_embedding = TimestepEmbedding(time_channels, emb, act_fn="gelu")
        self.down_blocks, self.up_blocks = nn.ModuleList(), nn.ModuleList()
        for i, (inner, outer) in enumerate(zip(widths[:-1], widths[1:], strict=True)):
            down, up = nn.Conv2d(inner, outer, 3, padding=1), nn.Conv2d(outer, inner, 3, padding=1)
            if i < last:
                down = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(4 * inner, outer, 1))
            if i > 0:
                up = nn.Sequential(nn.Upsample(scale_factor=2, mode="nearest"), up)
            self.down_blocks.append(_Down(inner, inner, emb, attentions[i], down))
            end = _Residual(2 * inner, inner, emb) if i == 0 else None
            self.up_blocks.insert(0, _Up(inner + outer, outer, emb, attentions[i], up, end))
        attention = (heads[-1], head_channels[-1], memory, True)
        self.mid_block = _Mid(widths[-1], widths[-1], emb, attention, nn.Identity())
        self.conv_out = nn.Conv2d(widths[0], out_channels, 1)

    @property
    def blocks(self) -> tuple[nn.Module, ...]:
        """Down blocks, mid block and up blocks, called as (x, skips, emb), which give (x, skips)."""
        return (*self.down_blocks, self.mid_block, *self.up_blocks)

    def embed(self, t: torch.Tensor) -> torch.Tensor:
        """Embedding of timesteps of shape (n,); shape (n, E)."""
        waves = get_timestep_embedding(t, self.config.time_channels, downscale_freq_shift=1)
        return self.time_embedding(waves.to(self.dtype))

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        """Output for x_t of shape (n, C, H, W) at timesteps of shape (n,)."""
        emb, x = self.embed(t), self.conv_in(x)
        skips = (x,)
        for block in self.blocks:
            x, skips = block(x, skips, emb)
        return self.conv_out(x)


class _RMSNorm(nn.Module):
    """Every pixel has a root mean square of 1 over the channels, times a learned scale of each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.normalize(x, dim=1) * self.scale * x.shape[1] ** 0.5


class _Residual(nn.Module):
    """Two convolutions beside a shortcut; the timestep scales and shifts the first normalisation."""

    def __init__(self, inner: int, outer: int, emb: int) -> None:
        super().__init__()
        self.time = nn.Linear(emb, 2 * outer)
        self.conv1, self.norm1 = nn.Conv2d(inner, outer, 3, padding=1), _RMSNorm(outer)
        self.conv2, self.norm2 = nn.Conv2d(outer, outer, 3, padding=1), _RMSNorm(outer)
        self.shortcut = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        scale, shift = self.time(F.silu(emb))[:, :, None, None].chunk(2, dim=1)
        y = F.silu(self.norm1(self.conv1(x)) * (1 + scale) + shift)
        return F.silu(self.norm2(self.conv2(y))) + self.shortcut(x)


class _Attention(nn.Module):
    """Attention between pixels and learned keys and values: by softmax ("full"), or linear in the number of pixels."""

    def __init__(self, channels: int, heads: int, head_channels: int, memory: int, full: bool) -> None:
        super().__init__()
        self.heads, self.full, inner = heads, full, heads * head_channels
        self.norm, self.to_qkv = _RMSNorm(channels), nn.Conv2d(channels, 3 * inner, 1, bias=False)
        self.memory = nn.Parameter(torch.randn(2, heads, head_channels, memory))
        self.to_out, self.out_norm = nn.Conv2d(inner, channels, 1), nn.Identity() if full else _RMSNorm(channels)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = self.to_qkv(self.norm(x)).flatten(2).unflatten(1, (3, self.heads, -1)).unbind(1)
        # Each is (n, heads, channels, pixels).
        own_k, own_v = self.memory[:, None].expand(-1, len(x), -1, -1, -1)
        k, v = torch.cat([own_k, k], dim=-1), torch.cat([own_v, v], dim=-1)
        if self.full:
            y = F.scaled_dot_product_attention(q.mT, k.mT, v.mT).mT
        else:
            y = (k.softmax(dim=-1) @ v.mT).mT @ (q.softmax(dim=-2) * q.shape[-2] ** -0.5)
        return x + self.out_norm(self.to_out(y.flatten(1, 2).unflatten(2, x.shape[2:])))


class _Down(nn.Module):
    """A level on the way down, which leaves two skip connections."""

    def __init__(self, inner: int, outer: int, emb: int, attention: tuple, resample: nn.Module) -> None:
        super().__init__()
        self.block1, self.block2 = _Residual(inner, outer, emb), _Residual(inner, outer, emb)
        self.attention, self.resample = _Attention(outer, *attention), resample

    def forward(self, x: torch.Tensor, skips: tuple, emb: torch.Tensor, context=None) -> tuple[torch.Tensor, tuple]:
        first = self.block1(x, emb)
        second = self.attention(self.block2(first, emb))
        return self.resample(second), (*skips, first, second)


class _Mid(_Down):
    """The bottleneck, with softmax attention."""

    def forward(self, x: torch.Tensor, skips: tuple, emb: torch.Tensor, context=None) -> tuple[torch.Tensor, tuple]:
        return self.block2(self.attention(self.block1(x, emb)), emb), skips


class _Up(_Down):
    """A level on the way up, which takes two skip connections, and a third for the block at the network's end."""

    def __init__(self, inner: int, outer: int, emb: int, attention: tuple, resample: nn.Module, end) -> None:
        super().__init__(inner, outer, emb, attention, resample)
        self.end = end

    def forward(self, x: torch.Tensor, skips: tuple, emb: torch.Tensor, context=None) -> tuple[torch.Tensor, tuple]:
        *skips, first, second = skips
        x = self.block1(torch.cat([x, second], dim=1), emb)
        x = self.resample(self.attention(self.block2(torch.cat([x, first], dim=1), emb)))
        if self.end is not None:
            x = self.end(torch.cat([x, skips.pop()], dim=1), emb)
        return x, tuple(skips)


NETWORKS = {network.__name__: network for network in (MultiheadUNet2DModel, LucidrainsUNet)}
"""These networks by the names in their configs."""
