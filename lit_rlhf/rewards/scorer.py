"""The scorer: calls a list of rewards, checks what they return, adds it up."""

from __future__ import annotations

import asyncio
import functools
import inspect
import math
import os
import threading
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, SupportsFloat

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf.rewards.base import GIVEN, Entry, fail
from lit_rlhf.types import Text

if TYPE_CHECKING:
    from transformers import TrainerState


@dataclass(frozen=True)
class Scores:
    """What the rewards say about a flat list of completions.

    Attributes:
        rewards: Weighted sum of the rewards of the whole completion, 0 where none had an opinion.
        parts: Each reward by name before its weight, NaN where it had no opinion; a token-level one as its sum.
        valid: False where no reward that weighs anything, token-level ones included, had an opinion.
        whole: True where such a reward of the whole completion had one.
        token_rewards: Weighted sum of the token-level rewards, one row a completion, or None where there are none.
        metrics: What rewards reported with `log_metric`, the mean where a name came more than once.
        extra: What rewards reported with `log_extra`: columns of one entry a completion.
    """

    rewards: Float[Tensor, " completions"]
    parts: dict[str, Float[Tensor, " completions"]]
    valid: Bool[Tensor, " completions"]
    whole: Bool[Tensor, " completions"]
    token_rewards: list[Float[Tensor, " _"]] | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    extra: dict[str, list[Any]] = field(default_factory=dict)


class Scorer:
    """Calls a list of rewards and adds up what they return.

    Args:
        rewards: Rewards, bare or `Weighted`. Two of one name (two reward models, say) become `name` and `name_2`.
        role: What messages call them.

    Raises:
        ValueError: If the list is empty.
        TypeError: If an entry is not a reward: a string, a class that was not instantiated, a bare model.
    """

    def __init__(self, rewards: Sequence[Callable[..., Any]], role: str = "reward") -> None:
        if isinstance(rewards, str) or not isinstance(rewards, Sequence):
            raise TypeError(f"rewards must be a list of callables, not {rewards!r}: put it in brackets")
        if not rewards:
            raise ValueError(
                "rewards is empty: give at least one, such as rewards=[lit_rlhf.rewards.Length(maximum=50)]"
            )
        self._entries: list[Entry] = []
        for reward in rewards:
            self._entries.append(Entry.of(reward, {entry.name for entry in self._entries}, role))

    def weights(self, step: int) -> list[float]:
        """What the rewards are multiplied by after `step` updates."""
        return [entry.weight(step) for entry in self._entries]

    @property
    def follows_training(self) -> bool:
        """Whether a reward asks where training stands, so that its scores of one text may change."""
        return any("trainer_state" in (entry.accepts or ()) for entry in self._entries)

    @property
    def names(self) -> list[str]:
        """The names by which the rewards are logged."""
        return [entry.name for entry in self._entries]

    def check(self, columns: Iterable[str]) -> None:
        """Raise a ValueError if a reward asks for a column that the data don't have; needs no model."""
        names = {*columns, *GIVEN}
        for entry in self._entries:
            entry.check(names)

    def setup(self, device: torch.device | str) -> None:
        """Load what rewards need (models) onto `device`, once for a device; called before the first use."""
        for entry in self._entries:
            entry.setup(device)

    def __call__(
        self,
        prompts: list[Text],
        completions: list[Text],
        completion_ids: list[list[int]],
        finished: list[bool],
        columns: dict[str, list[Any]] | None = None,
        state: TrainerState | None = None,
    ) -> Scores:
        """Score completions. Every list has one entry a completion, so prompts and columns come repeated.

        Args:
            prompts: Strings or messages.
            completions: Strings or messages, as the prompts.
            completion_ids: Token ids without padding, the EOS token included.
            finished: Whether each completion ended by itself.
            columns: The other columns of the data.
            state: Where training stands (`global_step`, `max_steps`, `epoch`), for rewards that follow a schedule.

        Raises:
            RuntimeError: If a reward raises.
            ValueError: If a reward returns anything but one finite number or None a completion (a token).
        """
        log = _Log(len(completions))
        given = {
            **(columns or {}),
            "prompts": prompts,
            "completions": completions,
            "completion_ids": completion_ids,
            "finished": finished,
            "trainer_state": state or _new_state(),
            "log_extra": log.log_extra,
            "log_metric": log.log_metric,
        }
        step = 0 if state is None else state.global_step
        return self._add_up(call_all(self._entries, given), [len(ids) for ids in completion_ids], log, step)

    def _add_up(self, outputs: list[Any], lengths: list[int], log: _Log, step: int) -> Scores:
        parts: dict[str, Tensor] = {}
        rewards = torch.zeros(len(lengths), dtype=torch.float32)
        token_rewards: list[Tensor] | None = None
        for entry, output in zip(self._entries, outputs, strict=True):
            if entry.token_level:
                rows = _token_rows(output, lengths, entry.title)
                parts[entry.name] = torch.stack([row.sum() for row in rows])
                kept = [entry.weight(step) * row.nan_to_num() for row in rows]
                token_rewards = [a + b for a, b in zip(token_rewards, kept, strict=True)] if token_rewards else kept
            else:
                parts[entry.name] = read_numbers(output, len(lengths), entry.title)
                rewards = rewards + entry.weight(step) * parts[entry.name].nan_to_num()
        valid = torch.zeros(len(lengths), dtype=torch.bool)
        whole = torch.zeros_like(valid)
        for entry in [entry for entry in self._entries if entry.weight(step) != 0] or self._entries:
            opinion = ~parts[entry.name].isnan()
            valid |= opinion
            whole |= opinion & (not entry.token_level)
        metrics = {name: sum(values) / len(values) for name, values in log.metrics.items()}
        return Scores(rewards, parts, valid, whole, token_rewards, metrics, log.extra)


def call_all(entries: Sequence[Entry], given: dict[str, Any]) -> list[Any]:
    """Call rewards with those of the arguments that each takes; async ones side by side.

    Raises:
        RuntimeError: If one raises.
    """
    outputs: list[Any] = []
    try:
        outputs.extend(entry.call(given) for entry in entries)
    except BaseException:
        for output in filter(inspect.iscoroutine, outputs):
            output.close()
        raise
    # In a thread, as a notebook has a running loop here; always the same loop, as network clients hold on to it.
    waiting = {i: output for i, output in enumerate(outputs) if inspect.isawaitable(output)}
    if waiting:
        results = asyncio.run_coroutine_threadsafe(_gather(waiting.values()), _event_loop(os.getpid())).result()
        for i, result in zip(waiting, results, strict=True):
            if isinstance(result, BaseException):
                fail(entries[i].title, result)
            outputs[i] = result
    return outputs


class _Log:
    """Collects what rewards report while they run."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.metrics: dict[str, list[float]] = {}
        self.extra: dict[str, list[Any]] = {}

    def log_metric(self, name: str, value: SupportsFloat) -> None:
        """Report one number of this call."""
        self.metrics.setdefault(name, []).append(float(value))

    def log_extra(self, column: str, values: Iterable[Any]) -> None:
        """Report one entry a completion, shown beside it."""
        entries = list(values)
        if len(entries) != self.count:
            raise ValueError(f"log_extra({column!r}) got {len(entries)} values for {self.count} completions")
        self.extra[column] = entries


def _new_state() -> TrainerState:
    from transformers import TrainerState  # late: seconds, for a class that few rewards ask for

    return TrainerState()


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """The loop of the async rewards, in a thread of its own; by process, because threads don't survive a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"async-rewards-{pid}", daemon=True).start()
    return loop


async def _gather(waiting: Iterable[Awaitable[Any]]) -> list[Any]:
    return await asyncio.gather(*map(_settled, waiting))


async def _settled(waiting: Awaitable[Any]) -> Any:
    try:
        return await waiting
    except BaseException as error:  # a SystemExit would end the thread of the loop, and all would wait forever
        return error


def read_numbers(output: Any, count: int, title: str, per: str = "completions") -> Float[Tensor, " completions"]:
    """Check and convert what a reward returned; None becomes NaN."""
    _check_count(output, count, title, per)
    values = output.tolist() if hasattr(output, "tolist") else list(output)
    try:
        values = [value.item() if hasattr(value, "item") else value for value in values]
        numbers = torch.tensor([math.nan if value is None else value for value in values], dtype=torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        kinds = sorted({type(value).__name__ for value in values})
        raise ValueError(f"{title} returned {kinds}: it must return plain numbers (or None)") from error
    if numbers.ndim != 1:
        raise ValueError(f"{title} returned the shape {tuple(numbers.shape)}: it must be one number each")
    for i in numbers.isfinite().logical_not().nonzero().flatten().tolist():
        if values[i] is not None:
            raise ValueError(f"{title} returned {values[i]} at place {i}; for no opinion return None")
    return numbers


def _token_rows(output: Any, lengths: list[int], title: str) -> list[Float[Tensor, " _"]]:
    """One row of numbers a completion, as long as its ids; all NaN where the reward had no opinion."""
    _check_count(output, len(lengths), title, "completions")
    rows = []
    for i, (row, length) in enumerate(zip(output, lengths, strict=True)):
        if row is None:
            rows.append(torch.full((length,), math.nan, dtype=torch.float32))
            continue
        rows.append(read_numbers(row, length, title, f"tokens of completion {i}"))
        if rows[-1].isnan().any():
            raise ValueError(f"{title} returned None for a token: None stands for a whole completion")
    return rows


def _check_count(output: Any, count: int, title: str, per: str) -> None:
    if isinstance(output, str | dict) or not hasattr(output, "__len__") or getattr(output, "ndim", 1) == 0:
        raise ValueError(f"{title} returned {type(output).__name__}, not {count} numbers: one for each of the {per}")
    if len(output) != count:
        raise ValueError(f"{title} returned {len(output)} values for {count} {per}")
