"""The forwards of the code bases whose checkpoints the workbench converts, written as compact oracles.

Their parameters have the names of the originals, so that a state dict of these is a checkpoint of those. Nothing is
shared with the code under test.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import nn


def norm(channels: int, eps: float) -> nn.GroupNorm:
    return nn.GroupNorm(32, channels, eps=eps)


# The original DDPM (PyTorch port)


class DDPMResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, emb: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = norm(inner, 1e-6), nn.Conv2d(inner, outer, 3, padding=1)
        self.temb_proj = nn.Linear(emb, outer)
        self.norm2, self.conv2 = norm(outer, 1e-6), nn.Conv2d(outer, outer, 3, padding=1)
        if inner != outer:
            self.nin_shortcut = nn.Conv2d(inner, outer, 1)

    def forward(self, x, temb):
        y = self.conv1(F.silu(self.norm1(x))) + self.temb_proj(F.silu(temb))[:, :, None, None]
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x)


class DDPMAttention(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels, 1e-6)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x, temb=None):
        n, c, height, width = x.shape
        y = self.norm(x)
        q, k, v = (layer(y).reshape(n, c, height * width) for layer in (self.q, self.k, self.v))
        weights = torch.softmax(torch.einsum("nci,ncj->nij", q, k) * c**-0.5, dim=2)
        return x + self.proj_out(torch.einsum("nij,ncj->nci", weights, v).reshape(n, c, height, width))


class Holder(nn.Module):
    """Named parts, and a forward of their owner's."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class DDPM(nn.Module):
    """`attention`: resolutions, in pixels, at which there is attention."""

    def __init__(self, *, size: int, ch: int, mult: tuple[int, ...], layers: int, attention: tuple[int, ...]) -> None:
        super().__init__()
        self.ch, emb, wide = ch, 4 * ch, [ch * m for m in mult]
        self.temb = Holder(dense=nn.ModuleList([nn.Linear(ch, emb), nn.Linear(emb, emb)]))
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        skips, now = [ch], ch
        for i, width in enumerate(wide):
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers):
                block.append(DDPMResBlock(now, width, emb))
                if size >> i in attention:
                    attn.append(DDPMAttention(width))
                now = width
                skips.append(now)
            level = Holder(block=block, attn=attn)
            if i < len(wide) - 1:
                level.downsample = Holder(conv=nn.Conv2d(now, now, 3, stride=2))
                skips.append(now)
            self.down.append(level)
        self.mid = Holder(
            block_1=DDPMResBlock(now, now, emb), attn_1=DDPMAttention(now), block_2=DDPMResBlock(now, now, emb)
        )
        levels = []
        for i in reversed(range(len(wide))):
            block, attn = nn.ModuleList(), nn.ModuleList()
            for _ in range(layers + 1):
                block.append(DDPMResBlock(now + skips.pop(), wide[i], emb))
                if size >> i in attention:
                    attn.append(DDPMAttention(wide[i]))
                now = wide[i]
            level = Holder(block=block, attn=attn)
            if i > 0:
                level.upsample = Holder(conv=nn.Conv2d(now, now, 3, padding=1))
            levels.insert(0, level)
        self.up.extend(levels)
        self.norm_out, self.conv_out = norm(now, 1e-6), nn.Conv2d(now, 3, 3, padding=1)

    def forward(self, x, t):
        """(eps, h)"""
        half = self.ch // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        first, second = self.temb.dense
        temb = second(F.silu(first(torch.cat([angles.sin(), angles.cos()], dim=1))))
        x = self.conv_in(x)
        skips = [x]
        for level in self.down:
            for j, block in enumerate(level.block):
                x = block(x, temb)
                x = level.attn[j](x) if len(level.attn) else x
                skips.append(x)
            if hasattr(level, "downsample"):
                x = level.downsample.conv(F.pad(x, (0, 1, 0, 1)))
                skips.append(x)
        h = x = self.mid.block_2(self.mid.attn_1(self.mid.block_1(x, temb)), temb)
        for level in reversed(self.up):
            for j, block in enumerate(level.block):
                x = block(torch.cat([x, skips.pop()], dim=1), temb)
                x = level.attn[j](x) if len(level.attn) else x
            if hasattr(level, "upsample"):
                x = level.upsample.conv(F.interpolate(x, scale_factor=2, mode="nearest"))
        return self.conv_out(F.silu(self.norm_out(x))), h


# improved-diffusion and guided-diffusion


class GuidedResBlock(nn.Module):
    """`resample`: "up", "down" or None."""

    def __init__(self, inner: int, outer: int, emb: int, *, scale_shift: bool, resample: str | None = None) -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(norm(inner, 1e-5), nn.SiLU(), nn.Conv2d(inner, outer, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * outer if scale_shift else outer))
        self.out_layers = nn.Sequential(
            norm(outer, 1e-5), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(outer, outer, 3, padding=1)
        )
        self.skip_connection = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1)

    def _resampled(self, x):
        if self.resample == "up":
            return F.interpolate(x, scale_factor=2, mode="nearest")
        return F.avg_pool2d(x, 2) if self.resample == "down" else x

    def forward(self, x, emb):
        y = self.in_layers[2](self._resampled(self.in_layers[1](self.in_layers[0](x))))
        emb = self.emb_layers(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = emb.chunk(2, dim=1)
            y = self.out_layers[0](y) * (1 + scale) + shift
        else:
            y = self.out_layers[0](y + emb)
        return self.skip_connection(self._resampled(x)) + self.out_layers[3](F.silu(y))


class GuidedAttention(nn.Module):
    def __init__(self, channels: int, heads: int, *, new_order: bool) -> None:
        super().__init__()
        self.heads, self.new_order = heads, new_order
        self.norm, self.qkv = norm(channels, 1e-5), nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x, emb=None):
        n, c, *place = x.shape
        flat = x.reshape(n, c, -1)
        qkv = self.qkv(self.norm(flat))
        if self.new_order:
            q, k, v = (part.reshape(n, self.heads, c // self.heads, -1) for part in qkv.chunk(3, dim=1))
        else:
            q, k, v = qkv.reshape(n, self.heads, 3 * c // self.heads, -1).chunk(3, dim=2)
        scale = (c // self.heads) ** -0.25
        weights = torch.softmax(torch.einsum("nhci,nhcj->nhij", q * scale, k * scale), dim=-1)
        y = torch.einsum("nhij,nhcj->nhci", weights, v).reshape(n, c, -1)
        return (flat + self.proj_out(y)).reshape(n, c, *place)


class Op(nn.Module):
    """A resampling convolution, under the name that it has there."""

    def __init__(self, channels: int, *, up: bool) -> None:
        super().__init__()
        self.up = up
        conv = nn.Conv2d(channels, channels, 3, stride=1 if up else 2, padding=1)
        self.add_module("conv" if up else "op", conv)

    def forward(self, x, emb=None):
        return self.conv(F.interpolate(x, scale_factor=2, mode="nearest")) if self.up else self.op(x)


class Guided(nn.Module):
    """`attention`: factors of down-sampling at which there is attention; heads by their number or by their channels."""

    def __init__(
        self,
        *,
        ch: int,
        mult: tuple[int, ...],
        layers: int,
        attention: tuple[int, ...],
        head_channels: int = 0,
        heads: int = 0,
        classes: int = 0,
        out: int = 6,
        new_order: bool = False,
        scale_shift: bool = True,
        updown: bool = True,
    ) -> None:
        super().__init__()
        self.ch, emb, last = ch, 4 * ch, len(mult) - 1
        options = {"scale_shift": scale_shift}

        def attend(width: int) -> GuidedAttention:
            return GuidedAttention(width, heads or width // head_channels, new_order=new_order)

        self.time_embed = nn.Sequential(nn.Linear(ch, emb), nn.SiLU(), nn.Linear(emb, emb))
        if classes:
            self.label_emb = nn.Embedding(classes, emb)
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(3, ch, 3, padding=1)])])
        now, skips = ch, [ch]
        for i, m in enumerate(mult):
            for _ in range(layers):
                parts = [GuidedResBlock(now, m * ch, emb, **options)]
                now = m * ch
                parts += [attend(now)] if 2**i in attention else []
                self.input_blocks.append(nn.ModuleList(parts))
                skips.append(now)
            if i < last:
                down = GuidedResBlock(now, now, emb, resample="down", **options) if updown else Op(now, up=False)
                self.input_blocks.append(nn.ModuleList([down]))
                skips.append(now)
        self.middle_block = nn.ModuleList(
            [GuidedResBlock(now, now, emb, **options), attend(now), GuidedResBlock(now, now, emb, **options)]
        )
        self.output_blocks = nn.ModuleList()
        for i in reversed(range(len(mult))):
            for j in range(layers + 1):
                parts = [GuidedResBlock(now + skips.pop(), mult[i] * ch, emb, **options)]
                now = mult[i] * ch
                parts += [attend(now)] if 2**i in attention else []
                if i > 0 and j == layers:
                    up = GuidedResBlock(now, now, emb, resample="up", **options) if updown else Op(now, up=True)
                    parts.append(up)
                self.output_blocks.append(nn.ModuleList(parts))
        self.out = nn.Sequential(norm(now, 1e-5), nn.SiLU(), nn.Conv2d(now, out, 3, padding=1))

    def forward(self, x, t, y=None):
        """(output of `out` channels, h), of classes y."""
        half = self.ch // 2
        angles = t[:, None].float() * torch.exp(-math.log(10000) / half * torch.arange(half))
        emb = self.time_embed(torch.cat([angles.cos(), angles.sin()], dim=1))
        if y is not None:
            emb = emb + self.label_emb.weight[y]
        x = self.input_blocks[0][0](x)
        skips = [x]
        for parts in self.input_blocks[1:]:
            for part in parts:
                x = part(x, emb)
            skips.append(x)
        for part in self.middle_block:
            x = part(x, emb)
        h = x
        for parts in self.output_blocks:
            x = torch.cat([x, skips.pop()], dim=1)
            for part in parts:
                x = part(x, emb)
        return self.out(x), h


# lucidrains' denoising-diffusion-pytorch


class LucidrainsNorm(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.g = nn.Parameter(torch.ones(1, channels, 1, 1))

    def forward(self, x):
        return x / x.square().mean(dim=1, keepdim=True).sqrt() * self.g


class LucidrainsResBlock(nn.Module):
    def __init__(self, inner: int, outer: int, emb: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * outer))
        self.block1 = Holder(proj=nn.Conv2d(inner, outer, 3, padding=1), norm=LucidrainsNorm(outer))
        self.block2 = Holder(proj=nn.Conv2d(outer, outer, 3, padding=1), norm=LucidrainsNorm(outer))
        self.res_conv = nn.Conv2d(inner, outer, 1) if inner != outer else nn.Identity()

    def forward(self, x, emb):
        scale, shift = self.mlp(emb)[:, :, None, None].chunk(2, dim=1)
        y = F.silu(self.block1.norm(self.block1.proj(x)) * (scale + 1) + shift)
        return F.silu(self.block2.norm(self.block2.proj(y))) + self.res_conv(x)


class LucidrainsAttention(nn.Module):
    """`full`: the weights are a softmax over pixels; else of q over channels and of k over pixels, each on its own."""

    def __init__(self, channels: int, heads: int, dim: int, *, full: bool, memory: int = 4) -> None:
        super().__init__()
        self.heads, self.dim, self.full = heads, dim, full
        self.norm = LucidrainsNorm(channels)
        self.to_qkv = nn.Conv2d(channels, 3 * heads * dim, 1, bias=False)
        self.mem_kv = nn.Parameter(torch.zeros(2, heads, memory, dim) if full else torch.zeros(2, heads, dim, memory))
        out = nn.Conv2d(heads * dim, channels, 1)
        self.to_out = out if full else nn.Sequential(out, LucidrainsNorm(channels))

    def forward(self, x):
        n, _, height, width = x.shape
        q, k, v = self.to_qkv(self.norm(x)).reshape(n, 3, self.heads, self.dim, height * width).unbind(1)
        memory = self.mem_kv.transpose(-1, -2) if self.full else self.mem_kv
        k, v = (torch.cat([torch.stack([own] * n), each], dim=-1) for own, each in zip(memory, (k, v), strict=True))
        if self.full:
            weights = torch.softmax(torch.einsum("nhdi,nhdj->nhij", q, k) / math.sqrt(self.dim), dim=-1)
            y = torch.einsum("nhij,nhdj->nhdi", weights, v)
        else:
            q, k = torch.softmax(q, dim=2) / math.sqrt(self.dim), torch.softmax(k, dim=3)
            y = torch.einsum("nhdi,nhdj,nhej->nhei", q, k, v)
        return self.to_out(y.reshape(n, self.heads * self.dim, height, width))


class Lucidrains(nn.Module):
    """`heads`, `dims` and `full` of the attention at every level."""

    def __init__(
        self,
        *,
        dim: int,
        mult: tuple[int, ...],
        heads: tuple[int, ...],
        dims: tuple[int, ...],
        full: tuple[bool, ...],
        channels: int = 3,
        out: int = 3,
        first: int | None = None,
    ) -> None:
        super().__init__()
        first, emb, last = first or dim, 4 * dim, len(mult) - 1
        self.dim, wide = dim, [first, *(dim * m for m in mult)]
        self.init_conv = nn.Conv2d(channels, first, 7, padding=3)
        self.time_mlp = nn.Sequential(nn.Identity(), nn.Linear(dim, emb), nn.GELU(), nn.Linear(emb, emb))
        self.downs, self.ups = nn.ModuleList(), nn.ModuleList()
        for i in range(last + 1):
            a, b = wide[i], wide[i + 1]
            down = nn.Sequential(nn.Identity(), nn.Conv2d(4 * a, b, 1)) if i < last else nn.Conv2d(a, b, 3, padding=1)
            parts = [LucidrainsResBlock(a, a, emb), LucidrainsResBlock(a, a, emb)]
            self.downs.append(nn.ModuleList([*parts, LucidrainsAttention(a, heads[i], dims[i], full=full[i]), down]))
        self.mid_block1, self.mid_block2 = (LucidrainsResBlock(wide[-1], wide[-1], emb) for _ in range(2))
        self.mid_attn = LucidrainsAttention(wide[-1], heads[-1], dims[-1], full=True)
        for i in reversed(range(last + 1)):
            a, b = wide[i], wide[i + 1]
            up = nn.Conv2d(b, a, 3, padding=1)
            up = nn.Sequential(nn.Identity(), up) if i > 0 else up
            parts = [LucidrainsResBlock(a + b, b, emb), LucidrainsResBlock(a + b, b, emb)]
            self.ups.append(nn.ModuleList([*parts, LucidrainsAttention(b, heads[i], dims[i], full=full[i]), up]))
        self.final_res_block = LucidrainsResBlock(2 * first, first, emb)
        self.final_conv = nn.Conv2d(first, out, 1)

    def forward(self, x, t):
        """(output of `out` channels, h)"""
        half, n = self.dim // 2, len(x)
        angles = t[:, None].float() * torch.exp(-math.log(10000) / (half - 1) * torch.arange(half))
        emb = self.time_mlp(torch.cat([angles.sin(), angles.cos()], dim=1))
        x = start = self.init_conv(x)
        skips = []
        for i, (block1, block2, attention, down) in enumerate(self.downs):
            x = block1(x, emb)
            skips.append(x)
            x = block2(x, emb)
            x = attention(x) + x
            skips.append(x)
            if i < len(self.downs) - 1:  # the pixels of a square of two by two become channels, one after the other
                corners = [x[:, :, row::2, column::2] for row in (0, 1) for column in (0, 1)]
                x = torch.stack(corners, dim=2).reshape(n, -1, x.shape[2] // 2, x.shape[3] // 2)
            x = down(x)
        x = self.mid_block1(x, emb)
        h = x = self.mid_block2(self.mid_attn(x) + x, emb)
        for i, (block1, block2, attention, up) in enumerate(self.ups):
            x = block1(torch.cat([x, skips.pop()], dim=1), emb)
            x = block2(torch.cat([x, skips.pop()], dim=1), emb)
            x = attention(x) + x
            if i < len(self.ups) - 1:
                x = x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)
            x = up(x)
        return self.final_conv(self.final_res_block(torch.cat([x, start], dim=1), emb)), h


def randomised(network: nn.Module, seed: int = 0) -> nn.Module:
    """Every weight random, those of normalisations and biases too, so that no swap of two goes unseen."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if weight.ndim > 1:
                weight.copy_(noise / math.sqrt(weight[0].numel()))
            else:
                weight.copy_(float(name.endswith("weight")) + 0.3 * noise)
    return network.eval().requires_grad_(False)


# Asyrp's DeltaBlocks


class DDPMDelta(nn.Module):
    def __init__(self, channels: int, emb: int) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(channels, channels, 1), nn.Conv2d(channels, channels, 1)
        self.temb_proj, self.norm2 = nn.Linear(emb, channels), norm(channels, 1e-6)

    def forward(self, h, temb):
        y = self.conv1(h) + self.temb_proj(F.silu(temb))[:, :, None, None]
        return self.conv2(F.silu(self.norm2(y)))


class GuidedDelta(nn.Module):
    def __init__(self, channels: int, emb: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(norm(channels, 1e-5), nn.SiLU(), nn.Conv2d(channels, channels, 1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb, channels))
        self.out_layers = nn.Sequential(
            norm(channels, 1e-5), nn.SiLU(), nn.Dropout(0.0), nn.Conv2d(channels, channels, 1)
        )

    def forward(self, h, emb):
        return self.out_layers(self.in_layers(h) + self.emb_layers(emb)[:, :, None, None])
