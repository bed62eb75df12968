"""Extraction: the store is what sampling gives, whatever happened on the way."""

from __future__ import annotations

import errno
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import zarr
from diffusers import DDPMScheduler
from processes import start_process
from zarr.storage import LocalStore

import workbench as wb
from workbench.hspace import extract as extraction
from workbench.hspace.store import create_store, read_store

STEPS = 4


def extract(model, *args, **options):
    return wb.extract(model, *args, **{"steps": STEPS, "progress": False, **options})


def contents(path) -> dict[str, np.ndarray]:
    return {name: array[:] for name, array in zarr.open_group(path, mode="r").arrays()}


def assert_same(path, other) -> None:
    a, b = contents(path), contents(other)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)
    assert dict(zarr.open_group(path).attrs) == dict(zarr.open_group(other).attrs)


@pytest.fixture
def small_chunks(monkeypatch, tiny):
    """Two samples a chunk."""
    monkeypatch.setattr(extraction, "CHUNK_BYTES", 2 * STEPS * 4 * int(np.prod(tiny.h_shape)))


@pytest.fixture
def no_passes(monkeypatch, tiny):
    """Call it, and from then on the network may not be used."""

    def refuse(*arguments):
        raise AssertionError("the network was used")

    return lambda: monkeypatch.setattr(type(tiny), "encode", refuse)


# What is in it


def test_the_store_is_what_sampling_gives(tiny, cache):
    run = wb.sample(tiny, range(3, 8), steps=STEPS, record_h=True, record_x=True, progress=False)
    store = extract(tiny, 5, seed=3, record_x=True)
    assert (len(store), store.seeds) == (5, (3, 4, 5, 6, 7))
    assert (store.timesteps, store.h_shape) == (run.timesteps, tiny.h_shape)
    exact = extract(tiny, 5, seed=3, dtype="float32")
    assert exact.group["h"].dtype == np.float32
    for t in run.timesteps:
        # float16 keeps 11 bits.
        np.testing.assert_allclose(store.at(t), run.h.at(t), rtol=1e-3, atol=1e-4)
        np.testing.assert_allclose(store.at(t, space="x"), run.x.at(t), rtol=1e-3, atol=1e-3)
        np.testing.assert_array_equal(np.concatenate(list(store.batches(t))), store.at(t))
        np.testing.assert_array_equal(exact.at(t), run.h.at(t))
    np.testing.assert_allclose(store.images[:], run.x0.numpy(), rtol=1e-5, atol=1e-4)


def test_any_seeds_in_any_order(tiny, cache):
    store, run = extract(tiny, seeds=[9, 2**40, 4]), wb.sample(tiny, [4], steps=STEPS, record_h=True, progress=False)
    assert store.seeds == (9, 2**40, 4)
    np.testing.assert_allclose(store.at(0)[2], run.h.at(0)[0], rtol=1e-3, atol=1e-3)


def test_the_store_does_not_depend_on_batches_and_chunks(tiny, tmp_path, small_chunks):
    whole = extract(tiny, 5, out=tmp_path / "a.zarr", dtype="float32")
    assert whole.provenance["chunk"] == 2
    single = extract(tiny, 5, out=tmp_path / "b.zarr", dtype="float32", batch_size=1)
    for t in whole.timesteps:
        np.testing.assert_allclose(single.at(t), whole.at(t), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tap", ["before", "middle", "after"])
def test_the_tap_is_the_models_and_recorded(tiny, cache, tap):
    model = tiny.tapped(tap)
    store = extract(model, 2)
    run = wb.sample(model, range(2), steps=STEPS, record_h=True, progress=False)
    assert store.provenance["model"]["tap"] == tap
    assert repr(tap) in repr(store)
    np.testing.assert_allclose(store.at(750), run.h.at(750), rtol=1e-3, atol=1e-3)


def test_images_are_inverted(tiny, cache):
    images = torch.rand(3, *tiny.image_shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    store = extract(tiny, images=images, record_x=True)
    inverted = wb.invert(tiny, images, steps=STEPS, record_h=True, record_x=True, progress=False)
    for t in inverted.timesteps:
        np.testing.assert_allclose(store.at(t), inverted.h.at(t), rtol=1e-3, atol=1e-3)
        np.testing.assert_allclose(store.at(t, space="x"), inverted.x.at(t), rtol=1e-3, atol=1e-3)
    np.testing.assert_array_equal(store.images[:], images.numpy())
    np.testing.assert_allclose(store.x_T[:], inverted.x_T.numpy(), rtol=1e-5, atol=1e-5)
    assert store.seeds is store.names is None
    assert "inverted images" in repr(store)
    assert set(store.provenance["etas"]) == {0.0}
    assert extract(tiny, images=images.clone(), record_x=True).cached
    assert not extract(tiny, images=images * 0.5, record_x=True).cached


def test_a_folder_of_labelled_images_is_inverted_at_the_models_size_and_keeps_its_names(tiny, cache):
    images = wb.load_images("avataaars").select([5, 2, 9])
    store = extract(tiny, images=images)
    np.testing.assert_allclose(store.images[:], images.at_size(8)[:].numpy(), atol=1e-6)
    assert store.names == ("00005.webp", "00002.webp", "00009.webp")
    assert extract(tiny, images=images).cached
    assert not extract(tiny, images=images.select([0, 2])).cached


def test_what_is_kept_says_where_it_came_from_and_images_can_be_left_out(tiny, cache):
    store = wb.open_store(extract(tiny, 3, seed=5, eta=[1, 0.5, 0, 0], images=False).path)
    expected = {"seeds": {"first": 5, "n": 3}, "etas": [1.0, 0.5, 0.0, 0.0], "timesteps": [750, 500, 250, 0]}
    expected |= {"model": tiny.provenance(), "dtype": "float16", "workbench": wb.__version__}
    assert {name: store.provenance[name] for name in expected} == expected
    assert set(store.summary().index) == {"h", "seeds", "done"}
    with pytest.raises(ValueError, match="images=True"):
        _ = store.images


# Asking again


def test_asking_again_computes_nothing(tiny, cache, no_passes):
    first = extract(tiny, 3)
    assert not first.cached and first.path.parent == cache
    assert {p.name for p in cache.iterdir()} == {first.path.name, first.path.name + ".lock"}
    assert not [p for p in first.path.rglob("*") if "partial" in p.name or p.suffix == ".tmp"]
    no_passes()
    again = extract(tiny, 3)
    assert again.cached and "from the cache" in repr(again) and again.path == first.path
    np.testing.assert_array_equal(again.at(0), first.at(0))
    assert extract(tiny, seeds=[0, 1, 2], batch_size=1).cached


def changed(tiny, *, beta_end=0.02, bias=0.0, loud=1.0, dtype=None):
    """The tiny network with another schedule, other weights or another precision."""
    unet = wb.wrap(tiny.unet.unet, DDPMScheduler(), name="tiny", device="cpu").unet.unet
    with torch.no_grad():
        unet.conv_in.bias[0] += bias
        unet.mid_block.resnets[-1].conv2.weight *= loud
    return wb.wrap(unet, DDPMScheduler(beta_end=beta_end), name="tiny", device="cpu", dtype=dtype)


@pytest.mark.parametrize(
    "change",
    [
        lambda m: extract(m, 3),
        lambda m: extract(m, 2, seed=1),
        lambda m: extract(m, seeds=[1, 0]),
        lambda m: extract(m, 2, steps=5),
        lambda m: extract(m, 2, steps=[750, 500, 250, 1]),
        lambda m: extract(m, 2, eta=0.0),
        lambda m: extract(m, 2, eta=[1, 1, 1, 0.5]),
        lambda m: extract(m, 2, dtype="float32"),
        lambda m: extract(m, 2, images=False),
        lambda m: extract(m, 2, record_x=True),
        lambda m: extract(m, images=torch.zeros(2, *m.image_shape)),
        lambda m: extract(m.tapped("before"), 2),
        lambda m: extract(changed(m, bias=0.1), 2),
        lambda m: extract(changed(m, beta_end=0.03), 2),
        lambda m: extract(changed(m, dtype="bfloat16"), 2),
    ],
)
def test_every_input_is_in_the_key(tiny, cache, change):
    base = extract(tiny, 2)
    other = change(tiny)
    assert not other.cached
    assert other.path != base.path


def test_the_code_is_in_the_key_and_the_models_name_is_not(tiny, cache, monkeypatch, tmp_path):
    base = extract(tiny, 2)
    extract(tiny, 2, out=tmp_path / "a.zarr")
    renamed = wb.wrap(tiny.unet.unet, DDPMScheduler(), name="group/other", device="cpu")
    other = extract(renamed, 2)
    assert base.path.stem.split("-")[-1] == other.path.stem.split("-")[-1] and other.path.parent == cache
    assert extract(renamed, 2, out=tmp_path / "a.zarr").cached
    monkeypatch.setattr(extraction, "code_hash", lambda *modules: "changed")
    assert extract(tiny, 2).path != base.path
    with pytest.raises(ValueError, match="changed"):
        extract(tiny, 2, out=tmp_path / "a.zarr")


def test_a_store_of_other_inputs_at_the_same_place_is_refused(tiny, tmp_path):
    extract(tiny, 2, out=tmp_path / "a.zarr")
    before = contents(tmp_path / "a.zarr")
    for options, named in (({"n": 3}, "n"), ({"n": 2, "seed": 4}, "seeds"), ({"n": 2, "eta": 0.5}, "etas")):
        with pytest.raises(ValueError, match=f"holds an extraction of other inputs: its {named} is .*, not "):
            extract(tiny, out=tmp_path / "a.zarr", **options)
    np.testing.assert_array_equal(contents(tmp_path / "a.zarr")["h"], before["h"])


def test_foreign_paths_and_a_damaged_store_are_refused_and_left_alone(tiny, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.tex").write_text("important")
    for foreign in ("thesis", "thesis/chapter1.tex"):
        with pytest.raises(ValueError, match=f"{foreign} is not a store"):
            extract(tiny, 2, out=tmp_path / foreign)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["chapter1.tex", "thesis"], "nor is a lock laid beside"
    assert (tmp_path / "thesis" / "chapter1.tex").read_text() == "important"
    path = extract(tiny, 2, out=tmp_path / "a.zarr").path
    (path / "zarr.json").write_text("{")
    with pytest.raises(ValueError, match="is a store that can't be read"):
        extract(tiny, 2, out=path)


# Cut short


def test_a_failure_at_any_write_is_made_good_by_the_same_call(tiny, tmp_path, small_chunks, monkeypatch):
    """Every single write to the store fails once; what is left resumes to the same store or is none at all."""
    extract(tiny, 5, out=tmp_path / "whole.zarr")
    write, writes = LocalStore.set, []

    async def fail_at(self, key, value):
        writes.append(key)
        if len(writes) == failing:
            raise OSError(errno.EIO, "input/output error")
        await write(self, key, value)

    failing, failures = 1, 0
    while True:
        path = tmp_path / f"{failing}.zarr"
        with monkeypatch.context() as patch:
            patch.setattr(LocalStore, "set", fail_at)
            writes.clear()
            try:
                extract(tiny, 5, out=path)
                break
            except OSError:
                failures += 1
        extract(tiny, 5, out=path)
        assert_same(path, tmp_path / "whole.zarr")
        failing += 1
    # 5 arrays and the group, then 3 chunks of h, x0 and done at least.
    assert failures >= 15


def test_a_kill_right_after_the_store_appeared_loses_no_seeds(tiny, tmp_path, monkeypatch):
    def killed(*arguments, **options):
        create_store(*arguments, **options)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(extraction, "create_store", killed)
        extract(tiny, 3, seed=7, out=tmp_path / "a.zarr")
    assert extract(tiny, 3, seed=7, out=tmp_path / "a.zarr").seeds == (7, 8, 9)


def extract_until_stuck(model: wb.Model, path: Path) -> None:
    """In a process of its own: the third chunk is written and never noted as done."""
    write = extraction.write_chunk

    def stuck(store, chunk, values):
        if chunk < 2:
            return write(store, chunk, values)
        store.group["h"][4:6] = values["h"]
        time.sleep(600)

    extraction.write_chunk = stuck
    extract(model, 11, out=path)


def test_a_killed_extraction_resumes_and_a_second_process_is_refused(tiny, tmp_path, small_chunks, monkeypatch):
    """A real process and a real SIGKILL, while the third of six chunks is being written."""
    model, path = tiny, tmp_path / "a.zarr"
    process = start_process(extract_until_stuck, model, path)
    try:
        deadline = time.monotonic() + 300
        while not (path / "h" / "c" / "2").exists():
            assert process.is_alive(), process.exitcode
            assert time.monotonic() < deadline, "the extraction did not get there in time"
            time.sleep(0.01)
        with pytest.raises(RuntimeError, match="another process is extracting to .*a.zarr; wait for it to end"):
            extract(model, 11, out=path)
    finally:
        process.kill()
        process.join()
    assert read_store(path).group["done"][:].tolist() == [1, 1, 0, 0, 0, 0]

    computed = []
    with monkeypatch.context() as patch:
        patch.setattr(extraction, "sample", lambda m, seeds, **o: computed.append(seeds) or wb.sample(m, seeds, **o))
        resumed = extract(model, 11, out=path)
    assert computed == [(4, 5), (6, 7), (8, 9), (10,)]
    assert resumed.complete and not resumed.cached
    extract(model, 11, out=tmp_path / "whole.zarr")
    assert_same(path, tmp_path / "whole.zarr")


def test_a_real_limit_of_the_operating_system_is_met_the_same_way(tiny, tmp_path):
    """No file may grow beyond 16 kB, as under a quota: zarr's own files fit, a chunk of h does not."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (16_000, hard))
        with pytest.raises(OSError, match="the disk is full after 0 of 20 samples"):
            extract(tiny, 20, out=tmp_path / "a.zarr")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert extract(tiny, 20, out=tmp_path / "a.zarr").complete


def test_an_overflow_is_named_and_never_stored(tiny, cache):
    loud = changed(tiny, loud=1e7)  # h exceeds what float16 can hold
    with pytest.raises(ValueError, match='sample 0, timestep 750 .*float16 .*dtype="float32"'):
        extract(loud, 3)
    (path,) = cache.glob("*.zarr")
    assert not read_store(path).group["done"][:].any()
    store = extract(loud, 3, dtype="float32")
    assert np.abs(store.at(750)).max() > 65504
    assert np.isfinite(store.at(750)).all()


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "give either n, the number of samples, or seeds, or images"),
        ({"n": 2, "seeds": [1]}, "give either n"),
        ({"n": 0}, "n is 0; extract at least one sample"),
        ({"n": range(2)}, "must be the number of samples"),
        ({"n": 2, "seed": -1}, "seeds must be integers"),
        ({"seeds": [3, 3]}, "seed 3 appears more than once"),
        ({"n": 2, "steps": 0}, "takes 1 to 1000 steps"),
        ({"n": 2, "eta": 1.1}, "eta must lie"),
        ({"n": 2, "dtype": "float64"}, "'float64' is not known; it is one of float16, float32"),
        ({"n": 2, "batch_size": 0}, "batch_size is 0"),
        ({"n": 2, "images": torch.zeros(2, 3, 8, 8)}, "not both"),
        ({"images": torch.zeros(2, 3, 16, 16)}, r"takes \(n, 3, 8, 8\)"),
        ({"images": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)}, r"finite floats in \[-1, 1\]"),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing_behind(tiny, cache, options, message):
    with pytest.raises(ValueError, match=message):
        extract(tiny, **options)
    assert not list(cache.glob("*"))
