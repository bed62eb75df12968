from __future__ import annotations

import json
import warnings
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from stores import MODEL, make_store

from workbench.diffusion.schedule import NoiseSchedule
from workbench.directions.direction import Direction, load_direction, random_like

TIMESTEPS = (750, 500, 250, 0)
SHAPE = (3, 2, 2)
PROVENANCE = {"model": MODEL, "etas": [1.0] * 4, "method": "planted", "parameters": {"k": 3}, "seeds": {"first": 0}}


def make_direction(seed: int, *, model: dict = MODEL, timesteps=TIMESTEPS) -> Direction:
    delta = torch.from_numpy(np.random.default_rng(seed).standard_normal((len(timesteps), *SHAPE)))
    provenance = {**PROVENANCE, "model": model}
    return Direction.from_delta(delta, timesteps=timesteps, name=f"d{seed}", provenance=provenance)


def make_model(**changes) -> SimpleNamespace:
    return SimpleNamespace(provenance=lambda: {**MODEL, **changes})


def dot(a: Direction, b: Direction) -> float:
    return float((a.delta().double() * b.delta().double()).sum())


def cosines_per_step(a: Direction, b: Direction) -> torch.Tensor:
    return (a.unit * b.unit).flatten(1).sum(dim=1)


def test_delta_is_scale_times_sigma_times_unit():
    unit = torch.zeros(2, 1, 1, 2)
    unit[0, 0, 0, 0], unit[1, 0, 0, 1] = 1.0, -1.0
    d = Direction(unit, torch.tensor([2.0, 0.5]), (10, 0), "d", PROVENANCE)
    assert d.delta(3.0).flatten().tolist() == [6.0, 0.0, 0.0, -1.5]
    assert d.at(10).flatten().tolist() == [2.0, 0.0]
    assert not d.delta(0.0).any()
    with pytest.raises(ValueError, match="timestep 600 was not visited.*750 or 500"):
        make_direction(0).at(600)


def test_from_delta_splits_length_and_unit_and_keeps_zeros():
    delta = torch.randn(4, *SHAPE, generator=torch.Generator().manual_seed(0))
    delta[2] = 0
    d = Direction.from_delta(delta, timesteps=TIMESTEPS, name="d", provenance=PROVENANCE)
    torch.testing.assert_close(d.delta(), delta)
    torch.testing.assert_close(d.unit.flatten(1).norm(dim=1), torch.tensor([1.0, 1.0, 0.0, 1.0]))
    assert d.sigma[2] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"unit": torch.full((4, *SHAPE), 1.0)}, "length 1 or 0"),
        ({"unit": torch.full((4, *SHAPE), torch.nan)}, "length 1 or 0"),
        ({"sigma": torch.ones(3)}, "and 3 sigmas"),
        ({"sigma": -torch.ones(4)}, "not negative"),
        ({"timesteps": (0, 250, 500, 750)}, "decreasing"),
        ({"timesteps": (500, 0)}, "2 timesteps"),
    ],
)
def test_a_direction_that_contradicts_itself_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        replace(make_direction(0), **change)


def test_arithmetic_is_that_of_the_deltas():
    a, b = make_direction(0), make_direction(1)
    torch.testing.assert_close((a + b).delta(), a.delta() + b.delta())
    torch.testing.assert_close((a - b).delta(2.0), 2 * a.delta() - 2 * b.delta())
    torch.testing.assert_close((-a).delta(), -a.delta())
    assert not (-replace(a, extras={"class_gap": 2.0})).extras, "what was measured along a direction is not so along -v"
    torch.testing.assert_close((-1.5 * a).delta(), -1.5 * a.delta())
    torch.testing.assert_close((a * np.float64(0.5) + 2 * (a - b)).delta(), 2.5 * a.delta() - 2 * b.delta())
    assert ((-1.5 * a).sigma > 0).all()
    assert not (a - a).delta().any()


def test_arithmetic_records_its_operands_and_refuses_other_things():
    d = make_direction(0)
    combined = 2 * d - make_direction(1)
    first, second = combined.provenance["parameters"]["of"]
    assert combined.name == "(2 d0) - d1"
    assert first["parameters"]["of"][0]["parameters"] == {"k": 3} and first["parameters"]["factor"] == 2
    assert second["name"] == "d1" and combined.provenance["model"] == MODEL
    with pytest.raises(TypeError):
        d + 1
    with pytest.raises(TypeError):
        d * make_direction(1)
    with pytest.raises(ValueError, match="finite"):
        d * float("nan")


@pytest.mark.parametrize("combine", [lambda a, b: a + b, lambda a, b: a - b, Direction.orthogonal_to, Direction.cosine])
def test_directions_of_other_models_taps_or_timesteps_do_not_mix(combine):
    a = make_direction(0)
    with pytest.raises(ValueError, match="weights ffff"):
        combine(a, make_direction(1, model={**MODEL, "hash": "ffff"}))
    with pytest.raises(ValueError, match="'middle'"):
        combine(a, make_direction(1, model={**MODEL, "tap": "middle"}))
    with pytest.raises(ValueError, match="2 steps t=500..0.*resampled"):
        combine(a, make_direction(1, timesteps=(500, 0)))


def test_orthogonal_to_removes_the_span_of_all_others_at_once():
    v, a, b = make_direction(0), make_direction(1), make_direction(2) + 3 * make_direction(1)
    rest = v.orthogonal_to(a, b)
    assert abs(rest.cosine(a)) < 1e-6 and abs(rest.cosine(b)) < 1e-6
    one_by_one = v.orthogonal_to(a).orthogonal_to(b)
    assert abs(one_by_one.cosine(a)) > 1e-3
    # What was removed lies in the span, so the rest is the least-squares residual.
    basis = torch.stack([a.delta().flatten(), b.delta().flatten()], dim=1).double()
    fitted = basis @ torch.linalg.lstsq(basis, v.delta().flatten().double()[:, None]).solution
    torch.testing.assert_close(rest.delta().flatten().double(), v.delta().flatten() - fitted[:, 0], atol=1e-6, rtol=0)


def test_orthogonal_to_one_is_the_papers_formula_and_its_own_span_is_refused():
    v, a = make_direction(0), make_direction(1)
    expected = v.delta() - dot(v, a) / dot(a, a) * a.delta()
    torch.testing.assert_close(v.orthogonal_to(a).delta(), expected)
    early, late = v.restricted_to((750, 500)), a.restricted_to((250, 0))
    torch.testing.assert_close(early.orthogonal_to(late, per_step=True).delta(), early.delta())
    for others, message in (([a, 2 * v - a], "nothing is left of d0.*span of"), ([], "at least one")):
        with pytest.raises(ValueError, match=message):
            v.orthogonal_to(*others)
    with pytest.raises(TypeError, match="a list is no Direction"):
        v.orthogonal_to([a, 2 * v - a])


def test_orthogonal_to_is_idempotent_and_does_not_depend_on_order_length_or_repetition():
    v, a, b = make_direction(0), make_direction(1), make_direction(2)
    rest = v.orthogonal_to(a, b).delta()
    for other in (v.orthogonal_to(a, b).orthogonal_to(a, b), v.orthogonal_to(b, -100 * a), v.orthogonal_to(a, b, a)):
        torch.testing.assert_close(other.delta(), rest, atol=1e-6, rtol=0)


def test_orthogonal_per_step_holds_at_each_timestep_where_the_whole_one_does_not():
    v, a, b = make_direction(0), make_direction(1), make_direction(2)
    per_step = v.orthogonal_to(a, b, per_step=True)
    assert cosines_per_step(per_step, a).abs().max() < 1e-6
    assert cosines_per_step(per_step, b).abs().max() < 1e-6
    assert cosines_per_step(v.orthogonal_to(a, b), a).abs().max() > 1e-2


def test_restricted_to_includes_both_ends_and_is_zero_outside():
    d = make_direction(0)
    part = d.restricted_to((500, 250))
    assert not part.delta()[[0, 3]].any() and not part.unit[[0, 3]].any() and not part.sigma[[0, 3]].any()
    assert torch.equal(part.delta()[1:3], d.delta()[1:3])
    with pytest.raises(ValueError, match="no visited timestep lies in 250..500"):
        d.restricted_to((250, 500))


def test_resampled_takes_the_nearest_unit_and_interpolates_sigma():
    d = make_direction(0)
    for same in (d.resampled(TIMESTEPS), d.resampled(4)):
        assert same.timesteps == TIMESTEPS
        torch.testing.assert_close(same.delta(), d.delta())
    new, s = d.resampled((900, 700, 375, 100)), d.sigma
    assert torch.equal(new.unit, d.unit[[0, 0, 1, 3]])
    expected = torch.stack([s[0], 0.8 * s[0] + 0.2 * s[1], (s[1] + s[2]) / 2, 0.4 * s[2] + 0.6 * s[3]])
    torch.testing.assert_close(new.sigma, expected)
    assert d.resampled(10).timesteps == NoiseSchedule.linear().timesteps(10)


def test_resampled_keeps_a_restricted_direction_silent_outside_of_its_range():
    d = make_direction(0)
    part = d.restricted_to((500, 250)).resampled((800, 500, 400, 300, 250, 240, 0))
    acting = [False, True, True, True, True, False, False]
    assert (part.sigma > 0).tolist() == part.unit.flatten(1).any(dim=1).tolist() == acting
    torch.testing.assert_close(part.sigma[1:5], d.resampled((500, 400, 300, 250)).sigma)
    first = d.restricted_to((750, 500)).resampled((800, 400, 300, 0))
    assert (first.sigma > 0).tolist() == [True, False, False, False], "beyond the ends it goes on"


@pytest.mark.parametrize("timesteps", [range(990, -1, -10), (900, 540, 100, 0), (900, 460)])
def test_a_direction_of_one_timestep_resampled_acts_at_one_with_its_own_sigma(timesteps):
    d = make_direction(0)
    one = d.restricted_to((500, 500)).resampled(tuple(timesteps))
    acting = one.sigma.nonzero().flatten().tolist()
    assert acting == [int(np.abs(np.array(one.timesteps) - 500).argmin())]
    assert one.sigma[acting[0]] == pytest.approx(float(d.sigma[1]))
    assert torch.equal(one.unit[acting[0]], d.unit[1])


def test_cosine_of_known_angles():
    a, b = make_direction(0), make_direction(1)
    assert a.cosine(3 * a) == pytest.approx(1) and a.cosine(-a) == pytest.approx(-1)
    b = b.orthogonal_to(a)
    mixed = 3 * a + 3 * (a.sigma.norm() / b.sigma.norm()).item() * b
    assert mixed.cosine(a) == pytest.approx(0.5**0.5)


def test_calibrated_makes_one_unit_of_scale_one_sigma_of_the_population(tmp_path):
    h = np.random.default_rng(0).standard_normal((30, 4, *SHAPE)).astype(np.float32) * 5 + 100
    d = (make_direction(0) + 4 * make_direction(1)).restricted_to((500, 0))
    done = d.calibrated(make_store(tmp_path / "a.zarr", h, timesteps=TIMESTEPS, chunk=7), progress=False)
    for i, t in enumerate(TIMESTEPS[1:], start=1):
        projection = h[:, i].reshape(30, -1).astype(np.float64) @ done.unit[i].flatten().double().numpy()
        assert float(done.sigma[done.timesteps.index(t)]) == pytest.approx(projection.std(ddof=1), rel=1e-4)
    assert done.sigma[0] == 0
    assert torch.equal(done.unit, d.unit)
    other = d.calibrated(make_store(tmp_path / "b.zarr", h, timesteps=TIMESTEPS, chunk=30), progress=False)
    torch.testing.assert_close(other.sigma, done.sigma)


def test_calibrated_refuses_a_store_of_another_model_and_one_of_a_single_sample(tmp_path):
    h, other = np.ones((2, 4, *SHAPE), dtype=np.float32), {**MODEL, "hash": "ffff"}
    for name, values, model, message in (("a", h, other, "weights ffff"), ("b", h[:1], MODEL, "at least two")):
        with pytest.raises(ValueError, match=message):
            make_direction(0).calibrated(make_store(tmp_path / name, values, timesteps=TIMESTEPS, model=model))


@pytest.mark.parametrize(("first", "n", "shared"), [(0, 30, True), (0, 8, True), (29, 50, True), (30, 30, False)])
def test_calibration_warns_of_every_sample_that_the_direction_was_found_from(tmp_path, first, n, shared):
    """A store of seeds 0 to 29; one shared seed is enough, and a direction made from others is known by theirs."""
    h = np.random.default_rng(0).standard_normal((30, 4, *SHAPE)).astype(np.float32)
    store = make_store(tmp_path / "store.zarr", h, timesteps=TIMESTEPS)
    about = {**PROVENANCE, "method": "labels", "seeds": {"first": first, "n": n}}
    found = replace(make_direction(0), provenance=about)
    for direction in (found, (make_direction(1) - found).restricted_to((750, 250))):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            direction.calibrated(store, progress=False)
        assert any("spread too widely" in str(each.message) for each in said) == shared
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        random_like(found, seed=0).calibrated(store, progress=False)
        found.calibrated(store, like=found, progress=False)


def test_a_direction_of_another_model_is_refused_by_what_differs(tmp_path):
    """By `check_fits`, and by `load_direction` with a model."""
    d = make_direction(0, model={**MODEL, "network": "a"})
    path = d.save(tmp_path / "d.safetensors")
    d.check_fits(make_model(name="renamed"), TIMESTEPS)
    other_schedule = NoiseSchedule(NoiseSchedule.linear().alpha_bars ** 1.1).provenance()
    for change, message in (
        ({"hash": "ffff"}, "weights 0123456789abcdef.*weights ffff"),
        ({"tap": "before"}, r"'before'.*model.tapped\('after'\)"),
        ({"schedule": other_schedule}, "noise schedule"),
        ({"network": "b"}, "network"),
    ):
        with pytest.raises(ValueError, match=message):
            d.check_fits(make_model(**change))
        with pytest.raises(ValueError, match=message):
            load_direction(path, model=make_model(**change))
    with pytest.raises(ValueError, match="4 steps t=750..0, the run has 2 steps t=500..0.*resampled"):
        d.check_fits(make_model(), (500, 0))


def test_a_saved_direction_comes_back_whole(tmp_path):
    d = replace(make_direction(0) - make_direction(1), extras={"singular_value": 2.5})
    path = d.save(tmp_path / "sub" / "d.safetensors")
    with safe_open(path, framework="pt") as file:
        assert json.loads(file.metadata()["direction"])["provenance"] == d.provenance
    back = load_direction(path, model=make_model())
    assert torch.equal(back.unit, d.unit) and torch.equal(back.sigma, d.sigma)
    assert (back.timesteps, back.name, back.provenance, back.extras) == (d.timesteps, d.name, d.provenance, d.extras)
    assert [p.name for p in path.parent.iterdir()] == ["d.safetensors"]


def drifting(timesteps, shape, *, share: float = 0.3) -> Direction:
    """A direction that turns along the chain: one vector, and a share of another at each timestep; it rests at 500."""
    rng = np.random.default_rng(99)
    delta = torch.from_numpy(rng.standard_normal(shape) + share * rng.standard_normal((len(timesteps), *shape)))
    delta[[t == 500 for t in timesteps]] = 0.0
    return Direction.from_delta(delta, timesteps=timesteps, name="d", provenance=PROVENANCE)


@pytest.mark.parametrize(
    ("timesteps", "shape"),
    [(TIMESTEPS, (64, 8, 8)), ((750,), (64, 8, 8)), (tuple(range(900, -1, -50)), (2, 2, 2)), ((500,), SHAPE)],
    ids=["several", "one timestep", "more timesteps than dimensions", "a zero direction"],
)
def test_random_like_keeps_lengths_zeros_and_all_angles_between_timesteps(timesteps, shape):
    d = drifting(timesteps, shape)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    control = random_like(d, seed=3)
    assert torch.equal(torch_state, torch.get_rng_state())
    assert (numpy_state == np.random.get_state()[1]).all()  # noqa: NPY002
    assert torch.equal(control.sigma, d.sigma)
    own, found = d.unit.flatten(1), control.unit.flatten(1)
    torch.testing.assert_close(found @ found.T, own @ own.T, atol=1e-5, rtol=0)
    assert torch.equal(found.any(dim=1), own.any(dim=1))
    assert torch.equal(control.unit, random_like(d, seed=3).unit)
    assert torch.equal(control.unit, random_like(-d, seed=3).unit), "of the angles and the seed alone"
    assert not found.any() or control.cosine(random_like(d, seed=4)) < 0.9


def test_random_like_goes_another_way_and_every_way_alike():
    """In 4096 dimensions the cosine of random directions has a standard deviation of 1/64."""
    d = drifting(TIMESTEPS, (64, 8, 8))
    controls = [random_like(d, seed=s) for s in range(30)]
    cosines = torch.stack([cosines_per_step(each, d)[[0, 2, 3]] for each in controls])
    assert cosines.abs().max() < 5 / 64 and cosines.std() == pytest.approx(1 / 64, rel=0.3)
    assert cosines_per_step(*controls[:2])[[0, 2, 3]].abs().max() < 5 / 64
    small = torch.stack([random_like(drifting((750, 250), (1, 1, 3)), seed=s).unit.flatten(1) for s in range(600)])
    # The mean of 600 unit vectors of 3 entries is 0 to 1/sqrt(1800), and their covariance a third of the identity.
    assert small.mean(dim=0).abs().max() < 4 / 1800**0.5
    covariance = torch.einsum("sti,stj->tij", small, small) / 600
    torch.testing.assert_close(covariance, torch.eye(3).expand(2, 3, 3) / 3, atol=0.06, rtol=0)
