"""Hold out rows of the training data for validation."""

from __future__ import annotations

from typing import Literal

import numpy as np

from lit_rlhf.data.encoding import Encoded
from lit_rlhf.errors import InputError

SPLIT_SEED = 0
"""Seed of the random split, independent of the run's seed: all runs are compared on the same held-out rows."""


def hold_out(
    rows: list[Encoded], val: int | float, split: Literal["random", "last"]
) -> tuple[list[Encoded], list[Encoded]]:
    """Split rows into training and held-out rows, each in their original order.

    Args:
        rows: All rows.
        val: Number of rows to hold out (an int), or their share (a float below 1; at least one row).
        split: Whether random rows are held out, the same in every run, or the last ones.

    Raises:
        ValueError: If no row is left to train on.
    """
    count = val if isinstance(val, int) else max(1, round(val * len(rows)))
    if count >= len(rows):
        raise InputError(f"val={val} holds out {count} of {len(rows)} rows and leaves none to train on: lower it")
    order = np.arange(len(rows))
    if split == "random":
        order = np.random.default_rng(SPLIT_SEED).permutation(len(rows))
    train, held_out = np.sort(order[: len(rows) - count]), np.sort(order[len(rows) - count :])
    return [rows[i] for i in train], [rows[i] for i in held_out]
