"""Tables of labels: one reader for all the ways in which they are written, and the way from their rows to images.

Read are CSV files of any separator (as spreadsheets and Kaggle write them), CelebA's and CelebAMask-HQ's lists and the
`metadata.csv` of Hugging Face image folders.
"""

from __future__ import annotations

import codecs
import csv
import io
import posixpath
import re
import unicodedata
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import pandas as pd

LISTS = ("list_attr_celeba.txt", "list_attr_celeba.csv", "CelebAMask-HQ-attribute-anno.txt")
LABEL_FILES = ("attributes.csv", "attributes.tsv", "metadata.csv", *LISTS)
FILE_COLUMN = "file_name"
"""Column of the file names in a `metadata.csv`, wherever it stands; elsewhere it is the first one."""

CAPTION_FILES = {"captions.csv": ("file", "caption"), "metadata.csv": (FILE_COLUMN, "text")}
"""Tables of captions, and their columns."""

_WORDS = {"true": 1, "yes": 1, "false": 0, "no": 0}
_PARTS = re.compile(r"(train(ing)?|val(id(ation)?)?|test(ing)?|eval)([ _-]?set)?", re.IGNORECASE)


def labels_of(names: Sequence[str], content: bytes, where: str) -> pd.DataFrame:
    """The labels of images in a table: one row an image, in the order of `names`; -1 and 1 have become 0 and 1.

    Parameters
    ----------
    names : sequence of str
        File names of the images.
    content : bytes
        Of the table.
    where : str
        Its path, for messages. A warning says what is left out: columns of text, rows without image, 0 beside -1.
    """
    text, notes = _decode(content, where)
    table = _parse(text, where)
    columns = {}
    for name, column in table.items():
        numbers, note = _to_number(column, where)
        notes += note
        if numbers is not None:
            columns[name] = numbers
    if columns:
        table = _match(pd.DataFrame(columns, index=table.index), names, where, notes)
    else:  # a table of texts alone, such as several captions an image
        table = pd.DataFrame(index=pd.Index(names, name="file"))
    if notes:
        warnings.warn(f"{where}: {'; '.join(notes)}", stacklevel=3)
    return table


def read_captions(place: Path) -> dict[str, list[str]]:
    """Captions by file name, from a table in a folder of images or beside a zip of them."""
    folder = place if place.is_dir() else place.parent
    found = [name for name in CAPTION_FILES if (folder / name).is_file()]
    if not found:
        raise ValueError(f"{folder} has no captions; write {' or '.join(CAPTION_FILES)} beside the images")
    text, _ = _decode((folder / found[0]).read_bytes(), str(folder / found[0]))
    separator = _separator(text.splitlines()[:21] or [""]) or ","
    table = pd.read_csv(io.StringIO(text), sep=separator, dtype=str)
    file, caption = CAPTION_FILES[found[0]]
    if missing := {file, caption}.difference(table):
        raise ValueError(f"{folder / found[0]} has no column {min(missing)!r}; it has {', '.join(table)}")
    table[file] = table[file].map(plain, na_action="ignore")
    return table.dropna(subset=[caption]).groupby(file, sort=False)[caption].agg(list).to_dict()


def classes_of(names: Sequence[str], source: str) -> pd.DataFrame:
    """One attribute a class: the first folder of a name that is no part of a data set, such as train."""
    parts = [[part for part in name.split("/")[:-1] if not _PARTS.fullmatch(part)] for name in names]
    classes = pd.Series([re.sub(r"_(train|val|test)(_lmdb)?$", "", (part or [""])[0]) for part in parts])
    if classes.nunique() < 2 or (classes == "").any():
        found = ", ".join(sorted(set(classes) - {""})) or "none"
        raise ValueError(f'labels="folders" takes folders of two classes or more; {source} has {found}')
    return pd.get_dummies(classes).astype(int).set_index(pd.Index(names, name="file"))


def not_binary(labels: pd.DataFrame) -> dict[str, str]:
    """Columns that hold other numbers than 0 and 1, each with words that say which."""
    values = {str(name): set(column.dropna()) for name, column in labels.items()}
    return {name: f"{name} holds {some(sorted(found))}" for name, found in values.items() if not found <= {0, 1}}


def common_folder(names: Iterable[str]) -> str:
    """The folder, with a slash at its end, that all of these lie in; may be empty."""
    folders = {posixpath.dirname(name) for name in names}
    common = posixpath.commonpath(folders) if folders else ""
    return common and common + "/"


def some(names: Sequence) -> str:
    """The first of several names."""
    shown = [f"{name:g}" if isinstance(name, float) else str(name) for name in names[:3]]
    return ", ".join(shown) + (", ..." if len(names) > 3 else "") or "none"


def _decode(content: bytes, where: str) -> tuple[str, list[str]]:
    """Text of a table, and a note if its encoding is a guess."""
    encodings = ("utf-8-sig", "latin-1")
    if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
        encodings = ("utf-16",)
    for encoding in encodings:
        try:
            text = content.decode(encoding)
        except UnicodeDecodeError:
            continue
        if "\0" not in text:
            return text, ["it is not UTF-8 and read as Latin-1"] if encoding == "latin-1" else []
    raise ValueError(f"{where} cannot be read as a table (it is not text in UTF-8, UTF-16 or Latin-1); save it as CSV")


def _parse(text: str, where: str) -> pd.DataFrame:
    """All cells as text, "" where there is nothing; columns by their names, index: file names."""
    lines = [line for line in text.splitlines() if line.strip("\t ,;") and not line.startswith("sep=")]
    # CelebA's list begins with the number of its rows.
    count = int(lines.pop(0)) if lines and lines[0].strip().isdecimal() else None
    if not lines:
        raise ValueError(f"{where} cannot be read as a table (it has no rows); give a line of names, then one an image")
    separator = _separator(lines[:21])
    names = _cells(lines[0], separator)
    if separator in (None, "\t") and len(lines) > 1 and len(names) < len(_cells(lines[1], separator)):
        names = ["file", *names]
    repeated = sorted({name for name in names if name and names.count(name) > 1})
    if repeated:
        raise ValueError(f"{where} has more than one column {some(repeated)}; keep one each")
    names = [name or f"without a name ({i + 1})" for i, name in enumerate(names)]
    try:
        table = pd.read_csv(
            io.StringIO("\n".join(lines[1:])),
            sep=separator or r"\s+",
            header=None,
            names=names,
            dtype=str,
            skipinitialspace=True,
        )
    except (ValueError, OSError) as error:
        raise ValueError(f"{where} cannot be read as a table ({' '.join(str(error).split())}); correct it") from error
    # pandas takes surplus columns for an index.
    if not isinstance(table.index, pd.RangeIndex):
        raise ValueError(f"{where} has rows with more values than the {len(names)} columns it names; correct it")
    if count not in (None, len(table)):
        raise ValueError(f"{where} announces {count} rows and has {len(table)}; copy it again")
    table = table.fillna("").apply(lambda column: column.str.strip())
    if len(names) > 1 and _is_index(table, names):
        table = table.drop(columns=names.pop(0))
    table = table.set_index(next((name for name in names if name.lower() == FILE_COLUMN), names[0]))
    short = table.index[(table == "").any(axis=1)]
    if separator is None and len(short):
        raise ValueError(f"{where} has too few values in {some(short)}; give {table.shape[1]} a row")
    if separator == ";":
        table = table.apply(lambda column: column.str.replace(",", "."))
    # Spreadsheets write columns of nothing beside a table.
    empty = [name for name in table if name.startswith("without a name") and (table[name] == "").all()]
    return cast(pd.DataFrame, table.drop(columns=empty))


def _is_index(table: pd.DataFrame, names: list[str]) -> bool:
    """Whether pandas wrote its index of numbers, without a name, before a column of file names."""
    first, second = table[names[0]], table[names[1]]
    if names[0] not in ("without a name (1)", "Unnamed: 0") or not first.str.fullmatch(r"\d+").all():
        return False
    texts = second.is_unique and pd.to_numeric(second, errors="coerce").isna().all()
    return texts or any(name.lower() == FILE_COLUMN for name in names)


def _separator(lines: list[str]) -> str | None:
    """Separator of the values; None for white space. Most likely is the one that all lines have equally often."""
    found = [separator for separator in ",;\t" if separator in lines[0]]
    alike = {separator: len({line.count(separator) for line in lines}) == 1 for separator in found}
    return max(found, key=lambda separator: (alike[separator], lines[0].count(separator)), default=None)


def _cells(line: str, separator: str | None) -> list[str]:
    if separator is None:
        line, separator = " ".join(line.split()), " "
    return [cell.strip() for cell in next(csv.reader([line], delimiter=separator, skipinitialspace=True))]


def _to_number(column: pd.Series, where: str) -> tuple[np.ndarray | None, list[str]]:
    """A column of text as numbers (None if none is one), and what there is to say of it."""
    codes, cells = column.factorize()  # few values stand in many rows
    cells = pd.Series(cells, dtype=object)
    there, words = cells != "", cells.str.lower().map(_WORDS)
    numbers = words if words[there].notna().all() else pd.to_numeric(cells, errors="coerce")
    numbers = numbers.astype(float)
    wrong = there & ~np.isfinite(numbers)
    if wrong.any():
        first = wrong.idxmax()
        found = f"column {column.name} holds {cells[first]!r} in row {column.index[codes == first][0]}"
        if (wrong == there).all():
            return None, [f"a column that is no number is left out: {found}"]
        raise ValueError(f"{where}: {found}; labels are numbers or empty")
    values, notes = set(numbers.dropna()), []
    if -1 in values and values <= {-1, 0, 1}:
        if 0 in values:
            notes = [f"0 in column {column.name} counts as missing, beside -1{' and 1' if 1 in values else ''}"]
        numbers = numbers.where(numbers != 0).add(1) // 2
    whole = numbers.notna().all() and (numbers % 1 == 0).all()
    return numbers.to_numpy(int if whole else float)[codes], notes


def _match(table: pd.DataFrame, names: Sequence[str], where: str, notes: list[str]) -> pd.DataFrame:
    """Rows in the order of the images; `notes` gets what is left out.

    They are found by their paths, or else by their file names, or by these without the extension, if that is
    unambiguous: CelebA's list calls .jpg what is also shipped as .png.
    """
    rows = table.index.map(plain)
    rows = rows.str.removeprefix(common_folder(rows)) if len(rows) else rows
    repeated = rows[rows.duplicated()].unique()
    if len(repeated):
        raise ValueError(f"{where} has more than one row for {some(repeated)}; keep one each")
    images = pd.Index(map(plain, names))
    for key in (str, posixpath.basename, _stem):
        keys, wanted = rows.map(key), images.map(key)
        certain = key is str or not (keys.has_duplicates or wanted.has_duplicates)
        if certain and len(keys) and wanted.isin(keys).all():
            spare = rows[~keys.isin(wanted)]
            if len(spare):
                notes.append(f"rows without image are left out, {len(spare)} of {len(rows)} ({some(spare)})")
            return table.set_axis(keys).loc[wanted].set_axis(pd.Index(names, name="file"))
    unlabelled, imageless = images.difference(rows), rows.difference(images)
    raise ValueError(
        f"{where} does not match the images: {len(unlabelled)} of {len(images)} images have no row "
        f"({some(unlabelled)}) and {len(imageless)} of {len(rows)} rows have no image ({some(imageless)}); "
        + "; ".join(["the first line must name the columns and the first column hold the file names", *notes])
    )


def plain(name: str) -> str:
    """A file name as it is compared: macOS decomposes letters with accents, Windows writes backslashes."""
    return unicodedata.normalize("NFC", name).replace("\\", "/").removeprefix("./")


def _stem(name: str) -> str:
    return posixpath.splitext(posixpath.basename(name))[0]
