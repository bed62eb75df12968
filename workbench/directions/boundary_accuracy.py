"""Held-out accuracy of boundaries by timestep and by number of labelled samples, with controls."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from workbench.analysis.probes import expected_accuracy
from workbench.analysis.samples import Labels, matched, matched_column, name_of
from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.noise import FORWARD, normal
from workbench.directions.boundary import Boundary
from workbench.directions.boundary_fit import fit_boundaries, fit_boundary
from workbench.hspace.store import HStore


def accuracy_over_time(
    model: Model,
    store: HStore,
    labels: pd.DataFrame | pd.Series,
    *,
    timesteps: Sequence[int] | None = None,
    balance: bool = False,
    cv: int = 5,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of boundaries in x_t and h_t at every timestep, with controls (figure `zhu-e5`).

    Parameters
    ----------
    model : Model
        For the noise schedule, and the latents of a latent model.
    store : HStore
        With x and images.
    labels : DataFrame or Series, values 0 or 1
        Matched as in `fit_boundary`.
    timesteps : sequence of int, optional
        By default all timesteps of the store.
    balance, cv, seed
        As in `fit_boundary`.

    Returns
    -------
    DataFrame
        One row per timestep, attribute and `samples`: "x", "h"; "forward-diffused" images, with noise independent of
        them; "random labels" of x, which must be at chance; and "pixels", the clean images at t = -1. Columns are
        `accuracy`, its 95% interval `low`, `high`, `balanced_accuracy`, `n`, and `law`: the `expected_accuracy` of a
        difference of means fitted on all folds but one, from the distance of the classes and their noise. A probe that
        learns the noise's covariance can do better.
    """
    refuse_other_model(str(store.path), store.provenance["model"], model.provenance(), tap=False)
    table = matched(store, labels, "the labels")
    table = table.to_frame() if isinstance(table, pd.Series) else table
    shuffled = table.sample(frac=1, random_state=seed).reset_index(drop=True)
    images = torch.from_numpy(store.images[:])
    x0 = model.to_latents(images)
    options = {"balance": balance, "cv": cv, "seed": seed}
    rows = _accuracies(images.numpy(), table, t=-1, samples="pixels", **options)
    for t in store.timesteps if timesteps is None else timesteps:
        x = store.at(t, space="x")
        noise = normal(range(seed, seed + len(x0)), model.x_shape, stream=FORWARD, t=t)
        rows += _accuracies(x, table, t=t, samples="x", **options)
        rows += _accuracies(store.at(t), table, t=t, samples="h", **options)
        diffused = model.schedule.add_noise(x0, noise, t).numpy()
        rows += _accuracies(diffused, table, t=t, samples="forward-diffused", **options)
        rows += _accuracies(x, shuffled, t=t, samples="random labels", **options)
    return pd.DataFrame(rows)


def _accuracies(values: np.ndarray, labels: pd.DataFrame, *, t: int, samples: str, cv: int, **options) -> list[dict]:
    rows = []
    for name, boundary in fit_boundaries(values, labels, t=t, cv=cv, **options).items():
        fitted = boundary.balanced_accuracy.n * (1 - 1 / cv)
        law = expected_accuracy(boundary.extras["class_distance"], boundary.extras["dimensions"], fitted)
        rows.append({"t": t, "attribute": name, "samples": samples, **_held_out(boundary), "law": law})
    return rows


def _held_out(boundary: Boundary) -> dict:
    accuracy = boundary.accuracy
    return {
        "accuracy": accuracy.value,
        "low": accuracy.low,
        "high": accuracy.high,
        "balanced_accuracy": boundary.balanced_accuracy.value,
        "n": accuracy.n,
    }


def accuracy_over_samples(
    store: HStore,
    labels: Labels,
    *,
    t: int,
    counts: Sequence[int] = (20, 50, 100, 200),
    methods: Sequence[str] = ("svm", "mean", "lda"),
    draws: int = 3,
    seed: int = 0,
) -> pd.DataFrame:
    """Accuracy of boundaries in x_t against the number of labelled images (figure `zhu-e6`).

    Half of each class's samples are held out, the same ones for all boundaries.

    Parameters
    ----------
    store : HStore
    labels : Series, or array of shape (n,), values 0 or 1
    t : int
    counts : sequence of int
        Numbers of samples to fit, stratified by class with at least 3 of each; the number of all samples not held out
        is added.
    methods : sequence of str
    draws : int, default 3
        Draws for every number of samples.
    seed : int

    Returns
    -------
    DataFrame
        One row per number of samples, method and draw: `count`, `method`, `draw`, `accuracy` with `low`, `high` and
        `n`, `cosine` to the normal that the same method finds from all samples, and `law`.
    """
    y = matched_column(store, labels, "the labels").to_numpy()
    values, name = store.at(t, space="x"), name_of(labels, "label")
    rng = np.random.default_rng(seed)
    halves = [np.array_split(rng.permutation(np.flatnonzero(y == side)), 2) for side in (0, 1)]
    test, pool = (np.concatenate(half) for half in zip(*halves, strict=True))
    rows = []
    for method in methods:
        options = {"t": t, "space": "x", "method": method, "cv": 2, "name": name}
        whole = fit_boundary(values[pool], y[pool], **options)
        delta, d = whole.extras["class_distance"], whole.extras["dimensions"]
        for count in [*(c for c in counts if c < len(pool)), len(pool)]:
            for draw in range(draws if count < len(pool) else 1):
                chosen = _drawn(pool, y, count, np.random.default_rng([seed, draw]))
                boundary = fit_boundary(values[chosen], y[chosen], **options)
                measured = boundary.measured(values[test], y[test])
                effective = 4 / (1 / y[chosen].sum() + 1 / (1 - y[chosen]).sum())
                law = expected_accuracy(delta, d, effective)
                key = {"count": count, "method": method, "draw": draw}
                rows.append(key | _held_out(measured) | {"cosine": boundary.cosine(whole), "law": law})
    return pd.DataFrame(rows)


def _drawn(pool: np.ndarray, y: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Some of the pool, with both classes in their shares."""
    with_it = int(np.clip(round(count * y[pool].mean()), 3, count - 3))
    sides = [rng.permutation(pool[y[pool] == side]) for side in (0, 1)]
    return np.concatenate([sides[0][: count - with_it], sides[1][:with_it]])
