"""Stores of given h, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.diffusion.schedule import NoiseSchedule
from workbench.hspace.store import HStore, create_store, open_store, write_chunk

MODEL = {"name": "tiny", "hash": "0123456789abcdef", "tap": "after", "schedule": NoiseSchedule.linear().provenance()}


def make_store(
    path: Path, h: np.ndarray, *, timesteps: Sequence[int] | None = None, chunk: int = 16, model: dict = MODEL
) -> HStore:
    """A store of h with shape (n, T, C, h, w), by default at t of ..., 200, 100, 0."""
    n, steps = h.shape[:2]
    provenance = {
        "model": model,
        "n": n,
        "seeds": {"first": 0, "n": n},
        "timesteps": list(timesteps or range(100 * (steps - 1), -1, -100)),
        "etas": [1.0] * steps,
        "dtype": "float32",
        "chunk": chunk,
    }
    store = create_store(path, provenance, {"h": (h.shape, "float32"), "seeds": ((n,), "uint64")})
    for i, start in enumerate(range(0, n, chunk)):
        rows = slice(start, min(start + chunk, n))
        write_chunk(store, i, {"h": h[rows].astype(np.float32), "seeds": np.arange(n, dtype=np.uint64)[rows]})
    return open_store(path)
