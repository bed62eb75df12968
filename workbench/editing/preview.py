"""Previews of edits, in few steps along a sample's own x_t with the same first-order effect; predicted images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from workbench.diffusion.sampling import Trajectory
from workbench.diffusion.schedule import CLEAN
from workbench.editing.edits import eps_effects


@torch.inference_mode()
def abridged(plain: Trajectory, first: int, k: int) -> Trajectory:
    """A run through k of the plain run's x_t, evenly spaced from step `first` to the last.

    At eta 1, with the noise that leads from each x_t to the next. `plain` is one sample with its x_t recorded.
    """
    model, schedule = plain.model, plain.model.schedule
    positions = np.linspace(first, plain.steps - 1, k).round().astype(int).tolist()
    visited = [plain.timesteps[p] for p in positions]
    x = plain.x.values[positions, 0]
    t = torch.tensor(visited, device=model.device)
    eps = model(x.to(model.device), t).cpu()
    noise, image = torch.zeros(len(visited), *plain.x_T.shape), None
    after = torch.cat([x[1:], plain.x0])
    for j, pair in enumerate(schedule.pairs(visited)):
        sigma = schedule.sigma(*pair, 1.0)
        image = schedule.ddim_step(x[j], eps[j], pair, eta=1.0, noise=torch.zeros_like(x[j]) if sigma else None)
        if sigma:
            noise[j, 0] = (after[j] - image) / sigma
            image = after[j]
    return replace(
        plain,
        x_T=x[:1],
        timesteps=tuple(visited),
        etas=(1.0,) * len(visited),
        seeds=None,
        x=None,
        stored_noise=noise,
        residual=plain.x0 - image,
    )


def same_effect(plain: Trajectory, delta: torch.Tensor, rest: Trajectory, *, asymmetric: bool) -> torch.Tensor:
    """Delta h of an abridged run that moves x as far, to first order, as all steps of the plain run.

    A change of eps at a step moves x_prev by c (`eps_effects`), and x at a later timestep by sqrt of the ratio of both
    alpha_bar times that. Each delta of the result is the sum of the plain run's within its step, weighted by these.
    """
    schedule = plain.model.schedule

    def effect(pair: tuple[int, int], eta: float) -> float:
        c_p, c_d = eps_effects(schedule, pair, eta=eta)
        return c_p if asymmetric else c_p + c_d

    pairs, shortened = schedule.pairs(plain.timesteps), []
    for pair, eta in zip(schedule.pairs(rest.timesteps), rest.etas, strict=True):
        begin = plain.timesteps.index(pair[0])
        end = plain.steps if pair[1] == CLEAN else plain.timesteps.index(pair[1])
        whole = effect(pair, eta) or math.inf  # a last step from t = 0 may have none, where alpha_bar is 1 nowhere
        weights = [
            effect(pairs[i], plain.etas[i])
            * math.sqrt(schedule.alpha_bar(pair[1]) / schedule.alpha_bar(pairs[i][1]))
            / whole
            for i in range(begin, end)
        ]
        shortened.append(torch.einsum("i,i...->...", torch.tensor(weights), delta[begin:end]))
    return torch.stack(shortened)


@torch.inference_mode()
def predicted_images(run: Trajectory, positions: Sequence[int]) -> torch.Tensor:
    """P_t of a run of one sample with its x_t, edited if the run is, as images; (len(positions), C, H, W)."""
    predicted, model = [], run.model
    for i in positions:
        t, x_t = run.timesteps[i], run.x.values[i].to(model.device)
        bottleneck = model.encode(x_t, t)
        h = None if run.edit is None else run.edit.change(i, bottleneck.h, slice(None))
        eps = model.decode(bottleneck if h is None else bottleneck.with_h(h))
        predicted.append(model.schedule.predict_x0(x_t, eps, t).cpu())
    return model.to_images(torch.cat(predicted))
