"""Read models from disk, as folders or single files, and check them.

Nothing here executes a pickle: weights are safetensors, or a `.bin` file read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import re
import textwrap
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from workbench.formats.layouts import NAMES
from workbench.paths import local

WEIGHTS = "diffusion_pytorch_model.safetensors"
_DESCRIBED = ["*config.json", "model_index.json", "tokenizer/*", "*.safetensors.index.json"]
HUB_FILES = (
    [*_DESCRIBED, "*diffusion_pytorch_model.safetensors", "text_encoder/model*.safetensors"],
    [*_DESCRIBED, "*diffusion_pytorch_model*", "text_encoder/model*", "text_encoder/pytorch_model*"],
)
"""Files of a repository of the hub to fetch: whole safetensors alone, or all weights where that is not enough."""

_WEIGHT_FILES = re.compile(
    r"diffusion_pytorch_model(\.(?P<before>[a-zA-Z_]\w*))?(-\d+-of-(?P<shards>\d+))?(\.(?P<after>[a-zA-Z_]\w*))?"
    r"\.(?P<kind>safetensors|bin)"
)
"""Names that diffusers writes: whole or in shards, each also of a variant such as fp16."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}

_OTHER_PARTS = {
    "transformer": "a diffusion transformer (DiT, Stable Diffusion 3, Flux), which has no bottleneck",
    "text_encoder_2": "of the kind of SDXL, with two text encoders",
    **dict.fromkeys(("prior", "movq", "image_encoder", "controlnet"), "conditioned on images"),
}
"""Parts of pipelines that the workbench does not take, and what they mean."""


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers model folder: where its parts are.

    Attributes
    ----------
    unet_config : Path
    weights : tuple of Path
        One file, or shards.
    scheduler_config : Path
    vae_config : Path or None
        Of the autoencoder of a latent diffusion model.
    vae_weights : tuple of Path
    text : Path or None
        The folder itself, if it has a text encoder and its tokenizer.
    """

    unet_config: Path
    weights: tuple[Path, ...]
    scheduler_config: Path
    vae_config: Path | None = None
    vae_weights: tuple[Path, ...] = ()
    text: Path | None = None


def find_model_files(folder: str | Path) -> ModelFolder:
    """Find the parts of a diffusers DDPM folder; a FileNotFoundError names the one that is missing.

    The folder has `unet/` and `scheduler/`, or is flat with `config.json` and `scheduler_config.json`, as the
    google/ddpm-* repositories are. `unet_ema/`, the moving average of a training, goes before `unet/`; what lies in a
    training's folder (`unet/`, `checkpoint-500/`) has its scheduler there.
    """
    folder = local(folder)
    whole = next((place for place in _places(folder) if (place / "model_index.json").is_file()), folder)
    index = whole / "model_index.json"
    parts = read_json(index) if index.is_file() else {}
    if other := next((part for part in _OTHER_PARTS if parts.get(part) not in (None, [None, None])), None):
        raise ValueError(f"{folder} is {_OTHER_PARTS[other]} (it has {other}), which is not supported")
    config = find_unet_config(folder)
    if config is None:
        raise FileNotFoundError(f"{folder} has no unet/config.json and no config.json; it is no diffusers model folder")
    found = ModelFolder(config, _find_weights(config.parent), _find_scheduler(folder))
    if vae := next((part for part in ("vae", "vqvae") if part in parts), None):
        config = whole / vae / "config.json"
        if not config.is_file():
            raise FileNotFoundError(f"{whole} lacks {vae}/config.json, its autoencoder")
        found = replace(found, vae_config=config, vae_weights=_find_weights(config.parent))
    if parts.get("text_encoder") not in (None, [None, None]):
        for part in ("text_encoder/config.json", "tokenizer"):
            if not (whole / part).exists():
                raise FileNotFoundError(f"{whole} lacks {part}, which encodes its prompts")
        found = replace(found, text=whole)
    return found


def is_complete(folder: Path) -> bool:
    """Whether no part of a model folder is missing; what else is wrong with it shows when it is loaded."""
    try:
        find_model_files(folder)
    except (FileNotFoundError, ValueError) as error:
        return isinstance(error, ValueError)
    return True


def find_unet_config(folder: Path) -> Path | None:
    """Config of the U-Net in a model folder, of its moving average where there is one; None if there is neither."""
    parts = (folder / "unet_ema", folder / "unet", folder)
    return next((part / "config.json" for part in parts if (part / "config.json").is_file()), None)


def _find_weights(folder: Path) -> tuple[Path, ...]:
    """Weights without a variant before those of one, safetensors before `.bin`, and one file before shards."""
    found: dict[tuple, dict[str, Path]] = {}
    for path in folder.iterdir():
        if name := _WEIGHT_FILES.fullmatch(path.name):
            variant = name["before"] or name["after"] or ""
            key = ("non_ema" in variant, variant, name["kind"] == "bin", int(name["shards"] or 0))
            found.setdefault(key, {})[path.name] = path
    if not found:
        raise FileNotFoundError(f"{folder} has a config.json but no weights; expected {WEIGHTS} (or .bin, or shards)")
    (*_, shards), files = min(found.items())
    for i in range(1, shards + 1):
        if (wanted := re.sub(r"-\d+-of", f"-{i:05d}-of", min(files))) not in files:
            raise FileNotFoundError(f"{folder} lacks {wanted}, one of {shards} files that its weights are in")
    return tuple(path for _, path in sorted(files.items()))


def _places(folder: Path) -> Iterator[Path]:
    """The folder, and what it is a part of: a pipeline's around `unet/`, a training's around `checkpoint-500/`."""
    yield folder
    while re.fullmatch(r"unet|unet_ema|checkpoint-\d+", folder.resolve().name):
        folder = folder.resolve().parent
        yield folder


def _find_scheduler(folder: Path) -> Path:
    names = ("scheduler/scheduler_config.json", "scheduler_config.json")
    found = next((place / name for place in _places(folder) for name in names if (place / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(f"{folder} has no scheduler_config.json, so its noise schedule is unknown")
    return found


def read_json(path: Path) -> dict:
    """A JSON object from a file; ValueError naming the file if it is not one."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(content).__name__}")
    return content


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """Finite weights from a safetensors or `.bin` file, with the attention layers' old names brought up to date."""
    state = read_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} should hold weights by name, as diffusers saves them, and holds something else")
    _check_finite(state, path)
    old = r"(attentions\.\d+)\.(query|key|value|proj_attn)\."
    return {re.sub(old, lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name): tensor for name, tensor in state.items()}


def read_tensors(path: Path) -> object:
    """Content of a safetensors file or of a file of `torch.save`, which is read without executing anything.

    A ValueError shows how a file begins that is truncated or of another kind, such as a pointer or a server's message
    in its place, and names objects that are no tensors, numbers or texts.
    """
    with path.open("rb") as file:
        head = file.read(512)
    try:
        # A safetensors file begins with the length of a header and the header, a JSON object.
        if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 100_000_000:
            # Not the file's own pages, which change with it.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        with path.open("rb") as file:  # by its name, torch takes a renamed file for safetensors
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # of many kinds, by what the readers take other bytes for
        refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if refused is not None:
            reason = f" without running code: it holds a {refused[1]} beside them; save the state dict alone"
        else:  # torch's own text advises to run what the file holds
            what = f"it is truncated or of another kind ({type(error).__name__}), and begins with {head[:48]!r}"
            reason = f"; {what}: download or copy the file itself again"
        raise ValueError(f"{path} can't be read as weights{reason}") from error


def _check_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{path} has NaN or infinite weights: {bad} of {tensor.numel()} values of {name}")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a single file, in the layout "ddpm", "guided" or "lucidrains", by their names in it without prefixes.

    `betas` are the noise schedule and `loss_weight` the weight of the loss at every timestep, where the file has them.
    """

    layout: str
    state: dict[str, torch.Tensor] = field(repr=False)
    betas: torch.Tensor | None = field(default=None, repr=False)
    loss_weight: torch.Tensor | None = field(default=None, repr=False)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Find a U-Net in a `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file, whatever it is wrapped in.

    Of a training's last weights and their moving average, the average is taken; where there is none, a UserWarning says
    so. A ValueError names a file without a network that the workbench knows.
    """
    path = local(path)
    content = read_tensors(path)
    states = list(_state_dicts(content))
    names = [name for _, state in states for name in state]
    parts = ("first_stage_model.", "cond_stage_model.", "vae.", "text_encoder.")
    if latent := [name for name in names if name.startswith(parts) or ".transformer_blocks." in name]:
        what = f"a whole latent or text-conditional model in one file (it has {latent[0]})"
        raise ValueError(
            f"{path} is {what}; give its hub id, or a folder that diffusers makes of it: "
            f"StableDiffusionPipeline.from_single_file({str(path)!r}).save_pretrained(FOLDER)"
        )
    found = [
        (where, name.removesuffix(anchor), layout, state)
        for where, state in states
        for name in state
        for layout, anchor in NAMES["anchors"].items()
        if re.fullmatch(rf"(.*\.)?{re.escape(anchor)}", name)
    ]
    if not found:
        found = ", ".join(names[:3]) or "no tensors by name"
        raise ValueError(
            f"{path} holds no network that is known ({found}); the workbench reads those of the original DDPM "
            "(temb.dense.0 ...), of guided-diffusion and of denoising-diffusion-pytorch"
        )
    where, prefix, layout, state = max(found, key=lambda candidate: _is_average(candidate[0] + candidate[1]))
    if layout == "diffusers":
        raise ValueError(f"{path} is a single file; give a diffusers model folder (unet/ + scheduler/) or a hub id")
    if not _is_average(where + prefix) and _is_training(content):
        text = f"{path.name} has no moving average (EMA) of the weights; samples of a training's last ones are worse"
        warnings.warn(text, stacklevel=2)
    # Counters, such as an average's number of updates, have no dimension.
    inside = {n.removeprefix(prefix): w for n, w in state.items() if n.startswith(prefix) and w.ndim > 0}
    _check_finite(inside, path)
    buffers = [(name.rpartition(".")[2], tensor) for _, state in states for name, tensor in state.items()]
    betas = [each for name, each in buffers if name == "betas" and each.ndim == 1 and len(each) > 1]
    sound = (each for each in betas if ((each > 0) & (each < 1)).all())
    loss_weight = next((each for name, each in buffers if name == "loss_weight"), None)
    return Checkpoint(layout, inside, next(sound, None), loss_weight)


def _state_dicts(content: object, where: str = "") -> Iterator[tuple[str, dict[str, torch.Tensor]]]:
    """Every mapping of names to tensors in a file, with the names of the wrappers that it is in."""
    if isinstance(content, Mapping):
        tensors = {k: v for k, v in content.items() if isinstance(k, str) and isinstance(v, torch.Tensor)}
        if tensors:
            yield where, _with_dots(tensors)
        inside = content.items()
    elif isinstance(content, (list, tuple)):
        # DDIM's training writes a list: weights, optimiser, epoch, step and the moving average.
        inside = ((("ema" if i == 4 else i), part) for i, part in enumerate(content))
    else:
        return
    for name, part in inside:
        yield from _state_dicts(part, f"{where}{name}.")


def _with_dots(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The moving average of Lightning models has names without dots; those of the model itself say where they go."""
    inside = [name.removeprefix("model.") for name in state if name.startswith("model.")]
    dotted = {f"model_ema.{name.replace('.', '')}": f"model_ema.{name}" for name in inside}
    return {dotted.get(name, name): tensor for name, tensor in state.items()}


def _is_average(where: str) -> bool:
    # The ema of ema-pytorch holds the weights as they are beside their average.
    return re.search(r"ema|shadow|average", where.lower()) is not None and "online" not in where.lower()


def _is_training(content: object) -> bool:
    """Whether a file is a training's own checkpoint, rather than weights alone."""
    if isinstance(content, (list, tuple)):
        return True
    parts = {"optimizer", "optimizer_states", "optimizer_state_dict", "pytorch-lightning_version", "epoch", "step"}
    return isinstance(content, Mapping) and not parts.isdisjoint(content)


def load_strictly(
    module: torch.nn.Module,
    state: dict[str, torch.Tensor],
    *,
    path: Path,
    whose: str = "its config.json",
    assign: bool = False,
) -> None:
    """Load weights into a module; a ValueError names the weights that do not fit, and who asks for their shapes.

    With `assign` the module takes the tensors themselves and no second copy of them is made; it may then be one without
    values, on the device "meta".
    """
    try:
        module.load_state_dict(state, assign=assign)
    except RuntimeError as error:
        reasons = str(error).partition("\n")[2]
        raise ValueError(f"{path} does not fit {whose}: {textwrap.shorten(reasons, 300)}") from error


def hash_weights(module: torch.nn.Module) -> str:
    """Content hash of a module's weights: 16 hexadecimal digits of a SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
