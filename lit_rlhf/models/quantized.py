"""Models with quantized weights: adapters on them are trained, and merged into what the weights stand for."""

from __future__ import annotations

import copy
import math
from typing import Any, cast

import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from lit_rlhf.errors import InputError

BLOCK, BLOCK_OF_SCALES, DOUBLE = 64, 256, "bnb_4bit_use_double_quant"
"""Weights that share a scale in 4 bits; and scales that do, if they are quantized, too."""


def is_quantized(model: Any) -> bool:
    """Whether a `transformers` model, or the one inside a PEFT model, has quantized weights."""
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    return bool(getattr(model, "is_quantized", False))


def keep_layout(model: nn.Module) -> None:
    """Keep 4-bit weights as they are on a CPU.

    bitsandbytes lays them out anew for some CPUs, on the first pass in evaluation mode, and such layers have no
    gradient from then on.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def check_can_train(model: Any, loaded: bool) -> None:
    """Check that what is trained of a quantized model is an adapter, and that checkpoints can do without the rest.

    Args:
        model: The model.
        loaded: Whether its weights can be read again from its source.

    Raises:
        ValueError: If not.
    """
    if not is_quantized(model):
        return
    if not isinstance(model, PeftModel):
        raise InputError(
            "the policy's weights are quantized, so they can't be trained: give `lora` to train an adapter"
        )
    if not loaded:
        raise InputError(
            "the policy is quantized and in memory, where no checkpoint finds its weights again: give its folder or "
            "hub id, with quantization_config in `load`"
        )


def check_unsharded(load: dict[str, Any], sharded: bool) -> None:
    """Check that no quantized model is sharded.

    Raises:
        ValueError: If one would be.
    """
    if sharded and load.get("quantization_config") is not None:
        raise InputError(
            "quantized weights can't be sharded: use --trainer.strategy ddp, or leave quantization_config out"
        )


def plan_quantization(model: Any, options: Any) -> None:
    """Note in the linear layers of a model how many bytes each would have with quantized weights (bitsandbytes).

    Args:
        model: A model without storage.
        options: Its `quantization_config`.

    Raises:
        ValueError: If it is of another method.
    """
    from transformers.quantizers.base import get_keys_to_not_convert
    from transformers.quantizers.quantizers_utils import should_convert_module

    config = options if isinstance(options, dict) else options.to_dict()
    four_bits = bool(config.get("load_in_4bit"))
    if not (four_bits or config.get("load_in_8bit")):
        raise InputError(
            "lit-rlhf memory counts weights that bitsandbytes quantizes (load_in_4bit or load_in_8bit), and these are "
            f"quantized by {config.get('quant_method') or 'another method'}"
        )
    kept = config.get("llm_int8_skip_modules") or get_keys_to_not_convert(model)
    for name, layer in model.named_modules():
        if type(layer) is nn.Linear and should_convert_module(name, kept):
            count, rows = layer.weight.numel(), layer.weight.shape[0]
            blocks = math.ceil(count / BLOCK)
            scales = blocks + 4 * math.ceil(blocks / BLOCK_OF_SCALES) if config.get(DOUBLE) else 4 * blocks
            layer.quantized_bytes = math.ceil(count / 2) + scales if four_bits else count + 4 * rows  # type: ignore[assignment]


def dequantized_bytes(model: nn.Module) -> int:
    """Return the bytes of the largest layer of a model whose quantized weights are expanded for its pass."""
    layers: list[Any] = [layer for layer in model.modules() if hasattr(layer, "quantized_bytes")]
    return max((layer.weight.numel() * layer.weight.element_size() for layer in layers), default=0)


def quantized_layers(module: nn.Module) -> tuple[str, ...]:
    """Return the prefixes in the `state_dict` of layers with quantized weights."""
    weights = {name: p for name, p in module.named_parameters() if not p.is_floating_point()}
    return tuple(name.removesuffix("weight") for name in weights)


def dequantized(model: PeftModel) -> PeftModel:
    """Return an adapter on a copy of its model in float32: the values that the quantized weights stand for."""
    name, adapter = model.active_adapter, get_peft_model_state_dict(model, save_embedding_layers=False)
    config, base = model.active_peft_config, cast(Any, copy.deepcopy(model).unload())
    plain = base.dequantize(torch.float32).float()
    result = cast(PeftModel, get_peft_model(plain, config, name))
    set_peft_model_state_dict(result, adapter, name)
    return result
