"""RLOO: REINFORCE whose baseline is the mean return of the other completions of the same prompt.

Back to Basics, section 3.2, after Kool et al., 2019, "Buy 4 REINFORCE samples, get a baseline for free!".
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.reinforce import Reinforce
from lit_rlhf.types import Rollout


class RLOO(Reinforce):
    """REINFORCE leave-one-out: `A_i = R_i - mean_{j != i} R_j`, loss `-A_i log pi(y_i|x)`.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is k.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If `num_samples` is 1: there is no other completion to compare with.
    """

    min_samples = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, baseline="none", baseline_decay=0.0, **kwargs)

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion minus the mean of the others; token-level rewards per token, by reward-to-go."""
        sequence = F.rloo_advantages(rollout.returns, rollout.valid)
        if rollout.token_rewards is None:
            return sequence
        to_go = F.reward_to_go(rollout.token_rewards, rollout.completions.mask)
        return sequence.unsqueeze(-1) + F.rloo_advantages(to_go, rollout.valid)
