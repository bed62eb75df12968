"""The same figure is the same file when it is made again: every figure of `workbench figure --list`, of a small model.

The notebooks run as they stand, twice, each time in a kernel of its own. Their numbers depend on the machine, so that
the bytes are compared with each other; those of a figure of given numbers are held by test_figures.
"""

from __future__ import annotations

import pytest
import small_domain
from small_models import save

from workbench.report.figures import list_figures

FIGURES = list_figures()
ELSEWHERE = {"zhu-e15"}
"""Drawn only of images with hats, which a small model's own are not."""
TIMED = {"zhu-e19"}
"""Shows seconds, which no two runs take alike."""
NOTEBOOKS = sorted({each.notebook for each in FIGURES.values()})
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def given(tmp_path_factory, make_unet):
    """Parameters that name a small model, images and classifiers, in a home of the workbench's own."""
    with small_domain.home_of(tmp_path_factory.mktemp("again")) as home:
        yield small_domain.build(home, {"model_name": str(save(home, make_unet()))})


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_every_figure_of_a_notebook_is_the_same_file_when_it_is_made_again(given, kernels, name, tmp_path):
    made = []
    for folder in (tmp_path / "once", tmp_path / "again"):
        small_domain.run_notebook(name, given | {"figures": str(folder)}, kernels, tmp_path / "out.ipynb")
        made.append({path.name: path.read_bytes() for path in folder.iterdir()})
    once, again = made
    saved = {file.rpartition(".")[0] for file in once if file.endswith(".json")}
    assert saved == {figure for figure, each in FIGURES.items() if each.notebook == name} - ELSEWHERE
    assert len(once) == 7 * len(saved), "a record, and three files of each width"
    differ = {file for file in once if once[file] != again.get(file)}
    assert once.keys() == again.keys()
    assert {file for file in differ if not file.startswith(tuple(TIMED))} == set()
