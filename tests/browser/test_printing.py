"""A report printed as a PDF, and as slides."""

from __future__ import annotations

import re

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook
from report_checks import CHROMIUM

from workbench import cli
from workbench.report import notebooks, printing

needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")
CODE = "import plotly.express as px\nfrom workbench.report import plots"
CELLS = (
    new_markdown_cell("# A title\n\nWords.\n\n## First\n\nWords with $x_t$."),
    new_code_cell("seed: int = 0", metadata={"tags": ["parameters"]}),
    new_code_cell(CODE),
    new_code_cell("px.scatter(x=[1, 2, 3], y=[3, 1, 2])"),
    new_markdown_cell("Before the heading.\n\n## Second\n\nAfter it."),
    new_code_cell("plots.line([0, 1], [0, 1], xlabel='x', ylabel='y')"),
)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    path = tmp_path_factory.mktemp("printed") / "small.ipynb"
    nbformat.write(new_notebook(cells=[*CELLS], metadata={"kernelspec": kernel}), path)
    return path


@pytest.fixture(scope="module")
def page(source):
    return notebooks.run_notebook(source, out=source.parent / "out" / "small.ipynb", progress=False).html


@pytest.mark.browser
@needs_chromium
def test_a_pdf_has_the_figures_and_plotlys_are_vectors(page):
    pdf = printing.print_pdf(page)
    data = pdf.read_bytes()
    assert data.startswith(b"%PDF") and len(re.findall(rb"/Type /Page\b", data)) >= 1
    # The picture of matplotlib is one image; a plotly figure that is drawn as vectors adds none.
    pictures = [int(width) for width in re.findall(rb"/Subtype /Image\s+/Width (\d+)", data)]
    assert len([width for width in pictures if width > 300]) == 1, pictures
    assert [path.name for path in page.parent.iterdir() if "partial" in path.name] == []


@pytest.mark.browser
@needs_chromium
def test_slides_are_one_for_each_section_and_keys_turn_them(page, browser):
    slides = printing.write_slides(page)
    assert slides.name == "small.slides.html"
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


@pytest.mark.browser
@needs_chromium
def test_a_page_that_is_not_printed_is_a_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(printing, "find_browser", lambda: "false")
    (tmp_path / "a.html").write_text("a")
    with pytest.raises(RuntimeError, match=r"a\.html"):
        printing.print_pdf(tmp_path / "a.html")
    assert [path.name for path in tmp_path.iterdir()] == ["a.html"]
