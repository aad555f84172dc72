"""OPO: REINFORCE whose baseline is the mean return of the group, weighted by the length of its completions.

Hao et al., 2025, arXiv 2505.23585, section 3: the baseline of least variance, if the squared norm of a completion's
score is proportional to its length. It contains the completion's own return, so the gradient is biased. Departure: the
KL is in the return; the paper has none (`kl_coef=0`).
"""

from __future__ import annotations

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.rloo import RLOO
from lit_rlhf.types import Rollout


class OPO(RLOO):
    """OPO: `A_i = R_i - sum_j l_j R_j / sum_j l_j`, with lengths l; loss `-A_i log pi(y_i|x)`.

    With completions of one length it is `RLOO` times `(k - 1) / k`.
    """

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return of each completion minus the length-weighted mean of its group."""
        advantages = F.length_weighted_advantages(rollout.total_returns, rollout.completions.lengths, rollout.valid)
        if rollout.token_rewards is None:
            return advantages
        return self.returns_to_go(rollout, rollout.total_returns - advantages)
