"""Labelled images from a folder or a zip, decoded on access.

Every picture is converted the same way: EXIF rotation applied, transparency composited on white, 16 bits scaled to 8,
in colour or grey, its centre of the wanted aspect ratio (or a square, by name) cropped, resized by antialiased bicubic,
values 0..255 mapped to [-1, 1]. Images of other numbers of channels are .npy arrays.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd
import torch
from PIL import Image, UnidentifiedImageError
from tqdm.auto import tqdm

from workbench import paths
from workbench.datasets.files import Folder, Zip, find_files, find_labels, folder_of, warn_of_others
from workbench.datasets.tables import LISTS, classes_of, labels_of, plain, read_captions, some
from workbench.diffusion.images import Unsuitable, array_to_tensor, picture_to_tensor
from workbench.io import one_of
from workbench.shapes import shape_of

CROPS = {"celeba64": ((178, 218), (25, 57, 153, 185))}
"""Squares other than the centre one: size of the images that it is for, and (left, top, right, bottom).

"celeba64" is what the 64-pixel CelebA models of DDIM see of the aligned images: 128 pixels around (89, 121).
"""

Indices = slice | Sequence[int] | Sequence[bool] | np.ndarray | pd.Series | torch.Tensor


@dataclass(frozen=True, repr=False, eq=False)
class LabelledImages:
    """Images of one source with a table of labels; made by `load_images`.

    `images[3]` is one image, `images[:8]` or `images[[5, 2]]` a stack. Only the names and labels are kept in memory, so
    the record can be pickled, sent to other processes and used as a torch dataset.

    Attributes
    ----------
    labels : pandas.DataFrame
        One row per image in order, index: file name. Columns of -1/1 are converted to 0/1; NaN stays. No columns
        without a label file.
    """

    labels: pd.DataFrame
    _files: Folder | Zip
    _shape: tuple[int, int, int] | None
    _crop: str | None = None
    _checksums: dict[str, tuple[int, int]] = field(default_factory=dict, repr=False)  # shared by selections

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        side = "native size" if self._shape is None else "x".join(map(str, self._shape[self._shape[0] == 3 :]))
        known = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"LabelledImages({len(self)} images, {side}, {len(self.names)} attributes: {known or 'none'})"

    def __getitem__(self, index: int | Indices) -> torch.Tensor:
        """Decode one image or several.

        Parameters
        ----------
        index : int, slice, sequence of int or boolean mask

        Returns
        -------
        Tensor of shape (C, H, W) or (k, C, H, W), float32, values in [-1, 1]
            Of `image_shape`.

        Raises
        ------
        IndexError
            If there is no such image.
        ValueError
            If an image cannot be decoded, or images differ in size and no size was given.
        """
        positions = self._positions(index)
        if positions.ndim == 0:
            return self._decode(int(positions))
        stack = torch.empty(len(positions), *self.image_shape)
        for row, position in zip(stack, positions, strict=True):
            row.copy_(self._decode(int(position)))
        return stack

    @property
    def names(self) -> list[str]:
        """Names of the attributes."""
        return list(self.labels.columns)

    @cached_property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of an image: as requested, or else that of the first image."""
        if self._shape is not None or not len(self):
            return self._shape or (3, 0, 0)
        channels, height, width = self._open(self.labels.index[0]).shape
        return channels, height, width

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the shape and crop and over each image's name, length and CRC-32, in order.

        A folder and a zip of it have the same fingerprint. Labels are not included.
        """
        crop = "" if self._crop is None else f" {self._crop}"
        channels, height, width = self.image_shape
        shape = height if (channels, height) == (3, width) else self.image_shape
        digest = hashlib.sha256(f"{shape}{crop}\n".encode())
        for name in tqdm(self.labels.index, "fingerprint", unit="image", delay=2, leave=False):
            if name not in self._checksums:
                self._checksums[name] = self._files.checksum(name)
            length, checksum = self._checksums[name]
            digest.update(f"{name}\0{length}\0{checksum}\n".encode())
        return digest.hexdigest()

    @cached_property
    def hash(self) -> str:
        """The fingerprint of the same images in the order of their names."""
        return self.select(np.argsort(self.labels.index.to_numpy(str), kind="stable")).fingerprint

    @cached_property
    def captions(self) -> list[list[str]]:
        """Captions of every image, none or several, in order.

        They are read from `captions.csv` beside the images (columns `file`, `caption`), or from `metadata.csv` (columns
        `file_name`, `text`, as the hub's image folders have it): a row a caption.

        Raises
        ------
        ValueError
            If there is no such table, or none of its rows is of these images.
        """
        table = read_captions(self._files.path)
        captions = [table.get(plain(self._files.prefix + name), []) for name in self.labels.index]
        if not any(captions):
            raise ValueError(f"none of the {len(self)} images of {self._files.path} has a caption")
        return captions

    def label(self, name: str) -> pd.Series:
        """Labels of one attribute.

        Parameters
        ----------
        name : str

        Returns
        -------
        pandas.Series of length n
            Index: file name.

        Raises
        ------
        ValueError
            If the attribute is unknown; the message lists the known ones.
        """
        if name not in self.labels.columns:
            known = ", ".join(self.names) or 'none: no label file was found; give one as labels="table.csv"'
            raise ValueError(f"there is no attribute {name!r}; the known ones are {known}")
        return cast(pd.Series, self.labels[name])

    def at_size(self, size: int | Sequence[int] | None) -> LabelledImages:
        """The same images at another size.

        Parameters
        ----------
        size : int, (height, width), (channels, height, width) or None
            As of `load_images`, such as `model.image_shape`; None for the native size.

        Returns
        -------
        LabelledImages

        Raises
        ------
        ValueError
            If a number is below 1.
        """
        return replace(self, _shape=_checked(size))

    def at_side(self, side: int) -> LabelledImages:
        """The same images with a shorter side of so many pixels: in the form that was asked for, else as squares."""
        channels, height, width = self.image_shape
        height, width = (1, 1) if self._shape is None else (height, width)
        scale = side / min(height, width)
        return self.at_size((channels, round(scale * height), round(scale * width)))

    def select(self, indices: Indices) -> LabelledImages:
        """A subset of the images with their labels.

        Parameters
        ----------
        indices : slice, sequence of int or boolean mask of length n
            A pandas Series counts by position.

        Returns
        -------
        LabelledImages

        Raises
        ------
        IndexError
            If there is no such image or the mask has the wrong length.
        """
        return replace(self, labels=self.labels.iloc[np.atleast_1d(self._positions(indices))])

    def shuffled(self, seed: int) -> LabelledImages:
        """The same images in an order that the seed draws: the first of a folder are often all of one class.

        Parameters
        ----------
        seed : int

        Returns
        -------
        LabelledImages
        """
        return self.select(np.random.default_rng(seed).permutation(len(self)))

    def _positions(self, indices: int | Indices) -> np.ndarray:
        chosen = indices if isinstance(indices, slice) else np.asarray(indices)
        if not isinstance(chosen, slice) and chosen.size == 0:
            chosen = chosen.astype(int)
        try:
            return np.asarray(np.arange(len(self))[chosen])
        except IndexError as error:
            raise IndexError(f"there are {len(self)} images ({error}); give positions of these, or a mask") from error

    def _decode(self, position: int) -> torch.Tensor:
        name = self.labels.index[position]
        image = self._open(name)
        if image.shape != self.image_shape:
            what = f"the shape {tuple(image.shape)} and the first image {self.image_shape}"
            raise ValueError(f"{self._files.describe(name)} has {what}; give one size for all, such as size=64")
        return image

    def _open(self, name: str) -> torch.Tensor:
        return _decode(lambda: self._files.read(name), self._shape, self._files.describe(name), self._crop, _SKIP)

    def _without_broken(self) -> LabelledImages:
        whole, broken = [], []
        for position, name in enumerate(tqdm(self.labels.index, "checking", unit="image", delay=2, leave=False)):
            try:
                self._open(name)
                whole.append(position)
            except BrokenImage:
                broken.append(self._files.describe(name))
        if not whole:
            raise ValueError(f"none of {len(broken)} images can be decoded ({some(broken)}); give others")
        if broken:
            warnings.warn(f"images that cannot be decoded are left out: {', '.join(broken)}", stacklevel=3)
        return self.select(whole)


def load_images(
    source: str | Path,
    *,
    size: int | Sequence[int] | None = None,
    labels: str | Path | None = None,
    crop: str | None = None,
    skip_broken: bool = False,
) -> LabelledImages:
    """Open a set of images with its labels; images are decoded on access.

    Images are all files that Pillow reads (of several frames, the first); in a source without any, .npy arrays of one
    image each, of any number of channels, as `array_to_tensor` takes them. Names are paths relative to the source,
    without a folder common to all of them.

    Labels are searched inside the folder or zip and beside the zip; CelebA's and CelebAMask-HQ's lists also up to two
    folders above and in their `Anno` folders, so that the unpacked distributions load unchanged. Tables may be
    separated by commas, semicolons, tabs or spaces, in UTF-8, UTF-16 or Latin-1. File names are in the column
    `file_name`, as in the `metadata.csv` of Hugging Face, or in the first column. A warning names ignored columns and
    rows.

    CelebA's aligned images (178 x 218), CelebAMask-HQ, AFHQ and LSUN as folders of images load unchanged. Models of 128
    and 256 pixels are trained on their centre squares; for the 64-pixel models of DDIM see `crop`.

    Parameters
    ----------
    source : str or Path
        "avataaars" for the bundled set, "eurosat" for what `workbench data eurosat` wrote, a folder of images (or with
        an `images.zip`), or a zip. `./avataaars` is a folder.
    size : int, (height, width) or (channels, height, width), optional
        Pixels to resize the largest centred part of that aspect ratio to; one number is the side of a square. One
        channel is grey, 3 (default) are colours, and a model's `image_shape` has all three. Default: the native size,
        which must then be the same for all, and an array's channels.
    labels : str or Path, optional
        Table of labels, with a row for each image. Default: `attributes.csv` (or .tsv), else `metadata.csv`, else
        `list_attr_celeba.txt` or .csv, else `CelebAMask-HQ-attribute-anno.txt`, else none. "folders" makes an attribute
        of each class's folder, as in AFHQ (`train/cat/...`) and exported LSUN (`bedroom_train/...`).
    crop : {"celeba64"}, optional
        A square other than the centre, see `CROPS`.
    skip_broken : bool, default False
        Decode all images now and leave out broken ones, with a warning that names them. By default a broken image is
        an error on access.

    Returns
    -------
    LabelledImages
        Sorted by name. Columns of yes and no, or true and false, hold 1 and 0.

    Raises
    ------
    FileNotFoundError
        If the source or the label file does not exist.
    ValueError
        If there are no images; if images have no row, or rows are repeated or hold values that are not numbers; if
        a size is below 1; if the crop is unknown, or all images are of one class.

    Warns
    -----
    UserWarning
        About ignored files that are not images, rows without image, columns of text, zeros beside -1 and 1, and tables
        that are not read.
    """
    shape = _checked(size)
    if crop is not None:
        one_of("crop", crop, CROPS)
    files, names, others = find_files(folder_of(source))
    if labels == "folders":
        table = classes_of(names, str(source))
    else:
        found = find_labels(files, others) if labels is None else _given_labels(paths.local(labels))
        table = pd.DataFrame(index=pd.Index(names, name="file"))
        if found is not None:
            # CelebA's list in a folder above may be of other images.
            above = labels is None and Path(found[1]).name in LISTS and files.path not in Path(found[1]).parents
            try:
                table = labels_of(names, *found)
                words = f"labels are read from {found[1]}, outside of {source}"
            except ValueError as error:
                if not above:
                    raise
                words = f"{found[1]} is taken for a list of other images: {error}"
            if above:
                warnings.warn(words, stacklevel=2)
    warn_of_others(source, others, tables=labels is None and found is None)
    images = LabelledImages(table, files, shape, crop)
    return images._without_broken() if skip_broken else images


def load_image(path: str | Path | bytes, size: int | Sequence[int] | None = None) -> torch.Tensor:
    """Decode one image file.

    Parameters
    ----------
    path : str, Path or bytes
        A file that Pillow reads or a .npy array, or its content.
    size : int, (height, width) or (channels, height, width), optional
        As of `load_images`. Default: the native size.

    Returns
    -------
    Tensor of shape (channels, height, width), float32, values in [-1, 1]

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If the image cannot be decoded or has other channels, or a size is below 1.
    """
    shape = _checked(size)
    if isinstance(path, bytes):
        return _decode(lambda: path, shape, "what was given")
    path = paths.local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}; give the path of an image file")
    return _decode(path.read_bytes, shape, str(path))


def _cropped(image: Image.Image, crop: str | None) -> Image.Image:
    if crop is None:
        return image
    size, box = CROPS[crop]
    if image.size != size:
        width, height = size
        given = f"not {image.width} x {image.height}"
        raise Unsuitable(
            f"the crop {crop!r} is for images of {width} x {height} pixels, {given}; leave it out for others"
        )
    return image.crop(box)


def _checked(size: int | Sequence[int] | None) -> tuple[int, int, int] | None:
    return None if size is None else shape_of(size)


class BrokenImage(ValueError):
    """A file that cannot be decoded."""


_SKIP = ", or leave such out by skip_broken=True (--skip-broken)"


def _decode(
    read: Callable[[], bytes],
    shape: tuple[int, int, int] | None,
    where: str,
    crop: str | None = None,
    remedy: str = "",
) -> torch.Tensor:
    try:
        content = io.BytesIO(read())
        if content.getvalue().startswith(np.lib.format.MAGIC_PREFIX):
            if crop is not None:
                raise Unsuitable(f"the crop {crop!r} is for pictures; leave it out for arrays")
            return array_to_tensor(np.load(content, allow_pickle=False), shape)
        with Image.open(content) as image:
            return picture_to_tensor(_cropped(image, crop), shape)
    except Unsuitable as error:
        raise ValueError(f"{where}: {error}") from error
    except Exception as error:  # Pillow's decoders raise anything
        reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
        text = f"{where} cannot be decoded as an image ({reason}); replace it or remove it{remedy}"
        raise BrokenImage(text) from error


def _given_labels(path: Path) -> tuple[bytes, str]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no label file {path}; give a CSV file or CelebA's list_attr_celeba.txt")
    return path.read_bytes(), str(path)
