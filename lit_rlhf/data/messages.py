"""Read a prompt or a completion, a string or a list of messages, as data sets write it.

Messages come with `role` and `content`, or with ShareGPT's `from` and `value`. Contents in typed blocks are joined to
their text. Null fields, which tables add to messages, tool calls and tools, are removed at every depth. Arguments of
tool calls become dicts.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lit_rlhf.data.readers import Row
from lit_rlhf.errors import InputError, brief
from lit_rlhf.types import Message, Text

_ROLES = {
    "system": "system",
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model"), "assistant"),
}
_SHAREGPT_ROLES = {
    **_ROLES,
    "function_call": "assistant",
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "function_response"), "tool"),
}
_TEXT_BLOCKS = ("text", "input_text", "output_text")
_PYTHON_MESSAGES = re.compile(r"\[\s*\{\s*'(role|content|from|value)'\s*:")


def read_text(value: Any, name: str) -> Text:
    """Return the string or the messages in the column `name`.

    A string that is a JSON list of messages, as a csv file has it, is read as these messages, and a single message as
    a list of one.

    Raises:
        ValueError: If the value is neither, or a message can't be read.
    """
    if isinstance(value, str):
        messages = _parse_messages(value, name)
        return value if messages is None else _messages(messages, name)
    if is_message(value):
        value = [value]
    if is_messages(value) or (isinstance(value, list) and not value):
        return _messages(value, name)
    raise InputError(f"the column {name!r} contains {brief(value)}: it must be a string or a list of messages")


def is_messages(value: Any) -> bool:
    """Return whether a value is a list of dicts with at least one item."""
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def is_message(value: Any) -> bool:
    """Return whether a value is a message."""
    keys = set(value) if isinstance(value, dict) else set()
    return ("role" in keys and bool({"content", "tool_calls"} & keys)) or {"from", "value"} <= keys


def read_template_kwargs(row: Row) -> dict[str, Any]:
    """Return a row's arguments of the chat template, from its columns `chat_template_kwargs` and `tools`.

    Raises:
        ValueError: If a column is neither what the template takes nor its JSON.
    """
    kwargs = _read_json(row.get("chat_template_kwargs"), "chat_template_kwargs") or {}
    if not isinstance(kwargs, dict):
        raise InputError(f"the column 'chat_template_kwargs' contains {brief(kwargs)}: it must be a dict")
    if tools := _read_json(row.get("tools"), "tools"):
        items = [_read_json(tool, "tools") for tool in tools] if isinstance(tools, list) else []
        if not items or not all(isinstance(item, dict) or callable(item) for item in items):
            raise InputError(f"the column 'tools' contains {brief(tools)}: it must be a list of dicts, or its JSON")
        kwargs = {**kwargs, "tools": items}
    return kwargs


def _messages(items: list[Row], name: str) -> list[Message]:
    return [_message(item, name) for item in items]


def _message(item: Row, name: str) -> Message:
    message: Message = _drop_nulls(item)
    if "role" not in message and {"from", "value"} <= message.keys():
        message = _from_sharegpt(message, name)
    if not isinstance(message.get("role"), str) or len(message) < 2:
        raise InputError(
            f"the column {name!r} contains the message {brief(item)}: a message needs 'role' and 'content'"
        )
    message["role"] = _ROLES.get(message["role"].strip().lower(), message["role"])
    if "content" in message:
        message["content"] = _content(message["content"], name)
    if calls := message.get("tool_calls"):
        message["tool_calls"] = _tool_calls(calls, name)
    return message


def _drop_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _drop_nulls(item) for key, item in value.items() if item is not None}
    return [_drop_nulls(item) for item in value] if isinstance(value, list) else value


def _from_sharegpt(item: Row, name: str) -> Message:
    speaker, value = item["from"], item["value"]
    role = _SHAREGPT_ROLES.get(str(speaker).strip().lower())
    if role is None:
        raise InputError(
            f"the column {name!r} has the unknown role {speaker!r}: rename it to one of {', '.join(_SHAREGPT_ROLES)}"
        )
    if str(speaker).strip().lower() == "function_call":
        call = _read_json(value, name)
        return {"role": role, "content": "", "tool_calls": [{"type": "function", "function": call}]}
    return {"role": role, "content": value}


def _content(content: Any, name: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InputError(
            f"the column {name!r} has a message with the content {brief(content)}: it must be a string or text blocks"
        )
    for block in content:
        is_text = isinstance(block, dict) and block.get("type", "text") in _TEXT_BLOCKS
        if not is_text or not isinstance(block.get("text"), str):
            raise InputError(
                f"the column {name!r} has a message with the block {brief(block)}: only text is read, in blocks such "
                "as {'type': 'text', 'text': 'Hello'}; remove the block or the row with a transform"
            )
    return "".join(block["text"] for block in content)


def _tool_calls(value: Any, name: str) -> list[Row]:
    calls = _read_json(value, name)
    if not is_messages(calls) or not all(isinstance(call.get("function", call), dict) for call in calls):
        raise InputError(f"the column {name!r} has the tool calls {brief(value)}: they must be a list of dicts")
    return [
        {**call, "function": _with_arguments(call["function"])} if "function" in call else _with_arguments(call)
        for call in calls
    ]


def _with_arguments(function: Row) -> Row:
    """Return a called function with arguments given as JSON parsed, since templates write arguments as JSON."""
    if not isinstance(function.get("arguments"), str):
        return function
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        return function
    return {**function, "arguments": arguments} if isinstance(arguments, dict) else function


def _read_json(value: Any, name: str) -> Any:
    """Return a value without null fields; a string is parsed, and keeps its nulls."""
    if not isinstance(value, str):
        return _drop_nulls(value)
    try:
        return json.loads(value) if value.strip() else None
    except (ValueError, RecursionError) as error:
        raise InputError(f"the column {name!r} contains {brief(value)}, which is not JSON: {error}") from error


def _parse_messages(text: str, name: str) -> list[Row] | None:
    """Return the messages that a string contains as JSON, or None if it is any other text."""
    stripped = text.strip()
    if not stripped.startswith("[") or not stripped.endswith("]"):
        return None
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError) as error:
        if _PYTHON_MESSAGES.match(stripped):
            raise InputError(
                f"the column {name!r} has messages in Python's notation, {brief(text)}: write them with json.dumps"
            ) from error
        return None
    return value if is_messages(value) and all(map(is_message, value)) else None
