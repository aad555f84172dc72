"""Row functions for the `transform` of a data module: a row in, a row out, or None to drop it."""

from __future__ import annotations

import re

from lit_rlhf.data.sources import Row


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
        if self.column not in row:
            raise ValueError(
                f"no column {self.column!r} to take first words of; the data have {', '.join(map(repr, row))}"
            )
        if not isinstance(row[self.column], str):
            raise ValueError(f"the column {self.column!r} holds {row[self.column]!r}: first words need a string")
        text = row[self.column].strip()
        ends = [word.end() for word in re.finditer(r"\S+", text)]
        if len(ends) <= self.words:
            return None
        cut = ends[self.words - 1]
        return {**row, "prompt": text[:cut], "reference": text[cut:]}
