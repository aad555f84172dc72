"""A second device, pretended on the CPU: it records every operation that mixes its tensors with those of the host.

PyTorch computes on `cpu:1` as on `cpu` and forgets the index. Within `PretendedDevice`, the memory that was moved to
`cpu:1`, or computed from such memory, is remembered, and tensors report that device.
"""

import traceback
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEVICE = torch.device("cpu", 1)
aten = torch.ops.aten
MAY_MIX = {aten._to_copy.default, aten.copy_.default, aten.index.Tensor, aten.index_put_.default}
"""Copies, and those that a GPU allows with an index on the host."""


def tensors_of(value: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


class PretendedDevice:
    """A context in which `DEVICE` is another device than the host.

    Attributes:
        findings: Operations that would have failed on a GPU, with the line that they come from.
        syncs: How often the host waited for a number of the device.
    """

    def __init__(self) -> None:
        self.findings: list[str] = []
        self.syncs = 0
        self.inside = False  # a function of PyTorch that was given a tensor of the device
        self._memory: dict[int, StorageWeakRef] = {}
        self._modes = ExitStack()

    def __enter__(self) -> "PretendedDevice":
        self._modes.enter_context(Functions(self))
        self._modes.enter_context(Operations(self))
        return self

    def __exit__(self, *error) -> None:
        self._modes.close()

    def holds(self, tensor: Tensor) -> bool:
        return StorageWeakRef(tensor.untyped_storage()).cdata in self._memory

    def place(self, value: Any, here: bool) -> None:
        for tensor in tensors_of(value):
            storage = StorageWeakRef(tensor.untyped_storage())
            if here:
                self._memory.setdefault(storage.cdata, storage)
            else:
                self._memory.pop(storage.cdata, None)

    def report(self, operation: Any) -> None:
        stack = traceback.extract_stack()
        place = next((frame for frame in reversed(stack) if "/lit_rlhf/" in frame.filename), stack[0])
        self.findings.append(f"{operation} at {place.filename}:{place.lineno}: {place.line}")


class Operations(TorchDispatchMode):
    """Checks every operation, those of the backward pass too, and remembers where its result is."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        device, kwargs = self.device, kwargs or {}
        given = tensors_of((args, kwargs))
        here = [device.holds(tensor) for tensor in given]
        host = [tensor for tensor, held in zip(given, here, strict=True) if not held and tensor.ndim > 0]
        if any(here) and (host if operation not in MAY_MIX else not here[0] and operation is aten.index.Tensor):
            device.report(operation)
        device.syncs += operation is aten._local_scalar_dense.default and any(here)
        result = operation(*args, **kwargs)
        if operation is aten.copy_.default:
            return result
        if any(here) or kwargs.get("device") == DEVICE or (not given and device.inside):
            device.place(result, True)
        return result


class Functions(TorchFunctionMode):
    """Reports the device of a tensor, and copies from the device to the host."""

    def __init__(self, device: PretendedDevice) -> None:
        super().__init__()
        self.device = device

    def __torch_function__(self, function, types, args=(), kwargs=None):
        device, kwargs = self.device, kwargs or {}
        if getattr(function, "__self__", None) is Tensor.device and device.holds(args[0]):
            return DEVICE
        if function is Tensor.numpy and device.holds(args[0]):
            device.report("numpy")
        device.inside = any(device.holds(tensor) for tensor in tensors_of((args, kwargs)))
        if function in (Tensor.to, Tensor.cpu) and device.inside:
            return self._moved(function, *args, **kwargs)
        try:
            result = function(*args, **kwargs)
        finally:
            device.inside = False
        if (target := kwargs.get("device")) is not None and isinstance(result, Tensor):
            device.place(result, torch.device(target) == DEVICE)
        return result

    def _moved(self, function, tensor: Tensor, *args, **kwargs) -> Tensor:
        device, here = self.device, self.device.holds(tensor)
        device.inside = False
        if args and isinstance(args[0], Tensor):
            target, dtype = DEVICE if device.holds(args[0]) else torch.device("cpu"), args[0].dtype
        else:
            target, dtype = torch._C._nn._parse_to(*args, **kwargs)[:2] if function is Tensor.to else ("cpu", None)
        copy = tensor if dtype is None else tensor.to(dtype)
        if target is None or (torch.device(target) == DEVICE) == here:
            return copy
        device.syncs += here
        copy = copy.clone()
        device.place(copy, not here)
        return copy
