"""Supervised directions: planted ones are found by every method, confounders are balanced away, labels are matched."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import stores
import torch

from workbench.directions import supervised
from workbench.directions.direction import load_direction
from workbench.directions.supervised import METHODS, few_shot_directions, find_from_labels, find_from_scores, find_many

TIMESTEPS = (600, 300, 0)
N = 240
MEAN = 5.0
STRENGTH = 3.0


def planted_axes(d):
    """Two orthonormal axes a timestep: (T, 2, d)."""
    rng = np.random.default_rng(0)
    return np.stack([np.linalg.qr(rng.standard_normal((d, 2)))[0].T for _ in TIMESTEPS])


def labels_of(seeds):
    """Two correlated attributes: B is 1 for four fifths of those with A and for one fifth of the others."""
    rng = np.random.default_rng(1)
    a = rng.random(len(seeds)) < 0.4
    b = rng.random(len(seeds)) < np.where(a, 0.8, 0.2)
    return pd.DataFrame({"A": a.astype(int), "B": b.astype(int)}, index=seeds)


def make_store(path, model, values, seeds=None):
    """A store of given h of shape (n, T, C, h, w); without seeds of inverted images."""
    options = {"timesteps": TIMESTEPS, "chunk": 50, "model": model.provenance(), "inverted": seeds is None}
    return stores.make_store(path, values, seeds=seeds, **options)


def flat_of(h):
    """(n, T, d), float64"""
    return h.reshape(len(h), len(TIMESTEPS), -1).astype(np.float64)


def normalised(v):
    return v / np.linalg.norm(v, axis=-1, keepdims=True)


def assert_along(direction, v):
    np.testing.assert_allclose(cosines(direction, normalised(v)), 1, atol=1e-6)


@pytest.fixture(scope="module")
def seeds():
    return [int(s) for s in np.random.default_rng(2).permutation(1000)[:N]]


@pytest.fixture(scope="module")
def table(seeds):
    return labels_of(seeds)


@pytest.fixture(scope="module")
def axes(tiny):
    return planted_axes(int(np.prod(tiny.h_shape)))


@pytest.fixture(scope="module")
def h(tiny, axes, table):
    """Unit noise, a common mean, and STRENGTH along axis 0 for A and along axis 1 for B."""
    rng = np.random.default_rng(3)
    noise = rng.standard_normal((N, len(TIMESTEPS), axes.shape[2]))
    signal = STRENGTH * np.einsum("na,tad->ntd", table.to_numpy(), axes)
    return (MEAN + noise + signal).astype(np.float32).reshape(N, len(TIMESTEPS), *tiny.h_shape)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny, h, seeds):
    return make_store(tmp_path_factory.mktemp("store") / "planted.zarr", tiny, h, seeds)


@pytest.fixture(scope="module")
def inverted_store(tmp_path_factory, tiny, h):
    return make_store(tmp_path_factory.mktemp("store") / "inverted.zarr", tiny, h)


def cosines(direction, axis):
    return (direction.unit.flatten(1).double().numpy() * axis).sum(axis=1)


def same(a, b):
    torch.testing.assert_close(a.unit, b.unit, atol=1e-5, rtol=0)
    torch.testing.assert_close(a.sigma, b.sigma, atol=1e-4, rtol=0)


def find(store, labels, **options):
    return find_from_labels(store, labels, progress=False, **options)


def left_out(flat, y, used):
    """Projections of every centred sample on the unit difference of means without it: (n, T)."""
    rows, along = np.arange(len(flat)), []
    for i in rows:
        above, below = (flat[used & side & (rows != i)].mean(axis=0) for side in (y, ~y))
        v = above - below
        along.append(((flat[i] - flat.mean(axis=0)) * v).sum(axis=1) / np.linalg.norm(v, axis=1))
    return np.stack(along)


def spread(along):
    return np.sqrt((along**2).sum(axis=0) / (len(along) - 1))


# What is found


def test_the_difference_of_means_and_the_sigma_of_samples_left_out_of_it_are_the_equations(store, table, h):
    found = find(store, table["A"])
    flat, y = flat_of(h), table["A"].to_numpy() == 1
    unit = normalised(flat[y].mean(axis=0) - flat[~y].mean(axis=0))
    np.testing.assert_allclose(found.unit.flatten(1), unit, atol=1e-5)
    assert found.name == "A" and found.timesteps == TIMESTEPS
    along = left_out(flat, y, np.ones(N, dtype=bool))
    np.testing.assert_allclose(found.sigma, spread(along), rtol=1e-4)
    gap = (along[y].mean(axis=0) - along[~y].mean(axis=0)) / spread(along)
    assert found.extras["class_gap"] == pytest.approx(gap.mean(), rel=1e-3)


@pytest.mark.parametrize("method", METHODS)
def test_one_unit_of_scale_is_one_sigma_of_new_samples(tmp_path, tiny, method):
    """96 samples of a spectrum like that of h: in sample, sigma is 1.2 to 1.5 times as large."""
    n, d = 96, int(np.prod(tiny.h_shape))
    deviations, ratios = 10 / np.sqrt(np.arange(1, d + 1)), []
    for draw in range(5):
        rng = np.random.default_rng(draw)
        axes, labels = np.linalg.qr(rng.standard_normal((d, d)))[0], rng.permutation(np.arange(n) % 2)
        gap = 4 * axes[5] + 2 * axes[100]
        noise = (rng.standard_normal((n, len(TIMESTEPS), d)) * deviations) @ axes
        values = (MEAN + noise + labels[:, None, None] * gap).astype(np.float32)
        h = values.reshape(n, len(TIMESTEPS), *tiny.h_shape)
        found = find(make_store(tmp_path / f"{draw}.zarr", tiny, h), labels, method=method)
        unit = found.unit.flatten(1).double().numpy()
        truth = np.sqrt((((unit @ axes.T) * deviations) ** 2).sum(axis=1) + (unit @ gap / 2) ** 2)
        ratios.append(found.sigma.numpy() / truth)
    # 15 ratios, each of a standard deviation that 96 samples give to 7%: their mean to 2%.
    assert np.mean(ratios) == pytest.approx(1, abs=0.05)


def test_calibration_with_the_samples_of_a_direction_warns_or_takes_the_excess_of_a_known_one_off(tmp_path, tiny):
    n, d = 96, int(np.prod(tiny.h_shape))
    deviations, plain, alike = 10 / np.sqrt(np.arange(1, d + 1)), [], []
    for draw in range(5):
        rng = np.random.default_rng(draw)
        labels = pd.DataFrame({name: rng.permutation(np.arange(n) % 2) for name in "AB"})
        noise = rng.standard_normal((n, len(TIMESTEPS), d)) * deviations
        noise[:, :, 5:7] += 4 * labels.to_numpy()[:, None]
        store = make_store(tmp_path / f"{draw}.zarr", tiny, noise.astype(np.float32).reshape(n, -1, *tiny.h_shape))
        store.provenance["images"] = {"fingerprint": "these", "n": n}
        a, b = find_many(store, labels, progress=False).values()
        rest = a.orthogonal_to(b, per_step=True)
        variance = deviations**2 + 4 * np.isin(np.arange(d), (5, 6))
        truth = np.sqrt(rest.unit.flatten(1).double().numpy() ** 2 @ variance)
        with pytest.warns(UserWarning, match="was found from the samples of this store"):
            plain.append(rest.calibrated(store, progress=False).sigma.numpy() / truth)
        alike.append(rest.calibrated(store, like=a, progress=False).sigma.numpy() / truth)
    assert np.mean(plain) > 1.15
    assert np.mean(alike) == pytest.approx(1, abs=0.06)


@pytest.mark.parametrize("k", [2, 40])
def test_sigma_of_a_direction_from_scores_leaves_samples_out_too(store, h, k):
    scores = h[:, 0].reshape(N, -1)[:, 0].astype(float)
    found = find_from_scores(store, scores, k=k, progress=False)
    order, used = np.argsort(scores), np.zeros(N, dtype=bool)
    used[order[:k]] = used[order[-k:]] = True
    np.testing.assert_allclose(found.sigma, spread(left_out(flat_of(h), scores > np.median(scores), used)), rtol=1e-4)


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_found_by_every_method(axes, seeds, tmp_path, tiny, method):
    """The mean of 240 samples in 256 dimensions has noise of length 2 beside a signal of 3: a cosine of 0.8."""
    rng = np.random.default_rng(4)
    alone = pd.Series(rng.permutation(np.arange(N) % 2), index=seeds)
    signal = STRENGTH * alone.to_numpy()[:, None, None] * axes[:, 0]
    noise = rng.standard_normal((N, len(TIMESTEPS), axes.shape[2]))
    values = (MEAN + signal + noise).astype(np.float32).reshape(N, len(TIMESTEPS), *tiny.h_shape)
    found = find(make_store(tmp_path / "one.zarr", tiny, values, seeds), alone, method=method)
    assert (cosines(found, axes[:, 0]) > 0.7).all()
    gap = STRENGTH * cosines(found, axes[:, 0])
    assert found.extras["class_gap"] == pytest.approx((gap / np.sqrt(1 + gap**2 / 4)).mean(), rel=0.1)


def test_probes_are_fitted_in_few_components_of_many(store, table, monkeypatch):
    whole = find(store, table["A"], method="logistic")
    monkeypatch.setattr(supervised, "PROBE_RANK", 20)
    assert 0.5 < find(store, table["A"], method="logistic").cosine(whole) < 0.999


def test_reversed_labels_give_the_opposite(store, table):
    for method in METHODS:
        same(find(store, 1 - table["A"], method=method), -find(store, table["A"], method=method))


def test_many_attributes_at_once_are_the_same_as_one_by_one_and_share_one_reading(store, table, monkeypatch):
    for method in ("mean", "logistic"):
        found = find_many(store, table, method=method, progress=False)
        assert list(found) == ["A", "B"]
        for name, direction in found.items():
            same(direction, find(store, table[name], method=method))
    reads, batches = [], type(store).batches
    monkeypatch.setattr(type(store), "batches", lambda self, t, **some: reads.append(t) or batches(self, t, **some))
    whole = find_many(store, table, progress=False)
    assert reads == list(TIMESTEPS)
    monkeypatch.setattr(supervised, "IN_MEMORY_BYTES", 0)
    reads.clear()
    same(whole["A"], find_many(store, table, progress=False)["A"])
    assert sorted(reads) == sorted(2 * TIMESTEPS)


# Balance


@pytest.mark.parametrize("method", ["mean", "logistic"])
def test_balance_removes_a_planted_confounder_and_weakens_it_for_a_probe(store, axes, table, method):
    plain, balanced = (find(store, table["A"], method=method, balance=b) for b in (None, table["B"]))
    drags, left = (np.abs(cosines(found, axes[:, 1])) for found in (plain, balanced))
    assert left.mean() < drags.mean()
    if method == "mean":
        assert (drags > 0.3).all() and (left < 0.12).all() and (cosines(balanced, axes[:, 0]) > 0.6).all()


def test_scores_are_balanced_by_picking_alike_from_every_stratum(store, axes, table):
    rng = np.random.default_rng(6)
    scores = table["A"] + 0.5 * table["B"] + 0.1 * rng.random(N)
    plain = find_from_scores(store, scores, k=40, progress=False)
    balanced = find_from_scores(store, scores, k=40, balance=table["B"], progress=False)
    assert (cosines(plain, axes[:, 1]) > 0.4).all()
    assert (np.abs(cosines(balanced, axes[:, 1])) < 0.2).all()


def test_samples_that_are_not_among_the_compared_do_not_count(inverted_store, h):
    flat, labels, among = flat_of(h), np.isin(np.arange(N), [0, 1, 5, 200]), [6, 0, 1, 2, 5]
    found = find(inverted_store, labels.astype(int), among=among)
    assert_along(found, flat[[0, 1, 5]].mean(axis=0) - flat[[2, 6]].mean(axis=0))
    parameters = found.provenance["parameters"]
    assert (parameters["positives"], parameters["negatives"]) == (3, 2)
    with pytest.raises(ValueError, match=f"from 0 to {N - 1}"):
        find(inverted_store, labels.astype(int), among=[-1, *among])


# Scores


def test_scores_take_the_highest_against_the_lowest(store, seeds, h):
    scores = pd.Series(np.random.default_rng(7).standard_normal(N), index=seeds, name="Yaw")
    rows, flat = np.argsort(scores.to_numpy()), flat_of(h)
    found = find_from_scores(store, scores, k=30, progress=False)
    assert_along(found, flat[rows[-30:]].mean(axis=0) - flat[rows[:30]].mean(axis=0))
    assert found.name == "Yaw"


def test_shares_of_strata_add_up_and_what_small_ones_have_no_room_for_the_large_ones_take():
    np.testing.assert_array_equal(supervised._shares(np.array([50, 30, 20]), 10), [5, 3, 2])
    np.testing.assert_array_equal(supervised._shares(np.array([3, 3, 4]), 4), [1, 1, 2])
    rng = np.random.default_rng(0)
    for sizes in [np.array([3, 3, 3, 1]), np.array([1] * 10 + [90]), *(rng.integers(1, 30, 8) for _ in range(20))]:
        most = (sizes // 2).sum()
        for k in range(1, most + 1):
            shares = supervised._shares(sizes, k)
            assert shares.sum() == k and (shares <= sizes // 2).all()
        with pytest.raises(ValueError, match=f"at most {most} on a side"):
            supervised._shares(sizes, most + 1)


# Few examples


def few(store, labels, **options):
    return few_shot_directions(store, labels, progress=False, **{"counts": [2, 30], "draws": 3, "seed": 5, **options})


def test_directions_of_few_examples_near_the_planted_one_as_they_become_more(store, table):
    found = few(store, table["A"], counts=[1, 8, 60], draws=6).table
    assert list(found["count"].unique()) == [0, 1, 8, 60, np.inf] and len(found) == 6 * 5
    mean = found.groupby("count")["cosine"].mean()
    assert mean.is_monotonic_increasing
    assert abs(mean[0]) < 0.1 < mean[1] < mean[8] - 0.1 < mean[60] - 0.2
    assert found[found["count"] == np.inf]["cosine"].to_numpy() == pytest.approx(1)


def test_a_few_examples_and_those_that_are_left_are_differences_of_means(store, table, h, monkeypatch):
    """One of each class is drawn: which ones is known from the order of a generator that does not permute."""
    monkeypatch.setattr(supervised.np.random, "default_rng", lambda seed: Ordered())
    flat, y = flat_of(h), table["A"].to_numpy() == 1
    positives, negatives = np.flatnonzero(y), np.flatnonzero(~y)
    found = few(store, table["A"], counts=[3], draws=1)
    drawn, left = (
        normalised(flat[positives[part]].mean(axis=0) - flat[negatives[part]].mean(axis=0))
        for part in (slice(3), slice(3, None))
    )
    examples = np.isin(np.arange(N), [*positives[:3], *negatives[:3]])
    sigma = spread(left_out(flat, y, ~examples))[:, None]
    assert found.deltas.shape == (3, len(TIMESTEPS), *store.h_shape)
    np.testing.assert_allclose(found.deltas[1].flatten(1), sigma * drawn, atol=1e-4)
    np.testing.assert_allclose(found.deltas[2].flatten(1), sigma * left, atol=1e-4)
    a, b = (sigma * drawn).ravel(), (sigma * left).ravel()
    assert found.table["cosine"][1] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-4)


class Ordered:
    """A generator that leaves the order and whose noise is that of a seed."""

    def permutation(self, values):
        return values

    def standard_normal(self, shape):
        return np.random.Generator(np.random.PCG64(0)).standard_normal(shape)


def test_all_directions_of_a_draw_are_of_one_length_and_depend_on_the_seed(store, table):
    found, again = few(store, table["A"]), few(store, table["A"])
    lengths = found.deltas.flatten(2).norm(dim=2).view(3, 4, -1)
    torch.testing.assert_close(lengths, lengths[:, -1:].expand_as(lengths), rtol=1e-4, atol=0)
    assert torch.equal(found.deltas, again.deltas)
    # The random direction is a control of the same strength: it turns over time as the reference does.
    random, *_, reference = torch.nn.functional.normalize(found.deltas.flatten(2)[:4].double(), dim=2)
    torch.testing.assert_close(random @ random.T, reference @ reference.T, atol=1e-4, rtol=0)
    assert (random * reference).sum(dim=1).abs().max() < 0.5
    assert not torch.equal(found.deltas, few(store, table["A"], seed=6).deltas)
    assert not torch.equal(found.deltas[1], found.deltas[5])


def test_a_planted_direction_is_found_in_x_T_too(store, table, axes):
    noise = np.random.default_rng(9).standard_normal((N, axes.shape[2])) + 4 * np.outer(table["A"], axes[0, 0])
    found = few(store, table["A"], x_T=torch.from_numpy(noise).float().view(N, 1, 4, -1))
    assert found.deltas.shape == (12, 1, 1, 4, axes.shape[2] // 4)
    reference = found.deltas[-1].flatten().double()
    assert float(reference @ torch.from_numpy(axes[0, 0]) / reference.norm()) > 0.8
    torch.testing.assert_close(found.deltas.flatten(1).norm(dim=1), torch.ones(12))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": []}, r"counts are \[\]; draw 1 to [0-9]+ examples of each class of 'A'"),
        ({"counts": [0, 4]}, r"counts are \[0, 4\]"),
        ({"counts": [4, 200]}, r"counts are \[4, 200\]"),
        ({"draws": 0}, "draws is 0"),
    ],
)
def test_few_examples_that_cannot_be_drawn_are_refused(store, table, options, message):
    with pytest.raises(ValueError, match=message):
        few(store, table["A"], **options)


# Matching


def test_labels_are_matched_by_seed_and_not_by_position(store, table):
    a, found = table["A"], find(store, table["A"])
    shuffled = a.sample(frac=1, random_state=0)
    assert list(shuffled.index) != list(table.index)
    for labels in (shuffled, a.to_numpy(), a.reset_index(drop=True), a.astype(bool)):
        same(find(store, labels), found)
    assert find(store, shuffled.to_numpy()).cosine(found) < 0.9


def test_seeds_that_are_numbered_are_seeds(tmp_path, tiny, h, table):
    """Seeds 0..n-1 in another order: a Series numbered 0..n-1 names seeds."""
    order = np.random.default_rng(8).permutation(N)
    store = make_store(tmp_path / "ordered.zarr", tiny, h, order)
    by_seed = pd.Series(table["A"].to_numpy(), index=order).sort_index()
    same(find(store, by_seed), find(store, table["A"].to_numpy()))
    with pytest.raises(ValueError, match=r"positions or seeds.*pass \.to_numpy\(\)"):
        find(store, table["A"].reset_index(drop=True))


def test_file_names_are_matched_where_the_store_knows_them(inverted_store, table, monkeypatch):
    names = [f"{i:05d}.webp" for i in range(N)]
    labels = pd.Series(table["A"].to_numpy(), index=names)
    with pytest.raises(ValueError, match="are not known by name.*to_numpy"):
        find(inverted_store, labels)
    monkeypatch.setattr(type(inverted_store), "names", names)
    same(find(inverted_store, labels[::-1]), find(inverted_store, table["A"].to_numpy()))


# Provenance


def test_a_direction_knows_what_it_was_made_from_and_survives_its_file(store, table, tmp_path):
    found = find(store, table["A"], balance=table["B"])
    parameters = found.provenance["parameters"]
    assert found.provenance["method"] == "labels" and parameters["estimator"] == "mean"
    assert parameters["positives"] == table["A"].sum() and parameters["balance"] == ["B"]
    assert parameters["labels"] != find(store, table["B"]).provenance["parameters"]["labels"]
    again = load_direction(found.save(tmp_path / "a.safetensors"))
    assert again.provenance == found.provenance and again.extras == found.extras


# Bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a * 0, "all 240 labels 'A' are 0"),
        (lambda a: a.astype(float).where(a.index != a.index[3]), "1 of 240 labels 'A' are missing"),
        (lambda a: a * 2, "labels are 0 or 1, but 'A' has 2; .*find_from_scores"),
        (lambda a: a.map({0: "no", 1: "yes"}), "labels are 0 or 1"),
        (lambda a: (pd.Series(range(N), index=a.index, name="A") == 5).astype(int), "1 positives and 239 negatives"),
        (lambda a: a[:100], "140 of them have none and 0 of 100 belong to no sample"),
        (lambda a: a.rename({a.index[0]: 5000}), "1 of them have none and 1 of 240"),
        (lambda a: a.rename({a.index[0]: a.index[1]}), "more than once"),
        (lambda a: a.to_numpy()[:100], "are 100 for 240 samples"),
    ],
)
def test_labels_that_do_not_fit_are_refused(store, table, change, message):
    with pytest.raises(ValueError, match=message):
        find(store, change(table["A"]))


@pytest.mark.parametrize(
    ("scores", "options", "message"),
    [
        (np.ones(N), {}, "all scores 'score' are 1"),
        (np.where(np.arange(N) == 7, np.nan, np.arange(N)), {}, "1 of 240 scores 'score' are not finite"),
        (pd.DataFrame({"A": np.arange(N), "B": 1}), {}, "a table; give one of its columns: A, B"),
        (np.arange(N), {"k": 1}, "k is 1; 240 samples have 2 to 120 on a side"),
        (np.arange(N), {"k": 121}, "k is 121"),
        (np.arange(N) < 20, {"k": 50}, "share the value 0; take a smaller k"),
        (np.arange(N), {"method": "svm"}, "'svm' is not known; it is one of mean, logistic, lda"),
    ],
)
def test_scores_that_do_not_fit_are_refused(store, scores, options, message):
    with pytest.raises(ValueError, match=message):
        find_from_scores(store, scores, progress=False, **options)


def test_a_balance_that_is_impossible_is_refused(store, table):
    missing = table["B"].astype(float).where(table.index != table.index[3])
    for message, options in (
        ("no sample with A=1 has A=0, but [0-9]+ with A=0 do", {"balance": table[["A"]]}),
        ("1 samples lack a value", {"balance": missing}),
        ('"lda" takes no weights', {"balance": table["B"], "method": "lda"}),
    ):
        with pytest.raises(ValueError, match=message):
            find(store, table["A"], **options)
    for message, labels in (("takes a DataFrame", table["A"]), ("all 240 labels 'C' are 0", table.assign(C=0))):
        with pytest.raises(ValueError, match=message):
            find_many(store, labels, progress=False)
