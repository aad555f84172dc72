"""CISPO: REINFORCE with a clipped importance weight, so that no token loses its gradient.

MiniMax, 2025, arXiv 2506.13585, section 3.1. Departures: the paper does not state its upper bound; the default, 5, is
that of Khatri et al., 2025, arXiv 2510.13786, section 3.2. The mean runs over the tokens of an update, not of a group.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.grpo import GRPO, Reduction, TokenTerms
from lit_rlhf.types import Rollout


class CISPO(GRPO):
    """CISPO: `A_i = (R_i - mean) / std`, loss `-stop_gradient(clamp(w_t)) A_i log pi(y_t)`, mean over all tokens.

    At one update per rollout it is `DAPO`.

    Args:
        *args: See `GRPO`.
        kl_coef: See `OnlineAlgorithm`; the paper's is 0.
        clip_range: Lower bound of the weight, `1 - clip_range`; null for none.
        clip_range_high: Upper bound of the weight, `1 + clip_range_high`; null for `1 + clip_range`.
        reduction: See `GRPO`.
        **kwargs: See `GRPO`.
    """

    def __init__(
        self,
        *args: Any,
        kl_coef: float = 0.0,
        clip_range: float | None = None,
        clip_range_high: float | None = 4.0,
        reduction: Reduction = "tokens",
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            kl_coef=kl_coef,
            clip_range=clip_range,
            clip_range_high=clip_range_high,
            reduction=reduction,
            **kwargs,
        )

    def surrogate_loss(self, part: Rollout, ratio: Tensor, advantages: Tensor) -> TokenTerms:
        """Weighted negative log-probability of each token, and where the weight is clipped."""
        assert part.logprobs is not None
        weight = F.clip_ratio(ratio.detach(), self.clip_range, self.clip_range_high)
        return -weight * advantages * part.logprobs, weight != ratio.detach()
