"""Log-probabilities of tokens from features, in chunks, so that the logits of all positions are never held at once."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lit_rlhf import functional as F
from lit_rlhf.models.forward import ModelForward

LOGITS_AT_ONCE = 2**25
"""Elements of logits held at a time: 128 MiB in float32."""


def completion_logprobs(
    forward: ModelForward,
    features: Float[Tensor, "prompts samples tokens features"],
    tokens: Int[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
    temperature: float,
) -> Float[Tensor, "prompts samples tokens"]:
    """Return the log-probability of each token, in nats, at least float32, 0 where masked. Differentiable.

    Args:
        forward: The model's forward pass.
        features: The features before each token.
        tokens: The tokens.
        mask: True where a token counts.
        temperature: What logits are divided by.
    """
    counted = mask.flatten().nonzero().squeeze(-1)
    scores = chunked_logprobs(forward, features.flatten(0, 2).index_select(0, counted), tokens[mask], temperature)
    return scores.new_zeros(mask.shape).masked_scatter(mask, scores)


def chunked_logprobs(
    forward: ModelForward, features: Float[Tensor, "rows features"], tokens: Int[Tensor, " rows"], temperature: float
) -> Float[Tensor, " rows"]:
    """Return the log-probabilities of tokens, each chunk of logits recomputed for the gradient."""

    def score(features: Tensor, tokens: Tensor) -> Tensor:
        logits = F.at_least_float32(forward.project(features))
        return F.token_logprobs(logits if temperature == 1 else logits / temperature, tokens)

    rows = max(1, LOGITS_AT_ONCE // forward.config.get_text_config().vocab_size)
    if len(tokens) <= rows or not forward.head_apart:
        return score(features, tokens)
    parts = [
        checkpoint(score, some, ids, use_reentrant=False, preserve_rng_state=False)
        for some, ids in zip(torch.split(features, rows), torch.split(tokens, rows), strict=True)
    ]
    return torch.cat(parts)
