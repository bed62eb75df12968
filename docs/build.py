"""Build the documentation as a site that needs no network: python docs/build.py [FOLDER]

Copies the pages, generates those of the notebooks, of the API and of the figures, runs Sphinx with warnings as errors,
and follows every link of the result. Links out of the site can't be followed offline and are only listed.
"""

from __future__ import annotations

import base64
import inspect
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlparse

import nbformat
from nbformat.v4 import new_markdown_cell
from plotly.offline import get_plotlyjs

import workbench as wb
from workbench import paths
from workbench.report import claims, figures, pages, parameters

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ["CHANGELOG.md", "CONTRIBUTING.md", "README.md", "tests/gpu/README.md", "notebooks/unet.svg"]
"""Files outside of docs/ that its pages show or link to."""


def main(out: Path) -> int:
    stage = out.with_name(f"{out.name}-sources")
    for folder in (stage, out):
        shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(ROOT / "docs", stage / "docs", ignore=shutil.ignore_patterns("*.py", "*.css", "__pycache__"))
    for name in BESIDE:
        (stage / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, stage / name)
    (stage / "_static").mkdir()
    (stage / "_static" / "plotly.js").write_text(get_plotlyjs(), encoding="utf-8")
    shutil.copy(ROOT / "docs" / "site.css", stage / "_static")
    executed = write_notebooks(stage)
    write_api(stage / "docs" / "api")
    write_gallery(stage / "docs", executed)
    command = [sys.executable, "-m", "sphinx", "-b", "html", "-W", "--keep-going", "-q", "-c", ROOT / "docs"]
    # Sphinx looks for static files beside conf.py.
    command += ["-D", f"html_static_path={stage / '_static'}", stage, out]
    status = subprocess.run([str(word) for word in command]).returncode
    (out / "index.html").write_text('<meta http-equiv="refresh" content="0; url=docs/index.html">\n')
    broken, elsewhere = follow_links(out)
    print("\n".join(broken + [f"{len(elsewhere)} addresses outside of the site, which were not followed"]))
    print(f"site: {out / 'index.html'}")
    return int(bool(status or broken))


# Notebooks


def write_notebooks(stage: Path) -> dict[str, nbformat.NotebookNode]:
    """Copy the staged notebooks, each as its last report has it if that is of the same code; returns these reports."""
    executed, rows = {}, []
    (stage / "notebooks").mkdir(exist_ok=True)
    for name in parameters.list_notebooks():
        source = nbformat.read(paths.notebooks() / f"{name}.ipynb", as_version=4)
        report = paths.reports() / f"{name}.ipynb"
        found = nbformat.read(report, as_version=4) if report.exists() else None
        if found is not None and _code(found) == _code(source):
            executed[name] = source = found
            record = found.metadata.workbench
            values = ", ".join(f"`{key} = {value!r}`" for key, value in record.parameters.items())
            note = (
                f"Executed on {record.date} in {record.seconds:.0f} s, at commit {record.commit[:10]}, with {values}."
            )
        else:
            note = f"Shown without outputs: run `workbench run {name}`, then `make docs`, to see them here."
        rows.append(f"../notebooks/{name}")
        source.cells.insert(1, new_markdown_cell(f"*{note}*"))
        _offline(source)
        nbformat.write(source, stage / "notebooks" / f"{name}.ipynb")
    print(f"notebooks with outputs: {', '.join(executed) or 'none'}; the others have no report of their present code")
    page = stage / "docs" / "notebooks.md"
    page.write_text(page.read_text() + "\n```{toctree}\n:hidden:\n\n" + "\n".join(rows) + "\n```\n")
    return executed


def _code(notebook: nbformat.NotebookNode) -> list[str]:
    cells = (cell for cell in notebook.cells if cell.cell_type == "code")
    return [cell.source for cell in cells if "injected-parameters" not in cell.metadata.get("tags", [])]


def _offline(notebook: nbformat.NotebookNode) -> None:
    """Outputs as a page without a kernel and without network shows them."""
    for i, cell in enumerate(cell for cell in notebook.cells if cell.cell_type == "code"):
        outputs = [pages.offline(output, f"plot-{i}-{k}", {}) for k, output in enumerate(cell.outputs)]
        cell.outputs = [output for output in outputs if output is not None]
        for output in cell.outputs:
            output.get("data", {}).pop("application/vnd.jupyter.widget-view+json", None)
    notebook.metadata.pop("widgets", None)
    if "Plotly.newPlot" in json.dumps(notebook):
        script = '```{raw} html\n<script src="../_static/plotly.js"></script>\n```'
        notebook.cells.insert(1, new_markdown_cell(script))


# API


def write_api(folder: Path) -> None:
    """A page per room of the package, with everything that `workbench` exports."""
    folder.mkdir()
    rooms = defaultdict(list)
    for name, module in wb._NAMES.items():
        rooms[module.split(".")[0]].append((name, f"workbench.{module}"))
    lines = [
        "# API reference",
        "",
        "Everything that `import workbench as wb` offers, by the room that it comes from.",
        "",
    ]
    for room, names in rooms.items():
        about = (inspect.getdoc(sys.modules.get(f"workbench.{room}")) or "").partition("\n")[0]
        page = [f"# workbench.{room}", "", about, ""]
        lines += [f"- [{room}]({room}.md): " + ", ".join(f"`{name}`" for name, _ in names)]
        page += [_entry(getattr(wb, name), name, module) for name, module in names]
        (folder / f"{room}.md").write_text("\n".join(page))
    for module in wb._MODULES:
        found = getattr(wb, module)
        public = {name: value for name, value in vars(found).items() if name[0] != "_" and inspect.getdoc(value)}
        own = {
            name: value
            for name, value in public.items()
            if (inspect.isfunction(value) and value.__module__.startswith("workbench."))
            or (inspect.isclass(value) and value.__module__ == found.__name__)
        }
        page = [f"# wb.{module}", "", inspect.getdoc(found).partition("\n")[0], ""]
        page += [_entry(value, name, value.__module__) for name, value in own.items()]
        (folder / f"{module}.md").write_text("\n".join(page))
        lines += [f"- [{module}]({module}.md): " + ", ".join(f"`{name}`" for name in own)]
    lines += ["", "```{toctree}", ":hidden:", "", *rooms, *wb._MODULES, "```", ""]
    (folder / "index.md").write_text("\n".join(lines))


def _entry(found: object, name: str, module: str) -> str:
    """A heading, and what autodoc makes of a docstring."""
    kind = f"autoclass:: {name}\n   :members:" if inspect.isclass(found) else f"autofunction:: {name}"
    return f"## {name}\n\n```{{eval-rst}}\n.. py:currentmodule:: {module}\n\n.. {kind}\n```\n"


# Figures


def write_gallery(folder: Path, executed: dict[str, nbformat.NotebookNode]) -> None:
    """A page of the papers' figures: picture, numbers with intervals, verdicts, and where they come from."""
    records = {
        path.stem: json.loads(path.read_text()) for path in (paths.data() / "records").glob("avataaars32/*.json")
    }
    by_number = {(claim.figure, claim.number): claim for claim in claims.load_claims()}
    known = sorted(
        figures.list_figures().values(),
        key=lambda each: [int(w) if w.isdigit() else w for w in re.split(r"(\d+)", each.name)],
    )
    (folder / "figures").mkdir()
    lines = ["# Gallery of the papers' figures", "", _GALLERY, ""]
    for paper, title in {"haas": "Haas et al. 2024", "zhu": "Zhu et al. 2023"}.items():
        lines += [f"## {title}", ""]
        for each in (each for each in known if each.name.startswith(paper)):
            lines += [
                f"### {each.name}",
                "",
                f"{each.title}. Notebook [{each.notebook}](../notebooks/{each.notebook}.ipynb).",
                "",
            ]
            picture = _picture(executed.get(each.notebook), each.name)
            if picture:
                (folder / "figures" / f"{each.name}.png").write_bytes(picture)
                lines += [f"![{each.title}](figures/{each.name}.png)", ""]
            if each.name in records:
                lines += _numbers(records[each.name], by_number)
    (folder / "gallery.md").write_text("\n".join(lines))


_GALLERY = """\
`workbench figure NAME` draws any of these at column and page width as PDF, SVG and PNG. The numbers are the records of
`avataaars32` in `data/records`: value, 95% interval and n. The pictures come from the reports that were there when this
site was built, with the parameters that the notebook's page names: they may rest on fewer samples than the numbers.
"""


def _numbers(record: dict, by_number: dict) -> list[str]:
    about, lines = record["provenance"], []
    if record["numbers"]:
        lines += ["| number | value | 95% interval | n | claim | verdict |", "|---|---|---|---|---|---|"]
    for name, found in record["numbers"].items():
        claim = by_number.get((record["figure"], name))
        text, verdict = (claim.text, claim.verdict(found["low"], found["high"])) if claim else ("", "")
        interval = f"{found['low']:.3g} to {found['high']:.3g}"
        lines += [f"| `{name}` | {found['value']:.3g} | {interval} | {found['n']} | {text} | {verdict} |"]
    chosen = ", ".join(f"`{key}={value}`" for key, value in about["parameters"].items() if value not in ({}, ""))
    sources = ", ".join(f"{role} {source['name']} `{source['hash'][:12]}`" for role, source in about["sources"].items())
    return [*lines, "", f"Recorded with {chosen}; {sources}; code {about['code'] or 'not recorded'}.", ""]


def _picture(notebook: nbformat.NotebookNode | None, name: str) -> bytes | None:
    """The figure as a notebook's cell showed it."""
    for cell in notebook.cells if notebook else []:
        if cell.cell_type == "code" and f'"{name}"' in cell.source and "save_figure" in cell.source:
            for output in cell.outputs:
                if "image/png" in output.get("data", {}):
                    return base64.b64decode(output.data["image/png"])
    return None


# Links


class _Page(HTMLParser):
    """Addresses that a page links to or loads, and its anchors."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links, self.loads, self.anchors = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.anchors |= {given.get("id"), given.get("name")}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        elif tag == "link" and given.get("rel") not in ("canonical", "search", "next", "prev", "index", "genindex"):
            self.loads.append(given.get("href", ""))
        elif given.get("src"):
            self.loads.append(given["src"])


def follow_links(site: Path) -> tuple[list[str], set[str]]:
    """Links of a site that lead nowhere, and the addresses outside of it that it links to."""
    read = {path.resolve(): _Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    broken, elsewhere = [], set()
    for path, page in read.items():
        for address in (*page.links, *page.loads):
            parts = urlparse(address)
            if parts.scheme == "data" or address.startswith("mailto:"):
                continue
            if parts.scheme or parts.netloc:
                elsewhere.add(address)
                if address in page.loads:
                    broken.append(f"{path.relative_to(site.resolve())} loads {address[:100]} from the network")
                continue
            target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
            lost = not target.exists() or (
                target in read and parts.fragment and unquote(parts.fragment) not in read[target].anchors
            )
            if lost:
                broken.append(f"{path.relative_to(site.resolve())} links to {address}, which is not there")
    return sorted(set(broken)), elsewhere


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve() if len(sys.argv) > 1 else ROOT / "build" / "docs"))
