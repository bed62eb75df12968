"""Every registered method on every attribute, measured on the same held-out samples by the same judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import cloudpickle
import numpy as np
import torch
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from workbench.benchmark.bench import Bench
from workbench.benchmark.methods import METHODS
from workbench.benchmark.protocol import LADDER, Protocol
from workbench.benchmark.results import Benchmark, gather
from workbench.benchmark.study import Method, TextModels
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.memory import keep_freed_memory
from workbench.diffusion.models import Model
from workbench.hspace.planning import measure_pass_rate
from workbench.io import duration
from workbench.workers import start_workers


def run_benchmark(
    model: Model,
    protocol: Protocol,
    *,
    labeller: Classifier,
    judge: Classifier,
    images: LabelledImages,
    masks: Mapping[str, np.ndarray] | None = None,
    texts: TextModels | None = None,
    segmenter: Callable[[torch.Tensor], np.ndarray] | None = None,
    workers: int = 1,
    scheduler: str | None = None,
    progress: bool = True,
) -> Benchmark:
    """Measure the methods of a protocol, or read cached measurements.

    A measurement is reused as long as its inputs are unchanged: weights, methods' code, images, labels. A classifier
    that is a function has no hash; with one, or with a segmenter, everything is measured again, in this process.

    Parameters
    ----------
    model : Model
    protocol : Protocol
    labeller : Classifier
        Labels the populations.
    judge : Classifier
        Scores the edits; not the labeller, but with the same attributes.
    images : LabelledImages
        Shuffled by the seed: methods learn from the first images; the last ones are the real images for the distances.
    masks : mapping of attribute -> bool array of shape (H, W), optional
        Region of each attribute.
    texts : TextModels, optional
        For methods that learn from words, S_dir and the CLIP score; such as `TextModels.of_domain(domain_of(images))`.
    segmenter : callable, optional
        For the segmentation consistency SC; see `load_segmenter`.
    workers : int
        Number of parallel processes, each with its share of the cores; each pair of method and population is a task.
        On a GPU, one is enough.
    scheduler : str, optional
        Address of a dask scheduler whose workers measure instead; they must see the same cache.
    progress : bool

    Returns
    -------
    Benchmark
        The same for any number of workers, except for the last bits, which depend on the number of threads.

    Raises
    ------
    ValueError
        If the judge is the labeller, a method or attribute is unknown, there are too few images or samples, or
        `workers` is below 1.
    """
    parts = {"labeller": labeller, "judge": judge, "masks": masks, "texts": texts, "segmenter": segmenter}
    bench = _bench(model, protocol, images=images, **parts)
    wanted = list(bench.cells())
    alone = (workers == 1 and scheduler is None) or not bench.kept
    todo = [] if alone else [key for key in wanted if not bench.measured(*key)]
    cells = {}
    with tqdm(total=len(wanted), desc="benchmark", unit=" cells", disable=not progress, leave=False) as bar:
        for done in _elsewhere(bench, todo, workers, scheduler):
            bar.update(done)
        for key in wanted:
            bar.set_postfix_str(f"{len(wanted) - len(cells)} left: {key[0]}, {key[1]}")
            cells[key] = bench.measure(*key)
            bar.update(key not in todo)
    with threadpool_limits(1, user_api="blas"):
        return gather(bench, cells)


@dataclass(frozen=True)
class Plan:
    """What is left to do of a benchmark.

    Attributes
    ----------
    cells, left : int
        Combinations of method, attribute and population: all of them, and those that are not in the cache.
    passes : int
        Samples through the U-Net, at most, of the samples and edits of these cells; an edit that begins late takes
        fewer. What a method needs to find its edits is not known before, and not in it.
    rate : float
        Passes a second, measured here; 0 if nothing is left.
    """

    cells: int
    left: int
    passes: int
    rate: float

    def __str__(self) -> str:
        cells = f"{self.cells:,} cell{'s' * (self.cells != 1)} (method x attribute x population)"
        counted = f"{cells}, {self.cells - self.left:,} of them cached"
        if not self.left:
            return counted
        needs = f"{self.passes:,} passes at most, {duration(self.passes / self.rate)} at {self.rate:,.3g} a second"
        return (
            f"{counted}\nediting takes {needs}; finding the edits comes on top\n"
            "Ctrl-C stops it, and the same command goes on where it stopped"
        )


def plan_benchmark(model: Model, protocol: Protocol, *, seconds: float = 3.0, **sources: object) -> Plan:
    """What `run_benchmark` of the same model, protocol and sources (labeller, judge, ...) has left to do.

    The rate is measured for a few seconds, unless nothing is left.
    """
    p, bench = protocol, _bench(model, protocol, **sources)
    cells = list(bench.cells())
    left = [key for key in cells if not bench.measured(*key)]
    held_out, seen, finer = p.held_out * p.steps, 0, 0
    if p.transfer:
        seen, finer = min(p.held_out // 2, p.population) * p.steps, p.held_out // 2 * (2 * p.steps - 1)
    samples = held_out + finer + len({repeat for _, _, repeat in left}) * (p.population * p.steps + seen)
    edits = len(left) * (held_out * len(LADDER) + seen + finer)
    return Plan(
        cells=len(cells),
        left=len(left),
        passes=samples + edits if left else 0,
        rate=measure_pass_rate(model, seconds=seconds) if left else 0.0,
    )


def _bench(
    model: Model, protocol: Protocol, *, images: LabelledImages, masks: Mapping | None = None, **sources: object
) -> Bench:
    """What all cells share, with the images in the order that the seed draws."""
    masks = {name: np.asarray(mask, dtype=bool) for name, mask in (masks or {}).items()}
    return Bench(model, protocol, images=images.shuffled(protocol.seed), masks=masks, **sources)


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
        # As bytes: dask may move it from one worker to another later, when the first has loaded models into its own.
        shared = client.scatter(cloudpickle.dumps(replace(bench)), broadcast=True, hash=False)
        futures = {
            client.submit(_measure_task, shared, METHODS[method], attributes, repeat, pure=False): len(attributes)
            for (repeat, method), attributes in tasks.items()
        }
        for future in as_completed(futures):
            future.result()
            yield futures[future]


def _measure_task(shared: bytes, method: Method, attributes: Sequence[str], repeat: int) -> None:
    """On a worker, which may never have seen where the method was registered."""
    bench = _unpacked(shared)
    METHODS[method.name] = method
    keep_freed_memory()  # this process is the benchmark's own
    for attribute in attributes:
        bench.measure(method.name, attribute, repeat)


@lru_cache(maxsize=1)
def _unpacked(shared: bytes) -> Bench:
    """The worker's own, with what it loads and finds; kept for all of its tasks."""
    return cloudpickle.loads(shared)
