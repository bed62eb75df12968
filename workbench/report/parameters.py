"""Parameters of notebooks: from a command line, a profile, a sweep or a call, checked before a kernel starts.

A notebook declares them, with their types, in the cell tagged `parameters`. Text is read by the declared type alone,
wherever it stands: YAML's own guesses (`yes` a truth value, `010` the number 8, `1:30` the number 90) are not made.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path, PurePath

import nbformat
import papermill
import yaml

from workbench import paths

_TYPES = {"int": int, "float": float, "str": str, "bool": bool, "list": list, "dict": dict}
_WORDS_FOR_BOOL = {word: True for word in ("true", "yes", "on", "1")}
_WORDS_FOR_BOOL |= {word: False for word in ("false", "no", "off", "0")}
_PROFILE = ("common", "notebooks", "timeout", "passes", "in_short_for")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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


@dataclass(frozen=True)
class Profile:
    """What a report runs.

    Attributes
    ----------
    parameters : dict of str to dict
        Of each notebook, in order.
    timeout : int
        Seconds that a cell may take.
    passes : dict of str to int
        Passes of a network that notebooks are known to take.
    in_short_for : str or None
        The profile that this one cuts short.
    """

    parameters: dict[str, dict]
    timeout: int
    passes: dict[str, int]
    in_short_for: str | None = None


def list_notebooks() -> list[str]:
    """Names of the staged notebooks, in the order in which they build on each other."""
    return sorted(path.stem for path in paths.notebooks().glob("[!.]*.ipynb"))


def find_notebook(name: str | Path) -> Path:
    """File of a notebook.

    Parameters
    ----------
    name : str or Path
        Name ("10_extract"), the start of one name alone ("10"), or a path.

    Returns
    -------
    Path

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
        raise ValueError(
            f"notebook {str(name)!r} {problem}; give one whole name or its start{_suggestion(name, known)}"
        )
    return paths.notebooks() / f"{matches[0]}.ipynb"


def notebook_parameters(name: str | Path) -> dict[str, Parameter]:
    """Parameters that a notebook takes.

    Parameters
    ----------
    name : str or Path
        Name ("10_extract"), the start of one name alone ("10"), or a path.

    Returns
    -------
    dict of str to Parameter
    """
    parameters = {}
    for key, found in papermill.inspect_notebook(braced(find_notebook(name))).items():
        declared = found["inferred_type_name"].replace(" ", "")
        try:
            default = ast.literal_eval(found["default"])
            inferred = type(default).__name__
        except (ValueError, SyntaxError):
            default, inferred = found["default"], ""
        kind = declared if declared.partition("[")[0] in _TYPES else inferred
        parameters[key] = Parameter(key, kind if kind.partition("[")[0] in _TYPES else "", default, found["help"])
    return parameters


def check_parameters(
    name: str | Path, parameters: Mapping[str, object], *, readers: Mapping[str, Callable] | None = None
) -> dict[str, object]:
    """Parameters as JSON values of the types that the notebook declares, with what they name being there.

    What the notebook does with them says what is checked: a name that it gives to `load_model`, `load_images`,
    `load_image` or `load_classifier` must be one that they take, as far as that is known without a network or weights;
    `steps` and `timestep` must fit the model's schedule; and attributes that it gives to `check_attributes` must be
    known to the images, classifier and judge. The defaults of what is not given are checked with it.

    Parameters
    ----------
    name : str or Path
        As for `notebook_parameters`.
    parameters : mapping
        numpy scalars, arrays, tuples and paths are converted.
    readers : mapping, optional
        From `new_readers`, which reads every source once, where many notebooks are checked.

    Returns
    -------
    dict of str to value

    Raises
    ------
    ValueError
        If the notebook has no such parameter, the value is not of its type, or it names what is not there.
    """
    known, source = notebook_parameters(name), find_notebook(name)
    checked = {}
    for key, value in parameters.items():
        parameter = _known(key, known, source.stem)
        checked[key] = _typed(_plain(value), parameter.type, parameter, source.stem)
    values = {key: parameter.default for key, parameter in known.items()}
    # A path that is given is meant from here, a default from the notebook's folder, where the kernel runs.
    near = {key: str(source.parent / value) for key, value in values.items() if _is_path(key, value, source.parent)}
    _check_sources(source, values | near | from_here(checked), new_readers() if readers is None else readers)
    return checked


def from_here(parameters: Mapping[str, object]) -> dict[str, object]:
    """Parameters that name files, `..._name` and `..._path`, with whole paths: a kernel runs in the notebook's folder.

    So does `figures`, the folder that figures are written to. Names of bundled models and images stay names.
    """
    if parameters.get("figures"):
        parameters = {**parameters, "figures": str(paths.writable(parameters["figures"], folder=True).absolute())}
    return {
        key: str(paths.local(value).absolute()) if _is_path(key, value, Path()) else value
        for key, value in parameters.items()
    }


def _is_path(key: str, value: object, folder: Path) -> bool:
    if not (isinstance(value, str) and value and key.endswith(("_name", "_path"))):
        return False
    return not paths.is_address(value) and (folder / paths.local(value)).exists() and not _is_bundled(key, value)


def _is_bundled(key: str, value: str) -> bool:
    from workbench.datasets import classifiers, labelled  # torch: only where a file could be meant
    from workbench.diffusion.loading import has_unet

    if key == "model_name":
        return re.fullmatch(r"[\w.-]+", value) is not None and has_unet(paths.models() / value)
    if key in ("classifier_name", "judge_name"):
        return value in (*classifiers.BUNDLED, "clip")
    return key == "images_name" and value in labelled.BUNDLED


def read_parameters(name: str | Path, given: Mapping[str, object]) -> dict[str, object]:
    """Texts of a command line or of a YAML file, read by the types that the notebook declares.

    Parameters
    ----------
    name : str or Path
        As for `notebook_parameters`.
    given : mapping of str to value
        A list may be a list of texts, or written "[-1, 0, 1]" or "-1,0,1". What is no text must be of the type.

    Returns
    -------
    dict of str to value

    Raises
    ------
    ValueError
        If the notebook has no such parameter, or the value is not of its type.
    """
    name, known = find_notebook(name).stem, notebook_parameters(name)
    values = {}
    for key, value in given.items():
        parameter = _known(key, known, name)
        kind = parameter.type
        if kind == "list" and parameter.default and all(isinstance(item, str) for item in parameter.default):
            kind = "list[str]"
        values[key] = _typed(_read(_plain(value), kind), kind, parameter, name)
    return values


def parse_parameters(name: str | Path, assignments: Iterable[str]) -> dict[str, object]:
    """Read "key=value" words by the types that the notebook declares, so that `model_name=007` stays text.

    Parameters
    ----------
    name : str or Path
        As for `notebook_parameters`.
    assignments : iterable of str
        A list is written "[-1, 0, 1]" or "-1,0,1".

    Returns
    -------
    dict of str to value

    Raises
    ------
    ValueError
        If a word has no "=", the notebook has no such parameter, or the value is not of its type.
    """
    given = {}
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not an assignment; write name=value, for example seed=1")
        given[key] = text
    return read_parameters(name, given)


def plan_profile(profile: str, only: Sequence[str] | None = None) -> Profile:
    """A profile of the notebooks that a report runs, with checked parameters.

    Parameters
    ----------
    profile, only
        As of `report`.

    Raises
    ------
    ValueError, FileNotFoundError
        As `read_profile`, or if what a parameter names is not there.
    """
    found = read_profile(profile)
    wanted = list(found.parameters) if only is None else {find_notebook(name).stem for name in only}
    readers = new_readers()
    with naming(f"profile {profile!r}"):
        checked = {
            name: check_parameters(name, values, readers=readers)
            for name, values in found.parameters.items()
            if name in wanted
        }
    return replace(found, parameters=checked)


def read_profile(profile: str) -> Profile:
    """A profile, with the parameters of every notebook by their types.

    Parameters
    ----------
    profile : str
        Name of a YAML file in `profiles/`.

    Raises
    ------
    ValueError, FileNotFoundError
        If the profile is unknown or of another form, or names an unknown notebook or parameter.
    """
    known = list_notebooks()
    if not known:
        raise ValueError(f"there are no notebooks in {paths.notebooks()}; restore the folder from the repository")
    path = paths.profiles() / f"{profile}.yaml"
    if not path.is_file():
        profiles = ", ".join(sorted(other.stem for other in paths.profiles().glob("*.yaml"))) or "missing"
        raise FileNotFoundError(f"there is no profile {profile!r}; the profiles are {profiles}")
    content = load_yaml(path)
    content = check_sections({} if content is None else content, _PROFILE, path)
    own = content["notebooks"]
    if not isinstance(own, dict):
        raise ValueError(
            f"notebooks of {path} is {own!r}; it must map names to parameters, such as {known[0]}: {{seed: 1}}; all "
            f"notebooks are run, or those that --only names"
        )
    parameters = {name: notebook_parameters(name) for name in known}
    for key in content["common"]:
        if not any(key in each for each in parameters.values()):
            every = sorted({parameter for each in parameters.values() for parameter in each})
            raise ValueError(
                f"no notebook has the common parameter {key!r} of profile {profile!r}; there are {', '.join(every)}"
            )
    plan = {name: {key: value for key, value in content["common"].items() if key in parameters[name]} for name in known}
    meant = {}
    for key, values in own.items():
        names = [name for name in known if name == key] or [name for name in known if name.startswith(str(key))]
        if len(names) != 1:
            raise ValueError(
                f"profile {profile!r} names a notebook {key!r}; there are {', '.join(known)}{_suggestion(key, known)}"
            )
        if names[0] in meant:
            raise ValueError(f"profile {profile!r} names {names[0]} twice, as {meant[names[0]]!r} and {key!r}")
        if values and not isinstance(values, dict):
            raise ValueError(f"{key} of {path} is {values!r}; it must map parameters to values, such as {{seed: 1}}")
        meant[names[0]] = key
        plan[names[0]] |= values or {}
    with naming(f"profile {profile!r}"):
        plan = {name: read_parameters(name, values) for name, values in plan.items()}
    passes = {name: _read(count, "int") for name, count in content["passes"].items()}
    if set(passes) - set(known) or any(type(count) is not int for count in passes.values()):
        raise ValueError(f"passes of {path} is {content['passes']!r}; it must map notebooks to numbers")
    return Profile(plan, content["timeout"], passes, content["in_short_for"] or None)


def load_yaml(path: Path) -> object:
    """Content of a YAML file: mappings and lists of texts, whose types the notebooks declare; None if it is empty.

    Raises
    ------
    ValueError
        If it is not YAML, or a key stands twice; the message names the line.
    """
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), _Texts)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "indent with spaces" if "\\t" in problem else "correct it"
        raise ValueError(f"{path}{line} can't be read: {problem}; {hint}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from error


class _Texts(yaml.SafeLoader):
    """Every scalar is its text; of what YAML resolves by itself, the merge key `<<` stays."""

    yaml_implicit_resolvers = {"<": yaml.SafeLoader.yaml_implicit_resolvers["<"]}

    def compose_mapping_node(self, anchor):
        node, seen = super().compose_mapping_node(anchor), set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise yaml.MarkedYAMLError(problem=f"{key.value!r} stands there twice", problem_mark=key.start_mark)
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
        return node


def check_sections(content: object, sections: Sequence[str], where: str | Path) -> dict:
    """The sections of a profile or a sweep, with empty ones for those that are missing; `timeout` is a number.

    Raises
    ------
    ValueError
        If the content is no mapping of these sections, or one of them is of another form.
    """
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of {', '.join(sections)}, not {content!r}")
    unknown = [key for key in content if key not in sections]
    if unknown:
        raise ValueError(
            f"{where} has a {unknown[0]!r}; it must be a mapping of {', '.join(sections)}"
            f"{_suggestion(str(unknown[0]), sections)}"
        )
    empty = (None, "")
    found = {section: {} if content.get(section) in empty else content[section] for section in sections}
    for section in ("common", "matrix", "passes"):
        if not isinstance(found.get(section, {}), Mapping):
            raise ValueError(
                f"{section} of {where} is {found[section]!r}; it must map parameters to values, such as {{seed: 1}}"
            )
    timeout = _read(content.get("timeout", 3600), "int")
    if type(timeout) is not int or timeout < 1:
        raise ValueError(f"timeout of {where} is {content['timeout']!r}; it must be a number of seconds")
    return found | {"timeout": timeout}


def texts(value: object) -> object:
    """A list of texts, of numbers, or of one; written as a list or with commas. Another value stays as it is."""
    value = _read(str(value) if type(value) is int else value, "list[str]")
    return [str(item) if type(item) is int else item for item in value] if isinstance(value, list) else value


def new_readers() -> dict[str, Callable]:
    """What is read of a source that a notebook loads, by the function that loads it; every source is read once."""

    def model(name: str):
        from workbench.diffusion.loading import load_schedule, load_shapes

        if _is_remote(name) or paths.local(name).is_file():
            return None
        load_shapes(name)
        return load_schedule(name)

    def images(name: str):
        from workbench.datasets.labelled import load_images

        return load_images(name)

    def image(name: str):
        from workbench.datasets.labelled import load_image

        return load_image(name)

    def classifier(name: str):
        from workbench.datasets.classifiers import read_attributes

        return None if _is_remote(name) else read_attributes(name)

    return {
        "load_model": cache(model),
        "load_images": cache(images),
        "load_image": cache(image),
        "load_classifier": cache(classifier),
    }


def _is_remote(name: str) -> bool:
    """Whether it may be a repository of the hub, which is not asked: only the kernel fetches."""
    return _HUB_ID.fullmatch(name) is not None and not Path(name).parent.is_dir()


def _check_sources(source: Path, values: Mapping[str, object], readers: Mapping[str, Callable]) -> None:
    """Read what the notebook will load, and see whether attributes and timesteps fit it."""
    calls, optional = _calls(source)
    found = {}
    for function, arguments in calls:
        key = arguments[0].id if arguments and isinstance(arguments[0], ast.Name) else None
        if function in readers and isinstance(values.get(key), str) and not (values[key] == "" and key in optional):
            if values[key] == "":
                raise ValueError(f"{key} of {source.stem} is empty; give what {function} takes")
            try:
                found[key] = readers[function](values[key])
            except (ValueError, OSError, ImportError) as error:
                raise ValueError(f"{key} of {source.stem} is {values[key]!r}: {error}") from error
    if found.get("model_name") is not None:
        _check_timesteps(source.stem, values, found["model_name"])
    for function, arguments in calls:
        if function == "check_attributes" and arguments:
            from workbench.datasets.classifiers import check_attributes

            first, *keywords = arguments
            named = [values[node.id] for node in ast.walk(first) if isinstance(node, ast.Name) and node.id in values]
            wanted = [each for value in named for each in (value if isinstance(value, list) else [value])]
            roles = [keyword.arg for keyword in keywords if isinstance(keyword, ast.keyword)]
            with naming(source.stem):
                check_attributes(wanted, **{role: found.get(f"{role}_name") for role in roles})


def _calls(source: Path) -> tuple[list[tuple[str, list]], set[str]]:
    """Calls in a notebook with their arguments, and the names that it takes for left out where they are empty."""
    calls, optional = [], set()
    for cell in nbformat.read(source, as_version=4).cells:
        try:
            tree = ast.parse(cell.source if cell.cell_type == "code" else "")
        except SyntaxError:  # magics
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.Call):
                function = getattr(node.func, "attr", getattr(node.func, "id", ""))
                calls.append((function, [*node.args, *node.keywords]))
            elif isinstance(node, ast.If | ast.IfExp) and isinstance(node.test, ast.Name):
                optional.add(node.test.id)
    return calls, optional


def _check_timesteps(notebook: str, values: Mapping[str, object], schedule) -> None:
    for key, value in values.items():
        if key == "steps" or (key.endswith("_steps") and isinstance(value, list)):
            with naming(f"{key} of {notebook}"):
                for count in value if isinstance(value, list) else [value]:
                    schedule.timesteps(count)
        if key in ("timestep", "timesteps"):
            for t in value if isinstance(value, list) else [value]:
                if not 0 <= t < schedule.T:
                    raise ValueError(
                        f"{key} of {notebook} is {value}; the model {values['model_name']} was trained on timesteps "
                        f"0 to {schedule.T - 1}"
                    )


@contextmanager
def naming(where: str) -> Iterator[None]:
    """Errors say where what they are about stands."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def braced(path: Path) -> str:
    """papermill takes a path for a format string."""
    return str(path).replace("{", "{{").replace("}", "}}")


def _known(key: str, known: Mapping[str, Parameter], notebook: str) -> Parameter:
    if key not in known:
        names = ", ".join(known) or "no parameters"
        raise ValueError(f"{notebook} has no parameter {key!r}; it takes {names}{_suggestion(key, known)}")
    return known[key]


def _suggestion(word: str | Path, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(str(word), list(known), n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _plain(value: object) -> object:
    """numpy scalars and arrays, tensors, tuples and paths as JSON has them."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


def _read(value: object, kind: str) -> object:
    """A text as a value of a type; what can't be read stays as it is, for `_typed` to refuse."""
    outer, _, inner = kind.partition("[")
    if isinstance(value, list) and outer in ("list", ""):
        return [_read(item, inner.rstrip("]")) for item in value]
    if isinstance(value, dict) and outer in ("dict", ""):
        return {key: _read(item, "") for key, item in value.items()}
    if not isinstance(value, str) or outer == "str":
        return value
    if outer == "bool":
        return _WORDS_FOR_BOOL.get(value.strip().lower(), value)
    try:
        if outer in ("int", "float"):
            return _TYPES[outer](value)
        if outer in ("list", "dict"):
            bare = outer == "list" and not value.strip().startswith("[")
            content = yaml.load(f"[{value}]" if bare else value, _Texts)
            return _read(content, kind) if isinstance(content, _TYPES[outer]) else value
        return json.loads(value)
    except (ValueError, yaml.YAMLError):
        return value


def _typed(value: object, kind: str, parameter: Parameter, notebook: str) -> object:
    outer, _, inner = kind.partition("[")
    allowed = _TYPES.get(outer, object)
    if allowed is float and type(value) is int:
        value = float(value)
    fits = isinstance(value, allowed) and not (isinstance(value, bool) and allowed in (int, float))
    if fits and isinstance(value, float) and not math.isfinite(value):
        fits = False
    if not fits:
        given = f"{value!r} ({type(value).__name__})"
        words = " (true or false)" if parameter.type == "bool" else ""
        expected = f"{parameter.type}{words}, like its default {parameter.default!r}"
        raise ValueError(f"parameter {parameter.name} of {notebook} is {given}; it must be {expected}")
    if outer == "list" and inner:
        return [_typed(item, inner.rstrip("]"), parameter, notebook) for item in value]
    try:
        json.dumps(value)
    except TypeError:
        given = f"{value!r} ({type(value).__name__})"
        raise ValueError(f"parameter {parameter.name} of {notebook} is {given}; it must be a plain value") from None
    return value
