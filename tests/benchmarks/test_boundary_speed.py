"""What boundaries and sweeps of edits cost, as ratios of times in one run. Recorded, never asserted: `make bench`."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.svm import SVC

import workbench as wb
from workbench.directions.boundary_fit import fit_boundaries, fit_boundary

pytestmark = pytest.mark.slow


def test_a_boundary_of_100_images_of_256_pixels_against_svc_on_the_samples(medians, record):
    rng = np.random.default_rng(0)
    y = np.arange(100) % 2
    z = rng.standard_normal((100, 196608), dtype=np.float32)
    z[:, :64] += 2.0 * y[:, None]
    ours, held_out, plain = medians(
        lambda: fit_boundary(z, y, t=500, space="x", cv=2),
        lambda: fit_boundary(z, y, t=500, space="x"),
        lambda: SVC(kernel="linear").fit(z, y).coef_,
    )
    w = SVC(kernel="linear").fit(z, y).coef_
    cosine = fit_boundary(z, y, t=500, space="x").normal.double().numpy() @ w.ravel() / np.linalg.norm(w)
    assert cosine > 1 - 1e-6
    record("boundary with 5 folds, 100 x 196,608, against an SVC without", plain / held_out, "times as fast")
    record("boundary with 2 folds, 100 x 196,608", ours, "s")


def test_fourteen_attributes_share_the_products(medians, record):
    rng = np.random.default_rng(0)
    z = rng.standard_normal((100, 196608), dtype=np.float32)
    table = pd.DataFrame(rng.integers(2, size=(100, 14)), columns=[f"A{i}" for i in range(14)])
    together, apart = medians(
        lambda: fit_boundaries(z, table, t=500, space="x"),
        lambda: [fit_boundary(z, table[name], t=500, space="x") for name in table],
        repeats=1,
    )
    record("14 boundaries together against one by one", apart / together, "times as fast")


def test_a_sweep_of_20_strengths_against_one_by_one(model, medians, record):
    visited = list(range(500, -1, -25))
    images = wb.load_images("avataaars", size=32)[:40]
    run = wb.invert(model, images, steps=visited, progress=False)
    boundary = fit_boundary(run, np.arange(40) % 2, t=500, space="x", cv=2)
    distances = np.linspace(-3, 3, 20)
    options = {"boundary_x": boundary, "progress": False}

    def sweep():
        return wb.cross_boundary(model, run[0], distances=distances, **options).images

    def one_by_one():
        return torch.cat([wb.cross_boundary(model, run[0], distances=[d], **options).images for d in distances], dim=1)

    torch.testing.assert_close(sweep(), one_by_one(), atol=1e-3, rtol=1e-3)
    batched, single = medians(sweep, one_by_one)
    record("sweep of 20 strengths against one by one", single / batched, "times as fast")
