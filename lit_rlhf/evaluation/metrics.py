"""Metrics of completions, as torchmetrics: sums are accumulated over batches and ranks, then divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError

Z_95 = 1.959964
"""Two-sided 95 % quantile of the normal distribution."""


class Moments(Metric):
    """Mean and population variance, in float64; both NaN without values."""

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Shaped[Tensor, "*shape"]) -> None:
        """Add values."""
        values = F.to_float64(values)
        self.count += values.numel()
        self.total += values.sum()
        self.squares += (values**2).sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance."""
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean**2).clamp(min=0)


class WinRate(Moments):
    """Win rate with its 95 % confidence interval; a tie is half a win.

    The interval is the Wilson score interval for independent pairs; with ties it is conservative. Wilson, 1927,
    *Probable inference, the law of succession, and statistical inference*. It covers the choice of prompts for this
    policy, not the variation between training seeds.
    """

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return the win rate and both ends of its interval; NaN without comparisons."""
        rate, n = self.total / self.count, self.count
        center = (rate + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * (rate * (1 - rate) / n + Z_95**2 / (4 * n**2)).sqrt()
        return rate, center - half, center + half


class DistinctN(Metric):
    """Distinct-n: unique token n-grams divided by all n-grams of all completions, in [0, 1]; 0 without n-grams.

    Low if a policy repeats itself, within or across completions. It decreases with the number of completions, so only
    compare equal numbers. Li et al., 2016, arXiv 1510.03055.

    Args:
        n: Tokens per n-gram, at least 1.
    """

    full_state_update = False
    count: Tensor
    grams: list[Tensor]

    def __init__(self, n: int) -> None:
        super().__init__()
        if n < 1:
            raise InputError(f"n={n}: an n-gram has at least one token")
        self.n = n
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("grams", [], dist_reduce_fx="cat")

    def update(self, completions: Sequence[Sequence[int]]) -> None:
        """Add completions: token ids without padding."""
        grams = [ids[i : i + self.n] for ids in completions for i in range(len(ids) - self.n + 1)]
        batch = torch.tensor(grams, dtype=torch.long, device=self.count.device).view(-1, self.n)
        self.count += len(grams)
        self.grams.append(torch.unique(batch, dim=0))

    def compute(self) -> Tensor:
        """Return distinct-n."""
        unique = len(torch.unique(dim_zero_cat(self.grams), dim=0)) if len(self.grams) else 0
        return unique / self.count.clamp(min=1)


class Perplexity(Metric):
    """Token-level perplexity: `exp` of the mean negative log-probability over all tokens; NaN without tokens."""

    full_state_update = False
    logprob: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("logprob", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logprobs: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> None:
        """Add tokens by their log-probabilities in nats; `mask` is False for padding."""
        self.logprob += F.to_float64(logprobs.masked_fill(~mask, 0.0)).sum()
        self.count += F.to_float64(mask).sum()

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return (-self.logprob / self.count).exp()


def pairwise_accuracy(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
    """Return 1 for each pair whose chosen completion scores higher, 0.5 for a tie, NaN if a score is NaN."""
    share = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return share.masked_fill((chosen - rejected).isnan(), torch.nan)
