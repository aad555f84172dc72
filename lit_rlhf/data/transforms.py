"""Functions for the `transform` of a data module: they return a row, or None to drop it."""

from __future__ import annotations

import re

from lit_rlhf.data.formats import SPEAKER
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import InputError


class LastAnswer:
    """Splits a `Human:` / `Assistant:` dialogue, as in Anthropic's HH data, before its last answer.

    Adds `prompt`, which ends in `Assistant:`, and `completion`. Keeps all columns. Drops rows without an answer.

    Args:
        column: Name of the dialogue column.
    """

    def __init__(self, column: str = "chosen") -> None:
        self.column = column

    def __call__(self, row: Row) -> Row | None:
        """Return the row with prompt and completion, or None if there is no answer.

        Raises:
            ValueError: If the column does not exist or is not a string.
        """
        prompt, speaker, answer = read_string(row, self.column, "LastAnswer").rpartition(SPEAKER)
        return {**row, "prompt": prompt + speaker, "completion": answer} if speaker and answer.strip() else None


class FirstWords:
    """Makes a prompt from the first words of a text, for the policy to continue.

    Adds `prompt` and `reference`, the rest of the text. Keeps all columns. Drops rows without a word after the prompt.

    Args:
        column: Name of the text column.
        words: Number of words in the prompt.

    Attributes:
        continues_text: A policy with a chat template is meant to continue the text, so there is no warning about it.
    """

    continues_text = True

    def __init__(self, column: str = "text", words: int = 5) -> None:
        if words < 1:
            raise InputError(f"words={words}: a prompt needs at least 1 word")
        self.column, self.words = column, words

    def __call__(self, row: Row) -> Row | None:
        """Return the row with prompt and reference, or None if the text is too short.

        Raises:
            ValueError: If the column does not exist or is not a string.
        """
        text = read_string(row, self.column, "FirstWords").strip()
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        if len(ends) <= self.words:
            return None
        cut = ends[self.words - 1]
        return {**row, "prompt": text[:cut], "reference": text[cut:]}


class AsChat:
    """Makes a conversation of a question, for a model with a chat template.

    Adds `prompt`, a list of messages. Keeps all columns.

    Args:
        column: Name of the question's column.
        instruction: Text after the question, on the next line.
        system: A system message.
    """

    def __init__(self, column: str = "question", instruction: str = "", system: str = "") -> None:
        self.column, self.instruction, self.system = column, instruction, system

    def __call__(self, row: Row) -> Row:
        """Return the row with the prompt.

        Raises:
            ValueError: If the column does not exist or is not a string.
        """
        question = read_string(row, self.column, "AsChat")
        content = f"{question}\n{self.instruction}" if self.instruction else question
        system = [{"role": "system", "content": self.system}] if self.system else []
        return {**row, "prompt": [*system, {"role": "user", "content": content}]}


def read_string(row: Row, column: str, transform: str) -> str:
    """Return the string in a column; `transform` is the name for error messages.

    Raises:
        ValueError: If the column does not exist or is not a string.
    """
    if column not in row:
        raise InputError(f"{transform} needs the column {column!r}; the data have {', '.join(map(repr, row))}")
    text = row[column]
    if not isinstance(text, str):
        raise InputError(f"{transform} needs a string in the column {column!r}, not {text!r}")
    return text
