"""Stores on disk: read one timestep cheaply, refuse what is damaged, foreign or unfinished."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import zarr

import workbench as wb
from workbench.hspace.store import create_store, open_store, read_store, write_chunk

T = (750, 500, 250, 0)
N, CHUNK = 5, 2
PROVENANCE = {
    "model": {"name": "planted", "hash": "0" * 16, "tap": "after", "schedule": {"T": 1000}},
    "n": N,
    "timesteps": list(T),
    "chunk": CHUNK,
    "dtype": "float16",
}
LAYOUT = {
    "h": ((N, 4, 3, 2, 2), "float16"),
    "x": ((N, 4, 3, 4, 4), "float16"),
    "x0": ((N, 3, 4, 4), "float32"),
    "seeds": ((N,), "uint64"),
}
RNG = np.random.default_rng(0)
VALUES = {name: RNG.standard_normal(shape).astype("float32") for name, (shape, _) in LAYOUT.items() if name != "seeds"}


def write(path, *, chunks: int = 3):
    store = create_store(path, PROVENANCE, LAYOUT)
    store.group["seeds"][:] = np.arange(10, 10 + N, dtype="uint64")
    for chunk in range(chunks):
        rows = slice(chunk * CHUNK, (chunk + 1) * CHUNK)
        write_chunk(store, chunk, {name: value[rows] for name, value in VALUES.items()})
    return store


@pytest.fixture
def store(tmp_path):
    write(tmp_path / "a.zarr")
    return open_store(tmp_path / "a.zarr")


# What a store gives


def test_a_timestep_is_the_samples_flattened(store):
    for i, t in enumerate(T):
        h = store.at(t)
        assert (h.shape, h.dtype) == ((N, 12), np.float32)
        np.testing.assert_array_equal(h, VALUES["h"][:, i].reshape(N, -1).astype("float16"))
        np.testing.assert_array_equal(store.at(t, space="x"), VALUES["x"][:, i].reshape(N, -1).astype("float16"))


def test_batches_are_the_same_samples_a_chunk_at_a_time(store):
    batches = list(store.batches(500))
    assert [len(b) for b in batches] == [2, 2, 1]
    np.testing.assert_array_equal(np.concatenate(batches), store.at(500))
    np.testing.assert_array_equal(np.concatenate(list(store.batches(500, space="x"))), store.at(500, space="x"))


def test_a_store_knows_its_samples_and_arrays(store):
    assert (len(store), store.timesteps, store.h_shape, store.complete) == (N, T, (3, 2, 2), True)
    assert store.seeds == (10, 11, 12, 13, 14)
    np.testing.assert_array_equal(store.images[1:3], VALUES["x0"][1:3])
    table = store.summary()
    assert set(table.index) == {"h", "x", "x0", "seeds", "done"}
    shown = [(N, 4, 3, 2, 2), "sample, timestep, C, h, w", "float16"]
    assert table.loc["h", ["shape", "axes", "dtype"]].tolist() == shown
    assert repr(store) == (
        "HStore('planted', 5 generated samples, 4 steps t=750..0, h (3, 2, 2) 'after' the mid block, float16)"
    )


def test_one_file_a_chunk_and_one_timestep_does_not_read_the_others(tmp_path):
    write(tmp_path / "a.zarr")
    shards = [p for p in (tmp_path / "a.zarr" / "h" / "c").rglob("*") if p.is_file()]
    assert len(shards) == 3
    array = zarr.open_group(tmp_path / "a.zarr", mode="r")["h"]
    assert array.chunks == (CHUNK, 1, 3, 2, 2)
    assert array.shards == (CHUNK, 4, 3, 2, 2)
    assert array.metadata.zarr_format == 3


# What it refuses


def test_an_unvisited_timestep_and_what_was_not_kept_are_named(store, tmp_path):
    bare = create_store(tmp_path / "bare.zarr", PROVENANCE, {k: LAYOUT[k] for k in ("h", "seeds")})
    for words, ask in (
        (r"timestep 610 .*\(nearest 750 or 500\)", lambda: store.at(610)),
        ("timestep 610", lambda: list(store.batches(610))),
        ("has no x0; extract with images=True", lambda: bare.images),
        ("has no x; extract with record_x=True", lambda: bare.at(500, space="x")),
        ("has no x_T; only stores of inverted images", lambda: bare.x_T),
        ("space .z. is not known; it is one of h, x", lambda: bare.at(500, space="z")),
    ):
        with pytest.raises(ValueError, match=words):
            ask()


def test_an_unfinished_store_is_not_opened_but_says_how_far_it_is(tmp_path):
    write(tmp_path / "a.zarr", chunks=2)
    with pytest.raises(ValueError, match=r"about 4 of 5 samples"):
        wb.open_store(tmp_path / "a.zarr")
    assert not read_store(tmp_path / "a.zarr").complete
    assert "INCOMPLETE" in repr(read_store(tmp_path / "a.zarr"))
    with pytest.raises(FileNotFoundError, match="nothing.zarr"):
        wb.open_store(tmp_path / "nothing.zarr")


FOREIGN = (
    lambda path: path.mkdir(),
    lambda path: (path.mkdir(), (path / "a.png").write_bytes(b"")),
    lambda path: path.write_text("not a folder"),
    lambda path: zarr.create_group(path, zarr_format=3, attributes={"format": "something else"}),
    lambda path: zarr.create_array(path, shape=(2,), dtype="float32"),
)


@pytest.mark.parametrize("make", FOREIGN)
def test_what_is_no_store_is_refused_and_left_alone(tmp_path, make):
    path = tmp_path / "foreign"
    make(path)

    def files():
        return {p: p.read_bytes() for p in [path, *path.rglob("*")] if p.is_file()}

    before = files()
    with pytest.raises(ValueError, match="foreign is (a Zarr group but )?not a store .*; choose another path$"):
        wb.open_store(path)
    assert files() == before


def attributes(path, change) -> None:
    content = json.loads((path / "zarr.json").read_text())
    change(content["attributes"])
    (path / "zarr.json").write_text(json.dumps(content))


def truncate(file, keep: float = 0.5) -> None:
    file.write_bytes(file.read_bytes()[: int(file.stat().st_size * keep)])


def file_of(path, name: str, chunk: int):
    """The file of one chunk of samples."""
    chunk = path / name / "c" / str(chunk)
    return chunk if chunk.is_file() else next(p for p in chunk.rglob("*") if p.is_file())


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: truncate(p / "zarr.json"), "is a store that can't be read .*; delete it and extract again"),
        (lambda p: (p / "zarr.json").unlink(), "is a store that can't be read"),
        (lambda p: truncate(p / "h" / "zarr.json"), "corrupt|is a store that can't be read"),
        (lambda p: shutil.rmtree(p / "h"), "corrupt"),
        (lambda p: attributes(p, lambda a: a.pop("provenance")), "is a store that can't be read"),
        (lambda p: attributes(p, lambda a: a["provenance"]["timesteps"].pop()), "corrupt"),
        (lambda p: attributes(p, lambda a: a.update(version=99)), "has store format 99, this version reads"),
        (lambda p: file_of(p, "h", 1).unlink(), "files of finished samples are missing"),
        (lambda p: file_of(p, "x0", 2).unlink(), "files of finished samples are missing"),
    ],
)
def test_a_damaged_store_is_refused(tmp_path, damage, message):
    write(tmp_path / "a.zarr")
    damage(tmp_path / "a.zarr")
    with pytest.raises(ValueError, match=message):
        wb.open_store(tmp_path / "a.zarr")


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.97])
def test_a_truncated_shard_is_an_error_where_it_is_read_and_a_leftover_does_not_stand_for_one(tmp_path, keep):
    path = tmp_path / "a.zarr"
    write(path)
    shard = file_of(path, "h", 1)
    truncate(shard, keep)
    with pytest.raises(ValueError, match=r"is corrupt: samples 2..3 of h"):
        wb.open_store(path).at(0)
    shard.rename(shard.with_name("0.1234.partial"))
    with pytest.raises(ValueError, match="missing"):
        wb.open_store(path)


def test_samples_that_are_all_zero_are_no_missing_files(tmp_path):
    """Zarr leaves out chunks that equal the fill value, unless told otherwise."""
    store = create_store(tmp_path / "a.zarr", PROVENANCE, LAYOUT)
    store.group["seeds"][:] = np.zeros(N, "uint64")
    for chunk in range(3):
        size = min(CHUNK, N - chunk * CHUNK)
        write_chunk(store, chunk, {name: np.zeros((size, *VALUES[name].shape[1:]), "float32") for name in VALUES})
    assert not wb.open_store(tmp_path / "a.zarr").at(0).any()


# Writing


@pytest.mark.parametrize(
    ("name", "position", "value", "message"),
    [
        ("h", (1, 2, 0, 0, 0), 1e5, 'h of sample 3, timestep 250 is 100000, which float16 can\'t hold; .*"float32"'),
        ("x", (0, 0, 0, 0, 0), -7e4, "x of sample 2, timestep 750 is -70000, which float16 can't hold"),
        ("h", (0, 3, 0, 0, 0), np.nan, "h of sample 2, timestep 0 is nan.*the model gives no finite value"),
        ("x0", (1, 0, 0, 0), np.inf, "x0 of sample 3 is inf.*the model gives no finite value"),
    ],
)
def test_a_value_that_does_not_fit_is_named_and_the_chunk_is_not_done(tmp_path, name, position, value, message):
    store = write(tmp_path / "a.zarr", chunks=1)
    values = {key: v[2:4].copy() for key, v in VALUES.items()}
    values[name][position] = value
    with pytest.raises(ValueError, match=message):
        write_chunk(store, 1, values)
    assert store.group["done"][:].tolist() == [1, 0, 0]


def test_a_store_appears_whole_or_not_at_all(tmp_path, monkeypatch):
    def killed(*paths):
        raise InterruptedError

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr("workbench.io.os.replace", killed)
        create_store(tmp_path / "a.zarr", PROVENANCE, LAYOUT)
    assert not (tmp_path / "a.zarr").exists()
    create_store(tmp_path / "a.zarr", PROVENANCE, LAYOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["a.zarr"]
