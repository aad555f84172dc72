"""RLOO: REINFORCE whose baseline is the mean return of the other completions of the same prompt.

Back to Basics (Ahmadian et al., 2024, arXiv 2402.14740), section 3.2, after Kool et al., 2019, "Buy 4 REINFORCE
samples, get a baseline for free!".
"""

from __future__ import annotations

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.policy_gradient import PolicyGradient
from lit_rlhf.types import Rollout


class RLOO(PolicyGradient):
    """REINFORCE leave-one-out: `A_i = R_i - mean_{j != i} R_j`, loss `-A_i log pi(y_i|x)`.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is k.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If `num_samples` is 1: there is no other completion to compare with.
    """

    min_samples = 2
    group_baseline = True

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion minus the mean of the others; token-level rewards per token, by reward-to-go."""
        return F.rloo_advantages(self.returns_to_go(rollout), rollout.valid)
