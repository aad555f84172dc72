"""From rows to token ids, once, and from token ids to padded batches."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lit_rlhf import tokenization
from lit_rlhf.data.formats import Example
from lit_rlhf.data.sources import Row
from lit_rlhf.types import Demonstrations, Preferences, Prompts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Ids = np.ndarray[Any, np.dtype[np.int32]]


@dataclass(frozen=True)
class Encoded:
    """A row with its token ids, and its number in the data it was read from."""

    index: int
    example: Example
    prompt: Ids
    completions: tuple[Ids, ...]


class EncodedRows(Sequence[Encoded]):
    """Rows in memory; a list of numbers gets a list of rows."""

    def __init__(self, rows: Sequence[Encoded]) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return [self.rows[i] for i in index] if isinstance(index, list) else self.rows[index]


def read_examples(
    rows: Iterable[Row], read: Callable[[Row], Example], transform: Callable[[Row], Row | None] | None = None
) -> dict[int, Example]:
    """Return the example of each row by the row's number, without the rows that `transform` drops.

    Raises:
        ValueError: If a row can't be read (with its number), or if the transform drops all or returns no row.
    """
    examples: dict[int, Example] = {}
    number = -1
    for number, row in enumerate(rows):
        try:
            changed = row if transform is None else transform(row)
            if changed is not None and not isinstance(changed, dict):
                raise ValueError(f"the transform returned {changed!r}: it must return a dict, or None to drop the row")
            if changed is not None:
                examples[number] = read(changed)
        except ValueError as error:
            raise ValueError(f"row {number}: {error}") from error
    _report(number + 1 - len(examples), number + 1, "rows are dropped by the transform", "change the transform")
    names = dict.fromkeys(name for example in examples.values() for name in example.columns)
    for example in examples.values():
        example.columns.update({name: None for name in names if name not in example.columns})
    return examples


def drop_duplicates(examples: dict[int, Example]) -> dict[int, Example]:
    """Keep the first of the examples that share a prompt."""
    first: dict[str, int] = {}
    for number, example in examples.items():
        first.setdefault(json.dumps(example.prompt, sort_keys=True, default=str), number)
    _report(len(examples) - len(first), len(examples), "prompts are duplicates: dropped")
    return {number: examples[number] for number in first.values()}


def refuse_empty(examples: dict[int, Example]) -> None:
    """Refuse prompts with nothing in them.

    Raises:
        ValueError: If there is an empty prompt, with the number of the first and how many there are.
    """
    empty = [number for number, example in examples.items() if _is_empty(example)]
    if empty:
        raise ValueError(
            f"the prompt of row {empty[0]} is empty ({len(empty)} of {len(examples)} are): "
            "leave such rows out of the data, or drop them with a transform that returns None for them"
        )


def _is_empty(example: Example) -> bool:
    if isinstance(example.prompt, str):
        return not example.prompt.strip()
    return not any(message.get("content") or message.get("tool_calls") for message in example.prompt)


@dataclass(frozen=True)
class Encoder:
    """Turns examples into token ids.

    Args:
        tokenizer: Of the policy.
        max_prompt_tokens: The longest prompt, or None.
        max_completion_tokens: The longest completion, its EOS token included, or None.
        truncation: Whether a longer one drops its row or is truncated: a prompt to its end (a BOS token stays in front),
            a completion to its beginning, without the EOS token then.
        template_kwargs: Handed to the chat template.
    """

    tokenizer: PreTrainedTokenizerBase
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None
    truncation: Literal["drop", "truncate"] = "drop"
    template_kwargs: dict[str, Any] = field(default_factory=dict)

    def __call__(self, examples: dict[int, Example]) -> list[Encoded]:
        """Return the examples with their ids; what is too long, or a pair of equals, is counted and reported.

        Raises:
            ValueError: If nothing is left.
        """
        rows = [self._encode(number, example) for number, example in examples.items()]
        rows = self._limit(rows, "prompts", self.max_prompt_tokens, lambda row: [row.prompt], self._cut_prompt)
        rows = self._limit(
            rows, "completions", self.max_completion_tokens, lambda row: row.completions, self._cut_completions
        )
        kept = [row for row in rows if not _is_tie(row)]
        _report(
            len(rows) - len(kept),
            len(rows),
            "pairs have the same chosen and rejected completion: dropped",
            "look at the data",
        )
        return kept

    def _encode(self, number: int, example: Example) -> Encoded:
        template = {**self.template_kwargs, **example.template_kwargs}
        example = dataclasses.replace(example, template_kwargs=template)
        prompt = tokenization.encode_prompt(self.tokenizer, example.prompt, template)
        completions = (
            tokenization.encode_completion(self.tokenizer, example.prompt, completion, template_kwargs=template)
            for completion in example.completions
        )
        return Encoded(number, example, _ids(prompt), tuple(map(_ids, completions)))

    def _limit(
        self,
        rows: list[Encoded],
        what: str,
        limit: int | None,
        texts: Callable[[Encoded], Sequence[Ids]],
        cut: Callable[[Encoded, int], Encoded],
    ) -> list[Encoded]:
        if limit is None:
            return rows
        long = [max(map(len, texts(row)), default=0) > limit for row in rows]
        problem = f"{what} are longer than {limit} tokens"
        if self.truncation == "truncate":
            _report(sum(long), len(rows), f"{problem}: truncated")
            return [cut(row, limit) if is_long else row for row, is_long in zip(rows, long, strict=True)]
        cure = f"raise max_{what[:-1]}_tokens, or set truncation to 'truncate'"
        _report(sum(long), len(rows), f"{problem}: dropped", cure)
        return [row for row, is_long in zip(rows, long, strict=True) if not is_long]

    def _cut_prompt(self, row: Encoded, limit: int) -> Encoded:
        start = row.prompt[:1] if limit > 1 and row.prompt[0] == self.tokenizer.bos_token_id else row.prompt[:0]
        end = row.prompt[len(row.prompt) - limit + len(start) :]
        return dataclasses.replace(row, prompt=np.concatenate([start, end]))

    def _cut_completions(self, row: Encoded, limit: int) -> Encoded:
        return dataclasses.replace(row, completions=tuple(ids[:limit] for ids in row.completions))


def _ids(tokens: list[int]) -> Ids:
    return np.asarray(tokens, dtype=np.int32)


def _is_tie(row: Encoded) -> bool:
    return len(row.completions) == 2 and np.array_equal(*row.completions)


def _report(count: int, total: int, what: str, cure: str | None = None) -> None:
    """Say how many rows something happened to; a `cure` means that they are gone, so that it can't be all of them."""
    if cure and count == total:
        raise ValueError(f"all {total} {what}, and nothing is left: {cure}")
    if count:
        rank_zero_info(f"{count} of {total} {what}")


def pad(
    rows: Sequence[Ids], pad_id: int, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """Return the ids as one array, padded to the longest row on one side, and where a token counts."""
    length = max(map(len, rows))
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.bool_)
    for i, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, place], mask[i, place] = row, True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def collate_prompts(rows: Sequence[Encoded], pad_id: int) -> Prompts:
    """Make a batch of prompts, padded on the left."""
    tokens, mask = pad([row.prompt for row in rows], pad_id, "left")
    return Prompts(
        tokens=tokens,
        mask=mask,
        index=torch.tensor([row.index for row in rows]),
        text=[row.example.prompt for row in rows],
        columns={name: [row.example.columns[name] for row in rows] for name in rows[0].example.columns},
        template_kwargs=[row.example.template_kwargs for row in rows],
    )


def _collate_completions(rows: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    tokens, mask = pad([ids for row in rows for ids in row.completions], pad_id, "right")
    shape = (len(rows), -1, tokens.shape[-1])
    return dict(prompts=collate_prompts(rows, pad_id), tokens=tokens.reshape(shape), mask=mask.reshape(shape))


def collate_demonstrations(rows: Sequence[Encoded], pad_id: int) -> Demonstrations:
    """Make a batch of demonstrations, completions padded on the right."""
    return Demonstrations(**_collate_completions(rows, pad_id))


def collate_preferences(rows: Sequence[Encoded], pad_id: int) -> Preferences:
    """Make a batch of preferences, the chosen completion first, padded on the right."""
    return Preferences(**_collate_completions(rows, pad_id))
