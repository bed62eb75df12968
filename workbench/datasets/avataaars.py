"""The bundled domain: vector avatars with known factors and planted correlations.

Image `i` of part `p` is drawn from `numpy.random.default_rng(p * 1_000_000 + i)` alone. Its factors and labels need
nothing but numpy; only drawing needs the extra `[data]` (python_avatars and cairosvg).

Planted correlations: `Beard` excludes `Long_Hair`; `Smiling` leans to `Long_Hair` (.6 against .4); `Eyeglasses` lean
to `Gray_Hair` (.5 against .2). Everything else is drawn independently.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import NamedTuple, TypeVar
from xml.etree import ElementTree

import joblib
import numpy as np
from PIL import Image
from tqdm.auto import tqdm

from workbench import paths
from workbench.datasets.labelled_folder import write_folder
from workbench.io import written
from workbench.shapes import crop_centre, shape_of

SIZE = 64
HELD_OUT_PART = 10
"""The part that is bundled; this one and all above it are never trained on. Parts 0 and 1 are for training."""

LONG_HAIR = ("STRAIGHT_1", "STRAIGHT_2", "CURVY", "LONG_NOT_TOO_LONG", "BOB", "BIG_HAIR")
HATS = ("HAT", "WINTER_HAT_1", "WINTER_HAT_3")
"""Of pictures with captions alone: they take the place of the hair."""
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
BACKGROUNDS = ((200, 220, 240), (240, 226, 200), (214, 236, 208), (236, 210, 220), (226, 226, 230), (120, 140, 170))
SHIRTS = ("BLUE_02", "RED", "GRAY_02", "PASTEL_GREEN", "WHITE", "BLACK")


class Attribute(NamedTuple):
    """A label of 0 or 1: the factor that decides it and the options for which it is 1, and how often that is."""

    factor: str
    options: Collection[str]
    frequency: float
    regions: tuple[str, ...] = ()


ATTRIBUTES = {
    "Smiling": Attribute("mouth", SMILES, 0.49, ("mouth",)),
    "Mouth_Open": Attribute("mouth", ("SMILE", "BIG_SMILE", "SCREAM_OPEN"), 0.49 * 2 / 3 + 0.51 / 5, ("mouth",)),
    "Eyeglasses": Attribute("glasses", EYEGLASSES, 0.254, ("glasses",)),
    "Sunglasses": Attribute("glasses", SUNGLASSES, 0.08, ("glasses",)),
    "Beard": Attribute("beard", BEARDS, 0.2475, ("beard",)),
    "Long_Hair": Attribute("hair", LONG_HAIR, 0.45, ("hair",)),
    "Bald": Attribute("hair", ("NONE",), 0.055, ("hair",)),
    "Blond_Hair": Attribute("hair_color", ("BLONDE", "BLONDE_GOLDEN"), 0.945 * 0.82 * 0.27, ("hair", "beard")),
    "Black_Hair": Attribute("hair_color", ("BLACK", "BROWN_DARK"), 0.945 * 0.82 * 0.40, ("hair", "beard")),
    "Gray_Hair": Attribute("hair_color", GRAY_COLORS, 0.945 * 0.18, ("hair", "beard")),
    "Dark_Skin": Attribute("skin", ("BROWN", "DARK_BROWN", "BLACK"), 0.5),
    "Angry_Brows": Attribute("eyebrows", ("ANGRY",), 0.20, ("brows",)),
    "Raised_Brows": Attribute("eyebrows", ("RAISED_EXCITED",), 0.25, ("brows",)),
    "Eyes_Closed": Attribute("eyes", ("CLOSED", "HAPPY"), 0.30, ("eyes",)),
}
"""All but the tilt. A beard has the colour of the hair; skin is no region."""

FREQUENCIES = {name: attribute.frequency for name, attribute in ATTRIBUTES.items()}

PLANTED = {
    ("Long_Hair", "Beard"): (0.3025, 0.2475, 0.45, 0.0),
    ("Long_Hair", "Smiling"): (0.33, 0.22, 0.18, 0.27),
    ("Gray_Hair", "Eyeglasses"): (0.66095, 0.16895, 0.08505, 0.08505),
}
"""Pairs whose correlation is planted: probabilities of neither, of the second alone, of the first alone, of both."""

_TILTS = (-10.0, -5.0, 0.0, 5.0, 10.0)
_PART_STRIDE = 1_000_000
_MOST_IMAGES = 100_000
_POOL_FROM = 100

_CENTER = (99, 110)
_CROP = (33, 8, 165, 140)
_REGION_FACTORS = {
    "mouth": ("mouth", SMILES + OTHER_MOUTHS),
    "eyes": ("eyes", tuple(EYES)),
    "brows": ("eyebrows", tuple(EYEBROWS)),
    "hair": ("hair", ("NONE", *LONG_HAIR, *SHORT_HAIR)),
    "beard": ("beard", ("NONE", *BEARDS)),
    "glasses": ("glasses", ("NONE", *EYEGLASSES, *SUNGLASSES)),
}
REGIONS = tuple(_REGION_FACTORS)
"""Names that `region_mask` takes."""

_VISIBLE = 8
_COVERED = 0.1

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
    """Draw the factors of image `i` (0..999,999) of a part, the same on every machine.

    Parts 0 and 1 are for training, 10 and above are held out.
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
    """Labels of a picture: 14 attributes of 0 or 1, and `Tilt` in degrees; hair colours are 0 without hair."""
    shown = vars(factors) | {"hair_color": None if factors.hair in ("NONE", *HATS) else factors.hair_color}
    labels = {name: int(shown[a.factor] in a.options) for name, a in ATTRIBUTES.items()}
    return {**labels, "Tilt": factors.tilt}


def render(factors: Factors) -> Image.Image:
    """Draw a picture: RGB, 64x64.

    The avatar is rasterised at 198x210 on a transparent ground, rotated about (99, 110), composited on the background,
    cropped to the face and resized. Change one factor with `dataclasses.replace` to get a pair of pictures that differ
    in it alone.
    """
    avatar = _rasterise(factors).rotate(factors.tilt, Image.Resampling.BICUBIC, center=_CENTER)
    picture = Image.new("RGBA", avatar.size, factors.background)
    picture.alpha_composite(avatar)
    return picture.convert("RGB").crop(_CROP).resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def unlinked(part: int, i: int) -> tuple[Factors, Factors]:
    """Factors of image `i` without the planted correlations, and the same in other colours; see `build`."""
    own, mouth, beard, glasses, colors = (factors(part, i + shift) for shift in range(0, 1_000_000, 200_000))
    drawn = replace(own, mouth=mouth.mouth, beard=beard.beard, glasses=glasses.glasses)
    return drawn, replace(drawn, hair_color=colors.hair_color, skin=colors.skin, background=colors.background)


def build(n: int, *, part: int, out: str | Path, correlated: bool = True, progress: bool = True) -> Path:
    """Write the first `n` images of a part as a labelled folder that `load_images` reads.

    The same call writes the same bytes with the same versions of cairo and Pillow. From 100 images on, the drawing is
    shared among the cores.

    Parameters
    ----------
    n : int
        Number of images, 1..100,000.
    part : int
        0 and 1 are for training (12,000 images each), 10 and above are held out.
    out : str or Path
        Folder for `images.zip` (members `00000.webp`, ..., lossless) and `attributes.csv` (first column `file`).
        Made if missing; files of these names are replaced.
    correlated : bool, default True
        False is for training classifiers. One that is trained on the recipe's own images learns that long hair excludes
        a beard instead of looking for the beard, and then sees a beard vanish wherever hair grows. Without the planted
        correlations, mouth, beard and glasses come from three other images of the part: each factor is as frequent as
        in the recipe, and all are independent. Diffusion models also paint colours between those of the recipe, so
        every second picture is blended, by up to a third, with the same one in the colours of yet another image; the
        labels are those of the larger share.
    progress : bool
        Show a progress bar.

    Returns
    -------
    Path
        The folder.
    """
    return write_pictures(n, part=part, out=out, draw=_draw if correlated else _draw_unlinked, progress=progress)


def write_pictures(
    n: int, *, part: int, out: str | Path, draw: Callable[[int, int], tuple[bytes, dict]], progress: bool
) -> Path:
    """Write what `draw(part, i)` gives for the first `n` images, a picture's bytes and labels; as `build`."""
    if not 1 <= n <= _MOST_IMAGES:
        raise ValueError(f"n is {n}; give a number of images from 1 to {_MOST_IMAGES}")
    _import_extra()
    out = paths.writable(out, folder=True)
    workers = max(1, min(os.cpu_count() or 1, n // _POOL_FROM))
    pool = joblib.Parallel(workers, return_as="generator")
    drawn = pool(joblib.delayed(draw)(part, i) for i in range(n))
    shown = iter(tqdm(drawn, "avatars", n, unit="image", disable=not progress))
    first = next(shown)
    images = enumerate(chain([first], shown))
    return write_folder(out, list(first[1]), ((f"{i:05d}.webp", webp, labels) for i, (webp, labels) in images))


def region_mask(name: str, *, size: int | Sequence[int] = SIZE, tilt: float = 0.0) -> np.ndarray:
    """Where a part of the face can be: the pixels that change when that factor alone changes, bool (H, W).

    `size` is the side, (height, width) or (channels, height, width) of images that `load_images` crops and resizes.

    The mask is that of the factor, over all of its options, not of one picture's mouth or hair: use it to keep a
    Jacobian direction to one part. It turns with the head as `render` turns it (`tilt` in degrees, counter-clockwise).
    Regions overlap: a beard surrounds the mouth, glasses lie over the eyes. A pixel counts from a tenth of its area on:
    with a half, a fifth of a change of the brows would fall outside at 32 pixels. Reads `data/avataaars/regions.npz`.
    """
    if name not in REGIONS:
        raise ValueError(f"there is no region {name!r}; the regions are {', '.join(REGIONS)}")
    _, height, width = shape_of(size)
    upright = _read_regions(paths.data() / "avataaars" / "regions.npz")[name]
    face = upright.rotate(tilt, Image.Resampling.BILINEAR, center=_CENTER).crop(_CROP)
    cropped = crop_centre(face, height, width)
    return np.asarray(cropped.resize((width, height), Image.Resampling.BOX)) >= _COVERED * 255


def attribute_mask(attribute: str, *, size: int | Sequence[int] = SIZE) -> np.ndarray | None:
    """Where an attribute can be, for a head of unknown tilt: its regions, united over tilts from -10 to 10 degrees.

    None for attributes without a region of the face, such as the colour of the skin.
    """
    names = ATTRIBUTES[attribute].regions if attribute in ATTRIBUTES else ()
    masks = [region_mask(name, size=size, tilt=tilt) for name in names for tilt in _TILTS]
    return np.any(masks, axis=0) if masks else None


def build_regions(out: str | Path, *, progress: bool = True) -> Path:
    """Draw the regions that `region_mask` reads and write them as `regions.npz` into a folder; returns the file.

    A bare PALE head, upright, is drawn at 198x210 with every option of a factor; the region is where any two of the
    drawings differ by more than 8 of 255, united over all hairs that the head can wear. The whole canvas is kept, as
    turning brings parts of it into the crop. The same call writes the same bytes with the same versions of cairo,
    Pillow and numpy.
    """
    drawn = tqdm(_REGION_FACTORS.items(), "regions", unit="region", disable=not progress)
    regions = {name: _draw_region(factor, options) for name, (factor, options) in drawn}
    file = paths.writable(out, folder=True) / "regions.npz"
    with written(file) as partial, partial.open("wb") as stream:
        np.savez_compressed(stream, **regions)
    _read_regions.cache_clear()
    return file


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


def _rasterise(factors: Factors) -> Image.Image:
    """Draw the upright avatar on a transparent ground: RGBA, 198x210."""
    python_avatars, cairosvg = _import_extra()
    svg = python_avatars.Avatar(
        style=python_avatars.AvatarStyle.TRANSPARENT,
        top=(python_avatars.HatType if factors.hair in HATS else python_avatars.HairType)[factors.hair],
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
    return Image.open(io.BytesIO(png)).convert("RGBA")


def _draw_region(factor: str, options: Sequence[str]) -> np.ndarray:
    """Pixels of the canvas, bool (210, 198), that differ by more than 8 of 255 between options, under any hair."""
    bare = Factors(
        hair="NONE",
        hair_color="BLACK",
        mouth="DEFAULT",
        beard="NONE",
        glasses="NONE",
        eyes="DEFAULT",
        eyebrows="DEFAULT",
        skin="PALE",
        background=BACKGROUNDS[0],
        tilt=0.0,
        shirt="RED",
    )
    # The hair moves glasses and beard by a pixel or two.
    heads = [bare] if factor == "hair" else [replace(bare, hair=hair) for hair in _REGION_FACTORS["hair"][1]]
    differs = []
    for head in heads:
        avatars = [_rasterise(replace(head, **{factor: option})) for option in options]
        # Premultiplied, as the colour of a transparent pixel means nothing.
        pixels = np.stack([np.asarray(avatar.convert("RGBa")) for avatar in avatars])
        differs.append(np.ptp(pixels, axis=0).max(axis=-1) > _VISIBLE)
    return np.any(differs, axis=0)


@lru_cache
def _read_regions(file: Path) -> dict[str, Image.Image]:
    """Masks of the upright avatar: L, 198x210, 0 or 255."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no {file}; restore it, or call build_regions({str(file.parent)!r})")
    with np.load(file) as regions:
        return {name: Image.fromarray(regions[name].astype(np.uint8) * 255) for name in REGIONS}


def _free_hair_color(svg: str) -> bytes:
    """Let STRAIGHT_2 take the colour of its hair: python_avatars paints it auburn whatever colour is asked for."""
    avatar = ElementTree.fromstring(svg)
    for hair in avatar.iterfind(".//*[@id='straight_2_Color']"):
        hair.attrib.pop("fill", None)
    return ElementTree.tostring(avatar)


def encode(picture: Image.Image) -> bytes:
    """A picture as a lossless WebP."""
    webp = io.BytesIO()
    picture.save(webp, "WEBP", lossless=True)
    return webp.getvalue()


def _draw(part: int, i: int) -> tuple[bytes, dict[str, int | float]]:
    """Image `i` of the recipe, and its labels."""
    drawn = factors(part, i)
    return encode(render(drawn)), attributes(drawn)


def _draw_unlinked(part: int, i: int) -> tuple[bytes, dict[str, int | float]]:
    """Image `i` without the planted correlations, every second one blended, and its labels."""
    drawn, recoloured = unlinked(part, i)
    picture = render(drawn)
    if i % 2:
        picture = Image.blend(picture, render(recoloured), np.random.default_rng([part, i]).uniform(0, 1 / 3))
    return encode(picture), attributes(drawn)


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
