"""Run code on tensors without storage, and count the bytes that they would hold.

Floating-point tensors are fake: they have a shape and a dtype, and every operation returns another fake one. Token ids
and masks are real, since code looks into them. Nothing is computed, so a pass of a large model takes seconds.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

LARGE = 2**22
"""Elements above which what is broadcast from small tensors, such as a mask of attention, is fake, too."""


class Rehearsal(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count the bytes of all tensors that are made within this context and still held.

    Args:
        fake: The mode that the weights are fake tensors of.
        weights: Tensors that exist already, and are not counted.

    Attributes:
        held: Bytes held now.
        peak: Most bytes held so far.
    """

    def __init__(self, fake: FakeTensorMode, weights: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.fake, self.held, self.peak = fake, 0, 0
        self._known: Any = WeakIdKeyDictionary()
        for weight in weights:
            self._known[weight.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        """Run an operation, and count what it returns."""
        kwargs = kwargs or {}
        inputs = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        dtype = kwargs.get("dtype")
        faked = any(isinstance(tensor, FakeTensor) for tensor in inputs)
        if faked and func in DECIDED:
            return torch.tensor(DECIDED[func])
        if faked or (not inputs and dtype is not None and dtype.is_floating_point):
            with self.fake:
                outputs = func(*args, **kwargs)
        else:
            outputs = func(*args, **kwargs)
            if isinstance(outputs, Tensor) and outputs.numel() > max(LARGE, 2 * sum(x.numel() for x in inputs)):
                outputs = self.fake.from_tensor(outputs)
        self.count(tree_leaves(outputs))
        return outputs

    def count(self, values: Iterable[Any]) -> None:
        """Count tensors, once each; other values are none."""
        for tensor in values:
            if isinstance(tensor, Tensor) and (storage := tensor.untyped_storage()) not in self._known:
                self._known[storage] = True
                size = storage.nbytes()
                self.held += size
                self.peak = max(self.peak, self.held)
                weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.held -= size


DECIDED = {torch.ops.aten.all.default: True, torch.ops.aten.any.default: False}
"""What is assumed of numbers: all of them are finite, and no completion ends."""


def without_storage(modules: Iterable[nn.Module], fake: FakeTensorMode) -> None:
    """Replace the weights of modules, on the meta device, by fake tensors of the CPU. Shared ones stay shared."""
    replaced: dict[int, Tensor] = {}

    def replacement(tensor: Tensor) -> Tensor:
        if id(tensor) not in replaced:
            if tensor.is_floating_point():
                with fake:
                    new = torch.empty(tensor.shape, dtype=tensor.dtype)
            else:
                new = torch.zeros(tensor.shape, dtype=tensor.dtype)
            trained = tensor.requires_grad
            replaced[id(tensor)] = nn.Parameter(new, trained) if isinstance(tensor, nn.Parameter) else new
            replaced[id(replaced[id(tensor)])] = replaced[id(tensor)]
        return replaced[id(tensor)]

    kept: list[Tensor] = []  # so that no id is used twice
    for part in [part for module in modules for part in module.modules()]:
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    kept.append(tensor)
                    tensors[name] = replacement(tensor)  # type: ignore[assignment]


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors; one given twice counts once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())
