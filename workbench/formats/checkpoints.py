"""Reading models from disk, folders and single files: what they hold, and whether it is sound.

Nothing here executes a pickle: weights are safetensors, or a `.bin` file read with `weights_only=True`.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from workbench.formats.layouts import ANCHORS
from workbench.paths import local

WEIGHTS = "diffusion_pytorch_model.safetensors"
HUB_FILES = ["*config.json", "model_index.json", "*diffusion_pytorch_model*"]

_WEIGHT_FILES = re.compile(
    r"diffusion_pytorch_model(\.(?P<before>[a-zA-Z_]\w*))?(-\d+-of-(?P<shards>\d+))?(\.(?P<after>[a-zA-Z_]\w*))?"
    r"\.(?P<kind>safetensors|bin)(\.index(\.(?P<index>\w+))?\.json)?"
)
"""Names that diffusers writes: whole, in shards or as their index, each also of a variant such as fp16."""

_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


@dataclass(frozen=True)
class ModelFolder:
    """A diffusers model folder: where its U-Net's config and weights (one file, or shards) and its scheduler are."""

    path: Path
    unet_config: Path
    weights: tuple[Path, ...]
    scheduler_config: Path


def find_model_files(folder: str | Path) -> ModelFolder:
    """Find the parts of a diffusers DDPM folder.

    Parameters
    ----------
    folder : path
        Either with `unet/` and `scheduler/`, or flat with `config.json` and `scheduler_config.json`, as the
        google/ddpm-* repositories have. `unet_ema/`, the moving average of a training, goes before `unet/`; what lies
        in a training's folder (`unet/`, `checkpoint-500/`) has its scheduler there. Weights are safetensors or `.bin`,
        whole or in shards; a variant such as fp16 is taken where there are no others.

    Raises
    ------
    FileNotFoundError
        If a part is missing; the message names it.
    ValueError
        If the folder holds a latent-diffusion model.
    """
    folder = local(folder)
    _refuse_latent_models(folder)
    config = find_unet_config(folder)
    if config is None:
        raise FileNotFoundError(
            f"{folder} has no unet/config.json and no config.json; a diffusers model folder has one of them beside "
            f"its weights ({WEIGHTS})"
        )
    return ModelFolder(folder, config, _find_weights(config.parent), _find_scheduler(folder))


def find_unet_config(folder: Path) -> Path | None:
    """Config of the U-Net in a model folder, of its moving average where there is one; None if there is neither."""
    parts = (folder / "unet_ema", folder / "unet", folder)
    return next((part / "config.json" for part in parts if (part / "config.json").is_file()), None)


def _find_weights(folder: Path) -> tuple[Path, ...]:
    found: dict[tuple, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if name := _WEIGHT_FILES.fullmatch(path.name):
            variant, sharded = name["before"] or name["after"] or name["index"] or "", name["shards"] is not None
            rank = 1 if ".index." in path.name else 2 * sharded
            key = (variant != "", "non_ema" in variant, variant, name["kind"] == "bin", rank, int(name["shards"] or 0))
            found.setdefault(key, []).append(path)
    if not found:
        raise FileNotFoundError(f"{folder} has a config.json but no weights; expected {WEIGHTS} (or .bin, or shards)")
    (*_, shards), files = min(found.items())
    if files[0].suffix == ".json":
        index = files[0]
        names = read_json(index).get("weight_map")
        if not isinstance(names, dict) or not names or not all(isinstance(name, str) for name in names.values()):
            raise ValueError(f"{index} does not say in which files the weights are (weight_map); download it again")
        files = [folder / Path(name).name for name in sorted(set(names.values()))]
    elif shards:
        files = [folder / re.sub(r"-\d+-of", f"-{i:05d}-of", files[0].name) for i in range(1, shards + 1)]
    missing = next((path.name for path in files if not path.is_file()), None)
    if missing is not None:
        raise FileNotFoundError(f"{folder} lacks {missing}, one of {len(files)} files that its weights are in")
    return tuple(files)


def _find_scheduler(folder: Path) -> Path:
    place = folder
    while True:
        for config in (place / "scheduler" / "scheduler_config.json", place / "scheduler_config.json"):
            if config.is_file():
                return config
        if re.fullmatch(r"unet|unet_ema|checkpoint-\d+", place.resolve().name) is None:
            raise FileNotFoundError(f"{folder} has no scheduler_config.json, so its noise schedule is unknown")
        place = place.resolve().parent


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
    state = read_tensors(path)
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"{path} should hold weights by name, as diffusers saves them, and holds something else")
    _check_finite(state, path)
    return {_new_name(name): tensor for name, tensor in state.items()}


def read_tensors(path: Path) -> object:
    """Content of a safetensors file or of a file of `torch.save`, which is read without executing anything.

    Raises
    ------
    ValueError
        If the file is truncated, of another kind, which is named, or holds objects that are no tensors, numbers or
        texts.
    """
    with path.open("rb") as file:
        head = file.read(512)
    if (kind := _other_kind(head, path)) is not None:
        raise ValueError(f"{path} can't be read as weights; it is {kind}")
    try:
        if _is_safetensors(head):
            # Not the file's own pages, which change with it.
            return {name: tensor.clone() for name, tensor in load_file(path).items()}
        with path.open("rb") as file:  # by its name, torch takes a renamed file for safetensors
            return torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError, OSError, KeyError, ValueError) as error:
        refused = re.search(r"(?:GLOBAL|Unsupported class) ([\w.]+)", str(error))
        if refused is not None:
            raise ValueError(
                f"{path} can't be read as weights without running code: it holds a {refused[1]} beside them; save the "
                "network's state dict alone with torch.save, where it was trained"
            ) from error
        # torch's own text advises to run what the file holds.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().partition("\n")[0]
        reason = type(error).__name__ if "weights_only" in reason else reason or type(error).__name__
        kind = "a pickle of another program" if head.startswith(_NEWER_PICKLES) else "of another kind"
        raise ValueError(f"{path} can't be read as weights; it is truncated or {kind} ({reason})") from error


_BEGINNINGS = {
    b"\x1f\x8b": "a gzip archive; unpack it",
    b"7z\xbc\xaf": "a 7z archive; unpack it",
    b"Rar!": "a RAR archive; unpack it",
    b"\xfd7zXZ": "an xz archive; unpack it",
    b"BZh": "a bzip2 archive; unpack it",
    b"\x28\xb5\x2f\xfd": "a zstd archive; unpack it",
    b"\x89HDF": "an HDF5 file, such as Keras writes, and not of PyTorch",
    b"\x93NUMPY": "a NumPy array and not of PyTorch",
    b"GGUF": "a GGUF file, whose networks are no U-Nets of pixels",
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"%PDF": "a PDF document",
}
"""How files begin that people give as weights."""

_NEWER_PICKLES = (b"\x80\x03", b"\x80\x04", b"\x80\x05")


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a header and the header, a JSON object."""
    return len(head) > 8 and head[8:9] == b"{" and 2 <= int.from_bytes(head[:8], "little") < 100_000_000


def _other_kind(head: bytes, path: Path) -> str | None:
    """What a file is that begins so, if it is no weights but came in their place."""
    if not head:
        return "empty; download or copy it again"
    if not any(head):
        return "nothing but zeros where it begins, as a download that was cut short leaves it; download it again"
    if head.startswith(b"PK"):
        return _kind_of_zip(path)
    if head[257:262] == b"ustar":
        return "a tar archive; unpack it"
    kind = next((kind for beginning, kind in _BEGINNINGS.items() if head.startswith(beginning)), None)
    if kind is not None or any(byte < 32 and byte not in b"\t\r\n\f" for byte in head):
        return kind
    text = head.decode("utf-8", "replace").lstrip("\ufeff \t\r\n")
    if text.startswith("version https://git-lfs"):
        return "a Git LFS pointer, which stands for the file; fetch the file itself with `git lfs pull`"
    if re.match(r"<(!doctype|html|head|body|\?xml|!--)", text, re.IGNORECASE):
        return "a web page, which a server sent in place of the file; download the file itself"
    shown = text.partition("\n")[0].strip()[:60]
    if text.startswith(("{", "[")):
        return f"a JSON text ({shown}), such as a server's message in place of the file; download the file itself"
    return f"a text ({shown}) and not of torch.save or safetensors"


def _kind_of_zip(path: Path) -> str | None:
    """What is in a zip archive that torch.save did not write; None for one of its own, and for what is cut short."""
    if not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    if any("/code/" in name for name in names):
        return "a TorchScript program, whose weights can't be read without it; save its state dict with torch.save"
    if any(name.endswith("/data.pkl") or name == "data.pkl" for name in names):
        return None
    return f"a zip archive (of {', '.join(names[:2]) or 'nothing'}); unpack it, and give the file or folder in it"


def _check_finite(state: Mapping[str, torch.Tensor], path: Path) -> None:
    for name, tensor in state.items():
        if not torch.isfinite(tensor).all():
            bad = int((~torch.isfinite(tensor)).sum())
            raise ValueError(f"{path} has NaN or infinite weights: {bad} of {tensor.numel()} values of {name}")


@dataclass(frozen=True)
class Checkpoint:
    """Weights of a single file.

    Attributes
    ----------
    path : Path
    layout : {"ddpm", "guided"}
        See `layouts`.
    state : dict of str -> Tensor
        By their names in the file, without prefixes.
    where : str
        What was taken off: wrapper and prefix, such as "state_dict.ema.".
    betas : Tensor of shape (T,), optional
        Noise schedule, where the file has it, as Lightning's do.
    """

    path: Path
    layout: str
    state: dict[str, torch.Tensor] = field(repr=False)
    where: str
    betas: torch.Tensor | None = field(default=None, repr=False)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Find a U-Net in a `.ckpt`, `.pt`, `.pth`, `.bin` or `.safetensors` file, whatever it is wrapped in.

    Where a file holds several (a training's last weights and their moving average), the average is taken.

    Raises
    ------
    ValueError
        If the file can't be read, holds no known network, a latent-diffusion model or diffusers' weights without
        their config, or has weights that are NaN or infinite.

    Warns
    -----
    UserWarning
        If the file comes from a training and has no moving average of the weights.
    """
    path = local(path)
    content = read_tensors(path)
    states = list(_state_dicts(content))
    names = [name for _, state in states for name in state]
    _refuse_latent_weights(names, path)
    found = [
        (where, name.removesuffix(anchor), layout, state)
        for where, state in states
        for name in state
        for layout, anchor in ANCHORS.items()
        if re.fullmatch(rf"(.*\.)?{re.escape(anchor)}", name)
    ]
    if not found:
        some = f"its first names are {', '.join(names[:3])}" if names else "it has no tensors by name"
        raise ValueError(
            f"{path} holds no network that the workbench knows ({some}); it reads the layouts of the original DDPM "
            "(temb.dense.0 ...) and of guided-diffusion (time_embed.0 ...), and diffusers' folders"
        )
    where, prefix, layout, state = max(found, key=lambda candidate: _is_average(candidate[0] + candidate[1]))
    if layout == "diffusers":
        raise ValueError(
            f"{path} is a single file; give a diffusers model folder (unet/ + scheduler/) or a hub id: its config.json "
            "says what these weights are"
        )
    if not _is_average(where + prefix) and _is_training(content):
        warnings.warn(
            f"{path.name} has no moving average (EMA) of the weights; these are the last ones of a training, whose "
            "samples are usually worse",
            stacklevel=2,
        )
    # Counters, such as an average's number of updates, have no dimension.
    inside = {n.removeprefix(prefix): w for n, w in state.items() if n.startswith(prefix) and w.ndim > 0}
    _check_finite(inside, path)
    betas = [tensor for _, state in states for name, tensor in state.items() if re.fullmatch(r"(.*\.)?betas", name)]
    sound = [each for each in betas if each.ndim == 1 and len(each) > 1 and ((each > 0) & (each < 1)).all()]
    return Checkpoint(path, layout, inside, where + prefix, sound[0] if sound else None)


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


def _refuse_latent_weights(names: list[str], path: Path) -> None:
    parts = ("first_stage_model.", "cond_stage_model.", "vae.", "text_encoder.")
    latent = next((name for name in names if name.startswith(parts) or ".transformer_blocks." in name), None)
    if latent is not None:
        raise ValueError(
            f"{path} is a latent-diffusion model (it has {latent}); the workbench takes unconditional models that "
            "denoise pixels, such as google/ddpm-ema-celebahq-256"
        )


def _new_name(name: str) -> str:
    old = r"(attentions\.\d+)\.(query|key|value|proj_attn)\."
    return re.sub(old, lambda m: f"{m[1]}.{_OLD_ATTENTION[m[2]]}.", name)


def load_strictly(module: torch.nn.Module, state: dict[str, torch.Tensor], *, path: Path, assign: bool = False) -> None:
    """Load weights into a module; every key and shape must fit.

    With `assign` the module takes the tensors themselves and no second copy of them is made; it may then be one without
    values, on the device "meta".

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
    module.load_state_dict(state, assign=assign)


def hash_weights(module: torch.nn.Module) -> str:
    """Content hash of a module's weights: 16 hexadecimal digits of a SHA-256 over names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        values = tensor.detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(values.shape)}".encode())
        digest.update(values.numpy().data)
    return digest.hexdigest()[:16]
