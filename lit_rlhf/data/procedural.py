"""Prompts that a program makes, with answers that it can check."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from lit_rlhf.data.module import PromptData
from lit_rlhf.errors import InputError, MissingPackageError

COLUMNS = ("question", "answer", "metadata")


class ReasoningGym(PromptData):
    """Questions of one task of the package reasoning-gym, for the reward `ReasoningGymScore`.

    Rows have the columns `question`, `answer` and `metadata`, and the same numbers and seed make the same rows. No
    question of the validation occurs in training, and none twice, so there may be fewer than asked for.

    Args:
        task: Name of the task, such as `spell_backward`.
        options: Options of the task, such as `{"max_word_len": 4}`.
        train_size: Number of training questions.
        val_size: Number of validation questions.
        seed: Seed of the validation questions; the training questions have the next one.
        **kwargs: See `PromptData`; `transform`, such as `lit_rlhf.data.AsChat`, makes a prompt of a row. By default the
            prompt is the question.

    Raises:
        ImportError: If the package reasoning-gym is not installed.
        ValueError: If there is no such task, or it refuses an option.
    """

    def __init__(
        self,
        task: str,
        options: dict[str, Any] | None = None,
        train_size: int = 1000,
        val_size: int = 64,
        seed: int = 0,
        **kwargs: Any,
    ) -> None:
        if find_spec("reasoning_gym") is None:
            raise MissingPackageError("ReasoningGym needs the package reasoning-gym: pip install 'lit_rlhf[gym]'")
        val = questions(task, options or {}, val_size, seed, set())
        train = questions(task, options or {}, train_size, seed + 1, {row["question"] for row in val})
        super().__init__(train=train, val=val, **kwargs)


def questions(task: str, options: dict[str, Any], size: int, seed: int, seen: set[str]) -> list[dict[str, Any]]:
    """Return the questions of a task that are not in `seen`, and add them to it.

    Raises:
        ValueError: If there is no such task, or it refuses an option.
    """
    from reasoning_gym import create_dataset  # type: ignore[import-untyped]
    from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped]

    if task not in DATASETS:
        raise InputError(f"task={task!r}: reasoning-gym has {', '.join(sorted(DATASETS))}")
    try:
        entries = list(create_dataset(task, size=size, seed=seed, **options))
    except (TypeError, ValueError, AssertionError) as error:
        raise InputError(f"reasoning-gym's task {task!r} refuses the options {options}: {error}") from error
    rows = []
    for entry in entries:
        if entry["question"] not in seen:
            seen.add(entry["question"])
            rows.append({"prompt": entry["question"]} | {name: entry[name] for name in COLUMNS})
    return rows
