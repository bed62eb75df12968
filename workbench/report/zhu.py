"""What Zhu et al. 2023 (arXiv 2302.08357, BoundaryDiffusion) show or claim, E1 to E21.

The numbers are those of `editing.experiments`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from workbench.analysis import dynamics
from workbench.analysis.intervals import Estimate as Number
from workbench.analysis.intervals import difference_of, mean_of
from workbench.analysis.metrics import monotonicity
from workbench.benchmark import leaderboard
from workbench.benchmark.run import SIZES, Protocol, run_benchmark
from workbench.datasets import avataaars
from workbench.diffusion.images import picture_to_tensor
from workbench.diffusion.noise import FORWARD, normal
from workbench.diffusion.sampling import invert
from workbench.directions.boundary import fit_boundary
from workbench.editing import experiments
from workbench.editing.cross import cross_boundary
from workbench.editing.mixing_search import mixing_step
from workbench.hspace.extract import extract
from workbench.report import plots
from workbench.report.recipes import SHOWN, T_AXIS, Drawn, Setup, curves, recipe, words

STRENGTH = 4.0
"""Standard deviations that x or h are moved by, where one strength is shown."""


@recipe("zhu-e1", "Zhu E1", "radius of sampled, inverted and forward-diffused latents against t", minutes=0.3)
def radii(setup: Setup) -> Drawn:
    """Mean length of x_t by its source, relative to sqrt(d), and r(t)."""
    d, schedule = int(np.prod(setup.model.image_shape)), setup.model.schedule
    square, rows = float((setup.inverted.images[:] ** 2).mean()), []
    ends = {}
    for t in setup.timesteps:
        r = dynamics.marginal_radius(schedule.alpha_bar(t), mean_square=square, d=d)
        for name, x in _ensembles(setup, t).items():
            length = np.linalg.norm(x, axis=1) / r
            ends.setdefault(name, length)
            rows.append({"ensemble": name, "t": t, **vars(mean_of(length))})
    table = pd.DataFrame(rows)
    return Drawn(
        curves(table, "ensemble", "t", T_AXIS, "radius / r(t)", reverse_x=True),
        table,
        f"{setup.n} latents each, inversion in {setup.steps} steps; 95% intervals.",
        {"inverted": mean_of(ends["inverted"]), "sampled": mean_of(ends["sampled"])},
    )


@recipe("zhu-e2", "Zhu E2", "radius of inverted images against the number of inversion steps", minutes=1)
def radius_and_steps(setup: Setup) -> Drawn:
    """DDIM inversion, with the noise repaired, with fixed-point steps, and what a Gaussian model predicts."""
    x0, schedule, top = setup.images[-min(8, setup.measured) :], setup.model.schedule, setup.timesteps[0]
    d = x0[0].numel()
    spectrum = dynamics.data_spectrum(setup.inverted.images[:])
    r = dynamics.marginal_radius(schedule.alpha_bar(top), mean_square=float((x0**2).mean()), d=d)
    ways = {
        "DDIM": {},
        "noise-repaired": {"noise_repair": True},
        "fixed-point": {"method": "fixed-point", "iterations": 2},
    }
    rows, ratios = [], {}
    for count in (10, 20, 40):
        visited = np.linspace(top, 0, count).round().astype(int).tolist()
        for name, way in ways.items():
            run = invert(setup.model, x0, steps=visited, seed=setup.seed, progress=False, **way)
            ratios[name, count] = run.x_T.flatten(1).norm(dim=1).numpy() / r
            rows.append({"inversion": name, "steps": count, **vars(mean_of(ratios[name, count]))})
        exact = dynamics.linear_gaussian_inversion(spectrum, schedule.alpha_bars, visited, start="clean").ratio
        known = {"value": exact, "low": exact, "high": exact, "n": setup.n}
        rows.append({"inversion": "Gaussian model", "steps": count, **known})
    table = pd.DataFrame(rows)
    return Drawn(
        curves(table, "inversion", "steps", "inversion steps", f"radius of x_T / r(t), t = {top}"),
        table,
        f"{len(x0)} images, 95% intervals.",
        {
            "in_40_steps": mean_of(ratios["DDIM", 40]),
            "gain_of_steps": mean_of(ratios["DDIM", 40] - ratios["DDIM", 10]),
        },
    )


@recipe("zhu-e3", "Zhu E3", "distances and angles between latents, against N(0, I)", minutes=0.2)
def angles(setup: Setup) -> Drawn:
    """Pairwise distance, angle at the origin and at a corner, and the centroid, at the noisiest timestep."""
    rows = ["distance", "angle", "vertex_angle", "centroid"]
    ensembles = _ensembles(setup, setup.timesteps[0])
    found = {name: dynamics.latent_statistics(x, tests=8) for name, x in ensembles.items()}
    table = pd.DataFrame({name: one.table()["value"] for name, one in found.items()}).loc[rows]
    d = int(np.prod(setup.model.image_shape))
    table["N(0, I)"] = pd.Series(dynamics.gaussian_reference(setup.n, d))
    relative = table.div(table["N(0, I)"], axis=0)
    gaps = []
    for order in np.random.default_rng(setup.seed).permuted(np.tile(np.arange(setup.n), (200, 1)), axis=1):
        # Halves spread as much around the whole as wholes around the truth.
        half = ensembles["inverted"][order[: setup.n // 2]]
        scaled = half / np.linalg.norm(half, axis=1, keepdims=True)
        # Mean cosine of pairs, from the length of the mean.
        m = len(scaled)
        gaps.append((np.linalg.norm(scaled.sum(axis=0)) ** 2 - m) / (m * (m - 1)))
    low, high = np.quantile(gaps, (0.025, 0.975))
    return Drawn(
        plots.bars({name: relative[name] for name in relative}, ylabel="relative to N(0, I)"),
        table.reset_index(names="statistic"),
        f"t = {setup.timesteps[0]}, {setup.n} latents each.",
        {"cosine_of_inverted": Number(float(np.mean(gaps)), float(low), float(high), setup.n)},
    )


@recipe("zhu-e4", "Zhu E4", "the mixing step by several criteria", minutes=2)
def mixing(setup: Setup) -> Drawn:
    """Curves and steps of the criteria that the population allows."""
    labels = setup.scores.gt(0.5).astype(int)[[setup.attribute, setup.other]]
    some = [t for t in setup.timesteps if 50 <= t <= 850][:: max(1, setup.steps // 8)]
    options = {"model": setup.model, "classifier": setup.judge, "grid": some, "seed": setup.seed, "progress": False}
    plan = {
        "radius_gap": (setup.inverted, None, {"against": setup.still}),
        "tv": (setup.store, labels, {"against": setup.inverted}),
        "separability": (setup.store, labels, {}),
        "commit": (setup.store, labels, {"n": 8, "copies": 6}),
        "perceptual": (setup.store, labels, {"n": 48}),
    }
    found = [
        mixing_step(source, named, criterion=criterion, **{**options, **extra})
        for criterion, (source, named, extra) in plan.items()
    ]
    table = pd.DataFrame(
        [
            {"criterion": s.criterion, "t": s.t, "low": s.interval[0], "high": s.interval[1], "reached": s.reached}
            for s in found
        ]
    )
    commit = found[3]
    return Drawn(
        plots.mixing_steps(found),
        table,
        f"{setup.n} samples and images, {setup.steps} steps.",
        {"commit": Number(float(commit.t), float(commit.interval[0]), float(commit.interval[1]), commit.n)},
    )


@recipe("zhu-e5", "Zhu E5", "held-out accuracy of boundaries in x and h against t, with controls", minutes=0.5)
def accuracy(setup: Setup) -> Drawn:
    """Inverted images, beside forward-diffused ones, clean pixels and shuffled labels."""
    some = setup.timesteps[:: max(1, setup.steps // 10)]
    some = tuple(sorted({*some, setup.at}, reverse=True))
    table = experiments.accuracy_over_time(
        setup.model, setup.inverted, setup.truth[setup.attribute], timesteps=some, balance=True, seed=setup.seed
    )
    drawn = table[table["t"] >= 0].rename(columns={"accuracy": "value"})
    here = table[table["t"] == setup.at].set_index("samples")
    held = {name: _number(row, "accuracy") for name, row in here.iterrows()}
    return Drawn(
        curves(drawn, "samples", "t", T_AXIS, "held-out accuracy", reverse_x=True),
        table,
        f"{setup.attribute}, {setup.n} images, 5 folds; 95% Wilson intervals.",
        {
            "x_above_chance": difference_of(held["x"], held["random labels"]),
            "x_above_forward": difference_of(held["x"], held["forward-diffused"]),
            "h_above_x": difference_of(held["h"], held["x"]),
        },
    )


@recipe("zhu-e6", "Zhu E6", "how many images a boundary needs", minutes=0.3)
def images_needed(setup: Setup) -> Drawn:
    """Accuracy on a held-out half against the number of images, by method."""
    table = experiments.accuracy_over_samples(
        setup.inverted, setup.truth[setup.attribute], t=setup.at, counts=(10, 20, 40, 80), seed=setup.seed
    )
    each = table.groupby(["method", "count"])["accuracy"]
    drawn = each.agg(value="mean", low="min", high="max", n="size").reset_index()
    last = table[(table["method"] == "svm") & (table["count"] == table["count"].max())]
    best = last.iloc[0]
    return Drawn(
        curves(drawn, "method", "count", "images", "accuracy on the held-out half"),
        table,
        f"{setup.attribute} in x at t = {setup.at}; mean and range of 3 draws.",
        {"accuracy": _number(best, "accuracy")},
    )


@recipe("zhu-e7", "Zhu E7", "real images edited by one crossing", minutes=0.2)
def real_edits(setup: Setup) -> Drawn:
    """Inverted images without the attribute, moved to both sides in x and h."""
    b = setup.boundaries
    sweep = [-STRENGTH, 0.0, STRENGTH, 2 * STRENGTH]
    grid = cross_boundary(setup.model, setup.without, b["h"], b["x"], distances=sweep, seed=setup.seed, progress=False)
    scores = np.stack([setup.judge(x)[setup.attribute] for x in grid.images.unbind(1)], axis=1)
    rows = [{"distance": s, **vars(mean_of(scores[:, i]))} for i, s in enumerate(sweep)]
    shown = torch.cat([setup.without.x0[:SHOWN, None], grid.images[:SHOWN]], dim=1).clamp(-1, 1)
    return Drawn(
        plots.image_grid(shown, column_labels=["image", *(f"{s:+g} sd" for s in sweep)]),
        pd.DataFrame(rows),
        f"{setup.attribute} at t = {setup.at}, eta 1; {len(scores)} images measured, {SHOWN} shown.",
        {"effect": mean_of(scores[:, -1] - scores[:, 0])},
    )


@recipe("zhu-e8", "Zhu E8", "degree of an attribute against the distance", minutes=0.4)
def degrees(setup: Setup) -> Drawn:
    """The judge's score over nine distances, and its rank correlation."""
    b, sweep = setup.boundaries, np.linspace(-2 * STRENGTH, 2 * STRENGTH, 9)
    grid = cross_boundary(setup.model, setup.without, b["h"], b["x"], distances=sweep, seed=setup.seed, progress=False)
    scores = np.stack([setup.judge(x)[setup.attribute] for x in grid.images.unbind(1)], axis=1)
    table = pd.DataFrame([{"distance": s, **vars(mean_of(scores[:, i]))} for i, s in enumerate(sweep)])
    figure = plots.line(
        sweep, table["value"].to_numpy(), low=table["low"].to_numpy(), high=table["high"].to_numpy(),
        xlabel="distance (sd)", ylabel=f"score of {words(setup.attribute)}",
    )  # fmt: skip
    caption = f"x and h moved at t = {setup.at}; {len(scores)} images, 95% interval."
    return Drawn(figure, table, caption, {"rank_correlation": mean_of(monotonicity(scores, sweep))})


@recipe("zhu-e9", "Zhu E9", "where to move: x, h or both", minutes=1)
def where(setup: Setup) -> Drawn:
    """Success and preservation of moves in x, in h (once or at every step) and in both, beside random normals."""
    return _crossed(
        setup,
        experiments.spaces(setup.boundaries["h"], setup.boundaries["x"], control=setup.seed),
        claims={
            "x_above_h": ("x", "h, first step"),
            "x_above_random": ("x", "random"),
            "both_above_x": ("both", "x"),
        },
    )


@recipe("zhu-e10", "Zhu E10", "at which timestep to move", minutes=1)
def when(setup: Setup) -> Drawn:
    """The same move, in standard deviations, with boundaries fitted and crossed at each timestep."""
    some = [t for t in setup.timesteps if 100 <= t <= 900][:: max(1, setup.steps // 8)]
    some = sorted({*some, setup.at, min(t for t in setup.timesteps if t >= 100)}, reverse=True)
    table = experiments.compare_timesteps(
        setup.model, setup.inverted, setup.truth[setup.attribute], runs=setup.without, timesteps=some,
        classifier=setup.judge, distances=[STRENGTH], seed=setup.seed, progress=False,
    )  # fmt: skip
    drawn = table.rename(columns={"change": "value"})
    found = drawn[drawn["variant"] == "found"].set_index("t")
    ends = {t: _number(found.loc[t], "value") for t in some}
    return Drawn(
        curves(drawn, "variant", "t", T_AXIS, f"change of {words(setup.attribute)}", reverse_x=True),
        table,
        f"x moved to {STRENGTH:g} sd, eta 1 from there; {len(setup.without)} images, 95% intervals.",
        {"middle_above_late": difference_of(ends[setup.at], ends[some[-1]])},
    )


@recipe("zhu-e11", "Zhu E11", "eta after the move", minutes=0.6)
def noise_after(setup: Setup) -> Drawn:
    """The same move decoded with eta 0, 0.3 and 1."""
    variants = experiments.etas(setup.boundaries["h"], setup.boundaries["x"])
    claims = {"eta_1_above_0": ("eta 1", "eta 0")}
    return _crossed(setup, variants, claims=claims, real=_positives(setup), kept="psnr_image")


@recipe("zhu-e12", "Zhu E12", "the distance effect: straight moves, great circles and random normals", minutes=1)
def distance_effect(setup: Setup) -> Drawn:
    """Kernel distance to real images with the attribute against the distance."""
    sizes = [STRENGTH / 2, STRENGTH, 2 * STRENGTH]
    measured = experiments.measure_crossings(
        setup.model, setup.without, experiments.norms(None, setup.boundaries["x"], control=setup.seed),
        classifier=setup.judge, distances=sizes, real=_positives(setup), seed=setup.seed, progress=False,
    )  # fmt: skip
    table = measured.summary(setup.attribute)
    wide = measured.quality.pivot(index="distance", columns="variant", values="kid")
    figure = plots.line(
        wide.index, {name: wide[name] for name in wide}, xlabel="distance (sd)", ylabel="KID of the judge's features"
    )
    kept = measured.preservation.set_index(["variant", "distance"])["psnr"]
    gap = kept["great circle", sizes[-1]].to_numpy() - kept["straight", sizes[-1]].to_numpy()
    caption = f"x moved at t = {setup.at}; {len(setup.without)} edits."
    return Drawn(figure, table, caption, {"circle_keeps_more": mean_of(gap)})


@recipe("zhu-e13", "Zhu E13", "generation with and without an attribute from the same noise", minutes=0.5)
def control(setup: Setup) -> Drawn:
    """Share of generated images with the attribute, to either side of the boundary."""
    seeds = range(setup.seed + 2 * 10**6, setup.seed + 2 * 10**6 + 2 * setup.measured)
    table = experiments.control_both_signs(
        setup.model, seeds, setup.boundaries["h"], setup.boundaries["x"], classifier=setup.judge,
        attribute=setup.attribute, steps=setup.timesteps, distance=2 * STRENGTH, progress=False,
    )  # fmt: skip
    rows = table.set_index("sign")
    shares = {sign: _number(rows.loc[sign], "share") for sign in (-1, 1)}
    values = rows["share"].rename({-1: "without", 0: "no move", 1: "with"})
    figure = plots.bars(
        {setup.attribute: values},
        low={setup.attribute: rows["low"].set_axis(values.index)},
        high={setup.attribute: rows["high"].set_axis(values.index)},
        ylabel="share with the attribute",
    )
    caption = f"{2 * STRENGTH:g} sd to either side, {len(seeds)} samples, 95% Wilson intervals."
    return Drawn(figure, table, caption, {"with_less_without": difference_of(shares[1], shares[-1])})


@recipe("zhu-e14", "Zhu E14", "a boundary from another source of images: rendered against generated", minutes=0.5)
def other_source(setup: Setup) -> Drawn:
    """Boundaries from inverted drawings and from the model's own samples, both crossed by inverted images."""
    labels = setup.scores[setup.attribute].gt(0.5).astype(int)
    own = fit_boundary(setup.still, _still_labels(setup), t=setup.at, space="x", balance=True)
    loud = fit_boundary(setup.store, labels, t=setup.at, space="x", balance=True)
    both = np.concatenate([setup.inverted.at(setup.at, space="x"), setup.still.at(setup.at, space="x")])
    source = np.repeat([1, 0], [setup.n, setup.n])
    told = fit_boundary(both, source, t=setup.at, space="x", name="source").accuracy
    variants = {
        "from images": {"boundary_x": setup.boundaries["x"]},
        "from samples, eta 0": {"boundary_x": own},
        "from samples, eta 1": {"boundary_x": loud},
        "random": {"boundary_x": own, "control": setup.seed},
    }
    drawn = _crossed(setup, variants, claims={"samples_above_random": ("from samples, eta 0", "random")})
    return replace(drawn, claims=drawn.claims | {"sources_told_apart": Number(told.value, told.low, told.high, told.n)})


@recipe("zhu-e15", "Zhu E15", "a thing that the model never saw, hats, against an attribute that it knows", minutes=1)
def unseen(setup: Setup) -> Drawn:
    """Boundaries in x and h to drawings with hats and to the attribute, crossed by images that have neither.

    Probes of the judge's features, fitted on drawings and images, say whether a hat or the attribute is there.
    """
    hats, bare = _drawn_avatars(setup, hair="HAT"), _drawn_avatars(setup)
    learned, labels = torch.cat([hats[::2], bare[::2]]), np.repeat([1, 0], [len(hats[::2]), len(bare[::2])])
    store = extract(setup.model, images=learned, steps=setup.steps, record_x=True, progress=False)
    options = {"t": setup.at, "balance": True, "name": "hat"}
    to_hats = {s: fit_boundary(store, labels, space=s, **options) for s in ("h", "x")}
    known = setup.images[: setup.n], setup.truth[setup.attribute].to_numpy()
    probes = {"hat": _probe(setup, learned, labels), "attribute": _probe(setup, *known)}
    told = probes["hat"](torch.cat([hats[1::2], bare[1::2]])) > 0.5
    right = told == np.repeat([True, False], [len(hats[1::2]), len(bare[1::2])])
    model, runs, shared = setup.model, setup.without, {"seed": setup.seed, "progress": False}
    sweep = [STRENGTH, 2 * STRENGTH, 3 * STRENGTH]
    hat, known = ({f"boundary_{s}": pair[s] for s in ("h", "x")} for pair in (to_hats, setup.boundaries))
    moves = {
        "hat, which it never saw": ("hat", {**hat, "distances": sweep}),
        f"{setup.attribute}, which it knows": ("attribute", {**known, "distances": sweep}),
        "random, seen as a hat": ("hat", experiments.as_control(model, runs, hat, sweep, setup.seed)),
    }
    unmoved = cross_boundary(model, runs, **hat, distances=[0.0], mode="shift", **shared).images[:, 0]
    rows, changes = [], {}
    for name, (probe, arguments) in moves.items():
        images, before = cross_boundary(model, runs, **arguments, **shared).images, probes[probe](unmoved)
        gained = np.stack([probes[probe](x) - before for x in images.unbind(1)], axis=1)
        changes[name] = gained.mean(axis=1)
        rows += [{"move": name, "distance": s, **vars(mean_of(gained[:, i]))} for i, s in enumerate(sweep)]
    table, (hat, attribute, _) = pd.DataFrame(rows), changes.values()
    return Drawn(
        curves(table, "move", "distance", "distance (sd)", "change of the probability that it is there"),
        table,
        f"x and h moved at t = {setup.at}; {len(hat)} images. The probe for hats is right in {right.mean():.0%}.",
        {"unseen_less_than_known": mean_of(hat - attribute), "effect": mean_of(hat), "probe": mean_of(right)},
    )


@recipe("zhu-e16", "Zhu E16", "two attributes at once, by three rules", minutes=0.6)
def rules(setup: Setup) -> Drawn:
    """Add one attribute and take another away: what each rule changes."""
    pair = [setup.attribute, setup.other]
    options = {"t": setup.at, "balance": True}
    b = {s: [fit_boundary(setup.inverted, setup.truth[a], space=s, **options) for a in pair] for s in ("h", "x")}
    table = experiments.compare_rules(
        setup.model, setup.without, b["h"], b["x"], distances=[2 * STRENGTH, -2 * STRENGTH], classifier=setup.judge,
        seed=setup.seed, progress=False,
    )  # fmt: skip
    wide = table.pivot(index="rule", columns="attribute", values="change")
    wide = wide.loc[table["rule"].unique(), [*pair, *(a for a in wide if a not in pair)]]
    return Drawn(plots.matrix(wide), table, f"+{pair[0]} -{pair[1]} at t = {setup.at}; {len(setup.without)} images.")


@recipe("zhu-e17", "Zhu E17", "every method on the same held-out samples: success against preservation", minutes=1)
def benchmark(setup: Setup) -> Drawn:
    """The quick benchmark on two attributes, and the differences that the papers speak of."""
    names = (setup.attribute, setup.other)
    methods = (
        "random h", "random x", "PCA", "Jacobian", "Jacobian, masked", "mean difference", "boundary in h",
        "boundary in x", "boundary in x and h", "noise", "LOCO",
    )  # fmt: skip
    size = {**SIZES["quick"], "population": setup.n, "labelled": setup.n, "held_out": 16}
    protocol = Protocol(methods, names, seed=setup.seed, transfer=False, t=setup.t, **size)
    result = run_benchmark(
        setup.model, protocol, labeller=setup.labeller, judge=setup.judge, images=setup.images,
        masks=setup.masks(names), progress=False,
    )  # fmt: skip
    table = leaderboard.pareto(result.edits)
    without = int(leaderboard.by_attribute(result.edits, resamples=2)["n"].min())

    def gap(first: str, second: str) -> Number:
        found = leaderboard.difference(result.edits, first, second)
        return Number(found["value"], found["low"], found["high"], without)

    return Drawn(
        plots.pareto(table, family=result.provenance["family"]),
        table,
        f"Means over {', '.join(names)}; {size['held_out']} held-out samples, {without} or more without each; 95% "
        "bootstrap intervals.",
        {
            "supervised_above_random": gap("mean difference", "random h"),
            "mask_above_no_mask": gap("Jacobian, masked", "Jacobian"),
            "boundary_above_mean_difference": gap("boundary in x", "mean difference"),
            "h_above_noise": gap("mean difference", "noise"),
            "pca_above_random": gap("PCA", "random h"),
        },
    )


@recipe("zhu-e18", "Zhu E18", "edits of images that a seed chose", minutes=0.2)
def unpicked(setup: Setup) -> Drawn:
    """Six images by the seed, none of those that are learned from; the attribute taken away and added."""
    below = [t for t in setup.timesteps if t <= setup.at]
    grid = experiments.random_examples(
        setup.model, setup.images.select(slice(setup.n, None)), setup.boundaries["h"], setup.boundaries["x"],
        steps=below, n=6, seed=setup.seed, distances=(-2 * STRENGTH, 2 * STRENGTH), progress=False,
    )  # fmt: skip
    scores = pd.concat([setup.judge(x) for x in grid.images.unbind(1)], keys=["image", "taken", "added"])
    table = scores[setup.attribute].unstack(0).assign(image=grid.row_labels)
    figure = plots.image_grid(grid.images.clamp(-1, 1).transpose(0, 1), row_labels=["image", "taken away", "added"])
    return Drawn(figure, table, f"{setup.attribute}, seed {setup.seed}: {', '.join(grid.row_labels)}.")


@recipe("zhu-e19", "Zhu E19", "what a boundary and a sweep of edits cost", minutes=0.3)
def price(setup: Setup) -> Drawn:
    """Seconds of inversion, of a fit and of a sweep."""
    n = min(40, setup.n)
    labels = setup.truth[setup.attribute].to_numpy()[:n]
    table = experiments.costs(setup.model, setup.images[:n], labels, t=setup.at, steps=10, strengths=10)
    seconds, fits = table.set_index("task")["seconds"], []
    for _ in range(5):
        start = time.perf_counter()
        fit_boundary(setup.inverted, setup.truth[setup.attribute], t=setup.at, space="x")
        fits.append(time.perf_counter() - start)
    return Drawn(
        plots.bars({"seconds": seconds}, ylabel="seconds"),
        table,
        f"{n} images, 10 steps, 10 strengths; once, on the machine at hand. A fit of {setup.n} images: 5 times.",
        {"seconds_of_a_fit": mean_of(fits)},
    )


@recipe("zhu-e20", "Zhu E20", "reconstruction against the number of steps", minutes=0.3)
def reconstruction(setup: Setup) -> Drawn:
    """Round trip of inversion and decoding at eta 0."""
    images = setup.images[-min(12, setup.measured) :]
    table = experiments.reconstruction_over_steps(setup.model, images, steps=(6, 11, 21, 41), t=setup.at)
    figure = plots.line(
        table["steps"].to_numpy(), table["psnr"].to_numpy(), low=table["low"].to_numpy(), high=table["high"].to_numpy(),
        xlabel="steps", ylabel="PSNR of the round trip (dB)",
    )  # fmt: skip
    return Drawn(figure, table, f"From t = {setup.at}; median and quartiles of {len(images)} images.")


@recipe("zhu-e21", "Zhu E21", "which defects of the released code matter", minutes=0.5)
def defects(setup: Setup) -> Drawn:
    """The clean edit, and the same with each defect."""
    cleaner = setup.timesteps[setup.timesteps.index(setup.at) + 2]
    table = experiments.compare_defects(
        setup.model, setup.inverted, setup.truth[setup.attribute], runs=setup.without, t=setup.at, other_t=cleaner,
        classifier=setup.judge, distance=STRENGTH, seed=setup.seed, progress=False,
    )  # fmt: skip
    rows = table.set_index("variant")
    figure = plots.bars(
        {"change": rows["change"]}, low={"change": rows["low"]}, high={"change": rows["high"]},
        ylabel=f"change of {words(setup.attribute)}",
    )  # fmt: skip
    return Drawn(figure, table, f"{STRENGTH:g} sd at t = {setup.at}, {len(setup.without)} images, 95% intervals.")


def _ensembles(setup: Setup, t: int) -> dict[str, np.ndarray]:
    """x_t of the three sources, (n, d)."""
    x0 = torch.from_numpy(setup.inverted.images[:])
    noise = normal(range(setup.seed, setup.seed + len(x0)), x0.shape[1:], stream=FORWARD, t=t)
    return {
        "sampled": setup.still.at(t, space="x"),
        "inverted": setup.inverted.at(t, space="x"),
        "forward-diffused": setup.model.schedule.add_noise(x0, noise, t).flatten(1).numpy(),
    }


def _still_labels(setup: Setup) -> pd.Series:
    scores = setup.labeller(setup.still.images[:], progress=False).set_axis(list(setup.still.seeds))
    return scores[setup.attribute].gt(0.5).astype(int)


def _drawn_avatars(setup: Setup, **changed: str) -> torch.Tensor:
    """As many drawings of held-out avatars as images are learned from, with factors changed; at the model's size."""
    factors = [avataaars.factors(avataaars.HELD_OUT_PART + 10, i) for i in range(setup.n)]
    size = setup.model.image_shape[1]
    return torch.stack([picture_to_tensor(avataaars.render(replace(one, **changed)), size) for one in factors])


def _probe(setup: Setup, images: torch.Tensor, labels: np.ndarray) -> Callable[[torch.Tensor], np.ndarray]:
    """A logistic regression on the judge's features, from images to probabilities."""
    fitted = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(
        setup.judge.features(images), labels
    )
    return lambda x: fitted.predict_proba(setup.judge.features(x.clamp(-1, 1)))[:, 1]


def _positives(setup: Setup) -> torch.Tensor:
    """Real images with the attribute, none of those that are learned from."""
    labels = setup.images.labels[setup.attribute].to_numpy()
    return setup.images[[i for i in range(setup.n, len(setup.images)) if labels[i] == 1][:400]]


def _crossed(
    setup: Setup,
    variants: dict[str, dict],
    *,
    claims: dict[str, tuple[str, str]],
    real: torch.Tensor | None = None,
    kept: str = "psnr",
) -> Drawn:
    """Variants of a crossing: change of the attribute against preservation, and differences, mean over distances."""
    sizes = [STRENGTH / 2, STRENGTH, 2 * STRENGTH]
    measured = experiments.measure_crossings(
        setup.model, setup.without, variants, classifier=setup.judge, distances=sizes, real=real, seed=setup.seed,
        progress=False,
    )  # fmt: skip
    table = measured.summary(setup.attribute)
    figure = plots.pareto(
        _with_ends(table, kept), family=dict.fromkeys(variants, f"t = {setup.at}"), x=kept,
        xlabel="PSNR against the image (dB)" if kept == "psnr_image" else "PSNR against no move (dB)",
        y="change", ylabel=f"change of {words(setup.attribute)}",
    )  # fmt: skip

    def change(variant: str) -> np.ndarray:
        both = [measured.effects.scores(variant, size) for size in sizes]
        return np.mean([(after - before)[setup.attribute].to_numpy() for before, after in both], axis=0)

    found = {name: mean_of(change(first) - change(second)) for name, (first, second) in claims.items()}
    caption = f"{', '.join(f'{s:g}' for s in sizes)} sd at t = {setup.at}; {len(setup.without)} images."
    return Drawn(figure, table, caption, found)


def _number(row: pd.Series, value: str) -> Number:
    return Number(float(row[value]), float(row["low"]), float(row["high"]), int(row["n"]))


def _with_ends(table: pd.DataFrame, kept: str) -> pd.DataFrame:
    """A summary of crossings in the columns of a Pareto plot."""
    return table.rename(columns={"variant": "method"}).assign(
        change_low=table["low"], change_high=table["high"], **{f"{kept}_low": table[kept], f"{kept}_high": table[kept]}
    )
