from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import stores
import torch
from sklearn.decomposition import PCA

from workbench.directions import pca
from workbench.directions.direction import Direction
from workbench.directions.pca import find_pca
from workbench.hspace.store import HStore

SHAPE = (5, 2, 2)
D = 20


def make_store(path: Path, h: np.ndarray, **options) -> HStore:
    """A store of h with shape (n, T, C*h*w)."""
    return stores.make_store(path, h.reshape(*h.shape[:2], -1, 2, 2), **options)


def planted(n: int = 300, d: int = D, *, steps: int = 3, noise: float = 0.1, seed: int = 0):
    """h = mean + sum_j sigma_tj z_j axis_tj + noise; axes drift slowly over t, standard deviations decrease in j.

    Returns h of shape (n, T, d), axes (T, 4, d), sigmas (T, 4) and factors z (n, 4).
    """
    rng = np.random.default_rng(seed)
    z = rng.standard_normal((n, 4))
    z = np.linalg.qr(z - z.mean(axis=0))[0] * (n - 1) ** 0.5
    base, drift = rng.standard_normal((4, d)), rng.standard_normal((4, d))
    axes = np.stack([np.linalg.qr((base + 0.15 * i * drift).T)[0].T for i in range(steps)])
    sigmas = np.array([8.0, 5.0, 3.0, 2.0]) * (1 + 0.5 * np.arange(steps))[:, None]
    h = np.einsum("nj,tj,tjd->ntd", z, sigmas, axes) + noise * rng.standard_normal((n, steps, d)) + 3.0
    return h, axes, sigmas, z


def units_of(pcs) -> np.ndarray:
    """(T, k, d)."""
    return torch.stack([pc.unit.flatten(1) for pc in pcs], dim=1).numpy()


def test_components_are_those_of_scikit_learn(tmp_path):
    h = np.random.default_rng(0).standard_normal((60, 1, D)) * np.linspace(3, 0.5, D) + 2
    pcs, reference = find_pca(make_store(tmp_path / "h.zarr", h), 6), PCA(6, svd_solver="full").fit(h[:, 0])
    cosines = np.abs((units_of(pcs)[0] * reference.components_).sum(axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    np.testing.assert_allclose(pcs.scores[:, 0].std(axis=0, ddof=1), reference.explained_variance_**0.5, rtol=1e-5)
    np.testing.assert_allclose(pcs.explained_variance_ratio[0], reference.explained_variance_ratio_, rtol=1e-5)
    np.testing.assert_allclose(pcs.mean[0].flatten(), reference.mean_, rtol=1e-5)
    np.testing.assert_allclose(np.abs(pcs.scores[:, 0]), np.abs(reference.transform(h[:, 0])), atol=1e-3, rtol=0)


def test_planted_components_are_found_with_their_sigma(tmp_path):
    h, axes, sigmas, _ = planted()
    pcs = find_pca(make_store(tmp_path / "h.zarr", h), 4)
    assert np.abs((units_of(pcs) * axes).sum(axis=2)).min() > 0.999
    np.testing.assert_allclose(torch.stack([pc.sigma for pc in pcs], dim=1), sigmas, rtol=0.02)


def test_a_large_matrix_takes_the_randomized_route_and_agrees_with_the_exact_one(tmp_path):
    h, axes, _, _ = planted(n=520, d=600, steps=1)
    pcs = find_pca(make_store(tmp_path / "h.zarr", h, chunk=200), 4)
    exact = PCA(4, svd_solver="full").fit(h[:, 0]).components_
    assert np.abs((units_of(pcs)[0] * exact).sum(axis=1)).min() > 0.9999


@pytest.mark.parametrize("joint", [False, True])
def test_one_unit_of_scale_is_one_sigma_of_new_samples(tmp_path, joint):
    """96 samples whose scores spread 1.1 to 1.3 times as much; their sigmas are known to 3% each, if taken together."""
    d, ratios, excess = 400, [], []
    deviations = 10 / np.sqrt(np.arange(1, d + 1))
    for draw in range(6):
        h = np.random.default_rng(draw).standard_normal((96, 1, d)) * deviations
        pcs = find_pca(make_store(tmp_path / f"{draw}.zarr", h), 6, joint=joint)
        truth = np.sqrt(units_of(pcs)[0].astype(float) ** 2 @ deviations**2)
        ratios.append(np.concatenate([pc.sigma for pc in pcs]) / truth)
        excess.append(pcs.scores[:, 0].std(axis=0, ddof=1) / truth)
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)
    assert np.mean(excess) > 1.12


def test_order_swapped_and_signs_flipped_between_timesteps_are_repaired(tmp_path):
    _, axes, _, z = planted(steps=3)
    # At the middle timestep the second factor gets the largest variance and the first one the smallest.
    sigmas = np.array([[8, 5, 3, 2], [2, 9, 5, 3], [8, 5, 3, 2]], dtype=float)
    h = np.einsum("nj,tj,tjd->ntd", z, sigmas, axes)
    aligned = find_pca(make_store(tmp_path / "h.zarr", h), 4)
    cosines = (units_of(aligned) * axes).sum(axis=2)
    assert np.abs(cosines).min() > 0.99
    assert (np.sign(cosines) == np.sign(cosines[0])).all()
    assert aligned.matched_cosine.shape == (2, 4) and aligned.matched_cosine.min() > 0.8
    np.testing.assert_allclose(torch.stack([pc.sigma for pc in aligned], dim=1), sigmas, rtol=0.01)


def test_one_component_follows_a_factor_that_falls_back_for_a_while_and_takes_one_that_appears_late(tmp_path):
    _, axes, _, z = planted(steps=3)
    for last, sigmas, steps in (
        (0, [[8, 2, 1.5, 1], [1, 3, 2, 1.5], [8, 2, 1.5, 1]], [0, 1, 2]),
        (3, [[8, 2, 1.5, 0.1], [3, 2, 1.5, 20], [3, 2, 1.5, 20]], [2]),
    ):
        h = np.einsum("nj,tj,tjd->ntd", z, np.array(sigmas), axes)
        found = units_of(find_pca(make_store(tmp_path / f"{last}.zarr", h), 1))[:, 0]
        assert np.abs((found * axes[:, last]).sum(axis=1))[steps].min() > 0.99


def test_alignment_does_not_depend_on_signs_and_order_that_a_decomposition_returns():
    _, axes, _, _ = planted(steps=5)
    rng = np.random.default_rng(1)

    def aligned(components):
        order, signs = pca._chain(components)
        return np.stack([c[o] * s[:, None] for c, o, s in zip(components, order, signs, strict=True)])

    shuffled = [axes[0], *(a[rng.permutation(4)] for a in axes[1:])]
    flipped = [a * rng.choice([-1.0, 1.0], size=(4, 1)) for a in shuffled]
    np.testing.assert_allclose(aligned(flipped), aligned(list(axes)))


@pytest.mark.parametrize("rows", [50, 64, 299])
def test_blocks_of_samples_give_the_components_of_the_whole(tmp_path, monkeypatch, rows):
    """A matrix above the limit is decomposed block by block."""
    h, *_ = planted()
    store = make_store(tmp_path / "h.zarr", h)
    whole = find_pca(store, 4)
    monkeypatch.setattr(pca, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(pca, "BLOCK_ROWS", rows)
    blocks = find_pca(store, 4)
    assert (units_of(blocks) * units_of(whole)).sum(axis=2).min() > 0.999
    np.testing.assert_allclose(blocks.explained_variance_ratio, whole.explained_variance_ratio, rtol=1e-2)


def test_memory_is_that_of_one_timestep_or_of_one_block(tmp_path, monkeypatch):
    """Of n x d floats a timestep: they are held once, for one timestep at a time, or not at all above the limit."""
    n, d = 4000, 800
    store = make_store(tmp_path / "h.zarr", planted(n, d, steps=2)[0], chunk=100)

    def peak() -> float:
        tracemalloc.start()
        fits = [pca._fit(store, t, 8, 0) for t in store.timesteps]
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert len(fits) == 2
        return highest / (4 * n * d)

    assert 1.0 < peak() < 1.8
    monkeypatch.setattr(pca, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(pca, "BLOCK_ROWS", 100)
    assert peak() < 0.7


@pytest.mark.parametrize(("chunk", "rows"), [(7, 5), (7, 7), (16, 40), (16, 15), (3, 100)])
def test_blocks_hold_the_samples_in_order(tmp_path, chunk, rows):
    h = np.random.default_rng(0).standard_normal((40, 2, D)).astype(np.float32)
    blocks = list(pca._blocks(make_store(tmp_path / "h.zarr", h, chunk=chunk), 0, rows))
    np.testing.assert_array_equal(np.concatenate(blocks), h[:, 1])
    assert {len(b) for b in blocks[:-1]} <= {rows} and len(blocks[-1]) <= rows


@pytest.mark.parametrize("rows", [7, 60, 1000])
def test_joint_is_the_pca_of_the_standardised_concatenation(tmp_path, monkeypatch, rows):
    monkeypatch.setattr(pca, "BLOCK_ROWS", rows)
    rng = np.random.default_rng(0)
    h = rng.standard_normal((60, 1, D)) * np.linspace(3, 0.5, D) + rng.standard_normal((60, 3, D))
    h *= np.array([1.0, 5.0, 25.0])[:, None]
    pcs = find_pca(make_store(tmp_path / "h.zarr", h), 6, joint=True)
    centred = h - h.mean(axis=0)
    standardised = centred / np.sqrt(h.var(axis=0, ddof=1).sum(axis=1))[:, None]
    reference = PCA(6, svd_solver="full").fit_transform(standardised.reshape(60, -1))
    correlation = np.diag(np.corrcoef(pcs.shared_scores.T, reference.T)[:6, 6:])
    np.testing.assert_allclose(np.abs(correlation), 1, atol=1e-4)
    np.testing.assert_allclose(pcs.shared_scores.std(axis=0, ddof=1), 1, rtol=1e-5)
    # The direction at t is the regression of h_t on the shared scores.
    slopes = np.einsum("ntd,nj->tjd", centred, pcs.shared_scores)
    slopes /= np.linalg.norm(slopes, axis=2, keepdims=True)
    np.testing.assert_allclose(units_of(pcs), slopes, atol=1e-3)
    np.testing.assert_allclose(pcs.scores, np.einsum("ntd,tjd->ntj", centred, units_of(pcs)), rtol=1e-3, atol=1e-3)
    assert (pca._largest_positive(units_of(pcs)[0]) == 1).all()
    # What all shared scores explain together is the R^2 of the regression.
    fitted = np.einsum("nj,mj,mtd->ntd", pcs.shared_scores, pcs.shared_scores, centred) / 59
    r_squared = (fitted**2).sum(axis=(0, 2)) / (centred**2).sum(axis=(0, 2))
    np.testing.assert_allclose(pcs.explained_variance_ratio.sum(axis=1), r_squared, rtol=1e-3)


def test_joint_scores_follow_one_factor_through_a_swap_of_order(tmp_path):
    _, axes, _, z = planted(steps=2)
    sigmas = np.array([[8, 2, 1, 0.5], [3, 5, 1, 0.5]])
    pcs = find_pca(make_store(tmp_path / "h.zarr", np.einsum("nj,tj,tjd->ntd", z, sigmas, axes)), 1, joint=True)
    assert abs(np.corrcoef(pcs.shared_scores[:, 0], z[:, 0])[0, 1]) > 0.99


def test_the_interval_covers_the_share_and_shrinks_with_n(tmp_path):
    rng = np.random.default_rng(0)
    h = rng.standard_normal((1600, 1, D)) * np.array([4.0, 2.0] + [0.5] * (D - 2))
    many, few = (find_pca(make_store(tmp_path / f"{n}.zarr", h[:n], chunk=200), 2) for n in (1600, 100))
    for pcs in (many, few):
        low, high = pcs.explained_variance_interval[..., 0], pcs.explained_variance_interval[..., 1]
        assert (low < pcs.explained_variance_ratio).all() and (pcs.explained_variance_ratio < high).all()
    width = [np.ptp(pcs.explained_variance_interval[0, 0]) for pcs in (many, few)]
    # Widths go with 1 / sqrt(n): a factor of 4 here.
    assert 2.5 < width[1] / width[0] < 6.5
    # Delta method for a / (a + sum b): a Gaussian's variances have standard errors sqrt(2/n) a and sqrt(2/n) b.
    a, others = 16.0, np.array([4.0] + [0.25] * (D - 2))
    error = np.sqrt(2 / 1600 * (a**2 * others.sum() ** 2 + a**2 * (others**2).sum())) / (a + others.sum()) ** 2
    assert width[0] == pytest.approx(2 * 1.96 * error, rel=0.2)


def test_the_interval_is_the_bootstrap_of_the_samples():
    rng = np.random.default_rng(1)
    h = rng.standard_normal((8, 2, 3))
    h -= h.mean(axis=0)
    shares, interval = pca._explained(h[..., :1], h[..., :1], (h**2).sum(axis=2), list(h.transpose(1, 0, 2)), seed=5)
    np.testing.assert_allclose(shares[:, 0], h[..., 0].var(axis=0) / h.var(axis=0).sum(axis=1))
    rng = np.random.default_rng(5)
    drawn = [h[rng.integers(8, size=8)] for _ in range(pca.RESAMPLES)]
    expected = [d[..., 0].var(axis=0) / d.var(axis=0).sum(axis=1) for d in drawn]
    np.testing.assert_allclose(interval[:, 0], np.quantile(expected, (0.025, 0.975), axis=0).T)


@pytest.mark.parametrize("joint", [False, True])
def test_the_interval_of_a_component_that_is_nearly_all_of_few_samples_holds_its_share(tmp_path, joint):
    """That a draw has another mean explains nothing, and is no variance either."""
    rng = np.random.default_rng(0)
    h = rng.standard_normal((20, 2, 1)) * np.eye(8)[0] * 10 + 0.1 * rng.standard_normal((20, 2, 8))
    found = find_pca(make_store(tmp_path / "h.zarr", h.astype(np.float32)), 1, joint=joint)
    low, high = found.explained_variance_interval[..., 0, :].T
    share = found.explained_variance_ratio[:, 0]
    assert (low <= share).all() and (share <= high).all()
    if not joint:
        assert (low > 0.99).all()


def test_result_is_a_sequence_of_directions_with_provenance_and_the_same_for_the_same_seed(tmp_path):
    store = make_store(tmp_path / "h.zarr", planted()[0])
    pcs, again = find_pca(store, 4), find_pca(store, 4)
    assert np.array_equal(units_of(pcs), units_of(again))
    assert np.array_equal(pcs.explained_variance_interval, again.explained_variance_interval)
    assert isinstance(pcs, Sequence) and len(pcs) == 4
    assert [pc.name for pc in pcs] == ["PC1", "PC2", "PC3", "PC4"]
    assert [pc.name for pc in pcs[1:3]] == ["PC2", "PC3"] and pcs[-1] is pcs[3]
    assert all(isinstance(pc, Direction) for pc in pcs)
    assert pcs[1].h_shape == SHAPE and pcs[1].timesteps == store.timesteps
    provenance = pcs[1].provenance
    assert provenance["model"] == stores.MODEL and provenance["seeds"] == {"first": 0, "n": 300}
    assert provenance["method"] == "pca"
    assert provenance["parameters"] == {"component": 2, "k": 4, "joint": False, "n": 300, "seed": 0}
    assert pcs.scores.shape == (300, 3, 4) and pcs.explained_variance_interval.shape == (3, 4, 2)
    assert "\n" not in repr(pcs) and "4 of 300 samples" in repr(pcs)
    single = find_pca(make_store(tmp_path / "single.zarr", planted(steps=1)[0]), 2)
    assert single.matched_cosine.shape == (0, 2) and len(single[0].timesteps) == 1


def test_k_out_of_range_is_refused(tmp_path):
    store = make_store(tmp_path / "h.zarr", planted(n=12)[0])
    assert len(find_pca(store, 11)) == 11
    for k in (12, 0):
        with pytest.raises(ValueError, match=f"k is {k}; 12 samples of 20 values have 1 to 11"):
            find_pca(store, k)
    with pytest.raises(ValueError, match="1 sample; principal components need 2"):
        find_pca(make_store(tmp_path / "one.zarr", planted(n=1)[0]), 1)


@pytest.mark.parametrize("limit", [0, 2**31])
def test_a_value_that_is_not_finite_names_sample_and_timestep(tmp_path, monkeypatch, limit):
    monkeypatch.setattr(pca, "IN_MEMORY_BYTES", limit)
    monkeypatch.setattr(pca, "BLOCK_ROWS", 9)
    store = make_store(tmp_path / "h.zarr", planted(n=40)[0])
    store.group["h"][21, 1, 2, 0, 0] = np.nan
    with pytest.raises(ValueError, match="sample 21 at timestep 100 is not finite"):
        find_pca(store, 2)


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_h_that_does_not_vary_is_refused(tmp_path):
    h = planted(n=20)[0]
    h[:, 1] = 0.3
    with pytest.raises(ValueError, match="timestep 100 is the same for all 20 samples"):
        find_pca(make_store(tmp_path / "h.zarr", h), 2)
