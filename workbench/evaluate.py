"""Evaluate a model's samples against held-out images, for its model card."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jinja2
import numpy as np
import pandas as pd
import torch

from workbench.analysis.image_metrics import (
    attribute_frequencies,
    frechet_distance,
    joint_frequencies,
    kernel_distance,
    memorisation,
    nearest_neighbours,
    precision_recall,
)
from workbench.analysis.intervals import Estimate
from workbench.analysis.spectra import data_spectrum
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.images import check_images
from workbench.diffusion.inversion import invert
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import sample
from workbench.diffusion.training import read_settings
from workbench.io import write_text
from workbench.paths import local, writable

CARD, NUMBERS = "README.md", "evaluation.json"
BEGIN, END = "<!-- evaluation: written by workbench evaluate-model -->", "<!-- /evaluation -->"

HALVINGS = 5
"""Times that the held-out images are halved at random, for the distances' means and ranges."""

GOOD_RATIO, POOR_RATIO, LOW_RECALL, ENOUGH_IMAGES, GOOD_DECIBEL, FAR_POINTS = 3.0, 10.0, 0.5, 250, 25.0, 5.0
LOW_POWER, HIGH_POWER = 0.7, 1.4
"""Bounds of `Evaluation.statement`, the workbench's own: Frechet distance as a multiple and recall as a share of those
of real images, images on a side of a distance, dB of reconstructions, percentage points of attributes, and power of the
finest detail as a multiple of that of real images."""


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Quality of a model's samples; made by `evaluate_model`.

    Attributes
    ----------
    distances : DataFrame
        One row per feature space and measure ("frechet", "kernel"): `generated`, the distance of samples to one half of
        the held-out images, and `real`, the distance of the other half to it, with as many each; means over halvings,
        with their ranges `generated_low`, `generated_high`, `real_low`, `real_high`; and `ratio`, generated / real, for
        "frechet" (the kernel distance of real images is 0 on average).
    coverage : DataFrame
        One row per feature space: precision and recall of samples, and of the other half, each an `Estimate`.
    frequencies : DataFrame
        See `attribute_frequencies`; `drawn` is the judge's frequency among the held-out images.
    pairs : DataFrame
        See `joint_frequencies`.
    spectrum : Series
        Power of the samples as a multiple of that of the held-out images, by octave of spatial frequency. The index is
        the octave's lowest frequency in cycles an image; the last octave has all that are finer.
    copies : Estimate or None
        Share of samples nearer to a training image than to a held-out one, in pixels; None without training images.
    copies_real : Estimate or None
        The same share for held-out images not used in the comparison.
    inversion : ndarray of shape (k,), dB
        Peak signal-to-noise ratio of DDIM inversion's reconstruction of held-out images.
    images : Tensor of shape (n, C, H, W)
        The samples.
    about : dict
        Model, settings and numbers of images.
    nearest : Tensor of shape (2, 10, C, H, W) or None
        The ten samples nearest to a training image, above that image.
    """

    distances: pd.DataFrame
    coverage: pd.DataFrame = field(repr=False)
    frequencies: pd.DataFrame = field(repr=False)
    pairs: pd.DataFrame = field(repr=False)
    spectrum: pd.Series = field(repr=False)
    copies: Estimate | None
    copies_real: Estimate | None = field(repr=False)
    inversion: np.ndarray = field(repr=False)
    images: torch.Tensor = field(repr=False)
    about: dict
    nearest: torch.Tensor | None = field(repr=False)

    def to_markdown(self) -> str:
        """Format as a section of a model card."""
        about = {"a": self.about, "statement": self.statement(), "halvings": HALVINGS}
        median = np.median(self.inversion) if len(self.inversion) else None
        return _render("quality", **about, **vars(self), median=median)

    def statement(self) -> list[str]:
        """Summarise the quality in sentences; the worst feature space counts."""
        ratio, m = float(self.distances["ratio"].max()), self.about["m"]
        share = min(row.recall.value / max(row.recall_real.value, 1e-9) for row in self.coverage.itertuples())
        kind = "poor" if ratio > POOR_RATIO or share < LOW_RECALL else "good" if ratio <= GOOD_RATIO else "usable"
        if kind != "poor" and m < ENOUGH_IMAGES:
            kind = f"not known to be good or poor from {m} images"
        sentences = [
            f"The samples are {kind}: their Frechet distance is {ratio:.1f} times that of other real images (up to "
            f"{GOOD_RATIO:g} is good, above {POOR_RATIO:g} poor), and their recall is {100 * share:.0f}% of that of "
            f"real images (below {100 * LOW_RECALL:.0f}% is poor)."
        ]
        fine, frequency = float(self.spectrum.iloc[-1]), self.spectrum.index[-1]
        if not LOW_POWER <= fine <= HIGH_POWER:
            cause = (
                "too little fine detail: sample without noise (eta 0) or in more steps, or train on"
                if fine < LOW_POWER
                else "too much fine detail, or noise: train on"
            )
            sentences.append(
                f"From {frequency} cycles an image on, samples have {fine:.2f} times the power of real images, {cause}."
            )
        if self.copies is not None:
            copied = self.copies.low > self.copies_real.high
            sentences.append(
                "Some samples are copies of training images; use more images or fewer steps."
                if copied
                else "No sign that the model copies its training images."
            )
        if len(self.inversion):
            decibel = float(np.median(self.inversion))
            words = (
                "close enough to edit them"
                if decibel >= GOOD_DECIBEL
                else "too far from the original to edit; edit samples instead"
            )
            sentences.append(f"Inverted images are reconstructed at {decibel:.0f} dB (median): {words}.")
        if len(self.frequencies):
            gap = 100 * (self.frequencies["found"] - self.frequencies["drawn"]).abs()
            far = [f"{name} ({gap[name]:.0f} points)" for name in gap.index[gap > FAR_POINTS]]
            sentences.append(
                "Attributes that the judge finds more or less often in samples than in real images (the last column): "
                f"{', '.join(far)}."
                if far
                else f"Attributes are as frequent as in real images, within {FAR_POINTS:g} points."
            )
        return sentences

    def numbers(self) -> dict:
        """All numbers, as JSON values."""
        copies = {"generated": self.copies, "real": self.copies_real}
        return {
            "about": self.about,
            "distances": self.distances.astype(object).replace({np.nan: None}).reset_index().to_dict("records"),
            "coverage": {space: row.map(vars).to_dict() for space, row in self.coverage.iterrows()},
            "frequencies": self.frequencies.reset_index().to_dict("records"),
            "pairs": {
                ", ".join(pair): {key: row[key].to_dict() for key in ("expected", "found")}
                | {"distance": row["distance", ""]}
                for pair, row in self.pairs.iterrows()
            },
            "spectrum": {str(frequency): ratio for frequency, ratio in self.spectrum.items()},
            "memorisation": {of: None if estimate is None else vars(estimate) for of, estimate in copies.items()},
            "inversion_dB": [round(float(value), 2) for value in self.inversion],
        }

    def write(self, folder: str | Path) -> Path:
        """Write the numbers to the folder's `evaluation.json` and model card, replacing earlier ones.

        A card without this section gets it at the end; a folder without a card gets one. Returns the card.
        """
        folder = writable(folder, folder=True)
        card = folder / CARD
        text = card.read_text(encoding="utf-8") if card.is_file() else new_card(folder)
        section = f"{BEGIN}\n{self.to_markdown()}\n{END}"
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2] if END in rest else f"\n{rest}"
        write_text(card, f"{before.rstrip()}\n\n{section}{after}")
        write_text(folder / NUMBERS, json.dumps(self.numbers(), indent=2) + "\n")
        return card


def evaluate_model(
    model: Model,
    images: LabelledImages,
    *,
    classifiers: Sequence[Classifier],
    training: torch.Tensor | LabelledImages | Sequence | None = None,
    frequencies: Mapping[str, float] | None = None,
    pairs: Mapping[tuple[str, str], Sequence[float]] | None = None,
    n: int = 2000,
    steps: int = 50,
    eta: float = 1.0,
    seed: int = 0,
    n_inverted: int = 32,
    inversion_steps: int = 50,
    samples: torch.Tensor | None = None,
    batch_size: int | None = None,
    progress: bool = True,
) -> Evaluation:
    """Measure the samples of a model against held-out images.

    Parameters
    ----------
    model : Model
    images : LabelledImages
        Held-out images, 8 or more; they are cropped and resized to the model's size.
    classifiers : sequence of Classifier
        Distances are measured in the space of their features; the last one judges attributes.
    training : LabelledImages or Tensor of shape (k, C, H, W) with values in [-1, 1], or a list of these, optional
        Training images of the model, for the memorisation check.
    frequencies : mapping of attribute to probability, optional
        Expected frequencies in samples. Default: the frequencies of the held-out images' labels, for attributes of the
        judge.
    pairs : mapping of (attribute, attribute) to 4 probabilities, optional
        See `joint_frequencies`. `domain_of("avataaars")` has both for the bundled images.
    n : int, default 2000
        Number of samples, with seeds from `seed` on. Distances use as many as half of the held-out images.
    steps, eta
        Steps and eta of the samples; see `sample`. Fewer steps give a larger distance.
    seed : int
        First seed of the samples, and seed of random choices here.
    n_inverted, inversion_steps : int
        Number of held-out images to invert (0 for none), and the steps.
    samples : Tensor of shape (n, C, H, W), optional
        Samples drawn before with these seeds, steps and eta.
    batch_size : int, optional
    progress : bool

    Returns
    -------
    Evaluation

    Raises
    ------
    ValueError
        If there are too few images or samples, the number of samples is not `n`, or
        `n_inverted` is negative.
    """
    if np.ndim(eta):
        raise ValueError("eta is a list; a card has one number")
    if n_inverted < 0:
        raise ValueError(f"n_inverted is {n_inverted}; give a number of images, or 0 to invert none")
    if len(images) < 8 or n < 8:
        raise ValueError(f"{len(images)} held-out images and {n} samples are too few; give 8 or more of both")
    if samples is None:
        samples = sample(
            model, range(seed, seed + n), steps=steps, eta=eta, batch_size=batch_size, progress=progress
        ).images
    if len(samples) != n:
        raise ValueError(f"there are {len(samples)} samples and n is {n}; give as many")
    real, samples = check_images(images, model).clamp(-1, 1), samples.clamp(-1, 1)
    m = min(n, len(real) // 2)
    rng = np.random.default_rng(seed)
    halvings = [rng.permutation(len(real))[: 2 * m].reshape(2, m) for _ in range(HALVINGS)]
    taken = [rng.permutation(n)[:m] for _ in range(HALVINGS)]
    half, other = halvings[0]
    distances, coverage = {}, {}
    for classifier in classifiers:
        made, drawn = (classifier.features(x, progress=progress) for x in (samples, real))
        for measure, distance in (("frechet", frechet_distance), ("kernel", kernel_distance)):
            distances[classifier.name, measure] = _compare(distance, made, drawn, halvings=halvings, taken=taken)
        found, usual = (precision_recall(x, drawn[half]) for x in (made[taken[0]], drawn[other]))
        coverage[classifier.name] = {"precision": found.precision, "recall": found.recall}
        coverage[classifier.name] |= {"precision_real": usual.precision, "recall_real": usual.recall}
    distances = pd.DataFrame.from_dict(distances, orient="index").rename_axis(["space", "measure"])
    ratio = distances["generated"] / distances["real"]
    judge = classifiers[-1]
    labels, drawn_labels = ((judge(x, progress=progress) > 0.5).astype(int) for x in (samples, real))
    known = [name for name in judge.attributes if name in images.names]
    expected = frequencies or {name: float(images.label(name).mean()) for name in known}
    table = attribute_frequencies(labels, expected)
    table["drawn"] = drawn_labels[list(expected)].mean()
    copies = copies_real = nearest = None
    if training is not None:
        learned = check_images(training, model).clamp(-1, 1)
        flat, flat_real, flat_learned = (x.flatten(1).numpy() for x in (samples, real, learned))
        copies = memorisation(flat, flat_learned, flat_real[half], seed=seed)
        copies_real = memorisation(flat_real[other], flat_learned, flat_real[half], seed=seed)
        near, position = nearest_neighbours(flat, flat_learned)
        closest = np.argsort(near[:, 0])[:10]
        nearest = torch.stack([samples[closest], learned[position[closest, 0]]])
    errors = np.empty(0)
    if n_inverted:
        inverted = invert(model, real[:n_inverted], steps=inversion_steps, batch_size=batch_size, progress=progress)
        errors = inverted.round_trip_error()
    return Evaluation(
        distances=distances.assign(ratio=ratio.where(ratio.index.get_level_values("measure") == "frechet")),
        coverage=pd.DataFrame.from_dict(coverage, orient="index"),
        frequencies=table,
        pairs=joint_frequencies(labels, pairs or {}),
        spectrum=_octaves(samples) / _octaves(real),
        copies=copies,
        copies_real=copies_real,
        inversion=errors,
        images=samples,
        about={
            "model": model.name,
            "hash": model.hash,
            "n": n,
            "seed": seed,
            "steps": steps,
            "eta": float(eta),
            "held_out": len(real),
            "m": m,
            "compared": 0 if training is None else min(len(learned), m),
            "inversion_steps": inversion_steps,
            "expected": "labels" if frequencies is None else "recipe",
            "judge": judge.name,
        },
        nearest=nearest,
    )


def new_card(folder: str | Path) -> str:
    """A model card from the `training.json` that a training leaves; headings to fill in where it knows nothing."""
    folder = local(folder)
    path = folder / "training.json"
    if not path.is_file():
        return f"# {folder.resolve().name}\n"
    about = json.loads(path.read_text(encoding="utf-8"))
    known = {"name": folder.resolve().name, "size": read_settings(folder).size}
    return _render("card", s=about["settings"], noise=about.get("scheduler", {}), **about, **known) + "\n"


def _compare(
    distance: Callable[[np.ndarray, np.ndarray], float],
    made: np.ndarray,
    drawn: np.ndarray,
    *,
    halvings: list[np.ndarray],
    taken: list[np.ndarray],
) -> dict[str, float]:
    """Distances of samples, and of one half of the real images, to the other half: means and ranges over halvings."""
    found = {
        "generated": [distance(made[rows], drawn[half]) for rows, (half, _) in zip(taken, halvings, strict=True)],
        "real": [distance(drawn[other], drawn[half]) for half, other in halvings],
    }
    row = {}
    for name, values in found.items():
        row |= {name: np.mean(values), f"{name}_low": np.min(values), f"{name}_high": np.max(values)}
    return {name: float(value) for name, value in row.items()}


def _octaves(images: torch.Tensor) -> pd.Series:
    """Power of images by octave of spatial frequency, without their mean."""
    spectrum = data_spectrum(images).drop(index=0)
    finest = np.log2(max(images.shape[2:])) - 2  # half of the finest frequency that the pixels hold
    octave = 2 ** np.minimum(np.log2(spectrum.index), finest).astype(int)
    power = spectrum["power"] * spectrum["weight"]
    return power.groupby(octave).sum().rename_axis("frequency")


def _points(share: float) -> str:
    return f"{100 * share:.1f}"


def _percent(share: Estimate) -> str:
    return f"{_points(share.value)}% ({_points(share.low)} to {_points(share.high)})"


def _ranged(row: pd.Series, name: str) -> str:
    return f"{row[name]:.4g} ({row[f'{name}_low']:.4g} to {row[f'{name}_high']:.4g})"


def _render(template: str, **values: object) -> str:
    """A Markdown text of a template beside this module."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    made = jinja2.Environment(loader=loader, trim_blocks=True, lstrip_blocks=True)
    made.filters |= {"points": _points, "percent": _percent, "ranged": _ranged}
    return made.get_template(f"{template}.md.j2").render(values)
