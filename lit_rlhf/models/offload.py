"""Weights that wait in main memory while they are not used."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf.errors import InputError

OPTIONS = "offload_reference", "offload_critic"
"""Options of algorithms that ask for it."""
OF_REWARD_MODEL = "offload of a reward model"
"""The option of `lit_rlhf.RewardModel`, as errors name it."""


class OffloadedWeights:
    """Frozen weights that stay in main memory, and are copied to a device for each use.

    Args:
        module: The module.
        device: The device.
        shared: Weights of it that another model has on the device, and that stay there.

    Raises:
        ValueError: If weights are quantized, which have more tensors than these.
    """

    def __init__(self, module: nn.Module, device: torch.device | str, shared: Collection[Tensor] = ()) -> None:
        self.device = torch.device(device)
        on_device = {id(tensor) for tensor in shared}
        if any(not parameter.is_floating_point() for parameter in module.parameters()):
            raise InputError("quantized weights can't be offloaded: leave out quantization_config, or the offloading")
        own = [t for t in (*module.parameters(), *module.buffers()) if id(t) not in on_device]
        self._kept = [(tensor, self._in_main_memory(tensor.data)) for tensor in own]
        self._uses, self._lock = 0, threading.Lock()  # a reward may be called in several threads
        self._leave()

    @contextlib.contextmanager
    def in_use(self) -> Iterator[None]:
        """Hold the weights on the device within this context."""
        with self._lock:
            if not self._uses:
                for tensor, kept in self._kept:
                    tensor.data = kept.to(self.device, non_blocking=True)
            self._uses += 1
        try:
            yield
        finally:
            with self._lock:
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


def check_offload(options: Sequence[str], device: torch.device, sharded: bool, world_size: int = 1) -> None:
    """Check that models can be offloaded from a device, and warn if that changes nothing.

    Args:
        options: Names of the options that ask for it.
        device: The device.
        sharded: Whether models are sharded over devices.
        world_size: Number of processes.

    Raises:
        ValueError: If they are sharded, or if a trained model would be offloaded that several processes share.
    """
    if "offload_critic" in options and world_size > 1 and not sharded:
        raise InputError(  # PyTorch forgets the hooks of a parameter that changes its device, and DDP needs them
            "offload_critic is for one process, since DDP can't follow weights that move: leave it out, or use "
            "--trainer.strategy fsdp2, which splits all models over the devices"
        )
    for name in options:
        if sharded:
            raise InputError(
                f"{name} can't be combined with --trainer.strategy fsdp2, which splits all models over the devices: "
                "leave it out"
            )
        if device.type == "cpu":
            rank_zero_warn(f"{name} has no effect on a CPU, where all models are in main memory")
