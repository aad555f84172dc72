"""REINFORCE whose baseline is the mean return of the whole batch: one number for all prompts.

The plainest baseline of a batch, as in many implementations. It contains the completion's own return, which scales the
expected gradient by `1 - 1/N` for N completions, and does not turn it.
"""

from __future__ import annotations

from torch import Tensor

from lit_rlhf.algorithms.policy_gradient import PolicyGradient
from lit_rlhf.training.normalization import moments_over_ranks
from lit_rlhf.types import Rollout


class ReinforceBatchMean(PolicyGradient):
    """REINFORCE with a batch-mean baseline: `A_i = R_i - mean` of all returns, loss `-A_i log pi(y_i|x)`.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` may be 1.
        **kwargs: See `OnlineAlgorithm`.
    """

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion minus the mean over all ranks."""
        mean, _ = moments_over_ranks(rollout.total_returns, rollout.valid, self.sum_over_ranks)
        return self.returns_to_go(rollout, mean)
