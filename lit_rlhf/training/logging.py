"""Metrics of a rollout and of a loss, as sums over counts that can be added over minibatches and ranks.

Each metric is defined once, in `callbacks/README.md`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.types import Metrics, Rollout

Masked = tuple[Tensor, Tensor]
"""Values of a metric and the mask of those that count."""


def rollout_metrics(rollout: Rollout) -> dict[str, Masked]:
    """Return each metric of a rollout, before advantages are computed, as values and mask."""
    completions, valid = rollout.completions, rollout.valid
    rewards, all_rows = rollout.total_rewards, torch.ones_like(valid)
    highest = rewards.masked_fill(~valid, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(1)
    metrics = {
        "reward": (rewards, valid),
        "return": (rollout.total_returns, valid),
        "completion_length": (completions.lengths, all_rows),
        "eos_rate": (completions.finished, all_rows),
        "skipped_groups": (~valid.any(1), all_rows[:, 0]),
    }
    if rollout.reference_logprobs is not None:
        for name, estimate in (("kl", F.kl_k1), ("kl_k3", F.kl_k3)):
            values = estimate(completions.logprobs, rollout.reference_logprobs)
            metrics[name] = F.masked_sum(values, completions.mask), all_rows
    if valid.shape[1] > 1:
        metrics["zero_variance_groups"] = (highest == lowest, all_rows[:, 0])
    if completions.entropy is not None:
        metrics["entropy"] = (completions.entropy, completions.mask)
    if completions.sampled_mass is not None:
        metrics["sampled_mass"] = (completions.sampled_mass, completions.mask)
    for name, values in rollout.component_rewards.items():
        metrics[f"reward/{name}"] = (values, ~values.isnan())
    return metrics


def advantage_metrics(rollout: Rollout) -> dict[str, Masked]:
    """Return the advantages and their squares, as values and mask."""
    advantages = rollout.advantages
    assert advantages is not None
    mask = rollout.valid if advantages.ndim == 2 else rollout.loss_mask
    return {"advantage": (advantages, mask), "advantage_square": (advantages**2, mask)}


def reduce_rollout_metrics(
    collected: Rollout, rollout: Rollout, sum_over_ranks: Callable[[Tensor], Tensor]
) -> dict[str, Tensor]:
    """Return the means of a rollout's metrics over all ranks, with the standard deviation of its advantages.

    Args:
        collected: The rollout as collected.
        rollout: The rollout with advantages.
        sum_over_ranks: Adds up a tensor over all ranks.
    """
    masked = {**rollout_metrics(collected), **advantage_metrics(rollout)}
    totals = sum_over_ranks(torch.stack([sum_and_count(*metric) for metric in masked.values()]))
    means = {name: total / count for name, (total, count) in zip(masked, totals, strict=True)}  # NaN where count is 0
    mean, square = means.pop("advantage"), means.pop("advantage_square")
    means["advantage_std"] = (square - mean**2).clamp(min=0).sqrt()
    return {f"train/{name}": value for name, value in means.items()}


def sum_and_count(values: Tensor, mask: Tensor) -> Tensor:
    """Return the sum of the values that count and their number, in float64."""
    return torch.stack([F.to_float64(values.masked_fill(~mask, 0)).sum(), F.to_float64(mask).sum()])


def add_loss_metrics(sums: Mapping[str, Tensor], metrics: Metrics) -> dict[str, Tensor]:
    """Return running sums and counts of the masked loss metrics, with those of another minibatch added."""
    masked = {name: sum_and_count(*value) for name, value in metrics.items() if isinstance(value, tuple)}
    return {**sums, **{name: sums[name] + value if name in sums else value for name, value in masked.items()}}


def mean_metrics(prefix: str, sums: dict[str, Tensor], sum_over_ranks: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
    """Return the means of masked metrics over all ranks, as `prefix/name`."""
    if not sums:
        return {}
    totals = sum_over_ranks(torch.stack(list(sums.values())))
    return {f"{prefix}/{name}": total / count for name, (total, count) in zip(sums, totals, strict=True)}


def mean_reward_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of each metric that rewards reported, over the ranks that reported it."""
    names = dict.fromkeys(name for metrics in ranks for name in metrics)
    values = {name: [metrics[name] for metrics in ranks if name in metrics] for name in names}
    return {f"train/{name}": sum(found) / len(found) for name, found in values.items()}
