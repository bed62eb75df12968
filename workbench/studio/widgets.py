"""The edit studio in a notebook: a thin view over an `EditSession`.

Each control calls one method of the session. Images are made by one thread beside the kernel's loop: a preview first,
the whole image when the controls rest; a newer change stops an older one. Callbacks assign traits, so that everything
that shows can be read in Python and tested without a browser.
"""

from __future__ import annotations

import base64
import html
import io
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
import torch
from PIL import Image
from plotly import graph_objects as go
from traitlets import Unicode

from workbench import paths
from workbench.analysis.geometry import Embedding, embed
from workbench.datasets.classifiers import Classifier
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, replay
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction
from workbench.editing.render import EditGrid
from workbench.hspace.store import HStore
from workbench.io import provenance_mismatch
from workbench.report import plots
from workbench.studio.recipe import apply_recipe, save_recipe
from workbench.studio.session import EditSession
from workbench.studio.state import Cancelled, EditState, Progress, Rendering, describe

REST = 0.2
"""Seconds without a change after which the preview is replaced by the whole image."""

_ROOM = Path(__file__).parent
_BEFORE, _AFTER = plots.PALETTE[0], plots.PALETTE[1]
_PROCESSES = {
    "symmetric": "P_t and D_t change (Haas et al.)",
    "asymmetric": "P_t alone changes (Asyrp)",
    "single-step": "x_t and h_t cross boundaries, once (BoundaryDiffusion)",
}
_STRIP = (-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 3.0)
_GRID = (-2.0, -1.0, 0.0, 1.0, 2.0)
_WIDE = {"description_width": "150px"}
_MOST_LASSOED = 8
_MAPS = 16
"""Maps that are kept, so that going back to one is quick."""


class DropZone(anywidget.AnyWidget):
    """A field to drop an image file on, or to choose one; it sends the file's content as a message."""

    _esm = _ROOM / "dropzone.js"
    label = Unicode("Drop an image here, or choose one:").tag(sync=True)


class Worker:
    """A thread for work of which the latest counts: a newer image stops the one before.

    Parameters
    ----------
    on_progress : callable (float) -> None
        Called after every step of the work.
    on_error : callable (str) -> None
        Called with the sentence of an error.
    """

    def __init__(self, on_progress: Callable[[float], None], on_error: Callable[[str], None]) -> None:
        self._on_progress, self._on_error = on_progress, on_error
        self._condition = threading.Condition()
        self._tasks: deque[Callable[[Progress], None]] = deque()
        self._latest: Callable[[Progress], None] | None = None
        self._running: Progress | None = None
        self._runs_latest = False
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[Progress], None]) -> None:
        """Do this after all other tasks, and before any image."""
        with self._condition:
            self._tasks.append(task)
            self._start()

    def show(self, work: Callable[[Progress], None]) -> None:
        """Do this instead of what was shown before, finished or not."""
        with self._condition:
            self._latest = work
            if self._running is not None and self._runs_latest:
                self._running.cancel()
            self._start()

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until there is nothing to do; False if that takes longer than `timeout` seconds."""
        with self._condition:
            return self._condition.wait_for(self._idle, timeout)

    def _idle(self) -> bool:
        return not self._tasks and self._latest is None and self._running is None

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, daemon=True, name="edit-studio")
            self._thread.start()
        self._condition.notify_all()

    def _loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._tasks or self._latest)
                self._runs_latest = not self._tasks
                work = self._latest if self._runs_latest else self._tasks.popleft()
                if self._runs_latest:
                    self._latest = None
                progress = self._running = Progress(self._on_progress)
            try:
                work(progress)
            except Cancelled:
                pass
            except Exception as error:  # whatever it is, the person at the controls has to read it
                self._on_error(str(error) or type(error).__name__)
            finally:
                with self._condition:
                    self._running = None
                    self._condition.notify_all()


class EditStudio(widgets.VBox):
    """Edit samples by sliders, and see what comes of it at once.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The samples, not edited yet.
    directions : Direction, Boundary, or sequence of them
        One slider each: in sigma, or in signed distance.
    classifier : Classifier, optional
        Its probabilities before and after are shown as bars.
    store : HStore, optional
        What the map shows; by default the samples themselves.
    folder : path, optional
        Where things are saved, by default `data/edits`.

    Attributes
    ----------
    session : EditSession
        All state; also without widgets.

    Raises
    ------
    ValueError
        As of `EditSession`; if the store is of another model, or of other timesteps or another eta than the samples.
    """

    def __init__(
        self,
        model: Model,
        runs: Trajectory,
        directions: Direction | Boundary | Sequence[Direction | Boundary],
        *,
        classifier: Classifier | None = None,
        store: HStore | None = None,
        folder: str | Path | None = None,
    ) -> None:
        self.session = EditSession(model, runs, directions, classifier=classifier)
        if store is not None:
            _refuse_other_store(store, self.session)
        self.store, self.folder = store, paths.edits() if folder is None else paths.writable(folder, folder=True)
        self.rendering: Rendering | None = None
        self._without_view = False
        self._local = threading.local()
        self._worker = Worker(self._on_progress, self._on_problem)
        self._maps: dict[tuple[str, int, int], tuple[Embedding, list[str]]] = {}
        super().__init__(self._layout())
        self.add_class("hspace-studio")
        self.refresh()
        if self.session.notes:
            self._say("; ".join(self.session.notes))

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until nothing is being computed; False if that takes longer than `timeout` seconds."""
        return self._worker.wait(timeout)

    def refresh(self) -> None:
        """Show the session's state, after it was changed in Python."""
        self._show_state()
        self._update()

    def figure(self, state: EditState | None = None) -> plots.Figure:
        """An edit, by default the current one, as a figure: before, after, difference, and the read-out."""
        rendering = self.session.render(state=state)
        seed = self.session.label(rendering.state.sample)
        return plots.before_after(
            rendering.before,
            rendering.after,
            scores=self.session.read_out(rendering),
            caption=f"{seed} of {self.session.model.name}, {len(self.session.timesteps)} steps: "
            f"{describe(rendering.state)}.",
        )

    def _repr_mimebundle_(self, **kwargs) -> dict:
        # Where there is no live widget, as in an exported report, the picture of the current state stands in.
        self.wait()
        return super()._repr_mimebundle_(**kwargs) | {
            "image/png": base64.b64encode(self.figure()._repr_png_()).decode("ascii")
        }

    # Layout.

    def _layout(self) -> list[widgets.Widget]:
        self.style_sheet = widgets.HTML()
        self.status = widgets.HTML().add_class("hspace-status")
        self.progress = widgets.FloatProgress(
            0.0, min=0.0, max=1.0, layout=widgets.Layout(width="100%", height="6px", margin="0")
        )
        self.before, self.after, self.difference = (widgets.HTML() for _ in range(3))
        self.read_out = widgets.HTML()
        controls = widgets.VBox([*self._sample_controls(), *self._edit_controls()]).add_class("hspace-controls")
        pictures = widgets.HBox(
            [self.before, self.after, self.difference], layout=widgets.Layout(flex_flow="row wrap")
        ).add_class("hspace-large")
        self.views = widgets.Tab(
            [
                self.read_out,
                self._strip_view(),
                self._grid_view(),
                self._timestep_view(),
                self._map_view(),
                self._files(),
            ],
            titles=("Read-out", "Strip", "Grid", "Timesteps", "Map", "Files"),
        )
        self.views.observe(lambda _: self._update(), "selected_index")
        images = widgets.VBox([pictures, self.progress, self.status, self.views]).add_class("hspace-images")
        columns = widgets.Box([controls, images]).add_class("hspace-columns")
        return [self.style_sheet, columns]

    def _sample_controls(self) -> list[widgets.Widget]:
        self.samples = widgets.Box().add_class("hspace-samples")
        self.drop = DropZone()
        self.drop.on_msg(self._on_drop)
        return [_title("Sample"), self.samples, self.drop]

    def _edit_controls(self) -> list[widgets.Widget]:
        session = self.session
        self.scales: dict[str, widgets.FloatSlider] = {}
        self.distances: dict[str, widgets.FloatSlider] = {}
        self.leave: dict[str, widgets.Button] = {}
        self.against: dict[tuple[str, str], widgets.Checkbox] = {}
        self.edits = widgets.VBox()
        self.process = widgets.ToggleButtons(style={"button_width": "112px"})
        self._on(self.process, session.set_process, show=True)
        self.window = widgets.SelectionRangeSlider(
            options=session.timesteps,
            index=(0, len(session.timesteps) - 1),
            description="Timesteps",
            tooltip="directions act between these timesteps",
            style=_WIDE,
            layout=widgets.Layout(width="400px"),
        )
        self._on(self.window, lambda value: session.set_window(*value))
        self.eta = widgets.FloatSlider(
            0.0, min=0.0, max=1.0, step=0.1, description="eta", style=_WIDE, layout=widgets.Layout(width="400px")
        )
        self._on(self.eta, session.set_eta)
        self.undo, self.redo, self.reset = (
            widgets.Button(description=word, layout=widgets.Layout(width="96px")) for word in ("Undo", "Redo", "Reset")
        )
        for button, action in ((self.undo, session.undo), (self.redo, session.redo), (self.reset, session.reset)):
            self._on_click(button, action)

        buttons = widgets.HBox([self.undo, self.redo, self.reset])
        return [self.edits, _title("How"), self.process, self.window, self.eta, buttons]

    def _show_edits(self) -> None:
        """A slider for each direction and boundary that the session has; a recipe may bring some."""
        session = self.session
        if list(self.scales) == list(session.directions) and list(self.distances) == list(session.boundaries):
            return
        for name in session.directions.keys() - self.scales.keys():
            self._add_scale(name)
        for name in session.boundaries.keys() - self.distances.keys():
            self._add_distance(name)
        self.scales = {name: self.scales[name] for name in session.directions}
        self.distances = {name: self.distances[name] for name in session.boundaries}
        rows = []
        if self.scales:
            rows += [_title("Directions (sigma)"), *self.scales.values(), *self._projection_controls()]
        if self.distances:
            pairs = [widgets.HBox([slider, self.leave[name]]) for name, slider in self.distances.items()]
            rows += [_title("Boundaries (signed distance)"), *pairs]
        self.edits.children = rows
        possible = [p for p in _PROCESSES if (session.boundaries if p == "single-step" else session.directions)]
        self.process.tooltips, self.process.options = [_PROCESSES[process] for process in possible], possible

    def _add_scale(self, name: str) -> None:
        slider = widgets.FloatSlider(
            0.0,
            min=-4.0,
            max=4.0,
            step=0.1,
            description=name,
            tooltip=f"{name}, in sigma",
            style=_WIDE,
            layout=widgets.Layout(width="400px"),
        )
        self._on(slider, lambda value: self.session.set_scale(name, value))
        self.scales[name] = slider

    def _add_distance(self, name: str) -> None:
        slider = widgets.FloatSlider(
            0.0,
            min=-1.0,
            max=1.0,
            description=name,
            tooltip=f"signed distance from the boundary {name}",
            style=_WIDE,
            layout=widgets.Layout(width="340px"),
        )
        button = widgets.Button(
            description="leave", tooltip=f"don't move to {name}", layout=widgets.Layout(width="60px")
        )
        self._on(slider, lambda value: self.session.set_distance(name, value))
        self._on_click(button, lambda: self.session.set_distance(name, None))
        self.distances[name], self.leave[name] = slider, button

    def _projection_controls(self) -> list[widgets.Widget]:
        names = list(self.scales)
        if len(names) < 2:
            return []
        self.against = {
            (name, other): widgets.Checkbox(
                description=other, indent=False, tooltip=f"take what {name} shares with {other} out of {name}"
            )
            for name in names
            for other in names
            if other != name
        }
        for (name, _), box in self.against.items():
            self._on(box, lambda _, name=name: self.session.set_against(name, self._checked(name)))
        rows = [
            widgets.HBox(
                [widgets.Label(f"{name} ⟂"), *(box for (of, _), box in self.against.items() if of == name)],
                layout=widgets.Layout(flex_flow="row wrap"),
            )
            for name in names
        ]
        return [widgets.Accordion([widgets.VBox(rows).add_class("hspace-against")], titles=("Disentangle",))]

    def _checked(self, name: str) -> list[str]:
        return [other for (of, other), box in self.against.items() if of == name and box.value]

    def _strip_view(self) -> widgets.Widget:
        self.strip_of = self._chooser("Along")
        self.strip = widgets.HTML()
        return widgets.VBox([self.strip_of, self.strip])

    def _grid_view(self) -> widgets.Widget:
        self.grid_down, self.grid_across = self._chooser("Down"), self._chooser("Across")
        self.grid = widgets.HTML()
        return widgets.VBox([widgets.HBox([self.grid_down, self.grid_across]), self.grid])

    def _chooser(self, description: str) -> widgets.Dropdown:
        chooser = widgets.Dropdown(description=description, style={"description_width": "60px"})
        chooser.observe(lambda _: None if self._quiet else self._update(), "value")
        return chooser

    def _timestep_view(self) -> widgets.Widget:
        self.timestep = widgets.SelectionSlider(
            options=self.session.timesteps,
            index=len(self.session.timesteps) // 2,
            description="t",
            tooltip="timestep whose predicted image is shown",
            layout=widgets.Layout(width="420px"),
        )
        self.timestep.observe(lambda _: self._show_timestep(), "value")
        self.predicted, self.predictions, self._predicted = widgets.HTML(), widgets.HTML(), None
        return widgets.VBox([self.timestep, self.predicted.add_class("hspace-large"), self.predictions])

    def _map_view(self) -> widgets.Widget:
        self.map_method = widgets.ToggleButtons(
            options=[("PCA", "pca"), ("UMAP", "umap")], style={"button_width": "70px"}
        )
        self.map_t = widgets.SelectionSlider(
            options=self.session.timesteps,
            index=len(self.session.timesteps) // 2,
            description="t",
            tooltip="timestep of the map",
            continuous_update=False,
        )
        for control in (self.map_method, self.map_t):
            control.observe(lambda _: self._update(), "value")
        self.hover = widgets.HTML("Hover over a point to see its image.").add_class("hspace-small")
        self.map: go.FigureWidget | None = None
        self._map_images: np.ndarray | None = None
        self.map_box = widgets.VBox([widgets.HBox([self.map_method, self.map_t]), self.hover])
        return self.map_box

    def _files(self) -> widgets.Widget:
        self.file_name = widgets.Text("edit", description="Name", tooltip="of the files, without an ending")
        self.save_figure, self.save_recipe, self.save_direction, self.load_recipe = (
            widgets.Button(description=words, layout=widgets.Layout(width="150px"))
            for words in ("Save figure", "Save recipe", "Save direction", "Load recipe")
        )
        for button, ending, action in (
            (self.save_figure, "", self._save_figure),
            (self.save_recipe, ".json", self._save_recipe),
            (self.save_direction, ".safetensors", self._save_direction),
            (self.load_recipe, ".json", self._load_recipe),
        ):
            button.on_click(lambda _, ending=ending, action=action: self._on_file(ending, action))
        where = widgets.HTML(
            f"In {html.escape(str(self.folder))}; a recipe is rendered again by <code>workbench edit</code>."
        )
        return widgets.VBox(
            [
                where,
                self.file_name,
                widgets.HBox([self.save_figure, self.save_recipe]),
                widgets.HBox([self.save_direction, self.load_recipe]),
            ]
        )

    # From the controls to the session.

    @property
    def _quiet(self) -> bool:
        """Whether this thread is setting the controls itself."""
        return getattr(self._local, "quiet", False)

    def _on(self, control: widgets.Widget, action: Callable, *, show: bool = False) -> None:
        def changed(change) -> None:
            if not self._quiet:
                self._try(lambda: action(change["new"]), show=show)

        control.observe(changed, "value")

    def _on_click(self, button: widgets.Button, action: Callable[[], None]) -> None:
        button.on_click(lambda _: self._try(action, show=True))

    def _try(self, action: Callable[[], None], *, show: bool = False) -> None:
        """Change the session; if it refuses, say why and put the controls back."""
        try:
            action()
        except ValueError as error:
            self._on_problem(str(error))
            self._show_state()
            return
        self._say("")
        if show:
            self._show_state()
        else:
            self._show_buttons()
        self._update()

    def _pick(self, k: int) -> None:
        self.session.pick(k)
        self.session.rest()

    def _on_drop(self, _, content: dict, buffers: list) -> None:
        name = str(content.get("name", "the image"))
        data = bytes(buffers[0])

        def task(progress: Progress) -> None:
            self._say(f"inverting {name}")
            k = self.session.add_image(data, progress=progress)
            self._try(lambda: self._pick(k), show=True)
            self._say(f"{name} is {self.session.label(k)}")

        self._worker.submit(task)

    def _on_lasso(self, chosen: Sequence[int]) -> None:
        if not len(chosen):
            return

        def task(progress: Progress) -> None:
            taken = list(chosen)[:_MOST_LASSOED]
            if self.store is None:
                positions = taken
            elif self.store.seeds is not None:
                positions = self.session.add_seeds([self.store.seeds[i] for i in taken], progress=progress)
            else:
                images = torch.from_numpy(np.stack([self.store.images[i] for i in taken]))
                positions = [self.session.add_image(image.clamp(-1, 1), progress=progress) for image in images]
            self._try(lambda: self._pick(positions[0]), show=True)
            left = len(chosen) - len(taken)
            self._say(f"{len(taken)} samples are in the studio" + (f"; {left} more were left out" if left else ""))

        self._worker.submit(task)

    def _on_file(self, ending: str, action: Callable[[Path, EditState], str]) -> None:
        """What is saved, and where, is decided at the click, however long the worker is busy with something else."""
        try:
            path, state = self._file(ending), self.session.state
        except (ValueError, OSError) as error:
            self._on_problem(str(error))
            return
        self._worker.submit(lambda _: self._say(action(path, state)))

    def _save_figure(self, path: Path, state: EditState) -> str:
        word = _saved(path.with_name(f"{path.name}.png"))
        return f"{word} " + ", ".join(file.name for file in plots.save_figure(self.figure(state), path))

    def _save_recipe(self, path: Path, state: EditState) -> str:
        return f"{_saved(path)} {save_recipe(self.session, path, state=state).name}"

    def _save_direction(self, path: Path, state: EditState) -> str:
        return f"{_saved(path)} {self.session.direction(state).save(path).name}"

    def _load_recipe(self, path: Path, state: EditState) -> str:
        apply_recipe(self.session, path)
        self.refresh()
        return f"loaded {path.name}"

    def _file(self, ending: str) -> Path:
        name = self.file_name.value.strip()
        if not name or Path(name).name != name:
            raise ValueError(f"{name!r} is not a name for files; give one without folders")
        self.folder.mkdir(parents=True, exist_ok=True)
        return self.folder / f"{name}{ending}"

    # From the session to what shows.

    def _update(self) -> None:
        self._worker.show(self._work)

    def _work(self, progress: Progress) -> None:
        session, state = self.session, self.session.state
        if state.edits:
            # A newer move of a slider does not stop it: of moves in quick succession none would ever be seen.
            self._show(session.render(preview=True, state=state, progress=self._while_sample_stays(state)))
            progress.wait(REST)
        self._show(session.render(state=state, progress=progress))
        session.rest()
        self._show_distances(progress)
        views = (
            self._show_read_out,
            self._show_strip,
            self._show_grid,
            self._show_predictions,
            self._show_map,
            lambda *_: None,
        )
        try:
            views[self.views.selected_index or 0](state, progress)
        except ValueError as error:
            self._on_problem(str(error))
            self._without_view = True
            return
        if self._without_view:
            self._say("")
            self._without_view = False
        self.progress.value = 1.0

    def _while_sample_stays(self, state: EditState) -> Progress:
        """Progress of work that is stopped when another sample or eta is chosen, and by nothing else."""

        def listen(part: float) -> None:
            now = self.session.state
            if (now.sample, now.eta) != (state.sample, state.eta):
                raise Cancelled
            self._on_progress(part)

        return Progress(listen)

    def _show(self, rendering: Rendering) -> None:
        self.rendering = rendering
        steps = "preview" if rendering.preview else f"{len(self.session.timesteps)} steps"
        self.before.value = _picture(rendering.before, "before", self.session.label(rendering.state.sample))
        self.after.value = _picture(rendering.after, "after", f"{describe(rendering.state)} ({steps})")
        self.difference.value = _picture(rendering.difference, "difference", "after - before; grey is none")

    def _show_read_out(self, state: EditState, progress: Progress) -> None:
        table = self.session.read_out(self.rendering)
        self.read_out.value = "Give a classifier to see its scores." if table is None else _bars(table)

    def _show_strip(self, state: EditState, progress: Progress) -> None:
        name = self.strip_of.value
        if not self._fits(state, name):
            return
        with _emptied(self.strip):
            values = self._values(name, _STRIP)
            self.strip.value = _cells(self.session.strip(name, values, state=state, progress=progress))

    def _show_grid(self, state: EditState, progress: Progress) -> None:
        down, across = self.grid_down.value, self.grid_across.value
        if down is None or down == across:
            self.grid.value = "A grid takes two different directions or boundaries."
            return
        if not self._fits(state, down, across):
            return
        with _emptied(self.grid):
            values = self._values(across, _GRID)
            self.grid.value = _cells(self.session.grid(down, across, values=values, state=state, progress=progress))

    def _fits(self, state: EditState, *names: str | None) -> bool:
        """Whether the choosers are those of the state's process; they follow it a moment later."""
        single = state.process == "single-step"
        return all(name in (self.session.boundaries if single else self.session.directions) for name in names)

    def _values(self, name: str, scales: Sequence[float]) -> list[float]:
        """Scales, or distances as far apart as the boundary's slider reaches."""
        if name in self.session.directions:
            return list(scales)
        return [round(self.distances[name].max * scale / max(scales), 2) for scale in scales]

    def _show_predictions(self, state: EditState, progress: Progress) -> None:
        self._predicted = self.session.predictions(state=state, progress=progress)
        every = max(1, len(self._predicted.timesteps) // 10)
        grid = EditGrid(
            torch.stack([self._predicted.before[::every], self._predicted.after[::every]]),
            ("before", "after"),
            tuple(f"t = {t}" for t in self._predicted.timesteps[::every]),
            {},
        )
        self.predictions.value = _cells(grid)
        self._show_timestep()

    def _show_timestep(self) -> None:
        if self._predicted is None:
            return
        k, t = self.timestep.index, self.timestep.value
        pair = ((self._predicted.before[k], "before"), (self._predicted.after[k], "after"))
        self.predicted.value = "".join(_picture(image, f"{word}, predicted", f"x_0 at t = {t}") for image, word in pair)

    def _show_map(self, state: EditState, progress: Progress) -> None:
        method, t = self.map_method.value, self.map_t.value
        n = len(self.session.samples if self.store is None else self.store)
        if n < 4:
            self.hover.value = "A map takes at least 4 samples; give store= for one of a whole population."
            return
        if (method, t, n) not in self._maps:
            self._say("making the map")
            h, images, names = self._points(t, progress)
            options = {} if method == "pca" else {"neighbours": min(15, n - 1)}
            self._maps[method, t, n] = embed(h, method=method, **options), names
            self._map_images = images
            while len(self._maps) > _MAPS:
                del self._maps[next(iter(self._maps))]
            self._say("")
        found, names = self._maps[method, t, n]
        path = found.place(self.session.path(t, state=state, progress=progress))
        if self.map is None:
            self.map = self._new_map()
        points, line = self.map.data
        with self.map.batch_update():
            points.x, points.y, points.text = found.points[:, 0], found.points[:, 1], names
            line.x, line.y = path[:, 0], path[:, 1]
            self.map.update_layout(xaxis_title=found.axes[0], yaxis_title=found.axes[1])
        self.map_box.children = [self.map_box.children[0], self.map, self.hover]

    def _points(self, t: int, progress: Progress) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """h_t, images and names of what the map shows."""
        if self.store is not None:
            seeds = self.store.seeds
            names = [f"sample {i}" if seeds is None else f"seed {seeds[i]}" for i in range(len(self.store))]
            return self.store.at(t), self.store.images[:], names
        runs = [replay(run, record_h=True, progress=progress) for run in self.session.samples]
        images = np.concatenate([run.x0.numpy() for run in self.session.samples])
        return np.concatenate([run.h.at(t) for run in runs]), images, [self.session.label(k) for k in range(len(runs))]

    def _new_map(self) -> go.FigureWidget:
        figure = go.FigureWidget()
        marker = {"size": 8, "color": _BEFORE, "opacity": 0.8}
        figure.add_scatter(mode="markers", marker=marker, name="samples", hoverinfo="text")
        line, end = {"color": _AFTER, "width": 3}, {"color": _AFTER, "size": [7, 5, 5, 5, 13]}
        figure.add_scatter(mode="lines+markers", line=line, marker=end, name="the edit's path", hoverinfo="name")
        clear, grey = "rgba(0,0,0,0)", "#888"
        figure.update_layout(
            width=540,  # a tab that is not shown has no width to follow
            height=420,
            margin={"l": 50, "r": 10, "t": 10, "b": 45},
            paper_bgcolor=clear,
            plot_bgcolor=clear,
            font_color=grey,
            dragmode="lasso",
            hovermode="closest",
            legend={"orientation": "h", "y": 1.08},
        )
        figure.update_xaxes(gridcolor="rgba(136,136,136,0.3)", zeroline=False)
        figure.update_yaxes(gridcolor="rgba(136,136,136,0.3)", zeroline=False)
        points = figure.data[0]
        points.on_hover(lambda trace, found, _: self._show_hover(trace, found.point_inds))
        points.on_click(lambda trace, found, _: self._on_lasso(found.point_inds))
        points.on_selection(lambda trace, found, _: self._on_lasso(found.point_inds))
        return figure

    def _show_hover(self, trace, chosen: Sequence[int]) -> None:
        if chosen:
            self.hover.value = _picture(torch.from_numpy(self._map_images[chosen[0]]), "sample", trace.text[chosen[0]])

    def _show_state(self) -> None:
        """Bring the controls to the session's state."""
        self._local.quiet = True
        try:
            state, session = self.session.state, self.session
            self._show_samples()
            self._show_edits()
            for name, slider in self.scales.items():
                scale = state.scales.get(name, 0.0)
                slider.min, slider.max = min(slider.min, scale), max(slider.max, scale)
                slider.value = scale
            for (name, other), box in self.against.items():
                box.value = other in state.against.get(name, ())
            inside = [t for t in session.timesteps if state.t_range[1] <= t <= state.t_range[0]]
            self.process.value, self.window.value = state.process, (inside[0], inside[-1])
            run = session.samples[state.sample]
            own = state.eta is None or run.seeds is None  # an inverted image has its own, whatever samples have
            self.eta.value = float(np.mean(run.etas)) if own else state.eta
            single = state.process == "single-step"
            for slider in (*self.scales.values(), self.window):
                slider.disabled = single
            for control in (*self.distances.values(), *self.leave.values()):
                control.disabled = not single
            self.eta.disabled = run.seeds is None
            names = list(session.boundaries if single else session.directions)
            for chooser, preferred in ((self.strip_of, 0), (self.grid_down, 1), (self.grid_across, 0)):
                if list(chooser.options) != names:
                    chooser.options = names
                    chooser.index = min(preferred, len(names) - 1)
        finally:
            self._local.quiet = False
        self._show_buttons()

    def _show_samples(self) -> None:
        session, buttons = self.session, list(self.samples.children)
        for k in range(len(buttons), len(session.samples)):
            button = widgets.Button(description=session.label(k), tooltip=f"edit {session.label(k)}")
            button.add_class("hspace-sample").add_class(f"hspace-sample-{id(self)}-{k}")
            self._on_click(button, lambda k=k: self._pick(k))
            buttons.append(button)
        if len(buttons) != len(self.samples.children):
            self.samples.children = buttons
            thumbnails = "".join(
                f".hspace-sample-{id(self)}-{k} {{ background-image: url({_uri(run.x0[0])}); }}\n"
                for k, run in enumerate(session.samples)
            )
            self.style_sheet.value = f"<style>{_css()}{thumbnails}</style>"
        for k, button in enumerate(buttons):
            picked = k == session.state.sample
            (button.add_class if picked else button.remove_class)("hspace-picked")
            button.description = f"✓ {session.label(k)}" if picked else session.label(k)

    def _show_distances(self, progress: Progress) -> None:
        """Put the slider of each boundary that is not moved to at the sample's own distance."""
        if not self.distances:
            return
        own, moved = self.session.distances(progress=progress), self.session.state.distances
        self._local.quiet = True
        try:
            for name, slider in self.distances.items():
                boundary = self.session.boundaries[name]
                reach = max(abs(own[name]) * 1.5, 4.0 if boundary.deviations is None else 6.0 * boundary.sigma)
                reach = max(reach, abs(moved.get(name, 0.0)))
                if slider.max < reach:
                    slider.min, slider.max, slider.step = -reach, reach, reach / 100
                slider.value = moved.get(name, own[name])
        finally:
            self._local.quiet = False

    def _show_buttons(self) -> None:
        self.undo.disabled, self.redo.disabled = not self.session.can_undo, not self.session.can_redo

    def _on_progress(self, part: float) -> None:
        self.progress.value = part

    def _say(self, words: str) -> None:
        self.status.value = f'<span role="status">{html.escape(words)}</span>'

    def _on_problem(self, sentence: str) -> None:
        self.status.value = f'<span role="alert" class="hspace-problem">{html.escape(sentence)}</span>'


def _title(words: str) -> widgets.HTML:
    return widgets.HTML(f"<h4>{html.escape(words)}</h4>")


def _css() -> str:
    return (_ROOM / "studio.css").read_text(encoding="utf-8")


def _uri(image: torch.Tensor) -> str:
    """A picture (C, H, W) as the address of a PNG."""
    pixels = plots.to_pixels(image[None])[0]
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, format="PNG")
    return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def _picture(image: torch.Tensor, title: str, words: str) -> str:
    alt = html.escape(f"{title}: {words}", quote=True)
    return (
        f'<figure><img src="{_uri(image)}" alt="{alt}"><figcaption><b>{html.escape(title)}</b><br>{html.escape(words)}'
        "</figcaption></figure>"
    )


def _cells(grid: EditGrid) -> str:
    """A grid as a table of pictures."""

    def words(label: str) -> str:
        return html.escape(label).replace("\n", "<br>")

    head = "".join(f'<th scope="col">{words(label)}</th>' for label in grid.column_labels)
    rows = []
    for row, label in zip(grid.images, grid.row_labels, strict=True):
        cells = "".join(
            f'<td><img src="{_uri(image)}" alt="{html.escape(f"{label}, {column}", quote=True)}"></td>'
            for image, column in zip(row, grid.column_labels, strict=True)
        )
        rows.append(f'<tr><th scope="row">{words(label)}</th>{cells}</tr>')
    return f'<table class="hspace-cells"><tr><td></td>{head}</tr>{"".join(rows)}</table>'


def _bars(table) -> str:
    """Probabilities before and after, largest change first."""
    order = (table["after"] - table["before"]).abs().sort_values(ascending=False, kind="stable").index
    rows = []
    for name in order:
        before, after = table.loc[name, "before"], table.loc[name, "after"]
        bars = "".join(
            f'<span class="hspace-bar" style="width:{value:.1%};background:{color}"></span>'
            for value, color in ((before, _BEFORE), (after, _AFTER))
        )
        rows.append(
            f'<tr><th scope="row">{html.escape(str(name).replace("_", " "))}</th>'
            f'<td><div class="hspace-track">{bars}</div></td><td>{before:.2f}</td><td>{after:.2f}</td></tr>'
        )
    head = "<tr><th>attribute</th><th></th><th>before</th><th>after</th></tr>"
    return f'<table class="hspace-bars">{head}{"".join(rows)}</table>'


def _saved(path: Path) -> str:
    return "replaced" if path.exists() else "saved"


@contextmanager
def _emptied(view: widgets.HTML) -> Iterator[None]:
    """If there is nothing to show in the end, what was shown before goes, rather than pass for it."""
    try:
        yield
    except ValueError:
        view.value = ""
        raise


def _refuse_other_store(store: HStore, session: EditSession) -> None:
    own, other = session.model.provenance(), store.provenance["model"]
    if (own["hash"], own["tap"]) != (other["hash"], other["tap"]) or provenance_mismatch(own, other):
        raise ValueError(f"{store.path} is of another model, tap or schedule than {session.model.name!r}")
    if tuple(store.timesteps) != session.timesteps:
        raise ValueError(f"{store.path} has other timesteps than the samples; extract it with as many steps")
    etas = {run.etas for run in session.samples if run.seeds is not None}
    if store.seeds is not None and etas and etas != {tuple(store.provenance["etas"])}:
        raise ValueError(f"{store.path} is of another eta than the samples; extract it with theirs")
