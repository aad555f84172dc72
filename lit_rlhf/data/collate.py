"""Collate encoded rows into padded batches: prompts on the left, completions on the right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lit_rlhf.data.encoding import Encoded, Ids
from lit_rlhf.types import Demonstrations, Preferences, Prompts


def pad(
    rows: Sequence[Ids], pad_id: int, side: Literal["left", "right"]
) -> tuple[Int[Tensor, "n t"], Bool[Tensor, "n t"]]:
    """Pad token ids to the longest row on one side. Return tokens and mask (True where a token is not padding)."""
    length = max(map(len, rows))
    tokens = np.full((len(rows), length), pad_id, dtype=np.int64)
    mask = np.zeros((len(rows), length), dtype=np.bool_)
    for i, row in enumerate(rows):
        columns = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        tokens[i, columns], mask[i, columns] = row, True
    return torch.from_numpy(tokens), torch.from_numpy(mask)


def collate_prompts(rows: Sequence[Encoded], pad_id: int) -> Prompts:
    """Collate prompts, padded on the left."""
    tokens, mask = pad([row.prompt for row in rows], pad_id, "left")
    return Prompts(
        tokens=tokens,
        mask=mask,
        index=torch.tensor([row.index for row in rows]),
        text=[row.example.prompt for row in rows],
        columns={name: [row.example.columns[name] for row in rows] for name in rows[0].example.columns},
        template_kwargs=[row.example.template_kwargs for row in rows],
        parse_special_tokens=rows[0].parse_special_tokens,
    )


def _collate_completions(rows: Sequence[Encoded], pad_id: int) -> dict[str, Any]:
    tokens, mask = pad([ids for row in rows for ids in row.completions], pad_id, "right")
    shape = (len(rows), len(rows[0].completions), tokens.shape[-1])
    learned = None
    if any(row.learned for row in rows):
        masks = [m for row in rows for m in row.learned or map(np.ones_like, row.completions)]
        learned = pad(masks, 0, "right")[0].bool().reshape(shape)
    batch = dict(tokens=tokens.reshape(shape), mask=mask.reshape(shape), learned=learned)
    return dict(prompts=collate_prompts(rows, pad_id), **batch)


def collate_demonstrations(rows: Sequence[Encoded], pad_id: int) -> Demonstrations:
    """Collate demonstrations; completions are padded on the right."""
    return Demonstrations(**_collate_completions(rows, pad_id))


def collate_preferences(rows: Sequence[Encoded], pad_id: int) -> Preferences:
    """Collate preferences, the chosen completion first; completions are padded on the right."""
    return Preferences(**_collate_completions(rows, pad_id))
