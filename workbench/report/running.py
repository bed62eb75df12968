"""A notebook that runs: how far it is, the environment of its kernel, and how to stop it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

from workbench.diffusion.memory import KEPT_MEMORY
from workbench.diffusion.parallel import PROGRESS, THREADS, thread_count


class Job:
    """One notebook of a report.

    Parameters
    ----------
    name : str
    threads : int, optional
        Threads of its kernel's linear algebra; by default as many as this process has.
    on_change : callable () -> None, optional
        Called when it comes to another cell.

    Attributes
    ----------
    state : {"waiting", "running", "done", "failed", "kept"}
    cell, cells : int
        The cell that runs, from 1, and their number; 0 before the kernel runs.
    stopped : bool
    """

    def __init__(self, name: str, *, threads: int | None = None, on_change: Callable[[], None] = lambda: None) -> None:
        self.name, self.state, self.stopped = name, "waiting", False
        self.cell = self.cells = 0
        self.since: float | None = None
        self._threads, self._on_change = threads, on_change
        self._folder = TemporaryDirectory(prefix="workbench-")
        self._client, self._counted = None, 0
        self._lock = threading.Lock()

    def environment(self) -> dict[str, str]:
        """Variables of the kernel: samples are computed on all cores, and whatever waits for a thread sleeps.

        Threads that spin while they wait take the core of another notebook, or of whatever runs on the machine.
        """
        threads = {THREADS: str(thread_count()), PROGRESS: self._folder.name}
        if self._threads is not None:
            threads["OMP_NUM_THREADS"] = str(self._threads)
        return {"OMP_WAIT_POLICY": "PASSIVE", **KEPT_MEMORY, **os.environ, **threads}

    def follow(self, manager, client) -> None:
        """Learn of each cell as papermill's `manager` begins it, and keep the `client` to stop it by."""
        self.cells, self.since, self._client = len(client.nb.cells), time.monotonic(), client
        begin = manager.cell_start

        def cell_start(cell, cell_index=None, **options):
            if self.stopped:
                raise KeyboardInterrupt
            self.cell = (cell_index or 0) + 1
            self._on_change()
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
