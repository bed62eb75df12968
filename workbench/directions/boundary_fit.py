"""Fitting boundaries between samples with and without an attribute (Zhu et al. 2023, boundary search)."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pandas as pd
import torch

from workbench.analysis.probes import (
    Span,
    balanced_weight,
    class_separation,
    expected_accuracy,
    fit_probe,
    folds_of,
    samples_needed,
)
from workbench.analysis.samples import Labels, check_classes, check_table, digest_of, matched_column, name_of
from workbench.directions.boundary import Boundary, Samples, SamplesAt, held_out, samples_at
from workbench.io import one_of

METHODS = ("svm", "mean", "lda", "logistic")


def fit_boundary(
    source: Samples | SamplesAt,
    labels: Labels,
    *,
    t: int,
    space: str = "h",
    method: str = "svm",
    C: float = 1.0,
    balance: bool = False,
    cv: int = 5,
    seed: int = 0,
    wanted: float | None = None,
    name: str | None = None,
) -> Boundary:
    """Fit the hyperplane between the samples with and without an attribute (Zhu et al. 2023, boundary search).

    "svm" is their linear support vector machine: `SVC(kernel="linear", C=C)`, fitted through the inner products. With
    fewer samples than dimensions the classes are separable, the margin is hard and a larger C changes nothing.
    "mean" takes the difference of the class means as its normal and puts the boundary halfway between them; the squared
    lengths of the means omit each sample's product with itself, which would move the boundary towards the larger class.
    "lda" is Fisher's discriminant with Ledoit-Wolf shrinkage, "logistic" is logistic regression; both work in the
    samples' principal components, "logistic" with the first scaled to variance 1. With many samples "svm", "lda" and
    "logistic" separate classes best, along the least noisy axes; "mean" points along the largest difference, which is
    the better direction for editing.

    Means, deviations and accuracies come from cross-validation: each sample is measured against a boundary fitted
    without it. For a separate test set see `Boundary.measured`.

    Parameters
    ----------
    source : HStore, Trajectory with records, or array of shape (n, ...)
        The samples. With an array, neither model nor timestep can be checked.
    labels : Series, or array of shape (n,), values 0 or 1
        A Series is matched by its index: the seeds of the samples, or the file names of inverted images in a store. An
        array, or a Series with index 0..n-1 that are not the seeds, follows the order of the samples.
    t : int
        Timestep; the paper's mixing step.
    space : {"h", "x"}
    method : {"svm", "mean", "lda", "logistic"}
    C : float, default 1
        For "svm" and "logistic": inverse strength of the regularisation.
    balance : bool, default False
        Give both classes the same total weight in the fit, and put the boundary halfway between the means of their
        held-out samples. With a hard margin the weights change nothing, and almost all new samples of a rare class fall
        on the wrong side.
    cv : int, default 5
        Number of folds, at most the number of samples in the smaller class.
    seed : int, default 0
        Seed of the folds.
    wanted : float in (0.5, 1), optional
        Warn if the held-out accuracy stays below, with the number of samples needed by `expected_accuracy`.
    name : str, optional
        By default the name of the Series.

    Returns
    -------
    Boundary

    Raises
    ------
    ValueError
        If the timestep was not visited (the message names the nearest two) or not recorded, the method or space is
        unknown, or labels differ from the samples in length or index, are missing, not 0 or 1, or have fewer than 3
        samples of a class.
    """
    one_of("method", method, METHODS)
    if cv < 2 or not C > 0:
        raise ValueError(f"cv is {cv} and C is {C}; there are 2 folds or more, and C is above 0")
    if wanted is not None and not 0.5 < wanted < 1.0:
        raise ValueError(f"wanted is {wanted}; give an accuracy between 0.5 and 1")
    name, samples = name or name_of(labels, "label"), samples_at(source, t, space)
    y = check_classes(matched_column(samples, labels, f"the labels {name!r}"), name)
    positives, negatives = int(y.sum()), int((~y).sum())
    if min(positives, negatives) < 3:
        sizes = f"{positives} positives and {negatives} negatives"
        raise ValueError(f"{name!r} has {sizes}; a boundary needs at least 3 of each")
    span = samples.span
    probe = _probe(span, y, np.arange(len(y)), method, C, balance)
    normal = sum(a * row.astype(np.float64) for a, row in zip(probe.a, samples.values, strict=True) if a)
    length = float(np.linalg.norm(normal))
    if not length > 0.0:
        raise ValueError(f"the classes of {name!r} have the same mean; there is no boundary between them")
    distances, middle = _cross_validated(span, y, method, C, balance, cv, seed)
    separation, d = class_separation(span.products, y)
    settings = {"C": C, "balance": balance, "cv": cv, "seed": seed}
    counts = {"positives": positives, "negatives": negatives, "labels": digest_of(y)}
    found = Boundary(
        normal=torch.from_numpy(normal / length).view(samples.shape),
        intercept=(probe.b - float(normal @ samples.mean)) / length - middle,
        t=int(t),
        space=space,
        name=name,
        provenance={**samples.origin, "method": method, "parameters": settings | counts},
        **held_out(distances, y, cross_validated=True),
        extras={"weight_norm": length, "class_distance": separation, "dimensions": d},
    )
    if wanted is not None and found.accuracy.value < wanted:
        _warn(found, wanted)
    return found


def fit_boundaries(
    source: Samples, labels: pd.DataFrame, *, t: int, space: str = "h", **options: object
) -> dict[str, Boundary]:
    """Fit boundaries of many attributes as `fit_boundary` does, from one matrix of inner products.

    Parameters
    ----------
    source : HStore, Trajectory with records, or array of shape (n, ...)
    labels : DataFrame of shape (n, attributes), values 0 or 1
        Matched by its index, as in `fit_boundary`.
    t : int
    space : {"h", "x"}
    **options
        Other options of `fit_boundary`, except `name`.

    Returns
    -------
    dict of attribute -> Boundary

    Raises
    ------
    ValueError
        As `fit_boundary`, naming the attribute.
    """
    check_table(labels, "fit_boundaries")
    samples = samples_at(source, t, space)
    return {
        str(name): fit_boundary(samples, labels[name], t=t, space=space, name=str(name), **options) for name in labels
    }


def _probe(span: Span, y: np.ndarray, rows: np.ndarray, method: str, C: float, balance: bool):
    """The probe of some of the samples; balanced, both classes have the same total weight."""
    weight = None
    if balance:
        weight = np.zeros(len(y))
        weight[rows] = balanced_weight(np.ones(len(rows)), y[rows])
    return fit_probe(span, y, method, rows=rows, weight=weight, C=C)


def _cross_validated(
    span: Span, y: np.ndarray, method: str, C: float, balance: bool, cv: int, seed: int
) -> tuple[np.ndarray, float]:
    """Signed distances from the boundaries that are fitted to the other folds, (n,), and what was taken off.

    Balanced, the middle of the classes' means is taken off: in the distances of a fold, that of the other folds.
    """
    splits = folds_of(y, min(cv, int(y.sum()), int((~y).sum())), seed)
    distances = np.empty(len(y))
    for train, test in splits:
        probe = _probe(span, y, train, method, C, balance)
        distances[test] = (span.products[test] @ probe.a + probe.b) / probe.length(span.products)
    if not balance:
        return distances, 0.0
    middles = np.empty(len(y))
    for train, test in splits:
        middles[test] = _middle(distances[train], y[train])
    return distances - middles, _middle(distances, y)


def _middle(distances: np.ndarray, y: np.ndarray) -> float:
    return float(distances[y].mean() + distances[~y].mean()) / 2


def _warn(boundary: Boundary, wanted: float) -> None:
    """Say how many samples the wanted accuracy takes by the sample-size law."""
    delta, d = boundary.extras["class_distance"], boundary.extras["dimensions"]
    needed = samples_needed(wanted, delta=delta, d=d)
    law = f"the sample-size law asks for about {needed:.0f}" if needed < math.inf else "the law says no number does"
    if needed <= boundary.accuracy.n:
        law = f"the sample-size law expects {expected_accuracy(delta, d, boundary.accuracy.n):.0%} from that many"
    accuracy = f"has a held-out accuracy of {boundary.accuracy.value:.1%}, below the {wanted:.0%} asked for"
    warnings.warn(f"{boundary.name} in {boundary.space} at t={boundary.t} {accuracy}; {law}", stacklevel=3)
