"""Judges that compare two completions, such as a language model that is asked which one is better."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf.rewards.base import Entry
from lit_rlhf.rewards.scorer import call_all, read_numbers
from lit_rlhf.types import Text

if TYPE_CHECKING:
    from transformers import TrainerState

GIVEN = ("prompts", "completions", "opponents", "trainer_state")
"""What a judge of pairs can ask for, beside the columns of the data."""


class PairJudge(Protocol):
    """The shape of a judge of pairs: a plain function will do, with the attribute `pairwise = True`."""

    pairwise: bool

    def __call__(
        self, *, prompts: list[Text], completions: list[Text], opponents: list[Text], **columns: Any
    ) -> Sequence[float | None] | Tensor | Awaitable[Any]:
        """Return for each prompt how sure it is that the completion beats the opponent's, from 0 to 1.

        0.5 is a tie, and None stands for an answer that names neither side.
        """


class SymmetricJudge:
    """Asks a judge of pairs twice, with either completion first, so that a liking for a place favours nobody.

    Args:
        judge: A `PairJudge`.

    Raises:
        TypeError: If it is not callable.
    """

    def __init__(self, judge: Callable[..., Any]) -> None:
        self._entry = Entry.of(judge, taken=set(), role="judge")

    @property
    def names(self) -> list[str]:
        """The name by which the judge is shown."""
        return [self._entry.name]

    @property
    def follows_training(self) -> bool:
        """False: of the opponent nothing is kept but what it wrote."""
        return False

    def weights(self, step: int) -> list[float]:
        """Nothing: a judge of pairs has no weights that could change."""
        return []

    def check(self, columns: Iterable[str]) -> None:
        """Raise a ValueError if the judge asks for a column that the data don't have."""
        self._entry.check({*columns, *GIVEN})

    def setup(self, device: torch.device | str) -> None:
        """Load what the judge needs onto `device`, once for a device."""
        self._entry.setup(device)

    def __call__(
        self,
        prompts: list[Text],
        completions: list[Text],
        opponents: list[Text],
        columns: dict[str, list[Any]],
        state: TrainerState,
    ) -> tuple[Float[Tensor, " pairs"], Float[Tensor, " pairs"]]:
        """Compare completions with opponents.

        Returns:
            How much of a win each completion has, from 0 to 1, and what its place did for the one that stood
            first, from -0.5 to 0.5; both NaN where one of the two answers is missing.

        Raises:
            RuntimeError: If the judge raises.
            ValueError: If an answer is not None or a number from 0 to 1.
        """
        first = self._ask(completions, opponents, prompts, columns, state)
        second = self._ask(opponents, completions, prompts, columns, state)
        return (first + 1 - second) / 2, (first + second - 1) / 2

    def _ask(
        self,
        completions: list[Text],
        opponents: list[Text],
        prompts: list[Text],
        columns: dict[str, list[Any]],
        state: TrainerState,
    ) -> Float[Tensor, " pairs"]:
        own = dict(prompts=prompts, completions=completions, opponents=opponents, trainer_state=state)
        (output,) = call_all([self._entry], {**columns, **own})
        answers = read_numbers(output, len(prompts), self._entry.title, "pairs")
        for i in ((answers < 0) | (answers > 1)).nonzero().flatten().tolist():
            raise ValueError(
                f"{self._entry.title} answered {float(answers[i]):g} at place {i}: it must answer from 0 "
                "(the opponent is better) to 1, 0.5 for a tie, or None for neither"
            )
        return answers
