"""Every notebook runs to its end on a small untrained model of each kind, by parameters alone."""

import pytest
import small_domain
from notebook_files import output_of
from small_models import KINDS

from workbench.report.parameters import list_notebooks

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module", params=KINDS)
def given(request, tmp_path_factory, make_unet):
    """Parameters that name a model, images and classifiers, in a home of the workbench's own."""
    with small_domain.home_of(tmp_path_factory.mktemp("kind")) as home:
        yield small_domain.build(home, KINDS[request.param](home, make_unet))


@pytest.mark.parametrize("name", list_notebooks())
def test_runs_to_its_end(given, kernels, name, tmp_path):
    small_domain.run_notebook(name, given, kernels, tmp_path / "out.ipynb")


@pytest.mark.parametrize("given", ["class-conditional"], indirect=True)
@pytest.mark.parametrize("name", ["10_extract", "30_dynamics", "40_pca", "50_supervised", "85_appendix"])
def test_without_images_it_runs_to_its_end_too(given, kernels, name, tmp_path):
    out = tmp_path / "out.ipynb"
    small_domain.run_notebook(name, given | {"images_name": ""}, kernels, out)
    assert "images_name is empty" in output_of(out) or name in ("40_pca", "50_supervised")
