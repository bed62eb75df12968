"""Directions of h that are learned without labels, so that what they do can be told apart (Zhang et al. 2023)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from tqdm.auto import tqdm

from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.networks import seeded
from workbench.directions.asyrp import DeltaBlock
from workbench.directions.direction import Direction, deviations, origin_of
from workbench.hspace.store import HStore

SAMPLES = 256
"""Samples of a store, at most, that are learned from."""

TYPICAL = 0.3
"""Length of a shift of strength 1, in units of the root of h's whole variance at a timestep."""

VISIBLE = 0.05
"""Change of a pixel, in [-1, 1], that is as large as the noise through which it is seen."""

STRENGTHS = (0.5, 1.5)
STRENGTH_WEIGHT, FIDELITY_WEIGHT = 0.25, 0.05
"""Weights of the strength's error and of the discriminator; that of the direction's cross entropy is 1."""


@torch.enable_grad()
def learn_directions(
    model: Model,
    store: HStore,
    *,
    k: int = 9,
    steps: int = 400,
    batch_size: int = 12,
    learning_rate: float = 3e-3,
    seed: int = 0,
    progress: bool = True,
) -> list[Direction]:
    """Learn k directions of h that a network can tell from each other by what they do to the image.

    A shift module turns concept vector v_j and timestep t into a shift of h_t of a fixed length. A reconstructor sees
    the images predicted without and with the shift, P_t and P~_t, and says which j it was and how strong; it and the
    shifts are trained together, and a discriminator keeps P~_t among the P_t (Zhang et al. 2023, arXiv 2310.09912,
    after Voynov and Babenko 2020).

    Parameters
    ----------
    model : Model
    store : HStore
        With x_t (`extract(..., record_x=True)`); its first 256 samples are learned from.
    k : int
    steps, batch_size : int
    learning_rate : float
        Of Adam, for all networks.
    seed : int
    progress : bool

    Returns
    -------
    list of Direction, of length k
        One unit of scale is one sigma of the population, as for other methods. The sign means nothing. Their
        `extras["accuracy"]` is the share of all shifts of the last quarter of the steps that were told right.

    Raises
    ------
    ValueError
        If the store is of another model or tap, or has no x_t, or k is below 2.

    Notes
    -----
    Only the abstract was available; everything else is inferred. The authors shift h at all timesteps and
    backpropagate through the whole process; here each batch uses one visited timestep, so that a step costs four passes
    per sample. The shift module is Asyrp's DeltaBlock with a residual connection, the length of a shift .3 times the
    root of h's variance, and the
    reconstructor sees the change through noise.
    """
    if k < 2:
        raise ValueError(f"k is {k}; directions are told from each other, so there are at least 2")
    refuse_other_model(str(store.path), store.provenance["model"], model.provenance())
    visited = {t: torch.from_numpy(_first(store, t, "x")).view(-1, *model.x_shape) for t in store.timesteps}
    lengths = {t: TYPICAL * float(np.sqrt(_first(store, t, "h").var(axis=0).sum())) for t in store.timesteps}
    rng, generator = np.random.default_rng(seed), torch.Generator().manual_seed(seed)
    with seeded([seed]):
        module = ShiftModule(k, model.h_shape, model.unet.embed(0, 1).shape[1]).to(model.device)
        channels = model.x_shape[0]
        reconstructor = _judge(2 * channels, k + 1).to(model.device)
        discriminator = _judge(channels, 1).to(model.device)
    optimiser = torch.optim.Adam([*module.parameters(), *reconstructor.parameters()], learning_rate)
    critic = torch.optim.Adam(discriminator.parameters(), learning_rate, betas=(0.5, 0.99))
    right: list[float] = []
    for _ in tqdm(range(steps), "learning directions", disable=not progress, delay=2, leave=False):
        t = int(rng.choice(store.timesteps))
        x_t = visited[t][torch.from_numpy(rng.integers(len(visited[t]), size=batch_size))].to(model.device)
        which = torch.from_numpy(rng.integers(k, size=batch_size)).to(model.device)
        strength = rng.uniform(*STRENGTHS, batch_size) * rng.choice([-1.0, 1.0], batch_size)
        strength = torch.from_numpy(strength).float().to(model.device)
        with torch.no_grad():
            state = model.encode(x_t, t)
            P = model.schedule.predict_x0(x_t, model.decode(state), t)
        shift = lengths[t] * strength.view(-1, 1, 1, 1) * module(model.unet.embed(t, 1))[which]
        P_shifted = model.schedule.predict_x0(x_t, model.decode(state.with_h(state.h + shift)), t)
        real, made = discriminator(P), discriminator(P_shifted.detach())
        critic.zero_grad(set_to_none=True)
        (F.relu(1 - real).mean() + F.relu(1 + made).mean()).backward()
        critic.step()
        # Noise hides what could not be seen: without it, the least change would tell a direction.
        change = (P_shifted - P) / VISIBLE
        noise = torch.randn(change.shape, generator=generator).to(change)
        told = reconstructor(torch.cat([P.clamp(-1, 1), change + noise], dim=1))
        loss = F.cross_entropy(told[:, :k], which) + STRENGTH_WEIGHT * (told[:, k] - strength).abs().mean()
        loss = loss - FIDELITY_WEIGHT * discriminator(P_shifted).mean()
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
        right.append(float((told[:, :k].argmax(dim=1) == which).float().mean()))
    with torch.no_grad():
        units = torch.stack([module(model.unet.embed(t, 1)).cpu() for t in store.timesteps])
    flat = units.flatten(2).numpy()
    sigmas = deviations(store, dict(zip(store.timesteps, flat, strict=True)), progress=False)
    parameters = {"k": k, "steps": steps, "batch_size": batch_size, "learning_rate": learning_rate, "seed": seed}
    accuracy = float(np.mean(right[-max(1, steps // 4) :]))
    return [
        Direction(
            units[:, j],
            sigma,
            store.timesteps,
            f"learned {j + 1}",
            origin_of(store) | {"method": "learned", "parameters": {**parameters, "component": j}},
            {"accuracy": accuracy},
        )
        for j, sigma in enumerate(sigmas)
    ]


class ShiftModule(nn.Module):
    """Unit shifts of h at a timestep, (k, C, h, w), from concept vectors and the network's embedding of it, (1, E)."""

    def __init__(self, k: int, h_shape: tuple[int, int, int], emb_channels: int) -> None:
        super().__init__()
        self.concepts = nn.Parameter(torch.randn(k, *h_shape))
        self.block = DeltaBlock("ddpm", h_shape[0], emb_channels)

    def forward(self, emb: torch.Tensor) -> torch.Tensor:
        shift = self.concepts + self.block(self.concepts, emb.expand(len(self.concepts), -1))
        return F.normalize(shift.flatten(1)).view_as(shift)


def _judge(channels: int, outputs: int) -> nn.Sequential:
    """A small convolutional network of images of any size."""
    layers, width = [], 32
    for _ in range(3):
        layers += [nn.Conv2d(channels, width, 3, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels, width = width, 2 * width
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * channels, outputs))


def _first(store: HStore, t: int, space: str) -> np.ndarray:
    """h_t or x_t of the first samples of a store, flattened; nothing else is read."""
    chunks = range(-(-min(SAMPLES, len(store)) // store.provenance["chunk"]))
    return np.concatenate(list(store.batches(t, space=space, chunks=chunks)))[:SAMPLES]
