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

HAIR_COLORS = {
    "BLACK": ("black", "dark"),
    "BROWN_DARK": ("dark brown", "dark"),
    "BROWN": ("brown",),
    "BLONDE": ("blond", "blonde", "yellow"),
    "BLONDE_GOLDEN": ("blond", "blonde", "golden"),
    "AUBURN": ("auburn", "reddish brown"),
    "RED": ("red", "ginger"),
    "SILVER_GRAY": ("gray", "grey", "silver"),
    "PLATINUM": ("gray", "grey", "white", "platinum"),
}
SKIN_COLORS = {
    "PALE": ("pale", "light", "fair"),
    "LIGHT": ("light", "fair"),
    "TANNED": ("tanned", "light"),
    "BROWN": ("brown", "dark"),
    "DARK_BROWN": ("dark", "dark brown"),
    "BLACK": ("dark", "black"),
}
_BACKGROUND_NAMES = (("light blue", "blue"), ("beige", "yellow"), ("green",), ("pink",), ("white",), ("dark blue",))
BACKGROUND_COLORS = dict(zip(BACKGROUNDS, _BACKGROUND_NAMES, strict=True))
TILTED = 4.0  # degrees from which a caption says so

SUBJECTS = ("person", "face", "character", "avatar", "man", "woman")
OPENINGS = ("", "", "a photo of", "a picture of", "a portrait of", "a drawing of", "an image of")

Kind = str
"""How a phrase is used: "adj" before the noun, "with" after the word "with", "that" after the noun."""

PHRASES: dict[str, dict[Kind, tuple[str, ...]]] = {
    "smiling": {
        "adj": ("smiling", "happy", "grinning", "cheerful"),
        "with": ("a smile", "a happy smile", "a smiling face", "a smiling mouth"),
        "that": ("who smiles", "who is smiling", "who looks happy", "smiling", "that is happy"),
    },
    "not smiling": {
        "adj": ("unsmiling",),
        "with": ("no smile",),
        "that": ("without a smile", "who does not smile", "who is not smiling", "not smiling"),
    },
    "serious": {
        "adj": ("serious", "neutral"),
        "with": ("a serious face", "a neutral face", "a serious mouth"),
        "that": ("who looks serious", "who is serious"),
    },
    "sad": {"adj": ("sad", "unhappy"), "with": ("a sad mouth",), "that": ("who looks sad",)},
    "screaming": {"adj": ("screaming",), "with": ("a screaming mouth",), "that": ("who screams", "who is shouting")},
    "open mouth": {
        "adj": ("open mouthed",),
        "with": ("an open mouth", "the mouth open", "the mouth wide open"),
        "that": ("whose mouth is open", "who opens the mouth"),
    },
    "closed mouth": {
        "with": ("a closed mouth", "the mouth closed"),
        "that": ("whose mouth is closed", "whose mouth is not open", "without an open mouth"),
    },
    "glasses": {
        "with": ("glasses", "eyeglasses", "clear glasses", "spectacles"),
        "that": ("wearing glasses", "who wears glasses", "wearing eyeglasses", "in glasses", "who has glasses"),
    },
    "sunglasses": {
        "with": ("sunglasses", "dark glasses", "shades"),
        "that": ("wearing sunglasses", "who wears sunglasses", "wearing dark glasses", "in shades"),
    },
    "no glasses": {
        "with": ("no glasses",),
        "that": ("without glasses", "not wearing glasses", "who wears no glasses", "without eyeglasses"),
    },
    "beard": {
        "adj": ("bearded",),
        "with": ("a beard", "facial hair", "a full beard"),
        "that": ("who has a beard", "wearing a beard", "whose face has a beard"),
    },
    "no beard": {
        "adj": ("beardless", "clean shaven"),
        "with": ("no beard", "no facial hair"),
        "that": ("without a beard", "who has no beard", "without facial hair"),
    },
    "long hair": {
        "adj": ("long haired",),
        "with": ("long hair", "hair that is long"),
        "that": ("who has long hair", "whose hair is long"),
    },
    "short hair": {
        "adj": ("short haired",),
        "with": ("short hair", "hair that is short"),
        "that": ("who has short hair", "whose hair is short", "without long hair", "whose hair is not long"),
    },
    "bald": {
        "adj": ("bald", "hairless"),
        "with": ("a bald head", "no hair"),
        "that": ("who is bald", "without hair", "who has no hair"),
    },
    "hat": {
        "with": ("a hat", "a hat on the head"),
        "that": ("wearing a hat", "who wears a hat", "in a hat", "who has a hat on"),
    },
    "winter hat": {"with": ("a winter hat",), "that": ("wearing a winter hat", "in a winter hat")},
    "no hat": {"with": ("no hat",), "that": ("without a hat", "who wears no hat")},
    "angry": {
        "adj": ("angry", "frowning"),
        "with": ("angry eyebrows", "angry brows", "an angry look"),
        "that": ("who looks angry", "who frowns", "who is angry", "whose eyebrows are angry"),
    },
    "not angry": {"that": ("who does not frown", "who is not angry", "without angry eyebrows")},
    "raised brows": {
        "with": ("raised eyebrows", "raised brows", "eyebrows that are raised"),
        "that": ("whose eyebrows are raised", "who raises the eyebrows", "raising the brows"),
    },
    "lowered brows": {"that": ("without raised eyebrows", "whose eyebrows are not raised")},
    "closed eyes": {
        "with": ("closed eyes", "the eyes closed", "the eyes shut", "eyes that are closed"),
        "that": ("whose eyes are closed", "who closes the eyes", "closing the eyes"),
    },
    "open eyes": {
        "with": ("open eyes", "the eyes open"),
        "that": ("whose eyes are open", "whose eyes are not closed", "without closed eyes"),
    },
    "wide eyes": {"with": ("wide eyes", "wide open eyes"), "that": ("who looks surprised",)},
    "hair color": {
        "adj": ("{} haired",),
        "with": ("{} hair", "hair that is {}"),
        "that": ("whose hair is {}", "who has {} hair"),
    },
    "other hair color": {"that": ("whose hair is not {}", "without {} hair")},
    "long colored hair": {"with": ("long {} hair",), "that": ("who has long {} hair",)},
    "short colored hair": {"with": ("short {} hair",), "that": ("who has short {} hair",)},
    "skin": {"adj": ("{} skinned",), "with": ("{} skin",), "that": ("whose skin is {}", "who has {} skin")},
    "background": {"that": ("on a {} background", "in front of a {} background")},
    "tilt left": {"with": ("the head tilted to the left",), "that": ("tilting the head left",)},
    "tilt right": {"with": ("the head tilted to the right",), "that": ("tilting the head right",)},
}
"""Wordings of what a picture can show; {} is a colour."""

PROMPTS = {
    "Smiling": ("a smiling person", "a person who is not smiling"),
    "Mouth_Open": ("a person with an open mouth", "a person with a closed mouth"),
    "Eyeglasses": ("a person wearing glasses", "a person without glasses"),
    "Sunglasses": ("a person wearing sunglasses", "a person without glasses"),
    "Beard": ("a person with a beard", "a person without a beard"),
    "Long_Hair": ("a person with long hair", "a person with short hair"),
    "Bald": ("a bald person", "a person with short hair"),
    "Blond_Hair": ("a person with blond hair", "a person whose hair is not blond"),
    "Black_Hair": ("a person with black hair", "a person whose hair is not black"),
    "Gray_Hair": ("a person with gray hair", "a person whose hair is not gray"),
    "Dark_Skin": ("a person with dark skin", "a person with light skin"),
    "Angry_Brows": ("a person with angry eyebrows", "a person who is not angry"),
    "Raised_Brows": ("a person with raised eyebrows", "a person without raised eyebrows"),
    "Eyes_Closed": ("a person with closed eyes", "a person with open eyes"),
}
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
