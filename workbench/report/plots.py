"""Figures: every function takes data and returns a figure; none shows or saves.

Static figures are matplotlib's, drawn in one style (`hspace.mplstyle`) that is applied inside each function and changes
nothing outside of it. `animate` writes moving ones; maps to hover over are `wb.explore`'s.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import cycle

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from numpy.typing import ArrayLike

from workbench.analysis.mixing_criteria import MixingStep
from workbench.report.animation import animate
from workbench.report.network import network
from workbench.report.pictures import before_after, edit_grid, edit_strips, image_grid, pictures_of, to_pixels
from workbench.report.style import (
    ACCENT,
    INK,
    PALETTE,
    QUIET,
    STYLE,
    Figure,
    add_caption,
    as_array,
    colors_of,
    drawing,
    figure_files,
    finite,
    save_figure,
    words,
    wrapped,
)

__all__ = [
    "PALETTE",
    "STYLE",
    "Figure",
    "add_caption",
    "animate",
    "bars",
    "before_after",
    "curves",
    "edit_grid",
    "edit_strips",
    "figure_files",
    "image_grid",
    "line",
    "matrix",
    "mixing_steps",
    "network",
    "pareto",
    "save_figure",
    "scatter",
    "to_pixels",
    "training_curve",
]

_IN_AXES = 4
"""Names up to which a legend stands inside of the axes; longer ones stand above."""

_THUMBNAILS = 40


def curves(
    table: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str | None = None,
    low: str | None = None,
    high: str | None = None,
    xlabel: str,
    ylabel: str,
    caption: str | None = None,
    reverse_x: bool = False,
) -> Figure:
    """Draw a tidy table: one line for each name in a column, with its interval as a shaded band.

    Parameters
    ----------
    table : DataFrame
        One row per point of a line.
    x, y : str
        Columns of the points.
    by : str, optional
        Column of the lines' names, drawn in the order of the table; without it there is one line.
    low, high : str, optional
        Columns of the lower and upper end of the band; give both or none. NaN for an unknown end.
    xlabel, ylabel : str
        Labels of the axes, with units.
    caption : str, optional
        Drawn below in small type.
    reverse_x : bool
        Put the largest x at the left, in the order of the reverse process.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there is nothing to draw, values are not finite, or a band's low end lies above its high end.
    """
    if table.empty:
        raise ValueError("there is nothing to draw; the table is empty")
    if (low is None) != (high is None):
        raise ValueError("an interval needs both ends; give low and high, or neither")
    names = [None] if by is None else list(dict.fromkeys(table[by]))
    with drawing(6.4, 3.8, caption) as figure:
        axes = figure.add_subplot(xlabel=xlabel, ylabel=ylabel)
        # After eight lines the colours come again, dashed and then dotted.
        axes.set_prop_cycle(matplotlib.cycler(linestyle=["-", "--", ":"]) * matplotlib.cycler(color=PALETTE))
        for name in names:
            part = table if by is None else table[table[by] == name]
            of = "" if by is None else f" of {name!r}"
            at = finite(part[x], f"{x}{of}")
            (drawn,) = axes.plot(at, finite(part[y], f"{y}{of}"), label=words(name))
            if low is not None and part[low].notna().any():
                for end in (low, high):
                    finite(part[end].dropna(), f"{end}{of}")
                if (part[low] > part[high]).any():
                    raise ValueError(f"low is above high in the interval{of}; swap them")
                axes.fill_between(at, part[low], part[high], color=drawn.get_color(), alpha=0.2, linewidth=0)
        axes.margins(x=0.02)
        if reverse_x:
            axes.invert_xaxis()
        if by is not None and len(names) > _IN_AXES:
            figure.legend(loc="outside upper left", ncols=3)
        elif by is not None:
            axes.legend()
    return figure


def line(
    x: ArrayLike,
    y: ArrayLike | Mapping[str, ArrayLike],
    *,
    low: ArrayLike | Mapping[str, ArrayLike] | None = None,
    high: ArrayLike | Mapping[str, ArrayLike] | None = None,
    xlabel: str,
    ylabel: str,
    caption: str | None = None,
    reverse_x: bool = False,
) -> Figure:
    """Draw `curves` from arrays.

    Parameters
    ----------
    x : array of shape (n,)
    y : array of shape (n,), or a mapping from a line's name to an array of shape (n,)
    low, high : same form as y, optional; NaN where an end is not known
        Lower and upper end of the band; give both or none. A mapping may leave lines out.
    xlabel, ylabel, caption, reverse_x
        As in `curves`.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If lengths or names don't match, values are not finite, or a band's low end lies above its high end.
    """
    x, named = as_array(x), isinstance(y, Mapping)
    columns = {"y": y, "low": low, "high": high}
    columns = {key: value if named else {"line": value} for key, value in columns.items() if value is not None}
    parts = []
    for name in columns["y"]:
        part = {"x": x, "line": str(name)}
        for key, lines in columns.items():
            values = as_array(lines[name]) if name in lines else np.full(x.shape, np.nan)
            if values.shape != x.shape:
                raise ValueError(f"{key} of {name!r} has shape {values.shape}; x has {x.shape}, and they must be equal")
            part[key] = values
        parts.append(pd.DataFrame(part))
    for key in columns.keys() - {"y"}:
        if unknown := [name for name in columns[key] if name not in columns["y"]]:
            known = ", ".join(repr(name) for name in columns["y"])
            raise ValueError(f"{key} has an interval of {unknown[0]!r}, which is no line of y; the lines are {known}")
    ends = {key: key for key in ("low", "high") if key in columns}
    options = {"xlabel": xlabel, "ylabel": ylabel, "caption": caption, "reverse_x": reverse_x}
    return curves(pd.concat(parts), x="x", y="y", by="line" if named else None, **ends, **options)


def bars(
    groups: Mapping[str, pd.Series] | pd.DataFrame,
    *,
    ylabel: str,
    low: Mapping[str, pd.Series] | pd.DataFrame | None = None,
    high: Mapping[str, pd.Series] | pd.DataFrame | None = None,
    caption: str | None = None,
) -> Figure:
    """Draw bars side by side: one group per name, one colour per series.

    Parameters
    ----------
    groups : DataFrame of shape (k, series), or mapping of str -> Series of shape (k,)
        Series are indexed by the same names.
    ylabel : str
    low, high : same form as groups, optional
        Ends of an interval for every bar.
    caption : str, optional

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If there is nothing to draw, the series differ in names, or values are not finite.
    """
    series = dict(groups)
    if not series:
        raise ValueError("there is nothing to draw; give at least one series")
    if (low is None) != (high is None):
        raise ValueError("an interval needs both ends; give low and high, or neither")
    table = pd.DataFrame(series)
    if any(not one.index.equals(next(iter(series.values())).index) for one in series.values()):
        raise ValueError("the series have different names; bars compare the same names in each")
    finite(table.to_numpy(dtype=float), "a series")
    with drawing(max(4.0, 0.55 * len(table)), 3.6, caption) as figure:
        axes = figure.add_subplot(ylabel=ylabel)
        width = 0.8 / len(series)
        for k, name in enumerate(table):
            at = np.arange(len(table)) + (k - (len(series) - 1) / 2) * width
            error = None if low is None else [table[name] - low[name], high[name] - table[name]]
            hatch = ("", "//", "..")[k // len(PALETTE) % 3]  # as the lines' dashes
            ends = {"yerr": error, "error_kw": {"elinewidth": 1, "ecolor": INK}}
            axes.bar(at, table[name], width, label=name, hatch=hatch, **ends)
        axes.set_xticks(range(len(table)), map(words, table.index), rotation=45, ha="right")
        axes.grid(visible=False, axis="x")
        if len(series) > 1:
            # Above the axes: bars of a share reach their top.
            figure.legend(loc="outside upper left", ncols=2)
    return figure


def matrix(table: pd.DataFrame, *, caption: str | None = None, limit: float | None = None) -> Figure:
    """Draw a table of signed numbers as colours, with the numbers; 0 is white.

    Parameters
    ----------
    table : DataFrame of shape (rows, columns)
    caption : str, optional
    limit : float, optional
        Value of the strongest colours, by default the largest absolute value in the table.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If the table is empty or holds a value that is not finite.
    """
    values = finite(table.to_numpy(dtype=float), "the table")
    if values.size == 0:
        raise ValueError("there is nothing to draw; the table is empty")
    limit = limit or float(np.abs(values).max()) or 1.0
    rows, columns = values.shape
    with drawing(1.6 + 0.62 * columns, 1.2 + 0.42 * rows, caption) as figure:
        axes = figure.add_subplot()
        axes.imshow(values, cmap="RdBu_r", vmin=-limit, vmax=limit, aspect="auto")
        for (i, j), value in np.ndenumerate(values):
            color = "white" if abs(value) > 0.6 * limit else INK
            shown = f"{value:+.2f}" if columns <= 10 else re.sub(r"^(-?)0\.", r"\1.", f"{value:.2f}")
            axes.text(j, i, shown, ha="center", va="center", fontsize=8, color=color)
        axes.set_xticks(range(columns), map(words, table.columns), rotation=45, ha="right")
        axes.set_yticks(range(rows), map(words, table.index))
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
    return figure


def training_curve(log: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw the losses of a training by noise level, and their mean.

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
    with drawing(6.4, 3.8, caption) as figure:
        axes = figure.add_subplot(xlabel="images", ylabel="squared error of eps", xscale="log", yscale="log")
        colors = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(levels)))
        for name, color in zip(levels, colors, strict=True):
            axes.plot(log["images"], log[name], color=color, label=name)
        axes.plot(log["images"], log["loss"], color="black", linewidth=2, label="all")
        axes.legend(ncols=2)
    return figure


def mixing_steps(steps: Sequence[MixingStep], *, caption: str | None = None) -> Figure:
    """Draw the curves of several criteria over one axis of timesteps, and the timestep that each picks.

    Parameters
    ----------
    steps : sequence of MixingStep
        From `workbench.mixing_step`, of one noise schedule.
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure
        One panel per criterion: the curve with its 95% interval, the threshold (dashed), t (line) and its 95% interval
        (shaded).

    Raises
    ------
    ValueError
        If there is nothing to draw.
    """
    steps = [steps] if isinstance(steps, MixingStep) else list(steps)
    if not steps:
        raise ValueError("there is nothing to draw; give at least one mixing step")
    with drawing(6.8, 0.7 + 1.55 * len(steps), caption) as figure:
        panels = figure.subplots(len(steps), sharex=True, squeeze=False)[:, 0]
        for step, axes in zip(steps, panels, strict=True):
            curve = step.curve
            axes.plot(curve.index, curve["value"], color=PALETTE[0])
            axes.fill_between(curve.index, curve["low"], curve["high"], color=PALETTE[0], alpha=0.2, linewidth=0)
            axes.axhline(step.threshold, color=QUIET, linestyle="--", linewidth=1)
            axes.axvspan(*step.interval, color=ACCENT, alpha=0.15, linewidth=0)
            axes.axvline(step.t, color=ACCENT, linewidth=1.6)
            low, high = step.interval
            found = f"t = {step.t} [{low}, {high}]" if step.reached else f"threshold not reached, nearest at {step.t}"
            axes.set_title(f"{words(step.criterion)}: {found}, n = {step.n}", loc="left", fontsize=9)
            axes.set_ylabel(wrapped(step.quantity, 1.5), fontsize=7.5)
        panels[-1].set_xlabel("timestep t (0 is the image)")
        panels[-1].invert_xaxis()
    return figure


def pareto(
    table: pd.DataFrame,
    *,
    family: Mapping[str, str],
    caption: str | None = None,
) -> Figure:
    """Draw the success of methods against preservation, one curve per method over its strengths.

    Parameters
    ----------
    table : DataFrame
        From `leaderboard.pareto`: one row per method and strength, with `psnr_outside`, `success`, and their ends
        `..._low` and `..._high`.
    family : mapping of method -> family
        One panel per family; methods of the family "control" are drawn in grey in all panels.
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
    columns = min(2, len(panels))
    rows = -(-len(panels) // columns)
    with drawing(4.6 * columns, 2.9 * rows + 0.4, caption) as figure:
        grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).ravel()
        for axes, panel in zip(grid, panels, strict=False):
            styles = cycle(
                (*style, face) for face in (None, "white") for style in zip(PALETTE, "osD^vP*X", strict=True)
            )
            grey = cycle((":", "--"))
            for name, part in table.groupby("method", sort=False):
                control = family[name] == "control"
                if not control and family[name] != panel:
                    continue
                line_style, (color, marker, face) = (next(grey), (QUIET, ".", None)) if control else ("-", next(styles))
                label = name if not control or axes is grid[0] else "_"  # "_" has no entry in the legend
                x, y = part["psnr_outside"], part["success"]
                ends = [np.abs(part[f"{v.name}_{end}"] - v) for v in (x, y) for end in ("low", "high")]
                axes.errorbar(x, y, xerr=ends[:2], yerr=ends[2:], fmt="none", ecolor=color, alpha=0.25, elinewidth=1)
                looks = {"color": color, "marker": marker, "markerfacecolor": face or color, "linewidth": 1.3}
                axes.plot(x, y, line_style, label=label, **looks)
            axes.set_title(panel, loc="left", fontsize=9)
            axes.legend(fontsize=6.5, loc="upper left", bbox_to_anchor=(1.0, 1.02), handlelength=1.4)
        for axes in grid[len(panels) :]:
            axes.set_axis_off()
        figure.supylabel("share that gains the attribute", fontsize=9)
        for axes in grid[: len(panels)][-columns:]:
            axes.set_xlabel("PSNR outside of the attribute's region (dB)", fontsize=9)
            axes.tick_params(labelbottom=True)
    return figure


def scatter(
    points: ArrayLike,
    *,
    color: ArrayLike | None = None,
    images: ArrayLike | None = None,
    xlabel: str,
    ylabel: str,
    color_label: str | None = None,
    caption: str | None = None,
) -> Figure:
    """Draw points in the plane, with up to 40 thumbnails spread over the cloud.

    Parameters
    ----------
    points : array of shape (n, 2)
    color : array of shape (n,), optional
        Real numbers get a colour bar; words, booleans and at most 8 different integers get a legend.
    images : array or Tensor of shape (n, C, H, W), values in [-1, 1], optional
        The image of each point. Each next thumbnail is the point farthest from those chosen (greedy), until every other
        point would overlap one, so that both outliers and the middle of the cloud are shown.
    xlabel, ylabel, color_label : str
    caption : str, optional
        Drawn below in small type.

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If shapes don't match or values are not finite.
    """
    points = finite(points, "points").astype(float)
    if points.ndim != 2 or points.shape[1] != 2 or len(points) == 0:
        raise ValueError(f"points has shape {points.shape}; it must be (n, 2), at least one point")
    values, categories = colors_of(color, len(points))
    pictures = None if images is None else pictures_of(images, "images", len(points))
    with drawing(6.8, 6.0, caption) as figure:
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
            _draw_thumbnails(axes, points, pictures, edge)
    return figure


def _draw_thumbnails(axes: Axes, points: np.ndarray, pictures: np.ndarray, edge: Sequence) -> None:
    """Lay pictures over well-spread points; the axes must be square on the page."""
    side = 0.085
    low, high = points.min(0), points.max(0)
    span = np.where(high > low, high - low, 1.0) * (1 + 2 * side)
    low = (low + high) / 2 - span / 2
    height, width = pictures.shape[1:3]
    reach = side / 2 * span * np.array([width, height]) / max(height, width)
    for i in _spread((points - low) / span, 1.08 * side):
        (left, bottom), (right, top) = points[i] - reach, points[i] + reach
        axes.imshow(pictures[i], extent=(left, right, bottom, top), aspect="auto", zorder=3)
        frame = Rectangle((left, bottom), right - left, top - bottom, fill=False, edgecolor=edge[i], lw=1.4, zorder=4)
        axes.add_patch(frame)
    axes.set(xlim=(low[0], low[0] + span[0]), ylim=(low[1], low[1] + span[1]))


def _spread(points: np.ndarray, apart: float) -> list[int]:
    """Greedy subset of points of shape (n, 2) whose squares of side `apart` don't overlap, outermost point first."""
    chosen: list[int] = []
    distance = np.abs(points - points.mean(0)).max(1) + apart
    while len(chosen) < _THUMBNAILS and distance.max() >= apart:
        chosen.append(int(distance.argmax()))
        nearest = np.abs(points - points[chosen[-1]]).max(1)
        distance = nearest if len(chosen) == 1 else np.minimum(distance, nearest)
    return chosen
