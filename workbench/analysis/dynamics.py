"""Probabilistic behaviour of x_t and h_t along the chain: shells, angles, spectra, inversion, steps, separability.

Ensembles are arrays of shape (n, ...), one row a sample. What spans several timesteps is a store (or anything else with
`timesteps` and `at(t)`), a mapping t -> array, or an iterable of (t, array) pairs, read one timestep at a time.

The ensembles to compare are *sampled* (from x_T ~ N(0, I)), *inverted* (DDIM inversion of images, whose result depends
on the number of steps) and *forward-diffused*; see Zhu et al. 2023 (BoundaryDiffusion) for the claims about them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from scipy import linalg, stats
from scipy.special import gammaln
from sklearn.metrics import confusion_matrix
from sklearn.model_selection import StratifiedKFold
from threadpoolctl import threadpool_limits

from workbench.analysis.geometry import check_labels, check_samples, distances_of, gram, over_timesteps, pairs_of
from workbench.analysis.intervals import share_of

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


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


def gaussian_reference(n: int, d: int) -> dict[str, float]:
    """What `latent_statistics` gives on average for n samples of N(0, I_d), d > 10 or so.

    Parameters
    ----------
    n : int
    d : int

    Returns
    -------
    dict of str -> float
        radius (exact: sqrt(2) Gamma((d+1)/2) / Gamma(d/2), about sqrt(d - 1/2)) and its sd (about 0.707, whatever d),
        distance (sqrt(2) times the radius, exact) and its sd (1), angle (90 degrees) and its sd
        (about 57.3 / sqrt(d) degrees), vertex_angle (60 degrees), centroid (sqrt(d / n)), autocorrelation (0),
        coordinate_mean (0) and coordinate_variance (1).
    """
    radius = float(np.sqrt(2.0) * np.exp(gammaln((d + 1) / 2) - gammaln(d / 2)))
    return {
        "radius": radius,
        "radius_sd": float(np.sqrt(d - radius**2)),
        "distance": float(np.sqrt(2.0) * radius),
        "distance_sd": float(np.sqrt(2.0 * (d - radius**2))),
        "angle": 90.0,
        "angle_sd": float(np.degrees(1.0 / np.sqrt(d))),
        "vertex_angle": 60.0,
        "centroid": float(np.sqrt(d / n)),
        "coordinate_mean": 0.0,
        "coordinate_variance": 1.0,
        "autocorrelation": 0.0,
    }


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Geometry and distribution of an ensemble of n points in d dimensions.

    Attributes
    ----------
    n, d : int
    radii : ndarray of shape (n,)
        Lengths of the samples.
    radius, radius_sd, radius_se : float
        Their mean, standard deviation and standard error of the mean.
    radius_quantiles : dict of float -> float
    reference_radius : float or None
        r(t), if given.
    distance, distance_sd, distance_se : float
        Of pairs. Standard errors of pair means are jackknifed over samples: pairs are not independent.
    angle, angle_sd, angle_se : float
        Between pairs, seen from the origin; degrees.
    vertex_angle, vertex_angle_sd : float
        At the first corner of random triples of samples; degrees.
    centroid : float
        Length of the mean sample.
    centroid_expected : float
        What it would be for independent samples around the origin: root mean square radius / sqrt(n).
    coordinate_mean, coordinate_variance : float
        Over all samples and coordinates.
    ks_coordinates, ks_projections : DataFrame
        Kolmogorov-Smirnov tests against N(0, 1) of random coordinates (`coordinate`) and of projections on random unit
        vectors (`projection`): `statistic` and `p`, corrected by Bonferroni.
    power : DataFrame or None
        Radial power spectrum of an image-shaped ensemble: `frequency`, `power` (1 at every frequency for N(0, I)),
        `weight`; see `data_spectrum`.
    autocorrelation : float or None
        Of neighbouring pixels (lag 1, mean of both directions), for an image-shaped ensemble.
    """

    n: int
    d: int
    radii: np.ndarray = field(repr=False)
    radius: float
    radius_sd: float
    radius_se: float
    radius_quantiles: dict[float, float]
    reference_radius: float | None
    distance: float
    distance_sd: float
    distance_se: float
    angle: float
    angle_sd: float
    angle_se: float
    vertex_angle: float
    vertex_angle_sd: float
    centroid: float
    centroid_expected: float
    coordinate_mean: float
    coordinate_variance: float
    ks_coordinates: pd.DataFrame = field(repr=False)
    ks_projections: pd.DataFrame = field(repr=False)
    power: pd.DataFrame | None = field(default=None, repr=False)
    autocorrelation: float | None = None

    @property
    def radius_ratio(self) -> float:
        """Mean radius over r(t), or over sqrt(d) where no reference was given."""
        return self.radius / (np.sqrt(self.d) if self.reference_radius is None else self.reference_radius)

    def row(self) -> dict[str, float]:
        """All that is one number, for a table with one row an ensemble."""
        names = ("n", "d", "radius", "radius_sd", "radius_se")
        row = {name: getattr(self, name) for name in names}
        row |= {f"radius_q{100 * q:02.0f}": value for q, value in self.radius_quantiles.items()}
        row |= {"sqrt_d": float(np.sqrt(self.d)), "radius_minus_sqrt_d": self.radius - float(np.sqrt(self.d))}
        if self.reference_radius is not None:
            row |= {
                "reference_radius": self.reference_radius,
                "radius_minus_reference": self.radius - self.reference_radius,
                "radius_ratio": self.radius_ratio,
            }
        names = ("distance", "distance_sd", "distance_se", "angle", "angle_sd", "angle_se", "vertex_angle")
        names += ("vertex_angle_sd", "centroid", "centroid_expected", "coordinate_mean", "coordinate_variance")
        row |= {name: getattr(self, name) for name in names}
        for kind, tests in (("coordinates", self.ks_coordinates), ("projections", self.ks_projections)):
            row |= {f"ks_{kind}": tests.statistic.mean(), f"ks_{kind}_p": tests.p.min()}
        return row if self.autocorrelation is None else row | {"autocorrelation": self.autocorrelation}

    def table(self) -> pd.DataFrame:
        """The numbers beside those of N(0, I_d): columns `value` and `gaussian`, one row a number."""
        reference = pd.Series(gaussian_reference(self.n, self.d))
        values = pd.Series(self.row()).reindex(reference.index).dropna()
        return pd.DataFrame({"value": values.astype(float), "gaussian": reference[values.index]})

    def __repr__(self) -> str:
        against = "" if self.reference_radius is None else f", r(t) {self.reference_radius:.2f}"
        return (
            f"LatentStatistics({self.n} x {self.d}: radius {self.radius:.2f} +- {self.radius_sd:.2f} "
            f"(sqrt(d) {np.sqrt(self.d):.2f}{against}), angle {self.angle:.2f} degrees, "
            f"centroid {self.centroid:.2f} (expected {self.centroid_expected:.2f}))"
        )


def latent_statistics(
    ensemble: Any,
    *,
    reference_radius: float | None = None,
    tests: int = 64,
    triples: int = 10_000,
    seed: int = 0,
) -> LatentStatistics:
    """Radii, distances, angles and normality of an ensemble of x_t or h_t.

    Parameters
    ----------
    ensemble : array of shape (n, d) or (n, C, H, W)
        At least 3 samples. An image-shaped one gets a power spectrum and the lag-1 autocorrelation too.
    reference_radius : float, optional
        r(t) to compare the radius with; see `marginal_radius`.
    tests : int, default 64
        Number of coordinates, and of projections, that are tested against N(0, 1); at most d.
    triples : int, default 10000
        Random triples of samples for the angle at a vertex.
    seed : int, default 0

    Returns
    -------
    LatentStatistics

    Raises
    ------
    ValueError
        If there are fewer than 3 samples, one is 0, or a value is not finite.
    """
    values = np.asarray(ensemble)
    x = check_samples(values, fewest=3)
    n, d = x.shape
    rng = np.random.default_rng(seed)
    products = gram(x, centred=False)
    radii = np.sqrt(np.diag(products))
    if (radii == 0).any():
        raise ValueError(f"sample {int(np.argmin(radii))} is 0 throughout; it has no angle, leave it out")
    distances = distances_of(products)
    angles = np.degrees(np.arccos(np.clip(products / np.outer(radii, radii), -1.0, 1.0)))
    distance, distance_sd, distance_se = _pair_statistics(distances)
    angle, angle_sd, angle_se = _pair_statistics(angles)
    vertex = _vertex_angles(products, triples, rng)
    mean = x.mean(axis=0, dtype=np.float64)
    image_shaped = values.ndim == 4
    return LatentStatistics(
        n=n,
        d=d,
        radii=radii,
        radius=float(radii.mean()),
        radius_sd=float(radii.std(ddof=1)),
        radius_se=float(radii.std(ddof=1) / np.sqrt(n)),
        radius_quantiles=dict(zip(QUANTILES, map(float, np.quantile(radii, QUANTILES)), strict=True)),
        reference_radius=None if reference_radius is None else float(reference_radius),
        distance=distance,
        distance_sd=distance_sd,
        distance_se=distance_se,
        angle=angle,
        angle_sd=angle_sd,
        angle_se=angle_se,
        vertex_angle=float(vertex.mean()),
        vertex_angle_sd=float(vertex.std(ddof=1)),
        centroid=float(np.linalg.norm(mean)),
        centroid_expected=float(np.sqrt((radii**2).mean() / n)),
        coordinate_mean=float(mean.mean()),
        coordinate_variance=float((radii**2).mean() / d - mean.mean() ** 2),
        ks_coordinates=_ks_coordinates(x, min(tests, d), rng),
        ks_projections=_ks_projections(x, min(tests, d), rng),
        power=data_spectrum(values).frame() if image_shaped else None,
        autocorrelation=_autocorrelation(values) if image_shaped else None,
    )


def _pair_statistics(pairs: np.ndarray) -> tuple[float, float, float]:
    """Mean, standard deviation and jackknife standard error of the mean over the pairs i < j of an (n, n) matrix."""
    n = len(pairs)
    above = pairs[np.triu_indices(n, k=1)]
    rows = pairs.sum(axis=1) - np.diag(pairs)
    without = (above.sum() - rows) / ((n - 1) * (n - 2) / 2)
    se = np.sqrt((n - 1) / n * ((without - without.mean()) ** 2).sum())
    return float(above.mean()), float(above.std(ddof=1)), float(se)


def _vertex_angles(products: np.ndarray, triples: int, rng: np.random.Generator) -> np.ndarray:
    """Angles at i between j - i and k - i, degrees, for random i, j, k that differ."""
    n = len(products)
    i = rng.integers(n, size=triples)
    j = (i + rng.integers(1, n, size=triples)) % n
    k = rng.integers(n - 2, size=triples)
    for other in (np.minimum(i, j), np.maximum(i, j)):
        k += k >= other
    g = products
    inner = g[j, k] - g[i, j] - g[i, k] + g[i, i]
    lengths = np.sqrt((g[i, i] + g[j, j] - 2 * g[i, j]) * (g[i, i] + g[k, k] - 2 * g[i, k]))
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = inner / lengths
    return np.degrees(np.arccos(np.clip(cosines[np.isfinite(cosines)], -1.0, 1.0)))


def _ks_coordinates(x: np.ndarray, tests: int, rng: np.random.Generator) -> pd.DataFrame:
    chosen = np.sort(rng.choice(x.shape[1], size=tests, replace=False))
    return _ks(x[:, chosen], "coordinate", chosen)


def _ks_projections(x: np.ndarray, tests: int, rng: np.random.Generator) -> pd.DataFrame:
    directions = rng.standard_normal((tests, x.shape[1]), dtype=np.float32)
    directions /= np.linalg.norm(directions, axis=1, keepdims=True)
    return _ks(x @ directions.T, "projection", np.arange(tests))


def _ks(columns: np.ndarray, kind: str, names: np.ndarray) -> pd.DataFrame:
    results = [stats.kstest(column.astype(np.float64), "norm") for column in columns.T]
    p = np.minimum(1.0, np.array([result.pvalue for result in results]) * len(results))
    return pd.DataFrame({kind: names, "statistic": [result.statistic for result in results], "p": p})


def _autocorrelation(images: np.ndarray) -> float:
    """Correlation of horizontally and vertically neighbouring pixels, mean of both, over all samples and channels."""
    x = images.astype(np.float64) - images.mean(dtype=np.float64)
    down = (x[:, :, 1:] * x[:, :, :-1]).mean()
    across = (x[..., 1:] * x[..., :-1]).mean()
    return float((down + across) / 2 / (x**2).mean())


def statistics_over_time(
    ensembles: Any,
    *,
    alpha_bars: Sequence[float] | None = None,
    mean_square: float | None = None,
    index: str = "t",
    tests: int = 64,
    triples: int = 10_000,
    seed: int = 0,
) -> pd.DataFrame:
    """`latent_statistics` of every ensemble, one row each.

    Parameters
    ----------
    ensembles : mapping t -> array of shape (n, d) or (n, C, H, W), store, or iterable of (t, array)
        Or of anything else that `index` names, such as the number of inversion steps.
    alpha_bars : array of shape (T,), optional
        With `mean_square`, gives r(t); then the keys are timesteps, and -1 is the clean image.
    mean_square : float, optional
        m2 of the clean images in [-1, 1].
    index : str, default "t"
        Name of the index.
    tests, triples, seed
        As in `latent_statistics`.

    Returns
    -------
    DataFrame
        Indexed by `index`; columns as `LatentStatistics.row`.

    Raises
    ------
    ValueError
        As in `latent_statistics` (naming the timestep), or if only one of `alpha_bars` and `mean_square` is given.
    """
    if (alpha_bars is None) != (mean_square is None):
        raise ValueError("r(t) needs both alpha_bars and mean_square; give both or neither")
    rows = {}
    for t, ensemble in pairs_of(ensembles):
        x = check_samples(ensemble, t=t, fewest=3)
        radius = None
        if alpha_bars is not None:
            alpha_bar = 1.0 if t == -1 else float(np.asarray(alpha_bars)[t])
            radius = marginal_radius(alpha_bar, mean_square=mean_square, d=x.shape[1])
        rows[t] = latent_statistics(ensemble, reference_radius=radius, tests=tests, triples=triples, seed=seed).row()
    if not rows:
        raise ValueError("there is no ensemble; give at least one")
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis(index)


@dataclass(frozen=True, eq=False)
class Spectrum:
    """Second moment of images along orthogonal directions.

    Attributes
    ----------
    frequency : ndarray of shape (k,)
        Radial frequency in cycles an image; for principal components their rank, from 1.
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
        """One row a frequency: `frequency`, `power`, `weight`."""
        return pd.DataFrame({"frequency": self.frequency, "power": self.power, "weight": self.weight})

    def __repr__(self) -> str:
        f = self.frequency
        return f"Spectrum({len(f)} frequencies {f.min():g}..{f.max():g}, mean square {self.mean_square:.4f})"


def data_spectrum(images: Any, *, basis: str = "fourier") -> Spectrum:
    """How the mean square of images is spread over directions.

    Parameters
    ----------
    images : array of shape (n, C, H, W), values in [-1, 1]
    basis : {"fourier", "pca"}
        "fourier": power at every radial frequency (rounded to integers), mean over samples and channels, orthonormal
        transform. It takes images as if their statistics were the same at every pixel, and channels as unrelated.
        "pca": eigenvalues of the second moments of all values, not centred. It assumes neither, but of fewer images
        than values the smallest are 0 and the others a little too large.

    Returns
    -------
    Spectrum

    Raises
    ------
    ValueError
        If the array is not image-shaped, a value is not finite, or the basis is not known.
    """
    images = np.asarray(images)
    if images.ndim != 4:
        raise ValueError(f"the images have shape {images.shape}; a spectrum needs (n, C, H, W)")
    flat = check_samples(images, fewest=1)
    if basis == "pca":
        return _principal_spectrum(flat)
    if basis != "fourier":
        raise ValueError(f'basis {basis!r} is not known; it is "fourier" or "pca"')
    height, width = images.shape[2:]
    power = np.zeros((height, width))
    for image in images:
        power += (np.abs(np.fft.fft2(image.astype(np.float64), norm="ortho")) ** 2).mean(axis=0)
    rings = np.rint(_radial_frequency(height, width)).astype(int)
    return _by_ring(power / len(images), rings)


def _principal_spectrum(x: np.ndarray) -> Spectrum:
    n, d = x.shape
    moments = gram(x, centred=False) if n <= d else x.T.astype(np.float64) @ x
    power = np.zeros(d)
    values = np.linalg.eigvalsh(moments)[::-1] / n
    power[: len(values)] = np.maximum(values, 0.0)
    return Spectrum(np.arange(1, d + 1), power, np.ones(d))


def power_law_spectrum(size: int, gamma: float, *, mean_square: float = 0.3) -> Spectrum:
    """Spectrum of images whose mean square falls as frequency^-gamma, a model of photographs (gamma 2 to 3).

    Every one of the size^2 frequencies is a direction; the constant image has the power of frequency 1.

    Parameters
    ----------
    size : int
        Height and width in pixels.
    gamma : float
    mean_square : float, default 0.3
        m2, mean over all frequencies.

    Returns
    -------
    Spectrum
    """
    frequency, weight = np.unique(_radial_frequency(size, size).ravel(), return_counts=True)
    power = np.maximum(frequency, 1.0) ** -gamma
    return Spectrum(frequency, power * mean_square * weight.sum() / (weight @ power), weight.astype(float))


def _radial_frequency(height: int, width: int) -> np.ndarray:
    """Frequency of every entry of a 2-D transform, in cycles an image along the longer side."""
    longer = max(height, width)
    return np.hypot(np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None, :]) * longer


def _by_ring(power: np.ndarray, rings: np.ndarray) -> Spectrum:
    weight = np.bincount(rings.ravel()).astype(float)
    total = np.bincount(rings.ravel(), weights=power.ravel())
    there = weight > 0
    return Spectrum(np.flatnonzero(there).astype(float), total[there] / weight[there], weight[there])


def inversion_grid(t: int, steps: int) -> tuple[int, ...]:
    """Timesteps of BoundaryDiffusion's inversion to t: linspace(0, 1, steps) * t, cut to integers.

    Some repeat where `steps` is close to t (rounding errors are cut too); a repeated one changes nothing.

    Parameters
    ----------
    t : int
        The timestep to invert to.
    steps : int
        Their number, at least 2; the network is called steps - 1 times.

    Returns
    -------
    tuple of int, ascending from 0 to t
    """
    if steps < 2:
        raise ValueError(f"steps is {steps}; an inversion has at least 2 timesteps, 0 and its end")
    return tuple(int(v) for v in np.linspace(0, 1, steps) * t)


@dataclass(frozen=True, eq=False)
class LinearGaussianInversion:
    """What DDIM inversion would give if the images were Gaussian and the network exact.

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

    def frame(self) -> pd.DataFrame:
        """One row a timestep: `t`, `ratio`."""
        return pd.DataFrame({"t": self.timesteps, "ratio": self.ratios})

    def __repr__(self) -> str:
        t = self.timesteps
        return f"LinearGaussianInversion({len(t)} timesteps {t[0]}..{t[-1]}, radius ratio {self.ratio:.4f})"


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
        Second moments of the data; see `data_spectrum` and `power_law_spectrum`.
    alpha_bars : array of shape (T,)
        alpha_bar at every timestep, such as `model.schedule.alpha_bars`.
    timesteps : sequence of int
        Visited timesteps, in either direction; see `inversion_grid`.
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
    if start not in ("first", "clean"):
        raise ValueError(f'start {start!r} is not known; it is "first" or "clean"')
    if noise_repair and start == "clean":
        raise ValueError(
            'start "clean" has no noise to repair: the repair makes a clean image one of the first timestep; '
            'use start="first" with noise_repair'
        )
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


@dataclass(frozen=True, eq=False)
class StepGeometry:
    """Lengths and turns of n trajectories of S states.

    Attributes
    ----------
    timesteps : tuple of int
        Of the states; 0..S-1 where they are not known.
    lengths : ndarray of shape (S-1, n)
        Of the steps.
    angles : ndarray of shape (S-2, n), degrees in [0, 180]
        Between a step and the next; 0 is straight on. NaN where a step has length 0.
    curvatures : ndarray of shape (S-2, n), one over the units of the states
        Angle in radians over the mean length of the two steps.
    cosines : ndarray of shape (S-1, n), in [-1, 1]
        Between a state and the next, from the origin.
    centred_cosines : ndarray of shape (S-1, n), in [-1, 1]
        The same after the mean of the samples at each step is taken off: what the samples have in common makes the
        plain cosine large.
    straightness : ndarray of shape (n,), in [0, 1]
        Distance of the ends over the length of the path.
    """

    timesteps: tuple[int, ...]
    lengths: np.ndarray = field(repr=False)
    angles: np.ndarray = field(repr=False)
    curvatures: np.ndarray = field(repr=False)
    cosines: np.ndarray = field(repr=False)
    centred_cosines: np.ndarray = field(repr=False)
    straightness: np.ndarray = field(repr=False)

    def frame(self) -> pd.DataFrame:
        """One row a quantity and step: `quantity`, `t` (of the state where it begins; of an angle, its corner),
        `mean`, `sd`, `q05`, `q95` over samples, and `n`."""
        corners = self.timesteps[1:-1]
        tables = {
            "length": (self.timesteps[:-1], self.lengths),
            "angle": (corners, self.angles),
            "curvature": (corners, self.curvatures),
            "cosine": (self.timesteps[:-1], self.cosines),
            "centred cosine": (self.timesteps[:-1], self.centred_cosines),
        }
        rows = [
            (name, t, row.mean(), row.std(ddof=0), row.quantile(0.05), row.quantile(0.95), row.count())
            for name, (timesteps, table) in tables.items()
            for t, row in zip(timesteps, map(pd.Series, table), strict=True)
        ]
        return pd.DataFrame(rows, columns=["quantity", "t", "mean", "sd", "q05", "q95", "n"])

    def __repr__(self) -> str:
        return (
            f"StepGeometry({self.lengths.shape[1]} trajectories of {len(self.timesteps)} states, "
            f"mean turn {np.nanmean(self.angles):.1f} degrees, straightness {self.straightness.mean():.3f})"
        )


def step_geometry(trajectory: Any, *, timesteps: Sequence[int] | None = None) -> StepGeometry:
    """Lengths, turns, curvature and cosines of the steps of trajectories of x_t or h_t, in one pass.

    Parameters
    ----------
    trajectory : array of shape (S, n, ...), iterable of arrays of shape (n, ...), store, or mapping t -> array
        At least 3 states, in the order in which they are visited.
    timesteps : sequence of int, optional
        Of an array's or iterable's states.

    Returns
    -------
    StepGeometry

    Raises
    ------
    ValueError
        If there are fewer than 3 states, their shapes differ, or a value is not finite.
    """
    if isinstance(trajectory, Mapping) or (hasattr(trajectory, "timesteps") and hasattr(trajectory, "at")):
        pairs = pairs_of(trajectory)
    elif timesteps is None:
        pairs = enumerate(trajectory)
    else:
        pairs = zip(timesteps, trajectory, strict=True)
    visited, lengths, angles, curvatures, cosines, centred = [], [], [], [], [], []
    begin = state = step = None
    for t, x in over_timesteps(pairs, fewest=3, samples=1):
        before, state = state, x.astype(np.float64)
        visited.append(t)
        if before is None:
            begin = state
            continue
        step_before, step = step, state - before
        lengths.append(np.linalg.norm(step, axis=1))
        cosines.append(_cosine(before, state))
        centred.append(_cosine(before - before.mean(axis=0), state - state.mean(axis=0)))
        if step_before is not None:
            turn = np.arccos(np.clip(_cosine(step_before, step), -1.0, 1.0))
            angles.append(np.degrees(turn))
            curvatures.append(2 * turn / (lengths[-2] + lengths[-1]))
    path = np.sum(lengths, axis=0)
    chord = np.linalg.norm(state - begin, axis=1)
    return StepGeometry(
        tuple(visited),
        np.stack(lengths),
        np.stack(angles),
        np.stack(curvatures),
        np.stack(cosines),
        np.stack(centred),
        np.divide(chord, path, out=np.ones_like(path), where=path > 0),
    )


def _cosine(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Row by row; NaN where one is 0."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return (a * b).sum(axis=1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))


@dataclass(frozen=True, eq=False)
class Separability:
    """How well a linear probe tells groups apart, on samples that it has not seen.

    Attributes
    ----------
    balanced_accuracy : float in [0, 1]
        Mean of the groups' recalls.
    interval : (float, float)
        95% Wilson interval, for `n_effective` trials. It takes the predictions as independent; at chance they are not
        quite, and results spread 1.2 to 1.3 times as far (measured on noise, n = 100 to 500).
    chance : float
        One over the number of groups.
    accuracy : float in [0, 1]
    n : int
        Number of samples.
    n_effective : float
        Number of trials of a plain accuracy with the same sampling error: groups^2 / sum(1 / group size); n for groups
        of one size.
    correct : ndarray of shape (n,), bool
    shuffled : bool
        Whether the labels were permuted, as a control.
    """

    balanced_accuracy: float
    interval: tuple[float, float]
    chance: float
    accuracy: float
    n: int
    n_effective: float
    correct: np.ndarray = field(repr=False)
    shuffled: bool = False

    def row(self) -> dict[str, Any]:
        """For a table with one row a probe."""
        low, high = self.interval
        return {
            "balanced_accuracy": self.balanced_accuracy,
            "low": low,
            "high": high,
            "chance": self.chance,
            "accuracy": self.accuracy,
            "n": self.n,
            "n_effective": self.n_effective,
            "shuffled": self.shuffled,
        }

    def __repr__(self) -> str:
        low, high = self.interval
        return (
            f"Separability(balanced accuracy {self.balanced_accuracy:.3f} [{low:.3f}, {high:.3f}], n={self.n}, "
            f"chance {self.chance:.3f}{', shuffled labels' if self.shuffled else ''})"
        )


def separability(h: Any, labels: Any, *, folds: int = 5, seed: int = 0, shuffled: bool = False) -> Separability:
    """Cross-validated accuracy of a linear probe.

    The probe is Fisher's linear discriminant with groups of equal weight, and the covariance within groups shrunk
    towards a multiple of the identity as Ledoit & Wolf (2004) do, from the training samples alone. With few samples it
    comes close to the difference of the groups' means. It is the same in every orthonormal basis, so it runs on the n
    coordinates of the samples' span instead of d, with the same result.

    A high accuracy says something beside the controls alone: shuffled labels, pixels, and forward-diffused images.

    Parameters
    ----------
    h : array of shape (n, ...)
    labels : array of shape (n,)
        Two values or more; each has at least `folds` samples.
    folds : int, default 5
    seed : int, default 0
        Of the folds and the shuffling.
    shuffled : bool, default False
        Permute the labels, the control that must come out at chance.

    Returns
    -------
    Separability

    Raises
    ------
    ValueError
        If the labels are constant or missing, a group is smaller than `folds`, or a value is not finite.
    """
    by_name = {getattr(labels, "name", None) or "label": labels}
    (found,) = separabilities(h, by_name, folds=folds, seed=seed, shuffled=shuffled).values()
    return found


def separabilities(
    h: Any, labels: Any, *, folds: int = 5, seed: int = 0, shuffled: bool = False
) -> dict[str, Separability]:
    """`separability` of several attributes of the same samples.

    Parameters
    ----------
    h : array of shape (n, ...)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays
    folds, seed, shuffled
        As in `separability`.

    Returns
    -------
    dict of attribute -> Separability

    Raises
    ------
    ValueError
        As in `separability`.
    """
    h = check_samples(h)
    by_name = check_labels(labels, len(h))
    # Matrices of this size are faster in one thread, by far where other work shares the machine.
    with threadpool_limits(1, user_api="blas"):
        span = _span(h)
        return {
            name: _probe(span, values, d=h.shape[1], folds=folds, seed=seed, shuffled=shuffled)
            for name, values in by_name.items()
        }


def separability_over_time(
    h_by_t: Any, labels: Any, *, folds: int = 5, seed: int = 0, control: bool = True
) -> pd.DataFrame:
    """`separability` of every attribute at every timestep.

    Parameters
    ----------
    h_by_t : store, mapping t -> array of shape (n, ...), or iterable of (t, array)
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays
    folds, seed
        As in `separability`; the folds are the same at every timestep.
    control : bool, default True
        Add rows of shuffled labels.

    Returns
    -------
    DataFrame
        One row a timestep, attribute and kind of labels: `t`, `attribute`, `balanced_accuracy`, `low`, `high`,
        `chance`, `accuracy`, `n`, `n_effective`, `shuffled`.

    Raises
    ------
    ValueError
        As in `separability`, and if there is only one timestep.
    """
    rows = []
    for t, h in over_timesteps(h_by_t, progress="separability"):
        for shuffled in (False, True) if control else (False,):
            probes = separabilities(h, labels, folds=folds, seed=seed, shuffled=shuffled)
            rows += [{"t": t, "attribute": name} | probe.row() for name, probe in probes.items()]
    return pd.DataFrame(rows)


def _span(h: np.ndarray) -> np.ndarray:
    """The samples in coordinates of their own span, scaled to a mean squared length of 1: (n, at most n)."""
    products = gram(h)
    size = np.trace(products) / len(h)
    if size <= 0:
        raise ValueError("all samples are the same; no probe can tell them apart")
    if h.shape[1] <= len(h):
        return (h - h.mean(axis=0, dtype=np.float64)) / np.sqrt(size)
    values, vectors = np.linalg.eigh(products / size)
    kept = values > 1e-12 * values[-1]
    return vectors[:, kept] * np.sqrt(values[kept])


def _probe(span: np.ndarray, labels: np.ndarray, *, d: int, folds: int, seed: int, shuffled: bool) -> Separability:
    names, groups, sizes = np.unique(labels, return_inverse=True, return_counts=True)
    if not 2 <= folds <= sizes.min():
        smallest = int(np.argmin(sizes))
        raise ValueError(
            f"folds is {folds}, and the group {names[smallest]!s} has {sizes[smallest]} samples; "
            f"take 2 to {sizes.min()} folds, or more samples"
        )
    if shuffled:
        groups = np.random.default_rng(seed).permutation(groups)
    predicted = np.empty_like(groups)
    for train, test in StratifiedKFold(folds, shuffle=True, random_state=seed).split(span, groups):
        predicted[test] = _discriminate(span[train], groups[train], span[test], d)
    recalls = np.diag(confusion_matrix(groups, predicted, normalize="true"))
    balanced, effective = float(recalls.mean()), float(len(sizes) ** 2 / (1 / sizes).sum())
    rate = share_of(balanced, effective, cross_validated=True)
    return Separability(
        balanced_accuracy=balanced,
        interval=(rate.low, rate.high),
        chance=1 / len(sizes),
        accuracy=float((predicted == groups).mean()),
        n=len(groups),
        n_effective=effective,
        correct=predicted == groups,
        shuffled=shuffled,
    )


def _discriminate(train: np.ndarray, groups: np.ndarray, test: np.ndarray, d: int) -> np.ndarray:
    """Groups of the test samples by the shrunk linear discriminant; `d` counts the coordinates that are 0 as well."""
    means = np.stack([train[groups == group].mean(axis=0) for group in range(groups.max() + 1)])
    within = train - means[groups]
    n = len(within)
    covariance = within.T @ within / n
    trace, square = np.trace(covariance), (covariance**2).sum()
    # Ledoit & Wolf 2004: how far the covariance is from the truth, and from the multiple of the identity.
    error = ((within**2).sum(axis=1) ** 2).sum() / n**2 - square / n
    distance = square - trace**2 / d
    shrinkage = min(error / distance, 1.0) if distance > 0 else 1.0
    covariance *= 1.0 - shrinkage
    covariance[np.diag_indices_from(covariance)] += shrinkage * trace / d if trace > 0 else 1.0
    weights = linalg.solve(covariance, means.T, assume_a="pos")
    return (test @ weights - (means.T * weights).sum(axis=0) / 2).argmax(axis=1)
