"""Tables of a benchmark as files: of full precision, or rounded so that a record of it stays small."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from PIL import Image

from workbench.diffusion.images import to_bytes

ORDER = ["method", "attribute", "repeat", "seed", "scale"]
"""Rows in this order compress well."""

DIGITS = ("logit", "rms", "psnr_outside", "perceptual")
"""Columns of edits that are rounded to 3 significant digits; a logit from 10 on to a hundredth."""

THOUSANDTHS = ("identity", "s_dir", "clip_gain", "consistency")
"""Columns that are rounded to a thousandth."""

CHANGES = 500
"""Changes of probabilities are rounded to one part in so many."""

RECORDED_STRIPS = 2
"""Samples whose strips a record keeps, of those that are shown."""

QUALITY = 80
"""Of the lossy WebP of these strips."""


def rounded(edits: pd.DataFrame) -> pd.DataFrame:
    """Edits as a record has them: `DIGITS`, `THOUSANDTHS`, changes of the attributes to 1 / `CHANGES`.

    `after` follows from the rounded logit, which keeps its sign, and `psnr` from the rounded rms. So each sample has
    the attribute, before and after, exactly where it had it.
    """
    found = edits.copy()
    for name in found:
        if name in DIGITS:
            values = found[name].to_numpy(dtype=float)
            kept = _significant(values)
            # The order of a sample's logits matters, and a weak edit changes a large one by little.
            kept = np.where(np.abs(values) >= 10, values.round(2), kept) if name == "logit" else kept
            found[name] = kept.astype(np.float32)
        elif name in THOUSANDTHS:
            found[name] = found[name].astype(float).round(3).astype(np.float32)
        elif name.startswith("change "):
            found[name] = ((found[name] * CHANGES).round() / CHANGES).astype(np.float32)
    return _with_derived(found)[list(edits.columns)].sort_values(ORDER, ignore_index=True)


def _with_derived(edits: pd.DataFrame) -> pd.DataFrame:
    """Edits with `after` of the logit and `psnr` of the rms."""
    with np.errstate(divide="ignore"):
        psnr = 20.0 * np.log10(2.0 / edits["rms"].astype(float))
    return edits.assign(after=probability(edits["logit"]), psnr=psnr)


def probability(logits: np.ndarray | pd.Series) -> np.ndarray:
    """Probabilities of logits, float64."""
    with np.errstate(over="ignore"):
        return 1.0 / (1.0 + np.exp(-np.asarray(logits, dtype=float)))


def _significant(values: np.ndarray, digits: int = 3) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = 10.0 ** (np.floor(np.log10(np.abs(values))) - digits + 1)
        found = np.round(values / unit) * unit
    return np.where(np.isfinite(found), found, values)  # 0, infinite and unknown ones stay


def write_edits(edits: pd.DataFrame, path: Path, *, small: bool = False) -> None:
    """Write edits as Parquet; `small` ones are `rounded`, and without what follows from other columns."""
    if not small:
        edits.to_parquet(path, index=False)
        return
    kept = rounded(edits).drop(columns=["after", "psnr"])
    kept.to_parquet(path, index=False, compression="zstd", compression_level=19)


def read_edits(path: Path) -> pd.DataFrame:
    """Edits that `write_edits` wrote, with all of their columns."""
    edits = pd.read_parquet(path)
    if "after" in edits:
        return edits
    columns = list(edits.columns)
    columns.insert(columns.index("logit"), "after")
    columns.insert(columns.index("rms") + 1, "psnr")
    return _with_derived(edits).reindex(columns=columns)


def write_strips(strips: Mapping[tuple[str, str], np.ndarray], path: Path, *, small: bool = False) -> None:
    """Write strips as WebP in a table; `small` ones are lossy, and of the first `RECORDED_STRIPS` samples."""
    options = {"quality": QUALITY} if small else {"lossless": True}
    rows = []
    for (method, attribute), strip in strips.items():
        strip = strip[:RECORDED_STRIPS] if small else strip
        rows.append([method, attribute, list(strip.shape), _packed(strip, **options) if strip.size else b""])
    pd.DataFrame(rows, columns=["method", "attribute", "shape", "webp"]).to_parquet(path, index=False)


def read_strips(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """Strips that `write_strips` wrote."""
    table = pd.read_parquet(path)
    return {(row.method, row.attribute): _unpacked(row.webp, row.shape) for row in table.itertuples()}


def _packed(strip: np.ndarray, **options) -> bytes:
    """Samples and their edits, (n, k, C, H, W) in [-1, 1], as a picture: a row a sample."""
    n, k, c, height, width = strip.shape
    values = to_bytes(torch.from_numpy(strip), progress=False).numpy()
    sheet = values.transpose(0, 3, 1, 4, 2).reshape(n * height, k * width, c)
    found = io.BytesIO()
    # WebP has no grey pictures; a single channel is written three times.
    Image.fromarray(np.broadcast_to(sheet, (*sheet.shape[:2], 3)).copy()).save(found, "WEBP", method=6, **options)
    return found.getvalue()


def _unpacked(picture: bytes, shape: np.ndarray) -> np.ndarray:
    n, k, c, height, width = shape
    if not picture:
        return np.zeros(shape, dtype=np.float32)
    sheet = np.asarray(Image.open(io.BytesIO(picture)).convert("RGB"))[..., :c]
    values = sheet.reshape(n, height, k, width, c).transpose(0, 2, 4, 1, 3)
    return values / np.float32(127.5) - 1
