"""Small notebooks that tests write and run."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook

PARAMETERS = """model_name: str = "avataaars32"  # a bundled name or a folder
steps: int = 20
seed: int = 0
eta: float = 0.0  # 0 is DDIM
images: bool = True
scales: list = [-1, 1]
levels: list[float] = [0.5]"""


def write_notebook(path: Path, *cells: str, title: str = "A title", parameters: str = PARAMETERS) -> Path:
    first = [new_markdown_cell(f"# {title}"), new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    notebook = new_notebook(cells=first + [new_code_cell(cell) for cell in cells], metadata={"kernelspec": kernel})
    nbformat.write(notebook, path)
    return path


def output_of(path: Path) -> str:
    cells = nbformat.read(path, as_version=4).cells
    return "".join(output.get("text", "") for cell in cells for output in cell.get("outputs", []))
