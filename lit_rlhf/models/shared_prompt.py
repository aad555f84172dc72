"""Features of completions that share their prompt.

The keys and values of a prompt are computed once, in a batch of n rows, and repeated for its k completions, with
gradient through the cache. Completions of similar length are computed together, so that little padding is computed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from lit_rlhf.models.forward import ModelForward, as_sampled, checkpoints_activations
from lit_rlhf.models.length_groups import groups_of_similar_length
from lit_rlhf.models.out_of_memory import FittingRows
from lit_rlhf.models.recompute import select_cache_rows
from lit_rlhf.types import Prompts

SequencesT = TypeVar("SequencesT", bound="TokenSequences")


@runtime_checkable
class TokenSequences(Protocol):
    """Completions to score: `lit_rlhf.types.Completions`, `Demonstrations`, `Preferences`."""

    @property
    def tokens(self) -> Tensor:
        """Token ids, `[prompts, samples, tokens]`."""

    @property
    def mask(self) -> Tensor:
        """True where a token counts."""

    def rows(self: SequencesT, index: slice) -> SequencesT:
        """Return the completions of the prompts that `index` selects."""


def score_in_parts(
    forward: ModelForward,
    fitting: FittingRows,
    score: Callable[[Prompts, SequencesT], Tensor],
    prompts: Prompts,
    completions: SequencesT,
) -> Tensor:
    """Score a batch; without gradient, with all weights gathered, and in parts where it runs out of memory."""
    if torch.is_grad_enabled():
        return score(prompts, completions)
    n, k = completions.tokens.shape[:2]
    with forward.without_gradient():
        if forward.in_step:
            return score(prompts, completions)
        return torch.cat(fitting.in_parts(lambda rows: score(prompts.rows(rows), completions.rows(rows)), n, k))


def prompt_positions(mask: Bool[Tensor, "rows columns"]) -> Int[Tensor, "rows columns"]:
    """Return the position of each token, padding not counted."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def prompt_of_row(n: int, k: int) -> Int[Tensor, " rows"]:
    """Return the prompt of each row, where each of `n` prompts has `k` rows."""
    return torch.arange(n).repeat_interleave(k)


def fill_padding(prompts: Prompts) -> Prompts:
    """Replace padding by each prompt's last token: the embedding of a padding id is never trained and may be NaN."""
    return prompts.replace(tokens=prompts.tokens.where(prompts.mask, prompts.tokens[:, -1:]))


def completion_features(
    forward: ModelForward, prompts: Prompts, completions: TokenSequences
) -> Float[Tensor, "prompts samples tokens features"]:
    """Return the features before each completion token; undefined in the padding. Differentiable.

    Each prompt is computed once if the model allows that, or else once per completion.
    """
    n, k, t = completions.tokens.shape
    tokens = filled_tokens(prompts, completions)
    prompts = fill_padding(prompts)
    if forward.in_step and t == 1:  # other ranks make a second pass
        tokens = tokens.repeat(1, 2)
    with as_sampled(forward.model):
        if can_share(forward):
            lengths = completions.mask.flatten(0, 1).sum(1).tolist()
            features = shared_features(forward, prompts, tokens, prompt_of_row(n, k), lengths)
        else:
            features = plain_features(forward, prompts, tokens, k)
    return features[:, :t].reshape(n, k, t, -1)


def can_share(forward: ModelForward) -> bool:
    """Whether prompts are shared now: the model allows it, and its own gradient checkpointing does not prevent it."""
    return bool(forward.shares_prompt) and not checkpoints_activations(forward.model)


def filled_tokens(prompts: Prompts, completions: TokenSequences) -> Int[Tensor, "rows tokens"]:
    """Return the completions' tokens by row, with each prompt's last token in place of padding."""
    last = prompts.tokens[:, -1:].repeat_interleave(completions.tokens.shape[1], 0)
    return completions.tokens.flatten(0, 1).where(completions.mask.flatten(0, 1), last)


def shared_features(
    forward: ModelForward,
    prompts: Prompts,
    tokens: Int[Tensor, "rows tokens"],
    owner: Int[Tensor, " rows"],
    lengths: Sequence[int] | None = None,
) -> Float[Tensor, "rows tokens features"]:
    """Return the features before each completion token, with each prompt computed once. Differentiable.

    Rows are selected by `index_select` and never by indexing: on a CPU, the gradient of indexing is added up by atomic
    operations in an order that changes from run to run; the gradient of `index_select` is not.

    Args:
        forward: The model's forward pass.
        prompts: The prompts.
        tokens: Completions.
        owner: The prompt of each completion.
        lengths: Number of tokens of each row; features past a row's length are undefined. By default all tokens.
    """
    length = tokens.shape[1]
    if lengths is None or forward.in_step:  # every rank makes two passes
        lengths = [length] * len(tokens)
    owner, cache = owner.to(tokens.device), DynamicCache(config=forward.config)
    first = forward(prompts.tokens, prompts.mask, prompt_positions(prompts.mask), cache, 1).index_select(0, owner)
    groups, parts = groups_of_similar_length(lengths), []
    for group in groups:
        rows = torch.tensor(group, device=tokens.device)
        longest = max(1, *(lengths[i] for i in group))
        fed, part = tokens[rows, : longest - 1], first.index_select(0, rows)
        if longest > 1:
            prompt_mask = prompts.mask[owner[rows]]
            mask = torch.cat([prompt_mask, torch.ones_like(fed, dtype=torch.bool)], 1)
            positions = prompt_mask.sum(1, keepdim=True) + torch.arange(longest - 1, device=fed.device)
            rows_cache = select_cache_rows(cache, owner[rows])
            part = torch.cat([part, forward(fed, mask, positions, rows_cache, longest - 1)], 1)
        parts.append(part if longest == length else nn.functional.pad(part, (0, 0, 0, length - longest)))
    if len(parts) == 1:
        return parts[0]
    order = torch.tensor([i for group in groups for i in group], device=tokens.device)
    return torch.cat(parts).index_select(0, order.argsort())


def last_features(
    forward: ModelForward,
    prompts: Prompts,
    tokens: Int[Tensor, "rows tokens"],
    owner: Int[Tensor, " rows"],
    lengths: Sequence[int],
) -> Float[Tensor, "rows features"]:
    """Return the features after the last token of each completion, with each prompt computed once. Differentiable."""
    tokens = nn.functional.pad(tokens, (0, 1), value=int(prompts.tokens[0, -1]))  # features are those before a token
    features = shared_features(forward, prompts, tokens, owner, [length + 1 for length in lengths])
    rows, columns = tokens.shape
    last = torch.arange(rows, device=tokens.device) * columns + torch.tensor(lengths, device=tokens.device)
    return features.flatten(0, 1).index_select(0, last)


def plain_features(
    forward: ModelForward, prompts: Prompts, tokens: Int[Tensor, "rows tokens"], k: int
) -> Float[Tensor, "rows tokens features"]:
    """Return the features of `shared_features` from a plain forward pass, with each prompt computed k times."""
    ids = torch.cat([prompts.tokens.repeat_interleave(k, 0), tokens], 1)
    mask = torch.cat([prompts.mask.repeat_interleave(k, 0), torch.ones_like(tokens, dtype=torch.bool)], 1)
    return forward(ids, mask, prompt_positions(mask), None, tokens.shape[1] + 1)[:, :-1]
