"""Try a reward on one conversation before a model is loaded."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Sequence
from typing import Any

from lit_rlhf.errors import InputError
from lit_rlhf.rewards.base import RewardSpec
from lit_rlhf.rewards.functions import to_text
from lit_rlhf.types import Message, Text

MISTAKES = (AttributeError, TypeError, KeyError, IndexError)
"""What code for strings raises if it is given messages."""


def check_reads_messages(
    spec: RewardSpec, prompt: list[Message], columns: dict[str, Any], answers: Sequence[str] = ("completions",)
) -> None:
    """Check that a plain function reads messages: it must not fail on a short answer that it reads as a string.

    Rewards with a model, async and guarded ones are not tried, since a call may take long or cost something.

    Args:
        spec: The reward.
        prompt: A prompt of the data.
        columns: Its other columns.
        answers: The arguments that are completions.

    Raises:
        ValueError: If the function raises with messages, and not with strings.
    """
    if not inspect.isfunction(spec.reward) or inspect.iscoroutinefunction(spec.reward) or spec.guard:
        return
    answer: list[Message] = [{"role": "assistant", "content": "Yes."}]
    error = _try(spec, prompt, {**columns, **dict.fromkeys(answers, answer)})
    if not isinstance(error, MISTAKES):
        return
    if _try(spec, to_text(prompt), {**columns, **dict.fromkeys(answers, "Yes.")}) is None:
        place = traceback.extract_tb(error.__traceback__)[-1]
        raise InputError(
            f"{spec.title} can't read conversations ({type(error).__name__}: {error}, {place.filename}:{place.lineno}):"
            " a prompt or a completion is a list of messages there, and lit_rlhf.rewards.to_text(completion) returns "
            "its text"
        ) from error


def _try(spec: RewardSpec, prompt: Text, columns: dict[str, Any]) -> Exception | None:
    """Return what the reward raises for one completion, or None."""
    from transformers import TrainerState

    arguments = {
        **{name: [value] for name, value in columns.items()},
        "prompts": [prompt],
        "completion_ids": [[0]],
        "finished": [True],
        "trainer_state": TrainerState(),
        "log_extra": lambda column, values: None,
        "log_metric": lambda name, value: None,
    }
    try:
        spec.invoke(arguments)
    except Exception as error:
        return error
    return None
