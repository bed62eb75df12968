"""Plans of reports and sweeps: notebooks with their parameters, read from a YAML file and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import cast

import nbformat
import yaml

from workbench import paths
from workbench.io import code_hash
from workbench.report.parameters import (
    DOMAIN,
    Texts,
    check_parameters,
    find_notebook,
    list_notebooks,
    notebook_defaults,
    read_parameters,
    read_value,
    suggestion,
    with_domain,
)
from workbench.report.sources import naming, new_reader

_PROFILE = ("common", "notebooks", "timeout", "passes", "in_short_for")
_SWEEP = ("notebooks", "common", "matrix", "timeout")


@dataclass(frozen=True)
class Run:
    """One notebook with one set of checked parameters.

    Attributes
    ----------
    notebook : str or Path
    parameters : dict
    out : Path
        The executed notebook; its HTML lies beside it.
    key : str
        Name of its content, as of `content_key`.
    varied : dict
        Those of a sweep's matrix.
    log : Path, optional
        Where what it prints is kept as well.
    """

    notebook: str | Path
    parameters: dict
    out: Path
    key: str = ""
    varied: dict = field(default_factory=dict)
    log: Path | None = None

    @property
    def name(self) -> str:
        """Name of its report."""
        return self.out.stem


@dataclass(frozen=True)
class Plan:
    """The runs of a report or a sweep.

    Attributes
    ----------
    runs : tuple of Run
        In order.
    folder : Path
        Of the reports and their index page.
    timeout : int
        Seconds that a cell may take.
    passes : dict of str to int
        Passes of a network that notebooks are known to take.
    in_short_for : str or None
        The profile that this one cuts short.
    """

    runs: tuple[Run, ...]
    folder: Path
    timeout: int
    passes: dict[str, int] = field(default_factory=dict)
    in_short_for: str | None = None

    @property
    def parameters(self) -> dict[str, dict]:
        """Those of every run."""
        return {run.name: run.parameters for run in self.runs}


def read_profile(
    profile: str, only: Sequence[str] | None = None, *, domain: str | None = None, check: bool = True
) -> Plan:
    """A profile, by the name of its YAML file in `profiles/`: one run of each notebook, or of those in `only`.

    What suits a domain replaces the profile's model, images, classifiers and attributes, and its reports have a folder
    of their own. Without `check`, what parameters name need not be there. ValueError or FileNotFoundError if the
    profile is unknown or of another form, or names an unknown notebook or parameter, or one of another type.
    """
    known = list_notebooks()
    if not known:
        raise ValueError(f"there are no notebooks in {paths.notebooks()}; restore the folder from the repository")
    path = paths.profiles() / f"{profile}.yaml"
    if not path.is_file():
        profiles = ", ".join(sorted(other.stem for other in paths.profiles().glob("*.yaml"))) or "missing"
        raise FileNotFoundError(f"there is no profile {profile!r}; the profiles are {profiles}")
    content = _sections(_load_yaml(path) or {}, _PROFILE, path)
    wanted = set(known) if only is None else {_staged(name) for name in only}
    own: dict[str, dict] = {}
    with naming(f"profile {profile!r}"):
        for key, values in _mapping(content["notebooks"], f"notebooks of {path}").items():
            name = find_notebook(key).stem
            if name in own:
                raise ValueError(f"it names {name} twice, the second time as {key!r}")
            own[name] = _mapping(values or {}, f"{key} of {path}")
        given = _combined({name: own.get(name, {}) for name in known}, content)
        reader = new_reader()
        values = {}
        for name, each, _ in given:
            checked = check and name in wanted
            each = each if domain is None else each | with_domain(name, {DOMAIN: domain})
            values[name] = check_parameters(name, each, reader=reader) if checked else read_parameters(name, each)
    try:
        passes = {find_notebook(name).stem: read_value(count, "int") for name, count in content["passes"].items()}
    except ValueError as error:
        raise ValueError(f"passes of {path} is {content['passes']!r}; it must map notebooks to numbers") from error
    folder = paths.reports() / (domain or "")
    runs = tuple(Run(name, values[name], folder / f"{name}.ipynb") for name in known if name in wanted)
    return Plan(runs, folder, content["timeout"], passes, content["in_short_for"] or None)


def plan_sweep(source: str | Path | Mapping, *, name: str | None = None) -> Plan:
    """The runs of a sweep, a YAML file or a mapping as of `sweep`: one for each combination of a notebook's axes.

    ValueError or FileNotFoundError if the file is missing or not a sweep, or a notebook or parameter is unknown or of
    the wrong type, or names a missing file.
    """
    where = "the sweep"
    if not isinstance(source, Mapping):
        where = paths.local(source)
        if not where.is_file():
            raise FileNotFoundError(f"there is no sweep at {where}; write one, as docs/how-to/cluster.md shows")
        name, source = name or where.stem, cast(Mapping, _load_yaml(where))
    content = _sections(source, _SWEEP, where)
    try:
        starts = read_value(content["notebooks"] or list_notebooks(), "list[str]")
    except ValueError as error:
        given = f"{content['notebooks']!r}; it must be a list of names or their starts, such as [20_geometry, 50]"
        raise ValueError(f"notebooks of {where} is {given}") from error
    for key, values in content["matrix"].items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"matrix {key!r} of {where} is {values!r}; it must be a list of values")
    reader, runs, folder = new_reader(), {}, paths.reports() / "sweeps" / (name or "sweep")
    with naming(where):
        for notebook, given, axes in _combined({_staged(start): {} for start in starts}, content):
            values = check_parameters(notebook, given, reader=reader)
            key = content_key(notebook, values)
            own, varied = f"{notebook}-{key}", {axis: values.get(axis, value) for axis, value in axes.items()}
            runs[own] = Run(notebook, values, folder / f"{own}.ipynb", key, varied, folder / "logs" / f"{own}.log")
    return Plan(tuple(runs.values()), folder, content["timeout"])


def _staged(name: str) -> str:
    """Name of a staged notebook; a path of another one is refused, since its name alone would mean the staged one."""
    path = find_notebook(name)
    if path.parent.resolve() != paths.notebooks().resolve():
        raise ValueError(f"{name!r} is no staged notebook; copy it to {paths.notebooks()} under a name of its own")
    return path.stem


def find_cuts(plan: Plan, *, domain: str | None = None) -> dict[str, str]:
    """Parameters of a profile that differ from the profile that it shortens, in words, by notebook."""
    if plan.in_short_for is None:
        return {}
    cuts, longer = {}, read_profile(plan.in_short_for, domain=domain, check=False).parameters
    for name, values in plan.parameters.items():
        defaults = notebook_defaults(name)
        own, other = defaults | values, defaults | longer[name]
        differ = [f"{key} = {own[key]!r} for {other[key]!r}" for key in own if own[key] != other[key]]
        if differ:
            cuts[name] = f"Cut short for speed: {', '.join(differ)} of the profile {plan.in_short_for}."
    return cuts


def content_key(notebook: str, parameters: Mapping) -> str:
    """Name of a run's content: its notebook's code, all parameters, the package's code, and the weights it names."""
    source = nbformat.read(find_notebook(notebook), as_version=4)
    everything = notebook_defaults(notebook) | parameters
    content = [[cell.source for cell in source.cells if cell.cell_type == "code"], everything]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode())
    digest.update(code_hash().encode())
    for file in _weights(everything):
        digest.update(file.read_bytes())
    for file in _images(everything):
        about = file.stat()
        digest.update(f"{file} {about.st_size} {about.st_mtime_ns}".encode())
    return digest.hexdigest()[:12]


def _images(parameters: Mapping) -> list[Path]:
    """Files of a folder of images that parameters name, with tables of labels in it or beside it."""
    folder = Path(str(parameters.get("images_name", "")))
    if not (folder.is_absolute() and folder.is_dir()):
        return []
    return sorted(file for file in (*folder.rglob("*"), *folder.parent.glob("*.csv")) if file.is_file())


def _weights(parameters: Mapping) -> list[Path]:
    """Files of the models, classifiers and directions that parameters name, as far as they lie here."""
    from workbench.datasets.classifiers import BUNDLED  # torch, seconds

    named = {key: value for key, value in parameters.items() if isinstance(value, str) and value}
    names = [value for key, value in named.items() if key.endswith(("_name", "_path"))]
    places = [folder / name for name in names for folder in (paths.models(), Path())]
    places += [paths.models() / BUNDLED[name] for name in names if name in BUNDLED]
    files = [file for place in places if place.is_dir() for file in sorted(place.rglob("*.safetensors"))]
    return [*files, *(place for place in places if place.is_file())]


def _combined(own: Mapping[str, dict], content: Mapping) -> Iterator[tuple[str, dict, dict]]:
    """Each notebook with its own parameters, the common ones and those of the matrix that it has; and these alone."""
    known = {name: {DOMAIN, *notebook_defaults(name)} for name in own}
    common, matrix = content["common"], content.get("matrix", {})
    for key in [*common, *matrix]:
        if not any(key in each for each in known.values()):
            every = sorted({parameter for each in known.values() for parameter in each})
            raise ValueError(f"none of {', '.join(known)} has the parameter {key!r}; there are {', '.join(every)}")
    for name, values in own.items():
        shared = {key: value for key, value in common.items() if key in known[name]}
        axes = {key: value for key, value in matrix.items() if key in known[name]}
        for combination in product(*axes.values()):
            varied = dict(zip(axes, combination, strict=True))
            yield name, shared | values | varied, varied


def _sections(content: object, sections: Sequence[str], where: str | Path) -> dict:
    """The sections of a profile or a sweep, with empty ones for those that are missing; `timeout` is a number."""
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of {', '.join(sections)}, not {content!r}")
    if unknown := [key for key in content if key not in sections]:
        known = f"{', '.join(sections)}{suggestion(unknown[0], sections)}"
        raise ValueError(f"{where} has a {unknown[0]!r}; it must be a mapping of {known}")
    found = {section: {} if content.get(section) in (None, "") else content[section] for section in sections}
    for section in ("common", "matrix", "passes"):
        _mapping(found.get(section, {}), f"{section} of {where}")
    try:
        timeout = read_value(content.get("timeout", 3600), "int")
    except ValueError:
        timeout = 0
    if timeout < 1:
        raise ValueError(f"timeout of {where} is {content['timeout']!r}; it must be a number of seconds")
    return found | {"timeout": timeout}


def _mapping(value: object, what: str) -> Mapping:
    if not isinstance(value, Mapping):
        raise ValueError(f"{what} is {value!r}; it must map names to values, such as {{seed: 1}}")
    return value


def _load_yaml(path: Path) -> object:
    """Mappings and lists of texts, whose types the notebooks declare; None if the file is empty."""
    try:
        return yaml.load(path.read_text(encoding="utf-8-sig"), Texts)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}," if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "indent with spaces" if "\\t" in problem else "correct it"
        raise ValueError(f"{path}{line} can't be read: {problem}; {hint}") from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not text in UTF-8 ({error}); save it as UTF-8") from error
