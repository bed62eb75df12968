"""Recipes: an edit as a JSON file with a folder of tensors that no seed reproduces.

`edit.json` names the model by its hash, the sample by its seed, and each direction and boundary by the checksum of its
file in `edit.parts/`. The inversion of a dropped image is kept there too. The recipe also records a checksum of the
edited image, so that a later rendering can tell whether it is the same, bit for bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from workbench.datasets.classifiers import Classifier
from workbench.diffusion.loading import load_model
from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import Trajectory, sample
from workbench.directions.boundary import Boundary, load_boundary
from workbench.directions.direction import Direction, load_direction
from workbench.formats.tensors import digest, kind_of
from workbench.io import write_text
from workbench.paths import file_name, local, writable
from workbench.studio.session import EditSession
from workbench.studio.state import EditState, Rendering

FORMAT, VERSION = "hspace-edit", 1
_KEYS = {*"model sample timesteps etas eta process t_range directions boundaries result".split()}
_RESULT_KEYS = {"sha256", "torch", "threads"}


def save_recipe(session: EditSession, path: str | Path, *, state: EditState | None = None) -> Path:
    """Render an edit of a session and write it as a recipe.

    Parameters
    ----------
    session : EditSession
    path : path
        Path of the `.json`; the tensors go to a folder of the same name ending in `.parts`.
    state : EditState, optional
        By default the session's.

    Returns
    -------
    Path

    Raises
    ------
    ValueError
        If the path has another suffix, or nothing is edited.
    """
    path = writable(path)
    if path.suffix != ".json":
        raise ValueError(f"a recipe is a .json file, not {path.name}")
    state = session.state if state is None else state
    if not state.edits:
        raise ValueError("nothing is edited, so there is no recipe; pull a slider first")
    run = session.samples[state.sample]
    folder = _folder_of(path)
    folder.mkdir(parents=True, exist_ok=True)
    replaced = _files_of(path)
    names = dict.fromkeys([*state.scales, *(other for name in state.scales for other in state.against.get(name, ()))])
    recipe = {
        "format": FORMAT,
        "version": VERSION,
        "model": session.model.provenance(),
        "sample": _about_sample(run, folder),
        "timesteps": list(run.timesteps),
        "etas": list(run.etas),
        "eta": state.eta,
        "process": state.process,
        "t_range": list(state.t_range),
        "directions": [
            {
                "name": name,
                "file": _save_part(session.directions[name], name, folder),
                "scale": state.scales.get(name, 0.0),
                "against": list(state.against.get(name, ())) if name in state.scales else [],
            }
            for name in names
        ],
        "boundaries": [
            {"name": name, "file": _save_part(session.boundaries[name], name, folder), "distance": distance}
            for name, distance in state.distances.items()
        ],
        "result": result_of(session.render(state=state)),
    }
    write_text(path, json.dumps(recipe, indent=1))
    for file in replaced - _files_of(path):
        _part(path, file).unlink(missing_ok=True)
    return path


def open_recipe(path: str | Path, *, model: Model | None = None, classifier: Classifier | None = None) -> EditSession:
    """Open a session with the sample, directions and edit of a recipe, ready to render.

    Parameters
    ----------
    path : path
    model : Model, optional
        By default the bundled or hub model named in the recipe.
    classifier : Classifier, optional

    Returns
    -------
    EditSession

    Raises
    ------
    FileNotFoundError
        If the recipe, one of its parts or its model is missing.
    ValueError
        If it is not a recipe, or the model's weights or tap differ from the recorded ones.
    """
    path = local(path)
    recipe = read_recipe(path)
    own = recipe["model"]
    if model is None:
        model = load_model(own["name"], device="cpu").as_recorded(own)
    parts = _parts_of(recipe, path, model)
    run = _run_of(recipe, path, model)
    session = EditSession(model, run, list(parts.values()), classifier=classifier)
    apply_recipe(session, path)
    return session


def apply_recipe(session: EditSession, path: str | Path) -> None:
    """Bring a session to the edit of a recipe, as one change; what it lacks of sample and directions is added.

    FileNotFoundError if the recipe or a part of it is not there; ValueError if it is not a recipe, or of another model
    or other timesteps than the session's.
    """
    path = local(path)
    recipe = read_recipe(path)
    parts = _parts_of(recipe, path, session.model)
    if tuple(recipe["timesteps"]) != session.timesteps:
        steps = f"{path} has {len(recipe['timesteps'])} steps and this session {len(session.timesteps)}"
        raise ValueError(f"{steps}; render it with `workbench edit`, or open it by itself")
    k, named = _sample_of(recipe, path, session), {}
    for name, part in parts.items():
        named[name] = _place_of(part, session, taken=named.values())
    state = EditState(
        t_range=tuple(recipe["t_range"]),
        sample=k,
        scales={named[d["name"]]: d["scale"] for d in recipe["directions"]},
        distances={named[b["name"]]: b["distance"] for b in recipe["boundaries"]},
        against={named[d["name"]]: tuple(named[o] for o in d["against"]) for d in recipe["directions"] if d["against"]},
        process=recipe["process"],
        eta=recipe["eta"],
    )
    session.restore(state)


def load_editable(path: str | Path, *, model: Model) -> Direction | Boundary:
    """Read a direction or a boundary, whichever the file holds; raises as `load_direction` and `load_boundary` do."""
    return (load_boundary if kind_of(path) == "boundary" else load_direction)(path, model=model)


def read_recipe(path: str | Path) -> dict:
    """The JSON of a recipe; FileNotFoundError or ValueError if it is none."""
    path = local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}; the studio saves one")
    try:
        recipe = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not a recipe: it is not JSON ({error})") from error
    if not isinstance(recipe, dict) or recipe.get("format") != FORMAT:
        raise ValueError(f"{path} is not a recipe of an edit")
    if recipe.get("version") != VERSION:
        raise ValueError(f"{path} is a recipe of version {recipe.get('version')}; this workbench reads {VERSION}")
    lacking = _KEYS - recipe.keys() or _RESULT_KEYS.difference(recipe["result"])
    if lacking:
        raise ValueError(f"{path} is not a whole recipe; it lacks {', '.join(sorted(lacking))}")
    return recipe


def result_of(rendering: Rendering) -> dict:
    """Checksum of an edited image, with the torch version and threads that affect its last bits."""
    return {
        "sha256": hashlib.sha256(rendering.after.contiguous().numpy().tobytes()).hexdigest(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
    }


def _folder_of(path: Path) -> Path:
    return path.with_suffix(".parts")


def _files_of(path: Path) -> set[str]:
    """Names of the parts of a recipe; none where there is no recipe."""
    try:
        recipe = read_recipe(path)
        named = [each["file"] for each in (*recipe["directions"], *recipe["boundaries"])]
        named += [recipe["sample"]["image"]] if "image" in recipe["sample"] else []
        return {name for name in named if _part(path, name)}
    except (OSError, ValueError, LookupError, TypeError):  # another file of that name, which is replaced
        return set()


def _part(path: Path, name: str) -> Path:
    """A file beside a recipe; its name leads nowhere else."""
    if Path(name).name != name:
        raise ValueError(f"{path} names a part {name!r}; parts lie in {_folder_of(path).name} itself")
    return _folder_of(path) / name


def _save_part(part: Direction | Boundary, name: str, folder: Path) -> str:
    file = f"{file_name(name)}-{checksum_of(part)[:12]}.safetensors"
    part.save(folder / file)
    return file


def checksum_of(part: Direction | Boundary) -> str:
    """Checksum of the values of a direction or a boundary, and of where they belong."""
    if isinstance(part, Direction):
        timesteps = torch.tensor(part.timesteps)
        return digest({"unit": part.unit.contiguous(), "sigma": part.sigma.contiguous(), "timesteps": timesteps})
    intercept = torch.tensor([part.intercept], dtype=torch.float64)
    return digest({f"normal in {part.space} at {part.t}": part.normal.contiguous(), "intercept": intercept})


def _parts_of(recipe: dict, path: Path, model: Model) -> dict[str, Direction | Boundary]:
    refuse_other_model(str(path), recipe["model"], model.provenance())
    found = {d["name"]: load_direction(_part(path, d["file"]), model=model) for d in recipe["directions"]}
    return found | {b["name"]: load_boundary(_part(path, b["file"]), model=model) for b in recipe["boundaries"]}


def _place_of(part: Direction | Boundary, session: EditSession, *, taken: Collection[str]) -> str:
    """The session's name of a direction or boundary, which is none of those taken; it is added if need be."""
    known = session.directions if isinstance(part, Direction) else session.boundaries
    wanted = checksum_of(part)
    alike = (name for name, own in known.items() if name not in taken and checksum_of(own) == wanted)
    return next(alike, None) or session.add(part)


def _sample_of(recipe: dict, path: Path, session: EditSession) -> int:
    run = _run_of(recipe, path, session.model)
    for k, own in enumerate(session.samples):
        if own.seeds == run.seeds and own.etas == run.etas and torch.equal(own.x_T, run.x_T):
            return k
    return session.add_samples(run)


def _run_of(recipe: dict, path: Path, model: Model) -> Trajectory:
    """The plain sample."""
    timesteps, etas = tuple(recipe["timesteps"]), tuple(recipe["etas"])
    about = recipe["sample"]
    seeds = (about["seed"],) if "seed" in about else None
    if "image" not in about:
        return sample(model, seeds, steps=timesteps, eta=etas, progress=False)
    file = _part(path, about["image"])
    if not file.is_file():
        raise FileNotFoundError(f"there is no inverted image {file}; the recipe's folder must come with it")
    try:
        kept = load_file(file)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} can't be read as an inverted image ({type(error).__name__})") from error
    return Trajectory(model, kept["x_T"], kept["x0"], timesteps, etas, seeds, stored_noise=kept.get("stored_noise"))


def _about_sample(run: Trajectory, folder: Path) -> dict:
    """Its seed, or a file of what no seed gives: an inverted image, or a sample that was moved in x_t."""
    seed = {} if run.seeds is None else {"seed": run.seeds[0]}
    return seed if run.is_sampled else seed | {"image": _save_run(run, folder)}


def _save_run(run: Trajectory, folder: Path) -> str:
    tensors = {"x_T": run.x_T.contiguous(), "x0": run.x0.contiguous()}
    if run.stored_noise is not None:
        tensors["stored_noise"] = run.stored_noise.contiguous()
    file = f"image-{digest(tensors)[:12]}.safetensors"
    save_file(tensors, folder / file)
    return file
