"""Domains: kinds of images with known classifiers, regions and attribute frequencies."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from workbench.datasets import avataaars
from workbench.io import one_of


@dataclass(frozen=True)
class Domain:
    """Classifiers, regions and frequencies of one kind of images; empty but for the name if not in `DOMAINS`.

    Attributes
    ----------
    name : str
        Name of the images, for `load_images`.
    labeller, judge : str or None
        Names of two classifiers, for `load_classifier`: one labels, the other judges.
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
    """

    name: str
    labeller: str | None = None
    judge: str | None = None
    classifiers: Mapping[str, str] = field(default_factory=dict, repr=False)
    frequencies: Mapping[str, float] = field(default_factory=dict, repr=False)
    pairs: Mapping[tuple[str, str], tuple[float, float, float, float]] = field(default_factory=dict, repr=False)
    regions: tuple[str, ...] = ()
    region: Callable[..., np.ndarray] | None = field(default=None, repr=False)
    _mask: Callable[..., np.ndarray | None] | None = field(default=None, repr=False)

    def masks(self, attributes: Iterable[str], size: int | Sequence[int]) -> dict[str, np.ndarray]:
        """Masks of attributes in images of a size (as of `load_images`), bool (H, W); only attributes with a region."""
        masks = {name: self._mask(name, size=size) for name in attributes} if self._mask else {}
        return {name: mask for name, mask in masks.items() if mask is not None}


AVATAAARS = Domain(
    name="avataaars",
    labeller="avataaars",
    judge="avataaars-judge",
    classifiers={"avataaars": "avataaars-attributes/labeller", "avataaars-judge": "avataaars-attributes/judge"},
    frequencies=avataaars.FREQUENCIES,
    pairs=avataaars.PLANTED,
    regions=avataaars.REGIONS,
    region=avataaars.region_mask,
    _mask=avataaars.attribute_mask,
)
"""The bundled domain: drawn avatars."""

DOMAINS = (AVATAAARS,)


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
    known = {region: domain for domain in DOMAINS for region in domain.regions}
    return known[one_of("region", name, known)].region(name, size=size)
