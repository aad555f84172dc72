"""GRPO: group-normalized advantages, a clipped token ratio, and no critic.

Shao et al., 2024, arXiv 2402.03300, section 4.1. Departures: none in the equations; the advantage uses the sample
standard deviation plus 1e-4, as TRL does.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.errors import InputError
from lit_rlhf.types import Metrics, Rollout


class GRPO(OnlineAlgorithm):
    """GRPO: `A_i = (R_i - mean) / std` of the group, loss `-mean_t min(w_t A_i, clamp(w_t) A_i) + beta * mean_t k3_t`.

    With `w_t = pi / pi_old`. At one update per rollout the ratio is 1, and the clip has no effect.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is the size of the group.
        clip_range: Clip the ratio w to `[1 - clip_range, 1 + clip_range]`; null does not clip.
        kl_penalty: See `OnlineAlgorithm`; the paper's is `k3_loss`.
        **kwargs: See `OnlineAlgorithm`. The paper's `kl_coef` is 0.04.

    Raises:
        ValueError: If `num_samples` is 1, or `clip_range` is not above 0.
    """

    uses_importance_ratio = True
    published_kl_penalty = "k3_loss"

    def __init__(self, *args: Any, clip_range: float | None = 0.2, kl_penalty: str = "k3_loss", **kwargs: Any) -> None:
        super().__init__(*args, kl_penalty=kl_penalty, **kwargs)
        name = type(self).__name__
        if self.num_samples < 2:
            raise InputError(f"{name} compares a group, so num_samples={self.num_samples} must be at least 2")
        if clip_range is not None and not clip_range > 0:
            raise InputError(f"clip_range={clip_range} must be above 0, or null for none")
        self.clip_range = clip_range

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion, normalized to mean 0 and variance 1 within its group."""
        return F.group_normalized_advantages(rollout.total_returns, rollout.valid)

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """Clipped surrogate loss, the mean over a completion's tokens."""
        assert part.logprobs is not None and part.old_logprobs is not None and part.advantages is not None
        advantages = part.advantages.unsqueeze(-1).expand_as(part.logprobs)
        terms, clipped = F.ppo_clip_loss(part.logprobs, part.old_logprobs, advantages, self.clip_range)
        ratio = F.importance_ratio(part.logprobs.detach(), part.old_logprobs)
        metrics: Metrics = {"clip_fraction": (clipped, part.loss_mask), "ratio": (ratio, part.loss_mask)}
        return F.masked_sum(terms, part.completions.mask) / self.token_divisor(part), metrics

    def token_divisor(self, part: Rollout) -> Tensor | float:
        """Length of each completion."""
        return part.completions.lengths.clamp(min=1)
