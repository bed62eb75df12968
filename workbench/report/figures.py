"""The papers' figures: a notebook cell draws each figure, saves it, and records the numbers behind the claims.

A figure is found by the name in its `save_figure` call. Its record, NAME.json, has the numbers with their intervals,
the plotted table, and the provenance: models and images, the notebook's parameters, a digest of its code.
"""

from __future__ import annotations

import ast
import contextlib
import copy
import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
from IPython import get_ipython
from IPython.display import Markdown, display
from matplotlib import style
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text

from workbench import _MODULES, _NAMES, __version__, paths
from workbench.io import code_hash, write_text
from workbench.report.claims import load_claims
from workbench.report.facts import record_facts
from workbench.report.style import STYLE, add_caption
from workbench.report.style import save_figure as save_files

if TYPE_CHECKING:
    from workbench.diffusion.models import Model

WIDTHS = {"single": 3.4, "double": 7.0}
"""Widths of a column and of a page, in inches."""

BENCHMARK = "benchmark"
"""Claims of this figure are judged by the recorded benchmark: "A less B" is the success of A less that of B."""

SMALLEST = 5.5
"""Points below which no letter of a figure falls."""


@dataclass(frozen=True)
class PaperFigure:
    """A figure that a staged notebook saves.

    Attributes
    ----------
    name : str
        Such as "haas-fig4".
    notebook : str
    title : str
        Subject and number in the paper.
    """

    name: str
    notebook: str
    title: str


def list_figures() -> dict[str, PaperFigure]:
    """Every figure that a staged notebook saves, by name, in the order of the notebooks.

    Reads the notebooks' sources for calls of `save_figure`; nothing runs.
    """
    found = {}
    for path in sorted(paths.notebooks().glob("[!.]*.ipynb")):
        for call in _calls(path, "save_figure"):
            title = next((keyword.value for keyword in call.keywords if keyword.arg == "title"), None)
            if call.args and isinstance(call.args[0], ast.Constant):
                name = call.args[0].value
                found[name] = PaperFigure(name, path.stem, getattr(title, "value", ""))
    return found


def save_figure(
    name: str,
    figure: Figure,
    *,
    title: str,
    caption: str,
    table: pd.DataFrame,
    numbers: Mapping[str, object],
    sources: Mapping[str, object],
    folder: str | Path = "",
) -> Figure:
    """Record a paper figure's numbers as facts of the notebook, and write the figure if a folder is given.

    Parameters
    ----------
    name : str
        Such as "haas-fig4"; a string literal, by which `workbench figure` finds the notebook.
    figure : matplotlib Figure
        Without a caption, which a paper typesets itself.
    title : str
        Subject and number in the paper; a string literal.
    caption : str
        Shown below the figure in the notebook, and kept in the record.
    table : DataFrame
        The numbers drawn.
    numbers : mapping of str to Estimate
        The numbers behind the claims. Each becomes the fact `NAME.NUMBER`; the verdicts are displayed below.
    sources : mapping of str to Model, Classifier or LabelledImages
        Inputs of the numbers, by role: "model", "labeller", "judge", "images".
    folder : path, optional
        Folder for `NAME.json`, and the figure at column width (`NAME-single`) and page width (`NAME-double`) as PDF,
        SVG and PNG; empty writes nothing.

    Returns
    -------
    matplotlib Figure
        With its caption, for the notebook to display.
    """
    if numbers:
        record_facts({f"{name}.{number}": estimate for number, estimate in numbers.items()})
    claims = [claim for claim in load_claims() if claim.figure == name and claim.number in numbers]
    verdicts = {claim.text: claim.verdict(numbers[claim.number].low, numbers[claim.number].high) for claim in claims}
    if verdicts:
        display(Markdown("\n".join(f"- **{verdict}**: {text}" for text, verdict in verdicts.items())))
    if folder:
        folder = paths.writable(folder, folder=True)
        for width, inches in WIDTHS.items():
            save_files(resized(copy.deepcopy(figure), inches), folder / f"{name}-{width}")
        record = {"figure": name, "title": title, "caption": caption}
        record["numbers"] = {number: vars(estimate) for number, estimate in numbers.items()}
        record["table"] = json.loads(table.to_json(orient="records", double_precision=6))
        record["provenance"] = _provenance(name, sources)
        write_text(folder / f"{name}.json", json.dumps(record, indent=1) + "\n")
    add_caption(figure, caption)
    return figure


def draw_figure(
    name: str | Sequence[str],
    *,
    out: str | Path,
    parameters: Mapping[str, object] | None = None,
    profile: str | None = None,
) -> list[Path]:
    """Run the notebook that has a figure, or those that have several, and let them write their figures to a folder.

    Parameters
    ----------
    name : str or sequence of str
        Of `list_figures`; "all" is all of them. Each notebook runs once.
    out : path
        Folder. The executed notebooks go there too, with all other figures that they save.
    parameters : mapping, optional
        Of the notebooks; texts are read by the types that a notebook declares. Each notebook takes those it has.
    profile : str, optional
        Takes the notebooks' other parameters from `profiles/PROFILE.yaml`; by default they are the notebooks' own.

    Returns
    -------
    list of Path
        The files of the given figures.

    Raises
    ------
    ValueError
        If there is no such figure, or none of the notebooks has one of the parameters. Nothing has run then.
    NotebookFailed
        At the end, if a notebook failed. The others have run.
    """
    # A notebook's kernel, which imports this module, does not need papermill.
    from workbench.report.notebooks import NotebookFailed, raise_failures, run_notebook
    from workbench.report.parameters import DOMAIN, notebook_parameters, read_parameters
    from workbench.report.plans import read_profile

    out = paths.writable(out, folder=True).absolute()
    known, parameters = list_figures(), parameters or {}
    names = [name] if isinstance(name, str) else list(name)
    names = list(known) if names == ["all"] else names
    for each in names:
        if each not in known:
            raise ValueError(f"there is no figure {each!r}; `workbench figure --list` has {', '.join(known)}")
    notebooks = list(dict.fromkeys(known[each].notebook for each in names))
    given = read_profile(profile, notebooks) if profile else None
    plan = given.parameters if given else {notebook: {} for notebook in notebooks}
    options = {"timeout": given.timeout} if given else {}
    taken = {n: {DOMAIN, *notebook_parameters(n)} & parameters.keys() for n in notebooks}
    for key in parameters:
        if not any(key in keys for keys in taken.values()):
            raise ValueError(f"{' and '.join(notebooks)} have no parameter {key!r}; see `workbench run NAME --list`")
    for notebook, keys in taken.items():
        plan[notebook] |= read_parameters(notebook, {key: parameters[key] for key in sorted(keys)})
        plan[notebook]["figures"] = str(out)
    failures = []
    for notebook in notebooks:
        try:
            run_notebook(notebook, plan[notebook], out / f"{notebook}.ipynb", **options)
        except NotebookFailed as failure:
            failures.append(failure)
    raise_failures(failures)
    return [path for each in names for path in [*out.glob(f"{each}.json"), *sorted(out.glob(f"{each}-[sd]*.*"))]]


def read_records(*, model: Model, **sources: object) -> dict[str, dict]:
    """The recorded numbers of every figure, and of the benchmark, as far as they were measured on the same sources.

    Parameters
    ----------
    model : Model
        Its records are in `data/records/NAME`.
    **sources : Classifier or LabelledImages
        By role, as in `save_figure`. Leaves out a record of another model, or of another source in one of these roles.

    Returns
    -------
    dict of str to dict
        By name, as `save_figure` writes them, and "current": whether the notebook and all that it calls of the
        workbench are still the same.
    """
    wanted = {role: _identity(source)["hash"] for role, source in ({"model": model} | sources).items()}
    known, records = list_figures(), _of_benchmark(model, wanted)
    for path in sorted((paths.data() / "records" / model.name).glob("*.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        made, about = known.get(record["figure"]), record["provenance"]
        measured_on = {role: source["hash"] for role, source in about["sources"].items()}
        if any(measured_on.get(role, value) != value for role, value in wanted.items()):
            continue
        current = made is not None and about["code"] == _code_hash(made.notebook)
        records[record["figure"]] = {**record, "current": current}
    return records


def _of_benchmark(model: Model, wanted: Mapping[str, str]) -> dict[str, dict]:
    """The differences of methods that claims name, by the recorded benchmark of the model if there is one."""
    from workbench.benchmark.leaderboard import difference
    from workbench.benchmark.records import load_benchmark, record_folder, source_hashes

    if not record_folder(model).is_dir():
        return {}
    found = load_benchmark(record_folder(model))
    known = source_hashes(found.provenance) | {"model": found.provenance["model"]["hash"]}
    if any(known[role] != value for role, value in wanted.items()):
        return {}
    pairs = {claim.number: claim.number.split(" less ") for claim in load_claims() if claim.figure == BENCHMARK}
    there = {name: pair for name, pair in pairs.items() if set(pair) <= set(found.protocol.methods)}
    numbers = {name: vars(difference(found.edits, *pair)) for name, pair in there.items()}
    return {BENCHMARK: {"figure": BENCHMARK, "numbers": numbers, "current": found.current}}


def domain_records() -> dict[str, dict[str, dict]]:
    """Bundled records of the model of every domain, by the domain's name, as of `read_records`."""
    from workbench.datasets.domain import DOMAINS
    from workbench.diffusion.loading import load_model

    return {domain.name: read_records(model=load_model(domain.model, device="cpu")) for domain in DOMAINS}


def resized(figure: Figure, width: float) -> Figure:
    """The figure at another width on paper, with all that is drawn on it, letters as far as they stay legible.

    Parameters
    ----------
    figure : matplotlib Figure
        Changed in place.
    width : float
        In inches.

    Returns
    -------
    Figure
    """
    laid_out = figure.get_layout_engine() is not None
    with style.context(STYLE):
        factor = width / _drawn_width(figure)
        # Letters don't shrink below what is legible: what has a layout of its own keeps some height for them.
        _scale(figure, factor, factor**0.5 if laid_out else factor)
        for axis in (axis for axes in figure.axes for axis in (axes.xaxis, axes.yaxis)):
            sizes = [label.get_fontsize() for label in axis.get_ticklabels()[:1]]
            axis.set_tick_params(labelsize=max([SMALLEST, *(size * factor for size in sizes)]))
        ticks = {id(label) for axes in figure.axes for a in (axes.xaxis, axes.yaxis) for label in a.get_ticklabels()}
        for text in figure.findobj(Text):
            if id(text) not in ticks:
                text.set_fontsize(max(SMALLEST, text.get_fontsize() * factor))
        for _ in range(8):
            factor = width / _drawn_width(figure)
            if abs(factor - 1.0) < 1e-3:
                break
            _scale(figure, factor, 1.0 if laid_out else factor)
    return figure


def _drawn_width(figure: Figure) -> float:
    """Width in inches of all that is drawn, labels outside of the axes too."""
    figure.draw_without_rendering()
    return figure.get_tightbbox(FigureCanvasAgg(figure).get_renderer()).width


def _scale(figure: Figure, across: float, up: float) -> None:
    figure.set_size_inches(figure.get_figwidth() * across, figure.get_figheight() * up)


def _provenance(name: str, sources: Mapping[str, object]) -> dict:
    """Inputs of a figure's numbers, with the parameters of the running notebook."""
    about = {"workbench": __version__, "sources": {role: _identity(source) for role, source in sources.items()}}
    made, shell = list_figures().get(name), get_ipython()
    if made is None or shell is None:
        return about | {"notebook": None, "parameters": {}, "code": None}
    _, first = next(_code_cells(paths.notebooks() / f"{made.notebook}.ipynb"))
    names = [statement.target.id for statement in first.body if isinstance(statement, ast.AnnAssign)]
    values = {name: shell.user_ns[name] for name in names if name in shell.user_ns and name != "figures"}
    return about | {"notebook": made.notebook, "parameters": values, "code": _code_hash(made.notebook)}


def _identity(source: object) -> dict:
    """Name and content hash of a model with its condition, a classifier or labelled images."""
    condition = getattr(source, "condition", None)
    return {
        "name": getattr(source, "name", ""),
        "hash": source.hash if condition is None else f"{source.hash}-{condition.hash}",
    }


def _code_hash(notebook: str) -> str:
    """Digest of a notebook's code and of the modules that it measures with; those that draw or report don't count."""
    texts, modules, exported = [], set(), _NAMES | _MODULES
    for text, tree in _code_cells(paths.notebooks() / f"{notebook}.ipynb"):
        texts.append(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("workbench"):
                modules |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
            elif isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "wb":
                modules.add(f"workbench.{exported.get(node.attr)}")
    package = Path(__file__).parents[2]
    files = {module for module in modules if (package / module.replace(".", "/")).with_suffix(".py").is_file()}
    measure = sorted(module for module in files if not module.startswith("workbench.report."))
    return hashlib.sha256("\n".join([*texts, code_hash(*measure) if measure else ""]).encode()).hexdigest()[:16]


def _code_cells(path: Path) -> Iterator[tuple[str, ast.Module]]:
    """Source and tree of a notebook's code cells, the parameters first; cells that are no plain Python are left out."""
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "code":
            with contextlib.suppress(SyntaxError):  # magics
                yield text, ast.parse(text)


def _calls(path: Path, function: str) -> Iterator[ast.Call]:
    """Calls of a function in a notebook."""
    for _, tree in _code_cells(path):
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) == function:
                yield node
