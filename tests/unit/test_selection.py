"""From selected samples to a direction: what is planted is found, and what an attribute explains is said."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from stores import make_store
from tqdm.auto import tqdm

import workbench as wb

N, STEPS, SHAPE = 60, 3, (4, 3, 3)


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A store whose first 20 samples lie apart along a planted axis, the more the cleaner; and that axis."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((N, STEPS, *SHAPE))
    axis = rng.standard_normal(SHAPE)
    axis /= np.linalg.norm(axis)
    h[:20] += 6 * axis * np.arange(1, STEPS + 1).reshape(STEPS, 1, 1, 1)
    return make_store(tmp_path_factory.mktemp("store") / "planted.zarr", h), axis


def select(store, a, b=None, **options):
    return wb.find_from_selection(store, a, b, t=0, progress=False, **options)


def test_the_planted_axis_is_found_with_its_separability_and_seeds(planted):
    store, axis = planted
    found = select(store, range(20), name="apart")
    assert found.counts == (20, 40) and found.direction.name == "apart"
    cosines = found.direction.unit.flatten(1).numpy() @ axis.ravel()
    assert (cosines > 0.9).all() and cosines[-1] > 0.98
    assert found.boundary.balanced_accuracy.value > 0.97 and found.boundary.accuracy.n == N
    assert found.boundary.t == 0 and tuple(found.boundary.normal.shape) == SHAPE
    for each in (found.direction, found.boundary):
        assert each.provenance["parameters"]["selection"] == {"t": 0, "a": list(range(20)), "b": "rest"}
        assert each.provenance["model"] == store.provenance["model"]


def test_a_random_selection_separates_at_chance(planted):
    others = np.random.default_rng(1).permutation(np.arange(20, N))
    held = select(planted[0], others[:20], others[20:]).boundary.balanced_accuracy
    assert held.value < 0.75


def test_b_takes_the_place_of_the_rest(planted):
    store, axis = planted
    found = select(store, range(5, 20), range(20, 40))
    assert found.counts == (15, 20) and found.boundary.accuracy.n == 35
    h = store.at(0)
    expected = h[5:20].mean(axis=0) - h[20:40].mean(axis=0)
    np.testing.assert_allclose(found.direction.unit[-1].flatten(), expected / np.linalg.norm(expected), atol=1e-5)
    assert found.direction.provenance["parameters"]["selection"]["b"] == list(range(20, 40))


def test_a_warning_names_the_attribute_that_explains_it_and_no_other(planted):
    rng = np.random.default_rng(2)
    scores = pd.DataFrame({"noise": rng.uniform(size=N), "told": (np.arange(N) < 20) + 0.1 * rng.uniform(size=N)})
    scores.loc[3, "told"] = np.nan
    found = select(planted[0], range(20), scores=scores)
    assert list(found.attributes.index) == ["told", "noise"] and found.attributes.auc["told"] == 1.0
    assert found.warning.startswith("told alone tells A from B")
    assert select(planted[0], range(20), scores=1 - scores).warning.startswith("told")
    assert select(planted[0], range(20), scores=scores[["noise"]]).warning == ""
    assert select(planted[0], range(20)).warning == ""


def test_known_directions_are_compared_and_a_few_timesteps_are_enough_for_a_glimpse(planted):
    store, _ = planted
    known = select(store, range(20), name="known").direction
    other = wb.random_like(known, seed=0)
    found = select(store, range(20), known=[other, known])
    assert list(found.cosines.index) == ["known", other.name] and found.cosines["known"] == pytest.approx(1.0)
    some = select(store, range(20), timesteps=[100], known=[known])
    assert some.direction.timesteps == (100,) and some.boundary is None and some.cosines.empty
    assert np.allclose(some.direction.unit[0], known.unit[1]) and np.allclose(some.direction.sigma[0], known.sigma[1])


def test_a_first_look_reads_the_chunks_that_hold_most_of_the_selection_and_nothing_else(tmp_path, monkeypatch):
    rng, n, size = np.random.default_rng(0), 400, 8
    axis, a = rng.normal(size=SHAPE), np.concatenate([np.arange(16, 40), [101, 203, 305]])
    h = rng.normal(size=(n, 2, *SHAPE))
    h[a] += 3 * axis
    store, read = make_store(tmp_path / "s.zarr", h, chunk=size), []
    batches = type(store).batches
    monkeypatch.setattr(
        type(store), "batches", lambda self, t, **o: read.append(list(o["chunks"])) or batches(self, t, **o)
    )
    found = select(store, a, timesteps=[100], most=8 * size).direction
    (chunks,) = read
    assert len(chunks) == 8 and {2, 3, 4} < set(chunks)
    rows = store.rows_of(chunks)
    assert rows.tolist() == [row for c in chunks for row in range(size * c, size * c + size)]
    side = np.isin(rows, a)
    expected = h[rows[side], 0].mean(axis=0) - h[rows[~side], 0].mean(axis=0)
    np.testing.assert_allclose(found.unit[0], expected / np.linalg.norm(expected), atol=1e-5)
    assert found.unit[0].numpy().ravel() @ axis.ravel() / np.linalg.norm(axis) > 0.9
    # At least two samples of each side are read, however few and wherever they are.
    for a, b in (([7, 393], None), (range(0, n, size), [3, 11])):
        assert select(store, a, b, timesteps=[100], most=1).direction.unit.isfinite().all()


def test_finding_is_stopped_by_its_bar(planted):
    class Stopped(Exception):
        pass

    class Bar(tqdm):
        def update(self, n=1):
            raise Stopped

    with pytest.raises(Stopped):
        wb.find_from_selection(planted[0], range(20), t=0, progress=Bar(disable=True))


@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        ([4], None, "A has 1 sample"),
        ([], None, "A has 0 samples"),
        (range(N), None, "B has 0 samples"),
        ([1, 2], [2, 3], "sample 2 is in A and in B"),
        ([1, N], None, f"no sample {N}"),
    ],
)
def test_what_gives_no_direction_is_a_sentence(planted, a, b, message):
    with pytest.raises(ValueError, match=message):
        select(planted[0], a, b)


def test_two_samples_give_a_direction_without_a_boundary(planted):
    assert select(planted[0], [0, 1]).boundary is None
