"""Edits of a trajectory: a direction added to h, or another sample's h in its place."""

from __future__ import annotations

import torch

from workbench.diffusion.models import Model
from workbench.diffusion.sampling import EDIT_MODES, HEdit, HFunction, Trajectory, replay
from workbench.diffusion.schedule import NoiseSchedule
from workbench.directions.asyrp import DeltaFunction
from workbench.directions.direction import Direction, finite
from workbench.io import provenance_mismatch


def edit(
    model: Model,
    run: Trajectory,
    direction: Direction | DeltaFunction | Trajectory,
    *,
    scale: float = 1.0,
    mode: str = "add",
    asymmetric: bool = False,
    t_range: tuple[int, int] | None = None,
    gain: str | None = None,
    residual: bool = False,
    record_h: bool = False,
    progress: bool = True,
) -> Trajectory:
    """Run a trajectory again with its h edited: same x_T, same noise.

    h_t <- h_t + scale * sigma_t * v_t (Haas et al. eq. 6)

    Parameters
    ----------
    model : Model
        The model that the run comes from, at the tap of the direction.
    run : Trajectory
        Not edited yet.
    direction : Direction, DeltaFunction, or Trajectory with recorded h
        For "replace" and "slerp" the donor of h: a run of one sample, or of as many as `run`.
    scale : float, default 1
        In standard deviations of the population's projection; of a DeltaFunction, a factor of its Delta h. For "slerp"
        the weight of the donor, in [0, 1]. Not used by "replace".
    mode : {"add", "replace", "slerp"}
        "replace" is the swap of Haas et al. Fig. 2a, "slerp" the normalised interpolation of InjectFusion.
    asymmetric : bool
        Edit P_t alone (Asyrp eq. 5); by default P_t and D_t (symmetric, Haas et al.).
    t_range : (int, int), optional
        (from, to): the edit acts at from >= t >= to. By default at all timesteps.
    gain : {None, "match"}
        "match" scales an asymmetric edit, step by step, to the first-order effect of the symmetric one.
    residual : bool
        Of an inverted image: add what its reconstruction lacks, as `replay` does.
    record_h : bool
        Keep the network's own h_t of the edited run.
    progress : bool

    Returns
    -------
    Trajectory
        Its x0 are the edited images. Scale 0 gives the unedited ones, bit for bit.

    Raises
    ------
    ValueError
        If the direction belongs to another model, tap or number of steps, the run is edited already, or a residual is
        asked for that it does not have.
    """
    change = plan_edit(model, run, direction, scale=scale, mode=mode, asymmetric=asymmetric, t_range=t_range, gain=gain)
    return replay(run, edit=change, residual=residual, record_h=record_h, progress=progress)


def plan_edit(
    model: Model,
    run: Trajectory,
    direction: Direction | DeltaFunction | Trajectory,
    *,
    scale: float = 1.0,
    mode: str = "add",
    asymmetric: bool = False,
    t_range: tuple[int, int] | None = None,
    gain: str | None = None,
) -> HEdit | HFunction:
    """What `edit` will do to h, without doing it; parameters and errors as there."""
    check_run(model, run)
    scale = finite(scale, "scale")
    gains = step_gains(run, asymmetric, gain)
    if mode not in EDIT_MODES:
        raise ValueError(f"mode {mode!r} is not known; it is one of {', '.join(EDIT_MODES)}")
    if mode == "add" and isinstance(direction, DeltaFunction):
        direction.check_fits(model)
        weights = tuple((scale * gains).tolist())
        return HFunction(direction, run.timesteps, weights, active_steps(run, t_range), asymmetric)
    if mode == "add":
        values = _delta_of(model, run, direction, scale) * gains[:, None, None, None, None]
    else:
        values = _donor_h(run, direction)
    weight = scale if mode == "slerp" else 1.0
    if not 0.0 <= weight <= 1.0:
        raise ValueError(f"slerp takes a weight in [0, 1] as its scale, not {scale}")
    return HEdit(values, mode=mode, active=active_steps(run, t_range), asymmetric=asymmetric, weight=weight)


def check_run(model: Model, run: Trajectory) -> None:
    """Refuse a run of another model, or one that is edited already."""
    _refuse_other_model(model, run.model, "the run")
    if run.edit is not None:
        raise ValueError("this run is edited already; edit the plain run, with the sum of both directions")


def _refuse_other_model(model: Model, other: Model, whose: str) -> None:
    if other.hash != model.hash or other.tap != model.tap:
        raise ValueError(
            f"{whose} comes from {other.name!r} tapped {other.tap!r} the mid block (weights {other.hash}), "
            f"not from {model.name!r} tapped {model.tap!r} (weights {model.hash}); sample it again with this model"
        )
    if different := provenance_mismatch(other.provenance(), model.provenance()):
        raise ValueError(f"{whose} comes from {other.name!r} with another {different}; sample it again with this model")


def active_steps(run: Trajectory, t_range: tuple[int, int] | None) -> tuple[bool, ...]:
    """Which steps of a run lie in the range (from, to), from >= t >= to.

    Raises
    ------
    ValueError
        If none does.
    """
    if t_range is None:
        return (True,) * run.steps
    high, low = t_range
    active = tuple(low <= t <= high for t in run.timesteps)
    if not any(active):
        raise ValueError(
            f"no visited timestep lies in t_range {high}..{low}; this run visits {run.timesteps[0]}, ..., "
            f"{run.timesteps[-1]} (give the noisier end first)"
        )
    return active


def eps_effects(schedule: NoiseSchedule, pair: tuple[int, int], *, eta: float) -> tuple[float, float]:
    """By how much a change of eps moves x_prev, through P_t and through D_t.

    c_P = -sqrt(alpha_bar_prev (1 - alpha_bar) / alpha_bar), c_D = sqrt(1 - alpha_bar_prev - sigma^2); from DDIM eq. 12.

    Parameters
    ----------
    schedule : NoiseSchedule
    pair : (int, int)
        (t, t_prev)
    eta : float in [0, 1]

    Returns
    -------
    (float, float)
        c_P and c_D, of opposite signs.
    """
    t, t_prev = pair
    a, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t_prev)
    c_p = -((a_prev * (1.0 - a) / a) ** 0.5)
    c_d = (1.0 - a_prev - schedule.sigma(t, t_prev, eta) ** 2) ** 0.5
    return c_p, c_d


def match_gain(schedule: NoiseSchedule, pair: tuple[int, int], *, eta: float) -> float:
    """Factor that gives an asymmetric edit the first-order effect of the symmetric one at a step.

    A change of eps moves x_prev by c_P + c_D (`eps_effects`) if it enters P_t and D_t, and by c_P if it enters P_t
    alone. The two have opposite signs, so the asymmetric edit is the stronger one, the more so the smaller the step
    (Asyrp, Theorem 1).

    Parameters
    ----------
    schedule, pair, eta
        As of `eps_effects`.

    Returns
    -------
    float
        |c_P + c_D| / |c_P|, in (0, 1].
    """
    c_p, c_d = eps_effects(schedule, pair, eta=eta)
    return abs(c_p + c_d) / abs(c_p)


def step_gains(run: Trajectory, asymmetric: bool, gain: str | None) -> torch.Tensor:
    """What an added edit is multiplied by at every step: `match_gain` if asked for, else 1; shape (steps,)."""
    if gain not in (None, "match"):
        raise ValueError(f'gain {gain!r} is not known; it is None or "match"')
    if gain is None or not asymmetric:
        return torch.ones(run.steps)
    steps = zip(pairs_of(run), run.etas, strict=True)
    return torch.tensor([match_gain(run.model.schedule, pair, eta=eta) for pair, eta in steps])


def pairs_of(run: Trajectory) -> list[tuple[int, int]]:
    """(t, t_prev) of every step of a run."""
    return run.model.schedule.pairs(run.timesteps)


def _delta_of(model: Model, run: Trajectory, direction: Direction, scale: float) -> torch.Tensor:
    if not isinstance(direction, Direction):
        raise ValueError(f'mode "add" takes a Direction or a DeltaFunction, not a {type(direction).__name__}')
    direction.check_fits(model, run.timesteps)
    return direction.delta(scale)[:, None]


def _donor_h(run: Trajectory, donor: Trajectory) -> torch.Tensor:
    h = donor.h if isinstance(donor, Trajectory) else None
    if h is None:
        raise ValueError('modes "replace" and "slerp" take a run with recorded h as donor (sample with record_h=True)')
    _refuse_other_model(run.model, donor.model, "the donor")
    if donor.timesteps != run.timesteps or len(donor) not in (1, len(run)):
        raise ValueError(
            f"the donor has {len(donor)} samples at {donor.steps} timesteps; it needs 1 or {len(run)} samples "
            f"and the run's own {run.steps} timesteps"
        )
    return h.values
