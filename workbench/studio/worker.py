"""A thread beside the kernel's loop, on which the studio computes."""

from __future__ import annotations

import atexit
import threading
from collections import deque
from collections.abc import Callable

from workbench.studio.state import Cancelled, Progress

Task = Callable[[Progress], None]


class Worker:
    """A thread that does one task after the other; of images the latest counts, and stops the one before.

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
        self._tasks: deque[tuple[Task, Progress]] = deque()
        self._image: Progress | None = None
        self._thread: threading.Thread | None = None

    def submit(self, task: Task, progress: Progress | None = None) -> Progress:
        """Do this after all that was asked for before; its progress, by default a new one, can be cancelled."""
        progress = progress or Progress(self._on_progress)
        with self._condition:
            self._tasks.append((task, progress))
            self._condition.notify_all()
            if self._thread is None:
                atexit.register(self._end)
                self._thread = threading.Thread(target=self._loop, daemon=True, name="edit-studio")
                self._thread.start()
        return progress

    def show(self, work: Task) -> None:
        """Run this job in place of the previous one, finished or not."""
        with self._condition:
            if self._image is not None:
                self._image.cancel()
            self._image = self.submit(work)

    def wait(self, timeout: float = 60.0) -> bool:
        """Wait until there is nothing to do; False if that takes longer than `timeout` seconds."""
        with self._condition:
            return self._condition.wait_for(lambda: not self._tasks, timeout)

    def _end(self) -> None:
        """Stop before the interpreter ends, which would abort a thread inside of torch."""
        with self._condition:
            for _, progress in self._tasks:
                progress.cancel()
        self.wait()

    def _loop(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._tasks)
                task, progress = self._tasks[0]
            try:
                progress.wait(0.0)  # it may be cancelled before it begins
                task(progress)
            except Cancelled:
                pass
            except Exception as error:  # whatever it is, the person at the controls has to read it
                self._on_error(str(error) or type(error).__name__)
            with self._condition:
                self._tasks.popleft()
                self._condition.notify_all()
