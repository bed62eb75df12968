"""Labelled images from a folder or a zip, decoded only when they are asked for.

Every picture becomes RGB the same way: EXIF rotation applied, transparency composited on white, 16 bits scaled to 8,
the centre square (or another one, by name) cropped, resized by antialiased bicubic, values 0..255 mapped to [-1, 1].
"""

from __future__ import annotations

import hashlib
import io
import os
import posixpath
import re
import struct
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm.auto import tqdm

from workbench import paths

BUNDLED = "avataaars"
LISTS = ("list_attr_celeba.txt", "CelebAMask-HQ-attribute-anno.txt")
LABEL_FILES = ("attributes.csv", *LISTS)
FOLDERS = "folders"
_PARTS = ("train", "val", "test")

CROPS = {"celeba64": ((178, 218), (25, 57, 153, 185))}
"""Squares other than the centre one: size of the images that it is for, and (left, top, right, bottom).

"celeba64" is what the 64-pixel CelebA models of DDIM see of the aligned images: 128 pixels around (89, 121).
"""
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif")

Indices = slice | Sequence[int] | Sequence[bool] | np.ndarray | pd.Series | torch.Tensor

# What Pillow's decoders and zipfile raise on damaged data.
_UNDECODABLE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    RuntimeError,  # a zip with a password, or packed in a way that zipfile does not know
    Image.DecompressionBombError,
)


@dataclass(frozen=True, repr=False, eq=False)
class LabelledImages:
    """Images of one source with a table of labels; made by `load_images`.

    `images[3]` is one image, `images[:8]` or `images[[5, 2]]` a stack. Nothing is kept in memory but the names and the
    labels, so that the record can be pickled, sent to other processes and used as a torch dataset.

    Attributes
    ----------
    labels : pandas.DataFrame
        One row an image in the order of the images, index: file name. Columns that came as -1/1 hold 0/1; NaN stays.
        No columns if there is no label file.
    """

    labels: pd.DataFrame
    _files: _Folder | _Zip | _Parts
    _size: int | None
    _crop: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def __repr__(self) -> str:
        side = f"{self._size}x{self._size}" if self._size else "native size"
        known = ", ".join(self.names[:3]) + (", ..." if len(self.names) > 3 else "")
        return f"LabelledImages({len(self)} images, {side}, {len(self.names)} attributes: {known or 'none'})"

    def __getitem__(self, index: int | Indices) -> torch.Tensor:
        """Decode one image or several.

        Parameters
        ----------
        index : int, slice, sequence of int or boolean mask

        Returns
        -------
        Tensor of shape (3, size, size) or (k, 3, size, size), float32, values in [-1, 1]

        Raises
        ------
        IndexError
            If there is no such image.
        ValueError
            If an image cannot be decoded, or differs in size while no size was asked for.
        """
        positions = self._positions(index)
        if positions.ndim == 0:
            return self._decode(int(positions))
        stack = torch.empty(len(positions), 3, self.size, self.size)
        for row, position in zip(stack, positions, strict=True):
            row.copy_(self._decode(int(position)))
        return stack

    @property
    def names(self) -> list[str]:
        """Names of the attributes."""
        return list(self.labels.columns)

    @cached_property
    def size(self) -> int:
        """Side of the images in pixels: the one asked for, or else that of the first image."""
        if self._size is not None or not len(self):
            return self._size or 0
        name = self.labels.index[0]
        try:
            with Image.open(io.BytesIO(self._files.read(name))) as image:
                return min(_cropped(image, self._crop).size)
        except _UNDECODABLE as error:
            raise _undecodable(self._files.describe(name), error) from error

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256, in hex, over the size and crop and over each image's name, length and CRC-32, in order.

        The same for a folder and for a zip of it. Labels do not enter.
        """
        crop = "" if self._crop is None else f" {self._crop}"
        digest = hashlib.sha256(f"{self.size}{crop}\n".encode())
        for name in tqdm(self.labels.index, "fingerprint", unit="image", delay=2, leave=False):
            length, checksum = self._files.checksum(name)
            digest.update(f"{name}\0{length}\0{checksum}\n".encode())
        return digest.hexdigest()

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
            known = ", ".join(self.names) or "none: no label file was found"
            raise ValueError(f"there is no attribute {name!r}; the known ones are {known}")
        return self.labels[name]

    def batches(self, batch_size: int) -> Iterator[torch.Tensor]:
        """Stream all images in order.

        Parameters
        ----------
        batch_size : int
            Images a batch, 1 or more; the last one may be smaller.

        Yields
        ------
        Tensor of shape (k, 3, size, size), float32, values in [-1, 1]

        Raises
        ------
        ValueError
            If `batch_size` is below 1 or an image cannot be decoded.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; give 1 or more")
        return (self[start : start + batch_size] for start in range(0, len(self), batch_size))

    def at_size(self, size: int | None) -> LabelledImages:
        """The same images at another size.

        Parameters
        ----------
        size : int or None
            Side in pixels; None for the native size.

        Returns
        -------
        LabelledImages

        Raises
        ------
        ValueError
            If the size is below 1.
        """
        return replace(self, _size=_checked(size))

    def select(self, indices: Indices) -> LabelledImages:
        """Some of the images with their labels.

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
            If there is no such image or the mask has another length.
        """
        return replace(self, labels=self.labels.iloc[np.atleast_1d(self._positions(indices))])

    def _positions(self, indices: int | Indices) -> np.ndarray:
        chosen = indices if isinstance(indices, slice) else np.asarray(indices)
        if not isinstance(chosen, slice) and chosen.size == 0:
            chosen = chosen.astype(int)
        try:
            return np.asarray(np.arange(len(self))[chosen])
        except IndexError as error:
            raise IndexError(
                f"there are {len(self)} images, give positions below that or a boolean mask of that length ({error})"
            ) from error

    def _decode(self, position: int) -> torch.Tensor:
        name = self.labels.index[position]
        where = self._files.describe(name)
        try:
            content = self._files.read(name)
        except _UNDECODABLE as error:
            raise _undecodable(where, error) from error
        image = _decode(content, self._size, where, self._crop)
        if image.shape[-1] != self.size:
            raise ValueError(
                f"{where} is {image.shape[-1]} pixels wide after cropping and the first image {self.size}; "
                "give the size that all should have, such as size=64"
            )
        return image


def load_images(
    source: str | Path, *, size: int | None = None, labels: str | Path | None = None, crop: str | None = None
) -> LabelledImages:
    """Open a set of images with its labels; images are decoded later, when they are asked for.

    Labels are looked for inside of the folder or zip, then beside the zip; CelebA's and CelebAMask-HQ's lists also
    beside the folder. Names are paths relative to the source, without a folder that is common to all of them.

    CelebA's aligned images (178 x 218), CelebAMask-HQ, AFHQ and LSUN as folders of images load as they are. Their
    centre squares are what models of 128 and 256 pixels are trained on; for the 64-pixel models of DDIM see `crop`.

    Parameters
    ----------
    source : str or Path
        "avataaars" for the bundled set, a folder of images (or with an `images.zip`), or a zip. `./avataaars` is a
        folder.
    size : int, optional
        Side in pixels that the images are resized to. Default: the native size, which must then be one for all.
    labels : str or Path, optional
        Label file. A `.txt` file is read as CelebA's list (with or without its first line, the count), anything else as
        CSV with the file name in the first column. Default: `attributes.csv`, else `list_attr_celeba.txt`, else
        `CelebAMask-HQ-attribute-anno.txt`, else none. "folders" makes an attribute of each class's folder, as AFHQ
        (`train/cat/...`) and exported LSUN (`bedroom_train/...`) have them.
    crop : {"celeba64"}, optional
        Another square than the centre one, see `CROPS`.

    Returns
    -------
    LabelledImages
        Sorted by name.

    Raises
    ------
    FileNotFoundError
        If the source or the label file does not exist.
    ValueError
        If there are no images; if rows and images do not match (rows of CelebA's list may lack an image), are repeated
        or hold something that is not a number; if the size is below 1; if the crop is not known, or all images are of
        one class.
    """
    size = _checked(size)
    if crop is not None and crop not in CROPS:
        raise ValueError(f"there is no crop {crop!r}; there are {', '.join(CROPS)}, and the centre square by default")
    files = _find_files(paths.data() / BUNDLED if source == BUNDLED else paths.local(source))
    names = files.names()
    if labels == FOLDERS:
        return LabelledImages(_classes(names, source), files, size, crop)
    found = _find_labels(files) if labels is None else _given_labels(paths.local(labels))
    if found is None:
        table = pd.DataFrame(index=pd.Index(names, name="file"))
    else:
        where, content = found
        is_list = where.endswith(".txt")
        table = _match((_read_list if is_list else _read_csv)(content, where), names, where, spare_rows=is_list)
    return LabelledImages(table, files, size, crop)


def load_pair(positive: str | Path, negative: str | Path, *, name: str, size: int | None = None) -> LabelledImages:
    """Open two folders or zips as one labelled set: images with an attribute and images without it.

    The way to a boundary for what no label file names, such as pictures that a text-to-image model made for two
    prompts. Names are `positive/...` and `negative/...`.

    Parameters
    ----------
    positive, negative : str or Path
        Folders or zips of images; label files in them are not read.
    name : str
        Of the attribute.
    size : int, optional
        As in `load_images`.

    Returns
    -------
    LabelledImages
        The images of `positive`, label 1, and then those of `negative`, label 0.

    Raises
    ------
    FileNotFoundError
        If one does not exist.
    ValueError
        If one has no images, or both are the same place.
    """
    positive, negative = paths.local(positive), paths.local(negative)
    if positive.resolve() == negative.resolve():
        raise ValueError(f"{positive} is given for the images with and without {name}; give two folders")
    parts = {"positive": _find_files(positive), "negative": _find_files(negative)}
    names = {part: [f"{part}/{file}" for file in files.names()] for part, files in parts.items()}
    labels = pd.Series(
        [int(part == "positive") for part, files in names.items() for _ in files],
        index=pd.Index([file for files in names.values() for file in files], name="file"),
        name=name,
    )
    return LabelledImages(labels.to_frame(), _Parts(parts), _checked(size))


def load_image(path: str | Path | bytes, size: int | None = None) -> torch.Tensor:
    """Decode one image file.

    Parameters
    ----------
    path : str, Path or bytes
        A file, or the content of one.
    size : int, optional
        Side in pixels. Default: the native size, cropped to a square.

    Returns
    -------
    Tensor of shape (3, size, size), float32, values in [-1, 1]

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it cannot be decoded, or the size is below 1.
    """
    if isinstance(path, bytes):
        return _decode(path, size, "what was given")
    path = paths.local(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no image {path}; give the path of an image file")
    return _decode(path.read_bytes(), size, str(path))


def to_tensor(image: Image.Image | str | Path, size: int | None = None) -> torch.Tensor:
    """Convert one image as every image of a `LabelledImages` is converted.

    Parameters
    ----------
    image : PIL.Image.Image, str or Path
        A picture of any 8- or 16-bit mode, or the path of one.
    size : int, optional
        Side in pixels. Default: the native size, cropped to a square.

    Returns
    -------
    Tensor of shape (3, size, size), float32, values in [-1, 1]

    Raises
    ------
    FileNotFoundError
        If a path does not exist.
    ValueError
        If the image cannot be decoded or has 32-bit pixels, or the size is below 1.
    """
    if not isinstance(image, Image.Image):
        return load_image(image, size)
    square = _crop_square(_to_rgb(image))
    if _checked(size) is not None:
        square = square.resize((size, size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(square)).permute(2, 0, 1).contiguous().float() / 127.5 - 1


class _Unsuitable(ValueError):
    """A sound image that is not what was asked for."""


def _to_rgb(image: Image.Image) -> Image.Image:
    image = ImageOps.exif_transpose(image)
    if image.mode in ("I", "F"):
        raise _Unsuitable("the range of 32-bit pixels is unknown; save with 8 or 16 bits a channel")
    if image.mode.startswith("I;16"):
        # Pillow's own conversion clips at 255.
        return Image.fromarray(np.rint(np.asarray(image) / 257).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("RGB")
    return image.convert("RGB")


def _crop_square(image: Image.Image) -> Image.Image:
    side = min(image.size)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return image.crop((left, top, left + side, top + side))


def _cropped(image: Image.Image, crop: str | None) -> Image.Image:
    if crop is None:
        return image
    size, box = CROPS[crop]
    if image.size != size:
        width, height = size
        raise _Unsuitable(
            f"the crop {crop!r} is for images of {width} x {height} pixels, not {image.width} x {image.height}; leave "
            "it out for others"
        )
    return image.crop(box)


def _checked(size: int | None) -> int | None:
    if size is not None and size < 1:
        raise ValueError(f"size is {size}; give a number of pixels of 1 or more, or None for the native size")
    return size


def _decode(content: bytes, size: int | None, where: str, crop: str | None = None) -> torch.Tensor:
    _checked(size)
    try:
        with Image.open(io.BytesIO(content)) as image:
            return to_tensor(_cropped(image, crop), size)
    except _UNDECODABLE as error:
        raise _undecodable(where, error) from error


def _undecodable(where: str, error: Exception) -> ValueError:
    if isinstance(error, _Unsuitable):
        return ValueError(f"{where}: {error}")
    reason = "its format is not known" if isinstance(error, UnidentifiedImageError) else error
    return ValueError(f"{where} cannot be decoded as an image ({reason}); replace it or remove it")


@dataclass(frozen=True)
class _Folder:
    """Image files below a folder; `prefix` is the folder common to all of them."""

    path: Path
    prefix: str = ""

    def members(self) -> list[str]:
        found, trails = [], {str(self.path): {os.path.realpath(self.path)}}
        for folder, folders, files in os.walk(self.path, followlinks=True):
            found += [Path(folder, file).relative_to(self.path).as_posix() for file in files]
            trail = trails.pop(folder)
            inside = {name: os.path.realpath(Path(folder, name)) for name in folders}
            folders[:] = [name for name in folders if inside[name] not in trail]  # a link to where it lies has no end
            trails |= {os.path.join(folder, name): {*trail, inside[name]} for name in folders}
        return found

    def names(self) -> list[str]:
        return _image_names(self.members(), self.prefix)

    def describe(self, name: str) -> str:
        return str(self.path / (self.prefix + name))

    def read(self, name: str) -> bytes:
        return (self.path / (self.prefix + name)).read_bytes()

    def checksum(self, name: str) -> tuple[int, int]:
        content = self.read(name)
        return len(content), zlib.crc32(content)


@dataclass(frozen=True)
class _Zip:
    """Image files in a zip. Holds no handle, so that it can be pickled and used after a fork."""

    path: Path
    stamp: tuple[int, int]
    prefix: str = ""

    def members(self) -> list[str]:
        return self._handle().namelist()

    def names(self) -> list[str]:
        return _image_names(self.members(), self.prefix)

    def describe(self, name: str) -> str:
        return f"{name} in {self.path}"

    def read(self, name: str) -> bytes:
        return self._handle().read(self.prefix + name)

    def checksum(self, name: str) -> tuple[int, int]:
        member = self._handle().getinfo(self.prefix + name)
        return member.file_size, member.CRC

    def _handle(self) -> zipfile.ZipFile:
        return _open_zip(self.path, self.stamp, os.getpid())


@dataclass(frozen=True)
class _Parts:
    """Several sources as one; a name begins with that of its part."""

    parts: dict[str, _Folder | _Zip]

    def describe(self, name: str) -> str:
        part, _, file = name.partition("/")
        return self.parts[part].describe(file)

    def read(self, name: str) -> bytes:
        part, _, file = name.partition("/")
        return self.parts[part].read(file)

    def checksum(self, name: str) -> tuple[int, int]:
        part, _, file = name.partition("/")
        return self.parts[part].checksum(file)


@lru_cache(maxsize=8)
def _open_zip(path: Path, stamp: tuple[int, int], process: int) -> zipfile.ZipFile:
    """One handle a process (a forked one would share the position in the file) and a state of the file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a complete zip ({error}); copy or build it again") from error


def _find_files(source: Path) -> _Folder | _Zip:
    if source.is_dir():
        files = _Folder(source)
        if not files.names() and (source / "images.zip").is_file():
            files = _zip(source / "images.zip")
    elif source.is_file():
        with source.open("rb") as file:
            if not file.read(2) == b"PK" and not zipfile.is_zipfile(source):
                what = "a single image" if source.suffix.lower() in SUFFIXES else "no zip"
                raise ValueError(f"{source} is {what}; give a folder or a zip of images")
        files = _zip(source)
    else:
        raise FileNotFoundError(
            f"there is no folder or zip {source}; give a folder of images, a zip of images, or {BUNDLED!r}"
        )
    names = files.names()
    if not names:
        raise ValueError(f"{source} holds no images; give a folder or a zip with {', '.join(SUFFIXES)} files")
    return replace(files, prefix=_common_folder(names))


def _zip(path: Path) -> _Zip:
    state = path.stat()
    return _Zip(path.resolve(), (state.st_mtime_ns, state.st_size))


def _image_names(members: Iterable[str], prefix: str) -> list[str]:
    """Sorted names of the images, without hidden files and the metadata folder of macOS zips."""
    return sorted(
        member.removeprefix(prefix)
        for member in members
        if member.lower().endswith(SUFFIXES)
        and not any(part.startswith((".", "__MACOSX")) for part in member.split("/"))
    )


def _common_folder(names: Iterable[str]) -> str:
    folders = {posixpath.dirname(name) for name in names}
    common = posixpath.commonpath(folders) if folders else ""
    return common and common + "/"


def _find_labels(files: _Folder | _Zip) -> tuple[str, bytes] | None:
    """Place and content of the label file that belongs to the images."""
    if isinstance(files, _Zip):
        inside = {posixpath.basename(member): member for member in files.members()}
        for name in LABEL_FILES:
            if name in inside:
                return f"{files.path}/{inside[name]}", replace(files, prefix="").read(inside[name])
        candidates = [files.path.parent / name for name in LABEL_FILES]
    else:
        beside = [files.path.resolve().parent / name for name in LISTS]
        candidates = [*(files.path / name for name in LABEL_FILES), *beside]
    return next(((str(path), path.read_bytes()) for path in candidates if path.is_file()), None)


def _classes(names: list[str], source: str | Path) -> pd.DataFrame:
    """One attribute a class: the first folder of a name that is no part of a data set."""
    parts = [[part for part in name.split("/")[:-1] if part not in _PARTS] for name in names]
    classes = pd.Series([re.sub(r"_(train|val|test)(_lmdb)?$", "", (part or [""])[0]) for part in parts])
    if classes.nunique() < 2 or (classes == "").any():
        raise ValueError(
            f'labels="folders" takes a folder for each of two classes or more; {source} has '
            f"{', '.join(sorted(set(classes) - {''})) or 'none'}"
        )
    table = pd.get_dummies(classes).astype(int)
    return table.set_index(pd.Index(names, name="file"))


def _given_labels(path: Path) -> tuple[str, bytes]:
    if not path.is_file():
        raise FileNotFoundError(f"there is no label file {path}; give a CSV file or CelebA's list_attr_celeba.txt")
    return str(path), path.read_bytes()


def _read_csv(content: bytes, where: str) -> pd.DataFrame:
    table = _parse(content, where)
    return _to_numbers(table.set_index(table.columns[0]), where)


def _read_list(content: bytes, where: str) -> pd.DataFrame:
    """CelebA's list: the count (may be missing), the names, then a line an image."""
    head = [line.split() for line in content[:100_000].decode("utf-8-sig", "replace").split("\n")[:3]]
    count = int(head.pop(0)[0]) if len(head[0]) == 1 and head[0][0].isdigit() else None
    if len(head) < 2 or not head[1]:
        raise ValueError(f"{where} has no rows; CelebA's list has a line of names, then a line an image")
    names, first_row = head[:2]
    if len(names) < len(first_row):
        names = ["file", *names]
    skipped = 1 if count is None else 2
    table = _parse(content, where, sep=r"\s+", header=None, names=names, skiprows=skipped).set_index(names[0])
    if count not in (None, len(table)):
        raise ValueError(f"{where} announces {count} rows and has {len(table)}; copy it again")
    short = table.index[table.isna().any(axis=1)]
    if len(short):
        raise ValueError(f"{where} has too few values in {_some(short)}; give {len(names) - 1} a row")
    return _to_numbers(table, where)


def _parse(content: bytes, where: str, **options) -> pd.DataFrame:
    """File names in the first column as text, whatever they look like."""
    try:
        table = pd.read_csv(io.BytesIO(content), converters={0: str}, encoding="utf-8-sig", **options)
    except (ValueError, OSError) as error:
        raise ValueError(f"{where} cannot be read as a table ({' '.join(str(error).split())}); correct it") from error
    # pandas takes surplus columns for an index.
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{where} has rows with more values than the {table.shape[1]} columns it names; correct it")
    return table


def _to_numbers(table: pd.DataFrame, where: str) -> pd.DataFrame:
    """Numeric columns; those of -1 and 1 become 0 and 1."""
    return pd.DataFrame(
        {name: _to_number(column, where) for name, column in table.items()}, index=table.index.str.strip()
    )


def _to_number(column: pd.Series, where: str) -> np.ndarray:
    numbers = pd.to_numeric(column, errors="coerce")
    wrong = numbers.isna() & column.notna()
    if wrong.any():
        row = wrong.idxmax()
        raise ValueError(
            f"column {column.name} of {where} holds {column[wrong].iloc[0]!r} in row {row}; labels are numbers or empty"
        )
    if numbers.dtype == bool:
        numbers = numbers.astype(int)
    values = set(numbers.dropna())
    if -1 in values and values <= {-1, 1}:
        numbers = (numbers + 1) // 2
    return numbers.to_numpy()


def _match(table: pd.DataFrame, names: list[str], where: str, *, spare_rows: bool) -> pd.DataFrame:
    """Rows in the order of the images."""
    table.index = table.index.str.removeprefix(_common_folder(table.index))
    table.index.name = "file"
    repeated = table.index[table.index.duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{where} has more than one row for {_some(repeated)}; keep one each")
    images = pd.Index(names)
    unlabelled, imageless = images.difference(table.index), table.index.difference(images)
    if len(unlabelled) or (len(imageless) and not spare_rows):
        raise ValueError(
            f"{where} does not match the images: {len(unlabelled)} of {len(images)} images have no row "
            f"({_some(unlabelled)}) and {len(imageless)} of {len(table)} rows have no image ({_some(imageless)}); "
            "the first column must hold the file names"
        )
    return table.loc[names]


def _some(names: pd.Index) -> str:
    return ", ".join(map(str, names[:3])) + (", ..." if len(names) > 3 else "") if len(names) else "none"
