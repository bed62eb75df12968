"""What `make` says while it installs."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import venv
from pathlib import Path

import pytest

SPEC = importlib.util.spec_from_file_location("install", Path(__file__).parents[2] / ".ci" / "install.py")
install = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(install)

PIP = """Obtaining file:///somewhere
Collecting torch (from hspace-workbench==0.1.0)
  Downloading torch-2.13.0-cp311-cp311-manylinux_2_28_x86_64.whl (191.2 MB)
Progress 0 of 191200000
Progress 95600000 of 191200000
Collecting tqdm
  Downloading tqdm-4.70.1-py3-none-any.whl.metadata (57 kB)
Installing collected packages: tqdm, torch
Successfully installed torch-2.13.0 tqdm-4.70.1
""".splitlines(keepends=True)


def test_an_environment_that_was_left_without_pip_gets_one(tmp_path, monkeypatch):
    venv.create(tmp_path / "half", with_pip=False)
    asked = []
    start = subprocess.Popen
    monkeypatch.setattr(
        subprocess,
        "Popen",
        lambda command, **on: (
            asked.append(command) or start([sys.executable, "-c", ""], **on)
            if "install" in command
            else start(command, **on)
        ),
    )
    monkeypatch.setattr(install, "compile_packages", lambda python: 0)
    assert install.main(str(tmp_path / "half")) == 0
    ((python, *_),) = asked
    assert subprocess.run([python, "-m", "pip", "--version"], capture_output=True).returncode == 0


def test_a_log_names_what_is_large_and_how_much_it_was(capsys):
    install.follow(PIP, terminal=False)
    said = capsys.readouterr().out.splitlines()
    assert said[:2] == ["downloading torch-2.13.0, 191.2 MB", "installing 2 packages, 191 MB were downloaded"]
    assert said[2].startswith("installed in") and len(said) == 3


def test_a_terminal_shows_how_far_a_download_is(capsys, monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(install.time, "monotonic", lambda: next(clock))
    install.follow(PIP, terminal=True)
    said = capsys.readouterr().out
    assert "torch-2.13.0: 96 of 191 MB" in said and said.count("\n") == 2


@pytest.mark.parametrize("terminal", [True, False])
def test_an_error_of_pip_is_shown(capsys, terminal):
    install.follow(["ERROR: No matching distribution found for torch==9\n"], terminal=terminal)
    assert "No matching distribution found for torch==9" in capsys.readouterr().out
