"""Facts: numbers that a notebook records, shown in its report and read back to compare runs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import nbformat
from IPython.display import display

from workbench.paths import local

MIME = "application/vnd.hspace-workbench.facts+json"
_PARTS = ("value", "low", "high", "n")


def record_facts(facts: Mapping[str, object]) -> None:
    """Show facts below the cell and keep them in the notebook.

    Parameters
    ----------
    facts : mapping of str to value
        Numbers, texts and booleans; or objects with a `value`, its interval `low` and `high` and its `n`, such as an
        `Estimate`. A repeated name overwrites the earlier fact.

    Raises
    ------
    ValueError
        If a value has another type, such as an array.
    """
    kept = {str(name): _plain(name, value) for name, value in facts.items()}
    width = max(map(len, kept), default=0)
    text = "\n".join(f"{name:{width}s}  {_words(value)}" for name, value in kept.items())
    display({MIME: kept, "text/plain": text}, raw=True)


def read_facts(notebook: str | Path) -> dict[str, object]:
    """Read the facts of an executed notebook, in order.

    Parameters
    ----------
    notebook : str or Path
        The executed `.ipynb`.

    Returns
    -------
    dict of str to value
        Numbers, texts, booleans, or a dict with "value" and, if known, "low", "high" and "n".
    """
    found = {}
    for cell in nbformat.read(local(notebook), as_version=4).cells:
        for output in cell.get("outputs", []):
            found |= output.get("data", {}).get(MIME, {})
    return found


def _plain(name: str, value: object) -> object:
    if hasattr(value, "value"):
        return {part: _plain(name, getattr(value, part)) for part in _PARTS if hasattr(value, part)}
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", 0) == 0 else value
    if not isinstance(value, str | bool | int | float):
        raise ValueError(f"fact {name!r} is {type(value).__name__}; give a number, a text, or an Estimate")
    # JSON has no NaN and no infinity.
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _words(value: object) -> str:
    if not isinstance(value, Mapping):
        return f"{value:.4g}" if isinstance(value, float) else str(value)
    interval = f" ({_words(value['low'])} to {_words(value['high'])})" if {"low", "high"} <= value.keys() else ""
    return _words(value["value"]) + interval + (f", n = {value['n']}" if "n" in value else "")
