"""The drawing of a U-Net with all places where an activation can be read and edited."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.colors import LogNorm
from matplotlib.patches import Rectangle

from workbench.report.style import ACCENT, INK, QUIET, Figure, drawing


def network(table: pd.DataFrame, *, caption: str | None = None) -> Figure:
    """Draw a U-Net: a box per block, as high as its resolution and as wide as its channels, and an arrow per skip.

    Parameters
    ----------
    table : DataFrame
        Of `wb.tap_table`. The colour is the rms of the activations, averaged over the timesteps of the table.
    caption : str, optional

    Returns
    -------
    Figure

    Raises
    ------
    ValueError
        If the table has no taps.
    """
    if table.empty:
        raise ValueError("the table has no taps; give one of wb.tap_table")
    taps = table.groupby("tap", sort=False).agg(
        {"channels": "first", "height": "first", "width": "first", "rms": "mean"}
    )
    blocks = [tap for tap in taps.index if tap.startswith(("down.", "after", "up."))]
    skips = [tap for tap in taps.index if tap.startswith("skip.")]
    places = {tap: float(i) for i, tap in enumerate(blocks)}
    tallest, widest = taps["height"].max(), taps["channels"].max()
    low, high = taps["rms"].min(), taps["rms"].max()
    scale = LogNorm(max(low, 1e-12) / 1.01, max(high, 1e-12) * 1.01)
    with drawing(1.2 + 1.1 * len(blocks), 2.4 + 0.32 * len(skips), caption) as figure:
        axes = figure.add_subplot()
        for tap, x in places.items():
            row = taps.loc[tap]
            height, width = _height(row["height"], tallest), 0.2 + 0.55 * row["channels"] / widest
            color = _blue(scale(row["rms"]))
            axes.add_patch(Rectangle((x - width / 2, -height), width, height, facecolor=color, edgecolor=INK))
            name = "after (h)" if tap == "after" else tap
            shape = f"{row['channels']:.0f} x {row['height']:.0f} x {row['width']:.0f}"
            axes.annotate(
                f"{name}\n{shape}\nrms {row['rms']:.2g}", (x, -height - 0.04), ha="center", va="top", fontsize=7
            )
        middle = places["after"]
        for k, tap in enumerate(skips):
            # The first skip is the outermost.
            reach, y = (middle + 0.3) * (1 - k / len(skips)), 0.2 * (len(skips) - k)
            row = taps.loc[tap]
            axes.plot([middle - reach] * 2 + [middle + reach], [0.03, y, y], color=QUIET, lw=0.9)
            axes.annotate(
                "", (middle + reach, 0.02), (middle + reach, y), arrowprops={"arrowstyle": "-|>", "color": QUIET}
            )
            text = f"{tap}: {_shape(row)}, rms {row['rms']:.2g}"
            axes.text(middle, y + 0.03, text, ha="center", va="bottom", fontsize=7, color=ACCENT)
        axes.set_xlim(-0.8, len(blocks) - 0.2)
        axes.set_ylim(-1.4, 0.2 * len(skips) + 0.2)
        axes.axis("off")
    return figure


def _blue(share: float) -> tuple[float, float, float]:
    """A blue that darkens with a share from 0 to 1."""
    light, dark = np.array([0.92, 0.95, 0.99]), np.array([0.35, 0.55, 0.80])
    return tuple(light + float(np.clip(share, 0, 1)) * (dark - light))


def _shape(row: pd.Series) -> str:
    return f"{row['channels']:.0f} x {row['height']:.0f} x {row['width']:.0f}"


def _height(pixels: float, tallest: float) -> float:
    """Height of a box: 1 for the finest resolution, less by a fifth a halving."""
    return max(0.25, 1.0 - 0.22 * np.log2(tallest / pixels))
