"""PPO: policy gradient per token with a critic, and several clipped updates on the same rollout.

Schulman et al., 2017, arXiv 1707.06347; for language models Ziegler et al., 2019, arXiv 1909.08593, and Ouyang et al.,
2022, arXiv 2203.02155. One departure from most implementations: old log-probabilities come from the training forward,
not from sampling, whose rounding differs.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.vanilla_pg import ValuedRollout, VanillaPG
from lit_rlhf.errors import InputError
from lit_rlhf.training import method_checks
from lit_rlhf.training.normalization import whiten_over_ranks
from lit_rlhf.types import Metrics, Rollout


class PPO(VanillaPG):
    """PPO: `A_t` by GAE(lambda), loss `-min(w_t A_t, clamp(w_t) A_t) + c (V - G)^2 / 2`, `w_t = pi / pi_old`.

    With `G_t = V_old(s_t) + A_t` before whitening; of the value loss and that of the clipped value, the larger one
    counts. With `gae_lambda=1` and without clipping, ratio and whitening it is `VanillaPG`.

    Args:
        *args: See `VanillaPG`.
        gae_lambda: From 0, one-step advantages that trust the critic, to 1, Monte-Carlo returns. Typically 0.95 or 1.
        clip_range: Clip the ratio w to `[1 - clip_range, 1 + clip_range]`; null does not clip.
        clip_range_vf: Clip the change of the values; null does not clip.
        importance_ratio: Whether to correct for updates since sampling by the ratio w; without it, no clipping either.
        whiten: Whether to normalize a rollout's advantages to mean 0 and variance 1, over all ranks.
        **kwargs: See `VanillaPG`.

    Raises:
        ValueError: If a number is out of its range, or has no effect.
    """

    def __init__(
        self,
        *args: Any,
        gae_lambda: float = 0.95,
        clip_range: float | None = 0.2,
        clip_range_vf: float | None = 0.2,
        importance_ratio: bool = True,
        whiten: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= gae_lambda <= 1:
            raise InputError(f"gae_lambda={gae_lambda} must be between 0 and 1")
        method_checks.check_clip_range(clip_range)
        if not importance_ratio and clip_range not in (0.2, None):
            raise InputError(f"clip_range={clip_range} has no effect with importance_ratio=False: leave one out")
        if clip_range_vf is not None and not clip_range_vf > 0:
            raise InputError(f"clip_range_vf={clip_range_vf} must be above 0, or null for none")
        self.gae_lambda, self.clip_range, self.clip_range_vf = gae_lambda, clip_range, clip_range_vf
        self.uses_importance_ratio, self.whiten = importance_ratio, whiten

    def value_targets(self, rollout: ValuedRollout) -> Float[Tensor, "prompts samples tokens"]:
        """Value targets: lambda-returns, `values + GAE advantages`."""
        assert rollout.old_values is not None
        mask = rollout.completions.mask
        return rollout.old_values + F.gae(self.token_rewards(rollout), rollout.old_values, mask, self.gae_lambda)

    def advantages(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """GAE advantages, whitened by default."""
        advantages = super().advantages(rollout)
        return whiten_over_ranks(advantages, rollout.loss_mask, self.sum_over_ranks) if self.whiten else advantages

    def policy_loss(self, part: ValuedRollout) -> tuple[Float[Tensor, "prompts samples"], Metrics]:
        """Clipped surrogate loss per completion, and the clip fraction."""
        if not self.uses_importance_ratio:
            return super().policy_loss(part)
        assert part.logprobs is not None and part.old_logprobs is not None and part.advantages is not None
        ratio = F.importance_ratio(part.logprobs, part.old_logprobs)
        terms, clipped = F.ppo_clip_loss(ratio, part.advantages, self.clip_range)
        metrics: Metrics = {"clip_fraction": (clipped, part.loss_mask), "ratio": (ratio.detach(), part.loss_mask)}
        return F.masked_sum(terms, part.completions.mask), metrics

    def value_loss(self, part: ValuedRollout) -> Float[Tensor, "prompts samples tokens"]:
        """Clipped value loss of each token."""
        assert part.values is not None and part.value_targets is not None and part.old_values is not None
        return F.value_loss(part.values, part.value_targets, part.old_values, self.clip_range_vf)
