"""Shared helpers: atomic files, provenance, and common error messages."""

from __future__ import annotations

import ast
import contextlib
import hashlib
import itertools
import json
import os
import shutil
import subprocess
import threading
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import TypeVar

from filelock import FileLock, Timeout

from workbench.paths import home, writable

PACKAGE = Path(__file__).parent

Value = TypeVar("Value")

_ATTEMPTS = itertools.count()

_PARSING = threading.Lock()
"""Python 3.11 can't parse in two threads at once."""


@contextlib.contextmanager
def written(path: str | os.PathLike, *, folder: bool = False) -> Iterator[Path]:
    """Where to write a file or a new folder, which is renamed at the end and so appears whole or not at all."""
    path = writable(path, folder=folder)
    path.parent.mkdir(parents=True, exist_ok=True)
    # Another one each time: after a failure, threads that still write (zarr's) may bring back some of what is removed.
    partial = path.with_name(f"{path.name}.partial-{os.getpid()}-{next(_ATTEMPTS)}")
    shutil.rmtree(partial, ignore_errors=True)  # of a killed process with the same number
    try:
        yield partial
        os.replace(partial, path)
    finally:
        if folder:
            shutil.rmtree(partial, ignore_errors=True)
        else:
            partial.unlink(missing_ok=True)


@contextlib.contextmanager
def locked(lock: Path, doing: str, *, patience: float | None = None) -> Iterator[None]:
    """Hold a lock file while doing something, such as "training in FOLDER".

    Where another process holds it: a RuntimeError, or with `patience` a wait, and a warning after so many seconds.
    """
    lock.parent.mkdir(parents=True, exist_ok=True)
    held = FileLock(lock)
    try:
        held.acquire(timeout=patience or 0)
    except Timeout as error:
        if patience is None:
            raise RuntimeError(f"another process is {doing}; wait for it to end, or give another path") from error
        warnings.warn(f"another process is {doing}; waiting for it", stacklevel=5)
        held.acquire()
    try:
        yield
    finally:
        held.release()


def write_text(path: str | os.PathLike, text: str) -> Path:
    """Write a text file whole or not at all; returns its path."""
    with written(path) as partial:
        partial.write_text(text, encoding="utf-8")
    return Path(path)


def one_of(what: str, value: Value, options: Iterable[Value]) -> Value:
    """The value, if it is one of the options; otherwise a ValueError that lists them."""
    options = tuple(options)
    if value not in options:
        known = ", ".join(repr(option) if "," in str(option) else str(option) for option in options)
        raise ValueError(f"{what} {value!r} is not known; it is one of {known}")
    return value


def check_text(text: object) -> None:
    """Raise if it is no text of a word at least."""
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text is {text!r}; give at least one word")


def duration(seconds: float) -> str:
    """A duration in the unit that suits it: "90 s", "12 min", "3.5 hours"."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} hours"


def as_json(value: object, **options: object) -> str:
    """JSON of a value that may hold numbers and arrays of numpy."""

    def plain(part: object) -> object:
        if hasattr(part, "tolist"):
            return part.tolist()
        raise TypeError(f"a {type(part).__name__} is no value for a file: {part!r}")

    return json.dumps(value, default=plain, **options)


def version_of(package: str) -> str | None:
    """Version of an installed package, without the build; None if it is missing."""
    try:
        return metadata.version(package).partition("+")[0]
    except metadata.PackageNotFoundError:
        return None


def commit() -> str | None:
    """Commit of the clone, with "-dirty" if files differ from it; None outside of a clone."""
    command = ["git", "-C", str(home()), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None


def code_hash(*modules: str) -> str:
    """Digest of modules and of all modules of this package that they import, directly or not.

    What cannot change a result does not count: comments, docstrings, layout, texts of errors, checks that only raise,
    and `__repr__`. Modules are dotted names, such as "workbench.hspace.extract"; without any, the digest is of all.
    """
    with _PARSING:
        return _code_hash(*modules)


@cache
def _code_hash(*modules: str) -> str:
    todo, seen = {*modules} or {*_files()}, {}
    while todo:
        name = todo.pop()
        seen[name], imported = _read(name)
        todo |= imported - seen.keys()
    return hashlib.sha256("\n".join(f"{name} {seen[name]}" for name in sorted(seen)).encode()).hexdigest()[:16]


@cache
def _files() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        found[".".join([PACKAGE.name, *path.relative_to(PACKAGE).with_suffix("").parts])] = path
    return found


@cache
def _read(module: str) -> tuple[str, set[str]]:
    """Digest of a module's code, and the modules of this package that it imports."""
    tree, imported = ast.parse(_files()[module].read_text(encoding="utf-8")), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported |= {str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            node.exc = node.exc.func
        for block in ("body", "orelse", "finalbody"):
            if isinstance(inside := getattr(node, block, None), list):
                setattr(node, block, [part for part in inside if not _without_effect(part)])
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported & _files().keys()


def _without_effect(node: ast.stmt) -> bool:
    """Whether a statement is a text, a `__repr__`, or a check that only raises."""
    if isinstance(node, ast.If) and isinstance(node.body[-1], ast.Raise) and not node.orelse:
        kept = any(isinstance(part, ast.NamedExpr) for part in ast.walk(node.test))
        return not kept and all(isinstance(part, ast.Assign) for part in node.body[:-1])
    if isinstance(node, ast.FunctionDef):
        return node.name == "__repr__"
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
