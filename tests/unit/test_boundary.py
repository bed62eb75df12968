"""Boundaries: scikit-learn's own normals, planted ones, the sample-size law, moves, files, and what is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from scipy.stats import norm
from sklearn.svm import SVC

import workbench as wb
from workbench.analysis import probes
from workbench.analysis.probes import class_separation, expected_accuracy, samples_needed
from workbench.analysis.samples import gram
from workbench.diffusion.schedule import NoiseSchedule
from workbench.directions.boundary import load_boundary, move_jointly
from workbench.directions.boundary_fit import METHODS, fit_boundaries, fit_boundary

STEPS = 4
N = 60


def planted(n, d, *, delta, seed=0, offset=3.0):
    """n samples of unit noise around a common mean, their labels, and the unit vector that the classes lie apart on."""
    rng = np.random.default_rng(seed)
    axis = np.random.default_rng(99).standard_normal(d)
    axis /= np.linalg.norm(axis)
    y = np.arange(n) % 2
    z = offset + rng.standard_normal((n, d)) + delta * np.outer(y - 0.5, axis)
    return z.astype(np.float32), y, axis


@pytest.fixture(scope="module")
def run(tiny):
    """Sampled, with h and x recorded."""
    return wb.sample(tiny, range(N), steps=STEPS, eta=0.0, record_h=True, record_x=True, progress=False)


@pytest.fixture(scope="module")
def labels(run):
    """By seed; what they say can be seen in x_T."""
    brightness = run.x_T.mean(dim=(1, 2, 3)).numpy()
    return pd.Series((brightness > np.median(brightness)).astype(int), index=run.seeds, name="Bright")


@pytest.fixture(scope="module")
def boundary(run, labels):
    return fit_boundary(run, labels, t=500)


@pytest.fixture(scope="module")
def store(tmp_path_factory, tiny):
    options = {"steps": STEPS, "eta": 0.0, "record_x": True, "dtype": "float32", "progress": False}
    return wb.extract(tiny, N, out=tmp_path_factory.mktemp("store") / "s.zarr", **options)


# The fit


@pytest.mark.parametrize(("n", "d", "C"), [(60, 500, 1.0), (60, 500, 1e-4), (200, 20, 1.0)])
def test_the_normal_is_that_of_a_linear_svc(n, d, C):
    z, y, _ = planted(n, d, delta=2.0)
    found = fit_boundary(z, y, t=0, C=C)
    oracle = SVC(kernel="linear", C=C, tol=1e-3).fit(z, y)
    w = oracle.coef_[0]
    assert found.normal.double().numpy() @ w / np.linalg.norm(w) > 1 - 1e-6
    assert found.extras["weight_norm"] == pytest.approx(np.linalg.norm(w), rel=1e-3)
    np.testing.assert_allclose(found.distance(z), oracle.decision_function(z) / np.linalg.norm(w), atol=2e-2)


def test_the_interval_of_a_cross_validated_accuracy_holds_that_of_new_samples():
    """Of 60 draws, Wilson's own would miss 10 or more: the folds learn from the same samples, and err together."""
    missed = 0
    for draw in range(60):
        z, y, axis = planted(60, 100, delta=2.5, seed=draw)
        found = fit_boundary(z, y, t=0)
        above, below = found.distance(3.0 + 1.25 * np.stack([axis, -axis]))
        truth = (norm.cdf(above) + norm.cdf(-below)) / 2
        missed += not found.accuracy.low <= truth <= found.accuracy.high
    assert missed <= 6


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_boundary_is_found_and_its_held_out_numbers_are_those_of_new_samples(method):
    z, y, axis = planted(200, 300, delta=5.0)
    new, truth, _ = planted(4000, 300, delta=5.0, seed=1)
    found = fit_boundary(z, y, t=0, method=method)
    assert found.normal.double().numpy() @ axis > 0.75
    right = ((found.distance(new) > 0) == truth).mean()
    assert found.accuracy.low - 0.01 < right < found.accuracy.high + 0.01
    measured = found.measured(new, truth)
    np.testing.assert_allclose(found.means, measured.means, atol=0.35)
    np.testing.assert_allclose(found.deviations, measured.deviations, atol=0.2)
    assert measured.accuracy.value == right and measured.accuracy.n == 4000
    assert found.means[0] < 0 < found.means[1]


def test_training_samples_lie_at_the_margin_and_so_are_not_what_is_reported():
    z, y, _ = planted(40, 2000, delta=1.0)
    found = fit_boundary(z, y, t=0)
    at_margin = found.distance(z) * np.where(y == 1, 1, -1)
    assert at_margin.std() < 0.01 * at_margin.mean()
    assert found.accuracy.value < 0.9 and min(found.deviations) > 0.5


@pytest.mark.parametrize("method", METHODS)
def test_random_labels_are_held_out_at_chance(method):
    z = np.random.default_rng(5).standard_normal((400, 300)).astype(np.float32)
    y = np.random.default_rng(6).permutation(np.arange(400) % 2)
    assert abs(fit_boundary(z, y, t=0, method=method).accuracy.value - 0.5) < 2 * 0.5 / 20 + 0.02


@pytest.mark.parametrize("method", METHODS)
def test_reversed_labels_turn_the_normal_round_and_a_shift_of_all_samples_the_intercept_alone(method):
    z, y, _ = planted(60, 100, delta=3.0)
    there, back, shifted = (fit_boundary(*given, t=0, method=method) for given in ((z, y), (z, 1 - y), (z + 7, y)))
    torch.testing.assert_close(there.normal, -back.normal, atol=1e-3, rtol=0)  # the machine's own tolerance
    np.testing.assert_allclose(there.distance(z), -back.distance(z), atol=1e-2)
    assert there.means[1] == pytest.approx(-back.means[0], abs=0.05)
    torch.testing.assert_close(there.normal, shifted.normal, atol=1e-4, rtol=0)
    np.testing.assert_allclose(there.distance(z), shifted.distance(z + 7), atol=1e-2)
    assert abs(there.intercept - shifted.intercept) > 1e-2


def test_many_attributes_are_the_same_as_one_by_one_and_share_the_products(monkeypatch):
    z, y, _ = planted(60, 100, delta=3.0)
    table = pd.DataFrame({"A": y, "B": np.random.default_rng(0).integers(2, size=60)})
    calls = []
    monkeypatch.setattr(probes, "gram", lambda values: calls.append(1) or gram(values))
    found = fit_boundaries(z, table, t=0)
    assert calls == [1] and list(found) == ["A", "B"]
    for name in table:
        alone = fit_boundary(z, table[name], t=0)
        assert torch.equal(alone.normal, found[name].normal) and alone.accuracy == found[name].accuracy


@pytest.mark.parametrize("method", METHODS)
def test_a_balanced_boundary_of_few_samples_lies_half_way_and_sees_a_rare_class(method):
    """Weights alone change nothing where the margin is hard."""
    rng = np.random.default_rng(1)
    y, truth = np.arange(120) < 15, np.arange(2000) < 1000
    z, new = (rng.standard_normal((len(t), 2000)).astype(np.float32) for t in (y, truth))
    for values, labels in ((z, y), (new, truth)):
        values[:, 0] += 9.0 * labels
    balanced = fit_boundary(z, y.astype(int), t=0, method=method, balance=True)
    right = (balanced.distance(new) > 0) == truth
    assert min(right[truth].mean(), right[~truth].mean()) > 0.7
    assert abs(balanced.balanced_accuracy.value - right.mean()) < 0.12
    assert abs(sum(balanced.means)) < 0.2 * (balanced.means[1] - balanced.means[0])
    if method == "svm":
        plain = fit_boundary(z, y.astype(int), t=0)
        assert torch.equal(plain.normal, balanced.normal)
        assert ((plain.distance(new) > 0) == truth)[truth].mean() < 0.2


def test_the_mean_boundary_of_uneven_classes_lies_half_way():
    """Sample means are long by their noise, the smaller class' by more: uncorrected, all would be of the larger."""
    rng = np.random.default_rng(0)
    y = np.arange(200) < 20
    z = rng.standard_normal((200, 5000)).astype(np.float32)
    z[:, 0] += 12 * (y - 0.5)
    found = fit_boundary(z, y.astype(int), t=0, method="mean")
    assert abs(sum(found.means)) < 0.5 * (found.means[1] - found.means[0])
    assert found.balanced_accuracy.value > 0.8


# How many samples


@pytest.mark.parametrize(("d", "n", "delta"), [(500, 40, 4.0), (500, 160, 3.0), (2000, 100, 6.0)])
def test_the_sample_size_law_is_what_boundaries_reach(d, n, delta):
    reached = []
    for seed in range(6):
        z, y, _ = planted(n, d, delta=delta, seed=seed)
        new, truth, _ = planted(1000, d, delta=delta, seed=100 + seed)
        reached += [((fit_boundary(z, y, t=0, method=m).distance(new) > 0) == truth).mean() for m in ("mean", "svm")]
    assert np.mean(reached) == pytest.approx(expected_accuracy(delta, d, n), abs=0.03)


def test_the_law_and_its_inverse_and_its_limits():
    assert expected_accuracy(0.0, 100, 10) == 0.5
    assert expected_accuracy(4.0, 100, 10**9) == pytest.approx(norm.cdf(2.0), abs=1e-6)
    n = samples_needed(0.9, delta=4.0, d=3072)
    assert expected_accuracy(4.0, 3072, n) == pytest.approx(0.9)
    assert samples_needed(0.99, delta=4.0, d=10) == np.inf
    # 90% from 100 samples of 196,608 values needs classes 15 deviations apart, from 1,000 samples 8.7.
    assert expected_accuracy(15, 196608, 100) == pytest.approx(0.9, abs=0.01)
    assert expected_accuracy(8.7, 196608, 1000) == pytest.approx(0.9, abs=0.01)


def test_the_laws_two_numbers_are_measured_in_noise_that_is_not_isotropic():
    """Deviation 3 along the difference of the means, 1 in 400 other directions, and 0.1 in 5,000 more."""
    rng = np.random.default_rng(0)
    scale = np.concatenate([[3.0], np.ones(400), np.full(5000, 0.1)])
    delta, d = 18.0 / 3.0, (scale**4).sum() / 81.0
    found = []
    for _ in range(20):
        y = np.arange(200) < 100
        z = rng.standard_normal((200, scale.size)) * scale
        z[:, 0] += 18.0 * y
        found.append(class_separation(gram(z), y))
    deltas, dimensions = np.median(found, axis=0)
    assert deltas == pytest.approx(delta, rel=0.1) and dimensions == pytest.approx(d, rel=0.25)


def test_too_few_samples_for_the_accuracy_asked_for_are_a_warning_with_the_laws_number():
    z, y, _ = planted(40, 2000, delta=5.0)
    with pytest.warns(UserWarning, match=r"95% .* about \d+"):
        fit_boundary(z, y, t=0, wanted=0.95, method="mean")
    with pytest.warns(UserWarning, match="no number does"):
        fit_boundary(z, np.random.default_rng(0).permutation(y), t=0, wanted=0.95)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit_boundary(z, y, t=0, wanted=0.55)


# Sources and matching


def test_a_store_a_run_and_an_array_give_the_same_boundary(store, run, labels):
    for space, values in (("h", run.h.at(500)), ("x", run.x.at(500))):
        of_run = fit_boundary(run, labels, t=500, space=space)
        of_store = fit_boundary(store, labels.sample(frac=1, random_state=0), t=500, space=space)
        of_array = fit_boundary(values, labels.to_numpy(), t=500, space=space)
        assert of_run.name == of_store.name == "Bright"
        torch.testing.assert_close(of_run.normal, of_store.normal, atol=1e-4, rtol=0)
        torch.testing.assert_close(of_run.normal.flatten(), of_array.normal, atol=1e-6, rtol=0)
        assert of_run.provenance["model"] == of_store.provenance["model"] and of_array.provenance["model"] is None
        assert of_run.normal.shape == (run.model.h_shape if space == "h" else run.model.image_shape)


# Moves


@pytest.fixture(scope="module")
def pair():
    """Two boundaries whose normals have a cosine of about 0.5, and samples."""
    z, y, _ = planted(60, 48, delta=4.0)
    first = fit_boundary(z, y, t=3, name="first")
    other = first.normal + 1.7 * torch.nn.functional.normalize(torch.linspace(-1, 1, 48) ** 2, dim=0)
    second = replace(first, normal=other / other.norm(), intercept=0.7, name="second")
    return z[:9], first, second


def near(found, expected, *, atol=1e-4):
    np.testing.assert_allclose(found, expected, atol=atol)


def test_a_move_reaches_its_distance_and_leaves_the_rest_in_every_mode(pair):
    z, first, _ = pair
    assert abs(first.intercept) > 0.1
    n, distance = first.normal.numpy(), first.distance(z)
    near(distance, z.astype(float) @ first.normal.double().numpy() + first.intercept, atol=1e-7)
    for to in (-5.0, 0.0, 2.5):
        moved = first.move(z, to=to)
        near(first.distance(moved), to)
        near(moved - np.outer(moved @ n, n), z - np.outer(z @ n, n))
    shifted = first.move(z, to=1.5, mode="shift")
    near(first.distance(shifted), distance + 1.5)
    near(first.move(z, to=distance + 1.5), shifted, atol=1e-5)
    near(first.distance(first.move(z, to=-1.0, mode="mirror")), 0.0)
    near(first.distance(first.move(z, to=-2.0, mode="mirror")), -distance)
    shaped = torch.from_numpy(z).view(9, 3, 4, 4)
    moved = first.move(shaped, to=np.arange(9.0))
    assert moved.shape == shaped.shape and moved.dtype == torch.float32
    near(moved.flatten(1), first.move(z, to=np.arange(9.0)), atol=1e-6)
    near(first.distance(moved.flatten(1).numpy()), np.arange(9.0))


def test_a_move_that_keeps_the_norm_reaches_its_distance_on_a_great_circle(pair):
    z, first, second = pair
    moved = first.move(z, to=2.0, keep_norm=True)
    both = move_jointly(z, [first, second], to=[2.0, -1.0], keep_norm=True)
    for found in (moved, both):
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), np.linalg.norm(z, axis=1), rtol=1e-5)
        near(first.distance(found), 2.0)
    near(second.distance(both), -1.0)
    for row, origin in zip(moved, z, strict=True):
        plane = np.stack([origin, first.normal.numpy(), row])
        assert np.linalg.svd(plane / np.linalg.norm(plane, axis=1, keepdims=True))[1][2] < 1e-5
    with pytest.raises(ValueError, match="no point of that length"):
        first.move(z, to=1e4, keep_norm=True)


def test_a_sample_with_nothing_to_change_stays_the_same_to_the_bit(pair):
    z, first, second = pair
    for keep_norm in (False, True):
        assert np.array_equal(first.move(z, to=first.distance(z), keep_norm=keep_norm), z)
        assert np.array_equal(first.move(z, to=0.0, mode="shift", keep_norm=keep_norm), z)
    both = np.stack([first.distance(z), second.distance(z)], axis=1)
    assert np.array_equal(move_jointly(z, [first, second], to=both), z)


def test_a_joint_move_reaches_all_distances_by_the_shortest_way(pair):
    z, first, second = pair
    moved = move_jointly(z, [first, second], to=[3.0, -2.0])
    missing = (3.0 - first.distance(z), -2.0 - second.distance(z))
    near(first.distance(moved), 3.0)
    near(second.distance(moved), -2.0)
    normals = np.stack([first.normal, second.normal]).astype(float)
    near(moved - z, np.linalg.lstsq(normals, np.stack(missing))[0].T)


def test_a_conditional_boundary_leaves_the_others_distances(pair):
    z, first, second = pair
    alone = first.orthogonal_to(second)
    assert first.cosine(second) > 0.3 and abs(alone.cosine(second)) < 1e-6
    moved, gain = alone.move(z, to=4.0, mode="shift"), np.sqrt(1 - first.cosine(second) ** 2)
    near(second.distance(moved), second.distance(z))
    near(first.distance(moved) - first.distance(z), 4.0 * gain)
    on_second = second.move(z, to=0.0)
    near(alone.distance(on_second), first.distance(on_second) / gain)
    with pytest.raises(ValueError, match="deviations of .* are not known"):
        _ = alone.sigma
    with pytest.raises(ValueError, match="nothing is left of first"):
        first.orthogonal_to(second, first)


# Files


def test_a_boundary_survives_its_file(run, labels, boundary, tmp_path):
    path = boundary.save(tmp_path / "new" / "b.safetensors")
    again = load_boundary(path, model=run.model)
    assert torch.equal(again.normal, boundary.normal)
    for key in vars(boundary):
        if key != "normal":
            assert getattr(again, key) == getattr(boundary, key), key
    assert again.provenance["parameters"]["positives"] == labels.sum()
    assert f"balanced accuracy {boundary.balanced_accuracy.value:.1%}" in repr(again)
    with pytest.raises(ValueError, match="length 1"):
        replace(boundary, normal=torch.full_like(boundary.normal, torch.nan))
    bare = boundary.orthogonal_to(fit_boundary(run, 1 - labels[::-1].to_numpy(), t=500, name="other"))
    assert load_boundary(bare.save(tmp_path / "bare.safetensors")).accuracy is None


def test_a_file_of_another_model_is_refused(run, labels, boundary, make_unet, tmp_path):
    path = boundary.save(tmp_path / "b.safetensors")
    other = wb.wrap(make_unet(seed=1), run.model.schedule, name="other", device="cpu")
    noise = NoiseSchedule(run.model.schedule.alpha_bars**1.1)
    rescheduled = wb.wrap(run.model.unet.unet, noise, name="tiny", device="cpu")
    for options, message in (
        ({"model": other}, "belongs to the model 'tiny'.*'other'"),
        ({"model": run.model.tapped("before")}, "h at the tap 'after', this model has it at 'before'"),
        ({"model": rescheduled}, "another noise schedule than this model"),
    ):
        with pytest.raises(ValueError, match=message):
            load_boundary(path, **options)
    load_boundary(path, model=run.model).check_fits(run.model, t=500, space="h")
    fit_boundary(run, labels, t=500, space="x").check_fits(run.model.tapped("before"), t=500, space="x")


# Bad input


@pytest.mark.parametrize(
    ("options", "change", "message"),
    [
        ({"t": 510}, None, r"timestep 510 .*nearest 750 or 500"),
        ({"space": "z"}, None, "'z'"),
        ({"method": "forest"}, None, "'forest' .*one of svm, mean, lda, logistic"),
        ({"cv": 1}, None, "2 folds or more"),
        ({"C": 0.0}, None, "C is above 0"),
        ({"wanted": 1.5}, None, "between 0.5 and 1"),
        ({}, lambda y: y * 0 + (y.index < 2), "2 positives and 58 negatives; a boundary needs at least 3"),
        ({}, lambda y: y + 1, "labels are 0 or 1"),
        ({}, lambda y: y[:50], "10 of them have none"),
    ],
)
def test_options_and_labels_that_do_not_fit_are_refused(run, labels, options, change, message):
    with pytest.raises(ValueError, match=message):
        fit_boundary(run, change(labels) if change else labels, **{"t": 500, **options})


def test_samples_that_do_not_fit_are_refused(run, labels, store, boundary, tmp_path, pair):
    plain = wb.sample(run.model, range(4), steps=STEPS, progress=False)
    bare = wb.extract(run.model, 4, steps=STEPS, out=tmp_path / "bare.zarr", progress=False)
    for message, call in (
        ("record_h=True", lambda: fit_boundary(plain, [0, 1, 0, 1], t=500)),
        ("record_x=True", lambda: fit_boundary(bare, [0, 1, 0, 1], t=500, space="x")),
        (r"\(3, 7\) don't fit Bright, .*\(n, 16", lambda: boundary.distance(np.zeros((3, 7)))),
        ("finite, of shape", lambda: boundary.move(run.h.at(500), to=np.nan)),
        ("mode 'jump' is not known", lambda: boundary.move(run.h.at(500), to=1.0, mode="jump")),
        ("linearly dependent", lambda: move_jointly(pair[0], [pair[1], pair[1]], to=[0.0, 1.0])),
        ("within one space and timestep", lambda: boundary.orthogonal_to(fit_boundary(run, labels, t=250))),
        ("at least one other", lambda: boundary.orthogonal_to()),
        ("takes a DataFrame", lambda: fit_boundaries(run, labels, t=500)),
        ("same mean|the same", lambda: fit_boundary(np.ones((6, 4)), [0, 1, 0, 1, 0, 1], t=0, method="mean")),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="a list is no Boundary"):
        boundary.orthogonal_to([pair[1]])
