"""Held-out accuracy of boundaries over timesteps and over numbers of samples."""

from __future__ import annotations

from dataclasses import replace

import pandas as pd
import pytest
import torch

import workbench as wb

VISITED, N = (750, 500, 250, 0), 40


@pytest.fixture(scope="module")
def images(tiny):
    generator = torch.Generator().manual_seed(0)
    shade = torch.randn(N, 1, 1, 1, generator=generator).clamp(-2, 2) / 5
    return (shade + 0.2 * torch.randn(N, *tiny.image_shape, generator=generator)).clamp(-1, 1)


@pytest.fixture(scope="module")
def labels(images):
    return pd.Series((images.mean(dim=(1, 2, 3)) > 0).int().numpy(), name="Bright")


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny, images):
    path = tmp_path_factory.mktemp("store") / "s.zarr"
    return wb.extract(tiny, images=images, steps=VISITED, record_x=True, dtype="float32", out=path, progress=False)


def test_accuracies_stand_beside_their_controls(tiny, store, labels):
    table = wb.accuracy_over_time(tiny, store, labels, timesteps=[500, 0])
    assert set(table.samples) == {"pixels", "x", "h", "forward-diffused", "random labels"}
    assert (table.groupby("samples").t.nunique() == [2, 2, 1, 2, 2]).all()
    accuracy = table.set_index(["samples", "t"]).accuracy
    alone = wb.fit_boundary(store, labels, t=500, space="x")
    assert accuracy["x", 500] == alone.accuracy.value
    assert accuracy["pixels", -1] > 0.9 and accuracy["random labels", 0] < 0.8
    assert accuracy["forward-diffused", 500] < accuracy["pixels", -1]
    other = replace(tiny, schedule=replace(tiny.schedule, alpha_bars=tiny.schedule.alpha_bars**2))
    with pytest.raises(ValueError, match="another noise schedule"):
        wb.accuracy_over_time(other, store, labels, timesteps=[500])
    assert table.law.between(0.5, 1).all() and (table.n == N).all()


def test_more_samples_come_closer_to_the_boundary_of_all(store, labels):
    table = wb.accuracy_over_samples(store, labels, t=0, counts=[8, 16, 500], methods=["svm", "mean"], draws=2)
    assert list(table["count"].unique()) == [8, 16, 20] and len(table) == 2 * (2 + 2 + 1)
    means = table.groupby("count").cosine.mean()
    assert means.is_monotonic_increasing and means[20] == pytest.approx(1.0)
    assert (table.n == 20).all() and (table.low <= table.accuracy).all()


def test_a_rare_class_is_in_both_halves(store):
    rare = pd.Series([1] * 6 + [0] * (N - 6), index=store.names, name="rare")
    for seed in range(4):
        table = wb.accuracy_over_samples(store, rare, t=0, counts=[8], methods=["mean"], draws=1, seed=seed)
        assert (table.n == N // 2).all()
