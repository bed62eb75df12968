"""Sweeps: the notebooks over a matrix of parameters, in parallel, as reports that can be compared.

A run is known by its content: its parameters, the code of the notebook and of the package, and its models' weights. A
sweep that is started again runs what is not there yet. The workers are dask's, on this machine or on a cluster that
sees the same folders.
"""

from __future__ import annotations

import hashlib
import html
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import nbformat
import pandas as pd
from tqdm.auto import tqdm

from workbench import paths
from workbench.datasets.classifiers import BUNDLED
from workbench.io import code_hash
from workbench.report.facts import read_facts
from workbench.report.notebooks import NotebookFailed, run_notebook, write_index
from workbench.report.parameters import (
    check_parameters,
    check_sections,
    find_notebook,
    from_here,
    list_notebooks,
    load_yaml,
    naming,
    new_readers,
    notebook_parameters,
    read_parameters,
    texts,
)
from workbench.workers import start_workers

SECTIONS = ("notebooks", "common", "matrix", "timeout")


@dataclass(frozen=True)
class Run:
    """One notebook with one set of parameters.

    Attributes
    ----------
    notebook : str
    parameters : dict
        Those that differ from the notebook's defaults or are named in the sweep.
    varied : dict
        Those of the matrix.
    key : str
        Name of its content: 12 hexadecimal digits.
    folder : Path
        Of the sweep.
    """

    notebook: str
    parameters: dict
    varied: dict
    key: str
    folder: Path

    @property
    def name(self) -> str:
        return f"{self.notebook}-{self.key}"

    @property
    def path(self) -> Path:
        """The executed notebook; it exists only if the run came to its end."""
        return self.folder / f"{self.name}.ipynb"

    @property
    def log(self) -> Path:
        return self.folder / "logs" / f"{self.name}.log"


def plan_sweep(source: str | Path | Mapping, *, name: str | None = None) -> list[Run]:
    """The runs of a sweep, checked, in order; nothing runs.

    Parameters
    ----------
    source : path of a YAML file, or mapping
        `notebooks`: names or their starts (default: all); `common`: parameters for every notebook that has them;
        `matrix`: lists of values, of which every combination is run; `timeout`: seconds that a cell may take. Texts
        are read by the types that the notebooks declare.
    name : str, optional
        Of the folder below `reports/sweeps/`; by default that of the file.

    Returns
    -------
    list of Run
        A notebook is run once for each combination of those matrix parameters that it has.

    Raises
    ------
    ValueError, FileNotFoundError
        If the file is missing or not a sweep, or a notebook or parameter is unknown or of the wrong type, or
        names what is not there.
    """
    content, name, where = _read(source, name)
    folder = paths.reports() / "sweeps" / name
    starts = texts(content["notebooks"]) or list_notebooks()
    if not isinstance(starts, list) or not all(isinstance(start, str) for start in starts):
        raise ValueError(
            f"notebooks of {where} is {starts!r}; it must be a list of names or their starts, such as [20_geometry, 50]"
        )
    notebooks = [find_notebook(start).stem for start in starts]
    common, matrix = content["common"], content["matrix"]
    known = {notebook: notebook_parameters(notebook) for notebook in notebooks}
    for key in [*common, *matrix]:
        if not any(key in each for each in known.values()):
            raise ValueError(f"none of {', '.join(notebooks)} has the parameter {key!r} of {where}")
    for key, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"matrix {key!r} of {where} is {values!r}; it must be a list of values")
    readers = new_readers()
    runs = {}
    for notebook in notebooks:
        axes = {key: values for key, values in matrix.items() if key in known[notebook]}
        shared = {key: value for key, value in common.items() if key in known[notebook]}
        for combination in product(*axes.values()):
            with naming(where):
                values = read_parameters(notebook, shared | dict(zip(axes, combination, strict=True)))
                parameters = from_here(check_parameters(notebook, values, readers=readers))
            varied = {key: values[key] for key in axes}
            run = Run(notebook, parameters, varied, content_key(notebook, parameters), folder)
            runs[run.name] = run
    return list(runs.values())


def sweep(
    source: str | Path | Mapping,
    *,
    name: str | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run what a sweep lacks, and write its summary page and table.

    Parameters
    ----------
    source, name
        As of `plan_sweep`.
    scheduler : str, optional
        Address of a dask scheduler, "tcp://host:8786". Its workers must see the same folders (a cluster's shared disk)
        and have the workbench installed. By default, workers are started on this machine.
    workers : int, optional
        Number of those workers; by default one a core. Each has its share of the cores.
    progress : bool
        Show a bar over the runs.

    Returns
    -------
    pandas.DataFrame
        One row a run: notebook, status ("done", "cached" or "failed"), seconds, the matrix parameters and the facts
        that the notebook recorded. Also written as `facts.csv` beside the page `index.html` in `reports/sweeps/NAME/`.

    Raises
    ------
    ValueError, FileNotFoundError
        As `plan_sweep`, or if `workers` is below 1. A notebook that fails is no error here: it has its row.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")
    timeout = _read(source, name)[0]["timeout"]
    runs = plan_sweep(source, name=name)
    todo = [run for run in runs if not run.path.exists()]
    failures = {}
    with tqdm(total=len(runs), desc="sweep", unit="run", disable=not progress) as bar:
        bar.update(len(runs) - len(todo))
        for run, failure in _carry_out(todo, timeout=timeout, scheduler=scheduler, workers=workers):
            if failure:
                failures[run.name] = failure
            bar.set_postfix_str(run.name)
            bar.update()
    table = pd.DataFrame([_row(run, fresh=run in todo, failure=failures.get(run.name)) for run in runs])
    folder = runs[0].folder
    table.to_csv(folder / "facts.csv", index=False)
    write_index(folder, title=f"Sweep {folder.name}", intro=_table(table))
    return table


def _carry_out(
    todo: Sequence[Run], *, timeout: int, scheduler: str | None, workers: int | None
) -> Iterator[tuple[Run, str | None]]:
    """Each run as it ends, with what went wrong, if anything did."""
    if not todo:
        return
    from distributed import as_completed  # a second to import

    with start_workers(min(workers or os.cpu_count(), len(todo)), scheduler=scheduler) as client:
        # What a notebook does wrong is a result; a worker that is lost is dask's to replace, so it tries again.
        futures = {client.submit(_run, run, timeout, key=run.name, retries=2, pure=False): run for run in todo}
        for future in as_completed(futures):
            error = future.exception()
            yield futures[future], future.result() if error is None else f"{type(error).__name__}: {error}"


def _run(run: Run, timeout: int) -> str | None:
    """On a worker: the notebook, its log, and the sentence of its failure."""
    run.log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(run.log, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger = logging.getLogger("papermill")
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        run_notebook(run.notebook, run.parameters, run.path, progress=False, timeout=timeout)
    except NotebookFailed as failure:
        logger.error(str(failure))
        return str(failure)
    finally:
        logger.removeHandler(handler)
        handler.close()
    return None


def _row(run: Run, *, fresh: bool, failure: str | None) -> dict:
    row = {"notebook": run.notebook, "status": "done" if fresh else "cached", "seconds": None, **run.varied}
    if failure is not None:
        return row | {"run": run.name, "status": "failed", "error": failure}
    seconds = nbformat.read(run.path, as_version=4).metadata["workbench"]["seconds"]
    facts = {}
    for name, value in read_facts(run.path).items():
        if isinstance(value, Mapping):
            facts |= {name if part == "value" else f"{name} ({part})": v for part, v in value.items()}
        else:
            facts[name] = value
    return row | {"run": run.name, "seconds": seconds} | facts


def _table(table: pd.DataFrame) -> str:
    """The rows of each notebook, with the columns that it has, as HTML."""
    parts = []
    for notebook, rows in table.groupby("notebook", sort=False):
        rows = rows.drop(columns="notebook").dropna(axis=1, how="all")
        page = [
            f'<a href="{"failed/" if status == "failed" else ""}{run}.html">{status}</a>'
            for run, status in zip(rows["run"], rows["status"], strict=True)
        ]
        log = [f'<a href="logs/{run}.log">log</a>' for run in rows["run"]]
        rows = rows.drop(columns="run").map(lambda v: html.escape(f"{v:.4g}" if isinstance(v, float) else str(v)))
        rows = rows.assign(status=page, log=log)
        parts.append(f"<h2>{html.escape(notebook)}</h2>{rows.to_html(index=False, escape=False, border=0)}")
    return f'<div class="tables">{"".join(parts)}</div>'


def _read(source: str | Path | Mapping, name: str | None) -> tuple[dict, str, str]:
    if isinstance(source, Mapping):
        content, where = dict(source), "the sweep"
        name = name or "sweep"
    else:
        path = paths.local(source)
        if not path.is_file():
            raise FileNotFoundError(f"there is no sweep at {path}; write one, for example the one in the README")
        content, where = load_yaml(path), str(path)
        name = name or path.stem
    return check_sections(content, SECTIONS, where), name, where


def content_key(notebook: str, parameters: Mapping) -> str:
    """Name of a run's content: its notebook's code, all parameters, the package's code, and the weights it names."""
    source = nbformat.read(find_notebook(notebook), as_version=4)
    everything = {key: known.default for key, known in notebook_parameters(notebook).items()} | parameters
    content = [[cell.source for cell in source.cells if cell.cell_type == "code"], everything]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(code_hash().encode())
    for file in _weights(everything):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def _weights(parameters: Mapping) -> list[Path]:
    """Files of the models, classifiers and directions that parameters name, as far as they lie here."""
    named = {key: value for key, value in parameters.items() if isinstance(value, str) and value}
    names = [value for key, value in named.items() if key.endswith(("_name", "_path"))]
    places = [folder / name for name in names for folder in (paths.models(), Path())]
    places += [paths.models() / BUNDLED[name] for name in names if name in BUNDLED]
    files = [file for place in places if place.is_dir() for file in sorted(place.rglob("*.safetensors"))]
    return [*files, *(place for place in places if place.is_file())]
