"""The formulas, as pure functions of tensors. Each keeps the dtype it is given, so a test can run it in float64.

Notation: y is a completion of the prompt x, pi the policy, ref the reference; `log pi(y|x)` is the sum of the
log-probabilities of the completion's tokens. "Back to Basics" is Ahmadian et al., 2024, arXiv 2402.14740.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable


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
    """Log-probability of each token under its own logits: `logits[token] - logsumexp(logits)`. Differentiable once."""
    return cast(Tensor, _TokenLogprobs.apply(logits, tokens))  # type: ignore[no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """With its gradient, `one_hot(token) - softmax(logits)`, in one tensor of that size, not the four of its steps."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, tokens: Tensor) -> Tensor:
        tokens, total = tokens.unsqueeze(-1), logits.logsumexp(-1, keepdim=True)
        ctx.save_for_backward(logits, tokens, total)
        return (logits.gather(-1, tokens) - total).squeeze(-1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        logits, tokens, total = ctx.saved_tensors
        gradient = gradient.unsqueeze(-1)
        return (logits - total).exp_().mul_(-gradient).scatter_add_(-1, tokens, gradient), None


def entropy(
    probabilities: Float[Tensor, "*batch vocabulary"], logprobs: Float[Tensor, "*batch vocabulary"]
) -> Float[Tensor, "*batch"]:
    """Entropy in nats of a distribution, given its logarithm too; what can't happen may have a logarithm of -inf."""
    return -(probabilities * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)


def kl_k1(
    logprobs: Float[Tensor, "*batch tokens"], reference_logprobs: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """The estimator k1 of KL(pi || ref), a token: `log pi - log ref`.

    Unbiased under samples of pi, can be negative. Subtracted from the reward, detached, its gradient is the exact
    gradient of the KL of the sequence. Schulman, "Approximating KL divergence", 2020.
    """
    return logprobs - reference_logprobs


def kl_k2(logprobs: Float[Tensor, "*batch"], reference_logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """The estimator k2 of KL(pi || ref): `(log pi - log ref)^2 / 2`.

    Biased in value. Of whole completions and with gradient, in the loss, its gradient is the exact gradient of the KL
    of the sequence; a token at a time it is another one. Schulman, "Approximating KL divergence", 2020.
    """
    return (logprobs - reference_logprobs) ** 2 / 2


def best_of_kl(n: int) -> float:
    """How far best-of-n is at most from the policy it chooses from: `log n - (n - 1) / n`, in nats a completion.

    Beirami et al., 2024, arXiv 2401.01879, theorem 1.
    """
    return math.log(n) - (n - 1) / n


def kl_k3(
    logprobs: Float[Tensor, "*batch tokens"], reference_logprobs: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """The estimator k3 of KL(pi || ref), a token: `ref / pi - 1 - log(ref / pi)`.

    Unbiased in value, never negative, of low variance: a good monitor. As a penalty its gradient is another one.
    Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def kl_of_completions(
    estimator: str,
    logprobs: Float[Tensor, "prompts samples tokens"],
    reference_logprobs: Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples"]:
    """An estimate of KL(pi || ref) for each completion: the sum of `k1` or `k3` over its tokens, or its own `k2`."""
    logprobs, reference_logprobs = logprobs.masked_fill(~mask, 0.0), reference_logprobs.masked_fill(~mask, 0.0)
    if estimator == "k2":
        return kl_k2(logprobs.sum(-1), reference_logprobs.sum(-1))
    return masked_sum({"k1": kl_k1, "k3": kl_k3}[estimator](logprobs, reference_logprobs), mask)


def kl_penalized_return(
    rewards: Float[Tensor, "prompts samples"], kl: Float[Tensor, "prompts samples"], kl_coef: float
) -> Float[Tensor, "prompts samples"]:
    """What is optimised: `R(x, y) = r(x, y) - beta * log(pi(y|x) / ref(y|x))`. Back to Basics, section 2."""
    return rewards - kl_coef * kl


def adapted_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """`beta (1 + K clamp((KL - target) / target, -0.2, 0.2))`. Ziegler et al., 2019, arXiv 1909.08593, section 2.2."""
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + gain * error)


def token_rewards_with_kl(
    rewards: Float[Tensor, "prompts samples"],
    penalties: Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples tokens"]:
    """The reward of each token: minus its own penalty, and at the last one that of the whole completion.

    The penalty of a token is `beta * log(pi / ref)`, less its immediate reward where there is one.
    Ziegler et al., 2019, arXiv 1909.08593, section 2.
    """
    last = mask & ~torch.nn.functional.pad(mask[..., 1:], (0, 1))
    return torch.where(last, rewards.unsqueeze(-1) - penalties, -penalties).masked_fill(~mask, 0.0)


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


def best_of(
    returns: Float[Tensor, "prompts samples"], valid: Bool[Tensor, "prompts samples"]
) -> Bool[Tensor, "prompts samples"]:
    """True at the valid completion of each prompt with the highest return, the first of equals; nowhere if none is."""
    best = returns.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(valid).scatter(1, best, True) & valid


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


def whiten(values: Float[Tensor, "*shape"], mean: Tensor, variance: Tensor) -> Float[Tensor, "*shape"]:
    """Bring values to mean 0 and variance 1, given the mean and the variance of all that counts."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def gae(
    rewards: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*batch tokens"],
    decay: float,
) -> Float[Tensor, "*batch tokens"]:
    """Generalised advantage estimation: `A_t = sum_l lambda^l delta_{t+l}`, `delta_t = r_t + V_{t+1} - V_t`, gamma = 1.

    Schulman et al., 2016, arXiv 1506.02438, equation 16. The value behind the last token is 0. At lambda = 1 it is the
    return minus the value, at lambda = 0 the temporal difference `delta_t`.

    Args:
        rewards: Reward of each token.
        values: What the critic expects before each token.
        mask: True where a token counts; the tokens that do come first.
        decay: Lambda, between 0 and 1.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    following = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    delta = rewards + following - values
    advantages, ahead = torch.zeros_like(delta), torch.zeros_like(delta[..., 0])
    for t in reversed(range(delta.shape[-1])):
        ahead = delta[..., t] + decay * ahead
        advantages[..., t] = ahead
    return advantages.masked_fill(~mask, 0.0)


def ppo_clip_loss(
    logprobs: Float[Tensor, "*batch tokens"],
    old_logprobs: Float[Tensor, "*batch tokens"],
    advantages: Float[Tensor, "*batch tokens"],
    clip: float | None,
) -> tuple[Float[Tensor, "*batch tokens"], Bool[Tensor, "*batch tokens"]]:
    """The term of each token: `-min(w A, clamp(w, 1 - eps, 1 + eps) A)`, `w = pi / pi_old`.

    Schulman et al., 2017, arXiv 1707.06347, equation 7.

    Returns:
        The terms, and where the clip holds the ratio; nowhere with `clip` None.
    """
    ratio = (logprobs - old_logprobs).exp()
    plain = ratio * advantages
    if clip is None:
        return -plain, torch.zeros_like(plain, dtype=torch.bool)
    clipped = ratio.clamp(1 - clip, 1 + clip) * advantages
    return -torch.minimum(plain, clipped), clipped < plain


def value_loss(
    values: Float[Tensor, "*batch tokens"],
    targets: Float[Tensor, "*batch tokens"],
    old_values: Float[Tensor, "*batch tokens"],
    clip: float | None = None,
) -> Float[Tensor, "*batch tokens"]:
    """The term of each token: `(V - G)^2 / 2`; with `clip` the larger of it and that of V held within `clip` of V_old.

    The clip is that of the reference implementation of PPO (Engstrom et al., 2020, arXiv 2005.12729, section 3).
    """
    plain = (values - targets) ** 2
    if clip is None:
        return plain / 2
    held = old_values + (values - old_values).clamp(-clip, clip)
    return torch.maximum(plain, (held - targets) ** 2) / 2


def dpo_loss(margin: Float[Tensor, "*pairs"], beta: float) -> Float[Tensor, "*pairs"]:
    """The term of each pair: `-log sigmoid(beta * margin)`. Rafailov et al., 2023, arXiv 2305.18290, equation 7.

    Args:
        margin: `log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)`, of whole completions.
        beta: How dear the distance from the reference is.
    """
    return -torch.nn.functional.logsigmoid(beta * margin)


def ipo_loss(margin: Float[Tensor, "*pairs"], beta: float) -> Float[Tensor, "*pairs"]:
    """The term of each pair: `(margin - 1 / (2 beta))^2`. Azar et al., 2024, arXiv 2310.12036, equation 17."""
    return (margin - 1 / (2 * beta)) ** 2


def bradley_terry_loss(chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """The term of each pair: `-log sigmoid(r(chosen) - r(rejected))`. Bradley and Terry, 1952."""
    return -torch.nn.functional.logsigmoid(chosen - rejected)


def gradient_noise(squares: float, mean_square: float, parts: int, size: int) -> tuple[float, float]:
    """Estimate a prompt's gradient variance and the squared norm of the true gradient, both without bias.

    McCandlish et al., 2018, arXiv 1812.06162, appendix A.1, for more than two batches.

    Args:
        squares: The sum of the squared norms of the parts' gradients.
        mean_square: The squared norm of their mean.
        parts: How many parts there are, at least 2.
        size: Prompts of each part.

    Returns:
        The trace of the covariance of a single prompt's gradient, and the squared norm of the expected gradient, which
        can come out negative where the noise is large.
    """
    part_variance = (squares - parts * mean_square) / (parts - 1)
    return part_variance * size, mean_square - part_variance / parts
