"""A U-Net, split at its bottleneck.

`encode` runs the network up to the tap, `decode` runs the rest; together they are diffusers' `UNet2DModel.forward`, bit
for bit. Only the top level of that forward is written out here: every block is diffusers' own.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from diffusers import UNet2DModel

from workbench.io import one_of

TAPS = ("before", "middle", "after")


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """The network's state at the tap: h and the decoder's other inputs.

    Attributes
    ----------
    h : Tensor of shape (n, C, h, w), float32
        The bottleneck activation h_t.
    skips : tuple of Tensor
        Outputs of the encoder's blocks, unchanged by edits of h.
    emb : Tensor of shape (n, E)
        Embedding of the timestep.
    tap : {"before", "middle", "after"}
    residual : Tensor of shape (n, C, h, w), optional
        For the tap "middle": the input of the residual block that contains the tap.
    """

    h: torch.Tensor
    skips: tuple[torch.Tensor, ...] = field(repr=False)
    emb: torch.Tensor = field(repr=False)
    tap: str = "after"
    residual: torch.Tensor | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Bottleneck(h={tuple(self.h.shape)}, tap={self.tap!r}, {len(self.skips)} skips)"

    @classmethod
    def joined(cls, parts: Sequence[Bottleneck]) -> Bottleneck:
        """Concatenate the samples of several states, in order."""
        first = parts[0]
        if len(parts) == 1:
            return first
        skips = tuple(torch.cat(same) for same in zip(*(part.skips for part in parts), strict=True))
        residual = None if first.residual is None else torch.cat([part.residual for part in parts])
        h, emb = torch.cat([part.h for part in parts]), torch.cat([part.emb for part in parts])
        return cls(h, skips, emb, first.tap, residual)

    def with_h(self, h: torch.Tensor) -> Bottleneck:
        """The same state with another h (a swap, Haas et al. Fig. 2a)."""
        return replace(self, h=h)

    def repeat(self, k: int) -> Bottleneck:
        """Repeat each sample `k` times in a row, so that k edits of it run as one batch."""
        return self._map(lambda x: _repeated(x, k))

    def __getitem__(self, index) -> Bottleneck:
        """Samples `index` (slice, list or tensor of positions)."""
        return self._map(lambda x: _in_format_of(x, x[index]))

    def _map(self, f) -> Bottleneck:
        residual = None if self.residual is None else f(self.residual)
        return replace(self, h=f(self.h), skips=tuple(map(f, self.skips)), emb=f(self.emb), residual=residual)


def _repeated(x: torch.Tensor, k: int) -> torch.Tensor:
    """Each row k times in a row, in the memory format of x and by a single copy, which repeat_interleave is not."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return _repeated(x.permute(0, 2, 3, 1).flatten(1), k).view(-1, *x.shape[2:], x.shape[1]).permute(0, 3, 1, 2)
    # A clone, since flatten alone makes no copy of a single row: an edit of one of its k would be one of all.
    return x.unsqueeze(1).expand(-1, k, *x.shape[1:]).clone(memory_format=torch.contiguous_format).flatten(0, 1)


def _in_format_of(x: torch.Tensor, copied: torch.Tensor) -> torch.Tensor:
    """A copy in the memory format of x: torch's gathers drop channels_last, in which convolutions are faster."""
    if x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return copied.contiguous(memory_format=torch.channels_last)
    return copied


class SplitUNet:
    """`UNet2DModel` as an encoder and a decoder that meet at the bottleneck.

    Parameters
    ----------
    unet : diffusers.UNet2DModel
    tap : {"after", "middle", "before"}
        Where h is read and edited (Haas et al., Fig. 10):

        - "after" (default; both papers, Asyrp): output of the mid block, before it meets the first skip.
        - "middle": inside the mid block's last residual block, after its second normalisation (with the timestep's
          shift applied) and before the non-linearity.
        - "before": input of the mid block. The same tensor, kept as a skip, is not edited.
    dtype : torch.dtype
        Precision of the network's arithmetic; lower ones run under autocast. Input and output stay float32.

    Raises
    ------
    ValueError
        If the network has no mid block, or is not a noise-prediction U-Net that the workbench can split.
    """

    def __init__(self, unet: UNet2DModel, *, tap: str = "after", dtype: torch.dtype = torch.float32) -> None:
        self.unet, self.tap, self.dtype = unet, one_of("tap", tap, TAPS), dtype
        if getattr(unet, "mid_block", None) is None or not getattr(unet.mid_block, "resnets", None):
            raise ValueError(f"{type(unet).__name__} has no middle block, so it has no bottleneck to read h from")
        if not isinstance(unet, UNet2DModel):
            raise ValueError(f"{type(unet).__name__} is not supported; the workbench takes diffusers' UNet2DModel")
        config = unet.config
        if config.time_embedding_type == "fourier" or any("Skip" in b for b in config.down_block_types):
            raise ValueError("score-SDE U-Nets (Fourier embedding, skip blocks) are not DDPMs and are not supported")
        if config.sample_size is None:
            raise ValueError("this U-Net's config has no sample_size, so the size of its images is not known; set it")
        if config.class_embed_type is not None or config.num_class_embeds is not None:
            raise ValueError("this U-Net is conditioned on a class; the workbench takes unconditional models")
        _refuse_sizes_that_do_not_fit(unet)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (self.unet.config.in_channels, height, width)

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that the network computes in."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.unet.device.type, dtype=self.dtype)

    def encode(self, x_t: torch.Tensor, t: int | torch.Tensor) -> Bottleneck:
        """Run the network up to the tap.

        Parameters
        ----------
        x_t : Tensor of shape (n, C, H, W)
        t : int or Tensor of shape (n,)
            Timestep(s).

        Returns
        -------
        Bottleneck
        """
        unet = self.unet
        if x_t.is_cuda and unet.mid_block._compiled_call_impl is not None:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may now reuse the outputs of the last pass
        with self.autocast():
            emb = self.embed(t, len(x_t))
            x = unet.conv_in(2 * x_t - 1.0 if unet.config.center_input_sample else x_t)
            skips = (x,)
            for block in unet.down_blocks:
                x, outputs = block(hidden_states=x, temb=emb)
                skips += outputs
            residual = None
            if self.tap == "after":
                x = unet.mid_block(x, emb)
            elif self.tap == "middle":
                residual = self._mid_block_head(x, emb)
                x = _resnet_head(unet.mid_block.resnets[-1], residual, emb)
        return Bottleneck(x.float(), skips, emb, self.tap, residual)

    def decode(self, bottleneck: Bottleneck, delta_h: torch.Tensor | None = None) -> torch.Tensor:
        """Run the rest of the network, with `delta_h` added to h.

        Parameters
        ----------
        bottleneck : Bottleneck
        delta_h : Tensor that broadcasts to (n, C, h, w), optional

        Returns
        -------
        Tensor of shape (n, C, H, W), float32
            eps, the predicted noise. A network with learned variance gives twice the channels; eps is the first half.
        """
        unet, emb, skips = self.unet, bottleneck.emb, bottleneck.skips
        h = bottleneck.h if delta_h is None else bottleneck.h + delta_h
        with self.autocast():
            x = h
            if bottleneck.tap == "before":
                x = unet.mid_block(x, emb)
            elif bottleneck.tap == "middle":
                x = _resnet_tail(unet.mid_block.resnets[-1], bottleneck.residual, x)
            for block in unet.up_blocks:
                skips, outputs = skips[: -len(block.resnets)], skips[-len(block.resnets) :]
                x = block(x, outputs, emb)
            x = unet.conv_out(unet.conv_act(unet.conv_norm_out(x)))
        return x[:, : unet.config.in_channels].float()

    def __call__(self, x_t: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """eps_theta(x_t, t), the predicted noise; shape (n, C, H, W), float32."""
        return self.decode(self.encode(x_t, t))

    def embed(self, t: int | torch.Tensor, n: int) -> torch.Tensor:
        """Embedding of the timestep for n samples; shape (n, E)."""
        unet = self.unet
        # Filled on the device: a copy of a number would make a GPU's whole queue wait.
        t = t.to(unet.device).expand(n) if torch.is_tensor(t) else torch.full((n,), t, device=unet.device)
        return unet.time_embedding(unet.time_proj(t).to(unet.dtype))

    def _mid_block_head(self, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
        """The mid block up to its last residual block."""
        mid = self.unet.mid_block
        x = mid.resnets[0](x, emb)
        for attention, resnet in zip(mid.attentions, mid.resnets[1:], strict=True):
            if attention is not None:
                x = attention(x, temb=emb)
            if resnet is not mid.resnets[-1]:
                x = resnet(x, emb)
        return x


def _refuse_sizes_that_do_not_fit(unet: UNet2DModel) -> None:
    """What diffusers builds, and torch then fails at in the first pass or at the first step."""
    config, size = unet.config, unet.config.sample_size
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"sample_size is {size!r}; it is the side of the images in pixels, or their height and width")
    multiple = 2 ** sum(bool(block.downsamplers) for block in unet.down_blocks)
    if any(side % multiple for side in sides):
        raise ValueError(f"sample_size is {size}; this U-Net takes multiples of {multiple}")
    if config.out_channels not in (config.in_channels, 2 * config.in_channels):
        raise ValueError(
            f"in_channels is {config.in_channels} and out_channels is {config.out_channels}; the workbench takes as "
            "many of both, or twice as many outputs for a learned variance"
        )
    narrow = [module.query_dim for module in unet.modules() if getattr(module, "heads", 1) < 1]
    if narrow:
        heads = config.attention_head_dim
        raise ValueError(f"attention_head_dim is {heads}, and attention here is {min(narrow)} channels wide")


def _resnet_head(resnet, x: torch.Tensor, emb: torch.Tensor) -> torch.Tensor:
    """diffusers' `ResnetBlock2D.forward` up to its second non-linearity."""
    x = resnet.conv1(resnet.nonlinearity(resnet.norm1(x)))
    emb = resnet.time_emb_proj(resnet.nonlinearity(emb))[:, :, None, None]
    if resnet.time_embedding_norm == "scale_shift":
        scale, shift = torch.chunk(emb, 2, dim=1)
        return resnet.norm2(x) * (1 + scale) + shift
    return resnet.norm2(x + emb)


def _resnet_tail(resnet, residual: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """diffusers' `ResnetBlock2D.forward` from its second non-linearity on."""
    x = resnet.conv2(resnet.dropout(resnet.nonlinearity(x)))
    if resnet.conv_shortcut is not None:
        residual = resnet.conv_shortcut(residual)
    return (residual + x) / resnet.output_scale_factor
