"""Row functions for the `transform` of a data module: a row in, a row out, or None to drop it."""

from __future__ import annotations

import re

from lit_rlhf.data.formats import SPEAKER
from lit_rlhf.data.sources import Row


class LastAnswer:
    """Cuts a dialogue of `Human:` and `Assistant:` before its last answer, as those of Anthropic's HH are written.

    Adds `prompt`, which ends in `Assistant:`, and `completion`. Rows without an answer are dropped.

    Args:
        column: The column that holds the dialogue; it stays, with all others.
    """

    def __init__(self, column: str = "chosen") -> None:
        self.column = column

    def __call__(self, row: Row) -> Row | None:
        """Return the row with prompt and completion, or None where nothing is answered.

        Raises:
            ValueError: If the column does not exist or holds no string.
        """
        prompt, speaker, answer = string_in(row, self.column, "an answer").rpartition(SPEAKER)
        return {**row, "prompt": prompt + speaker, "completion": answer} if speaker and answer.strip() else None


class FirstWords:
    """Makes a prompt of the first words of a text, for a policy to continue.

    Adds `prompt`, and `reference`: how the text itself goes on. Rows without a word after the prompt are dropped.

    Args:
        column: The column that holds the text; it stays, with all others.
        words: How many words the prompt takes.
    """

    def __init__(self, column: str = "text", words: int = 5) -> None:
        if words < 1:
            raise ValueError(f"words={words}: a prompt takes at least 1 word")
        self.column, self.words = column, words

    def __call__(self, row: Row) -> Row | None:
        """Return the row with its prompt, or None where the text is too short.

        Raises:
            ValueError: If the column does not exist or holds no string.
        """
        text = string_in(row, self.column, "first words").strip()
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        if len(ends) <= self.words:
            return None
        cut = ends[self.words - 1]
        return {**row, "prompt": text[:cut], "reference": text[cut:]}


def string_in(row: Row, column: str, wanted: str) -> str:
    """The string that a column holds.

    Raises:
        ValueError: If there is none.
    """
    if column not in row:
        raise ValueError(f"no column {column!r} to take {wanted} of; the data have {', '.join(map(repr, row))}")
    text = row[column]
    if not isinstance(text, str):
        raise ValueError(f"the column {column!r} holds {text!r}: {wanted} can be taken of a string only")
    return text
