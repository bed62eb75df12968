"""Attribute classifiers: load a `Classifier` by bundled name, hub id, folder or function.

The labeller never judges: find directions with `load_classifier("avataaars")` and judge edits with
`load_classifier("avataaars-judge")`, a network of another design trained from another seed on other images.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch import nn

from workbench import paths
from workbench.datasets import huggingface
from workbench.datasets.attribute_net import (
    BATCH,
    DESIGNS,
    FORMAT,
    VERSION,
    binary_labels,
    fit_network,
    new_network,
    read_network,
    write_network,
)
from workbench.datasets.classifier import Classifier
from workbench.datasets.clip import load_clip
from workbench.datasets.domain import DOMAINS
from workbench.datasets.labelled import LabelledImages, load_images
from workbench.datasets.pixel_amounts import AMOUNTS, measure_pixels
from workbench.diffusion.images import to_bytes
from workbench.diffusion.models import find_device
from workbench.formats.checkpoints import hash_weights, read_json
from workbench.formats.hub import CLIP, find_folder
from workbench.io import one_of

BUNDLED = {name: folder for domain in DOMAINS for name, folder in domain.classifiers.items()}
BUNDLED |= {domain.clip: domain.clip for domain in DOMAINS if domain.clip}
"""Bundled classifiers and their folders below data/models."""

PIXELS = "pixels"
"""Name of the classifier that computes its scores from the pixels."""

TABLE_I_PROMPTS = {
    "Smiling": ("A smiling person", "A person"),
    "Eyeglasses": ("A person wearing glasses", "A person"),
    "Old": ("An old person", "A young person"),
    "Male": ("A man", "A woman"),
    "Wearing_Hat": ("A person wearing a hat", "A person"),
}
"""Prompt pairs of Haas et al. 2024 (arXiv 2303.11073), Table I: with the attribute, without it."""


def load_classifier(
    source: str | Path | Callable,
    *,
    device: str | torch.device | None = None,
    prompts: Mapping[str, tuple[str, str]] | None = None,
    attributes: Sequence[str] | None = None,
) -> Classifier:
    """Load an attribute classifier.

    Parameters
    ----------
    source : str, path or callable
        - "avataaars" or "eurosat" (they label), "avataaars-judge" or "eurosat-judge" (they judge), all bundled;
        - "pixels": amounts that are computed from the pixels, see `measure_pixels`;
        - a folder written by `train_classifier`;
        - a hub id or folder of a transformers image classifier: one attribute per class;
        - "clip", "avataaars-clip" (bundled), or a hub id or folder of another CLIP: zero-shot, one attribute per pair
          of prompts;
        - a function or module from a Tensor of shape (n, C, H, W), values in [-1, 1], to probabilities: a DataFrame
          with these columns, or an array of shape (n, len(attributes)).
    device : str or torch.device, optional
        By default the best available; for a callable, that of its weights, or the CPU.
    prompts : mapping of str to (str, str), optional
        For CLIP: each attribute's prompts with and without it; the probability is the softmax over the pair. Default:
        those of the domain of a bundled CLIP, or the five pairs of Haas et al. 2024, Table I.
    attributes : sequence of str
        For a callable: names of its columns.

    Returns
    -------
    Classifier

    Raises
    ------
    FileNotFoundError
        If the classifier is neither local nor downloadable.
    ValueError
        If the files are damaged or of another kind, or an argument is missing or does not apply to the source.
    """
    if isinstance(source, Classifier):
        return source
    if callable(source):
        return _from_callable(source, attributes, device)
    if source == PIXELS:
        return _from_callable(measure_pixels, AMOUNTS, None, name=PIXELS)
    if attributes is not None:
        raise ValueError(f"attributes= names the columns of a function; {str(source)!r} has names of its own")
    device = find_device(device)
    folder, name, config = _find(source)
    kind = config.get("model_type")
    if kind == "clip":
        return replace(load_clip(folder, device=device), name=name).classifier(prompts or _prompts_of(source))
    if prompts is not None:
        raise ValueError(f"prompts= is for CLIP; {name} is {f'a model of type {kind!r}' if kind else 'none'}")
    if kind is None:
        return _from_folder(folder, name, config, device)
    return huggingface.image_classifier(folder, name=name, device=device)


def read_attributes(source: str | Path) -> tuple[str, ...] | None:
    """Attributes of a classifier (a name or path as of `load_classifier`), or None if its config does not name them."""
    if source == PIXELS:
        return AMOUNTS
    config = {"model_type": "clip"} if source == "clip" else _find(source)[2]
    if config.get("model_type") == "clip":
        return tuple(_prompts_of(source))
    known = config.get("attributes", config.get("id2label"))
    return None if known is None else tuple(known.values() if isinstance(known, dict) else known)


def _prompts_of(source: str | Path) -> Mapping[str, tuple[str, str]]:
    """Prompts of the attributes of a CLIP's domain, or of Table I."""
    return next((domain.prompts for domain in DOMAINS if domain.clip == source), TABLE_I_PROMPTS)


def check_attributes(
    wanted: Iterable[str],
    *,
    images: LabelledImages | None = None,
    classifier: Classifier | Sequence[str] | None = None,
    judge: Classifier | Sequence[str] | None = None,
) -> None:
    """Raise if images or classifiers lack an attribute, before a notebook computes anything.

    `workbench run`, `report` and `sweep` find this call in a notebook and execute it before they start a kernel.

    Parameters
    ----------
    wanted : iterable of str
        Names of attributes.
    images : LabelledImages, optional
        Images whose labels must include the attributes.
    classifier, judge : Classifier or sequence of str, optional
        The labeller and the judge, or the names of their attributes.

    Raises
    ------
    ValueError
        If an attribute is missing; the message names the notebook's parameter.
    """
    wanted = list(dict.fromkeys(wanted))
    for role, source in (("images", images), ("classifier", classifier), ("judge", judge)):
        if source is None:
            continue
        known = getattr(source, "names", getattr(source, "attributes", source))
        missing = [name for name in wanted if name not in known]
        if missing:
            raise ValueError(
                f"the {role} {'have' if role == 'images' else 'has'} no attribute {', '.join(missing)}; give "
                f"{role}_name, or attributes from {', '.join(known) or 'others, since there are no labels'}"
            )


@torch.enable_grad()
def train_classifier(
    images: LabelledImages | str | Path,
    *,
    out: str | Path,
    seed: int = 0,
    steps: int = 3000,
    design: str = "labeller",
    flips: bool = False,
    turns: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Classifier:
    """Train a small convolutional network on all 0/1 attributes of the images.

    The network is as large as the images, and at most 64 pixels (labeller) or 48 (judge): give images at the size of
    the model that they are for. They are shifted by up to 4% of their side and 5% in colour, shrunk to a random size
    between 32 pixels and its own, blurred and made noisy, so that the network works at other sizes and on
    generated images. AdamW; the training ends early once a tenth of the images, held out, gain nothing more. The same
    seed gives the same weights on one machine with the same number of threads.

    Parameters
    ----------
    images : LabelledImages, str or Path
        Images, or a source for `load_images`. At a size that was asked for, they keep its aspect ratio and channels;
        else they are cropped to the centre square, and pictures are in colour. Missing labels (NaN) are left out of
        the loss; columns with numbers other than 0 and 1, such as angles, are ignored with a warning.
    out : str or Path
        Folder for `config.json` and `model.safetensors`; `load_classifier` reads it. Files of these names are replaced.
    seed : int
        Seed of the initial weights, the order of the images and their augmentation.
    steps : int, default 3000
        Largest number of batches of 128 images.
    design : {"labeller", "judge"}
        Which of two networks; use one to label and the other to judge.
    flips, turns : bool
        Mirror images at random from left to right, and turn them by right angles: where neither changes a label, as in
        photographs from above.
    device : str or torch.device, optional
        By default the best available.
    progress : bool
        Show a bar, and first how long it takes at most.

    Returns
    -------
    Classifier
        The trained classifier.

    Raises
    ------
    ValueError
        If there are no 0/1 attributes, an attribute is the same in all images, `steps` is below 1, the design is
        unknown, or images that are not square are to be turned.
    """
    network_config = dict(DESIGNS[one_of("design", design, DESIGNS)])
    if steps < 1:
        raise ValueError(f"steps is {steps}; give 1 or more")
    out = paths.writable(out, folder=True)
    if not isinstance(images, LabelledImages):
        images = load_images(images)
    labels = binary_labels(images)
    network_config["size"] = min(network_config["size"], *images.image_shape[1:])
    images = images.at_side(network_config["size"])
    network_config["channels"], height, width = images.image_shape
    if turns and height != width:
        raise ValueError(f"images of {height} x {width} pixels can't be turned by right angles; give square ones")
    device = find_device(device)
    generator = torch.Generator().manual_seed(seed)
    network = new_network(len(labels.columns), network_config)
    network.initialise(generator).to(device)
    started = time.monotonic()
    pixels, mirrored = to_bytes(images, progress=progress), {"flips": flips, "turns": turns}
    fit = fit_network(network, pixels, labels, steps=steps, generator=generator, **mirrored, progress=progress)
    training = {
        "images": len(images),
        "fingerprint": images.fingerprint,
        "seed": seed,
        **mirrored,
        **fit,
        "batch": BATCH,
        "minutes": round((time.monotonic() - started) / 60, 2),
    }
    write_network(network, out, config=network_config, attributes=list(labels.columns), training=training)
    return load_classifier(out, device=device)


def _locate(source: str | Path) -> tuple[Path, str]:
    """Folder and name of a classifier."""
    if isinstance(source, str) and source in BUNDLED:
        return paths.models() / BUNDLED[source], source
    path = paths.local(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json; give the folder of a classifier")
        return path, path.resolve().name
    if source == "clip":
        source = CLIP
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        return find_folder(source, bundled=BUNDLED), source
    raise FileNotFoundError(
        f'no classifier {str(path)!r}; bundled: {", ".join(BUNDLED)}; otherwise give "{PIXELS}", "clip", a folder, the '
        "hub id of an image classifier, or a function with attributes="
    )


def _find(source: str | Path) -> tuple[Path, str, dict]:
    """Folder, name and config of a classifier."""
    folder, name = _locate(source)
    config = read_json(folder / "config.json")
    own = (config.get("format"), config.get("version")) == (FORMAT, VERSION)
    if not own and "model_type" not in config:
        raise ValueError(
            f"{folder / 'config.json'} describes no known classifier (format {FORMAT!r}, version "
            f"{VERSION}, or a transformers image classifier or CLIP)"
        )
    return folder, name, config


def _from_folder(folder: Path, name: str, config: dict, device: torch.device) -> Classifier:
    network = read_network(folder, config).to(device)
    return Classifier(
        name,
        tuple(config["attributes"]),
        config["hash"],
        device,
        lambda batch: network(network.prepare(batch)),
        lambda batch: network.features(network.prepare(batch)),
        _maps=lambda batch: network.maps(network.prepare(batch)),
    )


def _from_callable(function: Callable, attributes: Sequence[str] | None, device, name: str | None = None) -> Classifier:
    name = name or getattr(function, "__name__", type(function).__name__)
    if not attributes or isinstance(attributes, str):
        raise ValueError(f"{name} is a function; name its columns, such as attributes=['Smiling', 'Beard']")
    names, is_module = list(attributes), isinstance(function, nn.Module)
    if device is None:
        first = next(function.parameters(), None) if is_module else None
        device = "cpu" if first is None else first.device
    device = torch.device(device)
    if is_module:
        function.to(device)

    def score(batch: torch.Tensor) -> torch.Tensor:
        with _evaluating(function) if is_module else contextlib.nullcontext():
            given = function(batch.to(device))
        if isinstance(given, pd.DataFrame):
            for column in names:
                one_of(f"column of {name}", column, given)
            given = given[names].to_numpy()
        values = given.detach().cpu() if isinstance(given, torch.Tensor) else torch.from_numpy(np.array(given))
        if tuple(values.shape) != (len(batch), len(names)):
            expected = f"expected {(len(batch), len(names))}, one column for each of {', '.join(names)}"
            raise ValueError(f"{name} gave shape {tuple(values.shape)} for {len(batch)} images; {expected}")
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} gave values outside of [0, 1]; it must give probabilities")
        return torch.logit(values.double(), eps=1e-12)

    return Classifier(name, tuple(names), hash_weights(function) if is_module else None, device, score, None)


@contextlib.contextmanager
def _evaluating(module: nn.Module) -> Iterator[None]:
    """Batch statistics and dropout are off inside, so that an image's score is its own."""
    training = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, mode in training.items():
            part.training = mode
