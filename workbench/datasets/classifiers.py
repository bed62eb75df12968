"""Attribute classifiers: from a bundled name, a hub id, a folder or a function to a table of probabilities.

Whoever labels never scores: find directions with `load_classifier("avataaars")` and judge edits with
`load_classifier("avataaars-judge")`, a network of another design that was trained from another seed on other images.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import save
from torch import nn
from tqdm.auto import tqdm

from workbench import paths
from workbench.datasets import avataaars
from workbench.datasets.labelled import LabelledImages, load_images
from workbench.datasets.tables import not_binary
from workbench.diffusion.images import warn_of_unit_range
from workbench.diffusion.models import best_device
from workbench.diffusion.parallel import in_threads, split
from workbench.formats.checkpoints import hash_weights, load_strictly, read_json, read_state_dict

BUNDLED = {"avataaars": "labeller", "avataaars-judge": "judge"}
"""Bundled classifiers and their folders below data/models/avataaars-attributes."""

CLIP = "openai/clip-vit-base-patch32"
"""What `load_classifier("clip")` stands for."""

TABLE_I_PROMPTS = {
    "Smiling": ("A smiling person", "A person"),
    "Eyeglasses": ("A person wearing glasses", "A person"),
    "Old": ("An old person", "A young person"),
    "Male": ("A man", "A woman"),
    "Wearing_Hat": ("A person wearing a hat", "A person"),
}
"""Prompt pairs of Haas et al. 2024 (arXiv 2303.11073), Table I: with the attribute, without it."""

FORMAT, VERSION = "workbench-classifier", 1
WEIGHTS = "model.safetensors"

DESIGNS = {
    "labeller": {"size": 64, "widths": (24, 48, 96, 128), "kernel": 3, "residual": True, "activation": "relu"},
    "judge": {"size": 48, "widths": (24, 48, 96, 128), "kernel": 5, "residual": False, "activation": "gelu"},
}
"""Networks that `train_classifier` can train."""

BATCH, WARMUP = 128, 100
LEARNING_RATE, WEIGHT_DECAY = 2e-3, 0.02

# Clipping is off when sampling, so images overshoot [-1, 1] and are clamped; 8-bit values reach far further.
_MOST = 10.0

_ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU}


@dataclass(frozen=True, eq=False)
class Classifier:
    """A function from images to probabilities of named attributes; made by `load_classifier`.

    Attributes
    ----------
    name : str
    attributes : tuple of str
        Columns of the tables, in order.
    hash : str or None
        Content hash of the weights (and prompts); None for a function that has none.
    device : torch.device
        Where the network runs. Images may be anywhere, results are numpy and pandas.
    """

    name: str
    attributes: tuple[str, ...]
    hash: str | None
    device: torch.device
    _score: Callable[[torch.Tensor], torch.Tensor] = field(repr=False)
    _features: Callable[[torch.Tensor], torch.Tensor] | None = field(repr=False)
    _to_probability: Callable[[torch.Tensor], torch.Tensor] = field(default=torch.sigmoid, repr=False)
    _maps: Callable[[torch.Tensor], list[torch.Tensor]] | None = field(default=None, repr=False)

    def __call__(self, images, *, batch_size: int = 64, progress: bool = True) -> pd.DataFrame:
        """Probability of every attribute.

        Parameters
        ----------
        images : Tensor, ndarray or zarr array of shape (n, 3, H, W), values in [-1, 1], or LabelledImages
            Of any size. Overshoot (generated images go somewhat beyond the range) is clamped.
        batch_size : int
            Images a pass.
        progress : bool
            Show a bar if it takes more than two seconds.

        Returns
        -------
        pandas.DataFrame of shape (n, attributes), float64, values in [0, 1]
            Index: 0..n-1, or the file names of LabelledImages.

        Raises
        ------
        ValueError
            If the images are not floats of this shape and range.
        """
        scores = self._collect(self._score, images, batch_size=batch_size, progress=progress)
        return self._table(self._to_probability(scores), images)

    def scores(self, images, *, batch_size: int = 64, progress: bool = True) -> pd.DataFrame:
        """Logits, which keep an order where probabilities are 0 or 1 to the last digit; arguments as of a call.

        Returns
        -------
        pandas.DataFrame of shape (n, attributes), float64
            Log odds; for a network of exclusive classes, what enters its softmax.
        """
        return self._table(self._collect(self._score, images, batch_size=batch_size, progress=progress), images)

    def features(self, images, *, batch_size: int = 64, progress: bool = True) -> np.ndarray:
        """What the network's last layer sees, for distances between images or sets of them; arguments as of a call.

        Returns
        -------
        ndarray of shape (n, d), float32

        Raises
        ------
        ValueError
            If the classifier is a function, which has no inside.
        """
        if self._features is None:
            raise ValueError(f"{self.name} is a function and has no features; take a bundled classifier or a network")
        return self._collect(self._features, images, batch_size=batch_size, progress=progress).float().numpy()

    def maps(self, images, *, batch_size: int = 64) -> list[np.ndarray]:
        """What every stage of the network sees, for perceptual distances; arguments as of a call.

        Returns
        -------
        list of ndarray of shape (n, C_l, H_l, W_l), float32
            One a stage, finest first.

        Raises
        ------
        ValueError
            If the classifier is not a network of this project's, whose stages are known.
        """
        if self._maps is None:
            raise ValueError(f"the stages of {self.name} are not known; take a classifier that train_classifier wrote")
        n, stages = _count(images), []
        for start in range(0, n, batch_size):
            with torch.inference_mode():
                batch = self._maps(_read(images, slice(start, start + batch_size)))
            stages.append([stage.cpu().numpy() for stage in batch])
        return [np.concatenate(parts) for parts in zip(*stages, strict=True)]

    @torch.inference_mode()
    def _collect(self, function, images, *, batch_size: int, progress: bool) -> torch.Tensor:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        n = _count(images)
        outputs, ranges = [], []
        with tqdm(total=n, desc=self.name, unit="image", delay=2, leave=False, disable=not progress) as bar:
            for start in range(0, n, batch_size):
                batch = _read(images, slice(start, start + batch_size))
                outputs.append(self._in_threads(function, batch).cpu().double())
                ranges.append(torch.stack(batch.aminmax()))
                bar.update(len(batch))
        if not isinstance(images, LabelledImages):
            warn_of_unit_range(*map(float, torch.cat(ranges).aminmax()))
        return torch.cat(outputs)

    def _in_threads(self, function, batch: torch.Tensor) -> torch.Tensor:
        """`function` of a batch; a network of this project's splits its images over the cores of a CPU."""
        if self.device.type != "cpu" or self._maps is None:
            return function(batch)
        return torch.cat(in_threads(lambda rows: function(batch[rows]), split(len(batch), batch.shape[1:])))

    def _table(self, values: torch.Tensor, images) -> pd.DataFrame:
        index = images.labels.index if isinstance(images, LabelledImages) else None
        return pd.DataFrame(values.numpy(), index=index, columns=list(self.attributes))

    def __repr__(self) -> str:
        known = ", ".join(self.attributes[:3]) + (", ..." if len(self.attributes) > 3 else "")
        weights = f"weights {self.hash}" if self.hash else "a function"
        return f"Classifier({self.name!r}: {len(self.attributes)} attributes {known}, {self.device}, {weights})"


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
        - "avataaars" (labels) or "avataaars-judge" (scores), which are bundled;
        - a folder that `train_classifier` wrote;
        - a hub id or folder of a transformers image classifier: an attribute a class;
        - "clip", or a hub id or folder of another CLIP: zero-shot, an attribute a pair of prompts;
        - a function or module from a Tensor of shape (n, 3, H, W), values in [-1, 1], to probabilities: a DataFrame
          with these columns, or an array of shape (n, len(attributes)).
    device : str or torch.device, optional
        By default the best there is; for a callable, that of its weights, or the CPU.
    prompts : mapping of str to (str, str), optional
        For CLIP: each attribute's prompts with and without it; the probability is the softmax over the pair. Default:
        the five pairs of Haas et al. 2024, Table I.
    attributes : sequence of str
        For a callable: what its columns mean.

    Returns
    -------
    Classifier

    Raises
    ------
    FileNotFoundError
        If there is no such classifier here and it can't be fetched.
    ImportError
        If a transformers model is asked for without the extra `[hf]`.
    ValueError
        If the files are damaged or of another kind, or an argument is missing or does not belong to the source.
    """
    if isinstance(source, Classifier):
        return source
    if callable(source):
        return _from_callable(source, attributes, device)
    if attributes is not None:
        raise ValueError(f"attributes= names the columns of a function; {str(source)!r} has names of its own")
    device = best_device() if device is None else torch.device(device)
    folder, name = _locate(source)
    config = read_json(folder / "config.json")
    # A bundled network of another kind, such as a U-Net, says so in its config.
    if config.get("format") == FORMAT or "model_type" not in config:
        if prompts is not None:
            raise ValueError(f"prompts= is for CLIP; {name} has attributes of its own")
        return _from_folder(folder, name, config, device)
    if config["model_type"] == "clip":
        return _from_prompts(folder, name, prompts or TABLE_I_PROMPTS, device)
    if prompts is not None:
        raise ValueError(f"prompts= is for CLIP; {name} is a model of type {config['model_type']!r}")
    return _from_transformers(folder, name, device)


def read_attributes(source: str | Path) -> tuple[str, ...] | None:
    """Attributes of a classifier, without its weights.

    Parameters
    ----------
    source : str or path
        As of `load_classifier`, but no function.

    Returns
    -------
    tuple of str or None
        None if the config does not name them.

    Raises
    ------
    FileNotFoundError, ImportError, ValueError
        As `load_classifier`.
    """
    if source == "clip":
        return tuple(TABLE_I_PROMPTS)
    path = _locate(source)[0] / "config.json"
    config = read_json(path)
    if config.get("format") == FORMAT or "model_type" not in config:
        _refuse_unknown(config, path)
        return tuple(config.get("attributes", ()))
    if config["model_type"] == "clip":
        return tuple(TABLE_I_PROMPTS)
    return tuple(config["id2label"].values()) if isinstance(config.get("id2label"), dict) else None


def check_attributes(
    wanted: Iterable[str],
    *,
    images: LabelledImages | None = None,
    classifier: Classifier | Sequence[str] | None = None,
    judge: Classifier | Sequence[str] | None = None,
) -> None:
    """Refuse attributes that images or classifiers lack, in a notebook before it computes anything.

    `workbench run`, `report` and `sweep` find this call in a notebook and make it before they start a kernel.

    Parameters
    ----------
    wanted : iterable of str
        Names of attributes.
    images : LabelledImages, optional
        Whose labels must have them.
    classifier, judge : Classifier or sequence of str, optional
        The one that labels and the one that scores, or the names of their attributes.

    Raises
    ------
    ValueError
        If one lacks an attribute; the message names the notebook's parameter for it.
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


def train_classifier(
    images: LabelledImages | str | Path,
    *,
    out: str | Path,
    seed: int = 0,
    steps: int = 2000,
    design: str = "labeller",
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Classifier:
    """Train a small convolutional network on every attribute of 0 or 1 that the images are labelled with.

    Images are shifted by up to 4% of their side and 5% in colour, shrunk to a random size from half of the network's to
    its own, blurred and made noisy, so that the network holds at other sizes and on generated images. AdamW, cosine
    decay after a warmup. The same seed gives the same weights on one machine with the same number of threads.

    Parameters
    ----------
    images : LabelledImages, str or Path
        Or what `load_images` takes. A missing label (NaN) is left out of the loss; columns with other numbers than 0
        and 1, such as an angle, are left out altogether, with a warning.
    out : str or Path
        Folder for `config.json` and `model.safetensors`; `load_classifier` reads it. Files of these names are replaced.
    seed : int
        Of the first weights, the order of the images and what is done to them.
    steps : int, default 2000
        Batches of 128 images.
    design : {"labeller", "judge"}
        Which of two networks; let one label and the other score.
    device : str or torch.device, optional
        By default the best there is.
    progress : bool
        Show a bar.

    Returns
    -------
    Classifier
        The one that was written.

    Raises
    ------
    ValueError
        If there are no attributes of 0 and 1, an attribute is the same in all images, `steps` is below 1, or the design
        is unknown.
    """
    if design not in DESIGNS:
        raise ValueError(f"design {design!r} is not known; it is one of {', '.join(DESIGNS)}")
    if steps < 1:
        raise ValueError(f"steps is {steps}; give 1 or more")
    out = paths.writable(out, folder=True)
    if not isinstance(images, LabelledImages):
        images = load_images(images)
    labels = _binary_labels(images)
    device = best_device() if device is None else torch.device(device)
    generator = torch.Generator().manual_seed(seed)
    network = _new_network(len(labels.columns), DESIGNS[design])
    network.initialise(generator).to(device)
    started = time.monotonic()
    pixels = _to_bytes(images.at_size(network.size), progress=progress)
    loss = _fit(network, pixels, labels, steps=steps, generator=generator, progress=progress)
    training = {
        "images": len(images),
        "fingerprint": images.fingerprint,
        "seed": seed,
        "steps": steps,
        "batch": BATCH,
        "minutes": round((time.monotonic() - started) / 60, 2),
        "last_loss": round(loss, 5),
    }
    _write(network, out, design=design, attributes=list(labels.columns), training=training)
    return load_classifier(out, device=device)


def build_unlinked(n: int, *, part: int, out: str | Path, progress: bool = True) -> Path:
    """Draw avatars without the planted correlations and between the recipe's colours, for training.

    A classifier of the recipe's own images learns that long hair excludes a beard instead of looking for the beard, and
    then sees a beard vanish wherever hair grows. Here mouth, beard and glasses come from three other images of the
    part: each factor is as frequent as in the recipe, and all are independent. Diffusion models also paint colours that
    lie between those of the recipe: every second picture is blended, by up to a third, with the same one in the
    colours of yet another image; the labels are those of the larger share. A script that calls this needs the usual
    `if __name__ == "__main__":`.

    Parameters
    ----------
    n : int
        Number of images, 1..100,000.
    part : int
        As in `avataaars.build`: 0 and 1 are for training.
    out : str or Path
        Folder for `00000.webp`, ... (lossless) and `attributes.csv`, which is written last. Made if missing.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path
        The folder; `load_images` reads it.

    Raises
    ------
    ValueError
        If `n` or `part` is out of range.
    ImportError
        If the extra `[data]` or the cairo system library is missing.
    """
    if not 1 <= n <= 100_000:
        raise ValueError(f"n is {n}; give a number of images from 1 to 100000")
    avataaars.render(_unlinked(part, 0)[0])
    out = paths.writable(out, folder=True)
    out.mkdir(parents=True, exist_ok=True)
    jobs = (_draw_unlinked, repeat(part), range(n), repeat(out))
    # Fork is unsafe in a process that has started torch's threads.
    with ProcessPoolExecutor(os.cpu_count(), mp_context=get_context("spawn")) as pool:
        drawn = pool.map(*jobs, chunksize=16) if n >= 100 else map(*jobs)
        rows = list(tqdm(drawn, "avatars", n, unit="image", delay=2, disable=not progress))
    table = out / "attributes.csv.part"
    pd.DataFrame(rows).to_csv(table, index=False, lineterminator="\n")
    os.replace(table, out / "attributes.csv")
    return out


def evaluate_classifier(
    classifier: Classifier,
    images: LabelledImages,
    *,
    sizes: Sequence[int] | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Accuracy and calibration on labelled images that the classifier has not seen.

    Parameters
    ----------
    classifier : Classifier
    images : LabelledImages
    sizes : sequence of int, optional
        Sides in pixels to show the images at. Default: their own.
    progress : bool
        Show a bar if it takes more than two seconds.

    Returns
    -------
    pandas.DataFrame
        One row an attribute that is labelled, one level of columns a size: n (labelled images), frequency (of 1),
        accuracy (share of images on the right side of .5) and ece (expected calibration error).

    Raises
    ------
    ValueError
        If no attribute of the classifier is labelled.
    """
    known = [name for name in classifier.attributes if name in images.names]
    if not known:
        raise ValueError(f"the images are labelled with {', '.join(images.names) or 'nothing'}; {classifier} needs one")
    labels = images.labels[known]
    tables = {}
    for size in sizes or (images.size,):
        probabilities = classifier(images.at_size(size), progress=progress)[known]
        right = ((probabilities > 0.5) == (labels > 0.5)).where(labels.notna())
        tables[size] = pd.DataFrame(
            {
                "n": labels.notna().sum(),
                "frequency": labels.mean(),
                "accuracy": right.mean().astype(float),
                "ece": expected_calibration_error(calibration(probabilities, labels)),
            },
            index=known,
        )
    return pd.concat(tables, axis=1, names=["size", None])


def calibration(probabilities: pd.DataFrame | pd.Series, labels, *, bins: int = 10) -> pd.DataFrame:
    """Reliability curve: how often an attribute is there where its probability is said to be p.

    Parameters
    ----------
    probabilities : DataFrame or Series, values in [0, 1]
        A column an attribute.
    labels : DataFrame, Series or array of 0, 1 or NaN
        With the same attributes (a table may have more) and the same images: matched by index, not by position; an
        array is in the order of the probabilities. Images without a label are left out.
    bins : int
        Number of bins of equal width; p = 1 is in the last.

    Returns
    -------
    pandas.DataFrame
        Index: attribute and bin (0-based); columns lower, upper (edges), n (images in the bin), predicted (their mean
        probability) and observed (share with the attribute), both NaN where n is 0.

    Raises
    ------
    ValueError
        If images or attributes differ, or a value is out of range.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; give 1 or more")
    predicted = probabilities.to_frame(_name_of(probabilities)) if probabilities.ndim == 1 else probabilities
    observed = _matched(labels, predicted)
    if not ((predicted >= 0) & (predicted <= 1)).all(axis=None):
        raise ValueError("probabilities must be numbers from 0 to 1; give classifier(images), not its scores")
    if not (observed.isin([0, 1]) | observed.isna()).all(axis=None):
        raise ValueError("labels must be 0, 1 or missing")
    return pd.concat({name: _curve(predicted[name], observed[name], bins) for name in predicted}, names=["attribute"])


def expected_calibration_error(curve: pd.DataFrame) -> pd.Series:
    """Mean distance between a reliability curve and the diagonal, weighted by images (Guo et al. 2017, eq. 3).

    Parameters
    ----------
    curve : pandas.DataFrame
        From `calibration`.

    Returns
    -------
    pandas.Series of float in [0, 1]
        Index: attribute.
    """
    distance = (curve["predicted"] - curve["observed"]).abs() * curve["n"]
    by_attribute = pd.DataFrame({"distance": distance, "n": curve["n"]}).groupby(level="attribute", sort=False).sum()
    return (by_attribute["distance"] / by_attribute["n"]).rename("ece")


class AttributeNet(nn.Module):
    """A small convolutional network that takes images of any size.

    Parameters
    ----------
    attributes : int
        Number of outputs.
    size : int
        Side in pixels that images are resized to.
    widths : sequence of int
        Channels of each stage; a stage halves the resolution.
    kernel : int
        Odd side of the convolutions.
    residual : bool
        Add a residual convolution to each stage.
    activation : {"relu", "gelu"}
    """

    def __init__(
        self, attributes: int, *, size: int, widths: Sequence[int], kernel: int, residual: bool, activation: str
    ) -> None:
        super().__init__()
        self.size = size
        stages = []
        for inputs, outputs in zip((3, *widths), widths, strict=False):
            stages.append(_Convolution(inputs, outputs, kernel, stride=2, activation=activation))
            if residual:
                stages.append(_Residual(outputs, kernel, activation=activation))
        self.stages = nn.Sequential(*stages)
        self.head = nn.Linear(widths[-1], attributes)

    def prepare(self, images: torch.Tensor) -> torch.Tensor:
        """Tensor of shape (n, 3, H, W) on the CPU to what the network takes, on its device."""
        # Resized on the CPU, so that every device sees the same pixels.
        images = _resize(images, (self.size, self.size)).clamp(-1, 1)
        return images.to(self.head.weight.device).contiguous(memory_format=torch.channels_last)

    def features(self, images: torch.Tensor) -> torch.Tensor:
        """Tensor of shape (n, 3, size, size), values in [-1, 1], to (n, widths[-1])."""
        return self.stages(images).mean(dim=(2, 3))

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Tensor of shape (n, 3, size, size), values in [-1, 1], to the output of every stage."""
        outputs = []
        for stage in self.stages:
            images = stage(images)
            outputs.append(images)
        return outputs

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Tensor of shape (n, 3, size, size), values in [-1, 1], to logits (n, attributes)."""
        return self.head(self.features(images))

    def initialise(self, generator: torch.Generator) -> AttributeNet:
        """Draw the first weights."""
        for module in self.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.BatchNorm2d):
                module.reset_parameters()
        nn.init.zeros_(self.head.weight)
        return self


class _Convolution(nn.Sequential):
    def __init__(self, inputs: int, outputs: int, kernel: int, *, stride: int = 1, activation: str) -> None:
        super().__init__(
            nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(outputs),
            _ACTIVATIONS[activation](),
        )


class _Residual(nn.Module):
    def __init__(self, channels: int, kernel: int, *, activation: str) -> None:
        super().__init__()
        self.inner = _Convolution(channels, channels, kernel, activation=activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.inner(x)


def _count(images) -> int:
    """Number of images, of the right shape."""
    if isinstance(images, LabelledImages):
        n = len(images)
    else:
        shape = tuple(getattr(images, "shape", ()))
        if len(shape) != 4 or shape[1] != 3:
            given = f"have shape {shape}" if shape else f"are a {type(images).__name__}"
            raise ValueError(
                f"images {given}; give a Tensor or array of shape (n, 3, H, W), or LabelledImages "
                "(a single image is images[None])"
            )
        n = shape[0]
    if n == 0:
        raise ValueError("there are no images; give 1 or more")
    return n


def _read(images, rows: slice) -> torch.Tensor:
    """Some of the images: float32 on the CPU, in [-1, 1]."""
    batch = images[rows]
    batch = batch.detach().cpu() if isinstance(batch, torch.Tensor) else torch.from_numpy(np.asarray(batch))
    if not batch.is_floating_point():
        raise ValueError(f"images are {batch.dtype}; give floats in [-1, 1], for 8-bit images x / 127.5 - 1")
    if not torch.isfinite(batch).all():
        raise ValueError(f"images {rows.start} to {rows.start + len(batch) - 1} hold NaN or infinite values")
    if batch.abs().max() > _MOST:
        raise ValueError(f"images reach {batch.abs().max():g}; give values in [-1, 1], for 8-bit images x / 127.5 - 1")
    return batch.float().clamp(-1, 1)


def _resize(images: torch.Tensor, size: tuple[int, int], mode: str = "bicubic") -> torch.Tensor:
    if tuple(images.shape[2:]) == size:
        return images
    return F.interpolate(images, size=size, mode=mode, antialias=True, align_corners=False)


def _unlinked(part: int, i: int) -> tuple[avataaars.Factors, avataaars.Factors]:
    """Factors of a picture, and the same in other colours."""
    own, mouth, beard, glasses, colors = (
        avataaars.factors(part, i + shift) for shift in (0, 200_000, 400_000, 600_000, 800_000)
    )
    factors = replace(own, mouth=mouth.mouth, beard=beard.beard, glasses=glasses.glasses)
    other = {name: getattr(colors, name) for name in ("hair_color", "skin", "background")}
    return factors, replace(factors, **other)


def _draw_unlinked(part: int, i: int, out: Path) -> dict[str, str | int | float]:
    factors, recoloured = _unlinked(part, i)
    picture = avataaars.render(factors)
    if i % 2:
        share = np.random.default_rng([part, i]).uniform(0, 1 / 3)
        picture = Image.blend(picture, avataaars.render(recoloured), share)
    file = f"{i:05d}.webp"
    picture.save(out / file, "WEBP", lossless=True)
    return {"file": file, **avataaars.attributes(factors)}


def _new_network(attributes: int, config: Mapping) -> AttributeNet:
    # Without memory no weights are drawn, so that the global generator stays as it is.
    with torch.device("meta"):
        network = AttributeNet(attributes, **config)
    return network.to_empty(device="cpu")


def _refuse_unknown(config: dict, path: Path) -> None:
    if config.get("format") != FORMAT or config.get("version") != VERSION:
        raise ValueError(
            f"{path} describes no classifier that is known here (format {FORMAT!r}, version {VERSION}, or a "
            "transformers image classifier or CLIP)"
        )


def _from_folder(folder: Path, name: str, config: dict, device: torch.device) -> Classifier:
    path = folder / "config.json"
    _refuse_unknown(config, path)
    try:
        attributes = tuple(config["attributes"])
        network = _new_network(len(attributes), config["network"])
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"{path} is damaged: it does not describe a network ({error})") from error
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise FileNotFoundError(f"there is no {weights}; copy the classifier's folder again or train it again")
    load_strictly(network, read_state_dict(weights), path=weights)
    if hash_weights(network) != config.get("hash"):
        raise ValueError(f"{weights} is not the file that {path} was written for; copy both again or train again")
    network.eval().requires_grad_(False).to(device)
    return Classifier(
        name,
        attributes,
        config["hash"],
        device,
        lambda batch: network(network.prepare(batch)),
        lambda batch: network.features(network.prepare(batch)),
        _maps=lambda batch: network.maps(network.prepare(batch)),
    )


def _write(network: AttributeNet, out: Path, *, design: str, attributes: list[str], training: dict) -> None:
    out.mkdir(parents=True, exist_ok=True)
    config = {
        "format": FORMAT,
        "version": VERSION,
        "attributes": attributes,
        "network": DESIGNS[design],
        "hash": hash_weights(network),
        "training": training,
    }
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in network.state_dict().items()}
    weights_part, config_part = out / f"{WEIGHTS}.part", out / "config.json.part"
    weights_part.write_bytes(save(state))
    config_part.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    os.replace(weights_part, out / WEIGHTS)
    os.replace(config_part, out / "config.json")


def _binary_labels(images: LabelledImages) -> pd.DataFrame:
    others = not_binary(images.labels)
    labels = images.labels.drop(columns=list(others))
    if labels.empty:
        why = f" ({'; '.join(others.values())})" if others else ""
        raise ValueError(f"{images} has no attribute of 0 and 1{why}; give images with such labels, or labels=")
    constant = [name for name in labels if labels[name].nunique() < 2]
    if constant:
        raise ValueError(
            f"{', '.join(constant)} does not vary among these {len(images)} images; give more images or drop the column"
        )
    if others:
        warnings.warn(f"left out is what is not labelled with 0 and 1: {'; '.join(others.values())}", stacklevel=3)
    return labels


def _to_bytes(images: LabelledImages, *, progress: bool) -> torch.Tensor:
    """All images in memory, 8 bits a value."""
    pixels = torch.empty(len(images), 3, images.size, images.size, dtype=torch.uint8)
    done = 0
    with tqdm(total=len(images), desc="decoding", unit="image", delay=2, leave=False, disable=not progress) as bar:
        for batch in images.batches(256):
            pixels[done : done + len(batch)] = ((batch + 1) * 127.5).round()
            done += len(batch)
            bar.update(len(batch))
    return pixels


def _fit(
    network: AttributeNet,
    pixels: torch.Tensor,
    labels: pd.DataFrame,
    *,
    steps: int,
    generator: torch.Generator,
    progress: bool,
) -> float:
    """Train the network in place; returns the mean loss of the last tenth of the steps."""
    labels = torch.tensor(labels.to_numpy(np.float32))
    network.train().to(memory_format=torch.channels_last)
    optimiser = torch.optim.AdamW(network.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    warmup = min(WARMUP, steps // 10 + 1)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimiser, lambda i: min((i + 1) / warmup, 0.5 + 0.5 * np.cos(np.pi * i / steps))
    )
    losses = []
    rows_of = _shuffled(len(pixels), generator)
    for _ in tqdm(range(steps), "training", unit="step", delay=2, leave=False, disable=not progress):
        rows = next(rows_of)
        batch = network.prepare(_degrade(pixels[rows].float() / 127.5 - 1, generator))
        truth = labels[rows].to(batch.device)
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=batch.device.type != "mps"):
            scores = network(batch)
        known = truth.isfinite().float()
        loss = F.binary_cross_entropy_with_logits(scores.float(), truth.nan_to_num(), weight=known)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        rate.step()
        losses.append(loss.detach())
    network.eval()
    return float(torch.stack(losses[-max(1, steps // 10) :]).mean())


def _shuffled(n: int, generator: torch.Generator) -> Iterator[torch.Tensor]:
    """Batches of positions, every image once before any comes again."""
    while True:
        order = torch.randperm(n, generator=generator)
        for start in range(0, max(1, n - BATCH + 1), BATCH):
            yield order[start : start + BATCH]


def _degrade(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """What a small diffusion model does to images: other places, colours and sizes, blur, noise."""
    n, side = len(images), images.shape[-1]
    shift = torch.eye(2, 3).repeat(n, 1, 1)
    shift[:, :, 2] = _uniform((n, 2), -0.08, 0.08, generator)
    grid = F.affine_grid(shift, list(images.shape), align_corners=False)
    images = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    gain, offset = _uniform((n, 3, 1, 1), 0.95, 1.05, generator), _uniform((n, 3, 1, 1), -0.05, 0.05, generator)
    images = gain * images + offset
    smaller = int(torch.randint(side // 2, side + 1, (), generator=generator))
    images = _resize(images, (smaller, smaller))
    images = _blur(images, float(_uniform((), 0.0, 0.8, generator)))
    deviation = _uniform((n, 1, 1, 1), 0.0, 0.1, generator)
    return images + deviation * torch.randn(images.shape, generator=generator)


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return low + (high - low) * torch.rand(shape, generator=generator)


def _blur(images: torch.Tensor, sigma: float) -> torch.Tensor:
    """Gaussian blur by 5 pixels a side."""
    weights = torch.exp(-0.5 * (torch.arange(-2.0, 3.0) / max(sigma, 1e-3)) ** 2)
    weights = (weights / weights.sum()).repeat(3, 1, 1, 1)
    images = F.pad(images, (2, 2, 2, 2), mode="replicate")
    return F.conv2d(F.conv2d(images, weights, groups=3), weights.transpose(2, 3), groups=3)


def _from_callable(function: Callable, attributes: Sequence[str] | None, device) -> Classifier:
    name = getattr(function, "__name__", type(function).__name__)
    if not attributes or isinstance(attributes, str):
        raise ValueError(f"{name} is a function; name its columns, such as attributes=['Smiling', 'Beard']")
    names = list(attributes)
    is_module = isinstance(function, nn.Module)
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
            missing = [n for n in names if n not in given]
            if missing:
                raise ValueError(f"{name} gave no column {', '.join(missing)}; it gave {', '.join(map(str, given))}")
            given = given[names].to_numpy()
        values = given.detach().cpu() if isinstance(given, torch.Tensor) else torch.from_numpy(np.array(given))
        if tuple(values.shape) != (len(batch), len(names)):
            raise ValueError(
                f"{name} gave shape {tuple(values.shape)} for {len(batch)} images; {(len(batch), len(names))} was due, "
                f"a column each for {', '.join(names)}"
            )
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


def _from_transformers(folder: Path, name: str, device: torch.device) -> Classifier:
    transformers = _import_transformers()
    network = _load_pretrained(transformers.AutoModelForImageClassification, folder, name).to(device)
    prepare = _preprocessing(folder)
    heads = [m for m in network.modules() if isinstance(m, nn.Linear) and m.out_features == network.config.num_labels]

    def score(batch: torch.Tensor) -> torch.Tensor:
        return network(pixel_values=prepare(batch).to(device)).logits

    def features(batch: torch.Tensor) -> torch.Tensor:
        seen = []
        with heads[-1].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0])):
            score(batch)
        return seen[0].flatten(1)

    exclusive = network.config.problem_type != "multi_label_classification" and network.config.num_labels > 1
    return Classifier(
        name,
        tuple(network.config.id2label[i] for i in range(network.config.num_labels)),
        hash_weights(network),
        device,
        score,
        features if heads else None,
        (lambda scores: scores.softmax(dim=1)) if exclusive else torch.sigmoid,
    )


def _from_prompts(folder: Path, name: str, prompts: Mapping[str, tuple[str, str]], device: torch.device) -> Classifier:
    """Zero-shot: the softmax over a pair of prompts is the sigmoid of the difference of their logits."""
    for attribute, pair in prompts.items():
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(prompt, str) for prompt in pair):
            raise ValueError(f"prompts[{attribute!r}] is {pair!r}; give two texts, with the attribute and without it")
    network, features, embed = _clip(folder, name, device)
    with torch.inference_mode():
        embedded = embed([text for pair in prompts.values() for text in pair])
        present, absent = embedded[0::2], embedded[1::2]
        difference = network.logit_scale.exp() * (present - absent).T
    digest = hashlib.sha256(json.dumps([hash_weights(network), list(prompts.items())]).encode()).hexdigest()[:16]
    return Classifier(name, tuple(prompts), digest, device, lambda batch: features(batch) @ difference, features)


def clip_encoders(source: str | Path, *, device: str | torch.device | None = None) -> tuple[Callable, Callable]:
    """Functions from images in [-1, 1], and from a list of texts, to CLIP's embeddings of length 1."""
    folder, name = _locate(source)
    kind = read_json(folder / "config.json").get("model_type")
    if kind != "clip":
        raise ValueError(f"{name} is a model of type {kind!r}, not a CLIP")
    return _clip(folder, name, best_device() if device is None else torch.device(device))[1:]


def _clip(folder: Path, name: str, device: torch.device) -> tuple[nn.Module, Callable, Callable]:
    transformers = _import_transformers()
    network = _load_pretrained(transformers.CLIPModel, folder, name).to(device)
    prepare = _preprocessing(folder)
    try:
        tokeniser = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} has no tokenizer that can be read ({_first_line(error)}); copy it again") from error

    def images(batch: torch.Tensor) -> torch.Tensor:
        return F.normalize(network.get_image_features(pixel_values=prepare(batch).to(device)).pooler_output, dim=1)

    def texts(given: list[str]) -> torch.Tensor:
        tokens = tokeniser(given, padding=True, return_tensors="pt").to(device)
        return F.normalize(network.get_text_features(**tokens).pooler_output, dim=1)

    return network, images, texts


def segmentation_logits(source: str | Path, *, device: str | torch.device | None = None) -> Callable:
    """A function from images in [-1, 1] to the logits of a transformers segmentation, (n, classes, h, w)."""
    folder, name = _locate(source)
    transformers = _import_transformers()
    device = best_device() if device is None else torch.device(device)
    network = _load_pretrained(transformers.AutoModelForSemanticSegmentation, folder, name).to(device)
    prepare = _preprocessing(folder)
    return lambda batch: network(pixel_values=prepare(batch).to(device)).logits


def _load_pretrained(kind, folder: Path, name: str) -> nn.Module:
    """A transformers network in eval mode, all of its weights read from the folder."""
    log = _import_transformers().utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    # It warns of weights that are missing or left over; the missing ones are an error here.
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        with torch.random.fork_rng(devices=[]):
            network, report = kind.from_pretrained(
                folder, local_files_only=True, trust_remote_code=False, dtype=torch.float32, output_loading_info=True
            )
    except (OSError, ValueError, RuntimeError, LookupError, TypeError, AttributeError, SafetensorError) as error:
        what = "a segmentation" if "Segmentation" in kind.__name__ else "an image classifier or CLIP"
        raise ValueError(f"{folder} can't be loaded as {what} ({_first_line(error)})") from error
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()
    missing = sorted(report["missing_keys"])
    if missing:
        raise ValueError(
            f"{name} has no weights for {missing[0]} ({len(missing)} are missing); it is not a finished classifier"
        )
    return network.eval().requires_grad_(False)


def _preprocessing(folder: Path) -> Callable[[torch.Tensor], torch.Tensor]:
    """What the model's image processor does, from images in [-1, 1]; transformers' own need torchvision."""
    candidates = [folder / name for name in ("preprocessor_config.json", "processor_config.json")]
    path = next((p for p in candidates if p.is_file()), None)
    if path is None:
        raise FileNotFoundError(f"{folder} has no preprocessor_config.json; copy it from where the model comes from")
    config = read_json(path)
    config = config.get("image_processor", config)
    size, crop = config.get("size"), config.get("crop_size")
    for key, what in (("include_top", "a second normalisation"), ("rescale_offset", "a shifted scale of values")):
        if config.get(key):
            raise ValueError(f"{path} asks for {what} ({key}), which is not known here; give a function instead")
    # PIL's numbers: 2 is bilinear, 3 bicubic.
    modes = {2: "bilinear", 3: "bicubic"}
    if config.get("resample", 2) not in modes:
        raise ValueError(f"{path} resizes by PIL's filter {config['resample']}; known here are 2 and 3")
    mode = modes[config.get("resample", 2)]
    edge = size.get("shortest_edge") if isinstance(size, Mapping) else size
    if config.get("crop_pct") and edge is not None:
        # ConvNext's: a smaller image is cut out of one that is resized to more, a larger one is only resized.
        cut = edge < 384
        size = {"shortest_edge": int(edge / config["crop_pct"])} if cut else {"height": edge, "width": edge}
        crop = {"height": edge, "width": edge}
        config = {**config, "do_center_crop": cut}
    mean, std = (torch.tensor(config.get(key, 0.5)).view(-1, 1, 1) for key in ("image_mean", "image_std"))

    def prepare(batch: torch.Tensor) -> torch.Tensor:
        if config.get("do_resize", size is not None):
            batch = _resize(batch, _target(size, batch.shape[2:]), mode)
        if config.get("do_center_crop") and crop is not None:
            batch = _crop(batch, _target(crop, batch.shape[2:]))
        batch = (batch.clamp(-1, 1) + 1) * 127.5
        if config.get("do_rescale", True):
            batch = batch * config.get("rescale_factor", 1 / 255)
        return (batch - mean) / std if config.get("do_normalize", True) else batch

    return prepare


def _target(size: int | Mapping, shape: Sequence[int]) -> tuple[int, int]:
    """Height and width that an image processor's size means for an image of this shape."""
    if isinstance(size, Mapping) and "height" in size:
        return size["height"], size["width"]
    if isinstance(size, Mapping) and "shortest_edge" not in size:
        raise ValueError(f"the image processor's size is {dict(size)}; give height and width, or shortest_edge")
    edge = size["shortest_edge"] if isinstance(size, Mapping) else size
    return tuple(edge * side // min(shape) for side in shape)


def _crop(batch: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    top, left = ((side - wanted) // 2 for side, wanted in zip(batch.shape[2:], size, strict=True))
    return batch[:, :, max(top, 0) : max(top, 0) + size[0], max(left, 0) : max(left, 0) + size[1]]


def _locate(source: str | Path) -> tuple[Path, str]:
    """Folder and name of a classifier."""
    if source == "":
        raise ValueError(f"the name of a classifier is empty; bundled: {', '.join(BUNDLED)}")
    if source in BUNDLED:
        return paths.models() / "avataaars-attributes" / BUNDLED[source], source
    if source == "clip":
        source = CLIP
    path = paths.local(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"{path} has no config.json; give the folder of a classifier")
        return path, path.resolve().name
    if isinstance(source, str) and re.fullmatch(r"[\w.-]+/[\w.-]+", source):
        _import_transformers()
        return _download(source), source
    raise FileNotFoundError(
        f'no classifier {str(path)!r}; bundled: {", ".join(BUNDLED)}; otherwise give "clip", a folder, the hub id '
        "of an image classifier, or a function with attributes="
    )


def _download(repository: str) -> Path:
    # The local cache first, and safetensors before pickled weights (which are read without executing them).
    for local in (True, False):
        try:
            for weights in ("*.safetensors", "pytorch_model*.bin"):
                wanted = ["*.json", "*.txt", weights]
                folder = Path(snapshot_download(repository, allow_patterns=wanted, local_files_only=local))
                if any(folder.glob(weights)):
                    return folder
            why = "it holds no weights for torch"
        except (OSError, ValueError, RuntimeError) as error:
            why = type(error).__name__
    raise FileNotFoundError(
        f"{repository!r} is neither a local folder nor in the hub cache, and it can't be fetched now ({why}); on a "
        f"machine with a network run `hf download {repository}` and copy the folder here, or set HF_HOME to its cache; "
        f"bundled: {', '.join(BUNDLED)}"
    )


def _import_transformers():
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f"classifiers from the hub need transformers; install it with `pip install -e .[hf]` ({error})"
        ) from error
    return transformers


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0]


def _name_of(series: pd.Series) -> str:
    return "attribute" if series.name is None else series.name


def _matched(labels, predicted: pd.DataFrame) -> pd.DataFrame:
    """Labels as a table with the rows and columns of the probabilities."""
    if not isinstance(labels, (pd.DataFrame, pd.Series)):
        values = np.asarray(labels, dtype=float)
        if values.reshape(len(values), -1).shape != predicted.shape:
            raise ValueError(f"labels have shape {values.shape} and probabilities {predicted.shape}; give one each")
        return pd.DataFrame(values.reshape(predicted.shape), predicted.index, predicted.columns)
    if labels.ndim == 1:
        labels = labels.to_frame(predicted.columns[0] if predicted.shape[1] == 1 else _name_of(labels))
    unlabelled = [str(name) for name in predicted if name not in labels]
    if unlabelled:
        raise ValueError(f"there are no labels for {', '.join(unlabelled)}; select columns that both tables have")
    if len(labels) != len(predicted) or not labels.index.is_unique or not predicted.index.isin(labels.index).all():
        raise ValueError(
            f"the {len(labels)} labels and {len(predicted)} probabilities are of other images: their indexes differ; "
            "give both with file names, or both numbered"
        )
    return labels.loc[predicted.index, list(predicted.columns)].astype(float)


def _curve(predicted: pd.Series, observed: pd.Series, bins: int) -> pd.DataFrame:
    labelled = observed.notna().to_numpy()
    predicted, observed = predicted.to_numpy(float)[labelled], observed.to_numpy(float)[labelled]
    bin_of = np.minimum((predicted * bins).astype(int), bins - 1)
    edges = np.linspace(0, 1, bins + 1)
    n = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "lower": edges[:-1],
                "upper": edges[1:],
                "n": n,
                "predicted": np.bincount(bin_of, predicted, bins) / n,
                "observed": np.bincount(bin_of, observed, bins) / n,
            },
            index=pd.RangeIndex(bins, name="bin"),
        )
