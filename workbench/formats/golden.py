"""Reference values of the hub's DDPMs from diffusers' authors, to check that a model is loaded correctly.

The numbers are those of the script `scripts/generate_logits.py` of huggingface/diffusers (Apache-2.0): the first values
of the first row of eps, for one image of noise of torch's CPU generator with seed 0, at t = 10.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch

T, COUNT = 10, 30

TOLERANCE = 1e-3
"""Up to this difference the script takes two networks for the same."""

EPS: dict[str, list[float]] = json.loads((Path(__file__).parent / "golden.json").read_text(encoding="utf-8"))
"""eps by hub id."""


def noise(image_shape: tuple[int, int, int]) -> torch.Tensor:
    """The image of noise that the script takes.

    Parameters
    ----------
    image_shape : (int, int, int)
        (C, H, W)

    Returns
    -------
    Tensor of shape (1, C, H, W), float32, on the CPU
    """
    return torch.randn(1, *image_shape, generator=torch.Generator().manual_seed(0))
