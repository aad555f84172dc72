"""Base of REINFORCE, RLOO, OPO, ReMax and the batch-mean baseline: the policy-gradient loss of whole completions."""

from __future__ import annotations

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.types import Metrics, Rollout


class PolicyGradient(OnlineAlgorithm):
    """REINFORCE's loss `-A log pi(y|x)`; a method chooses the baseline b of the advantages `A = R - b`."""

    def returns_to_go(self, rollout: Rollout, baseline: Tensor | float = 0.0) -> Tensor:
        """Return the return of each completion or, with token-level rewards, the reward-to-go of each token.

        Args:
            rollout: The rollout.
            baseline: Number to subtract, which broadcasts to completions.
        """
        if rollout.token_rewards is None:
            return rollout.returns - baseline
        to_go = F.reward_to_go(rollout.token_rewards, rollout.completions.mask)
        return (rollout.returns - baseline).unsqueeze(-1) + to_go

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """Negative log-probability of each completion, weighted by its advantage."""
        assert part.logprobs is not None and part.advantages is not None
        return F.reinforce_loss(part.logprobs, part.advantages, part.completions.mask), {}
