"""A report's page in a real browser without network: every kind of output, printed as a PDF, and as slides."""

from __future__ import annotations

import base64
import json
import re
import zlib

import nbformat
import numpy as np
import plotly.express as px
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from report_checks import CHROMIUM, check_report

from workbench import cli
from workbench.analysis.maps import Map
from workbench.report import alive, notebooks, pages, plots, printing
from workbench.studio.explorer import Explorer

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")

FORMULAS = r"""# Every kind of output

The noisy image is $x_t = \sqrt{\bar\alpha_t}\,x_0 + \sqrt{1-\bar\alpha_t}\,\epsilon$. One step is

$$x_{t-1} = \sqrt{\bar\alpha_{t-1}}\,\mathbf{P}_t(\epsilon_\theta(x_t \mid \Delta h_t))
+ \mathbf{D}_t(\epsilon_\theta(x_t))$$

\begin{align*} a &= b \\ c &= d \end{align*}

## First
"""
THERE = {"images": 2, "plotly": 1, "explorers": 2, "formulas": 3}
"""What the page shows."""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """An executed notebook, put together without a kernel."""
    rng = np.random.default_rng(0)
    images, points = rng.uniform(-1, 1, (40, 3, 32, 32)), rng.normal(size=(40, 2))
    maps = [Map("one", points, ("PC 1", "PC 2")), Map("two", -points, ("a", "b"))]
    options = {"names": range(40), "images": lambda rows: images[rows]}
    colours = ({"x": points[:, 0]}, {"right": points[:, 0] > 0})
    explorers = {f"explorer{i}": Explorer(maps, colours=each, **options) for i, each in enumerate(colours)}
    figures = [plots.image_grid(images[:8]), plots.scatter(points, images=images, xlabel="PC 1", ylabel="PC 2")]
    flat = [{"image/png": base64.b64encode(figure._repr_png_()).decode()} for figure in figures]
    live = {"application/vnd.plotly.v1+json": json.loads(px.scatter(x=[1, 2, 3], y=[3, 1, 2]).to_json())}
    cells = [new_markdown_cell(FORMULAS), new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})]
    for data in (*flat, live, *({alive.VIEW: {"model_id": name}} for name in explorers)):
        cells.append(new_code_cell("draw()", outputs=[new_output("display_data", data=data)], execution_count=1))
    cells.append(new_markdown_cell("Before the heading.\n\n## Second\n\nAfter it."))
    states = {name: {"state": made.get_state()} for name, made in explorers.items()}
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    metadata = {"widgets": {alive._STATE: {"state": states}}, "kernelspec": kernel}
    path = tmp_path_factory.mktemp("report") / "every.ipynb"
    nbformat.write(new_notebook(cells=cells, metadata=metadata), path)
    return path


@pytest.fixture(scope="module")
def page(source):
    return pages.export_html(source, source.with_suffix(".html"), footer={}, folder=source.parent)


@pytest.mark.browser
@needs_chromium
def test_every_figure_and_formula_is_there_once(browser, page):
    check_report(browser, page, **THERE, screenshot=page.with_suffix(".png"))
    assert page.stat().st_size < 7e6, "a second copy of plotly.js"


DAMAGE = {
    "network": ("</main>", '<img src="https://example.org/a.png" alt=""></main>'),
    "formulas": ("<math", "<b"),
    "static figure": ("data:image/png;base64,iVBOR", "data:image/png;base64,AAAA"),
    "0 live plotly figures": ("Plotly.newPlot", "Plotly.missing"),
    "LaTeX": ("<main>", "<main>$$x$$"),
    "Timeout": ("this.showTip(i, event)", "undefined"),
}
"""What the check says of a page in which the first is replaced by the second."""


@pytest.mark.browser
@needs_chromium
@pytest.mark.parametrize("said", ["network", *(pytest.param(said, marks=pytest.mark.slow) for said in [*DAMAGE][1:])])
def test_the_check_sees_what_is_missing(browser, page, tmp_path, said):
    damaged = tmp_path / "damaged.html"
    damaged.write_text(page.read_text(encoding="utf-8").replace(*DAMAGE[said]), encoding="utf-8")
    with pytest.raises(Exception, match=said):
        check_report(browser, damaged, **THERE, patience=1_000)


@pytest.mark.browser
@needs_chromium
def test_a_pdf_has_the_figures_and_plotlys_are_vectors(page):
    data = printing.print_pdf(page).read_bytes()
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", data)) >= 1
    # Each of matplotlib is one picture, and each map of an explorer; a plotly figure as vectors adds none.
    pictures = [int(width) for width in re.findall(rb"/Subtype /Image\s+/Width (\d+)", data)]
    assert len([width for width in pictures if width > 300]) == 2, pictures
    assert [path.name for path in page.parent.iterdir() if "partial" in path.name] == []


@pytest.mark.browser
@needs_chromium
def test_a_printed_run_has_vectors_and_its_page_and_notebook_stay_as_they_are_without(tmp_path, capsys):
    curve = "from workbench.report import plots\n\n"
    curve += "plots.line([1, 2, 3], {'planted': [0.1, 0.3, 0.2]}, xlabel='t', ylabel='y')"
    cells = [new_markdown_cell("# One curve"), new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]})]
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    source = tmp_path / "curve.ipynb"
    nbformat.write(new_notebook(cells=[*cells, new_code_cell(curve)], metadata={"kernelspec": kernel}), source)
    out = tmp_path / "out" / "curve.ipynb"
    assert cli.main(["run", str(source), "-o", str(out), "--pdf", "--slides"]) == 0
    written = {path.name for path in out.parent.iterdir()}
    assert written == {f"curve{end}" for end in (".ipynb", ".html", ".pdf", ".slides.html")}
    assert [line.rpartition(".")[2] for line in capsys.readouterr().out.split()] == ["html", "pdf", "html"]
    data = out.with_suffix(".pdf").read_bytes()
    assert b"/Subtype /Image" not in data, "a figure is printed as pixels"
    assert data.count(b"/Type /FontDescriptor") == data.count(b"/FontFile2") + data.count(b"/FontFile3") > 0
    drawn = sum(
        zlib.decompress(each).count(b" l\n") for each in re.findall(rb"(?s)stream\r?\n(x.*?)\r?\nendstream", data)
    )
    assert drawn > 50, "the curve, its axes and its letters are lines"
    page, slides = (out.with_suffix(end).read_text(encoding="utf-8") for end in (".html", ".slides.html"))
    assert "image/svg+xml" not in page and "data:image/png" in page and "data:image/svg+xml" in slides
    assert "image/svg+xml" not in out.read_text(encoding="utf-8")


@pytest.mark.browser
@needs_chromium
def test_slides_are_one_for_each_section_and_keys_turn_them(page, browser):
    slides = printing.write_slides(page)
    assert slides.name == "every.slides.html"
    with browser.new_context(offline=True, viewport={"width": 1200, "height": 700}) as context:
        shown, errors = context.new_page(), []
        shown.on("pageerror", lambda error: errors.append(str(error)))
        shown.goto(slides.absolute().as_uri())
        texts = shown.evaluate(
            "() => [...document.querySelectorAll('main > section')].map((slide) => slide.textContent)"
        )
        assert len(texts) == 3 and errors == []
        assert "Before the heading" in texts[1] and "After it" in texts[2]
        assert shown.evaluate("() => document.querySelectorAll('main .js-plotly-plot svg').length") > 0
        assert shown.text_content("#place") == "1 / 3"
        shown.keyboard.press("ArrowRight")
        shown.wait_for_function("() => document.getElementById('place').textContent === '2 / 3'")


def test_without_a_browser_nothing_runs(source, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(notebooks, "run_notebook", lambda *_: pytest.fail("the notebook ran"))
    assert cli.main(["run", str(source), "--pdf"]) == 2
    said = capsys.readouterr().err
    assert "no Chromium or Chrome" in said and said.count("\n") == 1


def test_a_page_that_is_not_printed_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(printing, "find_browser", lambda: "false")
    (tmp_path / "a.html").write_text("a")
    with pytest.raises(RuntimeError, match=r"a\.html"):
        printing.print_pdf(tmp_path / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
