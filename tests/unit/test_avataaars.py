from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import sys
import zipfile
from functools import cache

import numpy as np
import pytest
from PIL import Image

from workbench import paths
from workbench.datasets import avataaars

BINARY = [
    "Smiling",
    "Mouth_Open",
    "Eyeglasses",
    "Sunglasses",
    "Beard",
    "Long_Hair",
    "Bald",
    "Blond_Hair",
    "Black_Hair",
    "Gray_Hair",
    "Dark_Skin",
    "Angry_Brows",
    "Raised_Brows",
    "Eyes_Closed",
]


def has_extra() -> bool:
    try:
        import cairosvg
        import python_avatars
    except (ImportError, OSError):
        return False
    return bool(cairosvg and python_avatars)


@pytest.fixture
def extra():
    if not has_extra():
        pytest.skip("the extra [data] (python_avatars, cairosvg, cairo) is not installed")


draws = pytest.mark.usefixtures("extra")


@cache
def many():
    """20,000 draws of factors, and their labels as columns."""
    drawn = [avataaars.factors(7, i) for i in range(20_000)]
    rows = [avataaars.attributes(factors) for factors in drawn]
    return drawn, {name: np.array([row[name] for row in rows]) for name in rows[0]}


def assert_frequency(hits, probability):
    """Within 4 standard errors: a right law fails once in 16,000 checks."""
    error = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(np.mean(hits) - probability) <= 4 * error


LAW = {
    "Smiling": 0.45 * 0.6 + 0.55 * 0.4,
    "Mouth_Open": 0.49 * 2 / 3 + 0.51 / 5,
    "Eyeglasses": 0.18 * 0.5 + 0.82 * 0.2,
    "Sunglasses": 0.08,
    "Beard": 0.55 * 0.45,
    "Long_Hair": 0.45,
    "Bald": 0.55 * 0.10,
    "Blond_Hair": 0.945 * 0.82 * 0.27,
    "Black_Hair": 0.945 * 0.82 * 0.40,
    "Gray_Hair": 0.945 * 0.18,
    "Dark_Skin": 0.5,
    "Angry_Brows": 0.20,
    "Raised_Brows": 0.25,
    "Eyes_Closed": 0.30,
}


@pytest.mark.parametrize("name", BINARY)
def test_labels_follow_the_law_of_the_recipe(name):
    assert_frequency(many()[1][name], LAW[name])


@pytest.mark.parametrize(
    ("name", "given", "value", "probability"),
    [
        ("Smiling", "Long_Hair", 1, 0.6),
        ("Smiling", "Long_Hair", 0, 0.4),
        ("Eyeglasses", "Gray_Hair", 1, 0.5),
        ("Eyeglasses", "Gray_Hair", 0, (0.254 - 0.945 * 0.18 * 0.5) / (1 - 0.945 * 0.18)),
        ("Beard", "Long_Hair", 0, 0.45),
        ("Bald", "Long_Hair", 0, 0.10),
        ("Mouth_Open", "Smiling", 1, 2 / 3),
        ("Sunglasses", "Gray_Hair", 1, 0.08),
    ],
)
def test_correlations_are_planted_as_the_recipe_says(name, given, value, probability):
    labels = many()[1]
    assert_frequency(labels[name][labels[given] == value], probability)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Beard", "Long_Hair"),
        ("Bald", "Long_Hair"),
        ("Eyeglasses", "Sunglasses"),
        ("Bald", "Blond_Hair"),
        ("Bald", "Black_Hair"),
        ("Bald", "Gray_Hair"),
        ("Blond_Hair", "Black_Hair"),
        ("Angry_Brows", "Raised_Brows"),
    ],
)
def test_labels_that_exclude_each_other_never_meet(one, other):
    labels = many()[1]
    assert labels[one].any() and labels[other].any()
    assert not (labels[one] & labels[other]).any()


@pytest.mark.parametrize(
    ("field", "law"),
    [
        ("eyes", {"DEFAULT": 0.45, "HAPPY": 0.15, "SQUINT": 0.10, "SURPRISED": 0.15, "CLOSED": 0.15}),
        ("eyebrows", {"DEFAULT": 0.40, "ANGRY": 0.20, "RAISED_EXCITED": 0.25, "SAD_CONCERNED": 0.15}),
        ("skin", dict.fromkeys(["PALE", "LIGHT", "TANNED", "BROWN", "DARK_BROWN", "BLACK"], 1 / 6)),
        ("shirt", dict.fromkeys(["BLUE_02", "RED", "GRAY_02", "PASTEL_GREEN", "WHITE", "BLACK"], 1 / 6)),
        ("beard", dict.fromkeys(["BEARD_LIGHT", "BEARD_MEDIUM", "BEARD_MAGESTIC"], 0.2475 / 3) | {"NONE": 0.7525}),
        ("glasses", dict.fromkeys(["PRESCRIPTION_1", "PRESCRIPTION_2", "ROUND"], 0.254 / 3)
            | dict.fromkeys(["SUNGLASSES", "WAYFARERS"], 0.04) | {"NONE": 0.666}),
        ("mouth", dict.fromkeys(["SMILE", "BIG_SMILE", "TWINKLE"], 0.49 / 3)
            | dict.fromkeys(["SERIOUS", "SAD", "CONCERNED", "DEFAULT", "SCREAM_OPEN"], 0.51 / 5)),
        ("hair", dict.fromkeys(avataaars.LONG_HAIR, 0.45 / 6)
            | dict.fromkeys(avataaars.SHORT_HAIR, 0.495 / 6) | {"NONE": 0.055}),
        ("hair_color", {"SILVER_GRAY": 0.18 * 0.7, "PLATINUM": 0.18 * 0.3, "BLACK": 0.82 * 0.24,
            "BROWN_DARK": 0.82 * 0.16, "BROWN": 0.82 * 0.15, "BLONDE": 0.82 * 0.15, "BLONDE_GOLDEN": 0.82 * 0.12,
            "AUBURN": 0.82 * 0.10, "RED": 0.82 * 0.08}),
        ("background", dict.fromkeys([(200, 220, 240), (240, 226, 200), (214, 236, 208), (236, 210, 220),
            (226, 226, 230), (120, 140, 170)], 1 / 6)),
    ],
)  # fmt: skip
def test_every_factor_has_the_distribution_of_the_recipe(field, law):
    drawn = [getattr(factors, field) for factors in many()[0]]
    assert set(drawn) == set(law)
    for option, probability in law.items():
        assert_frequency([value == option for value in drawn], probability)


def test_tilt_is_a_clipped_normal_of_4_degrees():
    tilt = many()[1]["Tilt"]
    assert tilt.min() == -10 and tilt.max() == 10
    assert_frequency(tilt < 0, 0.5)
    assert_frequency(np.abs(tilt) < 4, math.erf(1 / math.sqrt(2)))
    assert_frequency(np.abs(tilt) == 10, 1 - math.erf(2.5 / math.sqrt(2)))


def test_factors_depend_on_part_and_index_alone():
    np.random.seed(0)  # noqa: NPY002
    first = avataaars.factors(3, 5)
    np.random.seed(1)  # noqa: NPY002
    assert avataaars.factors(3, 5) == first
    assert avataaars.factors(4, 5) != first and avataaars.factors(3, 6) != first


def test_labels_need_no_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "python_avatars", None)
    monkeypatch.setitem(sys.modules, "cairosvg", None)
    assert list(avataaars.attributes(avataaars.factors(10, 0))) == [*BINARY, "Tilt"]


@pytest.mark.parametrize(("part", "i"), [(-1, 0), (0, -1), (0, 1_000_000)])
def test_an_image_that_does_not_exist_is_refused(part, i):
    with pytest.raises(ValueError, match="does not exist"):
        avataaars.factors(part, i)


def test_shipped_labels_are_those_of_part_10():
    with (paths.data() / "avataaars" / "attributes.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 2000
    for i, row in enumerate(rows):
        labels = avataaars.attributes(avataaars.factors(avataaars.HELD_OUT_PART, i))
        assert row == {"file": f"{i:05d}.webp", **{name: str(value) for name, value in labels.items()}}


@pytest.mark.parametrize("n", [0, -1, 100_001])
def test_build_refuses_a_number_out_of_range_and_writes_nothing(n, tmp_path):
    with pytest.raises(ValueError, match="100000"):
        avataaars.build(n, part=10, out=tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("missing", ["python_avatars", "cairosvg"])
def test_a_missing_extra_is_a_sentence_with_the_remedy(missing, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(ImportError, match=r"pip install -e \.\[data\].*cairo") as failure:
        avataaars.build(3, part=10, out=tmp_path / "new")
    assert "\n" not in str(failure.value)
    assert not (tmp_path / "new").exists()


@pytest.mark.data
@draws
def test_shipped_images_are_a_fresh_drawing():
    """To 2 of 255 on average, as another cairo may smooth edges differently."""
    with zipfile.ZipFile(paths.data() / "avataaars" / "images.zip") as shipped:
        for i in range(10):
            picture = Image.open(io.BytesIO(shipped.read(f"{i:05d}.webp")))
            fresh, labels = avataaars.draw(10, i)
            assert fresh.mode == picture.mode == "RGB" and fresh.size == picture.size == (64, 64)
            assert np.abs(np.asarray(fresh, float) - np.asarray(picture, float)).mean() < 2
            assert labels == avataaars.attributes(avataaars.factors(10, i))


@pytest.mark.data
@draws
def test_build_gives_the_same_bytes_again(tmp_path):
    folders = [avataaars.build(3, part=10, out=tmp_path / name, progress=False) for name in ("one", "two")]
    for file in ("images.zip", "attributes.csv"):
        first, second = ((folder / file).read_bytes() for folder in folders)
        assert first == second
    assert sorted(path.name for path in folders[0].iterdir()) == ["attributes.csv", "images.zip"]
    with (folders[0] / "attributes.csv").open() as built, (paths.data() / "avataaars" / "attributes.csv").open() as all:
        assert built.readlines() == list(itertools.islice(all, 4))


@pytest.mark.data
@draws
def test_build_in_a_pool_equals_drawing_in_one_process(tmp_path, monkeypatch):
    monkeypatch.setattr(avataaars.os, "cpu_count", lambda: 2)
    alone = avataaars.build(4, part=11, out=tmp_path / "alone", progress=False)
    monkeypatch.setattr(avataaars, "_POOL_FROM", 2)
    pooled = avataaars.build(4, part=11, out=tmp_path / "pooled", progress=False)
    for file in ("images.zip", "attributes.csv"):
        assert (alone / file).read_bytes() == (pooled / file).read_bytes()


@pytest.mark.data
@draws
def test_an_interrupted_build_leaves_the_last_one_untouched(tmp_path, monkeypatch):
    avataaars.build(2, part=10, out=tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    draw = avataaars.draw

    def fail_late(part, i):
        if i == 2:
            raise KeyboardInterrupt
        return draw(part, i)

    monkeypatch.setattr(avataaars, "draw", fail_late)
    with pytest.raises(KeyboardInterrupt):
        avataaars.build(3, part=12, out=tmp_path, progress=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


BASE = avataaars.Factors(
    hair="BOB",
    hair_color="BROWN",
    mouth="SMILE",
    beard="NONE",
    glasses="NONE",
    eyes="DEFAULT",
    eyebrows="DEFAULT",
    skin="PALE",
    background=(200, 220, 240),
    tilt=0.0,
    shirt="RED",
)


def pixels(**changes) -> np.ndarray:
    return np.asarray(avataaars.render(dataclasses.replace(BASE, **changes)), float)


@pytest.mark.data
@draws
@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("hair", (*avataaars.LONG_HAIR, *avataaars.SHORT_HAIR, "NONE")),
        ("mouth", avataaars.SMILES + avataaars.OTHER_MOUTHS),
        ("beard", (*avataaars.BEARDS, "NONE")),
        ("glasses", (*avataaars.EYEGLASSES, *avataaars.SUNGLASSES, "NONE")),
        ("eyes", tuple(avataaars.EYES)),
        ("eyebrows", tuple(avataaars.EYEBROWS)),
        ("skin", avataaars.SKINS),
        ("background", avataaars.BACKGROUNDS),
        ("tilt", (-10.0, 0.0, 1.0, 10.0)),
    ],
)
def test_every_option_of_a_factor_shows(field, options):
    pictures = [pixels(**{field: option}) for option in options]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).max() > 10


@pytest.mark.data
@draws
@pytest.mark.parametrize("hair", avataaars.LONG_HAIR + avataaars.SHORT_HAIR)
def test_hair_takes_its_color_so_that_the_color_labels_are_true(hair):
    """The hair is dark when it is BLACK and light when it is SILVER_GRAY; python_avatars alone fails for STRAIGHT_2."""
    bald = pixels(hair="NONE")
    dark, light = (pixels(hair=hair, hair_color=color) for color in ("BLACK", "SILVER_GRAY"))
    is_hair = np.abs(dark - light).max(axis=-1) > 100
    assert is_hair.sum() > 100
    assert np.abs(dark - bald)[is_hair].max(axis=-1).min() > 0
    assert np.median(dark[is_hair].mean(axis=-1)) < 80
    assert np.median(light[is_hair].mean(axis=-1)) > 180


@pytest.mark.data
@draws
def test_tilt_turns_counter_clockwise_about_the_face():
    """Turning the upright picture by hand gives the tilted one, up to resampling and the crop's border."""
    upright = Image.fromarray(pixels().astype(np.uint8))
    center = tuple((np.array([99, 110]) - [33, 8]) * 64 / 132)
    turned = np.asarray(upright.rotate(8, Image.Resampling.BICUBIC, center=center), float)
    inside = (slice(20, 55), slice(12, 52))
    right = np.abs(turned - pixels(tilt=8.0))[inside].mean()
    wrong = np.abs(turned - pixels(tilt=-8.0))[inside].mean()
    assert right < 4 < wrong


@pytest.mark.data
@draws
def test_background_fills_the_corners_of_a_tilted_picture():
    picture = pixels(hair="CAESAR", background=(214, 236, 208), tilt=10.0)
    assert (picture[[0, 0], [0, -1]] == (214, 236, 208)).all()
