"""Reward shaping in training. All of it is off by default, since it changes the objective."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from lit_rlhf.models.sampling import counter_based_uniform

NOISE_EPOCH = 2**32
"""Offset of the epoch in the counter of the reward noise, which keeps it apart from the sampling noise."""


@dataclass(frozen=True)
class RewardShaping:
    """Options of reward shaping, applied to rewards of whole completions before the KL is subtracted.

    Attributes:
        normalize: Normalize rewards to mean 0 and variance 1 over all rewards so far, including this rollout's.
        clip: Then clip them to `[-clip, clip]`; null does not clip.
        noise: Before both, add Gaussian noise of this standard deviation, to measure robustness to noisy rewards. Back
            to Basics uses 1, 3 and 5.
        mask_truncated_completions: Exclude completions truncated at `max_new_tokens` from loss and baselines.
        missing_eos_penalty: Subtract this from the reward of truncated completions, after the steps above.

    Raises:
        ValueError: If a number is out of its range, or has no effect.
    """

    normalize: bool = False
    clip: float | None = None
    noise: float = 0.0
    mask_truncated_completions: bool = False
    missing_eos_penalty: float = 0.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip > 0:
            raise InputError(f"shaping: clip={self.clip} must be above 0, or null for none")
        if not self.noise >= 0:
            raise InputError(f"shaping: noise={self.noise} must be 0 or more: it is a standard deviation")
        if not 0 <= self.missing_eos_penalty < math.inf:
            raise InputError(
                f"shaping: missing_eos_penalty={self.missing_eos_penalty} must be 0 or more: it is subtracted"
            )
        if self.mask_truncated_completions and self.missing_eos_penalty:
            raise InputError(
                f"shaping: missing_eos_penalty={self.missing_eos_penalty} has no effect with "
                "mask_truncated_completions, which leaves the same completions out: choose one"
            )


@dataclass
class RewardStatistics:
    """Running statistics of rewards, in Python floats: float64 whatever the dtype and device of the weights.

    Attributes:
        count: Number of rewards.
        total: Their sum.
        squares: Sum of their squares.
    """

    count: float = 0.0
    total: float = 0.0
    squares: float = 0.0

    def update(self, count: float, total: float, squares: float) -> None:
        """Add the sums of a rollout."""
        self.count += count
        self.total += total
        self.squares += squares

    @property
    def mean(self) -> float:
        """Mean, 0 without rewards."""
        return self.total / max(self.count, 1.0)

    @property
    def std(self) -> float:
        """Population standard deviation, at least 1e-6."""
        variance = self.squares / max(self.count, 1.0) - self.mean**2
        return max(math.sqrt(max(variance, 0.0)), 1e-6)


def shape_rewards(
    rewards: Float[Tensor, "prompts samples"],
    valid: Bool[Tensor, "prompts samples"],
    options: RewardShaping,
    statistics: RewardStatistics,
    sum_over_ranks: Callable[[Tensor], Tensor],
    noise_counter: tuple[int, int, list[int]] = (0, 0, []),
) -> Float[Tensor, "prompts samples"]:
    """Return rewards with noise, normalization and clipping; those that are not valid stay unchanged and uncounted.

    Args:
        rewards: Rewards of whole completions.
        valid: True where they count.
        options: What to apply.
        statistics: Running statistics, updated if `normalize` is set.
        sum_over_ranks: Adds up a tensor over all ranks.
        noise_counter: Counter of the noise: the run's seed, the epoch, and the index of each prompt.
    """
    shaped = rewards
    if options.noise:
        seed, epoch, index = noise_counter
        uniform = counter_based_uniform(seed, NOISE_EPOCH + epoch, index, rewards.shape[1], 1)
        normal = torch.special.ndtri(uniform.clamp(min=1e-12)).view(rewards.shape)
        shaped = shaped + options.noise * normal.to(rewards.dtype).to(rewards.device)
    if options.normalize:
        kept, counted = F.to_float64(shaped.masked_fill(~valid, 0.0)), F.to_float64(valid)
        statistics.update(*sum_over_ranks(torch.stack([counted.sum(), kept.sum(), (kept**2).sum()])).tolist())
        shaped = ((F.to_float64(shaped) - statistics.mean) / statistics.std).to(rewards)
    if options.clip is not None:
        shaped = shaped.clamp(-options.clip, options.clip)
    return shaped.where(valid, rewards)
