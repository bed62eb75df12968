"""The `workbench` command: thin shells around the functions of the package.

Errors of the user's making are one sentence on stderr and exit status 2; a notebook that fails is status 1.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import sys
import time
import warnings
from dataclasses import replace
from pathlib import Path

from workbench import paths
from workbench.io import written

EXAMPLES = """examples:
  workbench models                                  what can be loaded, and what it needs
  workbench convert celeba_hq.ckpt data/models/celeba_hq
  workbench sample avataaars32 --seeds 0-15 -o samples.png
  workbench extract avataaars32 --n 512 --steps 50  h-space of 512 samples, on disk
  workbench plan --model google/ddpm-ema-celebahq-256 --n 50000 --steps 50 --gpu h100
  workbench find pca avataaars32 --n 512 --k 5      directions, saved under data/directions
  workbench mixing-step avataaars32 --n 256         the timestep at which x_t has mixed
  workbench boundary fit avataaars32 --t 500 --attributes Smiling
  workbench studio --model avataaars32              edit by sliders, in the browser
  workbench benchmark --quick                       every method on known factors, and a leaderboard
  workbench figure haas-fig4 --out figures          a figure of the papers, with its numbers
  workbench params 10_extract                       parameters of a notebook
  workbench run 10_extract -p n 512 -p steps 20     one notebook as a report
  workbench report --profile quick                  all of them in minutes, and reports/index.html
  workbench sweep seeds.yaml --workers 2            notebooks over a matrix of parameters
  workbench data avataaars --n 2000 --part 10       draw the bundled images again
"""
PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".tif", ".tiff", ".pdf", ".svg")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = _parser().parse_args(argv)
    formatted = warnings.formatwarning
    # A warning is one sentence here, as an error is.
    warnings.formatwarning = lambda message, *_, **__: f"workbench: {message}\n"
    try:
        for name in ("n", "k"):
            if (number := getattr(arguments, name, None)) is not None and number < 1:
                raise ValueError(f"--{name} is {number}; give 1 or more")
        if getattr(arguments, "check_out", None) is not None and arguments.out is not None:
            arguments.out = arguments.check_out(arguments.out)
        status = arguments.action(arguments) or 0
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever read the output has left, as `| head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except KeyboardInterrupt:
        print("workbench: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, RuntimeError, ImportError) as error:
        if arguments.debug:
            raise
        # An OSError's own text leads with its number; the sentence is in strerror where there is one.
        sentence = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        if isinstance(error, OSError) and error.filename and str(error.filename) not in sentence:
            sentence = f"{error.filename}: {sentence}"
        print(f"workbench: {sentence}", file=sys.stderr)
        return 1 if type(error).__name__ == "NotebookFailed" else 2
    finally:
        warnings.formatwarning = formatted


def _out_folder(path: str) -> Path:
    return paths.writable(path, folder=True)


def _out_picture(path: str) -> Path:
    return paths.writable(path, suffixes=("", *PICTURES))


def _out_figure(path: str) -> Path:
    from workbench.report.plots import figure_files

    figure_files(path)
    return paths.local(path)


def _out_edit(path: str) -> Path:
    return paths.writable(path) if path.endswith(".safetensors") else _out_figure(path)


def _add_out(parser: argparse.ArgumentParser, check, text: str, **options) -> None:
    """`--out`, which `main` checks before the command does anything."""
    parser.add_argument("-o", "--out", help=text, **options)
    parser.set_defaults(check_out=check)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="workbench",
        description="Explore the bottleneck space (h-space) of pixel diffusion models.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    def command(name: str, action, text: str, example: str) -> argparse.ArgumentParser:
        return _command(commands, common, name, action, text=text, example=example)

    command("models", _models, "list models that load without a network, and public ones", "workbench models")

    convert = command(
        "convert",
        _convert,
        "make a model folder of a checkpoint of the original DDPM or of guided-diffusion",
        "workbench convert celeba_hq.ckpt data/models/celeba_hq",
    )
    convert.add_argument("file", help=".ckpt, .pt, .pth or .safetensors file")
    convert.add_argument("out", help="new folder")
    convert.add_argument("--preset", help="which published checkpoint it is (default: by its name)")
    convert.add_argument("--image-size", type=int, help="without a preset: side of the images in pixels")
    convert.add_argument("--timesteps", type=int, help="that it was trained on (default: the preset's, or 1000)")
    convert.add_argument(
        "--rescale-timesteps", action="store_true", help="it was told t * 1000 / T, as improved-diffusion's are"
    )
    convert.add_argument("--head-channels", type=int, help="without a preset: channels of an attention head")
    convert.add_argument("--attention-order", choices=("legacy", "new"), help="default legacy")
    convert.add_argument(
        "--schedule",
        choices=("linear", "cosine"),
        help="default: the preset's, or linear where no preset has these shapes and another",
    )

    boundary = command(
        "convert-boundary",
        _convert_boundary,
        "make a boundary of a .sav file of BoundaryDiffusion, without executing it",
        "workbench convert-boundary smile_h.sav --model celeba_hq --t 500 --space h",
    )
    boundary.add_argument("file", help=".sav file")
    boundary.add_argument("--model", required=True, help="the model that it was fitted with")
    boundary.add_argument("--t", type=int, required=True, help="timestep that it was fitted at")
    boundary.add_argument("--space", choices=("h", "x"), required=True, help="what it was fitted in; x is their z")
    boundary.add_argument("--name", help="of the attribute (default: of the file)")
    _add_out(boundary, _out_folder, "folder (default: data/boundaries)")

    verify = command(
        "verify",
        _verify,
        "compare a model with what its authors' library printed for a hub model",
        "workbench verify google/ddpm-ema-celebahq-256",
    )
    verify.add_argument("model", help="hub id, model folder or checkpoint file")
    verify.add_argument("--against", help="hub id that it should equal (default: the model itself)")
    verify.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")

    sample = command("sample", _sample, "generate images", "workbench sample avataaars32 --seeds 0-15 -o samples.png")
    _add_model(sample)
    sample.add_argument("--seeds", type=_seeds, default=range(16), help="e.g. 0-15 or 3,7,11 (default 0-15)")
    _add_out(sample, _out_picture, "PNG, JPEG, WebP, TIFF, PDF or SVG (default samples.png)", default="samples.png")

    extract = command(
        "extract",
        _extract,
        "record the h-space of many samples on disk",
        "workbench extract avataaars32 --n 512 --steps 50",
    )
    _add_model(extract)
    extract.add_argument("--n", type=int, help="number of samples (default 512, or all images)")
    extract.add_argument("--seed", type=int, default=0, help="seed of the first sample (default 0)")
    _add_images(extract, "invert these instead, without --seed and --eta: avataaars, a folder or a zip file of images")
    extract.add_argument("--tap", choices=("before", "middle", "after"), default="after", help="where h is read")
    extract.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of h on disk")
    extract.add_argument("--record-x", action="store_true", help="keep x_t too")
    extract.add_argument("-o", "--out", help="store, a folder or an address like s3://... (default: under data/cache)")

    plan = command(
        "plan",
        _plan,
        "say what an extraction will need: disk, memory, passes, hours",
        "workbench plan --model google/ddpm-ema-celebahq-256 --n 50000 --steps 50 --gpu h100",
    )
    plan.add_argument("--model", default="avataaars32", help="as for extract, or a public one that is not here")
    plan.add_argument("--n", type=int, default=512, help="number of samples (default 512)")
    plan.add_argument("--steps", type=int, default=50, help="visited timesteps (default 50)")
    plan.add_argument("--gpu", help="h100, a100, l4, ...: assume a share of its peak (default: measure this machine)")
    plan.add_argument("--utilisation", type=float, help="that share (default 0.25)")
    plan.add_argument("--rate", type=float, help="passes a second of one process, as you measured them")
    plan.add_argument("--precision", choices=("float32", "bfloat16"), default="float32", help="of the network")
    plan.add_argument("--processes", type=int, default=1, help="processes, one a GPU (default 1)")
    plan.add_argument("--batch-size", type=int, help="samples a pass (default: 64 on a GPU, else as extract takes)")
    plan.add_argument("--dtype", choices=("float16", "float32"), default="float16", help="of h on disk")
    plan.add_argument("--record-x", action="store_true", help="keep x_t too")

    store = command("store", _store, "describe an extracted store", "workbench store data/cache/NAME.zarr")
    store.add_argument("path", help="folder or address")

    _add_find(commands, common)
    _add_analysis(command)
    _add_boundary(commands, common)
    _add_benchmark(command)
    _add_studio(command)

    _add_train(command)

    evaluate = command(
        "evaluate-model",
        _evaluate_model,
        "measure a model's samples against held-out images, and write it into the model card",
        "workbench evaluate-model avataaars32 --images held-out --training part0 part1 --card data/models/avataaars32",
    )
    _add_model(evaluate)
    _add_images(evaluate, "held-out images (default avataaars, the bundled ones)", default="avataaars")
    evaluate.add_argument("--training", nargs="+", default=[], help="what it was trained on, to look for copies")
    evaluate.add_argument("--n", type=int, default=2000, help="number of samples (default 2000)")
    evaluate.add_argument("--seed", type=int, default=0, help="seed of the first sample (default 0)")
    evaluate.add_argument(
        "--classifiers",
        nargs="+",
        default=["avataaars", "avataaars-judge"],
        help="feature spaces; the last one judges attributes (default avataaars avataaars-judge)",
    )
    evaluate.add_argument("--inverted", type=int, default=32, help="images to invert and reconstruct (default 32)")
    evaluate.add_argument("--recipe", action="store_true", help="expect the bundled domain's probabilities")
    evaluate.add_argument("--card", help="model folder whose README.md takes the numbers")

    train = command(
        "train-classifier",
        _train_classifier,
        "train an attribute classifier on labelled images",
        "workbench train-classifier FOLDER --out DIR --seed 0",
    )
    train.add_argument("images", help="folder or zip of images with attributes.csv, or avataaars")
    _add_labels(train)
    _add_out(train, _out_folder, "folder for config.json and model.safetensors", required=True)
    train.add_argument("--seed", type=int, default=0)
    train.add_argument("--steps", type=int, default=2000, help="batches of 128 images (default 2000)")
    train.add_argument(
        "--design", choices=("labeller", "judge"), default="labeller", help="one labels, the other scores"
    )

    data = command("data", _data, "draw images of the bundled domain", "workbench data avataaars --n 2000 --part 10")
    data.add_argument("name", choices=("avataaars",))
    data.add_argument("--n", type=int, default=2000, help="number of images (default 2000)")
    data.add_argument("--part", type=int, default=10, help="0 and 1 are for training, 10 and up held out (default 10)")
    _add_out(data, _out_folder, "folder (default: avataaars-part<PART>)")

    params = command("params", _params, "list notebooks, or the parameters of one", "workbench params 10_extract")
    params.add_argument("notebook", nargs="?")

    run = command("run", _run, "run one notebook as a report", "workbench run 10_extract -p n 512 -p steps 20")
    run.add_argument("notebook", help="name or its number, e.g. 10_extract or 10")
    run.add_argument("-p", "--parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"))
    run.add_argument("-o", "--out", help="executed notebook (default: reports/NAME.ipynb)")

    report = command("report", _report, "run the notebooks, write reports/index.html", "workbench report")
    report.add_argument(
        "--profile", default="quick", help="a file of profiles/ (default quick, a first look; standard and full: more)"
    )
    report.add_argument("--jobs", type=int, help="notebooks side by side (default: as cores and memory allow)")
    report.add_argument("--only", nargs="+", metavar="NOTEBOOK", help="these notebooks only")

    sweep = command(
        "sweep",
        _sweep,
        "run notebooks over a matrix of parameters, in parallel",
        "workbench sweep seeds.yaml --workers 2",
    )
    sweep.add_argument("file", help="YAML file with notebooks, common, matrix and timeout")
    sweep.add_argument("--workers", type=int, help="runs at once on this machine (default: one a core)")
    sweep.add_argument("--scheduler", help="address of a dask scheduler instead, such as tcp://host:8786")
    return parser


def _add_train(command) -> None:
    """`workbench train`: an option a field of `TrainingSettings`; only those that are given reach it."""
    train = command(
        "train",
        _train,
        "train a diffusion model on images, or go on with one that was stopped",
        "workbench train FOLDER --out data/models/mine --size 32 --steps 5000\n  "
        "workbench train FOLDER --out data/models/mine --resume",
    )
    train.add_argument("images", nargs="+", help="folders or zips of images, or avataaars")
    _add_skip_broken(train)
    _add_out(train, _out_folder, "folder of the model", required=True)
    train.add_argument("--resume", action="store_true", help="go on from the last checkpoint in it")
    train.add_argument("--minutes", type=float, default=10.0, help="time between checkpoints (default 10)")
    train.add_argument("--previews", type=int, default=16, help="samples drawn at each of them (default 16)")
    network = train.add_argument_group("network; --from takes it and its first weights from a model")
    network.add_argument("--from", dest="start", metavar="MODEL", help="bundled name or folder")
    network.add_argument("--grow", action="store_true", default=None, help="to twice its size: a resolution outside")
    network.add_argument("--size", type=int, help="side of the images in pixels (default 32)")
    network.add_argument("--widths", type=int, nargs="+", help="channels, finest resolution first (default 48 96 144)")
    network.add_argument("--layers", type=int, help="residual blocks a resolution (default 1)")
    network.add_argument("--attention", type=int, nargs="*", help="resolutions with self-attention (default 8)")
    network.add_argument("--head-channels", type=int, help="channels of an attention head (default 48)")
    network.add_argument("--skips", type=int, help="skip connections kept, from the input on (default: all)")
    settings = train.add_argument_group("training")
    settings.add_argument("--dropout", type=float, help="share of activations that are dropped (default 0)")
    settings.add_argument("--steps", type=int, help="optimiser steps (default 10000)")
    settings.add_argument("--batch-size", type=int, help="images a step, over all processes (default 32)")
    settings.add_argument("--learning-rate", type=float, help="the largest one; a cosine follows (default 4e-4)")
    settings.add_argument("--warmup", type=int, help="steps until it is reached (default 200)")
    settings.add_argument("--weight-decay", type=float, help="of AdamW (default 1e-4)")
    settings.add_argument("--clip", type=float, help="largest norm of the gradient (default 1)")
    settings.add_argument("--ema", type=float, help="decay of the average of the weights (default 0.999)")
    settings.add_argument("--gamma", type=float, help="of the min-SNR weights; inf for the plain loss (default 5)")
    settings.add_argument("--flips", action="store_true", default=None, help="mirror every second image")
    settings.add_argument("--precision", choices=("bfloat16", "float32"), help="of the arithmetic (default bfloat16)")
    settings.add_argument("--compile", action="store_true", default=None, help="compile the network")
    settings.add_argument("--seed", type=int, help="of all that is random (default 0)")


def _add_analysis(command) -> None:
    """`workbench geometry` and `workbench mixing-step`: tables on the screen, figures and numbers in files."""
    geometry = command(
        "geometry",
        _geometry,
        "map h-space at a timestep, and measure the maps and the dimension",
        "workbench geometry avataaars32 --n 256 --steps 20 --t 500 -o geometry",
    )
    mixing = command(
        "mixing-step",
        _mixing_step,
        "find the timestep at which x_t has mixed, by one criterion or several",
        "workbench mixing-step avataaars32 --n 256 --steps 20 --criterion separability commit -o mixing.png",
    )
    for parser in (geometry, mixing):
        _add_model(parser)
        parser.add_argument("--n", type=int, default=256, help="number of samples or images (default 256)")
        parser.add_argument("--seed", type=int, default=0, help="seed of the first sample (default 0)")
        parser.add_argument(
            "--attributes", nargs="+", help="e.g. Smiling Beard (default: all that 5 samples have or lack)"
        )
        parser.add_argument(
            "--labeller", default="avataaars", help="classifier that labels samples (default avataaars)"
        )
    geometry.add_argument("--tap", choices=("before", "middle", "after"), default="after", help="where h is read")
    geometry.add_argument("--t", type=int, default=500, help="timestep of the maps; the nearest visited (default 500)")
    _add_out(geometry, _out_folder, "folder (default geometry)", default="geometry")
    criteria = ("radius_gap", "tv", "separability", "commit", "perceptual", "edit")
    mixing.add_argument(
        "--criterion", nargs="+", choices=criteria, default=["separability"], help="default separability"
    )
    _add_images(mixing, "invert these instead of sampling, without --eta: avataaars, a folder or a zip file of images")
    mixing.add_argument("--judge", default="avataaars-judge", help="classifier that judges (default avataaars-judge)")
    _add_out(mixing, _out_figure, "figure, written as PDF, SVG and PNG")


def _add_benchmark(command) -> None:
    """`workbench benchmark` and `workbench figure`: tables, figures and a report in files."""
    benchmark = command(
        "benchmark",
        _benchmark,
        "measure every method of finding directions on the same held-out samples",
        "workbench benchmark --quick --methods PCA 'mean difference' -o benchmark",
    )
    benchmark.add_argument("model", nargs="?", default="avataaars32", help="default avataaars32")
    benchmark.add_argument("--quick", action="store_true", help="few samples and three attributes: minutes, not hours")
    benchmark.add_argument("--methods", nargs="+", metavar="METHOD", help="default: all that are registered")
    benchmark.add_argument("--attributes", nargs="+", metavar="NAME", help="default: all of the judge's, or three")
    benchmark.add_argument("--plugin", help="Python file that registers more methods")
    benchmark.add_argument("--seed", type=int, default=0, help="of populations and held-out samples (default 0)")
    _add_images(benchmark, "labelled images: bundled name, folder or zip", default="avataaars")
    benchmark.add_argument("--labeller", default="avataaars", help="labels samples (default avataaars)")
    benchmark.add_argument("--judge", default="avataaars-judge", help="scores edits (default avataaars-judge)")
    benchmark.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    benchmark.add_argument("--workers", type=int, help="processes (default: one a core, or one where there is a GPU)")
    benchmark.add_argument("--scheduler", metavar="ADDRESS", help="of dask, tcp://host:8786, for workers elsewhere")
    _add_out(benchmark, _out_folder, "folder (default benchmark)", default="benchmark")
    benchmark.add_argument("--no-report", action="store_true", help="leave out the HTML of 80_benchmark")
    for size in ("population", "held-out", "repeats", "steps"):
        benchmark.add_argument(f"--{size}", type=int, help="in place of the size's own")

    figure = command(
        "figure",
        _figure,
        "run the notebook that has a figure of the papers; it goes to PDF, SVG and PNG, its numbers to JSON",
        "workbench figure haas-fig4 --out figures",
    )
    figure.add_argument("names", nargs="*", metavar="NAME", help="of `workbench figure --list`, or all")
    figure.add_argument("--list", action="store_true", help="what there is, what it shows and in which notebook")
    figure.add_argument("--profile", help="parameters of the notebooks, from profiles/PROFILE.yaml")
    figure.add_argument("-p", dest="parameters", action="append", default=[], metavar="NAME=VALUE", help="a parameter")
    _add_out(figure, _out_folder, "folder (default figures)", default="figures")


def _command(commands, common, name: str, action, *, text: str, example: str) -> argparse.ArgumentParser:
    """A command of its own, with its help and an example."""
    made = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        parents=[common],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.set_defaults(action=action)
    return made


def _add_find(commands, common: argparse.ArgumentParser) -> None:
    """`workbench find pca|jacobian|scores|labels`: one subcommand a method."""
    find = commands.add_parser(
        "find",
        help="find directions in h-space and save them",
        description="Find directions in h-space and save them.",
        epilog="example:\n  workbench find pca avataaars32 --n 512 --k 5",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    methods = find.add_subparsers(title="methods", metavar="METHOD", required=True)

    def method(name: str, action, text: str, example: str) -> argparse.ArgumentParser:
        whole = f"workbench find {name} avataaars32 {example}"
        made = _command(methods, common, name, action, text=text, example=whole)
        _add_model(made)
        made.add_argument("--n", type=int, default=512, help="number of samples or images (default 512)")
        if name != "labels":
            made.add_argument("--seed", type=int, default=0, help="seed of the first sample (default 0)")
        made.add_argument("--tap", choices=("before", "middle", "after"), default="after", help="where h is read")
        _add_out(made, _out_folder, "folder (default: data/directions)")
        return made

    pca = method("pca", _find_pca, "principal components of the samples' h (Haas et al.)", "--n 512 --k 5")
    pca.add_argument("--k", type=int, default=5, help="number of components (default 5)")
    pca.add_argument("--joint", action="store_true", help="one PCA over all timesteps")

    text = "what one sample reacts to most (Haas et al.); scaled by n samples"
    jacobian = method("jacobian", _find_jacobian, text, "--t 600 --region mouth")
    jacobian.add_argument("--k", type=int, default=3, help="number of directions (default 3)")
    jacobian.add_argument("--t", type=int, required=True, help="timestep")
    jacobian.add_argument("--region", help="of the bundled domain: mouth, eyes, brows, hair, beard or glasses")

    text = "from the samples of lowest to those of highest classifier score"
    scores = method("scores", _find_scores, text, "--attributes Smiling Beard")
    scores.add_argument("--attributes", nargs="+", required=True, help="columns of the classifier, e.g. Smiling Beard")
    scores.add_argument("--k", type=int, default=100, help="samples a side (default 100)")
    scores.add_argument("--classifier", default="avataaars", help="bundled name, folder or hub id (default avataaars)")

    text = "from labelled images, inverted, without to those with an attribute"
    labels = method("labels", _find_labels, text, "--attributes Smiling")
    _add_images(labels, "avataaars, or a folder or zip with attributes.csv", default="avataaars")
    labels.add_argument("--attributes", nargs="+", required=True, help="columns of the labels")


def _add_boundary(commands, common: argparse.ArgumentParser) -> None:
    """`workbench boundary fit|edit`: boundaries from labelled images or samples, and edits that cross them."""
    fit_example = "workbench boundary fit avataaars32 --t 500 --attributes Smiling Beard"
    edit_example = (
        "workbench boundary edit avataaars32 --boundaries data/boundaries/avataaars32-Smiling-x-t500.safetensors "
        "--images avataaars --n 4 -o smiles.png"
    )
    boundary = commands.add_parser(
        "boundary",
        help="fit boundaries at one timestep, and edit images by crossing them",
        description="Fit boundaries at one timestep, and edit images by crossing them (BoundaryDiffusion).",
        epilog=f"example:\n  {fit_example}\n  {edit_example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = boundary.add_subparsers(title="actions", metavar="ACTION", required=True)

    def action(name: str, function, text: str, example: str) -> argparse.ArgumentParser:
        made = _command(actions, common, name, function, text=text, example=example)
        made.add_argument("model", help="bundled name, diffusers folder or hub id")
        made.add_argument("--steps", type=int, default=50, help="timesteps that a whole run visits (default 50)")
        made.add_argument("--seed", type=int, default=0, help="of the first sample, or of the noise (default 0)")
        made.add_argument("--tap", choices=("before", "middle", "after"), default="after", help="where h is read")
        made.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
        made.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="of the network's arithmetic")
        made.add_argument("--batch-size", type=int, help="samples a pass (default: by the model)")
        return made

    fit = action("fit", _boundary_fit, "fit and save boundaries in x and h", fit_example)
    fit.add_argument("--t", type=int, required=True, help="timestep, one of those visited")
    fit.add_argument("--n", type=int, default=100, help="number of images or samples (default 100)")
    _add_images(fit, "to invert: avataaars, or a folder or zip with labels", default="avataaars")
    fit.add_argument("--attributes", nargs="+", help="columns of the labels (default: all with two classes)")
    fit.add_argument("--classifier", help="label generated samples by this one instead")
    fit.add_argument("--positive", help="folder or zip of images with the attribute, in place of labels")
    fit.add_argument("--negative", help="folder or zip of images without it")
    fit.add_argument("--method", choices=("svm", "mean", "lda", "logistic"), default="svm")
    fit.add_argument("--balance", action="store_true", help="give both classes the same weight")
    fit.add_argument("--wanted", type=float, help="warn if the held-out accuracy stays below this")
    _add_out(fit, _out_folder, "folder (default: data/boundaries)")

    edit = action("edit", _boundary_edit, "edit images or samples by crossing boundaries", edit_example)
    edit.add_argument("--boundaries", nargs="+", required=True, help="files, in x, in h or in both")
    _add_images(edit, "to edit: avataaars, or a folder or zip")
    edit.add_argument("--seeds", type=_seeds, help="of samples to edit, e.g. 0-15 or 3,7,11")
    edit.add_argument("--n", type=int, default=4, help="number of images (default 4)")
    edit.add_argument(
        "--distances", nargs="+", type=_number, default=[-3.0, -1.5, 0.0, 1.5, 3.0], help="(default -3 -1.5 0 1.5 3)"
    )
    edit.add_argument("--unit", choices=("sd", "distance"), default="sd", help="of the distances")
    edit.add_argument("--mode", choices=("absolute", "shift", "mirror"), default="absolute", help="what they are")
    edit.add_argument("--eta", type=_number, default=1.0, help="from t on: 0 is DDIM, 1 is DDPM (default 1)")
    edit.add_argument("--h-policy", choices=("first", "offset", "offset-asymmetric", "none", "stale"), default="first")
    edit.add_argument("--keep-norm", action="store_true", help="move on a great circle")
    _add_out(edit, _out_picture, "PNG, JPEG, WebP, TIFF, PDF or SVG (default edits.png)", default="edits.png")


def _add_studio(command) -> None:
    """`workbench studio`, a page to edit on, and `workbench edit`, which renders what it saved."""
    studio = command(
        "studio",
        _studio,
        "edit by sliders in the browser, as a page on its own for this machine alone",
        "workbench studio --model avataaars32 --directions data/directions --seeds 0-7",
    )
    studio.add_argument("--model", default="avataaars32", help="bundled name, diffusers folder, hub id or file")
    studio.add_argument(
        "--directions",
        nargs="+",
        help="files or folders of directions and boundaries (default: those saved for the model, or PCA)",
    )
    studio.add_argument("--seeds", type=_seeds, default=list(range(8)), help="samples to edit (default 0-7)")
    studio.add_argument("--steps", type=int, default=50, help="visited timesteps (default 50)")
    studio.add_argument("--eta", type=_number, default=1.0, help="0 is DDIM, 1 is DDPM (default 1)")
    studio.add_argument("--classifier", default="", help="scores images before and after, e.g. avataaars-judge")
    studio.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    studio.add_argument("--port", type=int, default=0, help="(default: a free one)")
    studio.add_argument("--theme", choices=("light", "dark"), default="light")

    edit = command(
        "edit",
        _edit,
        "render a recipe that the studio saved",
        "workbench edit data/edits/edit.json -o edit.png",
    )
    edit.add_argument("recipe", help=".json file, with its .parts folder beside it")
    edit.add_argument("--model", help="the same model elsewhere (default: as the recipe names it)")
    edit.add_argument("--classifier", help="scores to draw beside the images, e.g. avataaars-judge")
    edit.add_argument("--device", help="cpu, cuda or mps (default cpu, which is exact to the bit)")
    _add_out(edit, _out_edit, "figure as PNG, PDF and SVG, or .safetensors of values", default="edit.png")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", help="bundled name, diffusers folder, hub id or checkpoint file")
    parser.add_argument("--steps", type=int, default=50, help="visited timesteps (default 50)")
    parser.add_argument("--eta", type=_number, default=1.0, help="0 is DDIM, 1 is DDPM (default 1)")
    parser.add_argument("--device", help="cpu, cuda or mps (default: the best there is)")
    parser.add_argument("--precision", choices=("float32", "bfloat16", "float16"), help="of the network's arithmetic")
    parser.add_argument("--compile", action="store_true", help="compile the network (faster after a minute)")
    parser.add_argument("--batch-size", type=int, help="samples a pass (default: by the model)")


def _add_images(parser: argparse.ArgumentParser, text: str, *, default: str | None = None) -> None:
    parser.add_argument("--images", default=default, help=text)
    _add_labels(parser)


def _add_labels(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--labels",
        metavar="FILE",
        help="table of the images' labels, or `folders` for a class each (default: attributes.csv, metadata.csv or "
        "CelebA's list, in the folder or beside it)",
    )
    _add_skip_broken(parser)


def _add_skip_broken(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--skip-broken", action="store_true", help="name and leave out images that cannot be decoded")


def _images(arguments: argparse.Namespace, size: int | None = None):
    import workbench as wb

    return wb.load_images(arguments.images, size=size, labels=arguments.labels, skip_broken=arguments.skip_broken)


def _number(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return number


def _seeds(text: str) -> list[int]:
    if not re.fullmatch(r"\d+(-\d+)?(,\d+(-\d+)?)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of seeds such as 0-15 or 3,7,11")
    spans = [part.partition("-") for part in text.split(",")]
    for first, dash, last in spans:
        if dash and int(last) < int(first):
            raise argparse.ArgumentTypeError(f"{first}-{last} has no seeds; write {last}-{first}")
    return [s for first, _, last in spans for s in range(int(first), int(last or first) + 1)]


def _load(arguments: argparse.Namespace):
    import workbench as wb

    wb.keep_freed_memory()  # this process is the command's own
    compiled = getattr(arguments, "compile", False)
    return wb.load_model(arguments.model, device=arguments.device, dtype=arguments.precision, compile=compiled)


def _models(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.diffusion.loading import known_models

    for row in wb.list_models():
        channels, height, width = row["images"]
        print(f"{row['name']:32s} {row['where']:10s} {channels} x {height} x {width}  {row['path']}")
    print("\npublic models (hub ids, and presets for single files); memory for one image is estimated:")
    for row in known_models():
        channels, height, width = row["images"]
        size = f"{channels} x {height} x {width}"
        need, h = f"{row['memory'].total / 2**30:.1f} GiB", " x ".join(map(str, row["h"]))
        weights = f"{row['parameters'] / 1e6:.0f} M"
        files = f", {' or '.join(row['files'])}" if row["files"] else ""
        print(f"{row['name']:32s} {size:13s} {weights:>5s} weights {need:>8s}  h {h:12s} {row['about']}{files}")


def _convert(arguments: argparse.Namespace) -> None:
    import workbench as wb

    options = ("preset", "image_size", "head_channels", "attention_order", "schedule", "timesteps", "rescale_timesteps")
    folder = wb.convert_checkpoint(
        arguments.file, arguments.out, **{option: getattr(arguments, option) for option in options}
    )
    print(f"{wb.load_model(folder, device='cpu')}\n{folder.resolve()}")


def _convert_boundary(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.directions.legacy import convert_boundary

    model = wb.load_model(arguments.model, device="cpu")
    boundary = convert_boundary(arguments.file, model, t=arguments.t, space=arguments.space, name=arguments.name)
    ending = f"-{boundary.space}-t{boundary.t}"
    path = _file(arguments.out or paths.boundaries(), model, boundary.name, ending)
    print(f"{boundary}\n{boundary.save(path)}")


def _verify(arguments: argparse.Namespace) -> int:
    import workbench as wb
    from workbench.diffusion.loading import verify
    from workbench.formats import golden

    reference = arguments.against or arguments.model
    difference = verify(wb.load_model(arguments.model, device=arguments.device), reference)
    same = difference <= golden.TOLERANCE
    print(
        f"{arguments.model} {'is' if same else 'is not'} the network of {reference}: {golden.COUNT} values of eps at "
        f"t = {golden.T} differ by up to {difference:.1e} (allowed {golden.TOLERANCE:.0e})"
    )
    return 0 if same else 1


def _sample(arguments: argparse.Namespace) -> None:
    import workbench as wb

    run = wb.sample(
        _load(arguments),
        arguments.seeds,
        steps=arguments.steps,
        eta=arguments.eta,
        batch_size=arguments.batch_size,
    )
    figure = wb.plots.image_grid(run.x0.clamp(-1, 1), titles=[str(s) for s in run.seeds])
    _save_picture(figure, arguments.out)
    print(f"{run}\n{arguments.out.resolve()}")


def _save_picture(figure, path: Path) -> None:
    with written(path) as partial:
        figure.savefig(partial, dpi=150, format=path.suffix.lower()[1:] or "png")


def _extract(arguments: argparse.Namespace) -> None:
    import workbench as wb

    source: dict = {"n": 512 if arguments.n is None else arguments.n, "seed": arguments.seed, "eta": arguments.eta}
    if arguments.images is not None:
        source = {"images": _images(arguments).select(slice(arguments.n))}
    store = wb.extract(
        _load(arguments).tapped(arguments.tap),
        steps=arguments.steps,
        out=arguments.out,
        dtype=arguments.dtype,
        record_x=arguments.record_x,
        batch_size=arguments.batch_size,
        **source,
    )
    print(f"{store}\n{store.path}")


def _plan(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.diffusion.loading import load_shapes
    from workbench.diffusion.models import best_device
    from workbench.diffusion.parallel import cpu_batch
    from workbench.hspace import planning

    network = load_shapes(arguments.model)
    on_gpu = arguments.gpu is not None or best_device().type != "cpu"
    if arguments.rate is not None and not arguments.rate > 0:
        raise ValueError(f"--rate is {arguments.rate:g}; give passes a second")
    if arguments.batch_size is None:
        arguments.batch_size = 64 if on_gpu else cpu_batch(planning.shapes_of(network)[0])
    if arguments.rate is not None:
        # It is that of one process wherever they run, and not of all cores here.
        processes = 1 if on_gpu else arguments.processes
        flop_rate, source = processes * arguments.rate * planning.count_flops(network), "as given"
    elif arguments.gpu is not None:
        share = planning.UTILISATION if arguments.utilisation is None else arguments.utilisation
        flop_rate = planning.peak_rate(arguments.gpu, dtype=arguments.precision, utilisation=share)
        source = f"assumed: {share:.0%} of the peak of a {arguments.gpu.upper()} in {arguments.precision}"
    else:
        model = wb.load_model("avataaars32", dtype=arguments.precision)
        batch = min(arguments.batch_size, arguments.n, model.batch_size())
        passes = planning.measure_pass_rate(model, batch_size=batch)
        flop_rate = passes * planning.count_flops(load_shapes(model.name))
        source = f"measured with {model.name} on {model.device}: {flop_rate / 1e12:.2g} TFLOP/s"
    options = ("n", "steps", "processes", "batch_size", "dtype", "record_x")
    options = {name: getattr(arguments, name) for name in options}
    print(planning.plan_extraction(network, flop_rate=flop_rate, source=source, on_gpu=on_gpu, **options))


def _store(arguments: argparse.Namespace) -> None:
    import workbench as wb

    store = wb.open_store(arguments.path)
    print(f"{store}\n{store.summary().to_string()}")


def _save(directions, model, arguments: argparse.Namespace, kind: str = "") -> None:
    """Save directions by their names; `kind` keeps apart what others find by the same name."""

    folder = arguments.out or paths.directions()
    ending = kind + _ending_of_tap(arguments)
    for direction in directions:
        print(f"{direction}\n{direction.save(_file(folder, model, direction.name, ending))}")


def _file(folder: Path, model, name: str, ending: str = "") -> Path:
    """Where a direction or boundary of a model is saved."""
    return folder / f"{model.name.replace('/', '--')}-{paths.file_name(name)}{ending}.safetensors"


def _ending_of_tap(arguments: argparse.Namespace) -> str:
    return "" if arguments.tap == "after" else f"-{arguments.tap}"


def _samples(model, arguments: argparse.Namespace):
    import workbench as wb

    return wb.extract(
        model,
        arguments.n,
        seed=arguments.seed,
        steps=arguments.steps,
        eta=arguments.eta,
        batch_size=arguments.batch_size,
    )


def _find_pca(arguments: argparse.Namespace) -> None:
    import workbench as wb

    if not arguments.joint and arguments.k >= arguments.n:
        raise ValueError(f"--k is {arguments.k}; {arguments.n} samples have up to {arguments.n - 1} components")
    model = _load(arguments).tapped(arguments.tap)
    found = wb.find_pca(_samples(model, arguments), k=arguments.k, joint=arguments.joint)
    _save(found, model, arguments, "-joint" if arguments.joint else "")


def _find_jacobian(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.datasets.domain import find_region
    from workbench.diffusion.schedule import index_of

    model = _load(arguments).tapped(arguments.tap)
    index_of(arguments.t, model.schedule.timesteps(arguments.steps), trained=model.schedule.T)
    mask = None if arguments.region is None else find_region(arguments.region, size=model.image_shape[1])
    store = _samples(model, arguments)
    run = wb.sample(model, [arguments.seed], steps=arguments.steps, eta=arguments.eta)
    spectrum = wb.find_jacobian(model, run, t=arguments.t, k=arguments.k, mask=mask, population=store)
    prefix = "" if arguments.region is None else f"{arguments.region} "
    _save((replace(d, name=prefix + d.name) for d in spectrum), model, arguments)


def _find_scores(arguments: argparse.Namespace) -> None:
    import workbench as wb

    if not 2 <= arguments.k <= arguments.n // 2:
        raise ValueError(f"--k is {arguments.k}; {arguments.n} samples have 2 to {arguments.n // 2} on a side")
    classifier = wb.load_classifier(arguments.classifier, device=arguments.device)
    _check_attributes(arguments.attributes, classifier.attributes)
    model = _load(arguments).tapped(arguments.tap)
    store = _samples(model, arguments)
    scores = classifier(store.images).set_axis(store.seeds)
    found = (wb.find_from_scores(store, scores[name], k=arguments.k, name=name) for name in arguments.attributes)
    _save(found, model, arguments)


def _find_labels(arguments: argparse.Namespace) -> None:
    import workbench as wb

    images = _images(arguments)
    _check_attributes(arguments.attributes, images.names)
    images = images.select(slice(arguments.n))
    model = _load(arguments).tapped(arguments.tap)
    store = wb.extract(model, images=images, steps=arguments.steps, batch_size=arguments.batch_size)
    _save(wb.find_many(store, images.labels[arguments.attributes]).values(), model, arguments, "-labels")


def _geometry(arguments: argparse.Namespace) -> None:
    import pandas as pd

    import workbench as wb
    from workbench.analysis import geometry

    if arguments.n < geometry.FEWEST:
        raise ValueError(f"--n is {arguments.n}; the dimension takes {geometry.FEWEST} samples or more")
    if arguments.steps < 2:
        raise ValueError(f"--steps is {arguments.steps}; the dimension along the chain takes 2 or more")
    labeller = wb.load_classifier(arguments.labeller, device=arguments.device)
    _check_attributes(arguments.attributes or [], labeller.attributes)
    store = _samples(_load(arguments).tapped(arguments.tap), arguments)
    around = min(15, (arguments.n - 1) // 2)  # neighbours, of which few samples have fewer
    labels = _labels((labeller(store.images) > 0.5).astype(int), arguments.attributes)
    t = min(store.timesteps, key=lambda visited: abs(visited - arguments.t))
    h, images, tables, figures = store.at(t), store.images[:], [], {}
    for method, name in {"pca": "PCA", "umap": "UMAP", "tsne": "t-SNE"}.items():
        embedded = geometry.embed(h, method=method, seed=arguments.seed, neighbours=around)
        table = geometry.quality(h, embedded, labels=labels, seed=arguments.seed, neighbours=around)
        tables.append(table.assign(map=name))
        axes = dict(zip(("xlabel", "ylabel"), embedded.axes, strict=True))
        caption = f"{name} of h at t = {t}, {len(store)} samples of {arguments.model}."
        figures[method] = wb.plots.scatter(embedded.points, images=images, caption=caption, **axes)
    quality = pd.concat(tables, ignore_index=True)
    nearest = min(10, arguments.n // 2 - 1)
    dimensions = geometry.dimensions_over_time(store, seed=arguments.seed, neighbours=nearest)
    for method, figure in figures.items():
        wb.plots.save_figure(figure, arguments.out / f"map-{method}")
    quality.to_csv(arguments.out / "quality.csv", index=False)
    dimensions.to_csv(arguments.out / "dimensions.csv", index=False)
    shown = quality[quality["space"] == "map"].drop(columns="space")
    print(f"{shown.round(2).to_string(index=False)}\n\n{dimensions[dimensions.t == t].round(1).to_string(index=False)}")
    print(arguments.out.resolve())


def _mixing_step(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.analysis.mixing_criteria import agreement

    if arguments.n < 10:
        raise ValueError(
            f"--n is {arguments.n}; give 10 or more, so that 5 samples can have an attribute and 5 lack it"
        )
    labeller, judge = (wb.load_classifier(c, device=arguments.device) for c in (arguments.labeller, arguments.judge))
    _check_attributes(arguments.attributes or [], labeller.attributes)
    model = _load(arguments)
    source = {"n": arguments.n, "seed": arguments.seed, "eta": arguments.eta}
    if arguments.images is not None:
        source = {"images": _images(arguments).select(slice(arguments.n))}
    store = wb.extract(model, steps=arguments.steps, record_x=True, batch_size=arguments.batch_size, **source)
    labels = _labels((labeller(store.images) > 0.5).astype(int), arguments.attributes)
    options = {"model": model, "classifier": judge, "seed": arguments.seed, "batch_size": arguments.batch_size}
    steps = [wb.mixing_step(store, labels, criterion=criterion, **options) for criterion in arguments.criterion]
    print(agreement(steps).drop(columns="quantity").round(2).to_string())
    if arguments.out is not None:
        caption = f"{arguments.model}, {store.provenance['n']} samples, {arguments.steps} steps."
        for path in wb.plots.save_figure(wb.plots.mixing_steps(steps, caption=caption), arguments.out):
            print(path.resolve())


def _labels(labels, attributes: list[str] | None):
    """The wanted attributes, or all that can be told apart: those that at least 5 samples have and 5 lack."""
    if attributes is not None:
        return labels[attributes]
    kept = [name for name in labels if 5 <= labels[name].sum() <= len(labels) - 5]
    if not kept:
        raise ValueError(f"no attribute is there in 5 of {len(labels)} samples and lacks in 5; give more with --n")
    return labels[kept]


def _boundary_fit(arguments: argparse.Namespace) -> None:
    import workbench as wb

    model = _load(arguments).tapped(arguments.tap)
    source, labels = _labelled_samples(model, arguments)
    folder = arguments.out or paths.boundaries()
    for space in ("x", "h"):
        found = wb.fit_boundaries(
            source,
            labels,
            t=arguments.t,
            space=space,
            method=arguments.method,
            balance=arguments.balance,
            wanted=arguments.wanted,
        )
        for boundary in found.values():
            kind = "" if arguments.method == "svm" else f"-{arguments.method}"
            kind += _ending_of_tap(arguments) if space == "h" else ""
            path = _file(folder, model, boundary.name, f"-{space}-t{boundary.t}{kind}")
            print(f"{boundary}\n{boundary.save(path)}")


def _labelled_samples(model, arguments: argparse.Namespace):
    """A store with x and h down to the timestep, and a table of labels."""
    import workbench as wb
    from workbench.diffusion.schedule import index_of

    visited = model.schedule.timesteps(arguments.steps)
    first = index_of(arguments.t, visited, trained=model.schedule.T)
    options = {"record_x": True, "batch_size": arguments.batch_size}
    if (arguments.positive is None) != (arguments.negative is None):
        raise ValueError("give both --positive and --negative, the images with and without the attribute")
    if arguments.classifier is not None and arguments.positive is not None:
        raise ValueError("--classifier labels samples of the model; leave out --positive and --negative, or it")
    if arguments.positive is not None and len(arguments.attributes or []) > 1:
        raise ValueError("two folders have one attribute between them; give its name alone as --attributes")
    if arguments.classifier is not None:
        classifier = wb.load_classifier(arguments.classifier, device=arguments.device)
        attributes = arguments.attributes or list(classifier.attributes)
        _check_attributes(attributes, classifier.attributes)
        store = wb.extract(model, arguments.n, seed=arguments.seed, steps=visited, eta=0.0, **options)
        scores = classifier(store.images).set_axis(store.seeds)
        return store, scores[attributes].gt(0.5).astype(int)
    if arguments.positive is not None:
        name = (arguments.attributes or ["attribute"])[0]
        images = wb.load_pair(arguments.positive, arguments.negative, name=name, skip_broken=arguments.skip_broken)
        half, positives = arguments.n // 2, int(images.label(name).sum())
        images = images.select([*range(min(half, positives)), *range(positives, min(positives + half, len(images)))])
        attributes = [name]
    else:
        images = _images(arguments).select(slice(arguments.n))
        attributes = arguments.attributes or [name for name in images.names if _two_classes(images.label(name))]
        _check_attributes(attributes, images.names)
        if left_out := [name for name in images.names if arguments.attributes is None and name not in attributes]:
            print(f"without a boundary, for lack of two classes or of labels: {', '.join(left_out)}")
    return wb.extract(model, images=images, steps=visited[first:], **options), images.labels[attributes]


def _two_classes(labels) -> bool:
    """Whether there is a boundary to find: an angle has none, nor what hardly any image has."""
    return labels.isin([0, 1]).all() and 2 <= labels.sum() <= len(labels) - 2


def _boundary_edit(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.diffusion.schedule import index_of

    if (arguments.images is None) == (arguments.seeds is None):
        raise ValueError("give --images or --seeds, what is to be edited")
    model = _load(arguments).tapped(arguments.tap)
    boundaries = [wb.load_boundary(path, model=model) for path in arguments.boundaries]
    visited = model.schedule.timesteps(arguments.steps)
    first = index_of(boundaries[0].t, visited, trained=model.schedule.T)
    if arguments.seeds is not None:
        run = wb.sample(model, arguments.seeds, steps=visited, eta=0.0, batch_size=arguments.batch_size)
    else:
        images = _images(arguments).select(slice(arguments.n))
        run = wb.invert(model, images, steps=visited[first:], batch_size=arguments.batch_size)
    grid = wb.cross_boundary(
        model,
        run,
        [boundary for boundary in boundaries if boundary.space == "h"] or None,
        [boundary for boundary in boundaries if boundary.space == "x"] or None,
        distances=arguments.distances,
        unit=arguments.unit,
        mode=arguments.mode,
        eta=arguments.eta,
        h_policy=arguments.h_policy,
        keep_norm=arguments.keep_norm,
        seed=arguments.seed if arguments.images is not None else None,
        batch_size=arguments.batch_size,
    )
    _save_picture(wb.plots.edit_grid(replace(grid, images=grid.images.clamp(-1, 1))), arguments.out)
    print(f"{grid}\n{arguments.out.resolve()}")


def _studio(arguments: argparse.Namespace) -> None:
    from workbench.studio.server import serve_studio

    names = ("model", "directions", "seeds", "steps", "eta", "classifier", "device")
    serve_studio(
        {name: getattr(arguments, name) for name in names},
        on_ready=lambda address: print(f"the studio is at\n  {address}\nuntil Ctrl-C", flush=True),
        port=arguments.port,
        theme=arguments.theme,
    )


def _edit(arguments: argparse.Namespace) -> None:
    import torch

    import workbench as wb
    from workbench.studio import recipe
    from workbench.studio.state import describe

    own = recipe.read_recipe(arguments.recipe)
    torch.set_num_threads(own["result"]["threads"])  # their number decides the last bits
    model = wb.load_model(arguments.model or own["model"]["name"], device=arguments.device or "cpu")
    classifier = arguments.classifier and wb.load_classifier(arguments.classifier, device=arguments.device)
    session = wb.open_recipe(arguments.recipe, model=model.tapped(own["model"]["tap"]), classifier=classifier or None)
    rendering = session.render()
    words = f"{session.label(rendering.state.sample)}: {describe(rendering.state)}"
    if arguments.out.suffix == ".safetensors":
        files = [rendering.save(arguments.out)]
    else:
        scores = session.read_out(rendering)
        figure = wb.plots.before_after(rendering.before, rendering.after, scores=scores, caption=f"{words}.")
        files = wb.plots.save_figure(figure, arguments.out)
    here, recorded = recipe.result_of(rendering), own["result"]
    made = "torch {torch}, {threads} threads"
    print(words)
    if here["sha256"] == recorded["sha256"]:
        print("the same image as when it was saved, bit for bit")
    else:
        print(f"not the same bits as when it was saved ({made.format(**recorded)}; here {made.format(**here)})")
    for path in files:
        print(path.resolve())


def _benchmark(arguments: argparse.Namespace) -> None:
    import runpy

    import workbench as wb
    from workbench.benchmark import leaderboard
    from workbench.benchmark import run as benchmark
    from workbench.benchmark.methods import METHODS
    from workbench.report import notebooks

    if arguments.plugin is not None:
        runpy.run_path(str(paths.local(arguments.plugin)))
    labeller, judge = (wb.load_classifier(c, device=arguments.device) for c in (arguments.labeller, arguments.judge))
    model = wb.load_model(arguments.model, device=arguments.device)
    size = benchmark.SIZES["quick" if arguments.quick else "full"]
    given = {name: getattr(arguments, name) for name in ("population", "held_out", "repeats", "steps")}
    size = {**size, **{name: value for name, value in given.items() if value is not None}}
    usual = [name for name in judge.attributes if not arguments.quick or name in benchmark.QUICK_ATTRIBUTES]
    attributes = tuple(arguments.attributes or usual or judge.attributes)
    _check_attributes(attributes, judge.attributes)
    plan = {**size, "labelled": size["population"], "seed": arguments.seed}
    protocol = wb.Protocol(tuple(arguments.methods or METHODS), attributes, **plan)
    usual_workers = os.cpu_count() if model.device.type == "cpu" else 1
    result = wb.run_benchmark(
        model,
        protocol,
        labeller=labeller,
        judge=judge,
        images=_images(arguments, model.image_shape[1]),
        masks=wb.domain_of(arguments.images).masks(attributes, size=model.image_shape[1]),
        workers=usual_workers if arguments.workers is None else arguments.workers,
        scheduler=arguments.scheduler,
    )
    folder = result.save(arguments.out)
    table = leaderboard.leaderboard(result.edits)
    table.to_csv(folder / "leaderboard.csv")
    figure = wb.plots.pareto(leaderboard.pareto(result.edits), family=result.provenance["family"])
    wb.plots.save_figure(figure, folder / "pareto")
    seeds = [f"seed {seed % benchmark.HELD_OUT}" for seed in result.provenance["shown"][:2]]
    for attribute in sorted({of for _, of in result.strips}):
        strips = wb.plots.edit_strips(result.strips, attribute, names=seeds)
        wb.plots.save_figure(strips, folder / f"strips-{paths.file_name(attribute)}")
    shown = "success success_low success_high leakage entanglement psnr_outside identity p_random".split()
    print(f"{result}\n{table[[c for c in shown if c in table]].round(2).to_string()}\n{folder.resolve()}")
    if not arguments.no_report and arguments.plugin is None:
        parameters = {name: getattr(protocol, name) for name in size}
        parameters |= {"model_name": arguments.model, "seed": arguments.seed, "images_name": arguments.images}
        parameters |= {"classifier_name": arguments.labeller, "judge_name": arguments.judge}
        parameters |= {"labels_name": arguments.labels or "", "skip_broken": arguments.skip_broken}
        parameters |= {"attributes": list(attributes), "methods": list(protocol.methods)}
        print(notebooks.run_notebook("80_benchmark", parameters, folder / "80_benchmark.ipynb").html)


def _figure(arguments: argparse.Namespace) -> None:
    from workbench.report import figures

    if arguments.list:
        for made in figures.list_figures().values():
            print(f"{made.name:12s} {made.notebook:16s} {made.title}")
        return
    if not arguments.names:
        raise ValueError("name a figure, or `all`; `workbench figure --list` shows them")
    parameters = {}
    for assignment in arguments.parameters:
        key, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"{assignment!r} is not an assignment; write name=value, for example seed=1")
        parameters[key] = text
    options = {"out": arguments.out, "parameters": parameters, "profile": arguments.profile}
    for path in figures.draw_figure(arguments.names, **options):
        print(path.resolve())


def _check_attributes(wanted: list[str], known) -> None:
    for name in wanted:
        if name not in known:
            raise ValueError(f"there is no attribute {name!r}; there are {', '.join(known)}")


def _train(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.diffusion import training

    wb.keep_freed_memory()  # this process is the command's own
    fields = training.TrainingSettings.__dataclass_fields__
    given = {name: value for name in fields if (value := getattr(arguments, name)) is not None}
    if arguments.resume and given:
        surplus = "from" if "start" in given else next(iter(given)).replace("_", "-")
        raise ValueError(f"a resumed training has its own settings; leave out --{surplus}")
    networks = ("size", "widths", "layers", "attention", "head_channels")
    if arguments.start is not None and (surplus := [name for name in networks if name in given]):
        raise ValueError(f"--from takes the network of the model; leave out --{surplus[0].replace('_', '-')}")
    settings = training.read_settings(arguments.out) if arguments.resume else training.TrainingSettings(**given)
    size = settings.size
    if arguments.start is not None:
        size = wb.load_model(arguments.start, device="cpu").image_shape[1] * (2 if settings.grow else 1)
    model = wb.train_model(
        [wb.load_images(source, size=size, skip_broken=arguments.skip_broken) for source in arguments.images],
        None if arguments.resume else settings,
        out=arguments.out,
        resume=arguments.resume,
        minutes=arguments.minutes,
        previews=arguments.previews,
    )
    caption = f"{model.name}: {model.parameters / 1e6:.2f} M parameters, batches of {settings.batch_size} images."
    curve = wb.plots.training_curve(training.read_log(arguments.out), caption=caption)
    _save_picture(curve, arguments.out / "curve.png")
    print(f"{model}\n{arguments.out.resolve()}")


def _evaluate_model(arguments: argparse.Namespace) -> None:
    import workbench as wb
    from workbench.datasets.domain import AVATAAARS

    card = None if arguments.card is None else paths.local(arguments.card)
    if card is not None and not card.is_dir():
        raise FileNotFoundError(f"there is no model folder {card}, whose card takes the numbers")
    model = _load(arguments)
    size = model.image_shape[1]
    training = [wb.load_images(source, size=size, skip_broken=arguments.skip_broken) for source in arguments.training]
    evaluation = wb.evaluate_model(
        model,
        _images(arguments, size),
        classifiers=[wb.load_classifier(source, device=arguments.device) for source in arguments.classifiers],
        training=training or None,
        n=arguments.n,
        steps=arguments.steps,
        eta=arguments.eta,
        seed=arguments.seed,
        n_inverted=arguments.inverted,
        batch_size=arguments.batch_size,
        frequencies=AVATAAARS.frequencies if arguments.recipe else None,
        pairs=AVATAAARS.pairs if arguments.recipe else None,
    )
    print(evaluation.to_markdown())
    if card is None:
        return
    caption = (
        f"{model.name}: the first {min(100, arguments.n)} samples, {arguments.steps} steps, eta {arguments.eta:g}."
    )
    sheets = {"samples": wb.plots.image_grid(evaluation.images[:100], columns=10, caption=caption)}
    if evaluation.nearest is not None:
        labels = ["samples", "nearest\ntraining images"]
        sheets["nearest"] = wb.plots.image_grid(evaluation.nearest, row_labels=labels)
    for name, sheet in sheets.items():
        with written(card / f"{name}.png") as partial:
            sheet.savefig(partial, dpi=100, format="png", bbox_inches="tight")
    print(evaluation.write(card).resolve())


def _train_classifier(arguments: argparse.Namespace) -> None:
    import workbench as wb

    classifier = wb.train_classifier(
        _images(arguments), out=arguments.out, seed=arguments.seed, steps=arguments.steps, design=arguments.design
    )
    print(f"{classifier}\n{arguments.out.resolve()}")


def _data(arguments: argparse.Namespace) -> None:
    from workbench.datasets import avataaars

    out = arguments.out or Path(f"avataaars-part{arguments.part}")
    print(avataaars.build(arguments.n, part=arguments.part, out=out).resolve())


def _params(arguments: argparse.Namespace) -> None:
    from workbench.report import notebooks

    if arguments.notebook is None:
        print("\n".join(notebooks.list_notebooks()))
        return
    for parameter in notebooks.notebook_parameters(arguments.notebook).values():
        print(f"{parameter.name:16s} {parameter.type:11s} {parameter.default!s:20s} {parameter.help}")


def _run(arguments: argparse.Namespace) -> None:
    from workbench.report import notebooks

    given = [f"{name}={value}" for name, value in arguments.parameter]
    parameters = notebooks.parse_parameters(arguments.notebook, given)
    print(notebooks.run_notebook(arguments.notebook, parameters, arguments.out).html)


def _report(arguments: argparse.Namespace) -> None:
    start = time.monotonic()
    from workbench.report import reports  # seconds, which count

    before = _finished_stores()
    reports.report(arguments.profile, only=arguments.only, jobs=arguments.jobs, since=start)
    made = len(_finished_stores() - before)
    cache = f"{made} made, and kept in {paths.cache()}" if made else f"all from {paths.cache()}"
    print(f"extractions: {cache}")
    print(f"report: {paths.reports() / 'index.html'} ({time.monotonic() - start:.0f} s)")


def _sweep(arguments: argparse.Namespace) -> int:
    from workbench.report.sweep import sweep

    table = sweep(arguments.file, scheduler=arguments.scheduler, workers=arguments.workers)
    counts = table["status"].value_counts()
    print(", ".join(f"{counts[status]} {status}" for status in ("done", "cached", "failed") if status in counts))
    print(f"sweep: {paths.reports() / 'sweeps' / paths.local(arguments.file).stem / 'index.html'}")
    return int("failed" in counts)


def _finished_stores() -> set[Path]:

    return set(paths.cache().glob("*.zarr"))


if __name__ == "__main__":
    sys.exit(main())
