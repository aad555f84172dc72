"""REINFORCE: the whole completion is one action, its return is compared with a moving average of earlier ones.

Back to Basics, section 3.1. One departure: besides the plain mean of all earlier returns, which the paper uses, an
exponential one and none at all are on offer.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.online import OnlineAlgorithm
from lit_rlhf.training.buffers import keep_float64
from lit_rlhf.training.monitor import Metrics
from lit_rlhf.types import Rollout


class Reinforce(OnlineAlgorithm):
    """REINFORCE with a moving-average baseline: `A = R - b`, loss `-A log pi(y|x)`.

    Args:
        *args: See `OnlineAlgorithm`.
        baseline: `mean` of all earlier returns, `exponential` moving average of them, or `none`.
        baseline_decay: Weight of the past in the exponential average, after each rollout.
        **kwargs: See `OnlineAlgorithm`.
    """

    baseline_total: Tensor
    baseline_weight: Tensor

    def __init__(
        self,
        *args: Any,
        baseline: Literal["none", "mean", "exponential"] = "mean",
        baseline_decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if baseline not in (known := ("none", "mean", "exponential")):
            raise ValueError(f"baseline={baseline!r} must be one of {', '.join(known)}")
        if not 0 <= baseline_decay < 1:
            raise ValueError(f"baseline_decay={baseline_decay} must be at least 0 and below 1")
        self.baseline, self.baseline_decay = baseline, baseline_decay
        self.register_buffer("baseline_total", torch.zeros((), dtype=torch.float64))
        self.register_buffer("baseline_weight", torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Reinforce:
        """Keep the average in float64, to whatever the weights are cast: a count in bfloat16 ends at 256."""
        keep_float64(self, lambda: super(Reinforce, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return minus the average return of earlier rollouts; with token-level rewards, the return from each token."""
        before = self.baseline_value()
        if rollout.token_rewards is None:
            self.update_baseline(rollout.returns, rollout.valid)
            return rollout.returns - before
        to_go = F.reward_to_go(rollout.token_rewards, rollout.completions.mask)
        self.update_baseline(rollout.returns + to_go[..., 0], rollout.valid)
        return rollout.returns.unsqueeze(-1) + to_go - before

    def loss(self, rollout: Rollout) -> tuple[Tensor, Metrics]:
        """The log-probability of each completion, weighted by its advantage."""
        assert rollout.advantages is not None
        return F.reinforce_loss(self.logprobs(rollout), rollout.advantages, rollout.completions.mask), {}

    def baseline_value(self) -> float:
        """Average return of the rollouts so far, 0 before the first."""
        return float(self.baseline_total / self.baseline_weight) if self.baseline_weight > 0 else 0.0

    def update_baseline(self, returns: Tensor, valid: Tensor) -> None:
        """Take a rollout's returns into the average, over all ranks."""
        if self.baseline == "none":
            return
        sums = torch.stack([returns.double().masked_fill(~valid, 0.0).sum(), valid.sum().double()])
        total, count = self.sum_over_ranks(sums)
        if count == 0:
            return
        if self.baseline == "mean":
            self.baseline_total += total
            self.baseline_weight += count
        else:
            fresh = 1 - self.baseline_decay
            self.baseline_total.mul_(self.baseline_decay).add_(fresh * total / count)
            self.baseline_weight.mul_(self.baseline_decay).add_(fresh)
