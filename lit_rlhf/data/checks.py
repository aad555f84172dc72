"""Argument and size checks of the data modules."""

from __future__ import annotations

import re
from numbers import Integral
from typing import Any

from lightning.pytorch.trainer.states import TrainerFn

from lit_rlhf.data.formats import Example
from lit_rlhf.errors import InputError, InputTypeError, brief

_LONE_SURROGATE = re.compile("[\ud800-\udfff]")


def check_minimum(minimum: int, optional: bool = True, **arguments: int | None) -> None:
    """Raise a ValueError if an argument is below `minimum`, a TypeError if it is no integer; None may pass."""
    for name, value in arguments.items():
        if not (value is None and optional) and (not isinstance(value, Integral) or isinstance(value, bool)):
            raise InputTypeError(f"{name}={brief(value)}: it must be a whole number")
        if value is not None and value < minimum:
            raise InputError(f"{name}={value}: it must be at least {minimum}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError if an argument is not one of the allowed values."""
    if value not in allowed:
        raise InputError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))}")


def check_val(val: Any) -> None:
    """Raise a ValueError if `val` is a number that is neither a count of rows nor a share of them."""
    if isinstance(val, bool) or (isinstance(val, float) and not 0 < val < 1) or (isinstance(val, int) and val < 1):
        raise InputError(f"val={val}: give a number of rows, a share between 0 and 1, a source, or None")


def check_sources(stage: str, train: Any, val: Any, overfit_batches: int | float) -> None:
    """Raise a ValueError if a stage lacks its data, or `overfit_batches` would replace the sampler."""
    if stage == "fit" and overfit_batches:
        raise InputError(
            f"overfit_batches={overfit_batches} would replace the sampler, which repeats the prompts of a rollout for "
            "each of its steps: use a train set of a few rows instead"
        )
    if stage == "fit" and train is None:
        raise InputError("there is no training data: set data.train to a file, a hub id or a list of rows")
    if stage != "fit" and val is None:
        raise InputError(
            f"there is no data to {TrainerFn(stage).value}: set data.val to a file, a hub id, or a number of rows"
        )


def check_row(row: Any) -> None:
    """Check that a row is a dict with named columns, and that its texts can be encoded.

    Raises:
        ValueError: If it is not. Names the column.
    """
    if not isinstance(row, dict):
        raise InputError(f"it is a {type(row).__name__}: rows must be dicts, such as {{'prompt': 'Hello'}}")
    for name, value in row.items():
        if not isinstance(name, str):
            raise InputError(f"the column {name!r} has no string as its name: rename it")
        if _has_lone_surrogate(name) or _has_lone_surrogate(value):
            raise InputError(
                f"the column {name!r} contains {brief(value)}, with half of a surrogate pair, which is no character: "
                "repair the text, or drop the row with a transform"
            )


def _has_lone_surrogate(value: Any) -> bool:
    if isinstance(value, str):
        return not value.isascii() and _LONE_SURROGATE.search(value) is not None
    if isinstance(value, dict):
        return any(_has_lone_surrogate(item) for pair in value.items() for item in pair)
    return isinstance(value, (list, tuple)) and any(map(_has_lone_surrogate, value))


def check_prompts(examples: dict[int, Example]) -> None:
    """Check that no prompt is empty.

    Raises:
        ValueError: If a prompt is empty, with the first one's row index and the number of empty prompts.
    """
    empty = [index for index, example in examples.items() if _is_empty(example)]
    if empty:
        raise InputError(
            f"the prompt of row {empty[0]} is empty ({len(empty)} of {len(examples)} are): "
            "remove such rows from the data, or drop them with a transform that returns None for them"
        )


def _is_empty(example: Example) -> bool:
    if isinstance(example.prompt, str):
        return not example.prompt.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in example.prompt)


def check_train_size(rows: int, min_rows: int, batch_size: int, num_replicas: int) -> None:
    """Raise a ValueError if the training rows do not suffice for one update."""
    if rows < min_rows:
        raise InputError(
            f"{rows} rows to train on are fewer than the {min_rows} that one update needs (batch_size {batch_size} x "
            f"devices {num_replicas} x blocks {min_rows // (batch_size * num_replicas)}): add rows, or lower "
            "data.batch_size or trainer.accumulate_grad_batches"
        )


def check_val_size(rows: int, num_replicas: int) -> None:
    """Raise a ValueError if there are fewer validation rows than devices."""
    if rows < num_replicas:
        raise InputError(f"{rows} rows to validate on are fewer than the {num_replicas} devices: hold out more")
