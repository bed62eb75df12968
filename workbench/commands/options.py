"""Shared options and groups of options, each with its help in one place, and the decorator that makes commands.

A group is a dataclass; `command` turns its fields into options of any function with a parameter of that type.
"""

import dataclasses
import functools
import inspect
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Context, Option, Typer
from typer.core import TyperCommand, TyperGroup

import workbench as wb
from workbench import paths
from workbench.io import one_of, written

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")


class Command(TyperCommand):
    """A command that accepts several values after one option, as in `--attributes Smiling Beard`."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        """Repeat the option's name before each of its values, as typer expects."""
        lists = {name for parameter in self.params if parameter.multiple for name in parameter.opts}
        words, option = [], None
        for word in args:
            if word.startswith("-") and not _are_numbers(word):
                option = word if word in lists else None
            elif option is not None and words[-1] != option:
                words.append(option)
            words.append(word)
        return super().parse_args(ctx, words)


class Group(TyperGroup):
    """A set of commands, listed in alphabetical order."""

    def list_commands(self, ctx: Context) -> list[str]:
        return sorted(self.commands)


app = Typer(cls=Group, add_completion=False, rich_markup_mode=None, context_settings={"max_content_width": 120})


def subcommands(name: str, help: str, *, example: str) -> Typer:
    """Add a command with subcommands, such as `workbench find`."""
    made = Typer(cls=Group, rich_markup_mode=None)
    app.add_typer(made, name=name, help=help, epilog=_as_epilog(example))
    return made


def _as_epilog(example: str) -> str:
    return f"\b\nexample:\n  {example}"


def command(name: str, *, example: str, app: Typer = app) -> Callable:
    """Register a function as a command: its docstring is the help, its parameters are the options."""

    def register(function: Callable) -> Callable:
        groups, options = {}, []
        for parameter in inspect.signature(function).parameters.values():
            fields = [parameter]
            if dataclasses.is_dataclass(group := parameter.annotation):
                fields = list(inspect.signature(group).parameters.values())
                groups[parameter.name] = group, [field.name for field in fields]
            options += [field.replace(kind=inspect.Parameter.KEYWORD_ONLY) for field in fields]

        @functools.wraps(function)
        def run(**given):
            for name, (group, fields) in groups.items():
                given[name] = group(**{field: given.pop(field) for field in fields})
            return function(**given)

        run.__signature__ = inspect.Signature(options)
        app.command(name, cls=Command, epilog=_as_epilog(example))(run)
        return function

    return register


def _are_numbers(text: str) -> bool:
    """Whether a word is a number, or several as a notebook's parameter takes them, such as -1,0,1."""
    try:
        for part in text.split(","):
            float(part)
    except ValueError:
        return False
    return True


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text!r} is not a finite number")
    return number


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise ValueError(f"{text!r} is not a list of seeds such as 0-15 or 3,7,11")
    spans = [part.partition("-") for part in text.split(",")]
    for first, dash, last in spans:
        if dash and int(last) < int(first):
            raise ValueError(f"{first}-{last} has no seeds; write {last}-{first}")
    return [seed for first, _, last in spans for seed in range(int(first), int(last or first) + 1)]


def _out(check: Callable[[str], Path], help: str):
    """`--out`, checked before the command does anything."""
    return Option("-o", "--out", callback=lambda path: None if path is None else check(path), help=help, metavar="PATH")


def _edit(path: str) -> Path:
    if path.endswith(".safetensors"):
        return paths.writable(path)
    from workbench.report.plots import figure_files

    figure_files(path)
    return paths.local(path)


_folder = functools.partial(paths.writable, folder=True)
_picture = functools.partial(paths.writable, suffixes=("", *PICTURES))


def save_picture(figure, path: Path) -> None:
    with written(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.lower()[1:] or "png")


def assignments(words: list[str] | None) -> dict[str, str]:
    """Names and values of `-p n 512 -p seed=1`."""
    rest = iter(words or ())
    pairs = (word.split("=", 1) if "=" in word else (word, next(rest, "")) for word in rest)
    return {name: value for name, value in pairs}


def check_attributes(wanted: list[str], known) -> None:
    for name in wanted:
        one_of("attribute", name, known)


Tap = Annotated[str, Option(metavar="TAP", help="where h is read: mid, before, middle, down.0, skip.3, up.1, ...")]
Dtype = Annotated[Literal["float16", "float32"], Option(help="precision of h on disk")]
RecordX = Annotated[bool, Option("--record-x", help="record x_t too")]
ModelName = Annotated[str, Argument(help="bundled name, diffusers folder, hub id or checkpoint file", metavar="MODEL")]
Device = Annotated[str | None, Option(help="cpu, cuda or mps (default: the best available)")]
BatchSize = Annotated[int | None, Option(help="samples per pass (default: by the model)")]
Steps = Annotated[int, Option(help="number of visited timesteps")]
Eta = Annotated[float, Option(parser=_finite, metavar="NUMBER", help="0 is DDIM, 1 is DDPM")]
Seed = Annotated[int, Option(help="seed of the first sample")]
Seeds = Annotated[str, Option(parser=_seeds, metavar="SEEDS", help="samples, e.g. 0-15 or 3,7,11")]
Count = Annotated[int, Option(min=1, help="number of samples or images")]
Attributes = Annotated[list[str] | None, Option(metavar="NAME...", help="such as Smiling Beard")]
Numbers = Annotated[list[float], Option(parser=_finite, metavar="NUMBER...", help="distances from the boundary")]
Parameters = Annotated[
    list[str] | None,
    Option(
        "-p",
        "--parameter",
        metavar="NAME VALUE",
        help="value of a notebook parameter, also NAME=VALUE; repeatable; `domain` sets model, images and classifiers",
    ),
]
LabelledSource = Annotated[str, Option(help="labelled images: bundled name, folder or zip")]
Labeller = Annotated[str, Option(help="classifier that labels samples")]
Judge = Annotated[str, Option(help="classifier that scores edits")]
OutFolder = Annotated[str | None, _out(_folder, "folder to write")]
OutFound = Annotated[str | None, _out(_folder, "folder (default: data/directions, or data/boundaries)")]
OutImages = Annotated[str | None, _out(_folder, "folder (default: NAME-part<PART>; eurosat: data/eurosat)")]
OutEdit = Annotated[str, _out(_edit, "figure as PNG, PDF and SVG, or .safetensors of values")]
OutPage = Annotated[str | None, _out(functools.partial(paths.writable, suffixes=(".html",)), "HTML page")]
OutPicture = Annotated[str, _out(_picture, "PNG, JPEG, WebP, TIFF, PDF or SVG")]


@dataclasses.dataclass
class Labels:
    """Where labels come from, and whether broken images are left out."""

    labels: Annotated[
        str | None,
        Option(
            metavar="FILE",
            help="table of the images' labels, or `folders`: each subfolder is a class (default: attributes.csv, "
            "metadata.csv or CelebA's list, in the folder or beside it)",
        ),
    ] = None
    skip_broken: Annotated[bool, Option("--skip-broken", help="leave out images that cannot be decoded")] = False

    def load(self, images: str, size: Sequence[int] | None = None):
        return wb.load_images(images, size=size, labels=self.labels, skip_broken=self.skip_broken)


@dataclasses.dataclass(kw_only=True)
class Condition:
    """What a conditional model is given."""

    prompt: Annotated[str | None, Option(help="prompt of a text-conditional model")] = None
    negative_prompt: Annotated[str, Option(help="text that guidance steers away from")] = ""
    guidance_scale: Annotated[
        float | None, Option(help="scale of classifier-free guidance (default: 7.5 with a prompt)")
    ] = None
    label: Annotated[int | None, Option(help="class of a class-conditional model")] = None

    @property
    def condition(self) -> dict[str, object]:
        """Options of `wb.load_model`; none where nothing is given."""
        if self.prompt is None and self.label is None:
            if self.negative_prompt or self.guidance_scale is not None:
                raise ValueError("--negative-prompt and --guidance-scale need a --prompt beside them")
            return {}
        names = ("prompt", "negative_prompt", "guidance_scale", "label")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}


@dataclasses.dataclass(kw_only=True)
class Network(Condition):
    """A model, its condition, and the device and precision of its network."""

    model: ModelName
    device: Device = None
    precision: Annotated[Literal["float32", "bfloat16", "float16"] | None, Option(help="precision of the passes")] = (
        None
    )
    compile: Annotated[bool, Option("--compile", help="compile the network (faster after a minute)")] = False
    batch_size: BatchSize = None

    def load(self, tap: str | None = None):
        wb.keep_freed_memory()  # this process is the command's own
        options = {"device": self.device, "dtype": self.precision, "compile": self.compile}
        model = wb.load_model(self.model, **options, **self.condition)
        return model if tap is None else model.tapped(tap)


@dataclasses.dataclass(kw_only=True)
class Sampling(Network):
    """A model, and the timesteps and eta of its sampling."""

    steps: Steps = 50
    eta: Eta = 1.0

    @property
    def chain(self) -> dict[str, object]:
        """The sampling options of `wb.sample` and `wb.extract`."""
        return {"steps": self.steps, "eta": self.eta, "batch_size": self.batch_size}
