"""A fingerprint of a model's weights, to notice that a run would continue from, or be merged into, another model."""

from __future__ import annotations

import hashlib
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lit_rlhf.models.sharding import whole

SAMPLES = 64
"""Values of each weight that are hashed one by one, beside the sum over all of them."""
INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def fingerprint(model: Any, skip: Collection[str] = ()) -> str:
    """Hash all weights of a model, and buffers that are saved.

    It is the same on every device, for any names, number of threads and repeated layers: the sums are of the weights'
    bits as integers, so they are exact in any order. A layer that an adapter's `layer_replication` repeats counts once,
    as does a tied weight.

    Call it on all ranks if the weights are sharded.

    Args:
        model: The model, or a PEFT model around it.
        skip: Parts of names to leave out: those of adapters, or a new head, which is in no folder.
    """
    weights = {
        id(weight): weight
        for name, weight in model.state_dict(keep_vars=True).items()
        if isinstance(weight, Tensor) and weight.device.type != "meta" and not set(skip) & set(name.split("."))
    }
    return hashlib.sha256("\n".join(sorted(map(_digest, weights.values()))).encode()).hexdigest()


def _digest(weight: Tensor) -> str:
    flat = whole(weight.detach()).reshape(-1)
    bits = flat.view(INTEGERS[flat.element_size()]) if flat.numel() else flat.to(torch.int32)
    chosen = bits[:: max(1, bits.numel() // SAMPLES)].tolist()
    return f"{tuple(weight.shape)} {weight.dtype} {int(bits.sum(dtype=torch.int64))} {chosen}"
