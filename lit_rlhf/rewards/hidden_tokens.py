"""Find special tokens that rewards look for but don't receive, since completions are decoded without them."""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from types import CodeType
from typing import Any


def find_hidden_tokens(
    rewards: Iterable[Callable[..., Any]], completion_ids: list[list[int]], tokens: dict[int, str]
) -> list[str]:
    """Return the special tokens that matter to rewards.

    Args:
        rewards: Rewards that receive completions without special tokens.
        completion_ids: Token ids of the completions.
        tokens: Special tokens by id.

    Returns:
        Tokens that the code or an attribute of a reward contains, and those in half of the completions (four at least).
    """
    text = "\n".join(string for reward in rewards for string in _strings(reward))
    text += re.sub(r"\\(.)", r"\1", text)  # patterns escape brackets
    counts = Counter(i for ids in completion_ids for i in set(ids) & tokens.keys())
    frequent = {i for i, count in counts.items() if count >= max(4, len(completion_ids) / 2)}
    return [token for i, token in tokens.items() if i in frequent or token in text]


def _strings(reward: Any) -> Iterator[str]:
    """Yield the strings and patterns in the code of a reward, in the globals that it uses, and in its attributes."""
    values: list[Any] = list(getattr(reward, "__dict__", {}).values())
    if isinstance(reward, functools.partial):
        values += [*reward.args, *reward.keywords.values()]
        reward = reward.func
    function: Any = reward if hasattr(reward, "__code__") else type(reward).__call__
    codes: list[CodeType] = [function.__code__] if hasattr(function, "__code__") else []
    for code in codes:
        values += code.co_consts
        values += [function.__globals__.get(name) for name in code.co_names]
        codes += [constant for constant in code.co_consts if isinstance(constant, CodeType)]
    for value in values:
        if isinstance(value, str):
            yield value
        elif isinstance(value, re.Pattern) and isinstance(value.pattern, str):
            yield value.pattern
        elif isinstance(value, tuple | list | frozenset):
            yield from (item for item in value if isinstance(item, str))
