"""Widgets that stay alive in a page without a kernel and without a network.

An anywidget is a script and a state. One whose trait `offline` is true can do without a kernel: the page holds both,
and a stand-in for the kernel's side that answers `get` and `set`. Its trait `view` is kept in the address of the page,
so that a link leads back to what is seen.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from nbformat import NotebookNode

VIEW = "application/vnd.jupyter.widget-view+json"
_STATE = "application/vnd.jupyter.widget-state+json"

MOST_BYTES = 20_000_000
"""Of all widgets of a page: more is a page that nobody waits for."""

_STAND_IN = Path(__file__).with_suffix(".js")
_TOO_LARGE = "_too_large"


def embedded(state: Mapping[str, object], key: str) -> str:
    """HTML of a widget's state; `key`, a name without special characters, tells its view from others in the address."""
    if _TOO_LARGE in state:
        return f"<p><em>{state[_TOO_LARGE]}</em></p>"
    own = {name: value for name, value in state.items() if name == "_esm" or not name.startswith("_")}
    # Nothing in the text of a script may look like its end.
    text = json.dumps(own).replace("<", "\\u003c")
    return (
        f'<style>{state.get("_css") or ""}</style><div id="{key}" class="alive"></div>'
        f'<script type="application/json">{text}</script>'
        f'<script type="module">{_STAND_IN.read_text(encoding="utf-8").replace("KEY", key)}</script>'
    )


def widgets_of(notebook: NotebookNode) -> dict[str, dict]:
    """States of the widgets of an executed notebook that can do without a kernel, by model."""
    kept = notebook.metadata.get("widgets", {}).get(_STATE, {}).get("state", {})
    return {name: model["state"] for name, model in kept.items() if model["state"].get("offline")}


def fitting(states: Mapping[str, dict]) -> dict[str, dict]:
    """States of the widgets that fit on one page; a sentence for each of the others."""
    kept, room = {}, MOST_BYTES
    for name, state in states.items():
        size = len(embedded(state, name))
        if size > room:
            left = f"a page holds {MOST_BYTES / 1e6:.0f} MB of them, of which {room / 1e6:.0f} MB are left"
            remedy = "write this one by save_html as a page of its own, or show fewer samples"
            state, size = {_TOO_LARGE: f"Maps of {size / 1e6:.0f} MB are left out: {left}; {remedy}."}, 0
        kept[name], room = state, room - size
    return kept


def keep_shown(notebook: NotebookNode) -> None:
    """Drop the states of all widgets from a notebook but of those that stay alive where an output shows them."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    shown = {output.get("data", {}).get(VIEW, {}).get("model_id") for output in outputs}
    states = notebook.metadata.get("widgets", {}).get(_STATE, {}).get("state", {})
    alive = {name: states[name] for name in widgets_of(notebook).keys() & shown}
    notebook.metadata.pop("widgets", None)
    if alive:
        state = {"state": alive, "version_major": 2, "version_minor": 0}
        notebook.metadata["widgets"] = NotebookNode({_STATE: state})
