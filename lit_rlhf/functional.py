"""The formulas, as pure functions of tensors. Each keeps the dtype it is given, so a test can run it in float64.

Notation: y is a completion of the prompt x, pi the policy, ref the reference; `log pi(y|x)` is the sum of the
log-probabilities of the completion's tokens. "Back to Basics" is Ahmadian et al., 2024, arXiv 2402.14740.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor


def masked_sum(
    values: Float[Tensor, "prompts samples tokens"], mask: Bool[Tensor, "prompts samples tokens"]
) -> Float[Tensor, "prompts samples"]:
    """Sum over the tokens that count. What stands in the padding, NaN included, reaches neither value nor gradient."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32 if it is in a 16-bit dtype, and as it is otherwise."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def token_logprobs(
    logits: Float[Tensor, "*batch vocabulary"], tokens: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Log-probability of each token under its own logits: `logits[token] - logsumexp(logits)`."""
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)
    return chosen - logits.logsumexp(-1)


def entropy(logits: Float[Tensor, "*batch vocabulary"]) -> Float[Tensor, "*batch"]:
    """Entropy in nats of the distribution that the logits describe."""
    logprobs = logits.log_softmax(-1)
    return -(logprobs.exp() * logprobs).nan_to_num(0.0).sum(-1)


def kl_k1(
    logprobs: Float[Tensor, "*batch tokens"], reference_logprobs: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """The estimator k1 of KL(pi || ref), a token: `log pi - log ref`.

    Unbiased under samples of pi, can be negative. Subtracted from the reward, detached, its gradient is the exact
    gradient of the KL of the sequence. Schulman, "Approximating KL divergence", 2020.
    """
    return logprobs - reference_logprobs


def kl_k3(
    logprobs: Float[Tensor, "*batch tokens"], reference_logprobs: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """The estimator k3 of KL(pi || ref), a token: `ref / pi - 1 - log(ref / pi)`.

    Unbiased in value, never negative, of low variance: a good monitor. As a penalty its gradient is another one.
    Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def shaped_return(
    rewards: Float[Tensor, "prompts samples"], kl: Float[Tensor, "prompts samples"], kl_coef: float
) -> Float[Tensor, "prompts samples"]:
    """What is optimised: `R(x, y) = r(x, y) - beta * log(pi(y|x) / ref(y|x))`. Back to Basics, section 2."""
    return rewards - kl_coef * kl


def reward_to_go(
    rewards: Float[Tensor, "*batch tokens"], mask: Bool[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Sum of the rewards from each token on, undiscounted: `G_t = sum_{s >= t} r_s`, 0 past a completion's end."""
    kept = rewards.masked_fill(~mask, 0.0)
    return kept.flip(-1).cumsum(-1).flip(-1).masked_fill(~mask, 0.0)


def rloo_advantages(
    rewards: Shaped[Tensor, "prompts samples *tokens"], valid: Bool[Tensor, "prompts samples"] | None = None
) -> Shaped[Tensor, "prompts samples *tokens"]:
    """Leave-one-out advantages: `A_i = R_i - mean_{j != i} R_j`. Back to Basics, section 3.2; Kool et al., 2019.

    With a tokens axis every token has the leave-one-out baseline of its own place; rewards past a completion's end
    must be 0 and still count in the divisor, otherwise the gradient is biased.

    Args:
        rewards: A number a completion, or a number a token.
        valid: False where a completion counts nowhere: not in its own place, its siblings' baseline or the divisor.

    Returns:
        The advantages; 0 where not valid, and where no valid sibling is left to compare with.
    """
    if valid is None:
        valid = torch.ones(rewards.shape[:2], dtype=torch.bool, device=rewards.device)
    valid = valid.reshape(*valid.shape, *[1] * (rewards.ndim - 2)).expand_as(rewards)
    level = rewards.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    kept = (rewards - level).masked_fill(~valid, 0.0)  # so that equal rewards give exactly 0, not a rounding error
    siblings = valid.sum(1, keepdim=True) - 1
    baseline = (kept.sum(1, keepdim=True) - kept) / siblings.clamp(min=1)
    return (kept - baseline).masked_fill(~valid | (siblings < 1), 0.0)


def reinforce_loss(
    logprobs: Float[Tensor, "prompts samples tokens"],
    advantages: Float[Tensor, "prompts samples"] | Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples"]:
    """The term of each completion: `-sum_t A_t log pi(y_t | x, y_<t)`. A single advantage stands at every token.

    Back to Basics, equations 2 and 3: a sum over tokens, no length normalisation, no ratio, no clip.
    """
    if advantages.ndim == 2:
        advantages = advantages.unsqueeze(-1)
    return -masked_sum(advantages * logprobs.masked_fill(~mask, 0.0), mask)


def bradley_terry_loss(chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """The term of each pair: `-log sigmoid(r(chosen) - r(rejected))`. Bradley and Terry, 1952."""
    return -torch.nn.functional.logsigmoid(chosen - rejected)
