"""HTML of the studio: images, tables of images, bars, and lines of text."""

from __future__ import annotations

import html

import pandas as pd
import torch

from workbench.editing.render import EditGrid
from workbench.report import plots
from workbench.report.pictures import png_address

BEFORE, AFTER = plots.PALETTE[0], plots.PALETTE[1]


def address(image: torch.Tensor) -> str:
    """A picture (C, H, W) as the address of a PNG."""
    return png_address(plots.to_pixels(image[None])[0])


def picture(image: torch.Tensor, title: str, words: str) -> str:
    """A picture (C, H, W) with its caption."""
    title, words = html.escape(title), html.escape(words)
    return (
        f'<figure><img src="{address(image)}" alt="{title}: {words}"><figcaption><b>{title}</b><br>{words}</figcaption>'
        "</figure>"
    )


def cells(grid: EditGrid) -> str:
    """A grid as a table of pictures."""
    rows, columns = (
        [html.escape(label).replace("\n", "<br>") for label in labels]
        for labels in (grid.row_labels, grid.column_labels)
    )
    lines = ["<tr><td></td>" + "".join(f'<th scope="col">{column}</th>' for column in columns)]
    for images, row in zip(grid.images, rows, strict=True):
        alts = [f"{row}, {column}".replace("<br>", " ") for column in columns]
        shown = (f'<td><img src="{address(image)}" alt="{alt}">' for image, alt in zip(images, alts, strict=True))
        lines.append(f'<tr><th scope="row">{row}</th>' + "".join(shown))
    return f'<table class="hspace-cells">{"".join(lines)}</table>'


def bars(table: pd.DataFrame) -> str:
    """Probabilities before and after, largest change first."""
    order = (table["after"] - table["before"]).abs().sort_values(ascending=False, kind="stable").index
    lines = ["<tr><th>attribute</th><th></th><th>before</th><th>after</th></tr>"]
    for name, before, after in table.loc[order, ["before", "after"]].itertuples():
        drawn = "".join(
            f'<span class="hspace-bar" style="width:{value:.1%};background:{color}"></span>'
            for value, color in ((before, BEFORE), (after, AFTER))
        )
        lines.append(
            f'<tr><th scope="row">{html.escape(str(name).replace("_", " "))}</th>'
            f'<td><div class="hspace-track">{drawn}</div></td><td>{before:.2f}</td><td>{after:.2f}</td></tr>'
        )
    return f'<table class="hspace-bars">{"".join(lines)}</table>'
