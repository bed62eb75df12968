"""A device that is pretended refuses what a GPU refuses, and every operation of the workbench runs on it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import operations
import pytest
import torch
from mirror import mirror


def test_the_device_refuses_what_a_gpu_refuses():
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:  # it stays in the process that knows it
        elsewhere.submit(refuse).result()


def refuse() -> None:
    here, there = torch.ones(3), torch.ones(3, device=mirror())
    assert there.device.type == "mirror" and torch.equal((there + 1).cpu(), here + 1)
    for mixed in (lambda: here + there, lambda: torch.cat([here, there]), lambda: here[there.long()]):
        with pytest.raises(RuntimeError, match="on one device|on the CPU"):
            mixed()
    with pytest.raises(RuntimeError):
        there.numpy()
    # Numbers, indices and copies may come from the CPU.
    assert (there * torch.tensor(2.0))[torch.tensor([0])].item() == 2.0
    assert torch.equal(here.clone().copy_(there + 1), here + 1)


def test_every_operation_keeps_its_tensors_on_one_device(tmp_path):
    """In a process of its own, as torch has to know the device before it takes a derivative."""
    command = [sys.executable, Path(__file__).with_name("parts.py"), tmp_path, "correctness", "--dry"]
    root = str(Path(__file__).parents[2])
    found = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]
    results = json.loads((tmp_path / "correctness.json").read_text())
    there = [name for name, *_ in (*operations.OPERATIONS, *operations.EXACT)]
    assert all(results[f"{name}, float32"]["passed"] for name in there)
