"""REINFORCE: the whole completion is one action; the baseline is a moving average of earlier returns.

Back to Basics (Ahmadian et al., 2024, arXiv 2402.14740), section 3.1. One departure: besides the mean of all
earlier returns, which the paper uses, the baseline can be an exponential moving average or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.policy_gradient import PolicyGradient
from lit_rlhf.errors import InputError
from lit_rlhf.types import Rollout


@dataclass
class MovingAverage:
    """A weighted average in Python floats: float64 whatever the dtype of the weights.

    Attributes:
        total: Weighted sum of the returns.
        weight: Sum of the weights.
    """

    total: float = 0.0
    weight: float = 0.0

    def add(self, total: float, weight: float, decay: float | None = None) -> None:
        """Add returns by their sum and number, or with a decay their mean with the weight `1 - decay`."""
        past, fresh = (1.0, 1.0) if decay is None else (decay, 1 - decay)
        self.total = past * self.total + fresh * total
        self.weight = past * self.weight + fresh * weight

    @property
    def value(self) -> float:
        """The average, 0 before the first return."""
        return self.total / self.weight if self.weight > 0 else 0.0


class Reinforce(PolicyGradient):
    """REINFORCE with a moving-average baseline: `A = R - b`, loss `-A log pi(y|x)`.

    Args:
        *args: See `OnlineAlgorithm`.
        baseline: `mean` of all earlier returns, their `exponential` moving average, or `none`.
        baseline_decay: Weight of the past in the exponential average, after each rollout.
        **kwargs: See `OnlineAlgorithm`.

    Raises:
        ValueError: If a value is outside its range, or has no effect.
    """

    def __init__(
        self,
        *args: Any,
        baseline: Literal["none", "mean", "exponential"] = "mean",
        baseline_decay: float = 0.9,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if baseline not in (known := ("none", "mean", "exponential")):
            raise InputError(f"baseline={baseline!r} must be one of {', '.join(known)}")
        if not 0 <= baseline_decay < 1:
            raise InputError(f"baseline_decay={baseline_decay} must be at least 0 and below 1")
        if baseline != "exponential" and baseline_decay != 0.9:
            raise InputError(f"baseline_decay={baseline_decay} has no effect with baseline={baseline!r}: leave it out")
        self.baseline, self.baseline_decay = baseline, baseline_decay
        self.baseline_average = self.running_statistics["baseline"] = MovingAverage()

    def advantages(self, rollout: Rollout) -> Tensor:
        """Return minus the baseline of earlier rollouts; with token-level rewards, per token with reward-to-go."""
        baseline = self.baseline_average.value
        to_go = self.returns_to_go(rollout)
        self.update_baseline(to_go if to_go.ndim == 2 else to_go[..., 0], rollout.valid)
        return to_go - baseline

    def update_baseline(self, returns: Tensor, valid: Tensor) -> None:
        """Add a rollout's returns to the moving average, over all ranks."""
        if self.baseline == "none":
            return
        sums = torch.stack([F.to_float64(returns.masked_fill(~valid, 0.0)).sum(), F.to_float64(valid).sum()])
        total, count = self.sum_over_ranks(sums).tolist()
        if count == 0:
            return
        if self.baseline == "mean":
            self.baseline_average.add(total, count)
        else:
            self.baseline_average.add(total / count, 1.0, self.baseline_decay)
