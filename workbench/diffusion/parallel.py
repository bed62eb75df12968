"""Passes on all cores of a CPU: the samples of a batch are split over threads that compute with one thread each.

Torch's own threads meet at a barrier after every operation and wait there by spinning. One busy process beside them is
enough to make them several times slower, while these threads meet once a pass. The split depends on the batch alone,
so that results are the same to the bit whatever the number of threads.
"""

from __future__ import annotations

import contextlib
import math
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import joblib
import torch

THREADS = "WORKBENCH_THREADS"
"""Environment variable with the number of threads that compute."""

PROGRESS = "WORKBENCH_PROGRESS"
"""Environment variable with a folder in which processes of a report count their passes."""

PIECES = 4
"""A batch is split into a multiple of this number of pieces, so that they fill two cores, or four, evenly."""

FULL_PIXELS = 2**15
"""Pixels of a batch up to which larger ones are faster."""

LEAST_PIXELS = 3 * 2**10
"""Pixels of a piece below which the calls of the network's layers cost too much."""

LARGE_PIXELS = 2**14
"""Pixels of an image from which torch's own threads pay within it."""

T = TypeVar("T")

_passes = 0
_pool: ThreadPoolExecutor | None = None
_lock = threading.Lock()
_worker = threading.local()


def thread_count() -> int:
    """Number of threads that compute on a CPU.

    That of the environment variable `WORKBENCH_THREADS`; without it torch's (`OMP_NUM_THREADS`,
    `torch.set_num_threads`), but no more than the cores that this process may use (affinity, quota of its cgroup).

    Raises
    ------
    ValueError
        If the variable is not a positive integer.
    """
    given = os.environ.get(THREADS)
    if not given:
        return max(1, min(torch.get_num_threads(), joblib.cpu_count()))
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{THREADS} is {given!r}; give a number of threads, 1 or more")
    return int(given)


def cpu_batch(image_shape: tuple[int, int, int]) -> int:
    """Samples that run at once on a CPU: the size up to which larger batches are faster, or pieces for all threads."""
    size = max(1, FULL_PIXELS // (image_shape[1] * image_shape[2]))
    return max(size, thread_count() * max(1, size // PIECES))


def split(n: int, image_shape: tuple[int, int, int]) -> list[slice]:
    """The pieces of a batch of n images: of almost the same size, and the same whatever computes them."""
    pixels = image_shape[1] * image_shape[2]
    pieces = PIECES * math.ceil(n * pixels / FULL_PIXELS)
    pieces = max(1, min(pieces, n, n * pixels // LEAST_PIXELS))
    ends = [n * (i + 1) // pieces for i in range(pieces)]
    return [slice(start, end) for start, end in zip([0, *ends], ends, strict=False)]


def threads_each(pieces: list[slice], image_shape: tuple[int, int, int]) -> int:
    """Torch's threads a piece: 1, or several for images of 128 pixels and more that are fewer than the threads.

    The last bits of a result depend on their number; smaller images are not worth it.
    """
    large = image_shape[1] * image_shape[2] >= LARGE_PIXELS
    return max(1, thread_count() // len(pieces)) if large else 1


def in_threads(function: Callable[[slice], T], pieces: list[slice], *, each: int = 1) -> list[T]:
    """`function` of every piece, in order, on threads that compute with `each` threads of torch's.

    Derivatives are recorded, or not, as in the calling thread.
    """
    threads, own = thread_count(), torch.get_num_threads()
    if getattr(_worker, "busy", False) or (own == each and (threads == 1 or len(pieces) == 1)):
        return [function(piece) for piece in pieces]
    inference, gradients = torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    def compute(piece: slice) -> T:
        if torch.get_num_threads() != each:
            torch.set_num_threads(each)
        with torch.inference_mode(inference), torch.set_grad_enabled(gradients):
            return function(piece)

    try:
        return list(_threads(threads).map(compute, pieces))
    finally:
        # A thread that sets its own number sets that of all threads to come, which stays the caller's.
        torch.set_num_threads(own)


def count_passes(n: int) -> None:
    """Add n to the passes of this process, a pass being the network's of one sample, for whoever follows a report."""
    global _passes
    _passes += n
    if folder := os.environ.get(PROGRESS):
        with contextlib.suppress(OSError):  # a count is not worth a failure
            Path(folder, str(os.getpid())).write_text(str(_passes))


def _threads(n: int) -> ThreadPoolExecutor:
    """The threads of this process; they start with the first pass."""
    global _pool
    with _lock:
        if _pool is None or _pool._max_workers != n:
            ready = threading.Barrier(n + 1)
            _pool = ThreadPoolExecutor(n, "workbench", initializer=_start)
            for _ in range(n):
                _pool.submit(ready.wait)
            ready.wait()
        return _pool


def _start() -> None:
    _worker.busy = True
    torch.get_num_threads()  # torch gives a thread the number of all when it first computes, which must not come later


def _forget() -> None:
    """A forked process has none of its parent's threads."""
    global _passes, _pool, _lock
    _passes, _pool, _lock = 0, None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
