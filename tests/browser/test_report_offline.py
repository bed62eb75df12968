"""An exported report shows everything in a real browser without network."""

from __future__ import annotations

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from report_checks import CHROMIUM, check_report

from workbench.report import notebooks

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")]

FORMULAS = r"""# Every kind of output

The noisy image is $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$. One step is

$$x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\mathbf{P}_t(\epsilon_\theta(x_t \mid \Delta h_t))
+ \mathbf{D}_t(\epsilon_\theta(x_t))$$

\begin{align*} a &= b \\ c &= d \end{align*}
"""
IMPORTS = """import matplotlib.pyplot as plt
import numpy as np
import plotly.express as px
from tqdm.auto import tqdm
from workbench.analysis.maps import Map
from workbench.report import plots
from workbench.studio.explorer import Explorer
rng = np.random.default_rng(seed)
images = rng.uniform(-1, 1, (40, 3, 32, 32))
points = rng.normal(size=(40, 2))
maps = [Map('one', points, ('PC 1', 'PC 2')), Map('two', -points, ('a', 'b'))]
for i in tqdm(range(3)): pass"""
CELLS = (
    IMPORTS,
    "plots.image_grid(images[:8])",
    "plots.scatter(points, images=images, xlabel='PC 1', ylabel='PC 2')",
    "px.scatter(x=[1, 2, 3], y=[3, 1, 2])",
    "Explorer(maps, names=range(40), colours={'x': points[:, 0]}, images=lambda rows: images[rows])",
    "Explorer(maps, names=range(40), colours={'right': points[:, 0] > 0}, images=lambda rows: images[rows])",
)


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    cells = [new_markdown_cell(FORMULAS), new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})]
    cells += [new_code_cell(cell) for cell in CELLS]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(new_notebook(cells=cells, metadata={"kernelspec": kernel}), folder / "every.ipynb")
    out = folder / "out" / "every.ipynb"
    return notebooks.run_notebook(folder / "every.ipynb", {"seed": 1}, out, progress=False).html


def test_every_figure_and_formula_is_there(browser, page):
    check_report(browser, page, images=2, plotly=1, explorers=2, formulas=3, screenshot=page.with_suffix(".png"))


def test_each_figure_is_stored_once(page):
    """Neither a second picture beside a returned figure, nor a second copy of plotly.js."""
    executed = nbformat.read(page.with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert page.stat().st_size < 7e6


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda text: text.replace("<math", "<b").replace("</math", "</b"), "formulas"),
        (lambda text: text.replace("data:image/png;base64,iVBOR", "data:image/png;base64,AAAA"), "static figure"),
        (lambda text: text.replace("Plotly.newPlot", "Plotly.missing"), "0 live plotly figures"),
        (lambda text: text.replace("</main>", '<img src="https://example.org/a.png" alt=""></main>'), "network"),
        (lambda text: text.replace("<main>", "<main>$$x$$"), "LaTeX"),
        (lambda text: text.replace("this.showTip(i, event)", "undefined"), "Timeout"),
    ],
)
def test_the_check_sees_what_is_missing(browser, page, tmp_path, damage, message):
    damaged = tmp_path / "damaged.html"
    damaged.write_text(damage(page.read_text(encoding="utf-8")), encoding="utf-8")
    with pytest.raises(Exception, match=message):
        check_report(browser, damaged, images=2, plotly=1, explorers=2, formulas=3, patience=2_000)
