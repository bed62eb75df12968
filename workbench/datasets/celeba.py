"""CelebA as the 64-pixel models of DDIM saw it (Liu et al. 2015): aligned faces, cropped and resized, in parts.

The faces are not bundled. As with `eurosat`, the part of a face follows from its file name alone.
"""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

from PIL import Image
from tqdm.auto import tqdm

from workbench.datasets.eurosat import PARTS, part_of
from workbench.datasets.labelled import load_images
from workbench.datasets.labelled_folder import write_folder
from workbench.diffusion.images import to_bytes
from workbench.io import one_of

ORIGIN = "mmlab.ie.cuhk.edu.hk/projects/CelebA.html"


def build(source: str | Path, *, part: int = 10, out: str | Path, progress: bool = True) -> Path:
    """Write the faces of a part as a labelled folder of 64 x 64 pixels that `load_images` reads.

    Parameters
    ----------
    source : str or Path
        Folder or zip with CelebA's aligned images (178 x 218) and `list_attr_celeba.txt` or .csv in it or beside it, as
        published.
    part : {0, 1, 10}
        0 is for the labeller, 1 for the judge, 10 for edits: 45%, 45% and 10% of the faces. All of them are among
        those that a published model was trained on.
    out : str or Path
        Folder for `images.zip`, PNG files of the square that `CROPS["celeba64"]` names, and `attributes.csv` of 0 and
        1. Made if missing; files of these names are replaced.
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
        If its images are of another size or have no attributes, none belongs to the part, or there is no such part.
    """
    one_of("part", part, PARTS)
    images = load_images(source, size=64, crop="celeba64")
    chosen = [i for i, name in enumerate(images.labels.index) if part_of(name) == part]
    if not images.names or not chosen:
        what = f"face of part {part}" if images.names else "list_attr_celeba.txt or .csv beside its images"
        raise ValueError(f"{source} has no {what}; give CelebA's aligned images as published ({ORIGIN})")

    def faces():
        for i in tqdm(chosen, "faces", unit="image", disable=not progress):
            png, pixels = io.BytesIO(), to_bytes(images[[i]], progress=False)[0]
            Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(png, "PNG")
            row = images.labels.iloc[i]
            yield f"{PurePosixPath(row.name).stem}.png", png.getvalue(), row.to_dict()

    return write_folder(out, images.names, faces())
