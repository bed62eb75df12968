"""Every registered method on every attribute, measured on the same held-out samples by the same judge."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from threadpoolctl import threadpool_limits
from tqdm.auto import tqdm

from workbench.benchmark.bench import Bench
from workbench.benchmark.methods import METHODS
from workbench.benchmark.protocol import Protocol
from workbench.benchmark.results import Benchmark, gather
from workbench.benchmark.study import Method, TextModels
from workbench.datasets.classifiers import Classifier
from workbench.datasets.labelled import LabelledImages
from workbench.diffusion.memory import keep_freed_memory
from workbench.diffusion.models import Model
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
        In an order that the seed draws, methods learn from the first images, and the last ones serve as real images.
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
    parts = {"labeller": labeller, "judge": judge, "texts": texts, "segmenter": segmenter}
    parts |= {"images": images.shuffled(protocol.seed), "masks": dict(masks or {})}
    bench = Bench(model, protocol, **parts)
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
        return gather(bench, cells)


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
