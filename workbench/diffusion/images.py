"""Images of all kinds, as tensors of values in [-1, 1]."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from workbench.diffusion.models import Model
from workbench.shapes import crop_centre, shape_of, with_channels

_ARRAYS = ("uint8", "uint16", "float16", "float32", "float64")


class Unsuitable(ValueError):
    """A valid image that does not meet the request."""


def picture_to_tensor(image: Image.Image, size: int | Sequence[int] | None = None) -> torch.Tensor:
    """A picture: EXIF rotation applied, transparency on white, its centre resized by antialiased bicubic.

    Parameters
    ----------
    image : PIL.Image.Image
        Of any 8- or 16-bit mode.
    size : int, (height, width) or (channels, height, width), optional
        What is cropped is the largest centred part of that aspect ratio. One channel is grey (luminance). Default: the
        whole picture at its native size, in colour.

    Returns
    -------
    Tensor of shape (channels, height, width), float32, values in [-1, 1]

    Raises
    ------
    ValueError
        If the image has 32-bit pixels or cannot be decoded, or channels other than 1 or 3 are asked for.
    """
    picture = _to_rgb(image)
    channels, height, width = shape_of((picture.height, picture.width) if size is None else size)
    if channels not in (1, 3):
        raise Unsuitable(f"a picture has 3 channels, or 1 (grey), not {channels}; save others as .npy arrays (C, H, W)")
    bands = picture.convert("L" if channels == 1 else "RGB").split()
    return _fitted(bands, height, width) / 127.5 - 1


def array_to_tensor(values: np.ndarray, size: int | Sequence[int] | None = None) -> torch.Tensor:
    """An image from an array, cropped and resized as `picture_to_tensor` does.

    Parameters
    ----------
    values : array of shape (height, width), (channels, height, width) or (height, width, channels)
        8 or 16 bits without sign, or floats in [-1, 1]. The shorter one of the first and last axis counts channels.
    size : int, (height, width) or (channels, height, width), optional
        Default: the array's own.

    Returns
    -------
    Tensor of shape (channels, height, width), float32, values in [-1, 1]

    Raises
    ------
    ValueError
        If the array is something else, or has another number of channels (colour becomes grey, and grey colour).
    """
    kind = str(values.dtype)
    if values.ndim not in (2, 3) or 0 in values.shape or kind not in _ARRAYS:
        what = f"it holds {kind} of shape {values.shape}"
        raise Unsuitable(f"{what}; give an image (channels, height, width) of uint8, uint16 or floats in [-1, 1]")
    values = values[None] if values.ndim == 2 else values
    values = np.moveaxis(values, 2, 0) if values.shape[2] < values.shape[0] else values
    channels, height, width = values.shape if size is None else shape_of(size)
    if len(values) != channels and {len(values), channels} != {1, 3}:
        raise Unsuitable(f"it has {len(values)} channels, not {channels}; give size=({len(values)}, {height}, {width})")
    if kind == "uint16":
        values = values.astype(np.float32) / 32767.5 - 1
    elif kind != "uint8":
        values = values.astype(np.float32)
        if not np.abs(values).max() <= 1.001:
            raise Unsuitable("its floats are not all in [-1, 1]; of 8-bit values save x / 127.5 - 1, or uint8")
    fitted = _fitted([Image.fromarray(np.ascontiguousarray(band)) for band in values], height, width)
    return with_channels(fitted / 127.5 - 1 if kind == "uint8" else fitted.clamp(-1, 1), channels)


def check_images(images: torch.Tensor | np.ndarray | Image.Image | Sequence, model: Model) -> torch.Tensor:
    """Images as a tensor that the model takes.

    Parameters
    ----------
    images : LabelledImages, Tensor or array of shape (n, C, H, W), PIL.Image.Image, or a sequence of images
        Values in [-1, 1]; a tensor of a sequence may have shape (C, H, W). LabelledImages and pictures are cropped and
        resized to the model's size, and have its channels.

    Returns
    -------
    Tensor of shape (n, C, H, W), float32, on the CPU

    Raises
    ------
    ValueError
        If they are not of the model's shape and range, or no images.

    Warns
    -----
    UserWarning
        If no value of tensors is below 0, as of images in [0, 1].
    """
    parts = list(images) if isinstance(images, list | tuple) else [images]
    tensors = [_as_tensor(part, model.image_shape) for part in parts]
    if isinstance(images, list | tuple):
        tensors = [tensor[None] if tensor.ndim == 3 else tensor for tensor in tensors]
    for tensor in tensors or [torch.empty(0)]:
        if tensor.ndim != 4 or tuple(tensor.shape[1:]) != model.image_shape or len(tensor) == 0:
            expected = f"(n, {', '.join(map(str, model.image_shape))})"
            raise ValueError(f"images have shape {tuple(tensor.shape)}; {model.name} takes {expected}")
        check_values(tensor)
    checked = torch.cat([tensor.float().cpu() for tensor in tensors]) if len(tensors) > 1 else tensors[0].float().cpu()
    if not any(map(_is_picture, parts)):
        warn_of_unit_range(*map(float, checked.aminmax()))
    return checked


def check_values(images: torch.Tensor) -> None:
    """Raise unless the values are an image in [-1, 1]."""
    if not images.is_floating_point() or not torch.isfinite(images).all() or images.abs().max() > 1.001:
        raise ValueError("images must be finite floats in [-1, 1]; for 8-bit images use x / 127.5 - 1")


def warn_of_unit_range(lowest: float, highest: float) -> None:
    """Warn of images that vary and have no value below 0: hardly any in [-1, 1] do, and all in [0, 1]."""
    if 0 <= lowest < highest:
        text = "no value of the images is below 0, as of images in [0, 1]; map these to [-1, 1] by 2 * x - 1"
        warnings.warn(text, stacklevel=4)


def to_bytes(images: torch.Tensor | Sequence, *, progress: bool = True) -> torch.Tensor:
    """All images of a tensor or of LabelledImages in memory, as uint8."""
    pixels = torch.empty(len(images), *images[:1].shape[1:], dtype=torch.uint8)
    for start in tqdm(range(0, len(images), 256), "reading images", delay=2, leave=False, disable=not progress):
        rows = slice(start, start + 256)
        pixels[rows] = ((images[rows] + 1) * 127.5).round().clamp(0, 255)
    return pixels


def fingerprint(images: torch.Tensor | Sequence) -> str:
    """SHA-256 of a tensor of images in float32, or the fingerprint of LabelledImages."""
    if hasattr(images, "fingerprint"):
        return images.fingerprint
    return hashlib.sha256(images.float().contiguous().numpy().data).hexdigest()


def _is_picture(image) -> bool:
    return isinstance(image, Image.Image) or hasattr(image, "at_size")


def _as_tensor(image, shape: tuple[int, int, int]) -> torch.Tensor:
    """An image of any kind as a tensor; pictures get the given shape."""
    if isinstance(image, Image.Image):
        return picture_to_tensor(image, shape)[None]
    if hasattr(image, "at_size"):
        return image.at_size(shape)[:]
    if torch.is_tensor(image):
        return image.detach()
    if hasattr(image, "__array__"):
        return torch.from_numpy(np.asarray(image))
    raise ValueError(f"images are a {type(image).__name__}; give tensors, PIL images or LabelledImages")


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise Unsuitable("the range of 32-bit pixels is unknown; save with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _fitted(bands: Sequence[Image.Image], height: int, width: int) -> torch.Tensor:
    """The centre of every band at a size, of shape (bands, height, width), float32."""
    cropped = (crop_centre(band, height, width) for band in bands)
    resized = (part.resize((width, height), Image.Resampling.BICUBIC) for part in cropped)
    return torch.from_numpy(np.stack([np.asarray(part) for part in resized])).float()
