"""A U-Net, split where h is read and edited.

`encode` runs the network up to the tap, `decode` runs the rest; together they are the network's own forward pass, bit
for bit.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch.utils._pytree import tree_map

from workbench.diffusion.conditions import Condition, blank_condition
from workbench.diffusion.stages import Stages, stages_of
from workbench.io import one_of


@dataclass(frozen=True, eq=False)
class Bottleneck:
    """The network's state at the tap: h and the decoder's other inputs.

    Attributes
    ----------
    h : Tensor of shape (n, C, h, w), float32
        The activation h_t at the tap. With classifier-free guidance, that of the conditional pass.
    skips : tuple of Tensor
        Outputs of the encoder's blocks, unchanged by edits of h. With guidance these and the next have 2n rows, two a
        sample: of the conditional pass and of the unconditional one.
    emb : Tensor of shape (n, E)
        Embedding of the timestep, and of a class.
    tap : str
    residual : Tensor of shape (n, C, h, w), optional
        For the tap "middle": the input of the residual block that contains the tap. For a skip: output of the mid
        block.
    guided : (Tensor, Tensor), optional
        With guidance: the network's own h of both passes, each of shape (n, C, h, w).
    noisy : (Tensor, Tensor), optional
        For networks that predict v or x_0: x_t of shape (n, C, H, W), and alpha_bar of shape (n, 1, 1, 1).
    """

    h: torch.Tensor
    skips: tuple[torch.Tensor, ...] = field(repr=False)
    emb: torch.Tensor = field(repr=False)
    tap: str = "after"
    residual: torch.Tensor | None = field(default=None, repr=False)
    guided: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)
    noisy: tuple[torch.Tensor, torch.Tensor] | None = field(default=None, repr=False)

    def __repr__(self) -> str:
        return f"Bottleneck(h={tuple(self.h.shape)}, tap={self.tap!r}, {len(self.skips)} skips)"

    @classmethod
    def joined(cls, parts: Sequence[Bottleneck]) -> Bottleneck:
        """Concatenate the samples of several states, in order."""
        if len(parts) == 1:
            return parts[0]
        return replace(parts[0], **tree_map(lambda *each: torch.cat(each), *(part._tensors() for part in parts)))

    def with_h(self, h: torch.Tensor) -> Bottleneck:
        """The same state with another h (a swap, Haas et al. Fig. 2a)."""
        return replace(self, h=h)

    def repeat(self, k: int) -> Bottleneck:
        """Repeat each sample `k` times in a row, so that k edits of it run as one batch."""
        return self._map(lambda x: _repeated(x, k))

    def __getitem__(self, index) -> Bottleneck:
        """Samples `index` (slice, list or tensor of positions)."""
        return self._map(lambda x: _in_format_of(x, x[index]))

    def _tensors(self) -> dict:
        """The fields that have a row or two a sample."""
        return {name: value for name, value in vars(self).items() if value is not None and name != "tap"}

    def _map(self, f) -> Bottleneck:
        n = len(self.h)

        def apply(value):
            # Two rows a sample move together.
            return f(value) if len(value) == n else _in_format_of(value, f(value.unflatten(0, (n, -1))).flatten(0, 1))

        return replace(self, **tree_map(apply, self._tensors()))


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
    """A U-Net as an encoder and a decoder that meet at the tap.

    Parameters
    ----------
    unet : UNet2DModel or UNet2DConditionModel
    tap : str
        Where h is read and edited (Haas et al., Fig. 10):

        - "after" (default, also "mid"; both papers, Asyrp): output of the mid block, before it meets the first skip.
        - "middle": inside the mid block's last residual block, after its second normalisation (with the timestep's
          shift applied) and before the non-linearity.
        - "before": input of the mid block. The same tensor, kept as a skip, is not edited.
        - "down.0", "down.1", ...: output of a block on the way down. The same tensor, kept as a skip, is not edited.
        - "skip.0", "skip.1", ...: what a skip connection carries, counted from the input of the network.
        - "up.0", "up.1", ...: output of a block on the way up.
    dtype : torch.dtype
        Precision of the network's arithmetic; lower ones run under autocast. Input and output stay float32.
    condition : Condition, optional
        What a conditional network is given in every pass.

    Raises
    ------
    ValueError
        If the workbench can't split the network, it has no such tap, or the condition does not fit.
    """

    def __init__(
        self,
        unet: torch.nn.Module | Stages,
        *,
        tap: str = "after",
        dtype: torch.dtype = torch.float32,
        condition: Condition | None = None,
    ) -> None:
        self.stages = unet if isinstance(unet, Stages) else stages_of(unet)
        self.unet, self.dtype, self.condition = self.stages.module, dtype, condition
        self.tap = "after" if tap == "mid" else tap
        if self.tap not in self.stages.taps:
            one_of("tap", tap, self.taps)
        self._mid = list(self.stages.stages).index("mid")
        if condition is not None:
            condition.check(self.stages)

    @property
    def taps(self) -> tuple[str, ...]:
        """Names of all taps."""
        return (*self.stages.taps, *(name for name in self.stages.shapes if name != "mid"))

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t."""
        return self.stages.x_shape

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of h."""
        shapes = self.stages.shapes
        return shapes.get(self.tap, shapes["mid"])

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels at every resolution, finest first."""
        return tuple(shape[0] for name, shape in self.stages.shapes.items() if name.startswith("down."))

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def compiled(self) -> bool:
        """Whether the network's blocks are compiled: faster, and without derivatives."""
        return any(block._compiled_call_impl is not None for block in self.stages.blocks)

    def at(self, *, tap: str | None = None, condition: Condition | None = None) -> SplitUNet:
        """The same network with another tap, or with another condition."""
        return SplitUNet(self.stages, tap=tap or self.tap, dtype=self.dtype, condition=condition or self.condition)

    def blank(self) -> SplitUNet:
        """The same network with any condition, if it needs one: for shapes, memory and operations."""
        needed = self.condition is None and self.stages.conditioned_on is not None
        return self.at(condition=blank_condition(self.stages)) if needed else self

    def autocast(self) -> contextlib.AbstractContextManager:
        """The precision that the network computes in."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def embed(self, t: int | torch.Tensor, n: int) -> torch.Tensor:
        """Embedding of the timestep, and of a class, for n samples; shape (n, E)."""
        return self._embed(t, n)[:: 2 if self._guided else 1]

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

        Raises
        ------
        ValueError
            If the network is conditional and has no condition.
        """
        parts, n = self.stages, len(x_t)
        if x_t.is_cuda and self.compiled:
            torch.compiler.cudagraph_mark_step_begin()  # a graph may now reuse the outputs of the last pass
        with self.autocast():
            emb, context = self._embed(t, n), parts.context(self._given(n)[1])
            x, skips = parts.begin(_repeated(x_t, 2) if self._guided else x_t)
            for stage in self._stages(0, self._first):
                x, skips = stage(x, skips, emb, context)
            residual = None
            if self.tap == "middle":
                residual = parts.mid_head(x, emb, context)
                x = parts.mid_normalised(residual, emb)
            elif self.tap.startswith("skip."):
                residual, x = x, skips[int(self.tap.removeprefix("skip."))]
        h = x.float()
        if not self._guided:
            return Bottleneck(h, skips, emb, self.tap, residual)
        both = _in_format_of(h, h[0::2]), _in_format_of(h, h[1::2])
        return Bottleneck(both[0].clone(), skips, emb, self.tap, residual, guided=both)

    def decode(self, bottleneck: Bottleneck, delta_h: torch.Tensor | None = None) -> torch.Tensor:
        """Run the rest of the network, with `delta_h` added to h.

        With classifier-free guidance, both passes have the change of h, and the output is u + scale (c - u) of the
        conditional output c and the unconditional u (Ho and Salimans 2022, eq. 6 with scale = 1 + w).

        Parameters
        ----------
        bottleneck : Bottleneck
        delta_h : Tensor that broadcasts to (n, C, h, w), optional

        Returns
        -------
        Tensor of shape (n, C, H, W), float32
            The network's prediction, without the variance that some networks learn.
        """
        parts, emb, skips, tap = self.stages, bottleneck.emb, bottleneck.skips, bottleneck.tap
        h = bottleneck.h if delta_h is None else bottleneck.h + delta_h
        if bottleneck.guided is not None:
            own, other = bottleneck.guided
            h = _in_format_of(own, torch.stack([h, other + (h - own)], dim=1).flatten(0, 1))
        with self.autocast():
            context, x = parts.context(self._given(len(bottleneck.h))[1]), h
            if tap == "middle":
                x = parts.mid_tail(bottleneck.residual, x)
            elif tap.startswith("skip."):
                k = int(tap.removeprefix("skip."))
                x, skips = bottleneck.residual, (*skips[:k], x, *skips[k + 1 :])
            for stage in self._stages(self._first + (tap == "middle"), None):
                x, skips = stage(x, skips, emb, context)
            out = parts.finish(x, skips)
        return self._prediction(out)

    def undivided(self, x_t: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """Output (n, C, H, W) of the network's own forward pass, which `decode` of `encode` equals bit for bit."""
        rows, n = _repeated(x_t, 2) if self._guided else x_t, len(x_t)
        with self.autocast():
            out = self.stages.whole(rows, self._times(t, n), *self._given(n))
        return self._prediction(out)

    def _prediction(self, out: torch.Tensor) -> torch.Tensor:
        """The network's output without a learned variance, and both passes combined."""
        out = out[:, : self.x_shape[0]].float()
        if not self._guided:
            return out
        conditional, plain = out[0::2], out[1::2]
        return plain + self.condition.guidance_scale * (conditional - plain)

    def __call__(self, x_t: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """The network's prediction; shape (n, C, H, W), float32."""
        return self.decode(self.encode(x_t, t))

    @property
    def _guided(self) -> bool:
        return self.condition is not None and self.condition.guided

    def _times(self, t: int | torch.Tensor, n: int) -> torch.Tensor:
        """Timesteps of n samples, one row a pass."""
        # Filled on the device: a copy of a number would make a GPU's whole queue wait.
        t = t.to(self.device) if torch.is_tensor(t) else torch.full((1,), t, device=self.device)
        t = t.expand(n)
        return _repeated(t, 2) if self._guided else t

    def _embed(self, t: int | torch.Tensor, n: int) -> torch.Tensor:
        """Embedding for n samples, one row a pass."""
        return self.stages.embed(self._times(t, n), *self._given(n))

    @property
    def _first(self) -> int:
        """Number of whole stages before the tap."""
        if self.tap in ("before", "middle"):
            return self._mid
        if self.tap == "after" or self.tap.startswith("skip."):
            return self._mid + 1
        return 1 + list(self.stages.stages).index(self.tap)

    def _stages(self, start: int, stop: int | None) -> list:
        return list(self.stages.stages.values())[start:stop]

    def _given(self, n: int) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Labels and tokens of n samples; one row a pass."""
        kind = self.stages.conditioned_on
        if kind is None:
            return None, None
        if self.condition is None:
            example = 'prompt="..."' if kind == "text" else "label=3"
            raise ValueError(f"this network is conditioned on a {kind} and has none; use model.conditioned({example})")
        return self.condition.rows(n, self.device)
