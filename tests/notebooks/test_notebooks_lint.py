"""The staged notebooks, and the templates, keep the form that reports, readers and reviews rely on."""

from __future__ import annotations

import ast
import re

import nbformat
import pytest

from workbench import paths
from workbench.report.parameters import list_notebooks, notebook_parameters

MOST_LINES, MOST_PARAMETERS = 20, 17
PLAIN = re.compile(r"(int|float|str|bool|dict|list|list\[(int|float|str|bool)\])")
TYPES = {"int": int, "float": float, "str": str, "bool": bool, "dict": dict}
FORBIDDEN = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)

TEMPLATES = [f"templates/{path.stem}" for path in (paths.notebooks() / "templates").glob("*.ipynb")]

pytestmark = pytest.mark.parametrize("name", [*list_notebooks(), *TEMPLATES])


def read(name):
    return nbformat.read(paths.notebooks() / f"{name}.ipynb", as_version=4)


def code_cells(name):
    return [cell for cell in read(name).cells if cell.cell_type == "code"]


def calls(name):
    nodes = (node for cell in code_cells(name) for node in ast.walk(ast.parse(cell.source)))
    return [node for node in nodes if isinstance(node, ast.Call)]


def test_has_the_form_of_a_staged_notebook(name):
    """Numbered by its stage, stripped, with the kernel of all, a title, and parameters in the first code cell."""
    assert re.fullmatch(r"\d\d_[a-z0-9_]+", name) or name in TEMPLATES
    notebook, cells = read(name), code_cells(name)
    assert "papermill" not in notebook.metadata and "widgets" not in notebook.metadata
    assert notebook.metadata.kernelspec.name == "python3"
    assert notebook.cells[0].cell_type == "markdown" and re.match(r"# \S", notebook.cells[0].source)
    assert [i for i, cell in enumerate(cells) if "parameters" in cell.metadata.get("tags", [])] == [0]
    for cell in cells:
        assert cell.outputs == [] and cell.execution_count is None, cell.source
        assert not set(cell.metadata) - {"tags"}, f"metadata other than tags: {dict(cell.metadata)}"


def test_every_parameter_is_plain_and_seen_by_papermill(name):
    """papermill overlooks a line with a second "=", or with an annotation that is not a plain word."""
    written = []
    for statement in ast.parse(code_cells(name)[0].source).body:
        assert isinstance(statement, ast.AnnAssign), f"not an annotated parameter: {ast.unparse(statement)}"
        assert PLAIN.fullmatch(ast.unparse(statement.annotation)), ast.unparse(statement)
        ast.literal_eval(statement.value)
        written.append(statement.target.id)
    found = notebook_parameters(paths.notebooks() / f"{name}.ipynb")
    assert list(found) == written
    assert {"model_name", "steps", "seed"} <= set(found)
    for parameter in found.values():
        assert isinstance(parameter.default, TYPES.get(parameter.type, list))
        assert parameter.help, f"{parameter.name} has no comment that says what it is"


def test_takes_a_condition_and_passes_it_on(name):
    """Otherwise a conditional model runs in no notebook."""
    first, *_ = code_cells(name)
    declared = [statement.target.id for statement in ast.parse(first.source).body]
    assert declared[declared.index("model_name") + 1] == "condition"
    loaded = [ast.unparse(call) for call in calls(name) if ast.unparse(call.func) == "wb.load_model"]
    assert loaded == ["wb.load_model(model_name, **condition)"]


def test_shows_and_judges_images_not_latents(name):
    """x0 of a latent model is no image; classifiers and figures would take its first three channels for one."""
    for call in calls(name):
        if ast.unparse(call.func) in ("judge", "labeller", "judge.features", "wb.plots.image_grid"):
            assert ".x0" not in ast.unparse(call)


def test_says_with_how_much_noise_it_samples(name):
    """Few steps with noise leave photographs flat, so their domain must be able to set eta."""
    for call in calls(name):
        if ast.unparse(call.func) in ("wb.sample", "wb.extract"):
            given = {keyword.arg for keyword in call.keywords}
            assert given & {"eta", "images", None}, ast.unparse(call)


def test_cells_are_short_and_hold_no_machinery(name):
    for cell in code_cells(name):
        source = cell.source
        most = MOST_PARAMETERS if "parameters" in cell.metadata.get("tags", []) else MOST_LINES
        assert 0 < len(source.splitlines()) <= most, source
        assert not re.search(r"^\s*[%!]", source, re.MULTILINE), f"a magic or a shell command: {source}"
        tree = ast.parse(source)
        defined = [node for node in ast.walk(tree) if isinstance(node, FORBIDDEN)]
        assert not defined or name in TEMPLATES, f"a def or class: {source}"
        assert "sys.path" not in ast.unparse(tree), source


def test_prose_stands_before_code(name):
    """At most three code cells in a row: a reader meets a sentence before the next step."""
    kinds = "".join("m" if cell.cell_type == "markdown" else "c" for cell in read(name).cells)
    assert kinds.startswith("m") and "cccc" not in kinds, kinds
