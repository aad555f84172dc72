"""How a policy computes one token after another: with a cache that its samples share, or without one."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import DynamicCache

from lit_rlhf.prefix import prompt_positions
from lit_rlhf.types import Prompts

if TYPE_CHECKING:
    from lit_rlhf.policy import Policy


class CachedDecoder:
    """Rows that keep their keys and values; the prompt's are computed once for its k rows."""

    def __init__(self, policy: Policy, prompts: Prompts, k: int) -> None:
        self.policy, self.prompts, self.k = policy, prompts, k
        self.cache = DynamicCache(config=policy.causal_lm.config)
        self.mask = prompts.mask.repeat_interleave(k, 0)
        self.positions = self.mask.sum(1, keepdim=True)

    def start(self) -> Tensor:
        """Return the logits of the first token of every row."""
        prompts = self.prompts
        positions = prompt_positions(prompts.mask)
        features = self.policy.forward_features(prompts.tokens, prompts.mask, positions, self.cache, keep=1)
        if self.k > 1:
            self.cache.batch_repeat_interleave(self.k)
        return self.policy.project(features[:, -1]).repeat_interleave(self.k, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row and return the logits of the next."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        features = self.policy.forward_features(tokens.unsqueeze(1), self.mask, self.positions, self.cache, keep=1)
        self.positions = self.positions + 1
        return self.policy.project(features[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class PlainDecoder:
    """Rows computed anew at every token, for a model without a cache."""

    def __init__(self, policy: Policy, prompts: Prompts, k: int) -> None:
        self.policy = policy
        self.ids = prompts.tokens.repeat_interleave(k, 0)
        self.mask = prompts.mask.repeat_interleave(k, 0)

    def start(self) -> Tensor:
        """Return the logits of the first token of every row."""
        positions = prompt_positions(self.mask)
        features = self.policy.forward_features(self.ids, self.mask, positions, None, keep=1)
        return self.policy.project(features[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row and return the logits of the next."""
        self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return self.start()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]
