"""Forward passes over completions that share their prompt, and the search for what a model allows of them.

The k completions of a prompt share it: its keys and values are computed for n rows and repeated k times, with gradient
through the cache. Completions of like length go together, so that little padding is computed. A `Forward` gives the
features of the last columns of a batch: hidden states, or logits.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from lit_rlhf.models.length_groups import groups_of_like_length
from lit_rlhf.types import Prompts

NO_ROUNDING = 0.05
"""A change of a model's output, relative to its size, that bfloat16 does not explain."""


@runtime_checkable
class Given(Protocol):
    """Completions to score: `lit_rlhf.types.Completions`, `Demonstrations`, `Preferences`."""

    @property
    def tokens(self) -> Tensor:
        """Token ids, `[prompts, samples, tokens]`."""

    @property
    def mask(self) -> Tensor:
        """True where a token counts."""


@runtime_checkable
class Forward(Protocol):
    """A model's forward pass."""

    def __call__(
        self,
        ids: Int[Tensor, "rows columns"],
        mask: Bool[Tensor, "rows past_and_columns"],
        positions: Int[Tensor, "rows columns"],
        cache: DynamicCache | None,
        keep: int,
    ) -> Float[Tensor, "rows keep features"]:
        """Return the features of the last `keep` columns; with a cache, `ids` come behind what it holds."""
        ...


def prompt_positions(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Position of each token among those that are not padding."""
    return (mask.cumsum(1) - 1).clamp(min=0)


@functools.cache
def accepts(forward: Any, argument: str) -> bool:
    """Whether a model's forward has an argument of this name."""
    return argument in inspect.signature(forward).parameters


def forward_arguments(
    trunk: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None
) -> dict[str, Any]:
    """What a model of `transformers` is called with; `trunk` is the part of it that embeds the tokens."""
    arguments: dict[str, Any] = {"input_ids": ids, "attention_mask": mask.long(), "use_cache": cache is not None}
    if cache is not None:
        arguments["past_key_values"] = cache
    if accepts(type(trunk).forward, "position_ids"):
        arguments["position_ids"] = positions
    return arguments


def hidden_states(
    trunk: nn.Module, ids: Tensor, mask: Tensor, positions: Tensor, cache: DynamicCache | None, keep: int
) -> Float[Tensor, "rows keep features"]:
    """The last hidden states of a model without a head: with `trunk` bound, a `Forward`."""
    hidden: Tensor = trunk(**forward_arguments(trunk, ids, mask, positions, cache)).last_hidden_state
    return hidden[:, -keep:]


def completion_features(
    forward: Forward, config: Any, prompts: Prompts, completions: Given, shared: bool
) -> Float[Tensor, "prompts samples tokens features"]:
    """Features that stand before each completion token; what stands in the padding means nothing.

    Args:
        forward: The model's.
        config: The model's, for its cache.
        prompts: The prompts.
        completions: The completions.
        shared: Whether each prompt is computed once, or once a completion.
    """
    n, k, t = completions.tokens.shape
    prompts, mask = defined(prompts), completions.mask.flatten(0, 1)
    tokens = completions.tokens.flatten(0, 1).where(mask, prompts.tokens[:, -1:].repeat_interleave(k, 0))
    if shared:
        return shared_features(forward, config, prompts, tokens, owners(n, k), mask.sum(1).tolist()).view(n, k, t, -1)
    return plain_features(forward, prompts, tokens, k).view(n, k, t, -1)


def owners(n: int, k: int) -> Int[Tensor, " rows"]:
    """The prompt of each row, where each of `n` has `k` rows."""
    return torch.arange(n).repeat_interleave(k)


def shared_features(
    forward: Forward,
    config: Any,
    prompts: Prompts,
    tokens: Int[Tensor, "rows tokens"],
    owner: Int[Tensor, " rows"],
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, "rows tokens features"]:
    """Features that stand before each completion token, each prompt computed once. Differentiable.

    Args:
        forward: The model's.
        config: The model's, for its cache.
        prompts: The prompts.
        tokens: Completions.
        owner: The prompt of each completion.
        lengths: How many tokens of each row count; what stands behind those means nothing. All where None.
    """
    length = tokens.shape[1]
    lengths = [length] * len(tokens) if lengths is None else lengths
    owner, cache = owner.to(tokens.device), DynamicCache(config=config)
    first = forward(prompts.tokens, prompts.mask, prompt_positions(prompts.mask), cache, 1).index_select(0, owner)
    groups, parts = groups_of_like_length(lengths), []
    for group in groups:
        rows = torch.tensor(group, device=tokens.device)
        longest = max(1, *(lengths[i] for i in group))
        fed, part = tokens[rows, : longest - 1], first.index_select(0, rows)
        if longest > 1:
            prompt_mask = prompts.mask[owner[rows]]
            mask = torch.cat([prompt_mask, torch.ones_like(fed, dtype=torch.bool)], 1)
            positions = prompt_mask.sum(1, keepdim=True) + torch.arange(longest - 1, device=fed.device)
            part = torch.cat([part, forward(fed, mask, positions, select_cache_rows(cache, owner[rows]), longest - 1)], 1)
        parts.append(part if longest == length else nn.functional.pad(part, (0, 0, 0, length - longest)))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for group in groups for i in group], device=tokens.device)
    return torch.cat(parts).index_select(0, order.argsort())


def select_cache_rows(cache: DynamicCache, rows: Int[Tensor, " rows"]) -> DynamicCache:
    """Return a cache of some rows of another one, which stays as it is.

    `reorder_cache` is used for it, and not `batch_select_indices`: that one indexes, and on a CPU the gradient of
    indexing is added up by atomic operations, in another order each time. The gradient of `index_select` is not.
    """
    if any(hasattr(layer, "recurrent_states") for layer in cache.layers):
        raise NotImplementedError("a recurrent state can't be shared by several completions")
    chosen = copy.copy(cache)
    chosen.layers = [copy.copy(layer) for layer in cache.layers]
    chosen.reorder_cache(rows)
    return chosen


def plain_features(
    forward: Forward, prompts: Prompts, tokens: Int[Tensor, "rows tokens"], k: int
) -> Float[Tensor, "rows tokens features"]:
    """The same features from one forward over prompt and completion, each prompt computed k times."""
    ids = torch.cat([prompts.tokens.repeat_interleave(k, 0), tokens], 1)
    mask = torch.cat([prompts.mask.repeat_interleave(k, 0), torch.ones_like(tokens, dtype=torch.bool)], 1)
    return forward(ids, mask, prompt_positions(mask), None, tokens.shape[1] + 1)[:, :-1]


def checkpoints_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is at work: `transformers` keeps no cache then."""
    return model.training and any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def as_sampled(model: nn.Module) -> AbstractContextManager[None]:
    """Compute as in sampling: in training some models do more than dropout, such as noise on the routes of experts.

    Where activations are checkpointed the mode stays, since `transformers` does that in training only.
    """
    return contextlib.nullcontext() if checkpoints_activations(model) else eval_mode(model)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def defined(prompts: Prompts) -> Prompts:
    """Pad with each prompt's own last token: the embedding of a padding id, which nothing trains, can hold anything."""
    return prompts.replace(tokens=prompts.tokens.where(prompts.mask, prompts.tokens[:, -1:]))


def padded(prompts: Prompts, columns: int = 3) -> Prompts:
    """The same prompts behind more padding, which changes a model's output by its rounding only."""
    pad = (columns, 0)
    return prompts.replace(
        tokens=nn.functional.pad(prompts.tokens, pad), mask=nn.functional.pad(prompts.mask, pad, value=False)
    )


def probe_input(vocabulary: int, device: torch.device) -> tuple[Prompts, Int[Tensor, "rows tokens"]]:
    """Two prompts, one of them padded, and two completions of each, of arbitrary tokens."""
    ids = torch.arange(3, 29, device=device) * 7919 % vocabulary
    mask = torch.ones(2, 5, dtype=torch.bool, device=device)
    mask[0, :2] = False
    return Prompts(ids[:10].view(2, 5), mask, torch.arange(2, device=device)), ids[10:].view(4, 4)


def probe_plain(
    forward: Forward, vocabulary: int, device: torch.device
) -> tuple[Prompts, Tensor, Tensor, float, float]:
    """What the plain path gives for the probe.

    Returns:
        Prompts, completions, their features, the root mean square of what padding changes in these, and 0.0; or, for a
        model whose output depends on its padding, the same without padding, which then changes nothing, and by how
        much padding would change it, relative to its size.
    """
    prompts, tokens = probe_input(vocabulary, device)
    expected = plain_features(forward, prompts, tokens, 2)
    noise = rms(plain_features(forward, padded(prompts), tokens, 2) - expected)
    if noise <= NO_ROUNDING * rms(expected):
        return prompts, tokens, expected, noise, 0.0
    whole = prompts.replace(mask=torch.ones_like(prompts.mask))
    return whole, tokens, plain_features(forward, whole, tokens, 2), 0.0, noise / rms(expected)


def fallback_reason(compute: Callable[[], Tensor], expected: Tensor, noise: float) -> str | None:
    """Say how far a fast path is from the plain one; None where no further than padding moves that.

    Args:
        compute: The fast path.
        expected: What the plain path gives.
        noise: Root mean square of what padding changes in that.
    """
    try:
        difference = rms(compute() - expected)
    except Exception as error:  # whatever a model without a cache raises, the plain path remains
        return f"{type(error).__name__}: {error}"
    return None if difference <= 1e-3 + 3 * noise else f"its output would differ by {difference:.2g}"


def why_not_shared(forward: Forward, config: Any, vocabulary: int, device: torch.device) -> str | None:
    """Say why a prompt can't be shared by its completions; None where it can.

    Args:
        forward: The model's, in evaluation mode.
        config: The model's, for its cache.
        vocabulary: How many token ids it embeds.
        device: Where it is.
    """
    prompts, tokens, expected, noise, _ = probe_plain(forward, vocabulary, device)
    return fallback_reason(lambda: shared_features(forward, config, prompts, tokens, owners(2, 2)), expected, noise)


def rms(tensor: Tensor) -> float:
    """Root mean square."""
    return float(tensor.float().square().mean().sqrt())
