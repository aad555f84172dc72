"""Losses, advantages and KL estimators as pure functions of tensors. All keep the dtype of their inputs.

Notation: x is a prompt, y a completion, pi the policy, ref the reference. `log pi(y|x)` is the sum of the completion's
token log-probabilities. "Back to Basics" is Ahmadian et al., 2024, arXiv 2402.14740. Axis names: `lit_rlhf.types`.
"""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_LOG_RATIO = 20.0
"""Bound on the log importance ratio. `exp(90)` overflows float32; `exp(20)`, about 5e8, leaves room for sums."""


def masked_sum(
    values: Float[Tensor, "prompts samples tokens"], mask: Bool[Tensor, "prompts samples tokens"]
) -> Float[Tensor, "prompts samples"]:
    """Sum over tokens where `mask` is True. Other values, even NaN, affect neither the result nor the gradient."""
    return values.masked_fill(~mask, 0.0).sum(-1)


def masked_mean(
    values: Float[Tensor, "prompts samples tokens"], mask: Bool[Tensor, "prompts samples tokens"]
) -> Float[Tensor, "prompts samples"]:
    """Mean over tokens where `mask` is True; 0 without such tokens. Padding behaves as in `masked_sum`."""
    return masked_sum(values, mask) / mask.sum(-1).clamp(min=1)


REDUCTIONS = "sums", "completions", "tokens", "constant_length"
"""Names of `reduce_tokens`."""


def reduce_tokens(
    terms: Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
    reduction: str,
    max_length: int,
) -> Float[Tensor, "prompts samples"] | Float[Tensor, "prompts samples tokens"]:
    """Reduce a loss per token to terms whose mean is the loss of an update.

    Args:
        terms: The loss of each token.
        mask: True at the tokens of completions.
        reduction: `sums`: the sum of each completion (REINFORCE, RLOO); `completions`: its mean (GRPO, arXiv
            2402.03300, equation 3); `tokens`: all tokens of the update are alike (DAPO, arXiv 2503.14476, equation 8);
            `constant_length`: the sum over `max_length` (Dr. GRPO, arXiv 2503.20783, section 3.2).
        max_length: Maximum number of tokens of a completion.

    Returns:
        One number per completion, or the terms as they are for `tokens`.
    """
    if reduction == "tokens":
        return terms
    if reduction == "completions":
        return masked_mean(terms, mask)
    return masked_sum(terms, mask) / {"sums": 1, "constant_length": max_length}[reduction]


def at_least_float32(tensor: Tensor) -> Tensor:
    """Convert a 16-bit tensor to float32; return any other dtype unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def float64_device(device: torch.device) -> torch.device:
    """Return the device of float64 computations: the same one, or the CPU for devices without float64 (mps)."""
    return torch.device("cpu") if device.type == "mps" else device


def to_float64(tensor: Tensor) -> Tensor:
    """Convert to float64, on `float64_device`."""
    return tensor.to(float64_device(tensor.device)).double()


def token_logprobs(
    logits: Float[Tensor, "*batch vocabulary"], tokens: Int[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Token log-probability: `logits[token] - logsumexp(logits)`, in nats. Supports first derivatives only."""
    return cast(Tensor, _TokenLogprobs.apply(logits, tokens))  # type: ignore[no-untyped-call]


class _TokenLogprobs(torch.autograd.Function):
    """Compute the gradient, `one_hot(token) - softmax(logits)`, in one tensor of the size of `logits`, not four."""

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
    """Entropy in nats: `-sum p log p`. Log-probabilities may be -inf where the probability is 0."""
    return -(probabilities * logprobs.clamp_min(torch.finfo(logprobs.dtype).min)).sum(-1)


def kl_k1(
    logprobs: Float[Tensor, "*batch tokens"], reference_logprobs: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Per-token k1 estimator of KL(pi || ref): `log pi - log ref`.

    Unbiased under samples from pi; can be negative. Subtracted from the reward (detached), it gives the exact policy
    gradient of the sequence KL. Schulman, "Approximating KL divergence", 2020.
    """
    return logprobs - reference_logprobs


def kl_k2(logprobs: Float[Tensor, "*batch"], reference_logprobs: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    """k2 estimator of KL(pi || ref): `(log pi - log ref)^2 / 2`.

    Biased in value. As a loss on the log-probabilities of whole completions, its gradient is the exact gradient of the
    sequence KL; applied per token, it is not. Schulman, "Approximating KL divergence", 2020.
    """
    return (logprobs - reference_logprobs) ** 2 / 2


def best_of_kl(n: int) -> float:
    """Upper bound on the KL of best-of-n to its base policy: `log n - (n - 1) / n`, in nats per completion.

    Beirami et al., 2024, arXiv 2401.01879, theorem 1.
    """
    return math.log(n) - (n - 1) / n


def kl_k3(
    logprobs: Float[Tensor, "*batch tokens"], reference_logprobs: Float[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Per-token k3 estimator of KL(pi || ref): `ref / pi - 1 - log(ref / pi)`.

    Unbiased in value, never negative, low variance: suited to monitoring. As a penalty, its gradient is not the
    gradient of KL(pi || ref). Schulman, "Approximating KL divergence", 2020.
    """
    log_ratio = reference_logprobs - logprobs
    return log_ratio.exp() - 1 - log_ratio


def kl_of_completions(
    estimator: str,
    logprobs: Float[Tensor, "prompts samples tokens"],
    reference_logprobs: Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples"]:
    """Estimate KL(pi || ref) per completion: the token sum of `k1` or `k3`, or `k2` of summed log-probabilities."""
    logprobs, reference_logprobs = logprobs.masked_fill(~mask, 0.0), reference_logprobs.masked_fill(~mask, 0.0)
    if estimator == "k2":
        return kl_k2(logprobs.sum(-1), reference_logprobs.sum(-1))
    return masked_sum({"k1": kl_k1, "k3": kl_k3}[estimator](logprobs, reference_logprobs), mask)


def kl_penalized_return(
    rewards: Float[Tensor, "prompts samples"], kl: Float[Tensor, "prompts samples"], kl_coef: float
) -> Float[Tensor, "prompts samples"]:
    """KL-penalized return: `R(x, y) = r(x, y) - beta * log(pi(y|x) / ref(y|x))`. Back to Basics, section 2."""
    return rewards - kl_coef * kl


def adapted_kl_coef(kl_coef: float, kl: float, target: float, gain: float) -> float:
    """Adaptive KL coefficient: `beta (1 + K clamp((KL - target) / target, -0.2, 0.2))`.

    Ziegler et al., 2019, arXiv 1909.08593, section 2.2.
    """
    error = min(max(kl / target - 1, -0.2), 0.2)
    return kl_coef * (1 + gain * error)


def token_rewards_with_kl(
    rewards: Float[Tensor, "prompts samples"],
    penalties: Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples tokens"]:
    """Per-token rewards: minus each token's penalty, plus the sequence reward at the last token.

    A token's penalty is `beta * log(pi / ref)` minus its token-level reward, if any. Padding gets 0.
    Ziegler et al., 2019, arXiv 1909.08593, section 2.
    """
    last = mask & ~torch.nn.functional.pad(mask[..., 1:], (0, 1))
    return torch.where(last, rewards.unsqueeze(-1) - penalties, -penalties).masked_fill(~mask, 0.0)


def reward_to_go(
    rewards: Float[Tensor, "*batch tokens"], mask: Bool[Tensor, "*batch tokens"]
) -> Float[Tensor, "*batch tokens"]:
    """Undiscounted reward-to-go: `G_t = sum_{s >= t} r_s`; 0 past a completion's end."""
    kept = rewards.masked_fill(~mask, 0.0)
    return kept.flip(-1).cumsum(-1).flip(-1).masked_fill(~mask, 0.0)


def rloo_advantages(
    rewards: Shaped[Tensor, "prompts samples *tokens"], valid: Bool[Tensor, "prompts samples"] | None = None
) -> Shaped[Tensor, "prompts samples *tokens"]:
    """Leave-one-out advantages: `A_i = R_i - mean_{j != i} R_j`. Back to Basics, section 3.2; Kool et al., 2019.

    With a tokens axis, the baseline is computed per token position, over all other completions: one that has ended
    counts with a token-level reward-to-go of 0. Without it the gradient would be biased.

    Args:
        rewards: One number per completion or per token.
        valid: False for completions to ignore: they get no advantage and enter neither baselines nor divisors.

    Returns:
        The advantages: 0 for invalid completions and for those without a valid sibling; exactly 0 in a group whose
        rewards are all equal.
    """
    if valid is None:
        valid = torch.ones(rewards.shape[:2], dtype=torch.bool, device=rewards.device)
    valid = valid.reshape(*valid.shape, *[1] * (rewards.ndim - 2)).expand_as(rewards)
    shifted = _subtract_group_max(rewards, valid)
    siblings = valid.sum(1, keepdim=True) - 1
    baseline = (shifted.sum(1, keepdim=True) - shifted) / siblings.clamp(min=1)
    return (shifted - baseline).masked_fill(~valid | (siblings < 1), 0.0)


def group_centered_advantages(
    returns: Float[Tensor, "prompts samples"], valid: Bool[Tensor, "prompts samples"]
) -> Float[Tensor, "prompts samples"]:
    """Dr. GRPO advantages: `A_i = R_i - mean_j R_j`. Liu et al., 2025, arXiv 2503.20783.

    The mean is over the valid completions of the group.

    Returns:
        The advantages: 0 for invalid completions and in groups with fewer than two valid ones; exactly 0 in a group
        whose returns are all equal.
    """
    shifted, count = _subtract_group_max(returns, valid), valid.sum(1, keepdim=True)
    mean = shifted.sum(1, keepdim=True) / count.clamp(min=1)
    return (shifted - mean).masked_fill(~valid | (count < 2), 0.0)


def length_weighted_advantages(
    returns: Float[Tensor, "prompts samples"],
    lengths: Int[Tensor, "prompts samples"],
    valid: Bool[Tensor, "prompts samples"],
) -> Float[Tensor, "prompts samples"]:
    """OPO advantages: `A_i = R_i - sum_j l_j R_j / sum_j l_j`, lengths l. Hao et al., 2025, arXiv 2505.23585.

    Returns:
        The advantages: 0 for invalid completions; exactly 0 in a group whose returns are all equal.
    """
    shifted, weights = _subtract_group_max(returns, valid), lengths * valid
    mean = (shifted * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1)
    return (shifted - mean).masked_fill(~valid, 0.0)


def group_normalized_advantages(
    returns: Float[Tensor, "prompts samples"], valid: Bool[Tensor, "prompts samples"], eps: float = 1e-4
) -> Float[Tensor, "prompts samples"]:
    """GRPO advantages: `A_i = (R_i - mean_j R_j) / (std_j R_j + eps)`. Shao et al., 2024, arXiv 2402.03300, 4.1.2.

    Mean and standard deviation are over the valid completions of the group. The standard deviation is the sample one
    (divisor n - 1), as in TRL; the paper does not say which.

    Args:
        returns: One number per completion.
        valid: False for completions to ignore.
        eps: Added to the standard deviation, so that nearly equal returns do not give large advantages; 0 is allowed.

    Returns:
        The advantages: 0 for invalid completions and in groups with fewer than two valid ones; exactly 0 in a group
        whose returns are all equal.
    """
    centered = group_centered_advantages(returns, valid)
    degrees_of_freedom = (valid.sum(1, keepdim=True) - 1).clamp(min=1)
    std = ((centered**2).sum(1, keepdim=True) / degrees_of_freedom).sqrt()
    return (centered / (std + eps)).masked_fill(std == 0, 0.0)


def _subtract_group_max(
    returns: Shaped[Tensor, "prompts samples *tokens"], valid: Bool[Tensor, "prompts samples *tokens"]
) -> Shaped[Tensor, "prompts samples *tokens"]:
    """Subtract each group's largest valid return, so that equal returns become exactly 0; 0 where not valid."""
    level = returns.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return (returns - level).masked_fill(~valid, 0.0)


def best_of_group_mask(
    returns: Float[Tensor, "prompts samples"], valid: Bool[Tensor, "prompts samples"]
) -> Bool[Tensor, "prompts samples"]:
    """Mark each prompt's valid completion with the highest return (first of ties); none if no completion is valid."""
    best = returns.masked_fill(~valid, -torch.inf).argmax(1, keepdim=True)
    return torch.zeros_like(valid).scatter(1, best, True) & valid


def per_token(
    advantages: Float[Tensor, "prompts samples"] | Float[Tensor, "prompts samples tokens"],
    like: Float[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples tokens"]:
    """Give each token the advantage of its completion; advantages per token stay."""
    return advantages.unsqueeze(-1).expand_as(like) if advantages.ndim == 2 else advantages


def reinforce_loss(
    logprobs: Float[Tensor, "prompts samples tokens"],
    advantages: Float[Tensor, "prompts samples"] | Float[Tensor, "prompts samples tokens"],
    mask: Bool[Tensor, "prompts samples tokens"],
) -> Float[Tensor, "prompts samples"]:
    """REINFORCE loss per completion: `-sum_t A_t log pi(y_t | x, y_<t)`.

    A per-completion advantage applies to each of its tokens. Back to Basics, equations 2 and 3: a sum over tokens,
    with no length normalization, no importance ratio and no clipping.
    """
    return -masked_sum(per_token(advantages, logprobs) * logprobs.masked_fill(~mask, 0.0), mask)


def whiten(values: Float[Tensor, "*shape"], mean: Tensor, variance: Tensor) -> Float[Tensor, "*shape"]:
    """Normalize values to mean 0 and variance 1: `(values - mean) / sqrt(variance + 1e-8)`."""
    return (values - mean) * torch.rsqrt(variance + 1e-8)


def gae(
    rewards: Float[Tensor, "*batch tokens"],
    values: Float[Tensor, "*batch tokens"],
    mask: Bool[Tensor, "*batch tokens"],
    lam: float,
) -> Float[Tensor, "*batch tokens"]:
    """Generalized advantage estimation: `A_t = sum_l lambda^l delta_{t+l}`, `delta_t = r_t + V_{t+1} - V_t`, gamma = 1.

    Schulman et al., 2016, arXiv 1506.02438, equation 16. The value after the last token is 0. lambda = 1 gives the
    return minus the value, lambda = 0 the temporal difference `delta_t`.

    Args:
        rewards: Per-token rewards.
        values: The critic's prediction before each token.
        mask: True for tokens of the completion; padding is on the right.
        lam: Lambda, between 0 and 1.
    """
    rewards, values = rewards.masked_fill(~mask, 0.0), values.masked_fill(~mask, 0.0)
    next_values = torch.cat([values[..., 1:], torch.zeros_like(values[..., :1])], -1)
    delta = rewards + next_values - values
    advantages, running = torch.zeros_like(delta), delta.new_zeros(delta.shape[:-1])
    for t in reversed(range(delta.shape[-1])):
        running = delta[..., t] + lam * running
        advantages[..., t] = running
    return advantages.masked_fill(~mask, 0.0)


def importance_ratio(
    logprobs: Float[Tensor, "*batch"], old_logprobs: Float[Tensor, "*batch"]
) -> Float[Tensor, "*batch"]:
    """Compute the importance ratio `w = pi / pi_old`, of tokens or of whole completions.

    The log-ratio is clamped to +-`MAX_LOG_RATIO`, so the result is always finite. Beyond the bound the gradient is 0;
    within it, value and gradient are those of `exp(logprobs - old_logprobs)`.
    """
    return (logprobs - old_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()


def ppo_clip_loss(
    ratio: Float[Tensor, "*batch"],
    advantages: Float[Tensor, "*batch"],
    clip_range: float | None,
    clip_range_high: float | None = None,
) -> tuple[Float[Tensor, "*batch"], Bool[Tensor, "*batch"]]:
    """Clipped surrogate loss: `-min(w A, clamp(w, 1 - low, 1 + high) A)`.

    Schulman et al., 2017, arXiv 1707.06347, equation 7; with two bounds Yu et al., 2025, arXiv 2503.14476, equation 10.

    Args:
        ratio: The importance ratio w of each token, with gradient.
        advantages: The advantages A.
        clip_range: See `clip_ratio`.
        clip_range_high: See `clip_ratio`.

    Returns:
        The loss, and a mask of the tokens whose clipped term is active.
    """
    unclipped, clipped = ratio * advantages, clip_ratio(ratio, clip_range, clip_range_high) * advantages
    return -torch.minimum(unclipped, clipped), clipped < unclipped


def clip_ratio(
    ratio: Float[Tensor, "*batch"], clip_range: float | None, clip_range_high: float | None = None
) -> Float[Tensor, "*batch"]:
    """Clip a ratio to `[1 - clip_range, 1 + clip_range_high]`. A bound that is None is absent.

    Args:
        ratio: The ratio.
        clip_range: The lower bound, and the upper one without `clip_range_high`.
        clip_range_high: The upper bound.
    """
    high = clip_range if clip_range_high is None else clip_range_high
    low = None if clip_range is None else 1 - clip_range
    return ratio if low is None and high is None else ratio.clamp(low, None if high is None else 1 + high)


def value_loss(
    values: Float[Tensor, "*batch tokens"],
    targets: Float[Tensor, "*batch tokens"],
    old_values: Float[Tensor, "*batch tokens"],
    clip_range: float | None = None,
) -> Float[Tensor, "*batch tokens"]:
    """Value loss per token: `(V - G)^2 / 2`, or with `clip_range` `max((V - G)^2, (V_clipped - G)^2) / 2`.

    `V_clipped` is V limited to `clip_range` around V_old, as in the reference implementation of PPO (Engstrom et al.,
    2020, arXiv 2005.12729, section 3).
    """
    unclipped = (values - targets) ** 2
    if clip_range is None:
        return unclipped / 2
    clipped_values = old_values + (values - old_values).clamp(-clip_range, clip_range)
    return torch.maximum(unclipped, (clipped_values - targets) ** 2) / 2


def dpo_loss(margin: Float[Tensor, "*pairs"], beta: float) -> Float[Tensor, "*pairs"]:
    """DPO loss per pair: `-log sigmoid(beta * margin)`. Rafailov et al., 2023, arXiv 2305.18290, equation 7.

    Args:
        margin: `log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)`, of whole completions.
        beta: Strength of the KL constraint.
    """
    return -torch.nn.functional.logsigmoid(beta * margin)


def ipo_loss(margin: Float[Tensor, "*pairs"], beta: float) -> Float[Tensor, "*pairs"]:
    """IPO loss per pair: `(margin - 1 / (2 beta))^2`. Azar et al., 2024, arXiv 2310.12036, equation 17."""
    return (margin - 1 / (2 * beta)) ** 2


def kto_loss(
    log_ratio: Float[Tensor, "*rows"], kl: Float[Tensor, ""], desirable: Bool[Tensor, "*rows"], beta: float
) -> Float[Tensor, "*rows"]:
    """KTO loss per completion: `1 - sigmoid(s beta (log_ratio - kl))`, s = 1 if desirable, otherwise -1.

    Ethayarajh et al., 2024, arXiv 2402.01306, equation 8.

    Args:
        log_ratio: `log pi(y|x) / ref(y|x)` of whole completions.
        kl: The reference point z, a KL of at least 0.
        desirable: Whether each completion is.
        beta: Strength of the KL constraint.
    """
    sign = torch.where(desirable, 1.0, -1.0)
    return torch.sigmoid(-sign * beta * (log_ratio - kl))


def bradley_terry_loss(chosen: Float[Tensor, "*pairs"], rejected: Float[Tensor, "*pairs"]) -> Float[Tensor, "*pairs"]:
    """Bradley-Terry loss per pair: `-log sigmoid(r(chosen) - r(rejected))`. Bradley and Terry, 1952."""
    return -torch.nn.functional.logsigmoid(chosen - rejected)


def gradient_noise(
    sum_of_squared_norms: float, squared_norm_of_mean: float, num_parts: int, part_size: int
) -> tuple[float, float]:
    """Unbiased estimates of the per-prompt gradient variance and of the true gradient's squared norm.

    McCandlish et al., 2018, arXiv 1812.06162, appendix A.1, extended to more than two batches.

    Args:
        sum_of_squared_norms: Sum over the parts of a batch of the squared norm of the part's gradient.
        squared_norm_of_mean: Squared norm of the mean of these gradients.
        num_parts: Number of parts, at least 2.
        part_size: Prompts in each part.

    Returns:
        The trace of the covariance of a single prompt's gradient, and the squared norm of the expected gradient, which
        can be negative if the noise is large.
    """
    part_variance = (sum_of_squared_norms - num_parts * squared_norm_of_mean) / (num_parts - 1)
    return part_variance * part_size, squared_norm_of_mean - part_variance / num_parts
