"""The edit studio and the explorer as pages on their own, served by Voila to this machine alone."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from nbformat.v4 import new_code_cell, new_notebook
from traitlets.config import Config

from workbench import paths
from workbench.analysis.maps import METHODS
from workbench.datasets.classifiers import load_classifier
from workbench.datasets.clip import load_clip
from workbench.diffusion.loading import load_model
from workbench.diffusion.models import Model
from workbench.diffusion.noise import check_seeds
from workbench.diffusion.sampling import sample
from workbench.diffusion.schedule import index_of
from workbench.directions.boundary import Boundary
from workbench.directions.direction import Direction
from workbench.directions.pca import find_pca
from workbench.hspace.extract import extract
from workbench.hspace.store import open_store
from workbench.io import one_of
from workbench.studio.explorer import Explorer, explore
from workbench.studio.recipe import load_editable
from workbench.studio.renderings import MOST_SAMPLES
from workbench.studio.widgets import EditStudio

WORDS_SAMPLES = 256
LOOPBACK = "127.0.0.1"
_OWN_SOURCES = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob: ws://127.0.0.1:*; frame-ancestors 'self'"


def serve_studio(options: dict, **page: Any) -> None:
    """Serve a studio; `options` are arguments of `open_studio`, as JSON can hold them. `page` as of `serve`."""

    def check() -> None:
        model = load_model(options["model"], device=options.get("device"), **options.get("condition", {}))
        model.schedule.etas(options.get("eta", 1.0), 1)
        if len(check_seeds(options.get("seeds", range(8)))) > MOST_SAMPLES:
            raise ValueError(f"a studio holds {MOST_SAMPLES} samples; {len(options['seeds'])} seeds were given")
        find_editables(model, options.get("directions"), model.schedule.timesteps(options.get("steps", 50)))
        if options.get("classifier"):
            load_classifier(options["classifier"], device=options.get("device"))
        if options.get("clip"):
            load_clip(options["clip"], device=options.get("device"))

    serve("open_studio", options, check, title="h-space edit studio", **page)


def serve(
    function: str,
    options: dict,
    check: Callable[[], None],
    *,
    title: str,
    on_ready: Callable[[str], None],
    port: int = 0,
    theme: str = "light",
) -> None:
    """Serve a widget until interrupted, to this machine alone and only with the token in the address.

    `function` of this module makes it from `options`; `check` raises for what these name, before anything is served.
    `on_ready` is called with the address when the page can be opened. Port 0 takes a free one. ValueError if there is
    no such port or voila is not installed, OSError if the port is taken.
    """
    try:
        from voila.app import Voila  # slow to import, and needed by these commands alone
    except ModuleNotFoundError as error:
        raise ValueError("a page of its own needs voila: pip install -c constraints.txt -e '.[lab]'") from error

    if not 0 <= port <= 65535:
        raise ValueError(f"port {port} is invalid; give 1 to 65535, or 0 for a free one")
    port = _free_port(port)
    check()
    token = secrets.token_urlsafe(24)
    config = Config()
    config.Voila.log_level = "ERROR"
    # Voila's page asks a server elsewhere for its icons; this one works without a network, and tells nobody.
    config.Voila.tornado_settings = {"headers": {"Content-Security-Policy": _OWN_SOURCES}}
    config.VoilaConfiguration.update(theme=theme, strip_sources=True, show_tracebacks=True)
    with TemporaryDirectory(prefix="studio-") as folder:
        notebook = Path(folder) / "studio.ipynb"
        notebook.write_text(json.dumps(_notebook(function, options, title)), encoding="utf-8")
        app = Voila.instance(config=config)
        # As arguments, since a voila.json of the user's would come before the configuration, and may open the page to
        # all. They stay in this process: other users of the machine don't see the token.
        safe = {"ip": LOOPBACK, "port": port, "token": token, "port_retries": 0, "open_browser": False}
        app.initialize([str(notebook), *(f"--Voila.{name}={value}" for name, value in safe.items())])
        address = f"http://{LOOPBACK}:{port}/?token={token}"
        on_ready(address)
        app.start()


def open_explorer(
    store: str,
    *,
    model: str | None = None,
    directions: Sequence[str] | None = None,
    classifier: str = "",
    methods: Sequence[str] = ("pca",),
    device: str | None = None,
) -> Explorer:
    """The explorer of a store on disk, as `workbench explore` shows it.

    By default the model is the store's own; with "", there are maps and no edits. `directions` as in `open_studio`.
    Raises FileNotFoundError or ValueError if something named is not there, or does not fit.
    """
    opened, loaded, found, judge = _named(store, model, directions, classifier, device)
    known = [each for each in found if isinstance(each, Direction) and each.timesteps == opened.timesteps]
    crossed = [each for each in found if isinstance(each, Boundary) and each.space in opened.group]
    scores = None if judge is None else judge(opened.images[:])
    if scores is not None:
        scores.index = list(opened.seeds or opened.names or scores.index)
    return explore(opened, scores=scores, model=loaded, methods=methods, directions=known, boundaries=crossed)


def serve_explorer(options: dict, **page: Any) -> None:
    """Serve an explorer; `options` are arguments of `open_explorer`, as JSON can hold them. `page` as of `serve`."""

    def check() -> None:
        for method in options["methods"]:
            one_of("method", method, METHODS)
        _named(*(options[key] for key in ("store", "model", "directions", "classifier", "device")))

    serve("open_explorer", options, check, title="h-space explorer", **page)


def _named(store: str, model: str | None, directions: Sequence[str] | None, classifier: str, device: str | None):
    """Store, model, editables and classifier that the arguments of `open_explorer` name; raises as it does."""
    opened, loaded, found = open_store(store), None, []
    if model == "" and directions is not None:
        raise ValueError("directions need the store's model; leave out model=''")
    if model != "":
        own = opened.provenance["model"]
        try:
            loaded = load_model(model or own["name"], device=device).as_recorded(own)
        except FileNotFoundError as error:
            if model:
                raise
            remedy = "name its folder as the model, or '' for maps alone"
            raise FileNotFoundError(
                f"{store} is of the model {own['name']!r}, which is not bundled; {remedy}"
            ) from error
        found = find_editables(loaded, directions, opened.timesteps)
    return opened, loaded, found, load_classifier(classifier, device=device) if classifier else None


def open_studio(
    model: str,
    *,
    condition: Mapping[str, object] | None = None,
    directions: Sequence[str] | None = None,
    seeds: Sequence[int] = range(8),
    steps: int = 50,
    eta: float = 1.0,
    classifier: str = "",
    clip: str = "",
    device: str | None = None,
) -> EditStudio:
    """The studio of names and files, as `workbench studio` shows it.

    `condition` are options of `load_model`, for a conditional model. `directions` are files of directions and
    boundaries, or folders of them; by default those saved for this model in `data/directions` and `data/boundaries`,
    or, without any direction, principal components of 96 samples. With `clip`, as of `load_clip`, sentences become
    directions, by the scores of 256 samples. Raises FileNotFoundError or ValueError if something
    named is not there, or does not fit the model.
    """
    loaded = load_model(model, device=device, **(condition or {}))
    runs = sample(loaded, seeds, steps=steps, eta=eta, progress=False)
    found = find_editables(loaded, directions, runs.timesteps)
    words, store = load_clip(clip, device=device) if clip else None, None
    without = directions is None and not any(isinstance(each, Direction) for each in found)
    if words or without:
        store = extract(loaded, WORDS_SAMPLES if words else 96, steps=steps, eta=eta, progress=False)
        found = [*(find_pca(store, k=4) if without else ()), *found]
    scores = load_classifier(classifier, device=device) if classifier else None
    return EditStudio(loaded, runs, found, classifier=scores, store=store if words else None, clip=words)


def find_editables(model: Model, named: Sequence[str] | None, timesteps: Sequence[int]) -> list[Direction | Boundary]:
    """Directions and boundaries: those of the files and folders named, or all saved ones that fit.

    A boundary needs its own timestep among those given. FileNotFoundError or ValueError if a file or folder that is
    named is not there, holds nothing, or does not fit.
    """

    def load(path: Path) -> Direction | Boundary:
        found = load_editable(path, model=model)
        if isinstance(found, Boundary):
            index_of(found.t, timesteps, trained=model.schedule.T)
        return found

    if named is None:
        found = []
        for folder in (paths.directions(), paths.boundaries()):
            for path in sorted(folder.glob("*.safetensors")):
                with suppress(ValueError):  # of another model, which is no mistake in a folder of all
                    found.append(load(path))
        return found
    files = []
    for name in named:
        path = paths.local(name)
        within = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not within:
            raise FileNotFoundError(f"there is no direction in {path}; workbench find writes some")
        files += within
    return [load(path) for path in files]


def _notebook(function: str, options: dict, title: str) -> dict:
    # The page's kernel starts in the folder of the notebook, and names of files are meant from here.
    imports = f"import os\n\nfrom workbench.studio.server import {function}\n\nos.chdir({os.getcwd()!r})"
    cell = new_code_cell(f"{imports}\n{function}(**{options!r})")
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new_notebook(cells=[cell], metadata={"kernelspec": kernel, "title": title})


def _free_port(port: int = 0) -> int:
    """The port, or a free one for 0; OSError if it is taken."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError as error:
            raise OSError(f"port {port} is taken ({error.strerror}); choose another with --port") from error
        return probe.getsockname()[1]
