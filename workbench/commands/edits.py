"""Commands that find directions and boundaries, and edit along them."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

import workbench as wb
from workbench import paths
from workbench.commands import options as opt
from workbench.commands.options import check_attributes, command

SOURCE = "a person"
FIND = "workbench find pca avataaars32 --n 512 --k 5"
FIT = "workbench boundary fit avataaars32 --t 500 --attributes Smiling Beard"
find = opt.subcommands("find", "Find directions in h-space and save them.", example=FIND)
boundary = opt.subcommands("boundary", "Fit boundaries at one timestep, and cross them.", example=FIT)


Method = Annotated[Literal["svm", "mean", "lda", "logistic"], Option(help="how the normal is found")]


def save(found: Iterable, model, folder: Path, ending: str = "") -> None:
    """Save directions or boundaries under their names; `ending` tells apart those found in different ways."""
    for each in found:
        path = folder / f"{model.name.replace('/', '--')}-{paths.file_name(each.name)}{ending}.safetensors"
        print(f"{each}\n{each.save(path)}")


@dataclasses.dataclass
class Place:
    """Where the network's h is read, and where directions and boundaries are saved."""

    tap: opt.Tap = "after"
    out: opt.OutFound = None

    @property
    def ending(self) -> str:
        return "" if self.tap in ("after", "mid") else f"-{self.tap}"


@dataclasses.dataclass
class Samples(opt.Sampling):
    """Samples whose h is recorded."""

    n: opt.Count = 512
    seed: opt.Seed = 0

    def extract(self, model):
        return wb.extract(model, self.n, seed=self.seed, **self.chain)


@command("pca", app=find, example=FIND)
def find_pca(
    samples: Samples,
    place: Place,
    k: Annotated[int, Option(min=1, help="number of components")] = 5,
    joint: Annotated[bool, Option("--joint", help="one PCA over all timesteps")] = False,
):
    """Find principal components of h (Haas et al.)."""
    if not joint and k >= samples.n:
        raise ValueError(f"--k is {k}; {samples.n} samples have up to {samples.n - 1} components")
    model = samples.load(place.tap)
    found = wb.find_pca(samples.extract(model), k=k, joint=joint)
    save(found, model, place.out or paths.directions(), ("-joint" if joint else "") + place.ending)


@command("jacobian", app=find, example="workbench find jacobian avataaars32 --t 600 --region mouth")
def find_jacobian(
    samples: Samples,
    place: Place,
    t: Annotated[int, Option(help="timestep")],
    k: Annotated[int, Option(min=1, help="number of directions")] = 3,
    region: Annotated[str | None, Option(help="mouth, eyes, brows, hair, beard or glasses of an avatar")] = None,
):
    """Find the directions that change one sample most (Haas et al.).

    --seed chooses the sample; the unit of scale is the standard deviation of --n samples.
    """
    from workbench.datasets.domain import find_region
    from workbench.diffusion.schedule import index_of

    model = samples.load(place.tap)
    index_of(t, model.schedule.timesteps(samples.steps), trained=model.schedule.T)
    mask = None if region is None else find_region(region, size=model.image_shape)
    store = samples.extract(model)
    run = wb.sample(model, [samples.seed], **samples.chain)
    spectrum = wb.find_jacobian(model, run, t=t, k=k, mask=mask, population=store)
    prefix = "" if region is None else f"{region} "
    found = (dataclasses.replace(each, name=prefix + each.name) for each in spectrum)
    save(found, model, place.out or paths.directions(), f"-seed{samples.seed}{place.ending}")


@command("scores", app=find, example="workbench find scores avataaars32 --attributes Smiling Beard")
def find_scores(
    samples: Samples,
    place: Place,
    attributes: opt.Attributes,
    k: Annotated[int, Option(min=1, help="samples on each side")] = 100,
    classifier: opt.Labeller = "avataaars",
):
    """Find directions from a classifier's scores: from the samples of lowest score to those of highest."""
    if not 2 <= k <= samples.n // 2:
        raise ValueError(f"--k is {k}; {samples.n} samples have 2 to {samples.n // 2} on a side")
    labeller = wb.load_classifier(classifier, device=samples.device)
    check_attributes(attributes, labeller.attributes)
    model = samples.load(place.tap)
    store = samples.extract(model)
    scores = labeller(store.images).set_axis(store.seeds)
    found = (wb.find_from_scores(store, scores[name], k=k, name=name) for name in attributes)
    save(found, model, place.out or paths.directions(), place.ending)


@command("labels", app=find, example="workbench find labels avataaars32 --attributes Smiling")
def find_labels(
    network: opt.Network,
    place: Place,
    labels: opt.Labels,
    attributes: opt.Attributes,
    images: opt.LabelledSource = "avataaars",
    n: opt.Count = 512,
    steps: opt.Steps = 50,
    seed: Annotated[int, Option(help="seed of the random choice of images")] = 0,
):
    """Find directions from labelled images: from those without an attribute to those with it.

    Inverts the images first.
    """
    labelled = labels.load(images)
    check_attributes(attributes, labelled.names)
    labelled = labelled.shuffled(seed).select(slice(n))  # the first of a folder may all be of one class
    model = network.load(place.tap)
    store = wb.extract(model, images=labelled, steps=steps, batch_size=network.batch_size)
    found = wb.find_many(store, labelled.labels[attributes]).values()
    save(found, model, place.out or paths.directions(), f"-labels{place.ending}")


@command("text", app=find, example="workbench find text avataaars32 --text 'a smiling person' 'a person with a beard'")
def find_text(
    samples: Samples,
    place: Place,
    text: Annotated[list[str], Option(metavar="TEXT...", help="texts; each gives a direction")],
    against: Annotated[str, Option(help="text that describes images without it")] = SOURCE,
    k: Annotated[int | None, Option(min=1, help="samples a side (default: those that fit clearly, 8 to 128)")] = None,
    clip: Annotated[str, Option(help="avataaars-clip, clip, a hub id or a folder")] = "avataaars-clip",
):
    """Find directions from sentences: from the samples that fit `--against` to those that fit `--text`, by CLIP."""
    network = wb.load_clip(clip, device=samples.device)
    network.texts([*text, against])  # refuses words that it does not know
    model = samples.load(place.tap)
    store = samples.extract(model)
    found = (wb.find_from_text(store, each, against=against, clip=network, k=k) for each in text)
    save(found, model, place.out or paths.directions(), f"-text{place.ending}")


@command("fit", app=boundary, example=FIT)
def boundary_fit(
    network: opt.Network,
    place: Place,
    labels: opt.Labels,
    t: Annotated[int, Option(help="timestep, one of the visited ones")],
    steps: opt.Steps = 50,
    n: Annotated[int, Option(min=1, help="number of images or samples")] = 100,
    seed: Annotated[int, Option(help="seed of the first sample, or of the random choice of images")] = 0,
    images: opt.LabelledSource = "avataaars",
    attributes: opt.Attributes = None,
    classifier: Annotated[str | None, Option(help="fit on samples labelled by this classifier, not on images")] = None,
    method: Method = "svm",
    balance: Annotated[bool, Option("--balance", help="give both classes the same weight")] = False,
    wanted: Annotated[float | None, Option(help="warn if the held-out accuracy stays below this")] = None,
):
    """Fit and save boundaries in x and h.

    By default, fits one for each attribute with two classes.
    """
    from workbench.diffusion.schedule import index_of

    model = network.load(place.tap)
    visited = model.schedule.timesteps(steps)
    first = index_of(t, visited, trained=model.schedule.T)
    recording = {"record_x": True, "batch_size": network.batch_size}
    if classifier is not None:
        labeller = wb.load_classifier(classifier, device=network.device)
        check_attributes(attributes or [], labeller.attributes)
        source = wb.extract(model, n, seed=seed, steps=visited, eta=0.0, **recording)
        table = labeller(source.images).set_axis(source.seeds).gt(0.5).astype(int)
        table = table[attributes or _with_two_classes(table)]
    else:
        chosen = labels.load(images).shuffled(seed).select(slice(n))
        check_attributes(attributes or [], chosen.names)
        table = chosen.labels[attributes or _with_two_classes(chosen.labels)]
        source = wb.extract(model, images=chosen, steps=visited[first:], **recording)
    kind = ("" if method == "svm" else f"-{method}") + ("" if classifier is None else "-samples")
    for space, ending in {"x": kind, "h": kind + place.ending}.items():
        found = wb.fit_boundaries(source, table, t=t, space=space, method=method, balance=balance, wanted=wanted)
        save(found.values(), model, place.out or paths.boundaries(), f"-{space}-t{t}{ending}")


def _with_two_classes(labels) -> list[str]:
    """Attributes with two classes of three samples or more, as a boundary needs; not angles, nor constant ones."""
    names = []
    for name, label in labels.items():
        if label.isin([0, 1]).all() and 3 <= label.sum() <= len(label) - 3:
            names.append(name)
    if not names:
        raise ValueError(f"no attribute has 3 of {len(labels)} samples in both classes; raise --n")
    if left_out := [name for name in labels if name not in names]:
        print(f"left out (not 0/1, or fewer than 3 samples of a class): {', '.join(left_out)}")
    return names


@command("text", app=boundary, example="workbench boundary text 'a person with long red hair' --model avataaars32")
def boundary_text(
    text: Annotated[str, Argument(help="prompt of the images with the attribute")],
    place: Place,
    model: Annotated[str, Option(help="the model that is edited")] = "avataaars32",
    source: Annotated[str, Option(help="prompt of the images without it")] = SOURCE,
    generator: Annotated[str, Option(help="text-to-image model that makes the images")] = "avataaars32-text",
    guidance_scale: Annotated[float, Option(help="of the generator")] = 4.0,
    n: Annotated[int, Option(min=1, help="images of each prompt")] = 32,
    t: Annotated[int | None, Option(help="timestep (default: the noise level of the paper's mixing step)")] = None,
    steps: Annotated[int, Option(min=1, help="timesteps of generator and inversion")] = 12,
    method: Method = "svm",
    seed: opt.Seed = 0,
    device: opt.Device = None,
):
    """Fit boundaries in x and h from a sentence, with the images of a text-to-image model."""
    network = wb.load_model(model, device=device).tapped(place.tap)
    options = {"n": n, "t": t, "steps": steps, "generator_steps": steps, "seed": seed, "method": method}
    options |= {"guidance_scale": guidance_scale, "generator": generator}
    for space, found in wb.boundary_from_text(text, source=source, model=network, **options).items():
        ending = place.ending if space == "h" else ""
        save([found], network, place.out or paths.boundaries(), f"-{space}-t{found.t}-text{ending}")


@command("import", app=boundary, example="workbench boundary import smile_h.sav --model celeba_hq --t 500 --space h")
def boundary_import(
    file: Annotated[str, Argument(help=".sav file")],
    model: Annotated[str, Option(help="model that the boundary was fitted on")],
    t: Annotated[int, Option(help="timestep that the boundary was fitted at")],
    space: Annotated[Literal["h", "x"], Option(help="latent space of the boundary (BoundaryDiffusion's z is x here)")],
    name: Annotated[str | None, Option(help="name of the attribute (default: the file's)")] = None,
    out: opt.OutFound = None,
):
    """Read a .sav file of BoundaryDiffusion, without executing it."""
    from workbench.directions.legacy import convert_boundary

    network = wb.load_model(model, device="cpu")
    made = convert_boundary(file, network, t=t, space=space, name=name)
    save([made], network, out or paths.boundaries(), f"-{space}-t{t}")


@dataclasses.dataclass
class Crossing:
    """Options of `wb.cross_boundary`."""

    distances: opt.Numbers = (-3.0, -1.5, 0.0, 1.5, 3.0)
    unit: Annotated[Literal["sd", "distance"], Option(help="unit of the distances")] = "sd"
    mode: Annotated[
        Literal["absolute", "shift", "mirror"],
        Option(
            help="absolute: signed distance after the move; shift: length of the move; "
            "mirror: multiple of the own distance"
        ),
    ] = "absolute"
    eta: opt.Eta = 1.0
    h_policy: Annotated[
        Literal["first", "offset", "offset-asymmetric", "none", "stale"],
        Option(
            help="first: h moves in the first step alone (the paper); offset: its change is added at every step; "
            "offset-asymmetric: to P_t alone; none: only x moves; stale: as the released code does"
        ),
    ] = "first"
    keep_norm: Annotated[bool, Option("--keep-norm", help="keep the norm, moving on a great circle")] = False


SMILE = "data/boundaries/avataaars32-Smiling-x-t500.safetensors"


@command("edit", app=boundary, example=f"workbench boundary edit avataaars32 --images avataaars --boundaries {SMILE}")
def boundary_edit(
    network: opt.Network,
    crossing: Crossing,
    labels: opt.Labels,
    boundaries: Annotated[list[str], Option(metavar="FILE...", help="boundary files in x, in h or in both")],
    images: Annotated[str | None, Option(help="images to edit: avataaars, a folder or a zip")] = None,
    seeds: opt.Seeds = None,
    n: Annotated[int, Option(min=1, help="number of images")] = 4,
    steps: opt.Steps = 50,
    seed: Annotated[int, Option(help="seed of the noise for edited images")] = 0,
    tap: opt.Tap = "after",
    out: opt.OutPicture = "edits.png",
):
    """Edit images or samples by crossing boundaries.

    --eta applies to the steps from the boundaries' timestep on.
    """
    from workbench.diffusion.schedule import index_of

    if (images is None) == (seeds is None):
        raise ValueError("give either --images or --seeds to edit")
    model = network.load(tap)
    crossed = [wb.load_boundary(path, model=model) for path in boundaries]
    visited = model.schedule.timesteps(steps)
    first = index_of(crossed[0].t, visited, trained=model.schedule.T)
    if seeds is not None:
        run = wb.sample(model, seeds, steps=visited, eta=0.0, batch_size=network.batch_size)
        noise = {}
    else:
        chosen = labels.load(images).select(slice(n))
        run = wb.invert(model, chosen, steps=visited[first:], batch_size=network.batch_size)
        noise = {"seed": seed}
    in_h, in_x = ([each for each in crossed if each.space == space] or None for space in "hx")
    grid = wb.cross_boundary(model, run, in_h, in_x, **vars(crossing), **noise, batch_size=network.batch_size)
    opt.save_picture(wb.plots.edit_grid(dataclasses.replace(grid, images=grid.images.clamp(-1, 1))), out)
    print(f"{grid}\n{out.resolve()}")


@dataclasses.dataclass
class Page:
    """A page that is served to this machine alone."""

    device: opt.Device = None
    port: Annotated[int, Option(help="port of the page; 0 picks a free one")] = 0
    theme: Annotated[Literal["light", "dark"], Option(help="theme of the page")] = "light"

    def serve(self, function: Callable, what: str, settings: dict) -> None:
        def on_ready(address: str) -> None:
            print(f"the {what} is at\n  {address}\nuntil Ctrl-C", flush=True)

        function(settings | {"device": self.device}, on_ready=on_ready, port=self.port, theme=self.theme)


@command("studio", example="workbench studio --model avataaars32 --directions data/directions --seeds 0-7")
def studio(
    condition: opt.Condition,
    page: Page,
    model: Annotated[str, Option(help="bundled name, diffusers folder, hub id or file")] = "avataaars32",
    directions: Annotated[list[str] | None, Option(metavar="PATH...", help="default: the model's own, or PCA")] = None,
    seeds: opt.Seeds = "0-7",
    steps: opt.Steps = 50,
    eta: opt.Eta = 1.0,
    classifier: Annotated[str, Option(help="scores images before and after the edit, e.g. avataaars-judge")] = "",
    clip: Annotated[str, Option(help="type sentences to get sliders, by this CLIP, e.g. avataaars-clip")] = "",
):
    """Edit with sliders in the browser.

    The page is reachable from this machine alone. --directions takes files or folders of directions and boundaries;
    the default is those saved for the model.
    """
    from workbench.studio.server import serve_studio

    settings = {"model": model, "condition": condition.condition, "directions": directions, "seeds": seeds}
    settings |= {"steps": steps, "eta": eta, "classifier": classifier, "clip": clip}
    page.serve(serve_studio, "studio", settings)


@command("explore", example="workbench explore data/cache/NAME.zarr --classifier avataaars")
def explore(
    store: Annotated[str, Argument(help="folder that `workbench extract` wrote, or its address")],
    page: Page,
    model: Annotated[str | None, Option(help="another path of the store's model; '' for maps alone")] = None,
    directions: Annotated[list[str] | None, Option(metavar="PATH...", help="default: the model's own")] = None,
    classifier: Annotated[str, Option(help="its scores colour the samples, e.g. avataaars")] = "",
    methods: Annotated[list[str], Option(metavar="METHOD...", help="pca, umap, paths")] = ("pca",),
    out: opt.OutPage = None,
):
    """Explore a population on linked maps in the browser.

    The page is reachable from this machine alone. With --out, write a page that needs no kernel instead.
    """
    from workbench.studio.server import open_explorer, serve_explorer

    settings = {"store": store, "model": model, "directions": directions, "classifier": classifier}
    settings |= {"methods": list(methods)}
    if out is None:
        page.serve(serve_explorer, "explorer", settings)
    else:
        alone = model is None and directions is None  # a page without a kernel has maps; edits need the model
        explorer = open_explorer(**settings | {"model": "" if alone else model, "device": page.device})
        print(explorer.save_html(out, title=f"Explorer: {Path(store).name}").resolve())


@command("edit", example="workbench edit data/edits/edit.json -o edit.png")
def edit(
    recipe: Annotated[str, Argument(help=".json file, with its .parts folder beside it")],
    model: Annotated[str | None, Option(help="another path of the same model (default: the recipe's)")] = None,
    classifier: Annotated[str | None, Option(help="draw its scores beside the images, e.g. avataaars-judge")] = None,
    device: Annotated[str, Option(help="cpu, cuda or mps; only cpu is exact to the bit")] = "cpu",
    out: opt.OutEdit = "edit.png",
):
    """Render a recipe saved in the studio."""
    import torch

    from workbench.studio.recipe import read_recipe, result_of
    from workbench.studio.state import describe

    own = read_recipe(recipe)
    torch.set_num_threads(own["result"]["threads"])  # the number of threads affects the last bits
    network = wb.load_model(model or own["model"]["name"], device=device).as_recorded(own["model"])
    scorer = wb.load_classifier(classifier, device=device) if classifier else None
    session = wb.open_recipe(recipe, model=network, classifier=scorer)
    rendering = session.render()
    words = f"{session.label(rendering.state.sample)}: {describe(rendering.state)}"
    if out.suffix == ".safetensors":
        files = [rendering.save(out)]
    else:
        scores = session.read_out(rendering)
        figure = wb.plots.before_after(rendering.before, rendering.after, scores=scores, caption=f"{words}.")
        files = wb.plots.save_figure(figure, out)
    here, recorded = result_of(rendering), own["result"]
    made = "torch {torch}, {threads} threads"
    print(words)
    if here["sha256"] == recorded["sha256"]:
        print("the same image as when it was saved, bit for bit")
    else:
        print(f"not the same bits as when it was saved ({made.format(**recorded)}; here {made.format(**here)})")
    for path in files:
        print(path.resolve())
