"""Load causal language models and their tokenizers, and check that the two fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils.peft_utils import find_adapter_config_file

from lit_rlhf.errors import InputError, InputFileNotFoundError
from lit_rlhf.tokenization import end_of_turn

SHIPPED = {"testbed": Path(__file__).parents[1] / "testbed" / "assets" / "policy"}
"""Folders of the models that come with the package, by name."""


def resolve(source: str | Path) -> str:
    """Resolve `source` to a folder or hub id; `testbed` is the policy that comes with the package.

    Raises:
        FileNotFoundError: If `source` can only be a folder, and there is none.
    """
    text = str(source)
    if text in SHIPPED:
        return str(SHIPPED[text])
    looks_like_a_path = text.count("/") > 1 or text.startswith((".", "/", "~"))
    if looks_like_a_path and not Path(text).expanduser().is_dir():
        raise InputFileNotFoundError(f"{text!r}: there is no such folder; give a folder or a model's id on the hub")
    return str(Path(text).expanduser().resolve()) if Path(text).expanduser().is_dir() else text


def is_adapter(name: str) -> bool:
    """Whether a folder or hub id holds a PEFT adapter."""
    return find_adapter_config_file(name) is not None


def load_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model; of the options only `revision`, `token` and `trust_remote_code` are used.

    Raises:
        ValueError: If there is none.
    """
    name = resolve(source)
    try:
        return AutoTokenizer.from_pretrained(name, **hub_options(options))
    except (OSError, ValueError) as error:
        if Path(name).is_dir() and is_adapter(name):  # PEFT itself saves no tokenizer with an adapter
            options = {key: value for key, value in options.items() if key != "revision"}
            return load_tokenizer(str(PeftConfig.from_pretrained(name).base_model_name_or_path), **options)
        raise InputError(
            f"{str(source)!r} is neither a local folder with a model and its tokenizer nor loadable from the hub: "
            f"{error}"
        ) from error


def hub_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return those options of `from_pretrained` that tokenizers and configurations accept, too."""
    return {key: options[key] for key in ("revision", "token", "trust_remote_code") if key in options}


def load_causal_lm(source: str | Path, **options: Any) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase]:
    """Load a causal language model, or a PEFT adapter with the model that it was trained on, and its tokenizer."""
    name = resolve(source)
    options = {"dtype": torch.float32, **options}
    tokenizer = load_tokenizer(name, **options)
    if is_adapter(name):
        return AutoPeftModelForCausalLM.from_pretrained(name, is_trainable=True, **options), tokenizer
    return AutoModelForCausalLM.from_pretrained(name, **options), tokenizer


def add_lora(model: PreTrainedModel | PeftModel, lora: dict[str, Any]) -> PeftModel:
    """Wrap a model with a new LoRA adapter.

    Raises:
        ValueError: If the model has an adapter already, or `peft.LoraConfig` does not know an option.
    """
    if isinstance(model, PeftModel):
        raise InputError("the policy is an adapter already: leave `lora` out to train that one, or merge it first")
    return cast(PeftModel, get_peft_model(model, lora_config(lora)))


def lora_config(options: dict[str, Any]) -> LoraConfig:
    """Build a `peft.LoraConfig`.

    Raises:
        ValueError: If there is no such option, or if one changes the model under the adapter, which is the reference.
    """
    known = {"init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"), "bias": ("none",)}
    for name, allowed in known.items():
        if (value := options.get(name, allowed[0])) not in allowed:
            raise InputError(
                f"lora: {name}={value!r} changes the model under the adapter, which is the reference when the adapter "
                f"is off: use one of {', '.join(map(repr, allowed))}"
            )
    try:
        return LoraConfig(**{"task_type": "CAUSAL_LM", **options})
    except TypeError as error:
        raise InputError(
            f"lora: {error}; the options are those of peft.LoraConfig, such as r and lora_alpha"
        ) from error


def embedding_rows(model: nn.Module) -> int:
    """Return how many token ids a model embeds."""
    embeddings: Any = cast(Any, model).get_input_embeddings()
    return int(embeddings.weight.shape[0])


def check_vocabulary(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Check that every id of the tokenizer has a row in the model's embedding.

    Raises:
        ValueError: If the tokenizer has ids that the model does not embed.
    """
    rows = embedding_rows(model)
    if len(tokenizer) > rows:
        raise InputError(
            f"the tokenizer {tokenizer.name_or_path!r} has {len(tokenizer)} tokens, but the model embeds {rows}: "
            "use the model's own tokenizer, or model.resize_token_embeddings"
        )


def check_same_tokens(role: str, source: str | Path, tokenizer: PreTrainedTokenizerBase, **options: Any) -> None:
    """Check that the tokenizer of a model that reads completions, if it has one, has the policy's token ids.

    Raises:
        ValueError: If the ids of a token differ.
    """
    try:
        known = load_tokenizer(source, **options).get_vocab()
    except (OSError, ValueError):
        return
    for token, i in tokenizer.get_vocab().items():
        if known.get(token, i) != i:
            raise InputError(
                f"the {role} {str(source)!r} has id {known[token]} for {token!r}, and the policy has {i}: give a model "
                "with the same tokenizer, such as one that started from the same model"
            )


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout probability to 0, so that training and sampling use the same policy. The config stays."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def add_stop_id(config: Any, token: int) -> None:
    """Add an id to the end-of-sequence ids of a generation config."""
    known = config.eos_token_id
    ids = known if isinstance(known, list) else [] if known is None else [known]
    if token not in ids:
        config.eos_token_id = [*ids, token]


def make_savable(config: Any) -> None:
    """Set `do_sample` in a generation config with sampling options: `transformers` refuses to save it otherwise."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True


def end_of_sequence_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return every id that ends a completion: the generation config's, the tokenizer's, the chat template's."""
    ids: set[int] = set()
    for owner in (getattr(model, "generation_config", None), model.config.get_text_config(), tokenizer):
        value = getattr(owner, "eos_token_id", None)
        ids.update(value if isinstance(value, list) else [] if value is None else [value])
    if (turn := end_of_turn(tokenizer)) is not None:
        ids.add(turn)
    return sorted(ids)
