"""Sweeps: notebooks over a matrix of parameters, in parallel, as comparable reports.

A run is identified by its parameters, the code of the notebook and of the package, and its models' weights. A repeated
sweep runs only the missing runs.
"""

from __future__ import annotations

import html
from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from workbench.report.board import Board, default_jobs, start_kernels
from workbench.report.facts import read_facts
from workbench.report.notebooks import Report, read_report
from workbench.report.plans import Run, plan_sweep
from workbench.workers import start_workers


def sweep(
    source: str | Path | Mapping,
    *,
    name: str | None = None,
    scheduler: str | None = None,
    workers: int | None = None,
    progress: bool = True,
) -> pd.DataFrame:
    """Run notebooks over a matrix of parameters, and gather their facts.

    Parameters
    ----------
    source : path of a YAML file, or mapping
        `notebooks`: names or prefixes (default: all); `common`: parameters for every notebook that has them; `matrix`:
        lists of values, run in every combination; `timeout`: seconds per cell. Texts are converted to the types that
        the notebooks declare.
    name : str, optional
        Name of the folder below `reports/sweeps/`; by default the file's.
    scheduler : str, optional
        Address of a dask scheduler, "tcp://host:8786". Its workers must see the same folders and have the workbench
        installed. By default, notebooks run on this machine.
    workers : int, optional
        Parallel runs on this machine; by default as many as cores and memory allow, and one on an accelerator.
    progress : bool
        Show progress: in one line on a terminal, else in one line per run.

    Returns
    -------
    pandas.DataFrame
        One row per run: notebook, status ("done", "cached" or "failed"), seconds, the matrix parameters and the facts.
        Also written as `facts.csv` beside the page `index.html` in `reports/sweeps/NAME/`.

    Raises
    ------
    ValueError, FileNotFoundError
        If the file is missing or not a sweep, a notebook or parameter is unknown, of the wrong type or names a missing
        file; or if `workers` is below 1. A failing notebook raises nothing; its row says "failed".
    """
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; give 1 or more")
    with start_kernels(workers if scheduler is None else 1) as kernels:
        plan = plan_sweep(source, name=name)
        kept = {run.name: found for run in plan.runs if (found := read_report(run.out)) is not None}
        jobs = max(1, min(workers or default_jobs(), len(plan.runs) - len(kept)))
        options = {"jobs": jobs, "kernels": kernels, "title": f"Sweep {plan.folder.name}", "others": False}
        with Board(plan, kept, show=progress, **options) as board:
            if scheduler is None:
                results = board.run()
            else:
                with start_workers(1, scheduler=scheduler) as client:
                    # A worker that is lost is dask's to replace, so it tries again.
                    results = board.run(client.get_executor(retries=2, pure=False))
    table = pd.DataFrame([_row(run, results[run.name], cached=run.name in kept) for run in plan.runs])
    plan.folder.mkdir(parents=True, exist_ok=True)
    table.to_csv(plan.folder / "facts.csv", index=False)
    board.write_index(intro=_table(table))
    return table


def _row(run: Run, result: Report | Exception, *, cached: bool) -> dict:
    row = {"notebook": run.notebook, "status": "cached" if cached else "done", "seconds": None, **run.varied}
    row["run"] = run.name
    if isinstance(result, Exception):
        return row | {"status": "failed", "error": str(result) or type(result).__name__}
    row["seconds"] = result.seconds
    for name, value in read_facts(run.out).items():
        parts = value if isinstance(value, Mapping) else {"value": value}
        row |= {name if part == "value" else f"{name} ({part})": each for part, each in parts.items()}
    return row


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
        rows = rows.drop(columns="run").map(_cell)
        rows = rows.assign(status=page, log=log)
        parts.append(f"<h2>{html.escape(notebook)}</h2>{rows.to_html(index=False, escape=False, border=0)}")
    return f'<div class="tables">{"".join(parts)}</div>'


def _cell(value: object) -> str:
    """A value as the page shows it; pandas makes whole numbers floats where another row has none."""
    if isinstance(value, float):
        return f"{value:.0f}" if value.is_integer() else f"{value:.4g}"
    return html.escape(str(value))
