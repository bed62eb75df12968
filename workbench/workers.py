"""Worker processes: dask's, on this machine, or on a cluster whose machines see the same folders."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
from collections.abc import Iterator


@contextlib.contextmanager
def start_workers(n: int, *, scheduler: str | None = None) -> Iterator:
    """A dask client, and its workers on this machine while the context lasts.

    Parameters
    ----------
    n : int
        Workers to start; each has its share of the cores.
    scheduler : str, optional
        Address of a dask scheduler, "tcp://host:8786", whose workers are used instead. They must see the same folders
        and have the workbench installed.

    Yields
    ------
    distributed.Client

    Raises
    ------
    ValueError
        If `n` is below 1.
    OSError
        If no scheduler answers in 20 seconds.
    """
    if n < 1:
        raise ValueError(f"workers is {n}; give 1 or more")
    import dask  # a second to import, with distributed
    from distributed import Client, LocalCluster

    if scheduler is not None:
        with Client(scheduler, timeout=20) as client:
            yield client
        return
    threads = str(max(1, os.cpu_count() // n))
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    environment = {"distributed.nanny.pre-spawn-environ": dict.fromkeys(names, threads)}
    with (
        dask.config.set(environment),
        LocalCluster(
            n_workers=n,
            threads_per_worker=1,
            dashboard_address=None,
            memory_limit=0,
            host="127.0.0.1",
            silence_logs=logging.ERROR,
            preload=__name__,
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def dask_setup(worker: object) -> None:
    """In a worker, as dask preloads this module: leave Ctrl-C to who started it, else each prints a traceback."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
