"""Figures and the table of Haas et al. 2024 (arXiv 2303.11073), in the order of the paper."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy.stats import spearmanr

from workbench.analysis.image_metrics import cosine_similarity, kernel_distance, kernel_distance_interval
from workbench.analysis.intervals import Estimate as Number
from workbench.analysis.intervals import difference_of, mean_of, ratio_of
from workbench.benchmark.run import backdrop
from workbench.directions.direction import Direction, random_like
from workbench.directions.jacobian import find_jacobian
from workbench.directions.pca import find_pca
from workbench.directions.supervised import find_from_labels
from workbench.editing.disentangle import disentangling_table, few_examples
from workbench.editing.measure import measure_effects
from workbench.editing.render import edit, edit_grid
from workbench.report import plots
from workbench.report.recipes import (
    SHOWN,
    T_AXIS,
    Drawn,
    Setup,
    curves,
    recipe,
    words,
)


@recipe("haas-fig2a", "Haas E1", "h of one sample in another: what follows h, and what follows x_T", minutes=0.2)
def swap(setup: Setup) -> Drawn:
    """Every sample gets the h of the next one, and keeps its x_T and noise."""
    run = setup.run
    donors = run[np.roll(np.arange(len(run)), -1)]
    images = edit(setup.model, run, donors, mode="replace", progress=False).x0
    own, given, mixed = (setup.judge(x) > 0.5 for x in (run.x0, donors.x0, images))
    differ = own != given
    follows = (mixed == given).where(differ)
    plain = run.x0.clamp(-1, 1).numpy()
    both = backdrop(plain) & backdrop(donors.x0.clamp(-1, 1).numpy())
    away = [
        np.sqrt((((images - x) ** 2).numpy() * both).sum(axis=(1, 2, 3)) / both.sum(axis=(1, 2, 3)).clip(min=1) / 3)
        for x in (run.x0, donors.x0)
    ]
    table = pd.DataFrame({"attribute": own.columns, "differ": differ.sum().to_numpy()})
    table["follows_h"] = follows.mean().to_numpy(dtype=float)
    figure = plots.image_grid(
        torch.stack([run.x0[:SHOWN], donors.x0[:SHOWN], images[:SHOWN]]).clamp(-1, 1),
        row_labels=["x_T and noise of", "h of", "swapped"],
    )
    return Drawn(
        figure,
        table,
        f"h of the second row in the process of the first; {len(run)} samples measured, {SHOWN} shown.",
        {
            "follows_h": mean_of(follows.mean(axis=1)),
            "backdrop_nearer_to_x": mean_of((away[1] - away[0])[both.any(axis=(1, 2, 3))]),
        },
    )


@recipe("haas-fig2b", "Haas E2", "the difference of h of one pair, added to other samples", minutes=0.2)
def arithmetic(setup: Setup) -> Drawn:
    """h of the sample that has an attribute most clearly less that of one without; a fifth of it, and all."""
    scores = setup.scores[setup.other]
    ends = [list(setup.store.seeds).index(seed) for seed in (scores.idxmax(), scores.idxmin())]
    h = np.stack([setup.store.at(t)[ends] for t in setup.store.timesteps])
    delta = torch.from_numpy(h[:, 0] - h[:, 1]).view(-1, *setup.model.h_shape)
    pair = Direction.from_delta(
        delta, timesteps=setup.timesteps, name="pair", provenance=setup.direction(setup.other).provenance
    )
    control = replace(random_like(pair, seed=setup.seed), name="random")
    scales = [0.2, 0.5, 1.0]
    effects = measure_effects(
        setup.model, setup.run, [pair, control], classifier=setup.judge, scales=scales, progress=False
    )
    rows, gaps = [], None
    for scale in scales:
        change = {}
        for name in ("pair", "random"):
            before, after = effects.scores(name, scale)
            change[name] = (after - before)[setup.other][before[setup.other] <= 0.5].to_numpy()
            rows.append({"direction": name, "scale": scale, **vars(mean_of(change[name]))})
        gaps = change["pair"] - change["random"]
    table = pd.DataFrame(rows)
    return Drawn(
        curves(table, "direction", "scale", "share of the difference that is added", f"change of {words(setup.other)}"),
        table,
        f"Samples without {setup.other}, 95% intervals; one pair of samples.",
        {"effect": mean_of(gaps)},
    )


@recipe("haas-fig3", "Haas E3", "what principal components change", minutes=0.5)
def components(setup: Setup) -> Drawn:
    """Effects of five components at +2 sigma, beside a random direction as long as the first."""
    pcs = list(find_pca(setup.store, k=5, progress=False))
    control = replace(random_like(pcs[0], seed=setup.seed), name="random")
    effects = measure_effects(
        setup.model, setup.run, [*pcs, control], classifier=setup.judge, scales=[2.0], progress=False
    )
    matrix = effects.matrix(2.0)
    table = matrix.mean.reset_index().melt("direction", var_name="attribute", value_name="effect")
    size = {d: np.abs(np.subtract(*effects.scores(d, 2.0)[::-1])).mean(axis=1) for d in effects.edits}
    found = np.mean([size[pc.name] for pc in pcs], axis=0)
    return Drawn(
        plots.matrix(matrix.mean),
        table,
        f"Mean change of the judge's score at +2 sigma, {len(setup.run)} samples.",
        {"more_than_random": mean_of(found - size["random"].to_numpy())},
    )


@recipe("haas-fig4", "Haas E4", "a principal component and a random direction, as long and longer", minutes=0.6)
def component_and_random(setup: Setup) -> Drawn:
    """Change of the image and distance to real images, against the scale."""
    first = find_pca(setup.store, k=1, progress=False)[0]
    control = replace(random_like(first, seed=setup.seed), name="random")
    scales = [1.0, 2.0, 4.0, 8.0, 16.0]
    images = edit_grid(setup.model, setup.run, [first, control], scales=scales, progress=False).images
    images = images.clamp(-1, 1).unflatten(0, (2, -1))
    moved = (images - setup.run.x0.clamp(-1, 1)[None, :, None]).square().mean(dim=(3, 4, 5)).sqrt().numpy()
    real = setup.judge.features(setup.images[-500:])
    rows, kernels = [], {}
    for d, name in enumerate(("PC1", "random")):
        for i, scale in enumerate(scales):
            features = setup.judge.features(images[d, :, i])
            low, high = kernel_distance_interval(features, real)
            kernels[name, scale] = Number(kernel_distance(features, real), low, high, len(features))
            rows.append({"direction": name, "scale": scale, **vars(mean_of(moved[d, :, i]))})
            rows[-1] |= {"kid": kernels[name, scale].value, "kid_low": low, "kid_high": high}
    table = pd.DataFrame(rows)
    farther = difference_of(kernels["random", 8.0], kernels["PC1", 8.0])
    return Drawn(
        curves(table, "direction", "scale", "scale (sigma)", "change of the image (RMS)"),
        table,
        f"Mean over {len(setup.run)} samples with its 95% interval.",
        {"change_at_2": mean_of(moved[0, :, 1] - moved[1, :, 1]), "random_degrades": farther},
    )


@recipe("haas-fig5", "Haas E5", "a Jacobian direction of one sample, applied to others", minutes=0.4)
def transfer(setup: Setup) -> Drawn:
    """Cosine between the change of the source and those of other samples, beside a random direction."""
    source = find_jacobian(
        setup.model, setup.run[0], t=setup.at, k=1, mask=_mask(setup), tol=1e-3, population=setup.store, progress=False
    )[0]
    control = random_like(source, seed=setup.seed)
    images = edit_grid(setup.model, setup.run, [source, control], scales=[8.0], progress=False).images[:, 0]
    moved = (images.unflatten(0, (2, -1)) - setup.run.x0).flatten(2).numpy()
    alike = {
        name: cosine_similarity(np.repeat(m[:1], len(m) - 1, axis=0), m[1:])
        for name, m in zip(("Jacobian", "random"), moved, strict=True)
    }
    table = pd.DataFrame([{"direction": name, **vars(mean_of(values))} for name, values in alike.items()])
    grid = edit_grid(setup.model, setup.run[:SHOWN], source, scales=[-8.0, -4.0, 0.0, 4.0, 8.0], progress=False)
    return Drawn(
        plots.image_grid(grid.images.clamp(-1, 1), column_labels=grid.column_labels),
        table,
        f"Found on the first sample at t = {setup.at}; {len(setup.run)} samples measured, {SHOWN} shown.",
        {"cosine_above_random": mean_of(alike["Jacobian"] - alike["random"])},
    )


@recipe("haas-fig6", "Haas E6", "masked Jacobian directions: how much of the change lies in the region", minutes=0.8)
def masks(setup: Setup) -> Drawn:
    """Share of the squared change inside of a region, by its own direction, the unmasked and a random one."""
    runs = setup.run[: min(8, len(setup.run))]
    known = setup.masks(["Smiling", "Eyes_Closed", "Raised_Brows"])
    if not known:
        raise ValueError("no regions of these images are known; give masks to find_jacobian, in 40_unsupervised")
    regions = dict(zip(("mouth", "eyes", "brows"), known.values(), strict=False))
    rows = []
    for i in range(len(runs)):
        options = {"t": setup.at, "k": 1, "tol": 1e-3, "population": setup.store, "progress": False}
        plain = find_jacobian(setup.model, runs[i], **options)[0]
        tried = {"no mask": plain, "random": random_like(plain, seed=setup.seed)}
        found = {name: find_jacobian(setup.model, runs[i], mask=m, **options)[0] for name, m in regions.items()}
        every = [*tried.values(), *found.values()]
        images = edit_grid(setup.model, runs[i], every, scales=[-4.0, 4.0], progress=False).images
        change = (images - runs.x0[i]).square().mean(dim=(1, 2)).numpy()
        for k, (name, mask) in enumerate(regions.items()):
            inside = [(c * mask).sum() / c.sum() for c in change]
            rows.append(
                {"sample": i, "region": name, "masked": inside[2 + k], "no mask": inside[0], "random": inside[1]}
            )
    table = pd.DataFrame(rows)
    means = table.groupby("region", sort=False)[["masked", "no mask", "random"]].mean()
    by_sample = table.groupby("sample")[["masked", "no mask"]].mean()
    return Drawn(
        plots.bars({column: means[column] for column in means}, ylabel="share inside the mask"),
        table,
        f"Of the squared change at -4 and +4 sigma, {len(runs)} samples.",
        {"masked_above_plain": mean_of(by_sample["masked"] - by_sample["no mask"])},
    )


@recipe("haas-fig7", "Haas E7", "single attributes against the scale", minutes=0.6)
def attributes(setup: Setup) -> Drawn:
    """The judge's score of each attribute along its own direction."""
    names = _frequent(setup)[:6]
    found = {name: setup.direction(name) for name in names}
    controls = {f"random, as long as {name}": random_like(found[name], seed=setup.seed) for name in names}
    scales = [-2.0, -1.0, 1.0, 2.0]
    effects = measure_effects(
        setup.model, setup.run, {**found, **controls}, classifier=setup.judge, scales=scales, progress=False
    )
    rows, gaps = [], []
    for name in names:
        for scale in scales:
            change = np.subtract(*effects.scores(name, scale)[::-1])[name]
            rows.append({"attribute": name, "scale": scale, **vars(mean_of(change))})
        before, after = effects.scores(name, 2.0)
        least = (before[name] <= 0.5).to_numpy()
        chance = effects.scores(f"random, as long as {name}", 2.0)[1][name]
        gaps.append(np.where(least, after[name] - chance, np.nan))
    table = pd.DataFrame(rows)
    return Drawn(
        curves(table, "attribute", "scale", "scale (sigma)", "change of the score"),
        table,
        f"{len(setup.run)} samples, 95% intervals.",
        {"effect_above_random": mean_of(np.nanmean(gaps, axis=0))},
    )


@recipe("haas-fig8a", "Haas E8", "how many examples a direction needs, in h and in x_T", minutes=1.5)
def examples(setup: Setup) -> Drawn:
    """Effect of directions from few examples, at eta 0."""
    labels = setup.labeller(setup.still.images[:]).set_axis(list(setup.still.seeds))[setup.other].gt(0.5).astype(int)
    # What the largest count leaves is the reference, and has as many.
    most = int(min(labels.sum(), len(labels) - labels.sum())) // 2
    counts = [c for c in (2, 5, 10, 20, 40) if c <= most]
    if not counts:
        raise ValueError(f"{most * 2} of {len(labels)} samples are too few with or without {setup.other}; enlarge n")
    few = few_examples(
        setup.model, setup.still_run, setup.still, labels=labels, classifier=setup.judge, counts=counts, draws=4,
        seed=setup.seed, progress=False,
    )  # fmt: skip
    rows = [
        {"space": space, "count": count, **vars(mean_of(part["effect"])), "cosine": part["cosine"].mean()}
        for (space, count), part in few.groupby(["space", "count"])
    ]
    table, last = pd.DataFrame(rows), counts[-1]
    by = few.set_index(["space", "count", "draw"])[["effect", "cosine"]].sort_index()
    effect, cosine = by["effect"], by["cosine"]
    shown = table[(table["count"] > 0) & np.isfinite(table["count"])]
    return Drawn(
        curves(shown, "space", "count", "examples of each class", f"change of {words(setup.other)}"),
        table,
        f"4 draws from {len(labels)} samples; {len(setup.still_run)} samples edited. 2 sigma in h, 10 in x_T.",
        {
            "share_of_full_effect": mean_of(effect["h", 10.0 if 10 in counts else last] / effect["h", np.inf]),
            "h_cosine_above_x_T": mean_of(cosine["h", last] - cosine["x_T", last]),
        },
    )


@recipe("haas-fig8b", "Haas E9", "edits one after the other: how well they add", minutes=0.3)
def sums(setup: Setup) -> Drawn:
    """The change by the sum of directions against the sum of their changes."""
    names = [setup.other, setup.attribute, "Eyeglasses"]
    names = [name for name in names if name in setup.judge.attributes]
    found = [setup.direction(name) for name in names]
    total, rows, images = found[0], [], [setup.run.x0]
    single = edit_grid(setup.model, setup.run, found, scales=[1.0], progress=False).images[:, 0]
    single = (single.unflatten(0, (len(found), -1)) - setup.run.x0).flatten(2)
    errors = {}
    for i, direction in enumerate(found):
        total = direction if i == 0 else total + direction
        edited = edit_grid(setup.model, setup.run, total, scales=[1.0], progress=False).images[:, 0]
        images.append(edited)
        change, expected = (edited - setup.run.x0).flatten(1), single[: i + 1].sum(dim=0)
        errors[i] = ((change - expected).norm(dim=1) / expected.norm(dim=1)).numpy()
        rows.append({"edits": " + ".join(names[: i + 1]), **vars(mean_of(errors[i]))})
    figure = plots.image_grid(
        torch.stack(images, dim=1)[:SHOWN].clamp(-1, 1),
        column_labels=["sample", *(f"+ {words(name)}" for name in names)],
    )
    return Drawn(
        figure,
        pd.DataFrame(rows),
        f"Each of 1 sigma; error relative to the sum of the single changes, {len(setup.run)} samples.",
        {"error_of_two": mean_of(errors[1])},
    )


@recipe(
    "haas-table1",
    "Haas E10",
    "effects on each other's attributes, before and after projection",
    minutes=3,
)
def table1(setup: Setup) -> Drawn:
    """Effect matrices of five attributes, original and disentangled."""
    names = _frequent(setup)[:5]
    runs = setup.run[: len(setup.run) // 4 * 4]
    found = disentangling_table(
        setup.model, runs, {name: setup.direction(name) for name in names}, classifier=setup.judge,
        scales=(1.5,), success=0.0, repeats=4, progress=False,
    )  # fmt: skip
    both = pd.concat({variant: found.matrix(variant) for variant in found.effects}, axis=1)
    both.columns = [f"{name}{'' if variant == 'original' else ' ⊥'}" for variant, name in both.columns]
    leaks = {}
    for variant, effects in found.effects.items():
        matrix = effects.matrix(1.5).of(names)
        sizes = np.abs(np.concatenate([matrix.mean.to_numpy()[None], matrix.draws]))
        own = np.trace(sizes, axis1=1, axis2=2)
        leaks[variant] = (sizes.sum(axis=(1, 2)) - own) / own
    fall = leaks["original"] - leaks["disentangled"]
    low, high = np.quantile(fall[1:], (0.025, 0.975))
    return Drawn(
        plots.matrix(both),
        found.table,
        f"Change of the score at 1.5 sigma, {len(runs)} samples; columns with ⊥ after projection (eq. 12).",
        {"leakage_falls": Number(float(fall[0]), float(low), float(high), len(runs))},
    )


@recipe("haas-fig11", "Haas E11", "asymmetric against symmetric injection, as strong and rescaled", minutes=0.6)
def injection(setup: Setup) -> Drawn:
    """How much stronger the asymmetric edit is, and how alike the two are when matched step by step."""
    found = setup.direction(setup.other)
    scales = [0.5, 1.0, 2.0]
    ways = {"symmetric": {}, "asymmetric": {"asymmetric": True}, "matched": {"asymmetric": True, "gain": "match"}}
    images = {
        name: edit_grid(setup.model, setup.run, found, scales=scales, progress=False, **way).images
        for name, way in ways.items()
    }
    moved = {name: (x - setup.run.x0[:, None]).flatten(2).numpy() for name, x in images.items()}
    size = {name: np.sqrt((m**2).mean(axis=2)) for name, m in moved.items()}
    rows = [
        {"injection": name, "scale": scale, **vars(mean_of(size[name][:, i]))}
        for name in ways
        for i, scale in enumerate(scales)
    ]
    table = pd.DataFrame(rows)
    return Drawn(
        curves(table, "injection", "scale", "scale (sigma)", "change of the image (RMS)"),
        table,
        f"Direction of {setup.other}, {len(setup.run)} samples, {setup.steps} steps, eta 1.",
        {
            "amplification": ratio_of(size["asymmetric"][:, 1], size["symmetric"][:, 1]),
            "alike_when_matched": mean_of(cosine_similarity(moved["matched"][:, 1], moved["symmetric"][:, 1])),
        },
    )


@recipe("haas-fig13", "Haas E12", "how fine the Jacobian's effect is, from early to late timesteps", minutes=1)
def coarse_to_fine(setup: Setup) -> Drawn:
    """Mean spatial frequency of the top left singular vectors against t, also of eps and of P_t."""
    size, runs = setup.model.image_shape[1], setup.run[: min(6, len(setup.run))]
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size)))
    visited, rows, correlation = setup.timesteps[:: max(1, setup.steps // 10)], [], []
    for i in range(len(runs)):
        last, fine = None, []
        for t in visited:
            last = find_jacobian(setup.model, runs[i], t=t, k=3, tol=1e-3, warm_start=last, progress=False)
            power = np.abs(np.fft.fft2(last.left.numpy())) ** 2
            fine.append(float((power * radius).sum() / power.sum()))
        rows += [{"sample": i, "t": t, "frequency": f} for t, f in zip(visited, fine, strict=True)]
        correlation.append(spearmanr(visited, fine).statistic)
    same = []
    for run in (runs[i] for i in range(min(3, len(runs)))):
        options = {"t": setup.at, "k": 1, "tol": 1e-6, "progress": False}
        eps, x0 = (find_jacobian(setup.model, run, output=output, **options).right for output in ("eps", "x0"))
        same.append(float(abs((eps * x0).sum())))
    table = pd.DataFrame(rows)
    wide = table.pivot(index="t", columns="sample", values="frequency").sort_index(ascending=False)
    figure = plots.line(
        wide.index, {f"sample {i}": wide[i] for i in wide}, xlabel=T_AXIS, ylabel="mean frequency (cycles a pixel)",
        reverse_x=True,
    )  # fmt: skip
    return Drawn(
        figure,
        table,
        f"Of the top 3 left singular vectors, {len(runs)} samples.",
        {"rank_correlation": mean_of(correlation), "same_vector_of_eps_and_x0": mean_of(same)},
    )


@recipe("haas-alg2", "Haas E13", "block and sequential iteration: the same space, at what cost", minutes=0.3)
def algorithms(setup: Setup) -> Drawn:
    """Singular values and cosines of Algorithm 1 and Algorithm 2, and the products that they take."""
    rows, cosines = [], []
    for i in range(min(4, len(setup.run))):
        found = {}
        for name, block in (("Algorithm 1", None), ("Algorithm 2", 1)):
            start = time.perf_counter()
            found[name] = find_jacobian(
                setup.model, setup.run[i], t=setup.at, k=3, block=block, tol=1e-5, progress=False
            )
            seconds = time.perf_counter() - start
            for j, value in enumerate(found[name].singular_values):
                row = {"sample": i, "algorithm": name, "vector": j + 1, "singular value": value}
                rows.append(row | {"iterations": found[name].convergence.iterations, "seconds": seconds})
        a, b = (f.right.flatten(1).numpy() for f in found.values())
        cosines.append(np.linalg.svd(a @ b.T, compute_uv=False).min())
    table = pd.DataFrame(rows)
    means = table.groupby(["algorithm", "vector"])["singular value"].mean().unstack(0)
    means.index = [f"sigma {i}" for i in means.index]
    return Drawn(
        plots.bars({name: means[name] for name in means}, ylabel="singular value"),
        table,
        f"Mean over {min(4, len(setup.run))} samples at t = {setup.at}.",
        {"smallest_cosine": mean_of(cosines)},
    )


@recipe("haas-fig17", "Haas E14", "directions from inverted real images, applied to generated samples", minutes=0.4)
def from_images(setup: Setup) -> Drawn:
    """Effect of the difference of means of inverted images, beside that of samples and a random direction."""
    found = {
        "images": find_from_labels(setup.inverted, setup.truth[setup.other], progress=False),
        "samples": setup.direction(setup.other),
    }
    found["random"] = random_like(found["images"], seed=setup.seed)
    scales = [0.5, 1.0, 2.0]
    effects = measure_effects(setup.model, setup.run, found, classifier=setup.judge, scales=scales, progress=False)
    rows, change = [], {}
    for name in found:
        for scale in scales:
            before, after = effects.scores(name, scale)
            change[name, scale] = (after - before)[setup.other][before[setup.other] <= 0.5].to_numpy()
            rows.append({"direction": name, "scale": scale, **vars(mean_of(change[name, scale]))})
    table = pd.DataFrame(rows)
    return Drawn(
        curves(table, "direction", "scale", "scale (sigma)", f"change of {words(setup.other)}"),
        table,
        f"Samples without {setup.other}, 95% intervals.",
        {"effect_above_random": mean_of(change["images", 2.0] - change["random", 2.0])},
    )


@recipe("haas-fig18", "Haas E15", "five principal components of a model, on one sample", minutes=0.3)
def five_components(setup: Setup) -> Drawn:
    """Strips of the first five components: for churches and bedrooms give such a model."""
    pcs = find_pca(setup.store, k=5, progress=False)
    grid = edit_grid(setup.model, setup.run[:1], pcs[:5], scales=[-3.0, -1.5, 0.0, 1.5, 3.0], progress=False)
    table = pd.DataFrame(
        {"component": [pc.name for pc in pcs], "explained variance": pcs.explained_variance_ratio.mean(axis=0)}
    )
    figure = plots.image_grid(
        grid.images.clamp(-1, 1), row_labels=[pc.name for pc in pcs], column_labels=grid.column_labels
    )
    return Drawn(figure, table, f"One sample of {setup.model_name}, {setup.n} samples for the components.")


def _frequent(setup: Setup) -> list[str]:
    """Attributes that enough samples have and lack, the two of the setup first."""
    counts = setup.scores.gt(0.5).sum()
    fewest = max(4, setup.n // 16)
    known = [name for name in counts.index if fewest <= counts[name] <= setup.n - fewest]
    return list(dict.fromkeys([*(a for a in (setup.other, setup.attribute) if a in known), *known]))


def _mask(setup: Setup) -> np.ndarray | None:
    return setup.masks([setup.other]).get(setup.other)
