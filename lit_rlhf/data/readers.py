"""Read a data file without changing the type of a value.

Rows of json and jsonl files have the types of JSON. Cells of csv files are strings: `007` and `NA` stay what they are;
an empty cell is None. Columns of parquet files have the types of the file.
"""

from __future__ import annotations

import bz2
import copy
import csv
import gzip
import io
import json
import lzma
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import pyarrow
import pyarrow.parquet

from lit_rlhf.errors import InputError, brief

Row: TypeAlias = dict[str, Any]
"""A row of a data set, by column name."""

KINDS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
"""Kinds of data files, by suffix."""

_OPENERS: dict[str, Callable[[str], Any]] = {
    ".gz": gzip.open,
    ".bz2": bz2.open,
    ".xz": lzma.open,
    ".zst": pyarrow.input_stream,
    ".lz4": pyarrow.input_stream,
    ".zip": lambda path: _open_zip(path),
}


_SIGNATURES = {
    b"version https://git-lfs": ("", "it is a pointer of Git LFS: fetch the file with `git lfs pull`"),
    b"\x1f\x8b": (".gz", "it is compressed with gzip: add .gz to its name"),
    b"PK\x03\x04": (".zip", "it is a zip archive or a spreadsheet: export it as csv or json"),
    b"PAR1": (".parquet", "it is a parquet file: let its name end in .parquet"),
    b"<!doctype": ("", "it is a web page: download the data file itself"),
    b"<html": ("", "it is a web page: download the data file itself"),
}
"""How files begin that are often given as data, the suffix with which that is right, and what to do."""


def kind_of(path: Path) -> str | None:
    """Return the kind of a data file, compressed or not; None for any other file."""
    name = path.with_suffix("") if path.suffix.lower() in _OPENERS else path
    return KINDS.get(name.suffix.lower())


def read_file(path: Path) -> list[Row] | datasets.Dataset:
    """Return the rows of a file: a list for json, jsonl and csv, a `datasets.Dataset` for parquet.

    Raises:
        ValueError: If the file can't be read. Names the file and, for text, the line.
    """
    kind, name = kind_of(path), repr(str(path))
    if path.exists() and not path.is_file():
        raise InputError(f"{name} is no file but a pipe, a device or a folder: write the rows to a file, and give that")
    if kind is None:
        raise InputError(f"{name} has no supported file type: use {', '.join(KINDS)}, compressed or not")
    try:
        _check_signature(path)
        if kind == "parquet":
            return _read_parquet(path)
        with _open_text(path) as text:
            return _read_csv(text) if kind == "csv" else _read_json(text)
    except InputError as error:
        raise InputError(f"{name} could not be read: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{name} could not be read: line {_first_undecodable_line(path)} is not UTF-8 text ({error.reason}): "
            "save the file as UTF-8, for example with `iconv -f ENCODING -t UTF-8`"
        ) from error
    except Exception as error:  # files can be torn, compressed otherwise, or not be what their name says
        raise InputError(f"{name} could not be read: {type(error).__name__}: {error}") from error


def _check_signature(path: Path) -> None:
    with path.open("rb") as file:
        start = file.read(32).lower()
    for signature, (suffix, remedy) in _SIGNATURES.items():
        if start.startswith(signature.lower()) and not (suffix and path.name.lower().endswith(suffix)):
            raise InputError(remedy)


def _open(path: Path) -> Any:
    opener = _OPENERS.get(path.suffix.lower())
    return opener(str(path)) if opener else path.open("rb")


def _open_zip(path: str) -> Any:
    archive = zipfile.ZipFile(path)
    names = [name for name in archive.namelist() if not name.endswith("/") and not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise InputError(f"it contains {len(names)} files: give an archive with one file, or the files in a folder")
    return archive.open(names[0])


def _open_text(path: Path, errors: str = "strict") -> io.TextIOWrapper:
    return io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="", errors=errors)


def _first_undecodable_line(path: Path) -> int | None:
    with _open_text(path, errors="surrogateescape") as text:
        lines = enumerate(text, start=1)
        return next((i for i, line in lines if any("\udc80" <= char <= "\udcff" for char in line)), None)


def _read_json(text: io.TextIOWrapper) -> list[Row]:
    """Return the objects of JSON lines, or of a document that is a list of objects or one object."""
    rows: list[Row] = []
    for number, line in enumerate(text, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except json.JSONDecodeError as error:
            if rows:
                raise InputError(f"line {number} is not JSON: {error.msg} at character {error.colno}") from error
            value = _parse_document(line + text.read(), number)
        except (ValueError, RecursionError) as error:  # too many digits, or too many brackets
            raise InputError(f"line {number} is not JSON: {error}") from error
        values = value if isinstance(value, list) and not rows else [value]
        for item in values:
            if not isinstance(item, dict):
                raise InputError(f"line {number} has the row {brief(item)}: a row must be an object")
            rows.append({sys.intern(name): cell for name, cell in item.items()})
    return rows


def _parse_document(text: str, first_line: int) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = first_line + error.lineno - 1
        raise InputError(
            f"line {line} is not JSON: {error.msg} at character {error.colno}: "
            "write one object per line, or one list of objects"
        ) from error


def _read_csv(text: io.TextIOWrapper) -> list[Row]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(text, strict=True)
    lines = _csv_lines(reader)
    names = next(lines, [])
    if len(names) == 1 and (separator := next((char for char in ";\t" if char in names[0]), None)):
        raise InputError(f"the first line is one cell, {brief(names[0])}: separate cells by commas, not {separator!r}")
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise InputError(f"it has several columns {repeated!r}: rename all but one")
    rows = []
    for cells in lines:
        if len(cells) != len(names):
            raise InputError(
                f"line {reader.line_num} has {len(cells)} cells, but the first line names {len(names)} columns: "
                "put cells with commas, quotes or line breaks in double quotes"
            )
        rows.append({name: cell or None for name, cell in zip(names, cells, strict=True)})
    return rows


def _csv_lines(reader: Any) -> Iterator[list[str]]:
    """Yield the cells of each line that is not blank."""
    try:
        yield from filter(None, reader)
    except csv.Error as error:
        raise InputError(f"line {reader.line_num}: {error}") from error


def _read_parquet(path: Path) -> datasets.Dataset:
    with _open(path) as file:
        table = pyarrow.parquet.ParquetFile(file).read()
    # a random fingerprint, since the default one is a hash of all values
    return as_stored(datasets.Dataset(table, fingerprint=datasets.fingerprint.generate_random_fingerprint()))


def as_stored(dataset: datasets.Dataset) -> datasets.Dataset:
    """Switch off decoding of images, audio and the like: it opens the file, or the address, that a row names."""
    features = copy.deepcopy(dataset.features)
    found: list[Any] = [features]
    for feature in found:
        if isinstance(feature, dict):
            found += feature.values()
        elif hasattr(feature, "feature"):
            found.append(feature.feature)
        elif hasattr(feature, "decode") and not isinstance(feature, datasets.Json):
            feature.decode = False
    dataset.info.features = features
    return dataset
