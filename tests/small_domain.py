"""A domain of a small untrained model's own: its images, their labels, and classifiers that find each in half of them.

With it every notebook runs by parameters alone, in seconds: nothing is concluded from the numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

import workbench as wb
from workbench import paths
from workbench.datasets.attribute_net import new_network, write_network
from workbench.report.kernels import KernelServer
from workbench.report.parameters import check_parameters, find_notebook, notebook_parameters
from workbench.report.running import Job

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
    "57_words": {"n_generated": 4, "n_trained": 4},
    "60_boundaries": {"n": 40},
    "65_audit": {"n": 40},
    "80_benchmark": {"population": 32, "held_out": 8, "methods": ["random h", "PCA", "boundary in x", "noise", "LOCO"]},
    "95_train_your_own": {"training_steps": 4, "n": 24, "n_images": 24},
}


def sizes_of(name: str) -> dict:
    """Parameters of a notebook but for what it loads."""
    known = notebook_parameters(name)
    return {key: value for key, value in (SIZES | OWN.get(name, {})).items() if key in known}


def run_notebook(name: str, values: dict, kernels: KernelServer, out: Path) -> None:
    """Execute a staged notebook with those of these values that it takes, and sizes of its own."""
    known = notebook_parameters(name)
    values = sizes_of(name) | {key: value for key, value in values.items() if key in known}
    with contextlib.closing(Job(name, threads=1, kernels=kernels)) as job:
        failure = job.execute(find_notebook(name), out, check_parameters(name, values), timeout=600)
    assert failure is None, failure


@contextlib.contextmanager
def home_of(folder: Path) -> Iterator[Path]:
    """A home of the workbench's own, with the bundled images, models and notebooks, but an empty cache."""
    here = paths.home()
    (folder / "data").mkdir()
    for name in ("avataaars", "models"):
        (folder / "data" / name).symlink_to(here / "data" / name)
    (folder / "notebooks").symlink_to(here / "notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WORKBENCH_HOME", str(folder))
        yield folder


def build(folder: Path, model: dict) -> dict:
    """Write labelled images and two classifiers of the model that these parameters name; parameters of all of them."""
    loaded = wb.load_model(model["model_name"], device="cpu", **model.get("condition", {}))
    images = wb.sample(loaded, range(1000, 1120), steps=SIZES["steps"], progress=False).images.clamp(-1, 1)
    _write_images(images, folder / "images")
    for kernel, name in ((3, "classifier"), (5, "judge")):
        _write_classifier(images, folder / name, kernel=kernel)
    named = {f"{name}_name": str(folder / name) for name in ("images", "classifier", "judge")}
    return model | named


def _write_images(images: torch.Tensor, folder: Path) -> None:
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


def _write_classifier(images: torch.Tensor, folder: Path, *, kernel: int) -> None:
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
