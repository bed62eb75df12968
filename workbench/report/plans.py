"""What a report or a sweep runs, read from a YAML file and checked: notebooks with their parameters."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path

import nbformat
import yaml

from workbench import paths
from workbench.io import code_hash
from workbench.report.parameters import (
    Texts,
    check_parameters,
    find_notebook,
    list_notebooks,
    notebook_defaults,
    read_parameters,
    read_value,
    suggestion,
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
    """

    notebook: str | Path
    parameters: dict
    out: Path
    key: str = ""
    varied: dict = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name of its report."""
        return self.out.stem

    @property
    def log(self) -> Path:
        """What it prints, where that is kept."""
        return self.out.parent / "logs" / f"{self.name}.log"


@dataclass(frozen=True)
class Plan:
    """What a report or a sweep runs.

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


def read_profile(profile: str, only: Sequence[str] | None = None, *, check: bool = True) -> Plan:
    """A profile: one run of each notebook.

    Parameters
    ----------
    profile : str
        Name of a YAML file in `profiles/`.
    only : sequence of str, optional
        These notebooks alone; names or their starts.
    check : bool
        Whether what parameters name must be there.

    Raises
    ------
    ValueError, FileNotFoundError
        If the profile is unknown or of another form, or names an unknown notebook or parameter, or one of another type.
    """
    known = list_notebooks()
    if not known:
        raise ValueError(f"there are no notebooks in {paths.notebooks()}; restore the folder from the repository")
    path = paths.profiles() / f"{profile}.yaml"
    if not path.is_file():
        profiles = ", ".join(sorted(other.stem for other in paths.profiles().glob("*.yaml"))) or "missing"
        raise FileNotFoundError(f"there is no profile {profile!r}; the profiles are {profiles}")
    content = _read_sections(path, _PROFILE, path)
    if not isinstance(content["notebooks"], dict):
        raise ValueError(
            f"notebooks of {path} is {content['notebooks']!r}; it must map names to parameters, such as {known[0]}: "
            f"{{seed: 1}}; all notebooks are run, or those that --only names"
        )
    reader, own = new_reader(), {}
    wanted = set(known) if only is None else {find_notebook(name).stem for name in only}
    with naming(f"profile {profile!r}"):
        common = _common(content["common"], known)
        for key, values in content["notebooks"].items():
            name = find_notebook(key).stem
            if values and not isinstance(values, dict):
                raise ValueError(
                    f"{key} of {path} is {values!r}; it must map parameters to values, such as {{seed: 1}}"
                )
            if name in own:
                raise ValueError(f"it names {name} twice, the second time as {key!r}")
            own[name] = values or {}
        runs = []
        for name in known:
            given = common[name] | own.get(name, {})
            if check and name in wanted:
                given = check_parameters(name, given, reader=reader)
            else:
                given = read_parameters(name, given)
            runs.append(Run(name, given, paths.reports() / f"{name}.ipynb"))
    try:
        passes = {find_notebook(name).stem: read_value(count, "int") for name, count in content["passes"].items()}
    except ValueError as error:
        raise ValueError(f"passes of {path} is {content['passes']!r}; it must map notebooks to numbers") from error
    runs = tuple(run for run in runs if run.name in wanted)
    return Plan(runs, paths.reports(), content["timeout"], passes, content["in_short_for"] or None)


def plan_sweep(source: str | Path | Mapping, *, name: str | None = None) -> Plan:
    """The runs of a sweep.

    Parameters
    ----------
    source : path of a YAML file, or mapping
        `notebooks`: names or their starts (default: all); `common`: parameters for every notebook that has them;
        `matrix`: lists of values, of which every combination is run; `timeout`: seconds that a cell may take. Texts
        are read by the types that the notebooks declare.
    name : str, optional
        Of the folder below `reports/sweeps/`; by default that of the file.

    Returns
    -------
    Plan
        A notebook is run once for each combination of those matrix parameters that it has.

    Raises
    ------
    ValueError, FileNotFoundError
        If the file is missing or not a sweep, or a notebook or parameter is unknown or of the wrong type, or
        names what is not there.
    """
    where = "the sweep"
    if not isinstance(source, Mapping):
        source = paths.local(source)
        if not source.is_file():
            raise FileNotFoundError(f"there is no sweep at {source}; write one, for example the one in the README")
        name, where = name or source.stem, source
    content = _read_sections(source, _SWEEP, where)
    starts = content["notebooks"]
    try:
        starts = read_value(str(starts) if type(starts) is int else starts, "list") if starts else list_notebooks()
        starts = read_value([str(start) if type(start) is int else start for start in starts], "list[str]")
    except ValueError as error:
        raise ValueError(
            f"notebooks of {where} is {content['notebooks']!r}; it must be a list of names or their starts, such as "
            "[20_geometry, 50]"
        ) from error
    notebooks, matrix = [find_notebook(start).stem for start in starts], content["matrix"]
    for key, values in matrix.items():
        if not isinstance(values, list) or not values:
            raise ValueError(f"matrix {key!r} of {where} is {values!r}; it must be a list of values")
    reader, runs, folder = new_reader(), {}, paths.reports() / "sweeps" / (name or "sweep")
    with naming(where):
        common, axes_of = _common(content["common"], notebooks), _common(matrix, notebooks)
        for notebook in notebooks:
            axes = axes_of[notebook]
            for combination in product(*axes.values()):
                varied = dict(zip(axes, combination, strict=True))
                values = check_parameters(notebook, common[notebook] | varied, reader=reader)
                key = content_key(notebook, values)
                varied = read_parameters(notebook, varied)
                runs[f"{notebook}-{key}"] = Run(notebook, values, folder / f"{notebook}-{key}.ipynb", key, varied)
    return Plan(tuple(runs.values()), folder, content["timeout"])


def find_cuts(plan: Plan) -> dict[str, str]:
    """What each notebook of a profile has less of than in the one that it cuts short, in words."""
    if plan.in_short_for is None:
        return {}
    cuts, longer = {}, read_profile(plan.in_short_for, check=False).parameters
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
    return digest.hexdigest()[:12]


def _weights(parameters: Mapping) -> list[Path]:
    """Files of the models, classifiers and directions that parameters name, as far as they lie here."""
    from workbench.datasets import classifiers  # torch, seconds

    named = {key: value for key, value in parameters.items() if isinstance(value, str) and value}
    names = [value for key, value in named.items() if key.endswith(("_name", "_path"))]
    places = [folder / name for name in names for folder in (paths.models(), Path())]
    if any(name in classifiers.BUNDLED for name in names):
        places.append(paths.models() / "avataaars-attributes")
    files = [file for place in places if place.is_dir() for file in sorted(place.rglob("*.safetensors"))]
    return [*files, *(place for place in places if place.is_file())]


def _common(given: Mapping[str, object], notebooks: Iterable[str]) -> dict[str, dict]:
    """What each notebook has of some parameters, each of which one must have."""
    known = {name: notebook_defaults(name) for name in notebooks}
    for key in given:
        if not any(key in each for each in known.values()):
            every = sorted({parameter for each in known.values() for parameter in each})
            raise ValueError(f"none of {', '.join(known)} has the parameter {key!r}; there are {', '.join(every)}")
    return {name: {key: value for key, value in given.items() if key in each} for name, each in known.items()}


def _read_sections(source: Path | Mapping, sections: Sequence[str], where: str | Path) -> dict:
    """The sections of a profile or a sweep, with empty ones for those that are missing; `timeout` is a number."""
    content = source if isinstance(source, Mapping) else _load_yaml(source)
    content = {} if content is None and sections is _PROFILE else content
    if not isinstance(content, Mapping):
        raise ValueError(f"{where} must be a mapping of {', '.join(sections)}, not {content!r}")
    if unknown := [key for key in content if key not in sections]:
        raise ValueError(
            f"{where} has a {unknown[0]!r}; it must be a mapping of {', '.join(sections)}"
            f"{suggestion(unknown[0], sections)}"
        )
    found = {section: {} if content.get(section) in (None, "") else content[section] for section in sections}
    for section in ("common", "matrix", "passes"):
        if not isinstance(found.get(section, {}), Mapping):
            raise ValueError(
                f"{section} of {where} is {found[section]!r}; it must map parameters to values, such as {{seed: 1}}"
            )
    try:
        timeout = read_value(content.get("timeout", 3600), "int")
    except ValueError:
        timeout = 0
    if timeout < 1:
        raise ValueError(f"timeout of {where} is {content['timeout']!r}; it must be a number of seconds")
    return found | {"timeout": timeout}


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
