"""Read a folder of data files, or one written by `Dataset.save_to_disk`.

Only the data files themselves count. A dataset card or a script in the folder is never used.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import datasets

from lit_rlhf.data.readers import KINDS, Row, as_stored, kind_of, read_file
from lit_rlhf.errors import InputError, InputFileNotFoundError

_SPLITS = {
    **dict.fromkeys(("train", "training"), "train"),
    **dict.fromkeys(("validation", "valid", "val", "dev"), "validation"),
    **dict.fromkeys(("test", "testing", "eval", "evaluation"), "test"),
}
_SHARD = re.compile(r"(?P<split>.+?)-(?P<index>\d{5})-of-(?P<total>\d{5})\b")
_SAVED = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
"""Files of the library datasets that are no data."""


def read_folder(folder: Path) -> Any:
    """Return the rows of a folder: a dict by split, or a `Dataset` or `DatasetDict` if it was saved as one.

    All json, jsonl, csv and parquet files are read, in subfolders too, in the order of their names. Hidden files and
    folders are ignored, and those whose names begin with `__` or `~`. A file belongs to the split that its name
    contains, as a word, or else the name of its folder: `train`, `validation` (or `valid`, `val`, `dev`) or `test` (or
    `eval`). Other files belong to `train`. A name such as `NAME-00000-of-00002.parquet` is a part of the split `NAME`.

    Raises:
        FileNotFoundError: If there is no data file.
        ValueError: If the files can't be read or don't belong together.
    """
    files = _find_files(folder)
    is_saved = (folder / "dataset_dict.json").is_file() or all((folder / name).is_file() for name in _SAVED[1::2])
    if is_saved:
        if files:
            raise InputError(
                f"the folder {str(folder)!r} was written by save_to_disk, but contains {str(files[0])!r} too: "
                "remove the file, or give its path"
            )
        return _read_saved(folder)
    if not files:
        raise InputFileNotFoundError(f"no data in the folder {str(folder)!r}: expected {', '.join(KINDS)} files")
    first = {kind_of(path): path for path in reversed(files)}
    if len(first) > 1:
        names = " and ".join(repr(str(path.relative_to(folder))) for path in sorted(first.values()))
        raise InputError(
            f"the folder {str(folder)!r} has data files of several kinds, such as {names}: keep one kind, or give the "
            "path of one file"
        )
    splits: dict[str, list[Path]] = {}
    for path in files:
        splits.setdefault(_split_of(path.relative_to(folder)), []).append(path)
    for split, paths in splits.items():
        _check_shards(folder, split, paths)
    return {split: _join(paths) for split, paths in splits.items()}


def _find_files(folder: Path) -> list[Path]:
    """Return the data files in a folder and below it, sorted. Links are followed, each folder is visited once."""
    found, visited = [], set()
    for root, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(root)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not _is_ignored(name))
        paths = [Path(root, name) for name in names if not _is_ignored(name) and name not in _SAVED]
        found += [path for path in paths if kind_of(path) is not None]
    return sorted(found)


def _refuse_folder(error: OSError) -> None:
    """Raise a ValueError for a folder that can't be listed, which `os.walk` would leave out."""
    raise InputError(f"the folder {str(error.filename)!r} can't be read: {error.strerror}") from error


def _is_ignored(name: str) -> bool:
    return name.startswith((".", "__", "~"))


def _split_of(path: Path) -> str:
    if shard := _SHARD.match(path.name):
        return _SPLITS.get(shard["split"].lower(), shard["split"])
    for part in reversed(path.parts):
        words = re.split(r"[^a-z]+", part.lower())
        if split := next((_SPLITS[word] for word in words if word in _SPLITS), None):
            return split
    return "train"


def _check_shards(folder: Path, split: str, paths: list[Path]) -> None:
    """Raise a ValueError if a file of a series is missing, or there are two series."""
    shards = [shard for path in paths if (shard := _SHARD.match(path.name))]
    numbers, totals = sorted(int(shard["index"]) for shard in shards), {int(shard["total"]) for shard in shards}
    if shards and (len(totals) > 1 or numbers != list(range(max(totals)))):
        raise InputError(
            f"the folder {str(folder)!r} has {len(numbers)} files for the split {split!r}, such as "
            f"{str(paths[0].relative_to(folder))!r}, that are not one complete series: add the missing files, or give "
            "the path of one folder or file"
        )


def _join(paths: list[Path]) -> list[Row] | datasets.Dataset:
    parts = {path: rows for path in paths if len(rows := read_file(path))}
    if not parts:
        return []
    (first, columns), *others = ((path, _columns(rows)) for path, rows in parts.items())
    for path, names in others:
        if not names & columns:
            raise InputError(
                f"{str(path)!r} has the columns {sorted(names)} and {str(first)!r} {sorted(columns)}: "
                "they are no parts of one data set, move one to another folder"
            )
    tables = list(parts.values())
    if isinstance(tables[0], list):
        return [row for rows in tables for row in rows]
    try:
        return datasets.concatenate_datasets(tables)
    except Exception as error:
        raise InputError(
            f"{str(first)!r} and the files beside it have columns of different types: {error}: convert them to one type"
        ) from error


def _columns(rows: list[Row] | datasets.Dataset) -> set[str]:
    return set(rows[0]) if isinstance(rows, list) else set(rows.column_names)


def _read_saved(folder: Path) -> Any:
    try:
        saved = datasets.load_from_disk(str(folder), keep_in_memory=False)
    except Exception as error:  # files can be torn or missing
        raise InputError(f"{str(folder)!r} could not be read: {type(error).__name__}: {error}") from error
    parts = list(saved.values()) if isinstance(saved, dict) else [saved]
    paths = [os.path.normpath(file["filename"]) for part in parts for file in part.cache_files]
    outside = next((path for path in paths if not Path(path).is_relative_to(os.path.normpath(folder))), None)
    if outside is not None:
        raise InputError(f"{str(folder)!r} refers to {outside!r}, outside of the folder: give that path instead")
    for part in parts:
        as_stored(part)
    return saved
