"""Continuous properties of images, computed from their pixels: no network, no labels, true for any domain."""

from __future__ import annotations

import torch

from workbench.shapes import with_channels

LUMA = (0.299, 0.587, 0.114)
"""Weights of red, green and blue in the brightness (ITU-R BT.601)."""

AMOUNTS = ("Brightness", "Greenness", "Edge_Density")


def measure_pixels(images: torch.Tensor) -> torch.Tensor:
    """Amounts of `AMOUNTS` in images.

    Parameters
    ----------
    images : Tensor of shape (n, C, H, W), values in [-1, 1]

    Returns
    -------
    Tensor of shape (n, 3), float64, values in [0, 1]
        Mean luma; green chromatic coordinate G / (R + G + B) of the mean colour, 1/3 for grey images; mean length of
        the luma's gradient from pixel to pixel, 1 for the sharpest checkerboard.
    """
    colours = (with_channels(images, 3).double().clamp(-1, 1) + 1) / 2
    luma = (colours * torch.tensor(LUMA, dtype=torch.float64)[:, None, None]).sum(dim=1)
    red, green, blue = colours.mean(dim=(2, 3)).unbind(dim=1)
    total = red + green + blue
    greenness = torch.where(total > 0, green / total.clamp_min(1e-12), torch.full_like(total, 1 / 3))
    down, right = luma.diff(dim=1)[:, :, :-1], luma.diff(dim=2)[:, :-1]
    edges = ((down**2 + right**2) / 2).sqrt().mean(dim=(1, 2))
    return torch.stack([luma.mean(dim=(1, 2)), greenness, edges], dim=1)
