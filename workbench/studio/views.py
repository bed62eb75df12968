"""Tabs of an edit studio; each is computed when it is opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

import ipywidgets as widgets
import numpy as np
import torch

from workbench.analysis.maps import make_maps
from workbench.datasets.clip import Clip
from workbench.diffusion.sampling import replay
from workbench.directions.words import SOURCE, find_from_text
from workbench.editing.render import EditGrid
from workbench.studio.explorer import Explorer, explore
from workbench.studio.markup import bars, cells, picture
from workbench.studio.state import Predictions, Progress

if TYPE_CHECKING:
    from workbench.studio.widgets import EditStudio

_STRIP = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
_GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)
_MOST_TAKEN = 8


class View(widgets.VBox):
    """A tab: `shown` is what `show` makes of the session on the studio's thread."""

    def __init__(self, studio: EditStudio, *controls: widgets.Widget) -> None:
        self.studio, self.session, self.shown = studio, studio.session, widgets.HTML()
        super().__init__([*([widgets.HBox(controls)] if controls else []), self.shown])

    def show(self, progress: Progress) -> None:
        """Bring the view to the session's state; ValueError if there is nothing to show."""


class ReadOut(View):
    """A classifier's probabilities before and after."""

    def show(self, progress: Progress) -> None:
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

    def show(self, progress: Progress) -> None:
        chosen = [chooser.value for chooser in self.choosers.values()]
        if None in chosen or len({*chosen}) < len(chosen):
            self.shown.value = "A grid takes two different directions or boundaries."
            return
        single = self.session.state.process == "single-step"
        if not {*chosen} <= {*(self.session.boundaries if single else self.session.directions)}:
            return  # the choosers follow the state's process a moment later
        values = _STRIP if len(chosen) == 1 else _GRID
        controls = dict.fromkeys(chosen, values)
        if single:  # distances as far apart as each boundary's slider reaches
            reaches = {name: self.studio.distances[name].max for name in chosen}
            controls = {name: [round(reach * k / max(values), 2) for k in values] for name, reach in reaches.items()}
        self.shown.value = cells(self.session.grid(controls, progress=progress))


class Timesteps(View):
    """P_t along the chain, with and without the edit."""

    def __init__(self, studio: EditStudio) -> None:
        timesteps, words = studio.session.timesteps, "timestep whose predicted image is shown"
        middle = len(timesteps) // 2
        self.timestep = widgets.SelectionSlider(options=timesteps, index=middle, description="t", tooltip=words)
        self.timestep.observe(lambda _: self._show_one(), "value")
        self.predicted = widgets.HTML().add_class("hspace-large")
        self._found: Predictions | None = None
        super().__init__(studio)
        self.children = [self.timestep, self.predicted, self.shown]

    def show(self, progress: Progress) -> None:
        found = self._found = self.session.predictions(progress=progress)
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
    """Samples on linked maps, and the path of the edit; what is selected can be edited, or become a direction."""

    def __init__(self, studio: EditStudio) -> None:
        self.method = widgets.ToggleButtons(options=[("PCA", "pca"), ("UMAP", "umap")], style={"button_width": "70px"})
        studio.follow(self.method)
        self.explorer: Explorer | None = None
        self._made: tuple[str, int] | None = None
        super().__init__(studio, self.method)

    def show(self, progress: Progress) -> None:
        session, store = self.session, self.studio.store
        wanted = self.method.value, len(session.samples if store is None else store)
        if wanted != self._made:
            self.studio.say("making the map")
            before = self.explorer
            self.explorer, self._made = self._explore(wanted[0], progress), wanted
            if before is not None:
                before.close()
            self.explorer.on_ask("take", "Edit these samples", self._take)
            self.children = [self.children[0], self.explorer, self.shown]
            self.studio.say("")
        middle = self.explorer.maps[len(self.explorer.maps) // 2]
        path = session.path(middle.timesteps[0], progress=progress)
        self.explorer.paths = {middle.name: self.explorer.within(middle.name, middle.place(path))}

    def _explore(self, method: str, progress: Progress) -> Explorer:
        store, session, model = self.studio.store, self.session, self.session.model
        if store is not None:
            own = {"model": model, "runs": self.studio.runs, "studio": self.studio}
            return explore(store, methods=[method], directions=list(session.directions.values()), **own)
        runs = [replay(run, record_h=True, progress=progress) for run in session.samples]
        images = np.concatenate([run.images.numpy() for run in session.samples])
        t, n = session.timesteps[len(session.timesteps) // 2], len(runs)
        made = make_maps({"h": lambda t: [run.h.at(t) for run in runs]}, n=n, timesteps=[t], methods=[method])
        names = [session.label(k) for k in range(n)]
        return Explorer(made, names=names, images=lambda rows: images[rows], studio=self.studio)

    def _take(self, progress: Progress) -> None:
        """Edit the selected samples; the first of them is shown."""
        chosen, store = self.explorer.sides[0], self.studio.store
        taken = chosen[:_MOST_TAKEN]
        if not taken:
            raise ValueError("no sample is selected; draw around some")
        if store is None:
            positions = taken
        elif store.seeds is not None:
            eta = store.provenance["etas"]
            positions = self.session.add_seeds([store.seeds[i] for i in taken], eta=eta, progress=progress)
        else:
            images = torch.from_numpy(np.stack([store.images[i] for i in taken]))
            positions = [self.session.add_image(image.clamp(-1, 1), progress=progress) for image in images]
        self.studio.pick(positions[0])
        left = len(chosen) - len(taken)
        self.explorer.say(f"{len(taken)} samples are in the studio" + (f"; {left} more were left out" if left else ""))


class Words(widgets.VBox):
    """A field for a sentence, which becomes a direction of its own by the scores of a CLIP."""

    def __init__(self, studio: EditStudio, clip: Clip) -> None:
        self.studio, self.clip = studio, clip
        self.text = widgets.Text(placeholder="a smiling person", description="Text", tooltip="what the samples become")
        self.against = widgets.Text(SOURCE, description="against", tooltip="what the samples are without the edit")
        self.find = widgets.Button(description="Add a slider", tooltip="find the direction of the text")
        self.find.on_click(lambda _: self._ask())
        super().__init__([self.text, self.against, self.find])

    def _ask(self) -> None:
        text, against = self.text.value, self.against.value
        self.studio.say(f"looking for {text!r}")
        self.studio.worker.submit(lambda _: self._find(text, against))

    def _find(self, text: str, against: str) -> None:
        store = self.studio.store
        found = find_from_text(store, text, against=against, clip=self.clip, progress=False)
        name = self.studio.session.add(found)
        self.studio.refresh()
        samples = f"{found.provenance['parameters']['fitting']} of {len(store)} samples fit it"
        self.studio.say(f"{name}: {samples} better than {against!r}")
