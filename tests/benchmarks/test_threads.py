"""Sampling on all cores of a CPU, quiet and beside other busy processes, against one thread of a quiet machine."""

from __future__ import annotations

import contextlib
import os
import statistics
import subprocess
import sys
import time

import joblib
import pytest
import torch

import workbench as wb
from workbench.diffusion.parallel import THREADS

pytestmark = [pytest.mark.slow, pytest.mark.skipif(joblib.cpu_count() < 2, reason="needs two cores")]

GOALS = {0: 1.8, 1: 0.85, 2: None}
"""Least rate beside so many busy processes, in rates of one thread."""


@contextlib.contextmanager
def busy(count: int):
    """So many processes that compute without end."""
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def seconds(model, threads: int) -> float:
    """Of sampling 64 images in 3 steps."""
    before, torchs = os.environ.get(THREADS), torch.get_num_threads()
    os.environ[THREADS] = str(threads)
    torch.set_num_threads(threads)
    try:
        start = time.perf_counter()
        wb.sample(model, range(64), steps=3, progress=False)
        return time.perf_counter() - start
    finally:
        torch.set_num_threads(torchs)
        os.environ.pop(THREADS) if before is None else os.environ.update({THREADS: before})


@pytest.mark.parametrize("count", GOALS)
def test_sampling_beside_busy_processes(model, record, count):
    wb.keep_freed_memory()
    cores, ratios = joblib.cpu_count(), []
    for warm in range(4):
        one = seconds(model, 1)
        with busy(count):
            ratio = one / seconds(model, cores)
        ratios += [ratio] if warm else []
    goal = "" if GOALS[count] is None or cores != 2 else f"at least {GOALS[count]}"
    name = f"sampling on {cores} threads beside {count} busy processes, against one thread without"
    record(name, statistics.median(ratios), "times as fast", goal=goal)
