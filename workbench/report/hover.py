"""The interactive figure: points whose images show on hover, in plotly."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from IPython.display import display
from plotly import graph_objects as go

from workbench.report.pictures import pictures_of, png_address
from workbench.report.style import PALETTE, colors_of, labelled, points_of

_SCRIPT = Path(__file__).with_name("hover.js").read_text(encoding="utf-8")


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
        return super().to_html(**{"post_script": _SCRIPT} | kwargs)

    def write_html(self, file, **kwargs) -> None:
        """As plotly's `Figure.write_html`, with the thumbnails on hover."""
        super().write_html(file, **{"post_script": _SCRIPT} | kwargs)

    def show(self) -> None:
        """Display the figure in a notebook."""
        display(self)


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
    points = points_of(points, (2, 3))
    thumbnails = [png_address(picture, (64, 64)) for picture in pictures_of(images, "images", len(points))]
    values, categories = colors_of(color, len(points))
    if text is None:
        text = [f"sample {i}" for i in range(len(points))]
        if values is not None:
            shown = [f"{v:.3g}" if categories is None else categories[v] for v in values]
            text = [f"{one}\n{color_label or 'colour'}: {value}" for one, value in zip(text, shown, strict=True)]
    text = labelled(text, len(points), "text", "points")

    flat = points.shape[1] == 2
    trace, size = (go.Scatter, 7) if flat else (go.Scatter3d, 3.5)
    everything = np.arange(len(points))
    if categories is not None:
        parts = [(name, everything[values == k], {"color": PALETTE[k]}) for k, name in enumerate(categories)]
    elif values is not None:
        bar = {"color": values, "colorscale": "Viridis", "colorbar": {"title": color_label or ""}}
        parts = [(None, everything, bar)]
    else:
        parts = [(None, everything, {"color": PALETTE[0]})]
    figure = HoverFigure()
    for name, chosen, marker in parts:
        figure.add_trace(
            trace(
                **dict(zip("xyz", points[chosen].T, strict=False)),
                customdata=[(thumbnails[i], text[i]) for i in chosen],
                mode="markers",
                hoverinfo="none",
                marker={"size": size, "opacity": 0.85, **marker},
                name=name,
                showlegend=name is not None,
            )
        )
    below = textwrap.wrap(caption or "", 110)
    titles = {"xaxis_title": xlabel, "yaxis_title": ylabel}
    figure.update_layout(
        template="plotly_white",
        title=title,
        legend_title=color_label,
        height=560,
        margin={"l": 60, "r": 20, "t": 50 if title else 20, "b": 60 + 16 * len(below)},
        hovermode="closest",
        **titles if flat else {"scene": titles | {"zaxis_title": zlabel or ""}},
    )
    if below:
        figure.add_annotation(
            text="<br>".join(below),
            **{"x": 0, "xref": "paper", "xanchor": "left", "y": 0, "yref": "paper", "yanchor": "top", "yshift": -48},
            **{"showarrow": False, "align": "left", "font": {"size": 11, "color": "#555555"}},
        )
    return figure
