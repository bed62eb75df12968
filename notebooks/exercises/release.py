"""Make the exercise sheets from their solutions: python notebooks/exercises/release.py

Cuts out what stands between `### BEGIN SOLUTION` and `### END SOLUTION`, as nbgrader does, and the outputs.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat

HERE = Path(__file__).resolve().parent
_REGION = re.compile(r"### BEGIN SOLUTION\n.*?### END SOLUTION", re.S)


def released(solution: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """The sheet of a solution."""
    sheet = nbformat.from_dict(solution)
    for cell in sheet.cells:
        cell.source = _REGION.sub("# YOUR CODE HERE", cell.source)
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return sheet


def main() -> None:
    for path in sorted((HERE / "solutions").glob("*.ipynb")):
        nbformat.write(released(nbformat.read(path, as_version=4)), HERE / path.name)


if __name__ == "__main__":
    main()
