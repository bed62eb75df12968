"""The bundled domain as a user's own: other names of the model, its images, its classifiers and all attributes.

Images have half of the size, so that reports of them are made in a third of the time.
"""

from __future__ import annotations

import json
import shutil
import zipfile
from pathlib import Path

import pandas as pd

from workbench import paths


def build(folder: Path, *, n_images: int = 200) -> dict:
    """Write the model, labelled images and two classifiers into `folder`; parameters for notebooks that name them."""
    shutil.copytree(paths.models() / "avataaars32", folder / "faces")
    config = folder / "faces" / "unet" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 16}))
    for kind in ("labeller", "judge"):
        shutil.copytree(paths.models() / "avataaars-attributes" / kind, folder / kind)
        config = json.loads((folder / kind / "config.json").read_text())
        config["attributes"] = [renamed(name) for name in config["attributes"]]
        (folder / kind / "config.json").write_text(json.dumps(config))
    labels = pd.read_csv(paths.data() / "avataaars" / "attributes.csv").rename(columns=renamed)[:n_images]
    (folder / "portraits").mkdir()
    with zipfile.ZipFile(paths.data() / "avataaars" / "images.zip") as archive:
        archive.extractall(folder / "portraits", members=labels["file"])
    labels.to_csv(folder / "portraits" / "attributes.csv", index=False)
    named = {"model_name": "faces", "images_name": "portraits", "classifier_name": "labeller", "judge_name": "judge"}
    return {parameter: str(folder / name) for parameter, name in named.items()}


def renamed(attribute: str) -> str:
    """The same attribute in a name that no notebook knows."""
    return attribute.lower().replace("_", " ")
