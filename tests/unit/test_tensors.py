"""Files of tensors with a JSON header: what is written comes back, and each kind is known by its header."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

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


def test_grids_of_version_0_1_load_without_a_checksum(tmp_path):
    path = tmp_path / "grid.safetensors"
    save_file({"images": torch.zeros(1)}, path, metadata={"edit_grid": json.dumps({"rows": ["0"]})})
    assert load_tensors(path, kind="edit_grid")[1] == {"rows": ["0"]}


def test_other_files_have_no_kind(tmp_path):
    (tmp_path / "text").write_text("no tensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "plain.safetensors")
    assert kind_of(tmp_path / "text") is kind_of(tmp_path / "plain.safetensors") is kind_of(tmp_path / "none") is None
