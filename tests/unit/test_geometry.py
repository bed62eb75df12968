"""Geometry: planted shapes are found, library oracles agree, and what can't be answered is refused in a sentence."""

from __future__ import annotations

import itertools

import numpy as np
import pandas as pd
import pytest
import torch
from scipy import linalg
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors

from workbench.analysis import samples
from workbench.analysis.dimension import dimensions, dimensions_over_time, levina_bickel, participation_ratio, two_nn
from workbench.analysis.embedding import embed, map_quality
from workbench.analysis.maps import make_maps
from workbench.analysis.samples import distances_of, gram
from workbench.analysis.similarity import (
    angles_over_time,
    attribute_angles,
    cka_over_time,
    difference_directions,
    principal_angles,
)


@pytest.fixture
def rng():
    return np.random.default_rng(7)


@pytest.fixture(scope="module")
def blobs():
    """120 samples in three groups, 30 dimensions: far apart in the first two, noise elsewhere."""
    rng = np.random.default_rng(1)
    groups = np.repeat([0, 1, 2], 40)
    h = rng.standard_normal((120, 30))
    h[:, :2] += 12 * np.array([[0, 0], [1, 0], [0, 1]])[groups]
    return h.astype(np.float32), groups


class Store:
    """What the module needs of a store."""

    def __init__(self, by_t):
        self.by_t, self.timesteps = by_t, tuple(by_t)

    def at(self, t):
        return self.by_t[t]


def flat(rng, n, dim, d):
    """n samples of an isotropic Gaussian of dimension `dim` in d coordinates."""
    basis = np.linalg.qr(rng.standard_normal((d, dim)))[0]
    return rng.standard_normal((n, dim)) @ basis.T


def test_gram_is_the_inner_product_over_all_blocks(rng, monkeypatch):
    monkeypatch.setattr(samples, "CHUNK", 7)
    h = rng.standard_normal((6, 50)) + 3
    centred = h - h.mean(axis=0)
    np.testing.assert_allclose(gram(h), centred @ centred.T, atol=1e-12)
    np.testing.assert_allclose(gram(h, centred=False), h @ h.T, atol=1e-12)


def test_pca_map_agrees_with_the_singular_vectors(blobs):
    h, groups = blobs
    found = embed(h, k=3)
    u, s, _ = np.linalg.svd(h - h.mean(axis=0), full_matrices=False)
    np.testing.assert_allclose(np.abs(found.points), np.abs(u * s)[:, :3], rtol=1e-3, atol=1e-3)
    np.testing.assert_allclose(found.explained_variance_ratio, s[:3] ** 2 / (s**2).sum(), rtol=1e-4)
    assert found.variance_kept == pytest.approx(found.explained_variance_ratio.sum())
    assert embed(h.reshape(120, 5, 3, 2)).axes == ["PC 1", "PC 2"]


@pytest.mark.parametrize(("method", "options"), [("umap", {"min_dist": 0.2}), ("tsne", {})])
def test_maps_are_the_same_for_the_same_seed_and_keep_groups_apart(blobs, method, options):
    h, groups = blobs
    threads = torch.get_num_threads()
    first, again, other = (embed(h, method=method, seed=seed, **options) for seed in (0, 0, 1))
    assert torch.get_num_threads() == threads, "numba sets that of OpenMP"
    np.testing.assert_array_equal(first.points, again.points)
    assert method == "tsne" or not np.array_equal(first.points, other.points)
    assert first.explained_variance_ratio is None and first.parameters["neighbours"] == 15
    assert silhouette_score(first.points, groups) > 0.4


@pytest.mark.parametrize("method", ["pca", "umap"])
def test_other_samples_find_their_place_in_a_finished_map(blobs, method):
    h, groups = blobs
    found = embed(h, method=method)
    before = found.points.copy()
    placed = found.place(h[::10] + 0.01)
    nearest = NearestNeighbors(n_neighbors=1).fit(found.points).kneighbors(placed, return_distance=False)[:, 0]
    assert (groups[nearest] == groups[::10]).all()
    if method == "pca":
        np.testing.assert_allclose(found.place(h), found.points, atol=1e-3)
    assert np.array_equal(found.points, before)
    with pytest.raises(ValueError, match="t-SNE can't map new samples"):
        embed(h, method="tsne").place(h[:2])


def test_umap_of_a_timestep_is_laid_out_as_the_one_before(rng):
    turn = np.linspace(0, 2 * np.pi, 60, endpoint=False)
    base = np.stack([np.cos(turn), np.sin(turn)], axis=1) @ rng.standard_normal((2, 10))
    base += 0.02 * rng.standard_normal(base.shape)
    by_t = {500: base, 100: -base[:, rng.permutation(10)]}  # the same ring, in other coordinates
    made = make_maps({"h": lambda t: [by_t[t]]}, n=60, timesteps=[500, 100], methods=["umap"])
    first, second = (each.points.ravel() for each in made)
    assert np.corrcoef(first, second)[0, 1] > 0.9


def test_the_identity_map_is_trusted_fully_and_a_random_one_at_chance(rng):
    h = rng.standard_normal((200, 3))
    same = map_quality(h, h, resamples=5).set_index("measure")
    assert same["value"].tolist() == [1.0, 1.0]
    means = {}
    for _ in range(10):
        random = map_quality(h, rng.standard_normal((200, 2)), resamples=2).set_index("measure")
        for measure in random.index:
            means.setdefault(measure, []).append(random.loc[measure, "value"] - random.loc[measure, "chance"])
    for measure, gaps in means.items():
        assert abs(np.mean(gaps)) < 4 * np.std(gaps) / np.sqrt(len(gaps)) + 1e-3, measure


def test_neighbourhood_preservation_counts_shared_neighbours(rng):
    h = rng.standard_normal((60, 10))
    points = h[:, :2]
    found = map_quality(h, points, neighbours=6, resamples=2).set_index("measure").loc["neighbourhood preservation"]
    sets = [NearestNeighbors(n_neighbors=6).fit(x).kneighbors(return_distance=False) for x in (h, points)]
    expected = np.mean([len(set(a) & set(b)) / 6 for a, b in zip(*sets, strict=True)])
    assert found["value"] == pytest.approx(expected)
    assert found["chance"] == pytest.approx(6 / 59)


def test_silhouette_is_given_for_the_map_and_for_h_and_leaves_groups_of_one_sample_out(blobs):
    h, groups = blobs
    labels = pd.DataFrame({"group": groups, "noise": np.arange(120) % 2})
    table = map_quality(h, embed(h), labels=labels, resamples=20)
    found = table[table["measure"] == "silhouette"].set_index(["attribute", "space"])
    assert found.loc[("group", "map"), "value"] == pytest.approx(silhouette_score(embed(h).points, groups))
    assert found.loc[("group", "h"), "value"] == pytest.approx(silhouette_score(h, groups), abs=1e-5)
    assert abs(found.loc[("noise", "map"), "value"]) < 0.05
    assert (table["low"] <= table["value"]).all() and (table["value"] <= table["high"]).all()
    kept = np.arange(120) != 7
    table = map_quality(h, h[:, :2], labels=np.where(kept, groups, 9), resamples=2)
    found = table[(table["measure"] == "silhouette") & (table["space"] == "map")]["value"].item()
    assert found == pytest.approx(silhouette_score(h[kept, :2], groups[kept]), abs=1e-5)


def test_half_sample_intervals_cover_the_spread_between_samples(rng):
    """The interval is as wide as the statistic varies from one set of samples to the next."""
    draws = [rng.standard_normal((120, 6)) for _ in range(30)]
    tables = [map_quality(h, h[:, :2], resamples=40).set_index("measure").loc["trustworthiness"] for h in draws]
    spread = np.std([table["value"] for table in tables])
    width = np.mean([table["high"] - table["low"] for table in tables]) / (2 * 1.96)
    assert 0.6 < width / spread < 1.6


@pytest.mark.parametrize("n", [60, 400])
def test_the_participation_ratio_does_not_depend_on_the_number_of_samples(n, rng):
    spectrum = np.sqrt(np.geomspace(1, 0.01, 300))
    truth = (spectrum**2).sum() ** 2 / (spectrum**4).sum()
    found = [participation_ratio(gram(rng.standard_normal((n, 300)) * spectrum)) for _ in range(20)]
    assert np.mean(found) == pytest.approx(truth, abs=4 * np.std(found) / np.sqrt(20) + 0.02 * truth)


@pytest.mark.parametrize("dim", [2, 5])
def test_both_estimators_find_a_planted_dimension(dim, rng):
    h = flat(rng, 800, dim, 50)
    assert two_nn(distances_of(gram(h))) == pytest.approx(dim, rel=0.12)
    assert levina_bickel(distances_of(gram(h))) == pytest.approx(dim, rel=0.1)


def test_a_curved_sheet_has_dimension_two_and_more_principal_directions(rng):
    angle, height = rng.uniform(0, 9, 800), rng.uniform(0, 9, 800)
    inner = gram(np.stack([angle * np.cos(angle), height, angle * np.sin(angle)], axis=1))
    for estimate in (two_nn, levina_bickel):
        assert estimate(distances_of(inner)) == pytest.approx(2, rel=0.12)
    assert participation_ratio(inner) > 2.5


def test_levina_bickel_is_the_inverse_of_the_mean_log_ratio(rng):
    h = rng.standard_normal((40, 4))
    t = NearestNeighbors(n_neighbors=6).fit(h).kneighbors()[0]
    inverses = [np.mean([np.log(row[5] / row[j]) for j in range(5)]) for row in t]
    assert levina_bickel(distances_of(gram(h)), neighbours=6) == pytest.approx(1 / np.mean(inverses))


def test_two_nn_is_the_slope_of_the_papers_plot(rng):
    h = rng.standard_normal((100, 4))
    t = NearestNeighbors(n_neighbors=2).fit(h).kneighbors()[0]
    x = np.log(np.sort(t[:, 1] / t[:, 0])[:90])
    y = -np.log(1 - np.arange(1, 91) / 101)
    assert two_nn(distances_of(gram(h))) == pytest.approx(np.linalg.lstsq(x[:, None], y, rcond=None)[0].item())


def test_dimensions_over_time_are_those_of_each_timestep_with_intervals(rng):
    by_t = {800: flat(rng, 120, 3, 30), 0: flat(rng, 120, 6, 30)}
    table = dimensions_over_time(Store(by_t), resamples=20)
    assert list(table) == ["t", "estimator", "value", "low", "high", "n"]
    for t, h in by_t.items():
        one = dimensions(h, resamples=20)
        pd.testing.assert_frame_equal(table[table["t"] == t].drop(columns="t").reset_index(drop=True), one)
        assert ((one["low"] < one["value"]) & (one["value"] < one["high"])).all()


def test_angles_over_time_follow_a_rotated_plane(rng):
    """A plane turned by 30 degrees about one of its axes has principal angles 0 and 30."""
    scores = rng.standard_normal((80, 2)) * [3, 2]
    basis = np.eye(12)
    turned = np.stack([basis[0], np.cos(np.pi / 6) * basis[1] + np.sin(np.pi / 6) * basis[2]])
    found = angles_over_time({900: scores @ basis[:2] + 5, 400: scores @ turned, 0: scores @ basis[4:6]}, k=2)
    np.testing.assert_allclose(found.angles[0, 1], [0, 30], atol=1e-5)
    np.testing.assert_allclose(found.angles[0, 2], [90, 90], atol=1e-5)
    np.testing.assert_allclose(found.within, 0, atol=1e-5)
    assert found.mean.loc[900, 400] == pytest.approx(15, abs=1e-5)


def test_principal_angles_compare_spaces_and_not_the_vectors_that_span_them(rng):
    basis = np.linalg.qr(rng.standard_normal((20, 6)))[0].T
    turned = np.stack([basis[0], np.cos(np.pi / 6) * basis[1] + np.sin(np.pi / 6) * basis[4], basis[5]])
    mixed = rng.standard_normal((3, 3)) @ turned
    np.testing.assert_allclose(principal_angles(basis[:3], mixed), [0, 30, 90], atol=1e-5)
    as_images = torch.from_numpy(mixed).view(3, 5, 2, 2)
    np.testing.assert_allclose(principal_angles(torch.from_numpy(basis[:1]), as_images), [0], atol=1e-5)


def test_angles_over_time_agree_with_scipy_on_scikit_learns_components_and_of_noise_are_at_chance(rng):
    by_t = {t: (rng.standard_normal((60, 30)) * np.geomspace(9, 1, 30)).astype(np.float32) for t in (1, 0)}
    found = angles_over_time(by_t, k=4)
    bases = [PCA(4, svd_solver="full").fit(h).components_.T for h in by_t.values()]
    np.testing.assert_allclose(found.angles[0, 1][::-1], np.degrees(linalg.subspace_angles(*bases)), atol=1e-2)
    found = angles_over_time({t: rng.standard_normal((60, 400)) for t in range(3)}, k=3)
    assert found.mean.loc[0, 1] == pytest.approx(found.chance, abs=4), "unrelated"
    assert found.within.mean() == pytest.approx(found.chance, abs=4), "halves of noise"


def test_attribute_angles_find_planted_directions(rng):
    a, b = rng.integers(0, 2, (2, 4000))
    h = rng.standard_normal((4000, 10)) * 0.1
    h[:, 0] += a
    h[:, :2] += np.outer(b, [np.cos(1.0), np.sin(1.0)])
    found = attribute_angles(h, {"a": a, "b": b})
    directions = difference_directions(h, {"a": a, "b": b})
    np.testing.assert_allclose(directions["a"][:2], [1, 0], atol=0.05)
    np.testing.assert_allclose(directions["b"][:2], [np.cos(1.0), np.sin(1.0)], atol=0.05)
    assert found.mean.loc["a", "b"] == pytest.approx(np.degrees(1.0), abs=4)
    assert (found.within < 5).all()
    flipped = difference_directions(h, 1 - a)["label"]
    np.testing.assert_allclose(flipped, -directions["a"])


def cka(a, b):
    return cka_over_time({1: a, 0: b}).loc[1, 0]


def test_cka_does_not_see_rotation_scale_and_shift(rng):
    a = rng.standard_normal((40, 9))
    turned = 3 * a @ np.linalg.qr(rng.standard_normal((9, 9)))[0] - 4
    assert cka(a, turned) == pytest.approx(1)
    assert cka(a, a @ np.diag([9, 1, 1, 1, 1, 1, 1, 1, 1])) < 0.95


def test_cka_of_every_pair_uses_the_unbiased_hsic_of_the_paper(rng):
    """Song et al. 2012, eq. 5, term by term."""
    by_t = dict(zip((2, 1, 0), rng.standard_normal((3, 12, 5)), strict=True))

    def hsic(k, m):
        n, one = len(k), np.ones(len(k))
        k, m = k - np.diag(np.diag(k)), m - np.diag(np.diag(m))
        total = np.trace(k @ m) + one @ k @ one * (one @ m @ one) / ((n - 1) * (n - 2))
        return (total - 2 / (n - 2) * (one @ k @ m @ one)) / (n * (n - 3))

    found = cka_over_time((t, h) for t, h in by_t.items())
    for (s, a), (t, b) in itertools.product(by_t.items(), repeat=2):
        k, m = a @ a.T, b @ b.T
        assert found.loc[s, t] == pytest.approx(hsic(k, m) / np.sqrt(hsic(k, k) * hsic(m, m)), abs=1e-5)


def test_unrelated_representations_have_cka_zero(rng):
    found = [cka(*rng.standard_normal((2, 30, 500))) for _ in range(20)]
    assert abs(np.mean(found)) < 4 * np.std(found) / np.sqrt(20)


def test_bad_input_is_refused_in_a_sentence(rng):
    h = rng.standard_normal((20, 8))
    broken, wide = h.copy(), rng.standard_normal((20, 30))
    broken[3, 2] = np.nan
    for message, call in (
        (r"sample 3 has NaN or infinite values \(1 of 20", lambda: embed(broken)),
        ("sample 3 at timestep 600 has NaN", lambda: cka_over_time({700: h, 600: broken})),
        ("k is 20; 20 samples of 8 values have 1 to 8 components", lambda: embed(h, k=20)),
        ("k is 10; halves of 20 samples of 30 .* 1 to 9", lambda: angles_over_time({1: wide, 0: wide}, k=10)),
        ("neighbours is 20; .* 1 to 19", lambda: embed(h, method="umap", neighbours=20)),
        ("neighbours is 10; .* 1 to 9", lambda: map_quality(h, h, neighbours=10)),
        ("all labels 'Beard' are 1", lambda: map_quality(h, h, labels={"Beard": np.ones(20, dtype=int)}, neighbours=3)),
        ("fewer than two groups of two samples", lambda: map_quality(h, h, labels=np.arange(20) == 4, neighbours=3)),
        ("have shape \\(19,\\); there are 20 samples", lambda: map_quality(h, h, labels=np.arange(19), neighbours=3)),
        ("sample 2 is missing", lambda: map_quality(h, h, labels=[0, 1, None] + [1] * 17, neighbours=3)),
        ("the map has 19 points and h 20 samples", lambda: map_quality(h, h[:19])),
        ("1 timestep given where a curve needs at least 2", lambda: cka_over_time({5: h})),
        ("timestep 1 has 19 samples and the one before 20", lambda: cka_over_time({2: h, 1: h[:19]})),
        ("samples 1 and 5 are the same", lambda: two_nn(distances_of(gram(np.concatenate([h[:5], h[1:]]))))),
        ("all samples are the same", lambda: participation_ratio(gram(np.ones((5, 3))))),
        ("only 'a'", lambda: attribute_angles(h, {"a": np.arange(20) % 2})),
        ("have 3 values; a difference direction needs two", lambda: difference_directions(h, np.arange(20) % 3)),
        ("'lle'", lambda: embed(h, method="lle")),
    ):
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("n", [6, 7, 29, 31, 32, 33])
def test_quality_takes_as_many_neighbours_as_it_says(n):
    """Half-samples have fewer than half of them to give."""
    h = np.random.default_rng(0).standard_normal((n, 5))
    found = map_quality(h, h[:, :2], neighbours=min(15, (n - 1) // 2), resamples=3)
    assert np.isfinite(found[["value", "low", "high"]].to_numpy(dtype=float)).all()
