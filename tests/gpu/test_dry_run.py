"""The checks for a GPU run from beginning to end on a CPU, and they fail where a device computes something else."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import operations
import pytest
import torch

import workbench as wb

HERE = Path(__file__).parent
FILES = {"correctness", "speeds", "edits", "sharing"}


@pytest.mark.slow
def test_a_dry_run_passes_and_each_part_keeps_its_results(tmp_path):
    """With the words `passed` where something is compared, and a file a part."""
    environment = {**os.environ, "PYTHON": sys.executable, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    subprocess.run(["bash", HERE / "run.sh", "--dry", tmp_path], env=environment, check=True, timeout=900)
    results = {path.stem: json.loads(path.read_text()) for path in tmp_path.glob("*.json")}
    assert results.keys() == FILES
    assert len(list(tmp_path.iterdir())) <= 8  # as many files as a borrowed machine may give back
    compared = {name.rpartition(", ")[0] for name in results["correctness"] if "passed" in results["correctness"][name]}
    assert compared == {name for name, *_ in (*operations.OPERATIONS, *operations.EXACT)}
    assert results["sharing"]["two processes"]["passed"]
    assert all(values.get("passed", True) for part in results.values() for values in part.values())


@pytest.fixture(scope="module")
def inputs(tiny):
    return operations.Inputs(tiny)


def altered(make_unet, factor: float) -> wb.Model:
    """The tiny network with one weight changed by a factor."""
    unet = make_unet()
    with torch.no_grad():
        unet.conv_out.weight[0, 0, 1, 1] *= factor
    return wb.wrap(unet, wb.NoiseSchedule.linear(), name="altered", device="cpu")


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (1.5, False), (float("nan"), False)])
def test_a_device_that_computes_something_else_fails(tiny, inputs, make_unet, monkeypatch, factor, passes):
    monkeypatch.setattr(operations, "OPERATIONS", operations.OPERATIONS[:3])
    monkeypatch.setattr(operations, "EXACT", [])
    found = dict(operations.compare(tiny, {"other": altered(make_unet, factor)}, inputs))
    assert list(found) == ["one pass", "sample", "invert, ddim"]
    assert [result["other"]["passed"] for result in found.values()] == [passes] * 3


def test_a_device_that_never_repeats_itself_fails(tiny, inputs, monkeypatch):
    decode, scale = type(tiny).decode, iter(range(1, 10**6))
    monkeypatch.setattr(operations, "OPERATIONS", [])
    monkeypatch.setattr(operations, "EXACT", operations.EXACT[:2])
    monkeypatch.setattr(type(tiny), "decode", lambda self, *args: decode(self, *args) * (1 + 1e-6 * next(scale)))
    found = dict(operations.compare(tiny, {"other": tiny}, inputs))
    assert [result["other"]["passed"] for result in found.values()] == [False, False]
