"""GSPO: GRPO with one ratio per completion, the geometric mean of its tokens' ratios.

Zheng et al., 2025, arXiv 2507.18071, section 4. Departures: as in `GRPO`.
"""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.grpo import GRPO
from lit_rlhf.types import Rollout


class GSPO(GRPO):
    """GSPO: `A_i = (R_i - mean) / std`, loss `-min(s A_i, clamp(s) A_i)`, `s = (pi(y) / pi_old(y)) ** (1 / length)`.

    At one update per rollout it is `GRPO` without a KL.

    Args:
        *args: See `GRPO`.
        kl_coef: See `OnlineAlgorithm`; the paper leaves the KL out.
        clip_range: See `GRPO`; the ratio of a completion varies less than that of a token.
        clip_range_high: See `GRPO`.
        **kwargs: See `GRPO`.
    """

    def __init__(
        self,
        *args: Any,
        kl_coef: float = 0.0,
        clip_range: float | None = 3e-4,
        clip_range_high: float | None = 4e-4,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            *args,
            kl_coef=kl_coef,
            clip_range=clip_range,
            clip_range_high=clip_range_high,
            reduction="completions",
            **kwargs,
        )

    def ratio(self, part: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return the ratio of each completion, at each of its tokens."""
        assert part.logprobs is not None and part.old_logprobs is not None
        now, before = (F.masked_mean(x, part.completions.mask) for x in (part.logprobs, part.old_logprobs))
        return F.importance_ratio(now, before).unsqueeze(-1).expand_as(part.logprobs)
