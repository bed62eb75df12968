"""Pictures as tensors: resized, cropped, turned, and of every mode."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from test_labelled import expected, picture

from workbench.datasets.labelled import load_image
from workbench.diffusion.images import picture_to_tensor as to_tensor


@pytest.mark.parametrize("size", [5, 12, 30])
def test_resize_is_pillows_antialiased_bicubic(size):
    image = picture(0)
    assert torch.equal(to_tensor(image, size), expected(image.resize((size, size), Image.Resampling.BICUBIC)))


def test_the_centre_of_the_wanted_aspect_ratio_is_cropped_and_exif_rotation_is_applied(tmp_path):
    for width, height, size, box in (
        (20, 12, 12, (4, 0, 16, 12)),
        (12, 21, 12, (0, 4, 12, 16)),
        (20, 12, (10, 20), (0, 1, 20, 11)),
        (20, 12, (6, 5), (5, 0, 15, 12)),
        (12, 21, (3, 4, 2), (0, 0, 12, 21)),  # 10.5 pixels wide rounds to what there is
    ):
        image = picture(1, width, height)
        high, wide = (size, size) if isinstance(size, int) else size[-2:]
        if wide != 2:
            image_of_box = image.crop(box).resize((wide, high), Image.Resampling.BICUBIC)
            assert torch.equal(to_tensor(image, size), expected(image_of_box))
        assert to_tensor(image, size).shape == (3, high, wide)
        assert torch.equal(to_tensor(image), expected(image))
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side, to be shown turned 90 degrees clockwise
    picture(2).save(tmp_path / "turned.png", exif=exif)
    assert torch.equal(load_image(tmp_path / "turned.png"), expected(picture(2).rotate(-90)))


def test_transparency_is_composited_on_white():
    image = Image.new("RGBA", (3, 3), (0, 0, 0, 0))
    image.putpixel((0, 0), (255, 0, 0, 255))
    image.putpixel((1, 0), (0, 0, 0, 51))
    tensor = to_tensor(image)
    assert (tensor[:, 2, 2] == 1).all()
    assert tensor[:, 0, 0].tolist() == [1, -1, -1]
    torch.testing.assert_close(tensor[:, 0, 1], torch.full((3,), 204 / 127.5 - 1))


def test_transparency_of_a_palette_is_composited_on_white():
    image = Image.new("P", (2, 1))
    image.putpalette([255, 0, 0, 0, 0, 255])
    image.putdata([0, 1])
    image.info["transparency"] = 1
    assert to_tensor(image, 1).shape == (3, 1, 1)
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    for shown in (image, Image.open(buffer)):
        assert to_tensor(shown.crop((0, 0, 1, 1)))[:, 0, 0].tolist() == [1, -1, -1]
        assert to_tensor(shown.crop((1, 0, 2, 1)))[:, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "1", "LA", "RGBA"])
def test_every_mode_becomes_three_channels_of_its_colors(mode):
    image = picture(3).convert("L" if mode in ("L", "LA", "1") else "RGB").convert(mode)
    assert torch.equal(to_tensor(image), expected(image))


def test_sixteen_bits_are_scaled_not_clipped_and_32_are_refused(tmp_path):
    Image.fromarray(np.array([[0, 257, 32768, 65535]] * 4, np.uint16)).save(tmp_path / "deep.png")
    expected_row = torch.tensor([0, 1, 128, 255]) / 127.5 - 1
    torch.testing.assert_close(load_image(tmp_path / "deep.png"), expected_row.expand(3, 4, 4))
    with pytest.raises(ValueError, match="32-bit"):
        to_tensor(Image.new("F", (4, 4)))
    Image.new("F", (4, 4)).save(tmp_path / "deep.tif")
    with pytest.raises(ValueError, match=r"deep\.tif: "):
        load_image(tmp_path / "deep.tif")
