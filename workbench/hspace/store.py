"""Extracted h-spaces on disk.

A store is a Zarr v3 group. One shard holds all timesteps of a chunk of samples, so adding a chunk writes one file;
inside it each timestep is a chunk of its own, so reading one timestep of all samples reads nothing else.

| array | shape | |
|---|---|---|
| h | (n, steps, C, h, w) | bottleneck activations h_t |
| x0 | (n, C, H, W) | images in [-1, 1], if kept |
| x_T | (n, C, H, W) | starting noise, of inverted images |
| x | (n, steps, C, H, W) | x_t, if recorded |
| seeds | (n,) | of generated samples |
| done | (chunks,) | 1 where a chunk of samples is complete |

The group's attributes hold all inputs that determine the content. A store is a folder, or an fsspec address such as
s3://bucket/name.zarr.
"""

from __future__ import annotations

import errno
import glob
import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import fsspec
import numpy as np
import pandas as pd
import zarr
from zarr.errors import BaseZarrError

from workbench.diffusion.schedule import index_of
from workbench.io import one_of, written
from workbench.paths import is_address, place

FORMAT, VERSION = "hspace-store", 1
DTYPES = ("float16", "float32")


@dataclass(frozen=True, eq=False)
class HStore:
    """An extracted h-space: h_t of n samples at every visited timestep, their images and provenance.

    Attributes
    ----------
    path : Path, or str for an address
    provenance : dict
        All inputs of the extraction: model, seeds or images, timesteps, etas, dtype.
    cached : bool
        True if `extract` found the store finished and computed nothing.
    """

    path: Path | str
    provenance: dict = field(repr=False)
    group: zarr.Group = field(repr=False)
    cached: bool = False

    def __len__(self) -> int:
        return self.group["h"].shape[0]

    @property
    def timesteps(self) -> tuple[int, ...]:
        """Visited timesteps, noisiest first."""
        return tuple(self.provenance["timesteps"])

    @property
    def h_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of one h_t."""
        return self.shape_of("h")

    def shape_of(self, space: str) -> tuple[int, int, int]:
        """(C, h, w) of one h_t (space "h") or x_t ("x"); raises as `at`."""
        return cast(tuple[int, int, int], self._of(space).shape[2:])

    @property
    def seeds(self) -> tuple[int, ...] | None:
        """Seeds of the samples in their order; None for inverted images."""
        return tuple(int(s) for s in self.group["seeds"][:]) if "seeds" in self.group else None

    @property
    def names(self) -> tuple[str, ...] | None:
        """File names of inverted images in their order; None for generated samples and images without names."""
        names = self.group.attrs.get("names")
        return None if names is None else tuple(names)

    @property
    def images(self) -> zarr.Array:
        """Images: array of shape (n, C, H, W), values in [-1, 1]; slicing reads from disk.

        Raises
        ------
        ValueError
            If the store has no images.
        """
        return self._array("x0", "extract with images=True to keep them")

    @property
    def x_T(self) -> zarr.Array:
        """Starting noise of inverted images: array of shape (n, C, H, W), float32."""
        return self._array("x_T", "only stores of inverted images keep it; a seed gives it for generated ones")

    @property
    def complete(self) -> bool:
        """Whether every sample is extracted."""
        return bool(self.group["done"][:].all())

    def at(self, t: int, *, space: str = "h") -> np.ndarray:
        """All samples at timestep `t`, flattened.

        Parameters
        ----------
        t : int
        space : {"h", "x"}
            h_t, or x_t if it was recorded.

        Returns
        -------
        ndarray of shape (n, C*h*w), float32

        Raises
        ------
        ValueError
            If `t` was not visited, or x_t was not recorded.
        """
        values = np.empty((len(self), int(np.prod(self._of(space).shape[2:]))), dtype=np.float32)
        for rows, batch in self._chunks(t, space):
            values[rows] = batch
        return values

    def batches(self, t: int, *, space: str = "h", chunks: Sequence[int] | None = None) -> Iterator[np.ndarray]:
        """Iterate over the samples at timestep `t`, chunk by chunk, in the order of the store or of `chunks`.

        Parameters
        ----------
        t : int
        space : {"h", "x"}
        chunks : sequence of int, optional
            Some of the store's, where a part of the samples is enough.

        Yields
        ------
        ndarray of shape (at most `chunk`, C*h*w), float32
        """
        return (batch for _, batch in self._chunks(t, space, chunks))

    def rows_of(self, chunks: Sequence[int]) -> np.ndarray:
        """Positions of the samples of some chunks, in their order."""
        size = self.provenance["chunk"]
        rows = (np.asarray(chunks)[:, None] * size + np.arange(size)).ravel()
        return rows[rows < len(self)]

    def _chunks(self, t: int, space: str, chunks: Sequence[int] | None = None) -> Iterator[tuple[slice, np.ndarray]]:
        array = self._of(space)
        i = index_of(t, self.timesteps, trained=self.provenance["model"]["schedule"].get("T"))
        size, n = self.provenance["chunk"], array.shape[0]
        for chunk in range(-(-n // size)) if chunks is None else chunks:
            rows = slice(chunk * size, min((chunk + 1) * size, n))
            try:
                values = array[rows, i]
            except (ValueError, RuntimeError, BaseZarrError) as error:
                lost = f"samples {rows.start}..{rows.stop - 1} of {space} can't be read"
                raise ValueError(f"{self.path} is corrupt: {lost}; delete it and extract again") from error
            yield rows, values.reshape(len(values), -1).astype(np.float32)

    def _of(self, space: str) -> zarr.Array:
        return self._array(one_of("space", space, ("h", "x")), "extract with record_x=True to keep x_t")

    def _array(self, name: str, remedy: str) -> zarr.Array:
        if name not in self.group:
            raise ValueError(f"{self.path} has no {name}; {remedy}")
        return cast(zarr.Array, self.group[name])

    def summary(self) -> pd.DataFrame:
        """List the arrays of the store, one per row, with shape, axes, dtype and size on disk."""
        axes = {"h": "sample, timestep, C, h, w", "x": "sample, timestep, C, H, W", "x0": "sample, C, H, W"}
        axes |= {"x_T": "sample, C, H, W", "seeds": "sample", "done": "chunk"}
        rows = {
            name: {
                "shape": array.shape,
                "axes": axes[name],
                "dtype": str(array.dtype),
                "MB on disk": round(array.nbytes_stored() / 1e6, 2),
            }
            for name, array in sorted(self.group.arrays())
        }
        return pd.DataFrame.from_dict(rows, orient="index")

    def __repr__(self) -> str:
        model, t = self.provenance["model"], self.timesteps
        state = ", from the cache" if self.cached else "" if self.complete else ", INCOMPLETE"
        origin = "inverted images" if self.seeds is None else "generated samples"
        return (
            f"HStore({model['name']!r}, {len(self)} {origin}, {len(t)} steps t={t[0]}..{t[-1]}, "
            f"h {self.h_shape} {model['tap']!r} the mid block, {self.group['h'].dtype}{state})"
        )


def open_store(path: str | Path) -> HStore:
    """Open a finished store.

    Parameters
    ----------
    path : path or address

    Returns
    -------
    HStore

    Raises
    ------
    FileNotFoundError
        If there is nothing at `path`.
    ValueError
        If it is not a store, is corrupt, has another format version, or is not finished.
    """
    store = read_store(path)
    if not store.complete:
        done = int(store.group["done"][:].sum()) * store.provenance["chunk"]
        done = f"about {min(done, len(store))} of {len(store)} samples"
        raise ValueError(f"{path} is not finished ({done}); repeat the call to extract to resume it")
    return store


def read_store(path: str | Path) -> HStore:
    """Open a store that may not be finished; raises as `open_store` otherwise."""
    path = place(path)
    if not exists(path):
        raise FileNotFoundError(f"there is no store at {path}; make one with extract")
    try:
        group = zarr.open_group(path, mode="r+")
        attributes = dict(group.attrs)
        if attributes.get("format") != FORMAT:
            raise ValueError(f"{path} is a Zarr group but not a store of the workbench; choose another path")
        if attributes.get("version") != VERSION:
            version = attributes.get("version")
            raise ValueError(f"{path} has store format {version}, this version reads {VERSION}; extract again")
        store = HStore(path, attributes["provenance"], group)
        arrays = {name for name, _ in group.arrays()}
        if {"h", "done"} - arrays or group["h"].shape[1] != len(store.timesteps):
            raise ValueError(f"{path} is corrupt: its arrays don't match its description; delete it and extract again")
        finished, files = np.flatnonzero(group["done"][:]), _files(path)
        if not all(_chunk_file(group[name], c) in files for name in arrays - {"done"} for c in finished):
            raise ValueError(f"{path} is corrupt: files of finished samples are missing; delete it and extract again")
    except (BaseZarrError, KeyError, OSError, json.JSONDecodeError, TypeError) as error:
        if is_address(path) or not all((path / name / "zarr.json").is_file() for name in ("h", "done")):
            raise ValueError(f"{path} is not a store of the workbench; choose another path") from error
        reason = f"is a store that can't be read ({type(error).__name__})"
        raise ValueError(f"{path} {reason}; delete it and extract again") from error
    return store


def exists(path: Path | str) -> bool:
    """Whether there is something at `path`; at an address, where layouts can be cut short, a described group."""
    if not is_address(path):
        return path.exists()
    files, root = fsspec.url_to_fs(path)
    return files.exists(f"{root}/zarr.json") and bool(zarr.open_group(path, mode="r").attrs)


def _files(path: Path | str) -> set[str]:
    """Names of all files below `path`, relative to it."""
    if not is_address(path):
        return {file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()}
    files, root = fsspec.url_to_fs(path)
    return {name.removeprefix(root).lstrip("/") for name in files.find(root)}


def _chunk_file(array: zarr.Array, chunk: int) -> str:
    """Where an array keeps a chunk of samples, relative to the store."""
    return "/".join([array.name.lstrip("/"), "c", str(chunk), *["0"] * (array.ndim - 1)])


def create_store(
    path: Path | str,
    provenance: dict,
    arrays: dict[str, tuple[tuple[int, ...], str]],
    *,
    names: list[str] | None = None,
) -> HStore:
    """Lay out an empty store; it appears at `path` whole or not at all.

    Parameters
    ----------
    path : Path, or str for an address
    provenance : dict
        With "chunk", the number of samples that are written at once.
    arrays : dict of name -> (shape, dtype)
        The first axis of each is the sample.
    names : list of str, optional
        File names of inverted images.
    """
    attributes = {"format": FORMAT, "version": VERSION, "provenance": provenance, "names": names}
    if is_address(path):
        # Objects can't be renamed, so the description comes last.
        group = zarr.open_group(path, mode="a", zarr_format=3)
        _add_arrays(group, provenance["chunk"], arrays)
        group.attrs.update(attributes)
        return read_store(path)
    for leftover in path.parent.glob(f"{glob.escape(path.name)}.partial-*"):  # of a process that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    with written(path, folder=True) as partial:
        _add_arrays(zarr.create_group(partial, zarr_format=3, attributes=attributes), provenance["chunk"], arrays)
    return read_store(path)


def _add_arrays(group: zarr.Group, size: int, arrays: dict[str, tuple[tuple[int, ...], str]]) -> None:
    n = arrays["h"][0][0]
    for name, (shape, dtype) in arrays.items():
        per_step = name in ("h", "x")
        group.create_array(
            name,
            shape=shape,
            dtype=dtype,
            chunks=(min(size, n), 1, *shape[2:]) if per_step else (min(size, n), *shape[1:]),
            shards=(min(size, n), *shape[1:]) if per_step else None,
            # Activations and noise do not compress; images do.
            compressors="auto" if name == "x0" else None,
            # No chunk consists of these, so that zarr writes all of them and a missing file is a loss.
            fill_value=np.iinfo(dtype).max if dtype == "uint64" else np.nan,
            # Of a layout that was cut short at an address.
            overwrite=True,
        )
    group.create_array("done", shape=(-(-n // size),), dtype="uint8", chunks=(1,), compressors=None, overwrite=True)


def write_chunk(store: HStore, chunk: int, values: dict[str, np.ndarray]) -> None:
    """Write the values of one chunk of samples by name, then mark it as done.

    A value that does not fit the store's dtype is a ValueError that names sample and timestep. After a full disk, what
    was done before stays, and the same call resumes.
    """
    start = chunk * store.provenance["chunk"]
    try:
        for name, value in values.items():
            # zarr would compare every chunk with the fill value, which takes as long as writing it.
            array = store.group[name].with_config({"write_empty_chunks": True})
            with np.errstate(over="ignore"):  # refused below, with the place
                stored = value.astype(array.dtype)
                # The ends of the range tell whether all is finite, ten times as fast as isfinite of each float16.
                ends = np.array([value.min(), value.max()]).astype(array.dtype)
            if not np.isfinite(ends).all():
                _refuse(store, name, value, stored, start)
            array[start : start + len(stored)] = stored
        store.group["done"][chunk] = 1
    except OSError as error:
        raise disk_error(error, store.path, f"after {start} of {len(store)} samples") from error


def disk_error(error: OSError, path: Path, when: str) -> OSError:
    """A sentence for a full disk; any other error as it is."""
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return error
    remedy = "free some space and make the same call again, it resumes there"
    return OSError(error.errno, f"the disk is full {when}; {remedy}", str(path))


def _refuse(store: HStore, name: str, value: np.ndarray, stored: np.ndarray, start: int) -> None:
    where = np.argwhere(~np.isfinite(stored))[0]
    at = f"sample {start + where[0]}" + (f", timestep {store.timesteps[where[1]]}" if name in ("h", "x") else "")
    worst = value[tuple(where)]
    remedy = 'extract with dtype="float32"' if np.isfinite(worst) else "the model gives no finite value there"
    raise ValueError(f"{name} of {at} is {worst:g}, which {stored.dtype} can't hold; {remedy}")


def key_of(provenance: dict) -> str:
    """Name of a set of inputs: 16 hexadecimal digits of a SHA-256. The model's name is no input, its weights are."""
    inputs = {**provenance, "model": {k: v for k, v in provenance["model"].items() if k != "name"}}
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:16]
