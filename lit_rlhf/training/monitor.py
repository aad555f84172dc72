"""What the online loop tells of itself: metrics of a rollout, seconds by phase, failures on every rank at once."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.types import Rollout

if TYPE_CHECKING:
    from lit_rlhf.algorithms.base import Algorithm
    from lit_rlhf.algorithms.online import OnlineAlgorithm


Metrics = dict[str, float | Tensor | tuple[Tensor, Tensor]]
"""What a loss tells: by name a number, or values and where they count, for a mean over all ranks."""


class Clock:
    """Adds up the seconds of a rollout by phase; training is all of a step that is not spent on collecting."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started: float | None = None  # while a step is under way

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count what runs inside towards a phase."""
        started = now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now() - started

    def begin_step(self, new: bool) -> None:
        """Start to count a step; with `new` the first of a rollout."""
        if new:
            self.seconds = {}
        self._started = now() - sum(self.seconds.values())

    def end_step(self) -> None:
        """Count what is left of the step, backward and update included, towards training."""
        self.seconds, self._started = self.so_far(), None

    def so_far(self) -> dict[str, float]:
        """Return the seconds of the rollout by phase, with those of a step that is under way."""
        if self._started is None:
            return dict(self.seconds)
        rest = now() - self._started - sum(self.seconds.values())
        return {**self.seconds, "train": self.seconds.get("train", 0.0) + rest}

    def read(self, tokens: int) -> dict[str, float]:
        """Return the seconds by phase, and completion tokens per second."""
        total = max(sum(self.seconds.values()), 1e-9)
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        return {**seconds, "throughput/completion_tokens": tokens / total}


def now() -> float:
    """Seconds on a clock that waits for the accelerator, where this process uses one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, float]:
    """The most that this process has held on an accelerator so far, in MiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory/peak_mib": torch.cuda.max_memory_allocated(device) / 2**20}


@contextlib.contextmanager
def raise_on_all_ranks(module: Algorithm) -> Iterator[None]:
    """Make a failure on one rank a failure on all, so that they stop and save together instead of waiting."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if module.trainer.world_size > 1:
        failed = module.sum_over_ranks(torch.tensor(float(error is not None), device=module.device))
        if failed > 0 and error is None:
            error = RuntimeError(f"{int(failed)} other process(es) failed while sampling or scoring: see their message")
        if error is not None:
            error.on_all_ranks = True  # type: ignore[attr-defined]  # a checkpoint can be saved together
    if error is not None:
        raise error


def log_rollout(module: OnlineAlgorithm, collected: Rollout, rollout: Rollout) -> None:
    """Log the means over all ranks, as sums over counts: of what was collected, and of the method's advantages."""
    means = reduce_means(module, {**rollout_sums(collected), **advantage_sums(rollout)})
    mean, square = means.pop("advantage"), means.pop("advantage_square")
    means["advantage_std"] = (square - mean**2).clamp(min=0).sqrt()
    shown = {"reward", "kl"}
    for name, value in means.items():
        module.log(f"train/{name}", value, prog_bar=name in shown, batch_size=1)
    module.log("train/kl_coef", module.kl_coef, batch_size=1)


def rollout_sums(rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """Return values and where they count, for each metric of a rollout."""
    completions, valid = rollout.completions, rollout.valid
    k1 = F.kl_k1(completions.logprobs, rollout.reference_logprobs)
    k3 = F.kl_k3(completions.logprobs, rollout.reference_logprobs)
    everywhere = torch.ones_like(valid)
    rewards, returns = rollout.rewards, rollout.returns
    if rollout.token_rewards is not None:
        immediate = F.masked_sum(rollout.token_rewards, completions.mask)
        rewards, returns = rewards + immediate, returns + immediate
    highest = rewards.masked_fill(~valid, -torch.inf).amax(1)
    lowest = rewards.masked_fill(~valid, torch.inf).amin(1)
    sums = {
        "reward": (rewards, valid),
        "return": (returns, valid),
        "kl": (F.masked_sum(k1, completions.mask), everywhere),
        "kl_k3": (F.masked_sum(k3, completions.mask), everywhere),
        "completion_length": (completions.lengths, everywhere),
        "finished": (completions.finished, everywhere),
        "skipped_groups": (~valid.any(1), everywhere[:, 0]),
    }
    if valid.shape[1] > 1:
        sums["zero_variance_groups"] = (highest == lowest, everywhere[:, 0])
    if completions.entropy is not None:
        sums["entropy"] = (completions.entropy, completions.mask)
    if completions.sampled_mass is not None:
        sums["sampled_mass"] = (completions.sampled_mass, completions.mask)
    for name, part in rollout.parts.items():
        sums[f"reward/{name}"] = (part, ~part.isnan())
    return sums


def advantage_sums(rollout: Rollout) -> dict[str, tuple[Tensor, Tensor]]:
    """Return the advantages and their squares, and where they count."""
    advantages, valid = rollout.advantages, rollout.valid
    assert advantages is not None
    counted = valid if advantages.ndim == 2 else rollout.counted
    return {"advantage": (advantages, counted), "advantage_square": (advantages**2, counted)}


def log_loss_metrics(module: OnlineAlgorithm, metrics: Metrics, new: bool) -> None:
    """Log what a loss tells, as means over all ranks; values with a place count over the slices of a rollout so far.

    Args:
        module: The method.
        metrics: What the loss of a slice tells.
        new: Whether the slice is the first of a rollout.
    """
    if new:
        module.metric_sums = {}
    numbers = {f"train/{name}": value for name, value in metrics.items() if not isinstance(value, tuple)}
    module.log_dict(numbers, sync_dist=True, batch_size=1)
    for name, value in metrics.items():
        if isinstance(value, tuple):
            module.metric_sums[name] = module.metric_sums.get(name, 0.0) + sum_and_count(*value)
    if module.metric_sums:
        totals = module.sum_over_ranks(torch.stack(list(module.metric_sums.values())))
        means = {
            f"train/{name}": total / count for name, (total, count) in zip(module.metric_sums, totals, strict=True)
        }
        module.log_dict(means, batch_size=1)


def sum_and_count(values: Tensor, where: Tensor) -> Tensor:
    """The sum of values where they count, and how many do."""
    return torch.stack([values.double().masked_fill(~where, 0.0).sum(), where.sum().double()])


def reduce_means(module: OnlineAlgorithm, sums: dict[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Return the mean of each metric over all that counts on all ranks, in one reduction; NaN where nothing does."""
    rows = [sum_and_count(values, where) for values, where in sums.values()]
    totals = module.sum_over_ranks(torch.stack(rows))
    return {name: total / count for name, (total, count) in zip(sums, totals, strict=True)}


def mean_metrics(ranks: list[dict[str, float]]) -> dict[str, float]:
    """Return the mean of what rewards reported, over the ranks on which they did."""
    names = dict.fromkeys(name for metrics in ranks for name in metrics)
    values = {name: [metrics[name] for metrics in ranks if name in metrics] for name in names}
    return {f"train/{name}": sum(found) / len(found) for name, found in values.items()}
