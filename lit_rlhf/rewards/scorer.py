"""The scorer: call a list of rewards and add up what they return."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf.errors import InputError, InputTypeError
from lit_rlhf.local_warnings import warn_locally
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.rewards.base import REWARD_ARGUMENTS, RewardSpec, own_copy
from lit_rlhf.rewards.calls import call_all
from lit_rlhf.rewards.hidden_tokens import find_hidden_tokens
from lit_rlhf.rewards.messages import check_reads_messages
from lit_rlhf.rewards.outputs import read_numbers, read_token_rows
from lit_rlhf.types import Text

if TYPE_CHECKING:
    from transformers import TrainerState


@dataclass(frozen=True)
class Scores:
    """Rewards of a batch of completions.

    Attributes:
        rewards: Weighted sum of the sequence-level rewards, 0 where none had an opinion.
        component_rewards: Each reward by name, before its weight; NaN where it had no opinion. A token-level reward is
            summed over tokens.
        valid: False where no reward with a nonzero weight, token-level or not, had an opinion.
        has_sequence_reward: True where a sequence-level reward with a nonzero weight had an opinion.
        token_rewards: Weighted sum of the token-level rewards, padded on the right with 0 to the longest completion;
            None without such rewards.
        metrics: Values that rewards reported with `log_metric`, averaged by name.
        reward_extras: Values that rewards reported with `log_extra`, by column: one list per prompt, with one entry
            per completion.
    """

    rewards: Float[Tensor, "prompts samples"]
    component_rewards: dict[str, Float[Tensor, "prompts samples"]]
    valid: Bool[Tensor, "prompts samples"]
    has_sequence_reward: Bool[Tensor, "prompts samples"]
    token_rewards: Float[Tensor, "prompts samples tokens"] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    reward_extras: dict[str, list[list[Any]]] = field(default_factory=dict)

    def total(self) -> Float[Tensor, "prompts samples"]:
        """Return sequence-level plus summed token-level rewards; NaN where not valid."""
        total = self.rewards if self.token_rewards is None else self.rewards + self.token_rewards.sum(-1)
        return total.where(self.valid, torch.nan)

    def to(self, device: torch.device | str) -> Scores:
        """Return the scores with every tensor on `device`."""
        return dataclasses.replace(
            self,
            rewards=self.rewards.to(device),
            component_rewards={name: values.to(device) for name, values in self.component_rewards.items()},
            valid=self.valid.to(device),
            has_sequence_reward=self.has_sequence_reward.to(device),
            token_rewards=None if self.token_rewards is None else self.token_rewards.to(device),
        )


class Scorer:
    """Calls a list of rewards and adds up what they return.

    Args:
        rewards: Rewards, bare or `Weighted`. A repeated name gets a suffix: two reward models become `reward_model` and
            `reward_model_2`.
        role: Name of the rewards in messages.

    Raises:
        ValueError: If the list is empty.
        TypeError: If an item is not a reward: a string, a class that was not instantiated, a bare model.
    """

    def __init__(self, rewards: Sequence[Callable[..., Any]], role: str = "reward") -> None:
        if isinstance(rewards, str) or not isinstance(rewards, Sequence):
            raise InputTypeError(f"rewards must be a list of callables, not {rewards!r}: put it in brackets")
        if not rewards:
            raise InputError(
                "rewards is empty: give at least one, such as rewards=[lit_rlhf.rewards.Length(maximum=50)], or on the "
                "command line --model.rewards+=mine.reward"
            )
        self._specs: list[RewardSpec] = []
        for reward in rewards:
            self._specs.append(RewardSpec.of(reward, {spec.name for spec in self._specs}, role))
        self._warned_of_hidden_tokens = False

    def weights(self, step: int) -> list[float]:
        """Return the weights of the rewards after `step` updates."""
        return [spec.weight(step) for spec in self._specs]

    @property
    def follows_training(self) -> bool:
        """Whether a reward names `trainer_state`, so that its score of the same text may change during training."""
        return any(spec.names("trainer_state") for spec in self._specs)

    @property
    def special_tokens(self) -> bool:
        """Whether a reward receives completions with special tokens."""
        return any(spec.special_tokens for spec in self._specs)

    @property
    def names(self) -> list[str]:
        """Names of the rewards in logs."""
        return [spec.name for spec in self._specs]

    def check(self, columns: Iterable[str]) -> None:
        """Raise a ValueError if the data lack a column that a reward requires. Loads no model."""
        names = {*columns, *REWARD_ARGUMENTS}
        for spec in self._specs:
            spec.check(names)

    def check_on_row(self, prompt: Text, columns: dict[str, Any]) -> None:
        """Raise a ValueError if a function can't read messages, tried on one row of conversations. Loads no model."""
        if isinstance(prompt, list):
            for spec in self._specs:
                check_reads_messages(spec, prompt, columns)

    def check_max_new_tokens(self, max_new_tokens: int) -> None:
        """Call the `check_max_new_tokens` of the rewards that have one."""
        for spec in self._specs:
            if callable(check := getattr(spec.reward, "check_max_new_tokens", None)):
                check(max_new_tokens)

    def check_hidden_tokens(self, completion_ids: list[list[int]], tokens: Callable[[], dict[int, str]]) -> None:
        """Warn once of special tokens that matter to rewards but are not in the completions that they receive.

        Args:
            completion_ids: Token ids of the completions.
            tokens: Returns the special tokens, by id.
        """
        takes = [spec for spec in self._specs if spec.accepts is None or "completions" in spec.accepts]
        blind = [spec.reward for spec in takes if not spec.special_tokens]
        if self._warned_of_hidden_tokens or not blind:
            return
        if hidden := find_hidden_tokens(blind, completion_ids, tokens()):
            self._warned_of_hidden_tokens = True
            warn_locally(
                f"rewards don't see {', '.join(hidden[:8])}: special tokens are left out of completions; set "
                "special_tokens = True on a reward that looks for them"
            )

    def setup(self, device: torch.device | str, sharding: Sharding | None = None) -> None:
        """Call the `setup` of the rewards, which loads models; once per device, before the first use.

        Args:
            device: The device.
            sharding: How models are sharded over ranks, if they are.
        """
        for spec in self._specs:
            spec.setup(device, sharding)

    def __call__(
        self,
        prompts: Sequence[Text],
        completions: list[list[Text]],
        completion_ids: list[list[list[int]]],
        finished: list[list[bool]],
        columns: dict[str, list[Any]] | None = None,
        state: TrainerState | None = None,
        raw_completions: list[list[Text]] | None = None,
    ) -> Scores:
        """Score n prompts with k completions each. Rewards receive flat lists of n * k entries.

        Args:
            prompts: Strings or messages, one per prompt.
            completions: Strings or messages, one list of k per prompt.
            completion_ids: Token ids without padding, EOS token included, one list of k per prompt.
            finished: Whether each completion ended by itself, one list of k per prompt.
            columns: The other columns of the data, one entry per prompt.
            state: Training progress (`global_step`, `max_steps`, `epoch`), for rewards with a schedule.
            raw_completions: Completions with their special tokens, for rewards with `special_tokens = True`.

        Raises:
            RuntimeError: If a reward raises.
            ValueError: If the lists differ in shape, or a reward returns anything but one finite number or None per
                completion (or token).
        """
        n, k = len(prompts), len(completions[0]) if completions else 0
        _check_shapes(n, k, completions=completions, completion_ids=completion_ids, finished=finished)
        log = _Log(n * k)
        arguments = {
            **{name: _repeat(values, k) for name, values in (columns or {}).items()},
            "prompts": _repeat(prompts, k),
            "completions": _flatten(completions),
            "completion_ids": _flatten(completion_ids),
            "finished": _flatten(finished),
            "trainer_state": state or _new_state(),
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
        }
        raw = arguments if raw_completions is None else {**arguments, "completions": _flatten(raw_completions)}
        outputs = call_all(self._specs, [raw if spec.special_tokens else arguments for spec in self._specs])
        lengths = [len(ids) for group in completion_ids for ids in group]
        return self._add_up(outputs, lengths, (n, k), log, step=0 if state is None else state.global_step)

    def _add_up(self, outputs: list[Any], lengths: list[int], shape: tuple[int, int], log: _Log, step: int) -> Scores:
        components: dict[str, Tensor] = {}
        rewards = torch.zeros(len(lengths), dtype=torch.float32)
        token_rows: list[Tensor] | None = None
        for spec, output in zip(self._specs, outputs, strict=True):
            if spec.token_level:
                rows = read_token_rows(output, lengths, spec.title)
                components[spec.name] = torch.stack([row.sum() for row in rows])
                weighted = [spec.weight(step) * row.nan_to_num() for row in rows]
                token_rows = [a + b for a, b in zip(token_rows, weighted, strict=True)] if token_rows else weighted
            else:
                components[spec.name] = read_numbers(output, len(lengths), spec.title)
                rewards = rewards + spec.weight(step) * components[spec.name].nan_to_num()
        valid = torch.zeros(len(lengths), dtype=torch.bool)
        has_sequence_reward = torch.zeros_like(valid)
        for spec in [spec for spec in self._specs if spec.weight(step) != 0] or self._specs:
            has_opinion = ~components[spec.name].isnan()
            valid |= has_opinion
            has_sequence_reward |= has_opinion & (not spec.token_level)
        token_rewards = None
        if token_rows is not None:
            padded = torch.nn.utils.rnn.pad_sequence(token_rows, batch_first=True)
            token_rewards = padded.view(*shape, padded.shape[1])
        return Scores(
            rewards=rewards.view(shape),
            component_rewards={name: values.view(shape) for name, values in components.items()},
            valid=valid.view(shape),
            has_sequence_reward=has_sequence_reward.view(shape),
            token_rewards=token_rewards,
            metrics={name: sum(values) / len(values) for name, values in log.metrics.items()},
            reward_extras={name: _group(values, shape[1]) for name, values in log.extras.items()},
        )


def _check_shapes(n: int, k: int, **lists: list[list[Any]]) -> None:
    for name, groups in lists.items():
        if [len(group) for group in groups] != [k] * n:
            raise InputError(
                f"{name} has groups of {[len(group) for group in groups]} entries: it must have {k} for each of the "
                f"{n} prompts"
            )


def _repeat(values: Sequence[Any], k: int) -> list[Any]:
    return [value for value in values for _ in range(k)]


def _flatten(groups: list[list[Any]]) -> list[Any]:
    return [value for group in groups for value in group]


def _group(values: list[Any], k: int) -> list[list[Any]]:
    return [values[i : i + k] for i in range(0, len(values), k)]


class _Log:
    """Collects what rewards report with `log_metric` and `log_extra`."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extras: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: SupportsFloat) -> None:
        """Report a number for this call."""
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Report one entry per completion, shown with it in `samples.jsonl`."""
        entries = own_copy(list(values))
        if len(entries) != self.count:
            raise InputError(f"log_extra({column!r}) got {len(entries)} values for {self.count} completions")
        self.extras[column] = entries


def _new_state() -> TrainerState:
    from transformers import TrainerState  # imported late: takes seconds, and few rewards need it

    return TrainerState()
