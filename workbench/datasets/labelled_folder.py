"""Write labelled images as the domains keep them: a folder of one zip and one table, which `load_images` reads."""

from __future__ import annotations

import csv
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from workbench import paths
from workbench.io import written


def write_folder(
    out: str | Path, attributes: Sequence[str], images: Iterable[tuple[str, bytes, Mapping[str, int | float]]]
) -> Path:
    """Write `images.zip` and `attributes.csv` of images with their file names and labels; returns the folder.

    Files of these names are replaced, both at once at the end. The same images give the same bytes.
    """
    out = paths.writable(out, folder=True)
    with (
        written(out / "attributes.csv") as table,
        written(out / "images.zip") as archive,
        zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as members,
        table.open("w", newline="", encoding="utf-8") as text,
    ):
        rows = csv.DictWriter(text, ["file", *attributes], lineterminator="\n")
        rows.writeheader()
        for file, content, labels in images:
            members.writestr(_stamped(file), content)
            rows.writerow({"file": file, **labels})
    return out


def _stamped(file: str) -> zipfile.ZipInfo:
    """Member without anything that depends on the time or the system."""
    member = zipfile.ZipInfo(file, date_time=(1980, 1, 1, 0, 0, 0))
    member.create_system = 3
    member.external_attr = 0o644 << 16
    return member
