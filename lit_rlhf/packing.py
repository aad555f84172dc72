"""Linear layers of few rows on a processor: weights laid out once for all tokens of a decoding, not at every product.

A matrix product first lays its operands out for the kernel. Of a thousand rows that is little; of sixteen, as decoding
has them, it is most of the time. oneDNN, which comes with torch, can keep what it has laid out. Its two operations in
torch are those of `torch.compile`, and not documented: they are tried before they are used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST = 2**16
"""Elements of a weight below which a call costs more than the layout."""


@contextlib.contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within it the model's linear layers compute with a copy of their weights as they are now, without gradient.

    The copy is as large as the weights, and gone afterwards. Nothing changes where a layer is no plain
    `torch.nn.Linear`, is not on a processor, or oneDNN is absent or switched off (`torch.backends.mkldnn.enabled`).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and can_pack(layer)]
    for layer in layers:
        layer.forward = packed(layer.weight.detach(), layer.bias)  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward


def can_pack(layer: nn.Linear) -> bool:
    """Whether it is plain, whole, on a processor, and large enough to gain."""
    weight = layer.weight
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # somebody has put another there
        and type(weight.data) is Tensor
        and weight.shape == (layer.out_features, layer.in_features)
        and weight.device.type == "cpu"
        and weight.numel() >= SMALLEST
        and available(dtype_of_product(weight))
    )


def dtype_of_product(weight: Tensor) -> torch.dtype:
    """In what a product with this weight is computed, under autocast too."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else weight.dtype


def packed(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """`torch.nn.functional.linear` with this weight and bias."""
    dtype = dtype_of_product(weight)
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
    bias = None if bias is None else bias.detach().to(dtype)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda rows: linear(rows.to(dtype), laid_out, bias, "none", [], "")


def available(dtype: torch.dtype) -> bool:
    """Whether oneDNN is there and switched on, and does with this type what it should."""
    mkldnn: Any = torch.backends.mkldnn
    return mkldnn.is_available() and mkldnn.enabled and works(dtype)


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Whether the two operations are there and right."""
    weight = torch.linspace(-1, 1, 32 * 16).view(32, 16).to(dtype)
    rows, bias = weight[:3].flip(0), torch.linspace(-1, 1, 32).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            found = packed(weight, bias)(rows)
            expected = nn.functional.linear(rows, weight, bias)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
    return found.dtype == dtype and torch.allclose(found, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
