"""A notebook that runs: how far it is, the environment of its kernel, and how to stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench.report.kernels import KernelServer, environment


class Job:
    """One notebook of a report.

    Parameters
    ----------
    name : str
    threads : int, optional
        Threads of its kernel's linear algebra; by default as many as this process has.
    kernels : KernelServer, optional
        What its kernel is copied from; by default it starts anew.

    Attributes
    ----------
    state : {"waiting", "running", "done", "failed", "kept"}
    cell, cells : int
        The cell that runs, from 1, and their number; 0 before the kernel runs.
    stopped : bool
    """

    def __init__(self, name: str, *, threads: int | None = None, kernels: KernelServer | None = None) -> None:
        self.name, self.kernels, self.state, self.stopped = name, kernels, "waiting", False
        self.cell = self.cells = 0
        self._threads = threads
        self._folder = TemporaryDirectory(prefix="workbench-")
        self._client, self._counted = None, 0
        self._lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """Variables of the kernel, which computes samples on all cores and counts its passes."""
        from workbench.diffusion.parallel import PROGRESS, THREADS, thread_count  # torch, a second or two

        return environment(self._threads) | {THREADS: str(thread_count()), PROGRESS: self._folder.name}

    def follow(self, manager, client) -> None:
        """Learn of each cell as papermill's `manager` begins it, and keep the `client` to stop it by."""
        self.cells, self._client = len(client.nb.cells), client
        begin = manager.cell_start

        def cell_start(cell, cell_index=None, **options):
            if self.stopped:
                raise KeyboardInterrupt
            self.cell = (cell_index or 0) + 1
            begin(cell, cell_index, **options)

        manager.cell_start = cell_start

    @property
    def passes(self) -> int:
        """Passes of a network that its processes have counted."""
        total = 0
        for file in Path(self._folder.name).glob("*"):
            with contextlib.suppress(OSError, ValueError):  # it is just being written
                total += int(file.read_text())
        self._counted = max(self._counted, total)
        return self._counted

    def stop(self) -> None:
        """End the kernel; the notebook then ends with KeyboardInterrupt, where it runs."""
        with self._lock:
            self.stopped = True
            if self._client is not None:
                self._client.log.disabled = True  # that its kernel died is no news
            provisioner = getattr(getattr(self._client, "km", None), "provisioner", None)
            if provisioner is not None and provisioner.pid:
                with contextlib.suppress(OSError):
                    os.kill(provisioner.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def close(self) -> None:
        self.passes  # noqa: B018 - the last count, before its files go
        self._folder.cleanup()
