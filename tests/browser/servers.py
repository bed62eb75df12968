"""Servers in processes of their own, which the tests in a browser talk to."""

from __future__ import annotations

import os
import re
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def serving(command: list[str], environment: dict[str, str], log: Path):
    """A server in a process of its own, which ends with the block."""
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=os.environ | environment)
        try:
            yield process
        finally:
            process.terminate()
            process.wait(timeout=30)


def answers(url: str) -> int:
    """Status of the answer; 0 without one."""
    try:
        with urllib.request.urlopen(url, timeout=10) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def announced(log: Path, process: subprocess.Popen, *, patience: float = 240.0) -> tuple[str, str]:
    """Address that `workbench studio` or `workbench explore` prints, once it answers: with its token, and without."""
    deadline = time.monotonic() + patience
    while not (found := re.search(r"(http://127\.0\.0\.1:\d+)/\?token=\S+", log.read_text())):
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    while answers(found[1]) == 0:
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)
    return found[0], found[1]
