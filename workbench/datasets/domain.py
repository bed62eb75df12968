"""Domains: kinds of images with known classifiers, regions and attribute frequencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from workbench.datasets import avataaars, captions, eurosat
from workbench.io import one_of


@dataclass(frozen=True)
class Domain:
    """Facts about one kind of images; a record without anything but the name if it is not in `DOMAINS`.

    Attributes
    ----------
    name : str
        Name of the images, for `load_images`.
    model : str or None
        Name of a bundled model of them, for `load_model`.
    origin : str or None
        How to get the images, where they are not bundled.
    labeller, judge : str or None
        Names of two classifiers, for `load_classifier`: one labels, the other judges.
    clip : str or None
        Name of a bundled CLIP of them, for `load_clip`.
    generator : str or None
        Name of a bundled text-to-image model of them, for `load_model`.
    prompts : mapping of str to (str, str)
        Prompts with and without each attribute, in that CLIP's words.
    classifiers : mapping of str to str
        Folders of the classifiers, below data/models.
    frequencies : mapping of str to float
        Probability of every 0/1 attribute.
    pairs : mapping of (str, str) to 4 floats
        Probabilities of neither, of the second alone, of the first alone and of both, for pairs of attributes whose
        correlation is known.
    regions : tuple of str
        Names of the image regions with a mask.
    region : callable (name, size=) -> bool array of shape (H, W), or None
        Returns the mask of a region.
    choices : mapping of str to value
        Attributes and other values that suit the domain, for the parameters of notebooks with these names.
    """

    name: str
    model: str | None = None
    origin: str | None = None
    labeller: str | None = None
    judge: str | None = None
    clip: str | None = None
    generator: str | None = None
    prompts: Mapping[str, tuple[str, str]] = field(default_factory=dict, repr=False)
    classifiers: Mapping[str, str] = field(default_factory=dict, repr=False)
    frequencies: Mapping[str, float] = field(default_factory=dict, repr=False)
    pairs: Mapping[tuple[str, str], tuple[float, float, float, float]] = field(default_factory=dict, repr=False)
    regions: tuple[str, ...] = ()
    region: Callable[..., np.ndarray] | None = field(default=None, repr=False)
    choices: Mapping[str, object] = field(default_factory=dict, repr=False)
    _mask: Callable[..., np.ndarray | None] | None = field(default=None, repr=False)

    @property
    def parameters(self) -> dict[str, object]:
        """Values for the parameters of notebooks, by their names; each notebook takes those that it has."""
        names = {"model_name": self.model, "images_name": self.name}
        names |= {"clip_name": self.clip or "", "generator_name": self.generator or ""}
        return names | {"classifier_name": self.labeller, "judge_name": self.judge} | dict(self.choices)

    def masks(self, attributes: Iterable[str], size: int | Sequence[int]) -> dict[str, np.ndarray]:
        """Masks of attributes in images of a size (as of `load_images`), bool (H, W); only attributes with a region."""
        masks = {name: self._mask(name, size=size) for name in attributes} if self._mask else {}
        return {name: mask for name, mask in masks.items() if mask is not None}


AVATAAARS = Domain(
    name="avataaars",
    model="avataaars32",
    labeller="avataaars",
    judge="avataaars-judge",
    clip="avataaars-clip",
    generator="avataaars32-text",
    prompts=captions.PROMPTS,
    classifiers={"avataaars": "avataaars-attributes/labeller", "avataaars-judge": "avataaars-attributes/judge"},
    frequencies=avataaars.FREQUENCIES,
    pairs=avataaars.PLANTED,
    regions=avataaars.REGIONS,
    region=avataaars.region_mask,
    _mask=avataaars.attribute_mask,
)
"""The bundled domain: drawn avatars."""

EUROSAT = Domain(
    name="eurosat",
    model="eurosat32",
    origin=f"write them by `workbench data eurosat PATH`, with EuroSAT RGB as published ({eurosat.ORIGIN}) at PATH",
    labeller="eurosat",
    judge="eurosat-judge",
    classifiers={"eurosat": "eurosat-attributes/labeller", "eurosat-judge": "eurosat-attributes/judge"},
    frequencies=eurosat.FREQUENCIES,
    pairs={},
    choices={
        "steps": 20,
        "eta": 0.0,  # so few steps of DDPM leave photographs flat
        "attributes": ["Forest", "SeaLake", "AnnualCrop", "Industrial"],
        "colors": ["AnnualCrop", "HerbaceousVegetation"],
        "target": "Forest",
        "nuisances": ["SeaLake", "AnnualCrop", "Pasture"],
        "attribute": "Forest",
        "other": "SeaLake",
        "pair": ["River", "Residential"],
        "regions": [],
    },
)
"""Satellite photographs; its models are bundled, its images are not."""

DOMAINS = (AVATAAARS, EUROSAT)


def domain_of(images: str) -> Domain:
    """Find the domain of images.

    Parameters
    ----------
    images : str
        Name of the images, as for `load_images`.

    Returns
    -------
    Domain
        An empty domain if the images are not bundled.
    """
    return next((domain for domain in DOMAINS if domain.name == images), Domain(str(images)))


def find_region(name: str, *, size: int | Sequence[int]) -> np.ndarray:
    """The mask of a part of a picture by its name, bool (H, W), whichever domain has it; size as of `load_images`."""
    known = {each: domain.region for domain in DOMAINS if domain.region for each in domain.regions}
    return known[one_of("region", name, known)](name, size=size)
