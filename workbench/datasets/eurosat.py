"""The domain of EuroSAT: satellite photographs of ten kinds of land, 64 x 64 pixels (Helber et al. 2019).

The photographs are not bundled. `build` reads the published folder (EuroSAT RGB, doi.org/10.5281/zenodo.7711810, MIT
licence; contains modified Copernicus Sentinel data) and writes the parts that the bundled models were made with. The
part of a photograph follows from its file name alone, so that it is the same whichever photographs are at hand.
"""

from __future__ import annotations

import re
import zlib
from pathlib import Path, PurePosixPath

from tqdm.auto import tqdm

from workbench import paths
from workbench.datasets.labelled_folder import write_folder
from workbench.io import one_of

ORIGIN = "doi.org/10.5281/zenodo.7711810"

COUNTS = {
    "AnnualCrop": 3000,
    "Forest": 3000,
    "HerbaceousVegetation": 3000,
    "Highway": 2500,
    "Industrial": 2500,
    "Pasture": 2000,
    "PermanentCrop": 2500,
    "Residential": 3000,
    "River": 2500,
    "SeaLake": 3000,
}
"""Photographs of each class as published."""

FREQUENCIES = {name: count / sum(COUNTS.values()) for name, count in COUNTS.items()}

PARTS = (0, 1, 10)
"""0 trained the labeller, 1 the judge, both the diffusion model; 10 is held out from all of them. 45%, 45% and 10%."""

_NAME = re.compile(rf"({'|'.join(COUNTS)})_\d+\.(?i:jpe?g)")


def part_of(file: str) -> int:
    """The part of a photograph, by its name as published, such as "River_12.jpg"."""
    place = zlib.crc32(PurePosixPath(file).name.encode()) % 20
    return 10 if place < 2 else place % 2


def build(source: str | Path, *, part: int = 10, out: str | Path, progress: bool = True) -> Path:
    """Write the photographs of a part as a labelled folder that `load_images` reads.

    Parameters
    ----------
    source : str or Path
        Folder or zip with EuroSAT RGB as published, or with some of its photographs; the name of a file says its class.
    part : {0, 1, 10}
        See `PARTS`.
    out : str or Path
        Folder for `images.zip`, with the files as they are, named so that their order mixes the classes, and
        `attributes.csv`, a column of 0 and 1 for each class. Made if missing; files of these names are replaced.
    progress : bool
        Show a bar.

    Returns
    -------
    Path
        The folder.

    Raises
    ------
    FileNotFoundError
        If there is no such source.
    ValueError
        If no file of it has a name of EuroSAT's and belongs to the part, or there is no such part.
    """
    from workbench.datasets.files import find_files  # it asks domains for their names

    one_of("part", part, PARTS)
    source = paths.local(source)
    files, names, _ = find_files(source)
    wanted = [name for name in names if _NAME.fullmatch(PurePosixPath(name).name) and part_of(name) == part]
    if not wanted:
        what = f"no photograph of part {part} with a name such as Forest_1.jpg"
        raise ValueError(f"{source} has {what}; give EuroSAT RGB as published ({ORIGIN})")

    def photographs():
        for name in tqdm(wanted, "photographs", unit="image", disable=not progress):
            file = PurePosixPath(name).name
            mixed = f"{zlib.crc32(file.encode()):08x}_{file}"  # the first images by name are of all classes
            yield mixed, files.read(name), {each: int(file.startswith(f"{each}_")) for each in COUNTS}

    return write_folder(out, list(COUNTS), photographs())
