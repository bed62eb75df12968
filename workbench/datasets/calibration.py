"""How far a classifier can be trusted: accuracy and reliability curves on labelled images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages


def evaluate_classifier(
    classifier: Classifier, images: LabelledImages, *, sizes: Sequence[int] | None = None, progress: bool = True
) -> pd.DataFrame:
    """Accuracy and calibration on labelled images that the classifier has not seen.

    Returns
    -------
    pandas.DataFrame
        One row an attribute that is labelled, one level of columns a size that the images are shown at, in pixels of
        the shorter side (default: their own): n (labelled images), frequency (of 1), accuracy (share of images on the
        right side of .5) and ece (expected calibration error).
    """
    known = [name for name in classifier.attributes if name in images.names]
    if not known:
        raise ValueError(f"the images are labelled with {', '.join(images.names) or 'nothing'}; {classifier} needs one")
    labels = images.labels[known]
    tables = {}
    for size in sizes or (min(images.image_shape[1:]),):
        probabilities = classifier(images.at_side(size), progress=progress)[known]
        right = ((probabilities > 0.5) == (labels > 0.5)).where(labels.notna())
        columns = {"n": labels.notna().sum(), "frequency": labels.mean(), "accuracy": right.mean().astype(float)}
        columns["ece"] = expected_calibration_error(calibration(probabilities, labels))
        tables[size] = pd.DataFrame(columns, index=known)
    return pd.concat(tables, axis=1, names=["size", None])


def calibration(
    probabilities: pd.DataFrame | pd.Series, labels: pd.DataFrame | pd.Series, *, bins: int = 10
) -> pd.DataFrame:
    """Reliability curve: how often an attribute is there where its probability is said to be p.

    Parameters
    ----------
    probabilities : DataFrame or Series, values in [0, 1]
        A column an attribute.
    labels : DataFrame or Series of 0, 1 or NaN
        Of the same attributes (a table may have more) and the same images, which are matched by index. Images without
        a label are left out.
    bins : int
        Number of bins of equal width; p = 1 is in the last.

    Returns
    -------
    pandas.DataFrame
        Index: attribute and bin (0-based); columns lower, upper (edges), n (images in the bin), predicted (their mean
        probability) and observed (share with the attribute), both NaN where n is 0.
    """
    if bins < 1:
        raise ValueError(f"bins is {bins}; give 1 or more")
    if isinstance(probabilities, pd.Series):
        name = "attribute" if probabilities.name is None else probabilities.name
        probabilities, labels = probabilities.to_frame(name), labels.to_frame(name)
    unlabelled = [str(name) for name in probabilities if name not in labels]
    if unlabelled:
        raise ValueError(f"there are no labels for {', '.join(unlabelled)}; select columns that both tables have")
    if not labels.index.is_unique or not labels.index.sort_values().equals(probabilities.index.sort_values()):
        raise ValueError(
            f"the {len(labels)} labels and {len(probabilities)} probabilities are of different images: their indexes "
            "differ; give both with file names, or both numbered"
        )
    labels = labels.loc[probabilities.index, list(probabilities)].astype(float)
    if not ((probabilities >= 0) & (probabilities <= 1)).all(axis=None):
        raise ValueError("probabilities must be numbers from 0 to 1; give classifier(images), not its scores")
    if not (labels.isin([0, 1]) | labels.isna()).all(axis=None):
        raise ValueError("labels must be 0, 1 or missing")
    curves = {name: _curve(probabilities[name], labels[name], bins) for name in probabilities}
    return pd.concat(curves, names=["attribute"])


def expected_calibration_error(curve: pd.DataFrame) -> pd.Series:
    """Mean distance between `calibration` curves and the diagonal, weighted by images (Guo et al. 2017, eq. 3)."""
    distance = (curve["predicted"] - curve["observed"]).abs() * curve["n"]
    by_attribute = pd.DataFrame({"distance": distance, "n": curve["n"]}).groupby(level="attribute", sort=False).sum()
    return (by_attribute["distance"] / by_attribute["n"]).rename("ece")


def _curve(predicted: pd.Series, observed: pd.Series, bins: int) -> pd.DataFrame:
    labelled = observed.notna().to_numpy()
    predicted, observed = predicted.to_numpy(float)[labelled], observed.to_numpy(float)[labelled]
    bin_of = np.minimum((predicted * bins).astype(int), bins - 1)
    edges = np.linspace(0, 1, bins + 1)
    n = np.bincount(bin_of, minlength=bins)
    with np.errstate(invalid="ignore"):
        return pd.DataFrame(
            {
                "lower": edges[:-1],
                "upper": edges[1:],
                "n": n,
                "predicted": np.bincount(bin_of, predicted, bins) / n,
                "observed": np.bincount(bin_of, observed, bins) / n,
            },
            index=pd.RangeIndex(bins, name="bin"),
        )
