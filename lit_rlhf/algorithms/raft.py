"""RAFT: imitate the best completion of each prompt, drop the others.

Dong et al., 2023, arXiv 2304.06767, as Back to Basics (arXiv 2402.14740), section 3.3, runs it: online, with the KL in
the ranking.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.errors import InputError
from lit_rlhf.training import method_checks
from lit_rlhf.types import Metrics, Rollout


class RAFT(OnlineAlgorithm):
    """Reward-ranked fine-tuning: loss `-log pi(y|x)` of the completion with the highest return, a sum over tokens.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is k.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If `num_samples` is 1, where the best is the only one, or with `sample_minibatches` or a KL in the
            loss.
    """

    weighs_advantages = False
    min_samples = 2

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.kl_place == "loss":
            raise InputError("RAFT ranks by the return, which the KL must be part of: use kl_penalty='k1_reward'")
        method_checks.check_whole_groups("RAFT", self.updates.sample_minibatches)

    def advantages(self, rollout: Rollout) -> Tensor:
        """1 for the completion of each prompt with the highest return (the first of equals), 0 for the others."""
        returns = rollout.total_returns
        return F.best_of_group_mask(returns, rollout.valid).to(returns)

    def evaluate(self, part: Rollout) -> Rollout:
        """Evaluate the best completion of each prompt only."""
        assert part.advantages is not None
        best = part.pick(part.advantages.argmax(1, keepdim=True))
        assert best.advantages is not None
        return super().evaluate(best.replace(valid=best.valid & (best.advantages > 0)).trim())

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """Negative log-likelihood of the best completions."""
        assert part.logprobs is not None
        return -F.masked_sum(part.logprobs, part.completions.mask), {}
