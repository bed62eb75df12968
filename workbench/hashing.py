"""What a result depends on, beside its inputs: the code that made it."""

from __future__ import annotations

import ast
import hashlib
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parent


@cache
def code_hash(*modules: str) -> str:
    """Digest of modules of this package and of all that they import of it, directly or not.

    What changes nothing, comments, docstrings and layout, is not looked at.

    Parameters
    ----------
    *modules : str
        Dotted names, such as "workbench.hspace.extract"; none is the whole package.

    Returns
    -------
    str
        16 hexadecimal digits.
    """
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
        elif isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            node.body = [part for part in node.body if not _is_text(part)]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest(), imported & _files().keys()


def _is_text(node: ast.stmt) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
