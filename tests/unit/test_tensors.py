"""Files of tensors with a JSON header: what is written comes back, and each kind is known by its header."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from workbench.directions.boundary import load_boundary
from workbench.directions.direction import load_direction
from workbench.editing.render import EditGrid
from workbench.formats.tensors import kind_of, load_tensors, save_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3).T, "b": torch.tensor([True, False])}


def test_what_is_written_comes_back_and_has_a_kind(tmp_path):
    path = save_tensors(tmp_path / "sub" / "x.safetensors", TENSORS, {"name": "x", "t": [1, 2]}, kind="boundary")
    tensors, about = load_tensors(path, kind="boundary")
    assert about == {"name": "x", "t": [1, 2]}
    assert tensors.keys() == TENSORS.keys() and all(torch.equal(tensors[name], TENSORS[name]) for name in TENSORS)
    assert kind_of(path) == "boundary"
    with pytest.raises(ValueError, match="x.safetensors .* no direction"):
        load_tensors(path, kind="direction")


@pytest.mark.parametrize("load", [load_direction, load_boundary, EditGrid.load])
def test_foreign_and_damaged_files_are_refused(load, tmp_path):
    kind = {load_direction: "direction", load_boundary: "boundary"}.get(load, "edit_grid")
    path = tmp_path / "x.safetensors"
    whole = save_tensors(path, TENSORS, {"name": "x"}, kind=kind).read_bytes()
    for content, message in (
        (save({"unit": torch.zeros(1)}), "x.safetensors"),
        (b"not safetensors at all", "truncated or of another kind"),
        (whole[:-5], "truncated or of another kind"),
        (whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:], "checksum"),
        (whole.replace(b'"version":"1"', b'"version":"9"'), "format 9"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            load(path)
        assert kind_of(tmp_path / "none") is None
    path.unlink()
    with pytest.raises(FileNotFoundError, match="x.safetensors"):
        load(path)


def test_grids_of_version_0_1_load_without_a_checksum(tmp_path):
    path = tmp_path / "grid.safetensors"
    save_file({"images": torch.zeros(1)}, path, metadata={"edit_grid": json.dumps({"rows": ["0"]})})
    assert load_tensors(path, kind="edit_grid")[1] == {"rows": ["0"]}


def test_numbers_and_arrays_of_numpy_are_written_as_plain_ones(tmp_path):
    about = {"k": np.int64(3), "share": np.float32(0.5), "etas": np.array([0.0, 1.0])}
    path = save_tensors(tmp_path / "a.safetensors", {"x": torch.zeros(1)}, about, kind="thing")
    found = load_tensors(path, kind="thing")[1]
    assert {key: found[key] for key in about} == {"k": 3, "share": 0.5, "etas": [0.0, 1.0]}
    with pytest.raises(TypeError, match="a object is no value for a file"):
        save_tensors(tmp_path / "b.safetensors", {"x": torch.zeros(1)}, {"k": object()}, kind="thing")
