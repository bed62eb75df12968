"""A denoiser split at its bottleneck, with its noise schedule."""

from __future__ import annotations

import copy
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import FunctionType, MethodType
from typing import TypeVar

import torch
from diffusers import SchedulerMixin

from workbench.diffusion.codec import Codec
from workbench.diffusion.conditions import Condition, as_condition
from workbench.diffusion.memory import free_memory
from workbench.diffusion.noise import initial_noise
from workbench.diffusion.parallel import count_passes, cpu_batch, in_threads, split, threads_each
from workbench.diffusion.schedule import PREDICTIONS, NoiseSchedule
from workbench.diffusion.text import TextEncoder
from workbench.diffusion.unet import Bottleneck, SplitUNet
from workbench.formats.checkpoints import hash_weights
from workbench.io import one_of

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
COMPILE_MODES = ("default", "reduce-overhead")
COMPILE_TOLERANCE = {torch.float32: 2e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative differences that fused kernels may make by rounding: of TF32 for float32, where a GPU uses it."""


@dataclass(frozen=True, eq=False)
class Model:
    """A diffusion model: a U-Net split where h is read, its noise schedule, and what turns its x_0 into images.

    Attributes
    ----------
    name : str
    unet : SplitUNet
    schedule : NoiseSchedule
    hash : str
        Content hash of the weights.
    prediction : {"epsilon", "v_prediction", "sample"}
        What the network predicts. The model itself always gives eps.
    codec : Codec or None
        The autoencoder of a latent diffusion model.
    text : TextEncoder or None
        What turns a prompt into tokens.
    """

    name: str
    unet: SplitUNet = field(repr=False)
    schedule: NoiseSchedule = field(repr=False)
    hash: str
    prediction: str = "epsilon"
    codec: Codec | None = field(default=None, repr=False)
    text: TextEncoder | None = field(default=None, repr=False)

    @property
    def tap(self) -> str:
        """Where h is read and edited; see `SplitUNet`."""
        return self.unet.tap

    @property
    def taps(self) -> tuple[str, ...]:
        """All places where h can be read and edited."""
        return self.unet.taps

    @property
    def device(self) -> torch.device:
        return self.unet.device

    @property
    def latent(self) -> bool:
        """Whether x_t are latents of images rather than images."""
        return self.codec is not None

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the network's arithmetic. Images, eps and h are always float32."""
        return self.unet.dtype

    @property
    def compiled(self) -> bool:
        """Whether the network's blocks are compiled: faster, and without derivatives."""
        return self.unet.compiled

    @property
    def x_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of x_t, which all steps of a run have."""
        return self.unet.x_shape

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image; that of x_t but for latent diffusion models."""
        return self.x_shape if self.codec is None else self.codec.image_shape(self.x_shape)

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of h_t."""
        return self.unet.h_shape

    @property
    def widths(self) -> tuple[int, ...]:
        """Number of channels at every resolution, finest first."""
        return self.unet.widths

    @property
    def condition(self) -> Condition | None:
        """Condition of all passes; None for an unconditional model."""
        return self.unet.condition

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

        def eps(rows: slice) -> torch.Tensor:  # both halves of a piece at once: the pieces wait for each other once
            return self._eps(self._encode(x_t[rows], _rows_of(t, rows)))

        return _joined(self._in_pieces(eps, x_t))

    def encode(self, x_t: torch.Tensor, t: int | torch.Tensor) -> Bottleneck:
        """Run the network up to the tap; see `SplitUNet.encode`. On a CPU, the samples are split over its cores."""
        return Bottleneck.joined(self._in_pieces(lambda rows: self._encode(x_t[rows], _rows_of(t, rows)), x_t))

    def decode(self, bottleneck: Bottleneck, delta_h: torch.Tensor | None = None) -> torch.Tensor:
        """eps_theta from a state at the tap, with `delta_h` added to h; see `SplitUNet.decode`."""
        if delta_h is not None:
            bottleneck = bottleneck.with_h(bottleneck.h + delta_h)
        count_passes(len(bottleneck.h))
        return _joined(self._in_pieces(lambda rows: self._eps(bottleneck[rows]), bottleneck.h))

    def undivided(self, x_t: torch.Tensor, t: int | torch.Tensor) -> torch.Tensor:
        """eps_theta by the network's own forward pass instead of the parts that it is divided into, for comparison."""

        def eps(rows: slice) -> torch.Tensor:
            x, at = x_t[rows], _rows_of(t, rows)
            return self._as_eps(self.unet.undivided(x, at), self._noisy(x, at))

        return _joined(self._in_pieces(eps, x_t))

    def _encode(self, x_t: torch.Tensor, t: int | torch.Tensor) -> Bottleneck:
        return replace(self.unet.encode(x_t, t), noisy=self._noisy(x_t, t))

    def _eps(self, bottleneck: Bottleneck) -> torch.Tensor:
        return self._as_eps(self.unet.decode(bottleneck), bottleneck.noisy)

    def _noisy(self, x_t: torch.Tensor, t: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor] | None:
        """x_t and alpha_bar, which turn a prediction of v or x_0 into eps; None for eps."""
        if self.prediction == "epsilon":
            return None
        t = torch.as_tensor(t).cpu().expand(len(x_t))
        alpha_bar = torch.from_numpy(self.schedule.alpha_bars[t.numpy()]).float().view(-1, 1, 1, 1)
        return x_t, alpha_bar.to(x_t.device)

    def _as_eps(self, output: torch.Tensor, noisy: tuple[torch.Tensor, torch.Tensor] | None) -> torch.Tensor:
        """The network's prediction, whatever it predicts, as eps."""
        return output if noisy is None else PREDICTIONS[self.prediction](output, *noisy)

    def _in_pieces(self, function: Callable[[slice], T], x: torch.Tensor) -> list[T]:
        """`function` of pieces of the samples, on threads of a CPU; compiled code and derivatives have their own."""
        if self.device.type != "cpu" or self.compiled or x.requires_grad:
            return [function(slice(None))]
        pieces = split(len(x), self.x_shape)
        return in_threads(function, pieces, each=threads_each(pieces, self.x_shape))

    def tapped(self, tap: str) -> Model:
        """The same model with h read and edited at another tap; see `SplitUNet` and `taps`."""
        return replace(self, unet=self.unet.at(tap=tap))

    def conditioned(
        self,
        *,
        prompt: str | None = None,
        negative_prompt: str = "",
        label: int | None = None,
        condition: torch.Tensor | None = None,
        negative: int | torch.Tensor | None = None,
        guidance_scale: float | None = None,
    ) -> Model:
        """The same model with a condition, which all its passes are given.

        With a guidance_scale other than 1, every pass is a batch of two (classifier-free guidance, Ho and Salimans
        2022). h is then that of the conditional pass, and a change of h is made in both.

        Parameters
        ----------
        prompt, negative_prompt : str
            For a model with a text encoder.
        label : int
            For a class-conditional model.
        condition : Tensor of shape (1, L, D)
            Tokens of a text, in place of a prompt.
        negative : int or Tensor of shape (1, L, D), optional
            Label or tokens of the second pass; needed for guidance without a prompt.
        guidance_scale : float, optional
            By default 7.5 with a prompt, else 1.

        Returns
        -------
        Model

        Raises
        ------
        ValueError
            If the model is unconditional or of another kind, no condition or more than one is given, or it does not
            fit.
        """
        about = encoder = None
        if prompt is not None:
            if self.text is None or label is not None or condition is not None:
                has = "takes no other condition beside it" if self.text is not None else "has no text encoder"
                raise ValueError(f"prompt is {prompt!r}, and {self.name} {has}")
            guidance_scale = 7.5 if guidance_scale is None else guidance_scale
            about, encoder = {"prompt": prompt, "negative_prompt": negative_prompt}, self.text.hash
            condition, negative = self.text.tokens(prompt), self.text.tokens(negative_prompt, empty=True)
        read = {"about": about, "encoder": encoder}
        given = as_condition(label=label, tokens=condition, negative=negative, guidance_scale=guidance_scale, **read)
        return replace(self, unet=self.unet.at(condition=given))

    def as_recorded(self, provenance: dict) -> Model:
        """This model at the tap of a provenance and with its condition.

        Raises
        ------
        ValueError
            If the condition was a tensor of tokens, which a provenance does not hold.
        """
        model, recorded = self.tapped(provenance["tap"]), dict(provenance.get("condition") or {})
        if recorded.pop("hash", None) is None:
            return model
        if not recorded.keys() & {"prompt", "label"}:
            raise ValueError(f"{self.name} was conditioned on tokens that no file holds; give the model, conditioned")
        return model.conditioned(**recorded)

    def to_images(self, x0: torch.Tensor) -> torch.Tensor:
        """Images of x_0: decoded from the latents of a latent model, or x_0 itself.

        Parameters
        ----------
        x0 : Tensor of shape (..., C, H, W) of `x_shape`

        Returns
        -------
        Tensor of shape (..., C, H, W) of `image_shape`, float32, nominally in [-1, 1], not clipped
        """
        if self.codec is None:
            return x0
        return self.codec.decode(x0.flatten(0, -4)).unflatten(0, x0.shape[:-3])

    def to_latents(self, images: torch.Tensor) -> torch.Tensor:
        """x_0 of images (n, C, H, W) in [-1, 1]: latents of a latent model, or the images themselves."""
        return images if self.codec is None else self.codec.encode(images)

    def batch_size(self) -> int:
        """Default number of samples per pass.

        On a CPU, `cpu_batch` (32 at 32 x 32 pixels, fewer for larger images); on an accelerator, as many as fit in 70%
        of its free memory by the measured need of one sample, up to 256.
        """
        if self.device.type != "cuda":
            return cpu_batch(self.x_shape)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.inference_mode():
            self(torch.zeros(1, *self.x_shape, device=self.device), 0)
        one = torch.cuda.max_memory_allocated(self.device) - before
        fits = int(0.7 * free_memory(self.device) / max(one, 1))
        return 2 ** max(0, min(fits, 256).bit_length() - 1)

    def provenance(self) -> dict:
        """Identity of this model in files: name, weights, network, tap and schedule; what is special, where it is."""
        # The same weights in a network of other settings, such as the order of the time embedding, are another model.
        settings = {key: value for key, value in self.unet.unet.config.items() if not key.startswith("_")}
        network = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:16]
        special = {
            "prediction": None if self.prediction == "epsilon" else self.prediction,
            "codec": self.codec and self.codec.hash,
            "condition": self.condition and self.condition.provenance(),
        }
        return {
            "name": self.name,
            "hash": self.hash,
            "network": network,
            "tap": self.tap,
            "schedule": self.schedule.provenance(),
            **{name: value for name, value in special.items() if value is not None},
        }

    def __repr__(self) -> str:
        precision = str(self.dtype).removeprefix("torch.")
        return (
            f"Model({self.name!r}: {self.parameters / 1e6:.2f} M parameters, images {self.image_shape}, "
            f"h {self.h_shape} at {self.tap!r}, T={self.schedule.T}, {self.device} {precision}, "
            f"weights {self.hash}, clip_sample off{'' if self.condition is None else f', {self.condition}'})"
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
    condition: bool = True,
    remedy: str = "what belongs to one model does not carry over to another",
) -> None:
    """Raise if the provenances of two models differ in weights, tap, network, noise schedule or condition.

    Parameters
    ----------
    what : str
        Subject of the messages: "the run", the name of a direction, the path of a store.
    own, model : dict or None
        Provenances of the model that it was made with, and of the one at hand. None (plain arrays) fits every model.
    whose : str
        Owner of the second provenance, for the messages.
    tap, condition : bool
        Compare where h is read, and what the model is conditioned on, too.
    remedy : str
        Remedy if the weights differ.

    Raises
    ------
    ValueError
    """
    if own is None or model is None:
        return
    if own["hash"] != model["hash"]:
        first, second = (f"{each['name']!r} (weights {each['hash']})" for each in (own, model))
        raise ValueError(f"{what} belongs to the model {first}, {whose} to {second}; {remedy}")
    if tap and own["tap"] != model["tap"]:
        taps = f"{what} has h at the tap {own['tap']!r}, {whose} has it at {model['tap']!r}"
        raise ValueError(f"{taps}; use model.tapped({own['tap']!r})")
    compared = {
        # What one of them does not record (older files, arrays) is no difference.
        "network around the same weights": [each.get("network") for each in (own, model)],
        "noise schedule": [(each.get("schedule") or {}).get("hash") for each in (own, model)],
    }
    differing = [name for name, pair in compared.items() if None not in pair and pair[0] != pair[1]]
    special = ("prediction", "codec", *(["condition"] if condition else []))
    differing += [name for name in special if own.get(name) != model.get(name)]
    if differing:
        raise ValueError(f"{what} belongs to a model with another {differing[0]} than {whose} does")


def wrap(
    unet: torch.nn.Module,
    scheduler: SchedulerMixin | NoiseSchedule,
    *,
    name: str,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    prediction: str | None = None,
    vae: torch.nn.Module | None = None,
    **condition: str | float | torch.Tensor | None,
) -> Model:
    """Make a `Model` from a network in memory.

    Parameters
    ----------
    unet : diffusers.UNet2DModel or UNet2DConditionModel
        Copied; the original is not changed.
    scheduler : diffusers scheduler or NoiseSchedule
        Gives alpha_bar and the spacing of timesteps; a diffusers scheduler gives the kind of prediction, too.
    name : str
        Name for messages and provenance.
    device, dtype
        As in `load_model`.
    prediction : {"epsilon", "v_prediction", "sample"}, optional
        What the network predicts; by default as the scheduler says, else eps.
    vae : AutoencoderKL or VQModel, optional
        The autoencoder of a latent diffusion model. Copied, too.
    **condition
        `label`, `condition`, `negative` and `guidance_scale`, as in `Model.conditioned`.

    Returns
    -------
    Model

    Raises
    ------
    ValueError
        If the workbench can't split the network, or the condition does not fit.
    """
    own = scheduler if isinstance(scheduler, NoiseSchedule) else schedule_of(scheduler)
    model = make_model(
        copy.deepcopy(unet),
        own,
        name=name,
        device=find_device(device),
        dtype=dtype,
        prediction=prediction or prediction_of(scheduler),
        vae=copy.deepcopy(vae),
    )
    return model.conditioned(**condition) if condition else model


def make_model(
    unet: torch.nn.Module,
    schedule: NoiseSchedule,
    *,
    name: str,
    device: torch.device,
    dtype: str | None,
    prediction: str = "epsilon",
    vae: torch.nn.Module | None = None,
    text: TextEncoder | None = None,
) -> Model:
    """As `wrap`, of networks that nobody else uses."""
    split = SplitUNet(unet, dtype=DTYPES[one_of("dtype", dtype or "float32", DTYPES)])
    one_of("prediction", prediction, PREDICTIONS)
    memory_format = torch.contiguous_format if device.type == "mps" else torch.channels_last
    unet.eval().requires_grad_(False).float().to(device=device, memory_format=memory_format)
    codec = None if vae is None else Codec(vae.float().to(device))
    # A VQModel's latents are of the width of its codes.
    channels = None if codec is None else vae.config.get("vq_embed_dim") or vae.config.latent_channels
    if channels not in (None, split.x_shape[0]):
        raise ValueError(f"the autoencoder's latents have {channels} channels, the network's {split.x_shape[0]}")
    return Model(name, split, schedule, hash_weights(unet), prediction, codec, text)


def compile_blocks(model: Model, mode: str = "default", *, n: int = 1) -> None:
    """Compile the blocks, and compare passes of n samples with the plain network's; ValueError if they differ or fail.

    All outputs are compared at the end: a CUDA graph that overwrote one with the next would not pass.
    """
    one_of("compile", mode, COMPILE_MODES)
    model = replace(model, unet=model.unet.blank())
    # Kept from now on: it follows from a pass of tensors without values, which the compiler does not take.
    _ = model.h_shape
    noise, t = initial_noise(range(4 * n), model.x_shape).to(model.device).split(n), model.schedule.T // 2
    with torch.inference_mode():
        expected = [model(x, t) for x in noise]
        for block in model.unet.stages.blocks:
            block.forward = MethodType(_with_own_code(type(block).forward), block)
            block.compile(mode=mode, dynamic=False)
        try:
            found = [model(x, t) for x in noise]
        except Exception as error:  # of many kinds: the compiler's own, and those of the tools that it calls
            reason = str(error).strip().splitlines()[0]
            raise ValueError(f"{model.name} can't be compiled here ({reason}); load it with compile=False") from error
    expected, found = torch.cat(expected), torch.cat(found)
    difference, norm = float((found - expected).norm()), float(expected.norm())
    if not difference <= COMPILE_TOLERANCE[model.dtype] * norm:
        differs = f"differs by {difference:.2g} from the plain network's, whose norm is {norm:.2g}"
        raise ValueError(f"the noise of {model.name}, compiled by {mode!r}, {differs}; load it with compile=False")


def _with_own_code(function: FunctionType) -> FunctionType:
    """A copy with a code object of its own.

    The compiler keeps eight versions of a code object, for the shapes of its inputs. Blocks of one class would share
    them, and with a second size of batch the last blocks would not be compiled.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_compiled")
    copied = FunctionType(code, function.__globals__, function.__name__, function.__defaults__, function.__closure__)
    copied.__kwdefaults__ = function.__kwdefaults__
    return copied


def schedule_of(scheduler: SchedulerMixin) -> NoiseSchedule:
    """The noise schedule of a diffusers scheduler; ValueError where the workbench can't use it."""
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(f"{type(scheduler).__name__} has no alpha_bar; the workbench takes those of DDPM and DDIM")
    alpha_bars = scheduler.alphas_cumprod.double().numpy()
    return NoiseSchedule(
        alpha_bars,
        spacing=config.get("timestep_spacing", "leading"),
        offset=config.get("steps_offset", 0),
        clean=1.0 if config.get("set_alpha_to_one", True) else float(alpha_bars[0]),
    )


def prediction_of(scheduler: SchedulerMixin | NoiseSchedule) -> str:
    """Kind of prediction of a diffusers scheduler; eps where there is none."""
    return "epsilon" if isinstance(scheduler, NoiseSchedule) else scheduler.config.get("prediction_type", "epsilon")


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
