"""Group rows of similar length, so that little padding is computed."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

MAX_GROUPS = 4
"""Maximum number of groups. With evenly distributed lengths, four groups leave a quarter of the padding."""

MIN_ROWS = 8
"""Minimum number of rows of a group: smaller batches do not use a processor fully."""

WORTHWHILE = 0.9
"""Rows are grouped only if that reduces the computed tokens at least to this fraction."""


def groups_of_similar_length(lengths: Sequence[int]) -> list[list[int]]:
    """Split rows into groups, each to be padded to its longest row; the longest rows come first.

    Args:
        lengths: Number of tokens of each row.

    Returns:
        Indices of the rows; one group in the given order if grouping would save little.
    """
    rows = range(len(lengths))
    count = min(MAX_GROUPS, len(lengths) // MIN_ROWS)
    if count > 1:
        order = sorted(rows, key=lambda i: lengths[i], reverse=True)
        cuts = [i * len(order) // count for i in range(count + 1)]
        groups = [order[start:end] for start, end in pairwise(cuts)]
        if sum(len(group) * lengths[group[0]] for group in groups) <= WORTHWHILE * len(order) * lengths[order[0]]:
            return groups
    return [list(rows)] if lengths else []


def padded_size(lengths: Sequence[int]) -> int:
    """Return the number of computed tokens, padding included, for rows of these lengths in groups."""
    return sum(len(group) * max(lengths[i] for i in group) for group in groups_of_similar_length(lengths))
