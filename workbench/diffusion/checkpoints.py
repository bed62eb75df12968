"""Reading model folders from disk: which files there are, what they hold, and whether they are sound.

Nothing here executes a pickle: weights are safetensors, or a `.bin` file read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

WEIGHTS = ("diffusion_pytorch_model.safetensors", "diffusion_pytorch_model.bin")
HUB_FILES = ["*config.json", "model_index.json", "*diffusion_pytorch_model.safetensors", "*diffusion_pytorch_model.bin"]

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers model folder: where its U-Net's config and weights and its scheduler's config are."""

    path: Path
    unet_config: Path
    weights: Path
    scheduler_config: Path


def find_model_files(folder: str | Path) -> ModelFolder:
    """Find the parts of a diffusers DDPM folder.

    Parameters
    ----------
    folder : path
        Either with `unet/` and `scheduler/`, or flat with `config.json` and `scheduler_config.json`, as the
        google/ddpm-* repositories have.

    Raises
    ------
    FileNotFoundError
        If a part is missing; the message names it.
    ValueError
        If the folder holds a latent-diffusion model.
    """
    folder = Path(folder)
    _refuse_latent_models(folder)
    unet = folder / "unet" if (folder / "unet").is_dir() else folder
    scheduler = folder / "scheduler" if (folder / "scheduler").is_dir() else folder
    config = unet / "config.json"
    if not config.is_file():
        raise FileNotFoundError(
            f"{folder} has no unet/config.json and no config.json; a diffusers model folder has one of them beside "
            f"its weights ({WEIGHTS[0]})"
        )
    weights = next((unet / name for name in WEIGHTS if (unet / name).is_file()), None)
    if weights is None:
        raise FileNotFoundError(f"{unet} has a config.json but no weights; expected {WEIGHTS[0]} (or .bin)")
    schedule = scheduler / "scheduler_config.json"
    if not schedule.is_file():
        raise FileNotFoundError(f"{folder} has no scheduler_config.json, so its noise schedule is unknown")
    return ModelFolder(folder, config, weights, schedule)


def _refuse_latent_models(folder: Path) -> None:
    index = folder / "model_index.json"
    parts = set(read_json(index)) if index.is_file() else set()
    latent = sorted(parts & {"vae", "vqvae", "text_encoder", "movq", "image_encoder"})
    if latent:
        raise ValueError(
            f"{folder} is a latent-diffusion model (it has {', '.join(latent)}); the workbench takes unconditional "
            "models that denoise pixels, such as google/ddpm-ema-celebahq-256"
        )


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
    """Weights from a safetensors or `.bin` file, with the attention layers' old names brought up to date.

    Raises
    ------
    ValueError
        If the file is truncated or not a weights file, or if a weight is NaN or infinite.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"{path} can't be read as weights; it is truncated or of another kind ({reason})") from error
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} should hold weights by name, as diffusers saves them, and holds something else")
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{path} has NaN or infinite weights: {bad} of {tensor.numel()} values of {name}")
    return {_new_name(name): tensor for name, tensor in state.items()}


def _new_name(name: str) -> str:
    old = r"(attentions\.\d+)\.(query|key|value|proj_attn)\."
    return re.sub(old, lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], *, path: Path) -> None:
    """Load weights into a module; every key and shape must fit.

    Raises
    ------
    ValueError
        Naming the first weight that does not fit the config.
    """
    expected = module.state_dict()
    for name, tensor in expected.items():
        if name not in state:
            raise ValueError(f"{path} does not fit its config.json: {name} {tuple(tensor.shape)} is missing")
        if state[name].shape != tensor.shape:
            raise ValueError(
                f"{path} does not fit its config.json: {name} is {tuple(state[name].shape)} in the file "
                f"and {tuple(tensor.shape)} in the config"
            )
    extra = sorted(set(state) - set(expected))
    if extra:
        raise ValueError(f"{path} does not fit its config.json: {extra[0]} has no place in the network")
    module.load_state_dict(state)


def hash_weights(module: torch.nn.Module) -> str:
    """Content hash of a module's weights: 16 hexadecimal digits of a SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
