"""Check the models, images, classifiers, attributes and timesteps named by parameters, before a kernel starts."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import nbformat

from workbench import paths

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def from_here(parameters: Mapping[str, object], folder: Path | None = None) -> dict[str, object]:
    """Parameters that name files, `..._name` and `..._path`, with whole paths: a kernel runs in the notebook's folder.

    They are meant from `folder`, by default from here, and so is `figures`, the folder that figures are written to.
    Names of bundled models and images stay names.
    """
    folder = Path() if folder is None else folder
    if parameters.get("figures"):
        figures = paths.writable(folder / paths.local(parameters["figures"]), folder=True)
        parameters = {**parameters, "figures": str(figures.absolute())}
    return {
        key: str((folder / paths.local(value)).absolute()) if _is_path(key, value, folder) else value
        for key, value in parameters.items()
    }


def _is_path(key: str, value: object, folder: Path) -> bool:
    if not (isinstance(value, str) and value and key.endswith(("_name", "_path"))):
        return False
    return not paths.is_address(value) and (folder / paths.local(value)).exists() and not _is_bundled(key, value)


def _is_bundled(key: str, value: str) -> bool:
    from workbench.datasets import classifiers, files  # torch: only where a file could be meant
    from workbench.diffusion.loading import has_unet

    if key == "model_name":
        return re.fullmatch(r"[\w.-]+", value) is not None and has_unet(paths.models() / value)
    if key in ("classifier_name", "judge_name"):
        return value in (*classifiers.BUNDLED, classifiers.PIXELS, "clip")
    return key == "images_name" and value in files.BUNDLED


def new_reader() -> Callable[[str, str], object]:
    """A function (function, name) that reads what the notebook's `function` would load; it reads every source once."""
    return cache(_read)


def _read(function: str, name: str) -> object:
    """Network and schedule of a model, images, an image, or attributes of a classifier; None if only the kernel can."""
    from workbench.datasets import classifiers, labelled
    from workbench.diffusion import loading

    # It may be a repository of the hub, which is not asked: only the kernel fetches.
    remote = _HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir()
    if function == "load_model":
        if remote or paths.local(name).is_file():
            return None
        return loading.load_shapes(name).stages, loading.load_schedule(name)
    if function == "load_classifier":
        return None if remote else classifiers.read_attributes(name)
    return (labelled.load_images if function == "load_images" else labelled.load_image)(name)


def check_sources(source: Path, values: Mapping[str, object], reader: Callable | None = None) -> None:
    """Open the notebook's sources, and check that attributes and timesteps fit; ValueError if not."""
    reader, (calls, optional), found = reader or new_reader(), _calls(source, values), {}
    for function, arguments in calls:
        key = arguments[0].id if arguments and isinstance(arguments[0], ast.Name) else None
        loads = function in ("load_model", "load_images", "load_image", "load_classifier")
        if not loads or not isinstance(values.get(key), str) or (values[key] == "" and key in optional):
            continue
        if values[key] == "":
            raise ValueError(f"{key} of {source.stem} is empty; give what {function} takes")
        try:
            found[key] = reader(function, values[key])
        except (ValueError, OSError, ImportError) as error:
            raise ValueError(f"{key} of {source.stem} is {values[key]!r}: {error}") from error
    if found.get("model_name") is not None:
        network, schedule = found["model_name"]
        _check_sizes(source.stem, values, schedule)
        if "condition" in values:
            _check_condition(source.stem, values, network)
    for function, arguments in calls:
        if function == "check_attributes" and arguments:
            _check_attributes(source.stem, values, arguments, found)


class _Taken(ast.NodeTransformer):
    """Leaves of an `if` on a parameter that is true or false the branch that runs."""

    def __init__(self, values: Mapping[str, object]) -> None:
        self.values = values

    def visit_If(self, node: ast.If | ast.IfExp) -> ast.AST | list[ast.stmt]:
        self.generic_visit(node)
        value = self.values.get(getattr(node.test, "id", None))
        return (node.body if value else node.orelse) if isinstance(value, bool) else node

    visit_IfExp = visit_If


def _calls(source: Path, values: Mapping[str, object]) -> tuple[list[tuple[str, list]], set[str]]:
    """Calls that a notebook makes, with their arguments, and the names that it takes for left out where empty."""
    calls, optional = [], set()
    for cell in nbformat.read(source, as_version=4).cells:
        try:
            tree = _Taken(values).visit(ast.parse(cell.source if cell.cell_type == "code" else ""))
        except SyntaxError:  # magics
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = getattr(node.func, "attr", getattr(node.func, "id", ""))
                calls.append((function, [*node.args, *node.keywords]))
            elif isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name):
                optional.add(node.test.id)
    return calls, optional


def _check_attributes(notebook: str, values: Mapping[str, object], arguments: list, found: Mapping) -> None:
    """As the notebook's own call of `check_attributes`, whose arguments are names of its parameters."""
    from workbench.datasets.classifiers import check_attributes

    first, *keywords = arguments
    named = [values[node.id] for node in ast.walk(first) if isinstance(node, ast.Name) and node.id in values]
    wanted = [each for value in named for each in (value if isinstance(value, list) else [value])]
    roles = [keyword.arg for keyword in keywords if isinstance(keyword, ast.keyword)]
    with naming(notebook):
        check_attributes(wanted, **{role: found.get(f"{role}_name") for role in roles})


def _check_condition(notebook: str, values: Mapping[str, object], network) -> None:
    """The parameter `condition` must fit the model."""
    from workbench.diffusion.conditions import check_options

    kind = network.conditioned_on
    with naming(f"condition of {notebook} for the model {values['model_name']}"):
        if values["condition"]:
            check_options(network, **values["condition"])
        elif kind is not None:
            example = "{prompt: a face}" if kind == "text" else "{label: 3}"
            raise ValueError(f"this network is conditioned on a {kind} and none is given; give {example}, for example")


def _check_sizes(notebook: str, values: Mapping[str, object], schedule) -> None:
    for key, value in values.items():
        if key == "steps" or (key.endswith("_steps") and isinstance(value, list)):
            with naming(f"{key} of {notebook}"):
                for count in value if isinstance(value, list) else [value]:
                    schedule.timesteps(count)
        if key == "n" and value < 1:
            raise ValueError(f"n of {notebook} is {value}; give 1 sample or more")
        if key in ("timestep", "timesteps"):
            for t in value if isinstance(value, list) else [value]:
                if not 0 <= t < schedule.T:
                    trained = f"the model {values['model_name']} was trained on timesteps 0 to {schedule.T - 1}"
                    raise ValueError(f"{key} of {notebook} is {value}; {trained}")


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Prefix errors with the parameter they concern."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
