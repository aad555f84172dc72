"""Importance weights for completions that another policy sampled: an earlier one, or an engine's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Literal

from jaxtyping import Bool, Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.training.updates import Updates


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
        cap: Largest weight; infinite for none.
        floor: Smallest weight that `mask` keeps.

    Raises:
        ValueError: If a value is outside its range, or has no effect.
    """

    correction: Literal["none", "truncate", "mask"] = "none"
    level: Literal["sequence", "token"] = "sequence"
    cap: float = 2.0
    floor: float = 0.5

    def __post_init__(self) -> None:
        rules = {
            "correction": (self.correction in ("none", "truncate", "mask"), "none, truncate or mask"),
            "level": (self.level in ("sequence", "token"), "sequence or token"),
            "cap": (self.cap >= 1, "at least 1, or .inf for none"),
            "floor": (0 <= self.floor <= 1, "between 0 and 1"),
        }
        for name, (valid, rule) in rules.items():
            if not valid:
                raise InputError(f"importance: {name}={getattr(self, name)!r} must be {rule}")
        read = {"none": (), "truncate": ("level", "cap"), "mask": ("level", "cap", "floor")}[self.correction]
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name not in ("correction", *read) and value != field.default:
                other = "truncate or mask" if self.correction == "none" else "mask"
                raise InputError(
                    f"importance: {field.name}={value!r} has no effect with correction={self.correction!r}: choose "
                    f"{other}, or leave it out"
                )
        if self.correction == "mask" and self.floor == self.cap:
            raise InputError(f"importance: floor={self.floor:g} and cap={self.cap:g} mask all that differs")

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


def check_importance(algorithm: str, importance: Importance, weighs_advantages: bool) -> None:
    """Check that a method's loss can be weighed."""
    if importance.correction != "none" and not weighs_advantages:
        raise InputError(f"{algorithm} learns from completions, whoever sampled them: leave importance.correction out")


def check_correction(
    importance: Importance, updates: Updates, accumulate: int, sampling: Sampling, by_engine: bool, has_ratio: bool
) -> None:
    """Check that importance weights can be computed; warn if they are all 1.

    Args:
        importance: The options.
        updates: How a rollout is used.
        accumulate: Training steps per update.
        sampling: How completions are sampled.
        by_engine: Whether an engine samples them.
        has_ratio: Whether the method has a ratio itself.
    """
    if importance.correction == "none":
        return
    if by_engine and sampling.truncates:
        raise InputError("importance.correction needs sampling without top_p, top_k and min_new_tokens")
    if by_engine:
        return
    if has_ratio:
        rank_zero_warn("importance.correction has no effect: the method's own ratio corrects for updates")
    elif updates.steps_per_rollout <= accumulate:
        rank_zero_warn("importance.correction has no effect at one update per rollout, which is on-policy")
