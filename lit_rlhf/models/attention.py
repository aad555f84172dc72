"""Attention on a processor, for models that leave it to `scaled_dot_product_attention` of PyTorch.

`transformers` calls that in the way that suits accelerators. On a processor, other ways are faster and hold less:

- Where query heads share a key (grouped queries) and there is a mask, it repeats the keys and values for every query
  head, and all of that is held for the backward pass. The kernel here reads them shared, with the same result.
- The backward pass in bfloat16 takes five to ten times as long as in float32, and so it is done in float32.
- For a single token, grouped queries without a mask take three to ten times as long in bfloat16 as when those of one
  key stand in rows beneath each other.
"""

from __future__ import annotations

import functools
import inspect
import sys
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lit_rlhf.models.packing import dtype_of_product

NAME = "sdpa_on_cpu"
"""What models call this in their configuration; it is not saved with them."""


def use_cpu_attention(model: nn.Module) -> None:
    """Make a model of `transformers` compute its attention by `attention`, where it would by PyTorch's otherwise.

    Models with another attention (chosen by their user, or written out in their class) stay as they are, and so do
    those whose code does something else where the attention has another name.
    """
    parts = [part for part in model.modules() if isinstance(part, PreTrainedModel)]  # a PEFT model holds one
    if any(map(asks_for_a_name, parts)):
        return
    for part in parts:
        if part.config._attn_implementation == "sdpa" and part._can_set_attn_implementation():
            part.set_attn_implementation(NAME)


def asks_for_a_name(model: PreTrainedModel) -> bool:
    """Whether the source of a model's class, or of those it inherits from, mentions the attention `sdpa` by its name.

    Gemma 4 does, to keep its masks where keys are shared by layers, and others do to apply a sparse attention.
    """
    classes = [c for c in type(model).__mro__ if issubclass(c, PreTrainedModel) and c is not PreTrainedModel]
    return any(mentions_sdpa(name) for name in {c.__module__ for c in classes})


@functools.cache
def mentions_sdpa(module: str) -> bool:
    """Whether the source of a module holds the name as a string; false where there is no source."""
    try:
        source = inspect.getsource(sys.modules[module])
    except (KeyError, OSError, TypeError):
        return False
    return '"sdpa"' in source or "'sdpa'" in source


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
    """Compute what `sdpa_attention_forward` of `transformers` does, and leave to that whatever is not on a processor.

    Args:
        module: The layer.
        query: `[rows, query heads, tokens, features]`.
        key: `[rows, key heads, past and tokens, features]`; every key head serves as many query heads.
        value: Like the key.
        attention_mask: True where a token may be looked at, or numbers to add; all those before it where None.
        dropout: Probability.
        scaling: Of the products; one by the root of the features where None.
        is_causal: Whether a token looks at none behind it, where there is no mask; what the layer says where None.
        **others: What other kinds of attention need.

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
    dtype = dtype_of_product(query)
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


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
