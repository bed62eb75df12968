"""Directions and boundaries of given models and runs that nobody had to find."""

from __future__ import annotations

import torch

from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction


def random_tensor(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def planted(model, run, seed: int, name: str, *, delta: torch.Tensor | None = None) -> Direction:
    """A random direction, or that of a delta_h, as long at every timestep as the run's h is on average."""
    about = {"model": model.provenance(), "etas": list(run.etas), "method": "planted", "parameters": {}, "seeds": []}
    delta = random_tensor(seed, run.steps, *model.h_shape) if delta is None else delta
    length = run.h.values.flatten(2).norm(dim=2).mean(dim=1) / delta.flatten(1).norm(dim=1)
    delta = delta * length.view(-1, 1, 1, 1)
    return Direction.from_delta(delta, timesteps=run.timesteps, name=name, provenance=about)


def planted_boundary(model, space: str, t: int, *, seed: int = 0, intercept: float = 0.0, name="beard") -> Boundary:
    """A boundary with a random normal."""
    normal = random_tensor(seed, *(model.h_shape if space == "h" else model.image_shape))
    about = {"model": model.provenance(), "method": "planted", "parameters": {}}
    return Boundary(normal / normal.norm(), intercept, t, space, name, about)
