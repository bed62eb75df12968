"""Results of a benchmark, as tables."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from workbench import __version__, paths
from workbench.analysis.image_metrics import (
    diversity,
    frechet_distance,
    frechet_distance_interval,
    kernel_distance,
    kernel_distance_interval,
)
from workbench.analysis.intervals import mean_interval
from workbench.benchmark.bench import Bench, Cell
from workbench.benchmark.methods import METHODS
from workbench.benchmark.protocol import LADDER, MIDDLE, Protocol
from workbench.benchmark.tables import probability, write_edits, write_strips
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.models import Model
from workbench.io import as_json, code_hash


@dataclass(frozen=True, eq=False)
class Benchmark:
    """Measurements of a benchmark.

    Attributes
    ----------
    protocol : Protocol
    edits : DataFrame
        One row per method, attribute, population (`repeat`), strength (`scale`) and held-out sample (`seed`): the
        judge's probability of the attribute `before` and `after`, its `logit` after; the change of the image (`rms`),
        `psnr`, `psnr_outside` of the attribute's region, `perceptual`, `identity`; with text models `s_dir` and
        `clip_gain`; with a segmenter `consistency`; and `change NAME`, the change of every attribute's probability.
    transfer : DataFrame
        One row per method, attribute, population and kind ("population", "other steps"): mean `effect` on samples
        without the attribute with its 95% interval `low`, `high`; the effect on `held_out` samples at the same `scale`
        (for "other steps" with the same seeds); and the number of samples of the effect, `n`.
    realism : DataFrame
        One row per method, strength (`position` in `LADDER`) and feature space: `frechet` and `kernel`
        distance of edited images from real ones, each sample with one attribute edited, with `..._low` and `..._high`;
        `diversity` relative to the plain samples; `n`, the samples of a set. "real" compares as many real images with
        other real images; it and the plain samples are the floor.
    costs : DataFrame
        One row per method and attribute: `passes`, `scored`, `labels` and `seconds` to find the edit and its strength,
        `edit_passes` of one edit, and `scale`, the strength that changes samples of the population by `CHANGE`.
    skipped : DataFrame
        One row per method and attribute without a result, and the `reason`.
    strips : dict of (method, attribute) -> ndarray of shape (shown, 1 + scales, C, H, W), float32
        The plain sample and its edits, from the first population.
    provenance : dict
    """

    protocol: Protocol
    edits: pd.DataFrame = field(repr=False)
    transfer: pd.DataFrame = field(repr=False)
    realism: pd.DataFrame = field(repr=False)
    costs: pd.DataFrame = field(repr=False)
    skipped: pd.DataFrame = field(repr=False)
    strips: dict[tuple[str, str], np.ndarray] = field(repr=False)
    provenance: dict = field(repr=False)

    def save(self, folder: str | Path, *, small: bool = False) -> Path:
        """Write the tables and strips, for `load_benchmark` and for other programs.

        Parameters
        ----------
        folder : path
        small : bool
            Write a record. Changes of probabilities are rounded to 1/500; `identity`, `s_dir`, `clip_gain` and
            `consistency` to 1/1000; `logit`, `rms`, `psnr_outside` and `perceptual` to 3 significant digits (a
            logit from 10 on to 1/100). `after` and `psnr` follow from these, so that whether a sample has the attribute
            is exact. The strips are of two samples, and lossy. 27 methods, 14 attributes, 4 strengths, 128 samples and
            one population take below 5 MB.

        Returns
        -------
        Path
            The folder, with `edits` as Parquet and, unless `small`, as CSV; `strips` as WebP in Parquet; the other
            tables as CSV; the provenance as JSON.
        """
        folder = paths.writable(folder, folder=True)
        folder.mkdir(parents=True, exist_ok=True)
        write_edits(self.edits, folder / "edits.parquet", small=small)
        write_strips(self.strips, folder / "strips.parquet", small=small)
        if not small:
            self.edits.to_csv(folder / "edits.csv", index=False)
        for name in TABLES:
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        (folder / "provenance.json").write_text(as_json(self.provenance, indent=1) + "\n", encoding="utf-8")
        return folder

    @property
    def current(self) -> bool:
        """Whether the code that finds and measures is still that of these measurements."""
        return self.provenance["code"] == code_hash(Bench.__module__)

    def __repr__(self) -> str:
        p = self.protocol
        return (
            f"Benchmark({len(p.methods)} methods, {len(p.attributes)} attributes, {p.held_out} held-out samples, "
            f"{p.repeats} population{'s' if p.repeats > 1 else ''} of {p.population}, {len(self.edits)} edits)"
        )


def gather(bench: Bench, cells: Mapping[tuple[str, str, int], Cell]) -> Benchmark:
    """The tables of all cells."""
    there = {key: cell for key, cell in cells.items() if cell.tensors}
    about = [dict(zip(KEY, key, strict=True)) | cell.about for key, cell in cells.items()]
    methods = {name: METHODS[name] for name in bench.protocol.methods}
    plain = bench.held_out.images[bench.shown].clamp(-1, 1).numpy()[:, None]
    strips = {
        (m, a): np.concatenate([plain, cell.tensors["shown"].numpy() / np.float32(127.5) - 1], axis=1)
        for (m, a, r), cell in there.items()
        if r == 0
    }
    return Benchmark(
        bench.protocol,
        edits=_edits(bench, there),
        transfer=_transfer(bench, there),
        realism=_realism(bench, there),
        costs=pd.DataFrame([row for row in about if "reason" not in row]),
        skipped=pd.DataFrame([row for row in about if "reason" in row], columns=[*KEY, "reason"]),
        strips=strips,
        provenance={
            "workbench": __version__,
            "code": bench.code,
            "protocol": dict(vars(bench.protocol)),
            **identities(bench.model, labeller=bench.labeller, judge=bench.judge, images=bench.images),
            "held_out": list(bench.held_out.seeds),
            "shown": [bench.held_out.seeds[i] for i in bench.shown],
            "unit": {name: method.unit for name, method in methods.items()},
            "family": {name: method.family for name, method in methods.items()},
            "what": {name: (inspect.getdoc(method.find) or "").partition("\n")[0] for name, method in methods.items()},
        },
    )


def identities(model: Model, *, labeller: Classifier, judge: Classifier, images: LabelledImages) -> dict:
    """What was measured, by whom, in a benchmark's provenance."""
    return {
        "model": model.provenance(),
        "labeller": [labeller.name, labeller.hash],
        "judge": [judge.name, judge.hash],
        "images": images.hash,
    }


def _edits(bench: Bench, cells: Mapping[tuple[str, str, int], Cell]) -> pd.DataFrame:
    before, names = probability(bench.plain["scores"]), list(bench.judge.attributes)
    parts = []
    for (method, attribute, repeat), cell in cells.items():
        values = {name: tensor.numpy() for name, tensor in cell.tensors.items()}
        n, k = values["rms"].shape
        own, after = names.index(attribute), probability(values["logits"])
        columns = {
            "method": method,
            "attribute": attribute,
            "repeat": repeat,
            "scale": np.tile(cell.about["scale"] * np.array(LADDER), n),
            "seed": np.repeat(bench.held_out.seeds, k),
            "before": np.repeat(before[:, own], k),
            "after": after[:, :, own].ravel(),
            "logit": values["logits"][:, :, own].ravel(),
        }
        columns |= {name: values[name].ravel() for name in MEASURES if name in values}
        changes = after - before[:, None]
        columns |= {f"change {name}": changes[:, :, i].ravel() for i, name in enumerate(names)}
        parts.append(pd.DataFrame(columns))
    if not parts:
        raise ValueError("no method found anything; the reasons are in the cells: enlarge the population")
    return pd.concat(parts, ignore_index=True)


def _transfer(bench: Bench, cells: Mapping[tuple[str, str, int], Cell]) -> pd.DataFrame:
    rows = []
    for key, cell in cells.items():
        own = bench.judge.attributes.index(key[1])
        held_out = np.stack([bench.plain["scores"][:, own], cell.tensors["logits"][:, MIDDLE, own].numpy()], axis=1)
        for kind, compared in {"population": held_out, "other steps": held_out[: len(held_out) // 2]}.items():
            if kind in cell.tensors:
                changes = _changes(cell.tensors[kind].numpy())
                ends = mean_interval(changes)
                found = [_mean(changes), *ends, _mean(_changes(compared)), cell.about["scale"], len(changes)]
                rows.append([*key, kind, *found])
    return pd.DataFrame(rows, columns=TRANSFER)


def _realism(bench: Bench, cells: Mapping[tuple[str, str, int], Cell]) -> pd.DataFrame:
    """Distances to real images in the judge's features and in principal components of the pixels."""
    plain, real = bench.held_out.images.clamp(-1, 1), bench.real
    spaces = {
        "features": ("judge", bench.judge.features),
        "pixels": ("pixels", lambda images: bench.pixels.transform(images.flatten(1).numpy())),
    }
    rows = []
    for key, (space, of) in spaces.items():
        own, target = of(plain), of(real)
        # Every second one, so that both halves are alike; the first half is the reference of all.
        reference, other = target[::2], target[1::2]
        usual = diversity(own)
        # As many at a time as there are samples, since few make the Frechet distance larger.
        n = min(len(own), len(other))
        groups = len(other) // n
        found = {
            ("real", -1): _distances(other[: groups * n], reference, usual, groups=groups),
            ("plain", -1): _distances(own, reference, usual),
        }
        for method in bench.protocol.methods:
            parts = [cell.tensors[key].numpy() for (m, _, _), cell in cells.items() if m == method]
            for i in range(len(LADDER) if parts else 0):
                edited = np.concatenate([part[:, i] for part in parts])
                spread = np.mean([diversity(part[:, i]) for part in parts]) / usual
                distances = _distances(edited, reference, usual, groups=len(parts))
                found[method, i] = distances | {"diversity": spread}
        rows += [{"method": m, "position": i, "space": space, **values} for (m, i), values in found.items()]
    return pd.DataFrame(rows)


TABLES = ("transfer", "realism", "costs", "skipped")
"""Tables that are written as CSV."""

KEY = ["method", "attribute", "repeat"]
"""Columns that name a cell."""

TRANSFER = [*KEY, "kind", "effect", "low", "high", "held_out", "scale", "n"]
"""Columns of `Benchmark.transfer`."""

MEASURES = ("rms", "psnr", "psnr_outside", "perceptual", "identity", "s_dir", "clip_gain", "consistency")
"""Columns of `Benchmark.edits` about the image itself."""


def _changes(logits: np.ndarray) -> np.ndarray:
    """Change of the probability of each sample without the attribute; logits (n, 2), before and after."""
    p = probability(logits[logits[:, 0] <= 0])
    return p[:, 1] - p[:, 0]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _distances(features: np.ndarray, reference: np.ndarray, usual: float, *, groups: int = 1) -> dict:
    """Distances of a set of features from the reference; of several versions of it, one after the other."""
    found = {}
    for name, distance, interval in (
        ("frechet", frechet_distance, frechet_distance_interval),
        ("kernel", kernel_distance, kernel_distance_interval),
    ):
        low, high = interval(features, reference, groups=groups)
        found |= {name: distance(features, reference, groups=groups), f"{name}_low": low, f"{name}_high": high}
    return found | {
        "diversity": diversity(features) / usual,
        "n": len(features) // groups,
    }
