"""The form of images: channels, height and width, crops to them, other channels, and 8-bit values. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    import numpy as np
    import torch
    from PIL import Image

Pixels = TypeVar("Pixels", "torch.Tensor", "np.ndarray")

FARTHEST = 10.0
"""Images without values below 0 don't reach this."""


def shape_of(size: int | Sequence[int]) -> tuple[int, int, int]:
    """(channels, height, width) of a size: the side of a square, (height, width), or all three; by default 3 channels.

    Raises
    ------
    ValueError
        If a number is below 1, or there are more than three.
    """
    given = tuple(size) if isinstance(size, Sequence) else (size,)
    sides = given * 2 if len(given) == 1 else given
    shape = (3, *sides) if len(sides) == 2 else sides
    if len(shape) != 3 or not all(isinstance(each, Integral) and each >= 1 for each in shape):
        raise ValueError(f"size is {size}; give a side, (height, width) or (channels, height, width), each 1 or more")
    channels, height, width = map(int, shape)
    return channels, height, width


def eight_bit(lowest: float, highest: float) -> bool:
    """Whether values from the lowest to the highest are of 8 bits: far beyond 1, and none below 0.

    Images lie in [-1, 1], and those of a model that diverges far outside of it on both sides.
    """
    return lowest >= 0 and highest > FARTHEST


def crop_centre(image: Image.Image, height: int, width: int) -> Image.Image:
    """The largest centred part of a picture with the aspect ratio of a height and a width."""
    cut_height = min(image.height, max(1, round(image.width * height / width)))
    cut_width = min(image.width, max(1, round(image.height * width / height)))
    left, top = (image.width - cut_width) // 2, (image.height - cut_height) // 2
    return image.crop((left, top, left + cut_width, top + cut_height))


def with_channels(images: Pixels, channels: int) -> Pixels:
    """Images (..., C, H, W) with another number of channels, as they are shown and as networks for others see them.

    Grey is the luminance of 3 channels. Colours are the first three channels of more, and the first one of fewer as
    grey.

    Raises
    ------
    ValueError
        For other numbers of channels.
    """
    given = images.shape[-3]
    if given == channels:
        return images
    if channels == 3:
        return images[..., [0, 1, 2] if given > 3 else [0, 0, 0], :, :]
    if (given, channels) != (3, 1):
        raise ValueError(f"images have {given} channels, and {channels} are wanted; give images of {channels}")
    red, green, blue = (images[..., [k], :, :] for k in range(3))
    return 0.299 * red + 0.587 * green + 0.114 * blue
