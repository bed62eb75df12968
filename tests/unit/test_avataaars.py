from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import re
import sys
import zipfile

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image

from workbench import paths
from workbench.datasets import avataaars
from workbench.datasets.domain import AVATAAARS, DOMAINS, domain_of, find_region
from workbench.datasets.labelled import load_images
from workbench.diffusion.images import picture_to_tensor as to_tensor

BINARY = list(avataaars.FREQUENCIES)


def drawing(test):
    """A test that draws avatars; skipped without the extra [data] (python_avatars, cairosvg, cairo)."""
    try:
        import cairosvg  # noqa: F401
        import python_avatars  # noqa: F401
    except (ImportError, OSError):
        test = pytest.mark.skip(reason="the extra [data] is not installed")(test)
    return pytest.mark.data(test)


@pytest.fixture
def no_extra(monkeypatch):
    for package in ("python_avatars", "cairosvg"):
        monkeypatch.setitem(sys.modules, package, None)


def assert_frequency(hits, probability):
    """Within 4 standard errors: a right law fails once in 16,000 checks."""
    error = math.sqrt(probability * (1 - probability) / len(hits))
    assert abs(np.mean(hits) - probability) <= 4 * error


@pytest.fixture(scope="module")
def labels():
    """Labels of 20,000 draws of factors."""
    return pd.DataFrame([avataaars.attributes(avataaars.factors(7, i)) for i in range(20_000)])


def test_labels_follow_the_probabilities_of_the_recipe(labels):
    assert list(labels) == [*BINARY, "Tilt"]
    for name, probability in avataaars.FREQUENCIES.items():
        assert_frequency(labels[name], probability)
    for (a, b), probabilities in avataaars.PLANTED.items():
        assert sum(probabilities) == pytest.approx(1.0)
        assert sum(probabilities[2:]) == pytest.approx(avataaars.FREQUENCIES[a])
        assert probabilities[1] + probabilities[3] == pytest.approx(avataaars.FREQUENCIES[b])
        for (i, j), probability in zip(itertools.product((0, 1), repeat=2), probabilities, strict=True):
            assert_frequency((labels[a] == i) & (labels[b] == j), probability)


def test_labels_that_exclude_each_other_never_meet(labels):
    pairs = "Beard-Long_Hair Bald-Long_Hair Eyeglasses-Sunglasses Bald-Blond_Hair Bald-Black_Hair Bald-Gray_Hair"
    for pair in f"{pairs} Blond_Hair-Black_Hair Angry_Brows-Raised_Brows".split():
        one, other = (labels[name] for name in pair.split("-"))
        assert one.any() and other.any() and not (one & other).any()


def test_factors_depend_on_part_and_index_alone():
    np.random.seed(0)  # noqa: NPY002
    first = avataaars.factors(3, 5)
    np.random.seed(1)  # noqa: NPY002
    assert avataaars.factors(3, 5) == first
    assert avataaars.factors(4, 5) != first and avataaars.factors(3, 6) != first


def test_shipped_labels_are_those_of_part_10_and_need_no_extra(no_extra):
    with (paths.data() / "avataaars" / "attributes.csv").open(newline="") as table:
        rows = list(csv.DictReader(table))
    assert len(rows) == 2000
    for i, row in enumerate(rows):
        labels = avataaars.attributes(avataaars.factors(avataaars.HELD_OUT_PART, i))
        assert row == {"file": f"{i:05d}.webp", **{name: str(value) for name, value in labels.items()}}


def test_what_does_not_exist_or_cannot_be_drawn_is_refused_and_nothing_is_written(tmp_path):
    for part, i in ((-1, 0), (0, -1), (0, 1_000_000)):
        with pytest.raises(ValueError, match="does not exist"):
            avataaars.factors(part, i)
    for n in (0, -1, 100_001):
        with pytest.raises(ValueError, match="100000"):
            avataaars.build(n, part=10, out=tmp_path / "new")
    for missing in ("python_avatars", "cairosvg"):
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ImportError) as failure:
            patch.setitem(sys.modules, missing, None)
            avataaars.build(3, part=10, out=tmp_path / "new")
        assert re.fullmatch(r".*pip install -e \.\[data\].*cairo.*", str(failure.value)), "one line"
    assert not (tmp_path / "new").exists()


@drawing
def test_shipped_images_are_a_fresh_drawing():
    """To 2 of 255 on average, as another cairo may smooth edges differently."""
    with zipfile.ZipFile(paths.data() / "avataaars" / "images.zip") as shipped:
        for i in range(10):
            picture = Image.open(io.BytesIO(shipped.read(f"{i:05d}.webp")))
            fresh = avataaars.render(avataaars.factors(10, i))
            assert fresh.mode == picture.mode == "RGB" and fresh.size == picture.size == (64, 64)
            assert np.abs(np.asarray(fresh, float) - np.asarray(picture, float)).mean() < 2


@drawing
def test_build_gives_the_same_bytes_again_also_in_a_pool(tmp_path, monkeypatch):
    monkeypatch.setattr(avataaars.os, "cpu_count", lambda: 2)
    alone = avataaars.build(4, part=10, out=tmp_path / "alone", progress=False)
    monkeypatch.setattr(avataaars, "_POOL_FROM", 2)
    pooled = avataaars.build(4, part=10, out=tmp_path / "pooled", progress=False)
    for file in ("images.zip", "attributes.csv"):
        assert (alone / file).read_bytes() == (pooled / file).read_bytes()
    assert sorted(path.name for path in alone.iterdir()) == ["attributes.csv", "images.zip"]
    shipped = (paths.data() / "avataaars" / "attributes.csv").read_text().splitlines()
    assert (alone / "attributes.csv").read_text().splitlines() == shipped[:5]


NONE, DEFAULT = dict.fromkeys(("beard", "glasses"), "NONE"), dict.fromkeys(("eyes", "eyebrows"), "DEFAULT")
LOOKS = {"hair": "BOB", "hair_color": "BROWN", "mouth": "SMILE", "skin": "PALE", "shirt": "RED"}
BASE = avataaars.Factors(**NONE, **DEFAULT, **LOOKS, background=(200, 220, 240), tilt=0.0)


def pixels(**changes) -> np.ndarray:
    return np.asarray(avataaars.render(dataclasses.replace(BASE, **changes)), float)


@drawing
@pytest.mark.parametrize(
    ("field", "options"),
    [
        *avataaars._REGION_FACTORS.values(),
        ("skin", avataaars.SKINS),
        ("background", avataaars.BACKGROUNDS),
        ("tilt", (-10.0, 0.0, 1.0, 10.0)),
    ],
)
def test_every_option_of_a_factor_shows(field, options):
    pictures = [pixels(**{field: option}) for option in options]
    for one, other in itertools.combinations(pictures, 2):
        assert np.abs(one - other).max() > 10


@drawing
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


@drawing
def test_tilt_turns_counter_clockwise_about_the_face():
    """Turning the upright picture by hand gives the tilted one, up to resampling and the crop's border."""
    upright = Image.fromarray(pixels().astype(np.uint8))
    center = tuple((np.array([99, 110]) - [33, 8]) * 64 / 132)
    turned = np.asarray(upright.rotate(8, Image.Resampling.BICUBIC, center=center), float)
    inside = (slice(20, 55), slice(12, 52))
    right = np.abs(turned - pixels(tilt=8.0))[inside].mean()
    wrong = np.abs(turned - pixels(tilt=-8.0))[inside].mean()
    assert right < 4 < wrong


def centroid(mask: np.ndarray) -> np.ndarray:
    """Row and column of the middle of a mask, in pixels."""
    return np.argwhere(mask).mean(axis=0)


@pytest.fixture
def regions_in(tmp_path, monkeypatch):
    """Let `region_mask` read planted regions; the files are written as the shipped one is."""

    def plant(regions: dict[str, np.ndarray]):
        by_factor = {avataaars._REGION_FACTORS[name][0]: mask for name, mask in regions.items()}
        monkeypatch.setattr(avataaars, "_draw_region", lambda factor, options: by_factor[factor])
        monkeypatch.setattr(paths, "data", lambda: tmp_path)
        return avataaars.build_regions(tmp_path / "avataaars", progress=False)

    return plant


@pytest.mark.parametrize("name", avataaars.REGIONS)
def test_region_masks_hold_a_part_of_the_picture_and_need_no_extra(name, no_extra):
    for size, tilt in itertools.product((32, 64), (0.0, -10.0, 10.0)):
        mask = avataaars.region_mask(name, size=size, tilt=tilt)
        assert mask.shape == (size, size) and mask.dtype == bool
        assert 0.02 < mask.mean() < 0.75
    upright = avataaars.region_mask(name)
    assert (upright & upright[:, ::-1]).sum() > 0.85 * (upright | upright[:, ::-1]).sum()


def square(rows: slice, columns: slice) -> np.ndarray:
    mask = np.zeros((210, 198), bool)
    mask[rows, columns] = True
    return mask


@pytest.mark.parametrize("tilt", [-10.0, 0.0, 10.0])
def test_a_planted_region_lands_where_the_rotation_puts_it(tilt, regions_in):
    """A square 40 pixels to the right of the centre of rotation rises when the head turns counter-clockwise."""
    regions_in(dict.fromkeys(avataaars.REGIONS, square(slice(107, 114), slice(136, 143))))
    angle = np.radians(tilt)
    expected = np.array([110 - 40 * np.sin(angle) - 8, 99 + 40 * np.cos(angle) - 33])
    for size in (132, 66):
        found = centroid(avataaars.region_mask("eyes", size=size, tilt=tilt))
        assert found == pytest.approx(expected * size / 132, abs=1)


def test_a_region_below_the_crop_comes_in_when_the_head_turns(regions_in):
    """The regions hold the whole canvas: long hair outside of the upright picture shows in a tilted one."""
    regions_in(dict.fromkeys(avataaars.REGIONS, square(slice(142, 156), slice(145, 165))))
    assert [avataaars.region_mask("hair", tilt=tilt).any() for tilt in (0.0, 10.0, -10.0)] == [False, True, False]


def test_regions_that_do_not_exist_are_refused_and_a_changed_mask_leaves_the_next_one_alone(monkeypatch, tmp_path):
    for name in ("nose", "", "Mouth"):
        with pytest.raises(ValueError, match=f"{name}.*mouth, eyes, brows, hair, beard, glasses"):
            avataaars.region_mask(name)
    with pytest.raises(ValueError, match="size is 0"):
        avataaars.region_mask("eyes", size=0)
    changed = avataaars.region_mask("eyes")
    changed[:] = True
    assert not avataaars.region_mask("eyes").all()
    monkeypatch.setattr(paths, "data", lambda: tmp_path)
    with pytest.raises(FileNotFoundError, match="build_regions"):
        avataaars.region_mask("eyes")


@drawing
@pytest.mark.parametrize("name", avataaars.REGIONS)
def test_a_change_of_one_factor_lies_in_its_region_at_every_tilt(name):
    """95% of the absolute difference over all pairs, 98% of the squared one in each; turned the wrong way, less."""
    field, options = avataaars._REGION_FACTORS[name]
    inside = outside = wrong = 0.0
    for tilt, hair in ((-10.0, "NONE"), (0.0, "BOB"), (7.0, "SHORT_CURLY")):
        mask, mirrored = (avataaars.region_mask(name, tilt=angle) for angle in (tilt, -tilt))
        first, *others = (pixels(**{"hair": hair, field: option, "tilt": tilt}) for option in options)
        for other in others:
            difference = np.abs(other - first)
            if not difference.any():
                continue
            assert (difference[mask] ** 2).sum() > 0.98 * (difference**2).sum()
            inside += difference[mask].sum()
            outside += difference[~mask].sum()
            wrong += difference[mirrored].sum()
    assert inside > 0.95 * (inside + outside)
    assert wrong < inside


@drawing
@pytest.mark.parametrize("name", avataaars.REGIONS)
def test_a_region_is_no_larger_than_what_its_factor_changes(name):
    """At least 9 of 10 pixels of the upright mask differ by more than 8 of 255 between two options."""
    field, options = avataaars._REGION_FACTORS[name]
    pictures = [pixels(**{"hair": "NONE", "hair_color": "BLACK", field: option}) for option in options]
    changes = np.ptp(pictures, axis=0).max(axis=-1) > 8
    assert changes[avataaars.region_mask(name)].mean() > 0.9


@drawing
@pytest.mark.slow
def test_shipped_regions_are_a_fresh_drawing(tmp_path):
    """To 1% of a region, as another cairo may smooth edges differently."""
    with (
        np.load(avataaars.build_regions(tmp_path, progress=False)) as fresh,
        np.load(paths.data() / "avataaars" / "regions.npz") as shipped,
    ):
        assert tuple(fresh) == tuple(shipped) == avataaars.REGIONS
        for name in avataaars.REGIONS:
            assert fresh[name].shape == shipped[name].shape == (210, 198) and shipped[name].dtype == bool
            assert (fresh[name] ^ shipped[name]).sum() <= 0.01 * shipped[name].sum()


def test_uncorrelated_images_are_as_frequent_as_in_the_recipe():
    """By the labels alone: the three planted pairs are independent."""
    free = pd.DataFrame([avataaars.attributes(avataaars.unlinked(0, i)[0]) for i in range(3000)])
    recipe = pd.DataFrame([avataaars.attributes(avataaars.factors(0, i)) for i in range(3000)])
    for one, other in avataaars.PLANTED:
        assert abs(free[one].corr(free[other])) < 0.06 < 0.15 < abs(recipe[one].corr(recipe[other]))
    assert (free.mean() - recipe.mean()).drop("Tilt").abs().max() < 0.04


@drawing
def test_every_second_uncorrelated_image_is_a_blend(tmp_path):
    """Off by at most a third of the way to the same one in other colours."""
    images = load_images(avataaars.build(3, part=0, out=tmp_path, correlated=False, progress=False))
    for i, blended in enumerate([False, True, False]):
        own, other = (to_tensor(avataaars.render(factors)) for factors in avataaars.unlinked(0, i))
        assert torch.equal(images[i], own) is not blended
        assert (images[i] - own).abs().max() <= (other - own).abs().max() / 3 + 0.02
        assert images.labels.iloc[i].to_dict() == avataaars.attributes(avataaars.unlinked(0, i)[0])


def test_an_attributes_mask_holds_its_regions_at_every_tilt():
    for name, attribute in avataaars.ATTRIBUTES.items():
        mask = avataaars.attribute_mask(name, size=32)
        for region, tilt in itertools.product(attribute.regions, (-10, 0, 5)):
            assert mask[avataaars.region_mask(region, size=32, tilt=tilt)].all() and not mask.all()
    assert avataaars.attribute_mask("Dark_Skin") is None


def test_a_domain_gives_what_is_known_of_its_images():
    domain = domain_of("avataaars")
    assert domain is AVATAAARS and domain in DOMAINS
    masks = domain.masks(["Smiling", "Dark_Skin", "Nobody"], size=32)
    assert list(masks) == ["Smiling"] and (masks["Smiling"] == avataaars.attribute_mask("Smiling", size=32)).all()
    assert (find_region("eyes", size=16) == avataaars.region_mask("eyes", size=16)).all()
    with pytest.raises(ValueError, match="nose.*mouth, eyes"):
        find_region("nose", size=16)
    other = domain_of("faces.zip")
    assert other.name == "faces.zip" and other.masks(["Smiling"], size=32) == {} and not other.frequencies
