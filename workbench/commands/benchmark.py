"""The command that compares the methods."""

import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

import workbench as wb
from workbench import paths
from workbench.commands import options as opt
from workbench.commands.options import check_attributes, command

SHOWN = "new success success_low success_high change leakage entanglement psnr_outside identity p_random".split()
"""Columns of the leaderboard that are printed."""


@dataclasses.dataclass
class Size:
    """Sizes and sampling of a benchmark; the defaults are those of --quick, of the full benchmark or of the record."""

    population: Annotated[int | None, Option(help="samples, and labelled images, to find directions in")] = None
    held_out: Annotated[int | None, Option(help="samples to edit")] = None
    repeats: Annotated[int | None, Option(help="number of populations, each with its own seeds")] = None
    steps: Annotated[int | None, Option(help="visited timesteps")] = None
    eta: Annotated[float | None, Option(help="step noise: 0 is DDIM, 1 DDPM (default)")] = None


@command(
    "benchmark",
    example="""workbench benchmark --quick --methods PCA 'mean difference' -o benchmark
  workbench benchmark --records
  workbench benchmark --plugin mine.py --against records""",
)
def benchmark(
    size: Size,
    labels: opt.Labels,
    condition: opt.Condition,
    model: Annotated[str, Argument(help="bundled name, diffusers folder, hub id or checkpoint file")] = "avataaars32",
    quick: Annotated[bool, Option("--quick", help="few samples and three attributes: minutes, not hours")] = False,
    records: Annotated[bool, Option("--records", help="show the recorded benchmark of the model")] = False,
    against: Annotated[
        str | None, Option(metavar="RECORD", help="measure beside `records`, or a folder that a benchmark wrote")
    ] = None,
    methods: Annotated[
        list[str] | None, Option(metavar="METHOD...", help="default: all, or with --against the plugin's")
    ] = None,
    attributes: opt.Attributes = None,
    plugin: Annotated[str | None, Option(help="Python file that registers more methods")] = None,
    seed: Annotated[int, Option(help="seed of populations and held-out samples")] = 0,
    images: opt.LabelledSource = "avataaars",
    labeller: opt.Labeller = "avataaars",
    judge: opt.Judge = "avataaars-judge",
    device: opt.Device = None,
    workers: Annotated[int | None, Option(help="processes (default: one per core, or one on a GPU)")] = None,
    scheduler: Annotated[str | None, Option(help="address of a dask scheduler, such as tcp://host:8786")] = None,
    small: Annotated[bool, Option("--small", help="round the tables, as in data/records")] = False,
    no_report: Annotated[bool, Option("--no-report", help="leave out the HTML of 80_benchmark")] = False,
    out: opt.OutFolder = "benchmark",
):
    """Compare methods on the same held-out samples.

    Writes tables, curves, strips and, without --no-report, the report 80_benchmark. With --against, measures new
    methods alone, on a quarter of a record's samples (--held-out), and ranks them among the recorded methods there.
    """
    import runpy

    from workbench.benchmark import leaderboard
    from workbench.benchmark import records as recorded
    from workbench.benchmark.methods import METHODS
    from workbench.benchmark.protocol import QUICK_ATTRIBUTES, SIZES
    from workbench.benchmark.run import plan_benchmark
    from workbench.benchmark.study import TextModels

    bundled = set(METHODS)
    if plugin is not None:
        runpy.run_path(str(paths.local(plugin)))
    network = wb.load_model(model, device=device, **condition.condition)
    given = {f"--{name.replace('_', '-')}": value is not None for name, value in vars(size).items()}
    given |= {"--quick": quick, "--seed": seed}
    if records:
        chosen = {"--methods": methods, "--attributes": attributes, "--plugin": plugin, "--against": against}
        chosen |= {"--images": images != "avataaars", "--labels": labels.labels}
        chosen |= {"--labeller": labeller != "avataaars", "--judge": judge != "avataaars-judge"}
        _refuse(given | chosen, "--records")
        record = wb.load_benchmark(model=network)
        _print(record, leaderboard.leaderboard(record.edits), recorded.record_folder(network))
        if not no_report:
            parameters = {"recorded": True, "model_name": model, "condition": condition.condition}
            print(wb.run_notebook("80_benchmark", parameters, Path(out) / "80_benchmark.ipynb").html)
        return
    labels_by, judged_by = (wb.load_classifier(each, device=device) for each in (labeller, judge))
    sources = {"labeller": labels_by, "judge": judged_by, "images": labels.load(images, network.image_shape)}
    if against is not None:
        free = ("--held-out", "--repeats")
        _refuse({option: value for option, value in given.items() if option not in free}, "--against")
        record = wb.load_benchmark(None if against == "records" else against, model=network)
        options = {"attributes": attributes, "held_out": size.held_out, "repeats": size.repeats or 1}
        protocol = recorded.protocol_against(
            record, _chosen(methods, METHODS, bundled), model=network, **sources, **options
        )
    else:
        usual = [name for name in judged_by.attributes if not quick or name in QUICK_ATTRIBUTES]
        attributes = attributes or usual or list(judged_by.attributes)
        check_attributes(attributes, judged_by.attributes)
        sizes = SIZES["quick" if quick else "full"] | {k: v for k, v in vars(size).items() if v is not None}
        protocol = wb.Protocol(
            tuple(methods or METHODS), tuple(attributes), **sizes, labelled=sizes["population"], seed=seed
        )
    sources["masks"] = wb.domain_of(images).masks(protocol.attributes, size=network.image_shape)
    sources["texts"] = TextModels.of_domain(wb.domain_of(images))
    print(plan_benchmark(network, protocol, **sources), flush=True)
    workers = (os.cpu_count() if network.device.type == "cpu" else 1) if workers is None else workers
    result = wb.run_benchmark(network, protocol, **sources, workers=workers, scheduler=scheduler)
    if against is not None:
        result = recorded.against(record, result)
    folder = result.save(out, small=small)
    table = leaderboard.leaderboard(result.edits)
    if new := result.provenance.get("new"):
        table.insert(0, "new", ["new" if name in new else "" for name in table.index])
    table.to_csv(folder / "leaderboard.csv")
    _draw(result, folder)
    _print(result, table, folder)
    if not no_report and plugin is None and against is None:
        parameters = sizes | {"seed": seed, "attributes": attributes, "methods": list(protocol.methods)}
        parameters |= {"model_name": model, "classifier_name": labeller, "judge_name": judge, "images_name": images}
        parameters |= {"labels_name": labels.labels or "", "skip_broken": labels.skip_broken}
        parameters |= {"condition": condition.condition}
        print(wb.run_notebook("80_benchmark", parameters, folder / "80_benchmark.ipynb").html)


def _refuse(given: dict[str, object], by: str) -> None:
    """What a record decides can't be given beside it."""
    for option, value in given.items():
        if value:
            raise ValueError(f"{option} is given, and {by} takes it from the record; leave it out")


def _chosen(methods: Sequence[str] | None, known: Sequence[str], bundled: set[str]) -> list[str]:
    """The given methods, or those that the plugin registered."""
    chosen = list(methods or (name for name in known if name not in bundled))
    if not chosen:
        raise ValueError("--against has nothing to measure; give --methods, or a --plugin that registers some")
    return chosen


def _draw(result, folder: Path) -> None:
    """Curves, and strips of each attribute."""
    from workbench.benchmark import leaderboard
    from workbench.benchmark.protocol import HELD_OUT

    figure = wb.plots.pareto(leaderboard.pareto(result.edits), family=result.provenance["family"])
    wb.plots.save_figure(figure, folder / "pareto")
    seeds = [f"seed {seed % HELD_OUT}" for seed in result.provenance["shown"][:2]]
    for attribute in sorted({of for _, of in result.strips}):
        strips = wb.plots.edit_strips(result.strips, attribute, names=seeds)
        wb.plots.save_figure(strips, folder / f"strips-{paths.file_name(attribute)}")


def _print(result, table, folder: Path) -> None:
    shown = table[[name for name in SHOWN if name in table]].round(2)
    print(f"{result}\n{shown.to_string()}\n{folder.resolve()}")
