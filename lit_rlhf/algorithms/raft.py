"""RAFT: of the completions of a prompt the best is imitated, the others are thrown away.

Dong et al., 2023, arXiv 2304.06767, as Back to Basics, section 3.3, runs it: online, the KL in what "best" means.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.training.monitor import Metrics
from lit_rlhf.types import Rollout


class RAFT(OnlineAlgorithm):
    """Reward-ranked fine-tuning: loss `-log pi(y|x)` of the completion with the highest return, a token sum.

    Args:
        *args: See `OnlineAlgorithm`; `num_samples` is k.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If `num_samples` is 1, where the best is the only one, or if `sample_minibatches` or the KL in the
            loss is asked for.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.num_samples < 2:
            raise ValueError(
                f"RAFT imitates the best completion of a prompt, so num_samples={self.num_samples} must be at least 2"
            )
        if self.kl_place == "loss":
            raise ValueError("RAFT imitates, so the KL belongs into the choice of what: use kl_penalty='k1_reward'")
        if self.sample_minibatches > 1:
            raise ValueError(
                f"RAFT trains on one completion of a prompt, which sample_minibatches={self.sample_minibatches} can't "
                "cut: use minibatches"
            )

    def advantages(self, rollout: Rollout) -> Tensor:
        """1 for the best completion of each prompt, the first of equals; 0 for the others."""
        returns = rollout.returns
        if rollout.token_rewards is not None:
            returns = returns + F.masked_sum(rollout.token_rewards, rollout.completions.mask)
        return F.best_of_group_mask(returns, rollout.valid).to(returns)

    def loss(self, rollout: Rollout) -> tuple[Tensor, Metrics]:
        """The negative log-likelihood of the best completions; the others are not computed."""
        assert rollout.advantages is not None
        best = rollout.advantages.argmax(1)
        kept = rollout.pick(best).trim()
        terms = -F.masked_sum(self.logprobs(kept), kept.completions.mask)
        return terms.new_zeros(rollout.valid.shape).scatter(1, best.unsqueeze(1), terms), {}

    def terms(self, part: Rollout) -> tuple[Tensor, Tensor, Metrics]:
        """Only the best completions count."""
        terms, mask, metrics = super().terms(part)
        assert part.advantages is not None
        return terms, mask & (part.advantages > 0), metrics
