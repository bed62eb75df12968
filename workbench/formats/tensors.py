"""Files of tensors with a JSON header and a checksum: directions, boundaries, grids of edits, cells of a benchmark."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.io import as_json, written
from workbench.paths import local

VERSION = "1"


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], about: dict, *, kind: str) -> Path:
    """Write tensors to a safetensors file, with `about` as JSON in its header; whole or not at all."""
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header = {
        "format": f"hspace-{kind}",
        "version": VERSION,
        kind: as_json({**about, "sha256": digest(tensors)}),
    }
    with written(path) as partial:
        save_file(tensors, partial, metadata=header)
    return local(path)


def load_tensors(path: str | Path, *, kind: str) -> tuple[dict[str, torch.Tensor], dict]:
    """Tensors and header that `save_tensors` wrote; FileNotFoundError, or ValueError for any other or damaged file."""
    path = local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no {kind} at {path}")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        about = json.loads(header.get(kind, "{}"))
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        reason = f"{type(error).__name__}; it is truncated or of another kind"
        raise ValueError(f"{path} can't be read as a {kind} ({reason})") from error
    if not about:
        raise ValueError(f"{path} is a safetensors file but no {kind.replace('_', ' ')} of the workbench")
    if header.get("version", VERSION) != VERSION:
        raise ValueError(f"{path} has {kind} format {header['version']}, this version reads {VERSION}")
    # Grids of edits had no checksum up to version 0.1.
    if about.pop("sha256", None) not in (None, digest(tensors)):
        raise ValueError(f"{path} is corrupt: its values don't match their checksum; make the {kind} again")
    return tensors, about


def kind_of(path: str | Path) -> str | None:
    """The kind of a file that `save_tensors` wrote; None for any other."""
    try:
        with safe_open(local(path), framework="pt") as file:
            return (file.metadata() or {}).get("format", "").removeprefix("hspace-") or None
    except (SafetensorError, OSError):
        return None


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of named tensors, in hex."""
    checksum = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        checksum.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        checksum.update(tensor.numpy().data)
    return checksum.hexdigest()
