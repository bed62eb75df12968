"""Notebooks as reports: run with papermill, exported to HTML that opens without network.

The one file that runs papermill and nbconvert. Parameters are checked before anything runs (`parameters.py`). A report
replaces the last one only when it is complete; a failed one goes to `failed/` beside it.
"""

from __future__ import annotations

import base64
import html
import io
import os
import platform
import re
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
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
from papermill.exceptions import PapermillExecutionError
from PIL import Image
from plotly.io import to_html as plotly_html
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter
from tqdm.auto import tqdm

from workbench import paths
from workbench.report.parameters import (
    Parameter,
    check_parameters,
    find_notebook,
    from_here,
    list_notebooks,
    notebook_parameters,
    parse_parameters,
)
from workbench.report.parameters import braced as _braced
from workbench.report.parameters import plan_profile as _plan

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
    "report",
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
    source = find_notebook(name)
    stem = source.stem
    given = from_here(check_parameters(source, parameters or {}))
    everything = {key: parameter.default for key, parameter in notebook_parameters(source).items()} | given
    out = paths.reports() / f"{stem}.ipynb" if out is None else Path(out).absolute()
    if out.suffix != ".ipynb":
        raise ValueError(f"out is {out}; it must end in .ipynb, and the HTML goes beside it")
    out.parent.mkdir(parents=True, exist_ok=True)
    failed = out.parent / "failed" / out.name

    with TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}-") as folder:
        executed = Path(folder) / out.name
        start = time.perf_counter()
        failure = _execute(source, executed, given, timeout=timeout, progress=progress)
        seconds = time.perf_counter() - start
        record = _provenance(stem, everything, seconds) | ({} if failure is None else {"failure": failure})
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
            if out.parent == paths.reports():
                write_index()
            raise
        os.replace(executed, target)
        os.replace(page, target.with_suffix(".html"))
    if failure is None:
        failed.unlink(missing_ok=True)
        failed.with_suffix(".html").unlink(missing_ok=True)
    if out.parent == paths.reports():
        write_index()
    if failure is not None:
        page = failed.with_suffix(".html")
        message = f"{stem} failed in cell {failure['cell']} ({_problem(failure)}); what it did until then is in {page}"
        raise NotebookFailed(message, name=stem, path=page, **failure)
    return Report(stem, out, out.with_suffix(".html"), everything, seconds)


def report(
    profile: str = "standard", *, only: Sequence[str] | str | None = None, progress: bool = True
) -> list[Report]:
    """Run the staged notebooks in order and write the index page.

    Parameters
    ----------
    profile : str
        Name of a YAML file in `profiles/`. Its `notebooks` maps a notebook to its parameters (one that it leaves out
        runs with its defaults), its `common` holds parameters for every notebook that has them, its `timeout` the
        seconds that one cell may take.
    only : sequence of str or str, optional
        Run these notebooks alone; names or their starts.
    progress : bool
        Show progress bars.

    Returns
    -------
    list of Report

    Raises
    ------
    ValueError, FileNotFoundError
        If the profile is unknown, or names an unknown notebook or parameter. Nothing has run then.
    NotebookFailed
        At the end, if a notebook failed. The others have run, and the index page shows both.
    """
    plan, timeout = _plan(profile, [only] if isinstance(only, str) else only)
    reports: list[Report] = []
    failures: list[NotebookFailed] = []
    with tqdm(plan.items(), desc="report", unit="notebook", disable=not progress) as bar:
        for name, parameters in bar:
            bar.set_postfix_str(name)
            try:
                reports.append(run_notebook(name, parameters, progress=progress, timeout=timeout))
            except NotebookFailed as failure:
                failures.append(failure)
    if len(failures) == 1:
        raise failures[0]
    if failures:
        first = failures[0]
        what = "; ".join(f"{each.name} in cell {each.cell} ({each.ename})" for each in failures)
        message = f"{len(failures)} of {len(plan)} notebooks failed: {what}; see {paths.reports() / 'index.html'}"
        details = dict(name=first.name, cell=first.cell, ename=first.ename, evalue=first.evalue, path=first.path)
        raise NotebookFailed(message, **details) from first
    return reports


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
    notebook_path, html_path = Path(notebook_path), Path(html_path)
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
    _write(html_path, text)
    return html_path


def write_index(folder: str | Path | None = None, *, title: str = "Reports", intro: str = "") -> Path:
    """Write `index.html`, a page with a card for each report in a folder, failed ones in red.

    Parameters
    ----------
    folder : str or Path, optional
        Default: `reports/`.
    title : str
    intro : str
        HTML to stand before the cards.

    Returns
    -------
    Path
    """
    folder = paths.reports() if folder is None else Path(folder)
    good = {path.stem: path for path in folder.glob("*.ipynb")}
    bad = {path.stem: path for path in (folder / "failed").glob("*.ipynb")}
    cards = "".join(_card(good.get(name), bad.get(name)) for name in sorted(good.keys() | bad.keys()))
    words = f"{len(good)} complete" + (f", {len(bad)} failed" if bad else "")
    return write_page(
        folder / "index.html", title=title, words=words, body=f'{intro}\n<div class="cards">\n{cards}\n</div>'
    )


def write_page(path: str | Path, *, title: str, body: str, words: str = "") -> Path:
    """Write a page in the style of the reports, whole or not at all.

    Parameters
    ----------
    path : str or Path
    title : str
    body : str
        HTML below the title.
    words : str
        To stand in the header, before the date.

    Returns
    -------
    Path
    """
    path = Path(path)
    header = " · ".join(filter(None, [words, _now()]))
    text = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8" />
<meta name="viewport" content="width=device-width, initial-scale=1.0" />
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
    _write(path, text)
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


def _execute(source: Path, executed: Path, parameters: dict, *, timeout: int, progress: bool) -> dict | None:
    """Run into `executed`; returns None, or which cell of the source failed and how."""
    injected = 1 if parameters else 0
    if "WORKBENCH_HOME" in os.environ:
        # It may be relative to this folder, and the kernel's is another.
        os.environ["WORKBENCH_HOME"] = str(paths.home())
    for attempt in (1, 2):
        try:
            papermill.execute_notebook(
                _braced(source),
                _braced(executed),
                parameters=parameters,
                kernel_name="python3",
                cwd=str(source.parent),
                progress_bar={"desc": source.stem, "leave": False} if progress else False,
                execution_timeout=timeout,
                store_widget_state=False,
                log_output=True,
                extra_arguments=["--log-level=ERROR"],
            )
            return None
        except PapermillExecutionError as error:
            return dict(cell=error.cell_index - injected, ename=error.ename, evalue=error.evalue)
        except Exception as error:  # a cell out of time, a kernel that died or never started
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
        "Duration": _duration(record["seconds"]),
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
    _write(executed, nbformat.writes(notebook))


def _card(good: Path | None, bad: Path | None) -> str:
    notebook = nbformat.read(good or bad, as_version=4)
    record = notebook.metadata.get("workbench", {})
    name = (good or bad).stem
    folder = "" if good else "failed/"
    picture = _thumbnail(notebook)
    alt = f"first figure of {html.escape(name)}"
    image = f'<div class="picture"><img src="{picture}" alt="{alt}" /></div>' if picture else ""
    parameters = ", ".join(f"{key} = {value!r}" for key, value in record.get("parameters", {}).items())
    facts = [record.get("date", ""), _duration(record["seconds"]) if "seconds" in record else ""]
    place, failed = (html.escape(quote(f"{each}{name}")) for each in (folder, "failed/"))
    links = f'<a href="{place}.html">report</a><a href="{place}.ipynb">notebook</a>'
    problem = ""
    if bad:
        record = nbformat.read(bad, as_version=4).metadata.get("workbench", {})
        what = html.escape(_problem(record["failure"])) if "failure" in record else "failed"
        last = " The report below is the last good one." if good else ""
        problem = f'<p class="problem">Failed on {record.get("date", "")}: {what}. '
        problem += f'<a href="{failed}.html">See the notebook as far as it ran.</a>{last}</p>'
    return f"""<article class="card{" failed" if bad else ""}">
{image}
<div class="words">
<h2>{html.escape(_title(notebook) or name)}</h2>
{problem}
<p>{html.escape(" · ".join(filter(None, [name, *facts])))}</p>
<p>{html.escape(parameters)}</p>
<p class="links">{links if good or not bad else ""}</p>
</div>
</article>
"""


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


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 120 else f"{seconds // 60:.0f} min {seconds % 60:.0f} s"


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


def _write(path: Path, text: str) -> None:
    """Whole or not at all."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        beside.write_text(text, encoding="utf-8")
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)
