"""Maps of several timesteps that agree, and neighbours in the space itself."""

from __future__ import annotations

import numpy as np
import pytest

from workbench.analysis import maps
from workbench.analysis.maps import make_maps, nearest


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def batched(by_t, size=16):
    return lambda t: (by_t[t][i : i + size] for i in range(0, len(by_t[t]), size))


def agreement(a, b):
    return np.corrcoef(a.points.ravel(), b.points.ravel())[0, 1]


def stretched(rng, n=60, d=12):
    return rng.standard_normal((n, d)) * np.array([9.0, 5.0, *[0.5] * (d - 2)])


def test_components_keep_their_signs_from_one_timestep_to_the_next(rng):
    base = stretched(rng)
    by_t = {t: (-1) ** k * base + 0.01 * rng.standard_normal(base.shape) for k, t in enumerate((900, 500, 100))}
    made = make_maps({"h": batched(by_t)}, n=60, timesteps=list(by_t))
    assert [each.name for each in made] == [f"h, t = {t}, PCA" for t in by_t] and made[0].axes[0].startswith("PC 1 (")
    flips = [np.sign(np.sum(m.points * made[0].points, axis=0)) for m in made]
    assert np.array_equal(flips, np.ones((3, 2)))
    # Without the turn, of which a timestep alone knows nothing, base and -base have opposite maps.
    alone = [make_maps({"h": batched({t: h})}, n=60, timesteps=[t])[0] for t, h in ((1, base), (2, base))]
    assert agreement(*alone) == pytest.approx(1.0)


def test_of_many_samples_some_are_fitted_and_all_are_placed(rng, monkeypatch):
    h = stretched(rng, n=90)
    whole = make_maps({"h": batched({5: h})}, n=90, timesteps=[5])[0]
    monkeypatch.setattr(maps, "MOST", 40)
    some = make_maps({"h": batched({5: h})}, n=90, timesteps=[5])[0]
    assert some.points.shape == (90, 2) and "fitted to 40 of 90" in some.note and "fitted" not in whole.note
    assert np.abs(np.corrcoef(some.points[:, 0], whole.points[:, 0])[0, 1]) > 0.99
    np.testing.assert_allclose(some.place(h[:7]), some.points[:7], atol=1e-5)


def test_samples_travel_in_one_plane_without_the_means_and_lengths_of_timesteps(rng):
    base = stretched(rng)
    by_t = {t: base * (k + 1) + 50 * k for k, t in enumerate((900, 500, 100))}
    (moving,) = make_maps({"h": batched(by_t)}, n=60, timesteps=[500], visited=list(by_t), methods=["paths"])
    assert moving.points.shape == (3, 60, 2) and moving.timesteps == (900, 500, 100)
    np.testing.assert_allclose(moving.points[0], moving.points[2], atol=1e-4)


@pytest.mark.parametrize("exact", [True, False])
def test_neighbours_are_those_of_the_space(rng, exact, monkeypatch):
    monkeypatch.setattr(maps, "EXACT", 50 if exact else 5)
    h = rng.standard_normal((40, 6))
    found, words = nearest(batched({7: h}), 7, n=40, k=4)
    apart = np.linalg.norm(h[:, None] - h[None], axis=-1)
    np.testing.assert_array_equal(found, np.argsort(apart, axis=1)[:, 1:5])  # 6 components are all there are
    assert ("principal components" in words) != exact and "t = 7" in words


@pytest.mark.parametrize(
    ("n", "options", "message"), [(3, {}, "there are 3"), (1, {}, "there is 1"), (8, {"methods": ["lle"]}, "'lle'")]
)
def test_what_gives_no_map_is_a_sentence(rng, n, options, message):
    with pytest.raises(ValueError, match=message):
        make_maps({"h": batched({1: rng.standard_normal((n, 5))})}, n=n, timesteps=[1], **options)
