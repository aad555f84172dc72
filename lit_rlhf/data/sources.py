"""Load rows from the hub, a local file or folder, a list of dicts, or a `datasets.Dataset`."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias, cast

import datasets

from lit_rlhf.data.folders import read_folder
from lit_rlhf.data.readers import Row, kind_of, read_file
from lit_rlhf.errors import InputError, InputFileNotFoundError, brief

__all__ = ["Row", "Source", "load_rows"]

Source: TypeAlias = str | Iterable[Row]
"""Input of `load_rows`: a path, a hub id, a list of dicts or a `datasets.Dataset`."""

_STREAMS = (datasets.IterableDataset, datasets.IterableDatasetDict)


def load_rows(source: Any, prefer: Sequence[str] = ("train",)) -> Iterable[Row]:
    """Return the rows of a data set.

    Args:
        source: Rows (a list of dicts or a `datasets.Dataset`), or a string: a json, jsonl, csv or parquet file
            (compressed or not), a folder of such files, a folder written by `Dataset.save_to_disk`, or a hub id. A hub
            id can have a configuration after a colon, and any string a split after a hash sign:
            `"owner/name:config#train[:1000]"`. Files are read into memory, with the types that they have (see
            `readers`); a folder's files and splits are described in `folders`.
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
    if isinstance(rows, Mapping):
        rows = _choose(rows, name, prefer)
    if not len(rows):
        raise InputError(f"{name} is empty: give a data set with at least one row")
    if isinstance(rows, list):
        invalid = next((i for i, row in enumerate(rows) if not isinstance(row, dict)), None)
        if invalid is not None:
            raise InputError(
                f"row {invalid} is {brief(rows[invalid])}: rows must be dicts, such as {{'prompt': 'Hello'}}"
            )
    return cast(Iterable[Row], rows)


def _load(source: Any) -> Any:
    if isinstance(source, (list, datasets.Dataset, datasets.DatasetDict, *_STREAMS)):
        return source
    if not isinstance(source, (str, Path)):
        raise InputError(
            f"data can't be loaded from {brief(source)}: give a path, a hub id, a list of dicts or a Dataset"
        )
    text, split = str(source), None
    if not os.path.exists(os.path.expanduser(text)) and "#" in text:
        text, split = text.rsplit("#", 1)
    path = Path(os.path.expanduser(text))
    if os.path.isdir(path):  # unlike Path.is_dir, false for a text that can't be a path
        rows = read_folder(path)
    elif os.path.isfile(path):
        rows = {"train": read_file(path)}
    else:
        return _load_hub(text, split)
    return rows if split is None else _select(rows, split, repr(text))


def _choose(splits: Mapping[Any, Any], name: str, prefer: Sequence[str]) -> Any:
    names = [*[split for split in prefer if split in splits], *(splits if len(splits) == 1 else ())]
    if not names:
        example = f"{name.strip(chr(39))}#{next(iter(splits))}"
        raise InputError(f"{name} has the splits {', '.join(splits)}: select one, as in {example!r}")
    return splits[names[0]]


def _select(rows: Any, split: str, name: str) -> Any:
    """Return the rows of a split or of slices of splits, such as `train[:100]`."""
    splits = rows if isinstance(rows, Mapping) else {}
    try:
        sizes = {key: len(part) for key, part in splits.items()}
        parts = datasets.ReadInstruction.from_spec(split).to_absolute(sizes)
    except Exception as error:
        raise InputError(f"{name} has no split {split!r}; its splits: {', '.join(splits) or 'none'}") from error
    chosen = [_slice(splits[part.splitname], part.from_, part.to) for part in parts]
    if isinstance(chosen[0], list):
        return [row for part in chosen for row in part]
    return datasets.concatenate_datasets(chosen)


def _slice(rows: Any, start: int, end: int) -> Any:
    return rows[start:end] if isinstance(rows, list) else rows.select(range(start, max(start, end)))


def _load_hub(text: str, split: str | None) -> Any:
    is_path = kind_of(Path(text)) is not None or text.startswith((".", "/", "~")) or text.count("/") > 1
    if is_path or "*" in text or "://" in text:
        remedy = f"working directory: {str(Path.cwd())!r}"
        if "://" in text:
            remedy = "download it and give its path, or give a hub id"
        elif "*" in text:
            remedy = "give the folder, of which all data files are read"
        raise InputFileNotFoundError(f"the data file {brief(text)} does not exist ({remedy})")
    name, _, config = text.partition(":")
    if os.path.exists(name):  # datasets would read what the folder's dataset card says
        raise InputError(
            f"{name!r} is local and has no configuration {config!r}: give the path of a file or folder in it"
        )
    try:
        return datasets.load_dataset(name, config or None, split=split)
    except Exception as error:  # the hub raises many kinds of errors
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 300, placeholder="...")
        raise InputFileNotFoundError(
            f"{brief(text)} is neither a local file or folder nor loadable from the hub ({reason}): "
            "check the spelling, or give a json, jsonl, csv or parquet file"
        ) from error
