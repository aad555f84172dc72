"""Choices about the rewards that training sees. None is made unless asked for: they change what is optimised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lit_rlhf.models.sampling import counter_based_uniform
from lit_rlhf.training.buffers import keep_float64

NOISE_EPOCH = 2**32
"""Added to the epoch in the address of the noise of rewards, so that it is not that of sampling."""


class Shaping(nn.Module):
    """Normalises and clips the rewards of whole completions in training, before the KL is taken off.

    Args:
        normalize: Bring rewards to mean 0 and variance 1 of all that have been seen, this rollout's included.
        clip: Then hold them within `[-clip, clip]`.
        noise: Before both, add noise of this standard deviation, to find out how a method bears rewards that are not
            sure, as Back to Basics does with 1, 3 and 5.

    Raises:
        ValueError: If `clip` is not above 0, or `noise` is below.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, normalize: bool = False, clip: float | None = None, noise: float = 0.0) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"shaping: clip={clip} must be above 0, or null for none")
        if not noise >= 0:
            raise ValueError(f"shaping: noise={noise} must be 0 or more: it is a standard deviation")
        self.normalize, self.clip, self.noise = normalize, clip, noise
        if normalize:
            for name in ("count", "total", "squares"):
                self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Shaping:
        """Keep the statistics in float64, to whatever the module is cast."""
        keep_float64(self, lambda: super(Shaping, self)._apply(fn, recurse))  # type: ignore[no-untyped-call]
        return self

    def forward(
        self,
        rewards: Float[Tensor, "prompts samples"],
        valid: Bool[Tensor, "prompts samples"],
        sum_over_ranks: Callable[[Tensor], Tensor],
        address: tuple[int, int, list[int]] = (0, 0, []),
    ) -> Float[Tensor, "prompts samples"]:
        """Return the rewards as they shall be; those that are not valid stay as they are and count in no statistic.

        Args:
            rewards: The rewards.
            valid: Where they count.
            sum_over_ranks: Adds up a tensor of all ranks.
            address: Of the noise: the run's seed, the epoch, and each prompt's index.
        """
        shaped = rewards
        if self.noise:
            seed, epoch, index = address
            uniform = counter_based_uniform(seed, NOISE_EPOCH + epoch, index, rewards.shape[1], 1)
            normal = torch.special.ndtri(uniform.clamp(min=1e-12)).view(rewards.shape)
            shaped = shaped + self.noise * normal.to(rewards)
        if self.normalize:
            kept = shaped.double().masked_fill(~valid, 0.0)
            sums = sum_over_ranks(torch.stack([valid.sum().double(), kept.sum(), (kept**2).sum()]))
            self.count += sums[0]
            self.total += sums[1]
            self.squares += sums[2]
            count = self.count.clamp(min=1)
            mean = self.total / count
            deviation = (self.squares / count - mean**2).clamp(min=0).sqrt().clamp(min=1e-6)
            shaped = ((shaped.double() - mean.item()) / deviation.item()).to(rewards.dtype)
        if self.clip is not None:
            shaped = shaped.clamp(-self.clip, self.clip)
        return shaped.where(valid, rewards)
