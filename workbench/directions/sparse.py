"""A sparse code of h: an autoencoder of its positions, each a sum of a few features (Makhzani and Frey 2013)."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from tqdm.auto import tqdm

from workbench.analysis.samples import matched_column
from workbench.diffusion.networks import seeded
from workbench.directions.direction import Direction, origin_of
from workbench.hspace.store import HStore

TOKENS = 100_000
"""Positions of h that the code is trained on, at most, over all timesteps."""


@dataclass(frozen=True, eq=False)
class SparseCode:
    """A trained code, and what its features do in the store that it was trained on.

    At a position of h_t, with m_t and s_t the channels' means and standard deviations,
    z = TopK(ReLU(E ((h - m_t) / s_t - c) + b)) and h ~ m_t + s_t (c + D'z).

    Attributes
    ----------
    features : Tensor of shape (m, C), float32
        Rows of D, each of length 1.
    spreads : Tensor of shape (T, C)
        s_t at each timestep of the store.
    activity : ndarray of shape (n, m), float32
        Mean of z over positions and timesteps, one row per sample.
    maps : Tensor of shape (T, m, h, w)
        Mean of z over samples.
    explained : float
        Share of the variance of the standardised h that the code explains.
    store : HStore
    parameters : dict
    """

    features: torch.Tensor = field(repr=False)
    spreads: torch.Tensor = field(repr=False)
    activity: np.ndarray = field(repr=False)
    maps: torch.Tensor = field(repr=False)
    explained: float
    store: HStore = field(repr=False)
    parameters: dict

    def ranked(self, labels: pd.Series) -> np.ndarray:
        """Features by the size of their activity's correlation with labels, (m,), highest first; inactive ones last.

        Parameters
        ----------
        labels : Series of shape (n,)
            0 or 1, or scores, matched by seed or file name.
        """
        y = matched_column(self.store, labels, "the labels").to_numpy(dtype=float)
        z = self.activity - self.activity.mean(axis=0)
        size = np.sqrt((z**2).sum(axis=0) * ((y - y.mean()) ** 2).sum())
        correlation = np.divide(np.abs(z.T @ (y - y.mean())), size, out=np.zeros(z.shape[1]), where=size > 0)
        return np.argsort(-correlation, kind="stable")

    def aligned(self, labels: pd.Series, *, most: int = 8) -> np.ndarray:
        """Weights of a few features that tell an attribute, (m,), 0 for all but `most` at most.

        An L1-penalised logistic regression on the activities; the penalty is halved until just before more than `most`
        weights are nonzero (CASL's supervised mapping, He et al. 2026, arXiv 2601.15441, whose penalty is inferred).

        Raises
        ------
        ValueError
            If no feature tells anything about the attribute.
        """
        y = matched_column(self.store, labels, "the labels").to_numpy(dtype=float) > 0.5
        spread = self.activity.std(axis=0)
        z = (self.activity - self.activity.mean(axis=0)) / np.where(spread > 0, spread, 1.0)
        found = np.zeros(z.shape[1])
        for C in 2.0 ** np.arange(-10, 5):
            fit = LogisticRegression(l1_ratio=1.0, C=C, solver="liblinear", class_weight="balanced", random_state=0)
            weights = fit.fit(z, y).coef_[0]
            if np.count_nonzero(weights) > most:
                break
            found = weights
        if not found.any():
            raise ValueError(f"no feature of the sparse code tells {labels.name}; take more samples")
        return found / np.where(spread > 0, spread, 1.0)

    def direction(self, weights: np.ndarray, name: str, *, progress: bool = True) -> Direction:
        """h_t moved by s_t times the weighted features, each where it is active on average.

        Parameters
        ----------
        weights : ndarray of shape (m,)
        name : str
        progress : bool

        Returns
        -------
        Direction
            One unit of scale is one sigma of the store's samples. Since the code is theirs, they spread too widely
            along it: in avataaars32 by 7% at 64 samples, where sigma's own error is 9%, and less with more of them.
            `calibrated` with other samples is free of it.
        """
        chosen = np.flatnonzero(weights)
        terms = torch.from_numpy(weights[chosen]).float()[:, None] * self.features[chosen]
        delta = torch.einsum("fc,tfhw->tchw", terms, self.maps[:, chosen]) * self.spreads[:, :, None, None]
        own = {"weights": {int(f): float(weights[f]) for f in chosen}}
        provenance = origin_of(self.store) | {"method": "sparse code", "parameters": self.parameters | own}
        found = Direction.from_delta(delta, timesteps=self.store.timesteps, name=name, provenance=provenance)
        return found.calibrated(self.store, progress=progress)


@torch.enable_grad()
def fit_sparse_code(
    store: HStore,
    *,
    features: int | None = None,
    active: int = 8,
    steps: int = 1500,
    batch_size: int = 1024,
    learning_rate: float = 2e-3,
    seed: int = 0,
    progress: bool = True,
) -> SparseCode:
    """Train a sparse autoencoder on the positions of h at all timesteps of a store.

    Parameters
    ----------
    store : HStore
    features : int, optional
        By default four times the channels of h.
    active : int
        Features that are not 0, at most, at a position.
    steps, batch_size : int
        Batches of positions.
    learning_rate : float
        Of Adam.
    seed : int
    progress : bool

    Returns
    -------
    SparseCode

    Raises
    ------
    ValueError
        If `active` is not between 1 and the number of features.
    """
    channels, timesteps = store.h_shape[0], store.timesteps
    m = 4 * channels if features is None else features
    if not 1 <= active <= m:
        raise ValueError(f"active is {active}; it lies in 1..{m}, the number of features")
    rng = np.random.default_rng(seed)
    means, spreads, tokens = [], [], []
    for t in timesteps:
        h = _positions(store.at(t), channels)
        means.append(h.mean(dim=0))
        spreads.append(h.std(dim=0).clamp(min=1e-6))
        rows = rng.choice(len(h), min(len(h), TOKENS // len(timesteps)), replace=False)
        tokens.append((h[torch.from_numpy(rows)] - means[-1]) / spreads[-1])
    pool = torch.cat(tokens)
    with seeded([seed]):
        drawn = F.normalize(torch.randn(m, channels))
    encoder, decoder = drawn.clone().requires_grad_(), drawn.clone().requires_grad_()
    bias, centre = torch.zeros(m, requires_grad=True), torch.zeros(channels, requires_grad=True)
    optimiser = torch.optim.Adam([encoder, decoder, bias, centre], learning_rate)
    for _ in tqdm(range(steps), "training the sparse code", disable=not progress, delay=2, leave=False):
        batch = pool[torch.from_numpy(rng.integers(len(pool), size=batch_size))]
        z = _code(batch - centre, encoder, bias, active)
        loss = F.mse_loss(centre + z @ F.normalize(decoder), batch)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        optimiser.step()
    encoder, decoder, bias, centre = (part.detach() for part in (encoder, F.normalize(decoder), bias, centre))
    activity, maps, left, whole = np.zeros((len(store), m), np.float32), [], 0.0, 0.0
    for t, mean, spread in zip(timesteps, means, spreads, strict=True):
        seen, start = 0.0, 0
        for batch in store.batches(t):
            h = (_positions(batch, channels) - mean) / spread
            z = _code(h - centre, encoder, bias, active)
            left, whole = left + float((centre + z @ decoder - h).square().sum()), whole + float(h.square().sum())
            by_sample = z.view(len(batch), -1, m)
            activity[start : start + len(batch)] += by_sample.mean(dim=1).numpy() / len(timesteps)
            seen, start = seen + by_sample.sum(dim=0), start + len(batch)
        maps.append((seen / len(store)).T.view(m, *store.h_shape[1:]))
    parameters = {"features": m, "active": active, "steps": steps, "batch_size": batch_size, "seed": seed}
    return SparseCode(decoder, torch.stack(spreads), activity, torch.stack(maps), 1.0 - left / whole, store, parameters)


def _positions(h: np.ndarray, channels: int) -> torch.Tensor:
    """Flattened h of samples as one row of channels a position; (n*h*w, C)."""
    return torch.from_numpy(h).view(len(h), channels, -1).transpose(1, 2).reshape(-1, channels)


def _code(h: torch.Tensor, encoder: torch.Tensor, bias: torch.Tensor, active: int) -> torch.Tensor:
    """z of standardised positions (b, C), of which `active` at most are not 0; (b, m)."""
    z = F.relu(h @ encoder.T + bias)
    largest = z.topk(active, dim=1)
    return torch.zeros_like(z).scatter(1, largest.indices, largest.values)
