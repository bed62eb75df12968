"""Kernels that are copies of one process: as fresh as others, and gone when they should be."""

from __future__ import annotations

import contextlib
import os
import time

import psutil
import pytest
from notebook_files import output_of, write_notebook

from workbench import paths
from workbench.report import notebooks
from workbench.report.kernels import KernelServer, environment
from workbench.report.plans import Run
from workbench.report.running import Job

# The reports of tests/browser/test_all_reports.py run in such kernels, where one is enough for all notebooks.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not KernelServer.possible(), reason="kernels are copied on Linux alone"),
]


@pytest.fixture(scope="module")
def server():
    """One for all tests, since it imports for seconds; the last of them ends it."""
    with KernelServer(environment(1)) as server:
        yield server


def run(server: KernelServer, name: str, **options) -> notebooks.Report:
    with contextlib.closing(Job(name, threads=1, kernels=server)) as job:
        return notebooks.run_job(job, Run(name, {}, paths.reports() / f"{name}.ipynb"), **options)


def test_they_have_imported_what_is_slow_and_are_otherwise_fresh(server, home):
    cell = (
        "import sys, os\nprint('torch' in sys.modules, 'mine' in globals(), os.getcwd(), os.environ['OMP_NUM_THREADS'])"
    )
    write_notebook(home / "notebooks" / "10_a.ipynb", cell, "mine = 1\nimport torch; torch.set_num_threads(3)")
    write_notebook(home / "notebooks" / "20_b.ipynb", cell, "import torch; print(torch.get_num_threads())")
    said = [output_of(run(server, name).notebook).splitlines() for name in ("10_a", "20_b")]
    assert said[0][0] == said[1][0] == f"True False {home / 'notebooks'} 1"
    assert said[1][1] == "1"


def test_one_that_dies_is_a_failure_and_another_starts_after_it(server, home):
    write_notebook(home / "notebooks" / "10_a.ipynb", "import os\nos._exit(3)")
    with pytest.raises(notebooks.NotebookFailed, match="DeadKernelError"):
        run(server, "10_a", timeout=60)
    write_notebook(home / "notebooks" / "10_a.ipynb", "print('alive')")
    assert "alive" in output_of(run(server, "10_a").notebook)


def test_none_outlives_its_server(server, tmp_path):
    with server:
        process = server.fork(["-f", str(tmp_path / "connection.json")], cwd=str(tmp_path), env=dict(os.environ))
        assert process.poll() is None and psutil.pid_exists(process.pid)
    deadline = time.monotonic() + 30
    while psutil.pid_exists(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(process.pid)
    with pytest.raises(RuntimeError, match="run the report again"):
        server.fork([], cwd=str(tmp_path), env={})
