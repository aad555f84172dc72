"""Faster kernels for a CPU. Nothing in this file changes what an accelerator computes.

`cpu_attention` replaces the call of PyTorch's `scaled_dot_product_attention` in `transformers`, which suits
accelerators. On a CPU other computations are faster and need less memory:

- With grouped queries and a mask, `transformers` repeats the keys and values for every query head, and the backward
  pass keeps all of that. The kernel here reads them shared, with the same result.
- The backward pass in bfloat16 takes five to ten times as long as in float32, so it is done in float32.
- For a single token, grouped queries without a mask take three to ten times as long in bfloat16 as when the queries of
  one key are rows of one matrix.

`packed_product` prepares the weight of a linear layer once for all tokens of a decoding. A matrix product first lays
out its operands for the kernel. For a thousand rows that costs little; for sixteen, as in decoding, it is most of the
time. oneDNN, which comes with PyTorch, can keep the layout. Its two operations in PyTorch are those of `torch.compile`
and not documented, so they are tried before they are used.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PACK_WEIGHTS = True
"""Whether decoding uses `packed_product`."""

Product = Callable[[Tensor], Tensor]
"""`torch.nn.functional.linear` with a given weight and bias."""


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype of a product with this tensor, under autocast too (which leaves float64 alone)."""
    device = tensor.device.type
    autocast = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast and tensor.dtype != torch.float64 else tensor.dtype


# Attention


@contextlib.contextmanager
def cpu_attention() -> Iterator[None]:
    """Let models whose attention implementation is `sdpa` compute it by `attention` within this context.

    The name in their configuration stays, since some models check it. Nothing changes if the user has registered
    another function of that name.
    """
    if ALL_ATTENTION_FUNCTIONS["sdpa"] is not sdpa_attention_forward:
        yield
        return
    ALL_ATTENTION_FUNCTIONS["sdpa"] = attention
    try:
        yield
    finally:
        with contextlib.suppress(KeyError):  # another thread has removed it
            del ALL_ATTENTION_FUNCTIONS["sdpa"]  # type: ignore[no-untyped-call]


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Compute the same as `sdpa_attention_forward` of `transformers`, and call that one for other devices.

    Args:
        module: The layer.
        query: `[rows, query heads, tokens, features]`.
        key: `[rows, key heads, past and tokens, features]`; each key head serves the same number of query heads.
        value: Like the key.
        attention_mask: True where a token may be attended to, or numbers to add. None: all previous tokens.
        dropout: Probability.
        scaling: Factor of the products; by default one over the square root of the number of features.
        is_causal: Whether a token attends to previous tokens only, if there is no mask; by default the layer's own.
        **others: Arguments of other kinds of attention.

    Returns:
        `[rows, tokens, query heads, features]`, and None for the weights, which are not kept.
    """
    (rows, heads, length, _), key_heads = query.shape, key.shape[1]
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    causal = causal and length > 1 and attention_mask is None
    special = any(others.get(name) is not None for name in ("softcap", "position_bias", "cache"))
    if query.device.type != "cpu" or special or (causal and key.shape[2] != length):
        return sdpa_attention_forward(  # type: ignore[no-any-return, no-untyped-call]
            module, query, key, value, attention_mask, dropout, scaling, is_causal, **others
        )
    dtype = compute_dtype(query)
    single = length == 1 and (attention_mask is None or attention_mask.shape[1] == 1)
    inside = torch.float32 if dtype in (torch.bfloat16, torch.float16) and not single else dtype
    query, key, value = query.to(inside), key.to(inside), value.to(inside)
    if attention_mask is not None and attention_mask.is_floating_point():
        attention_mask = attention_mask.to(inside)
    if single:
        query = query.reshape(rows, key_heads, heads // key_heads, -1)
    with torch.autocast("cpu", enabled=False):
        attended = nn.functional.scaled_dot_product_attention(
            query, key, value, attention_mask, dropout, causal, scale=scaling, enable_gqa=query.shape[1] != key_heads
        )
    return attended.reshape(rows, heads, length, -1).transpose(1, 2).to(dtype).contiguous(), None


# Linear layers of few rows


def packed_product(weight: Tensor, bias: Tensor | None) -> Product | None:
    """Return the product with a copy of the weight in oneDNN's layout; None on other devices or without oneDNN."""
    mkldnn: Any = torch.backends.mkldnn
    available = PACK_WEIGHTS and weight.device.type == "cpu" and mkldnn.is_available() and mkldnn.enabled
    return pack(weight, bias) if available and packing_works(compute_dtype(weight)) else None


def pack(weight: Tensor, bias: Tensor | None) -> Product:
    """Copy the weight into oneDNN's layout and return the product with it."""
    dtype = compute_dtype(weight)
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype), None)
    bias = None if bias is None else bias.detach().to(dtype)
    linear = torch.ops.mkldnn._linear_pointwise
    return lambda rows: linear(rows.to(dtype), packed, bias, "none", [], "")


@functools.cache
def packing_works(dtype: torch.dtype) -> bool:
    """Whether the two operations exist and are right for this dtype."""
    weight = torch.linspace(-1, 1, 32 * 16).view(32, 16).to(dtype)
    rows, bias = weight[:3].flip(0), torch.linspace(-1, 1, 32).to(dtype)
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            found = pack(weight, bias)(rows)
            expected = nn.functional.linear(rows, weight, bias)
        except (AttributeError, NotImplementedError, RuntimeError, TypeError):
            return False
    return found.dtype == dtype and torch.allclose(found, expected, rtol=0, atol=16 * torch.finfo(dtype).eps)
