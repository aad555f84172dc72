"""Importance weights for completions that another policy sampled: an earlier one, or an engine's."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError


@dataclass(frozen=True)
class Importance:
    """How a loss corrects for completions that the current policy did not sample.

    They are from before an update, where a rollout is used for several, or an engine computes other probabilities. Each
    advantage is weighed by the ratio of the probabilities now and then, truncated (TIS; Espeholt et al., 2018, arXiv
    1802.01561; for language models Yao et al., 2025) or with what is far off left out (IcePop; Ling team, 2025, arXiv
    2510.18855). Methods that have a ratio (`PPO`, `GRPO` and others) correct for updates by it, and for an engine by
    this.

    Attributes:
        correction: `none`; `truncate`: weights of at most `cap`; `mask`: 0 outside `floor` to `cap`.
        level: One weight per `sequence` (unbiased, but for the cap) or per `token` (less variance, biased).
        cap: Largest weight.
        floor: Smallest weight that `mask` keeps.

    Raises:
        ValueError: If a value is outside its range.
    """

    correction: Literal["none", "truncate", "mask"] = "none"
    level: Literal["sequence", "token"] = "sequence"
    cap: float = 2.0
    floor: float = 0.5

    def __post_init__(self) -> None:
        rules = {
            "correction": (self.correction in ("none", "truncate", "mask"), "none, truncate or mask"),
            "level": (self.level in ("sequence", "token"), "sequence or token"),
            "cap": (1 <= self.cap < math.inf, "at least 1"),
            "floor": (0 <= self.floor <= 1, "between 0 and 1"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise InputError(f"importance: {name}={getattr(self, name)!r} must be {rule}")

    def weights(
        self,
        logprobs: Float[Tensor, "prompts samples tokens"],
        sampled: Float[Tensor, "prompts samples tokens"],
        mask: Bool[Tensor, "prompts samples tokens"],
    ) -> tuple[Tensor, Bool[Tensor, "prompts samples *tokens"]]:
        """Return the weight of each completion or token, and where it was cut.

        Args:
            logprobs: Log-probabilities that the loss is computed for.
            sampled: Log-probabilities of the policy that sampled.
            mask: True at the tokens of completions.
        """
        logprobs, sampled = logprobs.masked_fill(~mask, 0.0), sampled.masked_fill(~mask, 0.0)
        if self.level == "sequence":
            logprobs, sampled = logprobs.sum(-1), sampled.sum(-1)
        ratio = F.importance_ratio(logprobs, sampled)
        if self.correction == "truncate":
            return ratio.clamp(max=self.cap), ratio > self.cap
        cut = (ratio > self.cap) | (ratio < self.floor)
        return ratio.masked_fill(cut, 0.0), cut
