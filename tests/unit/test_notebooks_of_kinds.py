"""Every notebook runs to its end on a small untrained model of each kind, by parameters alone."""

from __future__ import annotations

from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_models import KINDS

import workbench as wb
from workbench import paths
from workbench.datasets.attribute_net import new_network, write_network
from workbench.report.kernels import KernelServer, environment
from workbench.report.parameters import check_parameters, find_notebook, list_notebooks, notebook_parameters
from workbench.report.running import Job

pytestmark = pytest.mark.slow

ATTRIBUTES = ["Bright", "Left", "Top"]

SIZES = {
    "n": 40,
    "steps": 4,
    "k": 6,
    "n_images": 4,
    "n_measured": 4,
    "n_shown": 2,
    "n_samples": 3,
    "attributes": ATTRIBUTES,
    "colors": ["Top"],
    "target": "Bright",
    "nuisances": ["Left", "Top"],
    "attribute": "Bright",
    "other": "Left",
    "pair": ["Left", "Top"],
    "regions": [],
}
"""For every notebook that has such a parameter."""

OWN = {
    "10_extract": {"tap": "up.0"},
    "20_geometry": {"n": 40},
    "25_spaces": {"taps": ["skip.1", "up.0"], "scales": [1.0, 2.0]},
    "30_dynamics": {"inversion_steps": [2, 4], "n_decoded": 4, "n_edited": 24},
    "40_pca": {"k": 3},
    "50_supervised": {"n_measured": 8},
    "60_boundaries": {"n": 40},
    "65_audit": {"n": 40},
    "80_benchmark": {"population": 32, "held_out": 8, "methods": ["random h", "PCA", "boundary in x", "noise", "LOCO"]},
    "85_appendix": {"methods": ["random h", "Jacobian, masked", "noise"]},
    "95_train_your_own": {"training_steps": 4, "n": 24, "n_images": 24},
}


@pytest.fixture(scope="module")
def kernels():
    with KernelServer(environment(1)) as server:
        yield server


@pytest.fixture(scope="module", params=KINDS)
def given(request, tmp_path_factory, make_unet):
    """Parameters that name a model, images and classifiers, in a home of the workbench's own."""
    here, home = paths.home(), tmp_path_factory.mktemp("kind")
    (home / "data").mkdir()
    for name in ("avataaars", "models"):
        (home / "data" / name).symlink_to(here / "data" / name)
    (home / "notebooks").symlink_to(here / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(home))
        parameters = KINDS[request.param](home, make_unet)
        model = wb.load_model(parameters["model_name"], device="cpu", **parameters.get("condition", {}))
        images = wb.sample(model, range(1000, 1120), steps=SIZES["steps"], progress=False).images.clamp(-1, 1)
        write_images(images, home / "images")
        for kernel, name in ((3, "classifier"), (5, "judge")):
            write_classifier(images, home / name, kernel=kernel)
            parameters[f"{name}_name"] = str(home / name)
        yield parameters | {"images_name": str(home / "images")}


def write_images(images: torch.Tensor, folder: Path) -> None:
    """Labelled images; half of them have each attribute."""
    _, height, width = images.shape[1:]
    upper, left = images[:, :, : height // 2], images[..., : width // 2]
    values = {"Bright": images, "Left": left - images[..., width // 2 :], "Top": upper - images[:, :, height // 2 :]}
    means = pd.DataFrame({name: value.mean(dim=(1, 2, 3)) for name, value in values.items()})
    folder.mkdir()
    labels = (means > means.median()).astype(int).set_axis([f"{i:03d}.png" for i in range(len(images))])
    labels.rename_axis("file").to_csv(folder / "attributes.csv")
    for name, image in zip(labels.index, ((images + 1) * 127.5).round().byte().numpy(), strict=True):
        Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)).save(folder / name)


def write_classifier(images: torch.Tensor, folder: Path, *, kernel: int) -> None:
    """An untrained classifier, in whose eyes half of the images have each attribute."""
    config = {"size": 16, "widths": (8, 16), "kernel": kernel, "residual": False, "activation": "relu"}
    config["channels"] = images.shape[1]
    network, generator = new_network(len(ATTRIBUTES), config), torch.Generator().manual_seed(kernel)
    network.initialise(generator).eval().requires_grad_(False)
    network.head.weight.normal_(generator=generator)
    logits = network(network.prepare(images))
    network.head.weight /= logits.std(dim=0)[:, None]
    network.head.bias -= logits.median(dim=0).values / logits.std(dim=0)
    write_network(network, folder, config=config, attributes=ATTRIBUTES, training={})


def run(name: str, given: dict, kernels: KernelServer, out: Path) -> nbformat.NotebookNode:
    """The executed notebook."""
    known = notebook_parameters(name)
    values = {key: value for key, value in (SIZES | OWN.get(name, {}) | given).items() if key in known}
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
