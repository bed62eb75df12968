"""Spectra of images, and the radius that DDIM inversion gives them in theory."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
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


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Second moment of images along orthogonal directions.

    Attributes
    ----------
    frequency : ndarray of shape (k,)
        Radial frequency in cycles an image.
    power : ndarray of shape (k,)
        Mean square along a direction of that frequency, s^2.
    weight : ndarray of shape (k,)
        Number of directions of that frequency.
    """

    frequency: np.ndarray = field(repr=False)
    power: np.ndarray = field(repr=False)
    weight: np.ndarray = field(repr=False)

    @property
    def mean_square(self) -> float:
        """m2, the mean square of a pixel (Parseval)."""
        return float(self.weight @ self.power / self.weight.sum())

    def frame(self) -> pd.DataFrame:
        """One row per frequency: `frequency`, `power`, `weight`."""
        return pd.DataFrame({"frequency": self.frequency, "power": self.power, "weight": self.weight})


def data_spectrum(images: Any) -> Spectrum:
    """Radial power spectrum of images: power at every frequency, mean over samples and channels.

    It takes images as if their statistics were the same at every pixel, and channels as unrelated.

    Parameters
    ----------
    images : array of shape (n, C, H, W), values in [-1, 1]

    Returns
    -------
    Spectrum
        Frequencies are rounded to integers, in cycles an image along the longer side; the transform is orthonormal.

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
    weight = np.bincount(rings).astype(float)
    total = np.bincount(rings, weights=power.ravel() / len(images))
    there = weight > 0
    return Spectrum(np.flatnonzero(there).astype(float), total[there] / weight[there], weight[there])


@dataclass(frozen=True, eq=False)
class LinearGaussianInversion:
    """Result of DDIM inversion for Gaussian images and an exact network.

    Attributes
    ----------
    timesteps : tuple of int
        Ascending.
    ratios : ndarray of shape (steps,)
        Root-mean-square radius of the inverted ensemble over that of the forward process' marginal, r(t).
    variance : ndarray of shape (steps, k)
        Of the inverted ensemble along every direction of the spectrum.
    """

    timesteps: tuple[int, ...]
    ratios: np.ndarray = field(repr=False)
    variance: np.ndarray = field(repr=False)

    @property
    def ratio(self) -> float:
        """The ratio at the last timestep."""
        return float(self.ratios[-1])


def linear_gaussian_inversion(
    spectrum: Spectrum,
    alpha_bars: Sequence[float],
    timesteps: Sequence[int],
    *,
    start: str = "first",
    noise_repair: bool = False,
    iterations: int = 0,
    mean_square: float | None = None,
) -> LinearGaussianInversion:
    """Radius of DDIM-inverted images for Gaussian data and exact eps, by recursion.

    Where the data has variance s^2 along a direction, the exact eps at noise level a = alpha_bar is linear,
    eps = sqrt(1-a) / (a s^2 + 1 - a) x, so a step a -> b multiplies x along it by

        sqrt(b/a) + (sqrt(1-b) - sqrt(b/a) sqrt(1-a)) sqrt(1-a) / (a s^2 + 1 - a)        (DDIM eq. 13)

    Two causes make the result shorter than r(t): Euler's error, which goes with more steps and is worst along
    directions of low variance; and that a clean image is passed off as one with the noise of the first timestep, which
    no number of steps mends, but `noise_repair` does.

    Parameters
    ----------
    spectrum : Spectrum
        Second moments of the data; see `data_spectrum`.
    alpha_bars : array of shape (T,)
        alpha_bar at every timestep, such as `model.schedule.alpha_bars`.
    timesteps : sequence of int
        Visited timesteps, in either direction.
    start : {"first", "clean"}
        "first": the clean image is taken as x at the first timestep (BoundaryDiffusion's code). "clean": it is taken
        as it is, alpha_bar 1, and one more step leads to the first timestep, with eps of timestep 0 (the workbench's
        `invert`).
    noise_repair : bool, default False
        Start from sqrt(a) x_0 + sqrt(1-a) N(0, I) instead, with the alpha_bar of the first timestep, as
        `invert(noise_repair=True)` does; only with start "first".
    iterations : int, default 0
        Fixed-point iterations a step: eps is taken at the step's end instead, as `invert(method="fixed-point")`.
    mean_square : float, optional
        m2 of r(t); by default the spectrum's.

    Returns
    -------
    LinearGaussianInversion

    Raises
    ------
    ValueError
        If a timestep is outside of the schedule, `start` is not known, or noise is to be repaired in a clean start.
    """
    alpha_bars = np.asarray(alpha_bars, dtype=np.float64)
    visited = tuple(sorted({int(t) for t in timesteps}))
    if not visited or visited[0] < 0 or visited[-1] >= len(alpha_bars):
        raise ValueError(f"timesteps must lie in 0..{len(alpha_bars) - 1}, not {list(visited)[:8]}")
    one_of("start", start, ("first", "clean"))
    if noise_repair and start == "clean":
        raise ValueError('start "clean" has no noise to repair; use start="first" with noise_repair')
    s2 = np.asarray(spectrum.power, dtype=np.float64)
    weight = spectrum.weight / spectrum.weight.sum()
    mean_square = spectrum.mean_square if mean_square is None else mean_square

    def eps_gain(a: float) -> np.ndarray:
        return np.sqrt(1.0 - a) / (a * s2 + 1.0 - a)

    levels = alpha_bars[list(visited)]
    variance = levels[0] * s2 + 1.0 - levels[0] if noise_repair else s2
    steps = [(a, a, b) for a, b in itertools.pairwise(levels)]
    if start == "clean":
        steps.insert(0, (1.0, alpha_bars[0], levels[0]))
    variances = [variance]
    for a, a_eps, b in steps:
        scale = np.sqrt(b / a)
        slope = np.sqrt(1.0 - b) - scale * np.sqrt(1.0 - a)
        gain = scale + slope * eps_gain(a_eps)
        for _ in range(iterations):
            gain = scale + slope * eps_gain(b) * gain
        variances.append(variances[-1] * gain**2)
    variances = np.stack(variances[-len(visited) :])
    marginal = levels * mean_square + 1.0 - levels
    return LinearGaussianInversion(visited, np.sqrt(variances @ weight / marginal), variances)
