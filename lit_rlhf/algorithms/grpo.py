"""GRPO: group-normalized advantages, a clipped token ratio, and no critic.

Shao et al., 2024, arXiv 2402.03300, section 4.1. Departures: none in the equations; the advantage uses the sample
standard deviation plus 1e-4, as TRL does.
"""

from __future__ import annotations

from typing import Any, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.training import method_checks
from lit_rlhf.training.normalization import whiten_over_ranks
from lit_rlhf.types import Metrics, Rollout

Spread = Literal["group", "batch", "none"]
Reduction = Literal["completions", "tokens", "constant_length", "sums"]
TokenTerms = tuple[Float[Tensor, "prompts samples tokens"], Bool[Tensor, "prompts samples tokens"]]


class GRPO(OnlineAlgorithm):
    """GRPO: `A_i = (R_i - mean) / std` of the group, loss `-mean_t min(w_t A_i, clamp(w_t) A_i) + beta * mean_t k3_t`.

    With R the sum of all rewards of a completion, those of tokens included, and `w_t = pi / pi_old`. At one update per
    rollout `pi_old` is `pi` without gradient: w is 1 with the gradient of `log pi`, and the clip has no effect. The
    base class adds the KL.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is the size of the group.
        clip_range: Clip the ratio w to `[1 - clip_range, 1 + clip_range]`; null does not clip.
        clip_range_high: Upper bound of the clip, `1 + clip_range_high`; null for `1 + clip_range`.
        advantage_std: Divide advantages by the standard deviation of the `group`, of the whole `batch`, or by `none`.
        reduction: How tokens are weighed: `completions` (the mean of each), `tokens` (all alike), `constant_length`
            (the sum of each over `max_new_tokens`), or `sums`.
        kl_coef: See `OnlineAlgorithm`; the paper's is 0.04.
        kl_penalty: See `OnlineAlgorithm`; the paper's is `k3_loss`.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If a number is out of its range, or an option has no effect.
    """

    uses_importance_ratio = True
    published_kl_penalty = "k3_loss"
    min_samples = 2
    group_baseline = True

    def __init__(
        self,
        *args: Any,
        clip_range: float | None = 0.2,
        clip_range_high: float | None = None,
        advantage_std: Spread = "group",
        reduction: Reduction = "completions",
        kl_coef: float = 0.04,
        kl_penalty: str = "k3_loss",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, kl_coef=kl_coef, kl_penalty=kl_penalty, **kwargs)
        method_checks.check_clip_range(clip_range, clip_range_high)
        method_checks.check_choice("advantage_std", advantage_std, ("group", "batch", "none"))
        method_checks.check_choice("reduction", reduction, F.REDUCTIONS)
        self.clip_range, self.clip_range_high = clip_range, clip_range_high
        self.advantage_std, self.reduction = advantage_std, reduction

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion minus the mean of its group, over a standard deviation by choice."""
        returns, valid = rollout.total_returns, rollout.valid
        if self.advantage_std == "group":
            return F.group_normalized_advantages(returns, valid)
        centered = F.group_centered_advantages(returns, valid)
        return centered if self.advantage_std == "none" else whiten_over_ranks(centered, valid, self.sum_over_ranks)

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """Surrogate loss, reduced over tokens."""
        assert part.advantages is not None
        ratio = self.ratio(part)
        terms, clipped = self.surrogate_loss(part, ratio, F.per_token(part.advantages, ratio))
        metrics: Metrics = {"clip_fraction": (clipped, part.loss_mask), "ratio": (ratio.detach(), part.loss_mask)}
        return self.reduce_tokens(terms, part), metrics

    def ratio(self, part: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return the importance ratio of each token."""
        assert part.logprobs is not None and part.old_logprobs is not None
        return F.importance_ratio(part.logprobs, part.old_logprobs)

    def surrogate_loss(self, part: Rollout, ratio: Tensor, advantages: Tensor) -> TokenTerms:
        """Clipped surrogate loss of each token, and where the clip is active."""
        return F.ppo_clip_loss(ratio, advantages, self.clip_range, self.clip_range_high)
