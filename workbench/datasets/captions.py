"""Captions of the bundled domain: sentences that are true of a picture, made from its factors.

A caption names some of the factors, in one of several wordings each, and leaves the others out. "A man" and "a woman"
are words of the captions without a meaning in the pictures, except that a bearded face is never "a woman".

The pictures with captions are drawn without the planted correlations, and one in eight wears a hat, which the domain of
the bundled models does not have.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from workbench.datasets.avataaars import (
    BACKGROUNDS,
    BEARDS,
    EYEGLASSES,
    HATS,
    LONG_HAIR,
    SHORT_HAIR,
    SMILES,
    SUNGLASSES,
    Factors,
    attributes,
    encode,
    render,
    unlinked,
    write_pictures,
)
from workbench.datasets.tables import CAPTION_FILES
from workbench.io import written

HAT_FREQUENCY = 1 / 8
_HATS, _WORDS = 0, 1
"""Streams of an image's random numbers."""

_BACKGROUND_NAMES = (("light blue", "blue"), ("beige", "yellow"), ("green",), ("pink",), ("white",), ("dark blue",))
BACKGROUND_COLORS = dict(zip(BACKGROUNDS, _BACKGROUND_NAMES, strict=True))
TILTED = 4.0  # degrees from which a caption says so

Kind = str
"""How a phrase is used: "adj" before the noun, "with" after the word "with", "that" after the noun."""

_SAID = yaml.safe_load(Path(__file__).with_name("captions.yaml").read_text(encoding="utf-8"))
HAIR_COLORS, SKIN_COLORS = _SAID["hair_colors"], _SAID["skin_colors"]
SUBJECTS, OPENINGS = _SAID["subjects"], _SAID["openings"]

PHRASES: dict[str, dict[Kind, list[str]]] = _SAID["phrases"]
"""Wordings of what a picture can show; {} is a colour."""

PROMPTS: dict[str, tuple[str, str]] = {name: tuple(pair) for name, pair in _SAID["prompts"].items()}
"""Prompts with and without each attribute of the domain, for a zero-shot classifier."""

_NEGATABLE = ("black", "blond", "gray", "red", "brown")
_MOST_PHRASES = 6
_BARE = 0.1  # share of captions that are one phrase, without a subject


def described_factors(part: int, i: int) -> Factors:
    """Factors of the picture `i` of a part that has captions: without planted correlations, and one in 8 with a hat."""
    drawn, _ = unlinked(part, i)
    rng = np.random.default_rng([part, i, _HATS])
    return replace(drawn, hair=str(rng.choice(HATS))) if rng.random() < HAT_FREQUENCY else drawn


def captions(factors: Factors, n: int, *, seed: int | tuple[int, ...]) -> list[str]:
    """Draw `n` captions of a picture.

    Parameters
    ----------
    factors : Factors
    n : int
    seed : int or tuple of int

    Returns
    -------
    list of str
        Lower case, without punctuation but commas; each names one to six of the factors.
    """
    rng = np.random.default_rng(seed)
    return [_caption(factors, rng) for _ in range(n)]


def build(n: int, *, part: int, out: str | Path, each: int = 8, progress: bool = True) -> Path:
    """Write the first `n` pictures of a part as a labelled folder with captions, for `train_clip`.

    As `avataaars.build`, with pictures of `described_factors`; an attribute `Hat` comes beside the 14.

    Parameters
    ----------
    n, part, out, progress
        As of `avataaars.build`.
    each : int, default 8
        Captions of a picture.

    Returns
    -------
    Path
        The folder.
    """
    out = write_pictures(n, part=part, out=out, draw=_draw, progress=progress)
    name, columns = next(iter(CAPTION_FILES.items()))
    with written(out / name) as partial, partial.open("w", newline="", encoding="utf-8") as text:
        rows = csv.writer(text, lineterminator="\n")
        rows.writerow(columns)
        for i in range(n):
            drawn = captions(described_factors(part, i), each, seed=(part, i, _WORDS))
            rows.writerows((f"{i:05d}.webp", caption) for caption in drawn)
    return out


def _draw(part: int, i: int) -> tuple[bytes, dict[str, int | float]]:
    """Picture `i` with captions, and its labels."""
    drawn = described_factors(part, i)
    return encode(render(drawn)), {**attributes(drawn), "Hat": int(drawn.hair in HATS)}


def _caption(factors: Factors, rng: np.random.Generator) -> str:
    topics = list(_topics(factors, rng))
    bare = rng.random() < _BARE
    chosen = rng.permutation(len(topics))[: 1 if bare else rng.integers(1, _MOST_PHRASES + 1)]
    phrases: dict[Kind, list[str]] = {"adj": [], "with": [], "that": []}
    for topic, color in (topics[i] for i in chosen):
        wordings = PHRASES[topic]
        kind = str(rng.choice(list(wordings)))
        phrases[kind].append(str(rng.choice(wordings[kind])).format(color))
        if bare:
            return phrases[kind][0]
    nouns = [noun for noun in SUBJECTS if not (noun == "woman" and factors.beard != "NONE")]
    noun = " ".join([*phrases["adj"][:2], str(rng.choice(nouns))])
    article = "an" if noun[0] in "aeiou" else "a"
    parts = [f"{rng.choice(OPENINGS)} {article} {noun}".strip()]
    if phrases["with"]:
        parts.append("with " + " and ".join(filter(None, [", ".join(phrases["with"][:-1]), phrases["with"][-1]])))
    if phrases["that"]:
        parts.append(", ".join(phrases["that"]))
    return " ".join(parts)


def _topics(factors: Factors, rng: np.random.Generator) -> Iterator[tuple[str, str]]:
    """What can be said of a picture: keys of `PHRASES`, each with a colour where it has one."""
    f = factors
    smiling, hatted = f.mouth in SMILES, f.hair in HATS
    yield "smiling" if smiling else "not smiling", ""
    if not smiling:
        yield {"SAD": "sad", "SCREAM_OPEN": "screaming"}.get(f.mouth, "serious"), ""
    yield "open mouth" if f.mouth in ("SMILE", "BIG_SMILE", "SCREAM_OPEN") else "closed mouth", ""
    glasses = {**dict.fromkeys(EYEGLASSES, "glasses"), **dict.fromkeys(SUNGLASSES, "sunglasses")}
    yield glasses.get(f.glasses, "no glasses"), ""
    yield "beard" if f.beard in BEARDS else "no beard", ""
    if hatted:
        yield "winter hat" if f.hair != "HAT" and rng.random() < 0.5 else "hat", ""
    elif rng.random() < HAT_FREQUENCY:
        yield "no hat", ""
    color = str(rng.choice(HAIR_COLORS[f.hair_color]))
    if f.hair in LONG_HAIR + SHORT_HAIR:
        length = "long" if f.hair in LONG_HAIR else "short"
        if rng.random() < 0.5:
            yield f"{length} colored hair", color
        else:
            yield f"{length} hair", ""
            yield "hair color", color
        if rng.random() < 0.25:
            known = " ".join(HAIR_COLORS[f.hair_color])
            yield "other hair color", str(rng.choice([each for each in _NEGATABLE if each not in known]))
    elif not hatted:
        yield "bald", ""
    if f.eyebrows == "ANGRY":
        yield "angry", ""
    elif rng.random() < 0.3:
        yield "not angry", ""
    if f.eyebrows == "RAISED_EXCITED":
        yield "raised brows", ""
    elif rng.random() < 0.3:
        yield "lowered brows", ""
    yield "closed eyes" if f.eyes in ("CLOSED", "HAPPY") else "open eyes", ""
    if f.eyes == "SURPRISED":
        yield "wide eyes", ""
    yield "skin", str(rng.choice(SKIN_COLORS[f.skin]))
    yield "background", str(rng.choice(BACKGROUND_COLORS[f.background]))
    if abs(f.tilt) > TILTED:
        yield "tilt left" if f.tilt > 0 else "tilt right", ""
