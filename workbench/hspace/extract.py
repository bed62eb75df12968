"""Extraction of h-space to disk: from seeds by sampling, from images by DDIM inversion."""

from __future__ import annotations

import contextlib
import hashlib
import os
import textwrap
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from workbench import __version__, paths
from workbench.diffusion.images import check_images, fingerprint
from workbench.diffusion.inversion import invert
from workbench.diffusion.models import Model
from workbench.diffusion.noise import check_seeds
from workbench.diffusion.sampling import Trajectory, check_batch_size, progress_bar, sample
from workbench.hspace.store import (
    DTYPES,
    HStore,
    create_store,
    disk_error,
    exists,
    key_of,
    open_store,
    read_store,
    write_chunk,
)
from workbench.io import code_hash, locked, one_of

CHUNK_BYTES = 2**28
"""Upper bound of the h of one chunk of samples in memory (float32)."""

WRITERS = {"cpu": 1, "cuda": 3, "mps": 1}
"""Chunks that are written at once. A GPU can compute one in less time than a thread takes to write it."""

PATIENCE = 60.0
"""Seconds to wait for another process's extraction before saying so."""


def extract(
    model: Model,
    n: int | None = None,
    *,
    seeds: Iterable[int] | None = None,
    images: bool | torch.Tensor | Sequence = True,
    steps: int | Sequence[int] = 50,
    eta: float | Sequence[float] = 1.0,
    seed: int = 0,
    out: str | Path | None = None,
    dtype: str = "float16",
    record_x: bool = False,
    batch_size: int | None = None,
    progress: bool = True,
) -> HStore:
    """Record h_t of many samples at every visited timestep, on disk.

    A repeated call with the same inputs returns the finished store at once; an interrupted call, even a killed one,
    resumes and repeats only the chunks in memory. Memory does not grow with n: a chunk is written while the next is
    computed, so memory holds at most two; beside a CUDA device three are written at once, and memory holds four.

    Processes launched together (`accelerate launch`, `torchrun`) share the work: each writes its own chunks, and all
    return the finished store, identical to that of a single process. A different number of processes may resume it.

    Parameters
    ----------
    model : Model
        Its tap decides where h is read: `extract(model.tapped("middle"), ...)`.
    n : int, optional
        Number of samples; their seeds are `seed`, `seed` + 1, ...
    seeds : iterable of int, optional
        The seeds, instead of n.
    images : bool, or images as `invert` takes them; default True
        True keeps the generated images beside h, False leaves them out. Given images are inverted (DDIM, eta 0) in
        place of sampling, and kept; LabelledImages are read chunk by chunk.
    steps : int or sequence of int, default 50
        Number of visited timesteps, or the timesteps, decreasing.
    eta : float or sequence of float, default 1
        0 is DDIM, 1 has the variance of DDPM. Not used for inversion.
    seed : int, default 0
        First seed.
    out : path or address, optional
        Path of the store; by default under `data/cache/`, named by all inputs. It may be an fsspec address such as
        `s3://bucket/name.zarr` (install s3fs), without a lock against two extractions to one address.
    dtype : {"float16", "float32"}
        Precision of h on disk. A value beyond the range of float16 is an error, not an infinity.
    record_x : bool
        Also keep x_t of every timestep.
    batch_size : int, optional
        Samples per pass; chosen by the model if not given.
    progress : bool

    Returns
    -------
    HStore

    Raises
    ------
    ValueError
        If the inputs don't fit the model or each other, or `out` holds a store from other inputs.
    RuntimeError
        If another process is extracting to `out`. For a store in the cache, the call waits for it, and warns
        after a minute.
    OSError
        If the disk is full. The store stays resumable.
    """
    one_of("dtype", dtype, DTYPES)
    source = None if isinstance(images, bool) else images
    if source is None:
        seeds = _seeds(n, seeds, seed)
        origin = {"seeds": _describe(seeds)}
    else:
        if n is not None or seeds is not None:
            raise ValueError("give n or seeds to sample new images, or images to invert, not both")
        if hasattr(source, "at_size"):
            source = source.at_size(model.image_shape)
            check_images(source.select(slice(1)), model)
        else:
            source = check_images(source, model)
        origin = {"images": {"fingerprint": fingerprint(source), "n": len(source)}}
        eta = 0.0
    count = len(seeds) if source is None else len(source)
    if batch_size is not None:
        check_batch_size(batch_size, model, count)
    timesteps = model.schedule.timesteps(steps)
    provenance = {
        "workbench": __version__,
        "code": code_hash(__name__),
        "model": model.provenance(),
        "precision": str(model.dtype).removeprefix("torch."),
        "n": count,
        **origin,
        "timesteps": list(timesteps),
        "etas": list(model.schedule.etas(eta, len(timesteps))),
        "dtype": dtype,
        "keeps": ["h", *(["x0"] if images is not False else []), *(["x"] if record_x else [])],
        "chunk": chunk_size(model.h_shape, model.x_shape, steps=len(timesteps), n=count, record_x=record_x),
    }
    name = f"{model.name.replace('/', '--')}-{key_of(provenance)}.zarr"
    path = paths.cache() / name if out is None else paths.place(out)
    if out is not None and not paths.is_address(path):  # before a lock is laid beside what is not ours
        if exists(path):
            _refuse_other_inputs(read_store(path), provenance)
        else:
            paths.writable(path, folder=True)
    ranks, alone = launched(), contextlib.nullcontext()
    if ranks[0] == 0 and not paths.is_address(path):
        lock = path.with_name(path.name + ".lock")
        alone = locked(lock, f"extracting to {path}", patience=PATIENCE if out is None else None)
    with alone:
        return _extract(model, path, provenance, seeds, source, batch_size, progress, ranks)


def launched() -> tuple[int, int, Callable[[], None]]:
    """Number of this process and of all that `accelerate launch` or `torchrun` began, and a call that waits for all."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return 0, 1, lambda: None
    if not dist.is_initialized():
        # They exchange nothing but that they are ready, which the CPU's backend does for GPUs too.
        dist.init_process_group("gloo", timeout=timedelta(days=7))
    return dist.get_rank(), dist.get_world_size(), dist.barrier


def _extract(model, path, provenance, seeds, source, batch_size, progress, ranks) -> HStore:
    rank, count, wait = ranks
    try:
        if rank == 0 and not exists(path):
            layout = _layout(model, provenance, inverted=source is not None)
            names = [str(name) for name in source.labels.index] if hasattr(source, "labels") else None
            create_store(path, provenance, layout, names=names)
        wait()
        store = read_store(path)
        _refuse_other_inputs(store, provenance)
        if store.complete:
            return replace(store, cached=True)
        if rank == 0 and seeds is not None:
            store.group["seeds"][:] = np.array(seeds, dtype=np.uint64)
    except OSError as error:
        raise disk_error(error, path, "before the first sample") from error
    size, n, timesteps = provenance["chunk"], provenance["n"], provenance["timesteps"]
    todo = [slice(c * size, min((c + 1) * size, n)) for c in np.flatnonzero(store.group["done"][:] == 0)]
    wait()  # all have seen the same list before the first of them shortens it
    mine = todo[rank::count]
    others = n - sum(rows.stop - rows.start for rows in mine)
    options = {"steps": timesteps, "record_h": True, "record_x": "x" in provenance["keeps"]}
    options["batch_size"] = check_batch_size(batch_size, model, n)
    workers = WRITERS.get(model.device.type, 1)
    verb = "extracting" if count == 1 else f"extracting, process 1 of {count}"
    with (
        progress_bar(n, len(timesteps), verb, show=progress and rank == 0) as bar,
        ThreadPoolExecutor(workers, "writer") as writers,
    ):
        bar.update(others * len(timesteps))
        writing: deque[Future] = deque()
        for rows in mine:
            if source is None:
                run = sample(model, seeds[rows], eta=provenance["etas"], progress=bar, **options)
            else:
                part = source[rows] if torch.is_tensor(source) else source.select(rows)
                run = invert(model, part, progress=bar, **options)
            options["batch_size"] = run.batch_size  # smaller than asked for where the device's memory is
            values = {name: _value(run, name) for name in ("h", "x", "x0", "x_T") if name in store.group}
            if len(writing) == workers:
                writing.popleft().result()
            writing.append(writers.submit(write_chunk, store, rows.start // size, values))
        for each in writing:
            each.result()
    wait()
    return open_store(path)


def _value(run: Trajectory, name: str) -> np.ndarray:
    """A quantity of a run, sample first."""
    if name in ("h", "x"):
        return getattr(run, name).values.transpose(0, 1).numpy()
    return (run.images if name == "x0" else run.x_T).numpy()


def _layout(model: Model, provenance: dict, *, inverted: bool) -> dict[str, tuple[tuple[int, ...], str]]:
    n, steps, dtype = provenance["n"], len(provenance["timesteps"]), provenance["dtype"]
    layout = {"h": ((n, steps, *model.h_shape), dtype)}
    if "x" in provenance["keeps"]:
        layout["x"] = ((n, steps, *model.x_shape), dtype)
    if "x0" in provenance["keeps"]:
        layout["x0"] = ((n, *model.image_shape), "float32")
    if inverted:
        layout["x_T"] = ((n, *model.x_shape), "float32")
    else:
        layout["seeds"] = ((n,), "uint64")
    return layout


def chunk_size(
    h_shape: tuple[int, int, int], x_shape: tuple[int, int, int], *, steps: int, n: int, record_x: bool
) -> int:
    """Samples that are written at once: at most 64 and `CHUNK_BYTES`, a power of two, or all."""
    values = np.prod(h_shape) + record_x * np.prod(x_shape)
    fits = max(1, int(CHUNK_BYTES // (4 * steps * values)))
    return min(n, 64, 2 ** (fits.bit_length() - 1))


def _seeds(n: int | None, seeds: Iterable[int] | None, seed: int) -> tuple[int, ...]:
    if (n is None) == (seeds is None):
        raise ValueError("give either n, the number of samples, or seeds, or images to invert")
    if seeds is None and not isinstance(n, (int, np.integer)):
        raise ValueError(f"n is {n!r}, and must be the number of samples; the seeds of some are given as seeds=...")
    if seeds is None and n < 1:
        raise ValueError(f"n is {n}; extract at least one sample")
    return check_seeds(range(seed, seed + n) if seeds is None else seeds)


def _describe(seeds: tuple[int, ...]) -> dict:
    """Seeds in few words: a range, or a hash of the list (the list itself is in the store)."""
    first, n = seeds[0], len(seeds)
    if seeds == tuple(range(first, first + n)):
        return {"first": first, "n": n}
    return {"sha256": hashlib.sha256(np.array(seeds, dtype=np.uint64).tobytes()).hexdigest(), "n": n}


def _refuse_other_inputs(store: HStore, provenance: dict) -> None:
    for name, wanted in provenance.items():
        found = store.provenance.get(name)
        if found != wanted and not (name == "model" and {**found, "name": ""} == {**wanted, "name": ""}):
            found, wanted = (textwrap.shorten(str(value), 80, placeholder="...") for value in (found, wanted))
            differs = f"its {name} is {found}, not {wanted}"
            raise ValueError(f"{store.path} holds an extraction of other inputs: {differs}; choose another path")
