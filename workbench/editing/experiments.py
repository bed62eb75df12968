"""Experiments about boundaries and the edits that cross them, one call each; every one returns a tidy table.

They are numbered by what Zhu et al. (2023) show or claim. Defaults are small: a minute or so on two cores.

| | question | call |
|---|---|---|
| E7, E8 | what an edit does; whether its degree follows the distance | measure_crossings, Crossings.monotonicity |
| E9 | x, h or both | measure_crossings of `spaces` |
| E10 | at which timestep | compare_timesteps |
| E11 | eta after the move | measure_crossings of `etas` |
| E12 | the distance effect | measure_crossings of `norms` |
| E13 | control of generated samples | control_both_signs |
| E16 | several attributes | compare_rules |
| E18 | examples that nobody picked | random_examples |
| E19 | costs | costs |
| E20 | reconstruction | reconstruction_over_steps |
| E21 | defects of the released code | compare_defects |
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd
import torch
from sklearn.svm import SVC

from workbench.analysis.effect_metrics import monotonicity
from workbench.analysis.image_metrics import kernel_distance, peak_signal_to_noise
from workbench.analysis.intervals import mean_interval, share_of
from workbench.analysis.samples import Labels, name_of
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, invert, replay, sample
from workbench.directions.boundary import (
    Boundary,
    change_of,
    random_boundary,
)
from workbench.directions.boundary_accuracy import accuracy_over_samples, accuracy_over_time  # noqa: F401
from workbench.directions.boundary_fit import fit_boundary
from workbench.editing.cross import cross_boundary
from workbench.editing.measure import Classifier, Effects
from workbench.editing.render import EditGrid
from workbench.hspace.store import HStore


@dataclass(frozen=True, eq=False)
class Crossings:
    """What edits across boundaries did to a judge's scores and to the images.

    Attributes
    ----------
    effects : Effects
        `edit` is the variant, `scale` the distance, and `before` the scores of the same decoding without a move.
    preservation : DataFrame
        One row a variant, distance and sample: `psnr` against that decoding, and `psnr_image` against the sample's
        own image; dB.
    quality : DataFrame
        One row a variant and distance: `kid`, the `kernel_distance` of the judge's features to those of real images.
        Empty if none were given.
    """

    effects: Effects = field(repr=False)
    preservation: pd.DataFrame = field(repr=False)
    quality: pd.DataFrame = field(repr=False)

    def summary(self, attribute: str) -> pd.DataFrame:
        """One row a variant and distance.

        Returns
        -------
        DataFrame
            `variant`, `distance`; `change` of the attribute's score with its 95% interval `low`, `high` over the
            samples; `gained`, the share of the samples without the attribute that have it
            afterwards, and `lost`, the share of those with it that have not, with their numbers; `others`, the mean
            size of the change of all other attributes; median `psnr` and `psnr_image`; `kid` if known; `n`.
        """
        rows = []
        for (variant, distance), part in self.preservation.groupby(["variant", "distance"], sort=False):
            before, after = self.effects.scores(variant, distance)
            change, n = (after - before)[attribute], len(after)
            low, high = mean_interval(change)
            has, had = after[attribute] > 0.5, before[attribute] > 0.5
            rows.append(
                {
                    "variant": variant,
                    "distance": distance,
                    "change": change.mean(),
                    "low": low,
                    "high": high,
                    "gained": has[~had].mean(),
                    "without": int((~had).sum()),
                    "lost": (~has)[had].mean(),
                    "with": int(had.sum()),
                    "others": (after - before).drop(columns=attribute).abs().to_numpy().mean(),
                    "psnr": part["psnr"].median(),
                    "psnr_image": part["psnr_image"].median(),
                    "n": n,
                }
            )
        table = pd.DataFrame(rows)
        return table if self.quality.empty else table.merge(self.quality, on=["variant", "distance"])

    def monotonicity(self, attribute: str) -> pd.Series:
        """Mean rank correlation of score and distance over the samples, one value a variant (E8)."""
        table = self.effects.table
        table = table[table["attribute"] == attribute]
        found = {}
        for variant, part in table.groupby("edit", sort=False):
            wide = part.pivot(index="seed", columns="scale", values="after")
            found[variant] = float(np.nanmean(monotonicity(wide, list(wide.columns))))
        return pd.Series(found, name=attribute)

    def __repr__(self) -> str:
        return f"Crossings({len(self.effects.edits)} variants, {self.effects!r})"


def measure_crossings(
    model: Model,
    runs: Trajectory,
    variants: Mapping[str, Mapping],
    *,
    classifier: Classifier,
    distances: Sequence[float] = (-3.0, -1.5, 1.5, 3.0),
    real: torch.Tensor | None = None,
    progress: bool = True,
    **options,
) -> Crossings:
    """Cross boundaries in several ways and let a judge score the images (E7, E8).

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The samples; others than the boundaries were fitted on.
    variants : mapping of name -> arguments of `cross_boundary`
        At least one of `boundary_h`, `boundary_x`; and whatever differs between the variants. `control`, a seed, makes
        of it moves of the same length along random normals.
    classifier : callable (images of shape (n, C, H, W)) -> DataFrame of shape (n, attributes), values in [0, 1]
        Another one than the labels came from.
    distances : sequence of float
    real : Tensor of shape (n, C, H, W), optional
        Real images; then the classifier has `features` too, and `kid` is measured.
    progress : bool
    **options
        Arguments of `cross_boundary` that all variants share.

    Returns
    -------
    Crossings
    """
    ids = np.arange(len(runs)) if runs.seeds is None else np.array(runs.seeds)
    tables, preserved, quality, plains = [], [], [], {}
    target = None if real is None else classifier.features(real)
    for name, given in variants.items():
        arguments = {**options, **given}
        control = arguments.pop("control", None)
        key = _decoding_of(arguments)
        if key not in plains:
            still = {**arguments, "distances": [0.0], "mode": "shift", "progress": False}
            plains[key] = cross_boundary(model, runs, **still).images[:, 0]
        plain = plains[key]
        if control is not None:
            arguments |= as_control(model, runs, arguments, distances, control)
        grid = cross_boundary(model, runs, **{"distances": distances, "progress": progress, **arguments})
        before = classifier(plain)
        for distance, images in zip(distances, grid.images.unbind(1), strict=True):
            after = classifier(images)
            scores = pd.DataFrame({"before": before.stack(), "after": after.stack()})
            scores = scores.rename_axis(["seed", "attribute"]).reset_index()
            tables.append(scores.assign(edit=name, scale=float(distance), seed=ids[scores["seed"]]))
            psnr = {"psnr": plain, "psnr_image": runs.x0}
            psnr = {key: peak_signal_to_noise(images.numpy(), other.numpy()) for key, other in psnr.items()}
            preserved.append(pd.DataFrame({"variant": name, "distance": float(distance), "seed": ids, **psnr}))
            if target is not None:
                kid = kernel_distance(classifier.features(images), target)
                quality.append({"variant": name, "distance": float(distance), "kid": kid})
    return Crossings(Effects(pd.concat(tables, ignore_index=True)), pd.concat(preserved), pd.DataFrame(quality))


def _decoding_of(arguments: Mapping) -> tuple:
    """What the images depend on where nothing is moved."""
    given = [b for b in (arguments.get("boundary_x"), arguments.get("boundary_h")) if b is not None]
    released = arguments.get("h_policy") == "stale", arguments.get("h_align", "exact")
    return given[0].t, *released, *(str(arguments.get(name, "default")) for name in ("eta", "steps", "seed"))


def as_control(model: Model, runs: Trajectory, arguments: Mapping, distances: Sequence[float], seed: int) -> dict:
    """Moves along random normals, each as long as the found boundary's own.

    Parameters
    ----------
    model : Model
    runs : Trajectory
    arguments : mapping
        Of `cross_boundary` for the found boundaries: `boundary_h`, `boundary_x` and what else they are crossed with.
    distances : sequence of float
        Where these move to.
    seed : int
        Of the normals.

    Returns
    -------
    dict
        Arguments of `cross_boundary` for the control.
    """
    boundaries = {s: arguments[f"boundary_{s}"] for s in "hx" if arguments.get(f"boundary_{s}") is not None}
    lengths = {}
    for space, boundary in boundaries.items():
        x_t = runs.x_at(boundary.t)
        with torch.inference_mode():
            z = x_t if space == "x" else model.encode(x_t.to(model.device), boundary.t).h.cpu()
        mode = arguments.get("mode", "absolute")
        in_sd = arguments.get("unit", "sd") == "sd" and mode != "mirror"
        wanted = np.array(distances, dtype=float)[None, :] * (boundary.sigma if in_sd else 1.0)
        own = np.repeat(boundary.distance(z)[:, None], len(distances), axis=1)
        lengths[space] = change_of(own, np.broadcast_to(wanted, own.shape), mode)[:, :, None]
    made = {f"boundary_{space}": random_boundary(boundary, seed=seed) for space, boundary in boundaries.items()}
    return {**made, "distances": lengths, "mode": "shift", "unit": "distance"}


def spaces(boundary_h: Boundary, boundary_x: Boundary, *, control: int | None = 0) -> dict[str, dict]:
    """Variants that compare where to move: x, h or both, and what becomes of h afterwards (E9).

    Parameters
    ----------
    boundary_h, boundary_x : Boundary
        Of one attribute.
    control : int, optional
        Seed of random normals in both spaces; None leaves them out.

    Returns
    -------
    dict of name -> arguments, for `measure_crossings`
    """
    h, x = {"boundary_h": boundary_h}, {"boundary_x": boundary_x}
    found = {
        "both": h | x,
        "x": x,
        "h, first step": h,
        "h, every step": h | {"h_policy": "offset"},
        "h, every step, asymmetric": h | {"h_policy": "offset-asymmetric"},
        "both, h every step": h | x | {"h_policy": "offset"},
    }
    return found if control is None else found | {"random": h | x | {"control": control}}


def etas(
    boundary_h: Boundary | None, boundary_x: Boundary | None, *, values: Sequence[float] = (0.0, 0.3, 1.0)
) -> dict:
    """Variants that compare eta after the move (E11).

    Parameters
    ----------
    boundary_h, boundary_x : Boundary or None
    values : sequence of float in [0, 1]

    Returns
    -------
    dict of name -> arguments, for `measure_crossings`
    """
    both = {"boundary_h": boundary_h, "boundary_x": boundary_x}
    return {f"eta {value:g}": both | {"eta": value} for value in values}


def norms(boundary_h: Boundary | None, boundary_x: Boundary | None, *, control: int = 0) -> dict[str, dict]:
    """Variants for the distance effect: straight moves, great circles, and random normals (E12).

    Parameters
    ----------
    boundary_h, boundary_x : Boundary or None
    control : int
        Seed of the random normals.

    Returns
    -------
    dict of name -> arguments, for `measure_crossings`
    """
    both = {"boundary_h": boundary_h, "boundary_x": boundary_x}
    return {
        "straight": both,
        "great circle": both | {"keep_norm": True},
        "random, straight": both | {"control": control},
        "random, great circle": both | {"control": control, "keep_norm": True},
    }


def compare_timesteps(
    model: Model,
    train: HStore | Trajectory,
    labels: Labels,
    *,
    runs: Trajectory,
    timesteps: Sequence[int],
    classifier: Classifier,
    distances: Sequence[float] = (3.0,),
    spaces: str = "x",
    eta: float = 1.0,
    seed: int = 0,
    progress: bool = True,
) -> pd.DataFrame:
    """The same edit, in standard deviations, with boundaries fitted and crossed at each timestep (E10).

    Parameters
    ----------
    model : Model
    train : HStore or Trajectory
        Inverted images with x and h recorded.
    labels : Series, or array of shape (n,), values 0 or 1
    runs : Trajectory
        Other images, inverted with x recorded.
    timesteps : sequence of int
    classifier
        As in `measure_crossings`.
    distances : sequence of float
    spaces : {"x", "h", "hx"}
    eta, seed
        As in `cross_boundary`.
    progress : bool

    Returns
    -------
    DataFrame
        `Crossings.summary` of every timestep, with `t` and the held-out accuracy of its boundaries, `accuracy_x` and
        so on.
    """
    attribute = name_of(labels, "label")
    parts = []
    for t in timesteps:
        found = {s: fit_boundary(train, labels, t=t, space=s) for s in spaces}
        given = {"found": {f"boundary_{s}": boundary for s, boundary in found.items()}}
        given["random"] = given["found"] | {"control": seed}
        measured = measure_crossings(
            model, runs, given, classifier=classifier, distances=distances, eta=eta, seed=seed, progress=progress
        )
        accuracies = {f"accuracy_{s}": boundary.accuracy.value for s, boundary in found.items()}
        parts.append(measured.summary(attribute).assign(t=t, **accuracies))
    return pd.concat(parts, ignore_index=True)


def control_both_signs(
    model: Model,
    seeds: Sequence[int],
    boundary_h: Boundary | None,
    boundary_x: Boundary | None = None,
    *,
    classifier: Classifier,
    attribute: str,
    steps: int = 50,
    distance: float = 3.0,
    eta: float = 1.0,
    real: torch.Tensor | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Generate with and without an attribute from the same x_T (E13, unconditional control).

    Parameters
    ----------
    model : Model
    seeds : sequence of int
    boundary_h, boundary_x : Boundary or None
    classifier
        As in `measure_crossings`.
    attribute : str
    steps : int, default 50
        Visited timesteps of the whole process; eta is 0 down to the boundary.
    distance : float, default 3
        In standard deviations, to both sides.
    eta : float, default 1
        From the boundary on.
    real : Tensor of shape (n, C, H, W), optional
        Real images to compare with (`kid`).
    progress : bool

    Returns
    -------
    DataFrame, one row a sign
        -1, 0 (no move) and 1: `share` of the images with the attribute and its 95% interval, `diversity` (root mean
        square pixel distance of pairs), `kid`, `n`.
    """
    run = sample(model, seeds, steps=steps, eta=0.0, progress=progress)
    rows = []
    for sign in (-1, 0, 1):
        to = {"distances": [0.0], "mode": "shift"} if sign == 0 else {"distances": [sign * distance]}
        images = cross_boundary(model, run, boundary_h, boundary_x, eta=eta, progress=progress, **to).images[:, 0]
        rate = share_of(float((classifier(images)[attribute] > 0.5).mean()), len(images))
        spread = images.flatten(1).double().var(dim=0).mean().sqrt().item() * np.sqrt(2.0)
        row = {"sign": sign, "share": rate.value, "low": rate.low, "high": rate.high, "diversity": spread}
        if real is not None:
            row["kid"] = kernel_distance(classifier.features(images), classifier.features(real))
        rows.append(row | {"n": rate.n})
    return pd.DataFrame(rows)


def compare_rules(
    model: Model,
    runs: Trajectory,
    boundary_h: Sequence[Boundary] | None,
    boundary_x: Sequence[Boundary] | None = None,
    *,
    distances: Sequence[float],
    classifier: Classifier,
    progress: bool = True,
    **options,
) -> pd.DataFrame:
    """Two or more attributes at once, by three rules, and each attribute by itself (E16).

    Parameters
    ----------
    model : Model
    runs : Trajectory
    boundary_h, boundary_x : sequence of m Boundary, or None
    distances : sequence of m float
        One an attribute, such as (3, -3).
    classifier
        As in `measure_crossings`.
    progress : bool
    **options
        Arguments of `cross_boundary`.

    Returns
    -------
    DataFrame
        One row a rule, "Name alone" among them, and attribute of the classifier: mean `change` of its score, and `n`.
    """
    named = boundary_x or boundary_h
    plain = cross_boundary(
        model, runs, boundary_h, boundary_x, distances=[0.0], mode="shift", progress=False, **options
    ).images[:, 0]
    before, variants = classifier(plain), {}
    for rule in ("sequential", "joint", "conditional"):
        variants[rule] = (boundary_h, boundary_x, [tuple(distances)], rule)
    for i, boundary in enumerate(named):
        alone = [None if found is None else [found[i]] for found in (boundary_h, boundary_x)]
        variants[f"{boundary.name} alone"] = (*alone, [distances[i]], "sequential")
    rows = []
    for name, (h, x, to, rule) in variants.items():
        images = cross_boundary(model, runs, h, x, distances=to, multi=rule, progress=progress, **options).images[:, 0]
        change = (classifier(images) - before).mean()
        rows += [{"rule": name, "attribute": a, "change": value, "n": len(images)} for a, value in change.items()]
    return pd.DataFrame(rows)


def random_examples(
    model: Model,
    images: torch.Tensor,
    boundary_h: Boundary | None,
    boundary_x: Boundary | None = None,
    *,
    steps: Sequence[int],
    n: int = 8,
    seed: int = 0,
    distances: Sequence[float] = (-3.0, 3.0),
    progress: bool = True,
    **options,
) -> EditGrid:
    """Edits of images that a seed chose, none left out (E18).

    Parameters
    ----------
    model : Model
    images : Tensor of shape (m, C, H, W), or LabelledImages
    boundary_h, boundary_x : Boundary or None
    steps : sequence of int
        Timesteps of the inversion, from the boundary's down.
    n : int, default 8
    seed : int
        Of the choice and the step noise.
    distances, **options
        Of `cross_boundary`.
    progress : bool

    Returns
    -------
    EditGrid
        Rows are labelled with the file names, or positions where there are none; the first column is the image itself.
    """
    chosen = np.sort(np.random.default_rng(seed).choice(len(images), size=min(n, len(images)), replace=False))
    run = invert(model, images[chosen], steps=steps, progress=progress)
    grid = cross_boundary(
        model, run, boundary_h, boundary_x, distances=distances, seed=seed, progress=progress, **options
    )
    names = getattr(images, "labels", None)
    return replace(
        grid,
        images=torch.cat([run.x0[:, None], grid.images], dim=1),
        row_labels=tuple(f"image {i}" for i in chosen) if names is None else tuple(names.index[chosen]),
        column_labels=("image", *grid.column_labels),
    )


def costs(
    model: Model,
    images: torch.Tensor,
    labels: Labels,
    *,
    t: int,
    steps: int = 20,
    strengths: int = 20,
    repeats: int = 1,
) -> pd.DataFrame:
    """What a boundary and a sweep of edits cost, against the way of the released code (E19).

    Parameters
    ----------
    model : Model
    images : Tensor of shape (n, C, H, W)
    labels : array of shape (n,), values 0 or 1
    t : int
    steps : int, default 20
        Timesteps from t down to 0, for inversion and decoding.
    strengths : int, default 20
        Distances of the sweep of one image.
    repeats : int, default 1
        The median is taken.

    Returns
    -------
    DataFrame, one row a task
        `task`, `seconds`, and `passes` of one image through the U-Net; 0 where there are none.
    """
    visited = np.linspace(t, 0, steps).round().astype(int).tolist()
    rows, results = [], {}

    def timed(task: str, passes: int, call) -> None:
        taken = []
        for _ in range(repeats):
            start = time.perf_counter()
            results[task] = call()
            taken.append(time.perf_counter() - start)
        rows.append({"task": task, "seconds": float(np.median(taken)), "passes": passes})

    n = len(images)
    timed("inversion", n * steps, lambda: invert(model, images, steps=visited, record_h=True, progress=False))
    run = results["inversion"]
    x = run.x_at(t).flatten(1).numpy()
    timed("boundary", 0, lambda: fit_boundary(x, labels, t=t, space="x"))
    timed("boundary, SVC on the samples", 0, lambda: SVC(kernel="linear").fit(x.astype(np.float64), labels))
    boundary = fit_boundary(run, labels, t=t, space="x")
    distances = np.linspace(-3, 3, strengths)
    cells = strengths * steps
    sweep = {"boundary_x": boundary, "progress": False}
    timed("sweep", cells, lambda: cross_boundary(model, run[0], distances=distances, **sweep))
    timed(
        "sweep, one by one",
        cells,
        lambda: [cross_boundary(model, run[0], distances=[d], **sweep) for d in distances],
    )
    return pd.DataFrame(rows)


def reconstruction_over_steps(
    model: Model, images: torch.Tensor, *, steps: Sequence[int] = (10, 20, 50), t: int | None = None
) -> pd.DataFrame:
    """Round trip of DDIM inversion and decoding at eta 0 (E20).

    Parameters
    ----------
    model : Model
    images : Tensor of shape (n, C, H, W)
    steps : sequence of int
        Numbers of timesteps from t (or from the noisiest) to 0.
    t : int, optional
        Where the inversion ends; by default at T - 1.

    Returns
    -------
    DataFrame, one row a number of steps
        `steps`, median `psnr` (dB) and its quartiles `low`, `high`, `n`.
    """
    top = model.schedule.T - 1 if t is None else t
    rows = []
    for count in steps:
        visited = np.linspace(top, 0, count).round().astype(int).tolist()
        run = invert(model, images, steps=visited, progress=False)
        psnr = peak_signal_to_noise(run.x0.numpy(), replay(run, progress=False).x0.numpy())
        low, middle, high = np.quantile(psnr, (0.25, 0.5, 0.75))
        rows.append({"steps": count, "psnr": middle, "low": low, "high": high, "n": len(images)})
    return pd.DataFrame(rows)


def compare_defects(
    model: Model,
    train: HStore | Trajectory,
    labels: Labels,
    *,
    runs: Trajectory,
    t: int,
    other_t: int,
    classifier: Classifier,
    distance: float = 3.0,
    eta: float = 1.0,
    seed: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Which defects of the released code of Zhu et al. matter: the same edit with each of them (E21).

    Parameters
    ----------
    model : Model
    train : HStore or Trajectory
        Inverted images with x and h recorded at t and at the next cleaner timestep of `runs`.
    labels : Series, or array of shape (n,), values 0 or 1
    runs : Trajectory
        Other images, inverted with x recorded.
    t : int
        Timestep of the boundary and of the edit.
    other_t : int
        The timestep that is edited at instead, with the boundaries of t.
    classifier
        As in `measure_crossings`.
    distance : float, default 3
        In standard deviations.
    eta, seed
        As in `cross_boundary`.
    progress : bool

    Returns
    -------
    DataFrame
        `Crossings.summary`, one row a variant: "clean"; "lagged h" and "stale h"; "no intercept"; "h not normalised"
        (the normal of h has its fitted length, as in the unconditional edits of that code); "boundary of another t";
        "h ignored" (its learned-variance networks); and "as released", lagged and stale h without intercepts.
    """
    visited = runs.timesteps
    cleaner = visited[visited.index(t) + 1]
    h, x = (fit_boundary(train, labels, t=t, space=space) for space in "hx")
    lagged = fit_boundary(train, labels, t=cleaner, space="h")
    own = {"distances": [distance], "eta": eta, "seed": seed}
    both = own | {"boundary_h": h, "boundary_x": x}
    with torch.inference_mode():
        plain_h = model.encode(runs.x_at(t).to(model.device), t).h.cpu()
    length = h.extras["weight_norm"]
    bent = (distance * h.sigma - length * h.distance(plain_h)) * length
    straight = distance * x.sigma - x.distance(runs.x_at(t))
    lengths = {"h": bent[:, None, None], "x": straight[:, None, None]}
    variants = {
        "clean": both,
        "lagged h": both | {"boundary_h": lagged, "h_align": "lagged"},
        "stale h": both | {"h_policy": "stale"},
        "no intercept": both | {"legacy_origin": True},
        "h not normalised": both | {"distances": lengths, "mode": "shift", "unit": "distance"},
        "boundary of another t": both | {"boundary_h": replace(h, t=other_t), "boundary_x": replace(x, t=other_t)},
        "h ignored": own | {"boundary_x": x},
        "as released": both | {"boundary_h": lagged, "h_align": "lagged", "h_policy": "stale", "legacy_origin": True},
    }
    measured = measure_crossings(model, runs, variants, classifier=classifier, distances=[distance], progress=progress)
    return measured.summary(name_of(labels, "label"))
