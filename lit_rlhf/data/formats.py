"""From a row, in any of TRL's data-set formats, to a prompt and its completions.

| rows                                                     | prompts | demonstrations | preferences |
|----------------------------------------------------------|---------|----------------|-------------|
| `prompt`                                                 | yes     |                |             |
| `prompt`, `completion`                                   | yes     | yes            |             |
| `messages` (or `conversations`): the last answer is cut off | yes  | yes            |             |
| `text`                                                   |         | yes            |             |
| `prompt`, `chosen`, `rejected`                           | yes     |                | yes         |
| `chosen`, `rejected`, which both begin with the prompt   | yes     |                | yes         |

Prompts and completions are strings or lists of messages. Where only one of them is messages, the other becomes a
message too: the user's, or the assistant's. Two columns of TRL's steer the chat template row by row:
`chat_template_kwargs` and `tools`.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from lit_rlhf.data.sources import Row
from lit_rlhf.types import Message, Text

_CONVERSATIONS = ("messages", "conversations")
_ANSWERS = ("completion", "chosen", "rejected")
_OTHER_PROMPTS = {"question", "instruction", "query", "input", "problem"}
_ROLES = {"human": "user", "gpt": "assistant"}
SPEAKER = "\n\nAssistant:"


@dataclass(frozen=True)
class Example:
    """One row, read.

    Attributes:
        prompt: A string, or the messages before the answer.
        completions: None for a prompt, one for a demonstration, the chosen and the rejected one for a preference.
        columns: Every other column of the row.
        template_kwargs: What this row hands to the chat template.
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    columns: Row = field(default_factory=dict)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def read_prompt(row: Row, prompt_column: str | None = None) -> Example:
    """Read a prompt. An answer that was cut off it stays in `columns`, as `completion` or as `chosen` and `rejected`.

    Raises:
        ValueError: If there is no prompt, or it is neither a string nor messages.
    """
    name = prompt_column or next((name for name in ("prompt", *_CONVERSATIONS) if name in row), None)
    if name in _CONVERSATIONS:
        prompt, answer = _split_answer(_text(_get(row, name, "prompt"), name))
        return _example(row, prompt, (), {name}, {"completion": answer} if answer else {})
    if name is None and "chosen" in row and "rejected" in row:
        name = "chosen"  # the prompt is what the two begin with
        pair = [_text(row[key], key) for key in ("chosen", "rejected")]
        _refuse_other_prompt(row, pair)
        prompt, (chosen, rejected) = _split_common(pair)
        return _example(row, prompt, (), {"chosen", "rejected"}, {"chosen": chosen, "rejected": rejected})
    name = name or "prompt"
    prompt = _text(_get(row, name, "prompt"), name)
    answers = {
        key: row[key] for key in _ANSWERS if key in row and (isinstance(row[key], str) or _is_messages(row[key]))
    }
    prompt, aligned = _align(prompt, [_text(answer, key) for key, answer in answers.items()])
    return _example(row, prompt, (), {name, *answers}, dict(zip(answers, aligned, strict=True)))


def read_demonstration(row: Row, prompt_column: str | None = None, completion_column: str | None = None) -> Example:
    """Read a demonstration: a prompt and the completion to imitate. A `text` is the completion of an empty prompt.

    Raises:
        ValueError: If there is no completion, or a text is neither a string nor messages.
    """
    name = completion_column or next((name for name in ("completion", *_CONVERSATIONS, "text") if name in row), None)
    if name is None:
        raise ValueError(
            "no demonstrations: expected columns 'prompt' and 'completion', or 'messages', or 'text'; the data have "
            f"{_names(row)}: name yours with completion_column and prompt_column, or make them with a transform"
        )
    completion = _text(_get(row, name, "completion"), name)
    if completion_column and prompt_column is None:
        _refuse_other_prompt(row, [completion])
    if prompt_column or name == "completion" or (completion_column and "prompt" in row):
        prompt_name = prompt_column or "prompt"
        prompt, (completion,) = _align(_text(_get(row, prompt_name, "prompt"), prompt_name), [completion])
        return _example(row, prompt, (completion,), {prompt_name, name})
    if isinstance(completion, str):
        return _example(row, "", (completion,), {name})
    prompt, answer = _split_answer(completion)
    if not answer:
        raise ValueError(f"the conversation in {name!r} has no turn of the assistant to learn from")
    return _example(row, prompt, (answer,), {name})


def read_preference(
    row: Row, prompt_column: str | None = None, chosen_column: str | None = None, rejected_column: str | None = None
) -> Example:
    """Read a preference: a prompt, the chosen and the rejected completion.

    Without a prompt column the prompt is what the two begin with: common leading messages; in strings the common
    prefix up to the start of a word, or up to the last `Assistant:` of a dialogue.

    Raises:
        ValueError: If a column is missing, or a text is neither a string nor messages.
    """
    names = [chosen_column or "chosen", rejected_column or "rejected"]
    pair = [_text(_get(row, name, key), name) for name, key in zip(names, ("chosen", "rejected"), strict=True)]
    prompt_name = prompt_column or ("prompt" if "prompt" in row else None)
    if prompt_name is None:
        _refuse_other_prompt(row, pair)
        prompt, pair = _split_common(pair)
    else:
        prompt, pair = _align(_text(_get(row, prompt_name, "prompt"), prompt_name), pair)
    return _example(row, prompt, tuple(pair), {*names, prompt_name or names[0]})


def _refuse_other_prompt(row: Row, texts: list[Text]) -> None:
    """Refuse to take strings for all there is of a row where a column has a name that prompts often have."""
    strings = all(isinstance(text, str) for text in texts)
    if strings and "prompt" not in row and (found := sorted(_OTHER_PROMPTS & row.keys())):
        raise ValueError(
            f"no column 'prompt', but {found[0]!r}: name it with prompt_column={found[0]!r}, or drop it by a transform"
        )


def _example(
    row: Row, prompt: Text, completions: tuple[Text, ...], used: set[str | None], made: Row | None = None
) -> Example:
    columns = {name: value for name, value in row.items() if name not in used} | (made or {})
    template = dict(row.get("chat_template_kwargs") or {})
    if tools := row.get("tools"):
        template["tools"] = json.loads(tools) if isinstance(tools, str) else tools
    return Example(prompt, completions, columns, {key: value for key, value in template.items() if value is not None})


def _get(row: Row, name: str, what: str) -> Any:
    if name not in row:
        raise ValueError(
            f"no column {name!r} in the data, which have {_names(row)}: "
            f"name the one to use with {what}_column, or make it with a transform"
        )
    return row[name]


def _names(row: Row) -> str:
    return ", ".join(map(repr, row)) or "no columns"


def _is_messages(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, dict) for item in value)


def _text(value: Any, name: str) -> Text:
    if isinstance(value, str):
        return value
    if value == [] or _is_messages(value):
        return [_message(item, name) for item in value]
    raise ValueError(f"the column {name!r} holds {value!r} where a string or a list of messages must be")


def _message(item: Row, name: str) -> Message:
    """One turn, without the empty fields that a table adds, from either spelling of role and content."""
    if "role" not in item and {"from", "value"} <= item.keys():
        item = {"role": _ROLES.get(item["from"], item["from"]), "content": item["value"]}
    if not isinstance(item.get("role"), str):
        raise ValueError(f"the column {name!r} holds the message {item!r}: a message needs 'role' and 'content'")
    return {key: value for key, value in item.items() if value is not None}


def _align(prompt: Text, completions: list[Text]) -> tuple[Text, list[Text]]:
    """Make all of them strings or all of them messages, and cut a repeated prompt off the completions."""
    if all(isinstance(text, str) for text in (prompt, *completions)):
        return prompt, completions
    if isinstance(prompt, str) and all(_is_dialogue(text) for text in completions):
        return _split_common(completions)
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return messages, [_reply(messages, text) for text in completions]


def _is_dialogue(text: Text) -> bool:
    return not isinstance(text, str) and len(text) > 1 and text[0]["role"] != "assistant"


def _reply(prompt: list[Message], completion: Text) -> Text:
    if isinstance(completion, str):
        return [{"role": "assistant", "content": completion}]
    repeated = len(completion) > len(prompt) and completion[: len(prompt)] == prompt
    return completion[len(prompt) :] if repeated else completion


def _split_answer(messages: Text) -> tuple[Text, list[Message]]:
    """Cut a conversation before its last turn of the assistant; what comes after that turn is left out."""
    if isinstance(messages, str):
        return messages, []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return messages, []
    return messages[: answers[-1]], [messages[answers[-1]]]


def _split_common(texts: list[Text]) -> tuple[Text, list[Text]]:
    """Cut what all texts begin with off them: the prompt."""
    if len(texts) == 1 and not isinstance(texts[0], str):
        prompt, answer = _split_answer(texts[0])
        return prompt, [answer]
    if all(isinstance(text, str) for text in texts):
        cut = _word_start([str(text) for text in texts])
    elif any(isinstance(text, str) for text in texts):
        raise ValueError("one of 'chosen' and 'rejected' is a string and the other messages: give both in one form")
    else:
        cut = _common([text[:-1] for text in texts])
    return texts[0][:cut], [text[cut:] for text in texts]


def _common(texts: list[Any]) -> int:
    """How many letters, or messages, all texts begin with."""
    same = (all(item == items[0] for item in items) for items in zip(*texts, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(map(len, texts)))


def _word_start(texts: list[str]) -> int:
    """Where the common prefix ends, moved back so that no completion begins inside a word."""
    prefix = texts[0][: _common(texts)]
    if SPEAKER in prefix:
        return prefix.rindex(SPEAKER) + len(SPEAKER)
    cut = len(prefix)
    while cut and any(_inside_word(text, cut) for text in texts):
        cut -= 1
    if cut and prefix[cut - 1] == " ":  # tokenizers write a word together with the space before it
        cut -= 1
    return cut


def _inside_word(text: str, cut: int) -> bool:
    around = text[cut - 1 : cut + 1]
    spaced = all(ord(letter) < 0x2E80 for letter in around)  # from there on, scripts without spaces between words
    return len(around) == 2 and spaced and not any(letter.isspace() for letter in around)
