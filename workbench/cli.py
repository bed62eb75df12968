"""The `workbench` command: thin shells around the functions of the package.

A usage error is one sentence on stderr and exit status 2; a failing notebook is exit status 1.
"""

import os
import sys
import time
import warnings
from typing import Annotated, Literal

import typer
from tqdm.auto import tqdm
from typer import Argument, Option

from workbench import paths
from workbench.commands import benchmark, doctor, edits, models  # noqa: F401 (they register their commands)
from workbench.commands.options import OutFolder, Parameters, app, assignments, command

EXAMPLES = """\b
examples:
  workbench models                                models to load
  workbench sample avataaars32 -o samples.png     images
  workbench extract avataaars32 --n 512           their h-space, on disk
  workbench find pca avataaars32 --k 5            directions in it, saved under data/directions
  workbench studio --model avataaars32            edit with sliders in the browser
  workbench run 20_geometry -p n 512              a notebook as a report; --list shows its parameters
  workbench report                                all notebooks, and reports/index.html
  workbench doctor                                installed versions, and missing dependencies of each feature
"""


@app.callback(epilog=EXAMPLES)
def _start(debug: Annotated[bool, Option("--debug", help="show the traceback of an error")] = False):
    """Explore the bottleneck space (h-space) of diffusion models."""


@command(
    "run",
    example="""workbench run 10_extract -p n 512 -p steps 20
  workbench run 20_geometry -p domain eurosat
  workbench run 10_extract --list""",
)
def run(
    notebook: Annotated[str | None, Argument(help="name or number, e.g. 10_extract or 10")] = None,
    parameter: Parameters = None,
    show: Annotated[bool, Option("--list", help="list its parameters; without a notebook, list all")] = False,
    out: Annotated[str | None, Option("-o", "--out", help="executed notebook (default: reports/NAME.ipynb)")] = None,
    pdf: Annotated[bool, Option("--pdf", help="also print the report, with a Chromium")] = False,
    slides: Annotated[bool, Option("--slides", help="also write slides: one per section, in one HTML file")] = False,
):
    """Run one notebook as a report, or list its parameters."""
    from workbench.report import notebooks, parameters, printing

    if notebook is None and not show:
        raise ValueError("name a notebook; `workbench run --list` shows them")
    if notebook is None:
        print("\n".join(parameters.list_notebooks()))
    elif show:
        for each in parameters.notebook_parameters(notebook).values():
            print(f"{each.name:16s} {each.type:11s} {each.default!s:20s} {each.help}")
    else:
        given = parameters.read_parameters(notebook, assignments(parameter))
        if pdf:
            printing.find_browser()  # before the notebook runs
        report = notebooks.run_notebook(notebook, given, out, vectors=pdf or slides)
        print(report.html)
        try:
            for wanted, make in ((pdf, printing.print_pdf), (slides, printing.write_slides)):
                if wanted:
                    print(make(report.vectors))
        finally:
            if report.vectors is not None:
                report.vectors.unlink()


@command("figure", example="workbench figure haas-fig4 -p n 128 --out figures\n  workbench figure --list")
def figure(
    names: Annotated[list[str] | None, Argument(help="names from `workbench figure --list`, or all")] = None,
    show: Annotated[bool, Option("--list", help="list the figures with their notebooks and titles")] = False,
    profile: Annotated[str | None, Option(help="parameters of the notebooks, from profiles/PROFILE.yaml")] = None,
    parameter: Parameters = None,
    out: OutFolder = "figures",
):
    """Draw a figure of the papers, with its numbers.

    Runs the notebook of the figure; writes the figure as PDF, SVG and PNG, and its numbers as JSON.
    """
    from workbench.report import figures

    if show:
        for each in figures.list_figures().values():
            print(f"{each.name:12s} {each.notebook:16s} {each.title}")
    elif not names:
        raise ValueError("name a figure, or `all`; `workbench figure --list` shows them")
    else:
        for path in figures.draw_figure(names, out=out, parameters=assignments(parameter), profile=profile):
            print(path.resolve())


@command("report", example="workbench report --profile full --only 00 10")
def report(
    profile: Annotated[
        str, Option(help="a file of profiles/: quick (minutes), standard, full (days on a CPU), ...")
    ] = "quick",
    domain: Annotated[
        Literal["avataaars", "eurosat"] | None,
        Option(help="use this domain's model, images, classifiers and attributes; writes to reports/DOMAIN"),
    ] = None,
    jobs: Annotated[int | None, Option(help="notebooks run in parallel (default: as cores and memory allow)")] = None,
    only: Annotated[list[str] | None, Option(metavar="NOTEBOOK...", help="run only these notebooks")] = None,
):
    """Run the notebooks, and write reports/index.html."""
    start = time.monotonic()
    from workbench.report import reports  # takes seconds, part of the reported time

    before = set(paths.cache().glob("*.zarr"))
    reports.report(profile, domain=domain, only=only, jobs=jobs, since=start)
    made = len(set(paths.cache().glob("*.zarr")) - before)
    print(f"extractions: {f'{made} made, and kept in' if made else 'all from'} {paths.cache()}")
    print(f"report: {paths.reports() / (domain or '') / 'index.html'} ({time.monotonic() - start:.0f} s)")


@command("sweep", example="workbench sweep seeds.yaml --workers 2")
def sweep(
    file: Annotated[str, Argument(help="YAML file with notebooks, common, matrix and timeout")],
    workers: Annotated[int | None, Option(help="parallel runs here (default: as cores and memory allow)")] = None,
    scheduler: Annotated[str | None, Option(help="address of a dask scheduler, such as tcp://host:8786")] = None,
):
    """Run notebooks over a matrix of parameters, in parallel."""
    from workbench.report.sweep import sweep

    table = sweep(file, scheduler=scheduler, workers=workers)
    counts = table["status"].value_counts()
    print(", ".join(f"{counts[status]} {status}" for status in ("done", "cached", "failed") if status in counts))
    print(f"sweep: {paths.reports() / 'sweeps' / paths.local(file).stem / 'index.html'}")
    return int("failed" in counts)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"] or ["--help"]
    shown = warnings.showwarning
    # Warnings print as one sentence, like errors, and above a progress bar instead of at its end.
    warnings.showwarning = lambda message, *_, **__: tqdm.write(f"workbench: {message}", file=sys.stderr)
    group = typer.main.get_command(app)
    try:
        with group.make_context("workbench", words) as context:
            status = group.invoke(context) or 0
        sys.stdout.flush()
        return status
    except typer.Exit as stop:  # --help has been shown
        return stop.exit_code
    except BrokenPipeError:  # whoever read the output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        return 130
    except (typer.TyperException, ValueError, OSError, RuntimeError, ImportError) as error:
        if debug:
            raise
        print(f"workbench: {_sentence(error)}", file=sys.stderr)
        return 1 if type(error).__name__ == "NotebookFailed" else 2
    finally:
        warnings.showwarning = shown


def _sentence(error: Exception) -> str:
    if isinstance(error, typer.TyperException):
        text = " ".join(error.format_message().split()).removesuffix(".")
        # For a value that is not a number, typer names the expected type but not the value.
        details = error.__cause__.errors()[0] if hasattr(error.__cause__, "errors") else {}
        given = f" (given: {details['input']!r})" if details.get("type", "value_error") != "value_error" else ""
        name = error.ctx.command_path if getattr(error, "ctx", None) else "workbench"
        return f"{text.replace('Value error, ', '')}{given}; see `{name} --help`"
    # The text of an OSError begins with its number; strerror, if set, is the sentence alone.
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    if isinstance(error, OSError) and error.filename and str(error.filename) not in text:
        return f"{error.filename}: {text}"
    return text


if __name__ == "__main__":
    sys.exit(main())
