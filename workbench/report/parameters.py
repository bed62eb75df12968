"""Parameters of notebooks: read their declarations, and convert values to their types.

A notebook declares them in the cell tagged `parameters`. Text of a command line, a YAML file or a call is read by the
declared type alone: YAML's own guesses (`yes` a truth value, `010` the number 8, `1:30` the number 90) are not made.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath

import papermill
import yaml

from workbench import paths
from workbench.io import one_of
from workbench.report.sources import check_sources, from_here

_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
_PLAIN = (str, bool, int, float, list, dict, type(None))
_CONDITION = {"prompt": "str", "negative_prompt": "str", "label": "int", "negative": "int", "guidance_scale": "float"}
"""Keys of the parameter `condition` with their types: options of `Model.conditioned` that a text can give."""

DOMAIN = "domain"
"""A parameter of every notebook: the name of a domain, instead of its model, images, classifiers and attributes."""

_TRUTH = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


@dataclass(frozen=True)
class Parameter:
    """One parameter of a notebook.

    Attributes
    ----------
    name : str
    type : str
        The annotation, or the type of the default: "int", "float", "str", "bool", "list", "dict", or a list of one kind
        such as "list[str]". "" if unknown.
    default : object
    help : str
        The comment behind the default.
    """

    name: str
    type: str
    default: object
    help: str


def list_notebooks() -> list[str]:
    """Names of the staged notebooks, in the order in which they build on each other."""
    return sorted(path.stem for path in paths.notebooks().glob("[!.]*.ipynb"))


def find_notebook(name: str | Path) -> Path:
    """File of a notebook, by its name ("10_extract"), the start of one name alone ("10"), or a path.

    Raises
    ------
    ValueError, FileNotFoundError
        If there is none, or a start fits several.
    """
    path, known = paths.local(name), list_notebooks()
    if path.suffix == ".ipynb":
        if not path.is_file():
            raise FileNotFoundError(f"there is no notebook {path}; the staged ones are {', '.join(known) or 'missing'}")
        return path.absolute()
    matches = [stem for stem in known if stem == str(name)] or [stem for stem in known if stem.startswith(str(name))]
    if len(matches) != 1:
        problem = f"fits {', '.join(matches)}" if matches else f"is none of {', '.join(known) or '(no notebooks)'}"
        raise ValueError(f"notebook {str(name)!r} {problem}; give one whole name or its start{suggestion(name, known)}")
    return paths.notebooks() / f"{matches[0]}.ipynb"


def notebook_parameters(name: str | Path) -> dict[str, Parameter]:
    """Parameters that a notebook takes, by their names; the notebook is named as for `find_notebook`."""
    parameters = {}
    for key, found in papermill.inspect_notebook(braced(find_notebook(name))).items():
        declared = found["inferred_type_name"].replace(" ", "")
        try:
            default = ast.literal_eval(found["default"])
            inferred = type(default).__name__
        except (ValueError, SyntaxError):
            default, inferred = found["default"], ""
        kind = next((each for each in (declared, inferred) if each.partition("[")[0] in _TYPES), "")
        parameters[key] = Parameter(key, kind, default, found["help"])
    return parameters


def notebook_defaults(name: str | Path) -> dict[str, object]:
    """Values of the parameters that are not given."""
    return {key: parameter.default for key, parameter in notebook_parameters(name).items()}


def with_domain(name: str | Path, given: Mapping[str, object]) -> dict[str, object]:
    """Given values, with those that suit the domain `given["domain"]` instead of its name; others that are given
    win."""
    if DOMAIN not in given:
        return dict(given)
    from workbench.datasets.domain import DOMAINS

    domains = {domain.name: domain for domain in DOMAINS}
    known = notebook_parameters(name)
    chosen = domains[one_of(DOMAIN, given[DOMAIN], domains)].parameters
    return {key: chosen[key] for key in known if key in chosen} | {k: v for k, v in given.items() if k != DOMAIN}


def read_parameters(name: str | Path, given: Mapping[str, object]) -> dict[str, object]:
    """Values as JSON has them, of the types that the notebook declares.

    Parameters
    ----------
    name : str or Path
        As for `find_notebook`.
    given : mapping of str to value
        Texts are read by the declared type; a list may be written "[-1, 0, 1]" or "-1,0,1", a condition
        "{prompt: a face}". numpy scalars, arrays, tuples and paths are converted. `domain`, the name of a domain that
        the notebook need not declare, stands for its model, images, classifiers and attributes.

    Returns
    -------
    dict of str to value

    Raises
    ------
    ValueError
        If the notebook has no such parameter, or the value is not of its type.
    """
    notebook, known, values = find_notebook(name).stem, notebook_parameters(name), {}
    for key, value in with_domain(name, given).items():
        if key not in known:
            names = ", ".join(known) or "no parameters"
            raise ValueError(f"{notebook} has no parameter {key!r}; it takes {names}{suggestion(key, known)}")
        parameter = known[key]
        kind = parameter.type
        if (key, kind) == ("condition", "dict"):
            values[key] = _read_condition(value, notebook)
            continue
        if kind == "list" and parameter.default and all(isinstance(item, str) for item in parameter.default):
            kind = "list[str]"
        try:
            values[key] = read_value(_plain(value), kind)
        except _Unfit as unfit:
            (value,) = unfit.args
            truth = " (true or false)" if parameter.type == "bool" else ""
            kind = f"{parameter.type}{truth}, like its default {parameter.default!r}"
            kind = kind if isinstance(value, _PLAIN) else "a plain value"
            given = f"{value!r} ({type(value).__name__})"
            raise ValueError(f"parameter {key} of {notebook} is {given}; it must be {kind}") from None
    return values


def _read_condition(given: object, notebook: str) -> dict[str, object]:
    """A condition of a model with values of the types that its keys have."""
    mapping = _from_text(given or "{}", "dict") if isinstance(given, str) else given
    if not isinstance(mapping, Mapping):
        example = "a mapping such as {prompt: a face} or {label: 3}"
        raise ValueError(f"parameter condition of {notebook} is {given!r}; it must be {example}")
    found = {}
    for key, value in mapping.items():
        if key not in _CONDITION:
            about = f"it takes {', '.join(_CONDITION)}{suggestion(key, _CONDITION)}"
            raise ValueError(f"condition of {notebook} has no {key!r}; {about}")
        try:
            found[key] = read_value(_plain(value), _CONDITION[key])
        except _Unfit:
            kind = {"str": "a text", "int": "a whole number", "float": "a number"}[_CONDITION[key]]
            raise ValueError(f"{key} of the condition of {notebook} is {value!r}; it must be {kind}") from None
    return found


def check_parameters(
    name: str | Path, given: Mapping[str, object], *, reader: Callable | None = None
) -> dict[str, object]:
    """Read parameters as `read_parameters`, make paths of files whole, and check that what they name is there.

    The notebook's own calls decide what is checked. It must be possible to load the names that it gives to
    `load_model`, `load_images`, `load_image` and `load_classifier`, as far as that is known without a network or
    weights. `steps` and `timestep` must fit the model's schedule. The images, classifier and judge must know the
    attributes that it gives to `check_attributes`. Defaults are checked too.

    Parameters
    ----------
    name, given
        As for `read_parameters`.
    reader : callable, optional
        From `sources.new_reader`; shared where many notebooks are checked, so that every source is read once.

    Raises
    ------
    ValueError
        As `read_parameters`, or if a parameter names what is not there.
    """
    source, values = find_notebook(name), from_here(read_parameters(name, given))
    # A path that is given is meant from here, a default from the notebook's folder, where the kernel runs.
    defaults = from_here(notebook_defaults(name), source.parent)
    check_sources(source, defaults | values, reader)
    return values


def read_value(value: object, kind: str) -> object:
    """A value, or a text, as one of a declared type; `_Unfit`, a ValueError, names the part that is not of it."""
    outer, _, inner = kind.partition("[")
    inner = inner.removesuffix("]")
    if isinstance(value, str) and outer != "str":
        value = _from_text(value, outer)
    if outer == "float" and type(value) is int:
        value = float(value)
    finite = not isinstance(value, float) or math.isfinite(value)
    truth_for_number = isinstance(value, bool) and outer in ("int", "float")
    if not isinstance(value, _TYPES.get(outer, _PLAIN)) or truth_for_number or not finite:
        raise _Unfit(value)
    if isinstance(value, list):
        return [read_value(item, inner) for item in value]
    if isinstance(value, dict):
        return {key: read_value(item, "") for key, item in value.items()}
    return value


class _Unfit(ValueError):
    """The value that is not of its type."""


def _from_text(text: str, kind: str) -> object:
    """Value of a text as one of a kind; the text itself if it is none."""
    try:
        if kind == "bool":
            return _TRUTH.get(text.strip().lower(), text)
        if kind in ("int", "float"):
            return _TYPES[kind](text)
        if kind in ("list", "dict"):
            bare = kind == "list" and not text.strip().startswith("[")
            content = yaml.load(f"[{text}]" if bare else text, Texts)
            return content if isinstance(content, _TYPES[kind]) else text
        return json.loads(text)
    except (ValueError, yaml.YAMLError):
        return text


def _plain(value: object) -> object:
    """numpy scalars and arrays, tensors, tuples and paths as JSON has them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


class Texts(yaml.SafeLoader):
    """Every scalar is its text; of what YAML resolves by itself, the merge key `<<` stays."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def braced(path: Path) -> str:
    """papermill takes a path for a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")


def suggestion(word: object, known: Iterable[str]) -> str:
    """The known word that is nearest to another, in brackets; or nothing."""
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""
