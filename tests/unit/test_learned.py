"""Directions that are learned without labels, and sparse codes of h."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from stores import make_store

import workbench as wb
from workbench.directions import learned
from workbench.directions.learned import learn_directions
from workbench.directions.sparse import fit_sparse_code

ATOMS, CHANNELS = 6, 16


@pytest.fixture(scope="module")
def population(tiny, tmp_path_factory):
    out = tmp_path_factory.mktemp("population") / "store.zarr"
    return wb.extract(tiny, 24, steps=[400, 300, 200, 100], record_x=True, out=out, progress=False)


def test_learned_directions_are_told_apart_by_what_they_do_and_are_in_sigmas(tiny, population, monkeypatch):
    """As far as it can be seen: an untrained network's image hardly depends on h."""
    monkeypatch.setattr(learned, "VISIBLE", 100.0)
    hidden = learn_directions(tiny, population, k=3, steps=80, progress=False)
    assert hidden[0].extras["accuracy"] < 0.55
    monkeypatch.setattr(learned, "VISIBLE", 0.003)
    found = learn_directions(tiny, population, k=3, steps=80, progress=False)
    assert found[0].extras["accuracy"] > 0.6, "by chance a third"
    for direction in found:
        torch.testing.assert_close(direction.unit.flatten(1).norm(dim=1), torch.ones(4))
        for i, t in enumerate(population.timesteps):
            along = population.at(t) @ direction.unit[i].flatten().numpy()
            assert along.std(ddof=1) == pytest.approx(float(direction.sigma[i]), rel=1e-3)
    again = learn_directions(tiny, population, k=3, steps=80, progress=False)
    assert torch.equal(found[2].unit, again[2].unit)


def test_learning_refuses_what_it_cannot_learn_from(tiny, population, tmp_path):
    with pytest.raises(ValueError, match="k is 1"):
        learn_directions(tiny, population, k=1)
    with pytest.raises(ValueError, match="tap"):
        learn_directions(tiny.tapped("before"), population)
    bare = wb.extract(tiny, 4, steps=2, out=tmp_path / "bare.zarr", progress=False)
    with pytest.raises(ValueError, match="record_x"):
        learn_directions(tiny, bare, steps=1)


@pytest.fixture(scope="module")
def coded(tmp_path_factory):
    """h whose positions are sums of two of six atoms; the first atom is there only in the samples with the label."""
    rng = np.random.default_rng(0)
    atoms = F.normalize(torch.from_numpy(rng.normal(size=(ATOMS, CHANNELS)))).numpy()
    n, steps, side = 60, 2, 4
    labels = pd.Series(rng.integers(0, 2, n), name="planted")
    z = np.zeros((n, steps, ATOMS, side, side))
    for s in range(n):
        for place in np.ndindex(steps, side, side):
            free = range(0 if labels[s] else 1, ATOMS)
            for atom in rng.choice(free, 2, replace=False):
                z[s, place[0], atom, place[1], place[2]] = rng.uniform(1, 2)
    h = np.einsum("nsahw,ac->nschw", z, atoms)
    store = make_store(tmp_path_factory.mktemp("coded") / "store.zarr", h)
    return store, atoms, labels


def test_a_sparse_code_finds_planted_features_and_which_of_them_goes_with_a_label(coded):
    store, atoms, labels = coded
    code = fit_sparse_code(store, features=12, active=2, steps=2500, batch_size=256, progress=False)
    assert code.explained > 0.9
    spread = code.spreads[0].numpy()
    planted = F.normalize(torch.from_numpy(atoms / spread).float())
    best = (planted @ code.features.T).amax(dim=1)
    assert best[0] > 0.9 and best.mean() > 0.8
    first = code.ranked(labels)[0]
    assert float(planted[0] @ code.features[first]) > 0.9
    shuffled = labels.sample(frac=1, random_state=1)
    assert code.ranked(shuffled)[0] == first, "matched by seed"
    np.testing.assert_array_equal(code.aligned(shuffled, most=3), code.aligned(labels, most=3))
    weights = code.aligned(labels, most=3)
    assert 0 < np.count_nonzero(weights) <= 3 and weights[first] > 0
    direction = code.direction(weights, "planted", progress=False)
    other = code.direction(2 * weights, "planted", progress=False)
    assert other.provenance["parameters"] != direction.provenance["parameters"]
    atom = torch.from_numpy(atoms[0]).float()[None, :, None, None].expand_as(direction.unit)
    assert F.cosine_similarity(direction.unit.flatten(1), atom.flatten(1)).min() > 0.8
    along = store.at(0) @ direction.unit[-1].flatten().numpy()
    assert along.std(ddof=1) == pytest.approx(float(direction.sigma[-1]), rel=1e-3)


def test_a_sparse_code_says_what_it_cannot_do(coded):
    store, _, labels = coded
    with pytest.raises(ValueError, match="active is 5"):
        fit_sparse_code(store, features=4, active=5)
    code = fit_sparse_code(store, features=8, active=2, steps=1, progress=False)
    with pytest.raises(ValueError, match="planted"):
        code.aligned(labels, most=0)


def test_learning_turns_gradients_on(tiny, population):
    with torch.no_grad():
        assert len(learn_directions(tiny, population, k=2, steps=1, batch_size=2, progress=False)) == 2
