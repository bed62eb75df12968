"""The mixing step: every criterion finds the step of a model whose posterior is known, and says so when it can't."""

from __future__ import annotations

import importlib
import itertools
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from diffusers import DDPMScheduler
from exact import exact_model, rms, which_class
from scipy import integrate, stats
from small_models import stable_diffusion

import workbench as wb
from workbench.analysis import mixing_criteria as mixing
from workbench.analysis.mixing_criteria import (
    agreement,
    kl_to_limit,
    largest_near_best,
    log_snr,
    radius_gap,
    radius_total_variation,
    read_off,
    separability_step,
    stays,
    total_variation,
)
from workbench.analysis.spectra import linear_gaussian_inversion
from workbench.editing.mixing_search import CRITERIA, decode_from, mixing_step

ALPHA_BARS = np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000))
MU, S = 0.25, 0.2
D = 48
STEP = 25
"""Distance of the timesteps that the runs visit: "within one step" below is the resolution of the grid."""


@pytest.fixture(scope="module")
def mixture():
    """Two classes at a distance of 2 |mu| = 3.5 with a standard deviation of 0.2, in 48 dimensions."""
    return exact_model(torch.full((3, 4, 4), MU), torch.full((3, 4, 4), S))


@pytest.fixture(scope="module")
def run(mixture):
    """Stochastic samples of it, whose x_t and x_0 are distributed as in the forward process."""
    return wb.sample(mixture, range(400), steps=40, eta=1.0, record_x=True, progress=False)


@pytest.fixture(scope="module")
def classifier(mixture):
    return which_class(mixture)


@pytest.fixture(scope="module")
def labels(run, classifier):
    return (classifier(run.x0) > 0.5).astype(int).set_axis(run.seeds)


def find(*args, **options):
    return mixing_step(*args, **{"progress": False, **options})


def evidence(t: int) -> float:
    """q(t): the class of x_t is found with probability Phi(q), and the log odds of x_t are N(2 q^2, 4 q^2)."""
    a = ALPHA_BARS[t]
    return MU * (D * a / (a * S**2 + 1 - a)) ** 0.5


def crossing(curve, level: float, timesteps) -> int:
    """The largest of the timesteps at which a falling curve is at least `level`."""
    return max(t for t in timesteps if curve(t) >= level)


# The criteria on the known model


def test_separability_is_the_bayes_accuracy_and_its_step_the_last_at_the_best(run, labels):
    found = find(run, labels)
    assert found.criterion == "separability"
    bayes = np.array([stats.norm.cdf(evidence(t)) for t in run.timesteps])
    error = np.sqrt(bayes * (1 - bayes) / len(run))
    assert (np.abs(found.curve["value"] - bayes) <= 4 * error + 0.02).all()
    # The best is 1, so that the rule asks for at most one error in 400: with luck it is met as late as at 1%.
    first = crossing(lambda t: stats.norm.cdf(evidence(t)), 0.9995, run.timesteps)
    last = crossing(lambda t: stats.norm.cdf(evidence(t)), 0.99, run.timesteps)
    assert first <= found.t <= last
    assert found.interval[0] <= found.t <= found.interval[1]


def test_random_labels_are_separable_by_chance_alone(run):
    shuffled = np.random.default_rng(5).integers(0, 2, len(run))
    found = find(run, shuffled, criterion="separability")
    error = 0.5 / np.sqrt(len(run))
    assert np.abs(found.curve["value"] - 0.5).max() < 4 * error
    assert np.abs(found.curve["value"].mean() - 0.5) < 2 * error


def test_commitment_is_that_of_the_exact_posterior(run, classifier):
    copies = 8
    found = find(run, criterion="commit", classifier=classifier, n=75, copies=copies, grid=run.timesteps[::2])
    larger = np.maximum(np.arange(copies + 1), copies - np.arange(copies + 1)) / copies

    def committed(t: int) -> float:
        """E[max(B, K - B)] / K, B binomial with the posterior probability, scaled by its value at 1/2 and 1."""
        q = evidence(t)

        def at(z: float) -> float:
            p = 1 / (1 + np.exp(-(2 * q**2 + 2 * q * z)))
            return stats.norm.pdf(z) * (stats.binom.pmf(np.arange(copies + 1), copies, p) @ larger)

        chance = stats.binom.pmf(np.arange(copies + 1), copies, 0.5) @ larger
        return (integrate.quad(at, -6, 6)[0] - chance) / (1 - chance)

    expected = np.array([committed(t) for t in found.curve.index])
    assert np.abs(found.curve["value"] - expected).max() < 0.12
    assert abs(found.t - crossing(committed, 0.5, found.curve.index)) <= 2 * STEP
    assert found.reached and found.threshold == 0.5 and found.n == 75


def test_the_prediction_error_is_that_of_the_exact_posterior():
    """One Gaussian: |P_t - x_0| is s sqrt((1 - a) / (a s^2 + 1 - a)) a value, and two images are sqrt(2) s apart."""
    s = 0.3
    model = exact_model(torch.zeros(3, 8, 8), torch.full((3, 8, 8), s))
    run = wb.sample(model, range(64), steps=200, eta=1.0, record_x=True, progress=False)
    found = find(run, criterion="perceptual", distance=rms, grid=run.timesteps[::4])
    noise = 1 - ALPHA_BARS[found.curve.index]
    expected = np.sqrt(noise / (ALPHA_BARS[found.curve.index] * s**2 + noise) / 2)
    # Nearer to the image, where a step of 5 halves the noise, samples are not quite those of the posterior.
    assert np.abs(found.curve["value"] - expected)[found.curve.index >= 80].max() < 0.03
    rising = found.curve.index[expected >= 0.5]
    assert abs(found.t - rising.min()) <= 20


def test_an_edit_succeeds_as_long_as_decoding_keeps_the_rest(mixture, run, labels, classifier):
    """The oracle moves x_t in the same way, and draws x_0 from the exact posterior in place of sampling."""
    mu = mixture.unet.mu / mixture.unet.mu.norm()

    def other_than_class(a, b):
        difference = a - b
        return rms(difference - (difference * mu).sum((1, 2, 3), keepdim=True) * mu, torch.zeros(()))

    options = {"criterion": "edit", "classifier": classifier, "distance": other_than_class, "n": 300}
    found = find(run, labels, **options, strengths=(0, 1, 2), grid=run.timesteps[::2], level=0.7)
    tested, has = run[200:300], torch.from_numpy(labels["plus"].to_numpy()[200:300] == 1)
    unit = other_than_class(run.x0[:300], run.x0[:300].roll(1, dims=0)).mean()
    away = (1 - 2 * has.float()).view(-1, 1, 1, 1)
    expected = {}
    for t in found.curve.index:
        moved = tested.x_at(t) + 2 * away * 2 * ALPHA_BARS[t] ** 0.5 * mixture.unet.mu
        x0 = mixture.unet.draw_x0(moved, t, torch.Generator().manual_seed(t))
        success = ((classifier(x0)["plus"].to_numpy() > 0.5) != has.numpy()).mean()
        expected[t] = success if other_than_class(x0, tested.x0).mean() / unit <= 0.7 else 0.0
    right = [t for t, success in expected.items() if success >= max(expected.values()) - 0.05]
    assert found.reached and found.curve["value"].max() > 0.95
    assert abs(found.t - max(right)) <= 2 * STEP
    loss = found.curve["loss at strength 0"]
    assert loss.iloc[-1] < 0.2 and loss.iloc[0] == pytest.approx(1, abs=0.05)


def test_the_radius_gap_is_that_of_the_linear_gaussian_model():
    """Sampled and inverted by few steps: both recursions are known, and so is where they part."""
    variance = torch.linspace(0.005, 0.05, 192).view(3, 8, 8)
    model = exact_model(torch.zeros(3, 8, 8), variance.sqrt())
    run = wb.sample(model, range(150), steps=40, eta=0.0, record_x=True, progress=False)
    found = find(run, level=0.05)
    assert found.criterion == "radius_gap"

    sampled, s2 = {}, variance.flatten().numpy()
    v = np.ones_like(s2)
    for t, t_prev in model.schedule.pairs(40):
        sampled[t] = v
        a, b = model.schedule.alpha_bar(t), model.schedule.alpha_bar(t_prev)
        scale = (b / a) ** 0.5
        v = v * (scale + ((1 - b) ** 0.5 - scale * (1 - a) ** 0.5) * (1 - a) ** 0.5 / (a * s2 + 1 - a)) ** 2
    # eps knows the true variances s2, while few steps of sampling end with others, v: what is known are the gains.
    spectrum = pd.DataFrame({"power": s2, "weight": 1.0})
    gains = linear_gaussian_inversion(spectrum, ALPHA_BARS, run.timesteps, start="clean") / s2
    radii = np.sqrt(gains @ v / len(v))
    expected = {t: abs(np.sqrt(sampled[t].mean()) - radii[t]) for t in run.timesteps}
    measured = found.curve["value"]
    assert max(abs(measured[t] - expected[t]) for t in run.timesteps) < 0.01
    below = [t for t in run.timesteps if all(expected[u] <= 0.05 for u in run.timesteps if u <= t)]
    assert abs(found.t - max(below)) <= STEP
    assert (found.curve["inverted"] < found.curve["sampled"] + 1e-3).all()


def test_total_variation_is_that_of_the_known_marginals(run, labels):
    """Along mu a mixture of two Gaussians, along every other direction one: the mean over the statistics is known."""
    found = find(run, labels, criterion="tv", n=400, resamples=10)
    z = np.linspace(-8, 8, 4001)

    def expected(t: int) -> tuple[float, float]:
        a = ALPHA_BARS[t]
        v, m = a * S**2 + 1 - a, (a * D) ** 0.5 * MU
        along = sum(stats.norm.pdf(z, sign * m, v**0.5) for sign in (1, -1)) / 2
        return tuple(
            0.5 * np.trapezoid(np.abs(p - stats.norm.pdf(z)), z) for p in (along, stats.norm.pdf(z, 0, v**0.5))
        )

    for t in (800, 600, 400, 300):
        along, across = expected(t)
        # Random directions in 48 dimensions share a little of mu, the radius is one statistic of 64.
        assert across - 0.03 <= found.curve.loc[t, "value"] <= 0.05 + across + (along - across) * 0.1
    assert found.reached and found.curve.loc[found.t, "value"] <= 0.25
    earlier = [t for t in run.timesteps if t < found.t]
    assert found.curve.loc[max(earlier), "value"] > 0.25


# Ensembles that are alike


def test_identical_ensembles_have_no_gap(run):
    gap = radius_gap(run.x, run.x, ALPHA_BARS)
    assert (gap.curve["value"] == 0).all() and gap.t == run.timesteps[0] and gap.reached


def test_samples_of_the_limit_have_no_total_variation_to_it():
    rng = np.random.default_rng(3)
    noise = {t: rng.standard_normal((200, 30)) for t in (900, 600, 300)}
    found = total_variation(noise, ALPHA_BARS, x0=rng.standard_normal((200, 30)), resamples=10)
    assert found.curve["value"].max() < 0.02 and found.t == 300


def test_the_interval_of_separability_allows_for_probes_that_learn_from_the_same_samples():
    rng = np.random.default_rng(0)
    y = np.arange(60) % 2
    x = {t: rng.standard_normal((60, 20)) + y[:, None] * step for t, step in ((900, 0.2), (300, 0.5))}
    found = separability_step(x, y, ALPHA_BARS, resamples=400)
    width = (found.curve["high"] - found.curve["low"]).to_numpy()
    independent = 2 * 1.96 * np.sqrt(found.curve["value"] * (1 - found.curve["value"]) / 60)
    assert (width > 1.15 * independent).all()


# Reading a timestep off a curve


@pytest.mark.parametrize(
    ("rule", "curve", "i", "reached"),
    [
        (stays(0.5), [0.9, 0.6, 0.4, 0.2], 2, True),
        (stays(0.5), [0.3, 0.6, 0.4, 0.2], 2, True),
        (stays(0.5), [0.4, 0.3, 0.2, 0.7], 2, False),
        (stays(0.5, from_noise=True), [0.1, 0.3, 0.6, 0.4], 1, True),
        (stays(0.5, from_noise=True), [0.9, 0.8, 0.6, 0.7], 2, False),
        (stays(0.5, above=True), [0.1, 0.4, 0.6, 0.9], 2, True),
        (stays(0.5, above=True, from_noise=True), [0.9, 0.6, 0.4, 0.6], 1, True),
        (largest_near_best(0.1), [0.2, 0.85, 0.9, 0.8], 1, True),
        (largest_near_best(0.1), [0.0, 0.0, 0.05, 0.0], 0, False),
        (largest_near_best(0.1, chance=0.5), [0.55, 0.5, 0.55, 0.5], 0, False),
    ],
)
def test_the_rules_pick_the_timestep_that_they_name(rule, curve, i, reached):
    found = rule(np.array(curve))
    assert (found[0], found[2]) == (i, reached)


def test_the_interval_of_t_covers_the_crossing_of_noisy_curves():
    """Samples scatter around a line that crosses 0.5 at t = 500; 95% intervals of 60 ensembles."""
    timesteps = np.arange(950, -1, -50)
    rng = np.random.default_rng(0)
    covered, options = [], {"alpha_bars": ALPHA_BARS, "criterion": "line", "quantity": "value", "resamples": 100}
    for _ in range(60):
        values = timesteps[:, None] / 1000 + 0.3 * rng.standard_normal((1, 40)) + 0.1 * rng.standard_normal((20, 40))
        found = read_off(timesteps, values, stays(0.5), **options)
        covered.append(found.interval[0] - 25 <= 500 <= found.interval[1] + 25)
        assert found.interval[0] <= found.t <= found.interval[1]
    assert 0.85 <= np.mean(covered) <= 1


def test_a_threshold_that_is_never_met_is_said_to_be(run):
    assert "not reached" not in repr(find(run, criterion="perceptual", distance=rms, n=16))
    never = find(run, criterion="perceptual", distance=rms, level=5.0, n=16)
    assert not never.reached and "not reached" in repr(never)


# Schedules and tables


def test_the_table_says_which_criteria_agree(run, labels, classifier):
    steps = [
        find(run, labels, criterion=c, classifier=classifier, n=60, resamples=20) for c in ("separability", "commit")
    ]
    steps.append(find(run, criterion="perceptual", distance=rms, resamples=20))
    table = agreement(steps)
    assert list(table.index) == ["separability", "commit", "perceptual"]
    for a, b in itertools.combinations(steps, 2):
        overlap = max(a.interval[0], b.interval[0]) <= min(a.interval[1], b.interval[1])
        assert (b.criterion in table.loc[a.criterion, "agrees_with"]) == overlap
    assert table["log_snr"].tolist() == [log_snr(ALPHA_BARS)[s.t] for s in steps]
    assert steps[0].on_schedule(ALPHA_BARS) == steps[0].t
    cosine = np.cos((np.arange(1, 401) / 400 + 0.008) / 1.008 * np.pi / 2).clip(1e-4) ** 2
    for step in steps:
        other = step.on_schedule(cosine)
        gap = np.abs(log_snr(cosine)[other] - step.log_snr)
        assert gap <= np.abs(np.diff(log_snr(cosine)))[other - 1 : other + 1].max()


def test_total_variation_of_radii_and_divergence_from_the_limit_are_those_of_the_notes():
    for size, steps in {
        256: {500: 1.0, 600: 0.99, 700: 0.54, 750: 0.28, 800: 0.13, 900: 0.03},
        64: {500: 0.95, 600: 0.52, 650: 0.29, 700: 0.15},
        32: {500: 0.72, 600: 0.28, 650: 0.15},
    }.items():
        for t, value in steps.items():
            assert radius_total_variation(ALPHA_BARS[t], d=3 * size**2) == pytest.approx(value, abs=0.01)
    for t, value in {500: 2.6e3, 700: 205, 800: 44.6, 900: 8, 999: 1.2}.items():
        assert kl_to_limit(ALPHA_BARS[t], mean_square=0.3, d=3 * 256**2) == pytest.approx(value, rel=0.02)


# Sources


def test_a_store_is_read_as_its_run_and_one_of_other_weights_is_refused(tiny, make_unet, cache):
    store = wb.extract(tiny, 12, steps=4, dtype="float32", record_x=True, progress=False)
    bare = wb.extract(tiny, 12, steps=4, progress=False)
    run = wb.sample(tiny, range(12), steps=4, record_x=True, record_h=True, progress=False)
    curves = [find(source, model=tiny, resamples=5).curve for source in (store, bare, run)]
    for curve in curves[1:]:
        pd.testing.assert_frame_equal(curve, curves[0], atol=1e-3)
    probes = [find(source, np.arange(12) % 2, model=tiny, resamples=5).curve["value"] for source in (store, run)]
    pd.testing.assert_series_equal(*probes)
    other = wb.wrap(make_unet(seed=9), tiny.schedule, name="other", device="cpu")
    for options, words in (({"model": other}, ".tiny.*.other."), ({}, "'tiny' is not here; give it with model=")):
        with pytest.raises(ValueError, match=words):
            find(store, **options)


def test_a_store_of_a_latent_model_is_read_as_its_run(tmp_path):
    """Its images are decoded, and encode to other latents."""
    stable_diffusion(tmp_path)
    model = wb.load_model(tmp_path / "model", device="cpu", prompt="a cafe")
    options = {"steps": 4, "record_x": True, "progress": False}
    store, run = wb.extract(model, 12, out=tmp_path / "a.zarr", **options), wb.sample(model, range(12), **options)
    curves = [find(source, model=model, resamples=5).curve for source in (store, run)]
    pd.testing.assert_frame_equal(*curves, atol=1e-3)


def test_real_images_are_compared_with_deterministic_samples(tiny):
    images = torch.rand(8, *tiny.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    inverted = wb.invert(tiny, images, steps=4, record_x=True, progress=False)
    sampled = wb.sample(tiny, range(8), steps=4, eta=0.0, record_x=True, progress=False)
    by_itself, given = find(inverted, resamples=5), find(sampled, against=inverted, resamples=5)
    pd.testing.assert_frame_equal(by_itself.curve, given.curve)


@pytest.mark.parametrize("n", [4, 31, 62, 63, 85, 170, 171, 183])
def test_total_variation_takes_any_number_of_samples(n):
    """Also where the halves of an odd number would have other bins; and of a uniform law it is 0 on average."""
    found = mixing._tv_uniform(np.random.default_rng(n).random((n, 400)))
    assert abs(found.mean()) < 4 * found.std() / 20


def test_decoding_with_the_samples_own_noise_gives_the_samples(tiny):
    run = wb.sample(tiny, [3, 5, 8], steps=6, eta=1.0, record_x=True, progress=False)
    t = run.timesteps[2]
    again, other = (decode_from(run, run.x_at(t), t, seeds=seeds, progress=False) for seeds in (run.seeds, [1, 1, 2]))
    torch.testing.assert_close(again, run.x0, atol=1e-5, rtol=1e-5)
    assert (other - run.x0).abs().max() > 1e-3


def test_an_edit_without_a_move_has_no_success(tiny):
    """New step noise after x_t alone gives some images another label; that is no edit."""
    run = wb.sample(tiny, range(96), steps=6, eta=1.0, record_x=True, progress=False)
    middle = run.x0.clamp(-1, 1).mean(dim=(1, 2, 3)).median()

    def bright(images):
        return (1e3 * (torch.as_tensor(images) - middle).mean(dim=(1, 2, 3))).sigmoid()[:, None]

    classifier = wb.load_classifier(bright, attributes=["Bright"])
    labels = (classifier(run.x0.clamp(-1, 1), progress=False) > 0.5).astype(int)
    options = {"classifier": classifier, "distance": lambda a, b: (a - b).flatten(1).norm(dim=1).numpy(), "level": 1e9}
    still, moved = (
        find(run, labels, criterion="edit", strengths=(0.0, strength), resamples=5, **options)
        for strength in (1e-6, 4.0)
    )
    assert (still.curve["success at strength 0"] == 0).all() and still.curve["value"].abs().max() < 0.2
    assert moved.curve["value"].max() > still.curve["value"].max() + 0.2


# Bad input


def test_what_is_missing_is_said(tiny, run, labels, classifier, make_unet):
    edit = dict(criterion="edit", classifier=classifier, distance=rms)
    for table, options, words in (
        (None, dict(criterion="mixing"), "one of radius_gap, tv, separability, commit, perceptual, edit"),
        (None, dict(criterion="separability"), "needs labels"),
        (None, dict(criterion="edit", classifier=classifier), "needs labels"),
        (None, dict(criterion="commit"), "needs classifier="),
        (None, dict(criterion="perceptual"), "needs classifier="),
        (None, dict(criterion="perceptual", distance="miles"), "'miles'"),
        (None, dict(criterion="perceptual", distance=rms, grid=[333]), "timestep 333 .*nearest 350 or 325"),
        (None, dict(criterion="commit", classifier=classifier, copies=1), "2 decodings"),
        (None, dict(n=3), "3 samples are too few"),
        (None, dict(against=run), "of one kind"),
        (labels.assign(plus=1), {}, "all labels 'plus' are 1"),
        (labels.rename(columns={"plus": "minus"}), edit, "does not judge 'minus'"),
        (labels * 2, edit, "'plus' has 2"),
        ([0, 1, 1], {}, "do not match the 400 samples"),
        (labels, {**edit, "strengths": (1, 2)}, "strengths are"),
    ):
        with pytest.raises(ValueError, match=words):
            find(run, *([] if table is None else [table]), **options)
    unknown = wb.invert(tiny, torch.zeros(4, *tiny.image_shape), steps=2, progress=False)
    with pytest.raises(ValueError, match="record_x=True"):
        find(unknown)
    halfway = wb.invert(tiny, torch.zeros(4, *tiny.image_shape), steps=[500, 250, 0], record_x=True, progress=False)
    with pytest.raises(ValueError, match="ends at t = 500, where samples are not"):
        find(halfway)
    whole = wb.invert(tiny, torch.zeros(4, *tiny.image_shape), steps=[999, 500, 0], record_x=True, progress=False)
    other = wb.wrap(make_unet(seed=7), DDPMScheduler(), name="other", device="cpu")
    with pytest.raises(ValueError, match="against.*other"):
        find(whole, against=wb.sample(other, range(4), steps=[999, 500, 0], eta=0.0, record_x=True, progress=False))


def test_a_curve_needs_two_timesteps_and_finite_values(mixture):
    single, ones = wb.sample(mixture, range(8), steps=1, record_x=True, progress=False), np.ones((6, 4))
    noise = np.random.default_rng(0).standard_normal((6, 4))
    for words, call in (
        ("1 timestep given", lambda: find(single)),
        (
            "sample 0 at timestep 500 has NaN",
            lambda: separability_step({900: noise, 500: ones * np.nan}, np.arange(6) % 2, ALPHA_BARS, folds=2),
        ),
        ("different timesteps", lambda: radius_gap({900: ones, 500: ones}, {900: ones, 400: ones}, ALPHA_BARS)),
    ):
        with pytest.raises(ValueError, match=words):
            call()


@pytest.mark.parametrize("criterion", CRITERIA)
def test_the_same_seed_gives_the_same_step(run, labels, classifier, criterion):
    options = dict(criterion=criterion, classifier=classifier, distance=rms, n=30, resamples=10, copies=2)
    a, b = (find(run, labels, **options, grid=run.timesteps[::8]) for _ in range(2))
    pd.testing.assert_frame_equal(a.curve, b.curve)
    assert (a.t, a.interval) == (b.t, b.interval)


def test_lpips_is_used_as_it_is_with_its_own_threshold_and_asked_for_where_it_is_missing(run, monkeypatch):
    class Module:
        @staticmethod
        def LPIPS(net, verbose):
            return lambda a, b: (a - b).square().flatten(1).mean(1).sqrt().view(-1, 1, 1, 1)

    monkeypatch.setattr(importlib, "import_module", lambda name: Module)
    found = find(run, criterion="perceptual", distance="lpips")
    unit = rms(run.x0[:64], run.x0[:64].roll(1, dims=0)).mean()
    scaled = find(run, criterion="perceptual", distance=rms, level=0.33 / unit)
    assert found.threshold == 0.33 and found.t == scaled.t
    np.testing.assert_allclose(found.curve["value"], scaled.curve["value"] * unit, rtol=1e-5)
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ValueError, match='"lpips" needs the package lpips'):
        find(run, criterion="perceptual", distance="lpips")
