"""Models of the Hugging Face hub, from its local cache first."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import cast

from huggingface_hub import snapshot_download

from workbench import paths

CLIP = "openai/clip-vit-base-patch32"
"""What "clip" stands for."""


def find_folder(source: str | Path, *, bundled: Iterable[str] = ()) -> Path:
    """Folder of a model of transformers: a folder, a name below data/models, a hub id; "clip" is `CLIP`."""
    for path in (paths.local(source), paths.models() / source):
        if path.is_dir():
            return path
    if source != "clip" and not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise FileNotFoundError(
            f"there is no {paths.local(source)}; give a folder, or the id of a repository of the hub"
        )
    kinds = ("*.safetensors", "pytorch_model*.bin")  # pickled weights are read without executing them
    return fetch(
        CLIP if source == "clip" else str(source),
        *(("*.json", "*.txt", weights) for weights in kinds),
        complete=lambda folder: any(path for kind in kinds for path in folder.glob(kind)),
        bundled=bundled,
    )


def fetch(repository: str, *choices: Sequence[str], complete: Callable[[Path], bool], bundled: Iterable[str]) -> Path:
    """Folder of a hub repository, from the local cache if it is complete there, else fetched.

    Parameters
    ----------
    repository : str
    *choices : sequence of str
        Patterns of files to fetch together; a later choice is for repositories where an earlier one is not complete.
    complete : callable
        Whether a folder has all that is needed. What is fetched and still incomplete is returned: loading it says why.
    bundled : iterable of str
        Names that the error message proposes.

    Raises
    ------
    FileNotFoundError
        If it is not in the cache and can't be fetched.
    """
    folder = None
    # The cache first: it answers at once, where an unreachable hub takes many seconds to give up.
    for local in (True, False):
        try:
            for patterns in choices:
                folder = Path(snapshot_download(repository, allow_patterns=list(patterns), local_files_only=local))
                if complete(folder):
                    return folder
            reason = None
        except (OSError, ValueError, RuntimeError) as error:
            reason = error
    if reason is None:
        return cast(Path, folder)
    raise FileNotFoundError(
        f"{repository!r} is neither a local folder nor in the hub cache, and it can't be fetched now "
        f"({type(reason).__name__}); bundled: {', '.join(bundled)}; on a machine with a network run "
        f"`hf download {repository}` and copy the folder here, or set HF_HOME to its cache"
    ) from reason
