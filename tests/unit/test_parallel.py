"""On a CPU the samples of a batch are split over threads, and nobody can tell from the results."""

from __future__ import annotations

import os
import sys
import threading

import pytest
import torch
from diffusers import DDPMScheduler
from processes import start_process

import workbench as wb
from workbench.diffusion import parallel
from workbench.diffusion.parallel import cpu_batch, in_threads, split, thread_count


@pytest.fixture
def threads(monkeypatch):
    """Sets the number of threads that compute."""
    return lambda n: monkeypatch.setenv(parallel.THREADS, str(n))


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 32, 32), (3, 64, 64), (1, 256, 256), (3, 32, 64)])
def test_the_pieces_of_a_batch_are_all_of_it_of_almost_one_size_and_not_tiny(shape):
    for n in range(1, 200):
        pieces = split(n, shape)
        sizes = [piece.stop - piece.start for piece in pieces]
        assert [i for piece in pieces for i in range(piece.start, piece.stop)] == list(range(n))
        assert max(sizes) - min(sizes) <= 1
        assert len(pieces) == 1 or min(sizes) * shape[1] * shape[2] >= parallel.LEAST_PIXELS / 2


def everything(model, folder) -> dict[str, torch.Tensor]:
    """A tensor of every loop over samples."""
    options = {"steps": 2, "progress": False}
    run = wb.sample(model, range(8), record_h=True, **options)
    store = wb.extract(model, 8, steps=2, out=folder / f"{os.environ[parallel.THREADS]}.zarr", progress=False)
    direction = wb.find_pca(store, k=1, progress=False)[0]
    inverted = wb.invert(model, run.x0.clamp(-1, 1), record_h=True, **options)
    spectrum = wb.find_jacobian(model, run[0], t=run.timesteps[1], k=2, max_iterations=1, tol=1.0, progress=False)
    return {
        "samples": run.x0,
        "h": run.h.values,
        "inverted": inverted.x_T,
        "replayed": wb.replay(inverted, progress=False).x0,
        "edited": wb.edit_grid(model, run, direction, scales=[-2, 1], progress=False).images,
        "asymmetric": wb.edit_grid(model, run, direction, scales=[2], asymmetric=True, progress=False).images,
        "Jacobian": torch.stack([each.delta() for each in spectrum]),
    }


def test_results_are_the_same_bits_for_any_number_of_threads(make_unet, threads, tmp_path):
    """Also where torch itself has another number of threads, which counts no more than theirs."""
    model = wb.wrap(make_unet(sample_size=32), DDPMScheduler(), name="small", device="cpu")
    assert len(split(8, model.image_shape)) > 1
    results = []
    for count, torchs in ((1, 1), (3, 2)):
        threads(count)
        before = torch.get_num_threads()
        torch.set_num_threads(torchs)
        try:
            results.append(everything(model, tmp_path))
        finally:
            torch.set_num_threads(before)
    for name, expected in results[0].items():
        for other in results[1:]:
            assert torch.equal(expected, other[name]), name


def test_the_pieces_run_on_several_threads_of_one_compute_thread_each(threads):
    threads(2)
    together = threading.Barrier(2, timeout=20)

    def piece(rows: slice) -> tuple[int, int, bool, bool]:
        together.wait()  # passes only if two run at the same time
        return rows.start, torch.get_num_threads(), torch.is_inference_mode_enabled(), torch.is_grad_enabled()

    pieces = [slice(i, i + 1) for i in range(4)]
    with torch.inference_mode():
        assert in_threads(piece, pieces) == [(i, 1, True, False) for i in range(4)]
    with torch.no_grad():
        assert [each[2:] for each in in_threads(piece, pieces)] == [(False, False)] * 4
    assert [each[2:] for each in in_threads(piece, pieces)] == [(False, True)] * 4


def test_the_threads_of_the_users_process_stay_as_they_are(threads):
    """Those of the calling thread, and those of a thread that starts later."""
    threads(2)
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(3)
    try:
        in_threads(lambda rows: torch.ones(4) @ torch.ones(4), [slice(0, 1), slice(1, 2)])
        later = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
        later.start()
        later.join()
        assert [torch.get_num_threads(), *seen] == [3, 3]
    finally:
        torch.set_num_threads(before)


def test_a_pass_within_a_pass_waits_for_no_thread(threads):
    threads(1)
    before = torch.get_num_threads()
    torch.set_num_threads(2)  # or else all would run here
    try:
        pieces = [slice(0, 1), slice(1, 2)]
        nested = in_threads(lambda rows: in_threads(lambda inner: inner.start, pieces), pieces)
    finally:
        torch.set_num_threads(before)
    assert nested == [[0, 1], [0, 1]]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_has_threads_of_its_own(threads):
    threads(2)
    pieces = [slice(0, 1), slice(1, 2)]
    in_threads(lambda rows: rows.start, pieces)
    child = start_process(lambda: sys.exit(40 + in_threads(lambda rows: rows.start, pieces)[1]))
    child.join(60)
    child.kill()
    assert child.exitcode == 41


def test_their_number_is_that_of_the_variable_else_torchs(monkeypatch, threads):
    monkeypatch.delenv(parallel.THREADS, raising=False)
    monkeypatch.setattr(parallel.torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(parallel.joblib, "cpu_count", lambda: 5)
    assert thread_count() == 5, "no more than the cores that this process may use"
    monkeypatch.setattr(parallel.torch, "get_num_threads", lambda: 2)
    assert thread_count() == 2
    threads("")
    assert thread_count() == 2
    threads(7)
    assert thread_count() == 7
    for bad in ("0", "two", "-1"):
        threads(bad)
        with pytest.raises(ValueError, match="WORKBENCH_THREADS"):
            thread_count()


def test_a_batch_has_work_for_every_thread(threads):
    threads(2)
    assert [cpu_batch((3, side, side)) for side in (32, 64, 256)] == [32, 8, 2]
    threads(16)
    assert [cpu_batch((3, side, side)) for side in (32, 64, 256)] == [128, 32, 16]
    assert len(split(128, (3, 32, 32))) == 16


def test_passes_are_counted_for_whoever_follows(model, tmp_path, monkeypatch):
    monkeypatch.setenv(parallel.PROGRESS, str(tmp_path))
    before = parallel._passes
    wb.sample(model, range(3), steps=4, progress=False)
    assert parallel._passes - before == 12
    assert int((tmp_path / str(os.getpid())).read_text()) == parallel._passes
