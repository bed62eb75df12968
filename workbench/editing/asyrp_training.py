"""Training of Asyrp's DeltaBlocks by two texts (Kwon et al. 2023, arXiv 2210.10960, section 3 and appendix)."""

from __future__ import annotations

import time
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from workbench.datasets.clip import Clip, load_clip
from workbench.diffusion.models import Model
from workbench.diffusion.networks import seeded
from workbench.diffusion.sampling import Trajectory, sample
from workbench.diffusion.schedule import within
from workbench.directions.asyrp import DeltaBlock, DeltaFunction
from workbench.directions.words import CLIP, SOURCE
from workbench.editing.asyrp import LEVELS, EditingInterval, find_interval

CLIP_WEIGHT, L1_WEIGHT = 0.8, 3.0
"""Asyrp's weights of its two losses; that of L1 is multiplied by the cosine of the texts."""

DECAY_EVERY, DECAY = 20, 0.9
"""The learning rate falls by this factor after so many passes over the samples, as in the published files."""


@torch.enable_grad()
def train_asyrp(
    model: Model,
    target: str,
    *,
    source: str = SOURCE,
    clip: Clip | str | Path = CLIP,
    run: Trajectory | None = None,
    n: int = 64,
    steps: int = 40,
    interval: EditingInterval | None = None,
    epochs: int = 4,
    batch_size: int = 8,
    learning_rate: float = 2e-3,
    name: str | None = None,
    seed: int = 0,
    progress: bool = True,
) -> DeltaFunction:
    """Train a function Delta h_t = f_t(h_t, t) that changes images from `source` to `target`.

    At every timestep from T down to t_edit, with P_t the image predicted from x_t without the edit and P~_t the one
    with it, the loss is (Asyrp's code, with its weights lambda_1 of 0.8 and lambda_2 of 3) ::

        lambda_1 * -log((2 - L_dir) / 2) + lambda_2 cos(E_T(target), E_T(source)) mean |P~_t - P_t|,
        L_dir = 1 - cos(E_I(P~_t) - E_I(P_t), E_T(target) - E_T(source)).

    x~_t follows the asymmetric process (the edit in P_t alone), x_t the plain one, both with eta 0, and neither carries
    derivatives to the next step. That P_t comes from the plain process is inferred from their code. The authors train
    100 images one by one by SGD with a rate of 0.5; here batches of samples are trained by Adam.

    Parameters
    ----------
    model : Model
        Of pixels, with the tap "after".
    target, source : str
        Texts of images after the edit and before it.
    clip : Clip, str or path, default "avataaars-clip"
        As of `load_clip`; Asyrp takes ViT-B/16.
    run : Trajectory, optional
        Deterministic: images inverted with `record_x=True`, or samples with eta 0; by default `n` samples of this seed.
    n, steps : int
        Samples and timesteps, where no run is given; Asyrp: 100 and 40.
    interval : EditingInterval, optional
        Its t_edit ends the edit. By default that of `find_interval`, Asyrp's rule, with the distance of CLIP's
        embeddings and the cosine of the texts.
    epochs, batch_size : int
        Passes over the samples, and samples in a batch.
    learning_rate : float, default 2e-3
    name : str, optional
        By default the target.
    seed : int
        Of the samples, the initial weights and the order.
    progress : bool

    Returns
    -------
    DeltaFunction
        With `training`: texts, settings, t_edit, t_boost and the mean losses of every epoch. Edit with it by
        `edit_asyrp`. Saved as `.pth`, its block, of the "ddpm" layout, is a file of Asyrp.

    Raises
    ------
    ValueError
        If the run is of another model or not deterministic, or a text is empty or of unknown words.

    Notes
    -----
    The last convolution begins at 0, so that training begins at the unedited image; Asyrp draws it at random.
    """
    if model.latent:
        raise ValueError(f"{model.name} works on latents; Asyrp is trained on models of pixels")
    clip = clip if isinstance(clip, Clip) else load_clip(clip, device=model.device)
    first, second = torch.from_numpy(clip.texts([source, target])).to(model.device)
    cosine = float(first @ second)
    if cosine > 1 - 1e-6:
        raise ValueError(f"{target!r} and {source!r} are the same to {clip.name}; give texts that differ")
    along = torch.nn.functional.normalize(second - first, dim=0)
    if run is None:
        run = sample(model, range(seed, seed + n), steps=steps, eta=0.0, record_x=True, progress=progress)
    if any(run.etas) or run.model.hash != model.hash:
        raise ValueError("train on a deterministic run (eta 0) of this model")
    if interval is None:
        interval = clip_interval(run, clip, cosine=max(cosine, 1e-3), progress=progress)
    with seeded([seed]):
        emb = model.unet.embed(0, 1).shape[1]
        block = DeltaBlock("ddpm", model.h_shape[0], emb).to(model.device)
    torch.nn.init.zeros_(block.conv2.weight)
    torch.nn.init.zeros_(block.conv2.bias)
    function = DeltaFunction(model, ((1.0, block),), name or target, ())
    function.check_fits(model)
    optimiser = torch.optim.Adam(block.parameters(), learning_rate)
    decay = torch.optim.lr_scheduler.StepLR(optimiser, DECAY_EVERY, DECAY)
    within((model.schedule.T - 1, interval.t_edit), run.timesteps)  # refuses an interval without a visited timestep
    pairs = [pair for pair in model.schedule.pairs(run.timesteps) if pair[0] >= interval.t_edit]
    rng, started, losses = np.random.default_rng(seed), time.monotonic(), []
    batches = -(-len(run) // batch_size)
    bar = tqdm(total=epochs * batches, desc=f"training {function.name}", unit="batch", disable=not progress)
    with bar:
        for _ in range(epochs):
            seen = []
            for rows in np.array_split(rng.permutation(len(run)), batches):
                x = edited = run.x_T[torch.from_numpy(rows)].to(model.device)
                for pair in pairs:
                    (x, edited), loss, parts = _step(
                        function, (x, edited), pair, clip=clip, along=along, weights=(CLIP_WEIGHT, L1_WEIGHT * cosine)
                    )
                    optimiser.zero_grad(set_to_none=True)
                    loss.backward()
                    optimiser.step()
                    seen.append(parts)
                bar.update()
                bar.set_postfix(loss=f"{float(loss.detach()):.3f}")
            decay.step()
            losses.append([round(float(value), 5) for value in np.mean(seen, axis=0)])
    about = {"target": target, "source": source, "clip": clip.hash, "cosine": cosine, "t_edit": interval.t_edit}
    about |= {"t_boost": interval.t_boost, "n": len(run), "steps": run.steps, "epochs": epochs, "losses": losses}
    about |= {"learning_rate": learning_rate, "seed": seed, "minutes": round((time.monotonic() - started) / 60, 2)}
    return replace(function, terms=((1.0, block.requires_grad_(False)),), training=about)


def clip_interval(run: Trajectory, clip: Clip, *, cosine: float, progress: bool = True) -> EditingInterval:
    """Asyrp's editing interval by the distance of CLIP's embeddings of images; see `find_interval`.

    All timesteps, with a warning, where a distance never reaches its level.
    """

    def distance(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        return np.linalg.norm(clip.images(a) - clip.images(b), axis=1)

    try:
        return find_interval(run, distance=distance, levels=LEVELS["clip"], cosine=cosine, progress=progress)
    except ValueError as error:
        warnings.warn(f"the edit acts at all timesteps, since no interval is found: {error}", stacklevel=4)
        return EditingInterval(0, 0)


def asyrp_loss(
    edited: torch.Tensor,
    plain: torch.Tensor,
    *,
    clip: Clip,
    along: torch.Tensor,
    weights: tuple[float, float],
) -> tuple[torch.Tensor, tuple[float, float]]:
    """Asyrp's loss of predicted images (n, C, H, W), and its two parts before they are weighted.

    `along` is the unit difference of the texts' embeddings, and `weights` are lambda_1 and lambda_2 times the cosine.
    """
    moved = clip.differentiable(edited) - clip.differentiable(plain)
    L_dir = 1.0 - torch.nn.functional.cosine_similarity(moved, along[None], dim=1, eps=1e-6)
    directional = -torch.log((2.0 - L_dir).clamp(min=1e-6) / 2.0).mean()
    l1 = (edited - plain).abs().mean()
    return weights[0] * directional + weights[1] * l1, (float(directional.detach()), float(l1.detach()))


def _step(
    function: DeltaFunction,
    x: tuple[torch.Tensor, torch.Tensor],
    pair: tuple[int, int],
    *,
    clip: Clip,
    along: torch.Tensor,
    weights: tuple[float, float],
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, tuple[float, float]]:
    """One step of the plain and of the edited process: both x_{t_prev}, the loss and its parts."""
    model, t, (plain, edited) = function.model, pair[0], x
    schedule = model.schedule
    with torch.no_grad():
        eps, state = model(plain, t), model.encode(edited, t)
        kept = model.decode(state)  # of D_t, which the asymmetric process leaves as it is
        plain_P = schedule.predict_x0(plain, eps, t)
        plain = schedule.ddim_step(plain, eps, pair)
    changed = model.decode(state.with_h(state.h + function(state.h, t)))
    P = schedule.predict_x0(edited, changed, t)
    loss, parts = asyrp_loss(P, plain_P, clip=clip, along=along, weights=weights)
    with torch.no_grad():
        edited = schedule.ddim_step(edited, changed.detach(), pair, eps_direction=kept)
    return (plain, edited), loss, parts
