"""DAPO: GRPO with a higher upper clip, all tokens weighed alike, and no KL.

Yu et al., 2025, arXiv 2503.14476, section 3. Two of its four parts are options of every method: dynamic sampling, and
the reward `lit_rlhf.rewards.SoftOverlong`. Departure: the mean runs over the tokens of an update, and in equation 8
over those of a group.
"""

from __future__ import annotations

from typing import Any

from lit_rlhf.algorithms.grpo import GRPO, Reduction


class DAPO(GRPO):
    """DAPO: `A_i = (R_i - mean) / std`, loss `-min(w_t A_i, clamp(w_t, 1 - low, 1 + high) A_i)`, mean over all tokens.

    With `clip_range_high=clip_range` and `reduction="completions"` it is `GRPO` without a KL.

    Args:
        *args: See `GRPO`.
        kl_coef: See `OnlineAlgorithm`; the paper's is 0.
        clip_range_high: See `GRPO`.
        reduction: See `GRPO`.
        **kwargs: See `GRPO`.
    """

    def __init__(
        self,
        *args: Any,
        kl_coef: float = 0.0,
        clip_range_high: float | None = 0.28,
        reduction: Reduction = "tokens",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, kl_coef=kl_coef, clip_range_high=clip_range_high, reduction=reduction, **kwargs)
