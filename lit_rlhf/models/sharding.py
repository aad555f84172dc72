"""Weights sharded over ranks (FSDP2): a group of weights per decoder layer, and one for the rest of a model.

With gradient, each layer's weights are gathered for its own passes, so all ranks must make the same passes in step.
Without gradient, as in sampling and scoring, a whole model is gathered first, and ranks may make as many passes as they
need.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Attributes:
        mesh: The ranks, in one dimension.
        precision: Dtypes in which weights are gathered and gradients are reduced.
    """

    mesh: DeviceMesh
    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)


class ShardedWeights:
    """The sharded weights of a module.

    Args:
        module: The module. Its weights become shards.
        sharding: How.
        methods: Names of its methods that run the model with gradient, and count as its forward passes. None may call
            another.
    """

    def __init__(self, module: nn.Module, sharding: Sharding, methods: Sequence[str] = ()) -> None:
        options: dict[str, Any] = {"mesh": sharding.mesh, "mp_policy": sharding.precision}
        for layer in decoder_layers(module):
            fully_shard(layer, **options, reshard_after_forward=True)
        fully_shard(module, **options, reshard_after_forward=False)  # the head is used after the forward pass
        for method in methods:
            register_fsdp_forward_method(module, method)
        self.root: Any = module
        self.is_gathered = False

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all weights within this context, without gradient. Enter it on all ranks."""
        if self.is_gathered:
            yield
            return
        self.root._get_fsdp_state()._lazy_init()  # otherwise a layer that runs first becomes the root
        parts = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        self.is_gathered = True
        try:
            yield
        finally:
            self.is_gathered = False
            for part in parts:
                part.reshard()
                part.set_reshard_after_forward(part is not self.root, recurse=False)


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of the `transformers` models in a module."""
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor with the shards of all ranks. Call it on all ranks."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def sharded_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Shard a whole tensor, equal on all ranks, as a parameter is sharded."""
    if not isinstance(parameter, DTensor):
        return tensor.to(parameter.device)
    device = parameter.to_local().device
    return distribute_tensor(tensor.to(device), parameter.device_mesh, parameter.placements, src_data_rank=None)


def from_local(shard: Tensor, parameter: Tensor) -> Tensor:
    """Return the tensor of which every rank gives its shard, sharded as a parameter is."""
    if not isinstance(parameter, DTensor):
        return shard.to(parameter.device)
    shard, shape = shard.to(parameter.to_local().device), parameter.shape
    return DTensor.from_local(
        shard, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=parameter.stride()
    )
