"""Running sums that stay exact: a count in bfloat16 ends at 256."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


def keep_float64(module: nn.Module, apply: Callable[[], Any]) -> None:
    """Let `apply` move and cast a module, and put its own float64 buffers back as they were, on their new device."""
    before = {name: b for name, b in module.named_buffers(recurse=False) if b.dtype == torch.float64}
    apply()
    for name, buffer in before.items():
        setattr(module, name, buffer.to(getattr(module, name).device))
