"""PCA of one timestep from a store, against scikit-learn's IncrementalPCA on the same values in memory."""

from __future__ import annotations

from pathlib import Path
from statistics import median
from time import perf_counter

import numpy as np
import pytest
from sklearn.decomposition import IncrementalPCA

from workbench.directions.pca import find_pca
from workbench.hspace.store import HStore, create_store, open_store, write_chunk


def make_store(path: Path, n: int, h_shape: tuple[int, int, int], *, seed: int = 0) -> HStore:
    """One timestep of Gaussian h with standard deviations 10 / sqrt(j) along 200 axes, and noise of 0.3 on all."""
    provenance = {
        "model": {"name": "synthetic", "hash": "0" * 16, "tap": "after", "schedule": {}},
        "seeds": {"first": 0, "n": n},
        "timesteps": [500],
        "etas": [1.0],
        "dtype": "float16",
        "chunk": 64,
    }
    store = create_store(path, provenance, {"h": ((n, 1, *h_shape), "float16"), "seeds": ((n,), "uint64")})
    rng = np.random.default_rng(seed)
    axes, _ = np.linalg.qr(rng.standard_normal((int(np.prod(h_shape)), 200), dtype=np.float32))
    axes *= 10 / np.sqrt(np.arange(1, 201, dtype=np.float32))
    for chunk, start in enumerate(range(0, n, 64)):
        rows = min(64, n - start)
        h = rng.standard_normal((rows, 200), dtype=np.float32) @ axes.T
        h += 1 + 0.3 * rng.standard_normal(h.shape, dtype=np.float32)
        seeds = np.arange(start, start + rows, dtype=np.uint64)
        write_chunk(store, chunk, {"h": h.reshape(rows, 1, *h_shape), "seeds": seeds})
    return open_store(path)


def compare(store: HStore, *, k: int = 10, repeats: int = 2) -> tuple[float, float, np.ndarray]:
    """Median seconds of both, and |cos| of their components."""
    h = store.at(500)
    ours, theirs = [], []
    for _ in range(repeats):
        start = perf_counter()
        pcs = find_pca(store, k, progress=False)
        ours.append(perf_counter() - start)
        start = perf_counter()
        baseline = IncrementalPCA(k, batch_size=1000).fit(h)
        theirs.append(perf_counter() - start)
    found = np.stack([pc.unit.flatten().numpy() for pc in pcs])
    return median(ours), median(theirs), np.abs((found * baseline.components_).sum(axis=1))


@pytest.mark.slow
def test_pca_finds_the_components_of_incremental_pca(tmp_path, record):
    """The first five components agree to a cosine of 0.99; the times include reading the store."""
    ours, theirs, cosines = compare(make_store(tmp_path / "h.zarr", 5000, (144, 8, 8)))
    record("PCA of 5,000 x 9,216 against IncrementalPCA", theirs / ours, "times as fast", goal="at least 3")
    assert cosines[:5].min() > 0.99
