"""The papers' figures by name: each recipe measures on a model, draws, and hands out the numbers that it drew.

A recipe is a function of a `Setup`; `recipe` enters it in the list. It returns a `Drawn`: the figure, the table behind
it, and the numbers that the claims of the papers stand or fall with, each with its interval and n.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pandas as pd
from matplotlib import style
from matplotlib.figure import Figure

from workbench import __version__
from workbench.analysis.intervals import Estimate
from workbench.datasets.classifiers import Classifier, load_classifier
from workbench.datasets.domain import domain_of
from workbench.datasets.labelled import LabelledImages, load_images
from workbench.diffusion.loading import load_model
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, invert, sample
from workbench.directions.boundary import Boundary, fit_boundary
from workbench.directions.direction import Direction
from workbench.directions.supervised import find_from_scores
from workbench.hspace.extract import extract
from workbench.hspace.store import HStore
from workbench.report.plots import STYLE, line

SHOWN = 4
"""Samples in a figure of images: the first ones of those to edit, none picked."""

T_AXIS = "timestep t (1000 is noise, 0 is the image)"

HELD_OUT = 10**6
"""Seeds of samples to edit count from here."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """What a recipe returns.

    Attributes
    ----------
    figure : matplotlib Figure
    table : DataFrame
        The numbers drawn.
    caption : str
    claims : dict of str -> Estimate
        What a claim is judged by.
    """

    figure: Figure = field(repr=False)
    table: pd.DataFrame = field(repr=False)
    caption: str
    claims: dict[str, Estimate] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Recipe:
    """A figure that can be asked for.

    Attributes
    ----------
    name : str
    experiment : str
        Its paper and its number there, such as "Haas E4".
    shows : str
    minutes : float
        Expected on two cores, with the setup's defaults and the bundled model.
    draw : callable (Setup) -> Drawn
    """

    name: str
    experiment: str
    shows: str
    minutes: float
    draw: Callable[[Setup], Drawn] = field(repr=False)

    @property
    def code(self) -> str:
        """Digest of the function that draws it."""
        return hashlib.sha256(inspect.getsource(self.draw).encode()).hexdigest()[:16]


_RECIPES: dict[str, Recipe] = {}


def recipe(name: str, experiment: str, shows: str, *, minutes: float) -> Callable[[Callable], Callable]:
    """Decorator that enters a function of a `Setup` in the list of figures."""

    def enter(draw: Callable[[Setup], Drawn]) -> Callable[[Setup], Drawn]:
        _RECIPES[name] = Recipe(name, experiment, shows, minutes, draw)
        return draw

    return enter


def list_figures() -> dict[str, Recipe]:
    """Every figure that can be asked for, by its name."""
    for module in ("haas", "zhu"):
        importlib.import_module(f"workbench.report.{module}")
    return dict(_RECIPES)


@dataclass(frozen=True, eq=False)
class Setup:
    """What recipes measure on; everything is made when it is first asked for.

    Attributes
    ----------
    model_name, images_name, classifier_name, judge_name : str
    labels_name, skip_broken
        `labels` and `skip_broken` of `load_images`.
    n : int
        Samples that directions are found on, and images that boundaries are fitted on.
    measured : int
        Samples and images that are edited; none of the above.
    steps : int
    t : int
        Timestep of boundaries and Jacobians; the nearest visited is taken.
    attribute, other : str
        The one that is edited, and a second one.
    seed : int
    device : str, optional
    """

    model_name: str = "avataaars32"
    images_name: str = "avataaars"
    labels_name: str | None = None
    skip_broken: bool = False
    classifier_name: str = "avataaars"
    judge_name: str = "avataaars-judge"
    n: int = 192
    measured: int = 24
    steps: int = 20
    t: int = 500
    attribute: str = "Long_Hair"
    other: str = "Smiling"
    seed: int = 0
    device: str | None = None

    @cached_property
    def model(self) -> Model:
        """The model."""
        return load_model(self.model_name, device=self.device)

    @cached_property
    def labeller(self) -> Classifier:
        """Labels the samples that directions are found on."""
        return load_classifier(self.classifier_name, device=self.device)

    @cached_property
    def judge(self) -> Classifier:
        """Scores the edits."""
        return load_classifier(self.judge_name, device=self.device)

    @cached_property
    def images(self) -> LabelledImages:
        """Labelled images; the first n are learned from, the last ones edited."""
        return load_images(
            self.images_name, size=self.model.image_shape[1], labels=self.labels_name, skip_broken=self.skip_broken
        )

    @cached_property
    def timesteps(self) -> tuple[int, ...]:
        """Visited timesteps."""
        return self.model.schedule.timesteps(self.steps)

    @cached_property
    def at(self) -> int:
        """The visited timestep that is nearest to t."""
        return min(self.timesteps, key=lambda visited: abs(visited - self.t))

    @cached_property
    def store(self) -> HStore:
        """h and x of n samples at eta 1."""
        return extract(self.model, self.n, seed=self.seed, steps=self.steps, record_x=True, progress=False)

    @cached_property
    def still(self) -> HStore:
        """h and x of n samples at eta 0."""
        return extract(self.model, self.n, seed=self.seed, steps=self.steps, eta=0.0, record_x=True, progress=False)

    @cached_property
    def inverted(self) -> HStore:
        """h and x of n inverted images."""
        images = self.images.select(slice(self.n))
        return extract(self.model, images=images, steps=self.steps, record_x=True, progress=False)

    @cached_property
    def truth(self) -> pd.DataFrame:
        """Labels of these images, for the judge's attributes."""
        names = [name for name in self.judge.attributes if name in self.images.names]
        return self.images.labels[names].iloc[: self.n].astype(int)

    @cached_property
    def scores(self) -> pd.DataFrame:
        """The labeller's probabilities of the samples at eta 1, by seed."""
        return self.labeller(self.store.images[:], progress=False).set_axis(list(self.store.seeds))

    @cached_property
    def run(self) -> Trajectory:
        """Samples to edit, at eta 1."""
        return self._sampled(1.0)

    @cached_property
    def still_run(self) -> Trajectory:
        """The same seeds at eta 0."""
        return self._sampled(0.0)

    @cached_property
    def without(self) -> Trajectory:
        """Inverted images without the attribute, none of those that are learned from."""
        return invert(self.model, self.real_without, steps=self.timesteps, record_x=True, progress=False)

    @cached_property
    def real_without(self):
        """Images without the attribute, none of those that are learned from; shape (measured, C, H, W)."""
        labels = self.images.labels[self.attribute].to_numpy()
        chosen = [i for i in range(self.n, len(self.images)) if labels[i] == 0]
        return self.images[chosen[-self.measured :]]

    @cached_property
    def boundaries(self) -> dict[str, Boundary]:
        """Of the attribute in h and x, from the inverted images."""
        labels = self.truth[self.attribute]
        return {s: fit_boundary(self.inverted, labels, t=self.at, space=s, balance=True) for s in ("h", "x")}

    def masks(self, attributes: Sequence[str]) -> dict[str, np.ndarray]:
        """Where attributes can be, as far as that is known: of the bundled domain."""
        return domain_of(self.images_name).masks(attributes, size=self.model.image_shape[1])

    def direction(self, attribute: str) -> Direction:
        """The difference of means of a quarter of the samples a side, by the labeller's scores."""
        return find_from_scores(self.store, self.scores[attribute], k=self.n // 4, name=attribute, progress=False)

    def provenance(self) -> dict:
        """What the numbers depend on."""
        settings = {name: value for name, value in vars(self).items() if name in self.__dataclass_fields__}
        settings.pop("device")
        return {
            "workbench": __version__,
            "model": self.model.provenance(),
            "settings": settings,
            "labeller": [self.labeller.name, self.labeller.hash],
            "judge": [self.judge.name, self.judge.hash],
            "images": self.images.fingerprint,
        }

    def check_attributes(self) -> None:
        """ValueError if a classifier does not know the attributes."""
        for classifier in (self.labeller, self.judge):
            for name in (self.attribute, self.other):
                if name not in classifier.attributes:
                    known = ", ".join(classifier.attributes)
                    raise ValueError(f"the classifier {classifier.name} has no attribute {name!r}; it has {known}")

    def _sampled(self, eta: float) -> Trajectory:
        seeds = range(HELD_OUT + self.seed, HELD_OUT + self.seed + self.measured)
        return sample(self.model, seeds, steps=self.steps, eta=eta, record_h=True, record_x=True, progress=False)


def words(name: str) -> str:
    """A name as a figure writes it."""
    return str(name).replace("_", " ")


def curves(table: pd.DataFrame, by: str, x: str, xlabel: str, ylabel: str, **options) -> Figure:
    """One line a name in the column `by`, with its band, of rows with `value`, `low` and `high`."""
    wide = {end: table.pivot(index=x, columns=by, values=end) for end in ("value", "low", "high")}
    names = list(table[by].unique())
    values, low, high = ({words(name): wide[end][name] for name in names} for end in ("value", "low", "high"))
    figure = line(wide["value"].index, values, low=low, high=high, xlabel=xlabel, ylabel=ylabel, **options)
    if len(names) > 4:
        with style.context(STYLE):
            figure.axes[0].get_legend().remove()
            figure.legend(loc="outside upper left", ncols=3)
    return figure
