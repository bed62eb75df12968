"""What a GPU needs, on a fake one: batches that its memory holds, no float64, the device of this process."""

from __future__ import annotations

import threading
import warnings

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import workbench as wb
from workbench.diffusion import models, noise
from workbench.diffusion.unet import SplitUNet
from workbench.directions.direction import Direction
from workbench.hspace import extract as extraction
from workbench.hspace.store import write_chunk

STEPS = 3


@pytest.fixture
def memory(monkeypatch):
    """Call it with a number of samples: passes of more run out of memory. Returns the sizes of all passes."""

    def limit(most: int) -> list[int]:
        encode, sizes = SplitUNet.encode, []

        def limited(self, x_t, t):
            sizes.append(len(x_t))
            if len(x_t) > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return encode(self, x_t, t)

        monkeypatch.setattr(SplitUNet, "encode", limited)
        return sizes

    return limit


def direction(model, run):
    delta = torch.randn(run.steps, *model.h_shape, generator=torch.Generator().manual_seed(0))
    about = {"model": model.provenance(), "etas": list(run.etas), "method": "test", "parameters": {}, "seeds": []}
    return Direction.from_delta(delta, timesteps=run.timesteps, name="random", provenance=about)


def sample(model, **options):
    return wb.sample(model, range(5), **{"steps": STEPS, "progress": False, **options})


def invert(model, method: str, **options):
    images = torch.rand(5, *model.image_shape, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return wb.invert(model, images, steps=STEPS, method=method, progress=False, **options)


RUNS = {
    "sample": lambda model, **options: sample(model, record_x=True, **options),
    "ddim": lambda model, **options: invert(model, "ddim", record_h=True, **options),
    "fixed-point": lambda model, **options: invert(model, "fixed-point", record_x=True, **options),
    "edit-friendly": lambda model, **options: invert(model, "edit-friendly", **options),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_batch_beyond_the_memory_is_halved_once_said_and_replays_exactly(tiny, memory, name):
    expected = RUNS[name](tiny, batch_size=2)
    memory(2)
    with pytest.warns(UserWarning, match="batches of 5") as said:
        run = RUNS[name](tiny, batch_size=5)
    assert [str(w.message) for w in said if "memory" in str(w.message)] == [str(said[0].message)]
    assert run.batch_size == 2
    for field in ("x_T", "x0", "stored_noise", "residual"):
        assert getattr(run, field) is None or torch.equal(getattr(run, field), getattr(expected, field))
    for field in ("h", "x"):
        assert getattr(run, field) is None or torch.equal(getattr(run, field).values, getattr(expected, field).values)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = wb.replay(run, progress=False)
    if name == "sample":
        assert torch.equal(again.x0, run.x0)


def test_a_grid_beyond_the_memory_is_that_of_small_batches(tiny, memory):
    run = sample(tiny)
    settings = {"scales": [-1.0, 0.0, 1.0, 2.0], "progress": False}
    expected = wb.edit_grid(tiny, run, direction(tiny, run), batch_size=4, **settings)
    sizes = memory(4)
    with pytest.warns(UserWarning, match="batches of 13"):
        grid = wb.edit_grid(tiny, run, direction(tiny, run), batch_size=13, **settings)
    assert torch.equal(grid.images, expected.images)
    assert sizes[:3] == [13, 7, 4]


def test_an_extraction_asks_for_the_smaller_batch_from_then_on(tiny, tmp_path, memory, monkeypatch):
    monkeypatch.setattr(extraction, "chunk_size", lambda *_, **__: 4)
    sizes = memory(2)
    with pytest.warns(UserWarning, match="batches of 4"):
        store = wb.extract(tiny, 10, steps=STEPS, batch_size=8, out=tmp_path / "a.zarr", progress=False)
    assert sizes == [4] + 5 * STEPS * [2]
    assert store.complete


def test_one_sample_beyond_the_memory_is_the_devices_own_error(tiny, memory):
    memory(0)
    with pytest.warns(UserWarning, match="batches of 5"), pytest.raises(torch.OutOfMemoryError, match=r"2\.00 GiB"):
        sample(tiny)


class NoFloat64(TorchDispatchMode):
    """Refuses what MPS refuses."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves((args, kwargs, out)):
            if isinstance(each, torch.Tensor) and each.dtype == torch.float64:
                raise TypeError(f"float64 in {func}")
        return out


def test_passes_and_edits_need_no_float64(tiny, monkeypatch):
    monkeypatch.setenv("WORKBENCH_THREADS", "1")  # a mode sees the operations of its own thread
    run = sample(tiny)
    found = direction(tiny, run)
    with NoFloat64():
        with pytest.raises(TypeError, match="float64 in"):
            torch.ones(1).double()
        for make in RUNS.values():
            make(tiny)
        for asymmetric in (False, True):
            wb.edit(tiny, run, found, asymmetric=asymmetric, gain="match", progress=False)
            wb.edit_grid(tiny, run, found, scales=[1.0], asymmetric=asymmetric, progress=False)


def test_a_large_draw_is_the_same_by_many_threads_and_uses_them(monkeypatch):
    shape, seeds = (3, 16, 16), range(40, 48)
    expected, threads = noise.step_noise(seeds, shape, t=7), set()
    generator = noise.np.random.Generator

    def seen(*args):
        threads.add(threading.get_ident())
        return generator(*args)

    monkeypatch.setattr(noise, "LARGE", 1)
    monkeypatch.setattr(noise.np.random, "Generator", seen)
    monkeypatch.setenv("WORKBENCH_THREADS", "3")
    assert torch.equal(noise.step_noise(seeds, shape, t=7), expected)
    assert threads and threading.get_ident() not in threads


def test_several_writers_write_the_store_of_one(tiny, tmp_path, monkeypatch):
    """Chunks are finished in any order, and no more than these are in memory."""
    monkeypatch.setattr(extraction, "chunk_size", lambda *_, **__: 2)
    one = wb.extract(tiny, 9, steps=STEPS, out=tmp_path / "one.zarr", progress=False)
    first, order = threading.Event(), []

    def late(store, chunk, values):
        if chunk == 0:
            assert first.wait(60)
        write_chunk(store, chunk, values)
        order.append(chunk)
        if chunk == 2:
            first.set()

    monkeypatch.setattr(extraction, "write_chunk", late)
    monkeypatch.setitem(extraction.WRITERS, "cpu", 3)
    three = wb.extract(tiny, 9, steps=STEPS, out=tmp_path / "three.zarr", progress=False)
    assert order.index(2) < order.index(0) and sorted(order) == [0, 1, 2, 3, 4]
    for name, array in one.group.arrays():
        np.testing.assert_array_equal(three.group[name][:], array[:])


@pytest.mark.parametrize("device", [None, "cuda"])
def test_each_launched_process_has_a_gpu_of_its_own(monkeypatch, device):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    found = []
    for rank in range(5):
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        found.append(str(models.find_device(device)))
    assert found == ["cuda:0", "cuda:1", "cuda:2", "cuda:3", "cuda:0"]


@pytest.mark.parametrize("mode", [True, "reduce-overhead"])
def test_a_compiler_that_computes_something_else_is_refused(tiny_folder, monkeypatch, mode):
    """As a graph would that gives a later output in place of an earlier one."""
    asked, last = set(), {}

    def compiled(self, *, mode, dynamic):
        asked.add(mode)
        forward = self.forward

        def stale(*args, **kwargs):
            given, last[self] = last.get(self), forward(*args, **kwargs)
            return last[self] if given is None else given

        self.forward = stale

    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    with pytest.raises(ValueError, match="differs by"):
        wb.load_model(tiny_folder, device="cpu", compile=mode)
    assert asked == {"default" if mode is True else mode}


@pytest.mark.slow
def test_blocks_of_one_class_are_all_compiled_for_every_size_of_batch(make_unet, monkeypatch):
    """The compiler keeps eight versions of a function: five blocks of a class would need ten for two sizes."""
    config = {"sample_size": 16, "block_out_channels": (4, 8, 12, 16, 20), "add_attention": False}
    unet = make_unet(**config, down_block_types=("DownBlock2D",) * 5, up_block_types=("UpBlock2D",) * 5)
    compiled, calls = torch.nn.Module.compile, []

    def counting(graph, inputs):
        return lambda *args: calls.append(1) or graph.forward(*args)

    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, mode, **rest: compiled(self, backend=counting, **rest))
    plain, model = (wb.wrap(unet, wb.NoiseSchedule.linear(), name="five", device="cpu") for _ in range(2))
    models.compile_blocks(model)
    with torch.inference_mode():
        for n in (1, 2, 3):
            calls.clear()
            x_t = torch.randn(n, 3, 16, 16, generator=torch.Generator().manual_seed(n))
            torch.testing.assert_close(model(x_t, 5), plain(x_t, 5), atol=1e-5, rtol=1e-5)
            assert len(calls) == len(model.unet.stages.blocks) == 11
