"""Processes to kill. A copy of this one has imported everything, which takes a new one ten seconds of a core."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess


def start_process(function: Callable, *arguments, method: str = "fork") -> BaseProcess:
    process = multiprocessing.get_context(method).Process(target=function, args=arguments, daemon=True)
    process.start()
    return process
