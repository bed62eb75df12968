"""Tabs of an edit studio; each is computed when it is opened."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import ipywidgets as widgets
import numpy as np
import torch
from plotly import graph_objects as go

from workbench.analysis.embedding import Embedding, embed
from workbench.diffusion.sampling import replay
from workbench.editing.render import EditGrid
from workbench.studio.markup import AFTER, BEFORE, bars, cells, picture
from workbench.studio.state import EditState, Predictions, Progress

if TYPE_CHECKING:
    from workbench.studio.widgets import EditStudio

_STRIP = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
_GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)
_MOST_LASSOED = 8
_MAPS = 16
"""Maps that are kept, so that going back to one is quick."""


class View(widgets.VBox):
    """A tab: `shown` is what `show` makes of the session on the studio's thread."""

    def __init__(self, studio: EditStudio, *controls: widgets.Widget) -> None:
        self.studio, self.session, self.shown = studio, studio.session, widgets.HTML()
        super().__init__([*([widgets.HBox(controls)] if controls else []), self.shown])

    def show(self, state: EditState, progress: Progress) -> None:
        """Bring the view to a state; ValueError if there is nothing to show."""


class ReadOut(View):
    """A classifier's probabilities before and after."""

    def show(self, state: EditState, progress: Progress) -> None:
        table = self.session.read_out(self.studio.rendering)
        self.shown.value = "Give a classifier to see its scores." if table is None else bars(table)


class Edits(View):
    """The edit with some of its controls at several values, which dropdowns choose."""

    def __init__(self, studio: EditStudio, **preferred: int) -> None:
        self.choosers = {word: widgets.Dropdown(description=word.capitalize()) for word in preferred}
        self._preferred = preferred
        for chooser in self.choosers.values():
            studio.follow(chooser)
        super().__init__(studio, *self.choosers.values())

    def offer(self, names: list[str]) -> None:
        """Let these be chosen."""
        for word, chooser in self.choosers.items():
            if list(chooser.options) != names:
                chooser.options = names
                chooser.index = min(self._preferred[word], len(names) - 1)

    def show(self, state: EditState, progress: Progress) -> None:
        chosen = [chooser.value for chooser in self.choosers.values()]
        if None in chosen or len({*chosen}) < len(chosen):
            self.shown.value = "A grid takes two different directions or boundaries."
            return
        single = state.process == "single-step"
        if not {*chosen} <= {*(self.session.boundaries if single else self.session.directions)}:
            return  # the choosers follow the state's process a moment later
        values = _STRIP if len(chosen) == 1 else _GRID
        if single:  # distances as far apart as the boundary's slider reaches
            reach = self.studio.distances[chosen[-1]].max
            values = [round(reach * value / max(values), 2) for value in values]
        if len(chosen) == 1:
            grid = self.session.strip(*chosen, values, state=state, progress=progress)
        else:
            grid = self.session.grid(*chosen, values=values, state=state, progress=progress)
        self.shown.value = cells(grid)


class Timesteps(View):
    """P_t along the chain, with and without the edit."""

    def __init__(self, studio: EditStudio) -> None:
        self.timestep = timestep_slider(studio.session.timesteps, "timestep whose predicted image is shown")
        self.timestep.observe(lambda _: self._show_one(), "value")
        self.predicted = widgets.HTML().add_class("hspace-large")
        self._found: Predictions | None = None
        super().__init__(studio)
        self.children = [self.timestep, self.predicted, self.shown]

    def show(self, state: EditState, progress: Progress) -> None:
        found = self._found = self.session.predictions(state=state, progress=progress)
        some = slice(None, None, max(1, len(found.timesteps) // 10))
        images = torch.stack([found.before[some], found.after[some]])
        grid = EditGrid(images, ("before", "after"), tuple(f"t = {t}" for t in found.timesteps[some]), {})
        self.shown.value = cells(grid)
        self._show_one()

    def _show_one(self) -> None:
        if self._found is not None:
            k, t = self.timestep.index, self.timestep.value
            pair = ((self._found.before[k], "before"), (self._found.after[k], "after"))
            self.predicted.value = "".join(
                picture(image, f"{word}, predicted", f"x_0 at t = {t}") for image, word in pair
            )


class Map(View):
    """Samples in the plane, and the path of the edit; a lasso takes samples into the studio."""

    def __init__(self, studio: EditStudio) -> None:
        self.method = widgets.ToggleButtons(options=[("PCA", "pca"), ("UMAP", "umap")], style={"button_width": "70px"})
        self.timestep = timestep_slider(studio.session.timesteps, "timestep of the map", continuous_update=False)
        for control in (self.method, self.timestep):
            studio.follow(control)
        self.figure: go.FigureWidget | None = None
        self._maps: dict[tuple[str, int, int], tuple[Embedding, list[str]]] = {}
        self._images: np.ndarray | None = None
        super().__init__(studio, self.method, self.timestep)
        self.shown.add_class("hspace-small").value = "Hover over a point to see its image."

    def show(self, state: EditState, progress: Progress) -> None:
        method, t, store = self.method.value, self.timestep.value, self.studio.store
        n = len(self.session.samples if store is None else store)
        if n < 4:
            self.shown.value = "A map takes at least 4 samples; give store= for one of a whole population."
            return
        if (method, t, n) not in self._maps:
            self.studio.say("making the map")
            h, self._images, names = self._points(t, progress)
            options = {} if method == "pca" else {"neighbours": min(15, n - 1)}
            self._maps[method, t, n] = embed(h, method=method, **options), names
            while len(self._maps) > _MAPS:
                del self._maps[next(iter(self._maps))]
            self.studio.say("")
        found, names = self._maps[method, t, n]
        path = found.place(self.session.path(t, state=state, progress=progress))
        if self.figure is None:
            self.figure = self._new_figure()
            self.children = [self.children[0], self.figure, self.shown]
        points, line = self.figure.data
        with self.figure.batch_update():
            points.x, points.y, points.text = found.points[:, 0], found.points[:, 1], names
            line.x, line.y = path[:, 0], path[:, 1]
            self.figure.update_layout(xaxis_title=found.axes[0], yaxis_title=found.axes[1])

    def _points(self, t: int, progress: Progress) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """h_t, images and names of the points of the map."""
        store, session = self.studio.store, self.session
        if store is not None:
            seeds = store.seeds
            names = [f"sample {i}" if seeds is None else f"seed {seeds[i]}" for i in range(len(store))]
            return store.at(t), store.images[:], names
        runs = [replay(run, record_h=True, progress=progress) for run in session.samples]
        images = np.concatenate([run.images.numpy() for run in session.samples])
        return np.concatenate([run.h.at(t) for run in runs]), images, [session.label(k) for k in range(len(runs))]

    def _new_figure(self) -> go.FigureWidget:
        figure = go.FigureWidget()
        marker = {"size": 8, "color": BEFORE, "opacity": 0.8}
        figure.add_scatter(mode="markers", marker=marker, name="samples", hoverinfo="text")
        line, end = {"color": AFTER, "width": 3}, {"color": AFTER, "size": [7, 5, 5, 5, 13]}
        figure.add_scatter(mode="lines+markers", line=line, marker=end, name="the edit's path", hoverinfo="name")
        figure.update_layout(
            width=540,  # a tab that is not shown has no width to follow
            height=420,
            margin={"l": 50, "r": 10, "t": 10, "b": 45},
            paper_bgcolor="rgba(0,0,0,0)",
            plot_bgcolor="rgba(0,0,0,0)",
            font_color="#888",
            dragmode="lasso",
            hovermode="closest",
            legend={"orientation": "h", "y": 1.08},
        )
        figure.update_xaxes(gridcolor="rgba(136,136,136,0.3)", zeroline=False)
        figure.update_yaxes(gridcolor="rgba(136,136,136,0.3)", zeroline=False)
        points = figure.data[0]
        points.on_hover(lambda trace, found, _: self.hover(trace, found.point_inds))
        points.on_click(lambda trace, found, _: self.take(found.point_inds))
        points.on_selection(lambda trace, found, _: self.take(found.point_inds))
        return figure

    def hover(self, trace, chosen: Sequence[int]) -> None:
        """Show the image of a point."""
        if chosen:
            self.shown.value = picture(torch.from_numpy(self._images[chosen[0]]), "sample", trace.text[chosen[0]])

    def take(self, chosen: Sequence[int]) -> None:
        """Take points into the studio, and edit the first of them."""
        if not len(chosen):
            return

        def task(progress: Progress) -> None:
            taken, store = list(chosen)[:_MOST_LASSOED], self.studio.store
            if store is None:
                positions = taken
            elif store.seeds is not None:
                positions = self.session.add_seeds([store.seeds[i] for i in taken], progress=progress)
            else:
                images = torch.from_numpy(np.stack([store.images[i] for i in taken]))
                positions = [self.session.add_image(image.clamp(-1, 1), progress=progress) for image in images]
            self.studio.pick(positions[0])
            left = len(chosen) - len(taken)
            more = f"; {left} more were left out" if left else ""
            self.studio.say(f"{len(taken)} samples are in the studio{more}")

        self.studio.submit(task)


def timestep_slider(timesteps: Sequence[int], tooltip: str, **options) -> widgets.SelectionSlider:
    """A slider over visited timesteps, which begins in their middle."""
    return widgets.SelectionSlider(
        options=timesteps, index=len(timesteps) // 2, description="t", tooltip=tooltip, **options
    )
