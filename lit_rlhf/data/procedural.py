"""Prompts that a program makes, with answers that it can check."""

from __future__ import annotations

import random
import zlib
from importlib.util import find_spec
from typing import Any

from lit_rlhf.data.module import PromptData
from lit_rlhf.errors import InputError, MissingPackageError

RUN_CODE = frozenset(
    "binary_matrix bitwise_arithmetic composite countdown intermediate_integration n_queens number_sorting "
    "polynomial_multiplication puzzle24 simple_integration spiral_matrix string_insertion".split()
)
"""Tasks whose check runs the answer, or a column of the row, as Python code; `composite` may hold one of them."""


class ReasoningGym(PromptData):
    """Questions of one task of the package reasoning-gym, for the reward `ReasoningGymScore`.

    Rows have the columns `question`, `answer`, `metadata` and `options`; the same numbers and seed make the same rows.
    No question occurs twice, in training or in validation, so there may be fewer for training than asked for.

    Args:
        task: Name of the task, such as `spell_backward`.
        options: Options of the task, such as `{"max_word_len": 4}`.
        train_size: Number of training questions.
        val_size: Number of validation questions; 0 for none.
        seed: Seed of the questions.
        **kwargs: See `PromptData`; `transform`, such as `lit_rlhf.data.AsChat`, makes a prompt of a row. By default the
            prompt is the question.

    Raises:
        ImportError: If the package reasoning-gym is not installed.
        ValueError: If there is no such task, it refuses an option or a size, or its check runs Python code.
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
        if train_size < 1 or val_size < 0:
            raise InputError(f"train_size={train_size} must be at least 1, and val_size={val_size} at least 0")
        rows = questions(task, options or {}, val_size + train_size, seed)
        if len(rows) <= val_size:
            raise InputError(
                f"reasoning-gym's task {task!r} has {len(rows)} different questions with the options {options or {}}, "
                f"and val_size={val_size} leaves none for training: lower it, or choose other options"
            )
        super().__init__(train=rows[val_size:], val=rows[:val_size] or None, **kwargs)


def questions(task: str, options: dict[str, Any], size: int, seed: int) -> list[dict[str, Any]]:
    """Return the questions of a task, each once.

    Raises:
        ValueError: If there is no such task, it refuses an option or the seed and size, or its check runs Python code.
    """
    from reasoning_gym import create_dataset  # type: ignore[import-untyped]
    from reasoning_gym.factory import DATASETS  # type: ignore[import-untyped]

    if task not in DATASETS:
        raise InputError(f"task={task!r}: reasoning-gym has {', '.join(sorted(DATASETS))}")
    if task in RUN_CODE:
        raise InputError(f"task={task!r}: reasoning-gym may run its answers or rows as Python code, which others wrote")
    if fixed := options.keys() & {"seed", "size"}:
        raise InputError(f"options has {min(fixed)!r}: give seed, train_size and val_size beside the options")
    first = zlib.crc32(f"{seed}".encode())  # question i has the seed first + i: those of near seeds would be the same
    state = random.getstate()
    try:
        random.seed(first)  # some tasks use the global generator, too
        entries = list(create_dataset(task, **{**options, "size": size, "seed": first}))
    except Exception as error:
        raise InputError(f"reasoning-gym's task {task!r} refuses the options {options}: {error}") from error
    finally:
        random.setstate(state)
    rows: dict[str, dict[str, Any]] = {}
    for entry in entries:
        columns = {name: entry[name] for name in ("question", "answer", "metadata")}
        rows.setdefault(entry["question"], {"prompt": entry["question"], **columns, "options": options})
    return list(rows.values())
