"""Memory is bounded by parameters and batches, not by the number of samples: stores may be larger than RAM."""

from __future__ import annotations

import ctypes
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
from diffusers import DDPMScheduler, UNet2DModel

import workbench as wb
from workbench.analysis import embedding
from workbench.hspace.store import create_store, open_store, write_chunk

PEAK = Path("/proc/self/clear_refs")

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PEAK.exists(), reason="reads the peak memory as Linux counts it"),
]


def peak_of(call) -> int:
    """Bytes that a call has at most beyond those before it."""
    gc.collect()
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier tests left free must not hide what this call takes
    PEAK.write_text("5")  # the peak starts again from what is held now
    before = psutil.Process().memory_info().rss
    call()
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(peak.split()[1]) - before


def make_store(path: Path, n: int, steps: int):
    """A store of noise with two classes, written a chunk at a time."""
    timesteps = list(range(10 * steps, 0, -10))
    model = {"name": "noise", "hash": "0" * 16, "tap": "after", "network": "0" * 16, "schedule": {"T": 1000}}
    provenance = {"model": model, "n": n, "timesteps": timesteps, "etas": [0.0] * steps, "chunk": 64, "seeds": {}}
    layout = {"h": ((n, steps, 32, 8, 8), "float16"), "seeds": ((n,), "uint64")}
    store, rng = create_store(path, provenance, layout), np.random.default_rng(0)
    for chunk, start in enumerate(range(0, n, 64)):
        seeds = np.arange(start, min(start + 64, n), dtype=np.uint64)
        h = rng.standard_normal((len(seeds), steps, 32, 8, 8), dtype=np.float32)
        h[:, :, 0] += (seeds % 2)[:, None, None, None]
        write_chunk(store, chunk, {"h": h, "seeds": seeds})
    return open_store(path)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    """A small store, and one whose h in float32 is more than four times the memory that is allowed below."""
    folder = tmp_path_factory.mktemp("stores")
    return make_store(folder / "small.zarr", 200, 3), make_store(folder / "large.zarr", 600, 100)


ALLOWED = 100_000_000

READERS = {
    "principal components": lambda store, y: wb.find_pca(store, 3, progress=False),
    "joint principal components": lambda store, y: wb.find_pca(store, 3, joint=True, progress=False),
    "differences of means": lambda store, y: wb.find_from_labels(store, y, name="class"),
    "a boundary": lambda store, y: wb.fit_boundary(store, y.to_numpy(), t=store.timesteps[0], space="h"),
    "a UMAP": lambda store, y: embedding.embed(store.at(store.timesteps[0]), method="umap"),
}


@pytest.mark.parametrize("name", READERS)
def test_a_store_larger_than_the_memory_allowed_is_read(stores, name):
    for store in stores:  # the small one first, for what is loaded and compiled once
        y = pd.Series(np.arange(len(store)) % 2, index=store.seeds)
        peak = peak_of(lambda store=store, y=y: READERS[name](store, y))
    size = 2 * store.group["h"].nbytes  # in float32
    assert size > 4 * ALLOWED and peak < ALLOWED, f"{peak / 1e6:.0f} MB for {size / 1e6:.0f} MB of h"


def test_ten_times_the_samples_need_no_more_memory_to_extract(tmp_path):
    levels = {"block_out_channels": (8, 128), "layers_per_block": 1, "norm_num_groups": 4, "add_attention": False}
    blocks = {"down_block_types": ("DownBlock2D",) * 2, "up_block_types": ("UpBlock2D",) * 2}
    model = wb.wrap(UNet2DModel(sample_size=8, **levels, **blocks), DDPMScheduler(), name="wide", device="cpu")

    def extract(n: int):
        return wb.extract(model, n, steps=8, out=tmp_path / f"{n}.zarr", progress=False, batch_size=64)

    few, many = (peak_of(lambda n=n: extract(n)) for n in (150, 1500))
    size = 2 * extract(1500).group["h"].nbytes
    assert many - few < 0.2 * size, f"{(many - few) / 1e6:.0f} MB more for {size / 1e6:.0f} MB of h"


HELD = """
import psutil, torch
from workbench.diffusion.memory import keep_freed_memory

def held():
    buffers = [torch.ones(4 << 20) for _ in range(12)]  # 16 MiB each
    del buffers
    return (psutil.Process().memory_info().rss - before) >> 20

torch.ones(4 << 20)
before = psutil.Process().memory_info().rss
print(keep_freed_memory(), held() > 150)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="sets glibc's allocator, and there is another one here")
@pytest.mark.parametrize("own, set_here", [({}, True), ({"MALLOC_TOP_PAD_": "131072"}, False)])
def test_freed_memory_is_kept_for_the_next_pass_unless_the_user_set_the_allocator(own, set_here):
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("MALLOC_", "GLIBC_"))}
    out = subprocess.run([sys.executable, "-c", HELD], env=clean | own, capture_output=True, text=True, check=True)
    assert out.stdout.split() == [str(set_here), str(set_here)]
