"""Keep special tokens inside text apart from those that a chat template writes.

A special token in a message becomes a control token when the rendered template is encoded. Each occurrence is therefore
put between two private characters before rendering; afterwards it is encoded as ordinary text and they are removed.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

CONTEXT = "\n"
"""Placeholder for the preceding text while a continuation is encoded or decoded."""

PRIVATE = range(0xE000, 0xF000)
"""Code points that Unicode assigns to no character."""


@dataclass(frozen=True)
class Marks:
    """Two characters that occur nowhere in a row, around each special token that is text."""

    start: str = chr(PRIVATE[0])
    end: str = chr(PRIVATE[1])

    @classmethod
    def absent_from(cls, value: Any) -> Marks:
        """Choose characters that occur in no string of a value."""
        used = set("".join(strings_of(value)))
        free = (chr(code) for code in PRIVATE if chr(code) not in used)
        return cls(next(free), next(free))

    def wrap(self, value: Any, tokens: re.Pattern[str]) -> Any:
        """Mark the tokens in every string of a value, keys included."""
        if isinstance(value, str):
            return tokens.sub(lambda match: f"{self.start}{match[0]}{self.end}", value)
        if isinstance(value, dict):
            return {self.wrap(key, tokens): self.wrap(item, tokens) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.wrap(item, tokens) for item in value]
        return value

    def split(self, text: str, tokens: re.Pattern[str]) -> list[str]:
        """Split a text into ordinary and marked parts, in turn.

        A template may cut a text between a token and its mark: single marks are removed, and separate the text.
        """
        parts = re.split(f"{self.start}({tokens.pattern}){self.end}|[{self.start}{self.end}]", text)
        return [part or "" for part in parts]


def strings_of(value: Any) -> Iterator[str]:
    """Yield every string of nested dicts and lists, keys included."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from strings_of(list(value.items()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from strings_of(item)


def any_of(tokens: Iterable[str]) -> re.Pattern[str]:
    """Return a pattern of these tokens; a token takes precedence over those that it contains."""
    longest_first = sorted({token for token in tokens if token}, key=lambda token: (-len(token), token))
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


def encode(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> list[int]:
    """Return the ids of a text, without tokens that the tokenizer adds. With `as_text`, special tokens are text."""
    return list(tokenizer(text, add_special_tokens=False, split_special_tokens=as_text)["input_ids"])


def encode_after(tokenizer: PreTrainedTokenizerBase, text: str, as_text: bool = False) -> list[int]:
    """Return the ids of a text that continues another; those of the text alone if it would merge with its context."""
    if context := context_ids(tokenizer):
        both = encode(tokenizer, CONTEXT + text, as_text)
        if both[: len(context)] == context:
            return both[len(context) :]
    return encode(tokenizer, text, as_text)


@functools.lru_cache(maxsize=8)
def context_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `CONTEXT`, or none if it is not in the tokenizer's vocabulary."""
    try:
        return encode(tokenizer, CONTEXT)
    except Exception:  # `tokenizers` raises nothing narrower
        return []


def encode_parts(tokenizer: PreTrainedTokenizerBase, parts: list[str]) -> list[int]:
    """Return the ids of parts that continue a text: ordinary ones and, in turn, special tokens that are text."""
    ids: list[int] = []
    for i, part in enumerate(parts):
        if part:
            ids += _encode_as_text(tokenizer, part) if i % 2 else encode_after(tokenizer, part)
    return ids


def _encode_as_text(tokenizer: PreTrainedTokenizerBase, token: str) -> list[int]:
    ids = encode_after(tokenizer, token, as_text=True)
    if tokenizer.convert_tokens_to_ids(token) in ids and len(token) > 1:
        # an added token that is not special, or a vocabulary of words with the special tokens among them
        return encode_after(tokenizer, token[0]) + encode_after(tokenizer, token[1:])
    return ids
