"""Every notebook runs to its end on a small untrained model of each kind, by parameters alone."""

from pathlib import Path

import nbformat
import pytest
import small_domain
from small_models import KINDS

from workbench.report.kernels import KernelServer
from workbench.report.parameters import check_parameters, find_notebook, list_notebooks, notebook_parameters
from workbench.report.running import Job

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def given(request, tmp_path_factory, make_unet):
    """Parameters that name a model, images and classifiers, in a home of the workbench's own."""
    with small_domain.home_of(tmp_path_factory.mktemp("kind")) as home:
        yield small_domain.build(home, KINDS[request.param](home, make_unet))


def run(name: str, given: dict, kernels: KernelServer, out: Path) -> nbformat.NotebookNode:
    """The executed notebook."""
    known = notebook_parameters(name)
    values = small_domain.sizes_of(name) | {key: value for key, value in given.items() if key in known}
    job = Job(name, threads=1, kernels=kernels)
    try:
        failure = job.execute(find_notebook(name), out, check_parameters(name, values), timeout=600)
    finally:
        job.close()
    assert failure is None, failure
    return nbformat.read(out, as_version=4)


@pytest.mark.parametrize("name", list_notebooks())
def test_runs_to_its_end(given, kernels, name, tmp_path):
    run(name, given, kernels, tmp_path / "out.ipynb")


@pytest.mark.parametrize("given", ["class-conditional"], indirect=True)
@pytest.mark.parametrize("name", ["10", "30", "40", "50", "85"])
def test_without_images_it_runs_to_its_end_too(given, kernels, name, tmp_path):
    executed = run(find_notebook(name).stem, given | {"images_name": ""}, kernels, tmp_path / "out.ipynb")
    printed = [output.get("text", "") for cell in executed.cells for output in cell.get("outputs", [])]
    assert any("images_name is empty" in text for text in printed) or name in ("40", "50")
