"""Rewards that check an answer or its form, without a model."""

from __future__ import annotations

import functools
import json
import re
import threading
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

from lit_rlhf.data.procedural import RUN_CODE
from lit_rlhf.errors import InputError, MissingPackageError
from lit_rlhf.rewards.functions import compile_pattern, extract, references, to_text
from lit_rlhf.types import Text


class MathAnswer:
    r"""1 if the mathematical answer of a completion equals the reference answer, else 0, by the package math-verify.

    Numbers, fractions, expressions, sets and LaTeX are compared by value: `\boxed{\frac{1}{2}}` equals `0.5`. Among
    words, anything but a number must be in `$...$` or a box. Of several answers, one in a box counts, or else the last;
    boxes with hardly a word between them are one answer of several values. None (no opinion) if a row has no reference
    answer, or one that is not mathematical.

    Args:
        column: Name of the column of reference answers.
        pattern: Regular expression that extracts the answer from a reference, such as `"#### (.+)"`: the first group
            (or all) of the last match. By default the whole reference is the answer.
        timeout: Seconds for reading or comparing an answer, after which it is wrong. There is no limit outside the main
            thread.

    Raises:
        ImportError: If the package math-verify is not installed.
        ValueError: If the pattern is not a regular expression.
    """

    def __init__(self, column: str = "answer", pattern: str | None = None, timeout: int = 5) -> None:
        if find_spec("math_verify") is None:
            raise MissingPackageError(
                "the reward MathAnswer needs the package math-verify: pip install 'lit_rlhf[math]'"
            )
        if timeout < 1:
            raise InputError(f"MathAnswer: timeout={timeout} must be at least 1 second")
        self.column, self.timeout = column, timeout
        self.pattern = None if pattern is None else compile_pattern(pattern)
        self.required_columns = (column,)

    def __call__(self, completions: list[Text], **columns: Any) -> list[float | None]:
        """Return 1, 0 or None per completion."""
        pairs = zip(completions, columns[self.column], strict=True)
        return [self._value(to_text(text), answer) for text, answer in pairs]

    def _value(self, text: str, answer: Any) -> float | None:
        golds = [gold for reference in references(answer) if (gold := self._parse_reference(reference))]
        if not golds:
            return None
        from math_verify import verify  # type: ignore[import-untyped]

        found = self._read(text, _WORD)
        return float(any(verify(gold, found, timeout_seconds=self._seconds) for gold in golds))

    def _parse_reference(self, text: str) -> list[Any]:
        found = extract(text, self.pattern)
        return self._read(text if found is None else found, _LONGER_WORD)

    def _read(self, text: str, word: re.Pattern[str]) -> list[Any]:
        text = _EMPHASIS.sub(r"\2", text)
        if word.search(text):
            return self._parse(_TOUCHING.sub(" ", text))
        marked = any(mark in text for mark in ("$", "\\boxed", "\\[", "\\("))
        return self._parse(text if marked else f"${text}$") or self._parse(text)

    def _parse(self, text: str) -> list[Any]:
        from math_verify import parse

        parsed: list[Any] = parse(text, parsing_timeout=self._seconds)
        return parsed

    @property
    def _seconds(self) -> int | None:
        """The time limit, which works by a signal."""
        return self.timeout if threading.current_thread() is threading.main_thread() else None


_FUNCTIONS = "sqrt|cbrt|sin|cos|tan|cot|sec|csc|log|ln|exp|pi"
_FOREIGN = r"[^\W\d_A-Za-z]"
_WORD, _LONGER_WORD = (
    re.compile(
        rf"(?:^|[\s(<\"'])(?:(?!(?:{_FUNCTIONS})\b)[A-Za-z]{{{least},}}(?=$|[\s,.:;!?'\")>])|[A-Za-z]:(?=\s))"
        rf"|{_FOREIGN}{{2}}"
    )
    for least in (2, 3)
)
"""A word of prose, or a label such as `A:`; in a reference of three letters, since `2 or 3` is a formula there."""
_TOUCHING = re.compile(rf"(?<=[^\W\d_]:)(?=[-\d])|(?<=>)(?=[-\d])|(?<=\d)(?=</)|(?<={_FOREIGN})(?=[-\d])")
"""Where a number touches a word, a tag or a label, as in `Answer:42`."""
_EMPHASIS = re.compile(r"(?<![\w*`)])([*_`]{1,3})(?=\S)([^*_`]+)(?<=\S)\1(?![\w*`(])")
"""What Markdown emphasizes; `x**2` and `a_1` are none."""


class ReasoningGymScore:
    """Score of an answer by the task of reasoning-gym that made the question, from 0 to 1.

    None (no opinion) on a row that is not of reasoning-gym. For `lit_rlhf.data.ReasoningGym`, or rows with the columns
    `answer` and `metadata` of its data sets; a column `options` has the options of the task.

    Args:
        pattern: Regular expression that extracts the answer, such as `"<answer>(.*?)</answer>"`: the first group (or
            all) of the last match. Without a match the score is that of no answer. By default the full completion is
            the answer.

    Raises:
        ImportError: If the package reasoning-gym is not installed.
        ValueError: If the pattern is not a regular expression.
    """

    required_columns = ("answer", "metadata")

    def __init__(self, pattern: str | None = None) -> None:
        if find_spec("reasoning_gym") is None:
            raise MissingPackageError("the reward ReasoningGymScore needs reasoning-gym: pip install 'lit_rlhf[gym]'")
        self.pattern = None if pattern is None else compile_pattern(pattern)

    def __call__(
        self,
        completions: list[Text],
        answer: list[Any],
        metadata: list[Any],
        options: list[dict[str, Any] | None] | None = None,
    ) -> list[float | None]:
        """Return a score or None per completion; 0 for an answer at which the check fails."""
        options = [None] * len(completions) if options is None else options
        rows = zip(completions, answer, metadata, options, strict=True)
        return [
            self._score(to_text(text), {"answer": gold, "metadata": task}, given) for text, gold, task, given in rows
        ]

    def _score(self, text: str, entry: dict[str, Any], options: dict[str, Any] | None) -> float | None:
        task = (entry["metadata"] or {}).get("source_dataset")
        if task is None:
            return None
        check, found = scorer(task, json.dumps(options or {}, sort_keys=True)), extract(text, self.pattern)
        try:
            return float(check(None if found is None else found.strip(), entry))
        except Exception:  # checks expect a form of the answer
            return 0.0


@functools.cache
def scorer(task: str, options: str) -> Callable[[str | None, dict[str, Any]], float]:
    """Return the function of reasoning-gym that scores an answer to a task with these options, a JSON object.

    Raises:
        ValueError: If that function may run Python code.
    """
    if task in RUN_CODE:
        raise InputError(f"ReasoningGymScore: {task!r} may run answers or rows as Python code, which others wrote")
    from reasoning_gym import create_dataset  # type: ignore[import-untyped]

    function: Callable[[str | None, dict[str, Any]], float] = create_dataset(task, **json.loads(options)).score_answer
    return function


class Format:
    """1 if a completion consists of these tags in this order, each once and with a text in it, else 0.

    `Format()` wants `<think>...</think><answer>...</answer>`, with white space around the tags.

    Args:
        tags: Names of the tags.
        opened: Whether the prompt ends with the first opening tag, as generation prompts of reasoning models do, so
            that the completion lacks it.
        special_tokens: Whether completions contain their special tokens, for tags that are such.

    Raises:
        ValueError: If there is no tag.
    """

    def __init__(
        self, tags: Sequence[str] = ("think", "answer"), opened: bool = False, special_tokens: bool = False
    ) -> None:
        if isinstance(tags, str) or not tags:
            raise InputError(f"Format: tags={tags!r} must be a list of names, such as [think, answer]")
        self.special_tokens = special_tokens
        names = [re.escape(tag) for tag in tags]
        no_tag = rf"(?!</?(?:{'|'.join(names)})>)"
        parts = [rf"<{name}>\s*{no_tag}\S(?:{no_tag}.)*</{name}>" for name in names]
        if opened:
            parts[0] = parts[0].removeprefix(rf"<{names[0]}>\s*")
        self.pattern = re.compile(r"\s*".join(["", *parts, ""]), re.DOTALL)

    def __call__(self, completions: list[Text]) -> list[float]:
        """Return 1 or 0 per completion."""
        return [float(self.pattern.fullmatch(to_text(completion)) is not None) for completion in completions]


class SoftOverlong:
    """Penalty of long completions that begins before they are truncated: 0, then linear down to -1 at `maximum` tokens.

    Yu et al., 2025, arXiv 2503.14476, equation 13.

    Args:
        maximum: Number of tokens from which on it is -1; usually `sampling.max_new_tokens`.
        buffer: Number of tokens before it over which the penalty grows.

    Raises:
        ValueError: If the buffer is not between 1 and the maximum, or no completion can be long enough for a penalty.
    """

    def __init__(self, maximum: int, buffer: int) -> None:
        if not 1 <= buffer <= maximum:
            raise InputError(f"SoftOverlong: buffer={buffer} must be between 1 and maximum={maximum}")
        self.maximum, self.buffer = maximum, buffer

    def check_max_new_tokens(self, max_new_tokens: int) -> None:
        """Check that some completions get a penalty."""
        if max_new_tokens <= self.maximum - self.buffer:
            raise InputError(
                f"SoftOverlong has no effect: its penalty begins above {self.maximum - self.buffer} tokens "
                f"(maximum={self.maximum} less buffer={self.buffer}), and completions have at most "
                f"max_new_tokens={max_new_tokens}: set maximum to that, and buffer below it"
            )

    def __call__(self, completion_ids: list[list[int]]) -> list[float]:
        """Return one number per completion, from -1 to 0."""
        return [max(-1.0, min(0.0, (self.maximum - self.buffer - len(ids)) / self.buffer)) for ids in completion_ids]
