"""What methods of the benchmark are: functions of a study and an attribute that return an edit.

A method sees a `Study`: samples of the model with a labeller's scores, and labelled images to invert, but neither the
judge nor the held-out samples. It returns a `Direction`, or an `editing.edits.Edit` to move something other than h.
`register_method` adds one:

    @register_method("my method")
    def my_method(study, attribute):
        return find_from_labels(study.store, study.labels(attribute))
"""

from __future__ import annotations

import hashlib
import inspect
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeVar, cast

import cloudpickle
import numpy as np
import pandas as pd

from workbench.benchmark.protocol import CHANGE
from workbench.datasets.clip import Clip, load_clip
from workbench.datasets.domain import Domain
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, sample
from workbench.directions.direction import Direction, finite
from workbench.directions.jacobian import Spectrum
from workbench.directions.pca import PrincipalComponents, find_pca
from workbench.directions.supervised import find_from_scores
from workbench.directions.words import Generator, name_of
from workbench.editing.edits import Edit, NotApplicable, Shift, as_edit
from workbench.editing.measure import Classifier
from workbench.editing.render import run_plans
from workbench.hspace.extract import extract
from workbench.hspace.store import HStore
from workbench.io import one_of

Found = TypeVar("Found")

FAMILIES = ("control", "unsupervised, h", "supervised, h", "boundary", "x and noise")

FEWEST = 8
"""Samples that have an attribute and that lack it, at least, for a method to learn it."""

TRIED = 8
"""Samples of the population that edits are tried on, to see how strong they are and what they change."""

ROUNDS, NEAR, FASTEST = 6, 1.25, 4.0
"""An edit's strength is sought in so many rounds at most, until the change is right up to one factor; a round changes
the strength by no more than the other."""

CANDIDATES, COMPONENTS = 3, 9
"""Vectors of a spectrum, and principal components, that an attribute is sought among."""

TOLERANCE = 1e-3
"""Of a spectrum's singular values: the candidates are compared by what they do, not by these."""


@dataclass(frozen=True, eq=False)
class Method:
    """A registered way to find an edit.

    Attributes
    ----------
    name : str
    find : callable (study, attribute) -> Direction or Edit
    scale : float, above 0
        A typical strength in the method's own unit, from which the benchmark seeks those that it measures.
    limit : float
        The largest strength that the edit takes.
    family : str
        Panel of the plots: one of `FAMILIES`.
    unit : str
        Of the strengths.
    code : str
        Digest of the function's source, its defaults and the values that it takes from around it, so that a changed one
        is measured again; of a function outside of the package that it calls, nothing is known.
    """

    name: str
    find: Callable[[Study, str], Direction | Edit] = field(repr=False)
    scale: float
    limit: float
    family: str
    unit: str
    code: str = field(repr=False)


METHODS: dict[str, Method] = {}
"""Every registered method by its name, in the order of registration."""


def register_method(
    name: str,
    *,
    scale: float = 1.0,
    limit: float = np.inf,
    family: str = "supervised, h",
    unit: str = "sigma",
) -> Callable[[Callable], Callable]:
    """Add a method to the benchmark (a decorator).

    Parameters
    ----------
    name : str
    scale : float, above 0
        A typical strength, in the method's own unit. From there the benchmark seeks the strength that changes samples
        of the population as much as every other method's, and measures edits of a quarter of it to its double.
    limit : float
        The largest strength that the edit takes.
    family : str
        One of `FAMILIES`; methods of a family share a panel of the Pareto plot.
    unit : str
        Unit of the strengths.

    Returns
    -------
    callable
        The function itself.

    Raises
    ------
    ValueError
        If the name is taken, the family unknown, or the scale not above 0 and up to the limit.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    one_of("family", family, FAMILIES)
    if not 0 < finite(scale, "scale") <= limit:
        raise ValueError(f"scale is {scale}; give one above 0, and up to the limit {limit}")

    def register(find: Callable) -> Callable:
        METHODS[name] = Method(name, find, scale, limit, family, unit, _code_of(find))
        return find

    return register


def _code_of(find: Callable) -> str:
    """Digest of a method's source, and of the values that it takes from around it."""
    try:
        source, around = inspect.getsource(find), inspect.getclosurevars(find)
    except (OSError, TypeError):  # typed at a prompt, or no function but callable
        return hashlib.sha256(_bytes_of(find)).hexdigest()[:16]
    values = {"defaults": [find.__defaults__, find.__kwdefaults__], **around.globals, **around.nonlocals}
    digest = hashlib.sha256(source.encode())
    for name, value in sorted(values.items()):
        if not callable(value) and not inspect.ismodule(value):  # these are code, of which nothing is known
            digest.update(name.encode() + _bytes_of(value))
    return digest.hexdigest()[:16]


def _bytes_of(value: object) -> bytes:
    try:
        return cloudpickle.dumps(value)
    except Exception:  # of many kinds, such as of a lock or an open file
        return str(type(value)).encode()


@dataclass(frozen=True, eq=False)
class TextModels:
    """What methods from words learn from, and S_dir is measured with.

    Attributes
    ----------
    clip : Clip
    prompts : mapping of attribute -> (str, str)
        Texts with each attribute and without it.
    generator : str or callable, optional
        A text-to-image model, as of `boundary_from_text`.
    """

    clip: Clip = field(repr=False)
    prompts: Mapping[str, tuple[str, str]]
    generator: str | Generator | None = None

    @classmethod
    def of_domain(cls, domain: Domain) -> TextModels | None:
        """Those of a domain; None where it has none."""
        if domain.clip is None:
            return None
        return cls(load_clip(domain.clip), domain.prompts, domain.generator)

    def inputs(self, attribute: str) -> list:
        """What an attribute's measurements depend on, as JSON can hold it."""
        return [self.clip.hash, self.prompts.get(attribute), self.generator and name_of(self.generator)]


@dataclass(frozen=True, eq=False)
class Study:
    """Samples, scores and labels for a method to learn from; their use is charged to `cost`, cached or not.

    Attributes
    ----------
    model : Model
    labeller : Classifier
        Labels samples; another one judges.
    attributes : tuple of str
        All attributes of the labeller, not only the measured ones: a method's result must not depend on these.
    n, seed : int
        The population: samples of the seeds `seed`, `seed` + 1, ...
    steps : int
    eta : float
    t : int
        Visited timestep of the methods that act at one.
    images : LabelledImages, optional
        For methods that learn from labelled images.
    masks : mapping of attribute -> bool array of shape (H, W)
        Where an attribute can be.
    texts : TextModels, optional
        For methods that learn from words.
    cost : dict of str -> Counter
        By what it was for: `passes` of one sample through the U-Net (a product with a Jacobian counts as two),
        `scored`, samples that the labeller scored, and `labels`, images that people labelled.
    """

    model: Model
    labeller: Classifier = field(repr=False)
    attributes: tuple[str, ...]
    n: int
    seed: int
    steps: int
    eta: float
    t: int
    images: LabelledImages | None = field(default=None, repr=False)
    masks: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    texts: TextModels | None = field(default=None, repr=False)
    cost: dict[str, Counter] = field(default_factory=dict, repr=False)
    _kept: dict[str, object] = field(default_factory=dict, init=False, repr=False)

    @property
    def store(self) -> HStore:
        """h_t and x_t of the population at every visited timestep."""
        self.cost["population"] = Counter(passes=self.n * self.steps)
        return self._store

    @property
    def scores(self) -> pd.DataFrame:
        """The labeller's probabilities, one row per sample of the population, by seed."""
        self.cost["scores"] = Counter(scored=self.n)
        return self._scores

    def labels(self, attribute: str) -> pd.Series:
        """Which samples of the population have an attribute, by the labeller; 0 or 1, by seed.

        Raises
        ------
        NotApplicable
            If too few have it or lack it.
        """
        return _enough(self.scores[attribute].gt(0.5).astype(int), "samples")

    def difference(self, attribute: str, store: HStore) -> Direction:
        """Direction from the quarter of a store's samples with the lowest scores to that with the highest.

        Raises
        ------
        NotApplicable
            If scores tie.
        """
        try:
            return find_from_scores(store, self.scores[attribute], k=self.n // 4, progress=False)
        except ValueError as error:
            raise NotApplicable(str(error)) from error

    @property
    def inverted(self) -> HStore:
        """h_t and x_t of the labelled images, by DDIM inversion."""
        self.cost["inversion"] = Counter(passes=len(self._images) * self.steps)
        options = {"images": self._images, "steps": self.steps, "progress": False}
        return self.learned("inverted", lambda: extract(self.model, **options))

    def truth(self, attribute: str) -> pd.Series:
        """Which images have an attribute, by their labels; raises as `labels`."""
        if attribute not in self._images.names:
            raise NotApplicable(f"the images have no labels of {attribute}")
        self.cost["truth"] = Counter(labels=len(self._images))
        return _enough(self._images.labels[attribute].astype(int), "images")

    @cached_property
    def run(self) -> Trajectory:
        """The first samples of the population, as a run."""
        seeds = range(self.seed, self.seed + self.n)[:TRIED]
        return sample(self.model, seeds, steps=self.steps, eta=self.eta, progress=False)

    def mask(self, attribute: str) -> np.ndarray:
        """Where an attribute can be; raises NotApplicable if that is not known."""
        if attribute not in self.masks:
            raise NotApplicable(f"no region of the image is known for {attribute}")
        return self.masks[attribute]

    def words(self, attribute: str) -> dict[str, object]:
        """CLIP and texts with and without an attribute, as `find_from_text` takes them; raises NotApplicable."""
        if self.texts is None or attribute not in self.texts.prompts:
            raise NotApplicable(f"there is no text model with a text for {attribute}")
        text, against = self.texts.prompts[attribute]
        return {"text": text, "against": against, "clip": self.texts.clip}

    def learned(self, name: str, find: Callable[[], Found]) -> Found:
        """Result of `find`, computed once for all attributes."""
        if name not in self._kept:
            self._kept[name] = find()
        return cast(Found, self._kept[name])

    def spent_on(self, spectrum: Spectrum) -> None:
        """Charge the products of a Jacobian's spectrum."""
        self.cost["spectrum"] = Counter(passes=2 * spectrum.products)

    def strengths(
        self, edits: Sequence[Edit], *, start: float, limit: float = np.inf
    ) -> tuple[np.ndarray, Counter[str]]:
        """The strength at which each edit changes samples of the population by `CHANGE`, sought from `start` on.

        Parameters
        ----------
        edits : sequence of Edit
        start, limit : float
            The largest strength is `limit`, though the edit changes less there.

        Returns
        -------
        strengths : ndarray of shape (edits,)
        cost : Counter
            `passes` of the search, as those of `cost`.
        """
        scales, plain = np.full(len(edits), min(start, limit)), self.run.images.clamp(-1, 1)
        cost: Counter[str] = Counter()
        for _ in range(ROUNDS):
            plans = [edit.plan(self.run, [scale]) for edit, scale in zip(edits, scales, strict=True)]
            images = run_plans(self.run, plans, progress=False)[:, :, 0].clamp(-1, 1)
            cost += Counter(passes=len(edits) * len(self.run) * self.steps)
            change = (images - plain).square().mean(dim=(2, 3, 4)).sqrt().mean(dim=1).numpy()
            # An image that is no number was changed too much.
            factor = CHANGE / np.nan_to_num(change, nan=np.inf).clip(1e-9)
            if ((np.abs(np.log(factor)) < np.log(NEAR)) | ((scales == limit) & (factor > 1))).all():
                break
            scales = np.minimum(scales * factor.clip(1 / FASTEST, FASTEST), limit)
        return scales, cost

    def pick(self, name: str, candidates: Sequence[Direction | Edit], attribute: str, *, scale: float) -> Edit:
        """The candidate, either way round, that raises an attribute's mean score the most, as the labeller sees it.

        All candidates are tried on samples of the population, where they change the image alike.

        Parameters
        ----------
        name : str
            Under which what the candidates do is kept, for other attributes.
        candidates : sequence of Direction or Edit
        attribute : str
        scale : float
            A typical strength.

        Returns
        -------
        Edit
        """
        edits = [found_edit(found) for found in candidates]
        signed = [edit for one in edits for edit in (one, -one)]

        def tried() -> tuple[pd.DataFrame, Counter]:
            scales, cost = self.strengths(edits, start=scale)
            plans = [edit.plan(self.run, [s, -s]) for edit, s in zip(edits, scales, strict=True)]
            images = run_plans(self.run, plans, progress=False)
            after = self.labeller(images.transpose(1, 2).flatten(0, 2))
            before = self.labeller(self.run.images)
            changes = after.to_numpy().reshape(len(signed), -1, after.shape[1]) - before.to_numpy()
            n = len(signed) * len(self.run)
            cost += Counter(passes=n * self.steps, scored=n)
            return pd.DataFrame(changes.mean(axis=1), columns=after.columns), cost

        changes, self.cost["candidates"] = self.learned(f"{name}, tried", tried)
        return signed[int(changes[attribute].to_numpy().argmax())]

    @cached_property
    def _store(self) -> HStore:
        options = {"steps": self.steps, "eta": self.eta, "record_x": True, "progress": False}
        return extract(self.model, self.n, seed=self.seed, **options)

    @cached_property
    def _scores(self) -> pd.DataFrame:
        return self.labeller(self._store.images[:]).set_axis(list(self._store.seeds))

    @property
    def _images(self) -> LabelledImages:
        if self.images is None:
            raise NotApplicable("there are no labelled images")
        return self.images


@dataclass(frozen=True, eq=False)
class Resampled(Shift):
    """A `Shift` that also fits runs of other timesteps, to which it resamples its direction."""

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        return Shift(fitting(self.direction, run)).plan(run, scales)


def fitting(direction: Direction, run: Trajectory) -> Direction:
    """The direction, resampled where the run has other timesteps."""
    return direction if direction.timesteps == run.timesteps else direction.resampled(run.timesteps)


def found_edit(found: Direction | Edit) -> Edit:
    """Result of a method as an edit of runs of any timesteps; ValueError if it is neither."""
    return Resampled(found) if isinstance(found, Direction) else as_edit(found)


def _enough(labels: pd.Series, what: str) -> pd.Series:
    has = int(labels.sum())
    if min(has, len(labels) - has) < FEWEST:
        least = f"{FEWEST} must have and {FEWEST} lack it"
        raise NotApplicable(f"{has} of {len(labels)} {what} have {labels.name}; {least}")
    return labels


def learnable(study: Study, labels: Callable[[str], pd.Series]) -> pd.DataFrame:
    """The labels of all attributes that can be learned, so that they share one pass."""
    columns = {}
    for name in study.attributes:
        try:
            columns[name] = labels(name)
        except NotApplicable:
            continue
    return pd.DataFrame(columns)


def principal_components(study: Study) -> PrincipalComponents:
    """The first `COMPONENTS` of the population's h."""
    store = study.store
    return study.learned("components", lambda: find_pca(store, k=COMPONENTS, progress=False))


def digest_of_mask(mask: np.ndarray) -> str:
    """Digest of a mask."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:8]
