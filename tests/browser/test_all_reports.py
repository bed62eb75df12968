"""`workbench report` on the staged notebooks: it ends, and every page shows everything without network."""

from __future__ import annotations

import nbformat
import pytest
from report_checks import CHROMIUM, check_report

from workbench import cli, paths
from workbench.report.notebooks import list_notebooks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Reports of all notebooks with their defaults; extractions are shared with the notebooks' own tests."""
    folder = tmp_path_factory.mktemp("reports")
    (folder / "smoke.yaml").write_text("notebooks: {}\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "profiles", lambda: folder)
        patch.setattr(paths, "reports", lambda: folder)
        assert cli.main(["report", "--profile", "smoke"]) == 0
    return folder


def test_the_index_links_every_report(reports):
    index = (reports / "index.html").read_text()
    for name in list_notebooks():
        assert f'href="{name}.html"' in index
    assert not (reports / "failed").exists() or not list((reports / "failed").iterdir())


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")
@pytest.mark.parametrize("name", list_notebooks())
def test_every_figure_of_the_notebook_is_on_the_page(reports, name):
    notebook = nbformat.read(reports / f"{name}.ipynb", as_version=4)
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if "data" in o]
    with_thumbnails = [o.data["text/html"] for o in outputs if "hover-thumbnail" in o.data.get("text/html", "")]
    # What a figure draws stands before its template, which names every type of trace.
    drawn = [page.rpartition("Plotly.newPlot(")[2].partition('"template"')[0] for page in with_thumbnails]
    hover = sum('"type":"scatter3d"' not in traces for traces in drawn)
    flat = sum("image/png" in o.data for o in outputs)
    plotly = len(with_thumbnails) + sum("application/vnd.plotly.v1+json" in o.data for o in outputs)
    assert flat + plotly > 0
    formulas = sum(cell.source.count("$$") // 2 for cell in notebook.cells if cell.cell_type == "markdown")
    check_report(reports / f"{name}.html", images=flat, plotly=plotly, hover=hover, formulas=formulas)


def test_a_second_report_reuses_the_extractions_and_says_so(reports, monkeypatch, capsys):
    monkeypatch.setattr(paths, "profiles", lambda: reports)
    monkeypatch.setattr(paths, "reports", lambda: reports)
    assert cli.main(["report", "--profile", "smoke", "--only", "10"]) == 0
    assert "extractions: all from" in capsys.readouterr().out
    assert "from the cache" in (reports / "10_extract.html").read_text()
