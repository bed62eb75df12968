"""Image files in folders and zips, and the tables of labels that belong to them."""

from __future__ import annotations

import os
import posixpath
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from PIL import Image

from workbench import paths
from workbench.datasets.domain import DOMAINS, domain_of
from workbench.datasets.tables import CAPTION_FILES, LABEL_FILES, LISTS, common_folder, some

BUNDLED = tuple(domain.name for domain in DOMAINS)
"""Names of images, each a folder below data."""

ARRAY = ".npy"

# Formats that Pillow names and cannot decode by itself, or only by running another program.
_NO_PICTURES = ("BUFR", "EPS", "GRIB", "HDF5", "IPTC", "MPEG", "WMF")
# What stands beside images, and nobody takes for one.
_COMPANIONS = (
    *(".csv", ".tsv", ".txt", ".xlsx", ".json", ".jsonl", ".parquet", ".xml", ".yaml", ".yml", ".md", ".html", ".pdf"),
    *(ARRAY, ".npz", ".pt", ".zip", ".log", ".py", ".part", ".db", ".ini", "license", "readme"),
)


@dataclass(frozen=True)
class Folder:
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

    def describe(self, name: str) -> str:
        return str(self.path / (self.prefix + name))

    def read(self, name: str) -> bytes:
        return (self.path / (self.prefix + name)).read_bytes()

    def checksum(self, name: str) -> tuple[int, int]:
        content = self.read(name)
        return len(content), zlib.crc32(content)


@dataclass(frozen=True)
class Zip:
    """Image files in a zip. Holds no handle, so that it can be pickled and used after a fork."""

    path: Path
    stamp: tuple[int, int]
    prefix: str = ""

    def members(self) -> list[str]:
        return self._handle().namelist()

    def describe(self, name: str) -> str:
        return f"{name} in {self.path}"

    def read(self, name: str) -> bytes:
        return self._handle().read(self.prefix + name)

    def checksum(self, name: str) -> tuple[int, int]:
        member = self._handle().getinfo(self.prefix + name)
        return member.file_size, member.CRC

    def _handle(self) -> zipfile.ZipFile:
        return _open_zip(self.path, self.stamp, os.getpid())


@lru_cache(maxsize=8)
def _open_zip(path: Path, stamp: tuple[int, int], process: int) -> zipfile.ZipFile:
    """One handle a process (a forked one would share the position in the file) and a state of the file."""
    try:
        return zipfile.ZipFile(path)
    except zipfile.BadZipFile as error:
        raise ValueError(f"{path} is not a complete zip ({error}); copy or build it again") from error


def folder_of(source: str | Path) -> Path:
    """Folder or file of images: below data by the name of a domain, else as the path says."""
    if source not in BUNDLED:
        return paths.local(source)
    folder, origin = paths.data() / source, domain_of(source).origin
    if origin and not folder.is_dir():
        raise FileNotFoundError(f"the images of {source} are not bundled; {origin}")
    return folder


def find_files(source: Path) -> tuple[Folder | Zip, list[str], list[str]]:
    """Where images lie, their sorted names, and the sorted paths of all other files that are not hidden.

    Arrays (.npy) are images where there are no pictures; beside pictures, they may be features of them.
    """
    suffixes = image_suffixes()
    if source.is_dir():
        files = Folder(source)
    elif source.suffix.lower() in (*suffixes, ARRAY):
        raise ValueError(f"{source} is a single image; give a folder or a zip of images")
    elif source.is_file():
        state = source.stat()
        files = Zip(source.resolve(), (state.st_mtime_ns, state.st_size))
    else:
        raise FileNotFoundError(
            f"there is no folder or zip {source}; give a folder of images, a zip of images, or one of "
            f"{', '.join(BUNDLED)}"
        )
    members = sorted(name for name in files.members() if not _is_hidden(name))
    images = [name for name in members if name.lower().endswith(suffixes)]
    if not images and (source / "images.zip").is_file():
        return find_files(source / "images.zip")
    images = images or [name for name in members if name.lower().endswith(ARRAY)]
    others = sorted({*members}.difference(images))
    if not images:
        there = f" (there is {some(others)})" if others else ""
        raise ValueError(
            f"{source} holds no images{there}; give a folder or a zip with .png, .jpg or other images, or .npy arrays"
        )
    files = replace(files, prefix=common_folder(images))
    return files, [name.removeprefix(files.prefix) for name in images], others


def _is_hidden(name: str) -> bool:
    """Whether it is a folder of a zip, a hidden file, or metadata of macOS."""
    return name.endswith("/") or any(part.startswith((".", "__MACOSX")) for part in name.split("/"))


def image_suffixes() -> tuple[str, ...]:
    """Extensions of all that Pillow decodes, with its plugins that are registered now."""
    known = Image.registered_extensions()  # fills OPEN; an .mpo is opened as the JPEG that it begins with
    return tuple(end for end, kind in known.items() if kind in {*Image.OPEN, "MPO"}.difference(_NO_PICTURES))


def warn_of_others(source: str | Path, others: list[str], *, tables: bool = False) -> None:
    """Name files that are skipped, and tables if these are not read either."""
    notes, skipped = [], [name for name in others if not name.lower().endswith(_COMPANIONS)]
    if skipped:
        notes.append(f"files without an extension of an image are skipped: {len(skipped)} ({some(skipped)})")
    endings = (".csv", ".tsv", ".jsonl", ".parquet")
    unread = [name for name in others if name.lower().endswith(endings) and name not in CAPTION_FILES]
    if tables and unread:
        notes.append(
            f"no labels are read, since no table is called {LABEL_FILES[0]} ({some(unread)}); give one as labels="
        )
    if notes:
        warnings.warn(f"{source}: {'; '.join(notes)}", stacklevel=3)


def find_labels(files: Folder | Zip, others: list[str]) -> tuple[bytes, str] | None:
    """Content and place of the label file that belongs to the images."""
    # Of a folder: a table that lies above all images, or in an `Anno` that does.
    inside: dict[str, str] = {}
    for member in sorted(others, key=lambda member: member.count("/"), reverse=True):
        folder = posixpath.dirname(member)
        above = posixpath.dirname(folder) if posixpath.basename(folder) == "Anno" else folder
        if isinstance(files, Zip) or files.prefix.startswith(above and above + "/"):
            inside[posixpath.basename(member)] = member
    for name in LABEL_FILES:
        if name in inside:
            whole = replace(files, prefix="")
            return whole.read(inside[name]), whole.describe(inside[name])
    place = files.path.resolve()
    candidates = [place.parent / name for name in LABEL_FILES if isinstance(files, Zip)]
    candidates += [above / part / name for above in place.parents[:2] for part in ("", "Anno") for name in LISTS]
    return next(((path.read_bytes(), str(path)) for path in candidates if path.is_file()), None)
