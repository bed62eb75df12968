"""Moving pictures of edits and of what a sample becomes: GIF, WebP or MP4 files for talks and pages."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from workbench.io import written
from workbench.paths import writable
from workbench.report.pictures import to_pixels
from workbench.report.style import as_array

if TYPE_CHECKING:  # it imports torch, and reports begin without
    from workbench.editing.render import EditGrid

_SUFFIXES = (".gif", ".webp", ".mp4")
_RATE = 8
"""Frames a second."""
_SIDE = 256
"""Pixels of the longer side of an image, at least; pixels are enlarged a whole number of times."""


def animate(
    images: EditGrid | np.ndarray | Sequence,
    path: str | Path,
) -> Path:
    """Write images as a film that goes there and back, such as an edit from weak to strong or a predicted image over t.

    Parameters
    ----------
    images : EditGrid, or array or Tensor of shape (frames, C, H, W) or (samples, frames, C, H, W), values in [-1, 1]
        The columns of a grid are its frames, its rows lie side by side.
    path : path
        Ends in .gif, .webp or .mp4; MP4 needs ffmpeg.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the images have another shape, there is only one frame, or the path ends otherwise or has no ffmpeg.
    """
    path = writable(path, suffixes=_SUFFIXES)
    images = as_array(images)
    images = images[None] if images.ndim == 4 else images
    if images.ndim != 5 or images.shape[1] < 2:
        raise ValueError(f"images has shape {images.shape}; a film takes (samples, frames, C, H, W), 2 frames or more")
    rows = [to_pixels(row) for row in images]
    frames = [np.concatenate([row[f] for row in rows], axis=1) for f in range(images.shape[1])]
    times = -(-_SIDE // max(images.shape[-2:]))
    frames = [frame.repeat(times, axis=0).repeat(times, axis=1) for frame in frames]
    frames += frames[-2:0:-1]
    suffix = path.suffix.lower()
    with written(path) as partial:
        if suffix == ".mp4":
            _film(frames, partial)
        else:
            first, *rest = map(Image.fromarray, frames)
            # The frames' own colours: 256 for each in a GIF, all in a WebP.
            options = {"format": suffix[1:].upper(), "save_all": True, "append_images": rest, "loop": 0}
            first.save(partial, **options, duration=round(1000 / _RATE), lossless=True, disposal=2)
    return path


def _film(frames: Sequence[np.ndarray], path: Path) -> None:
    """An MP4 by ffmpeg, which takes the frames as they are from its standard input."""
    program = shutil.which("ffmpeg")
    if program is None:
        raise ValueError("an MP4 needs ffmpeg, which is not installed; write a .webp or .gif, or install ffmpeg")
    height, width = frames[0].shape[:2]
    command = [program, "-y", "-loglevel", "error", "-f", "rawvideo", "-pix_fmt", "rgb24", "-s", f"{width}x{height}"]
    command += ["-r", str(_RATE), "-i", "-", "-vf", "pad=ceil(iw/2)*2:ceil(ih/2)*2", "-pix_fmt", "yuv420p", "-f", "mp4"]
    said = subprocess.run([*command, str(path)], input=b"".join(f.tobytes() for f in frames), capture_output=True)
    if said.returncode:
        raise ValueError(f"ffmpeg could not write the film: {said.stderr.decode(errors='replace').strip()[:200]}")
