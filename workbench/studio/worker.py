"""A thread beside the kernel's loop, on which the studio computes."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable

from workbench.studio.state import Cancelled, Progress


class Worker:
    """A thread for work of which the latest counts: a newer image stops the one before.

    Parameters
    ----------
    on_progress : callable (float) -> None
        Called after every step of the work.
    on_error : callable (str) -> None
        Called with the sentence of an error.
    """

    def __init__(self, on_progress: Callable[[float], None], on_error: Callable[[str], None]) -> None:
        self._on_progress, self._on_error = on_progress, on_error
        self._condition = threading.Condition()
        self._tasks: deque[Callable[[Progress], None]] = deque()
        self._latest: Callable[[Progress], None] | None = None
        self._running: Progress | None = None
        self._runs_latest = False
        self._thread: threading.Thread | None = None

    def submit(self, task: Callable[[Progress], None]) -> None:
        """Do this after all other tasks, and before any image."""
        with self._condition:
            self._tasks.append(task)
            self._start()

    def show(self, work: Callable[[Progress], None]) -> None:
        """Run this job in place of the previous one, finished or not."""
        with self._condition:
            self._latest = work
            if self._running is not None and self._runs_latest:
                self._running.cancel()
            self._start()

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until there is nothing to do; False if that takes longer than `timeout` seconds."""
        with self._condition:
            return self._condition.wait_for(
                lambda: not self._tasks and self._latest is None and self._running is None, timeout
            )

    def _start(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, daemon=True, name="edit-studio")
            self._thread.start()
        self._condition.notify_all()

    def _loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._tasks or self._latest)
                self._runs_latest = not self._tasks
                if self._runs_latest:
                    work, self._latest = self._latest, None
                else:
                    work = self._tasks.popleft()
                progress = self._running = Progress(self._on_progress)
            try:
                work(progress)
            except Cancelled:
                pass
            except Exception as error:  # whatever it is, the person at the controls has to read it
                self._on_error(str(error) or type(error).__name__)
            finally:
                with self._condition:
                    self._running = None
                    self._condition.notify_all()
