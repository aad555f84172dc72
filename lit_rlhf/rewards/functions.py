"""Rule-based rewards. Their arguments are plain values, so they can be configured in YAML."""

from __future__ import annotations

import math
import re
from typing import Any, Literal

from lit_rlhf.errors import InputError
from lit_rlhf.types import Text


def to_text(text: Text) -> str:
    """Convert a prompt or a completion to a string; the contents of messages are joined by newlines."""
    if isinstance(text, str):
        return text
    return "\n".join(_content(message.get("content")) for message in text)


def _content(content: Any) -> str:
    if isinstance(content, list):  # typed content blocks; only text blocks count
        return "".join(block.get("text", "") for block in content)
    return content or ""


class Length:
    """Length penalty: 0 for a length from `minimum` to `maximum`, otherwise minus the relative distance to the bound.

    `Length(minimum=40, maximum=40)` targets 40; 60 then gets -0.5.

    Args:
        minimum: Minimum length without a penalty.
        maximum: Maximum length without a penalty, or None for no limit.
        unit: Unit of length. Tokens are the policy's, EOS token included.

    Raises:
        ValueError: If the bounds exclude every length, or neither is given.
    """

    def __init__(
        self, minimum: int = 0, maximum: int | None = None, unit: Literal["tokens", "words", "chars"] = "tokens"
    ) -> None:
        if minimum < 0 or (maximum is not None and maximum < max(minimum, 1)):
            raise InputError(f"Length needs 0 <= minimum <= maximum, and maximum >= 1, not {minimum} and {maximum}")
        if minimum == 0 and maximum is None:
            raise InputError("Length has neither a minimum nor a maximum: give at least one")
        if unit not in ("tokens", "words", "chars"):
            raise InputError(f"the unit of Length is tokens, words or chars, not {unit!r}")
        self.minimum, self.maximum, self.unit = minimum, maximum, unit

    def __call__(self, completions: list[Text], completion_ids: list[list[int]]) -> list[float]:
        """Return one number per completion, at most 0."""
        if self.unit == "tokens":
            return [self._value(len(ids)) for ids in completion_ids]
        texts = map(to_text, completions)
        return [self._value(len(text.split() if self.unit == "words" else text)) for text in texts]

    def _value(self, length: int) -> float:
        if length < self.minimum:
            return length / self.minimum - 1
        return min(0.0, 1 - length / self.maximum) if self.maximum else 0.0


class Zero:
    """0 for every completion: for a policy that learns from the KL to a teacher alone."""

    def __call__(self, completions: list[Text]) -> list[float]:
        """Return 0 per completion."""
        return [0.0] * len(completions)


class RegexMatch:
    r"""1 if a regular expression matches the completion, else 0.

    `RegexMatch(r"[.!?]\s*$")` checks that the last sentence is complete, `RegexMatch(r"(?s)<a>.*</a>", full=True)` a
    format.

    Args:
        pattern: Regular expression, in the syntax of `re`. Inline flags are allowed: `(?i)` to ignore case, `(?s)` for
            a dot that matches newlines.
        full: Whether the pattern must match the full completion, instead of any part of it.
        special_tokens: Whether completions contain their special tokens, for tags that were added to the tokenizer as
            such.

    Raises:
        ValueError: If the pattern is not a regular expression.
    """

    def __init__(self, pattern: str, full: bool = False, special_tokens: bool = False) -> None:
        self.pattern, self.full, self.special_tokens = compile_pattern(pattern), full, special_tokens

    def __call__(self, completions: list[Text]) -> list[float]:
        """Return 1 or 0 per completion."""
        find = self.pattern.fullmatch if self.full else self.pattern.search
        return [float(find(to_text(completion)) is not None) for completion in completions]


class ExactMatch:
    r"""1 if the completion, or what a pattern extracts from it, equals the reference answer, else 0.

    None (no opinion) if a row has no reference answer; with a list of answers, any of them is right.

    Args:
        column: Name of the column of reference answers.
        pattern: Regular expression that extracts the answer, such as `"#### (.+)"`: the first group (or all) of the
            last match. Without a match the reward is 0. By default the full completion is the answer. A reference
            answer is read by the same pattern, or taken whole where the pattern finds nothing in it.
        normalise: Whether to ignore case, white space at the ends, its amount elsewhere, and the commas of thousands
            (1,450 equals 1450). Everything else counts: `18`, `18.0`, `$18` and `18.` are four answers, and a pattern
            may leave out the sign and the full stop.
        special_tokens: Whether completions contain their special tokens, for tags that were added to the tokenizer as
            such.

    Raises:
        ValueError: If the pattern is not a regular expression.
    """

    def __init__(
        self,
        column: str = "answer",
        pattern: str | None = None,
        normalise: bool = True,
        special_tokens: bool = False,
    ) -> None:
        self.column, self.normalise, self.special_tokens = column, normalise, special_tokens
        self.pattern = None if pattern is None else compile_pattern(pattern)
        self.required_columns = (column,)

    def __call__(self, completions: list[Text], **columns: Any) -> list[float | None]:
        """Return 1, 0 or None per completion."""
        pairs = zip(completions, columns[self.column], strict=True)
        return [self._value(to_text(text), answer) for text, answer in pairs]

    def _value(self, text: str, answer: Any) -> float | None:
        golds = [extract(reference, self.pattern) or reference for reference in references(answer)]
        found = extract(text, self.pattern)
        if not golds or found is None:
            return 0.0 if golds else None
        return float(self._normalise(found) in map(self._normalise, golds))

    def _normalise(self, text: str) -> str:
        return " ".join(_THOUSANDS.sub("", text.casefold()).split()) if self.normalise else text


_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")


def extract(text: str, pattern: re.Pattern[str] | None) -> str | None:
    """Return the first group (or all) of the pattern's last match, None without one; the text without a pattern."""
    if pattern is None:
        return text
    matches = list(pattern.finditer(text))
    if not matches:
        return None
    return (matches[-1][1] if pattern.groups else matches[-1][0]) or ""


def references(answer: Any) -> list[str]:
    """Return the texts that count as right: of messages, of each answer in a list, or of one value; [] for none.

    NaN is none: an empty field of a table.
    """
    if answer is None or (isinstance(answer, float) and math.isnan(answer)):
        return []
    if isinstance(answer, list):
        messages = bool(answer) and isinstance(answer[0], dict)
        return [to_text(answer)] if messages else [text for item in answer for text in references(item)]
    if isinstance(answer, float) and answer.is_integer():  # a table with an empty field turns integers into floats
        return [str(answer), str(int(answer))]
    return [str(answer)]


class Repetition:
    """Repetition penalty: minus the share of word n-grams that repeat earlier ones. 0 without repetition, above -1.

    Args:
        n: Words per n-gram.

    Raises:
        ValueError: If `n` is less than 1.
    """

    def __init__(self, n: int = 2) -> None:
        if n < 1:
            raise InputError(f"Repetition needs n-grams of at least 1 word, not {n}")
        self.n = n

    def __call__(self, completions: list[Text]) -> list[float]:
        """Return one number per completion, above -1 and at most 0."""
        return [self._value(to_text(completion).casefold().split()) for completion in completions]

    def _value(self, words: list[str]) -> float:
        grams = list(zip(*(words[i:] for i in range(self.n)), strict=False))
        return len(set(grams)) / len(grams) - 1 if grams else 0.0


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression.

    Raises:
        ValueError: If it is none.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise InputError(f"{pattern!r} is not a regular expression: {error}") from error
