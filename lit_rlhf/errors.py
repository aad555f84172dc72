"""Errors in user input: options, data, models. The command line prints their message without a traceback."""

from typing import Any

__all__ = [
    "InputError",
    "InputFileNotFoundError",
    "InputTypeError",
    "MissingPackageError",
    "brief",
    "counted",
    "input_error",
]


class InputError(ValueError):
    """Invalid input: an option, a data set, a model, or what a user's function returned."""


class InputTypeError(InputError, TypeError):
    """Input of a wrong type."""


class InputFileNotFoundError(InputError, FileNotFoundError):
    """A file, folder, model or data set that doesn't exist."""


class MissingPackageError(InputError, ImportError):
    """A package that an option needs and that is not installed."""


def brief(value: Any) -> str:
    """Return the `repr` of a value for a message, on one line and shortened to 100 characters."""
    text = repr(value).replace("\n", " ")
    return text if len(text) <= 100 else f"{text[:97]}..."


def counted(number: float, noun: str) -> str:
    """Return a number with its noun, in the plural unless it is 1."""
    return f"{number:,.0f} {noun}{'' if number == 1 else 's'}"


def input_error(error: BaseException) -> InputError | None:
    """Return the input error that led to an error: itself, one of its causes, or None."""
    seen: set[int] = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        if isinstance(current, InputError):
            return current
        seen.add(id(current))
        current = current.__cause__ or current.__context__
    return None
