"""Load causal language models and their tokenizers, and check that the two fit together."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from peft import PeftModel
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.models.adapters import load_adapter
from lit_rlhf.models.pretrained import is_adapter, is_classifier, load_config, load_model, load_tokenizer, resolve
from lit_rlhf.tokenization import end_of_turn


def load_causal_lm(
    source: str | Path, **options: Any
) -> tuple[PreTrainedModel | PeftModel, PreTrainedTokenizerBase, bool]:
    """Load a causal language model, or a PEFT adapter with the model that it was trained on.

    Returns:
        The model, its tokenizer, and whether its base model is what its source holds: an adapter may have resized it.
    """
    check_causal_lm(source, **options)
    what, tokenizer = f"the policy {str(source)!r}", load_tokenizer(source, **options)
    if is_adapter(resolve(source), **options):
        adapted, resized = load_adapter(AutoModelForCausalLM, source, tokenizer, what, **options)
        return adapted, tokenizer, not resized
    return load_model(AutoModelForCausalLM, source, what, **options)[0], tokenizer, True


def check_causal_lm(source: str | Path, **options: Any) -> None:
    """Check by its configuration, before its weights are loaded, that a model is a causal language model.

    Raises:
        ValueError: If it is an encoder-decoder or a reward model, or has no configuration. Adapters are not checked.
    """
    what = f"the policy {str(source)!r}"
    if is_adapter(resolve(source), **options):
        return
    config = load_config(source, what, **options)
    if is_classifier(config):
        raise InputError(f"{what} is a reward model, {(config.architectures or [''])[0]}: give a causal language model")


def check_decoder(model: Any) -> None:
    """Check that no token of a causal language model attends to later ones, as far as its configuration says.

    Raises:
        ValueError: If they do.
    """
    config = model.config.get_text_config()
    attention = {module.is_causal for module in model.modules() if isinstance(getattr(module, "is_causal", None), bool)}
    bidirectional = getattr(config, "is_decoder", None) is False or getattr(config, "use_bidirectional_attention", None)
    if getattr(model.config, "is_encoder_decoder", False) or (bidirectional and attention == {False}):
        raise InputError(
            f"the policy is a {type(model).__name__} that does not generate from left to right (an encoder attends to "
            "the future): give a decoder-only model"
        )


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Check with a small input that no token of a causal language model attends to later ones.

    Raises:
        ValueError: If they do.
    """
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.arange(3, 11, device=model.device).repeat(2, 1) * 7919 % vocabulary
    ids[1, -1] = (ids[1, -1] + 1) % vocabulary
    first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[:, :-1].float()
    change = (first - second).norm() / first.norm()
    dtypes = {p.dtype for p in model.parameters() if p.is_floating_point()}
    if change > max(1e-4, 4 * max(torch.finfo(dtype).eps for dtype in dtypes)):
        raise InputError(
            f"the policy is a {type(model).__name__} whose tokens attend to later ones (a change of the last token "
            f"moves the others' logits by {change:.1%}): give a decoder-only model"
        )


def unwrapped(model: Any) -> Any:
    """Replace wrappers of `torch.compile` in a model by the compiled modules: they rename the weights."""
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, OptimizedModule) and not isinstance(module, OptimizedModule):
                setattr(module, name, unwrapped(child))
    if not isinstance(model, OptimizedModule):
        return model
    inner = unwrapped(model._orig_mod)
    inner._compiled_call_impl = model.dynamo_ctx(inner._call_impl)
    return inner


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


def check_same_tokens(
    role: str, source: str | Path, tokenizer: PreTrainedTokenizerBase, complete: bool = False, **options: Any
) -> None:
    """Check that the tokenizer of a model that reads completions, if it has one, has the policy's token ids.

    Args:
        role: Name of the model in messages.
        source: Its folder or hub id.
        tokenizer: The policy's tokenizer.
        complete: Whether it must know every token of the policy, but for those that were added to a vocabulary.
        **options: Options of `from_pretrained`.

    Raises:
        ValueError: If the ids of a token differ, or one is missing.
    """
    try:
        known = load_tokenizer(source, **options).get_vocab()
    except (OSError, ValueError):
        return
    added = tokenizer.get_added_vocab()
    for token, i in tokenizer.get_vocab().items():
        if complete and token not in known and token not in added:
            raise InputError(
                f"the {role} {str(source)!r} has no token {token!r}, which the policy has: give a model with the same "
                "tokenizer, such as one that started from the same model"
            )
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
