"""Figures: every function takes data and returns a figure; none shows or saves.

Static figures are matplotlib's, drawn in one style (`hspace.mplstyle`) that is applied inside each function and changes
nothing outside of it. Interactive ones are plotly's, used only where hovering pays.
"""

from __future__ import annotations

import base64
import io
import os
import re
import textwrap
from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib
import numpy as np
import pandas as pd
from IPython.display import display
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure as MatplotlibFigure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from PIL import Image
from plotly import graph_objects as go

from workbench.analysis.mixing_criteria import MixingStep
from workbench.editing.grid import EditGrid
from workbench.paths import local, writable

__all__ = [
    "PALETTE",
    "HoverFigure",
    "bars",
    "before_after",
    "edit_grid",
    "edit_strips",
    "image_grid",
    "line",
    "matrix",
    "mixing_steps",
    "pareto",
    "save_figure",
    "scatter",
    "scatter_hover",
    "to_pixels",
    "unet_diagram",
]

STYLE = Path(__file__).with_name("hspace.mplstyle")
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#F0E442")

_FORMATS = (".pdf", ".svg", ".png")
_OTHER_FORMATS = {"jpg", "jpeg", "tif", "tiff", "webp", "gif", "avif", "eps", "ps", "pgf", "svgz", "bmp"}
_NO_DATES = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}, ".png": {}}
_FARTHEST_VALUE = 10.0
_MOST_CATEGORIES = len(PALETTE)
_CAPTION = {"fontsize": 8.5, "color": "#555555"}
_ACCENT, _INK, _QUIET = "#D55E00", "#222222", "#8a8a8a"


class Figure(MatplotlibFigure):
    """A matplotlib figure that a notebook displays as a cell's last value, without pyplot's list of open figures."""

    def _repr_png_(self) -> bytes:
        picture = io.BytesIO()
        self.savefig(picture, format="png", dpi=self.dpi)
        return picture.getvalue()

    def savefig(self, fname, **options) -> None:
        """As matplotlib's, with the labels, some of which stand outside of the canvas."""
        with style.context(STYLE):
            super().savefig(fname, **options)


class HoverFigure(go.Figure):
    """A plotly figure whose tooltip shows the thumbnail that a point carries as `customdata`.

    Plotly's own tooltip holds text alone, so the figure displays as HTML with a small script beside it. It needs no
    network: plotly.js is included, and an exported report keeps one copy for all of its figures.
    """

    _ipython_display_ = None

    def _repr_mimebundle_(self, include=None, exclude=None, validate=True, **kwargs) -> dict[str, str]:
        return {
            "text/html": self.to_html(full_html=False, include_plotlyjs=True, default_height="560px"),
            "text/plain": f"HoverFigure({sum(len(trace.x) for trace in self.data)} points)",
        }

    def to_html(self, **kwargs) -> str:
        """As plotly's `Figure.to_html`, with the thumbnails on hover."""
        return super().to_html(**{"post_script": _TOOLTIP_SCRIPT} | kwargs)

    def write_html(self, file, **kwargs) -> None:
        """As plotly's `Figure.write_html`, with the thumbnails on hover."""
        super().write_html(file, **{"post_script": _TOOLTIP_SCRIPT} | kwargs)

    def show(self) -> None:
        """Display the figure in a notebook."""
        display(self)


_TOOLTIP_SCRIPT = """
const graph = document.getElementById("{plot_id}");
const tip = document.createElement("div");
tip.className = "hover-thumbnail";
tip.style.cssText = "position:absolute;display:none;pointer-events:none;z-index:1000;padding:6px;background:#fff;" +
  "border:1px solid #999;border-radius:4px;box-shadow:0 2px 8px rgba(0,0,0,.25);font:12px sans-serif;color:#222;" +
  "text-align:center;white-space:pre-line";
const picture = document.createElement("img");
picture.alt = "";
picture.style.cssText = "display:block;width:96px;height:96px;margin:0 auto 4px;image-rendering:pixelated";
const words = document.createElement("span");
tip.append(picture, words);
graph.style.position = "relative";
graph.append(tip);
graph.on("plotly_hover", (hover) => {
  const point = hover.points[0];
  const [thumbnail, text] = point.customdata;
  picture.src = thumbnail;
  words.textContent = text;
  tip.style.display = "block";
  const frame = graph.getBoundingClientRect();
  const x = hover.event.clientX - frame.left, y = hover.event.clientY - frame.top;
  tip.style.left = (x + 16 + tip.offsetWidth > frame.width ? x - 16 - tip.offsetWidth : x + 16) + "px";
  tip.style.top = Math.max(0, Math.min(y - tip.offsetHeight / 2, frame.height - tip.offsetHeight)) + "px";
});
graph.on("plotly_unhover", () => { tip.style.display = "none"; });
"""


def image_grid(
    images,
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
        C is 3 (colour) or 1 (grey). Values outside of [-1, 1], as noisy images have them, are clipped.
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
        If the images have another shape, are not finite, or are far outside of [-1, 1]; if the labels don't match.
    """
    images = _numpy(images)
    if images.ndim == 5:
        if columns is not None:
            raise ValueError(
                "images of shape (rows, columns, C, H, W) set the columns; leave out the argument `columns`"
            )
        rows, columns = images.shape[:2]
        images = images.reshape(-1, *images.shape[2:])
        pictures = _pictures(images, "images")
    else:
        pictures = _pictures(images, "images")
        columns = min(len(pictures), 8) if columns is None else columns
        if columns < 1:
            raise ValueError(f"columns is {columns}; a grid needs at least 1")
        rows = -(-len(pictures) // columns)
    titles = _labels(titles, len(pictures), "titles", "images")
    row_labels = _labels(row_labels, rows, "row_labels", "rows")
    column_labels = _labels(column_labels, columns, "column_labels", "columns")

    height, width = pictures.shape[1:3]
    with style.context(STYLE):
        dpi = matplotlib.rcParams["figure.dpi"]
        cell = width * max(1, min(round(100 / width), int(1060 / (width * columns))))
        title_space = 0.22 * width if titles else 0.0
        gap = max(1.0, round(width / 16))
        step_x, step_y = width + gap, height + gap + title_space
        total_x, total_y = columns * step_x - gap, rows * step_y - gap
        inches = cell / width / dpi
        figure = Figure(figsize=(total_x * inches, total_y * inches))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(0, total_x), ylim=(total_y, 0), frame_on=False)
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


def before_after(before, after, *, scores: pd.DataFrame | None = None, caption: str | None = None) -> Figure:
    """One edit: the image before, after, the difference, and what a classifier says of both.

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
    before, after = _numpy(before).clip(-1, 1), _numpy(after).clip(-1, 1)
    pictures = to_pixels(np.stack([before, after, (after - before) / 2]))
    with style.context(STYLE):
        figure = Figure(figsize=(5.4 if scores is None else 8.6, 2.4 if caption is None else 2.8), layout="constrained")
        panels = figure.subplots(1, 3 if scores is None else 4, width_ratios=[1, 1, 1] + ([1.5] * (scores is not None)))
        for axes, picture, title in zip(panels, pictures, ("before", "after", "difference"), strict=False):
            axes.imshow(picture)
            axes.set_title(title)
            axes.set_axis_off()
        if scores is not None:
            order = (scores["after"] - scores["before"]).abs().nlargest(8).index[::-1]
            at = np.arange(len(order))
            panels[-1].barh(at + 0.2, scores.loc[order, "before"], 0.38, color=PALETTE[0], label="before")
            panels[-1].barh(at - 0.2, scores.loc[order, "after"], 0.38, color=PALETTE[1], label="after")
            panels[-1].set_yticks(at, [str(name).replace("_", " ") for name in order], fontsize=8)
            panels[-1].set(xlim=(0, 1), xlabel="probability")
            panels[-1].grid(visible=False, axis="y")
            figure.legend(loc="outside upper right", ncols=2, fontsize=8)
        add_caption(figure, caption)
    return figure


def to_pixels(images) -> np.ndarray:
    """8-bit pictures of images.

    Parameters
    ----------
    images : array or Tensor of shape (n, C, H, W), values in [-1, 1]
        Values outside, as strong edits have them, are clipped.

    Returns
    -------
    ndarray of shape (n, H, W, 3), uint8
    """
    return _pictures(_numpy(images).clip(-1, 1), "images")


def edit_strips(
    strips: Mapping[tuple[str, str], np.ndarray],
    attribute: str,
    *,
    names: Sequence[str],
    caption: str | None = None,
) -> Figure:
    """Samples and their edits from weak to strong, one row a method.

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
        raise ValueError(f"there is no strip of {attribute!r}; there are {_listed({of for _, of in strips})}")
    columns = max(strip.shape[1] for strip in shown.values())
    # A method with fewer strengths leaves white cells.
    rows = [
        np.pad(strip, [(0, 0), (0, columns - strip.shape[1]), (0, 0), (0, 0), (0, 0)], constant_values=1.0)
        for strip in shown.values()
    ]
    labels = [label for name in names for label in (name, *(f"edit {i + 1}" for i in range(columns - 1)))]
    images = np.stack([np.concatenate(list(row)) for row in rows])
    return image_grid(images, row_labels=list(shown), column_labels=labels, caption=caption)


def line(
    x,
    y,
    *,
    low=None,
    high=None,
    labels: Sequence[str] | None = None,
    xlabel: str,
    ylabel: str,
    caption: str | None = None,
    reverse_x: bool = False,
) -> Figure:
    """Draw one or several lines, each with its interval as a shaded band.

    Parameters
    ----------
    x : array of shape (n,)
    y : array of shape (n,) or (lines, n), or a mapping from a line's name to an array of shape (n,)
    low, high : same form as y, optional; NaN where an end is not known
        Lower and upper end of the band; give both or none. A mapping may leave lines out.
    labels : sequence of str, optional
        A name a line, where y is an array.
    xlabel, ylabel : str
        What the axes show, with the unit.
    caption : str, optional
        Drawn below in small type.
    reverse_x : bool
        Largest x at the left, as the reverse process visits timesteps.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If lengths or names don't match, values are not finite, or a band's low end lies above its high end.
    """
    x = _finite(_numpy(x), "x")
    if x.ndim != 1 or len(x) == 0:
        raise ValueError(f"x has shape {x.shape}; it must be (n,), one value a point")
    if isinstance(y, Mapping) and labels is not None:
        raise ValueError("y is a mapping, whose keys are the labels; leave out the argument `labels`")
    lines = _lines(y, "y", x, labels)
    if (low is None) != (high is None):
        raise ValueError("an interval needs both ends; give low and high, or neither")
    lows = {} if low is None else _lines(low, "low", x, labels, gaps=True)
    highs = {} if high is None else _lines(high, "high", x, labels, gaps=True)
    for name in lows.keys() | highs.keys():
        if name not in lines or name not in lows or name not in highs:
            raise ValueError(
                f"low and high must name the same lines as y ({_listed(lines)}); {name!r} is not in all three"
            )
        if (lows[name] > highs[name]).any():
            raise ValueError(f"low is above high in the interval of {name!r}; swap them")

    with style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        # After eight lines the colours come again, dashed and then dotted.
        axes.set_prop_cycle(matplotlib.cycler(linestyle=["-", "--", ":"]) * matplotlib.cycler(color=PALETTE))
        for name, values in lines.items():
            (drawn,) = axes.plot(x, values, label=name)
            if name in lows:
                axes.fill_between(x, lows[name], highs[name], color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.margins(x=0.02)
        if reverse_x:
            axes.invert_xaxis()
        if labels is not None or isinstance(y, Mapping):
            axes.legend()
        add_caption(figure, caption)
    return figure


def bars(
    groups: Mapping[str, pd.Series],
    *,
    ylabel: str,
    low: Mapping[str, pd.Series] | None = None,
    high: Mapping[str, pd.Series] | None = None,
    caption: str | None = None,
) -> Figure:
    """Bars side by side: one group a name, one colour a series.

    Parameters
    ----------
    groups : mapping of str -> Series of shape (k,)
        Indexed by the same names in each.
    ylabel : str
    low, high : mapping of str -> Series of shape (k,), optional
        Ends of an interval for every bar.
    caption : str, optional

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there is nothing to draw, the series have other names, or values are not finite.
    """
    if not groups:
        raise ValueError("there is nothing to draw; give at least one series")
    if (low is None) != (high is None):
        raise ValueError("an interval needs both ends; give low and high, or neither")
    table = pd.DataFrame(dict(groups))
    if any(not series.index.equals(next(iter(groups.values())).index) for series in groups.values()):
        raise ValueError("the series have different names; bars compare the same names in each")
    _finite(table.to_numpy(dtype=float), "a series")
    with style.context(STYLE):
        figure = Figure(figsize=(max(4.0, 0.55 * len(table)), 3.6), layout="constrained")
        axes = figure.add_subplot(ylabel=ylabel)
        width = 0.8 / len(groups)
        for k, name in enumerate(table):
            at = np.arange(len(table)) + (k - (len(groups) - 1) / 2) * width
            error = None if low is None else [table[name] - low[name], high[name] - table[name]]
            hatch = ("", "//", "..")[k // len(PALETTE) % 3]  # as the lines' dashes
            axes.bar(
                at, table[name], width, label=name, hatch=hatch, yerr=error, error_kw={"elinewidth": 1, "ecolor": _INK}
            )
        axes.set_xticks(
            range(len(table)), [str(name).replace("_", " ") for name in table.index], rotation=45, ha="right"
        )
        axes.grid(visible=False, axis="x")
        if len(groups) > 1:
            # Above the axes: bars of a share reach their top.
            figure.legend(loc="outside upper left", ncols=2)
        add_caption(figure, caption)
    return figure


def matrix(table: pd.DataFrame, *, caption: str | None = None, limit: float | None = None) -> Figure:
    """A table of signed numbers as colours, with the numbers written in; 0 is white.

    Parameters
    ----------
    table : DataFrame of shape (rows, columns)
    caption : str, optional
    limit : float, optional
        Value of the strongest colours, by default the largest size in the table.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If the table is empty or holds a value that is not finite.
    """
    values = _finite(table.to_numpy(dtype=float), "the table")
    if values.size == 0:
        raise ValueError("there is nothing to draw; the table is empty")
    limit = limit or float(np.abs(values).max()) or 1.0
    rows, columns = values.shape
    with style.context(STYLE):
        figure = Figure(figsize=(1.6 + 0.62 * columns, 1.2 + 0.42 * rows), layout="constrained")
        axes = figure.add_subplot()
        axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 * limit else _INK
            shown = f"{value:+.2f}" if columns <= 10 else re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}")
            axes.text(j, i, shown, ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(columns), [str(c).replace("_", " ") for c in table.columns], rotation=45, ha="right")
        axes.set_yticks(range(rows), [str(r).replace("_", " ") for r in table.index])
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        add_caption(figure, caption)
    return figure


def training_curve(log: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw the losses of a training by noise level, and all of them together.

    Parameters
    ----------
    log : DataFrame
        From `read_log` of `diffusion.training`.
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure
        Both axes are logarithmic. Levels are drawn from dark (little noise) to light; the black line is their mean.

    Raises
    ------
    ValueError
        If the log has no rows or no losses.
    """
    levels = [name for name in log if str(name).startswith("t ")]
    if not len(log) or "loss" not in log:
        raise ValueError("the log of the training is empty; train for more steps than it takes to log one row")
    with style.context(STYLE):
        figure = Figure(figsize=(6.4, 3.8), layout="constrained")
        axes = figure.add_subplot(xlabel="images", ylabel="squared error of eps", xscale="log", yscale="log")
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(levels)))
        for name, color in zip(levels, colors, strict=True):
            axes.plot(log["images"], log[name], color=color, label=name)
        axes.plot(log["images"], log["loss"], color="black", linewidth=2, label="all")
        axes.legend(ncols=2)
        add_caption(figure, caption)
    return figure


def mixing_steps(steps: Sequence[MixingStep], *, caption: str | None = None) -> Figure:
    """Draw the curves of several criteria above one axis of timesteps, and the timestep that each of them picks.

    Parameters
    ----------
    steps : sequence of MixingStep
        From `workbench.mixing_step`, of one noise schedule.
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure
        One panel a criterion: the curve with its 95% interval, the threshold (dashed), t (line) and its 95% interval
        (shaded).

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    steps = [steps] if isinstance(steps, MixingStep) else list(steps)
    if not steps:
        raise ValueError("there is nothing to draw; give at least one mixing step")
    with style.context(STYLE):
        figure = Figure(figsize=(6.8, 0.7 + 1.55 * len(steps)), layout="constrained")
        panels = figure.subplots(len(steps), sharex=True, squeeze=False)[:, 0]
        for step, axes in zip(steps, panels, strict=True):
            curve = step.curve
            axes.plot(curve.index, curve["value"], color=PALETTE[0])
            axes.fill_between(curve.index, curve["low"], curve["high"], color=PALETTE[0], alpha=0.2, linewidth=0)
            axes.axhline(step.threshold, color=_QUIET, linestyle="--", linewidth=1)
            axes.axvspan(*step.interval, color=_ACCENT, alpha=0.15, linewidth=0)
            axes.axvline(step.t, color=_ACCENT, linewidth=1.6)
            low, high = step.interval
            found = f"t = {step.t} [{low}, {high}]" if step.reached else f"threshold not reached, nearest at {step.t}"
            axes.set_title(f"{step.criterion.replace('_', ' ')}: {found}, n = {step.n}", loc="left", fontsize=9)
            axes.set_ylabel(_wrap(step.quantity, 1.5), fontsize=7.5)
        panels[-1].set_xlabel("timestep t (1000 is noise, 0 is the image)")
        panels[-1].invert_xaxis()
        add_caption(figure, caption)
    return figure


def pareto(
    table: pd.DataFrame,
    *,
    family: Mapping[str, str],
    x: str = "psnr_outside",
    xlabel: str = "PSNR outside of the attribute's region (dB)",
    y: str = "success",
    ylabel: str = "share that gains the attribute",
    caption: str | None = None,
) -> Figure:
    """Draw what methods achieve against what they preserve, one curve a method over its strengths.

    Parameters
    ----------
    table : DataFrame
        From `leaderboard.pareto`: one row a method and strength, with `x` and `y` and their ends `..._low`, `..._high`.
    family : mapping of method -> family
        A panel each; those of the family "control" are drawn in grey in all of them.
    x, y : str
    xlabel, ylabel : str
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there is nothing to draw, or a method has no family.
    """
    missing = [name for name in table["method"].unique() if name not in family]
    if table.empty or missing:
        raise ValueError(f"there is no family of {missing[0]!r}" if missing else "there is nothing to draw")
    panels = list(dict.fromkeys(family[name] for name in table["method"] if family[name] != "control")) or ["control"]
    with style.context(STYLE):
        columns = min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure = Figure(figsize=(3.6 * columns, 2.9 * rows + 0.4), layout="constrained")
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            colors, grey = cycle(zip(PALETTE, "osD^vP*X", strict=True)), cycle((":", "--"))
            for name, part in table.groupby("method", sort=False):
                if family[name] not in (panel, "control"):
                    continue
                color, marker = (_QUIET, ".") if family[name] == "control" else next(colors)
                line_style = next(grey) if family[name] == "control" else "-"
                ends = [np.abs(part[f"{v}_{e}"] - part[v]) for v in (x, y) for e in ("low", "high")]
                axes.errorbar(
                    part[x], part[y], xerr=ends[:2], yerr=ends[2:], fmt="none", ecolor=color, alpha=0.25, elinewidth=1
                )
                axes.plot(part[x], part[y], line_style, color=color, marker=marker, label=name, linewidth=1.3)
            axes.set_title(panel, loc="left", fontsize=9)
            axes.legend(fontsize=6.5, loc="best", handlelength=1.4)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supylabel(ylabel, fontsize=9)
        for axes in grid[: len(panels)][-columns:]:
            axes.set_xlabel(xlabel, fontsize=9)
            axes.tick_params(labelbottom=True)
        add_caption(figure, caption)
    return figure


def scatter(
    points,
    *,
    color=None,
    images=None,
    xlabel: str,
    ylabel: str,
    color_label: str | None = None,
    caption: str | None = None,
    n_thumbnails: int = 40,
) -> Figure:
    """Draw points in the plane, with thumbnails on a subset that is spread over the cloud.

    Parameters
    ----------
    points : array of shape (n, 2)
    color : array of shape (n,), optional
        Real numbers get a colour bar; words, booleans and at most 8 different integers get a legend.
    images : array or Tensor of shape (n, C, H, W), values in [-1, 1], optional
        The picture of each point.
    xlabel, ylabel, color_label : str
    caption : str, optional
        Drawn below in small type.
    n_thumbnails : int
        At most so many thumbnails. Each next one is the point farthest from those chosen (greedy), until none is left
        that overlaps no other, so the cloud's outliers and its middle are both shown.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If shapes don't match or values are not finite.
    """
    points = _points(points, (2,))
    values, categories = _colors(color, len(points))
    pictures = None if images is None else _pictures(_numpy(images), "images", len(points))

    with style.context(STYLE):
        figure = Figure(figsize=(6.8, 6.0), layout="constrained")
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        size = float(np.clip(900 / len(points), 6, 30))
        edge = [PALETTE[0]] * len(points)
        if categories is not None:
            edge = [PALETTE[k] for k in values]
            for k, category in enumerate(categories):
                axes.scatter(*points[values == k].T, s=size, color=PALETTE[k], label=category, linewidth=0)
            axes.legend(title=color_label, loc="upper left", bbox_to_anchor=(1.01, 1.0))
        else:
            drawn = axes.scatter(*points.T, s=size, c=values, color=None if color is not None else edge[0], linewidth=0)
            if color is not None:
                edge = drawn.to_rgba(values)
                figure.colorbar(drawn, ax=axes, label=color_label or "", shrink=0.8)
        axes.set_box_aspect(1)
        if pictures is not None:
            _draw_thumbnails(axes, points, pictures, edge, n_thumbnails)
        add_caption(figure, caption)
    return figure


def scatter_hover(
    points,
    images,
    *,
    color=None,
    text: Sequence[str] | None = None,
    xlabel: str,
    ylabel: str,
    zlabel: str | None = None,
    color_label: str | None = None,
    title: str | None = None,
    caption: str | None = None,
) -> HoverFigure:
    """Draw points in the plane or in space; hovering over a point shows its image.

    Parameters
    ----------
    points : array of shape (n, 2) or (n, 3)
    images : array or Tensor of shape (n, C, H, W), values in [-1, 1]
        The picture of each point; larger than 64 pixels, they are reduced.
    color : array of shape (n,), optional
        Real numbers get a colour bar; words, booleans and at most 8 different integers get a legend.
    text : sequence of str, optional
        Shown under each picture; default: the point's number and colour.
    xlabel, ylabel, zlabel, color_label, title, caption : str

    Returns
    -------
    HoverFigure
        A plotly figure, live in JupyterLab and, without network, in an exported report.

    Raises
    ------
    ValueError
        If shapes don't match or values are not finite.
    """
    points = _points(points, (2, 3))
    thumbnails = [_png_uri(picture) for picture in _pictures(_numpy(images), "images", len(points))]
    values, categories = _colors(color, len(points))
    shown = None if values is None else [f"{v:.3g}" if categories is None else categories[v] for v in values]
    if text is None:
        text = [
            f"sample {i}" + (f"\n{color_label or 'colour'}: {shown[i]}" if shown else "") for i in range(len(points))
        ]
    text = _labels(text, len(points), "text", "points")

    figure = HoverFigure()
    trace = go.Scatter if points.shape[1] == 2 else go.Scatter3d
    size = 7 if points.shape[1] == 2 else 3.5

    def add(chosen: np.ndarray, marker: dict, name: str | None) -> None:
        coordinates = dict(zip("xyz", points[chosen].T, strict=False))
        customdata = [(thumbnails[i], text[i]) for i in chosen]
        figure.add_trace(
            trace(
                **coordinates,
                customdata=customdata,
                mode="markers",
                hoverinfo="none",
                marker=dict(size=size, opacity=0.85, **marker),
                name=name,
                showlegend=name is not None,
            )
        )

    if categories is None:
        marker = dict(color=PALETTE[0])
        if values is not None:
            marker = dict(color=values, colorscale="Viridis", colorbar=dict(title=color_label or ""))
        add(np.arange(len(points)), marker, None)
    else:
        for k, category in enumerate(categories):
            add(np.flatnonzero(values == k), dict(color=PALETTE[k]), category)

    below = [] if not caption else textwrap.wrap(caption, 110)
    figure.update_layout(
        template="plotly_white",
        title=title,
        legend_title=color_label,
        height=560,
        margin=dict(l=60, r=20, t=50 if title else 20, b=60 + 16 * len(below)),
        hovermode="closest",
    )
    if points.shape[1] == 2:
        figure.update_layout(xaxis_title=xlabel, yaxis_title=ylabel)
    else:
        figure.update_layout(scene=dict(xaxis_title=xlabel, yaxis_title=ylabel, zaxis_title=zlabel or ""))
    if below:
        figure.add_annotation(
            text="<br>".join(below),
            **dict(x=0, xref="paper", xanchor="left", y=0, yref="paper", yanchor="top", yshift=-48),
            **dict(showarrow=False, align="left", font=dict(size=11, color="#555555")),
        )
    return figure


def unet_diagram(
    model_name: str,
    *,
    image_shape: Sequence[int],
    h_shape: Sequence[int],
    tap: str,
    widths: Sequence[int],
) -> Figure:
    """Draw a diffusion U-Net with the place where h-space is read and written.

    Parameters
    ----------
    model_name : str
    image_shape : (C, H, W)
        Of one image.
    h_shape : (C, h, w)
        Of h for one image.
    tap : {"before", "middle", "after"}
        Where h is: the input of the mid block, inside of it, or its output.
    widths : sequence of int
        Channels of each level, from the finest resolution to the coarsest (`block_out_channels` in diffusers).

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If a shape has not 3 entries, there is no level, or the tap has another name.
    """
    image_shape, h_shape, widths = tuple(image_shape), tuple(h_shape), tuple(widths)
    for name, shape in (("image_shape", image_shape), ("h_shape", h_shape)):
        if len(shape) != 3:
            raise ValueError(f"{name} is {shape}; it must be (channels, height, width) of one image")
    if tap not in ("before", "middle", "after"):
        raise ValueError(f"tap is {tap!r}; it must be 'before', 'middle' or 'after'")
    if not widths:
        raise ValueError("widths is empty; give the channels of each level, finest first")

    levels = len(widths)
    half, rise, step, drop = 0.43, 0.2, 0.76, 0.68
    middle = (levels - 1) * step + 1.15
    y_mid = -levels * drop
    y_h = y_mid - 0.62
    x_low, x_high, y_low, y_high = -half - 1.15, 2 * middle + half + 1.15, y_h - 0.42, 0.72

    with style.context(STYLE):
        figure = Figure(figsize=(x_high - x_low, y_high - y_low))
        axes = figure.add_axes((0, 0, 1, 1), xlim=(x_low, x_high), ylim=(y_low, y_high))
        axes.set_axis_off()

        def block(x: float, y: float, name: str, shape: tuple, color: str) -> None:
            box = FancyBboxPatch((x - half, y - rise), 2 * half, 2 * rise, boxstyle="round,pad=0,rounding_size=0.06")
            box.set(facecolor=color + "22", edgecolor=color, linewidth=1.4)
            axes.add_patch(box)
            axes.text(x, y + 0.075, name, ha="center", va="center", fontsize=8.5, color=_INK, weight="bold")
            axes.text(x, y - 0.085, "×".join(map(str, shape)), ha="center", va="center", fontsize=8, color=_INK)

        def arrow(start: tuple, end: tuple, path: str = "arc3", color: str = _INK, **kwargs) -> None:
            kwargs = dict(arrowstyle="-|>", mutation_scale=11, linewidth=1.3) | kwargs
            axes.add_patch(
                FancyArrowPatch(start, end, connectionstyle=path, color=color, shrinkA=0, shrinkB=0, **kwargs)
            )

        down_then_right, right_then_up = "angle,angleA=-90,angleB=0,rad=6", "angle,angleA=0,angleB=-90,rad=6"
        for i, channels in enumerate(widths):
            x_down, x_up, y = i * step, 2 * middle - i * step, -i * drop
            shape = (channels, max(image_shape[1] >> i, 1), max(image_shape[2] >> i, 1))
            block(x_down, y, f"down {i + 1}", shape, PALETTE[0])
            block(x_up, y, f"up {levels - i}", shape, PALETTE[2])
            arrow((x_down + half, y), (x_up - half, y), color=_QUIET, linestyle=(0, (4, 3)), linewidth=1.0)
            x_next = middle if i + 1 == levels else x_down + step
            arrow((x_down, y - rise), (x_next - half, y - drop), down_then_right)
            arrow((2 * middle - x_next + half, y - drop), (x_up, y - rise), right_then_up)
        block(middle, y_mid, "mid block", h_shape, PALETTE[4])
        axes.text(middle, 0.05, "skip connections", ha="center", va="bottom", fontsize=8, color=_QUIET)

        x_in, x_out = -half - 0.34, 2 * middle + half + 0.34
        arrow((x_in, 0), (-half, 0))
        arrow((x_out - 0.34, 0), (x_out, 0))
        for x, side, name in ((x_in - 0.05, "right", "$x_t$"), (x_out + 0.05, "left", r"$\epsilon_\theta$")):
            axes.text(x, 0.04, name, ha=side, va="bottom", fontsize=13, color=_INK)
            axes.text(x, -0.05, "×".join(map(str, image_shape)), ha=side, va="top", fontsize=8, color=_INK)

        shift, where = {
            "before": (-half - 0.16, "input of the mid block"),
            "middle": (0.0, "inside of the mid block"),
            "after": (half + 0.16, "output of the mid block"),
        }[tap]
        x_h, y_tap = middle + shift, y_mid - rise if tap == "middle" else y_mid
        arrow((x_h, y_tap), (x_h, y_h + 0.16), color=_ACCENT, arrowstyle="<|-|>", linewidth=1.8)
        axes.plot([x_h], [y_tap], "o", color=_ACCENT, markersize=8, zorder=5)
        axes.text(x_h, y_h + 0.03, r"$h_t$  (+ $\Delta h_t$)", ha="center", va="center", fontsize=13, color=_ACCENT)
        words = f"h-space: {where}\n{'×'.join(map(str, h_shape))} = {int(np.prod(h_shape)):,} numbers an image"
        axes.text(x_h, y_h - 0.1, words, ha="center", va="top", fontsize=8.5, color=_ACCENT, linespacing=1.4)

        axes.text(middle, 0.56, f"U-Net of {model_name}", ha="center", va="bottom", fontsize=11, color=_INK)
        words = "channels×height×width of each block; the timestep t enters every block"
        axes.text(middle, 0.53, words, ha="center", va="top", **_CAPTION)
    return figure


def save_figure(figure: MatplotlibFigure | go.Figure, path: str | Path) -> tuple[Path, ...]:
    """Write a figure to files for a paper or a page.

    A matplotlib figure becomes a PDF and an SVG (fonts included) and a PNG of 300 dots an inch; the same figure gives
    the same bytes at any date. A plotly figure becomes one HTML file that needs no network: its static formats would
    take a browser to draw, and its point is the hovering.

    Parameters
    ----------
    figure : matplotlib or plotly Figure
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
    is_plotly = isinstance(figure, go.Figure)
    if not is_plotly and not isinstance(figure, MatplotlibFigure):
        raise ValueError(f"save_figure takes a matplotlib or plotly figure; got {type(figure).__name__}")
    files = figure_files(path, (".html",) if is_plotly else _FORMATS)
    files[0].parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=files[0].parent, prefix=f".{files[0].stem}-") as folder, style.context(STYLE):
        for file in files:
            beside = Path(folder) / file.name
            if is_plotly:
                beside.write_text(figure.to_html(include_plotlyjs=True), encoding="utf-8")
            else:
                figure.savefig(beside, metadata=_NO_DATES[file.suffix])
        for file in files:
            os.replace(Path(folder) / file.name, file)
    return files


def figure_files(path: str | Path, suffixes: tuple[str, ...] = _FORMATS) -> tuple[Path, ...]:
    """What `save_figure` will write; ValueError before any work if it can't be, or is asked to be another format."""
    path = local(path)
    kind = path.suffix.lower()
    if kind.removeprefix(".") in _OTHER_FORMATS:
        raise ValueError(f"{path} ends in {path.suffix}; figures are written as {', '.join((*_FORMATS, '.html'))}")
    stem = path.name[: -len(path.suffix)] if kind in (*_FORMATS, ".html") else path.name
    return tuple(writable(path.with_name(f"{stem}{suffix}")) for suffix in suffixes)


def _draw_thumbnails(axes: Axes, points: np.ndarray, pictures: np.ndarray, edge: Sequence, most: int) -> None:
    """Lay pictures over well-spread points; the axes must be square on the page."""
    side = 0.085
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1.0) * (1 + 2 * side)
    low = (low + high) / 2 - span / 2
    for i in _spread((points - low) / span, most, 1.08 * side):
        (left, bottom), (right, top) = points[i] - side / 2 * span, points[i] + side / 2 * span
        axes.imshow(pictures[i], extent=(left, right, bottom, top), aspect="auto", zorder=3)
        frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor=edge[i], lw=1.4, zorder=4)
        axes.add_patch(frame)
    axes.set(xlim=(low[0], low[0] + span[0]), ylim=(low[1], low[1] + span[1]))


def _spread(points: np.ndarray, most: int, apart: float) -> list[int]:
    """Greedy subset of points of shape (n, 2) whose squares of side `apart` don't overlap, outermost point first."""
    chosen: list[int] = []
    distance = np.abs(points - points.mean(0)).max(1) + apart
    while len(chosen) < most and distance.max() >= apart:
        chosen.append(int(distance.argmax()))
        nearest = np.abs(points - points[chosen[-1]]).max(1)
        distance = nearest if len(chosen) == 1 else np.minimum(distance, nearest)
    return chosen


def _numpy(values) -> np.ndarray:
    """Array of anything array-like; a torch tensor may be on any device and of any float type."""
    if hasattr(values, "detach"):
        values = values.detach().cpu()
        values = values.float() if values.is_floating_point() else values
    return np.asarray(values)


def _pictures(images: np.ndarray, name: str, n: int | None = None) -> np.ndarray:
    """uint8 pictures (n, H, W, 3) of images (n, C, H, W) in [-1, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3) or 0 in images.shape:
        raise ValueError(
            f"{name} has shape {images.shape}; it must be (n, C, H, W) with 1 or 3 channels C, at least one image"
        )
    if n is not None and len(images) != n:
        raise ValueError(f"{name} holds {len(images)} images for {n} points; give one image a point")
    if not np.issubdtype(images.dtype, np.floating):
        raise ValueError(f"{name} is of type {images.dtype}; it must be floats in [-1, 1] (8 bits: x / 127.5 - 1)")
    _finite(images, name)
    low, high = float(images.min()), float(images.max())
    if max(-low, high) > _FARTHEST_VALUE:
        # Images of 8 bits have no values below 0.
        reason = "8 bits: x / 127.5 - 1" if 0 <= low and high <= 255 else "the samples diverge; clamp(-1, 1) shows them"
        raise ValueError(f"{name} lies in [{low:.4g}, {high:.4g}]; values must be in [-1, 1] ({reason})")
    scaled = np.clip(np.asarray(images, dtype=np.float32) * 127.5 + 127.5, 0, 255).round().astype(np.uint8)
    return np.broadcast_to(scaled.transpose(0, 2, 3, 1), (len(scaled), *scaled.shape[2:], 3))


def _png_uri(picture: np.ndarray) -> str:
    image = Image.fromarray(np.ascontiguousarray(picture))
    image.thumbnail((64, 64))
    data = io.BytesIO()
    image.save(data, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _points(points, dimensions: tuple[int, ...]) -> np.ndarray:
    points = _finite(_numpy(points), "points")
    if points.ndim != 2 or points.shape[1] not in dimensions or len(points) == 0:
        allowed = " or ".join(f"(n, {d})" for d in dimensions)
        raise ValueError(f"points has shape {points.shape}; it must be {allowed}, at least one point")
    return points.astype(float)


def _colors(color, n: int) -> tuple[np.ndarray | None, list[str] | None]:
    """Numbers and no names for a colour bar; or indices and the names of the categories for a legend."""
    if color is None:
        return None, None
    color = _numpy(color)
    if color.shape != (n,):
        raise ValueError(f"color has shape {color.shape} for {n} points; it must be ({n},), one value a point")
    if np.issubdtype(color.dtype, np.floating):
        return _finite(color, "color"), None
    names, indices = np.unique(color.astype(str) if color.dtype == object else color, return_inverse=True)
    if len(names) <= _MOST_CATEGORIES:
        return indices, [str(name) for name in names]
    if np.issubdtype(color.dtype, np.integer):
        return color.astype(float), None
    raise ValueError(f"color has {len(names)} categories; at most {_MOST_CATEGORIES} can be told apart, so merge some")


def _lines(y, name: str, x: np.ndarray, labels: Sequence[str] | None, *, gaps: bool = False) -> dict[str, np.ndarray]:
    if not isinstance(y, Mapping):
        rows = np.atleast_2d(_numpy(y))
        names = _labels(labels, len(rows), "labels", "lines") or [f"line {i + 1}" for i in range(len(rows))]
        y = dict(zip(names, rows, strict=True))
    lines = {str(key): _numpy(values) for key, values in y.items()}
    for key, values in lines.items():
        _finite(np.nan_to_num(values, posinf=np.inf, neginf=-np.inf) if gaps else values, f"{name} of {key!r}")
        if values.shape != x.shape:
            raise ValueError(f"{name} of {key!r} has shape {values.shape}; x has {x.shape}, and they must be equal")
    return lines


def _finite(values: np.ndarray, name: str) -> np.ndarray:
    if not np.issubdtype(values.dtype, np.number) and values.dtype != bool:
        raise ValueError(f"{name} is of type {values.dtype}; it must be numbers")
    bad = int(values.size - np.isfinite(values).sum())
    if bad:
        raise ValueError(f"{name} has {bad} of {values.size} values that are NaN or infinite; leave them out first")
    return values


def _labels(labels: Sequence[str] | None, n: int, name: str, what: str) -> list[str] | None:
    if labels is None:
        return None
    labels = [str(label) for label in labels]
    if len(labels) != n:
        raise ValueError(f"{name} has {len(labels)} entries for {n} {what}; give one each")
    return labels


def _listed(names) -> str:
    return ", ".join(repr(name) for name in names)


def _wrap(text: str, inches: float) -> str:
    return textwrap.fill(text, int(inches * 15.5))


def add_caption(figure: Figure, caption: str | None) -> None:
    """Write a caption below a figure."""
    if not caption:
        return
    if figure.get_layout_engine() is not None:
        figure.supxlabel(_wrap(caption, figure.get_figwidth()), x=0.02, ha="left", **_CAPTION)
    else:  # a grid of images fills its figure
        wrapped = _wrap(caption, max(figure.get_figwidth(), 3.0))
        figure.axes[0].annotate(wrapped, (0, 0), (0, -7), "axes fraction", "offset points", va="top", **_CAPTION)
