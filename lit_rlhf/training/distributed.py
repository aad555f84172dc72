"""Collective operations over the ranks of a Trainer; without several processes they return their input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.errors import InputError
from lit_rlhf.local_warnings import hold_warnings
from lit_rlhf.rewards.base import RewardInterrupted
from lit_rlhf.training.processes import ProcessLost, peers

_without_others: WeakSet[Trainer] = WeakSet()


def sum_over_ranks(trainer: Trainer, values: Tensor) -> Tensor:
    """Return the sum of a tensor over all ranks."""
    if trainer.world_size == 1:
        return values
    total: Tensor = trainer.strategy.reduce(values, reduce_op="sum")
    return total


def gather_over_ranks(trainer: Trainer, state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Return the states of all ranks, in the order of the ranks. The states must be picklable and on the CPU."""
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [None] * trainer.world_size
    torch.distributed.all_gather_object(states, state)
    return states


def gather_on_rank_zero(trainer: Trainer, state: dict[Any, Any]) -> list[dict[Any, Any]]:
    """Return the states of all ranks on rank 0, and empty ones on the others.

    The states, which may hold all gradients, meet in the memory of rank 0's host: NCCL would gather them on every GPU.

    Raises:
        ProcessLost: If other ranks are lost (see `without_others`), and this one's state is not empty.
    """
    if trainer.world_size == 1:
        return [state]
    if trainer in _without_others:
        if state:
            raise ProcessLost("it was in the middle of a rollout or an update, a part of which the lost process had")
        return [{} for _ in range(trainer.world_size)]
    states: list[Any] = [{} for _ in range(trainer.world_size)]
    group = peers(trainer).group
    torch.distributed.gather_object(state, states if trainer.is_global_zero else None, dst=0, group=group)
    return states


@contextlib.contextmanager
def without_others(trainer: Trainer) -> Iterator[None]:
    """Gather nothing from the other ranks within this context, since one of them is lost."""
    _without_others.add(trainer)
    try:
        yield
    finally:
        _without_others.discard(trainer)


@contextlib.contextmanager
def raise_on_all_ranks(trainer: Trainer) -> Iterator[None]:
    """Raise on every rank if the body raises on one, so that all ranks stop and save together instead of waiting.

    Ranks wait for one another as long as the `timeout` of the strategy says, and act on signals meanwhile.

    Raises:
        ProcessLost: If another rank has ended, or neither finishes nor stops when it is asked to.
    """
    if trainer.world_size == 1:
        yield
        return
    others = peers(trainer)
    error: Exception | None = None
    with hold_warnings() as held:
        try:
            yield
        except Exception as raised:
            error = raised
    (failed, warned), asked = others.totals([float(error is not None), float(len(held))])
    if failed or warned:
        reports = _gather_reports(trainer, error, held, asked)
        error = _common_error(error, reports, others.seconds)
    if error is not None:
        error.on_all_ranks = True  # type: ignore[attr-defined]  # a checkpoint can be saved together
        raise error


@dataclass(frozen=True)
class Report:
    """What a rank has to say: why it failed, and what it warns of.

    Attributes:
        failure: Its error message; None if it did not fail.
        number: The signal that ended it, if one did.
        asked: Whether it waited for too long.
        warnings: Its warnings.
    """

    failure: str | None
    number: int | None
    asked: bool
    warnings: list[str]


def _gather_reports(trainer: Trainer, error: Exception | None, held: list[str], asked: bool) -> list[Report]:
    """Return the reports of all ranks; the first rank shows each warning once."""
    failure = None if error is None else f"process {trainer.global_rank}: {error or type(error).__name__}"
    reports: list[Any] = [None] * trainer.world_size
    own = Report(failure, getattr(error, "number", None), asked, held)
    torch.distributed.all_gather_object(reports, own, group=peers(trainer).group)
    for message in dict.fromkeys(message for report in reports for message in report.warnings):
        rank_zero_warn(message)
    return reports


def _common_error(error: Exception | None, reports: list[Report], seconds: float) -> Exception | None:
    """Return what a rank raises if some ranks failed: its own error, or else one that quotes another rank's."""
    failed = [report for report in reports if report.failure is not None]
    if failed and any(report.asked for report in reports):
        return InputError(
            f"not finished within {seconds:g} s of the other processes (the timeout of trainer.strategy), so all of "
            f"them stop: {failed[0].failure}"
        )
    if error is not None or not failed:
        return error
    text = f"{len(failed)} other process(es) failed: {failed[0].failure}"
    return InputError(text) if failed[0].number is None else RewardInterrupted(text, failed[0].number)
