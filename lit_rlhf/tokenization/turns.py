"""The messages of a conversation: which are the assistant's, and where a completion begins."""

from __future__ import annotations

import re

from lit_rlhf.errors import InputError
from lit_rlhf.types import Message, Text

ANSWERS = ("assistant", "model", "bot", "gpt")
"""Roles whose turns are learned."""

ROLES = (*ANSWERS, "system", "developer", "user", "human", "tool", "function", "ipython", "environment", "observation")
"""Roles that templates know, some by a token of their own (`<|user|>`)."""


def split_turns(
    prompt: Text, completions: tuple[Text, ...], all_turns: bool = False
) -> tuple[Text, tuple[list[Message], ...]] | None:
    """Split a conversation so that completions begin with an assistant's turn; None if it is so already.

    Args:
        prompt: The prompt.
        completions: Its completions. Turns of others that all of them begin with become part of the prompt.
        all_turns: Whether a single completion begins with the first assistant turn, not with the last.
    """
    if isinstance(prompt, str) or not completions or any(isinstance(text, str) for text in completions):
        return None
    chats: list[list[Message]] = [list(text) for text in completions if not isinstance(text, str)]
    before = list(prompt)
    while all(len(chat) > 1 and not is_answer(chat[0]) and chat[0] == chats[0][0] for chat in chats):
        before, chats = [*before, chats[0][0]], [chat[1:] for chat in chats]
    if all_turns and len(chats) == 1:
        whole = join(before, chats[0])
        start = next((i for i, message in enumerate(whole) if i and is_answer(message)), len(before))
        if start < len(before) and not (start == len(before) - 1 and is_answer(before[-1])):
            before, chats = whole[:start], [whole[start:]]
    return None if before == prompt else (before, tuple(chats))


def is_answer(message: Message) -> bool:
    """Whether a message is an assistant's."""
    return message.get("role") in ANSWERS


def check_role(message: Message, control: re.Pattern[str]) -> None:
    """Check that a role can't become a control token where a template puts it between the token's ends.

    Raises:
        ValueError: If it can, as "im_end" between `<|` and `|>`.
    """
    role = message["role"]
    if role not in ROLES and (not re.fullmatch(r"[\w .-]+", role) or re.escape(role) in control.pattern):
        raise InputError(
            f"a message has the role {role!r}, which can become a control token of the template: rename it"
        )


def join(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """Append a completion to a conversation; an assistant turn at the end of the prompt is continued."""
    if not _is_continued(prompt, completion):
        return [*prompt, *completion]
    return [*prompt[:-1], {**completion[0], "content": contents([prompt[-1], completion[0]])}, *completion[1:]]


def _is_continued(prompt: list[Message], completion: list[Message]) -> bool:
    return bool(prompt and completion) and prompt[-1]["role"] == completion[0]["role"] == "assistant"


def contents(messages: list[Message]) -> str:
    """Return the joined texts of messages."""
    return "".join(text for message in messages if isinstance(text := message.get("content"), str))


def squash(text: str) -> str:
    """Remove all white space, which templates change."""
    return "".join(text.split())
