"""Extraction by several processes, and to an address instead of a folder."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap

import numpy as np
import pytest

import workbench as wb
from workbench.hspace import extract as extraction
from workbench.hspace.store import read_store

# Its chunks are of two samples, so that there is something to share; the last of the arguments kills a process.
SCRIPT = """
import os, sys
import torch
import workbench as wb
from workbench.hspace import extract as extraction

folder, out, dies_after = sys.argv[1], sys.argv[2], int(sys.argv[3])
torch.set_num_threads(1)
extraction.chunk_size = lambda *args, **kwargs: 2
write, written = extraction.write_chunk, []

def write_chunk(store, chunk, values):
    write(store, chunk, values)
    written.append(chunk)
    if len(written) == dies_after:
        os._exit(9)

extraction.write_chunk = write_chunk
store = wb.extract(wb.load_model(folder, device="cpu"), 11, steps=3, out=out, progress=False)
print("chunks", *sorted(written), "complete", store.complete)
"""


def launch(count: int, folder, out, *, dies: dict[int, int] | None = None) -> list[subprocess.Popen]:
    """Start processes as a launcher does; `dies` says after how many chunks a rank is killed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {**os.environ, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(count)}
    started = []
    for rank in range(count):
        words = [sys.executable, "-c", textwrap.dedent(SCRIPT), str(folder), str(out), str((dies or {}).get(rank, 0))]
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank), "ACCELERATE_USE_CPU": "true"}
        started.append(subprocess.Popen(words, env=environment, stdout=subprocess.PIPE, text=True))
    return started


@pytest.fixture
def one_process(tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(extraction, "chunk_size", lambda *args, **kwargs: 2)
    return wb.extract(wb.load_model(tiny_folder, device="cpu"), 11, steps=3, out=tmp_path / "one.zarr", progress=False)


def assert_equal(store, other):
    assert store.complete and store.provenance == other.provenance
    for name, array in other.group.arrays():
        np.testing.assert_allclose(store.group[name][:], array[:], rtol=1e-3, atol=1e-3, err_msg=name)


@pytest.mark.slow
def test_killed_processes_resume_in_another_number_to_the_store_of_one(tiny_folder, tmp_path, one_process):
    out = tmp_path / "many.zarr"
    first, second = launch(2, tiny_folder, out, dies={1: 1})
    assert second.wait(timeout=120) == 9
    first.kill()  # as launchers do when a process dies
    first.wait(timeout=120)
    done = np.flatnonzero(read_store(out).group["done"][:])
    assert 1 in done and len(done) < 6

    again = launch(2, tiny_folder, out)
    outputs = [process.communicate(timeout=120)[0].split() for process in again]
    chunks = [set(words[1 : words.index("complete")]) for words in outputs]
    assert chunks[0] and not chunks[0] & chunks[1]
    assert chunks[0] | chunks[1] == {str(c) for c in range(6) if c not in done}
    assert all(words[-1] == "True" for words in outputs)
    assert_equal(wb.open_store(out), one_process)


def test_a_store_at_an_address_is_that_of_a_folder(tiny_folder, tmp_path, one_process):
    # fsspec gives all addresses one interface; this one needs no server and no account.
    address = f"memory://{tmp_path}/there.zarr"
    model = wb.load_model(tiny_folder, device="cpu")
    store = wb.extract(model, 11, steps=3, out=address, progress=False)
    assert store.path == address and not store.cached
    assert_equal(store, one_process)
    np.testing.assert_array_equal(store.at(store.timesteps[1]), one_process.at(store.timesteps[1]))
    assert wb.extract(model, 11, steps=3, out=address, progress=False).cached
    with pytest.raises(ValueError, match="other inputs"):
        wb.extract(model, 11, steps=3, eta=0.5, out=address, progress=False)


def test_an_address_resumes_and_a_missing_one_is_a_sentence(tiny_folder, tmp_path, one_process):
    address = f"memory://{tmp_path}/there.zarr"
    model = wb.load_model(tiny_folder, device="cpu")
    with pytest.raises(FileNotFoundError, match="no store at memory://"):
        wb.open_store(address)
    wb.extract(model, 11, steps=3, out=address, progress=False).group["done"][2] = 0
    with pytest.raises(ValueError, match="not finished"):
        wb.open_store(address)
    store = wb.extract(model, 11, steps=3, out=address, progress=False)
    assert not store.cached
    assert_equal(store, one_process)


def test_a_file_address_is_a_folder(tiny_folder, tmp_path):
    model = wb.load_model(tiny_folder, device="cpu")
    wb.extract(model, 2, steps=2, out=f"file://{tmp_path}/here.zarr", progress=False)
    assert len(wb.open_store(tmp_path / "here.zarr")) == 2


def test_one_process_needs_no_launcher(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert extraction.launched()[:2] == (0, 1)
