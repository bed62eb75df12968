"""The edit studio in a notebook: a thin view over an `EditSession`.

Each control calls one method of the session. One thread beside the kernel's loop renders images: a preview first, the
full rendering when the controls rest; a new change cancels an old one. Callbacks assign traits, so that everything
visible can be read in Python and tested without a browser.
"""

from __future__ import annotations

import base64
import html
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import anywidget
import ipywidgets as widgets
import numpy as np
from traitlets import Unicode

from workbench import paths
from workbench.datasets.classifiers import Classifier
from workbench.datasets.clip import Clip
from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Trajectory
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction
from workbench.hspace.store import HStore
from workbench.report import plots
from workbench.studio.markup import address, picture
from workbench.studio.recipe import apply_recipe, save_recipe
from workbench.studio.session import EditSession
from workbench.studio.state import PROCESSES, Cancelled, EditState, Progress, Rendering, describe
from workbench.studio.views import Edits, Map, ReadOut, Timesteps, View, Words
from workbench.studio.worker import Worker

REST = 0.2
"""Seconds without a change after which the preview is replaced by the whole image."""

_ROOM = Path(__file__).parent


class DropZone(anywidget.AnyWidget):
    """A field to drop an image file on, or to choose one; it sends the file's content as a message."""

    _esm = _ROOM / "dropzone.js"
    label = Unicode("Drop an image here, or choose one:").tag(sync=True)


class EditStudio(widgets.VBox):
    """Edit samples with sliders and see the result at once.

    Parameters
    ----------
    model : Model
    runs : Trajectory
        The unedited samples.
    directions : Direction, Boundary, or sequence of them
        One slider each: in sigma, or in signed distance.
    classifier : Classifier, optional
        Bars show its probabilities before and after the edit.
    store : HStore, optional
        Samples of the map; by default those of `runs`. A selection of them can become another direction.
    clip : Clip, optional
        Turns sentences into directions, by its scores of the samples of `store`: see `find_from_text`.
    folder : path, optional
        Folder for saved files, by default `data/edits`.

    Attributes
    ----------
    session : EditSession
        All state; usable without widgets.

    Raises
    ------
    ValueError
        As `EditSession`; also if the store and the samples differ in model, timesteps or eta.
    """

    def __init__(
        self,
        model: Model,
        runs: Trajectory,
        directions: Direction | Boundary | Sequence[Direction | Boundary],
        *,
        classifier: Classifier | None = None,
        store: HStore | None = None,
        clip: Clip | None = None,
        folder: str | Path | None = None,
    ) -> None:
        if clip is not None and store is None:
            raise ValueError("a text becomes a direction by the samples of a store; give store= beside clip=")
        self.session = EditSession(model, runs, directions, classifier=classifier)
        if store is not None:
            _refuse_other_store(store, self.session)
        self.runs, self.clip = runs[:2], clip
        self.store, self.folder = store, paths.edits() if folder is None else paths.writable(folder, folder=True)
        self.rendering: Rendering | None = None
        self._local = threading.local()
        self.worker = Worker(self._on_progress, self._on_problem)
        super().__init__(self._layout())
        self.add_class("hspace-studio")
        self.refresh()
        if self.session.notes:
            self.say("; ".join(self.session.notes))

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until all computations finish; False after `timeout` seconds."""
        return self.worker.wait(timeout)

    def refresh(self) -> None:
        """Show the session's state after a change in Python."""
        self._show_state()
        self.worker.show(self._work)

    def figure(self, state: EditState | None = None) -> plots.Figure:
        """Draw an edit, by default the current one: before, after, difference, and scores."""
        rendering = self.session.render(state=state)
        seed, eta = self.session.label(rendering.state.sample), self._eta_of(rendering.state)
        return plots.before_after(
            rendering.before,
            rendering.after,
            scores=self.session.read_out(rendering),
            caption=f"{seed} of {self.session.model.name}, {len(self.session.timesteps)} steps, eta {eta:.3g}: "
            f"{describe(rendering.state)}.",
        )

    def _repr_mimebundle_(self, **kwargs) -> dict:
        # Where there is no live widget, as in an exported report, the picture of the current state stands in.
        self.wait()
        bundle = super()._repr_mimebundle_(**kwargs)
        with suppress(ValueError):  # an edit that can't be made; the studio shows the reason
            bundle["image/png"] = base64.b64encode(self.figure()._repr_png_()).decode("ascii")
        return bundle

    # Layout; sizes are in studio.css.

    def _layout(self) -> list[widgets.Widget]:
        self.style_sheet = widgets.HTML()
        self.status = widgets.HTML().add_class("hspace-status")
        self.progress = widgets.FloatProgress(0.0, min=0.0, max=1.0).add_class("hspace-progress")
        self.before, self.after, self.difference = (widgets.HTML() for _ in range(3))
        controls = widgets.VBox([*self._sample_controls(), *self._edit_controls()]).add_class("hspace-controls")
        pictures = widgets.HBox([self.before, self.after, self.difference]).add_class("hspace-large")
        self.read_out, self.strip, self.grid = ReadOut(self), Edits(self, along=0), Edits(self, down=1, across=0)
        self.predictions, self.map = Timesteps(self), Map(self)
        self._views = (self.read_out, self.strip, self.grid, self.predictions, self.map, self._files())
        titles = ("Read-out", "Strip", "Grid", "Timesteps", "Map", "Files")
        self.views = widgets.Tab(self._views, titles=titles)
        self.follow(self.views, "selected_index")
        images = widgets.VBox([pictures, self.progress, self.status, self.views]).add_class("hspace-images")
        return [self.style_sheet, widgets.Box([controls, images]).add_class("hspace-columns")]

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
        self._on(self.process, session.set_process)
        self.window = widgets.SelectionRangeSlider(
            options=session.timesteps,
            index=(0, len(session.timesteps) - 1),
            description="Timesteps",
            tooltip="directions act between these timesteps",
        )
        self._on(self.window, lambda value: session.set_window(*value))
        self.eta = widgets.FloatSlider(0.0, min=0.0, max=1.0, step=0.1, description="eta")
        self._on(self.eta, session.set_eta)
        self.undo = self._button("Undo", session.undo)
        self.redo = self._button("Redo", session.redo)
        self.reset = self._button("Reset", session.reset)
        buttons = widgets.HBox([self.undo, self.redo, self.reset])
        self.words = None if self.clip is None else Words(self, self.clip)
        words = [] if self.words is None else [_title("From words"), self.words]
        return [self.edits, *words, _title("How"), self.process, self.window, self.eta, buttons]

    def _show_edits(self) -> None:
        """A slider for each direction and boundary that the session has; a recipe may bring some."""
        session = self.session
        if list(self.scales) == list(session.directions) and list(self.distances) == list(session.boundaries):
            return
        for name in [name for name in session.directions if name not in self.scales]:
            self.scales[name] = self._slider(name, f"{name}, in sigma", 4.0, session.set_scale)
        for name in [name for name in session.boundaries if name not in self.distances]:
            words = f"signed distance from the boundary {name}"
            self.distances[name] = self._slider(name, words, 1.0, session.set_distance)
            leave = self._button("leave", lambda name=name: session.set_distance(name, None))
            leave.tooltip, self.leave[name] = f"don't move to {name}", leave
        rows = []
        if self.scales:
            rows += [_title("Directions (sigma)"), *self.scales.values(), *self._projection_controls()]
        if self.distances:
            pairs = [widgets.HBox([slider, self.leave[name]]) for name, slider in self.distances.items()]
            rows += [_title("Boundaries (signed distance)"), *pairs]
        self.edits.children = rows
        self.process.tooltips = [PROCESSES[process] for process in session.processes]
        self.process.options = session.processes

    def _projection_controls(self) -> list[widgets.Widget]:
        names = list(self.scales)
        if len(names) < 2:
            return []
        rows, self.against = [], {}
        for name in names:
            for other in [other for other in names if other != name]:
                words = f"take what {name} shares with {other} out of {name}"
                box = self.against[name, other] = widgets.Checkbox(description=other, indent=False, tooltip=words)
                self._on(box, lambda _, name=name: self.session.set_against(name, self._checked(name)))
            boxes = [box for (of, _), box in self.against.items() if of == name]
            rows.append(widgets.HBox([widgets.Label(f"{name} ⟂"), *boxes]))
        return [widgets.Accordion([widgets.VBox(rows).add_class("hspace-against")], titles=("Disentangle",))]

    def _checked(self, name: str) -> list[str]:
        return [other for (of, other), box in self.against.items() if of == name and box.value]

    def _slider(self, name: str, tooltip: str, reach: float, action: Callable) -> widgets.FloatSlider:
        slider = widgets.FloatSlider(0.0, min=-reach, max=reach, step=0.1, description=name, tooltip=tooltip)
        self._on(slider, lambda value: action(name, value))
        return slider

    def _button(self, words: str, action: Callable[[], None]) -> widgets.Button:
        button = widgets.Button(description=words)
        button.on_click(lambda _: self._try(action))
        return button

    def _files(self) -> View:
        self.file_name = widgets.Text("edit", description="Name", tooltip="of the files, without an ending")
        self.save_figure, self.save_recipe, self.save_direction, self.load_recipe = buttons = [
            widgets.Button(description=words)
            for words in ("Save figure", "Save recipe", "Save direction", "Load recipe")
        ]
        actions = (self._save_figure, self._save_recipe, self._save_direction, self._load_recipe)
        for button, ending, action in zip(buttons, ("", ".json", ".safetensors", ".json"), actions, strict=True):
            button.on_click(lambda _, ending=ending, action=action: self._on_file(ending, action))
        files = View(self).add_class("hspace-files")
        folder = html.escape(str(self.folder))
        files.shown.value = f"In {folder}; a recipe is rendered again by <code>workbench edit</code>."
        files.children = [files.shown, self.file_name, widgets.HBox(buttons[:2]), widgets.HBox(buttons[2:])]
        return files

    # From the controls to the session.

    @contextmanager
    def _quietly(self) -> Iterator[None]:
        """Set the controls themselves, which is no change of the session."""
        self._local.quiet = True
        try:
            yield
        finally:
            self._local.quiet = False

    @property
    def _quiet(self) -> bool:
        return getattr(self._local, "quiet", False)

    def _on(self, control: widgets.Widget, action: Callable, trait: str = "value") -> None:
        def changed(change) -> None:
            if not self._quiet:
                self._try(lambda: action(change["new"]))

        control.observe(changed, trait)

    def follow(self, control: widgets.Widget, trait: str = "value") -> None:
        """Recompute the views when a control outside of the edit changes."""
        self._on(control, lambda _: None, trait)

    def _try(self, action: Callable[[], None]) -> None:
        """Change the session; if it refuses, say why and put the controls back."""
        try:
            action()
        except ValueError as error:
            self._on_problem(str(error))
            self._show_state()
            return
        self.say("")
        self.refresh()

    def pick(self, k: int) -> None:
        """Edit another sample."""
        self._try(lambda: self.session.pick(k))

    def _on_drop(self, _, content: dict, buffers: list) -> None:
        name, data = str(content.get("name", "the image")), bytes(buffers[0])

        def task(progress: Progress) -> None:
            self.say(f"inverting {name}")
            k = self.session.add_image(data, progress=progress)
            self.pick(k)
            self.say(f"{name} is {self.session.label(k)}")

        self.worker.submit(task)

    def _on_file(self, ending: str, action: Callable[[Path, EditState], str]) -> None:
        """Save or load by the worker, with the state and the name at the time of the click."""
        name, state = self.file_name.value.strip(), self.session.state
        try:
            if not name or Path(name).name != name:
                raise ValueError(f"{name!r} is not a name for files; give one without folders")
            self.folder.mkdir(parents=True, exist_ok=True)
        except (ValueError, OSError) as error:
            self._on_problem(str(error))
            return
        path = self.folder / f"{name}{ending}"
        self.worker.submit(lambda _: self.say(action(path, state)))

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

    # From the session to what shows.

    def _work(self, progress: Progress) -> None:
        session, state = self.session, self.session.state
        if state.edits:
            # A newer move of a slider does not stop it: of moves in quick succession none would ever be seen.
            self._show(session.render(preview=True, state=state, progress=self._while_sample_stays(state)))
            progress.wait(REST)
        self._show(session.render(state=state, progress=progress))
        session.rest()
        self._show_distances(progress)
        view = self._views[self.views.selected_index or 0]
        try:
            view.show(progress)
        except ValueError as error:
            progress.wait(0.0)
            view.shown.value = ""  # what was shown before would pass for it
            self._on_problem(str(error))
            return
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
        self.before.value = picture(rendering.before, "before", self.session.label(rendering.state.sample))
        self.after.value = picture(rendering.after, "after", f"{describe(rendering.state)} ({steps})")
        self.difference.value = picture(rendering.difference, "difference", "after - before; grey is none")

    def _show_state(self) -> None:
        """Bring the controls to the session's state."""
        state, session = self.session.state, self.session
        with self._quietly():
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
            self.eta.value, self.eta.disabled = self._eta_of(state), session.samples[state.sample].seeds is None
            single = state.process == "single-step"
            for control in (*self.scales.values(), self.window):
                control.disabled = single
            for control in (*self.distances.values(), *self.leave.values()):
                control.disabled = not single
            for view in (self.strip, self.grid):
                view.offer(list(session.boundaries if single else session.directions))
        self.undo.disabled, self.redo.disabled = not session.can_undo, not session.can_redo

    def _eta_of(self, state: EditState) -> float:
        """Eta of an edit's steps, or their mean; an inverted image has its own, whatever samples have."""
        run = self.session.samples[state.sample]
        return float(np.mean(run.etas)) if state.eta is None or run.seeds is None else state.eta

    def _show_samples(self) -> None:
        session, buttons = self.session, list(self.samples.children)
        for k in range(len(buttons), len(session.samples)):
            button = widgets.Button(description=session.label(k), tooltip=f"edit {session.label(k)}")
            button.on_click(lambda _, k=k: self.pick(k))
            buttons.append(button.add_class("hspace-sample").add_class(f"hspace-sample-{id(self)}-{k}"))
        if len(buttons) != len(self.samples.children):
            self.samples.children = buttons
            _, height, width = session.model.image_shape
            wide, high = (64 * side // max(height, width) for side in (width, height))
            thumbnails = "".join(
                f".hspace-sample-{id(self)}-{k} {{ background-image: url({address(run.images[0])}); "
                f"background-size: {wide}px {high}px; }}\n"
                for k, run in enumerate(session.samples)
            )
            self.style_sheet.value = f"<style>{(_ROOM / 'studio.css').read_text(encoding='utf-8')}{thumbnails}</style>"
        for k, button in enumerate(buttons):
            picked = k == session.state.sample
            (button.add_class if picked else button.remove_class)("hspace-picked")
            button.description = f"✓ {session.label(k)}" if picked else session.label(k)

    def _show_distances(self, progress: Progress) -> None:
        """Put the slider of each boundary that is not moved to at the sample's own distance."""
        if not self.distances:
            return
        own, moved = self.session.distances(progress=progress), self.session.state.distances
        with self._quietly():
            for name, slider in self.distances.items():
                boundary = self.session.boundaries[name]
                usual = 4.0 if boundary.deviations is None else 6.0 * boundary.sigma
                reach = max(abs(own[name]) * 1.5, usual, abs(moved.get(name, 0.0)))
                if slider.max < reach:
                    slider.min, slider.max, slider.step = -reach, reach, reach / 100
                slider.value = moved.get(name, own[name])

    def _on_progress(self, part: float) -> None:
        self.progress.value = part

    def say(self, words: str) -> None:
        """Show a line of text below the images."""
        self.status.value = f'<span role="status">{html.escape(words)}</span>'

    def _on_problem(self, sentence: str) -> None:
        self.status.value = f'<span role="alert" class="hspace-problem">{html.escape(sentence)}</span>'


def _title(words: str) -> widgets.HTML:
    return widgets.HTML(f"<h4>{html.escape(words)}</h4>")


def _saved(path: Path) -> str:
    return "replaced" if path.exists() else "saved"


def _refuse_other_store(store: HStore, session: EditSession) -> None:
    refuse_other_model(str(store.path), store.provenance["model"], session.model.provenance())
    if tuple(store.timesteps) != session.timesteps:
        raise ValueError(f"{store.path} has other timesteps than the samples; extract it with as many steps")
    etas = {run.etas for run in session.samples if run.seeds is not None}
    if store.seeds is not None and etas and etas != {tuple(store.provenance["etas"])}:
        raise ValueError(f"{store.path} is of another eta than the samples; extract it with theirs")
