"""Noise as a pure function of (seed, stream, timestep).

A counter-based generator (Philox) is keyed by the seed and positioned by the timestep: the noise of a sample does not
depend on the batch it is in, on the order of samples or on where a run was resumed, and any part can be made again
instead of being stored. It is drawn on the CPU, so that a seed is the same image on every device. torch's own CPU
generator is not used since it keeps only the lower 32 bits of its seed: streams derived by hashing would collide.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import torch

from workbench.diffusion.parallel import in_threads

X_T, STEP, FORWARD = 0, 1, 2
"""Streams: initial noise, step noise, noise of the forward process."""

LARGE = 2**19
"""Values from which a draw is split over threads: one alone is slower than a GPU at 256 pixels."""


def check_seeds(seeds: int | Iterable[int]) -> tuple[int, ...]:
    """Seeds as a tuple of distinct non-negative ints.

    Raises
    ------
    ValueError
        If there is none, one is negative or no integer, or one appears twice (two equal seeds are one sample).
    """
    if isinstance(seeds, str):
        raise ValueError(f"seeds must be integers, not the text {seeds!r}; pass e.g. seeds=range(4)")
    given = (seeds,) if isinstance(seeds, (int, np.integer)) else tuple(seeds)
    if not given:
        raise ValueError("no seeds were given; pass at least one, e.g. seeds=range(4)")
    checked = tuple(int(s) for s in given)
    if any(c != s for c, s in zip(checked, given, strict=True)) or min(checked) < 0 or max(checked) >= 2**63:
        raise ValueError(f"seeds must be integers from 0 to 2**63 - 1, not {min(given)}..{max(given)}")
    if len(set(checked)) != len(checked):
        twice = next(s for s, times in Counter(checked).items() if times > 1)
        raise ValueError(f"seed {twice} appears more than once; every sample needs its own seed")
    return checked


def normal(seeds: Sequence[int], shape: Sequence[int], *, stream: int, t: int = 0) -> torch.Tensor:
    """Standard normal noise, one independent draw a seed.

    Parameters
    ----------
    seeds : sequence of int
    shape : sequence of int
        Shape of one sample, e.g. (3, 32, 32).
    stream : int
        `X_T`, `STEP` or `FORWARD`: streams of one seed are independent.
    t : int
        Timestep, for a stream that is drawn once a timestep.

    Returns
    -------
    Tensor of shape (len(seeds), *shape), float32, on the CPU
    """
    draws = np.empty((len(seeds), *shape), dtype=np.float32)

    def fill(rows: slice) -> None:
        for row, seed in zip(draws[rows], seeds[rows], strict=True):
            # The third word of the counter: no draw ever counts far enough to reach another timestep's block.
            generator = np.random.Generator(np.random.Philox(key=[seed, stream], counter=[0, 0, t, 0]))
            generator.standard_normal(dtype=np.float32, out=row)

    if draws.size < LARGE:
        fill(slice(None))
    else:
        in_threads(fill, [slice(i, i + 1) for i in range(len(seeds))])
    return torch.from_numpy(draws)


def initial_noise(seeds: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
    """x_T of each seed; shape (n, C, H, W), float32, on the CPU."""
    return normal(seeds, shape, stream=X_T)


def step_noise(seeds: Sequence[int], shape: Sequence[int], *, t: int) -> torch.Tensor:
    """z_t of each seed, for the step that leaves timestep `t`; shape (n, C, H, W), float32, on the CPU."""
    return normal(seeds, shape, stream=STEP, t=t)
