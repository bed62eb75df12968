"""Spectra of images, and the radius that DDIM inversion gives them in theory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from workbench.analysis.samples import check_samples
from workbench.io import one_of


def marginal_radius(alpha_bar: float, *, mean_square: float, d: int) -> float:
    """Radius r(t) of the forward process' marginal: sqrt(d (alpha_bar m2 + 1 - alpha_bar)).

    Parameters
    ----------
    alpha_bar : float in [0, 1]
        At timestep t; 0 gives sqrt(d).
    mean_square : float
        m2, mean of the squared values of the clean images in [-1, 1].
    d : int
        Number of values of an image.

    Returns
    -------
    float
    """
    return float(np.sqrt(d * (alpha_bar * mean_square + 1.0 - alpha_bar)))


def data_spectrum(images: Any) -> pd.DataFrame:
    """Radial power spectrum of images: power at every frequency, mean over samples and channels.

    It takes images as if their statistics were the same at every pixel, and channels as unrelated.

    Parameters
    ----------
    images : array of shape (n, C, H, W), values in [-1, 1]

    Returns
    -------
    DataFrame
        Indexed by `frequency`, in cycles an image along the longer side, rounded to integers. `power` is the mean
        square s^2 along a direction of that frequency (the transform is orthonormal), `weight` their number.

    Raises
    ------
    ValueError
        If the array is not image-shaped, or a value is not finite.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"the images have shape {images.shape}; a spectrum needs (n, C, H, W)")
    check_samples(images, fewest=1)
    height, width = images.shape[2:]
    power = np.zeros((height, width))
    for image in images:
        power += (np.abs(np.fft.fft2(image.astype(np.float64), norm="ortho")) ** 2).mean(axis=0)
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) * max(height, width)
    rings = np.rint(frequency).astype(int).ravel()
    directions = pd.DataFrame({"power": power.ravel() / len(images), "weight": 1.0})
    return directions.groupby(rings).agg({"power": "mean", "weight": "sum"}).rename_axis("frequency")


def linear_gaussian_inversion(
    spectrum: pd.DataFrame, alpha_bars: Sequence[float], timesteps: Sequence[int], *, start: str = "first"
) -> pd.DataFrame:
    """Variance of DDIM-inverted images for Gaussian data and exact eps, by recursion.

    Where the data has variance s^2 along a direction, the exact eps at noise level a = alpha_bar is linear,
    eps = sqrt(1-a) / (a s^2 + 1 - a) x, so a step a -> b multiplies x along it by

        sqrt(b/a) + (sqrt(1-b) - sqrt(b/a) sqrt(1-a)) sqrt(1-a) / (a s^2 + 1 - a)        (DDIM eq. 13)

    Two causes make the radius shorter than r(t) (see `radius_ratio`): Euler's error, which goes with more steps and is
    worst along directions of low variance; and that a clean image is passed off as one with the noise of the first
    timestep, which no number of steps mends. Starts of another variance v, such as the a s^2 + 1 - a of
    `invert(noise_repair=True)`, end with v / s^2 times the result.

    Parameters
    ----------
    spectrum : DataFrame
        Second moments of the data; see `data_spectrum`.
    alpha_bars : array of shape (T,)
        alpha_bar at every timestep, such as `model.schedule.alpha_bars`.
    timesteps : sequence of int
        Visited timesteps, in either direction.
    start : {"first", "clean"}
        "first": the clean image is taken as x at the first timestep (BoundaryDiffusion's code). "clean": it is taken
        as it is, alpha_bar 1, and one more step leads to the first timestep, with eps of timestep 0 (the workbench's
        `invert`).

    Returns
    -------
    DataFrame
        Of the inverted ensemble along a direction of each frequency of the spectrum (columns), at every visited
        timestep (rows, ascending).

    Raises
    ------
    ValueError
        If a timestep is outside of the schedule, or `start` is not known.
    """
    alpha_bars = np.asarray(alpha_bars, dtype=np.float64)
    visited = sorted({int(t) for t in timesteps})
    if not visited or visited[0] < 0 or visited[-1] >= len(alpha_bars):
        raise ValueError(f"timesteps must lie in 0..{len(alpha_bars) - 1}, not {visited[:8]}")
    one_of("start", start, ("first", "clean"))
    s2, levels = spectrum["power"].to_numpy(dtype=np.float64), alpha_bars[visited]
    steps = [(a, a, b) for a, b in itertools.pairwise(levels)]
    if start == "clean":
        steps.insert(0, (1.0, alpha_bars[0], levels[0]))
    variances = [s2]
    for a, a_eps, b in steps:
        scale = np.sqrt(b / a)
        slope = np.sqrt(1.0 - b) - scale * np.sqrt(1.0 - a)
        gain = scale + slope * np.sqrt(1.0 - a_eps) / (a_eps * s2 + 1.0 - a_eps)
        variances.append(variances[-1] * gain**2)
    timesteps = pd.Index(visited, name="t")
    return pd.DataFrame(variances[-len(visited) :], index=timesteps, columns=spectrum.index)


def radius_ratio(spectrum: pd.DataFrame, alpha_bars: Sequence[float], variance: pd.DataFrame) -> pd.Series:
    """Root mean square radius of an inverted ensemble over that of the forward process' marginal, r(t).

    Parameters
    ----------
    spectrum : DataFrame
        Of the data; its mean square is that of r(t).
    alpha_bars : array of shape (T,)
    variance : DataFrame
        See `linear_gaussian_inversion`.

    Returns
    -------
    Series
        Indexed by timestep.
    """
    weight = spectrum["weight"] / spectrum["weight"].sum()
    levels = np.asarray(alpha_bars, dtype=np.float64)[variance.index]
    return np.sqrt(variance @ weight / (levels * (weight @ spectrum["power"]) + 1.0 - levels))
