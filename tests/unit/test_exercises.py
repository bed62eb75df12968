"""The exercise sheets: solutions pass, gaps do not, and every usual mistake gets the hint that belongs to it."""

from __future__ import annotations

import ast
import importlib.util
import re

import nbformat
import numpy as np
import pandas as pd
import pytest
import torch

from workbench import exercises, paths

FOLDER = paths.notebooks() / "exercises"
SHEETS = sorted(path.stem for path in FOLDER.glob("*.ipynb"))
SMALL = {
    "1_what_h_is": {"n": 4, "steps": 4},
    "2_geometry": {"n": 32, "steps": 4},
    "3_unsupervised": {"n": 24, "steps": 5},
    "4_supervised": {"n": 48, "steps": 5},
    "5_boundaries": {"n": 40, "steps": 6},
}

exercises._load_tasks()
RNG = np.random.default_rng(0)
H, V = 3.0 + RNG.normal(size=(20, 6)) * np.arange(1, 7), np.array([0.5, -1.0, 2.0, 0.0, 1.0, 0.3])
U = np.array([1.0, 1.0, 0.0, 2.0, -1.0, 0.5])
A, B = np.arange(20) % 2 == 0, np.arange(20) % 3 == 0
TABLES = [pd.DataFrame(RNG.random((8, 5)) > 0.5) for _ in range(3)]
GIVEN = {
    "1.1": {"x0": RNG.normal(size=(2, 3)), "noise": RNG.normal(size=(2, 3)), "alpha_bar": 0.3},
    "1.2": {"x_t": RNG.normal(size=(2, 3)), "eps": RNG.normal(size=(2, 3)), "alpha_bar": 0.3},
    "1.3": {"h_shape": (144, 8, 8), "x_shape": (3, 32, 32)},
    "1.5": dict(zip(("own", "donor", "swapped"), TABLES, strict=True)),
    "1.7": {"before": RNG.normal(size=(2, 3)), "after": RNG.normal(size=(2, 2, 3))},
    "2.1": {"h": H, "k": 2},
    "2.2": {"variances": np.array([4.0, 2.0, 1.0])},
    "2.4": {"ratios": {900: 12.0, 500: 7.0, 0: 3.0}},
    "2.5": {"h": H, "points": H[:, :2], "k": 3},
    "2.6": {"n": 20, "k": 3},
    "2.7": {"x": H, "y": H @ RNG.normal(size=(6, 6)) + 1},
    "3.1": {"h": H, "v": V / np.linalg.norm(V)},
    "3.3": {"before": RNG.normal(size=(2, 3, 4, 4)), "after": RNG.normal(size=(2, 3, 4, 4))},
    "3.4": {"plus": RNG.normal(size=(2, 3)), "minus": RNG.normal(size=(2, 3)), "delta": 0.2},
    "3.5": {"jacobian": RNG.normal(size=(5, 3))},
    "3.6": {"change": RNG.normal(size=(3, 4, 4)), "mask": np.arange(16).reshape(4, 4) < 5},
    "4.1": {"h": H, "scores": RNG.random(20), "k": 4},
    "4.2": {"h_fit": H[:10], "h_other": H[10:], "v": V},
    "4.4": {"v": V, "u": U},
    "4.5": {"v": V, "u": U},
    "4.6": {"effects": pd.DataFrame([[0.5, -0.2], [0.1, 0.4]])},
    "4.7": {"h": H, "a": A, "b": B},
    "5.1": {"x": H, "w": V, "b": 1.5},
    "5.2": {"x": H, "n": V / np.linalg.norm(V), "b": 1.5, "to": 2.0},
    "5.3": {"x": H, "y": A},
    "5.4": {"alpha_bar": np.array([0.9, 0.5, 0.1]), "mean_square": 0.3, "d": 12},
    "5.6": {"curve": {900: 0.0, 800: 0.6, 700: 0.4, 600: 0.7, 300: 0.9, 100: 0.8}, "level": 0.5},
    "5.8": {"changes": {"x": 0.9, "h": 0.2, "both": 0.8}},
}


def cells(name: str, *, solved: bool) -> list:
    path = FOLDER / ("solutions" if solved else "") / f"{name}.ipynb"
    return nbformat.read(path, as_version=4).cells


def run(name: str, *, solved: bool) -> list[object]:
    """Run the code of a sheet with few samples; returns what its cells show."""
    scope, shown = {}, []
    for cell in cells(name, solved=solved):
        if cell.cell_type != "code":
            continue
        tree = ast.parse(cell.source)
        last = ast.Expression(tree.body.pop().value) if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, name, "exec"), scope)
        if "parameters" in cell.metadata.get("tags", []):
            scope |= SMALL[name]
        if last is not None:
            shown.append(eval(compile(last, name, "eval"), scope))
    return shown


def checks_in(name: str) -> list[str]:
    return re.findall(r'exercises\.check\("([\d.]+)"', "\n".join(cell.source for cell in cells(name, solved=True)))


@pytest.mark.parametrize("name", [SHEETS[0], *(pytest.param(name, marks=pytest.mark.slow) for name in SHEETS[1:])])
def test_a_solution_passes_every_check_of_its_sheet(name, cache):
    passed = [each.task for each in run(name, solved=True) if isinstance(each, exercises.Passed)]
    assert passed == checks_in(name) and len(passed) >= 7


def test_an_unfilled_sheet_stops_at_its_first_gap():
    with pytest.raises(exercises.NotYet, match=r"1\.1: the gap is empty"):
        run(SHEETS[0], solved=False)


def test_there_are_five_sheets_and_each_task_is_in_one_of_them():
    assert [name[0] for name in SHEETS] == list("12345")
    asked = [task for name in SHEETS for task in checks_in(name)]
    assert asked == list(exercises._TASKS)
    assert all(task.startswith(name[0]) for name in SHEETS for task in checks_in(name))


@pytest.mark.parametrize("name", SHEETS)
def test_a_sheet_is_its_solution_without_the_regions_and_carries_the_metadata_of_nbgrader(name):
    spec = importlib.util.spec_from_file_location("release", FOLDER / "release.py")
    release = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(release)
    solution = nbformat.read(FOLDER / "solutions" / f"{name}.ipynb", as_version=4)
    assert release.released(solution) == nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    identities = []
    for cell in cells(name, solved=False):
        assert "SOLUTION" not in cell.source and not cell.get("outputs")
        about = cell.metadata.get("nbgrader")
        if about is None:
            continue
        identities.append(about["grade_id"])
        is_check = "exercises.check" in cell.source
        assert (about["grade"], about["locked"], about["solution"]) == (is_check, is_check, not is_check)
        assert is_check or ("= ...\n# YOUR CODE HERE" in cell.source)
    assert len(identities) == len(set(identities)) == 2 * len(checks_in(name))


def test_a_right_answer_is_shown_and_is_no_value_that_nbgrader_would_take_for_points(capsys):
    from IPython.core.formatters import DisplayFormatter

    assert DisplayFormatter().format(exercises.Passed("1.1", "right.")) == ({}, {})
    assert "Task 1.1: right." in capsys.readouterr().out


@pytest.mark.parametrize("task", sorted(set(exercises._TASKS)))
def test_a_gap_is_no_answer_and_each_usual_mistake_gets_its_own_hint(task):
    given = GIVEN.get(task, {})
    for nothing in (..., None):
        with pytest.raises(exercises.NotYet, match=f"Task {task}: the gap is empty"):
            exercises.check(task, nothing, **given)
    (right, remark), *wrong = exercises._TASKS[task](**given)
    if isinstance(right, set):
        assert exercises.check(task, "b").remark == remark
        with pytest.raises(exercises.NotYet, match="'d' is no prediction"):
            exercises.check(task, "d")
        return
    assert exercises.check(task, right, **given).remark == remark
    assert wrong
    for answer, hint in wrong:
        if isinstance(answer, str) and answer == right:
            continue  # of tasks whose mistakes are all names
        with pytest.raises(exercises.NotYet) as caught:
            exercises.check(task, answer, **given)
        assert hint in str(caught.value)


def test_a_hint_is_no_answer():
    """No hint has the formula that is asked for."""
    for task in ("1.1", "1.2", "2.2", "4.5", "5.1", "5.2"):
        source = "".join(cell.source for name in SHEETS for cell in cells(name, solved=True))
        region = source.split(f'check("{task}"')[0].rpartition("### BEGIN SOLUTION\n")[2].partition("\n###")[0]
        for _, hint in list(exercises._TASKS[task](**GIVEN[task]))[1:]:
            assert region.rpartition(" = ")[2] not in hint


def test_other_mistakes_are_told_by_their_shape_or_their_values():
    given = GIVEN["1.1"]
    with pytest.raises(exercises.NotYet, match=r"shape \(3,\), and shape \(2, 3\) is asked for"):
        exercises.check("1.1", np.zeros(3), **given)
    with pytest.raises(exercises.NotYet, match="the values are not"):
        exercises.check("1.1", np.full((2, 3), np.nan), **given)
    with pytest.raises(exercises.NotYet, match="'z' is not what"):
        exercises.check("2.8", "z")
    with pytest.raises(exercises.NotYet, match="shape"):
        exercises.check("1.1", "text", **given)


def test_tensors_pass_as_arrays_do():
    given = {name: torch.as_tensor(value) for name, value in GIVEN["1.1"].items()}
    right = given["alpha_bar"] ** 0.5 * given["x0"] + (1 - given["alpha_bar"]) ** 0.5 * given["noise"]
    assert exercises.check("1.1", right.float().requires_grad_(), **given).task == "1.1"


def test_a_check_says_what_it_takes():
    with pytest.raises(ValueError, match=r"no task '9\.9'.*1\.1"):
        exercises.check("9.9", 1)
    with pytest.raises(ValueError, match=r"task 2\.6 takes n, k; given n"):
        exercises.check("2.6", 1, n=3)


def test_a_notebook_shows_a_hint_without_a_traceback():
    assert exercises.NotYet("Task 1.1: why")._render_traceback_() == ["Task 1.1: why"]


def test_a_mistake_close_to_the_right_answer_is_told_from_it():
    assert exercises.check("2.6", 8 / 511, n=512, k=8)
    with pytest.raises(exercises.NotYet, match="n - 1 are left"):
        exercises.check("2.6", 8 / 512, n=512, k=8)
    ratios = {"ratios": {900: 12.0, 500: 7.0}}
    assert exercises.check("2.4", 900.0, **ratios)
    with pytest.raises(exercises.NotYet):
        exercises.check("2.4", 901, **ratios)


def test_a_prediction_may_have_spaces_around_it():
    assert exercises.check("1.4", " b ")
