"""Data of the explorer's script as JSON: maps, colours, thumbnails, neighbours and strips of edits.

Numbers are 16 bits wide and pictures lie in sheets, so that 50,000 samples fit in a page: positions to 1/30000 of a
map's width, colours to 1/65000 of their range, and thumbnails as large as leaves room.
"""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Callable, Mapping, Sequence

import matplotlib
import numpy as np
import pandas as pd
from PIL import Image

from workbench.analysis.maps import Map
from workbench.editing.render import EditGrid
from workbench.report.alive import MOST_BYTES
from workbench.report.pictures import to_pixels
from workbench.report.style import PALETTE, colors_of, words

_PICTURE_BYTES = 8_000_000
_SIDES = (96, 64, 48, 32, 24, 16, 12, 8)
_MISSING = 65535
_SHEET = 2048
_COLUMNS = 32

Images = Callable[[slice], np.ndarray]
"""Images of some samples, of shape (m, C, H, W), values in [-1, 1]."""


def pack(
    maps: Sequence[Map],
    *,
    colours: Mapping[str, np.ndarray | pd.Series],
    names: Sequence[str] | np.ndarray,
    images: Images | None,
    neighbours: tuple[np.ndarray, str] | None,
    notes: Sequence[str] = (),
) -> str:
    """JSON of everything but the strips; ValueError if it takes more than MOST_BYTES. Numbers as names are seeds."""
    n = maps[0].points.shape[-2]
    numbered = not isinstance(names[0], str) and max(names) < 2**32
    data = {
        "n": n,
        "prefix": "seed ",
        "ids": _text(np.asarray(names, dtype=np.uint32)) if numbered else None,
        "names": None if numbered else [each if isinstance(each, str) else f"seed {each}" for each in names],
        "maps": [_packed(each) for each in maps],
        "colours": [_colour(name, pd.Series(np.asarray(values))) for name, values in colours.items()],
        "ramp": _text((matplotlib.colormaps["viridis"](np.linspace(0.08, 0.97, 256))[:, :3] * 255).astype(np.uint8)),
        "palette": PALETTE,
        "pictures": None if images is None else thumbnails(images, n),
        "neighbours": None,
        "notes": list(notes),
    }
    if neighbours is not None:
        found, how = neighbours
        data["neighbours"] = {"k": found.shape[1], "ids": _text(found.astype(np.int32)), "words": how}
    text = json.dumps(data)
    if len(text) > MOST_BYTES:
        size = f"{len(text) / 1e6:.0f} MB, and a page holds {MOST_BYTES / 1e6:.0f}"
        raise ValueError(f"{len(maps)} maps of {n} samples take {size}; leave out maps or colours, or take fewer")
    return text


def _packed(each: Map) -> dict:
    """A map within [-1, 1], its longer side filling that."""
    points = each.points.reshape(-1, *each.points.shape[-2:])
    low, high = points.min(axis=(0, 1)), points.max(axis=(0, 1))
    half = max(float((high - low).max()) / 2, 1e-12)
    within = (points - (low + high) / 2) / half
    return {
        "name": each.name,
        "axes": each.axes,
        "note": each.note,
        "frames": list(each.timesteps) if len(points) > 1 else None,
        "points": _text(((within + 1) * 32767.5).round().clip(0, 65535).astype(np.uint16)),
        "centre": ((low + high) / 2).tolist(),
        "half": half,
    }


def _colour(name: str, values: pd.Series) -> dict:
    """Colours as `colors_of` tells numbers from categories; what is missing is grey."""
    missing = (values.isna() | values.isin([np.inf, -np.inf])).to_numpy()
    if missing.all():
        raise ValueError(f"all {len(values)} values of {name!r} are NaN or infinite; leave it out")
    known = values[~missing].to_numpy()
    codes, categories = colors_of(known, len(known))
    low, high = (float(codes.min()), float(codes.max())) if categories is None else (0.0, 1.0)
    if categories is None:
        codes = np.round((codes - low) / max(high - low, 1e-300) * (_MISSING - 1))
    packed = np.full(len(values), _MISSING, dtype=np.uint16)
    packed[~missing] = codes
    note = f"grey: {missing.sum()} of {len(values)} samples have no value" if missing.any() else ""
    about = {"name": words(name), "categories": categories, "low": low, "high": high, "note": note}
    return about | {"values": _text(packed)}


def thumbnails(images: Images, n: int) -> dict:
    """Sheets of thumbnails of n samples: as large as the images, or as fit into _PICTURE_BYTES."""
    first = to_pixels(images(slice(0, min(n, 64))))
    height, width = first.shape[1:3]
    longest = max(height, width)
    start = min(longest, _SIDES[0])
    for side, exact in ((start, True), *((side, False) for side in (start, *(s for s in _SIDES if s < start)))):
        size = (max(1, round(width * side / longest)), max(1, round(height * side / longest)))
        if len(_sheet(first, size, exact=exact)) / len(first) * n <= _PICTURE_BYTES * (0.25 if exact else 1.0):
            break
    columns = max(1, min(_COLUMNS, _SHEET // size[0]))
    per = columns * max(1, _SHEET // size[1])
    sheets = [_sheet(to_pixels(images(slice(k, min(k + per, n)))), size, columns, exact) for k in range(0, n, per)]
    return {"width": size[0], "height": size[1], "columns": columns, "per": per, "sheets": sheets}


def _sheet(pictures: np.ndarray, size: tuple[int, int], columns: int = _COLUMNS, exact: bool = False) -> str:
    """Pictures side by side as the address of a WebP."""
    wide, high = size
    sheet = Image.new("RGB", (wide * min(columns, len(pictures)), high * -(-len(pictures) // columns)))
    for k, picture in enumerate(pictures):
        image = Image.fromarray(picture)
        image = image if image.size == size else image.resize(size, Image.Resampling.BOX)
        sheet.paste(image, (k % columns * wide, k // columns * high))
    data = io.BytesIO()
    sheet.save(data, format="WEBP", lossless=exact, quality=85, method=2)
    return "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode("ascii")


def strips_of(grid: EditGrid, *, title: str = "Edits", note: str = "") -> list[dict]:
    """One strip an edit of a grid; edits whose name begins with "random" are the control in each."""
    pairs = [label.partition("\n") for label in grid.row_labels]
    names = list(dict.fromkeys(name for name, _, _ in pairs))
    samples = list(dict.fromkeys(sample or "sample" for _, _, sample in pairs))
    controls = [name for name in names if name.startswith("random")]
    columns = [label.replace("\n", " ") for label in grid.column_labels]
    start = columns.index("0") if "0" in columns else len(columns) - 1
    made = []
    for name in [name for name in names if name not in controls] or names:
        lines = [name, *(control for control in controls if control != name)]
        rows = [r for line in lines for r, (own, _, _) in enumerate(pairs) if own == line]
        images = grid.images[rows].flatten(0, 1)
        height, width = images.shape[-2:]
        size = tuple(round(side * min(1, 128 / max(height, width))) for side in (width, height))
        made.append(
            {
                **{"name": name, "title": title, "note": note, "lines": lines, "samples": samples, "columns": columns},
                **{"start": start, "width": size[0], "height": size[1]},
                "sheet": _sheet(to_pixels(images), size, len(columns), max(size) <= 64),
            }
        )
    return made


def _text(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).tobytes()).decode("ascii")
