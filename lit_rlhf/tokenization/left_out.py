"""Find what a chat template leaves out of a conversation without an error."""

from __future__ import annotations

import json
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
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
    messages = join(prompt, completion)
    calls = any(message.get("tool_calls") for message in messages)
    thoughts = [(f"{name!r} of an assistant", m[name]) for m in completion for name in REASONING if m.get(name)]
    others = [m for m in messages if not is_answer(m) and m["role"] != "user"]
    if not (calls or thoughts or others):
        return None
    template = read_template(tokenizer, kwargs)
    written = render(tokenizer, messages, kwargs, template.blocks)
    if calls and written == _without_calls(tokenizer, messages, kwargs, template.blocks):
        return "the calls of tools"
    parts = [(f"the message of {m['role']!r}", m.get("content")) for m in others]
    parts += [] if template.thinks else thoughts
    return next((what for what, text in parts if not _is_written(text, squash(written))), None)


def _without_calls(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: dict[str, Any] | None, blocks: bool
) -> str | None:
    """Render a conversation without calls of tools; None if the template refuses that."""
    bare = [{"content": "", **{key: value for key, value in m.items() if key != "tool_calls"}} for m in messages]
    try:
        return render(tokenizer, bare, kwargs, blocks)
    except InputError:
        return None


def _is_written(text: Any, written: str) -> bool:
    if not isinstance(text, str):
        return True
    forms = (text, json.dumps(text)[1:-1], json.dumps(text, ensure_ascii=False)[1:-1])
    return any(squash(form) in written for form in forms)
