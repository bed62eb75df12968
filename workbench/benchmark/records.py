"""Recorded benchmarks: read again without measuring, and a new method measured beside them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pandas as pd

from workbench import paths
from workbench.benchmark.protocol import Protocol
from workbench.benchmark.results import TABLES, Benchmark, identities
from workbench.benchmark.tables import read_edits, read_strips
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.models import Model, refuse_other_model
from workbench.io import one_of

SHARE = 4
"""A new method is measured on one in so many of a record's held-out samples."""

FEWEST = 8
"""Held-out samples, at least."""

SAME_SAMPLE = 0.02
"""Mean difference, at most, of the probabilities of the same samples before an edit: other devices, other last bits."""


def record_folder(model: Model) -> Path:
    """Where the recorded benchmark of a bundled model is, if there is one."""
    return paths.data() / "records" / model.name / "benchmark"


def load_benchmark(folder: str | Path | None = None, *, model: Model | None = None) -> Benchmark:
    """Read a benchmark that `Benchmark.save` wrote, without measuring anything.

    Parameters
    ----------
    folder : path, optional
        By default the record of the model, `data/records/MODEL/benchmark`.
    model : Model, optional
        Whose benchmark it must be.

    Returns
    -------
    Benchmark
        Rounded if it was saved so (a record is).

    Raises
    ------
    FileNotFoundError
        If there is none.
    ValueError
        If neither a folder nor a model is given, or the benchmark is of another model.
    """
    if folder is None:
        if model is None:
            raise ValueError("give the folder of a benchmark, or the model whose record is meant")
        folder = record_folder(model)
        if not folder.is_dir():
            known = sorted(found.parent.name for found in (paths.data() / "records").glob("*/benchmark"))
            raise FileNotFoundError(
                f"there is no recorded benchmark of {model.name!r}, only of {', '.join(known) or 'no model'}; "
                "measure it by `workbench benchmark` without --records"
            )
    folder = paths.local(folder)
    missing = [name for name in ("edits.parquet", "strips.parquet", "provenance.json") if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(f"there is no benchmark in {folder}, which lacks {missing[0]}")
    about = json.loads((folder / "provenance.json").read_text(encoding="utf-8"))
    if model is not None:
        refuse_other_model(f"the benchmark in {folder}", about["model"], model.provenance())
    protocol = about["protocol"]
    lists = {name: tuple(protocol[name]) for name in ("methods", "attributes")}
    options = {"keep_default_na": False, "na_values": [""]}
    return Benchmark(
        Protocol(**protocol | lists),
        edits=read_edits(folder / "edits.parquet"),
        strips=read_strips(folder / "strips.parquet"),
        provenance=about,
        **{name: pd.read_csv(folder / f"{name}.csv", **options) for name in TABLES},
    )


def protocol_against(
    record: Benchmark,
    methods: Sequence[str],
    *,
    model: Model,
    labeller: Classifier,
    judge: Classifier,
    images: LabelledImages,
    attributes: Sequence[str] | None = None,
    held_out: int | None = None,
    repeats: int = 1,
) -> Protocol:
    """The protocol by which new methods are measured beside those of a record.

    Parameters
    ----------
    record : Benchmark
    methods : sequence of str
        The new ones.
    model, labeller, judge, images
        As of `run_benchmark`.
    attributes : sequence of str, optional
        Some of the record's; by default all.
    held_out : int, optional
        Number of the record's samples, its first ones; by default a quarter, or 8 if that is fewer.
    repeats : int
        Number of the record's populations, its first ones.

    Returns
    -------
    Protocol
        Steps, population, seeds and all else as in the record, but without samples of other seeds and timesteps.

    Raises
    ------
    ValueError
        If the model, labeller, judge or images are not the record's, or an attribute or number exceeds it.
    """
    _refuse_other_sources(record, identities(model, labeller=labeller, judge=judge, images=images))
    known = record.protocol
    attributes = known.attributes if attributes is None else attributes
    for name in attributes:
        one_of("attribute of the record", name, known.attributes)
    held_out = min(known.held_out, max(FEWEST, known.held_out // SHARE)) if held_out is None else held_out
    _refuse_more(known, held_out=held_out, repeats=repeats)
    fewer = {"held_out": held_out, "repeats": repeats, "shown": min(known.shown, held_out), "transfer": False}
    return replace(known, methods=tuple(methods), attributes=tuple(attributes), **fewer)


def against(record: Benchmark, measured: Benchmark) -> Benchmark:
    """A benchmark of a record's methods and new ones, on the attributes, samples and populations of the new ones.

    Parameters
    ----------
    record : Benchmark
    measured : Benchmark
        By the protocol of `protocol_against`.

    Returns
    -------
    Benchmark
        `edits`, `costs` and `skipped` of all methods; `realism`, `transfer` and `strips` of the new ones. A new method
        with the name of a recorded one becomes "NAME (new)". Their names are in `provenance["new"]`.

    Raises
    ------
    ValueError
        If the two are of other models, labellers, judges, images, protocols or samples.
    """
    _refuse_other_sources(record, measured.provenance)
    own, known = measured.protocol, record.protocol
    for name in ("population", "labelled", "steps", "eta", "t", "seed"):
        if getattr(own, name) != getattr(known, name):
            raise ValueError(f"{name} is {getattr(own, name)}, and {getattr(known, name)} in the record")
    _refuse_more(known, held_out=own.held_out, repeats=own.repeats)
    names = {name: f"{name} (new)" if name in known.methods else name for name in own.methods}
    tables = {name: getattr(measured, name) for name in ("edits", *TABLES)}
    new = replace(
        measured,
        strips={(names[method], attribute): strip for (method, attribute), strip in measured.strips.items()},
        **{name: table.assign(method=table["method"].replace(names)) for name, table in tables.items()},
    )
    both = {}
    for name in ("edits", "costs", "skipped"):
        old = getattr(record, name)
        old = old[old["attribute"].isin(own.attributes) & (old["repeat"] < own.repeats)]
        if name == "edits":
            old = old[old["seed"].isin(new.edits["seed"].unique())]
            _refuse_other_samples(old, new.edits)
        both[name] = pd.concat([part for part in (old, getattr(new, name)) if len(part)] or [old], ignore_index=True)
    about = {
        key: record.provenance[key] | {names[name]: value for name, value in measured.provenance[key].items()}
        for key in ("unit", "family", "what")
    }
    protocol = replace(own, methods=(*known.methods, *names.values()))
    about |= {"protocol": dict(vars(protocol)), "new": list(names.values())}
    return replace(new, **both, protocol=protocol, provenance=measured.provenance | about)


def source_hashes(about: Mapping) -> dict[str, str | None]:
    """Hashes of the labeller, judge and images of a benchmark's provenance, by role."""
    # A classifier is name and hash; the name may be a path.
    sources = {role: about[role] for role in ("labeller", "judge", "images")}
    return {role: each[-1] if isinstance(each, list) else each for role, each in sources.items()}


def _refuse_other_sources(record: Benchmark, given: dict) -> None:
    refuse_other_model("the record", record.provenance["model"], given["model"])
    own = source_hashes(given)
    for what, known in source_hashes(record.provenance).items():
        if known != own[what] or known is None:
            sources = f"{record.provenance[what]} and not {given[what]}"
            raise ValueError(f"the record has another {what}, {sources}; give the record's")


def _refuse_more(known: Protocol, **given: int) -> None:
    for name, value in given.items():
        if value > getattr(known, name):
            raise ValueError(f"{name} is {value}; the record has {getattr(known, name)}")


def _refuse_other_samples(old: pd.DataFrame, new: pd.DataFrame) -> None:
    key = ["attribute", "seed"]
    first, second = (part.drop_duplicates(key).set_index(key)["before"] for part in (old, new))
    gap = (first - second).abs().mean()  # of those that both have
    if gap > SAME_SAMPLE:
        raise ValueError(f"the samples differ from the record's by {gap:.2g} before any edit; measure the record again")
