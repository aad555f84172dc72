"""Gradient checkpointing of decoder layers with their cache, so that the completions of a prompt still share it.

A checkpointed layer keeps its input for the backward pass, which then computes it again. `transformers` takes the cache
away from such layers: with it, the second pass would append the same keys once more. Here the second pass gets the
cache as it was before the first.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from functools import cache as remember
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from lit_rlhf.errors import InputError

SecondPass = Callable[..., contextlib.AbstractContextManager[None]]
"""Makes the context in which a layer is computed again."""


def checkpointed_layers(model: nn.Module) -> list[GradientCheckpointingLayer]:
    """Return the layers that can be computed again.

    Raises:
        ValueError: If the model has none.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise InputError(f"gradient_checkpointing: a {type(model).__name__} has no layers for it: leave it out")
    return layers


@contextlib.contextmanager
def recomputed(layers: list[GradientCheckpointingLayer], again: SecondPass) -> Iterator[None]:
    """Let layers, within this context, keep only their input for the backward pass, which computes them again.

    Args:
        layers: The layers.
        again: Makes the context of a layer's second pass, which should be as that of the first.
    """
    for layer in layers:
        layer.forward = partial(_checkpointed, layer.forward, partial(again, layer))
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def _checkpointed(forward: Callable[..., Any], again: SecondPass, *args: Any, **kwargs: Any) -> Any:
    given: dict[Any, Any] = {**dict(enumerate(args)), **kwargs}
    caches = {name: value for name, value in given.items() if isinstance(value, Cache)}
    before = {name: _as_it_is(value) for name, value in caches.items()}
    first = [caches]  # held for the first pass only

    def call(values: dict[Any, Any]) -> Any:
        return forward(*(values[i] for i in range(len(args))), **{name: values[name] for name in kwargs})

    def run(others: dict[Any, Any]) -> Any:
        if first:
            return call(others | first.pop())
        with again():
            return call(others | {name: _as_it_is(value) for name, value in before.items()})

    others = {name: value for name, value in given.items() if name not in before}
    return checkpoint(run, others, use_reentrant=False, preserve_rng_state=False)


def _as_it_is(cache: Any) -> Any:
    """Return a cache with the same tensors; appending to the one does not change the other."""
    same = copy.copy(cache)
    vars(same).update({name: dict(value) for name, value in vars(cache).items() if isinstance(value, dict)})
    same.layers = [copy.copy(layer) for layer in cache.layers]
    return same


def select_cache_rows(cache: DynamicCache, rows: Int[Tensor, " rows"]) -> DynamicCache:
    """Return a new cache with the selected rows; the given cache is unchanged.

    A layer selects its rows when it appends to them, so that a checkpointed layer does not hold all of them.
    `reorder_cache` selects by `index_select`, `batch_select_indices` by indexing (see `shared_features`).
    """
    if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
        raise NotImplementedError("several completions can't share a recurrent state")
    chosen: DynamicCache = _as_it_is(cache)
    layers: list[Any] = chosen.layers
    for layer in layers:
        kind: Any = type(layer)
        layer.__class__, layer.rows = _selecting(kind), rows
    return chosen


@remember
def _selecting(kind: Any) -> Any:
    """Return a class of cache layers that select `rows` when they are first used."""

    class Selecting(kind):  # type: ignore[misc]
        rows: Tensor | None

        def select(self) -> None:
            if self.rows is not None:
                super().reorder_cache(self.rows)
                self.rows = None

        def update(self, *args: Any, **kwargs: Any) -> Any:
            self.select()
            return super().update(*args, **kwargs)

        def reorder_cache(self, beam_idx: Tensor) -> None:
            self.select()
            super().reorder_cache(beam_idx)

    return Selecting
