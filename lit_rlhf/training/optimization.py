"""The optimizer step: one mean over all loss terms of an update, the implementation of Adam, and its precision."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from lit_rlhf.errors import InputError
from lit_rlhf.models.sharding import local, whole


@dataclass
class LossSums:
    """Loss terms of the update in progress, on this rank.

    The mean runs over the whole update: every step that accumulates into it, on every rank. The number of terms is not
    known until the last step, so each step divides by an assumed count and the gradients are rescaled at the end.

    Attributes:
        total: Sum of the terms so far.
        count: Number of terms so far.
        assumed_count: Number of terms per step that the loss is divided by, equal on all ranks; 0 before a step.
    """

    total: float = 0.0
    count: int = 0
    assumed_count: float = 0.0

    def add(
        self, terms: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], assumed_count: float
    ) -> Float[Tensor, ""]:
        """Add the terms of a step and return its loss: their sum over the assumed count of the first step."""
        self.assumed_count = self.assumed_count or assumed_count
        total = terms.masked_fill(~mask, 0.0).sum()
        self.total += float(total.detach())
        self.count += int(mask.sum())
        return total / self.assumed_count


def scale_gradients(optimizer: Optimizer, factor: float) -> None:
    """Multiply the gradients of all parameters by a factor."""
    if factor == 1:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(factor)


def gradient_norms(optimizer: Optimizer, device: torch.device) -> dict[str, Tensor]:
    """Return the gradient norm of each parameter group: `grad_norm` of the first, `NAME_grad_norm` of others."""
    norms = {}
    for group in optimizer.param_groups:
        prefix = "" if group is optimizer.param_groups[0] else f"{group['name']}_"
        gradients = [p.grad for p in group["params"] if p.grad is not None]
        norms[f"{prefix}grad_norm"] = whole(torch.nn.utils.get_total_norm(gradients)).to(device).float()
    return norms


def enable_fused_adam(optimizer: Optimizer) -> None:
    """Enable fused Adam unless `fused` or `foreach` was set: one pass over weights and moments instead of many.

    The result is equal up to rounding. The flag is set here and not in the constructor, since with the latter Lightning
    leaves unscaling, and with it gradient clipping, to the optimizer; where it was set there, this is undone.
    """
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        plain = all(type(p.data) is Tensor and p.device.type in ("cpu", "cuda") for p in group["params"])
        if plain and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


def check_trainable(groups: list[dict[str, Any]], loaded_adapter: bool) -> None:
    """Check that every parameter group has a parameter to train.

    Args:
        groups: The groups, with their names.
        loaded_adapter: Whether the policy is an adapter, for the message.

    Raises:
        ValueError: If one has none.
    """
    hint = "load its adapter with is_trainable=True" if loaded_adapter else "give `lora` to train a new adapter"
    for group in groups:
        if not group["params"]:
            name = group["name"]
            raise InputError(f"the {name} has no trainable parameter{f': {hint}' * (name == 'policy')}")


def check_optimized(parameters: Iterable[tuple[str, Parameter]], groups: list[dict[str, Any]]) -> None:
    """Check that the optimizer has exactly the trainable parameters of the module.

    Args:
        parameters: All parameters of the module by name.
        groups: The parameter groups.

    Raises:
        ValueError: If one is missing, or is not part of the module: it would be neither synchronized nor saved.
    """
    trainable = {p: name for name, p in parameters if p.requires_grad}
    optimized = {p for group in groups for p in group["params"]}
    if missing := [name for p, name in trainable.items() if p not in optimized]:
        raise InputError(
            f"the parameter {missing[0]!r} ({len(missing)} in all) is trainable, but in no parameter group: return it "
            "from parameter_groups, or call requires_grad_(False)"
        )
    if foreign := [p for p in optimized if p not in trainable]:
        raise InputError(
            f"parameter_groups returns {len(foreign)} parameters, of shape {tuple(foreign[0].shape)} and others, that "
            "are not trainable parameters of the module, so no checkpoint would hold them: make their module an "
            "attribute of the algorithm"
        )


def check_updates_shards(optimizer: Optimizer, sharded: bool) -> None:
    """Check that an optimizer can update weights if they are sharded.

    Raises:
        ValueError: If not: Adafactor adds up rows and columns, and the kernels of bitsandbytes take plain tensors.
    """
    kind = type(optimizer)
    if sharded and (issubclass(kind, torch.optim.Adafactor) or kind.__module__.startswith("bitsandbytes")):
        raise InputError(
            f"{kind.__name__} can't update sharded weights: use torch.optim.AdamW, whose state is sharded, too, or "
            "--trainer.strategy ddp"
        )


def check_step_size(optimizer: Optimizer, has_adapter: bool = False) -> None:
    """Refuse 16-bit weights that the learning rate cannot change.

    An Adam step changes a weight by about the learning rate. bfloat16 rounds away changes below 1/512 of the weight,
    float16 below 1/4096.

    Raises:
        ValueError: If most steps would be rounded away.
    """
    for group in optimizer.param_groups:
        for dtype in (torch.bfloat16, torch.float16):
            weights = [shard for p in group["params"] if p.dtype == dtype and (shard := local(p.detach())).numel()]
            medians = [weight.abs().float().median() for weight in weights]
            nonzero = [size for size in medians if size > 0]  # half of a new adapter is 0, which any step changes
            if not nonzero:
                continue
            needed = float(torch.stack(nonzero).median()) * torch.finfo(dtype).eps / 4
            rate = max(group["lr"], group.get("initial_lr", 0.0))
            if rate < needed:
                raise InputError(
                    f"the trained weights are {str(dtype).removeprefix('torch.')}, and a learning rate of {rate:g} is "
                    f"too small to change them (about {needed:.1g} is needed): load them in float32 with "
                    f"--trainer.precision bf16-mixed{'' if has_adapter else ', or train `lora`'}"
                )
