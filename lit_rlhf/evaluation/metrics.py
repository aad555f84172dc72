"""Measures of what a policy writes, as torchmetrics: summed over batches and ranks before anything is divided."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

Z_95 = 1.959964
"""The normal distribution's quantile for 95 %, two-sided."""


class Moments(Metric):
    """Mean and variance (that of the population) of numbers, in float64; both NaN where there are none."""

    full_state_update = False
    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, values: Shaped[Tensor, "*shape"]) -> None:
        """Add numbers."""
        values = values.double()
        self.count += values.numel()
        self.total += values.sum()
        self.squares += (values**2).sum()

    def compute(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance."""
        mean = self.total / self.count
        return mean, (self.squares / self.count - mean**2).clamp(min=0)


class WinRate(Moments):
    """Share of wins with its 95 % interval; a tie is half a win.

    The interval is Wilson's for that many independent pairs; ties make the true one narrower. Wilson, 1927, *Probable
    inference, the law of succession, and statistical inference*. It says how sure these prompts make one of this
    policy, not how much another seed would change the policy.
    """

    def compute(self) -> tuple[Tensor, Tensor, Tensor]:  # type: ignore[override]
        """Return the rate and both ends of its interval, NaN where nothing was compared."""
        rate, n = self.total / self.count, self.count
        middle = (rate + Z_95**2 / (2 * n)) / (1 + Z_95**2 / n)
        half = Z_95 / (1 + Z_95**2 / n) * (rate * (1 - rate) / n + Z_95**2 / (4 * n**2)).sqrt()
        return rate, middle - half, middle + half


class DistinctN(Metric):
    """Share of different n-grams of tokens among all n-grams of all completions, in [0, 1]; 0 where there are none.

    Near 0 where a policy repeats itself, within a completion or across them. It falls with the number of completions,
    so only equally many compare. Li et al., 2016, arXiv 1510.03055.

    Args:
        n: Tokens of a gram, at least 1.
    """

    full_state_update = False
    count: Tensor
    grams: list[Tensor]

    def __init__(self, n: int) -> None:
        super().__init__()
        if n < 1:
            raise ValueError(f"n={n}: a gram has at least one token")
        self.n = n
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("grams", [], dist_reduce_fx="cat")

    def update(self, completions: Sequence[Sequence[int]]) -> None:
        """Add completions: token ids without padding."""
        grams = [ids[i : i + self.n] for ids in completions for i in range(len(ids) - self.n + 1)]
        found = torch.tensor(grams, dtype=torch.long, device=self.count.device).view(-1, self.n)
        self.count += len(grams)
        self.grams.append(torch.unique(found, dim=0))

    def compute(self) -> Tensor:
        """Return the share."""
        different = len(torch.unique(dim_zero_cat(self.grams), dim=0)) if len(self.grams) else 0
        return different / self.count.clamp(min=1)


class Perplexity(Metric):
    """`exp` of the mean negative log-probability of a token, over all tokens of all texts; NaN where there are none."""

    full_state_update = False
    logprob: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("logprob", "count"):
            self.add_state(name, torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, logprobs: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"]) -> None:
        """Add tokens: their log-probabilities in nats, and where they count."""
        self.logprob += logprobs.double().masked_fill(~mask, 0.0).sum()
        self.count += mask.sum()

    def compute(self) -> Tensor:
        """Return the perplexity."""
        return (-self.logprob / self.count).exp()


def pairwise_accuracy(chosen: Float[Tensor, " pairs"], rejected: Float[Tensor, " pairs"]) -> Float[Tensor, ""]:
    """Return the share of pairs whose chosen completion scores higher; a tie counts half."""
    return ((chosen > rejected).float() + 0.5 * (chosen == rejected).float()).mean()
