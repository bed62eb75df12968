"""Every notebook runs to its end on a small untrained model of each kind, by parameters alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from small_models import KINDS

import workbench as wb
from workbench import paths
from workbench.datasets.attribute_net import DESIGNS
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
    "30_dynamics": {"inversion_steps": [2, 4], "n_decoded": 4, "n_edited": 12},
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
def given(request, tmp_path_factory):
    """Parameters that name a model, images and classifiers, in a home of the workbench's own."""
    here, home = paths.home(), tmp_path_factory.mktemp("kind")
    (home / "data").mkdir()
    for name in ("avataaars", "models"):
        (home / "data" / name).symlink_to(here / "data" / name)
    (home / "notebooks").symlink_to(here / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(home))
        patch.setitem(DESIGNS, "labeller", SMALL | {"kernel": 3})
        patch.setitem(DESIGNS, "judge", SMALL | {"kernel": 5})
        parameters = KINDS[request.param](home)
        model = wb.load_model(parameters["model_name"], device="cpu", **parameters.get("condition", {}))
        images = write_images(wb.sample(model, range(1000, 1120), steps=4, progress=False).images, home / "images")
        for seed, name in enumerate(("labeller", "judge")):
            wb.train_classifier(images, out=home / name, seed=seed, steps=250, design=name, progress=False)
        yield parameters | {
            "images_name": str(home / "images"),
            "classifier_name": str(home / "labeller"),
            "judge_name": str(home / "judge"),
        }


SMALL = {"size": 16, "widths": (8, 16), "residual": False, "activation": "relu"}


def write_images(images: torch.Tensor, folder: Path) -> wb.LabelledImages:
    """Labelled images that are like a model's own: half of them have each attribute."""
    images = images.clamp(-1, 1)
    _, height, width = images.shape[1:]
    means = {
        "Bright": images.mean(dim=(1, 2, 3)),
        "Left": images[..., : width // 2].mean(dim=(1, 2, 3)) - images[..., width // 2 :].mean(dim=(1, 2, 3)),
        "Top": images[:, :, : height // 2].mean(dim=(1, 2, 3)) - images[:, :, height // 2 :].mean(dim=(1, 2, 3)),
    }
    folder.mkdir()
    names = [f"{i:03d}.png" for i in range(len(images))]
    for name, image in zip(names, ((images + 1) * 127.5).round().byte().numpy(), strict=True):
        Image.fromarray(image[0] if len(image) == 1 else np.moveaxis(image, 0, 2)).save(folder / name)
    labels = pd.DataFrame({name: (values > values.median()).int() for name, values in means.items()}, index=names)
    labels.rename_axis("file").to_csv(folder / "attributes.csv")
    return wb.load_images(folder, size=tuple(images.shape[1:]))


@pytest.mark.parametrize("name", list_notebooks())
def test_runs_to_its_end(given, kernels, name, tmp_path):
    known = notebook_parameters(name)
    values = {key: value for key, value in (SIZES | given).items() if key in known} | OWN.get(name, {})
    job = Job(name, threads=1, kernels=kernels)
    source = find_notebook(name)
    try:
        failure = job.execute(source, tmp_path / "out.ipynb", check_parameters(name, values), timeout=600)
    finally:
        job.close()
    assert failure is None, failure
