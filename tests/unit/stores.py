"""Stores of given h, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from workbench.diffusion.schedule import NoiseSchedule
from workbench.hspace.store import HStore, create_store, open_store, write_chunk

MODEL = {"name": "tiny", "hash": "0123456789abcdef", "tap": "after", "schedule": NoiseSchedule.linear().provenance()}


def make_store(
    path: Path,
    h: np.ndarray,
    *,
    timesteps: Sequence[int] | None = None,
    chunk: int = 16,
    model: dict = MODEL,
    seeds: Sequence[int] | None = None,
    inverted: bool = False,
) -> HStore:
    """A store of h with shape (n, T, C, h, w), by default at t of ..., 200, 100, 0 and of the seeds 0..n-1."""
    n, steps = h.shape[:2]
    arrays = {"h": h.astype(np.float32)}
    if not inverted:
        arrays["seeds"] = np.array(range(n) if seeds is None else seeds, dtype=np.uint64)
    provenance = {
        "model": model,
        "n": n,
        "timesteps": list(timesteps or range(100 * (steps - 1), -1, -100)),
        "etas": [1.0] * steps,
        "dtype": "float32",
        "chunk": chunk,
    }
    if not inverted:
        provenance["seeds"] = {"first": int(arrays["seeds"].min()), "n": n}
    layout = {name: (values.shape, str(values.dtype)) for name, values in arrays.items()}
    store = create_store(path, provenance, layout)
    for i, start in enumerate(range(0, n, chunk)):
        write_chunk(store, i, {name: values[start : start + chunk] for name, values in arrays.items()})
    return open_store(path)
