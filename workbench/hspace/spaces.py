"""The spaces of a network beside h: what every block gives and every skip connection carries."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd
import torch
from tqdm.auto import tqdm

from workbench.diffusion.sampling import Trajectory, batches


def tap_table(run: Trajectory, *, timesteps: Sequence[int] | None = None, progress: bool = True) -> pd.DataFrame:
    """Describe all taps of a network, in the order of its forward pass.

    Parameters
    ----------
    run : Trajectory
        Samples whose activations are measured.
    timesteps : sequence of int, optional
        Some that the run visited; by default its first, middle and last.
    progress : bool

    Returns
    -------
    DataFrame
        One row per tap and timestep, with columns "tap", "t", "channels", "height", "width"; "rms", the root mean
        square of all values; and "varies", the share of the mean square by which samples differ: 1 if the mean over
        samples is 0 everywhere, 0 if all samples are the same.

    Raises
    ------
    ValueError
        If there are fewer than two samples, or a timestep was not visited.
    """
    if len(run) < 2:
        raise ValueError(f"the run has {len(run)} sample; samples differ from at least two on")
    visited = run.timesteps
    usual = sorted({visited[0], visited[len(visited) // 2], visited[-1]}, reverse=True)
    chosen = usual if timesteps is None else timesteps
    model, rows = run.model, []
    pairs = [(tap, t) for tap in _in_order(model.taps) for t in chosen]
    with torch.inference_mode():
        for tap, t in tqdm(pairs, "reading taps", delay=2, leave=False, disable=not progress):
            tapped, x_t = model.tapped(tap), run.x_at(t)
            h = torch.cat(
                [tapped.encode(x_t[b].to(model.device), t).h.cpu() for b in batches(len(run), run.batch_size)]
            )
            square, of_mean = h.square().mean().item(), h.mean(dim=0).square().mean().item()
            n = len(h)
            # The square of a mean of n samples holds 1/n of their variance.
            varies = (square - of_mean) * n / (n - 1) / square if square > 0 else 0.0
            rows.append((tap, t, *h.shape[1:], square**0.5, min(varies, 1.0)))
    return pd.DataFrame(rows, columns=["tap", "t", "channels", "height", "width", "rms", "varies"])


def _in_order(taps: Sequence[str]) -> list[str]:
    """Taps in the order in which a pass comes by: down, the mid block, skips, up."""
    kinds = ("down", "before", "middle", "after", "skip", "up")
    return sorted(taps, key=lambda tap: kinds.index(tap.split(".")[0]))
