"""A denoiser split at its bottleneck, with its noise schedule."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from diffusers import SchedulerMixin, UNet2DModel

from workbench.diffusion.memory import free_memory
from workbench.diffusion.noise import initial_noise
from workbench.diffusion.parallel import count_passes, cpu_batch, in_threads, split, threads_each
from workbench.diffusion.schedule import NoiseSchedule
from workbench.diffusion.unet import Bottleneck, SplitUNet
from workbench.formats.checkpoints import hash_weights
from workbench.io import one_of, provenance_mismatch

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead")
COMPILE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative differences that fused kernels may make by rounding: of TF32 for float32, where a GPU uses it."""


@dataclass(frozen=True, eq=False)
class Model:
    """A pixel-space DDPM: a U-Net split at the bottleneck, and its noise schedule.

    Attributes
    ----------
    name : str
    unet : SplitUNet
    schedule : NoiseSchedule
    hash : str
        Content hash of the weights.
    """

    name: str
    unet: SplitUNet = field(repr=False)
    schedule: NoiseSchedule = field(repr=False)
    hash: str

    @property
    def tap(self) -> str:
        """Where h is read and edited: "before", "middle" or "after"."""
        return self.unet.tap

    @property
    def device(self) -> torch.device:
        return self.unet.unet.device

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's arithmetic. Images, eps and h are always float32."""
        return self.unet.dtype

    @property
    def compiled(self) -> bool:
        """Whether the network's blocks are compiled: faster, and without derivatives."""
        return self.unet.unet.mid_block._compiled_call_impl is not None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        return self.unet.image_shape

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the bottleneck activation h_t."""
        _, height, width = self.image_shape
        halvings = sum(block.downsamplers is not None for block in self.unet.unet.down_blocks)
        return (self.unet.unet.config.block_out_channels[-1], height >> halvings, width >> halvings)

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels at every resolution, finest first."""
        return tuple(self.unet.unet.config.block_out_channels)

    @property
    def parameters(self) -> int:
        """Number of weights."""
        return sum(p.numel() for p in self.unet.unet.parameters())

    def __call__(self, x_t: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """eps_theta(x_t, t), the predicted noise.

        Parameters
        ----------
        x_t : Tensor of shape (n, C, H, W)
        t : int or Tensor of shape (n,)

        Returns
        -------
        Tensor of shape (n, C, H, W), float32
        """
        count_passes(len(x_t))
        return _joined(self._in_pieces(lambda rows: self.unet(x_t[rows], _rows_of(t, rows)), x_t))

    def encode(self, x_t: torch.Tensor, t: int | torch.Tensor) -> Bottleneck:
        """Run the network up to the tap; see `SplitUNet.encode`. On a CPU, the samples are split over its cores."""
        return Bottleneck.joined(self._in_pieces(lambda rows: self.unet.encode(x_t[rows], _rows_of(t, rows)), x_t))

    def decode(self, bottleneck: Bottleneck, delta_h: torch.Tensor | None = None) -> torch.Tensor:
        """Run the rest of the network with `delta_h` added to h; see `SplitUNet.decode`."""
        if delta_h is not None:
            bottleneck = bottleneck.with_h(bottleneck.h + delta_h)
        count_passes(len(bottleneck.h))
        return _joined(self._in_pieces(lambda rows: self.unet.decode(bottleneck[rows]), bottleneck.h))

    def _in_pieces(self, function: Callable[[slice], T], x: torch.Tensor) -> list[T]:
        """`function` of pieces of the samples, on threads of a CPU; compiled code and derivatives have their own."""
        if self.device.type != "cpu" or self.compiled or x.requires_grad:
            return [function(slice(None))]
        pieces = split(len(x), self.image_shape)
        return in_threads(function, pieces, each=threads_each(pieces, self.image_shape))

    def tapped(self, tap: str) -> Model:
        """The same model with h read and edited elsewhere: "before", "middle" or "after" the mid block."""
        return Model(self.name, SplitUNet(self.unet.unet, tap=tap, dtype=self.dtype), self.schedule, self.hash)

    def batch_size(self) -> int:
        """Default number of samples per pass.

        On a CPU, `cpu_batch` (32 at 32 x 32 pixels, fewer for larger images); on an accelerator, as many as fit in 70%
        of its free memory by the measured need of one sample, up to 256.
        """
        if self.device.type != "cuda":
            return cpu_batch(self.image_shape)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.inference_mode():
            self(torch.zeros(1, *self.image_shape, device=self.device), 0)
        one = torch.cuda.max_memory_allocated(self.device) - before
        fits = int(0.7 * free_memory(self.device) / max(one, 1))
        return 2 ** max(0, min(fits, 256).bit_length() - 1)

    def provenance(self) -> dict:
        """Identity of this model in files: name, weights, network, tap and schedule."""
        # The same weights in a network of other settings, such as the order of the time embedding, are another model.
        settings = {key: value for key, value in self.unet.unet.config.items() if not key.startswith("_")}
        network = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        return {
            "name": self.name,
            "hash": self.hash,
            "network": network,
            "tap": self.tap,
            "schedule": self.schedule.provenance(),
        }

    def __repr__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name!r}: {self.parameters / 1e6:.2f} M parameters, images {self.image_shape}, "
            f"h {self.h_shape} {self.tap!r} the mid block, T={self.schedule.T}, {self.device} {precision}, "
            f"weights {self.hash}, clip_sample off)"
        )


def _joined(parts: list[torch.Tensor]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _rows_of(t: int | torch.Tensor, rows: slice) -> int | torch.Tensor:
    return t[rows] if torch.is_tensor(t) and t.ndim else t


def refuse_other_model(
    what: str,
    own: dict | None,
    model: dict | None,
    *,
    whose: str = "this model",
    tap: bool = True,
    remedy: str = "what belongs to one model does not carry over to another",
) -> None:
    """Raise if the provenances of two models differ in weights, tap, network or noise schedule.

    Parameters
    ----------
    what : str
        Subject of the messages: "the run", the name of a direction, the path of a store.
    own, model : dict or None
        Provenances of the model that it was made with, and of the one at hand. None (plain arrays) fits every model.
    whose : str
        Owner of the second provenance, for the messages.
    tap : bool
        Compare where h is read, too.
    remedy : str
        Remedy if the weights differ.

    Raises
    ------
    ValueError
    """
    if own is None or model is None:
        return
    if own["hash"] != model["hash"]:
        raise ValueError(
            f"{what} belongs to the model {own['name']!r} (weights {own['hash']}), {whose} to {model['name']!r} "
            f"(weights {model['hash']}); {remedy}"
        )
    if tap and own["tap"] != model["tap"]:
        raise ValueError(
            f"{what} has h {own['tap']!r} the mid block, {whose} has it {model['tap']!r}; use "
            f"model.tapped({own['tap']!r})"
        )
    if mismatch := provenance_mismatch(own, model):
        raise ValueError(f"{what} belongs to a model with another {mismatch} than {whose} does")


def wrap(
    unet: UNet2DModel,
    scheduler: SchedulerMixin | NoiseSchedule,
    *,
    name: str,
    device: str | torch.device | None = None,
    dtype: str | None = None,
) -> Model:
    """Make a `Model` from a U-Net in memory.

    Parameters
    ----------
    unet : diffusers.UNet2DModel
        Copied; the original is not changed.
    scheduler : diffusers scheduler or NoiseSchedule
        Gives alpha_bar, the spacing of timesteps and the kind of prediction.
    name : str
        Name for messages and provenance.
    device, dtype
        As in `load_model`.

    Returns
    -------
    Model

    Raises
    ------
    ValueError
        If the U-Net has no bottleneck, or does not predict the noise.
    """
    schedule = scheduler if isinstance(scheduler, NoiseSchedule) else schedule_of(scheduler)
    return make_model(copy.deepcopy(unet), schedule, name=name, device=find_device(device), dtype=dtype)


def make_model(
    unet: UNet2DModel, schedule: NoiseSchedule, *, name: str, device: torch.device, dtype: str | None
) -> Model:
    """As `wrap`, of a network that nobody else uses."""
    split = SplitUNet(unet, dtype=DTYPES[one_of("dtype", dtype or "float32", DTYPES)])
    memory_format = torch.contiguous_format if device.type == "mps" else torch.channels_last
    unet.eval().requires_grad_(False).float().to(device=device, memory_format=memory_format)
    return Model(name, split, schedule, hash_weights(unet))


def compile_blocks(model: Model, mode: str = "default") -> None:
    """Compile the blocks, and compare passes with those of the network as it was; ValueError if they differ or fail.

    All outputs are compared at the end: a CUDA graph that overwrote one with the next would not pass.
    """
    unet = model.unet.unet
    one_of("compile", mode, COMPILE_MODES)
    noise, t = initial_noise(range(4), model.image_shape).to(model.device), model.schedule.T // 2
    with torch.inference_mode():
        expected = [model(x[None], t) for x in noise]
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            block.compile(mode=mode)
        try:
            found = [model(x[None], t) for x in noise]
        except Exception as error:  # of many kinds: the compiler's own, and those of the tools that it calls
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{model.name} can't be compiled here ({reason}); load it with compile=False") from error
    expected, found = torch.cat(expected), torch.cat(found)
    difference, norm = float((found - expected).norm()), float(expected.norm())
    if not difference <= COMPILE_TOLERANCE[model.dtype] * norm:
        raise ValueError(
            f"compiled by the mode {mode!r}, {model.name} predicts noise that differs by {difference:.2g} from the "
            f"plain network's, whose norm is {norm:.2g}; load it with compile=False"
        )


def schedule_of(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler; ValueError where the workbench can't use it."""
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alpha_bar; the workbench takes those of DDPM and DDIM")
    if config.get("rescale_betas_zero_snr"):
        raise ValueError("rescale_betas_zero_snr is on; the workbench takes schedules without zero terminal SNR")
    predicts = config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ValueError(f"this model predicts {predicts!r}; the workbench takes models that predict noise ('epsilon')")
    return NoiseSchedule(
        scheduler.alphas_cumprod.double().numpy(),
        spacing=config.get("timestep_spacing", "leading"),
        offset=config.get("steps_offset", 0),
    )


def best_device() -> torch.device:
    """CUDA if there is one, else MPS, else the CPU; of several GPUs, the one of this process by its LOCAL_RANK."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def find_device(device: str | torch.device | None) -> torch.device:
    """The requested device, if available; by default the best one."""
    if device is None or (str(device) == "cuda" and torch.cuda.is_available()):
        return best_device()  # of several GPUs, that of this process
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {str(device)!r} is not available; the best one here is {best_device()}") from error
