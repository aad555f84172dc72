"""Pairwise judges, such as a language model that compares two completions."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.rewards.base import RewardSpec
from lit_rlhf.rewards.calls import call_all
from lit_rlhf.rewards.messages import check_reads_messages
from lit_rlhf.rewards.outputs import read_numbers
from lit_rlhf.types import Prompts, Text

if TYPE_CHECKING:
    from transformers import TrainerState

JUDGE_ARGUMENTS = ("prompts", "completions", "opponents", "trainer_state")
"""Arguments that a pairwise judge can take, in addition to the columns of the data."""


class PairJudge(Protocol):
    """Protocol of a pairwise judge; a plain function with the attribute `pairwise = True` satisfies it."""

    pairwise: bool

    def __call__(
        self, *, prompts: list[Text], completions: list[Text], opponents: list[Text], **columns: Any
    ) -> Sequence[float | None] | Tensor | Awaitable[Any]:
        """Return for each prompt the probability that the completion is better than the opponent's.

        0.5 is a tie. None means that the judge did not decide.
        """


class SymmetricJudge:
    """Pairwise judge that is asked in both orders, which cancels position bias.

    Args:
        judge: A `PairJudge`.

    Raises:
        TypeError: If `judge` is not callable.
    """

    def __init__(self, judge: Callable[..., Any]) -> None:
        self._spec = RewardSpec.of(judge, taken=set(), role="judge")

    @property
    def names(self) -> list[str]:
        """The judge's name, as a list of one."""
        return [self._spec.name]

    @property
    def follows_training(self) -> bool:
        """False: only the opponents' completions are cached, not scores."""
        return False

    def weights(self, step: int) -> list[float]:
        """Return an empty list: a pairwise judge has no weights."""
        return []

    def check(self, columns: Iterable[str]) -> None:
        """Raise a ValueError if the data lack a column that the judge requires."""
        self._spec.check({*columns, *JUDGE_ARGUMENTS})

    def check_on_row(self, prompt: Text, columns: dict[str, Any]) -> None:
        """Raise a ValueError if a function can't read messages, tried on one row of conversations."""
        if isinstance(prompt, list):
            check_reads_messages(self._spec, prompt, columns, answers=("completions", "opponents"))

    def setup(self, device: torch.device | str, sharding: Sharding | None = None) -> None:
        """Call the judge's `setup(device)`, once per device. A judge of pairs is not sharded."""
        self._spec.setup(device)

    def __call__(
        self,
        prompts: list[Text],
        completions: list[Text],
        opponents: list[Text],
        columns: dict[str, list[Any]],
        state: TrainerState,
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Compare completions with opponents, in both orders.

        Returns:
            The win of each completion, from 0 to 1 (the mean of both orders), and the position bias toward the first
            place, from -0.5 to 0.5. Both are NaN if the judge did not decide in one of the orders.

        Raises:
            RuntimeError: If the judge raises.
            ValueError: If an answer is neither None nor a number from 0 to 1.
        """
        first = self._ask(completions, opponents, prompts, columns, state)
        second = self._ask(opponents, completions, prompts, columns, state)
        return 0.5 + (first - second) / 2, (first + second - 1) / 2  # exactly 0.5 for a tie

    def _ask(
        self,
        completions: list[Text],
        opponents: list[Text],
        prompts: list[Text],
        columns: dict[str, list[Any]],
        state: TrainerState,
    ) -> Float[Tensor, " pairs"]:
        arguments = dict(prompts=prompts, completions=completions, opponents=opponents, trainer_state=state)
        (output,) = call_all([self._spec], [{**columns, **arguments}])
        answers = read_numbers(output, len(prompts), self._spec.title, "pairs")
        for i in ((answers < 0) | (answers > 1)).nonzero().flatten().tolist():
            raise InputError(
                f"{self._spec.title} returned {float(answers[i]):g} at index {i}: it must return a number from 0 "
                "(the opponent is better) to 1, 0.5 for a tie, or None if undecided"
            )
        return answers


def mean_wins(
    judge: SymmetricJudge, prompts: Prompts, texts: list[list[Text]], state: TrainerState
) -> Float[Tensor, "prompts samples"]:
    """Return the mean win of each completion against the others of its prompt; NaN if the judge decided none.

    Args:
        judge: The judge, who compares every two completions.
        prompts: The prompts.
        texts: Completions, `texts[prompt][sample]`.
        state: Progress of training.
    """
    n, k = len(texts), len(texts[0])
    pairs = [(row, i, j) for row in range(n) for i in range(k) for j in range(i + 1, k)]
    rows = [row for row, _, _ in pairs]
    columns = {name: [values[row] for row in rows] for name, values in prompts.columns.items()}
    first, second = ([texts[row][pair[side]] for row, *pair in pairs] for side in (0, 1))
    wins, _ = judge([prompts.text[row] for row in rows], first, second, columns, state)
    found = torch.full((n, k, k), torch.nan, dtype=wins.dtype)
    for (row, i, j), win in zip(pairs, wins, strict=True):
        found[row, i, j], found[row, j, i] = win, 1 - win
    return found.nanmean(-1).round(decimals=6)  # equal ranks are equal numbers, whatever the order of the sum
