"""PEFT adapters: new ones, adapters of a folder, and merging into the base model."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PeftModelForCausalLM, get_peft_model, set_peft_model_state_dict
from peft.tuners.lora import Linear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.save_and_load import load_peft_weights
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils.hub import cached_file

from lit_rlhf.errors import InputError
from lit_rlhf.models.load_errors import explained
from lit_rlhf.models.pretrained import (
    base_model_of,
    download_options,
    listed,
    load_config,
    load_model,
    resolve,
    shared_options,
)
from lit_rlhf.models.quantized import dequantized, is_quantized

PLAIN_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""Values of `init_lora_weights` that leave the base model as it is."""


def load_adapter(
    loader: Any, source: str | Path, tokenizer: PreTrainedTokenizerBase, what: str, **options: Any
) -> tuple[PeftModel, bool]:
    """Load a trainable PEFT adapter on its base model.

    Args:
        loader: The class of the base model, with `from_pretrained`.
        source: The adapter's hub id or folder.
        tokenizer: The adapter's tokenizer.
        what: Name in messages.
        **options: Options of `from_pretrained`.

    Returns:
        The model, and whether the base model's embedding was resized for the adapter.

    Raises:
        ValueError: If it can't be loaded, or if adapter and base model don't fit together.
    """
    name, where = resolve(source), download_options(options)
    with explained(what):
        config = PeftConfig.from_pretrained(name, **where)
        check_adapter(config, what)
        if config.task_type not in (None, "CAUSAL_LM"):
            raise InputError(f"{what} is an adapter for {config.task_type}: give one of a causal language model")
        if not config.base_model_name_or_path:
            raise InputError(f"{what} names no base model in its adapter_config.json")
        file = adapter_weights(name, **options)
    base_options = {**shared_options(options), **({"revision": config.revision} if config.revision else {})}
    base_source = config.base_model_name_or_path
    base_name = f"{base_source!r}, the base model of {what},"
    with base_model_of(source):
        load_config(base_source, base_name, **base_options)
    base, _ = load_model(loader, base_source, base_name, **base_options)
    with explained(what), tied_weights():
        mapping = getattr(base, "_checkpoint_conversion_mapping", {})
        weights = load_peft_weights(str(file.parent), device="cpu", key_mapping=mapping)
        resized = fit_embedding(base, weights, len(tokenizer))
        config.inference_mode, config.task_type = False, "CAUSAL_LM"
        model = PeftModelForCausalLM(base, config)
        result: Any = set_peft_model_state_dict(model, weights)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    if missing := sorted(trained & set(result.missing_keys)):
        raise InputError(f"{what} lacks {listed(missing, model)}: it does not fit its adapter_config.json")
    if unexpected := sorted(result.unexpected_keys):
        raise InputError(
            f"{what} has {len(unexpected)} weights for layers that {base_source!r} lacks, such as {unexpected[0]!r}: "
            "give the base model that it was trained on"
        )
    return model, resized


def check_adapter(config: PeftConfig, what: str) -> None:
    """Check that an adapter trains layers, and fits its base model as that is in its folder.

    Raises:
        ValueError: If not.
    """
    if config.is_prompt_learning:
        raise InputError(f"{what} ({config.peft_type}) trains prompts, not layers: use LoRA or the like")
    if (start := getattr(config, "init_lora_weights", True)) not in PLAIN_STARTS:
        raise InputError(
            f"{what} has init_lora_weights={start!r}, which changed the base model that it was trained on: convert it, "
            "with path_initial_model_for_weight_conversion of PEFT's save_pretrained, or merge it"
        )


def check_adapted(model: PeftModel) -> None:
    """Check that a model in memory has one adapter, which training would change.

    Raises:
        ValueError: If not.
    """
    if len(model.peft_config) > 1:
        raise InputError(
            f"the policy has {len(model.peft_config)} adapters ({', '.join(model.peft_config)}): keep one, with "
            "delete_adapter"
        )
    check_adapter(model.active_peft_config, "the policy's adapter")
    if any(isinstance(module, BaseTunerLayer) and module.merged for module in model.modules()):
        raise InputError("the policy's adapter is merged into its weights, and would not be trained: unmerge it first")


def adapter_weights(name: str, **options: Any) -> Path:
    """Return the file of an adapter's weights."""
    where = download_options(options)
    if not options.get("use_safetensors", True):
        quiet = {"_raise_exceptions_for_missing_entries": False}
        if cached_file(name, "adapter_model.safetensors", **where, **quiet) is None:
            return Path(str(cached_file(name, "adapter_model.bin", **where)))
    return Path(str(cached_file(name, "adapter_model.safetensors", **where)))


def fit_embedding(base: Any, weights: Mapping[str, torch.Tensor], tokens: int) -> bool:
    """Resize the base model's embedding to the one in an adapter's weights, or for all tokens; return if it changed."""
    embedding = base.get_input_embeddings()
    name = next(name for name, module in base.named_modules() if module is embedding)
    before = len(embedding.weight)
    saved = weights.get(f"base_model.model.{name}.weight")
    rows = max(before, tokens) if saved is None else len(saved)
    if rows != before:
        base.resize_token_embeddings(rows, mean_resizing=False)
    return rows != before


def add_lora(model: PreTrainedModel | PeftModel, lora: dict[str, Any]) -> PeftModel:
    """Wrap a model with a new LoRA adapter.

    Raises:
        ValueError: If the model has an adapter already, or `peft.LoraConfig` does not know an option.
    """
    if isinstance(model, PeftModel):
        raise InputError("the policy is an adapter already: leave `lora` out to train that one, or merge it first")
    config = lora_config(lora)
    layers = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D))}
    try:
        with tied_weights():
            adapted = cast(PeftModel, get_peft_model(model, config))
    except (ValueError, TypeError, RuntimeError, KeyError, NotImplementedError) as error:
        raise InputError(
            f"lora: no adapter for a {type(model).__name__} can be made with these options ("
            f"{' '.join(str(error).split()).partition('. ')[0]}); target_modules can be {', '.join(sorted(layers))}"
        ) from error
    for name, layer in adapted.named_modules():
        if type(layer) is Linear and isinstance(layer.base_layer, nn.Linear):
            kind = type(layer.base_layer)
            if kind.forward is not nn.Linear.forward:
                name = name.rpartition(".")[2]
                raise InputError(
                    f"lora: the layer {name!r} is a {kind.__name__}, which returns more than a product: leave it out, "
                    f"by target_modules or by exclude_modules: [{name}]"
                )
    return adapted


def lora_config(options: dict[str, Any]) -> LoraConfig:
    """Build a `peft.LoraConfig`.

    Raises:
        ValueError: If there is no such option, or if one changes the model under the adapter, which is the reference.
    """
    known = {"init_lora_weights": PLAIN_STARTS, "bias": ("none",)}
    for name, allowed in known.items():
        if (value := options.get(name, allowed[0])) not in allowed:
            raise InputError(
                f"lora: {name}={value!r} changes the model under the adapter, which is the reference when the adapter "
                f"is off: use one of {', '.join(map(repr, allowed))}"
            )
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **options})
    except (TypeError, ValueError) as error:
        raise InputError(
            f"lora: {error}; the options are those of peft.LoraConfig, such as r and lora_alpha"
        ) from error


def merged(model: PeftModel) -> PreTrainedModel:
    """Return a copy of the base model with the adapter merged into it."""
    return merge(model if is_quantized(model) else copy.deepcopy(model))


def merge(model: PeftModel) -> PreTrainedModel:
    """Merge an adapter into its base model, and return that, in float32: 16 bits would round small updates away.

    If the adapter changes the embedding or the head, the two are no longer tied, since they then differ.
    """
    if is_quantized(model):
        with tied_weights():
            model = dequantized(model)
    base: Any = model.get_base_model()
    base.float()
    layers = [base.get_input_embeddings(), base.get_output_embeddings()]
    inputs, outputs = (plain_layer(layer) for layer in layers)
    if outputs is not None and [inputs, outputs] != layers:
        if inputs.weight.data_ptr() == outputs.weight.data_ptr():
            outputs.weight = nn.Parameter(outputs.weight.detach().clone(), requires_grad=False)
        for config in (base.config, base.config.get_text_config()):
            config.tie_word_embeddings = False
    return cast(PreTrainedModel, model.merge_and_unload())


def save_adapter(model: PeftModel, folder: str | Path) -> None:
    """Write an adapter alone: its base model is in a folder, with its embedding."""
    model.save_pretrained(str(folder), save_embedding_layers=False)


@contextlib.contextmanager
def tied_weights() -> Iterator[None]:
    """Hide PEFT's warnings of tied weights, which `merge` unties."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="(?s).*(tie_word_embeddings|ensure_weight_tying)")
        yield


def plain_layer(layer: Any) -> Any:
    """Return a layer without the wrappers of PEFT."""
    while (inner := getattr(layer, "base_layer", getattr(layer, "original_module", None))) is not None:
        layer = inner
    return layer
