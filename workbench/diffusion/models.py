"""Models: from a name, a hub id, a folder or a file to a denoiser that is split at its bottleneck."""

from __future__ import annotations

import copy
import hashlib
import json
import logging
import os
import re
import shutil
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from diffusers import DDPMPipeline, DDPMScheduler, SchedulerMixin, UNet2DModel
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from workbench import paths
from workbench.diffusion.memory import MemoryNeed, estimate_memory, free_memory
from workbench.diffusion.parallel import count_passes, cpu_batch, in_threads, split, threads_each
from workbench.diffusion.schedule import NoiseSchedule
from workbench.diffusion.unet import Bottleneck, SplitUNet
from workbench.formats import checkpoints, golden, layouts
from workbench.formats.hub import fetch
from workbench.io import provenance_mismatch

T = TypeVar("T")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


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
        """Precision of the network's arithmetic. Images, eps and h are float32 whatever it is."""
        return self.unet.dtype

    @property
    def compiled(self) -> bool:
        """Whether the network's blocks are compiled: faster, and without derivatives."""
        return self.unet.unet.mid_block._compiled_call_impl is not None

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image."""
        config = self.unet.unet.config
        size = config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return (config.in_channels, height, width)

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
        if not self._splits(x_t):
            return self.unet(x_t, t)
        return torch.cat(self._in_threads(lambda rows: self.unet(x_t[rows], _rows_of(t, rows)), len(x_t)))

    def encode(self, x_t: torch.Tensor, t: int | torch.Tensor) -> Bottleneck:
        """Run the network up to the tap; see `SplitUNet.encode`. On a CPU, the samples are split over its cores."""
        if not self._splits(x_t):
            return self.unet.encode(x_t, t)
        parts = self._in_threads(lambda rows: self.unet.encode(x_t[rows], _rows_of(t, rows)), len(x_t))
        return Bottleneck.joined(parts)

    def decode(self, bottleneck: Bottleneck, delta_h: torch.Tensor | None = None) -> torch.Tensor:
        """Run the rest of the network with `delta_h` added to h; see `SplitUNet.decode`."""
        if delta_h is not None:
            bottleneck = bottleneck.with_h(bottleneck.h + delta_h)
        count_passes(len(bottleneck.h))
        if not self._splits(bottleneck.h):
            return self.unet.decode(bottleneck)
        return torch.cat(self._in_threads(lambda rows: self.unet.decode(bottleneck[rows]), len(bottleneck.h)))

    def _splits(self, x: torch.Tensor) -> bool:
        """Whether threads share the samples: an accelerator needs none, compiled code and derivatives have others."""
        return self.device.type == "cpu" and not self.compiled and not x.requires_grad

    def _in_threads(self, function: Callable[[slice], T], n: int) -> list[T]:
        pieces = split(n, self.image_shape)
        return in_threads(function, pieces, each=threads_each(pieces, self.image_shape))

    def tapped(self, tap: str) -> Model:
        """The same model with h read and edited elsewhere: "before", "middle" or "after" the mid block."""
        return Model(self.name, SplitUNet(self.unet.unet, tap=tap, dtype=self.dtype), self.schedule, self.hash)

    def batch_size(self) -> int:
        """Number of samples that run at once when nothing else is asked for.

        On a CPU, that of `cpu_batch` (32 at 32 x 32 pixels, fewer for larger images); on an accelerator, what fits 70%
        of its free memory by the measured need of one sample, up to 256.
        """
        channels, height, width = self.image_shape
        if self.device.type != "cuda":
            return cpu_batch(self.image_shape)
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        with torch.inference_mode():
            self(torch.zeros(1, channels, height, width, device=self.device), 0)
        one = torch.cuda.max_memory_allocated(self.device) - before
        fits = int(0.7 * torch.cuda.mem_get_info(self.device)[0] / max(one, 1))
        return 2 ** max(0, min(fits, 256).bit_length() - 1)

    def provenance(self) -> dict:
        """What identifies this model in a file: name, weights, network, tap and schedule."""
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
    """Refuse what was made with another model: other weights, tap, network or noise schedule.

    Parameters
    ----------
    what : str
        What was made, for the messages: "the run", the name of a direction, the path of a store.
    own, model : dict or None
        Provenances of the model that it was made with, and of the one at hand. None (plain arrays) fits every model.
    whose : str
        What the second provenance is of, for the messages.
    tap : bool
        Compare where h is read, too.
    remedy : str
        What to do where the weights are others.

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


def load_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool = False,
    preset: str | None = None,
    image_size: int | None = None,
    head_channels: int | None = None,
    attention_order: str | None = None,
    schedule: str | None = None,
    timesteps: int | None = None,
    rescale_timesteps: bool = False,
) -> Model:
    """Load a pixel-space DDPM.

    `clip_sample`, which the public DDPMs have on, is off here: clipping the predicted image bends the effect of an
    edit and makes inversion fail.

    Parameters
    ----------
    source : str or path
        A bundled name ("avataaars32"), a diffusers folder (`unet/` + `scheduler/`, or flat), the id of a hub
        repository ("google/ddpm-ema-celebahq-256"), or a single file in the layout of the original DDPM or of
        guided-diffusion ("celeba_hq.ckpt"); `convert_checkpoint` makes a folder of such a file, once. Of a folder with
        `unet_ema/` beside `unet/` the average is loaded; give the path of `unet/` for the weights themselves.
    device : str or torch.device, optional
        By default the best there is: CUDA, then MPS, then CPU.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Precision of the network's arithmetic, by default float32. Weights and outputs stay float32.
    compile : bool, default False
        Compile the network's blocks (`torch.compile`), which takes a minute or so for every new size of batch and needs
        a C++ compiler on a CPU. For sampling, inversion and edits; Jacobians need a model that is not compiled.
    preset : str, optional
        Of a single file: which published checkpoint it is. Not needed where the file has its published name, or
        where all else is given.
    image_size, head_channels : int, optional
        Of a single file without a preset: side of the images in pixels, and channels of an attention head (only
        guided-diffusion's layout has several heads). The rest of the architecture follows from the shapes.
    attention_order : {"legacy", "new"}, optional
        Of a single file without a preset: "new" for `use_new_attention_order` of guided-diffusion; all published files
        have the legacy order, which is the default.
    schedule : {"linear", "cosine"}, optional
        Of a single file: the noise schedule; by default the preset's or the file's own, or else linear. To be given
        where a preset that was not asked for has the same shapes and another schedule.
    timesteps : int, optional
        Of a single file: T, the number of timesteps that the network was trained on (`diffusion_steps` of
        guided-diffusion); by default the preset's or the file's own, or else 1000.
    rescale_timesteps : bool, default False
        Of a single file whose `timesteps` are given: the network was told t * 1000 / T (`rescale_timesteps`, which
        improved-diffusion has on and guided-diffusion off). The model then has 1000 timesteps at the same noise levels.

    Returns
    -------
    Model

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, or it is not one that the workbench can split at a bottleneck.

    Warns
    -----
    UserWarning
        If the model is estimated to need more memory than is free, is an average beside other weights, or is a single
        file for which T is assumed.
    """
    target = best_device() if device is None else _device_of(device)
    sizes = {"image_size": image_size, "head_channels": head_channels, "attention_order": attention_order}
    noise = {"schedule": schedule, "timesteps": timesteps, "rescale_timesteps": rescale_timesteps or None}
    options = {"preset": preset, **sizes, **noise}
    path = paths.local(source)
    if path.is_file():
        unet, scheduler = _read_file(path, target, **options)
        name = path.stem
    else:
        given = [option for option, value in options.items() if value is not None]
        folder, name = _locate(source)
        if given:
            raise ValueError(f"{given[0]} is for single files; {folder} has a config of its own")
        unet, scheduler = _read_folder(folder, target)
    model = _make(unet, scheduler, name=name, device=target, dtype=dtype)
    return _compiled(model) if compile else model


def load_shapes(source: str | Path) -> SplitUNet:
    """The network of a model without its weights, on the device "meta": what memory, FLOPs and shapes follow from.

    Parameters
    ----------
    source : str or path
        As of `load_model`, or one of the public ones of `known_models`, which need not be here.

    Returns
    -------
    SplitUNet

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, or it can't be split.
    """
    known = {**layouts.HUB, **{name: preset.architecture for name, preset in layouts.PRESETS.items()}}
    if source in known:
        return SplitUNet(_build(known[source].config(), path=Path("the preset")))
    if paths.local(source).is_file():
        raise ValueError(
            f"{source} is a file, whose network is not known before it is read; give the folder that `workbench "
            f"convert` makes of it, or the preset that it is of: {', '.join(layouts.PRESETS)}"
        )
    files = checkpoints.find_model_files(_locate(source)[0])
    return SplitUNet(_build(checkpoints.read_json(files.unet_config), path=files.unet_config))


def load_schedule(source: str | Path) -> NoiseSchedule:
    """The noise schedule of a model's folder, without its weights.

    Parameters
    ----------
    source : str or path
        A bundled name, a folder or a hub id, as of `load_model`.

    Returns
    -------
    NoiseSchedule

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, or its schedule is none that the workbench takes.
    """
    files = checkpoints.find_model_files(_locate(source)[0])
    return _read_schedule(files.scheduler_config)


def convert_checkpoint(
    file: str | Path,
    out: str | Path,
    *,
    preset: str | None = None,
    image_size: int | None = None,
    head_channels: int | None = None,
    attention_order: str | None = None,
    schedule: str | None = None,
    timesteps: int | None = None,
    rescale_timesteps: bool = False,
) -> Path:
    """Write the network of a single file as a diffusers folder (safetensors), which loads fast and is safe to share.

    Parameters
    ----------
    file : path
        In the layout of the original DDPM or of guided-diffusion.
    out : path
        New folder; written whole or not at all.
    preset, image_size, head_channels, attention_order, schedule, timesteps, rescale_timesteps
        As in `load_model`.

    Returns
    -------
    Path
        The folder; `load_model` takes it.

    Raises
    ------
    FileExistsError
        If `out` exists already.
    FileNotFoundError, ValueError
        If there is no such file, or it is none that can be converted.
    """
    file, out = paths.local(file), paths.writable(out, folder=True)
    if file.is_dir():
        inside = sorted(path.name for path in file.iterdir() if path.suffix in (".ckpt", ".pt", ".pth", ".safetensors"))
        raise ValueError(
            f"{file} is a folder, and convert takes a file"
            + (f"; give {' or '.join(inside)} in it" if inside else "; where it is a model folder, load it as it is")
        )
    if not file.is_file():
        raise FileNotFoundError(f"there is no checkpoint {file}; give a .ckpt, .pt, .pth or .safetensors file")
    if out.exists():
        raise FileExistsError(f"{out} exists already; give a new folder")
    unet, scheduler = _read_file(
        file,
        torch.device("cpu"),
        preset=preset,
        image_size=image_size,
        head_channels=head_channels,
        attention_order=attention_order,
        schedule=schedule,
        timesteps=timesteps,
        rescale_timesteps=rescale_timesteps,
    )
    SplitUNet(unet)  # refuses what could not be loaded again
    partial = out.with_name(f"{out.name}.partial-{os.getpid()}")
    try:
        DDPMPipeline(unet, scheduler).save_pretrained(partial)
        os.replace(partial, out)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


def verify(model: Model, reference: str) -> float:
    """Compare a model with what its authors' library printed for a hub model (see `golden`).

    Parameters
    ----------
    model : Model
        Of float32.
    reference : str
        Hub id, one of `golden.EPS`.

    Returns
    -------
    float
        Largest difference of eps; up to `golden.TOLERANCE` it is the same network.

    Raises
    ------
    ValueError
        If there are no values for that id, or the model is of another image size.
    """
    if reference not in golden.EPS:
        raise ValueError(f"there are no reference values for {reference!r}; there are for {', '.join(golden.EPS)}")
    architecture = layouts.HUB[reference]
    if model.image_shape != (architecture.in_channels, architecture.image_size, architecture.image_size):
        raise ValueError(f"{model.name} has images of shape {model.image_shape}, which {reference} has not")
    noise = golden.noise(model.image_shape).to(model.device)
    with torch.inference_mode():
        eps = model(noise, golden.T)[0, 0, 0, : golden.COUNT].cpu()
    return float((eps - torch.tensor(golden.EPS[reference])).abs().max())


def _read_folder(folder: Path, device: torch.device) -> tuple[UNet2DModel, NoiseSchedule]:
    files = checkpoints.find_model_files(folder)
    config = checkpoints.read_json(files.unet_config)
    kind = config.get("_class_name", "an unnamed network")
    if kind != "UNet2DModel":
        raise ValueError(
            f"{files.unet_config} describes {kind}; the workbench takes unconditional pixel-space U-Nets (UNet2DModel)"
        )
    schedule = _read_schedule(files.scheduler_config)
    unet = _build(config, path=files.unet_config)
    _warn_if_short_of_memory(_need_of(unet), folder, device)
    raw = files.unet_config.parent.with_name("unet")
    if files.unet_config.parent == folder / "unet_ema" and raw.is_dir():
        warnings.warn(
            f"{folder} has weights and their moving average, unet_ema, which is loaded; for the weights themselves "
            f"give {raw}",
            stacklevel=3,
        )
    state = {name: tensor for file in files.weights for name, tensor in checkpoints.read_state_dict(file).items()}
    checkpoints.load_strictly(unet, state, path=files.weights[0], assign=True)
    return unet, schedule


def _read_schedule(path: Path) -> NoiseSchedule:
    """The noise schedule that a scheduler_config.json describes, with what its keys were called before."""
    config = checkpoints.read_json(path)
    if not {"beta_schedule", "trained_betas"} & set(config):
        raise ValueError(
            f"{path} describes {config.get('_class_name', 'an unnamed scheduler')}, which has no betas; the workbench "
            "takes the noise schedules of DDPM and DDIM"
        )
    if isinstance(config.get("timesteps"), int):
        config.setdefault("num_train_timesteps", config["timesteps"])
    if config.get("predict_epsilon") is False:
        config["prediction_type"] = "sample"
    known = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
    if config.get("trained_betas") is None and config.get("beta_schedule") not in known:
        raise ValueError(
            f"{path} has the beta_schedule {config.get('beta_schedule')!r}, which diffusers does not; it is one of "
            f"{', '.join(known)}"
        )
    try:
        return _schedule_of(DDPMScheduler.from_config(config))
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has no noise schedule that can be used: {error}") from error


def _read_file(
    path: Path,
    device: torch.device,
    *,
    preset: str | None,
    image_size: int | None,
    head_channels: int | None,
    attention_order: str | None,
    schedule: str | None,
    timesteps: int | None,
    rescale_timesteps: bool | None,
) -> tuple[UNet2DModel, SchedulerMixin]:
    if rescale_timesteps and timesteps is None:
        raise ValueError("rescale_timesteps needs the number of timesteps; give timesteps, such as 4000")
    asked = None
    if schedule is not None or timesteps is not None:
        T = 1000 if timesteps is None else timesteps
        asked = layouts.noise_schedule(schedule or "linear", T, rescaled=bool(rescale_timesteps))
    sizes = {"image_size": image_size, "head_channels": head_channels, "attention_order": attention_order}
    given = {name: value for name, value in sizes.items() if value is not None}
    if preset is not None and given:
        raise ValueError(f"a preset says {next(iter(given))}; give the one or the other")
    known = layouts.preset_for(preset, "" if given else path.name)
    if known is not None and schedule is None and timesteps is not None and known.schedule != layouts.LINEAR:
        raise ValueError(f"the preset of {path} has a noise schedule of its own; give schedule with timesteps")
    if known is not None:
        unet = _build(known.architecture.config(), path=path)
        _warn_if_short_of_memory(_need_of(unet), path, device)
    else:  # of an unknown network the size of the file is all that is known before it is read
        _warn_if_short_of_memory(MemoryNeed(path.stat().st_size, 0), path, torch.device("cpu"))
    checkpoint = checkpoints.read_checkpoint(path)
    try:
        if known is None:
            architecture, whose = layouts.infer(checkpoint.state, checkpoint.layout, **given), "the architecture"
            if schedule is None and checkpoint.betas is None:
                layouts.refuse_unknown_schedule(architecture)
            unet = _build(architecture.config(), path=path)
            _warn_if_short_of_memory(_need_of(unet), path, device)
        else:
            architecture = known.architecture
            whose = f"the preset {next(name for name, p in layouts.PRESETS.items() if p is known)!r}"
            if checkpoint.layout != architecture.layout:
                theirs, ours = (layouts.FAMILIES[layout] for layout in (checkpoint.layout, architecture.layout))
                raise ValueError(
                    f"it has the layout of {theirs} ({next(iter(checkpoint.state))} ...), and {whose} is of {ours}"
                )
        state = layouts.convert(checkpoint.state, architecture, expected=unet.state_dict(), whose=whose)
    except ValueError as error:
        raise ValueError(f"{path} can't be loaded: {error}") from error
    checkpoints.load_strictly(unet, state, path=path, assign=True)
    if known is None and timesteps is None and (schedule is not None or checkpoint.betas is None):
        warnings.warn(
            f"{path.name} does not tell how many timesteps its network was trained on; 1000 are assumed, of the "
            f"{schedule or 'linear'} schedule. Were it others, give timesteps= (`workbench convert --timesteps`), and "
            "rescale_timesteps= where the network was told t * 1000 / T, as improved-diffusion's are",
            stacklevel=3,
        )
    own = layouts.LINEAR
    if checkpoint.betas is not None:
        own = {"trained_betas": checkpoint.betas.tolist(), "num_train_timesteps": len(checkpoint.betas)}
    betas = asked or (own if known is None else known.schedule)
    learned = architecture.out_channels == 2 * architecture.in_channels
    variance = "learned_range" if learned else "fixed_small"
    return unet, DDPMScheduler(**betas, clip_sample=False, variance_type=variance)


def wrap(
    unet: UNet2DModel,
    scheduler: SchedulerMixin | NoiseSchedule,
    *,
    name: str,
    device: str | torch.device | None = None,
    dtype: str | None = None,
) -> Model:
    """Make a `Model` of a U-Net that is already in memory.

    Parameters
    ----------
    unet : diffusers.UNet2DModel
        Copied, so that yours stays as it is.
    scheduler : diffusers scheduler or NoiseSchedule
        Gives alpha_bar, the spacing of timesteps and the kind of prediction.
    name : str
        For messages and provenance.
    device, dtype
        As in `load_model`.

    Returns
    -------
    Model

    Raises
    ------
    ValueError
        If the U-Net has no bottleneck, or predicts something else than the noise.
    """
    device = best_device() if device is None else _device_of(device)
    return _make(copy.deepcopy(unet), scheduler, name=name, device=device, dtype=dtype)


def _make(
    unet: UNet2DModel,
    scheduler: SchedulerMixin | NoiseSchedule,
    *,
    name: str,
    device: torch.device,
    dtype: str | None,
) -> Model:
    schedule = scheduler if isinstance(scheduler, NoiseSchedule) else _schedule_of(scheduler)
    split = SplitUNet(unet, dtype=_dtype_of(dtype))
    memory_format = torch.contiguous_format if device.type == "mps" else torch.channels_last
    split.unet.eval().requires_grad_(False).float().to(device=device, memory_format=memory_format)
    return Model(name, split, schedule, checkpoints.hash_weights(split.unet))


def _compiled(model: Model) -> Model:
    """The model with its blocks compiled, after a first pass, so that what can't be compiled shows now."""
    unet = model.unet.unet
    for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
        block.compile()
    try:
        with torch.inference_mode():
            model(torch.zeros(1, *model.image_shape, device=model.device), 0)
    except Exception as error:  # of many kinds: the compiler's own, and those of the tools that it calls
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"{model.name} can't be compiled here ({reason}); load it with compile=False") from error
    return model


def best_device() -> torch.device:
    """CUDA if there is one, else MPS, else the CPU; of several GPUs, the one of this process by its LOCAL_RANK."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def list_models() -> list[dict]:
    """Models that load without a network: bundled ones and those in the local hub cache.

    Returns
    -------
    list of dict
        With "name", "where" ("bundled" or "hub cache"), "images" (C, H, W) and "path".
    """
    found = [("bundled", p.name, p) for p in sorted(paths.models().glob("*")) if has_unet(p)]
    found += [("hub cache", name, path) for name, path in _cached_repositories() if has_unet(path)]
    return [{"name": n, "where": where, "images": _image_shape_of(p), "path": str(p)} for where, n, p in found]


def known_models() -> list[dict]:
    """Public models that load, with what they need.

    Returns
    -------
    list of dict
        With "name" (a hub id, or a preset for single files), "about", "files" (names that the files are published
        under), "images" (C, H, W), "h" (C, h, w), "parameters" and "memory", a `MemoryNeed`, which is estimated.
    """
    rows = [(name, "on the hub", (), architecture) for name, architecture in layouts.HUB.items()]
    rows += [(name, preset.about, preset.files, preset.architecture) for name, preset in layouts.PRESETS.items()]
    needs = {a: _need_of(_build(a.config(), path=Path("the preset"))) for *_, a in rows}
    return [
        {
            "name": name,
            "about": about,
            "files": files,
            "images": (a.in_channels, a.image_size, a.image_size),
            "h": a.h_shape,
            "parameters": needs[a].weights // 4,
            "memory": needs[a],
        }
        for name, about, files, a in rows
    ]


def _need_of(unet: UNet2DModel) -> MemoryNeed:
    """What a network without values will need; what can't be split or can't compute is refused here."""
    split = SplitUNet(unet)
    try:
        return estimate_memory(split)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        reason = str(error).partition("\n")[0]
        size = unet.config.sample_size
        raise ValueError(f"this U-Net can't compute an image of its sample_size, {size} ({reason})") from error


def _warn_if_short_of_memory(need: MemoryNeed, path: Path, device: torch.device) -> None:
    """Say so before weights are read, where the model won't fit."""
    free = free_memory(device)
    if need.total > free:
        warnings.warn(
            f"{path} is estimated to need {need.total / 2**30:.1f} GiB ({need.weights / 2**30:.1f} of weights, the "
            f"rest for one image), and {free / 2**30:.1f} GiB are free on {device}; it may fail or be very slow. Use a "
            "smaller model, or a machine with more memory",
            stacklevel=4,
        )


def _locate(source: str | Path) -> tuple[Path, str]:
    """Folder and name of a model."""
    if is_bundled(source):
        return paths.models() / source, source
    path = paths.local(source)
    if path.is_dir():
        return path, path.resolve().name
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        folder = fetch(source, checkpoints.HUB_FILES, complete=_is_complete, bundled=_bundled_names())
        return folder, source
    raise FileNotFoundError(
        f"no model {str(path)!r}; bundled: {', '.join(_bundled_names()) or 'none'}; otherwise give a diffusers "
        "folder, a .ckpt or .pt file, or a hub id such as google/ddpm-ema-celebahq-256"
    )


def _is_complete(folder: Path) -> bool:
    """Whether a download was not cut short."""
    try:
        checkpoints.find_model_files(folder)
    except (OSError, ValueError):
        return False
    return True


def is_bundled(source: str | Path) -> bool:
    return source in _bundled_names()


def _bundled_names() -> list[str]:
    return [p.name for p in sorted(paths.models().glob("*")) if has_unet(p)]


def _unet_config(folder: Path) -> dict:
    """Config of the folder's U-Net; empty if it has none."""
    config = checkpoints.find_unet_config(folder)
    return {} if config is None else checkpoints.read_json(config)


def has_unet(folder: Path) -> bool:
    try:
        return _unet_config(folder).get("_class_name") == "UNet2DModel"
    except ValueError:  # somebody else's malformed file is no model of ours
        return False


def _image_shape_of(folder: Path) -> tuple[int, int, int]:
    config = _unet_config(folder)
    size = config.get("sample_size")
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    return (config.get("in_channels", 3), height, width)


def _cached_repositories() -> list[tuple[str, Path]]:
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return []
    repositories = [r for r in repositories if r.revisions]
    return sorted((r.repo_id, max(r.revisions, key=lambda v: v.last_modified).snapshot_path) for r in repositories)


def _build(config: dict, *, path: Path) -> UNet2DModel:
    try:
        # diffusers logs every config key that it does not know; what does not fit shows when the weights are loaded.
        level = diffusers_logging.get_verbosity()
        diffusers_logging.set_verbosity(logging.ERROR)
        with torch.device("meta"):  # without values: the weights of the file take their place
            return UNet2DModel.from_config(config)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a U-Net that diffusers can build ({error})") from error
    finally:
        diffusers_logging.set_verbosity(level)


def _schedule_of(scheduler) -> NoiseSchedule:
    config = scheduler.config
    if not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"{type(scheduler).__name__} has no alpha_bar; the workbench takes the noise schedules of DDPM and DDIM"
        )
    if config.get("rescale_betas_zero_snr"):
        raise ValueError(
            "rescale_betas_zero_snr is on: at zero terminal SNR the noise does not tell the image; the workbench takes "
            "schedules that keep some of it"
        )
    predicts = config.get("prediction_type", "epsilon")
    if predicts != "epsilon":
        raise ValueError(f"this model predicts {predicts!r}; the workbench takes models that predict noise ('epsilon')")
    return NoiseSchedule(
        scheduler.alphas_cumprod.double().numpy(),
        spacing=config.get("timestep_spacing", "leading"),
        offset=config.get("steps_offset", 0),
    )


def _device_of(device: str | torch.device) -> torch.device:
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device {str(device)!r} is not there; the best one here is {best_device()}") from error


def _dtype_of(dtype: str | None) -> torch.dtype:
    if dtype is None:
        return torch.float32
    if dtype not in DTYPES:
        raise ValueError(f"dtype {dtype!r} is not known; it is one of {', '.join(DTYPES)}")
    return DTYPES[dtype]
