"""Methods of the field beside the two papers': of h, of the skips and of x_t, each with its source.

Where only an abstract is known, or released code does not run, the docstring of what the method calls says what was
inferred.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import numpy as np
import torch.nn.functional as F
from torch import from_numpy

from workbench.benchmark.study import (
    CANDIDATES,
    COMPONENTS,
    TOLERANCE,
    Resampled,
    Study,
    digest_of_mask,
    register_method,
)
from workbench.diffusion.sampling import Injection, Trajectory, sample
from workbench.directions.direction import Direction
from workbench.directions.jacobian import Spectrum, find_pullback
from workbench.directions.learned import learn_directions
from workbench.directions.sparse import SparseCode, fit_sparse_code
from workbench.editing.asyrp_training import train_asyrp
from workbench.editing.edits import AtTap, Edit, MoveX, NotApplicable, Shift, Swap, Transport
from workbench.hspace.extract import extract

TRAINED = 24
"""Samples that a network is trained on by texts."""

LEARNED = {"k": COMPONENTS, "steps": 400, "batch_size": 12}
CODED = {"steps": 1500}
"""Training of the learned directions and of the sparse code."""

CARRIED = 6
"""Vectors of each sample's pullback that span what can be carried to it."""

CALIBRATION, T_EDIT = 0.3, 400
"""InjectFusion's omega, and the timestep, of 1000, down to which it injects."""

# In h


@register_method("learned directions", scale=32.0, family="unsupervised, h")
def learned_direction(study: Study, attribute: str) -> Edit:
    """Of directions that a network tells apart by what they do, the one that changes it most (Zhang et al. 2023)."""
    store, settings = study.store, {**LEARNED, "seed": study.seed, "progress": False}
    found = study.learned("learned", lambda: learn_directions(study.model, store, **settings))
    study.cost["training"] = Counter(passes=4 * LEARNED["steps"] * LEARNED["batch_size"])
    return study.pick("learned", found, attribute, scale=32.0)


@register_method("sparse feature", scale=32.0, family="unsupervised, h")
def sparse_feature(study: Study, attribute: str) -> Edit:
    """Of the features of a sparse autoencoder of h that go with the attribute, the one that changes it most."""
    code, labels = _sparse_code(study), study.labels(attribute)
    likely = code.ranked(labels)[:CANDIDATES]
    alone = np.eye(len(code.features))
    one = [code.direction(alone[f], f"feature {f}", progress=False) for f in likely]
    return study.pick(f"features of {attribute}", one, attribute, scale=32.0)


@register_method("CASL", scale=32.0)
def aligned_features(study: Study, attribute: str) -> Direction:
    """A few features of the sparse autoencoder, weighted by how they tell the attribute (He et al. 2026)."""
    code, labels = _sparse_code(study), study.labels(attribute)
    try:
        weights = code.aligned(labels)
    except ValueError as error:  # no feature tells the attribute
        raise NotApplicable(str(error)) from error
    return code.direction(weights, attribute, progress=False)


def _sparse_code(study: Study) -> SparseCode:
    store = study.store
    return study.learned("sparse code", lambda: fit_sparse_code(store, **CODED, seed=study.seed, progress=False))


@register_method("InjectFusion", scale=0.5, limit=1.0, unit="weight of the other h")
def injected(study: Study, attribute: str) -> Edit:
    """h of the sample that has the attribute most, on the sphere, in the attribute's region (Jeong et al. 2024)."""
    study.labels(attribute)
    donor = [int(study.scores[attribute].idxmax())]
    options = {"eta": study.eta, "record_h": True, "progress": False}
    run = study.learned(f"donor {donor}", lambda: sample(study.model, donor, steps=study.store.timesteps, **options))
    study.cost["donor"] = Counter(passes=study.steps)
    mask = study.masks.get(attribute)
    if mask is not None:
        pixels = from_numpy(mask * 1.0)[None, None]
        mask = F.adaptive_max_pool2d(pixels, study.model.h_shape[1:])[0, 0].bool().numpy()
    T = study.model.schedule.T
    t_range = (T - 1, T_EDIT * T // 1000)
    return Swap(run, "slerp", t_range=t_range, mask=mask, calibration=CALIBRATION)


@register_method("Asyrp", scale=16.0, unit="strength that it was trained at")
def trained_block(study: Study, attribute: str) -> Edit:
    """A function of h and t that CLIP's loss of two texts trained (Kwon et al. 2023), on the asymmetric process."""
    words, steps = study.words(attribute), study.store.timesteps
    target, source = words.pop("text"), words.pop("against")
    seeds, options = range(study.seed, study.seed + TRAINED), {"eta": 0.0, "record_x": True, "progress": False}
    run = sample(study.model, seeds, steps=steps, **options)
    found = train_asyrp(study.model, target, source=source, run=run, **words, name=attribute, progress=False)
    # Of a step: two passes of each process and a backward pass of the decoder.
    study.cost["training"] = Counter(passes=5 * TRAINED * len(steps) * found.training["epochs"])
    return Trained(found, asymmetric=True, t_range=(study.model.schedule.T - 1, found.training["t_edit"]))


@dataclass(frozen=True, eq=False)
class Trained(Shift):
    """A shift along a trained block, of the same total strength at any number of steps."""

    def injection(self, run: Trajectory, scale: float) -> Injection:
        return super().injection(run, scale * self.direction.steps / run.steps)


# In the skips


@register_method("mean difference, skip", scale=8.0)
def skip_difference(study: Study, attribute: str) -> Edit:
    """The difference of means of the skip connection of lowest resolution, which h meets first, instead of h."""
    study.labels(attribute)
    taps = [tap for tap in study.model.taps if tap.startswith("skip.")]
    if not taps:
        raise NotApplicable("the network has no skip connections")
    model = study.model.tapped(taps[-1])
    options = {"seed": study.seed, "steps": study.steps, "eta": study.eta, "images": False, "progress": False}
    store = study.learned("skips", lambda: extract(model, study.n, **options))
    study.cost["skips"] = Counter(passes=study.n * study.steps)
    return AtTap(Resampled(study.difference(attribute, store)), taps[-1])


# In x


@register_method("pullback", scale=8.0, family="x and noise", unit="length in x_t")
def pullback(study: Study, attribute: str) -> Edit:
    """The singular vector of d h / d x_t of one sample that changes the attribute most (Park et al.)."""
    found = study.learned("pullback", lambda: _vectors(study, map="x->h"))
    study.spent_on(found)
    return study.pick("pullback", _moves(found), attribute, scale=8.0)


@register_method("pullback, transported", scale=8.0, family="x and noise", unit="length in x_t")
def transported(study: Study, attribute: str) -> Edit:
    """The vector of h that belongs to it, carried to each sample by the sample's own pullback (Park et al.).

    The pullback of each edited sample, 50 products or so, is not among the passes of an edit.
    """
    found = study.learned("pullback", lambda: _vectors(study, map="x->h"))
    study.spent_on(found)
    of = study.learned("pullbacks", lambda: _pullbacks(study))
    edits = [Transport(u, found.t, of, f"vector {i + 1}") for i, u in enumerate(found.left)]
    return study.pick("transported", edits, attribute, scale=8.0)


def _pullbacks(study: Study) -> Callable[[Trajectory], Sequence[Spectrum]]:
    """The pullbacks of a run's samples at the study's timestep, found once per run."""
    known: WeakKeyDictionary[Trajectory, list[Spectrum]] = WeakKeyDictionary()

    def of(run: Trajectory) -> Sequence[Spectrum]:
        if run not in known:
            settings = {"t": study.t, "k": CARRIED, "map": "x->h", "tol": TOLERANCE, "progress": False}
            known[run] = [find_pullback(study.model, run[i], **settings) for i in range(len(run))]
        return known[run]

    return of


@register_method("LOCO", scale=8.0, family="x and noise", unit="length in x_t")
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
