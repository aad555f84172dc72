"""Measures of what a policy writes."""

from __future__ import annotations

from collections.abc import Sequence


def distinct_n(completions: Sequence[Sequence[int]], n: int) -> float:
    """Share of different n-grams of tokens among all n-grams of all completions, in [0, 1]; 0 where there are none.

    Near 0 where a policy repeats itself, within a completion or across them. It falls with the number of completions,
    so only equally many compare. Li et al., 2016, arXiv 1510.03055.
    """
    grams = [tuple(ids[i : i + n]) for ids in completions for i in range(len(ids) - n + 1)]
    return len(set(grams)) / len(grams) if grams else 0.0
