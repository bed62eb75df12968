"""The noise schedule and the equations of one denoising step.

Names follow the DDPM paper: `alpha_bar` is the cumulative product of 1 - beta. The DDIM and Asyrp papers, and Haas et
al., write alpha_t for the same quantity.
"""

from __future__ import annotations

import hashlib
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from workbench.io import one_of

CLEAN = -1
"""The timestep "before 0": the clean image, alpha_bar = 1."""

SPACINGS = ("leading", "trailing", "linspace")

PREDICTIONS = {
    "epsilon": lambda output, x_t, alpha_bar: output,
    "v_prediction": lambda v, x_t, alpha_bar: alpha_bar.sqrt() * v + (1 - alpha_bar).sqrt() * x_t,
    "sample": lambda x_0, x_t, alpha_bar: (x_t - alpha_bar.sqrt() * x_0) / (1 - alpha_bar).sqrt(),
}
"""eps of what a network predicts: eps, v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0 (Salimans and Ho 2022), or
x_0."""


def index_of(t: int, timesteps: Sequence[int], *, trained: int | None = None) -> int:
    """Position of timestep `t` among the visited ones.

    Parameters
    ----------
    t : int
        Timestep, in the units that the network was trained on (0..T-1).
    timesteps : sequence of int
        The visited timesteps.
    trained : int, optional
        T, only for the message.

    Raises
    ------
    ValueError
        If `t` was not visited; the message names the nearest visited ones.
    """
    visited = [int(v) for v in timesteps]
    if int(t) == t and int(t) in visited:
        return visited.index(int(t))
    above = min((v for v in visited if v > t), default=None)
    below = max((v for v in visited if v < t), default=None)
    nearest = " or ".join(str(v) for v in (above, below) if v is not None)
    shown = ", ".join(map(str, visited)) if len(visited) <= 4 else f"{visited[0]}, {visited[1]}, ..., {visited[-1]}"
    of = "" if trained is None else f" of {trained}"
    raise ValueError(f"timestep {t} was not visited; {len(visited)} steps{of} visit {shown} (nearest {nearest})")


def within(t_range: tuple[int, int] | None, timesteps: Sequence[int]) -> tuple[bool, ...]:
    """Which timesteps lie in a range (from, to), from >= t >= to; ValueError if none does. None is all of them."""
    try:
        high, low = (timesteps[0], timesteps[-1]) if t_range is None else t_range
        inside = tuple(low <= t <= high for t in timesteps)
    except (TypeError, ValueError):
        raise ValueError(f"t_range is {t_range!r}; give two timesteps, such as (700, 100)") from None
    if not any(inside):
        visits = f"{timesteps[0]}, ..., {timesteps[-1]} (give the noisier end first)"
        raise ValueError(f"no visited timestep lies in {high}..{low}; visited are {visits}")
    return inside


@dataclass(frozen=True, eq=False)
class NoiseSchedule:
    """Noise level at every timestep, and the quantities derived from it.

    ===============  ================  ========================
    here             DDPM (Ho et al.)  DDIM, Asyrp, Haas et al.
    ===============  ================  ========================
    alpha_bar(t)     alpha-bar_t       alpha_t
    predict_x0       x-hat_0           P_t
    direction_to_xt  (none)            D_t
    sigma            sigma_t           sigma_t
    ===============  ================  ========================

    Attributes
    ----------
    alpha_bars : ndarray of shape (T,), float64, values in (0, 1), decreasing
        Cumulative product of 1 - beta.
    spacing : {"leading", "trailing", "linspace"}
        How `timesteps` places its steps; as in diffusers.
    offset : int
        Added to every timestep of the "leading" spacing (diffusers' `steps_offset`).
    clean : float
        alpha_bar of the clean image. Stable Diffusion was published with alpha_bar(0) there (`set_alpha_to_one` off).
    """

    alpha_bars: np.ndarray = field(repr=False)
    spacing: str = "leading"
    offset: int = 0
    clean: float = 1.0

    def __post_init__(self) -> None:
        a = np.array(self.alpha_bars, dtype=np.float64)
        # A last alpha_bar of 0 (zero terminal SNR) is allowed, and `timesteps` refuses to visit it.
        if a.ndim != 1 or a.size < 2 or not (a[:-1] > 0).all() or not a[-1] >= 0 or a[0] > 1 or (np.diff(a) > 0).any():
            raise ValueError("alpha_bar must be a decreasing list of at least 2 values in (0, 1]")
        one_of("spacing", self.spacing, SPACINGS)
        a.setflags(write=False)
        object.__setattr__(self, "alpha_bars", a)

    @classmethod
    def linear(cls) -> NoiseSchedule:
        """Linear schedule of DDPM (Ho et al. 2020, section 4), used by the models of both papers."""
        return cls(np.cumprod(1.0 - np.linspace(1e-4, 0.02, 1000)))

    @property
    def T(self) -> int:
        """Number of timesteps in training."""
        return self.alpha_bars.size

    def alpha_bar(self, t: int) -> float:
        """alpha-bar at timestep `t`; that of the clean image for t = -1."""
        return self.clean if t == CLEAN else float(self.alpha_bars[t])

    def timesteps(self, steps: int | Sequence[int]) -> tuple[int, ...]:
        """Visited timesteps of a run, noisiest first.

        Parameters
        ----------
        steps : int or sequence of int
            Number of timesteps, placed by `spacing`; or the timesteps themselves, strictly decreasing.

        Returns
        -------
        tuple of int
            Values in 0..T-1, decreasing.

        Raises
        ------
        ValueError
            If there are no steps, more steps than timesteps, a list that is not strictly decreasing within 0..T-1, or
            no signal at the first (zero terminal SNR).
        """
        if isinstance(steps, (int, np.integer)) and not isinstance(steps, bool):
            if not 1 <= steps <= self.T:
                raise ValueError(f"steps is {steps}; a model trained on {self.T} timesteps takes 1 to {self.T} steps")
            visited = tuple(self._spaced(int(steps)).tolist())
            if visited[0] >= self.T:
                begin = f"{steps} steps with the offset {self.offset} begin at timestep {visited[0]} of {self.T}"
                raise ValueError(f"{begin}; give fewer steps, or the timesteps themselves")
        else:
            try:
                visited = tuple(operator.index(t) for t in steps)
            except TypeError as error:
                raise ValueError(f"steps is a whole number or a list of whole timesteps, not {steps!r}") from error
            inside = all(0 <= t < self.T for t in visited)
            if not visited or not inside or any(a <= b for a, b in zip(visited, visited[1:], strict=False)):
                raise ValueError(
                    f"timesteps must be strictly decreasing within {self.T - 1}..0, not {list(visited)[:8]}"
                )
        if self.alpha_bars[visited[0]] == 0:  # eps does not determine x_0 there
            raise ValueError(f"alpha_bar is 0 at timestep {visited[0]} (zero terminal SNR); give lower ones")
        return visited

    def timesteps_from(self, t: int, steps: int | Sequence[int]) -> tuple[int, ...]:
        """Visited timesteps from `t` on: so many evenly spaced ones down to 0, or the timesteps themselves.

        Raises
        ------
        ValueError
            If there are no steps or more than timesteps, or a list does not begin with `t`.
        """
        if isinstance(steps, (int, np.integer)):
            if not 1 <= steps <= t + 1:
                raise ValueError(f"steps is {steps}; from t = {t} to 0 there are 1 to {t + 1}")
            return self.timesteps(np.linspace(t, 0, steps).round().astype(int).tolist())
        visited = self.timesteps(steps)
        if visited[0] != t:
            raise ValueError(f"the steps begin at timestep {visited[0]}; begin at t = {t}")
        return visited

    def _spaced(self, steps: int) -> np.ndarray:
        if self.spacing == "leading":
            visited = np.arange(steps)[::-1] * (self.T // steps) + self.offset
        elif self.spacing == "trailing":
            visited = np.round(np.arange(self.T, 0, -self.T / steps))[:steps] - 1
        else:
            visited = np.round(np.linspace(0, self.T - 1, steps))[::-1]
        return visited.astype(int)

    def pairs(self, steps: int | Sequence[int]) -> list[tuple[int, int]]:
        """Visited (t, t_prev), noisiest first; the last t_prev is -1, the clean image.

        `t_prev` is the next *visited* timestep, whatever the spacing.
        """
        visited = self.timesteps(steps)
        return list(zip(visited, (*visited[1:], CLEAN), strict=True))

    def add_noise(self, x0: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
        """x_t of the forward process: sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) noise (DDPM eq. 4)."""
        a = self.alpha_bar(t)
        return a**0.5 * x0 + (1.0 - a) ** 0.5 * noise

    def predict_x0(self, x_t: torch.Tensor, eps: torch.Tensor, t: int) -> torch.Tensor:
        """P_t, the clean image that `eps` predicts (DDIM eq. 9; Haas et al. eq. 3). Never clipped.

        Parameters
        ----------
        x_t, eps : Tensor of shape (n, C, H, W)
        t : int

        Returns
        -------
        Tensor of shape (n, C, H, W)
            Nominally in [-1, 1]. Not clipped: clipping distorts the edit and breaks inversion.
        """
        a = self.alpha_bar(t)
        return (x_t - (1.0 - a) ** 0.5 * eps) / a**0.5

    def sigma(self, t: int, t_prev: int, eta: float) -> float:
        """Standard deviation of the noise that the step t -> t_prev adds (DDIM eq. 16): 0 at eta 0, DDPM's at eta 1."""
        a, a_prev = self.alpha_bar(t), self.alpha_bar(t_prev)
        return eta * ((1.0 - a_prev) / (1.0 - a) * (1.0 - a / a_prev)) ** 0.5

    def direction_to_xt(self, eps: torch.Tensor, t: int, t_prev: int, *, eta: float = 0.0) -> torch.Tensor:
        """D_t, the direction that points back to x_t (DDIM eq. 12; Haas et al. eq. 4)."""
        return (1.0 - self.alpha_bar(t_prev) - self.sigma(t, t_prev, eta) ** 2) ** 0.5 * eps

    def calibrated(
        self, x_t: torch.Tensor, edited: torch.Tensor, plain: torch.Tensor, t: int, *, omega: float
    ) -> torch.Tensor:
        """x_t moved to where the network, without an edit, predicts about the edited image (InjectFusion).

        With P and eps of the plain pass, P~ and eps~ of the edited one, and P' having the mean of P~ and the standard
        deviation of P, sample by sample: x_t + sqrt(alpha_bar_t) (P' - P) + omega sqrt(1 - alpha_bar_t) (eps~ - eps),
        as the released code of Jeong et al. (2024, arXiv 2303.15403) has it.

        Parameters
        ----------
        x_t, edited, plain : Tensor of shape (n, C, H, W)
            The state, and eps~ and eps there.
        t : int
        omega : float

        Returns
        -------
        Tensor of shape (n, C, H, W)
        """
        before, after = self.predict_x0(x_t, plain, t), self.predict_x0(x_t, edited, t)
        mean, spread = after.mean((1, 2, 3), keepdim=True), after.std((1, 2, 3), keepdim=True)
        kept = before.std((1, 2, 3), keepdim=True)
        after = mean + (after - mean) * torch.where(spread > 0, kept / spread, 1.0)
        a = self.alpha_bar(t)
        return x_t + a**0.5 * (after - before) + omega * (1.0 - a) ** 0.5 * (edited - plain)

    def ddim_step(
        self,
        x_t: torch.Tensor,
        eps: torch.Tensor,
        pair: tuple[int, int],
        *,
        eta: float = 0.0,
        noise: torch.Tensor | None = None,
        eps_direction: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One step of the reverse process, t -> t_prev (DDIM eq. 12; Haas et al. eq. 2).

        x_prev = sqrt(alpha_bar_prev) P_t(eps) + D_t(eps_direction) + sigma_t z_t

        Parameters
        ----------
        x_t : Tensor of shape (n, C, H, W)
        eps : Tensor of shape (n, C, H, W)
            Predicted noise; of an edit, the edited prediction.
        pair : (int, int)
            (t, t_prev); t_prev = -1 is the clean image.
        eta : float in [0, 1]
            0 is deterministic DDIM, 1 has the variance of DDPM.
        noise : Tensor of shape (n, C, H, W), optional
            z_t, standard normal. Required if sigma_t > 0.
        eps_direction : Tensor of shape (n, C, H, W), optional
            Predicted noise for D_t. The unedited prediction gives the asymmetric reverse process (Asyrp eq. 5); by
            default both use `eps` (symmetric, Haas et al.).

        Returns
        -------
        Tensor of shape (n, C, H, W)
        """
        t, t_prev = pair
        p_t = self.predict_x0(x_t, eps, t)
        d_t = self.direction_to_xt(eps if eps_direction is None else eps_direction, t, t_prev, eta=eta)
        x_prev = self.alpha_bar(t_prev) ** 0.5 * p_t + d_t
        sigma = self.sigma(t, t_prev, eta)
        if sigma > 0.0:
            if noise is None:
                raise ValueError(f"the step {t} -> {t_prev} with eta {eta} adds noise, but none was given")
            x_prev = x_prev + sigma * noise
        return x_prev

    def etas(self, eta: float | Sequence[float], steps: int) -> tuple[float, ...]:
        """One eta per step, from a number or a list.

        Raises
        ------
        ValueError
            If the list and `steps` differ in length, or a value is outside [0, 1].
        """
        values = (float(eta),) * steps if np.ndim(eta) == 0 else tuple(map(float, eta))
        if len(values) != steps:
            raise ValueError(f"eta is a list of {len(values)} values for {steps} steps; give one, or one per step")
        if not all(0.0 <= v <= 1.0 for v in values):
            raise ValueError(f"eta must lie in [0, 1] (0 is DDIM, 1 is DDPM), not {min(values)}..{max(values)}")
        return values

    def provenance(self) -> dict:
        """Identity of this schedule in files: T, spacing, offset and alpha_bar."""
        return {
            "T": self.T,
            "spacing": self.spacing,
            "offset": self.offset,
            "alpha_bar": [float(self.alpha_bars[0]), float(self.alpha_bars[self.T // 2]), float(self.alpha_bars[-1])],
            "hash": hashlib.sha256(self.alpha_bars.astype(np.float32).tobytes()).hexdigest()[:16],
            **({} if self.clean == 1.0 else {"clean": self.clean}),
        }
