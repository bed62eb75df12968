"""Commands that load, sample, train and measure models."""

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

import workbench as wb
from workbench import paths
from workbench.commands import options as opt
from workbench.commands.options import command
from workbench.io import duration, written


@command("models", example="workbench models")
def models():
    """List models that load offline, and public ones.

    `workbench plan --model NAME` tells the memory that one of them needs.
    """
    from workbench.formats.layouts import HUB, PRESETS

    for row in wb.list_models():
        channels, height, width = row["images"]
        print(f"{row['name']:32s} {row['where']:10s} {channels} x {height} x {width}  {row['path']}")
    print("\npublic models (hub ids, and presets for single files):")
    rows = {name: (architecture, "on the hub") for name, architecture in HUB.items()}
    rows |= {name: (each.architecture, ", ".join([each.about, *each.files])) for name, each in PRESETS.items()}
    for name, (network, about) in rows.items():
        size, h = f"{network.in_channels} x {network.image_size} x {network.image_size}", network.h_shape
        print(f"{name:32s} {size:13s} h {' x '.join(map(str, h)):12s} {about}")


@dataclasses.dataclass
class Checkpoint:
    """Settings of a network that its file of weights does not record."""

    preset: Annotated[str | None, Option(help="which published checkpoint it is (default: by its name)")] = None
    image_size: Annotated[int | None, Option(help="without a preset: side of the images in pixels")] = None
    timesteps: Annotated[int | None, Option(help="timesteps in training (default: the preset's, or 1000)")] = None
    rescale_timesteps: Annotated[
        bool, Option("--rescale-timesteps", help="the network was trained on t * 1000 / T")
    ] = False
    head_channels: Annotated[int | None, Option(help="without a preset: channels of an attention head")] = None
    heads: Annotated[int | None, Option(help="number of attention heads (instead of --head-channels)")] = None
    attention_order: Annotated[
        Literal["legacy", "new"] | None,
        Option(help="order of q, k, v in guided-diffusion's attention (use_new_attention_order); default legacy"),
    ] = None
    schedule: Annotated[
        Literal["linear", "cosine", "sigmoid"] | None,
        Option(help="noise schedule (default: the preset's or file's, or linear)"),
    ] = None
    prediction: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None, Option(help="what the network predicts (default: epsilon)")
    ] = None


@command("convert", example="workbench convert celeba_hq.ckpt data/models/celeba_hq")
def convert(
    file: Annotated[str, Argument(help=".ckpt, .pt, .pth or .safetensors file")],
    out: Annotated[str, Argument(help="new folder")],
    checkpoint: Checkpoint,
):
    """Convert a checkpoint to a model folder.

    Reads files of the original DDPM, of guided-diffusion and of lucidrains' library; presets describe published ones.
    """
    folder = wb.convert_checkpoint(file, out, **vars(checkpoint))
    print(f"{wb.load_model(folder, device='cpu')}\n{folder.resolve()}")


@command("verify", example="workbench verify google/ddpm-ema-celebahq-256")
def verify(
    model: Annotated[str, Argument(help="hub id, model folder or checkpoint file")],
    against: Annotated[str | None, Option(help="hub id of the expected network (default: the model itself)")] = None,
    device: opt.Device = None,
):
    """Compare a model with the recorded values of a hub model."""
    from workbench.diffusion.loading import verify
    from workbench.formats import golden

    reference = against or model
    difference = verify(wb.load_model(model, device=device), reference)
    same = difference <= golden.TOLERANCE
    print(
        f"{model} {'is' if same else 'is not'} the network of {reference}: {golden.COUNT} values of eps at "
        f"t = {golden.T} differ by up to {difference:.1e} (allowed {golden.TOLERANCE:.0e})"
    )
    return 0 if same else 1


@command("sample", example="workbench sample avataaars32 --seeds 0-15 -o samples.png")
def sample(network: opt.Sampling, seeds: opt.Seeds = "0-15", out: opt.OutPicture = "samples.png"):
    """Generate images."""
    run = wb.sample(network.load(), seeds, **network.chain)
    opt.save_picture(wb.plots.image_grid(run.images.clamp(-1, 1), titles=[str(seed) for seed in run.seeds]), out)
    print(f"{run}\n{out.resolve()}")


@command("extract", example="workbench extract avataaars32 --n 512 --steps 50")
def extract(
    network: opt.Sampling,
    labels: opt.Labels,
    n: Annotated[int | None, Option(min=1, help="number of samples (default 512) or images")] = None,
    seed: opt.Seed = 0,
    images: Annotated[str | None, Option(help="images to invert: avataaars, a folder or a zip")] = None,
    tap: opt.Tap = "after",
    dtype: opt.Dtype = "float16",
    record_x: opt.RecordX = False,
    out: Annotated[str | None, Option("-o", "--out", help="folder or address (default: under data/cache)")] = None,
):
    """Record the h-space of samples or images on disk."""
    if images is None:
        source = {"n": 512 if n is None else n, "seed": seed, "eta": network.eta}
    else:
        source = {"images": labels.load(images).select(slice(n))}
    form = {"steps": network.steps, "batch_size": network.batch_size, "dtype": dtype, "record_x": record_x}
    store = wb.extract(network.load(tap), out=out, **source, **form)
    print(f"{store}\n{store.path}")


@command("taps", example="workbench taps avataaars32 -o taps.png")
def taps(
    network: opt.Sampling,
    n: Annotated[int, Option(min=1, help="number of samples that are measured")] = 8,
    seed: opt.Seed = 0,
    out: Annotated[Path | None, opt._out(opt._picture, "draw the U-Net, as PNG, PDF or SVG")] = None,
):
    """List where h can be read and edited.

    For every tap its shape, the root mean square of its activations, and the share of their mean square that varies
    between samples.
    """
    model = network.load()
    run = wb.sample(model, range(seed, seed + n), record_x=True, **network.chain)
    table = wb.tap_table(run)
    print(table.to_string(index=False, float_format=lambda value: f"{value:.3g}"))
    if out is not None:
        caption = f"{model.name}: {n} samples, mean rms over t = {', '.join(map(str, table['t'].unique()))}."
        opt.save_picture(wb.plots.network(table, caption=caption), out)
        print(out.resolve())


@command("plan", example="workbench plan --model google/ddpm-ema-celebahq-256 --n 50000 --steps 50 --gpu h100")
def plan(
    model: Annotated[str, Option(help="as for extract, or a public model not downloaded")] = "avataaars32",
    n: opt.Count = 512,
    steps: opt.Steps = 50,
    gpu: Annotated[
        str | None,
        Option(help="GPU to estimate for (h100, a100, l4, ...), by an assumed share of its peak rate"),
    ] = None,
    utilisation: Annotated[float, Option(help="assume this share of the GPU's peak rate")] = 0.25,
    rate: Annotated[float | None, Option(help="measured passes per second of one process")] = None,
    precision: Annotated[Literal["float32", "bfloat16"], Option(help="precision of the network")] = "float32",
    processes: Annotated[int, Option(help="number of processes, one per GPU")] = 1,
    batch_size: opt.BatchSize = None,
    dtype: opt.Dtype = "float16",
    record_x: opt.RecordX = False,
    guided: Annotated[
        bool | None,
        Option("--guided/--unguided", help="two passes a step, for guidance (default: of text-conditional models)"),
    ] = None,
):
    """Estimate the cost of an extraction.

    Disk, memory, passes and hours; without --gpu and --rate the speed is measured on this machine.
    """
    from workbench.diffusion.loading import load_image_shape, load_shapes
    from workbench.diffusion.models import best_device
    from workbench.diffusion.parallel import cpu_batch
    from workbench.hspace import planning

    network = load_shapes(model)
    on_gpu = gpu is not None or best_device().type != "cpu"
    if rate is not None and not rate > 0:
        raise ValueError(f"--rate is {rate:g}; give passes a second")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"--batch-size is {batch_size}; it must be at least 1")
    batch_size = batch_size or (64 if on_gpu else cpu_batch(network.x_shape))
    if rate is not None:
        # The rate is that of one process, not of all cores of this machine.
        flop_rate, source = (1 if on_gpu else processes) * rate * planning.count_flops(network), "as given"
    elif gpu is not None:
        flop_rate = planning.card_rate(gpu, dtype=precision, utilisation=utilisation)
        source = f"assumed: {utilisation:.0%} of the peak of a {gpu.upper()} in {precision}"
    else:
        own = wb.load_model("avataaars32", dtype=precision)
        passes = planning.measure_pass_rate(own, batch_size=min(batch_size, n, own.batch_size()))
        flop_rate = passes * planning.count_flops(load_shapes(own.name))
        source = f"measured with {own.name} on {own.device}: {flop_rate / 1e12:.2g} TFLOP/s"
    size = {"n": n, "steps": steps, "processes": processes, "batch_size": batch_size}
    guided = network.stages.conditioned_on == "text" if guided is None else guided
    size |= {"dtype": dtype, "record_x": record_x, "guided": guided, "image_shape": load_image_shape(model)}
    found = planning.plan_extraction(network, flop_rate=flop_rate, on_gpu=on_gpu, **size)
    rows = {
        "samples x steps": f"{n:,} x {steps}, {processes} process{'es' * (processes > 1)}",
        "U-Net passes": f"{found.passes:,}{', two a step,' * guided} of {found.flops / 1e9:,.3g} GFLOP",
        "disk": _bytes(found.disk),
        "RAM a process": f"{_bytes(found.ram)} (at most)",
        "GPU memory": f"{_bytes(found.gpu_memory)} (estimated, batches of {batch_size})",
        "time": f"{duration(found.seconds)} at {found.rate:,.3g} passes a second",
        "rate": source,
    }
    print("\n".join(f"{name:16s} {value}" for name, value in rows.items()))


def _bytes(count: float) -> str:
    unit, name = next(((u, s) for u, s in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB")) if count >= u), (1e3, "kB"))
    return f"{count / unit:.1f} {name}" if count else "none"


@dataclasses.dataclass
class Training:
    """Options for the fields of `TrainingSettings`, with its defaults."""

    start: Annotated[str | None, Option("--from", metavar="MODEL", help="begin with the weights of this model")] = None
    grow: Annotated[bool, Option("--grow", help="with --from: double its resolution by adding outer blocks")] = False
    size: Annotated[
        list[int] | None, Option(metavar="N...", help="side in pixels, or [channels] height width (default 32)")
    ] = None
    timesteps: Annotated[int | None, Option(help="number of timesteps (default 1000)")] = None
    prediction: Annotated[
        Literal["epsilon", "v_prediction", "sample"] | None, Option(help="the noise, v or x_0 (default epsilon)")
    ] = None
    widths: Annotated[list[int] | None, Option(metavar="N...", help="channels, finest first; default 48 96 144")] = None
    layers: Annotated[int | None, Option(help="residual blocks per resolution (default 1)")] = None
    attention: Annotated[list[int] | None, Option(metavar="N...", help="at resolutions; 0: none (default 8)")] = None
    head_channels: Annotated[int | None, Option(help="channels of an attention head (default 48)")] = None
    skips: Annotated[int | None, Option(help="number of outermost skip connections kept (default: all)")] = None
    text: Annotated[
        str | None, Option(metavar="CLIP", help="condition on captions of the images, by the text encoder of this CLIP")
    ] = None
    text_dropout: Annotated[float | None, Option(help="share of captions left out, for guidance (default 0.1)")] = None
    dropout: Annotated[float | None, Option(help="share of dropped activations (default 0)")] = None
    steps: Annotated[int | None, Option(help="optimiser steps (default 10000)")] = None
    batch_size: Annotated[int | None, Option(help="images per step, over all processes (default 32)")] = None
    learning_rate: Annotated[float | None, Option(help="peak rate, before cosine decay (default 4e-4)")] = None
    warmup: Annotated[int | None, Option(help="steps until the peak rate (default 200)")] = None
    weight_decay: Annotated[float | None, Option(help="weight decay of AdamW (default 1e-4)")] = None
    clip: Annotated[float | None, Option(help="maximum norm of the gradient (default 1)")] = None
    ema: Annotated[float | None, Option(help="decay of the moving average of the weights (default 0.999)")] = None
    gamma: Annotated[float | None, Option(help="gamma of the min-SNR weights; inf for the plain loss (default 5)")] = (
        None
    )
    flips: Annotated[bool, Option("--flips", help="mirror images with probability 0.5")] = False
    precision: Annotated[
        Literal["bfloat16", "float32"] | None, Option(help="precision of the passes (default bfloat16)")
    ] = None
    compile: Annotated[bool, Option("--compile", help="compile the network")] = False
    seed: Annotated[int | None, Option(help="seed of all random numbers (default 0)")] = None

    def given(self) -> dict[str, object]:
        return {name: value for name, value in vars(self).items() if value is not None and value is not False}


TRAIN = "workbench train FOLDER --out data/models/mine"


@command("train", example=f"{TRAIN} --size 32 --steps 5000\n  {TRAIN} --resume")
def train(
    images: Annotated[list[str], Argument(help="folders or zips of images, or avataaars")],
    out: opt.OutFolder,
    training: Training,
    resume: Annotated[bool, Option("--resume", help="continue from the last checkpoint in --out")] = False,
    minutes: Annotated[float, Option(help="minutes between checkpoints")] = 10.0,
    previews: Annotated[int, Option(help="samples drawn at each checkpoint")] = 16,
    skip_broken: Annotated[bool, Option("--skip-broken", help="leave out images that cannot be decoded")] = False,
):
    """Train a diffusion model on images, or resume a training."""
    from workbench.diffusion.training import TrainingSettings, read_log, read_settings

    wb.keep_freed_memory()  # this process is the command's own
    given = training.given()
    if resume and given:
        surplus = "from" if "start" in given else next(iter(given)).replace("_", "-")
        raise ValueError(f"a resumed training keeps its own settings; leave out --{surplus}")
    networks = ("size", "timesteps", "prediction", "widths", "layers", "attention", "head_channels")
    if training.start is not None and (surplus := [name for name in networks if name in given]):
        raise ValueError(f"--from keeps the network of the model; leave out --{surplus[0].replace('_', '-')}")
    settings = read_settings(out) if resume else TrainingSettings(**given)
    model = wb.train_model(
        [wb.load_images(source, skip_broken=skip_broken) for source in images],
        None if resume else settings,
        out=out,
        resume=resume,
        minutes=minutes,
        previews=previews,
    )
    caption = f"{model.name}: {model.parameters / 1e6:.2f} M parameters, batches of {settings.batch_size} images."
    opt.save_picture(wb.plots.training_curve(read_log(out), caption=caption), out / "curve.png")
    print(f"{model}\n{out.resolve()}")


DOMAIN = ("avataaars", "avataaars-judge")


@command(
    "evaluate-model",
    example="workbench evaluate-model avataaars32 --training part0 part1 --card data/models/avataaars32",
)
def evaluate_model(
    network: opt.Sampling,
    labels: opt.Labels,
    images: Annotated[str, Option(help="held-out images: bundled name, folder or zip")] = "avataaars",
    training: Annotated[list[str] | None, Option(metavar="IMAGES...", help="training images, to find copies")] = None,
    n: opt.Count = 2000,
    seed: opt.Seed = 0,
    classifiers: Annotated[list[str], Option(metavar="NAME...", help="feature spaces; the last one judges")] = DOMAIN,
    inverted: Annotated[int, Option(help="images to invert and reconstruct")] = 32,
    recipe: Annotated[bool, Option("--recipe", help="expect the attribute frequencies of the recipe")] = False,
    card: Annotated[str | None, Option(help="model folder; writes the numbers to its README.md")] = None,
):
    """Measure samples against held-out images.

    --card writes the numbers into the model card, and a contact sheet beside it.
    """
    from workbench.datasets.domain import DOMAINS

    folder = None if card is None else paths.local(card)
    if folder is not None and not folder.is_dir():
        raise FileNotFoundError(f"there is no model folder {folder} to write the card in")
    domain = next((domain for domain in DOMAINS if domain.classifiers.keys() & set(classifiers)), None)
    if recipe and domain is None:
        raise ValueError(f"--recipe is for classifiers of a domain, and {', '.join(classifiers)} are not")
    model = network.load()
    evaluation = wb.evaluate_model(
        model,
        labels.load(images),
        classifiers=[wb.load_classifier(each, device=network.device) for each in classifiers],
        training=[wb.load_images(each, skip_broken=labels.skip_broken) for each in training or ()] or None,
        n=n,
        seed=seed,
        n_inverted=inverted,
        **network.chain,
        frequencies=domain.frequencies if recipe else None,
        pairs=domain.pairs if recipe else None,
    )
    print(evaluation.to_markdown())
    if folder is None:
        return
    caption = f"{model.name}: the first {min(100, n)} samples, {network.steps} steps, eta {network.eta:g}."
    sheets = {"samples": wb.plots.image_grid(evaluation.images[:100], columns=10, caption=caption)}
    if evaluation.nearest is not None:
        rows = ["samples", "nearest\ntraining images"]
        sheets["nearest"] = wb.plots.image_grid(evaluation.nearest, row_labels=rows)
    for name, sheet in sheets.items():
        with written(folder / f"{name}.png") as partial:
            sheet.savefig(partial, dpi=100, format="png", bbox_inches="tight")
    print(evaluation.write(folder).resolve())


@command("train-classifier", example="workbench train-classifier FOLDER --out DIR --size 32 --flips")
def train_classifier(
    images: Annotated[str, Argument(help="folder or zip of labelled images, or avataaars")],
    out: opt.OutFolder,
    labels: opt.Labels,
    seed: Annotated[int, Option(help="seed of weights and batches")] = 0,
    steps: Annotated[int, Option(help="largest number of batches of 128 images")] = 3000,
    design: Annotated[
        Literal["labeller", "judge"], Option(help="architecture: of a labeller, or the different one of a judge")
    ] = "labeller",
    flips: Annotated[bool, Option("--flips", help="mirror images with probability 0.5")] = False,
    turns: Annotated[
        bool, Option("--turns", help="turn images by right angles, as pictures from above may be")
    ] = False,
    size: Annotated[
        list[int] | None,
        Option(
            metavar="N...", help="size of the images that it will see, [channels] height width (default: square, RGB)"
        ),
    ] = None,
):
    """Train an attribute classifier on labelled images."""
    options = {"seed": seed, "steps": steps, "design": design, "flips": flips, "turns": turns}
    classifier = wb.train_classifier(labels.load(images, size), out=out, **options)
    print(f"{classifier}\n{out.resolve()}")


@command("train-clip", example="workbench train-clip FOLDER --out data/models/my-clip --size 32")
def train_clip(
    images: Annotated[str, Argument(help="folder of images with captions.csv or metadata.csv")],
    out: opt.OutFolder,
    size: Annotated[int, Option(min=1, help="side of the images in pixels, a multiple of 4")] = 32,
    steps: Annotated[int, Option(min=1, help="number of batches")] = 3000,
    batch_size: Annotated[int, Option(help="images, each with a caption, in a batch")] = 256,
    seed: Annotated[int, Option(help="seed of weights and batches")] = 0,
    resume: Annotated[bool, Option("--resume", help="continue from the last checkpoint in --out")] = False,
    device: opt.Device = None,
):
    """Train a small CLIP on images with captions, or resume a training with the same settings."""
    given = wb.load_images(images, size=size)
    found = wb.train_clip(given, out=out, steps=steps, batch_size=batch_size, seed=seed, resume=resume, device=device)
    print(f"{found}\n{out.resolve()}")


@command("data", example="workbench data avataaars --n 2000 --part 10\n  workbench data eurosat EuroSAT_RGB.zip")
def data(
    name: Annotated[
        Literal["avataaars", "eurosat", "celeba64"],
        Argument(help="avataaars: draw avatars; eurosat: read the published zip; celeba64: crop CelebA's faces"),
    ],
    source: Annotated[
        str | None, Argument(help="folder or zip of EuroSAT RGB, or of CelebA's aligned images, as published")
    ] = None,
    n: Annotated[int | None, Option(min=1, help="number of avatars (default 2000)")] = None,
    part: Annotated[
        int, Option(help="part of the domain: 0 and 1 are for training, 10 (avataaars: 10 and above) is held out")
    ] = 10,
    captions: Annotated[
        bool, Option("--captions", help="draw captioned avatars: some with hats, without the planted correlations")
    ] = False,
    out: opt.OutImages = None,
):
    """Write the labelled images of a domain."""
    from workbench.datasets import avataaars, celeba, eurosat
    from workbench.datasets import captions as captioned

    if name == "avataaars":
        if source is not None:
            raise ValueError(f"avataaars are drawn and not read from {source!r}; leave it out")
        domain, ending = (captioned, "-captions") if captions else (avataaars, "")
        made = domain.build(n or 2000, part=part, out=out or Path(f"avataaars-part{part}{ending}"))
    else:
        domain, published = (eurosat, "EuroSAT RGB") if name == "eurosat" else (celeba, "CelebA's aligned images")
        if captions:
            raise ValueError(f"--captions are of avataaars; {name} has none")
        if source is None or n is not None:
            raise ValueError(f"give the folder or zip with {published} ({domain.ORIGIN}); all of its images are read")
        bundled = paths.data() / name if name == "eurosat" and part == 10 else Path(f"{name}-part{part}")
        made = domain.build(source, part=part, out=out or bundled)
    print(made.resolve())
