"""Weights sharded over ranks (FSDP2): a group of weights per decoder layer, and one for the rest of a model.

With gradient, each layer's weights are gathered for its own passes, so all ranks must make the same passes in step.
Without gradient, as in sampling and scoring, a whole model is gathered first, and ranks may make as many passes as they
need; by choice these passes, too, are made in step, for models that no rank can hold as a whole.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import PreTrainedModel

T = TypeVar("T")


@dataclass(frozen=True)
class Sharding:
    """How weights are sharded.

    Attributes:
        mesh: The ranks, in one dimension.
        precision: Dtypes in which the weights of decoder layers are gathered and their gradients are reduced. All
            other weights are gathered as they are, so that hidden states are added up, and heads computed, in the
            precision of one process under autocast.
        gather: Whether a whole model is gathered for passes without gradient.
    """

    mesh: DeviceMesh
    precision: MixedPrecisionPolicy = field(default_factory=MixedPrecisionPolicy)
    gather: bool = True

    @property
    def is_first(self) -> bool:
        """Whether this is the first rank."""
        return self.mesh.get_local_rank() == 0

    def from_first(self, value: T) -> T:
        """Return the value of the first rank. Call it on all ranks."""
        values = [value]
        torch.distributed.broadcast_object_list(values, group=self.mesh.get_group(), group_src=0)
        return values[0]

    def any_rank(self, flag: bool) -> bool:
        """Return whether the flag is set on any rank. Call it on all ranks."""
        flags = torch.tensor(float(flag), device=device_of(self.mesh))
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, group=self.mesh.get_group())
        return bool(flags)


class ShardedWeights:
    """The sharded weights of a module.

    Args:
        module: The module. Its weights become shards. Ranks whose weights are on the meta device, where they have no
            storage, get those of the first rank.
        sharding: How.
        methods: Names of its methods that run the model with gradient, and count as its forward passes. None may call
            another.
    """

    def __init__(self, module: nn.Module, sharding: Sharding, methods: Sequence[str] = ()) -> None:
        first_ranks = {name: p.detach() for name, p in module.named_parameters()}
        empty = sharding.any_rank(any(weight.is_meta for weight in first_ranks.values()))
        mesh = sharding.mesh
        for layer in decoder_layers(module):
            fully_shard(layer, mesh=mesh, mp_policy=sharding.precision, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=False)  # the head is used after the forward pass
        for method in methods:
            register_fsdp_forward_method(module, method)
        # an operation in place would lose FSDP2's hook on a view; there is none
        warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
        if empty:
            scatter(module, first_ranks, sharding)
        self.root: Any = module
        self.sharding = sharding
        self.is_gathered = False

    @contextlib.contextmanager
    def without_gradient(self) -> Iterator[None]:
        """Prepare passes without gradient within this context. Enter it on all ranks.

        The whole model is gathered, or else what is not part of a layer; each layer then takes all ranks in step.
        """
        if self.is_gathered or self.sharding.gather:
            with self.gathered():
                yield
            return
        self.root._get_fsdp_state()._lazy_init()
        sharded = [] if has_whole_weights(self.root) else [self.root]
        self.root.unshard()
        try:
            yield
        finally:
            for part in sharded:
                part.reshard()

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Hold all weights within this context. Enter it on all ranks.

        Gradients are not reduced: take those that you need by `torch.autograd.grad`, each rank its own.
        """
        if self.is_gathered:
            yield
            return
        self.root._get_fsdp_state()._lazy_init()  # otherwise a layer that runs first becomes the root
        parts = [module for module in self.root.modules() if isinstance(module, FSDPModule)]
        sharded = [part for part in parts if not has_whole_weights(part)]
        self._stay_gathered(True)
        for part in parts:
            part.unshard()
        self.is_gathered = True
        try:
            yield
        finally:
            self.is_gathered = False
            for part in sharded:
                part.reshard()
            self._stay_gathered(False)

    def _stay_gathered(self, stay: bool) -> None:
        self.root.set_reshard_after_forward(not stay)
        self.root.set_reshard_after_forward(False, recurse=False)
        self.root.set_reshard_after_backward(not stay)
        self.root.set_requires_gradient_sync(not stay)


def has_whole_weights(part: Any) -> bool:
    """Whether the weights of a sharded part are gathered: of a model after a pass whose gradient is still to come."""
    group = part._get_fsdp_state()._fsdp_param_group
    return group is not None and bool(group.is_unsharded)


def decoder_layers(module: nn.Module) -> list[nn.Module]:
    """Return the decoder layers of the `transformers` models in a module."""
    models = [part for part in module.modules() if isinstance(part, PreTrainedModel)]
    names = {name for model in models for name in model._no_split_modules or ()}
    return [part for part in module.modules() if type(part).__name__ in names]


@torch.no_grad()
def scatter(module: nn.Module, weights: dict[str, Tensor], sharding: Sharding) -> None:
    """Give every rank its shards of the weights, and the buffers, of the first rank.

    Args:
        module: The sharded module, on the other ranks without storage.
        weights: On the first rank the whole weights by name.
        sharding: The ranks.
    """
    mesh, first = sharding.mesh, sharding.is_first
    group, device = mesh.get_group(), device_of(mesh)
    if not first:
        module.to_empty(device=device)
    for name, parameter in module.named_parameters():
        weight = weights[name] if first else torch.empty(parameter.shape, dtype=parameter.dtype)
        sharded: Any = parameter
        sharded.to_local().copy_(distribute_tensor(weight.to(device), mesh, sharded.placements).to_local())
    for buffer in module.buffers():
        values = buffer.to(device)
        torch.distributed.broadcast(values, group=group, group_src=0)
        buffer.copy_(values)


def device_of(mesh: DeviceMesh) -> torch.device:
    """Return this rank's device."""
    if mesh.device_type == "cpu":
        return torch.device("cpu")
    return torch.device(mesh.device_type, torch.get_device_module(mesh.device_type).current_device())


def is_sharded(tensor: Tensor) -> bool:
    """Whether each rank holds a shard of a tensor."""
    return isinstance(tensor, DTensor)


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
