"""The bundled domain: vector avatars with known factors and planted correlations.

Image `i` of part `p` is drawn from `numpy.random.default_rng(p * 1_000_000 + i)` alone. Its factors and labels need
nothing but numpy; only drawing needs the extra `[data]` (python_avatars and cairosvg).

Planted correlations: `Beard` excludes `Long_Hair`; `Smiling` leans to `Long_Hair` (.6 against .4); `Eyeglasses` lean
to `Gray_Hair` (.5 against .2). Everything else is drawn independently.
"""

from __future__ import annotations

import csv
import io
import os
import zipfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar
from xml.etree import ElementTree

import numpy as np
from PIL import Image
from tqdm.auto import tqdm

SIZE = 64
TRAIN_PARTS = (0, 1)
TRAIN_PART_SIZE = 12_000
HELD_OUT_PART = 10
"""The part that is bundled; this one and all above it are never trained on."""

LONG_HAIR = ("STRAIGHT_1", "STRAIGHT_2", "CURVY", "LONG_NOT_TOO_LONG", "BOB", "BIG_HAIR")
SHORT_HAIR = ("SHORT_FLAT", "SHORT_ROUND", "SHORT_WAVED", "CAESAR", "SHORT_CURLY", "CAESAR_SIDE_PART")
GRAY_COLORS = {"SILVER_GRAY": 0.70, "PLATINUM": 0.30}
HAIR_COLORS = {
    "BLACK": 0.24,
    "BROWN_DARK": 0.16,
    "BROWN": 0.15,
    "BLONDE": 0.15,
    "BLONDE_GOLDEN": 0.12,
    "AUBURN": 0.10,
    "RED": 0.08,
}
SMILES = ("SMILE", "BIG_SMILE", "TWINKLE")
OTHER_MOUTHS = ("SERIOUS", "SAD", "CONCERNED", "DEFAULT", "SCREAM_OPEN")
BEARDS = ("BEARD_LIGHT", "BEARD_MEDIUM", "BEARD_MAGESTIC")
EYEGLASSES = ("PRESCRIPTION_1", "PRESCRIPTION_2", "ROUND")
SUNGLASSES = ("SUNGLASSES", "WAYFARERS")
EYES = {"DEFAULT": 0.45, "HAPPY": 0.15, "SQUINT": 0.10, "SURPRISED": 0.15, "CLOSED": 0.15}
EYEBROWS = {"DEFAULT": 0.40, "ANGRY": 0.20, "RAISED_EXCITED": 0.25, "SAD_CONCERNED": 0.15}
SKINS = ("PALE", "LIGHT", "TANNED", "BROWN", "DARK_BROWN", "BLACK")
BACKGROUNDS = (
    (200, 220, 240),
    (240, 226, 200),
    (214, 236, 208),
    (236, 210, 220),
    (226, 226, 230),
    (120, 140, 170),
)
SHIRTS = ("BLUE_02", "RED", "GRAY_02", "PASTEL_GREEN", "WHITE", "BLACK")

_PART_STRIDE = 1_000_000
_MOST_IMAGES = 100_000
_POOL_FROM = 100

Option = TypeVar("Option")


@dataclass(frozen=True)
class Factors:
    """Everything that decides one picture, and nothing else; names are those of python_avatars' enums.

    Attributes
    ----------
    hair, hair_color, mouth, beard, glasses, eyes, eyebrows, skin, shirt : str
        Parts and colours; "NONE" for no hair, no beard or no glasses. A beard has the colour of the hair. The shirt
        lies below the crop: it does not show.
    background : tuple of 3 int
        RGB in 0..255.
    tilt : float
        Rotation of the head in degrees, counter-clockwise, in [-10, 10].
    """

    hair: str
    hair_color: str
    mouth: str
    beard: str
    glasses: str
    eyes: str
    eyebrows: str
    skin: str
    background: tuple[int, int, int]
    tilt: float
    shirt: str


def factors(part: int, i: int) -> Factors:
    """Draw the factors of image `i` of a part.

    Parameters
    ----------
    part : int
        0 and 1 are for training (`TRAIN_PARTS`), 10 and above are held out.
    i : int
        Index in the part, 0..999,999.

    Returns
    -------
    Factors
        The same for the same `part` and `i` on every machine.

    Raises
    ------
    ValueError
        If `part` is negative or `i` is outside of 0..999,999.
    """
    if part < 0 or not 0 <= i < _PART_STRIDE:
        raise ValueError(f"part {part}, image {i} does not exist; part is 0 or more, image is 0..{_PART_STRIDE - 1}")
    rng = np.random.default_rng(part * _PART_STRIDE + i)
    long_hair = _happens(rng, 0.45)
    gray = _happens(rng, 0.18)
    bald = not long_hair and _happens(rng, 0.10)
    hair = "NONE" if bald else _pick(rng, LONG_HAIR if long_hair else SHORT_HAIR)
    hair_color = _pick_weighted(rng, GRAY_COLORS if gray else HAIR_COLORS)
    smiling = _happens(rng, 0.6 if long_hair else 0.4)
    mouth = _pick(rng, SMILES if smiling else OTHER_MOUTHS)
    beard = _pick(rng, BEARDS) if not long_hair and _happens(rng, 0.45) else "NONE"
    return Factors(
        hair=hair,
        hair_color=hair_color,
        mouth=mouth,
        beard=beard,
        glasses=_pick_glasses(rng, 0.5 if gray else 0.2),
        eyes=_pick_weighted(rng, EYES),
        eyebrows=_pick_weighted(rng, EYEBROWS),
        skin=_pick(rng, SKINS),
        background=_pick(rng, BACKGROUNDS),
        tilt=float(np.clip(rng.normal(0.0, 4.0), -10.0, 10.0)),
        shirt=_pick(rng, SHIRTS),
    )


def attributes(factors: Factors) -> dict[str, int | float]:
    """Labels of a picture.

    Parameters
    ----------
    factors : Factors

    Returns
    -------
    dict
        14 attributes, each 0 or 1, in the order of the columns of `attributes.csv`, then `Tilt` in degrees,
        counter-clockwise, in [-10, 10]. The hair colours are 0 for a bald head.
    """
    bald = factors.hair == "NONE"
    color = None if bald else factors.hair_color
    return {
        "Smiling": int(factors.mouth in SMILES),
        "Mouth_Open": int(factors.mouth in ("SMILE", "BIG_SMILE", "SCREAM_OPEN")),
        "Eyeglasses": int(factors.glasses in EYEGLASSES),
        "Sunglasses": int(factors.glasses in SUNGLASSES),
        "Beard": int(factors.beard in BEARDS),
        "Long_Hair": int(factors.hair in LONG_HAIR),
        "Bald": int(bald),
        "Blond_Hair": int(color in ("BLONDE", "BLONDE_GOLDEN")),
        "Black_Hair": int(color in ("BLACK", "BROWN_DARK")),
        "Gray_Hair": int(color in GRAY_COLORS),
        "Dark_Skin": int(factors.skin in ("BROWN", "DARK_BROWN", "BLACK")),
        "Angry_Brows": int(factors.eyebrows == "ANGRY"),
        "Raised_Brows": int(factors.eyebrows == "RAISED_EXCITED"),
        "Eyes_Closed": int(factors.eyes in ("CLOSED", "HAPPY")),
        "Tilt": factors.tilt,
    }


def render(factors: Factors) -> Image.Image:
    """Draw a picture.

    The avatar is rasterised at 198x210 on a transparent ground, rotated about (99, 110), composited on the background,
    cropped to the face and resized. Change one factor with `dataclasses.replace` to get a pair of pictures that differ
    in it alone.

    Parameters
    ----------
    factors : Factors

    Returns
    -------
    PIL.Image.Image
        RGB, 64x64.

    Raises
    ------
    ImportError
        If the extra `[data]` or the cairo system library is missing.
    """
    python_avatars, cairosvg = _import_extra()
    svg = python_avatars.Avatar(
        style=python_avatars.AvatarStyle.TRANSPARENT,
        top=python_avatars.HairType[factors.hair],
        hair_color=python_avatars.HairColor[factors.hair_color],
        facial_hair=python_avatars.FacialHairType[factors.beard],
        facial_hair_color=python_avatars.HairColor[factors.hair_color],
        accessory=python_avatars.AccessoryType[factors.glasses],
        mouth=python_avatars.MouthType[factors.mouth],
        eyes=python_avatars.EyeType[factors.eyes],
        eyebrows=python_avatars.EyebrowType[factors.eyebrows],
        nose=python_avatars.NoseType.DEFAULT,
        skin_color=python_avatars.SkinColor[factors.skin],
        # Given on purpose: the default is a random one, chosen when the package is imported.
        clothing=python_avatars.ClothingType.SHIRT_CREW_NECK,
        clothing_color=python_avatars.ClothingColor[factors.shirt],
    ).render()
    png = cairosvg.svg2png(bytestring=_free_hair_color(svg), output_width=198, output_height=210)
    avatar = Image.open(io.BytesIO(png)).convert("RGBA")
    avatar = avatar.rotate(factors.tilt, Image.Resampling.BICUBIC, center=(99, 110))
    picture = Image.new("RGBA", avatar.size, factors.background)
    picture.alpha_composite(avatar)
    face = picture.convert("RGB").crop((33, 8, 165, 140))
    return face.resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def draw(part: int, i: int) -> tuple[Image.Image, dict[str, int | float]]:
    """Draw image `i` of a part with its labels.

    Parameters
    ----------
    part, i : int
        See `factors`.

    Returns
    -------
    image : PIL.Image.Image
        RGB, 64x64.
    attributes : dict
        See `attributes`.

    Raises
    ------
    ValueError
        If there is no such image.
    ImportError
        If the extra `[data]` or the cairo system library is missing.
    """
    drawn = factors(part, i)
    return render(drawn), attributes(drawn)


def build(n: int, *, part: int, out: str | Path, progress: bool = True) -> Path:
    """Write the first `n` images of a part as a labelled folder that `load_images` reads.

    The same call writes the same bytes with the same versions of cairo and Pillow. Both files are written beside and
    renamed when they are complete. From 100 images on, the drawing is shared among the cores; a script that calls this
    then needs the usual `if __name__ == "__main__":`.

    Parameters
    ----------
    n : int
        Number of images, 1..100,000.
    part : int
        0 and 1 are for training (12,000 images each), 10 and above are held out.
    out : str or Path
        Folder for `images.zip` (members `00000.webp`, ..., lossless) and `attributes.csv` (first column `file`).
        Made if missing; files of these names are replaced.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    ValueError
        If `n` or `part` is out of range.
    ImportError
        If the extra `[data]` or the cairo system library is missing.
    """
    if not 1 <= n <= _MOST_IMAGES:
        raise ValueError(f"n is {n}; give a number of images from 1 to {_MOST_IMAGES}")
    names = list(attributes(factors(part, 0)))
    _import_extra()
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    finished = {file: out / f"{file}.part" for file in ("images.zip", "attributes.csv")}
    # Fork is unsafe in a process that has started torch's threads.
    workers = min(os.cpu_count() or 1, n // _POOL_FROM)
    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn")) if workers > 1 else None
    jobs = (_draw_webp, repeat(part), range(n))
    drawn = pool.map(*jobs, chunksize=16) if pool else map(*jobs)
    try:
        with (
            zipfile.ZipFile(finished["images.zip"], "w", zipfile.ZIP_STORED) as images,
            finished["attributes.csv"].open("w", newline="", encoding="utf-8") as table,
        ):
            rows = csv.DictWriter(table, ["file", *names], lineterminator="\n")
            rows.writeheader()
            for i, (webp, labels) in enumerate(tqdm(drawn, "avatars", n, unit="image", disable=not progress)):
                file = f"{i:05d}.webp"
                images.writestr(_stamped(file), webp)
                rows.writerow({"file": file, **labels})
        for file, written in finished.items():
            os.replace(written, out / file)
    finally:
        if pool:
            pool.shutdown(cancel_futures=True)
        for written in finished.values():
            written.unlink(missing_ok=True)
    return out


def _happens(rng: np.random.Generator, probability: float) -> bool:
    return bool(rng.random() < probability)


def _pick(rng: np.random.Generator, options: Sequence[Option]) -> Option:
    return options[rng.integers(len(options))]


def _pick_weighted(rng: np.random.Generator, options: Mapping[str, float]) -> str:
    return list(options)[rng.choice(len(options), p=list(options.values()))]


def _pick_glasses(rng: np.random.Generator, p_clear: float) -> str:
    u = rng.random()
    if u < p_clear:
        return _pick(rng, EYEGLASSES)
    if u < p_clear + 0.08:
        return _pick(rng, SUNGLASSES)
    return "NONE"


def _free_hair_color(svg: str) -> bytes:
    """Let STRAIGHT_2 take the colour of its hair: python_avatars paints it auburn whatever colour is asked for."""
    avatar = ElementTree.fromstring(svg)
    for hair in avatar.iterfind(".//*[@id='straight_2_Color']"):
        hair.attrib.pop("fill", None)
    return ElementTree.tostring(avatar)


def _draw_webp(part: int, i: int) -> tuple[bytes, dict[str, int | float]]:
    image, labels = draw(part, i)
    webp = io.BytesIO()
    image.save(webp, "WEBP", lossless=True)
    return webp.getvalue(), labels


def _stamped(file: str) -> zipfile.ZipInfo:
    """Member without anything that depends on the time or the system."""
    member = zipfile.ZipInfo(file, date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3
    member.external_attr = 0o644 << 16
    return member


def _import_extra():
    try:
        import cairosvg
        import python_avatars
    # cairosvg raises OSError where the system has no libcairo.
    except (ImportError, OSError) as error:
        raise ImportError(
            "drawing avatars needs python_avatars, cairosvg and the cairo system library; install them with "
            f"`pip install -e .[data]` and your system's package of cairo (libcairo2 on Debian) ({error})"
        ) from error
    return python_avatars, cairosvg
