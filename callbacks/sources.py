"""The folders that a run read its models from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import nn

MAX_DEPTH, MAX_ITEMS = 16, 100
"""How deep to look (objects count twice: a list of weighted rewards that name a model is 10 deep); longest list."""


def is_source(folder: Path, sources: Iterable[Path]) -> bool:
    """Return whether a folder, or one below it, is among the folders that a run has read."""
    return any(source.is_relative_to(folder.resolve()) for source in sources)


def model_folders(*values: Any) -> set[Path]:
    """Return the resolved model folders that values name: strings, paths, models in memory, and what objects hold."""
    found: set[Path] = set()
    for text in filter(None, _names(values, MAX_DEPTH, set())):
        found |= _with_bases(Path(text))
    return found


def _names(value: Any, depth: int, seen: set[int]) -> Iterator[str]:
    if isinstance(value, str | Path):
        yield str(value)
        return
    if depth == 0 or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, nn.Module):
        for module in value.modules():
            yield str(getattr(getattr(module, "config", None), "name_or_path", ""))
            for config in (getattr(module, "peft_config", None) or {}).values():
                yield str(config.base_model_name_or_path)
    elif isinstance(value, Mapping | list | tuple | set):
        items = value.values() if isinstance(value, Mapping) else value
        for item in items if len(value) <= MAX_ITEMS else ():
            yield from _names(item, depth - 1, seen)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _names(vars(value), depth - 1, seen)


def _with_bases(folder: Path) -> set[Path]:
    """Return the folder and those of the base models below its adapters; nothing for a hub id."""
    try:
        folder = folder.expanduser()
        adapter = folder / "adapter_config.json"
        if not adapter.is_file():
            return {folder.resolve()} if (folder / "config.json").is_file() else set()
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, RuntimeError):  # a text that is no path, or a file of another kind
        return set()
    known = {folder.resolve()}
    return known | (_with_bases(Path(base)) if base and Path(base).resolve() not in known else set())
