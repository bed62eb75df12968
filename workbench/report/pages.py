"""Executed notebooks as HTML that opens without network, and the index page of them."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Collection, Mapping, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from xml.etree import ElementTree

import jinja2
import nbformat
from latex2mathml.converter import convert as mathml
from nbconvert import HTMLExporter
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from nbformat import NotebookNode
from PIL import Image
from plotly.io import to_html as plotly_html
from plotly.offline import get_plotlyjs
from pygments.formatters import HtmlFormatter

from workbench import paths
from workbench.io import duration, write_text
from workbench.report.alive import VIEW, embedded, fitting, widgets_of
from workbench.report.pictures import png_address

_ROOM = Path(__file__).parent
SVG = "image/svg+xml"
_PLOTLY = "application/vnd.plotly.v1+json"
_REMOTE_SCRIPT = re.compile(r'<script[^>]*\ssrc="(?:https?:)?//[^>]*>\s*</script>')
_TEMPLATES = jinja2.Environment(loader=jinja2.FileSystemLoader(_ROOM), autoescape=True)


def export_html(
    notebook_path: str | Path,
    html_path: str | Path,
    *,
    footer: Mapping[str, str],
    folder: str | Path | None = None,
    vectors: bool = False,
) -> Path:
    """Write an executed notebook as one HTML file that asks the network for nothing.

    Formulas become MathML, which browsers draw themselves. Plotly figures stay alive, with one copy of plotly.js for
    all of them; so do widgets that can (see `alive`), and others show their picture, if they have one. Code is folded
    away, and progress bars are left out. Figures that were kept as SVG, too, are shown so with
    `vectors`, which takes more space. `footer` has the rows of the table "How this report was made"; pictures that the
    text names lie in `folder`, by default with the staged notebooks.
    """
    notebook_path, html_path = paths.local(notebook_path), paths.local(html_path)
    notebook = nbformat.read(notebook_path, as_version=4)
    cells, widgets = [cell for cell in notebook.cells if cell.cell_type == "code"], fitting(widgets_of(notebook))
    for i, cell in enumerate(cells):
        outputs = [offline(output, f"plot-{i}-{k}", widgets, vectors=vectors) for k, output in enumerate(cell.outputs)]
        cell.outputs = [output for output in outputs if output is not None]
    alive = any("Plotly.newPlot" in _html_of(output) for cell in cells for output in cell.outputs)
    page = {
        "name": html_path.stem,
        "title": _title(notebook) or html_path.stem,
        "subtitle": " · ".join(footer[key] for key in ("Date", "Duration") if key in footer),
        "css": _css() + _code_css(),
        "plotly_js": f"<script>{get_plotlyjs()}</script>" if alive else "",
        "footer": dict(footer),
    }
    template = {"template_name": "lab", "template_file": str(_ROOM / "report.html.j2")}
    exporter = _Exporter(**template, embed_images=True)
    resources = {"report": page, "metadata": {"path": str(folder or paths.notebooks())}}
    return write_text(html_path, exporter.from_notebook_node(notebook, resources=resources)[0])


def write_index(
    folder: str | Path | None = None,
    *,
    title: str = "Reports",
    intro: str = "",
    pending: Mapping[str, str] | None = None,
    notes: Mapping[str, str] | None = None,
    only: Collection[str] | None = None,
    refresh: int | None = None,
) -> Path:
    """Write `index.html`, a page with a card for each report in a folder, failed ones in red.

    `intro` is HTML before the cards. `pending` says of notebooks that wait or run how far they are, `notes` has a
    sentence for some cards, and after `refresh` seconds the page loads itself again.
    """
    folder = paths.reports() if folder is None else paths.local(folder)
    pending, notes = pending or {}, notes or {}
    good, bad = (
        {path.stem: path for path in place.glob("*.ipynb") if only is None or path.stem in only}
        for place in (folder, folder / "failed")
    )
    names = sorted(good.keys() | bad.keys() | pending.keys())
    cards = [_card(name, good.get(name), bad.get(name), pending.get(name, ""), notes.get(name, "")) for name in names]
    complete, failed = len(good.keys() - pending.keys()), len(bad.keys() - pending.keys())
    words = f"{complete} complete" + (f", {failed} failed" if failed else "")
    words += f", {len(pending)} to come" if pending else ""
    return write_page(folder / "index.html", title=title, words=words, body=intro, cards=cards, refresh=refresh)


def write_page(
    path: str | Path, *, title: str, body: str, words: str = "", cards: Sequence[dict] = (), refresh: int | None = None
) -> Path:
    """Write a page in the style of the reports: a title, `words` beside the date, a body of HTML, and cards."""
    words = " · ".join(filter(None, [words, now()]))
    page = {"title": title, "words": words, "body": body, "cards": cards, "refresh": refresh, "css": _css()}
    return write_text(paths.local(path), _TEMPLATES.get_template("page.html.j2").render(page))


def problem_of(failure: Mapping) -> str:
    """The first line of an error."""
    lines = failure["evalue"].strip().splitlines()
    return f"{failure['ename']}: {lines[0][:300].rstrip('.')}" if lines else failure["ename"]


def now() -> str:
    """Date and time as reports write them."""
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")


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

    @jinja2.pass_context
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


def offline(
    output: NotebookNode, div_id: str, widgets: Mapping[str, dict], *, vectors: bool = False
) -> NotebookNode | None:
    """The output as the HTML page shows it, or None for a progress bar."""
    if output.output_type == "stream":
        output.text = re.sub(r"[^\n]*\r(?!\n)", "", output.text)
        return output if output.text.strip() else None
    if output.output_type == "error":
        return output
    data = output.data
    view = data.pop(VIEW, None)
    if view is not None and view["model_id"] in widgets:
        data["text/html"] = embedded(widgets[view["model_id"]], div_id)
        return output
    if view is not None and set(data) <= {"text/plain"}:
        return None
    if _PLOTLY in data:
        figure = {key: value for key, value in data.pop(_PLOTLY).items() if key != "config"}
        options = {"full_html": False, "include_plotlyjs": False, "validate": False, "default_height": "480px"}
        data["text/html"] = plotly_html(figure, **options, div_id=div_id)
    elif SVG in data and "image/png" in data:  # a figure that was kept as both; an SVG alone is shown as it is
        drawn = data.pop(SVG)
        if vectors:  # as an image, whose names of parts are its own
            width = Image.open(io.BytesIO(base64.b64decode(data["image/png"]))).width
            encoded = base64.b64encode(drawn.encode()).decode()
            data["text/html"] = f'<img width="{width}" src="data:{SVG};base64,{encoded}" alt="">'
    elif "text/html" in data:
        data["text/html"] = _REMOTE_SCRIPT.sub("", _html_of(output).replace(get_plotlyjs(), ""))
    return output


def _html_of(output: NotebookNode) -> str:
    return "".join(output.get("data", {}).get("text/html", ""))


def _card(name: str, good: Path | None, bad: Path | None, state: str, note: str) -> dict:
    """Card of a report on the index page, with its progress while it waits or runs."""
    found = [_content(path, path.stat().st_mtime_ns) for path in (good, bad) if path is not None]
    card = {"name": name, "title": name, "facts": [name], "good": good is not None, "state": state, "note": note}
    if found:
        record = found[0]["record"]
        card |= {"title": found[0]["title"], "picture": found[0]["picture"]}
        card["parameters"] = ", ".join(f"{key} = {value!r}" for key, value in record.get("parameters", {}).items())
        card["facts"] += [record["date"], duration(record["seconds"])] if record else []
    if bad is not None:
        record = found[-1]["record"]
        card["failure"] = problem_of(record["failure"]) if "failure" in record else "failed"
        card["date"] = record.get("date", "")
    return card


@lru_cache(maxsize=256)
def _content(path: Path, changed: int) -> dict:
    """Title, picture and record of an executed notebook for its card; `changed` is the time of its last change."""
    notebook = nbformat.read(path, as_version=4)
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    encoded = next((output.data["image/png"] for output in outputs if "image/png" in output.get("data", {})), None)
    picture = None
    if encoded:
        picture = png_address(Image.open(io.BytesIO(base64.b64decode(encoded))).convert("RGB"), (560, 340))
    return {
        "title": _title(notebook) or path.stem,
        "picture": picture,
        "record": notebook.metadata.get("workbench", {}),
    }


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
