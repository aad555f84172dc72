"""Check and convert what rewards and judges return."""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.errors import InputError


def read_numbers(output: Any, count: int, title: str, per: str = "completions") -> Float[Tensor, " completions"]:
    """Check and convert the numbers that a reward returned; None becomes NaN."""
    _check_count(output, count, title, per)
    values = output.tolist() if hasattr(output, "tolist") else list(output)
    try:
        values = [value.item() if hasattr(value, "item") else value for value in values]
        numbers = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        kinds = sorted({type(value).__name__ for value in values})
        raise InputError(f"{title} returned {kinds}: it must return plain numbers (or None)") from error
    if numbers.ndim != 1:
        raise InputError(f"{title} returned the shape {tuple(numbers.shape)}: it must return one number each")
    for i in numbers.isfinite().logical_not().nonzero().flatten().tolist():
        if values[i] is not None:
            raise InputError(
                f"{title} returned {values[i]} at index {i}: return a finite number, or None for no opinion"
            )
    return numbers


def read_token_rows(output: Any, lengths: list[int], title: str) -> list[Float[Tensor, " _"]]:
    """Return one row of numbers per completion, as long as its ids; all NaN where the reward had no opinion."""
    _check_count(output, len(lengths), title, "completions")
    rows = []
    for i, (row, length) in enumerate(zip(output, lengths, strict=True)):
        if row is None:
            rows.append(torch.full((length,), math.nan, dtype=torch.float32))
            continue
        rows.append(read_numbers(row, length, title, f"tokens of completion {i}"))
        if rows[-1].isnan().any():
            raise InputError(f"{title} returned None for a token: return None only for a whole completion")
    return rows


def _check_count(output: Any, count: int, title: str, per: str) -> None:
    is_no_list = isinstance(output, str | bytes | dict | set | frozenset)
    if is_no_list or not hasattr(output, "__len__") or getattr(output, "ndim", 1) == 0:
        raise InputError(f"{title} returned {type(output).__name__}, not {count} numbers: one for each of the {per}")
    if len(output) != count:
        raise InputError(f"{title} returned {len(output)} values for {count} {per}: return one for each")
