"""How costs grow with the batch, the steps, the samples and the vectors, and what precision and layout save."""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import workbench as wb

pytestmark = pytest.mark.slow

OPTIONS = {"rounds": 3, "warmup_rounds": 1}


@pytest.fixture
def curve(benchmark):
    """Time a call that is one point of a curve: cost against x."""

    def time(function, x: float, xlabel: str, *, per: int = 1) -> None:
        benchmark.extra_info.update(x=x, xlabel=xlabel, per=per)
        benchmark.pedantic(function, **OPTIONS)

    return time


@pytest.mark.benchmark(group="a U-Net pass, per sample")
@pytest.mark.parametrize("batch", [1, 2, 4, 8, 16, 32, 64])
def test_a_pass_by_batch(model, curve, batch):
    x_t = torch.randn(batch, *model.image_shape)
    with torch.inference_mode():
        curve(lambda: model(x_t, 500), batch, "batch", per=batch)


@pytest.mark.benchmark(group="sampling of 8 images")
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_sampling_by_steps(model, curve, steps):
    curve(lambda: wb.sample(model, range(8), steps=steps, progress=False), steps, "steps")


@pytest.mark.benchmark(group="DDIM inversion of 8 images")
@pytest.mark.parametrize("steps", [5, 10, 20, 40])
def test_inversion_by_steps(model, curve, steps):
    images = wb.load_images("avataaars", size=32)[:8]
    curve(lambda: wb.invert(model, images, steps=steps, progress=False), steps, "steps")


@pytest.mark.benchmark(group="extraction of n samples, 5 steps")
@pytest.mark.parametrize("n", [32, 64, 128])
def test_extraction_by_samples(model, curve, tmp_path, n):
    places = iter(range(10))
    curve(lambda: wb.extract(model, n, steps=5, out=tmp_path / f"{next(places)}.zarr", progress=False), n, "samples n")


@pytest.mark.benchmark(group="top k singular vectors of the Jacobian")
@pytest.mark.parametrize("k", [1, 2, 4, 8])
def test_jacobian_by_vectors(model, curve, k):
    run = wb.sample(model, [0], steps=20, record_x=True, progress=False)
    curve(lambda: wb.find_jacobian(model, run, t=run.timesteps[8], k=k, progress=False), k, "vectors k")


PASSES = """
import time, torch, workbench as wb
if {kept}:
    wb.keep_freed_memory()
model = wb.load_model("avataaars32", device="cpu")
x_t = torch.randn(32, *model.image_shape)
with torch.inference_mode():
    model(x_t, 500)
    start = time.perf_counter()
    for _ in range(10):
        model(x_t, 500)
print(time.perf_counter() - start)
"""


def test_keeping_freed_memory(record):
    """The allocator is the whole process's, so each pass of the measurement is a process of its own."""
    seconds = {True: [], False: []}
    for kept in [True, False] * 3:
        command = [sys.executable, "-c", PASSES.format(kept=kept)]
        seconds[kept].append(float(subprocess.check_output(command, text=True)))
    ratio = statistics.median(seconds[False]) / statistics.median(seconds[True])
    record("a pass of 32 on a CPU, freed memory kept, against glibc's own way", ratio, "times as fast")


def load(variant: str):
    """The bundled model in float32 on the CPU, but for one thing."""
    options = {"bfloat16": {"dtype": "bfloat16"}, "compiled": {"compile": True}}.get(variant, {})
    model = wb.load_model("avataaars32", device="cpu", **options)
    layout = torch.contiguous_format if variant == "contiguous" else torch.channels_last
    model.unet.unet.to(memory_format=layout)
    return model


@pytest.mark.parametrize("variant", ["bfloat16", "compiled", "contiguous"])
def test_a_pass_in_another_precision_or_layout(medians, record, variant):
    if variant == "compiled" and not (os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("torch.compile needs a C++ compiler on a CPU")
    plain, other = load("channels_last"), load(variant)
    x_t = torch.randn(16, *plain.image_shape)
    with torch.inference_mode():
        difference = (other(x_t, 500) - plain(x_t, 500)).abs().max()  # also compiles
        theirs, ours = medians(lambda: other(x_t, 500), lambda: plain(x_t, 500), repeats=5)
    assert difference < (0.1 if variant == "bfloat16" else 1e-3)
    record(f"a pass, {variant}, against float32, eager, channels_last", ours / theirs, "times as fast")


def test_writing_is_hidden_behind_computing(model, medians, record, tmp_path):
    memory = Path("/dev/shm")
    if not os.access(memory, os.W_OK):
        pytest.skip("there is no file system in memory here")
    places = iter(range(100))

    def extract(folder):
        out = folder / f"hspace-{os.getpid()}-{next(places)}.zarr"
        wb.extract(model, 128, steps=5, out=out, progress=False)
        shutil.rmtree(out)

    disk, ram = medians(lambda: extract(tmp_path), lambda: extract(memory))
    record("extraction to disk against to memory", disk / ram, "times as long", goal="within 0.95 to 1.05")
