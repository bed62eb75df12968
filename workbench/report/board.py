"""Notebooks that run side by side: a line on the terminal, and an index page that renews itself."""

from __future__ import annotations

import contextlib
import shutil
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ThreadPoolExecutor, wait
from functools import partial
from typing import cast

import joblib
import psutil

from workbench.io import duration
from workbench.report.kernels import KernelServer, environment
from workbench.report.notebooks import Report, run_job
from workbench.report.pages import write_index
from workbench.report.plans import Plan, Run
from workbench.report.running import Job

KERNEL_MEMORY = 3 * 2**30
"""Bytes that a notebook on a CPU may need."""


def default_jobs() -> int:
    """Notebooks that run side by side: as many as cores and memory allow, and one on an accelerator."""
    import torch  # a second or two

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return 1
    return max(1, min(joblib.cpu_count(), psutil.virtual_memory().available // KERNEL_MEMORY))


@contextlib.contextmanager
def start_kernels(jobs: int | None) -> Iterator[KernelServer | None]:
    """Start to import what kernels are copied from, while this process checks; None where each kernel starts anew."""
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs is {jobs}; give 1 or more")
    with contextlib.ExitStack() as stack:
        yield stack.enter_context(KernelServer(environment(1))) if jobs != 1 and KernelServer.possible() else None


class Board:
    """The runs of a plan.

    Parameters
    ----------
    plan : Plan
    kept : mapping of str to Report
        What is made already, by the names of runs.
    jobs : int
        Notebooks that run side by side.
    kernels : KernelServer, optional
    title : str
        Of the index page.
    notes : mapping of str to str
        A sentence for the cards of these runs.
    show : bool
        Say how far it is: in one line on a terminal, else in a line a notebook.
    """

    def __init__(
        self,
        plan: Plan,
        kept: Mapping[str, Report],
        *,
        jobs: int = 1,
        kernels: KernelServer | None = None,
        title: str = "Reports",
        notes: Mapping[str, str] | None = None,
        show: bool = True,
        others: bool = True,
    ) -> None:
        self.plan, self.kept, self.title, self.notes = plan, kept, title, notes or {}
        options = {"threads": 1, "kernels": kernels} if jobs > 1 else {}
        self.jobs = {run.name: Job(run.name, **options) for run in plan.runs}
        for name in kept:
            self.jobs[name].state = "kept"
        self.began, self._index_at = time.monotonic(), 0.0
        self._side_by_side = jobs
        self._only = None if others else self.jobs.keys()
        self._show, self._terminal = show, show and sys.stderr.isatty()

    def run(self, executor: Executor | None = None) -> dict[str, Report | Exception]:
        """Execute the runs that are not cached; reports and errors by names, in the order of the plan.

        With an executor, such as dask's, notebooks run on its machines, and the line counts those that ended.
        """
        if self.kept:
            self.say(f"kept from before: {', '.join(self.kept)}")
        todo = [run for run in self.plan.runs if run.name not in self.kept]
        # The longest first, so that none is left alone at the end.
        todo.sort(key=lambda run: -self.plan.passes.get(run.name, 0))
        carry_out = self._run if executor is None else partial(_run_elsewhere, timeout=self.plan.timeout)
        with executor or ThreadPoolExecutor(self._side_by_side) as used:
            running = {used.submit(carry_out, run): run for run in todo}
            try:
                results = dict(self._follow(running))
            except KeyboardInterrupt:
                for future in running:
                    future.cancel()
                for job in self.jobs.values():
                    job.stop()
                raise
        results |= self.kept
        return {run.name: results[run.name] for run in self.plan.runs}

    def _run(self, run: Run) -> Report:
        job = self.jobs[run.name]
        job.state = "running"
        return run_job(job, run, timeout=self.plan.timeout)

    def _follow(self, running: dict[Future, Run]) -> Iterator[tuple[str, Report | Exception]]:
        left = set(running)
        while left:
            self.write_index(at_most_every=2.0)
            if self._terminal:
                width = shutil.get_terminal_size().columns - 1
                self._write(f"\r\033[K{self.line()[:width]}")
            ended, left = wait(left, timeout=0.5, return_when=FIRST_COMPLETED)
            for future in ended:
                error, name = future.exception(), running[future].name
                self.jobs[name].state = "failed" if error else "done"
                self.say(f"{error or f'{name}: {duration(future.result().seconds)}'} ({self._counted()})")
                self.write_index()
                yield name, cast(Exception, error) if error else future.result()

    def line(self) -> str:
        """One line with the current runs and the remaining time."""
        now = [f"{job.name} {job.cell}/{job.cells}" for job in self.jobs.values() if job.state == "running"]
        return f"{self._counted()}: {', '.join(now)}"

    def _counted(self) -> str:
        ended = sum(job.state in ("done", "failed", "kept") for job in self.jobs.values())
        left = self.seconds_left()
        return f"{ended} of {len(self.jobs)} done" + ("" if left is None else f", about {_roughly(left)} left")

    def seconds_left(self) -> float | None:
        """An estimate from the passes that are left and those that were made so far; None while little is known."""
        waiting = [job for job in self.jobs.values() if job.state in ("waiting", "running")]
        if not waiting or any(job.name not in self.plan.passes for job in waiting):
            return None
        made = sum(job.passes for job in self.jobs.values() if job.state != "kept")
        left = sum(max(self.plan.passes[job.name] - job.passes, 0) for job in waiting)
        if made < 0.05 * (made + left):
            return None
        return left * (time.monotonic() - self.began) / made

    def write_index(self, *, intro: str = "", at_most_every: float = 0.0) -> None:
        """Write the page: with what waits and runs, or as it stays, with an introduction."""
        now = time.monotonic()
        if now - self._index_at < at_most_every:
            return
        self._index_at = now
        left = [job for job in self.jobs.values() if job.state in ("waiting", "running") and not job.stopped]
        options = {}
        if left:
            intro = f"<p>{self._counted()}. This page renews itself until all are.</p>"
            options = {"pending": {job.name: _state(job) for job in left}, "refresh": 3}
        write_index(self.plan.folder, title=self.title, intro=intro, notes=self.notes, only=self._only, **options)

    def say(self, words: str) -> None:
        """Write a line that stays."""
        if self._show:
            self._write(f"\r\033[K{words}\n" if self._terminal else f"{words}\n")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def __enter__(self) -> Board:
        return self

    def __exit__(self, *_) -> None:
        """Clear the line, and write the page as it stays."""
        if self._terminal:
            self._write("\r\033[K")
        for job in self.jobs.values():
            job.close()
        self.write_index()


def _run_elsewhere(run: Run, timeout: int) -> Report:
    """On a worker of a cluster."""
    with contextlib.closing(Job(run.name)) as job:
        return run_job(job, run, timeout=timeout)


def _roughly(seconds: float) -> str:
    return f"{max(5 * round(seconds / 5), 5)} s" if seconds < 90 else f"{round(seconds / 60)} min"


def _state(job: Job) -> str:
    if job.state == "waiting":
        return "waiting"
    return f"running: cell {job.cell} of {job.cells}" if job.cell else "starting"
