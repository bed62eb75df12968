"""Make a virtual environment and install the workbench into it, saying what is downloaded and how far it is.

python .ci/install.py .venv            what reports need
python .ci/install.py .venv lab test   and these extras
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LARGE = 5e6
"""Bytes of a download that is worth a line of its own in a log."""


def main(folder: str, *extras: str) -> int:
    python = Path(folder) / ("Scripts" if sys.platform == "win32" else "bin") / "python"
    if not python.exists():
        print(f"making the environment {folder}", flush=True)
        venv.create(folder)
    # An earlier start may have been interrupted before there was a pip.
    missing = subprocess.run([python, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode
    if missing and subprocess.run([python, "-m", "ensurepip"], capture_output=True).returncode:
        print("this Python cannot install pip; install python3-venv, or choose another with PYTHON=", file=sys.stderr)
        return 2
    version = subprocess.run([python, "-m", "pip", "--version"], capture_output=True, text=True, check=True).stdout
    bar = "raw" if tuple(map(int, re.findall(r"\d+", version)[:2])) >= (24, 1) else "off"  # what older ones lack
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    command = [python, "-m", "pip", "install", "--disable-pip-version-check", "--progress-bar", bar, "--no-compile"]
    command += ["-c", ROOT / "constraints.txt", "-e", target]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return follow(pip.stdout, terminal=sys.stdout.isatty()) or pip.wait() or compile_packages(python)


def compile_packages(python: Path) -> int:
    """Compile what was installed on all cores, for which pip takes one, but for the packages' own tests."""
    where = [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
    packages = subprocess.run(where, capture_output=True, text=True, check=True).stdout.strip()
    command = [python, "-m", "compileall", "-q", "-j", "0", "-x", r"[\\/]tests?[\\/]", packages]
    # Some packages hold templates that are no Python; it says so of each.
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return 0


def follow(lines, *, terminal: bool) -> None:
    """Say in words what pip does: one line that changes on a terminal, else a line for each large download."""
    begun, files, bytes_, name, drawn = time.monotonic(), 0, 0.0, "", 0.0

    def say(words: str, *, stays: bool) -> None:
        if terminal:
            print(f"\r\033[K{words}", end="\n" if stays else "", flush=True)
        elif stays:
            print(words, flush=True)

    for line in lines:
        if found := re.match(r"\s*Downloading (\S+?)(?:-py\S*|-cp\S*|\.tar\.gz)? \(([\d.]+) ([kMG]?B)\)", line):
            size = float(found[2]) * {"B": 1, "kB": 1e3, "MB": 1e6, "GB": 1e9}[found[3]]
            name, files, bytes_ = found[1].rpartition("/")[2], files + 1, bytes_ + size
            say(f"downloading {name}, {found[2]} {found[3]}", stays=not terminal and size > LARGE)
        elif found := re.match(r"Progress (\d+) of (\d+)", line):
            if time.monotonic() - drawn > 0.2:
                drawn = time.monotonic()
                say(f"downloading {name}: {int(found[1]) / 1e6:.0f} of {int(found[2]) / 1e6:.0f} MB", stays=False)
        elif found := re.match(r"Collecting (\S+)", line):
            say(f"looking up {found[1]} ({files} files, {bytes_ / 1e6:.0f} MB so far)", stays=False)
        elif line.startswith("Installing collected packages"):
            say(f"installing {line.count(',') + 1} packages, {bytes_ / 1e6:.0f} MB were downloaded", stays=True)
        elif line.startswith("Successfully installed"):
            say(f"installed in {time.monotonic() - begun:.0f} s", stays=True)
        elif line.startswith("ERROR"):
            say(line.rstrip(), stays=True)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
