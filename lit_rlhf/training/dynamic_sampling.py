"""Dynamic sampling: learn only from prompts whose completions differ in their reward, and sample more until there are.

Yu et al., 2025, arXiv 2503.14476, section 3.2.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Bool
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.types import Record, Rollout

RecordT = TypeVar("RecordT", bound=Record)
RolloutT = TypeVar("RolloutT", bound=Rollout)


@dataclass(frozen=True)
class DynamicSampling:
    """Whether a rollout leaves out groups whose completions all have the same reward.

    They teach nothing by a group's mean, but count in the mean of a loss. A batch of the data is cut into `rounds`
    parts. Each part is sampled only if the parts before had too few groups that differ; a rollout has as many prompts
    as a part, and prompts that were not needed are passed over.

    Attributes:
        reward: Name of the reward that decides, as it is before weights and shaping; None for no dynamic sampling. A
            group differs if two of its scored completions do.
        rounds: Parts of a batch; 1 only leaves groups out.

    Raises:
        ValueError: If a value is outside its range.
    """

    reward: str | None = None
    rounds: int = 1

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"dynamic_sampling: rounds={self.rounds} must be at least 1")
        if self.rounds > 1 and self.reward is None:
            raise InputError(f"dynamic_sampling: rounds={self.rounds} has no effect without a reward: give its name")

    def check(self, rewards: Sequence[str], num_samples: int, compares_groups: bool) -> None:
        """Check that there is such a reward, and a group to compare; warn if a group that is left out has a gradient.

        Args:
            rewards: Names of the rewards.
            num_samples: Completions of each prompt.
            compares_groups: Whether a group whose rewards are all equal has no gradient.

        Raises:
            ValueError: If a check fails.
        """
        if self.reward is None:
            return
        if self.reward not in rewards:
            raise InputError(
                f"dynamic_sampling: there is no reward {self.reward!r}: give one of {', '.join(map(repr, rewards))}"
            )
        if num_samples < 2:
            raise InputError("dynamic_sampling compares completions of a prompt: give num_samples of 2 or more")
        if not compares_groups:
            rank_zero_warn(
                "dynamic_sampling leaves out groups whose rewards are all equal, and the method learns from them, "
                "since it does not subtract a baseline of the group: the objective changes"
            )

    def check_batch(self, batch_size: int, num_minibatches: int) -> None:
        """Check that a batch can be cut into the rounds.

        Raises:
            ValueError: If not.
        """
        if self.reward is None:
            return
        if batch_size % self.rounds:
            raise InputError(
                f"data.batch_size={batch_size} is sampled in dynamic_sampling.rounds={self.rounds} parts: give a "
                "multiple of it"
            )
        if num_minibatches > batch_size // self.rounds:
            raise InputError(
                f"num_minibatches={num_minibatches} is more than the {batch_size // self.rounds} prompts of a rollout, "
                "data.batch_size / dynamic_sampling.rounds"
            )

    def differing(self, rollout: Rollout) -> Bool[Tensor, " prompts"]:
        """Return True for groups in which two completions have different rewards."""
        assert self.reward is not None
        rewards = rollout.component_rewards[self.reward]
        scored = rollout.valid & ~rewards.isnan()
        highest = rewards.masked_fill(~scored, -torch.inf).amax(1)
        return highest > rewards.masked_fill(~scored, torch.inf).amin(1)

    def choose(self, rollout: RolloutT, count: int) -> RolloutT:
        """Return `count` prompts of a rollout: the first that differ, and invalid ones where these are too few."""
        differing = self.differing(rollout)
        order = torch.argsort((~differing).int(), stable=True)[:count].sort().values
        chosen = rollout.at(order.tolist())
        return chosen.replace(valid=chosen.valid & differing[order].unsqueeze(1))


def concatenate(parts: Sequence[RecordT]) -> RecordT:
    """Return all prompts of several records of one kind, with completions padded to the longest."""
    return (
        parts[0]
        if len(parts) == 1
        else type(parts[0])(
            **{f.name: _joined([getattr(part, f.name) for part in parts]) for f in dataclasses.fields(parts[0])}
        )
    )


def _joined(values: Sequence[Any]) -> Any:
    first = values[0]
    if isinstance(first, Record):
        return concatenate(values)
    if isinstance(first, list):
        return [item for value in values for item in value]
    if isinstance(first, dict):
        return {key: _joined([value[key] for value in values]) for key in first if all(key in v for v in values)}
    if not isinstance(first, Tensor):
        return first
    if first.ndim == 3:
        length = max(value.shape[2] for value in values)
        values = [torch.nn.functional.pad(value, (0, length - value.shape[2])) for value in values]
    return torch.cat(list(values))
