"""Options of the optimization of a rollout."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TypeVar

from lit_rlhf.errors import InputError
from lit_rlhf.types import Rollout

RolloutT = TypeVar("RolloutT", bound=Rollout)


@dataclass(frozen=True)
class Updates:
    """How a rollout is split into minibatches and how often it is reused.

    A training step takes one minibatch. With `accumulate_grad_batches` equal to the number of minibatches they make one
    update and only save memory; with less there are several updates per rollout, of which all but the first are
    off-policy. Names as in CleanRL.

    Attributes:
        num_minibatches: Minibatches of a rollout along its prompts.
        sample_minibatches: Minibatches of each group along its samples.
        update_epochs: Passes over a rollout; each pass is at least one update.

    Raises:
        ValueError: If a number is below 1.
    """

    num_minibatches: int = 1
    sample_minibatches: int = 1
    update_epochs: int = 1

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise InputError(f"updates: {name}={value} must be at least 1")

    @property
    def minibatches_per_epoch(self) -> int:
        """Minibatches of one pass over a rollout."""
        return self.num_minibatches * self.sample_minibatches

    @property
    def steps_per_rollout(self) -> int:
        """Training steps on one rollout."""
        return self.minibatches_per_epoch * self.update_epochs

    def prompt_slices(self, num_prompts: int) -> list[slice]:
        """Return the prompts of each minibatch."""
        return [nth_part(i, self.num_minibatches, num_prompts) for i in range(self.num_minibatches)]

    def minibatch(self, rollout: RolloutT, step: int) -> RolloutT:
        """Return the minibatch of a training step, trimmed to its longest rows. Its tensors are views."""
        row, column = divmod(step % self.minibatches_per_epoch, self.sample_minibatches)
        n, k = rollout.rewards.shape
        part = rollout.rows(nth_part(row, self.num_minibatches, n))
        return part.samples(nth_part(column, self.sample_minibatches, k)).trim()


def nth_part(i: int, parts: int, total: int) -> slice:
    """Return the i-th of `parts` slices of `total` items, of equal size up to one."""
    return slice(i * total // parts, (i + 1) * total // parts)
