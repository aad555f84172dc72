"""Collective operations over the ranks of a Trainer; without several processes they return their input."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor


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
    """
    if trainer.world_size == 1:
        return [state]
    states: list[Any] = [{} for _ in range(trainer.world_size)]
    group = torch.distributed.new_group(backend="gloo")
    try:
        torch.distributed.gather_object(state, states if trainer.is_global_zero else None, dst=0, group=group)
    finally:
        torch.distributed.destroy_process_group(group)
    return states


@contextlib.contextmanager
def raise_on_all_ranks(trainer: Trainer) -> Iterator[None]:
    """Raise on every rank if the body raises on one, so that all ranks stop and save together instead of waiting."""
    error: Exception | None = None
    try:
        yield
    except Exception as raised:
        error = raised
    if trainer.world_size > 1:
        failed = sum_over_ranks(trainer, torch.tensor(float(error is not None), device=trainer.strategy.root_device))
        if failed > 0 and error is None:
            error = RuntimeError(f"{int(failed)} other process(es) failed while sampling or scoring: see their message")
        if error is not None:
            error.on_all_ranks = True  # type: ignore[attr-defined]  # a checkpoint can be saved together
    if error is not None:
        raise error
