"""Load rows from the hub, a local file or folder, a list of dicts, or a `datasets.Dataset`."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets

from lit_rlhf.errors import InputError, InputFileNotFoundError

Row = dict[str, Any]
"""A row of a data set, by column name."""

Source: TypeAlias = str | Iterable[Row]
"""Input of `load_rows`: a path, a hub id, a list of dicts or a `datasets.Dataset`."""

_BUILDERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_STREAMS = (datasets.IterableDataset, datasets.IterableDatasetDict)


def load_rows(source: Any, prefer: Sequence[str] = ("train",)) -> Iterable[Row]:
    """Return the rows of a data set.

    Args:
        source: Rows (a list of dicts or a `datasets.Dataset`), or a string: a json, jsonl, csv or parquet file
            (compressed or not), a folder of such files, a folder written by `Dataset.save_to_disk`, or a hub id. A hub
            id can have a configuration after a colon, and any string a split after a hash sign:
            `"owner/name:config#train[:1000]"`.
        prefer: Preferred splits, best first, for a source with several splits that names none.

    Raises:
        FileNotFoundError: If the string is neither a local path nor a data set on the hub.
        ValueError: If the data are empty, a stream or unreadable, or have several splits and none is named.
    """
    rows = _load(source)
    name = repr(source) if isinstance(source, str) else f"the {type(source).__name__}"
    if isinstance(rows, _STREAMS):
        raise InputError(
            f"{name} is a stream ({type(rows).__name__}), but training needs random access: load it without "
            "streaming=True, or pass list(stream.take(n))"
        )
    if isinstance(rows, datasets.DatasetDict):
        rows = _choose(rows, name, prefer)
    if not len(rows):
        raise InputError(f"{name} is empty: give a data set with at least one row")
    if isinstance(rows, list):
        invalid = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
        if invalid is not None:
            raise InputError(f"row {invalid} is {rows[invalid]!r}: rows must be dicts, such as {{'prompt': 'Hello'}}")
    return cast(Iterable[Row], rows)


def _load(source: Any) -> Any:
    if isinstance(source, (list, datasets.Dataset, datasets.DatasetDict, *_STREAMS)):
        return source
    if not isinstance(source, (str, Path)):
        raise InputError(f"data can't be loaded from {source!r}: give a path, a hub id, a list of dicts or a Dataset")
    text, split = str(source), None
    if not _path(text).exists() and "#" in text:
        text, split = text.rsplit("#", 1)
    path = _path(text)
    if path.is_dir():
        return _load_folder(path, split)
    if path.is_file():
        return _load_file(path, split)
    return _load_hub(text, split)


def _path(text: str) -> Path:
    return Path(text).expanduser()


def _choose(splits: dict[str, Any], name: str, prefer: Sequence[str]) -> Any:
    names = [*[split for split in prefer if split in splits], *(splits if len(splits) == 1 else ())]
    if not names:
        example = f"{name.strip(chr(39))}#{next(iter(splits))}"
        raise InputError(f"{name} has the splits {', '.join(splits)}: select one, as in {example!r}")
    return splits[names[0]]


def _load_file(path: Path, split: str | None) -> Any:
    builder = next((_BUILDERS[suffix] for suffix in reversed(path.suffixes) if suffix in _BUILDERS), None)
    if builder is None:
        raise InputError(f"{str(path)!r} has no supported file type: use {', '.join(_BUILDERS)}")
    if path.stat().st_size == 0:
        raise InputError(f"{str(path)!r} is empty: give a data set with at least one row")
    return _read(builder, split, str(path), data_files=str(path))


def _load_folder(path: Path, split: str | None) -> Any:
    if not (path / "dataset_dict.json").is_file() and not (path / "state.json").is_file():
        if not any(file.suffix in _BUILDERS for file in path.rglob("*")):
            raise InputFileNotFoundError(f"no data in the folder {str(path)!r}: expected {', '.join(_BUILDERS)} files")
        return _read(str(path.resolve()), split, str(path))
    saved = datasets.load_from_disk(str(path))
    if split is None:
        return saved
    if not isinstance(saved, datasets.DatasetDict) or split not in saved:
        names = ", ".join(saved) if isinstance(saved, datasets.DatasetDict) else "none"
        raise InputError(f"{str(path)!r} has no split {split!r}; its splits: {names}")
    return saved[split]


def _read(builder: str, split: str | None, name: str, **arguments: Any) -> Any:
    # in memory: a cache of local files would be outside the run's folder, and could be stale
    with tempfile.TemporaryDirectory() as cache:
        try:
            return datasets.load_dataset(builder, split=split, cache_dir=cache, keep_in_memory=True, **arguments)
        except Exception as error:  # datasets passes on the errors of its readers
            cause = error.__cause__ or error
            if "corresponds to no data" in str(cause):
                raise InputError(f"{name!r} is empty: give a data set with at least one row") from error
            raise InputError(f"{name!r} could not be read: {type(cause).__name__}: {cause}") from error


def _load_hub(text: str, split: str | None) -> Any:
    is_path = Path(text).suffix in _BUILDERS or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_path:
        raise InputFileNotFoundError(f"the data file {text!r} does not exist (working directory: {str(Path.cwd())!r})")
    name, _, config = text.partition(":")
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub raises many kinds of errors
        raise InputFileNotFoundError(
            f"{text!r} is neither a local file or folder nor loadable from the hub ({type(error).__name__}: {error}): "
            "check the spelling, or give a json, jsonl, csv or parquet file"
        ) from error
