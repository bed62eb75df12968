"""A notebook that runs, by papermill: how far it is, what its kernel's environment is, and how to stop it."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
import papermill
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, NotebookExecutionManager, papermill_engines
from papermill.exceptions import PapermillExecutionError

from workbench import paths
from workbench.report.alive import keep_shown
from workbench.report.kernels import KernelServer, environment
from workbench.report.parameters import braced
from workbench.report.style import VECTORS


class Job:
    """One notebook while it runs.

    Parameters
    ----------
    name : str
    threads : int, optional
        Threads of its kernel's linear algebra; by default as many as this process has.
    kernels : KernelServer, optional
        What its kernel is copied from; by default it starts anew.
    vectors : bool
        Keep figures as SVG, too.

    Attributes
    ----------
    state : {"waiting", "running", "done", "failed", "kept"}
    cell, cells : int
        The cell that runs, from 1, and their number; 0 before the kernel runs.
    stopped : bool
    """

    def __init__(
        self, name: str, *, threads: int | None = None, kernels: KernelServer | None = None, vectors: bool = False
    ) -> None:
        self.name, self.kernels, self.vectors, self.state, self.stopped = name, kernels, vectors, "waiting", False
        self.cell = self.cells = 0
        self.counts = TemporaryDirectory(prefix="workbench-")
        self._threads, self._client, self._counted = threads, None, 0

    def execute(
        self, source: Path, executed: Path, parameters: dict, *, timeout: int, progress: bool = False
    ) -> dict | None:
        """Run a notebook into another file; returns None, or which cell of the source failed and how.

        Raises KeyboardInterrupt if the job is stopped.
        """
        injected = 1 if parameters else 0
        for attempt in (1, 2):
            try:
                papermill.execute_notebook(
                    braced(source),
                    braced(executed),
                    parameters=parameters,
                    kernel_name="python3",
                    engine_name="workbench",
                    progress_bar={"desc": source.stem, "leave": False} if progress else False,
                    log_output=True,
                    job=self,
                    folder=str(source.parent),
                    timeout=timeout,
                )
                return None
            except PapermillExecutionError as error:
                return {"cell": error.cell_index - injected, "ename": error.ename, "evalue": error.evalue}
            except Exception as error:  # a cell out of time, a kernel that died or never started
                if self.stopped:
                    raise KeyboardInterrupt from None
                cells = nbformat.read(executed, as_version=4).cells if executed.exists() else []
                started = [i for i, cell in enumerate(cells) if cell.metadata.papermill.get("start_time")]
                if not started and attempt == 1:
                    continue
                if not executed.exists():
                    raise
                last = max(max(started, default=0) - injected, 0)
                return {"cell": last, "ename": type(error).__name__, "evalue": str(error).strip().partition("\n")[0]}
        raise AssertionError("two attempts end in a return or an exception")

    def environment(self) -> dict[str, str]:
        """Variables of the kernel, which computes samples on all cores and counts its passes."""
        from workbench.diffusion.parallel import PROGRESS, THREADS, thread_count  # torch, a second or two

        # The home may be named relative to this folder, and the kernel's is another.
        own = {THREADS: str(thread_count()), PROGRESS: self.counts.name, "WORKBENCH_HOME": str(paths.home())}
        own |= {VECTORS: "1" if self.vectors else ""}
        return environment(self._threads) | own

    def follow(self, manager: NotebookExecutionManager, client: PapermillNotebookClient) -> None:
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
        for file in Path(self.counts.name).glob("*"):
            with contextlib.suppress(OSError, ValueError):  # it is just being written
                total += int(file.read_text())
        self._counted = max(self._counted, total)
        return self._counted

    def stop(self) -> None:
        """End the kernel; the notebook then ends with KeyboardInterrupt, where it runs."""
        self.stopped = True
        if self._client is not None:
            self._client.log.disabled = True  # that its kernel died is no news
        provisioner = getattr(getattr(self._client, "km", None), "provisioner", None)
        if provisioner is not None and provisioner.pid:
            with contextlib.suppress(OSError):
                os.kill(provisioner.pid, getattr(signal, "SIGKILL", signal.SIGTERM))

    def close(self) -> None:
        """Take the last count of passes, and remove its files."""
        self.passes  # noqa: B018 - the last count, before its files go
        self.counts.cleanup()


class _Engine(NBClientEngine):
    """papermill's own engine, with a folder and an environment of the kernel's, which leave this process's alone."""

    @classmethod
    def execute_managed_notebook(cls, nb_man, kernel_name, *, job: Job, folder: str, timeout: int, **options):
        copied = {} if job.kernels is None else {"kernel_manager_class": job.kernels.manager()}
        client = PapermillNotebookClient(
            nb_man,
            **copied,
            kernel_name=kernel_name,
            timeout=timeout,
            startup_timeout=180,
            log=logging.getLogger(f"papermill.{job.name}"),
            log_output=options["log_output"],
            extra_arguments=["--log-level=CRITICAL"],
            resources={"metadata": {"path": folder}},
        )
        job.follow(nb_man, client)
        done = client.execute(env=job.environment())
        keep_shown(nb_man.nb)
        return done


papermill_engines.register("workbench", _Engine)
# What notebooks print is in the notebooks; without a handler, Python would write their warnings to the terminal too.
logging.getLogger("papermill").addHandler(logging.NullHandler())


@contextlib.contextmanager
def logged(name: str, path: Path | None) -> Iterator[logging.Logger]:
    """Where a job of that name says what its notebook prints; also written to a file, if one is given."""
    logger = logging.getLogger(f"papermill.{name}")
    if path is None:
        yield logger
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(path, mode="w", encoding="utf-8")
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.setLevel(logging.INFO)
    logger.addHandler(handler)
    try:
        yield logger
    finally:
        logger.removeHandler(handler)
        handler.close()
