"""Warnings about what one process of a run sees: its own rows, its own memory. They are shown once, by one of them."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

_held: list[str] | None = None


def warn_locally(message: str) -> None:
    """Warn of something that other processes need not see. While warnings are held, they are shown later."""
    if _held is None:
        warnings.warn(message, stacklevel=3)
    else:
        _held.append(message)


@contextlib.contextmanager
def hold_warnings() -> Iterator[list[str]]:
    """Hold the warnings of the body, in all its threads, and yield the list that they are added to."""
    global _held
    before, _held = _held, []
    try:
        yield _held
    finally:
        _held = before
