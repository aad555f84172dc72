"""Weights that wait in main memory while they are not used."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf.errors import InputError

OPTIONS = "offload_reference", "offload_critic"
"""Options of algorithms that ask for it."""


class OffloadedWeights:
    """Frozen weights that stay in main memory, and are copied to a device for each use.

    Args:
        module: The module.
        device: The device.
        shared: Weights of it that another model has on the device, and that stay there.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, shared: Collection[Tensor] = ()) -> None:
        self.device = torch.device(device)
        on_device = {id(tensor) for tensor in shared}
        own = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in on_device]
        self._kept = [(tensor, self._in_main_memory(tensor.data)) for tensor in own]
        self._uses = 0
        self._leave()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the weights on the device within this context."""
        self._uses += 1
        try:
            if self._uses == 1:
                for tensor, kept in self._kept:
                    tensor.data = kept.to(self.device, non_blocking=True)
            yield
        finally:
            self._uses -= 1
            if not self._uses:
                self._leave()

    def _leave(self) -> None:
        for tensor, kept in self._kept:
            tensor.data = kept

    def _in_main_memory(self, weights: Tensor) -> Tensor:
        weights = weights.to("cpu")
        return weights.pin_memory() if self.device.type == "cuda" else weights


@contextlib.contextmanager
def in_main_memory(module: nn.Module, optimizer: Optimizer | None) -> Iterator[None]:
    """Keep trained weights, and the optimizer's state of them, in main memory within this context.

    Args:
        module: The module.
        optimizer: Its optimizer, which may have other parameters, too.
    """
    states: list[Any] = [] if optimizer is None else [optimizer.state.get(p, {}) for p in module.parameters()]
    state = [value for values in states for value in values.values() if isinstance(value, Tensor)]
    tensors = [*module.parameters(), *module.buffers(), *state]
    devices = [tensor.device for tensor in tensors]
    try:
        for tensor in tensors:
            tensor.data = tensor.data.to("cpu")
        yield
    finally:
        for tensor, device in zip(tensors, devices, strict=True):
            tensor.data = tensor.data.to(device)


def check_offload(options: Sequence[str], device: torch.device, sharded: bool) -> None:
    """Check that models can be offloaded from a device, and warn if that changes nothing.

    Args:
        options: Names of the options that ask for it.
        device: The device.
        sharded: Whether models are sharded over devices.

    Raises:
        ValueError: If they are sharded.
    """
    for name in options:
        if sharded:
            raise InputError(
                f"{name} can't be combined with --trainer.strategy fsdp2, which splits all models over the devices: "
                "leave it out, or use --trainer.strategy ddp"
            )
        if device.type == "cpu":
            rank_zero_warn(f"{name} has no effect on a CPU, where all models are in main memory")
