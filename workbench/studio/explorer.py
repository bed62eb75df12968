"""The explorer: linked maps of a population, from a selection of samples to a direction and its pictures.

One script of our own draws the maps, in JupyterLab and in an exported page alike. jupyter-scatter and embedding-atlas
were considered. The first links its views through the kernel, so that in an exported page no map knows of another; the
second brings a database and tens of megabytes of scripts. The script fills the pixels of a canvas itself instead of
using WebGL, of which a browser allows 16 contexts a page and which is slow without a graphics card: in a headless
Chromium on two busy cores a map of 50,000 points took 8 ms against 211 ms.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import anywidget
import numpy as np
import pandas as pd
from traitlets import Bool, Dict, List, Unicode

from workbench import paths
from workbench.analysis.maps import Map, make_maps, nearest
from workbench.analysis.samples import matched
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction, projections
from workbench.directions.selection import Selection
from workbench.editing.render import EditGrid, sample_labels
from workbench.hspace.store import HStore
from workbench.report.alive import embedded
from workbench.report.pages import write_page
from workbench.studio.desk import METHODS, PREVIEW_SCALE, SCALES, Desk, rows_of
from workbench.studio.markup import address
from workbench.studio.payload import Images, pack, strips_of
from workbench.studio.renderings import PREVIEW_STEPS
from workbench.studio.state import Progress
from workbench.studio.worker import Worker

if TYPE_CHECKING:
    from workbench.studio.widgets import EditStudio

_ROOM = Path(__file__).parent
_FRAMES = 12
"""Timesteps that a moving map shows, at most; fewer of many samples."""
_VALUES = 400_000
_TO_STUDIO = 8
_DRAWN = (
    "A group that was drawn on a map of h lies apart in h by construction. What the edit does, beside a random one, "
    "shows whether it means anything."
)


class Explorer(anywidget.AnyWidget):
    """Linked maps of samples: hover, select, colour, and, with a model, directions from selections.

    Made by `explore`. All that shows is a trait, so that it can be read and set in Python.

    Attributes
    ----------
    view : dict
        Camera `x`, `y`, `k`; `colour`, `frame`, `pinned`, `strip` and `step`; and the selections `a` and `b`, as in
        "0-5,9". Kept in the address of an exported page.
    found : dict
        What the selection leads to, in words and pictures.
    strips : list of dict
        Edits to slide through.
    paths : dict of str to list of (float, float)
        A line to draw over the map of that name.
    """

    _esm = "".join((_ROOM / name).read_text(encoding="utf-8") for name in ("points.js", "explorer.js"))
    _css = (_ROOM / "explorer.css").read_text(encoding="utf-8")
    offline = Bool(True).tag(sync=True)
    data, status, method, name = (Unicode(text).tag(sync=True) for text in ("", "", "mean", "selection"))
    problem, live = Bool(False).tag(sync=True), Bool(False).tag(sync=True)
    view, found, paths, offers, methods = (Dict().tag(sync=True) for _ in range(5))
    strips = List().tag(sync=True)

    def __init__(
        self,
        maps: Sequence[Map],
        *,
        names: Sequence[str] | Sequence[int],
        colours: Mapping[str, np.ndarray | pd.Series] | None = None,
        images: Images | None = None,
        neighbours: tuple[np.ndarray, str] | None = None,
        notes: Sequence[str] = (),
        desk: Desk | None = None,
        studio: EditStudio | None = None,
        **traits,
    ) -> None:
        data = pack(maps, colours=colours or {}, names=names, images=images, neighbours=neighbours, notes=notes)
        self.maps, self.names, self.desk, self.studio = list(maps), names, desk, studio
        self.folder = paths.directions()
        self.selection: Selection | None = None
        self.sides: tuple[list[int], list[int]] = ([], [])
        self._asked: dict[str, Callable[[Progress], None]] = {}
        self._finding: Progress | None = None
        # A network is run by one thread at a time, the studio's own if there is a studio. To measure a direction takes
        # no network, but minutes with many samples; sliders do not wait for it.
        self._finder = Worker(lambda part: None, self._on_problem)
        self._worker = Worker(lambda part: None, self._on_problem) if studio is None else studio.worker
        live = desk is not None or studio is not None
        super().__init__(data=data, methods={} if desk is None else METHODS, live=live, **traits)
        self.observe(self._on_view, "view")
        self.observe(lambda _: self._look(), "method")
        self.on_msg(self._on_message)
        if desk is not None:
            self.on_ask("render", "Render beside a random direction", self._render)
            self.on_ask("save", "Save", self._save)
            if studio is not None:
                self.on_ask("studio", "To the studio", self._to_studio)
            if desk.store.seeds is not None:
                self.on_ask("predict", "Predicted image over t", self._predict)
            self._submit(desk.prepare)

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until all computations finish; False after `timeout` seconds."""
        return self._worker.wait(timeout) and self._finder.wait(timeout)

    def on_ask(self, what: str, words: str, action: Callable[[Progress], None]) -> None:
        """Offer something else to do with a selection."""
        self._asked[what], self.offers = action, self.offers | {what: words}

    def save_html(self, path: str | Path, *, title: str = "Explorer") -> Path:
        """Write a page that needs neither a kernel nor a network."""
        path = paths.writable(path, suffixes=(".html",))
        state = {name: getattr(self, name) for name in ("_esm", "_css", *Explorer.class_own_traits(sync=True))}
        return write_page(path, title=title, body=embedded(state, "maps"))

    def select(self, a: Sequence[int], b: Sequence[int] = ()) -> None:
        """Select samples by their positions, as a lasso does."""
        self.view = {**self.view, "a": _spans(a), "b": _spans(b)}

    def within(self, name: str, points: np.ndarray) -> list[list[float]]:
        """Points of shape (m, 2) of a map as its script has them, for `paths`."""
        packed = next(each for each in json.loads(self.data)["maps"] if each["name"] == name)
        return ((points - packed["centre"]) / packed["half"]).tolist()

    @property
    def t(self) -> int:
        """Timestep of the map that was selected on."""
        timesteps = self.maps[min(int(self.view.get("map", 0)), len(self.maps) - 1)].timesteps
        return timesteps[int(self.view.get("frame", 0)) if len(timesteps) > 1 else 0]

    # From a selection to a direction.

    def _on_view(self, change) -> None:
        sides = tuple(_members(self.view.get(side, "")) for side in "ab")
        if sides != self.sides:
            self.sides = sides
            self._look()

    def _look(self) -> None:
        if self._finding is not None:
            self._finding.cancel()  # of many samples it takes minutes, and another selection is wanted now
            self.say("")
        self.selection = None
        if self.desk is not None and self.sides[0]:
            sides, method = self.sides, self.method
            self._finding = self._submit(lambda progress: self._find(*sides, method, progress))

    def _submit(
        self, action: Callable[[Progress], None], worker: Worker | None = None, progress: Progress | None = None
    ) -> Progress:
        def task(progress: Progress) -> None:
            try:
                action(progress)
            except (ValueError, OSError) as error:
                self._on_problem(str(error))

        return (worker or self._worker).submit(task, progress)

    def _find(self, a: list[int], b: list[int], method: str, progress: Progress) -> None:
        self.say("finding the direction")
        rendering = self.desk.glimpse(a, b or None, progress)
        captions = f"{sample_labels(self.desk.runs)[0]}, before", f"{PREVIEW_SCALE:+g} sigma, {PREVIEW_STEPS} steps"
        pictures = [address(rendering.before), address(rendering.after)]
        words = {"a": _spans(a), "b": _spans(b), "title": f"{self.name}: {METHODS[method]}"}
        words["pictures"] = list(zip(pictures, captions, strict=True))
        progress.wait(0.0)  # nothing is shown of a selection that was left
        self.found = words | {"note": "measuring it at all timesteps"}
        self._submit(lambda progress: self._measure(a, b, method, words, progress), self._finder, progress)

    def _measure(self, a: list[int], b: list[int], method: str, words: dict, progress: Progress) -> None:
        found = self.desk.find(a, b or None, progress, t=self.t, method=method, name=self.name)
        progress.wait(0.0)
        self.selection = found
        self.found = words | {"rows": rows_of(found), "warning": found.warning, "note": _DRAWN}
        self.say("")

    def _chosen(self) -> Selection:
        self._finder.wait(threading.TIMEOUT_MAX)
        if self.selection is None:
            raise ValueError("no direction is found yet; select at least 2 samples as A")
        return self.selection.named(self.name)

    def _on_message(self, _, content: dict, buffers: list) -> None:
        if content.get("ask") in self._asked:
            self._submit(self._asked[content["ask"]])

    def _render(self, progress: Progress) -> None:
        found = self._chosen()
        self.say(f"rendering {len(self.desk.runs)} samples at {len(SCALES)} strengths")
        self._add(self.desk.strip(found, self.method, progress), "The direction of the selection")

    def _predict(self, progress: Progress) -> None:
        pinned = int(self.view.get("pinned", -1))
        if pinned < 0:
            raise ValueError("no sample is kept; click one first")
        self.say("predicting its image at every timestep")
        self._add(self.desk.predictions(int(self.names[pinned]), progress), "The predicted image over t")

    def _add(self, grid: EditGrid, title: str) -> None:
        """Show edits to slide through."""
        self.strips = [*self.strips, *strips_of(grid, title=title)]
        self.say("")

    def _save(self, progress: Progress) -> None:
        self.say(self.desk.save(self._chosen(), self.method, self.folder))

    def _to_studio(self, progress: Progress) -> None:
        name = self.studio.session.add(self.desk.edit_of(self._chosen(), self.method))
        self.studio.refresh()
        self.say(f"{name} has a slider in the studio")

    def say(self, words: str) -> None:
        """Show a line of text below everything."""
        self.problem, self.status = False, words

    def _on_problem(self, sentence: str) -> None:
        self.problem, self.status = True, sentence


def explore(
    store: HStore | Mapping[str, HStore],
    *,
    scores: pd.DataFrame | pd.Series | None = None,
    model: Model | None = None,
    directions: Sequence[Direction] = (),
    boundaries: Sequence[Boundary] = (),
    timesteps: Sequence[int] | None = None,
    methods: Sequence[str] = ("pca",),
    with_x: bool = False,
    strips: EditGrid | None = None,
    runs: Trajectory | None = None,
    neighbours: int = 8,
    studio: EditStudio | None = None,
    seed: int = 0,
) -> Explorer:
    """Explore a population on linked maps: hover, select, and turn a selection into a direction.

    Hovering over or selecting a point highlights it on all maps; nearest neighbours are those of the space itself.
    Without a kernel, as in an exported report, the maps stay linked and `strips` can be slid through. With a model,
    a selection gives a direction with a preview, its statistics and a random control.

    Parameters
    ----------
    store : HStore, or mapping of str -> HStore
        Several stores of the same samples, such as those of other taps, by the names of their spaces; directions are
        found in the first.
    scores : DataFrame or Series, optional
        One row a sample, matched as labels; to colour by, and to tell whether one attribute explains a selection.
        Numbers, booleans or words; missing values are grey.
    model : Model, optional
        That of the store.
    directions : sequence of Direction
        Known ones, to colour by and to compare with.
    boundaries : sequence of Boundary
        To colour by the signed distance from them; those in h or x at one of the timesteps.
    timesteps : sequence of int, optional
        Visited ones to map; by default three.
    methods : sequence of {"pca", "umap", "paths"}
        "paths" is one plane for all timesteps, through which samples move.
    with_x : bool
        Map x_t as well, if it was recorded.
    strips : EditGrid, optional
        Edits to slide through; rows whose name begins with "random" are the control in each.
    runs : Trajectory, optional
        Samples to edit; by default two that the store lacks.
    neighbours : int, default 8
        0 shows none.
    studio : EditStudio, optional
        Where directions can be sent.
    seed : int

    Returns
    -------
    Explorer
        `save_html` writes it as a page.

    Raises
    ------
    ValueError
        If there are fewer than 4 samples, stores differ in their samples, scores don't match or a column is all NaN,
        or something belongs to another model.
    """
    stores = dict(store) if isinstance(store, Mapping) else {"h": store}
    first = next(iter(stores.values()))
    n, own = len(first), first.seeds or first.names
    for name, each in stores.items():
        if (each.seeds or each.names) != own or len(each) != n:
            raise ValueError(f"{name!r} has other samples than {next(iter(stores))!r}; extract the same seeds")
    visited = first.timesteps
    if timesteps is None:
        timesteps = [visited[round(part * (len(visited) - 1))] for part in (0.3, 0.55, 0.8)]
    timesteps = list(dict.fromkeys(int(t) for t in timesteps))
    spaces = {name: each.batches for name, each in stores.items()}
    spaces |= {"x": partial(first.batches, space="x")} if with_x else {}
    frames = max(2, min(_FRAMES, len(visited), _VALUES // n))
    moving = [visited[round(k)] for k in np.linspace(0, len(visited) - 1, frames)] if len(visited) > 1 else visited
    made = make_maps(spaces, n=n, timesteps=timesteps, visited=moving, methods=methods, seed=seed)
    t = timesteps[len(timesteps) // 2]
    table = None if scores is None else matched(first, scores, "the scores")
    table = table.to_frame(str(table.name or "score")) if isinstance(table, pd.Series) else table
    colours = {} if table is None else {str(name): table[name] for name in table.columns}
    colours |= _measured(first, t, directions, boundaries)
    notes, images = [], None
    if "x0" in first.group:
        images = partial(_read, first.images)
    else:
        notes.append(f"{first.path} keeps no images, so no thumbnails are shown; extract with images=True to see them.")
    k = min(neighbours, n - 1)
    near = nearest(first.batches, t, n=n, k=k, what=next(iter(stores)), seed=seed) if k > 0 else None
    desk = None
    if model is not None:
        numeric = None if table is None else table.select_dtypes(["number", "bool"])
        desk = Desk(first, model, runs=runs, scores=numeric, known=directions)
    shown = [] if strips is None else strips_of(strips, note=f"{len(strips.images)} rows were rendered beforehand.")
    names = list(own or [f"sample {i}" for i in range(n)])
    return Explorer(
        made,
        names=names,
        colours=colours,
        images=images,
        neighbours=near,
        notes=notes,
        desk=desk,
        studio=studio,
        strips=shown,
    )


def _measured(store: HStore, t: int, directions: Sequence[Direction], boundaries: Sequence[Boundary]) -> dict:
    """Colours that are measured in the store: norms, projections on directions and distances from boundaries."""
    colours = {f"norm of h, t = {t}": np.concatenate([np.linalg.norm(h, axis=1) for h in store.batches(t)])}
    for each in directions:
        if t in each.timesteps:
            i = each.timesteps.index(t)
            along = projections(store.batches(t), each.unit[i].flatten()[None].numpy())[:, 0]
            colours[f"along {each.name}, t = {t} (sigma)"] = (along - along.mean()) / max(float(each.sigma[i]), 1e-12)
    for each in boundaries:
        distances = [each.distance(batch) for batch in store.batches(each.t, space=each.space)]
        colours[f"distance to {each.name} ({each.space}, t = {each.t})"] = np.concatenate(distances)
    return colours


def _read(images, rows: slice) -> np.ndarray:
    return np.asarray(images[rows], dtype=np.float32)


def _members(text: str) -> list[int]:
    """Positions of text such as "0-5,9"."""
    return [i for a, b in re.findall(r"(\d+)(?:-(\d+))?", text) for i in range(int(a), int(b or a) + 1)]


def _spans(positions: Sequence[int]) -> str:
    """Positions as text such as "0-5,9"."""
    values = np.unique(np.asarray(list(positions), dtype=int))
    parts = np.split(values, np.flatnonzero(np.diff(values) > 1) + 1) if len(values) else []
    return ",".join(f"{part[0]}" if len(part) == 1 else f"{part[0]}-{part[-1]}" for part in parts)
