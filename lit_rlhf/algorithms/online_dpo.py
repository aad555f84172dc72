"""Online DPO: DPO on pairs of completions that the policy samples itself, ranked by rewards or by a pairwise judge.

Guo et al., 2024, arXiv 2402.04792, section 3. Departure: of more than two completions the best and the worst make the
pair.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.ranking import RankedRollout, RankingAlgorithm
from lit_rlhf.errors import InputError
from lit_rlhf.evaluation.metrics import pairwise_accuracy
from lit_rlhf.training import method_checks
from lit_rlhf.types import Metrics, Rollout


class OnlineDPO(RankingAlgorithm):
    """Online DPO: loss `-log sigmoid(beta * margin)` of the best and the worst completion of each prompt.

    The margin is `log pi(best) / ref(best) - log pi(worst) / ref(worst)`. A prompt whose completions are all alike is
    left out.

    Args:
        *args: See `RankingAlgorithm`.
        beta: Strength of the KL constraint, typically 0.05 to 0.5.
        **kwargs: See `RankingAlgorithm`.

    Raises:
        ValueError: If a number is out of its range, or there is no reference.
    """

    def __init__(self, *args: Any, beta: float = 0.1, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        method_checks.check_beta(beta)
        if self.reference_source is None:
            raise InputError("OnlineDPO compares the policy with a reference, so reference can't be null")
        self.beta = beta

    def advantages(self, rollout: Rollout) -> Tensor:
        """1 for the best completion of each prompt, -1 for the worst, and 0 for the others."""
        assert isinstance(rollout, RankedRollout) and rollout.ranking is not None
        best, worst = (F.best_of_group_mask(sign * rollout.ranking, rollout.valid) for sign in (1, -1))
        return best.to(rollout.returns) - worst.to(rollout.returns)

    def evaluate(self, part: Rollout) -> Rollout:
        """Evaluate the two completions of each pair only."""
        assert part.advantages is not None
        pair = part.pick(torch.stack([part.advantages.argmax(1), part.advantages.argmin(1)], 1))
        assert pair.advantages is not None
        differ = (pair.advantages[:, :1] > 0) & (pair.advantages[:, 1:] < 0)
        return super().evaluate(pair.replace(valid=pair.valid & differ).trim())

    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """DPO loss of each pair, for both of its completions."""
        assert part.logprobs is not None and part.reference_logprobs is not None
        log_ratios = F.masked_sum(part.logprobs - part.reference_logprobs, part.completions.mask)
        margin, counted = log_ratios[:, 0] - log_ratios[:, 1], part.valid[:, 0]
        metrics: Metrics = {
            "accuracy": (pairwise_accuracy(*log_ratios.detach().unbind(1)[:2]), counted),
            "reward_margin": (self.beta * margin.detach(), counted),
        }
        return F.dpo_loss(margin, self.beta).unsqueeze(1).expand_as(part.valid), metrics
