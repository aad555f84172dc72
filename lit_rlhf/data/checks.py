"""Argument and size checks of the data modules."""

from __future__ import annotations

from typing import Any

from lit_rlhf.data.formats import Example
from lit_rlhf.errors import InputError


def check_minimum(minimum: int, **arguments: int | None) -> None:
    """Raise a ValueError if an argument is below `minimum`; None passes."""
    for name, value in arguments.items():
        if value is not None and value < minimum:
            raise InputError(f"{name}={value}: it must be at least {minimum}")


def check_choice(name: str, value: str, allowed: tuple[str, ...]) -> None:
    """Raise a ValueError if an argument is not one of the allowed values."""
    if value not in allowed:
        raise InputError(f"{name}={value!r}: it must be one of {', '.join(map(repr, allowed))}")


def check_val(val: Any) -> None:
    """Raise a ValueError if `val` is a number that is neither a count of rows nor a share of them."""
    if (isinstance(val, float) and not 0 < val < 1) or (isinstance(val, int) and val < 1):
        raise InputError(f"val={val}: give a number of rows, a share between 0 and 1, a source, or None")


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
