"""Checks of exercise sheets: each wrong answer of a usual kind has a hint of its own.

A task is a generator, registered in `tasks.py` beside the sheets. It first yields the right answer, with a remark; then
wrong ones, each with the hint of the misunderstanding behind it. A set as the right answer is a prediction:
any of its members will do.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from workbench import paths

_TASKS: dict[str, Callable[..., Iterator[tuple[object, str]]]] = {}


class NotYet(AssertionError):
    """An answer that is not right yet; its text is a hint. Notebooks show the hint without a traceback."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]


@dataclass(frozen=True)
class Passed:
    """A right answer.

    Attributes
    ----------
    task : str
    remark : str
        What is worth noticing about it.
    """

    task: str
    remark: str

    def __repr__(self) -> str:
        return f"Task {self.task}: {self.remark}"

    def _ipython_display_(self) -> None:
        """Shown, and not the value of its cell, which nbgrader would take for a number of points."""
        from IPython.display import display

        display({"text/plain": repr(self)}, raw=True)


def check(task: str, answer: object, **given: object) -> Passed:
    """Check an answer of an exercise sheet.

    Parameters
    ----------
    task : str
        Number of the task, such as "1.1".
    answer : array, number or str
    **given : object
        What the answer was to be made of, as the sheet passes it.

    Returns
    -------
    Passed

    Raises
    ------
    NotYet
        If the answer is not right, with a hint.
    ValueError
        If there is no such task, or it is made of other things.
    """
    _load_tasks()
    if task not in _TASKS:
        raise ValueError(f"there is no task {task!r}; there are {', '.join(_TASKS)}")
    needed = inspect.signature(_TASKS[task]).parameters
    if needed.keys() != given.keys():
        raise ValueError(f"task {task} takes {', '.join(needed) or 'an answer alone'}; given {', '.join(given)}")
    if answer is None or answer is ...:
        raise NotYet(f"Task {task}: the gap is empty; replace ... in the cell above.")
    plain = {name: _plain(value) for name, value in given.items()}
    (right, remark), *wrong = _TASKS[task](**plain)
    answer = _plain(answer)
    if isinstance(right, set):
        if str(answer).strip() in right:
            return Passed(task, remark)
        raise NotYet(f"Task {task}: {answer!r} is no prediction; write one of {', '.join(sorted(right))} as text.")
    # A usual mistake may be close to the right answer, as n is to n - 1.
    near = [(_distance(answer, value), hint) for value, hint in wrong if _same(answer, value)]
    if _same(answer, right) and all(_distance(answer, right) <= distance for distance, _ in near):
        return Passed(task, remark)
    if near:
        raise NotYet(f"Task {task}, not yet: {min(near)[1]}")
    raise NotYet(f"Task {task}, not yet: {_general(answer, right)}")


def _load_tasks() -> None:
    """Run the file beside the sheets that registers their tasks, once."""
    if not _TASKS:
        file = paths.notebooks() / "exercises" / "tasks.py"
        spec = importlib.util.spec_from_file_location("workbench_exercise_tasks", file)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def _plain(value: object) -> object:
    """Arrays of anything array-like; tables keep their names."""
    if hasattr(value, "detach"):
        value = value.detach().cpu().numpy()
    return np.asarray(value, dtype=np.float64) if isinstance(value, np.ndarray) and value.dtype.kind == "f" else value


def _same(answer: object, value: object) -> bool:
    if isinstance(value, str) or isinstance(answer, str):
        return isinstance(value, str) and isinstance(answer, str) and answer.strip() == value
    exact = isinstance(value, (int, np.integer))
    try:
        answer, value = np.asarray(answer, dtype=np.float64), np.asarray(value, dtype=np.float64)
    except (TypeError, ValueError):
        return False
    if exact:  # a timestep or a count
        return answer.shape == value.shape and bool(np.all(answer == value))
    size = np.sqrt(np.mean(np.square(value))) if value.size else 0.0
    return answer.shape == value.shape and bool(np.all(np.abs(answer - value) <= 2e-3 * size + 1e-12))


def _distance(answer: object, value: object) -> float:
    """Between two that are the same up to rounding."""
    if isinstance(value, str):
        return 0.0
    return float(np.linalg.norm(np.asarray(answer, dtype=np.float64) - np.asarray(value, dtype=np.float64)))


def _general(answer: object, right: object) -> str:
    """A hint about an answer that no misunderstanding is known for."""
    if isinstance(right, str):
        return f"{answer!r} is not what the figure or the text shows; look again."
    shape, wanted = np.shape(answer), np.shape(right)
    if shape != wanted:
        return f"the answer has shape {shape}, and shape {wanted} is asked for; along which axis do you sum?"
    return "the shape is right and the values are not; compare each factor of the formula with your line."


def task(number: str) -> Callable:
    """Register a generator as the task of that number."""

    def register(function: Callable) -> Callable:
        _TASKS[number] = function
        return function

    return register


def prediction(number: str) -> None:
    """Register a question whose answer, a, b or c, is asked for before the figure that shows it."""
    _TASKS[number] = lambda: iter([({"a", "b", "c"}, "noted. Now run the next cell, and compare.")])


def choice(number: str, right: str, remark: str, **hints: str) -> None:
    """Register a question with one right answer of several, and a hint for each other."""
    _TASKS[number] = lambda: iter([(right, f"right. {remark}"), *hints.items()])
