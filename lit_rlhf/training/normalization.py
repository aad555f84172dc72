"""Statistics of a rollout over all ranks."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_rlhf import functional as F


def moments_over_ranks(
    values: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]
) -> tuple[Tensor, Tensor]:
    """Return mean and variance (divisor n) of the values that count, over all ranks; 0 without any.

    Args:
        values: Numbers of any shape.
        mask: True where a number counts, of the same shape.
        sum_over_ranks: Adds up a tensor over all ranks.
    """
    kept, counted = F.to_float64(values.masked_fill(~mask, 0.0)), F.to_float64(mask)
    count, total, squares = sum_over_ranks(torch.stack([counted.sum(), kept.sum(), (kept**2).sum()]))
    mean = total / count.clamp(min=1)
    variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0)
    return mean.to(values), variance.to(values)


def whiten_over_ranks(values: Tensor, mask: Tensor, sum_over_ranks: Callable[[Tensor], Tensor]) -> Tensor:
    """Normalize the values that count to mean 0 and variance 1 over all ranks, as `functional.whiten`; others are 0.

    Args:
        values: Numbers of any shape.
        mask: True where a number counts, of the same shape.
        sum_over_ranks: Adds up a tensor over all ranks.
    """
    return F.whiten(values, *moments_over_ranks(values, mask, sum_over_ranks)).masked_fill(~mask, 0.0)
