"""Inversion: find the x_t, or the step noises, from which a model generates given images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from workbench.diffusion.images import check_images
from workbench.diffusion.models import Model
from workbench.diffusion.noise import FORWARD, check_seeds, normal
from workbench.diffusion.sampling import (
    StepRecord,
    Trajectory,
    check_batch_size,
    in_batches,
    keep,
    progress_bar,
    replay,
    to_device,
)
from workbench.diffusion.schedule import CLEAN
from workbench.io import one_of

INVERSIONS = ("ddim", "fixed-point", "edit-friendly")


def invert(
    model: Model,
    images: torch.Tensor | np.ndarray | Image.Image | Sequence,
    *,
    steps: int | Sequence[int] = 50,
    method: str = "ddim",
    iterations: int = 5,
    eta: float | Sequence[float] = 1.0,
    noise_repair: bool = False,
    seed: int = 0,
    residual: bool = False,
    record_h: bool = False,
    record_x: bool = False,
    batch_size: int | None = None,
    progress: bool | tqdm = True,
) -> Trajectory:
    """Find the x_T, and for eta > 0 the noise of every step, from which the reverse process gives these images.

    "ddim" and "fixed-point" run the deterministic process (eta 0) backwards: the step from t_prev to t solves
    x_prev = DDIM(x_t, eps(x_t, t)) for x_t. "ddim" approximates with eps at (x_prev, t_prev), with one network pass per
    step (DDIM eq. 13) and first-order accuracy; "fixed-point" starts there and iterates x_t <- the solution with eps at
    the last (x_t, t), with `iterations` more passes per step.

    "edit-friendly" (Huberman-Spiegelglas et al. 2023, arXiv 2304.06140) draws every x_t of the forward process
    with independent noise, x_t = sqrt(alpha_bar_t) x_0 + sqrt(1 - alpha_bar_t) n_t, and stores the step noises
    z_t = (x_prev - mu_t(x_t)) / sigma_t that lead from one to the next. It proceeds from the noisiest step, and each
    x_prev is the result of the step with the stored z_t, so that a replay visits the same x_t, bit for bit. The last
    step adds no noise: the reconstruction is P_t at the least noisy timestep, and the residual is the rest. Where it
    does (`NoiseSchedule.clean` below 1, as in Stable Diffusion), its z leads to the image itself.

    Parameters
    ----------
    model : Model
    images : Tensor of shape (n, C, H, W), LabelledImages, PIL.Image.Image, or a list of images
        Tensors have values in [-1, 1] (if none is below 0, a warning asks whether they are in [0, 1]); in a list they
        may have shape (C, H, W). LabelledImages and PIL images are cropped and resized to the model's size.
    steps : int or sequence of int, default 50
        As in `sample`. More steps improve the reconstruction.
    method : {"ddim", "fixed-point", "edit-friendly"}
    iterations : int, default 5
        For "fixed-point".
    eta : float or sequence of float (one per step), values in (0, 1], default 1
        For "edit-friendly"; the others have eta 0.
    noise_repair : bool, default False
        For "ddim" and "fixed-point": draw x at the least noisy timestep from the forward process, instead of inverting
        a step from the clean image. The network expects a little noise there and a clean image has none, so its
        inversion ends inside the shell of sampled x_T, for any number of steps. With repair, the image is known only up
        to that noise.
    seed : int, default 0
        The image at position p takes its noise from seed + p: n_t of "edit-friendly", or the noise of the repair.
    residual : bool
        Also reconstruct the images and keep the residual; "edit-friendly" always does, at no cost.
    record_h, record_x : bool
        Keep h_t, x_t at every visited timestep; both are exact: h_t is the network's at (x_t, t).
    batch_size, progress
        As in `sample`.

    Returns
    -------
    Trajectory
        Without seeds; x0 holds the images (for a latent model, their latents), `replay` gives their reconstruction and
        `round_trip_error` its PSNR.

    Raises
    ------
    ValueError
        If the images don't have the model's shape and range, the method is unknown, iterations are negative, or eta is
        0 for "edit-friendly".
    """
    images = model.to_latents(check_images(images, model))
    if iterations < 0:
        raise ValueError(f"iterations is {iterations}; give 0 or more")
    one_of("method", method, INVERSIONS)
    visited = model.schedule.timesteps(steps)
    edit_friendly = method == "edit-friendly"
    etas = model.schedule.etas(eta if edit_friendly else 0.0, len(visited))
    if edit_friendly and min(etas) == 0.0:
        raise ValueError('an edit-friendly inversion needs an eta in (0, 1], not 0; for eta 0 use method="ddim"')
    if edit_friendly and noise_repair:
        raise ValueError('noise_repair is for "ddim" and "fixed-point"; "edit-friendly" has noise at every step')
    n = len(images)
    inverted = Trajectory(
        model=model,
        x_T=torch.empty_like(images),
        x0=images,
        timesteps=visited,
        etas=etas,
        h=StepRecord.empty(model, visited, n, model.h_shape) if record_h else None,
        x=StepRecord.empty(model, visited, n, model.x_shape) if record_x else None,
        stored_noise=torch.zeros(len(visited), n, *model.x_shape) if edit_friendly else None,
        residual=torch.empty_like(images) if edit_friendly else None,
        batch_size=check_batch_size(batch_size, model, n),
    )
    seeds = check_seeds(range(seed, seed + n))
    with progress_bar(n, len(visited), "inverting", show=progress) as bar, torch.inference_mode():

        def fill(batch: slice) -> None:
            if edit_friendly:
                _fill_edit_friendly(inverted, batch, seeds[batch], bar)
            else:
                repair = seeds[batch] if noise_repair else None
                _fill_ddim(inverted, batch, iterations if method == "fixed-point" else 0, repair, bar)

        inverted = replace(inverted, batch_size=in_batches(fill, n, inverted.batch_size))
    if residual and not edit_friendly:
        inverted = replace(inverted, residual=images - replay(inverted, progress=progress).x0)
    return inverted


def _fill_ddim(inverted: Trajectory, batch: slice, iterations: int, repair: Sequence[int] | None, bar: tqdm) -> None:
    """Invert the images of a batch by DDIM backwards, from clean to noisy."""
    model, h, x = inverted.model, inverted.h, inverted.x
    pairs = model.schedule.pairs(inverted.timesteps)
    x_t = to_device(inverted.x0[batch], model.device)
    steps = list(enumerate(pairs))
    if repair is not None:
        i, (t, _) = steps.pop()
        x_t = model.schedule.add_noise(x_t, _forward_noise(model, repair, t), t)
        keep(x, i, batch, x_t)
        bar.update(batch.stop - batch.start)
    for i, (t, t_prev) in reversed(steps):
        bottleneck = model.encode(x_t, max(t_prev, 0))
        if t_prev != CLEAN:
            keep(h, i + 1, batch, bottleneck.h)
        x_prev, x_t = x_t, _ddim_inverse(model, x_t, model.decode(bottleneck), (t, t_prev))
        for _ in range(iterations):
            x_t = _ddim_inverse(model, x_prev, model(x_t, t), (t, t_prev))
        keep(x, i, batch, x_t)
        bar.update(batch.stop - batch.start)
    if h is not None:
        keep(h, 0, batch, model.encode(x_t, pairs[0][0]).h)
    inverted.x_T[batch] = x_t.cpu()


def _fill_edit_friendly(inverted: Trajectory, batch: slice, seeds: Sequence[int], bar: tqdm) -> None:
    """Find the step noises of a batch, from noisy to clean."""
    model, schedule = inverted.model, inverted.model.schedule
    x0 = to_device(inverted.x0[batch], model.device)

    def forward(t: int) -> torch.Tensor:
        return x0 if t == CLEAN else schedule.add_noise(x0, _forward_noise(model, seeds, t), t)

    x_t = forward(inverted.timesteps[0])
    inverted.x_T[batch] = x_t.cpu()
    for i, (t, t_prev) in enumerate(schedule.pairs(inverted.timesteps)):
        bottleneck, eta = model.encode(x_t, t), inverted.etas[i]
        eps, z = model.decode(bottleneck), None
        keep(inverted.h, i, batch, bottleneck.h)
        keep(inverted.x, i, batch, x_t)
        sigma = schedule.sigma(t, t_prev, eta)
        if sigma > 0.0:
            mu = schedule.ddim_step(x_t, eps, (t, t_prev), eta=eta, noise=torch.zeros_like(x_t))
            z = (forward(t_prev) - mu) / sigma
            inverted.stored_noise[i, batch] = z.cpu()
        x_t = schedule.ddim_step(x_t, eps, (t, t_prev), eta=eta, noise=z)
        bar.update(batch.stop - batch.start)
    inverted.residual[batch] = (x0 - x_t).cpu()


def _forward_noise(model: Model, seeds: Sequence[int], t: int) -> torch.Tensor:
    return to_device(normal(seeds, model.x_shape, stream=FORWARD, t=t), model.device)


def _ddim_inverse(model: Model, x_prev: torch.Tensor, eps: torch.Tensor, pair: tuple[int, int]) -> torch.Tensor:
    """x_t such that the eta-0 step with this eps leads to x_prev (DDIM eq. 13)."""
    t, t_prev = pair
    schedule = model.schedule
    p_t = schedule.predict_x0(x_prev, eps, t_prev)
    return schedule.add_noise(p_t, eps, t)
