"""Find what a chat template leaves out of a conversation without an error."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.tokenization.template import read_template, render
from lit_rlhf.tokenization.thoughts import REASONING
from lit_rlhf.tokenization.turns import is_answer, join, squash
from lit_rlhf.types import Message, Text


def left_out(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: Text, kwargs: dict[str, Any] | None = None
) -> str | None:
    """Name what a chat template does not write of a conversation; None if it writes everything.

    Looked for are messages of roles other than user and assistant, calls of tools, and thoughts in fields of their own
    if the template knows none. Thoughts that it drops from earlier turns are no loss.

    Args:
        tokenizer: The tokenizer.
        prompt: The messages before the completion.
        completion: The messages that continue them.
        kwargs: Arguments of the chat template.
    """
    if isinstance(prompt, str) or isinstance(completion, str):
        return None
    template = read_template(tokenizer, kwargs)
    learned = () if template.thinks else completion
    parts = [part for message in join(prompt, completion) for part in _parts(message)]
    parts += [(f"{name!r} of an assistant", text) for m in learned for name in REASONING if (text := m.get(name))]
    if not parts:
        return None
    written = squash(render(tokenizer, join(prompt, completion), kwargs, template.blocks))
    return next((what for what, text in parts if not _is_written(text, written)), None)


def _parts(message: Message) -> list[tuple[str, Any]]:
    calls = message.get("tool_calls") or []
    parts = [("a call of a tool", call.get("function", call).get("name")) for call in calls]
    if not is_answer(message) and message["role"] != "user":
        parts.append((f"the message of {message['role']!r}", message.get("content")))
    return parts


def _is_written(text: Any, written: str) -> bool:
    if not isinstance(text, str):
        return True
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(squash(form) in written for form in forms)
