"""How a policy computes one token after another: with a cache that its samples share, or without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lit_rlhf.models.shared_prompt import prompt_positions
from lit_rlhf.types import Prompts

if TYPE_CHECKING:
    from lit_rlhf.models.policy import Policy

ROOM = 64
"""Tokens that a layer makes room for at a time."""


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A layer's keys and values with room behind them: a token is written there, and not all before it copied."""

    store: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write what a step adds behind what is held, without gradient; return all of it."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        store = self.store
        if store is None or store[0].shape[-2] < end:
            store = with_room(self.keys, end + ROOM), with_room(self.values, end + ROOM)
        for place, states in zip(store, (key_states, value_states), strict=True):
            place[..., start:end, :] = states
        return self._hold(store, end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows, and their room; those that stay where they are, are not copied."""
        if self.store is None:
            super().batch_select_indices(indices)
            return
        moved = (indices != torch.arange(len(indices), device=indices.device)).nonzero().squeeze(-1)
        for states in self.store:
            states[moved] = states[indices[moved]]
        keys, values = (states[: len(indices)] for states in self.store)
        self._hold((keys, values), self.get_seq_length())

    def _hold(self, store: tuple[Tensor, Tensor], length: int) -> tuple[Tensor, Tensor]:
        self.store = store
        self.keys, self.values = store[0][..., :length, :], store[1][..., :length, :]
        return self.keys, self.values


def with_room(states: Tensor, length: int) -> Tensor:
    """A copy with space for `length` tokens; what stands in the space means nothing."""
    store = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    store[..., : states.shape[-2], :] = states
    return store


class CachedDecoder:
    """Rows that keep their keys and values; the prompt's are computed once for its k rows."""

    def __init__(self, policy: Policy, prompts: Prompts, k: int) -> None:
        self.policy, self.prompts, self.k = policy, prompts, k
        self.cache = DynamicCache(config=policy.causal_lm.config)
        layers = self.cache.layers
        self.cache.layers = [PreallocatedCacheLayer() if type(x) is DynamicLayer else x for x in layers]  # type: ignore[no-untyped-call]
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
