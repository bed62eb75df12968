"""Figures that consist of images: grids, edits, before and after; and images as 8-bit pictures."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
import pandas as pd
from matplotlib import style
from numpy.typing import ArrayLike
from PIL import Image

from workbench.report.style import PALETTE, STYLE, Figure, add_caption, as_array, drawing, finite, labelled, words
from workbench.shapes import eight_bit, with_channels

if TYPE_CHECKING:  # it imports torch, and reports begin without
    from workbench.editing.render import EditGrid


def image_grid(
    images: ArrayLike,
    *,
    columns: int | None = None,
    titles: Sequence[str] | None = None,
    row_labels: Sequence[str] | None = None,
    column_labels: Sequence[str] | None = None,
    caption: str | None = None,
) -> Figure:
    """Draw images side by side.

    Parameters
    ----------
    images : array or Tensor of shape (n, C, H, W) or (rows, columns, C, H, W), values in [-1, 1]
        Of 1 channel they are grey; of more than 3, the first three are colours (`with_channels`). Values outside of
        [-1, 1], as noisy images and samples that diverge have them, are clipped.
    columns : int, optional
        Images in a row, for the first shape; default: up to 8.
    titles : sequence of str, optional
        One above each image, row by row.
    row_labels, column_labels : sequence of str, optional
        One left of each row, one above each column.
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure
        One axes that holds one picture an image, every pixel the same whole number of dots wide.

    Raises
    ------
    ValueError
        If the images have another shape, are not finite, or look like 8-bit values; if the labels don't match.
    """
    images = as_array(images)
    if images.ndim == 5:
        if columns is not None:
            raise ValueError("images of five dimensions set the columns; leave out the argument `columns`")
        columns = images.shape[1]
        images = images.reshape(-1, *images.shape[2:])
    pictures = pictures_of(images, "images")
    columns = min(len(pictures), 8) if columns is None else columns
    if columns < 1:
        raise ValueError(f"columns is {columns}; a grid needs at least 1")
    rows = -(-len(pictures) // columns)
    titles = labelled(titles, len(pictures), "titles", "images")
    row_labels = labelled(row_labels, rows, "row_labels", "rows")
    column_labels = labelled(column_labels, columns, "column_labels", "columns")

    height, width = pictures.shape[1:3]
    title_space = 0.22 * width if titles else 0.0
    gap = max(1.0, round(width / 16))
    step_x, step_y = width + gap, height + gap + title_space
    total_x, total_y = columns * step_x - gap, rows * step_y - gap
    dots = max(1, min(round(100 / max(height, width)), int(1060 / (width * columns))))  # a pixel
    with style.context(STYLE):
        inches = dots / matplotlib.rcParams["figure.dpi"]
        figure = Figure(figsize=(total_x * inches, total_y * inches))
        axes = figure.add_axes((0, 0, 1, 1), frame_on=False)
        axes.grid(False)
        for i, picture in enumerate(pictures):
            left, top = i % columns * step_x, i // columns * step_y + title_space
            axes.imshow(picture, extent=(left, left + width, top + height, top), aspect="auto")
            if titles:
                axes.text(left + width / 2, top - 0.03 * width, titles[i], ha="center", va="bottom", fontsize=8)
        axes.set(xlim=(0, total_x), ylim=(total_y, 0), aspect="auto")
        axes.xaxis.tick_top()
        axes.tick_params(length=0, pad=4)
        axes.set_xticks(np.arange(columns) * step_x + width / 2 if column_labels else [], column_labels)
        axes.set_yticks(np.arange(rows) * step_y + title_space + height / 2 if row_labels else [], row_labels)
        add_caption(figure, caption)
    return figure


def edit_grid(grid: EditGrid, *, caption: str | None = None) -> Figure:
    """A grid of edits: samples and directions down, scales across.

    Parameters
    ----------
    grid : EditGrid
        From `workbench.edit_grid`.
    caption : str, optional

    Returns
    -------
    matplotlib Figure
    """
    return image_grid(grid.images, row_labels=grid.row_labels, column_labels=grid.column_labels, caption=caption)


def edit_strips(
    strips: Mapping[tuple[str, str], np.ndarray], attribute: str, *, names: Sequence[str], caption: str | None = None
) -> Figure:
    """Samples and their edits from weak to strong, one row per method.

    Parameters
    ----------
    strips : mapping of (method, attribute) -> array of shape (samples, 1 + strengths, C, H, W), values in [-1, 1]
        As of a `Benchmark`; the first column is the sample itself.
    attribute : str
    names : sequence of str
        Of the samples to draw, the first ones.
    caption : str, optional

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If no method has a strip of that attribute.
    """
    shown = {method: strip[: len(names)] for (method, of), strip in strips.items() if of == attribute}
    if not shown:
        known = ", ".join(repr(of) for of in {of for _, of in strips})
        raise ValueError(f"there is no strip of {attribute!r}; there are {known}")
    columns = max(strip.shape[1] for strip in shown.values())
    # A method with fewer strengths leaves white cells.
    rows = [
        np.pad(strip, [(0, 0), (0, columns - strip.shape[1]), (0, 0), (0, 0), (0, 0)], constant_values=1.0)
        for strip in shown.values()
    ]
    labels = [label for name in names for label in (name, *(f"edit {i + 1}" for i in range(columns - 1)))]
    images = np.stack([np.concatenate(list(row)) for row in rows])
    return image_grid(images, row_labels=list(shown), column_labels=labels, caption=caption)


def before_after(
    before: ArrayLike, after: ArrayLike, *, scores: pd.DataFrame | None = None, caption: str | None = None
) -> Figure:
    """One edit: the image before, after, the difference, and a classifier's scores of both.

    Parameters
    ----------
    before, after : array or Tensor of shape (C, H, W), values in [-1, 1]
    scores : DataFrame with columns "before" and "after", values in [0, 1], optional
        One row an attribute. The 8 that change most are drawn.
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure
        The difference is after - before, halved: grey where there is none.
    """
    before, after = as_array(before).clip(-1, 1), as_array(after).clip(-1, 1)
    pictures = to_pixels(np.stack([before, after, (after - before) / 2]))
    widths = [1, 1, 1] if scores is None else [1, 1, 1, 1.5]
    with drawing(5.4 if scores is None else 8.6, 2.4 if caption is None else 2.8, caption) as figure:
        panels = figure.subplots(1, len(widths), width_ratios=widths)
        for axes, picture, title in zip(panels, pictures, ("before", "after", "difference"), strict=False):
            axes.imshow(picture)
            axes.set_title(title)
            axes.set_axis_off()
        if scores is not None:
            order = (scores["after"] - scores["before"]).abs().nlargest(8).index[::-1]
            at = np.arange(len(order))
            for column, shift, color in (("before", 0.2, PALETTE[0]), ("after", -0.2, PALETTE[1])):
                panels[-1].barh(at + shift, scores.loc[order, column], 0.38, color=color, label=column)
            panels[-1].set_yticks(at, map(words, order), fontsize=8)
            panels[-1].set(xlim=(0, 1), xlabel="probability")
            panels[-1].grid(visible=False, axis="y")
            figure.legend(loc="outside upper right", ncols=2, fontsize=8)
    return figure


def to_pixels(images: ArrayLike) -> np.ndarray:
    """8-bit pictures of images.

    Parameters
    ----------
    images : array or Tensor of shape (n, C, H, W), values in [-1, 1]
        Values outside, as strong edits have them, are clipped.

    Returns
    -------
    ndarray of shape (n, H, W, 3), uint8
    """
    return pictures_of(as_array(images).clip(-1, 1), "images")


def pictures_of(images: ArrayLike, name: str, n: int | None = None) -> np.ndarray:
    """uint8 pictures (n, H, W, 3) of images (n, C, H, W) in [-1, 1]."""
    images = as_array(images)
    if images.ndim != 4 or 0 in images.shape or images.shape[1] > max(3, images.shape[3]):
        raise ValueError(
            f"{name} has shape {images.shape}; it must be (n, C, H, W), channels first, at least one image"
        )
    if n is not None and len(images) != n:
        raise ValueError(f"{name} holds {len(images)} images for {n} points; give one image per point")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} is of type {images.dtype}; it must be floats in [-1, 1] (8 bits: x / 127.5 - 1)")
    finite(images, name)
    low, high = float(images.min()), float(images.max())
    if eight_bit(low, high):
        raise ValueError(f"{name} lies in [{low:.4g}, {high:.4g}]; values must be in [-1, 1] (8 bits: x / 127.5 - 1)")
    scaled = np.clip(with_channels(images, 3).astype(np.float32) * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return scaled.transpose(0, 2, 3, 1)


def png_address(picture: np.ndarray | Image.Image, most: tuple[int, int] | None = None) -> str:
    """A picture as the `data:` address of a PNG, reduced to at most so many pixels (width, height)."""
    image = picture if isinstance(picture, Image.Image) else Image.fromarray(np.ascontiguousarray(picture))
    if most is not None:
        image.thumbnail(most)
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=most is not None)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
