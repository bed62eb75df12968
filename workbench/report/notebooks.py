"""Notebooks as reports: run with papermill, exported to HTML that opens without network.

The one file that imports papermill, nbconvert and nbformat. A notebook declares its parameters in the cell tagged
`parameters`; names and types are checked before anything runs, which papermill alone does not do. A report replaces the
last one only when it is complete; a failed one goes to `failed/` beside it.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import logging
import os
import platform
import re
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import quote
from xml.etree import ElementTree

import nbformat
import papermill
from jinja2 import pass_context
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from plotly.io import to_html as plotly_html
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter

from workbench import paths
from workbench.io import write_text
from workbench.report.parameters import (
    Parameter,
    braced,
    check_parameters,
    find_notebook,
    from_here,
    list_notebooks,
    notebook_parameters,
    parse_parameters,
)
from workbench.report.running import Job

__all__ = [
    "NotebookFailed",
    "Parameter",
    "Report",
    "check_parameters",
    "export_html",
    "find_notebook",
    "list_notebooks",
    "notebook_parameters",
    "parse_parameters",
    "run_job",
    "run_notebook",
    "write_index",
    "write_page",
]

_ROOM = Path(__file__).parent
_PACKAGES = ("hspace-workbench", "torch", "diffusers", "numpy", "scikit-learn", "plotly")
_PLOTLY = "application/vnd.plotly.v1+json"
_WIDGET = "application/vnd.jupyter.widget-view+json"
_REMOTE_SCRIPT = re.compile(r'<script[^>]*\ssrc="(?:https?:)?//[^>]*>\s*</script>')


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
    """

    name: str
    notebook: Path
    html: Path
    parameters: dict
    seconds: float

    def __repr__(self) -> str:
        return f"Report({self.name}, {self.seconds:.1f} s, {self.html})"


class NotebookFailed(RuntimeError):
    """A notebook stopped at an error; what it did until then is kept.

    Attributes
    ----------
    name : str
    cell : int
        Index of the failing cell in the notebook, from 0.
    ename, evalue : str
        Name and message of the exception.
    path : Path
        The HTML of the executed notebook.
    """

    def __init__(self, message: str, *, name: str, cell: int, ename: str, evalue: str, path: Path):
        super().__init__(message)
        self.name, self.cell, self.ename, self.evalue, self.path = name, cell, ename, evalue, path


def run_notebook(
    name: str | Path,
    parameters: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    *,
    progress: bool = True,
    timeout: int = 3600,
    keep_code: bool = True,
) -> Report:
    """Run a notebook in a fresh kernel and write it, executed, with its HTML beside it.

    Parameters
    ----------
    name : str or Path
        Name ("10_extract"), the start of one name alone ("10"), or a path.
    parameters : mapping, optional
        Values in place of the notebook's defaults, of the same types (an int will do for a float; numpy scalars,
        arrays, tuples and paths are converted). A parameter that ends in `_name` or `_path` and names a file or folder
        here is that one, although the notebook runs in its own folder; a bundled name stays one.
    out : str or Path, optional
        The executed notebook, `.ipynb`; default: `reports/` under the notebook's name, entered in the index page.
    progress : bool
        Show a progress bar over the cells.
    timeout : int
        Seconds that one cell may take.
    keep_code : bool
        Put the code in the HTML, folded away.

    Returns
    -------
    Report

    Raises
    ------
    ValueError
        If the notebook or a parameter is unknown, or a value is not of the parameter's type. Nothing has run then.
    NotebookFailed
        If a cell fails. The executed notebook and its HTML lie in `failed/` beside `out`; the last good report stays.
    """
    job = Job(find_notebook(name).stem)
    entered = out is None or Path(out).absolute().parent == paths.reports()
    # In a thread of its own, so that an interrupt meets this one, which knows how to stop a kernel.
    with ThreadPoolExecutor(1, "notebook") as thread, contextlib.closing(job):
        options = {"progress": progress, "timeout": timeout, "keep_code": keep_code}
        running = thread.submit(run_job, job, name, parameters, out, index=write_index if entered else None, **options)
        try:
            return running.result()
        except KeyboardInterrupt:
            job.stop()
            raise


def run_job(
    job: Job,
    name: str | Path,
    parameters: Mapping[str, object] | None = None,
    out: str | Path | None = None,
    *,
    progress: bool = True,
    timeout: int = 3600,
    keep_code: bool = True,
    key: str = "",
    index: Callable[[], object] | None = None,
) -> Report:
    """`run_notebook` in this thread, as a job that is followed and stopped from another.

    `key` names the content of the report, and `index` writes the page that it is entered in.
    """
    source = find_notebook(name)
    stem = source.stem
    given = from_here(check_parameters(source, parameters or {}))
    everything = {key: parameter.default for key, parameter in notebook_parameters(source).items()} | given
    out = paths.reports() / f"{stem}.ipynb" if out is None else paths.writable(out).absolute()
    if out.suffix != ".ipynb":
        raise ValueError(f"out is {out}; it must end in .ipynb, and the HTML goes beside it")
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = out.parent / "failed" / out.name

    with TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
        executed = Path(folder) / out.name
        start = time.perf_counter()
        failure = _execute(source, executed, given, timeout=timeout, progress=progress, job=job)
        seconds = time.perf_counter() - start
        record = _provenance(stem, everything, seconds) | {"passes": job.passes, "key": key}
        record |= {} if failure is None else {"failure": failure}
        _stamp(executed, record, out.name)
        target = out if failure is None else failed
        target.parent.mkdir(exist_ok=True)
        options = {"footer": _footer(record), "keep_code": keep_code, "folder": source.parent}
        try:
            page = export_html(executed, executed.with_suffix(".html"), **options)
        except Exception as error:  # what was computed stays, whatever its page meets
            about = {"cell": 0, "ename": type(error).__name__, "evalue": f"its page could not be made: {error}"}
            _stamp(executed, record | {"failure": about}, out.name)
            failed.parent.mkdir(exist_ok=True)
            failed.with_suffix(".html").unlink(missing_ok=True)
            os.replace(executed, failed)
            if index is not None:
                index()
            raise
        os.replace(executed, target)
        os.replace(page, target.with_suffix(".html"))
    if failure is None:
        failed.unlink(missing_ok=True)
        failed.with_suffix(".html").unlink(missing_ok=True)
    if index is not None:
        index()
    if failure is not None:
        page = failed.with_suffix(".html")
        message = f"{stem} failed in cell {failure['cell']} ({_problem(failure)}); what it did until then is in {page}"
        raise NotebookFailed(message, name=stem, path=page, **failure)
    return Report(stem, out, out.with_suffix(".html"), everything, seconds)


def export_html(
    notebook_path: str | Path,
    html_path: str | Path,
    *,
    footer: Mapping[str, str],
    keep_code: bool = True,
    folder: str | Path | None = None,
) -> Path:
    """Write an executed notebook as one HTML file that asks the network for nothing.

    Formulas become MathML, which browsers draw themselves. Plotly figures stay alive, with one copy of plotly.js for
    all of them. Code is folded away. Progress bars are left out; a widget shows its picture, if it has one.

    Parameters
    ----------
    notebook_path, html_path : str or Path
    footer : mapping of str to str
        Rows of the table "How this report was made".
    keep_code : bool
        Put the code in, folded away.
    folder : str or Path, optional
        Where pictures lie that its text names; by default with the staged notebooks.

    Returns
    -------
    Path
        html_path
    """
    notebook_path, html_path = paths.local(notebook_path), paths.local(html_path)
    notebook = nbformat.read(notebook_path, as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    for i, cell in enumerate(cells):
        cell.outputs = [_offline(output, f"plot-{i}-{k}") for k, output in enumerate(cell.outputs)]
        cell.outputs = [output for output in cell.outputs if output is not None]
    drawn = "".join(_html_of(output) for cell in cells for output in cell.outputs)

    exporter = _Exporter(
        template_name="lab",
        template_file=str(_ROOM / "report.html.j2"),
        exclude_input=not keep_code,
        embed_images=True,
    )
    page = dict(
        name=html_path.stem,
        title=_title(notebook) or html_path.stem,
        subtitle=" · ".join(footer[key] for key in ("Date", "Duration") if key in footer),
        css=_css() + _code_css(),
        footer=dict(footer),
    )
    text, _ = exporter.from_notebook_node(
        notebook, resources={"report": page, "metadata": {"path": str(folder or paths.notebooks())}}
    )
    if "Plotly.newPlot" in drawn:
        text = text.replace("</head>", f"<script>{get_plotlyjs()}</script>\n</head>", 1)
    write_text(html_path, text)
    return html_path


def write_index(
    folder: str | Path | None = None,
    *,
    title: str = "Reports",
    intro: str = "",
    pending: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    refresh: int | None = None,
) -> Path:
    """Write `index.html`, a page with a card for each report in a folder, failed ones in red.

    Parameters
    ----------
    folder : str or Path, optional
        Default: `reports/`.
    title : str
    intro : str
        HTML to stand before the cards.
    pending : mapping of str to str, optional
        Notebooks that wait or run, and how far they are.
    notes : mapping of str to str, optional
        A sentence for the cards of these notebooks.
    refresh : int, optional
        Seconds after which the page loads itself again.

    Returns
    -------
    Path
    """
    folder = paths.reports() if folder is None else paths.local(folder)
    pending, notes = pending or {}, notes or {}
    good = {path.stem: path for path in folder.glob("*.ipynb")}
    bad = {path.stem: path for path in (folder / "failed").glob("*.ipynb")}
    cards = [
        _card(name, good.get(name), bad.get(name), state=pending.get(name, ""), note=notes.get(name, ""))
        for name in sorted(good.keys() | bad.keys() | pending.keys())
    ]
    complete, failed = len(good.keys() - pending.keys()), len(bad.keys() - pending.keys())
    words = f"{complete} complete" + (f", {failed} failed" if failed else "")
    words += f", {len(pending)} to come" if pending else ""
    body = f'{intro}\n<div class="cards">\n{"".join(cards)}\n</div>'
    return write_page(folder / "index.html", title=title, words=words, body=body, refresh=refresh)


def write_page(path: str | Path, *, title: str, body: str, words: str = "", refresh: int | None = None) -> Path:
    """Write a page in the style of the reports, whole or not at all.

    Parameters
    ----------
    path : str or Path
    title : str
    body : str
        HTML below the title.
    words : str
        To stand in the header, before the date.
    refresh : int, optional
        Seconds after which the page loads itself again.

    Returns
    -------
    Path
    """
    path = paths.local(path)
    header = " · ".join(filter(None, [words, _now()]))
    again = "" if refresh is None else f'\n<meta http-equiv="refresh" content="{refresh}" />'
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1.0" />{again}
<title>h-space workbench: {html.escape(title.lower())}</title>
<style>{_css()}</style>
</head>
<body>
<header class="report-header"><b>h-space workbench</b><span>{header}</span></header>
<main>
<h1>{html.escape(title)}</h1>
{body}
</main>
</body>
</html>
"""
    path.parent.mkdir(exist_ok=True)
    write_text(path, text)
    return path


class _Renderer(IPythonRenderer):
    """Markdown with formulas as MathML; one that cannot be converted stays readable as LaTeX code."""

    def inline_html(self, html: str) -> str:
        return super().inline_html(html) if "<img" in html else html  # embedding would close each tag that it parses

    def block_html(self, html: str) -> str:
        return super().block_html(html) if "<img" in html else html

    def inline_math(self, body: str) -> str:
        return _formula(body, "inline")

    def block_math(self, body: str) -> str:
        return _formula(body, "block")

    def latex_environment(self, name: str, body: str) -> str:
        return _formula(rf"\begin{{{name}}}{body}\end{{{name}}}", "block")


class _Exporter(HTMLExporter):
    def default_filters(self):
        yield from super().default_filters()
        yield "markdown2html", self.markdown_to_html

    @pass_context
    def markdown_to_html(self, context, source: str) -> str:
        attached = context.get("cell", {}).get("attachments", {})
        place = context["resources"]["metadata"]["path"]
        renderer = _Renderer(escape=False, embed_images=True, path=place, attachments=attached)
        return MarkdownWithMath(renderer=renderer).render(source)


def _formula(latex: str, display: str) -> str:
    source = re.sub(r"\\(begin|end)\{aligned\}", r"\\\1{align*}", latex.strip())
    try:
        formula = mathml(source, display=display)
        ElementTree.fromstring(formula)
    except Exception:  # the converter raises its own and built-in errors on LaTeX that it does not know
        formula = None
    if formula is None or "\\" in formula or 'linebreak="newline"' in formula:
        return f'<code class="latex">{html.escape(latex.strip())}</code>'
    return formula


def _offline(output: NotebookNode, div_id: str) -> NotebookNode | None:
    """The output as the HTML page shows it, or None for a progress bar."""
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        return output if output.text.strip() else None
    if output.output_type == "error":
        return output
    data = output.data
    if _WIDGET in data:
        del data[_WIDGET]
        if set(data) <= {"text/plain"}:
            return None
    if _PLOTLY in data:
        figure = {key: value for key, value in data.pop(_PLOTLY).items() if key != "config"}
        data["text/html"] = plotly_html(
            figure, full_html=False, include_plotlyjs=False, validate=False, default_height="480px", div_id=div_id
        )
    elif "text/html" in data:
        data["text/html"] = _REMOTE_SCRIPT.sub("", _html_of(output).replace(get_plotlyjs(), ""))
    return output


def _html_of(output: NotebookNode) -> str:
    return "".join(output.get("data", {}).get("text/html", ""))


class _Engine(NBClientEngine):
    """papermill's own engine, with a folder and an environment of the kernel's, which leave this process's alone."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, job: Job, folder: str, timeout: int, **options):
        copied = {} if job.kernels is None else {"kernel_manager_class": job.kernels.manager()}
        client = PapermillNotebookClient(
            nb_man,
            **copied,
            kernel_name=kernel_name,
            timeout=timeout,
            startup_timeout=180,
            log=logging.getLogger(f"papermill.{job.name}"),
            log_output=options["log_output"],
            store_widget_state=False,
            extra_arguments=["--log-level=CRITICAL"],
            resources={"metadata": {"path": folder}},
        )
        job.follow(nb_man, client)
        return client.execute(env=job.environment())


papermill_engines.register("workbench", _Engine)
# What notebooks print is in the notebooks; without a handler, Python would write their warnings to the terminal too.
logging.getLogger("papermill").addHandler(logging.NullHandler())


def _execute(source: Path, executed: Path, parameters: dict, *, timeout: int, progress: bool, job: Job) -> dict | None:
    """Run into `executed`; returns None, or which cell of the source failed and how.

    Raises KeyboardInterrupt if the job is stopped.
    """
    injected = 1 if parameters else 0
    if "WORKBENCH_HOME" in os.environ:
        # It may be relative to this folder, and the kernel's is another.
        os.environ["WORKBENCH_HOME"] = str(paths.home())
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                braced(source),
                braced(executed),
                parameters=parameters,
                kernel_name="python3",
                engine_name="workbench",
                progress_bar={"desc": source.stem, "leave": False} if progress else False,
                log_output=True,
                job=job,
                folder=str(source.parent),
                timeout=timeout,
            )
            return None
        except PapermillExecutionError as error:
            return dict(cell=error.cell_index - injected, ename=error.ename, evalue=error.evalue)
        except Exception as error:  # a cell out of time, a kernel that died or never started
            if job.stopped:
                raise KeyboardInterrupt from None
            cells = nbformat.read(executed, as_version=4).cells if executed.exists() else []
            started = [i for i, cell in enumerate(cells) if cell.metadata.papermill.get("start_time")]
            if not started and attempt == 1:
                continue
            if not executed.exists():
                raise
            lines = str(error).strip().splitlines()
            return dict(
                cell=max(max(started, default=0) - injected, 0),
                ename=type(error).__name__,
                evalue=lines[0] if lines else "",
            )
    raise AssertionError("two attempts end in a return or an exception")


def _problem(failure: Mapping) -> str:
    lines = failure["evalue"].strip().splitlines()
    return f"{failure['ename']}: {lines[0][:300].rstrip('.')}" if lines else failure["ename"]


def _provenance(name: str, parameters: dict, seconds: float) -> dict:
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    return dict(
        name=name,
        parameters=parameters,
        seconds=round(seconds, 2),
        date=_now(),
        commit=_commit(),
        python=platform.python_version(),
        versions=versions,
    )


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
        footer["Failed"] = f"in cell {record['failure']['cell']}: {_problem(record['failure'])}"
    return footer


def _commit() -> str:
    def git(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(paths.home()), *words], capture_output=True, text=True, check=True, timeout=20
        ).stdout.strip()

    try:
        return git("rev-parse", "--short=12", "HEAD") + (
            " with uncommitted changes" if git("status", "--porcelain") else ""
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def _stamp(executed: Path, record: dict, name: str) -> None:
    """Put the provenance in the notebook, for the index page and for readers of the file."""
    notebook = nbformat.read(executed, as_version=4)
    notebook.metadata["workbench"] = record
    notebook.metadata.papermill.update(input_path=f"{record['name']}.ipynb", output_path=name)
    write_text(executed, nbformat.writes(notebook))


def _card(name: str, good: Path | None, bad: Path | None, *, state: str, note: str) -> str:
    """A report's part of the index page, with how far it is while it waits or runs."""
    words = [f'<p class="state">{html.escape(state)}</p>'] if state else []
    title, picture, parameters, facts, links = name, None, "", [], ""
    if good or bad:
        card = _content(good or bad, (good or bad).stat().st_mtime_ns)
        title, picture, record = card["title"], card["picture"], card["record"]
        parameters = ", ".join(f"{key} = {value!r}" for key, value in record.get("parameters", {}).items())
        facts = [record.get("date", ""), duration(record["seconds"]) if "seconds" in record else ""]
    if good:
        place = html.escape(quote(name))
        links = f'<a href="{place}.html">report</a><a href="{place}.ipynb">notebook</a>'
        links += " (the last one)" if state else ""
    if bad and not state:
        record = _content(bad, bad.stat().st_mtime_ns)["record"]
        what = html.escape(_problem(record["failure"])) if "failure" in record else "failed"
        last = " The report below is the last good one." if good else ""
        page = html.escape(quote(f"failed/{name}"))
        words.append(
            f'<p class="problem">Failed on {record.get("date", "")}: {what}. '
            f'<a href="{page}.html">See the notebook as far as it ran.</a>{last}</p>'
        )
    image = f'<div class="picture"><img src="{picture}" alt="first figure of {html.escape(name)}" /></div>'
    words += [
        f"<p>{html.escape(' · '.join(filter(None, [name, *facts])))}</p>",
        f"<p>{html.escape(parameters)}</p>",
        f'<p class="note">{html.escape(note)}</p>' if note else "",
        f'<p class="links">{links}</p>',
    ]
    kind = "running" if state else "failed" if bad else ""
    return f"""<article class="card {kind}">
{image if picture else ""}
<div class="words">
<h2>{html.escape(title)}</h2>
{"".join(words)}
</div>
</article>
"""


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> dict:
    """What a card shows of an executed notebook; `changed` is the time of its last change."""
    notebook = nbformat.read(path, as_version=4)
    record = notebook.metadata.get("workbench", {})
    return {"title": _title(notebook) or path.stem, "picture": _thumbnail(notebook), "record": record}


def _thumbnail(notebook: NotebookNode) -> str | None:
    """First PNG among the outputs, reduced, as a data address."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    for output in outputs:
        encoded = output.get("data", {}).get("image/png")
        if encoded:
            image = Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB")
            image.thumbnail((560, 340))
            data = io.BytesIO()
            image.save(data, format="PNG", optimize=True)
            return "data:image/png;base64," + base64.b64encode(data.getvalue()).decode("ascii")
    return None


def _title(notebook: NotebookNode) -> str | None:
    for cell in notebook.cells:
        found = re.search(r"^# +(.+)$", cell.source, re.MULTILINE) if cell.cell_type == "markdown" else None
        if found:
            return found[1].strip()
    return None


def _css() -> str:
    return (_ROOM / "report.css").read_text(encoding="utf-8")


def _code_css() -> str:
    light = HtmlFormatter(style="friendly").get_style_defs(".highlight")
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return f"{light}\n@media (prefers-color-scheme: dark) {{\n{dark}\n}}\n.highlight {{ background: none; }}"


def duration(seconds: float) -> str:
    """Seconds in words."""
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")
