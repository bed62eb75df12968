"""Profiles: every one fits the notebooks, and those for a GPU say what they are expected to need."""

from __future__ import annotations

import inspect
import re

import pytest
import typer
import yaml

from workbench import cli, paths
from workbench.formats import layouts
from workbench.report import parameters, plans, reports

PROFILES = sorted(path.stem for path in paths.profiles().glob("*.yaml"))
GPU = [name for name in PROFILES if name not in ("quick", "standard", "full", "records", "smoke")]


def content(name: str) -> tuple[str, dict]:
    text = (paths.profiles() / f"{name}.yaml").read_text(encoding="utf-8")
    return text, yaml.safe_load(text)


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_names_parameters_that_the_notebooks_have_and_a_known_model(name):
    plan = plans.read_profile(name, check=False).parameters
    _, given = content(name)
    for notebook, values in (given.get("notebooks") or {}).items():
        assert values.items() <= plan[notebook].items()
        assert plan[notebook]["model_name"] == values.get("model_name", given["common"]["model_name"])
    model = given["common"]["model_name"]
    assert model in {*layouts.HUB, *layouts.PRESETS} or (paths.models() / model).is_dir()


@pytest.mark.parametrize("name", GPU)
def test_a_gpu_profile_says_what_it_is_estimated_to_need_and_what_to_run(name):
    text, _ = content(name)
    head = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    assert re.search(r"Estimated, not measured: \d+ GiB of GPU memory .* \d+ (hours?|minutes) at \d+ TFLOP/s", head)
    command = re.search(rf"workbench report --profile {name} --only ([\d ]+)", head)
    assert {number for number in command[1].split()} <= {n[:2] for n in parameters.list_notebooks()}


def test_a_report_is_a_first_look_unless_asked_for_more():
    command = typer.main.get_command(cli.app).commands["report"]
    by_default = next(option.default for option in command.params if option.name == "profile")
    assert by_default == inspect.signature(reports.report).parameters["profile"].default == "quick"
    assert f"\nPROFILE ?= {by_default}\n" in (paths.home() / "Makefile").read_text(encoding="utf-8")
    assert content("quick")[1]["common"]["model_name"] == "avataaars32"
    assert content("standard")[1]["common"]["model_name"] == "avataaars64"


def test_the_time_of_a_first_look_can_be_estimated_and_its_cards_say_what_was_cut():
    plan = plans.read_profile("quick")
    assert plan.passes.keys() == plan.parameters.keys() and min(plan.passes.values()) > 0
    assert plans.find_cuts(plan).keys() == plan.parameters.keys()
    of_photographs = plans.find_cuts(plans.read_profile("quick", domain="eurosat", check=False), domain="eurosat")
    assert "n = 48 for 256" in of_photographs["00_quickstart"]
    assert not any("eta" in words or "model_name" in words for words in of_photographs.values())


def test_every_notebook_takes_another_model_by_one_parameter_and_the_papers_has_a_profile():
    for name in parameters.list_notebooks():
        assert parameters.notebook_parameters(name)["model_name"].default == "avataaars32"
    assert "celebahq256" in GPU


@pytest.mark.parametrize("name", PROFILES)
def test_what_a_profile_says_to_run_is_found_before_a_kernel_starts(name):
    """A checkpoint that has to be converted first is missed in a sentence."""
    text, given = content(name)
    only = re.search(r"--only ([\d ]+)", text) if name in GPU else None
    model = given["common"]["model_name"]
    if "/" in model or (paths.models() / model).is_dir():
        plan = plans.read_profile(name, only and only[1].split())
        assert len(plan.parameters) == (len(only[1].split()) if only else len(parameters.list_notebooks()))
        assert plan.timeout >= 3600
    else:
        with pytest.raises(ValueError, match=f"no model '{model}'"):
            plans.read_profile(name, only[1].split())
