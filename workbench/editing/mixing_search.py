"""The search for the mixing step: six criteria behind one call, on generated samples or on real images."""

from __future__ import annotations

import importlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import pandas as pd
import torch
from scipy import stats
from tqdm.auto import tqdm

from workbench.analysis.mixing_criteria import (
    MixingStep,
    largest_near_best,
    radius_gap,
    read_off,
    separability_step,
    stays,
    total_variation,
)
from workbench.analysis.samples import check_classes, matched
from workbench.datasets.classifiers import Classifier
from workbench.diffusion.inversion import invert
from workbench.diffusion.loading import load_model
from workbench.diffusion.models import Model, refuse_other_model
from workbench.diffusion.sampling import (
    StepRecord,
    Trajectory,
    check_batch_size,
    in_batches,
    progress_bar,
    replay,
    sample,
    to_device,
)
from workbench.diffusion.schedule import index_of
from workbench.directions.boundary_fit import fit_boundary
from workbench.editing.cross import cross_boundary
from workbench.hspace.store import HStore
from workbench.io import one_of

CRITERIA = ("radius_gap", "tv", "separability", "commit", "perceptual", "edit")

# Default thresholds, in the units that `mixing_step` names; and samples that are looked at, at most.
LEVELS = {"radius_gap": 0.005, "tv": 0.25, "separability": 1.0, "commit": 0.5, "perceptual": 0.5, "edit": 0.75}
SAMPLES = {"radius_gap": 200, "tv": 200, "separability": 2000, "commit": 24, "perceptual": 64, "edit": 200}
LPIPS_LEVEL = 0.33  # threshold of Asyrp for LPIPS(P_t, x_0)
FRESH = 2**62  # seeds of decodings count from here, so that none shares its noise with a sample

Distance = Callable[[torch.Tensor, torch.Tensor], np.ndarray]


def mixing_step(
    source: HStore | Trajectory,
    labels: pd.Series | pd.DataFrame | Mapping[str, np.ndarray] | np.ndarray | None = None,
    *,
    criterion: str | None = None,
    level: float | None = None,
    model: Model | None = None,
    against: HStore | Trajectory | None = None,
    classifier: Classifier | None = None,
    grid: Sequence[int] | None = None,
    n: int | None = None,
    copies: int = 8,
    strengths: Sequence[float] = (0.0, 1.0, 2.0, 4.0),
    distance: str | Distance = "features",
    resamples: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> MixingStep:
    """Estimate the mixing step: the timestep for one move, noisy enough to adapt to it, clean enough not to undo it.

    Zhu et al. 2023 edit once, at this step. Their automatic search is not in the released code, so this function offers
    six criteria; which of them agree is a finding about the model, see `analysis.mixing_criteria.agreement`.

    "radius_gap"
        The mean radii of sampled and inverted x_t. t is the largest timestep such that at all t' <= t they differ by at
        most `level` (0.005) sqrt(d) and two standard errors.
    "tv"
        Total variation to N(0, I), mean of 64 one-dimensional statistics. t is the smallest timestep such that at all
        t' >= t it is at most `level` (0.25).
    "separability"
        Held-out accuracy of a linear probe; needs labels. t is the largest timestep within `level` (1) standard errors
        of the best.
    "commit"
        Agreement of `copies` stochastic decodings of one x_t, from 0 (as between different samples) to 1; needs a
        classifier. t is the largest timestep such that at all t' <= t it is at least `level` (0.5).
    "perceptual"
        Distance of P_t, the predicted image, from the image, in units of the distance of two images; needs a classifier
        or another `distance`. t is the smallest timestep such that at all t' >= t it is at least `level` (0.5).
    "edit"
        Success of one move of x_t across the boundary between classes, less the success of new noise without a move,
        among strengths with an identity loss (distance from the image) of at most `level` (0.75); needs labels and a
        classifier. t is the largest timestep within a standard error of the best.

    "separability" and "commit" relate x_t to the final image, so use a stochastic run (eta 1) for them: in a
    deterministic run x_t determines the image at every t. For "edit" use the images to be edited: inverted ones, if
    these are real.

    Parameters
    ----------
    source : HStore or Trajectory
        Generated samples or inverted images. x_t is read from the record (`record_x=True`), or recomputed from the
        seeds of generated samples.
    labels : array of shape (n,), or mapping or DataFrame of attribute -> such arrays, optional
        Labels of the images, 0 or 1. A Series or DataFrame is matched by its index: the seeds of the samples, or the
        file names of inverted images; an index 0..n-1 or an array follows the order of the samples.
    criterion : str, optional
        By default "separability" if there are labels, else "radius_gap".
    level : float, optional
        Threshold, in the criterion's units above.
    model : Model, optional
        Model of a store, if its name does not load. The weights must be those that made the store.
    against : HStore or Trajectory, optional
        For "radius_gap": the other ensemble at the same timesteps, inverted images if `source` is generated,
        generated samples if it is inverted. By default the images of `source` are inverted, or as many samples are
        drawn with eta 0.
    classifier : Classifier, optional
        For "edit", a judge: not the classifier that gave the labels.
    grid : sequence of int, optional
        Visited timesteps to test, for the criteria that run the model ("commit", "perceptual", "edit"). By default
        about ten, evenly over all but the noisiest.
    n : int, optional
        Use the first n samples; by default at most `SAMPLES`. "edit" fits the boundary on two thirds of them and edits
        the others.
    copies : int, default 8
        For "commit": decodings of every x_t.
    strengths : sequence of float, default (0, 1, 2, 4)
        For "edit": lengths of the move along the difference of the class means, in gaps between the means of held-out
        samples; ascending.
    distance : "features", "lpips" or callable (a, b) -> ndarray of shape (n,)
        For "perceptual" and "edit": distance between images of shape (n, C, H, W) in [-1, 1]. "features": Euclidean
        distance in the classifier's last layer. "lpips": the package of that name, not scaled by the distance of two
        images; `level` is then 0.33 by default, as in Asyrp.
    resamples : int, optional
        Half-samples for the intervals: 200 by default, and 50 for "tv", the slowest curve.
    seed : int, default 0
        Seed of folds, half-samples, and the noise of decodings.
    progress : bool

    Returns
    -------
    MixingStep

    Raises
    ------
    ValueError
        If the criterion lacks labels, a classifier or a record, labels are constant, a timestep of the grid was not
        visited, or there is only one timestep.
    """
    criterion = criterion or ("radius_gap" if labels is None else "separability")
    one_of("criterion", criterion, CRITERIA)
    if labels is None and criterion in ("separability", "edit"):
        raise ValueError(f'criterion "{criterion}" needs labels of the images, such as (classifier(images) > 0.5)')
    if classifier is None and (
        criterion in ("commit", "edit") or (criterion == "perceptual" and distance == "features")
    ):
        raise ValueError(f'criterion "{criterion}" needs classifier=, such as load_classifier("avataaars-judge")')
    n = min(len(source), SAMPLES[criterion] if n is None else n)
    if n < 4:
        raise ValueError(f"{n} samples are too few for a curve with an interval; give at least 4")
    model = _model_of(source, model)
    table = None if labels is None else _labels_of(source, labels, n)
    resampling = {"resamples": (50 if criterion == "tv" else 200) if resamples is None else resamples, "seed": seed}
    alpha_bars = model.schedule.alpha_bars
    if level is None:
        level = LPIPS_LEVEL if distance == "lpips" and criterion == "perceptual" else LEVELS[criterion]

    run = _run_of(source, model, n, progress=progress)
    if criterion == "separability":
        return separability_step(run.x, table, alpha_bars, errors=level, **resampling)
    if criterion == "tv":
        return total_variation(run.x, alpha_bars, x0=run.x0.numpy(), labels=table, level=level, **resampling)
    if criterion == "radius_gap":
        if against is not None:
            own = against.provenance["model"] if isinstance(against, HStore) else against.model.provenance()
            refuse_other_model("against", own, model.provenance(), tap=False)
        other = _other(run, progress) if against is None else _run_of(against, model, len(against), progress=progress)
        if (run.seeds is None) == (other.seeds is None):
            raise ValueError("source and against are of one kind; give generated samples and inverted images")
        sampled, inverted = (run, other) if other.seeds is None else (other, run)
        return radius_gap(sampled.x, inverted.x, alpha_bars, tolerance=level, **resampling)

    visited = _grid_of(run, grid)
    about = {"alpha_bars": alpha_bars, "criterion": criterion, **resampling}
    if criterion == "commit":
        values = _commitment(run, visited, classifier, copies, seed, progress)
        rule = stays(level, above=True)
        return read_off(visited, values, rule, quantity="agreement of decodings (0: chance)", **about)
    measure = distance_of(distance, classifier, run.images)
    if criterion == "perceptual":
        values, rule = prediction_errors(run, visited, measure, progress), stays(level, above=True, from_noise=True)
        unit = "LPIPS" if distance == "lpips" else "1: as of two images"
        return read_off(visited, values, rule, quantity=f"distance of P_t from the image ({unit})", **about)
    return _best_edit(run, visited, table, classifier, measure, level, strengths, about, progress)


def decode_from(
    run: Trajectory,
    x_t: torch.Tensor,
    t: int,
    *,
    seeds: Sequence[int],
    progress: bool | tqdm = True,
) -> torch.Tensor:
    """Run the reverse process of eta 1 from x_t (n, C, H, W) at a visited timestep to the images.

    Equal seeds get equal noise, so that what differs is x_t alone.
    """
    rest = run.tail(index_of(t, run.timesteps), x_t)
    etas, size = (1.0,) * len(rest.timesteps), check_batch_size(None, run.model, len(x_t))
    rest = replace(rest, etas=etas, seeds=tuple(seeds), stored_noise=None, edit=None, batch_size=size)
    return replay(rest, progress=progress).images


def _commitment(
    run: Trajectory, visited: Sequence[int], classifier: Classifier, copies: int, seed: int, progress: bool
) -> np.ndarray:
    """How far the decodings of one x_t agree, less chance: (len(visited), n).

    C(t) = E[max_c p_c], p_c the share of the decodings of x_t in class c, of every attribute. Its value by chance, C_0,
    is that of decodings of different samples: with `copies` draws the larger share exceeds 1/2 by luck alone.
    """
    if copies < 2:
        raise ValueError(f"copies is {copies}; agreement needs at least 2 decodings")
    seeds = [FRESH + seed * 2**32 + i for i in range(len(run) * copies)]
    shares = []
    steps = sum(run.steps - run.timesteps.index(t) for t in visited)
    with progress_bar(len(seeds), steps, "decoding", show=progress) as bar:
        for t in visited:
            x_t = run.x_at(t).repeat_interleave(copies, dim=0)
            images = decode_from(run, x_t, t, seeds=seeds, progress=bar)
            has = classifier(images.clamp(-1, 1), progress=False).to_numpy() > 0.5
            shares.append(has.reshape(len(run), copies, -1).mean(axis=1))
    shares = np.stack(shares)  # timestep, sample, attribute
    drawn = np.arange(copies + 1)
    larger = np.maximum(drawn, copies - drawn) / copies
    frequency = shares.mean(axis=(0, 1))
    chance = stats.binom.pmf(drawn[:, None], copies, frequency).T @ larger
    if (chance > 1 - 1e-9).all():
        raise ValueError("no attribute of the classifier ever differs between decodings; give it others")
    # The sums weigh an attribute by what there is to decide: one that nearly all samples share decides nothing.
    return (np.maximum(shares, 1 - shares) - chance).sum(axis=2) / (1 - chance).sum()


def prediction_errors(run: Trajectory, visited: Sequence[int], measure: Distance, progress: bool) -> np.ndarray:
    """Distance of P_t from the image: (len(visited), n)."""
    model, errors = run.model, []
    size = check_batch_size(None, model, len(run))
    with progress_bar(len(run), len(visited), "predicting", show=progress) as bar, torch.inference_mode():
        for t in visited:
            predicted = torch.empty_like(run.x0)

            def predict(batch: slice, t=t, predicted=predicted) -> None:
                x_t = to_device(run.x_at(t)[batch], model.device)
                predicted[batch] = model.schedule.predict_x0(x_t, model(x_t, t), t).cpu()
                bar.update(len(x_t))

            size = in_batches(predict, len(run), size)
            errors.append(measure(model.to_images(predicted), run.images))
    return np.stack(errors)


def _best_edit(
    run: Trajectory,
    visited: Sequence[int],
    table: pd.DataFrame,
    classifier: Classifier,
    measure: Distance,
    level: float,
    strengths: Sequence[float],
    about: dict,
    progress: bool,
) -> MixingStep:
    """Success of one move of x_t at every timestep, among strengths that keep the identity loss at most `level`.

    Success is that of the move: the share that leaves its class less the share that does so unmoved, by the new noise.
    """
    strengths = [float(s) for s in strengths]
    if strengths != sorted(strengths) or strengths[0] != 0 or len(strengths) < 2:
        raise ValueError(f"strengths are {strengths}; give 0 and then ascending ones")
    _check_judged(table, classifier)
    train = 2 * len(run) // 3
    tested = run[train:]
    m, k = len(tested), len(strengths)
    success = np.empty((len(visited), k, m, table.shape[1]))
    loss = np.empty_like(success)
    for (i, t), (a, name) in itertools.product(enumerate(visited), enumerate(table)):
        has = table[name].to_numpy() == 1
        options = {"t": t, "space": "x", "method": "mean", "seed": about["seed"]}
        boundary = fit_boundary(run[:train], has[:train].astype(int), **options)
        gap = boundary.means[1] - boundary.means[0]
        away = np.where(has[train:], -1.0, 1.0)[:, None, None]  # from the class that the sample is in
        moves = {"distances": away * gap * np.array(strengths)[:, None], "unit": "distance", "mode": "shift"}
        moves |= {"seed": FRESH + about["seed"] * 2**32, "progress": progress}
        images = cross_boundary(run.model, tested, None, boundary, **moves).images.flatten(0, 1)
        found = classifier(images.clamp(-1, 1), progress=False)[name].to_numpy() > 0.5
        crossed = found.reshape(m, k).T != has[train:]
        # New step noise alone moves some to the other class.
        success[i, :, :, a] = crossed.astype(float) - crossed[0]
        loss[i, :, :, a] = measure(images, tested.images.repeat_interleave(k, dim=0)).reshape(m, k).T

    def best(samples: np.ndarray) -> np.ndarray:
        losses, successes = (v[:, :, samples].mean(axis=(2, 3)) for v in (loss, success))
        return np.array([_at_loss(*pair, level) for pair in zip(losses, successes, strict=True)])

    where = best(np.arange(m)).argmax()
    losses, successes = (v[where].mean(axis=2) for v in (loss, success))  # (strengths, samples)
    kept = np.logical_and.accumulate(losses.mean(axis=1) <= level)
    strongest = np.where(kept, successes.mean(axis=1), -np.inf).argmax()
    tolerance = max(successes[strongest].std(ddof=1) / np.sqrt(m), 1 / (m * table.shape[1]))
    return read_off(
        visited,
        best,
        largest_near_best(tolerance),
        n=m,
        quantity=f"success at identity loss {level:g}",
        more={
            f"{kind} at strength {s:g}": values[:, k].mean(axis=(1, 2))
            for kind, values in (("success", success), ("loss", loss))
            for k, s in enumerate(strengths)
        },
        **about,
    )


def _at_loss(losses: np.ndarray, successes: np.ndarray, level: float) -> float:
    """The best success among strengths with a loss of at most `level`, interpolated to where the loss reaches it."""
    kept = int(np.logical_and.accumulate(losses <= level).sum())
    if kept == 0:
        return 0.0
    best = float(successes[:kept].max())
    if kept < len(losses):
        share = (level - losses[kept - 1]) / (losses[kept] - losses[kept - 1])
        best = max(best, float(successes[kept - 1] + share * (successes[kept] - successes[kept - 1])))
    return best


def _check_judged(table: pd.DataFrame, classifier: Classifier) -> None:
    for name, values in table.items():
        if name not in classifier.attributes:
            raise ValueError(f"{classifier.name} does not judge {name!r}; it knows {', '.join(classifier.attributes)}")
        check_classes(values, name)


def distance_of(distance: str | Distance, classifier: Classifier | None, x0: torch.Tensor) -> Distance:
    """The distance between images, 1 being the mean distance of two of the samples, but for LPIPS."""
    if distance == "lpips":
        return _lpips()
    if distance == "features":

        def of_features(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
            features = [classifier.features(images, progress=False) for images in (a, b)]
            return np.linalg.norm(np.subtract(*features), axis=1)

        plain = of_features
    elif callable(distance):
        plain = distance
    else:
        raise ValueError(f'distance {distance!r} is not known; it is "features", "lpips" or a function of two batches')
    unit = float(plain(x0.clamp(-1, 1), x0.clamp(-1, 1).roll(1, dims=0)).mean())
    if not unit > 0:
        raise ValueError("the images are at distance 0 from each other; there is no unit to measure by")
    return lambda a, b: plain(a.clamp(-1, 1), b.clamp(-1, 1)) / unit


def _lpips() -> Distance:
    try:
        network = importlib.import_module("lpips").LPIPS(net="alex", verbose=False)
    except (ImportError, OSError, RuntimeError) as error:
        raise ValueError(
            'distance "lpips" needs the package lpips with torchvision and its weights, which are fetched when first '
            f'used ({type(error).__name__}); install it on a machine with a network, or take distance="features"'
        ) from error

    @torch.inference_mode()
    def measure(a: torch.Tensor, b: torch.Tensor) -> np.ndarray:
        return network(a.clamp(-1, 1), b.clamp(-1, 1)).flatten().cpu().numpy().astype(np.float64)

    return measure


def _grid_of(run: Trajectory, grid: Sequence[int] | None) -> list[int]:
    """Visited timesteps to look at, noisiest first."""
    if grid is None:
        stride = max(1, round(run.steps / 10))
        return list(run.timesteps[stride // 2 :: stride])
    for t in grid:
        index_of(t, run.timesteps, trained=run.model.schedule.T)
    return sorted({int(t) for t in grid}, reverse=True)


def _model_of(source: HStore | Trajectory, model: Model | None) -> Model:
    if isinstance(source, Trajectory):
        return source.model
    wanted = source.provenance["model"]
    if model is None:
        try:
            model = load_model(wanted["name"]).as_recorded(wanted)
        except FileNotFoundError as error:
            raise ValueError(f"the store's model {wanted['name']!r} is not here; give it with model=") from error
    refuse_other_model("the store", wanted, model.provenance(), tap=False, remedy="give its own model with model=")
    return model


def _run_of(source: HStore | Trajectory, model: Model, n: int, *, progress: bool) -> Trajectory:
    """The first n samples as a run that records x_t."""
    if isinstance(source, HStore):
        # A store of a latent model holds decoded images, which encode to other latents.
        if source.seeds is not None and ("x" not in source.group or model.latent):
            options = {"steps": source.timesteps, "eta": source.provenance["etas"], "progress": progress}
            return sample(model, source.seeds[:n], record_x=True, **options)
        values = torch.stack([torch.from_numpy(source.at(t, space="x")[:n]) for t in source.timesteps])
        x = StepRecord(values.unflatten(2, model.x_shape), source.timesteps)
        return Trajectory(
            model=model,
            x_T=x.values[0],
            x0=model.to_latents(torch.from_numpy(source.images[:n])),
            timesteps=source.timesteps,
            etas=tuple(source.provenance["etas"]),
            seeds=None if source.seeds is None else source.seeds[:n],
            x=x,
            batch_size=min(n, model.batch_size()),
        )
    run = source[:n]
    if run.x is None:
        if run.seeds is None:
            raise ValueError("this inverted run does not know its x_t; call invert(..., record_x=True)")
        run = replay(run, record_x=True, progress=progress)
    return run


def _other(run: Trajectory, progress: bool) -> Trajectory:
    """Ensemble to compare a run with: its own images inverted; for an inversion, as many deterministic samples."""
    options = {"steps": run.timesteps, "record_x": True, "progress": progress}
    if run.seeds is None:
        first, T = run.timesteps[0], run.model.schedule.T
        if first < 0.9 * (T - T / run.steps):
            raise ValueError(
                f"the inversion ends at t = {first}, where samples are not N(0, I); give generated samples with these "
                "timesteps as against=, or invert to the noise"
            )
        return sample(run.model, range(len(run)), eta=0.0, **options)
    return invert(run.model, run.images.clamp(-1, 1), **options)


def _labels_of(source: HStore | Trajectory, labels, n: int) -> pd.DataFrame:
    """Labels of the first n samples, one column an attribute."""
    if isinstance(labels, pd.Series):
        labels = labels.to_frame(labels.name or "label")
    elif not isinstance(labels, pd.DataFrame):
        labels = pd.DataFrame(labels if isinstance(labels, Mapping) else {"label": np.asarray(labels)})
    return matched(source, labels, "the labels").iloc[:n]
