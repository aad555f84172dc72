"""Linear layers of few rows: weights prepared once for all tokens of a decoding, not at every product.

On a processor a matrix product first lays its operands out for the kernel. Of a thousand rows that is little; of
sixteen, as decoding has them, it is most of the time. oneDNN, which comes with torch, can keep what it has laid out.
Its two operations in torch are those of `torch.compile`, and not documented: they are tried before they are used.

Under autocast a product first casts its weight. A token of few rows takes no longer than reading the weights does, so
to read them in float32 and write and read them in bfloat16 is four times of that; here they are cast once.
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


Product = Callable[[Tensor], Tensor]
"""`torch.nn.functional.linear` with a weight and bias of its own."""


@contextlib.contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Within it the model's linear layers compute with a copy of their weights as they are now, without gradient.

    The copy is gone afterwards. It is as large as the weights in the dtype of the product. Nothing changes where a
    layer is no plain `torch.nn.Linear`, and where there is nothing to prepare: on an accelerator without autocast, or
    where oneDNN is absent or switched off (`torch.backends.mkldnn.enabled`).
    """
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear) and is_plain(layer)]
    products = {layer: product for layer in layers if (product := prepared(layer.weight.detach(), layer.bias))}
    for layer, product in products.items():
        layer.forward = product  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        for layer in products:
            del layer.forward


def is_plain(layer: nn.Linear) -> bool:
    """Whether it computes what its class says, with the whole of its weight, and is large enough to gain."""
    weight = layer.weight
    return (
        type(layer) is nn.Linear
        and "forward" not in vars(layer)  # somebody has put another there
        and type(weight.data) is Tensor
        and weight.shape == (layer.out_features, layer.in_features)
        and weight.numel() >= SMALLEST
    )


def prepared(weight: Tensor, bias: Tensor | None) -> Product | None:
    """The product with this weight, prepared; None where nothing would be gained."""
    dtype = dtype_of_product(weight)
    if weight.device.type == "cpu" and available(dtype):
        return packed(weight, bias)
    return None if dtype == weight.dtype else cast_once(weight, bias)


def dtype_of_product(weight: Tensor) -> torch.dtype:
    """In what a product with this weight is computed, under autocast too, which leaves float64 alone."""
    device = weight.device.type
    under = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if under and weight.dtype != torch.float64 else weight.dtype


def cast_once(weight: Tensor, bias: Tensor | None) -> Product:
    """The product with a copy of the weight in the dtype that it is computed in."""
    dtype = dtype_of_product(weight)
    copy = weight.to(dtype)
    bias = None if bias is None else bias.detach().to(dtype)
    return lambda rows: nn.functional.linear(rows.to(dtype), copy, bias)


def packed(weight: Tensor, bias: Tensor | None) -> Product:
    """The product with a copy of the weight that oneDNN has laid out."""
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
