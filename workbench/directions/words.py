"""Directions and boundaries from sentences: by CLIP's scores of samples, or by images of a text-to-image model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from workbench.analysis.mixing_criteria import log_snr
from workbench.datasets.clip import Clip, load_clip
from workbench.diffusion.inversion import invert
from workbench.diffusion.loading import load_model, load_pipeline
from workbench.diffusion.models import Model
from workbench.diffusion.sampling import sample
from workbench.directions.boundary import Boundary
from workbench.directions.boundary_fit import fit_boundary
from workbench.directions.direction import Direction
from workbench.directions.supervised import find_from_scores
from workbench.hspace.store import HStore
from workbench.io import check_text
from workbench.shapes import with_channels

CLIP, GENERATOR = "avataaars-clip", "avataaars32-text"
"""The bundled text models, both of the bundled domain."""

SOURCE = "a person"
"""What a text is compared with by default, in the bundled domain."""

MIXING_LOG_SNR = -2.47
"""log SNR of t = 500 in Zhu et al.'s CelebA-HQ model, their mixing step."""

GUIDANCE, GENERATOR_STEPS = 4.0, 12
CLEAREST = 0.02  # share of the samples that certainly fit
FEWEST, MOST = 8, 128  # samples on each side of a direction

Generator = Callable[[str, int, int], torch.Tensor]
"""(prompt, n, seed) -> images (n, C, H, W) in [-1, 1]."""


def find_from_text(
    store: HStore,
    text: str,
    *,
    against: str = SOURCE,
    clip: Clip | str | Path = CLIP,
    k: int | None = None,
    name: str | None = None,
    progress: bool = True,
    **options: object,
) -> Direction:
    """Find the direction of a sentence: from the samples that fit `against` to those that fit `text`.

    The score of a sample is the zero-shot score of CLIP: the cosine of its image with `text`, less that with `against`,
    times CLIP's scale. The direction is that of `find_from_scores`, between the k samples of highest and of lowest
    score.

    Parameters
    ----------
    store : HStore
        With images.
    text, against : str
    clip : Clip, str or path, default "avataaars-clip"
        As of `load_clip`; the default is for the bundled domain.
    k : int, optional
        Samples on each side; by default as many as have at least half of the score that 2% of the samples exceed, but
        from 8 to 128, and at most a quarter of all. Of a rare attribute, many more samples fit the text a little than
        have it.
    name : str, optional
        By default the text.
    progress : bool
    **options
        `method`, `balance` and `seed` of `find_from_scores`.

    Returns
    -------
    Direction
        Its provenance names the texts and the hash of the CLIP.

    Raises
    ------
    ValueError
        If a text is empty or of unknown words, both are the same, or fewer than 2 samples fit the text better than
        `against`.
    """
    _check_texts(text, against)
    clip = clip if isinstance(clip, Clip) else load_clip(clip)
    name = name or text
    scores = clip.classifier({name: (text, against)}).scores(store.images, progress=progress)[name].to_numpy()
    fitting = int((scores > 0).sum())
    if fitting < 2:
        raise ValueError(f"{fitting} of {len(scores)} samples fit {text!r} better than {against!r}; use other words")
    if k is None:
        clear = int((scores > np.quantile(scores, 1 - CLEAREST) / 2).sum())
        k = max(2, min(max(clear, FEWEST), len(scores) // 4, MOST))
    direction = find_from_scores(store, scores, k=k, name=name, progress=progress, **options)
    parameters = {"text": text, "against": against, "clip": clip.hash, "fitting": fitting}
    about = direction.provenance["parameters"] | parameters
    return replace(direction, provenance=direction.provenance | {"method": "text", "parameters": about})


def boundary_from_text(
    text: str,
    *,
    model: Model,
    source: str = SOURCE,
    generator: Model | Generator | str | Path = GENERATOR,
    n: int = 32,
    t: int | None = None,
    steps: int | Sequence[int] = 12,
    generator_steps: int = GENERATOR_STEPS,
    guidance_scale: float = GUIDANCE,
    seed: int = 0,
    progress: bool = True,
    **options: object,
) -> dict[str, Boundary]:
    """Fit boundaries of a sentence with the images of a text-to-image model (Zhu et al. 2023, text-based editing).

    The generator makes n images of `text` and n of `source`. They are inverted to the mixing step, and a hyperplane in
    x_t and one in h_t separate the two halves. Zhu et al. do not say which negatives they take; those of a source
    prompt are inferred from the pairs in their code ("Church", "Red brick wall Church").

    Parameters
    ----------
    text : str
        Prompt of the images with the attribute.
    model : Model
        The model that is edited.
    source : str, default "a person"
        Prompt of the images without it.
    generator : Model, str, path or callable, default "avataaars32-text"
        A text-to-image model, by `load_model`'s name, or the name of any other pipeline of diffusers from text to
        images; or a function of prompt, number of images and seed that returns images (n, C, H, W) in [-1, 1].
    n : int, default 32
        Images of each prompt.
    t : int, optional
        Timestep of the boundaries; by default that with the log SNR of Zhu et al.'s, t = 500 of their model.
    steps : int or sequence of int, default 12
        Number of timesteps of the inversion, evenly spaced from t to 0; or the timesteps, beginning with t. Fewer steps
        give shorter x_t, so take those of the samples that the boundary is used on or compared by.
    generator_steps, guidance_scale
        Sampling of the generator, where it is no function.
    seed : int, default 0
        Image i of the text has the seed 2 (seed + i) for its noise, of the source 2 (seed + i) + 1. Also of the folds.
    progress : bool
    **options
        Options of `fit_boundary`, such as `method`; `balance` is not needed.

    Returns
    -------
    dict of "x" and "h" to Boundary
        `Cross(h=found["h"], x=found["x"])` edits with both. Their provenance names the prompts and the generator.

    Raises
    ------
    ValueError
        If a prompt is empty or of unknown words, both are the same, n is below 3, the steps do not begin at t, or the
        generator is no text-to-image model.
    """
    _check_texts(text, source)
    if n < 3:
        raise ValueError(f"n is {n}; give 3 images of each prompt or more")
    t = mixing_timestep(model) if t is None else t
    visited = model.schedule.timesteps_from(t, steps)
    make = generator_of(generator, steps=generator_steps, guidance_scale=guidance_scale, progress=progress)
    images = [_fitted(make(prompt, n, 2 * seed + i), model) for i, prompt in enumerate((text, source))]
    run = invert(model, torch.cat(images), steps=visited, record_x=True, record_h=True, progress=progress)
    labels = np.repeat([1, 0], n)
    found = {
        space: fit_boundary(run, labels, t=t, space=space, name=text, seed=seed, **options) for space in ("x", "h")
    }
    parameters = {"text": text, "source": source, "generator": name_of(generator), "guidance_scale": guidance_scale}
    return {
        space: replace(each, provenance=each.provenance | {"parameters": each.provenance["parameters"] | parameters})
        for space, each in found.items()
    }


def mixing_timestep(model: Model) -> int:
    """The timestep at which the model's log SNR is nearest to that of Zhu et al.'s mixing step."""
    return int(np.abs(log_snr(model.schedule.alpha_bars) - MIXING_LOG_SNR).argmin())


def generator_of(
    generator: Model | Generator | str | Path,
    *,
    steps: int = GENERATOR_STEPS,
    guidance_scale: float = GUIDANCE,
    progress: bool = True,
) -> Generator:
    """A function (prompt, n, seed) -> images from a text-to-image model; see `boundary_from_text`."""
    if callable(generator) and not isinstance(generator, Model):
        return generator
    if not isinstance(generator, Model):
        try:
            generator = load_model(generator)
        except ValueError:  # such as one without a bottleneck, which can make images all the same
            return load_pipeline(generator, steps=steps, guidance_scale=guidance_scale)
    if generator.text is None:
        raise ValueError(f"{generator.name} makes no images from texts; give a text-to-image model as generator=")

    def make(prompt: str, n: int, seed: int) -> torch.Tensor:
        model = generator.conditioned(prompt=prompt, guidance_scale=guidance_scale)
        return sample(model, range(seed, seed + 2 * n, 2), steps=steps, progress=progress).images

    return make


def _fitted(images: torch.Tensor, model: Model) -> torch.Tensor:
    """Images at the size and with the channels of a model."""
    images = with_channels(images.float().cpu(), model.image_shape[0])
    if images.shape[2:] != model.image_shape[1:]:
        images = F.interpolate(images, size=model.image_shape[1:], mode="bicubic", antialias=True, align_corners=False)
    return images.clamp(-1, 1)


def _check_texts(text: str, other: str) -> None:
    for given in (text, other):
        check_text(given)
    if text.strip().lower() == other.strip().lower():
        raise ValueError(f"{text!r} is compared with itself; give two different texts")


def name_of(generator: Model | Generator | str | Path) -> str:
    """Name of a generator, for provenance."""
    return getattr(generator, "name", None) or getattr(generator, "__name__", None) or str(generator)
