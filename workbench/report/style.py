"""Shared parts of figures: style, caption, labels, checks of data, and saving."""

from __future__ import annotations

import io
import os
import re
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import IO

import numpy as np
from matplotlib import style
from matplotlib.figure import Figure as MatplotlibFigure
from numpy.typing import ArrayLike

from workbench.paths import local, writable

STYLE = Path(__file__).with_name("hspace.mplstyle")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")
CAPTION = {"fontsize": 8.5, "color": "#555555"}
ACCENT, INK, QUIET = "#D55E00", "#222222", "#8a8a8a"

_FORMATS = (".pdf", ".svg", ".png")
_OTHER_FORMATS = {"jpg", "jpeg", "tif", "tiff", "webp", "gif", "avif", "eps", "ps", "pgf", "svgz", "bmp"}
_NO_DATES = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}


VECTORS = "WORKBENCH_VECTORS"
"""Variable with which a notebook's figures are kept as SVG beside the pixels, for printing."""
_LARGEST = 3_000_000
"""Bytes of an SVG beyond which a printed figure stays pixels."""


class Figure(MatplotlibFigure):
    """A matplotlib figure that a notebook displays as a cell's last value, without pyplot's list of open figures."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=self.dpi)
        return picture.getvalue()

    def _repr_svg_(self) -> str | None:
        if not os.environ.get(VECTORS):
            return None
        picture = io.StringIO()
        self.savefig(picture, format="svg", metadata=_NO_DATES[".svg"])
        return picture.getvalue() if picture.tell() <= _LARGEST else None

    def savefig(self, fname: str | os.PathLike | IO, **options: object) -> None:
        """As matplotlib's, with the labels, some of which stand outside of the canvas."""
        with style.context(STYLE):
            super().savefig(fname, **options)


@contextmanager
def drawing(width: float, height: float, caption: str | None = None) -> Iterator[Figure]:
    """A figure of so many inches to draw on, with its caption below, in the style of all."""
    with style.context(STYLE):
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure
        add_caption(figure, caption)


def add_caption(figure: MatplotlibFigure, caption: str | None) -> None:
    """Write a caption below a figure."""
    if not caption:
        return
    if figure.get_layout_engine() is not None:
        figure.supxlabel(wrapped(caption, figure.get_figwidth()), x=0.02, ha="left", **CAPTION)
    else:  # a grid of images fills its figure
        below = wrapped(caption, max(figure.get_figwidth(), 3.0))
        figure.axes[0].annotate(below, (0, 0), (0, -7), "axes fraction", "offset points", va="top", **CAPTION)


def words(name: object) -> str:
    """A name as figures write it: `Long_Hair` is "Long Hair", and `x_t` stays."""
    return re.sub(r"_(?!\w\b)|(?<=\w\w)_", " ", str(name))


def wrapped(text: str, inches: float) -> str:
    """Text of captions, in lines of that width."""
    return textwrap.fill(text, int(inches * 15.5))


def as_array(values: ArrayLike) -> np.ndarray:
    """Array of anything array-like, or of the images of a run; a tensor may be on any device and of any float type."""
    values = getattr(values, "images", values)
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def finite(values: ArrayLike, name: str) -> np.ndarray:
    """Numbers as an array; ValueError if some are none."""
    values = as_array(values)
    if not np.issubdtype(values.dtype, np.number) and values.dtype != bool:
        raise ValueError(f"{name} is of type {values.dtype}; it must be numbers")
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {values.size} values that are NaN or infinite; leave them out first")
    return values


def labelled(labels: Sequence[str] | None, n: int, name: str, what: str) -> list[str] | None:
    """Labels as texts; ValueError if their number is another than n."""
    if labels is None:
        return None
    labels = [str(label) for label in labels]
    if len(labels) != n:
        raise ValueError(f"{name} has {len(labels)} entries for {n} {what}; give one each")
    return labels


def colors_of(color: ArrayLike | None, n: int) -> tuple[np.ndarray | None, list[str] | None]:
    """Numbers and no names for a colour bar; or indices and the names of the categories for a legend."""
    if color is None:
        return None, None
    color = as_array(color)
    if color.shape != (n,):
        raise ValueError(f"color has shape {color.shape} for {n} points; it must be ({n},), one value per point")
    if np.issubdtype(color.dtype, np.floating):
        return finite(color, "color"), None
    names, indices = np.unique(color.astype(str) if color.dtype == object else color, return_inverse=True)
    if len(names) <= len(PALETTE):
        return indices, [str(name) for name in names]
    if np.issubdtype(color.dtype, np.integer):
        return color.astype(float), None
    raise ValueError(f"color has {len(names)} categories; at most {len(PALETTE)} can be told apart, so merge some")


def save_figure(figure: MatplotlibFigure, path: str | Path) -> tuple[Path, ...]:
    """Write a figure to files for a paper or a page.

    It becomes a PDF and an SVG (fonts included) and a PNG of 300 dots an inch; the same figure gives the same bytes at
    any date.

    Parameters
    ----------
    figure : matplotlib Figure
    path : str or Path
        With one of the suffixes, or with none. Missing folders are made.

    Returns
    -------
    tuple of Path
        The files written, each of them whole: they are written beside and renamed.

    Raises
    ------
    ValueError
        If the figure is of another kind, or `path` ends in another format or can't be written.
    """
    if not isinstance(figure, MatplotlibFigure):
        raise ValueError(f"save_figure takes a matplotlib figure; got {type(figure).__name__}")
    files = figure_files(path)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=files[0].parent, prefix=f".{files[0].stem}-") as folder, style.context(STYLE):
        for file in files:
            figure.savefig(Path(folder) / file.name, metadata=_NO_DATES[file.suffix])
        for file in files:
            os.replace(Path(folder) / file.name, file)
    return files


def figure_files(path: str | Path) -> tuple[Path, ...]:
    """Files that `save_figure` will write; ValueError before any work if they can't be written so."""
    path = local(path)
    kind = path.suffix.lower()
    if kind.removeprefix(".") in _OTHER_FORMATS:
        raise ValueError(f"{path} ends in {path.suffix}; figures are written as {', '.join(_FORMATS)}")
    stem = path.name[: -len(path.suffix)] if kind in _FORMATS else path.name
    return tuple(writable(path.with_name(f"{stem}{suffix}")) for suffix in _FORMATS)
