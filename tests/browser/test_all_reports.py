"""`workbench report` on the staged notebooks: it ends, and every page shows everything without network.

The first one runs under nbval as it is; the others here on another domain, by parameters alone.
"""

from __future__ import annotations

import contextlib
import io
import json

import nbformat
import pytest
import small_domain
import yaml
from diffusers import DDPMScheduler
from report_checks import CHROMIUM, check_report

from workbench import cli, paths
from workbench.report.alive import widgets_of
from workbench.report.claims import load_claims
from workbench.report.facts import read_facts
from workbench.report.figures import list_figures
from workbench.report.parameters import list_notebooks

NAMES = [name for name in list_notebooks() if name != "00_quickstart"]


@pytest.fixture(scope="module")
def made(tiny_domain, tmp_path_factory):
    """Reports of these notebooks on another domain, in a home with a cache of its own; and what was said of them."""
    home = tmp_path_factory.mktemp("home")
    for folder in ("data", "notebooks", "profiles"):
        (home / folder).mkdir()
    for source in paths.data().iterdir():
        if source.name not in ("cache", "directions", "boundaries", "edits"):
            (home / "data" / source.name).symlink_to(source)
    for source in paths.notebooks().iterdir():
        if source.stem != "00_quickstart":
            (home / "notebooks" / source.name).symlink_to(source)
    sizes = {name: small_domain.sizes_of(name) for name in NAMES}
    # Of one notebook, since drawing a file takes seconds.
    sizes["55_disentangling"]["figures"] = str(home / "reports" / "figures")
    (home / "profiles" / "smoke.yaml").write_text(yaml.safe_dump({"common": tiny_domain, "notebooks": sizes}))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(home))
        yield home / "reports", report("--profile", "smoke")


@pytest.fixture(scope="module")
def tiny_domain(make_unet, tmp_path_factory):
    """Parameters that name an untrained model of 8 x 8 pixels, its images and two classifiers."""
    folder = tmp_path_factory.mktemp("domain")
    make_unet().save_pretrained(folder / "model" / "unet")
    DDPMScheduler().save_pretrained(folder / "model" / "scheduler")
    return small_domain.build(folder, {"model_name": str(folder / "model")})


def report(*words: str) -> str:
    """Run the command, and return what it says."""
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert cli.main(["report", *words]) == 0
    return said.getvalue()


@pytest.fixture
def reports(made):
    return made[0]


def test_the_index_links_every_report(reports):
    index = (reports / "index.html").read_text()
    for name in NAMES:
        assert f'href="{name}.html"' in index
    assert "1,000 passes of avataaars32" in index
    assert not (reports / "failed").exists() or not list((reports / "failed").iterdir())


def test_every_figure_of_the_papers_records_the_numbers_of_its_claims(reports):
    for name, figure in list_figures().items():
        if name == "zhu-e15":
            continue  # hats, which the bundled images alone have
        facts = read_facts(reports / f"{figure.notebook}.ipynb")
        for claim in load_claims():
            if claim.figure == name:
                found = facts[f"{name}.{claim.number}"]
                assert not (found["low"] > found["value"] or found["value"] > found["high"])


def test_figures_are_saved_where_the_parameter_says(reports):
    names = [name for name, figure in list_figures().items() if figure.notebook == "55_disentangling"]
    for name in names:
        assert len(list((reports / "figures").glob(f"{name}-[sd]*.*"))) == 6
        record = json.loads((reports / "figures" / f"{name}.json").read_text())
        assert record["title"] and record["caption"] and record["table"]


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason="needs a Chromium on the PATH")
@pytest.mark.parametrize("name", NAMES)
def test_every_figure_of_the_notebook_is_on_the_page(browser, reports, name):
    notebook = nbformat.read(reports / f"{name}.ipynb", as_version=4)
    outputs = [o for cell in notebook.cells if cell.cell_type == "code" for o in cell.outputs if "data" in o]
    flat = sum("image/png" in o.data for o in outputs)
    plotly = sum("application/vnd.plotly.v1+json" in o.data for o in outputs)
    explorers = len(widgets_of(notebook))
    assert flat + plotly + explorers > 0
    formulas = sum(cell.source.count("$$") // 2 for cell in notebook.cells if cell.cell_type == "markdown")
    check_report(browser, reports / f"{name}.html", images=flat, plotly=plotly, explorers=explorers, formulas=formulas)


def test_notebooks_share_extractions_and_the_report_says_how_many_were_made(made):
    reports, said = made
    stores = list((reports.parent / "data" / "cache").glob("*.zarr"))
    assert f"extractions: {len(stores)} made, and kept in" in said
    assert "from the cache" in (reports / "50_supervised.html").read_text()


@pytest.mark.slow
def test_a_second_report_reuses_the_extractions_and_says_so(reports):
    assert "extractions: all from" in report("--profile", "smoke", "--only", "10", "--jobs", "1")
    assert "from the cache" in (reports / "10_extract.html").read_text()
