"""Running sums that stay exact: a count in bfloat16 ends at 256."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def keep_float64(module: nn.Module, apply: Callable[[], Any]) -> None:
    """Let `apply` move and cast a module, and put its own float64 buffers back as they were, on their new device."""
    before = {name: b for name, b in module.named_buffers(recurse=False) if b.dtype == torch.float64}
    apply()
    for name, buffer in before.items():
        setattr(module, name, buffer.to(getattr(module, name).device))


@contextlib.contextmanager
def unchanged_on_error(buffers: Sequence[Tensor]) -> Iterator[None]:
    """Put buffers back as they were if something is raised: a checkpoint written then has nothing of a lost step."""
    before = [buffer.clone() for buffer in buffers]
    try:
        yield
    except BaseException:
        for buffer, kept in zip(buffers, before, strict=True):
            buffer.copy_(kept)
        raise
