"""Dr. GRPO: GRPO without its two biases, the division by the group's std and by each completion's length.

Liu et al., 2025, arXiv 2503.20783, section 3. With one update per rollout, `kl_coef` 0 and `max_new_tokens` factored
out, its gradient is (k - 1) / k times RLOO's.
"""

from __future__ import annotations

from typing import Any

from lit_rlhf.algorithms.grpo import GRPO, Reduction, Spread


class DrGRPO(GRPO):
    """Dr. GRPO: `A_i = R_i - mean` of the group, loss `-sum_t min(w_t A_i, clamp(w_t) A_i) / max_new_tokens`.

    Args:
        *args: See `GRPO`.
        kl_coef: See `OnlineAlgorithm`; the paper's is 0.
        advantage_std: See `GRPO`.
        reduction: See `GRPO`.
        **kwargs: See `GRPO`.
    """

    def __init__(
        self,
        *args: Any,
        kl_coef: float = 0.0,
        advantage_std: Spread = "none",
        reduction: Reduction = "constant_length",
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, kl_coef=kl_coef, advantage_std=advantage_std, reduction=reduction, **kwargs)
