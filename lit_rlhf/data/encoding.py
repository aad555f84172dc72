"""Read rows into examples and encode examples into token ids, once per tokenizer."""

from __future__ import annotations

import dataclasses
import json
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_rlhf import tokenization
from lit_rlhf.data.checks import check_row
from lit_rlhf.data.formats import Example, cut_repeated_prompt
from lit_rlhf.data.sources import Row
from lit_rlhf.errors import InputError, brief

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")

Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Encoded:
    """Token ids of an example, with the row index in its data source.

    `learned` is 1 at the tokens of each completion that an assistant wrote, and 0 at others; empty if there are none.
    `parse_special_tokens` says whether special tokens in plain strings were encoded as such.
    """

    index: int
    example: Example
    prompt: Ids
    completions: tuple[Ids, ...]
    learned: tuple[Ids, ...] = ()
    parse_special_tokens: bool = True


class EncodedRows(Sequence[Encoded]):
    """Encoded rows in memory. Indexing with a list returns a list of rows."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return [self.rows[i] for i in index] if isinstance(index, list) else self.rows[index]


def read_examples(
    rows: Iterable[Row], read: Callable[[Row], Example], transform: Callable[[Row], Row | None] | None = None
) -> dict[int, Example]:
    """Apply `transform` and read each row. Return the examples by row index, without the rows that were dropped.

    A column that only some rows have is None in the others. If at least half of the rows repeat their prompt at the
    start of all their string completions, it is cut off there.

    Raises:
        ValueError: If a row can't be read (names the row index), or if the transform drops every row, raises, or
            returns something other than a dict or None.
    """
    examples: dict[int, Example] = {}
    total = 0
    for index, row in _enumerate(rows):
        total += 1
        try:
            if (example := _read_example(row, read, transform)) is not None:
                examples[index] = example
        except InputError as error:
            raise InputError(f"row {index}: {error}") from error
    _report(total - len(examples), total, "rows were dropped by the transform", "change the transform")
    examples = _cut_repeated_prompts(examples)
    names = dict.fromkeys(name for example in examples.values() for name in example.columns)
    for example in examples.values():
        example.columns.update({name: None for name in names if name not in example.columns})
    return examples


def _enumerate(rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    iterator, index = iter(rows), 0
    while True:
        try:
            row = next(iterator)
        except StopIteration:
            return
        except Exception as error:  # such as an image that can't be decoded
            raise InputError(f"row {index} can't be loaded: {type(error).__name__}: {error}") from error
        yield index, row
        index += 1


def _read_example(
    row: Row, read: Callable[[Row], Example], transform: Callable[[Row], Row | None] | None
) -> Example | None:
    check_row(row)
    if transform is not None:
        name = getattr(getattr(transform, "func", transform), "__name__", type(transform).__name__)
        transformed = _call(f"the transform {name!r}", transform, dict(row))
        if transformed is None:
            return None
        if not isinstance(transformed, dict):
            raise InputError(f"the transform returned {brief(transformed)}: return a dict, or None to drop the row")
        row = transformed
        check_row(row)
    return _call("reading the row", read, row)


def _call(what: str, function: Callable[[Row], T], row: Row) -> T:
    """Call a user's function, and name it and the line in the message of its errors."""
    try:
        return function(row)
    except InputError:
        raise
    except Exception as error:
        frames = traceback.extract_tb(error.__traceback__)[1:]  # without this function
        where = f" ({Path(frames[0].filename).name}, line {frames[0].lineno})" if frames else ""
        columns = ", ".join(map(repr, row))
        raise InputError(f"{what} raised {type(error).__name__}: {error}{where}; the columns are {columns}") from error


def _cut_repeated_prompts(examples: dict[int, Example]) -> dict[int, Example]:
    # a single completion may begin like its prompt by chance ("Hello", "Hello, how are you?"), half of them do not
    cut = {index: example for index, old in examples.items() if (example := cut_repeated_prompt(old)) is not None}
    if not cut or 2 * len(cut) < len(examples):
        return examples
    rank_zero_info(f"{len(cut)} of {len(examples)} rows repeat the prompt at the start of their completions: cut off")
    return examples | cut


def drop_duplicates(examples: dict[int, Example]) -> dict[int, Example]:
    """Drop examples whose prompt, with the same arguments of the chat template, has occurred before."""
    first: dict[str, int] = {}
    for index, example in examples.items():
        key = [example.prompt, example.template_kwargs]
        first.setdefault(json.dumps(key, sort_keys=True, default=str), index)
    _report(len(examples) - len(first), len(examples), "prompts are duplicates: dropped")
    return {index: examples[index] for index in first.values()}


@dataclass(frozen=True)
class Encoder:
    """Tokenizes examples and applies the length limits.

    Args:
        tokenizer: The policy's tokenizer.
        max_prompt_tokens: Maximum prompt length, or None.
        max_completion_tokens: Maximum completion length, EOS token included, or None.
        truncation: "drop" removes rows that are too long. "truncate" keeps the end of a prompt (after its BOS token, if
            it has one) and the beginning of a completion, without EOS.
        template_kwargs: Arguments of the chat template. A row's own `template_kwargs` take precedence.
        parse_special_tokens: Whether special tokens in plain strings are encoded as such, not as text.
        all_turns: Whether a demonstration's completion begins with the first assistant turn, not with the last.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    truncation: Literal["drop", "truncate"] = "drop"
    template_kwargs: dict[str, Any] = field(default_factory=dict)
    parse_special_tokens: bool = True
    all_turns: bool = False

    def __call__(self, examples: dict[int, Example]) -> list[Encoded]:
        """Encode examples. Drop or truncate long rows, drop pairs of equal completions, and report how many.

        Raises:
            ValueError: If a row can't be encoded (names the row index), or if no row is left.
        """
        rows, rebuilt = [], 0
        left_out: dict[int, str] = {}
        for index, example in examples.items():
            try:
                row, is_rebuilt = self._encode(index, example)
                if what := self._left_out(row.example):
                    left_out[index] = what
            except ValueError as error:
                raise InputError(f"row {index}: {error}") from error
            rows.append(row)
            rebuilt += is_rebuilt
        _report(
            rebuilt,
            len(rows),
            "rows have turns that the chat template renders otherwise once they are finished: "
            "they are encoded as they continue its prompt, thoughts included",
        )
        if left_out:
            index, what = next(iter(left_out.items()))
            rank_zero_warn(
                f"the chat template leaves out {what} in row {index}, and {len(left_out)} of {len(rows)} rows lose "
                "something: use a template that writes it, or remove it from the data"
            )
        rows = self._limit(rows, "prompts", self.max_prompt_tokens, lambda row: [row.prompt], self._truncate_prompt)
        rows = self._limit(
            rows, "completions", self.max_completion_tokens, lambda row: row.completions, self._truncate_completions
        )
        kept = [row for row in rows if not _is_tie(row)]
        _report(
            len(rows) - len(kept),
            len(rows),
            "pairs have the same chosen and rejected completion: dropped",
            "check the data",
        )
        return kept

    def _encode(self, index: int, example: Example) -> tuple[Encoded, bool]:
        """Encode an example. Also return whether its ids differ from the rendered conversation."""
        tokenization.check_template_kwargs(example.template_kwargs, of_a_row=True)
        template = {**self.template_kwargs, **example.template_kwargs}
        example = dataclasses.replace(example, template_kwargs=template)
        if (split := tokenization.split_turns(example.prompt, example.completions, self.all_turns)) is not None:
            example = dataclasses.replace(example, prompt=split[0], completions=split[1])
        options: dict[str, Any] = dict(template_kwargs=template, parse_special_tokens=self.parse_special_tokens)
        prompt = tokenization.encode_prompt(self.tokenizer, example.prompt, **options)
        turns = [
            tokenization.encode_turns(self.tokenizer, example.prompt, completion, **options)
            for completion in example.completions
        ]
        learned = [_ids(turn.learned or [1] * len(turn.ids)) for turn in turns]
        row = Encoded(index, example, _ids(prompt), tuple(_ids(turn.ids) for turn in turns))
        if any(turn.learned for turn in turns):
            row = dataclasses.replace(row, learned=tuple(learned))
        row = dataclasses.replace(row, parse_special_tokens=self.parse_special_tokens)
        return row, any(turn.rebuilt for turn in turns)

    def _left_out(self, example: Example) -> str | None:
        for completion in example.completions or ([],):
            if what := tokenization.left_out(self.tokenizer, example.prompt, completion, example.template_kwargs):
                return what
        return None

    def _limit(
        self,
        rows: list[Encoded],
        what: str,
        limit: int | None,
        ids_of: Callable[[Encoded], Sequence[Ids]],
        truncate: Callable[[Encoded, int], Encoded],
    ) -> list[Encoded]:
        if limit is None:
            return rows
        too_long = [max(map(len, ids_of(row)), default=0) > limit for row in rows]
        problem = f"{what} are longer than {limit} tokens"
        if self.truncation == "truncate":
            _report(sum(too_long), len(rows), f"{problem}: truncated")
            return [truncate(row, limit) if is_long else row for row, is_long in zip(rows, too_long, strict=True)]
        remedy = f"raise max_{what[:-1]}_tokens, or set truncation to 'truncate'"
        _report(sum(too_long), len(rows), f"{problem}: dropped", remedy)
        return [row for row, is_long in zip(rows, too_long, strict=True) if not is_long]

    def _truncate_prompt(self, row: Encoded, limit: int) -> Encoded:
        start = row.prompt[:1] if limit > 1 and row.prompt[0] == self.tokenizer.bos_token_id else row.prompt[:0]
        end = row.prompt[len(row.prompt) - limit + len(start) :]
        return dataclasses.replace(row, prompt=np.concatenate([start, end]))

    def _truncate_completions(self, row: Encoded, limit: int) -> Encoded:
        completions, learned = (tuple(ids[:limit] for ids in rows) for rows in (row.completions, row.learned))
        return dataclasses.replace(row, completions=completions, learned=learned)


def _ids(tokens: Sequence[int]) -> Ids:
    return np.asarray(tokens, dtype=np.int32)


def _is_tie(row: Encoded) -> bool:
    return len(row.completions) == 2 and np.array_equal(*row.completions)


def _report(count: int, total: int, what: str, remedy: str | None = None) -> None:
    """Log how many rows were affected. With a `remedy` they are dropped; raise a ValueError if no row is left."""
    if remedy and count == total:
        raise InputError(f"all {total} {what}, so no row is left: {remedy}")
    if count:
        rank_zero_info(f"{count} of {total} {what}")
