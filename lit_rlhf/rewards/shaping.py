"""Choices about the scale of rewards. None is made unless asked for: they change what is optimised."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lit_rlhf.buffers import keep_float64


class Shaping(nn.Module):
    """Normalises and clips the rewards of whole completions, before the KL is taken off.

    Args:
        normalize: Bring rewards to mean 0 and variance 1 of all that have been seen, this rollout's included.
        clip: Then hold them within `[-clip, clip]`.

    Raises:
        ValueError: If `clip` is not above 0.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self, normalize: bool = False, clip: float | None = None) -> None:
        super().__init__()
        if clip is not None and not clip > 0:
            raise ValueError(f"shaping: clip={clip} must be above 0, or null for none")
        self.normalize, self.clip = normalize, clip
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
    ) -> Float[Tensor, "prompts samples"]:
        """Return the rewards as they shall be; those that are not valid stay as they are and count in no statistic."""
        shaped = rewards
        if self.normalize:
            kept = rewards.double().masked_fill(~valid, 0.0)
            sums = sum_over_ranks(torch.stack([valid.sum().double(), kept.sum(), (kept**2).sum()]))
            self.count += sums[0]
            self.total += sums[1]
            self.squares += sums[2]
            count = self.count.clamp(min=1)
            mean = self.total / count
            deviation = (self.squares / count - mean**2).clamp(min=0).sqrt().clamp(min=1e-6)
            shaped = ((rewards.double() - mean.item()) / deviation.item()).to(rewards.dtype)
        if self.clip is not None:
            shaped = shaped.clamp(-self.clip, self.clip)
        return shaped.where(valid, rewards)
