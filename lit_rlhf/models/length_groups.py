"""Rows of like length, put together so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

GROUPS = 4
"""Groups at the most. Where lengths are spread evenly, quarters of the rows leave a quarter of the padding."""

LEAST_ROWS = 8
"""Rows of a group at the least: smaller ones keep no processor busy."""

WORTHWHILE = 0.9
"""Rows are only grouped where what is then computed is at most this share of what it would be."""


def groups_of_like_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split rows into groups, each to be padded to its longest row, the longest first.

    Args:
        lengths: Tokens of each row.

    Returns:
        Indices of the rows: all in their order where groups would save little.
    """
    rows = range(len(lengths))
    count = min(GROUPS, len(lengths) // LEAST_ROWS)
    if count > 1:
        order = sorted(rows, key=lambda i: lengths[i], reverse=True)
        cuts = [i * len(order) // count for i in range(count + 1)]
        groups = [order[start:end] for start, end in pairwise(cuts)]
        if sum(len(group) * lengths[group[0]] for group in groups) <= WORTHWHILE * len(order) * lengths[order[0]]:
            return groups
    return [list(rows)] if lengths else []


def padded_size(lengths: Sequence[int]) -> int:
    """Tokens that are computed of rows of these lengths, padding included, in groups of like length."""
    return sum(len(group) * max(lengths[i] for i in group) for group in groups_of_like_length(lengths))
