"""Controls of the benchmark: random vectors, which a method must beat to have found anything.

One vector may happen to change an attribute, so each sample is edited along its own. Methods that offer several vectors
of which the labeller picks one have controls of as many random vectors, picked alike.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
import torch.nn.functional as F

from workbench.benchmark.study import CANDIDATES, COMPONENTS, Study, fitting, principal_components, register_method
from workbench.diffusion.sampling import Injection, Trajectory
from workbench.directions.direction import Direction, finite, random_like
from workbench.editing.edits import Edit, MoveX


@dataclass(frozen=True, eq=False)
class RandomShifts(Edit):
    """h_t along a random direction of each sample's own, with the lengths of another direction.

    Attributes
    ----------
    like : Direction
    seed : int
        Sample i has the direction of `seed` + i.
    """

    like: Direction = field(repr=False)
    seed: int
    name: str = "random h"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        like = fitting(self.like, run)
        found = [random_like(like, seed=self.seed + i) for i in range(len(run))]

        def shifted(scale: float) -> Trajectory:
            deltas = torch.stack([direction.delta(scale) for direction in found], dim=1)
            return replace(run, edit=Injection.adding(deltas, timesteps=run.timesteps))

        return [shifted(scale) if finite(scale, "a scale") else run for scale in scales]


@dataclass(frozen=True, eq=False)
class RandomMoves(Edit):
    """x_t along a random vector of each sample's own, of length 1."""

    t: int
    seed: int
    name: str = "random x"
    unit: str = "length in x_t"

    def plan(self, run: Trajectory, scales: Sequence[float]) -> list[Trajectory]:
        return MoveX(random_vectors(len(run), run.model.x_shape, seed=self.seed), self.t, self.name).plan(run, scales)


def random_vectors(n: int, shape: Sequence[int], *, seed: int) -> torch.Tensor:
    """Random vectors of length 1, (n, *shape); the first ones are the same for any n."""
    values = np.random.default_rng(seed).standard_normal((n, int(np.prod(shape))))
    return F.normalize(torch.from_numpy(values).float()).view(n, *shape)


@register_method("random h", family="control")
def random_direction(study: Study, attribute: str) -> Edit:
    """Random directions, one per sample, as long as the first principal component at every timestep."""
    return RandomShifts(principal_components(study)[0], _seed(study, attribute))


@register_method("random h, picked", family="control")
def picked_direction(study: Study, attribute: str) -> Edit:
    """Of as many random directions as there are principal components, the one that changes the attribute most."""
    like = principal_components(study)[0]
    found = [random_like(like, seed=study.seed + i) for i in range(COMPONENTS)]
    return study.pick("random h", found, attribute, scale=1.0)


@register_method("random x", scale=16.0, family="control", unit="length in x_t")
def random_move(study: Study, attribute: str) -> Edit:
    """Random vectors in x_t, one per sample."""
    return RandomMoves(study.t, _seed(study, attribute))


@register_method("random x, picked", scale=16.0, family="control", unit="length in x_t")
def picked_move(study: Study, attribute: str) -> Edit:
    """Of as many random vectors in x_t as a pullback offers, the one that changes the attribute most."""
    vectors = random_vectors(CANDIDATES, study.model.x_shape, seed=study.seed)
    return study.pick(
        "random x", [MoveX(v, study.t, f"vector {i + 1}") for i, v in enumerate(vectors)], attribute, scale=16.0
    )


def _seed(study: Study, attribute: str) -> int:
    """Of an attribute's own random vectors."""
    return zlib.crc32(f"{study.seed} {attribute}".encode())
