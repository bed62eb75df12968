"""Kernels that start at once: copies of a process that has done the notebooks' imports.

Starting Python and importing torch, diffusers and matplotlib takes 5 to 15 seconds of a core, eleven times in a report.
A copy (fork) takes none, and is as fresh: nothing but imports has happened in it. Where the system has no fork that can
be relied on, which is everywhere but on Linux, kernels start anew.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import psutil
from jupyter_client import AsyncKernelManager

IMPORTED = (
    "ipykernel.kernelapp",
    "matplotlib_inline.backend_inline",
    "ipywidgets",
    "workbench.datasets.classifiers",
    "workbench.hspace.extract",
    "workbench.report.facts",
    "workbench.report.plots",
)


LIBRARIES = {
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(2**25),
    "MALLOC_TRIM_THRESHOLD_": str(2**30),
}
"""Variables that libraries read when loaded: waiting threads sleep, and freed memory is kept for the next pass.

Threads that spin while they wait take the core of another notebook, or of whatever runs on the machine.
"""


def environment(threads: int | None) -> dict[str, str]:
    """Variables of a kernel, or of the process that kernels are copied from, with so many threads of linear algebra."""
    return {**LIBRARIES, **os.environ, **({} if threads is None else {"OMP_NUM_THREADS": str(threads)})}


class KernelServer:
    """The process that kernels are copies of; a context, at whose end it is gone.

    Parameters
    ----------
    environment : mapping of str to str
        Of that process: what libraries read when they are loaded, such as `OMP_NUM_THREADS`.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            [sys.executable, "-m", "workbench.report.kernels"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=dict(environment),
            start_new_session=True,  # an interrupt of the terminal is for the report
        )

    @staticmethod
    def possible() -> bool:
        return sys.platform == "linux"

    def fork(self, arguments: Sequence[str], *, cwd: str, env: Mapping[str, str]) -> ForkedProcess:
        """A kernel with these arguments of ipykernel's, in this folder and environment.

        Raises
        ------
        RuntimeError
            If the server has ended.
        """
        request = json.dumps({"arguments": list(arguments), "cwd": str(cwd), "env": dict(env)})
        with self._lock:
            try:
                self._process.stdin.write(f"{request}\n")
                self._process.stdin.flush()
                answer = self._process.stdout.readline()
            except (OSError, ValueError):  # it has ended, or was told to
                answer = ""
        if not answer:
            raise RuntimeError("the process that kernels are copied from has ended; run the report again")
        return ForkedProcess(int(answer))

    def manager(self) -> type[AsyncKernelManager]:
        """A kernel manager whose kernels are copies of this process."""
        server = self

        class Manager(AsyncKernelManager):
            async def _async_launch_kernel(self, kernel_cmd: list[str], **options) -> None:
                # [python, "-m", "ipykernel_launcher", *arguments]
                process = server.fork(kernel_cmd[3:], cwd=options["cwd"], env=options["env"])
                local = self.provisioner
                local.process, local.pid, local.pgid, local.cwd = process, process.pid, process.pid, options["cwd"]
                self._reconcile_connection_info(local.connection_info)

        return Manager

    def __enter__(self) -> KernelServer:
        return self

    def __exit__(self, *_) -> None:
        self._process.kill()  # kernels that are left end with it
        self._process.wait()
        self._process.stdin.close()
        self._process.stdout.close()


class ForkedProcess(psutil.Process):
    """A process that is not this one's child, with what `jupyter_client` asks of a `subprocess.Popen`."""

    stdin = stdout = stderr = None

    def poll(self) -> int | None:
        """None while it runs."""
        return None if self.is_running() else 1

    def send_signal(self, sig: int) -> None:
        with contextlib.suppress(psutil.NoSuchProcess):
            super().send_signal(sig)


def main() -> None:
    """Import, then answer each request on standard input with the number of a new process."""
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for the kernels; the system clears them away
    for name in IMPORTED:
        importlib.import_module(name)
    server = os.getpid()
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _become_kernel(json.loads(line), server)
        sys.stdout.write(f"{child}\n")
        sys.stdout.flush()


def _become_kernel(request: dict, server: int) -> None:
    """Never returns."""
    from ipykernel.kernelapp import IPKernelApp

    os.setsid()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)  # the server's own output is for answers
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    status = 1
    try:
        IPKernelApp.launch_instance([*request["arguments"], f"--IPKernelApp.parent_handle={server}"])
        status = 0
    finally:
        os._exit(status)


if __name__ == "__main__":
    main()
