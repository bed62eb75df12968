"""`workbench doctor`: what it says is so, and what is missing is named with its remedy."""

from __future__ import annotations

import importlib.util
import shutil
import tomllib
from importlib import metadata

import psutil
import pytest

import workbench as wb
from workbench import cli, paths
from workbench.commands import doctor


@pytest.fixture
def said(capsys, cache):
    cache.mkdir()
    (cache / "one.zarr").mkdir()
    (cache / "one.zarr" / "chunk").write_bytes(bytes(3 * 2**20))
    assert cli.main(["doctor"]) == 0
    return capsys.readouterr().out


def test_it_names_versions_machine_caches_and_whether_every_feature_is_ready(said, cache):
    assert f"workbench {wb.__version__}" in said
    for package in ("torch", "diffusers"):
        assert f"{package} {metadata.version(package).partition('+')[0]}" in said
    assert f"of {psutil.virtual_memory().total / 2**30:.1f} GiB" in said
    assert f"3 MiB in {cache}: 1 extracted stores" in said
    assert "device " in said and "threads compute" in said
    for feature in doctor.FEATURES:
        (line,) = [line for line in said.splitlines() if line.startswith(f"  {feature}: ")]
        assert line.endswith("ready") or "; install " in line


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "voila" else object())
    monkeypatch.setattr(shutil, "which", lambda name: None)
    lines = doctor._features()
    assert "  the edit studio as a page: missing voila; install [lab]" in lines
    assert "  JupyterLab: ready" in lines
    assert "  reports as PDF: missing program chromium; install chromium or chrome" in lines


def test_a_version_other_than_the_pinned_one_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "_constraints", lambda: ["torch==0.1.0", "no-such-package==1.0"])
    here = metadata.version("torch").partition("+")[0]
    assert doctor._versions()[-1] == f"  other than pinned: torch {here} (pinned 0.1.0)"


def test_the_extras_of_features_are_those_of_the_package():
    extras = tomllib.loads((paths.home() / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = {remedy.partition("]")[0][1:] for _, remedy in doctor.FEATURES.values() if remedy.startswith("[")}
    assert named == set(extras)
