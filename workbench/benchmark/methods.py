"""Methods to find an edit for an attribute: each is a function of a study and an attribute.

A method sees a `Study`: samples of the model with a labeller's scores, and labelled images to invert, but neither the
judge nor the held-out samples. It returns a `Direction`, or an `editing.edits.Edit` to move something other than h.
`register_method` adds one:

    @register_method("my method", scales=(0.5, 1.0, 2.0))
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

import numpy as np
import pandas as pd
import torch

from workbench.datasets.clip import Clip, load_clip
from workbench.datasets.domain import Domain
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.models import Model
from workbench.diffusion.noise import initial_noise, step_noise
from workbench.diffusion.sampling import Trajectory, sample
from workbench.directions.boundary import Boundary, random_boundary
from workbench.directions.boundary_fit import fit_boundaries
from workbench.directions.direction import Direction, finite, random_like
from workbench.directions.jacobian import JacobianSpectrum, Spectrum, find_jacobian, find_pullback
from workbench.directions.pca import find_pca
from workbench.directions.supervised import find_from_scores, find_many
from workbench.directions.words import Generator, boundary_from_text, find_from_text, generator_of, name_of
from workbench.editing.asyrp_training import train_asyrp
from workbench.editing.cross import Cross
from workbench.editing.edits import Edit, MoveNoise, MoveX, NotApplicable, Shift, as_edit
from workbench.editing.measure import Classifier
from workbench.editing.render import run_plans
from workbench.hspace.extract import extract
from workbench.hspace.store import HStore
from workbench.io import one_of

FAMILIES = ("control", "unsupervised, h", "supervised, h", "boundary", "x and noise")

FEWEST = 8
"""Samples that have an attribute and that lack it, at least, for a method to learn it."""

TRIED = 8
"""Samples that candidates are tried on, to see which of them changes an attribute."""

TRAINED = 24
"""Samples that a network is trained on by texts."""

CANDIDATES = 3
"""Vectors of a spectrum, at most, that an attribute is sought among; of principal components three times as many."""

TOLERANCE = 1e-3
"""Of a spectrum's singular values: the candidates are compared by what they do, not by these."""


@dataclass(frozen=True, eq=False)
class Method:
    """A registered way to find an edit.

    Attributes
    ----------
    name : str
    find : callable (study, attribute) -> Direction or Edit
    scales : tuple of float, ascending, above 0
        Strengths that the benchmark measures, in the method's own unit.
    family : str
        Panel of the plots: one of `FAMILIES`.
    unit : str
        Of the scales.
    code : str
        Digest of the function's source, so that a changed one is measured again; of a function outside of the package
        that it calls, nothing is known.
    """

    name: str
    find: Callable[[Study, str], Direction | Edit] = field(repr=False)
    scales: tuple[float, ...]
    family: str
    unit: str
    code: str = field(repr=False)


METHODS: dict[str, Method] = {}
"""Every registered method by its name, in the order of registration."""


def register_method(
    name: str,
    *,
    scales: Sequence[float] = (0.5, 1.0, 2.0, 4.0),
    family: str = "supervised, h",
    unit: str = "sigma",
) -> Callable[[Callable], Callable]:
    """Add a method to the benchmark (a decorator).

    Parameters
    ----------
    name : str
    scales : sequence of float, above 0
        Strengths to measure, in the method's own unit, from a barely visible change to an excessive one: methods are
        compared at equal change of the image.
    family : str
        One of `FAMILIES`; methods of a family share a panel of the Pareto plot.
    unit : str
        Unit of the scales.

    Returns
    -------
    callable
        The function itself.

    Raises
    ------
    ValueError
        If the name is taken, the family unknown, or a scale not above 0.
    """
    if name in METHODS:
        raise ValueError(f"there is a method {name!r} already; choose another name")
    one_of("family", family, FAMILIES)
    strengths = tuple(sorted({finite(s, "a scale") for s in scales}))
    if not strengths or strengths[0] <= 0:
        raise ValueError(f"scales are {list(scales)}; give at least one, all above 0")

    def register(find: Callable) -> Callable:
        code = hashlib.sha256(inspect.getsource(find).encode()).hexdigest()[:16]
        METHODS[name] = Method(name, find, strengths, family, unit, code)
        return find

    return register


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
        By what it was for: `passes` of one sample through the U-Net (a product with a Jacobian counts as one),
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
        return self.learned("store", self._extracted)

    @property
    def scores(self) -> pd.DataFrame:
        """The labeller's probabilities, one row per sample of the population, by seed."""
        self.cost["scores"] = Counter(scored=self.n)
        return self.learned("scores", self._scored)

    def labels(self, attribute: str) -> pd.Series:
        """Which samples of the population have an attribute, by the labeller; 0 or 1, by seed.

        Raises
        ------
        NotApplicable
            If too few have it or lack it.
        """
        return _enough(self.scores[attribute].gt(0.5).astype(int), "samples")

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
        seeds = range(self.seed, self.seed + self.n)[: max(TRIED, 2)]
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

    def learned(self, name: str, find: Callable[[], object]) -> object:
        """Result of `find`, computed once for all attributes."""
        if name not in self._kept:
            self._kept[name] = find()
        return self._kept[name]

    def spent_on(self, spectrum: Spectrum) -> None:
        """Charge the products of a Jacobian's spectrum."""
        self.cost["spectrum"] = Counter(passes=spectrum.products)

    def pick(self, name: str, candidates: Sequence[Direction | Edit], attribute: str, *, scale: float) -> Edit:
        """The candidate, either way round, that raises an attribute's mean score the most, as the labeller sees it.

        Parameters
        ----------
        name : str
            Under which what the candidates do is kept, for other attributes.
        candidates : sequence of Direction or Edit
        attribute : str
        scale : float
            At which they are tried, on samples of the population.

        Returns
        -------
        Edit
        """
        edits = [found_edit(found) for found in candidates]
        signed = [edit for one in edits for edit in (one, -one)]
        self.cost["candidates"] = Counter(passes=len(signed) * TRIED * self.steps, scored=len(signed) * TRIED)

        def tried() -> pd.DataFrame:
            run = self.run[:TRIED]
            images = run_plans(run, [edit.plan(run, [scale, -scale]) for edit in edits], progress=False)
            after = self.labeller(images.transpose(1, 2).flatten(0, 2))
            before = self.labeller(run.images)
            changes = after.to_numpy().reshape(len(signed), -1, after.shape[1]) - before.to_numpy()
            return pd.DataFrame(changes.mean(axis=1), columns=after.columns)

        changes = self.learned(f"{name}, tried", tried)
        return signed[int(changes[attribute].to_numpy().argmax())]

    def _extracted(self) -> HStore:
        options = {"steps": self.steps, "eta": self.eta, "record_x": True, "progress": False}
        return extract(self.model, self.n, seed=self.seed, **options)

    def _scored(self) -> pd.DataFrame:
        store = self.learned("store", self._extracted)
        return self.labeller(store.images[:]).set_axis(list(store.seeds))

    @property
    def _images(self) -> LabelledImages:
        if self.images is None:
            raise NotApplicable("there are no labelled images")
        return self.images


@dataclass(frozen=True, eq=False)
class Resampled(Shift):
    """A `Shift` that also fits runs of other timesteps, to which it resamples its direction."""

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        if self.direction.timesteps == run.timesteps:
            return super().plan(run, scales)
        return Shift(self.direction.resampled(run.timesteps)).plan(run, scales)


def found_edit(found: Direction | Edit) -> Edit:
    """Result of a method as an edit of runs of any timesteps; ValueError if it is neither."""
    return Resampled(found) if isinstance(found, Direction) else as_edit(found)


def _enough(labels: pd.Series, what: str) -> pd.Series:
    fewest = int(min(labels.sum(), len(labels) - labels.sum()))
    if fewest < FEWEST:
        has, least = int(labels.sum()), f"{FEWEST} must have and {FEWEST} lack it"
        raise NotApplicable(f"{has} of {len(labels)} {what} have {labels.name}; {least}")
    return labels


def _learnable(study: Study, labels: Callable[[str], pd.Series]) -> pd.DataFrame:
    """The labels of all attributes that can be learned, so that they share one pass."""
    columns = {}
    for name in study.attributes:
        try:
            columns[name] = labels(name)
        except NotApplicable:
            continue
    return pd.DataFrame(columns)


# Controls


@register_method("random h", scales=(2.0, 4.0, 8.0, 16.0), family="control")
def random_direction(study: Study, attribute: str) -> Direction:
    """A random direction as long as the difference of means at every timestep."""
    return random_like(mean_difference(study, attribute), seed=study.seed)


@register_method("random x", scales=(8.0, 16.0, 32.0, 64.0), family="control", unit="sd")
def random_move(study: Study, attribute: str) -> Edit:
    """A random normal in x_t at the boundary's timestep, in the boundary's unit."""
    return _crossing(x=random_boundary(_boundary(study, attribute, "x"), seed=study.seed))


# Unsupervised, in h


@register_method("PCA", scales=(0.5, 1.0, 2.0, 4.0), family="unsupervised, h")
def principal_component(study: Study, attribute: str) -> Edit:
    """The principal component that changes the attribute most (Haas et al.)."""
    store = study.store
    components = study.learned("pca", lambda: find_pca(store, k=3 * CANDIDATES, progress=False))
    return study.pick("pca", list(components), attribute, scale=2.0)


@register_method("Jacobian", scales=(2.0, 4.0, 8.0, 16.0), family="unsupervised, h")
def jacobian(study: Study, attribute: str) -> Edit:
    """The singular vector of one sample's Jacobian that changes the attribute most (Haas et al.)."""
    return study.pick("jacobian", _spectrum(study, None), attribute, scale=8.0)


@register_method("Jacobian, masked", scales=(2.0, 4.0, 8.0, 16.0), family="unsupervised, h")
def masked_jacobian(study: Study, attribute: str) -> Edit:
    """The same, with the rows of the attribute's region alone (Haas et al., eqs. 9-10)."""
    mask = study.mask(attribute)
    return study.pick(f"jacobian {digest_of_mask(mask)}", _spectrum(study, mask), attribute, scale=8.0)


def _spectrum(study: Study, mask: np.ndarray | None) -> JacobianSpectrum:
    options = {"t": study.t, "k": CANDIDATES, "mask": mask, "tol": TOLERANCE, "population": study.store}
    name = f"spectrum {'' if mask is None else digest_of_mask(mask)}"
    found = study.learned(name, lambda: find_jacobian(study.model, study.run[0], progress=False, **options))
    study.spent_on(found)
    return found


def digest_of_mask(mask: np.ndarray) -> str:
    """Digest of a mask."""
    return hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:8]


# Supervised, in h


@register_method("mean difference")
def mean_difference(study: Study, attribute: str) -> Direction:
    """From the samples of the lowest to those of the highest scores, a quarter of them each (Haas et al., eq. 11)."""
    study.labels(attribute)
    return find_from_scores(study.store, study.scores[attribute], k=study.n // 4, progress=False)


@register_method("mean difference, labels")
def mean_difference_of_images(study: Study, attribute: str) -> Direction:
    """From inverted images without the attribute to those with it, by their labels (Haas et al., SM F)."""
    study.truth(attribute)
    store = study.inverted
    table = study.learned("truth", lambda: _learnable(study, study.truth))
    return study.learned("images", lambda: find_many(store, table, progress=False))[attribute]


@register_method("mean difference, projected")
def projected(study: Study, attribute: str) -> Direction:
    """The difference of means outside of the span of those of all other attributes (Haas et al., eq. 12)."""
    study.labels(attribute)
    others = [name for name in _learnable(study, study.labels) if name != attribute]
    if not others:
        raise NotApplicable("no other attribute has enough samples to project out")
    found = {name: mean_difference(study, name) for name in [attribute, *others]}
    store = study.store
    rest = found[attribute].orthogonal_to(*(found[name] for name in others))
    return rest.calibrated(store, like=found[attribute], progress=False)


@register_method("probe, logistic")
def logistic_probe(study: Study, attribute: str) -> Direction:
    """The normal of a logistic regression at every timestep."""
    return _probe(study, attribute, "logistic")


@register_method("probe, LDA")
def discriminant_probe(study: Study, attribute: str) -> Direction:
    """The normal of Fisher's discriminant with shrinkage at every timestep."""
    return _probe(study, attribute, "lda")


def _probe(study: Study, attribute: str, method: str) -> Direction:
    study.labels(attribute)
    store = study.store
    table = study.learned("labels", lambda: _learnable(study, study.labels))
    return study.learned(method, lambda: find_many(store, table, method=method, progress=False))[attribute]


@register_method("text direction")
def text_direction(study: Study, attribute: str) -> Direction:
    """From the samples that fit a text without the attribute to those that fit one with it, as CLIP scores them."""
    words, store = study.words(attribute), study.store
    study.cost["scores"] = Counter(scored=study.n)
    try:
        return find_from_text(store, **words, name=attribute, progress=False)
    except ValueError as error:  # too few samples fit
        raise NotApplicable(str(error)) from error


@register_method("Asyrp", scales=(4.0, 8.0, 16.0, 32.0), unit="strength that it was trained at")
def trained_block(study: Study, attribute: str) -> Edit:
    """A function of h and t that CLIP's loss of two texts trained (Kwon et al. 2023), on the asymmetric process."""
    words, steps = study.words(attribute), study.store.timesteps
    target, source = words.pop("text"), words.pop("against")
    seeds, options = range(study.seed, study.seed + TRAINED), {"eta": 0.0, "record_x": True, "progress": False}
    run = sample(study.model, seeds, steps=steps, **options)
    found = train_asyrp(study.model, target, source=source, run=run, **words, name=attribute, progress=False)
    # Of a step: two passes of each process and a backward pass of the decoder.
    study.cost["training"] = Counter(passes=5 * TRAINED * len(steps) * found.training["epochs"])
    return Shift(found, asymmetric=True, t_range=(study.model.schedule.T - 1, found.training["t_edit"]))


# Boundaries


@register_method("boundary of text", scales=(2.0, 4.0, 8.0, 16.0), family="boundary", unit="sd")
def boundary_of_text(study: Study, attribute: str) -> Edit:
    """Between inverted images that a text-to-image model draws of two texts (Zhu et al., text-based editing)."""
    words = study.words(attribute)
    if study.texts.generator is None:
        raise NotApplicable("there is no text-to-image model")
    make = study.learned("generator", lambda: generator_of(study.texts.generator, progress=False))
    options = {"source": words["against"], "generator": make, "steps": study.steps, "t": study.t}
    n = max(FEWEST, study.n // 4)
    found = boundary_from_text(words["text"], model=study.model, n=n, seed=study.seed, progress=False, **options)
    study.cost["drawing"] = Counter(passes=2 * n * 3 * study.steps)
    return _crossing(h=found["h"], x=found["x"])


@register_method("boundary in h", scales=(4.0, 8.0, 16.0, 32.0), family="boundary", unit="sd")
def boundary_in_h(study: Study, attribute: str) -> Edit:
    """h_t moved along the normal of a linear SVM, in one step (Zhu et al.)."""
    return _crossing(h=_boundary(study, attribute, "h"))


@register_method("boundary in h, every step", scales=(2.0, 4.0, 8.0, 16.0), family="boundary", unit="sd")
def boundary_in_h_throughout(study: Study, attribute: str) -> Edit:
    """The same change of h at every step from there on."""
    return _crossing(h=_boundary(study, attribute, "h"), h_policy="offset")


@register_method("boundary in x", scales=(2.0, 4.0, 8.0, 16.0), family="boundary", unit="sd")
def boundary_in_x(study: Study, attribute: str) -> Edit:
    """x_t moved along the normal of a linear SVM, once (Zhu et al.)."""
    return _crossing(x=_boundary(study, attribute, "x"))


@register_method("boundary in x and h", scales=(2.0, 4.0, 8.0, 16.0), family="boundary", unit="sd")
def boundary_in_both(study: Study, attribute: str) -> Edit:
    """Both moved at once (Zhu et al., Algorithm 1)."""
    return _crossing(h=_boundary(study, attribute, "h"), x=_boundary(study, attribute, "x"))


def _boundary(study: Study, attribute: str, space: str) -> Boundary:
    study.labels(attribute)
    store = study.store
    table = study.learned("labels", lambda: _learnable(study, study.labels))
    options = {"t": study.t, "space": space, "balance": True}
    return study.learned(f"boundary {space}", lambda: fit_boundaries(store, table, **options))[attribute]


def _crossing(*, h: Boundary | None = None, x: Boundary | None = None, h_policy: str = "first") -> Edit:
    """A shift across boundaries that keeps the run's own noise, so that scale 0 is the sample."""
    return Cross(h, x, mode="shift", eta=None, h_policy=h_policy)


# In x and in the noise


@register_method("noise", scales=(2.5, 5.0, 10.0, 20.0), family="x and noise", unit="sd of each noise")
def noise_difference(study: Study, attribute: str) -> Edit:
    """The difference of means of x_T and of every z_t, each added to its own (the x_T baseline of Haas et al.)."""
    y = study.labels(attribute).to_numpy(dtype=float)
    weights = torch.from_numpy(y / y.sum() - (1 - y) / (1 - y).sum()).float()
    shape, seeds, visited = study.model.x_shape, list(study.labels(attribute).index), study.store.timesteps
    noises = [initial_noise(seeds, shape), *(step_noise(seeds, shape, t=t) for t in visited)]
    units = torch.stack([torch.einsum("n,nchw->chw", weights, noise) for noise in noises])
    units /= units.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return MoveNoise(units, visited, attribute)


@register_method("pullback", scales=(2.0, 4.0, 8.0, 16.0), family="x and noise", unit="length in x_t")
def pullback(study: Study, attribute: str) -> Edit:
    """The singular vector of d h / d x_t of one sample that changes the attribute most (Park et al.)."""
    found = study.learned("pullback", lambda: _vectors(study, map="x->h"))
    study.spent_on(found)
    return study.pick("pullback", _moves(found), attribute, scale=8.0)


@register_method("LOCO", scales=(2.0, 4.0, 8.0, 16.0), family="x and noise", unit="length in x_t")
def loco(study: Study, attribute: str) -> Edit:
    """The same for the predicted image within the region, less the directions that act outside of it (LOCO-Edit)."""
    mask = study.mask(attribute)
    name = f"loco {digest_of_mask(mask)}"
    found = study.learned(name, lambda: _vectors(study, map="x->x0", mask=mask, nullspace=CANDIDATES))
    study.spent_on(found)
    return study.pick(name, _moves(found), attribute, scale=8.0)


def _vectors(study: Study, **options) -> Spectrum:
    settings = {"t": study.t, "k": CANDIDATES, "tol": TOLERANCE, "progress": False, **options}
    return find_pullback(study.model, study.run[0], **settings)


def _moves(found: Spectrum) -> list[Edit]:
    return [MoveX(vector, found.t, f"vector {i + 1}") for i, vector in enumerate(found.right)]
