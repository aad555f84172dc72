"""Decoding one token after another: with a cache that the samples of a prompt share, or without a cache."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lit_rlhf.models.cpu import Product, compute_dtype, packed_product
from lit_rlhf.models.forward import ModelForward
from lit_rlhf.models.sampling import Decoder
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.models.shared_prompt import prompt_positions
from lit_rlhf.types import Prompts

CAPACITY_STEP = 64
"""Tokens by which the capacity of a cache grows."""

MIN_WEIGHT_SIZE = 2**16
"""Elements of a weight below which preparing it saves nothing."""


class PreallocatedCacheLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """KV cache with preallocated capacity: new tokens are written in place instead of concatenated."""

    store: tuple[Tensor, Tensor] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values, without gradient, and return all that are held."""
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        start = self.get_seq_length()
        end = start + key_states.shape[-2]
        store = self.store
        if store is None or store[0].shape[-2] < end:
            store = with_capacity(self.keys, end + CAPACITY_STEP), with_capacity(self.values, end + CAPACITY_STEP)
        for held, states in zip(store, (key_states, value_states), strict=True):
            held[..., start:end, :] = states
        return self._hold(store, end)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows with their capacity; rows whose place does not change are not copied."""
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


def with_capacity(states: Tensor, length: int) -> Tensor:
    """Return a copy with capacity for `length` tokens; the unused capacity is undefined."""
    store = states.new_empty(*states.shape[:-2], length, states.shape[-1])
    store[..., : states.shape[-2], :] = states
    return store


class CachedDecoder:
    """Decodes with a cache; the keys and values of a prompt are computed once for its k rows."""

    def __init__(self, forward: ModelForward, prompts: Prompts, k: int) -> None:
        self.forward, self.prompts, self.k = forward, prompts, k
        self.cache = DynamicCache(config=forward.config)
        layers = self.cache.layers
        self.cache.layers = [PreallocatedCacheLayer() if type(x) is DynamicLayer else x for x in layers]  # type: ignore[no-untyped-call]
        self.mask = prompts.mask.repeat_interleave(k, 0)
        self.positions = self.mask.sum(1, keepdim=True)

    def start(self) -> Tensor:
        """Return the logits of the first token of every row."""
        prompts = self.prompts
        features = self.forward(prompts.tokens, prompts.mask, prompt_positions(prompts.mask), self.cache, keep=1)
        if self.k > 1:
            self.cache.batch_repeat_interleave(self.k)
        return self.forward.project(features[:, -1]).repeat_interleave(self.k, 0)

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row and return the logits of the next."""
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        features = self.forward(tokens.unsqueeze(1), self.mask, self.positions, self.cache, keep=1)
        self.positions = self.positions + 1
        return self.forward.project(features[:, -1])

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.cache.batch_select_indices(rows)
        self.mask, self.positions = self.mask[rows], self.positions[rows]


class InStepDecoder:
    """A decoder whose passes take all ranks in step: a rank whose rows have ended continues until all have."""

    def __init__(self, decoder: CachedDecoder | PlainDecoder, forward: ModelForward, sharding: Sharding) -> None:
        self.decoder, self.forward, self.sharding = decoder, forward, sharding
        self.start, self.keep = decoder.start, decoder.keep

    def step(self, tokens: Tensor) -> Tensor:
        """See `Decoder`."""
        self.sharding.any_rank(True)
        return self.decoder.step(tokens)

    def wait(self) -> None:
        """Make passes whose result is not used, until all ranks wait."""
        row = torch.zeros(1, 1, dtype=torch.long, device=self.forward.device)
        while self.sharding.any_rank(False):
            self.forward(row, torch.ones_like(row, dtype=torch.bool), row, None, keep=1)


@contextlib.contextmanager
def in_step(decoder: CachedDecoder | PlainDecoder, forward: ModelForward) -> Iterator[Decoder]:
    """Keep all ranks decoding within this context if each pass takes all of them."""
    if not forward.in_step:
        yield decoder
        return
    assert forward.sharded is not None
    together = InStepDecoder(decoder, forward, forward.sharded.sharding)
    try:
        yield together
    finally:
        together.wait()


class PlainDecoder:
    """Decodes without a cache: each row is computed again for every token."""

    def __init__(self, forward: ModelForward, prompts: Prompts, k: int) -> None:
        self.forward = forward
        self.ids = prompts.tokens.repeat_interleave(k, 0)
        self.mask = prompts.mask.repeat_interleave(k, 0)

    def start(self) -> Tensor:
        """Return the logits of the first token of every row."""
        features = self.forward(self.ids, self.mask, prompt_positions(self.mask), None, keep=1)
        return self.forward.project(features[:, -1])

    def step(self, tokens: Tensor) -> Tensor:
        """Append a token to every row and return the logits of the next."""
        self.ids = torch.cat([self.ids, tokens.unsqueeze(1)], 1)
        self.mask = torch.cat([self.mask, torch.ones_like(self.mask[:, :1])], 1)
        return self.start()

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these."""
        self.ids, self.mask = self.ids[rows], self.mask[rows]


# Weights that do not change while a batch is decoded


@contextlib.contextmanager
def prepared_linears(model: nn.Module) -> Iterator[None]:
    """Let the model's linear layers compute, within this context, with a prepared copy of their weights.

    On a CPU the copy has the layout of the kernel (see `lit_rlhf.models.cpu`). Elsewhere, under autocast, it has the
    dtype of the product: autocast casts every weight for every token, four times the memory traffic of a bfloat16 copy,
    which limits the speed of decoding with few rows. The copies carry no gradient and are dropped afterwards. Layers
    that are not a plain `torch.nn.Linear`, or gain nothing, stay as they are.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_plain(layer)]
    products = {layer: product for layer in layers if (product := prepared_product(layer.weight.detach(), layer.bias))}
    for layer, product in products.items():
        layer.forward = product  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in products:
            del layer.forward


def is_plain(layer: nn.Linear) -> bool:
    """Whether this is an unmodified `Linear` with an unsharded weight that is large enough to gain."""
    weight = layer.weight
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # replaced by somebody else
        and type(weight.data) is Tensor
        and weight.shape == (layer.out_features, layer.in_features)
        and weight.numel() >= MIN_WEIGHT_SIZE
    )


def prepared_product(weight: Tensor, bias: Tensor | None) -> Product | None:
    """Return the product with a prepared copy of this weight; None if nothing would be gained."""
    if (packed := packed_product(weight, bias)) is not None:
        return packed
    return None if compute_dtype(weight) == weight.dtype else cast_once(weight, bias)


def cast_once(weight: Tensor, bias: Tensor | None) -> Product:
    """Return the product with a copy of the weight in the dtype of the product."""
    dtype = compute_dtype(weight)
    copy = weight.to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    return lambda rows: nn.functional.linear(rows.to(dtype), copy, bias)
