"""Options of validation and test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lit_rlhf.errors import InputError


@dataclass(frozen=True)
class EvaluationOptions:
    """What validation and test measure in addition to the rewards of greedy completions.

    Attributes:
        judge: Decides the win rate: a callable like a reward, or with `pairwise = True` one that compares two
            completions (`lit_rlhf.evaluation.PairJudge`). The rewards by default.
        compare_to: Opponent of the win rate: `policy`, the greedy completions of the reference policy, or the name of
            a column of completions.
        best_of: Above 1, evaluate the sample with the highest reward out of this many instead of the greedy
            completion. An upper bound of the KL of that choice (`F.best_of_kl`) is added to the policy's.
        preferred: Column of human-preferred completions, whose perplexity under the policy is measured.

    Raises:
        ValueError: If `best_of` is below 1.
    """

    judge: Callable[..., Any] | None = None
    compare_to: str = "policy"
    best_of: int = 1
    preferred: str | None = None

    def __post_init__(self) -> None:
        if self.best_of < 1:
            raise InputError(f"evaluation: best_of={self.best_of} must be at least 1")
