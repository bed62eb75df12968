"""Notebooks as reports: run with papermill, with offline HTML beside them.

A report replaces the last one only when complete; a failed one goes to `failed/` beside it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from IPython import get_ipython

from workbench import paths
from workbench.io import commit, duration, version_of
from workbench.report.pages import SVG, export_html, now, problem_of, write_index
from workbench.report.parameters import check_parameters, find_notebook, notebook_defaults
from workbench.report.plans import Run
from workbench.report.running import Job, logged

_PACKAGES = ("hspace-workbench", "torch", "diffusers", "numpy", "scikit-learn", "plotly")


@dataclass(frozen=True)
class Report:
    """A notebook that ran to its end.

    Attributes
    ----------
    name : str
    notebook, html : Path
        The executed notebook and its HTML.
    parameters : dict
        All of them, defaults included.
    seconds : float
    key : str
        Name of its content, where it is one of a report or a sweep.
    vectors : Path, optional
        The HTML once more, with matplotlib's figures as vectors, for printing.
    """

    name: str
    notebook: Path
    html: Path
    parameters: dict
    seconds: float
    key: str = ""
    vectors: Path | None = None

    def __repr__(self) -> str:
        return f"Report({self.name}, {self.seconds:.1f} s, {self.html})"


class NotebookFailed(RuntimeError):
    """A notebook, or several, stopped at an error; the output until then is kept."""


def raise_failures(failures: Sequence[Exception]) -> None:
    """Raise what notebooks failed by as one error, if any did; an error that is not a notebook's comes first."""
    for failure in failures:
        if len(failures) == 1 or not isinstance(failure, NotebookFailed):
            raise failure
    if failures:
        raise NotebookFailed(f"{len(failures)} notebooks failed: {'; '.join(map(str, failures))}") from failures[0]


def run_notebook(
    name: str | Path,
    parameters: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    *,
    progress: bool = True,
    timeout: int = 3600,
    vectors: bool = False,
) -> Report:
    """Run a notebook in a fresh kernel and write the executed notebook with its HTML.

    Parameters
    ----------
    name : str or Path
        Name ("10_extract"), an unambiguous prefix ("10"), or a path.
    parameters : mapping, optional
        Values in place of the notebook's defaults, of the same types (an int may stand for a float; texts are read as
        on the command line; numpy scalars, arrays, tuples and paths are converted). A parameter ending in `_name` or
        `_path` is resolved from the current folder if it names a file or folder there, although the notebook runs in
        its own folder; bundled names are kept.
    out : str or Path, optional
        The executed notebook, `.ipynb`; default: `reports/` under the notebook's name, listed in the index page.
    progress : bool
        Show a progress bar over the cells, on a terminal and in Jupyter; a log file would have a line of bars.
    timeout : int
        Time limit of one cell in seconds.
    vectors : bool
        Write NAME.vectors.html, too, with matplotlib's figures as vectors: larger, and sharp in print.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        Before the run, if the notebook or a parameter is unknown, or a value is not of the parameter's type.
    NotebookFailed
        If a cell fails. The executed notebook and its HTML go to `failed/` beside `out`; the last good report stays.
    """
    source = find_notebook(name)
    checked = check_parameters(source, parameters or {})
    out = paths.reports() / f"{source.stem}.ipynb" if out is None else paths.writable(out).absolute()
    if out.suffix != ".ipynb":
        raise ValueError(f"out is {out}; it must end in .ipynb, and the HTML goes beside it")
    if out.exists() and read_report(out) is None:
        raise ValueError(f"{out} is a notebook and no report of one, and would be replaced; give another place")
    progress = progress and (sys.stderr.isatty() or get_ipython() is not None)
    # In a thread of its own, so that an interrupt meets this one, which knows how to stop a kernel.
    with ThreadPoolExecutor(1, "notebook") as thread, contextlib.closing(Job(source.stem, vectors=vectors)) as job:
        running = thread.submit(run_job, job, Run(source, checked, out), progress=progress, timeout=timeout)
        try:
            return running.result()
        except KeyboardInterrupt:
            job.stop()
            raise
        finally:
            if not job.stopped and out.parent == paths.reports():
                write_index()


def run_job(job: Job, run: Run, *, progress: bool = False, timeout: int = 3600) -> Report:
    """Run a notebook, in this thread, with parameters that are checked, and make its report."""
    source, out = find_notebook(run.notebook), run.out
    everything = notebook_defaults(source) | run.parameters
    out.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
        executed, start = Path(folder) / out.name, time.perf_counter()
        with logged(job.name, run.log) as logger:
            failure = job.execute(source, executed, run.parameters, timeout=timeout, progress=progress)
            if failure is not None:
                logger.error(problem_of(failure))
        seconds = time.perf_counter() - start
        record = _provenance(source.stem, everything, seconds) | {"passes": job.passes, "key": run.key}
        record |= {} if failure is None else {"failure": failure}
        page = executed.with_suffix(".html")
        try:
            options = {"footer": _footer(record), "folder": source.parent}
            export_html(executed, page, **options)
            if job.vectors and failure is None:
                export_html(executed, page.with_suffix(".vectors.html"), **options, vectors=True)
        except Exception as error:  # what was computed stays, whatever its page meets
            about = {"ename": type(error).__name__, "evalue": f"its page could not be made: {error}"}
            failure = record["failure"] = {"cell": 0} | about
        _stamp(executed, record, out.name)
        failed = out.parent / "failed" / out.name
        target = out if failure is None else failed
        target.parent.mkdir(exist_ok=True)
        for stale in (failed, failed.with_suffix(".html")):
            stale.unlink(missing_ok=True)
        os.replace(executed, target)
        for suffix in (".html", ".vectors.html"):
            if page.with_suffix(suffix).exists():
                os.replace(page.with_suffix(suffix), target.with_suffix(suffix))
    if failure is not None:
        what = f"{source.stem} failed in cell {failure['cell']} ({problem_of(failure)})"
        raise NotebookFailed(f"{what}; what it did until then is in {failed.with_suffix('.html')}")
    vectors = out.with_suffix(".vectors.html") if job.vectors else None
    return Report(source.stem, out, out.with_suffix(".html"), everything, seconds, run.key, vectors)


def read_report(path: Path) -> Report | None:
    """A report that was made, or None if there is none."""
    record = nbformat.read(path, as_version=4).metadata.get("workbench") if path.exists() else None
    if record is None:
        return None
    about = (record["parameters"], record["seconds"], record["key"])
    return Report(path.stem, path, path.with_suffix(".html"), *about)


def _provenance(name: str, parameters: dict, seconds: float) -> dict:
    return {
        "name": name,
        "parameters": parameters,
        "seconds": round(seconds, 2),
        "date": now(),
        "commit": commit() or "unknown",
        "python": platform.python_version(),
        "versions": {package: version_of(package) or "not installed" for package in _PACKAGES},
    }


def _footer(record: Mapping) -> dict[str, str]:
    footer = {
        "Notebook": record["name"],
        "Parameters": ", ".join(f"{key} = {value!r}" for key, value in record["parameters"].items()) or "none",
        "Date": record["date"],
        "Duration": duration(record["seconds"]),
        "Git commit": record["commit"],
        "Versions": ", ".join(f"{key} {value}" for key, value in record["versions"].items()),
        "Python": record["python"],
    }
    if "failure" in record:
        footer["Failed"] = f"in cell {record['failure']['cell']}: {problem_of(record['failure'])}"
    return footer


def _stamp(executed: Path, record: dict, name: str) -> None:
    """Put the provenance in the notebook, for the index page and for readers of the file; SVGs were for printing."""
    notebook = nbformat.read(executed, as_version=4)
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            output.data.pop(SVG, None)
    notebook.metadata["workbench"] = record
    notebook.metadata.papermill.update(input_path=f"{record['name']}.ipynb", output_path=name)
    nbformat.write(notebook, executed)
