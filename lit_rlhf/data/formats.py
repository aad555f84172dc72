"""Read prompts and completions from rows in any of TRL's data set formats.

| rows                                                     | prompts | demonstrations | preferences |
|----------------------------------------------------------|---------|----------------|-------------|
| `prompt`                                                 | yes     |                |             |
| `prompt`, `completion`                                   | yes     | yes            |             |
| `messages` (or `conversations`), up to the last answer   | yes     | yes            |             |
| `text`                                                   |         | yes            |             |
| `prompt`, `chosen`, `rejected`                           | yes     |                | yes         |
| `conversations`, `chosen`, `rejected`                    | yes     |                | yes         |
| `chosen`, `rejected`, with the prompt as common prefix   | yes     |                | yes         |

Prompts and completions are strings or lists of messages. If only one of them is a list of messages, the other becomes
a message too, of the user or the assistant. Two columns, as in TRL, are per-row arguments of the chat template:
`chat_template_kwargs` and `tools`. A `system` column, as in ShareGPT data, is the system message of a conversation.
Columns of images, videos and audio must be empty.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.data.messages import is_message, is_messages, read_template_kwargs, read_text
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import InputError, brief
from lit_rlhf.types import Message, Text

_CONVERSATIONS = ("messages", "conversations")
_ANSWERS = ("completion", "chosen", "rejected")
_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_OTHER_PROMPTS = {"question", "instruction", "query", "input", "problem"}
SPEAKER = "\n\nAssistant:"
_FIRST_UNSPACED = 0x2E80
"""First code point of the scripts that do not separate words by spaces."""


@dataclass(frozen=True)
class Example:
    """Prompt and completions of a row.

    Attributes:
        prompt: A string, or the messages before the answer.
        completions: Empty for a prompt, one for a demonstration, chosen and rejected for a preference.
        columns: All other columns of the row.
        template_kwargs: The row's arguments of the chat template.
    """

    prompt: Text
    completions: tuple[Text, ...] = ()
    columns: Row = field(default_factory=dict)
    template_kwargs: dict[str, Any] = field(default_factory=dict)


def read_prompt(row: Row, prompt_column: str | None = None) -> Example:
    """Read a prompt. Answers stay in `columns`, as `completion` or as `chosen` and `rejected`.

    Raises:
        ValueError: If there is no prompt, or it is neither a string nor messages.
    """
    name = prompt_column or next((name for name in ("prompt", *_CONVERSATIONS) if name in row), None)
    if name in _CONVERSATIONS:
        conversation = _conversation(row, name, is_text_allowed=prompt_column is not None)
        if isinstance(conversation, str) or not conversation or conversation[-1]["role"] != "assistant":
            return _prompt_with_answers(row, name, conversation)
        prompt, answer = _split_answer(conversation)
        return _example(row, prompt, (), {name}, {"completion": answer})
    if name is None and "chosen" in row and "rejected" in row:
        name = "chosen"  # the prompt is the common prefix of the pair
        pair = [_nonempty(row[key], key) for key in ("chosen", "rejected")]
        _refuse_other_prompt(row, pair)
        prompt, (chosen, rejected) = _split_common(pair)
        return _example(row, prompt, (), {"chosen", "rejected"}, {"chosen": chosen, "rejected": rejected})
    name = name or "prompt"
    return _prompt_with_answers(row, name, read_text(_get(row, name, "prompt"), name))


def _prompt_with_answers(row: Row, name: str, prompt: Text) -> Example:
    """Return an example with this prompt, and the row's answers among the columns."""
    answers = {key: row[key] for key in _ANSWERS if _is_text(row.get(key))}
    prompt, aligned = _align(prompt, [read_text(answer, key) for key, answer in answers.items()])
    return _example(row, prompt, (), {name, *answers}, dict(zip(answers, aligned, strict=True)))


def read_demonstration(row: Row, prompt_column: str | None = None, completion_column: str | None = None) -> Example:
    """Read a demonstration: a prompt and the completion to imitate. A `text` is the completion of an empty prompt.

    Raises:
        ValueError: If there is no completion, or a value is neither a string nor messages.
    """
    name = completion_column or next((name for name in ("completion", *_CONVERSATIONS, "text") if name in row), None)
    if name is None:
        raise InputError(
            "no demonstrations: expected columns 'prompt' and 'completion', or 'messages', or 'text'; the data have "
            f"{_names(row)}: set completion_column and prompt_column, or add the columns with a transform"
        )
    if name in _CONVERSATIONS:
        completion = _conversation(row, name, is_text_allowed=completion_column is not None)
    else:
        completion = _nonempty(_get(row, name, "completion"), name)
    if completion_column and prompt_column is None:
        _refuse_other_prompt(row, [completion])
    if prompt_column or name == "completion" or (completion_column and "prompt" in row):
        prompt_name = prompt_column or "prompt"
        prompt, (completion,) = _align(_nonempty(_get(row, prompt_name, "prompt"), prompt_name), [completion])
        return _example(row, prompt, (completion,), {prompt_name, name})
    if isinstance(completion, str):
        return _example(row, "", (completion,), {name})
    prompt, answer = _split_answer(completion)
    if not answer:
        raise InputError(f"the conversation in {name!r} has no assistant turn to learn from")
    return _example(row, prompt, (answer,), {name})


def read_preference(
    row: Row, prompt_column: str | None = None, chosen_column: str | None = None, rejected_column: str | None = None
) -> Example:
    """Read a preference: a prompt, the chosen and the rejected completion.

    Without a prompt column, the prompt is the common prefix of the pair: its common leading messages, or in strings
    the common prefix up to the start of a word, or up to the last `Assistant:` of a dialogue.

    Raises:
        ValueError: If a column is missing, or a value is neither a string nor messages.
    """
    names = [chosen_column or "chosen", rejected_column or "rejected"]
    pair = [_nonempty(_get(row, name, key), name) for name, key in zip(names, ("chosen", "rejected"), strict=True)]
    prompt_name = prompt_column or ("prompt" if "prompt" in row else None)
    if prompt_name is None and not all(map(_is_dialogue, pair)):  # ShareGPT data have the prompt in `conversations`
        prompt_name = next((name for name in _CONVERSATIONS if row.get(name)), None)
    if prompt_name is None:
        _refuse_other_prompt(row, pair)
        prompt, pair = _split_common(pair)
    elif prompt_name in _CONVERSATIONS:
        prompt, pair = _align(_conversation(row, prompt_name, is_text_allowed=prompt_column is not None), pair)
    else:
        prompt, pair = _align(_nonempty(_get(row, prompt_name, "prompt"), prompt_name), pair)
    return _example(row, prompt, tuple(pair), {*names, prompt_name or names[0]})


def cut_repeated_prompt(example: Example) -> Example | None:
    """Return the example with the prompt removed from its string completions; None if not all begin with it."""
    prompt = example.prompt
    answers = {name: example.columns[name] for name in _ANSWERS if name in example.columns}
    texts = example.completions or tuple(answers.values())
    if not isinstance(prompt, str) or not prompt or not texts or not all(_repeats(prompt, text) for text in texts):
        return None
    if example.completions:
        return replace(example, completions=tuple(text[len(prompt) :] for text in example.completions))
    return replace(example, columns={**example.columns, **{k: text[len(prompt) :] for k, text in answers.items()}})


def _repeats(prompt: str, text: Any) -> bool:
    """Return whether a string continues a prompt that it begins with, and not inside a word."""
    if not isinstance(text, str) or len(text) <= len(prompt) or not text.startswith(prompt):
        return False
    return not all(char.isalnum() and ord(char) < _FIRST_UNSPACED for char in text[len(prompt) - 1 : len(prompt) + 1])


def _refuse_other_prompt(row: Row, texts: list[Text]) -> None:
    """Raise a ValueError if all texts are strings and another column has a usual name of a prompt column."""
    strings = all(isinstance(text, str) for text in texts)
    if strings and "prompt" not in row and (found := sorted(_OTHER_PROMPTS & row.keys())):
        raise InputError(
            f"no column 'prompt', but {found[0]!r}: set prompt_column={found[0]!r}, or drop the column with a transform"
        )


def _example(
    row: Row, prompt: Text, completions: tuple[Text, ...], used: set[str | None], answers: Row | None = None
) -> Example:
    for name in _MEDIA:
        if row.get(name):
            raise InputError(
                f"the column {name!r} is not empty, but only text is read: drop it or the row in a transform"
            )
    if "instruction" in used and row.get("input"):
        raise InputError(
            "the instruction has an 'input' beside it, as in Alpaca's data: join the two into a prompt in a transform"
        )
    columns = {name: value for name, value in row.items() if name not in used} | (answers or {})
    return Example(_with_system(row, prompt), completions, columns, read_template_kwargs(row))


def _get(row: Row, name: str, what: str) -> Any:
    if name not in row:
        raise InputError(
            f"no column {name!r} in the data, which have {_names(row)}: "
            f"set {what}_column to the column's name, or add the column with a transform"
        )
    return row[name]


def _names(row: Row) -> str:
    return ", ".join(map(repr, row)) or "no columns"


def _is_text(value: Any) -> bool:
    return isinstance(value, str) or is_message(value) or is_messages(value)


def _nonempty(value: Any, name: str) -> Text:
    text = read_text(value, name)
    if isinstance(text, list) and not text:
        raise InputError(f"the column {name!r} contains an empty list: it must be a string or a list of messages")
    return text


def _conversation(row: Row, name: str, is_text_allowed: bool) -> Text:
    """Return the messages in the column `name`."""
    messages = read_text(_get(row, name, "prompt"), name)
    if isinstance(messages, str) and not is_text_allowed:
        raise InputError(f"the column {name!r} contains {brief(messages)}: it must be a list of messages, or its JSON")
    return messages


def _with_system(row: Row, prompt: Text) -> Text:
    """Return messages after the system message of a column `system`."""
    system = row.get("system")
    if isinstance(prompt, str):
        if isinstance(system, str) and system:
            rank_zero_warn("the column 'system' is not a part of prompts that are strings: join them in a transform")
        return prompt
    if not system or (prompt and prompt[0]["role"] == "system"):
        return prompt
    if not isinstance(system, str):
        raise InputError(f"the column 'system' contains {brief(system)}: it must be a string")
    return [{"role": "system", "content": system}, *prompt]


def _align(prompt: Text, completions: list[Text]) -> tuple[Text, list[Text]]:
    """Convert to all strings or all messages, and remove a repeated prompt from the completions."""
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
    """Split a conversation before its last assistant turn; later turns are dropped."""
    if isinstance(messages, str):
        return messages, []
    answers = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not answers:
        return messages, []
    return messages[: answers[-1]], [messages[answers[-1]]]


def _split_common(texts: list[Text]) -> tuple[Text, list[Text]]:
    """Split the common prefix, the prompt, off all texts."""
    if len(texts) == 1 and not isinstance(texts[0], str):
        prompt, answer = _split_answer(texts[0])
        return prompt, [answer]
    if all(isinstance(text, str) for text in texts):
        cut = _word_start([str(text) for text in texts])
    elif any(isinstance(text, str) for text in texts):
        raise InputError("one of 'chosen' and 'rejected' is a string and the other messages: use the same type in both")
    else:
        cut = _common_length([text[:-1] for text in texts])
    return texts[0][:cut], [text[cut:] for text in texts]


def _common_length(texts: list[Any]) -> int:
    """Return the length of the common prefix, in characters or messages."""
    same = (all(item == items[0] for item in items) for items in zip(*texts, strict=False))
    return next((i for i, equal in enumerate(same) if not equal), min(map(len, texts)))


def _word_start(texts: list[str]) -> int:
    """Return the length of the common prefix, shortened so that no completion begins inside a word."""
    prefix = texts[0][: _common_length(texts)]
    if SPEAKER in prefix:
        return prefix.rindex(SPEAKER) + len(SPEAKER)
    cut = len(prefix)
    while cut and any(_inside_word(text, cut) for text in texts):
        cut -= 1
    if cut and prefix[cut - 1] == " ":  # tokenizers join a word with the space before it
        cut -= 1
    return cut


def _inside_word(text: str, cut: int) -> bool:
    around = text[cut - 1 : cut + 1]
    spaced = all(ord(char) < _FIRST_UNSPACED for char in around)
    return len(around) == 2 and spaced and not any(char.isspace() for char in around)
