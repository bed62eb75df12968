"""Load models by name, hub id, folder or file."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    UNet2DConditionModel,
    UNet2DModel,
    VQModel,
)
from diffusers.utils import logging as diffusers_logging
from huggingface_hub import scan_cache_dir
from huggingface_hub.errors import CacheNotFound

from workbench import paths
from workbench.diffusion.foreign import NETWORKS
from workbench.diffusion.memory import MemoryNeed, estimate_memory, free_memory
from workbench.diffusion.models import Model, compile_blocks, find_device, make_model, prediction_of, schedule_of
from workbench.diffusion.schedule import PREDICTIONS, NoiseSchedule
from workbench.diffusion.text import TextEncoder
from workbench.diffusion.unet import SplitUNet
from workbench.formats import checkpoints, golden, layouts, lucidrains
from workbench.formats.hub import fetch
from workbench.io import one_of, written

CLASSES = {"UNet2DModel": UNet2DModel, "UNet2DConditionModel": UNet2DConditionModel, **NETWORKS}
"""Networks that folders may have, by the names in their configs."""

AUTOENCODERS = {"AutoencoderKL": AutoencoderKL, "VQModel": VQModel}


@dataclass(frozen=True)
class FileSettings:
    """Settings of a network that its single file does not record; options of `load_model`."""

    preset: str | None = None
    image_size: int | None = None
    head_channels: int | None = None
    heads: int | None = None
    attention_order: str | None = None
    schedule: str | None = None
    timesteps: int | None = None
    rescale_timesteps: bool = False
    prediction: str | None = None

    @property
    def sizes(self) -> dict[str, int | str]:
        """Those that decide the architecture."""
        names = ("image_size", "head_channels", "heads", "attention_order")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


def load_model(
    source: str | Path,
    *,
    device: str | torch.device | None = None,
    dtype: str | None = None,
    compile: bool | str = False,
    preset: str | None = None,
    image_size: int | None = None,
    head_channels: int | None = None,
    heads: int | None = None,
    attention_order: str | None = None,
    schedule: str | None = None,
    timesteps: int | None = None,
    rescale_timesteps: bool = False,
    prediction: str | None = None,
    **condition: str | float | torch.Tensor | None,
) -> Model:
    """Load a diffusion model with a U-Net: unconditional or conditional, of pixels or latents.

    The public DDPMs set `clip_sample`; it is off here, because clipping the predicted image distorts the effect of an
    edit and makes inversion fail.

    Parameters
    ----------
    source : str or path
        A bundled name ("avataaars32"), a diffusers folder (`unet/` + `scheduler/`, or flat), the id of a hub
        repository ("google/ddpm-ema-celebahq-256"), or a single file in the layout of the original DDPM, of
        guided-diffusion ("celeba_hq.ckpt") or of lucidrains' denoising-diffusion-pytorch ("model-10.pt");
        `convert_checkpoint` converts such a file to a folder, once. In a folder with `unet_ema/` beside `unet/` the
        average is loaded; give the path of `unet/` for the last weights.
    device : str or torch.device, optional
        By default the best available: CUDA, then MPS, then CPU.
    dtype : {"float32", "bfloat16", "float16"}, optional
        Precision of the network's arithmetic, by default float32. Weights and outputs stay float32.
    compile : bool or "reduce-overhead", default False
        Compile the network's blocks (`torch.compile`); takes a minute or so for every new batch size and needs a C++
        compiler on a CPU. "reduce-overhead" also records their calls as CUDA graphs, one for every batch size, which
        saves most where the launches of kernels take longer than the kernels: small images, small batches. For
        sampling, inversion and edits; Jacobians need an uncompiled model. Some passes are compared with the plain
        network's.
    preset : str, optional
        For a single file: which published checkpoint it is. Not needed under the published file name, or if all other
        settings are given.
    image_size, head_channels, heads : int, optional
        For a single file without a preset: side of the images in pixels, and for guided-diffusion's layout the channels
        of an attention head (`num_head_channels`) or the number of heads (`num_heads`, improved-diffusion's 4). The
        rest of the architecture follows from the shapes.
    attention_order : {"legacy", "new"}, optional
        For a single file without a preset: "new" for `use_new_attention_order` of guided-diffusion; "legacy", the
        default, fits all published files but 64x64_diffusion.pt, whose preset has "new".
    schedule : {"linear", "cosine", "sigmoid"}, optional
        For a single file: the noise schedule; by default the preset's or the file's own, or else linear, or sigmoid for
        lucidrains' layout (its default). Required if
        the shapes match a preset with another schedule and no preset is given.
    timesteps : int, optional
        For a single file: T, the number of timesteps in training (`diffusion_steps` of guided-diffusion); by default
        the preset's or the file's own, or else 1000.
    rescale_timesteps : bool, default False
        For a single file with `timesteps`: the network was given t * 1000 / T (`rescale_timesteps`, on in
        improved-diffusion, off in guided-diffusion). The model then has 1000 timesteps at the same noise levels.
    prediction : {"epsilon", "v_prediction", "sample"}, optional
        For a single file: what the network predicts; by default inferred from the loss weights in the file;
        otherwise the noise, or v for lucidrains' layout.
    **condition
        Of a conditional model: `prompt`, `negative_prompt`, `label`, `condition`, `negative` and `guidance_scale`, as
        in `Model.conditioned`, which can also be called later.

    Returns
    -------
    Model

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such model, the workbench can't split it at a bottleneck, or the condition does not fit.

    Warns
    -----
    UserWarning
        If the estimated memory exceeds the free memory, an average is loaded in place of other weights, or T is assumed
        for a single file.
    """
    target, path = find_device(device), paths.local(source)
    sizes = (preset, image_size, head_channels, heads, attention_order)
    settings = FileSettings(*sizes, schedule, timesteps, rescale_timesteps, prediction)
    if path.is_file():
        unet, scheduler = _read_file(path, target, settings)
        parts = {"unet": unet, "schedule": schedule_of(scheduler), "prediction": prediction_of(scheduler)}
        name = path.stem
    else:
        folder, name = _locate(source)
        given = next((option for option, value in vars(settings).items() if value), None)
        if given is not None:
            raise ValueError(f"{given} is for single files; {folder} has a config of its own")
        parts = _read_folder(folder, target)
    model = make_model(**parts, name=name, device=target, dtype=dtype)
    if condition:
        model = model.conditioned(**condition)
    if compile:
        compile_blocks(model, "default" if compile is True else compile)
    return model


def load_pipeline(
    source: str | Path, *, steps: int, guidance_scale: float, device: str | torch.device | None = None
) -> Callable[[str, int, int], torch.Tensor]:
    """Any pipeline of diffusers from text to images, as a function (prompt, n, seed) -> images in [-1, 1].

    Parameters
    ----------
    source : str or path
        Hub id or folder.
    steps, guidance_scale
        As the pipeline's own `num_inference_steps` and `guidance_scale`.
    device : str or torch.device, optional
        By default the best available.

    Raises
    ------
    ValueError
        If there is no such pipeline, or diffusers can't load it.
    """
    from diffusers import AutoPipelineForText2Image  # imports all of its pipelines

    paths.local(source)  # refuses addresses
    try:
        pipeline = AutoPipelineForText2Image.from_pretrained(source).to(find_device(device))
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"{source} is no pipeline from text to images that can be loaded ({reason})") from error
    pipeline.set_progress_bar_config(disable=True)

    def make(prompt: str, n: int, seed: int) -> torch.Tensor:
        images = []
        for i in range(n):
            noise = torch.Generator().manual_seed(seed + 2 * i)
            options = {"num_inference_steps": steps, "guidance_scale": guidance_scale, "output_type": "pt"}
            images.append(pipeline(prompt, generator=noise, **options).images)
        return 2 * torch.cat(images).float().cpu() - 1

    return make


def load_shapes(source: str | Path) -> SplitUNet:
    """The network of a model without its weights, on the device "meta": memory, FLOPs and shapes follow from it.

    `source` is as of `load_model`, or one of `layouts.HUB` or `layouts.PRESETS`, which need not be on this machine.
    """
    known = {**layouts.HUB, **{name: preset.architecture for name, preset in layouts.PRESETS.items()}}
    if source in known:
        return SplitUNet(_build(known[source].config(), path=Path("the preset"))).blank()
    if paths.local(source).is_file():
        raise ValueError(f"{source} is a file, and its network is unknown until it is read; convert it first")
    files = checkpoints.find_model_files(_locate(source)[0])
    return SplitUNet(_build(checkpoints.read_json(files.unet_config), path=files.unet_config)).blank()


def load_image_shape(source: str | Path) -> tuple[int, int, int]:
    """(C, H, W) of a model's images, decoded where it is latent, without its weights; `source` as of `load_shapes`."""
    shape = load_shapes(source).x_shape
    if source in layouts.HUB or source in layouts.PRESETS:
        return shape
    files = checkpoints.find_model_files(_locate(source)[0])
    if files.vae_config is None:
        return shape
    config = checkpoints.read_json(files.vae_config)
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return (config.get("out_channels", 3), shape[1] * factor, shape[2] * factor)


def load_schedule(source: str | Path) -> NoiseSchedule:
    """The noise schedule of a model's folder, without its weights; `source` is as of `load_model`, but no file."""
    return schedule_of(_read_scheduler(checkpoints.find_model_files(_locate(source)[0]).scheduler_config))


def convert_checkpoint(file: str | Path, out: str | Path, **options: str | int | None) -> Path:
    """Convert a single file to a diffusers folder in safetensors, which loads fast and is safe to share.

    Parameters
    ----------
    file : path
        In one of the layouts of `load_model`.
    out : path
        New folder, written atomically.
    **options
        `preset`, `image_size`, `head_channels`, `heads`, `attention_order`, `schedule`, `timesteps`,
        `rescale_timesteps` and `prediction`, as in `load_model`.

    Returns
    -------
    Path
        The folder, for `load_model`.

    Raises
    ------
    FileExistsError
        If `out` exists already.
    FileNotFoundError, ValueError
        If there is no such file, or it can't be converted.
    """
    file, out = paths.local(file), paths.writable(out, folder=True)
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}; give a .ckpt, .pt, .pth or .safetensors file")
    if out.exists():
        raise FileExistsError(f"{out} exists already; give a new folder")
    unet, scheduler = _read_file(file, torch.device("cpu"), FileSettings(**options))
    SplitUNet(unet)  # refuses what could not be loaded again
    with written(out, folder=True) as partial:
        write_parts(unet, scheduler, partial)
    return out


def write_parts(unet: torch.nn.Module, scheduler: DDPMScheduler, folder: Path) -> None:
    """Write a network and its noise schedule as a model folder; a text encoder has to be beside them already."""
    if type(unet) is UNet2DModel:
        DDPMPipeline(unet, scheduler).save_pretrained(folder)
        return
    # diffusers has no pipeline for it, so it can't load the folder as one
    unet.save_pretrained(folder / "unet")
    scheduler.save_pretrained(folder / "scheduler")
    if isinstance(unet, UNet2DConditionModel):
        parts = {"unet": "diffusers", "scheduler": "diffusers", "text_encoder": "transformers"}
        index = {name: [library, ""] for name, library in {**parts, "tokenizer": "transformers"}.items()}
        (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")


def list_models() -> list[dict]:
    """List the models that load offline: bundled ones and those in the local hub cache.

    Returns
    -------
    list of dict
        With "name", "where" ("bundled" or "hub cache"), "images" (C, H, W) and "path".
    """
    found = [("bundled", name, paths.models() / name) for name in bundled_names()]
    try:
        cached = [repository for repository in scan_cache_dir().repos if repository.revisions]
    except CacheNotFound:
        cached = []
    for repository in sorted(cached, key=lambda each: each.repo_id):
        path = max(repository.revisions, key=lambda revision: revision.last_modified).snapshot_path
        if has_unet(path):
            found.append(("hub cache", repository.repo_id, path))
    return [
        {"name": name, "where": where, "images": _image_shape(_unet_config(path)), "path": str(path)}
        for where, name, path in found
    ]


def bundled_names() -> list[str]:
    """Names of the bundled models."""
    return [path.name for path in sorted(paths.models().glob("*")) if has_unet(path)]


def has_unet(folder: Path) -> bool:
    """Whether a folder describes a U-Net of diffusers."""
    try:
        return _unet_config(folder).get("_class_name") in CLASSES
    except ValueError:  # somebody else's malformed file is no model of ours
        return False


def _unet_config(folder: Path) -> dict:
    """Config of the folder's U-Net; empty if it has none."""
    config = checkpoints.find_unet_config(folder)
    return {} if config is None else checkpoints.read_json(config)


def _image_shape(config: dict) -> tuple[int, int, int]:
    size = config.get("sample_size")
    return (config.get("in_channels", 3), *(size if isinstance(size, list) else (size, size)))


def verify(model: Model, reference: str) -> float:
    """Largest difference of a model's eps from the values that its authors' library printed (see `golden`).

    Up to `golden.TOLERANCE` the model is the network of that hub id.
    """
    if reference not in golden.EPS:
        raise ValueError(f"there are no reference values for {reference!r}; there are for {', '.join(golden.EPS)}")
    architecture = layouts.HUB[reference]
    if model.x_shape != (architecture.in_channels, architecture.image_size, architecture.image_size):
        raise ValueError(f"{model.name} has x_t of shape {model.x_shape}, unlike {reference}")
    noise = golden.noise(model.x_shape).to(model.device)
    with torch.inference_mode():
        eps = model(noise, golden.T)[0, 0, 0, : golden.COUNT].cpu()
    return float((eps - torch.tensor(golden.EPS[reference])).abs().max())


def _read_folder(folder: Path, device: torch.device) -> dict:
    """Parts of a model, as `make_model` takes them."""
    files = checkpoints.find_model_files(folder)
    scheduler = _read_scheduler(files.scheduler_config)
    config = checkpoints.read_json(files.unet_config)
    unet = _build(config, path=files.unet_config)
    _warn_if_short_of_memory(_need_of(unet), folder, device)
    raw = files.unet_config.parent.with_name("unet")
    if files.unet_config.parent == folder / "unet_ema" and raw.is_dir():
        text = f"{folder} has a moving average, unet_ema, which is loaded; for the last weights themselves give {raw}"
        warnings.warn(text, stacklevel=3)
    _load_weights(unet, files.weights)
    parts = {"unet": unet, "schedule": schedule_of(scheduler), "prediction": prediction_of(scheduler)}
    if files.vae_config is not None:
        parts["vae"] = _build(checkpoints.read_json(files.vae_config), path=files.vae_config, classes=AUTOENCODERS)
        _load_weights(parts["vae"], files.vae_weights)
    if files.text is not None:
        parts["text"] = TextEncoder(files.text)
    return parts


def _load_weights(module: torch.nn.Module, files: Sequence[Path]) -> None:
    state = {name: tensor for file in files for name, tensor in checkpoints.read_state_dict(file).items()}
    checkpoints.load_strictly(module, state, path=files[0], assign=True)


def _read_scheduler(path: Path) -> DDPMScheduler:
    """The scheduler that a scheduler_config.json describes, by its keys of today or of old versions."""
    config = checkpoints.read_json(path)
    if config.get("trained_betas") is None and "beta_schedule" not in config:
        kind = config.get("_class_name", "an unnamed scheduler")
        raise ValueError(f"{path} describes {kind}, which has no betas; the workbench takes those of DDPM and DDIM")
    if isinstance(config.get("timesteps"), int):
        config.setdefault("num_train_timesteps", config["timesteps"])
    if config.get("predict_epsilon") is False:
        config["prediction_type"] = "sample"
    try:
        with _quiet():
            try:
                scheduler = DDIMScheduler.from_config(config)
            except NotImplementedError:  # it has fewer kinds of betas
                scheduler = DDPMScheduler.from_config(config)
        schedule_of(scheduler)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} has no noise schedule that can be used: {error}") from error
    return cast(DDPMScheduler, scheduler)


def _read_file(path: Path, device: torch.device, given: FileSettings) -> tuple[torch.nn.Module, DDPMScheduler]:
    """The network and scheduler of a single file."""
    schedule, timesteps, prediction, sizes = given.schedule, given.timesteps, given.prediction, given.sizes
    if given.rescale_timesteps and timesteps is None:
        raise ValueError("rescale_timesteps needs the number of timesteps; give timesteps, such as 4000")
    if prediction is not None:
        one_of("prediction", prediction, PREDICTIONS)
    if given.preset is not None and sizes:
        raise ValueError(f"a preset sets {next(iter(sizes))}; give one of the two")
    name = layouts.find_preset(given.preset, "" if sizes else path.name)
    known = layouts.PRESETS.get(name)
    if known is not None and schedule is None and timesteps is not None and known.schedule != layouts.LINEAR:
        raise ValueError(f"the preset of {path} has a noise schedule of its own; give schedule with timesteps")
    _warn_if_short_of_memory(MemoryNeed(path.stat().st_size, 0), path, torch.device("cpu"))
    checkpoint = checkpoints.read_checkpoint(path)
    whose, usual = "the architecture" if known is None else f"the preset {name!r}", "linear"
    try:
        if known is None and checkpoint.layout == "lucidrains":
            config, usual = lucidrains.infer(checkpoint.state, **sizes), "sigmoid"
            state = lucidrains.convert(checkpoint.state, config)
            prediction = prediction or _prediction_of(checkpoint, path)
        else:
            if known is not None and known.architecture.layout != checkpoint.layout:
                layout = known.architecture.layout
                raise ValueError(f"its weights are in the layout {checkpoint.layout!r}, those of {whose} in {layout!r}")
            state = layouts.by_our_names(checkpoint.state, checkpoint.layout)
            architecture = known.architecture if known else layouts.infer(state, checkpoint.layout, **sizes)
            if known is None and schedule is None and checkpoint.betas is None:
                layouts.refuse_unknown_schedule(architecture)
            config, state = architecture.config(), layouts.split_attention(state, architecture)
        unet = _build(config, path=path)
        _warn_if_short_of_memory(_need_of(unet), path, device)
    except (ValueError, RuntimeError) as error:  # torch's, of heads that do not fit
        raise ValueError(f"{path} can't be loaded: {error}") from error
    checkpoints.load_strictly(unet, state, path=path, whose=whose, assign=True)
    told = schedule is None and timesteps is None
    if told and known is not None:
        noise = known.schedule
    elif told and checkpoint.betas is not None:
        noise = {"trained_betas": checkpoint.betas.tolist(), "num_train_timesteps": len(checkpoint.betas)}
    else:
        T = 1000 if timesteps is None else timesteps
        noise = layouts.noise_schedule(schedule or usual, T, rescaled=given.rescale_timesteps)
        if known is None and timesteps is None:
            text = f"{path.name} does not tell how many timesteps its network was trained on; 1000 are assumed, of the"
            remedy = "give timesteps= and schedule= for others, and rescale_timesteps= for improved-diffusion's"
            warnings.warn(f"{text} {schedule or usual} schedule; {remedy}", stacklevel=3)
    variance = "learned_range" if config["out_channels"] == 2 * config["in_channels"] else "fixed_small"
    kinds = {"prediction_type": prediction or "epsilon", "variance_type": variance}
    return unet, DDPMScheduler(**noise, **kinds, clip_sample=False)


def _prediction_of(checkpoint: checkpoints.Checkpoint, path: Path) -> str:
    """Kind of prediction of a file in lucidrains' layout; v, its library's default, with a warning if it is unknown."""
    if checkpoint.betas is not None and checkpoint.loss_weight is not None:
        if told := lucidrains.predicted(checkpoint.betas, checkpoint.loss_weight):
            return told
    text = f"{path.name} does not tell what its network predicts; v is assumed, the default of its library"
    warnings.warn(f"{text}; give prediction='epsilon' for pred_noise or 'sample' for pred_x0", stacklevel=4)
    return "v_prediction"


def _build(config: dict, *, path: Path, classes: dict[str, type] = CLASSES) -> torch.nn.Module:
    """The network of a config, without values: the weights of a file take their place."""
    kind = config.get("_class_name", "an unnamed network")
    if kind not in classes:
        raise ValueError(f"{path} describes {kind}; the workbench takes {' and '.join(classes)}")
    try:
        with _quiet(), torch.device("meta"):
            return classes[kind].from_config(config)
    except (TypeError, ValueError, LookupError, AttributeError, RuntimeError, ArithmeticError) as error:
        raise ValueError(f"{path} does not describe a U-Net that diffusers can build ({error})") from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without diffusers' warnings of config keys that it does not know; what does not fit shows with the weights."""
    level = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        diffusers_logging.set_verbosity(level)


def _need_of(unet: UNet2DModel) -> MemoryNeed:
    """Memory that a network without values will need; refuses what can't be split or can't compute."""
    split = SplitUNet(unet).blank()
    try:
        return estimate_memory(split)
    except (RuntimeError, ValueError, TypeError, IndexError, ArithmeticError) as error:
        reason, size = str(error).partition("\n")[0], unet.config.sample_size
        raise ValueError(f"this U-Net can't compute an image of its sample_size, {size} ({reason})") from error


def _warn_if_short_of_memory(need: MemoryNeed, path: Path, device: torch.device) -> None:
    """Say so before weights are read, where the model won't fit."""
    free = free_memory(device)
    if need.total > free:
        warnings.warn(
            f"{path} is estimated to need {need.total / 2**30:.1f} GiB ({need.weights / 2**30:.1f} of weights, the "
            f"rest for one image), and {free / 2**30:.1f} GiB are free on {device}; it may fail or be very slow",
            stacklevel=4,
        )


def _locate(source: str | Path) -> tuple[Path, str]:
    """Folder and name of a model."""
    if isinstance(source, str) and source in bundled_names():
        return paths.models() / source, source
    path = paths.local(source)
    if path.is_dir():
        return path, path.resolve().name
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        folder = fetch(source, *checkpoints.HUB_FILES, complete=checkpoints.is_complete, bundled=bundled_names())
        return folder, source
    raise FileNotFoundError(
        f"no model {str(path)!r}; bundled: {', '.join(bundled_names()) or 'none'}; otherwise give a diffusers "
        "folder, a .ckpt or .pt file, or a hub id such as google/ddpm-ema-celebahq-256"
    )
