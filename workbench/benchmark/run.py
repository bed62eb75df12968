"""Every registered method on every attribute, measured on the same held-out samples by the same judge.

A cell is one method, one attribute and one population; it is found and measured by itself, from its parameters alone,
and kept on disk under a digest of all that it depends on. So a benchmark that was cut short goes on where it stopped,
and one with a new method measures that method alone.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from sklearn.decomposition import PCA
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from workbench import __version__, paths
from workbench.analysis.intervals import mean_interval
from workbench.analysis.metrics import (
    cosine_similarity,
    diversity,
    frechet_distance,
    frechet_distance_interval,
    kernel_distance,
    kernel_distance_interval,
    outside,
    peak_signal_to_noise,
    perceptual_distance,
)
from workbench.benchmark.methods import METHODS, Method, Study, found_edit
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.memory import keep_freed_memory
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import Trajectory, sample
from workbench.editing.edits import Edit, NotApplicable
from workbench.editing.render import run_plans
from workbench.formats.tensors import load_tensors, save_tensors
from workbench.io import code_hash
from workbench.workers import start_workers

HELD_OUT = 10**9
"""Seeds of the held-out samples count from here, far from any population."""

SAME_COLOUR = 0.2
"""Largest difference of a channel, in [-1, 1], between the backdrop and a pixel that belongs to it."""

PIXEL_COMPONENTS = 64
"""Principal components of real images' pixels: the feature space of no network."""


@dataclass(frozen=True)
class Protocol:
    """What is measured, and on how many.

    Attributes
    ----------
    methods, attributes : tuple of str
    population : int
        Samples that a method learns from.
    labelled : int
        Labelled images that a method learns from; the last ones of the set, at most half of it, stand for real images.
    held_out : int
        Samples that are edited. No method sees them.
    repeats : int
        Populations, each of other seeds.
    steps : int
        Visited timesteps.
    eta : float
    t : int
        Timestep of methods that act at one; the nearest visited is taken.
    shown : int
        Held-out samples whose edited images are kept, drawn by the seed.
    seed : int
    transfer : bool
        Also edit samples of the population, and held-out ones with a step between each two.
    """

    methods: tuple[str, ...]
    attributes: tuple[str, ...]
    population: int = 192
    labelled: int = 192
    held_out: int = 24
    repeats: int = 1
    steps: int = 10
    eta: float = 1.0
    t: int = 500
    shown: int = 4
    seed: int = 0
    transfer: bool = True


QUICK_ATTRIBUTES = ("Smiling", "Long_Hair", "Dark_Skin")

SIZES = {
    "quick": {"population": 192, "held_out": 16, "repeats": 1, "steps": 10},
    "full": {"population": 1000, "held_out": 128, "repeats": 3, "steps": 50},
}
"""Two sizes of a protocol: minutes and hours on two cores."""


@dataclass(frozen=True, eq=False)
class Benchmark:
    """What was measured.

    Attributes
    ----------
    protocol : Protocol
    edits : DataFrame
        One row a method, attribute, population (`repeat`), strength (`scale`) and held-out sample (`seed`): the judge's
        probability of the attribute `before` and `after`, its `logit` after; how far the image moved (`rms`), `psnr`,
        `psnr_outside` of the attribute's region, `psnr_backdrop`, `perceptual`, `perceptual_outside`, `identity`; and
        `change NAME`, that of every attribute's probability.
    transfer : DataFrame
        One row a method, attribute, population and kind ("population", "other steps"): mean `effect` on samples without
        the attribute with its 95% interval `low`, `high`, that on `held_out` ones at the same `scale` (of "other steps"
        the same seeds), and the number of samples that the effect is of, `n`.
    realism : DataFrame
        One row a method, strength (`position` in the method's scales) and feature space: `frechet` and `kernel`
        distance of edited images from real ones, each sample with one attribute edited, with `..._low` and `..._high`;
        `diversity` relative to the plain samples; `n`, the samples of a set. "real", as many real images against other
        ones, and the plain samples are the floor.
    costs : DataFrame
        One row a method and attribute: `passes`, `scored`, `labels` to find it, `seconds` that took, and `edit_passes`
        of one edit.
    skipped : DataFrame
        One row a method and attribute without a result, and the `reason`.
    strips : dict of (method, attribute) -> ndarray of shape (shown, 1 + scales, C, H, W), float32
        The plain sample and its edits, of the first population.
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

    def save(self, folder: str | Path) -> Path:
        """Write the tables: `edits` as Parquet and CSV, the others as CSV, the provenance as JSON.

        Parameters
        ----------
        folder : path

        Returns
        -------
        Path
        """
        folder = paths.writable(folder, folder=True)
        folder.mkdir(parents=True, exist_ok=True)
        self.edits.to_parquet(folder / "edits.parquet", index=False)
        for name in ("edits", "transfer", "realism", "costs", "skipped"):
            getattr(self, name).to_csv(folder / f"{name}.csv", index=False)
        (folder / "provenance.json").write_text(json.dumps(self.provenance, indent=1) + "\n", encoding="utf-8")
        return folder

    def __repr__(self) -> str:
        p = self.protocol
        return (
            f"Benchmark({len(p.methods)} methods, {len(p.attributes)} attributes, {p.held_out} held-out samples, "
            f"{p.repeats} population{'s' if p.repeats > 1 else ''} of {p.population}, {len(self.edits)} edits)"
        )


def run_benchmark(
    model: Model,
    protocol: Protocol,
    *,
    labeller: Classifier,
    judge: Classifier,
    images: LabelledImages,
    masks: Mapping[str, np.ndarray] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> Benchmark:
    """Measure the methods of a protocol, or read what is measured already.

    What was measured is read as long as nothing that it depends on has changed: weights, methods' code, images, labels.
    With a classifier that is a function, which has no hash, all is measured anew, and in this process.

    Parameters
    ----------
    model : Model
    protocol : Protocol
    labeller : Classifier
        Labels the populations.
    judge : Classifier
        Scores the edits; not the labeller, and of the same attributes.
    images : LabelledImages
        The first ones are learned from, the last ones stand for real images.
    masks : mapping of attribute -> bool array of shape (H, W), optional
        Where an attribute can be.
    workers : int
        Processes that measure at the same time, each with its share of the cores; a method and population is a task.
        On a GPU, one is enough.
    scheduler : str, optional
        Address of a dask scheduler whose workers measure instead; they must see the same cache.
    progress : bool

    Returns
    -------
    Benchmark
        The same for any number of workers, but for the last bits that the number of threads decides.

    Raises
    ------
    ValueError
        If the judge is the labeller, a method or attribute is not known, there are too few images or samples, or
        `workers` is below 1.
    """
    bench = Bench(model, protocol, labeller=labeller, judge=judge, images=images, masks=dict(masks or {}))
    wanted = list(bench.cells())
    alone = (workers == 1 and scheduler is None) or not bench.kept
    todo = [] if alone else [key for key in wanted if not bench.measured(*key)]
    cells = {}
    with tqdm(total=len(wanted), desc="benchmark", unit=" cells", disable=not progress, leave=False) as bar:
        for done in _elsewhere(bench, todo, workers, scheduler):
            bar.update(done)
        for key in wanted:
            bar.set_postfix_str(f"{key[0]}, {key[1]}")
            cells[key] = bench.measure(*key)
            bar.update(key not in todo)
    with threadpool_limits(1, user_api="blas"):
        return bench.gathered(cells)


def _elsewhere(
    bench: Bench, todo: Sequence[tuple[str, str, int]], workers: int, scheduler: str | None
) -> Iterator[int]:
    """Have cells measured by other processes, which put them into the cache; the number of cells of each task done."""
    tasks: dict[tuple[int, str], list[str]] = {}
    for method, attribute, repeat in todo:
        tasks.setdefault((repeat, method), []).append(attribute)
    if not tasks:
        return
    from distributed import as_completed  # a second to import

    for repeat in dict.fromkeys(repeat for repeat, _ in tasks):
        bench.study(repeat).store  # noqa: B018 - all would wait for the first that extracts it
    with start_workers(workers, scheduler=scheduler) as client:
        # What the workers keep between tasks is their own.
        shared = client.scatter(replace(bench), broadcast=True, hash=False)
        futures = {
            client.submit(_measure_task, shared, METHODS[method], attributes, repeat, pure=False): len(attributes)
            for (repeat, method), attributes in tasks.items()
        }
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def _measure_task(bench: Bench, method: Method, attributes: Sequence[str], repeat: int) -> None:
    """On a worker, which may never have seen where the method was registered."""
    METHODS[method.name] = method
    keep_freed_memory()  # this process is the benchmark's own
    for attribute in attributes:
        bench.measure(method.name, attribute, repeat)


@dataclass(frozen=True, eq=False)
class Bench:
    """All that cells share: who labels, who judges, who is edited. Parameters as of `run_benchmark`."""

    model: Model
    protocol: Protocol
    labeller: Classifier = field(repr=False)
    judge: Classifier = field(repr=False)
    images: LabelledImages = field(repr=False)
    masks: dict[str, np.ndarray] = field(repr=False)

    def __post_init__(self) -> None:
        p = self.protocol
        if self.judge is self.labeller or (self.judge.hash is not None and self.judge.hash == self.labeller.hash):
            raise ValueError("the judge is the labeller; whoever labels does not judge, so give another classifier")
        for what, given, known in (
            ("method", p.methods, METHODS),
            ("attribute", p.attributes, [a for a in self.judge.attributes if a in self.labeller.attributes]),
        ):
            unknown = [name for name in given if name not in known]
            if unknown or not given:
                raise ValueError(f"there is no {what} {(unknown or [''])[0]!r}; there are {', '.join(known)}")
        if min(p.population, p.held_out) < 8 or p.repeats < 1 or not 0 <= p.shown <= p.held_out:
            raise ValueError(
                f"population is {p.population}, held_out {p.held_out}, repeats {p.repeats} and shown {p.shown}; give 8 "
                "samples or more, 1 population or more, and show no more than are held out"
            )
        if p.labelled > len(self.images) // 2:
            raise ValueError(f"labelled is {p.labelled}; half of {len(self.images)} images must stay to compare with")

    def cells(self) -> Iterator[tuple[str, str, int]]:
        """Every method, attribute and population; those of one population follow each other, as they share it."""
        p = self.protocol
        return ((m, a, r) for r in range(p.repeats) for m in p.methods for a in p.attributes)

    def measure(self, method: str, attribute: str, repeat: int) -> Cell:
        """Find and measure one cell, or read it from the cache."""
        if not self.kept:
            return self._measured(METHODS[method], attribute, repeat)
        known = self._inputs(METHODS[method], attribute, repeat)
        path = _path(known)
        if path.is_file():
            return Cell.read(path, known)
        return self._measured(METHODS[method], attribute, repeat).write(path, known)

    def measured(self, method: str, attribute: str, repeat: int) -> bool:
        """Whether a cell is in the cache."""
        return self.kept and _path(self._inputs(METHODS[method], attribute, repeat)).is_file()

    @property
    def kept(self) -> bool:
        """Whether cells are kept: those of a classifier that is a function can't be told from another's."""
        return None not in (self.labeller.hash, self.judge.hash)

    def study(self, repeat: int) -> Study:
        """What methods may learn from in one population."""
        if repeat not in self._studies:
            p = self.protocol
            self._studies.clear()
            self._studies[repeat] = Study(
                self.model,
                self.labeller,
                attributes=self.labeller.attributes,
                n=p.population,
                seed=p.seed + repeat * p.population,
                steps=p.steps,
                eta=p.eta,
                t=self._t,
                images=self.images.select(slice(p.labelled)),
                masks=self.masks,
            )
        return self._studies[repeat]

    @cached_property
    def _studies(self) -> dict[int, Study]:
        return {}

    @property
    def _t(self) -> int:
        visited = self.model.schedule.timesteps(self.protocol.steps)
        return min(visited, key=lambda t: abs(t - self.protocol.t))

    @cached_property
    def _held_out(self) -> Trajectory:
        p = self.protocol
        seeds = range(HELD_OUT + p.seed, HELD_OUT + p.seed + p.held_out)
        return sample(self.model, seeds, steps=p.steps, eta=p.eta, record_x=True, progress=False)

    def _seen(self, study: Study) -> Trajectory:
        """Samples of a population, as many as are edited at other timesteps."""
        p, learned = self.protocol, study.learned
        seeds = range(study.seed, study.seed + min(p.held_out // 2, p.population))
        options = {"steps": p.steps, "eta": p.eta, "record_x": True, "progress": False}
        return learned("seen by the benchmark", lambda: sample(self.model, seeds, **options))

    @cached_property
    def _finer(self) -> Trajectory:
        p, visited = self.protocol, self._held_out.timesteps
        # Every timestep of the others and one between each two: methods that act at one find theirs.
        between = [(a + b) // 2 for a, b in zip(visited, visited[1:], strict=False)]
        steps = sorted({*visited, *between}, reverse=True)
        seeds = self._held_out.seeds[: p.held_out // 2]
        return sample(self.model, seeds, steps=steps, eta=p.eta, record_x=True, progress=False)

    @cached_property
    def _plain(self) -> dict[str, np.ndarray]:
        """What the judge sees of the held-out samples."""
        images = self._held_out.x0
        return {
            "scores": self._logits(images),
            "features": self.judge.features(images),
            "maps": self.judge.maps(images),
        }

    @cached_property
    def _real(self) -> torch.Tensor:
        """Real images that nothing was learned from, an even number."""
        unseen = len(self.images) - self.protocol.labelled
        n = min(unseen, 1000) // 2 * 2
        return self.images.at_size(self.model.image_shape[1])[len(self.images) - n :]

    @cached_property
    def _pixels(self) -> PCA:
        pixels = self._real.flatten(1).numpy()
        return PCA(min(PIXEL_COMPONENTS, len(pixels) - 1), random_state=0).fit(pixels)

    @cached_property
    def _labels(self) -> str:
        """Digest of the images' labels, which methods may learn from."""
        text = self.images.labels.iloc[: self.protocol.labelled].to_csv()
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    @property
    def shown(self) -> list[int]:
        """Positions of the held-out samples that are shown: drawn by the seed, none picked."""
        rng = np.random.default_rng(self.protocol.seed)
        return np.sort(rng.choice(self.protocol.held_out, self.protocol.shown, replace=False)).tolist()

    def _logits(self, images: torch.Tensor) -> np.ndarray:
        return self.judge.scores(images)[list(self.judge.attributes)].to_numpy()

    def _inputs(self, method: Method, attribute: str, repeat: int) -> dict:
        """All that a cell depends on, as JSON can hold it."""
        p, mask = self.protocol, self.masks.get(attribute)
        return {
            "code": code_hash(__name__),
            "model": self.model.provenance(),
            "precision": str(self.model.dtype),
            "labeller": [self.labeller.name, self.labeller.hash, list(self.labeller.attributes)],
            "judge": [self.judge.name, self.judge.hash, list(self.judge.attributes)],
            "images": [self.images.fingerprint, self._labels],
            "method": [method.name, method.code, list(method.scales)],
            "attribute": attribute,
            "repeat": repeat,
            "mask": None if mask is None else hashlib.sha256(np.packbits(mask).tobytes()).hexdigest()[:16],
            "protocol": {
                key: value for key, value in vars(p).items() if key not in ("methods", "attributes", "repeats")
            },
        }

    def _measured(self, method: Method, attribute: str, repeat: int) -> Cell:
        study = self.study(repeat)
        study.cost.clear()
        start = time.perf_counter()
        try:
            # Many small matrices: more threads cost more than they give, and far more where cores are busy.
            with threadpool_limits(1, user_api="blas"):
                edit = found_edit(method.find(study, attribute))
            seconds, held_out = time.perf_counter() - start, self._held_out
            cost = sum(study.cost.values(), Counter())
            with _counted(self.model) as passes:
                edited = self._edited(edit, held_out, method.scales)
            tensors = self._scored(edited, attribute) | self._transferred(edit, method, attribute, study)
        except NotApplicable as reason:
            return Cell({}, {"skipped": str(reason)})
        per_edit = passes[0] / (len(edited) * len(method.scales))
        names = ("passes", "scored", "labels")
        about = {"edit": edit.name, "seconds": seconds, "edit_passes": per_edit} | {k: cost[k] for k in names}
        return Cell({name: torch.as_tensor(np.ascontiguousarray(v)) for name, v in tensors.items()}, about)

    def _edited(self, edit: Edit, run: Trajectory, scales: Sequence[float]) -> torch.Tensor:
        """The images of an edit, (n, scales, C, H, W)."""
        return run_plans(run, [edit.plan(run, list(scales))], progress=False)[0]

    def _scored(self, edited: torch.Tensor, attribute: str) -> dict[str, np.ndarray]:
        """What an edit did to the held-out samples, (n, scales) or (n, scales, ...)."""
        plain, n = self._held_out.x0.clamp(-1, 1).numpy(), len(edited)
        measured: dict[str, list] = {}
        maps = self._plain["maps"]
        # Where no region is known, all but the backdrop may change.
        mask = self.masks.get(attribute, ~backdrop(plain))
        for images in edited.unbind(1):
            images = images.clamp(-1, 1)
            values, features = images.numpy(), self.judge.features(images)
            beyond = outside(plain, values, mask)
            found = {
                "logits": self._logits(images),
                "rms": np.sqrt(((values - plain) ** 2).mean(axis=(1, 2, 3))),
                "psnr": peak_signal_to_noise(values, plain),
                "psnr_outside": peak_signal_to_noise(values, plain, mask=~mask),
                "psnr_backdrop": peak_signal_to_noise(values, plain, mask=backdrop(plain)),
                "perceptual": perceptual_distance(self.judge.maps(values), maps),
                "perceptual_outside": perceptual_distance(self.judge.maps(beyond), maps),
                "identity": cosine_similarity(features, self._plain["features"]),
                "features": features,
                "pixels": self._pixels.transform(values.reshape(n, -1)),
            }
            for name, value in found.items():
                measured.setdefault(name, []).append(np.asarray(value, dtype=np.float32))
        kept = ((edited[self.shown].clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
        return {name: np.stack(values, axis=1) for name, values in measured.items()} | {"shown": kept.numpy()}

    def _transferred(self, edit: Edit, method: Method, attribute: str, study: Study) -> dict[str, np.ndarray]:
        """The attribute's logit before and after, on samples that it was found on and at other timesteps; (n, 2)."""
        if not self.protocol.transfer:
            return {}
        middle = method.scales[len(method.scales) // 2]
        found = {}
        seen = self._seen(study)
        for name, run in {"population": seen, "other steps": self._finer}.items():
            try:
                after = self._edited(edit, run, [middle])[:, 0]
            except NotApplicable:
                continue
            k = list(self.judge.attributes).index(attribute)
            found[name] = np.stack([self._logits(run.x0)[:, k], self._logits(after)[:, k]], axis=1)
        return found

    def gathered(self, cells: Mapping[tuple[str, str, int], Cell]) -> Benchmark:
        """The tables of all cells."""
        there = {key: cell for key, cell in cells.items() if cell.tensors}
        gone = [
            {"method": m, "attribute": a, "repeat": r, "reason": cell.about["skipped"]}
            for (m, a, r), cell in cells.items()
            if not cell.tensors
        ]
        costs = [{"method": m, "attribute": a, "repeat": r, **cell.about} for (m, a, r), cell in there.items()]
        plain = self._held_out.x0[self.shown].clamp(-1, 1).numpy()[:, None]
        strips = {
            (m, a): np.concatenate([plain, cell.tensors["shown"].numpy() / np.float32(127.5) - 1], axis=1)
            for (m, a, r), cell in there.items()
            if r == 0
        }
        return Benchmark(
            self.protocol,
            edits=self._edits(there),
            transfer=self._transfer(there),
            realism=self._realism(there),
            costs=pd.DataFrame(costs),
            skipped=pd.DataFrame(gone, columns=["method", "attribute", "repeat", "reason"]),
            strips=strips,
            provenance={
                "workbench": __version__,
                "code": code_hash(__name__),
                "protocol": dict(vars(self.protocol)),
                "model": self.model.provenance(),
                "labeller": [self.labeller.name, self.labeller.hash],
                "judge": [self.judge.name, self.judge.hash],
                "images": self.images.fingerprint,
                "held_out": list(self._held_out.seeds),
                "shown": [self._held_out.seeds[i] for i in self.shown],
                "scales": {name: [list(METHODS[name].scales), METHODS[name].unit] for name in self.protocol.methods},
                "family": {name: METHODS[name].family for name in self.protocol.methods},
            },
        )

    def _edits(self, cells: Mapping[tuple[str, str, int], Cell]) -> pd.DataFrame:
        before, names = _probability(self._plain["scores"]), list(self.judge.attributes)
        parts = []
        for (method, attribute, repeat), cell in cells.items():
            values = {name: tensor.numpy() for name, tensor in cell.tensors.items()}
            n, k = values["rms"].shape
            own, after = names.index(attribute), _probability(values["logits"])
            columns = {
                "method": method,
                "attribute": attribute,
                "repeat": repeat,
                "scale": np.tile(METHODS[method].scales, n),
                "seed": np.repeat(self._held_out.seeds, k),
                "before": np.repeat(before[:, own], k),
                "after": after[:, :, own].ravel(),
                "logit": values["logits"][:, :, own].ravel(),
            }
            columns |= {name: values[name].ravel() for name in MEASURES}
            changes = after - before[:, None]
            columns |= {f"change {name}": changes[:, :, i].ravel() for i, name in enumerate(names)}
            parts.append(pd.DataFrame(columns))
        if not parts:
            raise ValueError("no method found anything; the reasons are in the cells: enlarge the population")
        return pd.concat(parts, ignore_index=True)

    def _transfer(self, cells: Mapping[tuple[str, str, int], Cell]) -> pd.DataFrame:
        before, names, rows = self._plain["scores"], list(self.judge.attributes), []
        for (method, attribute, repeat), cell in cells.items():
            own, scales = names.index(attribute), METHODS[method].scales
            middle = len(scales) // 2
            held_out = np.stack([before[:, own], cell.tensors["logits"][:, middle, own].numpy()], axis=1)
            for kind, compared in {"population": held_out, "other steps": held_out[: len(held_out) // 2]}.items():
                if kind in cell.tensors:
                    changes, reference = _changes(cell.tensors[kind].numpy()), _changes(compared)
                    low, high = mean_interval(changes)
                    key = {"method": method, "attribute": attribute, "repeat": repeat, "kind": kind}
                    found = {"effect": _mean(changes), "low": low, "high": high, "held_out": _mean(reference)}
                    rows.append(key | {"scale": scales[middle], **found, "n": len(changes)})
        return pd.DataFrame(rows)

    def _realism(self, cells: Mapping[tuple[str, str, int], Cell]) -> pd.DataFrame:
        """Distances to real images in the judge's features and in principal components of the pixels."""
        plain, real = self._held_out.x0.clamp(-1, 1), self._real
        spaces = {
            "judge": (self.judge.features(plain), self.judge.features(real)),
            "pixels": tuple(self._pixels.transform(x.flatten(1).numpy()) for x in (plain, real)),
        }
        rows = []
        for space, (own, target) in spaces.items():
            # Every second one, so that both halves are alike; the first half is the reference of all.
            reference, other = target[::2], target[1::2]
            usual = diversity(own)
            # As many at a time as there are samples, since few make the Frechet distance larger.
            n = min(len(own), len(other))
            other = other[: len(other) // n * n]
            found = _distances(other, reference, usual, groups=len(other) // n)
            rows.append({"method": "real", "position": -1, "space": space, **found})
            rows.append({"method": "plain", "position": -1, "space": space, **_distances(own, reference, usual)})
            key = "features" if space == "judge" else "pixels"
            for method in self.protocol.methods:
                parts = [cell.tensors[key].numpy() for (m, _, _), cell in cells.items() if m == method]
                for i in range(len(METHODS[method].scales) if parts else 0):
                    edited = np.concatenate([part[:, i] for part in parts])
                    spread = np.mean([diversity(part[:, i]) for part in parts]) / usual
                    found = _distances(edited, reference, usual, groups=len(parts))
                    rows.append({"method": method, "position": i, "space": space, **found, "diversity": spread})
        return pd.DataFrame(rows)


MEASURES = (
    "rms",
    "psnr",
    "psnr_outside",
    "psnr_backdrop",
    "perceptual",
    "perceptual_outside",
    "identity",
)
"""Columns of `Benchmark.edits` about the image itself."""


@dataclass(frozen=True, eq=False)
class Cell:
    """One method, attribute and population: what was measured, and how it was found.

    Attributes
    ----------
    tensors : dict of str -> Tensor
        Empty if the method had nothing to offer.
    about : dict
        Name of the edit and what it cost, or why there is none (`skipped`).
    """

    tensors: dict[str, torch.Tensor] = field(repr=False)
    about: dict

    def write(self, path: Path, inputs: dict) -> Cell:
        """Keep it with its inputs; whole or not at all."""
        save_tensors(path, self.tensors, {"about": self.about, "inputs": inputs}, kind="cell")
        return self

    @classmethod
    def read(cls, path: Path, inputs: dict) -> Cell:
        """Read what `write` wrote; ValueError if it is damaged or of other inputs."""
        try:
            tensors, header = load_tensors(path, kind="cell")
        except ValueError as error:
            raise ValueError(f"{path} is damaged ({error}); delete it and run again") from error
        if header["inputs"] != json.loads(json.dumps(inputs)):
            raise ValueError(f"{path} holds a measurement of other inputs; delete it and run again")
        return cls(tensors, header["about"])


def _path(inputs: dict) -> Path:
    digest = hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]
    return paths.cache() / "benchmark" / f"{digest}.safetensors"


def backdrop(images: np.ndarray) -> np.ndarray:
    """Pixels of the colour of an image's upper corners.

    Parameters
    ----------
    images : array of shape (n, C, H, W), values in [-1, 1]

    Returns
    -------
    ndarray of bool, shape (n, 1, H, W)
    """
    corners = np.concatenate([images[:, :, :2, :2], images[:, :, :2, -2:]], axis=3)
    colour = np.median(corners, axis=(2, 3), keepdims=True)
    return (np.abs(images - colour) < SAME_COLOUR).all(axis=1, keepdims=True)


@contextmanager
def _counted(model: Model) -> Iterator[list[int]]:
    """How many samples pass the mid block within: the passes through the U-Net."""
    passes = [0]

    def count(module, inputs, output) -> None:
        passes[0] += len(output)

    handle = model.unet.unet.mid_block.register_forward_hook(count)
    try:
        yield passes
    finally:
        handle.remove()


def _probability(logits: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-np.asarray(logits, dtype=float)))


def _changes(logits: np.ndarray) -> np.ndarray:
    """Change of the probability of each sample without the attribute; logits (n, 2), before and after."""
    p = _probability(logits[logits[:, 0] <= 0])
    return p[:, 1] - p[:, 0]


def _mean(values: np.ndarray) -> float:
    return float(values.mean()) if len(values) else float("nan")


def _distances(features: np.ndarray, reference: np.ndarray, usual: float, *, groups: int = 1) -> dict:
    """Distances of a set of features from the reference; of several versions of it, one after the other."""
    low, high = kernel_distance_interval(features, reference, groups=groups)
    frechet_low, frechet_high = frechet_distance_interval(features, reference, groups=groups)
    return {
        "frechet": frechet_distance(features, reference, groups=groups),
        "frechet_low": frechet_low,
        "frechet_high": frechet_high,
        "kernel": kernel_distance(features, reference, groups=groups),
        "kernel_low": low,
        "kernel_high": high,
        "diversity": diversity(features) / usual,
        "n": len(features) // groups,
    }
