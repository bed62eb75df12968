"""Methods of the two papers, and methods from words; `controls` has their controls, `field_methods` the rest."""

from __future__ import annotations

from collections import Counter
from contextlib import suppress

import numpy as np
import torch

from workbench.benchmark import controls, field_methods  # noqa: F401 - they register their own
from workbench.benchmark.study import (
    CANDIDATES,
    FEWEST,
    METHODS,
    TOLERANCE,
    Study,
    digest_of_mask,
    learnable,
    principal_components,
    register_method,
)
from workbench.diffusion.noise import initial_noise, step_noise
from workbench.directions.boundary import Boundary
from workbench.directions.boundary_fit import fit_boundaries
from workbench.directions.direction import Direction
from workbench.directions.jacobian import JacobianSpectrum, find_jacobian
from workbench.directions.supervised import find_many
from workbench.directions.words import GENERATOR_STEPS, boundary_from_text, find_from_text, generator_of
from workbench.editing.cross import Cross
from workbench.editing.edits import Edit, MoveNoise, NotApplicable

__all__ = ["METHODS", "register_method"]

# Unsupervised, in h


@register_method("PCA", scale=1.0, family="unsupervised, h")
def principal_component(study: Study, attribute: str) -> Edit:
    """The principal component that changes the attribute most (Haas et al.)."""
    return study.pick("pca", list(principal_components(study)), attribute, scale=1.0)


@register_method("Jacobian", scale=8.0, family="unsupervised, h")
def jacobian(study: Study, attribute: str) -> Edit:
    """The singular vector of one sample's Jacobian that changes the attribute most (Haas et al.)."""
    return study.pick("jacobian", _spectrum(study, None), attribute, scale=8.0)


@register_method("Jacobian, masked", scale=8.0, family="unsupervised, h")
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


# Supervised, in h


@register_method("mean difference")
def mean_difference(study: Study, attribute: str) -> Direction:
    """From the samples of the lowest to those of the highest scores, a quarter of them each (Haas et al., eq. 11)."""
    study.labels(attribute)
    return study.difference(attribute, study.store)


@register_method("mean difference, labels")
def mean_difference_of_images(study: Study, attribute: str) -> Direction:
    """From inverted images without the attribute to those with it, by their labels (Haas et al., SM F)."""
    study.truth(attribute)
    store = study.inverted
    table = study.learned("truth", lambda: learnable(study, study.truth))
    return study.learned("images", lambda: find_many(store, table, progress=False))[attribute]


@register_method("mean difference, projected", scale=4.0)
def projected(study: Study, attribute: str) -> Direction:
    """The difference of means outside of the span of those of all other attributes (Haas et al., eq. 12)."""
    study.labels(attribute)
    own, others = mean_difference(study, attribute), []
    for name in learnable(study, study.labels):
        if name != attribute:
            with suppress(NotApplicable):  # its scores tie
                others.append(mean_difference(study, name))
    if not others:
        raise NotApplicable("no other attribute has enough samples to project out")
    return own.orthogonal_to(*others).calibrated(study.store, like=own, progress=False)


@register_method("probe, logistic", scale=4.0)
def logistic_probe(study: Study, attribute: str) -> Direction:
    """The normal of a logistic regression at every timestep."""
    return _probe(study, attribute, "logistic")


@register_method("probe, LDA", scale=8.0)
def discriminant_probe(study: Study, attribute: str) -> Direction:
    """The normal of Fisher's discriminant with shrinkage at every timestep."""
    return _probe(study, attribute, "lda")


def _probe(study: Study, attribute: str, method: str) -> Direction:
    study.labels(attribute)
    store = study.store
    table = study.learned("labels", lambda: learnable(study, study.labels))
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


# Boundaries


@register_method("boundary of text", scale=8.0, family="boundary", unit="sd")
def boundary_of_text(study: Study, attribute: str) -> Edit:
    """Between inverted images that a text-to-image model draws of two texts (Zhu et al., text-based editing)."""
    words = study.words(attribute)
    if study.texts.generator is None:
        raise NotApplicable("there is no text-to-image model")
    make = study.learned("generator", lambda: generator_of(study.texts.generator, progress=False))
    options = {"source": words["against"], "generator": make, "steps": study.steps, "t": study.t}
    n = max(FEWEST, study.n // 4)
    found = boundary_from_text(words["text"], model=study.model, n=n, seed=study.seed, progress=False, **options)
    # Guidance takes two passes a step of the generator.
    study.cost["drawing"] = Counter(passes=2 * n * (2 * GENERATOR_STEPS + study.steps))
    return _crossing(h=found["h"], x=found["x"])


@register_method("boundary in h", scale=64.0, family="boundary", unit="sd")
def boundary_in_h(study: Study, attribute: str) -> Edit:
    """h_t moved along the normal of a linear SVM, in one step (Zhu et al.)."""
    return _crossing(h=_boundary(study, attribute, "h"))


@register_method("boundary in h, every step", scale=16.0, family="boundary", unit="sd")
def boundary_in_h_throughout(study: Study, attribute: str) -> Edit:
    """The same change of h at every step from there on."""
    return _crossing(h=_boundary(study, attribute, "h"), h_policy="offset")


@register_method("boundary in x", scale=8.0, family="boundary", unit="sd")
def boundary_in_x(study: Study, attribute: str) -> Edit:
    """x_t moved along the normal of a linear SVM, once (Zhu et al.)."""
    return _crossing(x=_boundary(study, attribute, "x"))


@register_method("boundary in x and h", scale=8.0, family="boundary", unit="sd")
def boundary_in_both(study: Study, attribute: str) -> Edit:
    """Both moved at once (Zhu et al., Algorithm 1)."""
    return _crossing(h=_boundary(study, attribute, "h"), x=_boundary(study, attribute, "x"))


def _boundary(study: Study, attribute: str, space: str) -> Boundary:
    study.labels(attribute)
    store = study.store
    table = study.learned("labels", lambda: learnable(study, study.labels))
    options = {"t": study.t, "space": space, "balance": True}
    return study.learned(f"boundary {space}", lambda: fit_boundaries(store, table, **options))[attribute]


def _crossing(*, h: Boundary | None = None, x: Boundary | None = None, h_policy: str = "first") -> Edit:
    """A shift across boundaries that keeps the run's own noise, so that scale 0 is the sample."""
    return Cross(h, x, mode="shift", eta=None, h_policy=h_policy)


# In x and in the noise


@register_method("noise", scale=10.0, family="x and noise", unit="sd of each noise")
def noise_difference(study: Study, attribute: str) -> Edit:
    """The difference of means of x_T and of every z_t, each added to its own (Haas et al.'s baseline has x_T alone)."""
    study.labels(attribute)
    k, order = study.n // 4, study.scores[attribute].to_numpy().argsort(kind="stable")
    weights = torch.zeros(study.n)
    weights[order[:k].copy()], weights[order[-k:].copy()] = -1 / k, 1 / k
    shape, seeds, visited = study.model.x_shape, list(study.scores.index), study.store.timesteps
    noises = [initial_noise(seeds, shape), *(step_noise(seeds, shape, t=t) for t in visited)]
    units = torch.stack([torch.einsum("n,nchw->chw", weights, noise) for noise in noises])
    units /= units.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return MoveNoise(units, visited, attribute)
