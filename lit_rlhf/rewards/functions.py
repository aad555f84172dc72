"""Rewards that a few lines of Python compute, and that YAML can name: their arguments are plain values."""

from __future__ import annotations

import re
from typing import Any, Literal

from lit_rlhf.types import Text


def to_text(text: Text) -> str:
    """Return a prompt or a completion as one string: itself, or what its messages say, line by line."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(message.get("content")) for message in text)


def _content(content: Any) -> str:
    if isinstance(content, list):  # typed blocks; only those of text count
        return "".join(block.get("text", "") for block in content)
    return content or ""


class Length:
    """0 for a length from `minimum` to `maximum`; outside, minus the distance as a share of the bound that was missed.

    `Length(minimum=40, maximum=40)` aims at 40; 60 then gets -0.5.

    Args:
        minimum: Shortest length without a penalty.
        maximum: Longest length without a penalty, or None for no limit.
        unit: What is counted. Tokens are those of the policy, the EOS token included.

    Raises:
        ValueError: If no length lies between the bounds, or neither is given.
    """

    def __init__(
        self, minimum: int = 0, maximum: int | None = None, unit: Literal["tokens", "words", "chars"] = "tokens"
    ) -> None:
        if minimum < 0 or (maximum is not None and maximum < max(minimum, 1)):
            raise ValueError(f"Length needs 0 <= minimum <= maximum, and maximum >= 1, not {minimum} and {maximum}")
        if minimum == 0 and maximum is None:
            raise ValueError("Length has neither a minimum nor a maximum: give at least one")
        if unit not in ("tokens", "words", "chars"):
            raise ValueError(f"the unit of Length is tokens, words or chars, not {unit!r}")
        self.minimum, self.maximum, self.unit = minimum, maximum, unit

    def __call__(self, completions: list[Text], completion_ids: list[list[int]]) -> list[float]:
        """Return one number a completion, at most 0."""
        if self.unit == "tokens":
            return [self._value(len(ids)) for ids in completion_ids]
        texts = map(to_text, completions)
        return [self._value(len(text.split() if self.unit == "words" else text)) for text in texts]

    def _value(self, length: int) -> float:
        if length < self.minimum:
            return length / self.minimum - 1
        return min(0.0, 1 - length / self.maximum) if self.maximum else 0.0


class RegexMatch:
    r"""1 where a regular expression is found in the completion, else 0.

    `RegexMatch(r"[.!?]\s*$")` asks for a last sentence that ends, `RegexMatch(r"(?s)<a>.*</a>", full=True)` for a format.

    Args:
        pattern: In the syntax of `re`, flags included: `(?i)` for any case, `(?s)` for a dot that matches newlines.
        full: Whether the pattern must match the whole completion, rather than be found in it.

    Raises:
        ValueError: If the pattern is not a regular expression.
    """

    def __init__(self, pattern: str, full: bool = False) -> None:
        self.pattern, self.full = _compile(pattern), full

    def __call__(self, completions: list[Text]) -> list[float]:
        """Return 1 or 0 a completion."""
        find = self.pattern.fullmatch if self.full else self.pattern.search
        return [float(find(to_text(completion)) is not None) for completion in completions]


class ExactMatch:
    r"""1 where the completion, or what a pattern takes from it, is the answer that the data give, else 0.

    No opinion where the data give no answer (None).

    Args:
        column: The column of the data that holds the answer.
        pattern: Where the completion gives its answer, as in `"#### (.+)"`: the first group (or all) of the last match.
            Without a match the reward is 0. By default the whole completion is the answer.
        normalise: Whether to ignore case, and white space but for one blank between words.

    Raises:
        ValueError: If the pattern is not a regular expression.
    """

    def __init__(self, column: str = "answer", pattern: str | None = None, normalise: bool = True) -> None:
        self.column, self.normalise = column, normalise
        self.pattern = None if pattern is None else _compile(pattern)
        self.required_columns = (column,)

    def __call__(self, completions: list[Text], **columns: Any) -> list[float | None]:
        """Return 1, 0 or None a completion."""
        pairs = zip(completions, columns[self.column], strict=True)
        return [None if answer is None else self._value(to_text(text), answer) for text, answer in pairs]

    def _value(self, text: str, answer: Any) -> float:
        answers = {to_text(answer) if isinstance(answer, list) else str(answer)}
        if isinstance(answer, float) and answer.is_integer():  # what an empty field makes of a column of integers
            answers.add(str(int(answer)))
        if self.pattern is not None:
            matches = list(self.pattern.finditer(text))
            if not matches:
                return 0.0
            text = (matches[-1][1] if self.pattern.groups else matches[-1][0]) or ""
        return float(self._plain(text) in map(self._plain, answers))

    def _plain(self, text: str) -> str:
        return " ".join(text.casefold().split()) if self.normalise else text


class Repetition:
    """Minus the share of word n-grams that the completion said before: 0 for no repetition, near -1 for nothing else.

    Args:
        n: Words in a row that count as one n-gram.

    Raises:
        ValueError: If `n` is less than 1.
    """

    def __init__(self, n: int = 2) -> None:
        if n < 1:
            raise ValueError(f"Repetition counts n-grams of at least 1 word, not {n}")
        self.n = n

    def __call__(self, completions: list[Text]) -> list[float]:
        """Return one number a completion, above -1 and at most 0."""
        return [self._value(to_text(completion).casefold().split()) for completion in completions]

    def _value(self, words: list[str]) -> float:
        grams = list(zip(*(words[i:] for i in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1 if grams else 0.0


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{pattern!r} is not a regular expression: {error}") from error
