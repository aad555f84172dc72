"""Completions as text, and completions that a column of the data holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.tokenization import decode_completions, encode_completion, end_ids
from lit_rlhf.types import Completions, Prompts, Text


def completion_texts(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, completions: Completions
) -> list[list[Text]]:
    """Decode completions as rewards see them, `[prompt][sample]`: strings, or one message if the prompt is a chat."""
    n, k, _ = completions.tokens.shape
    texts = decode_completions(tokenizer, without_ends(tokenizer, completions.ids()))
    prompt_texts = prompts.text or [""] * n
    return [[as_completion(prompt_texts[i], text) for text in texts[i * k : (i + 1) * k]] for i in range(n)]


def without_ends(tokenizer: PreTrainedTokenizerBase, completions: list[list[int]]) -> list[list[int]]:
    """Return completions without the token that ends them, which is an ordinary one in some tokenizers."""
    ends = end_ids(tokenizer)
    return [ids[:-1] if ids and ids[-1] in ends else ids for ids in completions]


def as_completion(prompt: Text, completion: Text | None) -> Text:
    """Return a completion as rewards see it: a message if the prompt is a conversation, an empty one for None."""
    completion = "" if completion is None else completion
    chat = isinstance(prompt, list) and isinstance(completion, str)
    return [{"role": "assistant", "content": completion}] if chat else completion


def column_completions(
    tokenizer: PreTrainedTokenizerBase, prompts: Prompts, column: str
) -> tuple[list[Text], Completions]:
    """Return the completions in a column of the data, as text and as `Completions` with one sample.

    A row without a completion (None) gets one without tokens.

    Raises:
        ValueError: If there is no such column.
    """
    check_completion_column("column", column, prompts.columns)
    given = prompts.columns[column]
    texts = [as_completion(prompt, text) for prompt, text in zip(prompts.text, given, strict=True)]
    template_kwargs = prompts.template_kwargs or [{}] * len(texts)
    ids = []
    for row, prompt, text, options in zip(prompts.index.tolist(), prompts.text, texts, template_kwargs, strict=True):
        try:
            parse = prompts.parse_special_tokens
            encoded = encode_completion(tokenizer, prompt, text, template_kwargs=options, parse_special_tokens=parse)
            ids.append(encoded or [0])
        except InputError as error:
            raise InputError(f"row {row}, column {column!r}: {error}") from error
    rows = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True)
    lengths = torch.tensor([0 if text is None else len(row) for text, row in zip(given, ids, strict=True)])
    mask = torch.arange(rows.shape[1]) < lengths.unsqueeze(1)
    finished = torch.ones(len(ids), 1, dtype=torch.bool)
    completions = Completions(rows.unsqueeze(1), mask.unsqueeze(1), torch.zeros(rows.shape).unsqueeze(1), finished)
    return texts, completions.to(prompts.tokens.device)


def check_completion_column(option: str, column: str, columns: Iterable[str], alternative: str = "") -> None:
    """Check that the data have a column of completions.

    Args:
        option: The option that names the column.
        column: Its name.
        columns: The columns of the data.
        alternative: What else the option accepts, for the message.

    Raises:
        ValueError: If there is no such column.
    """
    if column not in columns:
        raise InputError(
            f"{option}={column!r} is not a column of the data ({sorted(columns)}): name one that holds "
            f"completions{alternative}"
        )


def check_lengths(config: Any, prompts: Prompts, given: Completions, column: str) -> None:
    """Check that each prompt with its completion from a column fits the policy's positions.

    Raises:
        ValueError: If one is longer.
    """
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    lengths = prompts.mask.sum(1) + given.lengths[:, 0]
    if positions is not None and int(lengths.max()) > positions:
        worst = int(lengths.argmax())
        raise InputError(
            f"row {int(prompts.index[worst])} and its {column!r} have {int(lengths[worst])} tokens, more than the "
            f"{positions} positions of the policy: drop such rows with data.transform"
        )
