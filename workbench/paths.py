"""Where the project's folders are, and what is meant by a path that a user gives.

Notebooks run from any directory (papermill and nbval start their kernels in different places), so nothing in the
project uses a relative path: it asks here. Every function that takes a path asks `place` or `local` what it means.
"""

from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path
from typing import TypeGuard
from urllib.parse import unquote

_HERE = re.compile(r"(file|local)://(localhost(?=/))?", re.IGNORECASE)
_ADDRESS = re.compile(r"(\w[\w+.-]*::)*\w[\w+.-]*://")
_LONGEST = 100  # bytes of a name as a part of a file's, of which most systems allow 255


def is_address(path: str | os.PathLike) -> TypeGuard[str]:
    """Whether something outside of this machine's folders is named, such as `s3://bucket/name.zarr`."""
    return isinstance(path, str) and bool(_ADDRESS.match(path)) and not _HERE.match(path)


def place(path: str | os.PathLike) -> Path | str:
    """Resolve a path given by a user.

    Parameters
    ----------
    path : str or path
        `~` is the home folder. After `file://`, `%20` and its like are characters, as `Path.as_uri` writes them.

    Returns
    -------
    Path, or str
        An address such as `s3://bucket/name.zarr` stays the text that it is.

    Raises
    ------
    ValueError
        If it is empty, or a Path made of an address, which has lost a slash.
    """
    if is_address(path):
        return path
    text = os.fspath(path)
    here = _HERE.match(text)
    text = unquote(text[here.end() :]) if here else text
    if not text.strip():
        raise ValueError(f"the path {text!r} is empty; give a file or a folder")
    if not isinstance(path, str) and re.match(r"\w[\w+.-]+:/", text) and not Path(text).exists():
        raise ValueError(f"{text!r} is an address that was made a Path, which drops a slash; give it as text")
    return Path(os.path.expanduser(text))  # Path.expanduser fails on a file that is named ~draft


def local(path: str | os.PathLike) -> Path:
    """As `place`, where only files and folders of this machine make sense; ValueError for an address."""
    found = place(path)
    if isinstance(found, str):
        raise ValueError(f"{found!r} is an address, where only stores may lie; give a file or folder of this machine")
    return found


def writable(path: str | os.PathLike, *, folder: bool = False, suffixes: tuple[str, ...] = ()) -> Path:
    """As `local`, for an output: refuses before any work, and without making anything, what could not be written.

    Parameters
    ----------
    path : str or path
    folder : bool
        Whether a folder is to be made, or a file.
    suffixes : tuple of str, optional
        Those that the file may have; "" is none.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the suffix is another, a folder stands where a file is to be or the reverse, or a file where a folder above.
    PermissionError
        If nothing may be written there.
    """
    path = local(path)
    if suffixes and path.suffix.lower() not in suffixes:
        ends = f"ends in {path.suffix}" if path.suffix else "has no suffix"
        raise ValueError(f"{path} {ends}; it can be written as {', '.join(filter(None, suffixes))}")
    if path.exists() and path.is_dir() != folder:
        there, wanted = ("file", "folder") if folder else ("folder", "file")
        raise ValueError(f"{path} is a {there}; give the {wanted} to write")
    whole = path.absolute()
    above = next(each for each in ((whole, *whole.parents) if folder else whole.parents) if each.exists())
    if not above.is_dir():
        raise ValueError(f"{path} can't be made, since {above} is a file; give another place")
    if not os.access(above, os.W_OK | os.X_OK):
        raise PermissionError(f"{path} can't be written, since {above} is read-only; give another place")
    return path


def file_name(name: str) -> str:
    """A name, as of an attribute or a direction, as a part of a file's name; what it can't keep becomes a checksum."""
    usual = name.replace(" ", "-").replace("=", "")
    plain = re.sub(r"[^\w.+()-]+", "-", usual).encode()[:_LONGEST].decode(errors="ignore").strip(".")
    if plain == usual:
        return plain
    return f"{plain.strip('-.')}-{hashlib.sha256(name.encode()).hexdigest()[:6]}".lstrip("-")


def home() -> Path:
    """Folder that holds `data/`, `notebooks/` and `reports/`.

    The clone that the package was installed from (`pip install -e .`), or the folder that the environment variable
    `WORKBENCH_HOME` names.

    Raises
    ------
    FileNotFoundError
        If that folder has no `data/`.
    """
    named = os.environ.get("WORKBENCH_HOME")
    root = local(named).resolve() if named else Path(__file__).resolve().parent.parent
    if not (root / "data").is_dir():
        raise FileNotFoundError(f"{root} has no data/ folder; install from a clone, or set WORKBENCH_HOME")
    return root


def data() -> Path:
    """Bundled models and images."""
    return home() / "data"


def models() -> Path:
    """Bundled models, one folder each."""
    return data() / "models"


def cache() -> Path:
    """Extracted stores, looked up by all of their inputs. Safe to delete."""
    return data() / "cache"


def directions() -> Path:
    """Saved directions."""
    return data() / "directions"


def boundaries() -> Path:
    """Saved boundaries."""
    return data() / "boundaries"


def edits() -> Path:
    """Figures, recipes and directions that an edit studio saved."""
    return data() / "edits"


def notebooks() -> Path:
    """The staged notebooks, without outputs."""
    return home() / "notebooks"


def profiles() -> Path:
    """YAML files with the parameters of a whole report."""
    return home() / "profiles"


def reports() -> Path:
    """Executed notebooks, their HTML and the index page."""
    return home() / "reports"
