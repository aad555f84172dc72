"""Tokenize prompts and completions, for data, rewards and policies alike.

Plain strings are tokenized verbatim; lists of messages go through the tokenizer's chat template. A completion ends with
the end-of-sequence token unless it was truncated, in reward-model training exactly as in scoring. Completions are
encoded and decoded as the continuation of a prompt: some tokenizers (Llama 2, Mistral) add a space before every text
that they encode and remove the first space of every text that they decode.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.types import Message, Text

CONTEXT = "\n"
"""Placeholder for the preceding text while a continuation is encoded or decoded."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Return the token ids of a prompt, to be followed by a completion.

    An empty prompt becomes the tokenizer's BOS token, or its EOS token if it has no BOS token.

    Raises:
        ValueError: If the prompt is a conversation and the tokenizer has no chat template, or if the prompt is empty
            and the tokenizer has neither BOS nor EOS.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()  # some tokenizers append EOS to every text
    else:
        text = _open_prompt(tokenizer, prompt, template_kwargs)
        ids = _encode(tokenizer, text)
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError(
            f"an empty prompt needs a start token, and the tokenizer {tokenizer.name_or_path!r} has neither BOS nor "
            "EOS: set tokenizer.bos_token"
        )
    return [start]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    finished: bool = True,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a completion, to be appended to the ids of `encode_prompt`.

    Args:
        tokenizer: The tokenizer of the model that reads the ids.
        prompt: The prompt of the completion; messages if the completion is messages.
        completion: A string, or the messages that continue the conversation.
        finished: Whether the completion is complete. If so it ends with exactly one EOS token, or with the token that
            ends a turn in the chat template; if it was truncated, it has none.
        template_kwargs: Arguments of the chat template.
    """
    eos = tokenizer.eos_token_id
    if isinstance(completion, str):
        ids = _encode_after(tokenizer, completion) if prompt else _encode(tokenizer, completion)
    else:
        ids = _encode_after(tokenizer, _continuation(tokenizer, prompt, completion, template_kwargs))
        ids, eos = _split_end_of_turn(tokenizer, ids)
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos] if finished and eos is not None else ids


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[list[int]], skip_special_tokens: bool = True
) -> list[str]:
    """Decode completions as continuations of a prompt, by default without special tokens."""
    context_ids = _context_ids(tokenizer)
    context = _decode(tokenizer, [context_ids], skip_special_tokens)[0]
    texts = _decode(tokenizer, [context_ids + ids for ids in completions], skip_special_tokens)
    return [
        text[len(context) :] if text.startswith(context) else _decode(tokenizer, [ids], skip_special_tokens)[0]
        for text, ids in zip(texts, completions, strict=True)
    ]


def _decode(
    tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], skip_special_tokens: bool = True
) -> list[str]:
    return list(tokenizer.batch_decode(list(rows), skip_special_tokens=skip_special_tokens))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text that continues another; those of the text alone if it would merge with its context."""
    if context_ids := _context_ids(tokenizer):
        both = _encode(tokenizer, CONTEXT + text)
        if both[: len(context_ids)] == context_ids:
            return both[len(context_ids) :]
    return _encode(tokenizer, text)


@functools.lru_cache(maxsize=8)
def _context_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of `CONTEXT`, or none if it is not in the tokenizer's vocabulary."""
    try:
        return _encode(tokenizer, CONTEXT)
    except Exception:  # `tokenizers` raises nothing narrower
        return []


def _split_end_of_turn(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], int | None]:
    """Split off the token that ends a turn, and drop what the template adds after it, which is never sampled."""
    eos: int | None = tokenizer.eos_token_id
    if eos in ids:
        ids = ids[: len(ids) - ids[::-1].index(eos)]
    end, special = eos, _special_ids(tokenizer, len(tokenizer))
    while (last := next((i for i in reversed(range(len(ids))) if ids[i] in special), None)) is not None:
        if _decode(tokenizer, [ids[last + 1 :]])[0].strip():
            break
        ids, end = ids[:last], ids[last]
    return ids, end


@functools.lru_cache(maxsize=8)
def _special_ids(tokenizer: PreTrainedTokenizerBase, size: int) -> frozenset[int]:
    """Return the ids of special tokens. `size` is part of the cache key, since tokens can be added."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends an assistant turn in the chat template; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    try:
        return encode_completion(tokenizer, *turns)[-1]
    except Exception:  # a template may reject these turns with any error
        return None


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: list[Message], template_kwargs: dict[str, Any] | None
) -> str:
    if isinstance(prompt, str):
        return _contents(completion)
    before = _open_prompt(tokenizer, prompt, template_kwargs)
    full = _template(tokenizer, _join(prompt, completion), template_kwargs, add_generation_prompt=False)
    if full.startswith(before):
        return full[len(before) :]
    return _contents(completion)  # the template rewrites earlier turns


def _join(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """Append a completion to a conversation; an assistant turn at the end of the prompt is continued."""
    if not (prompt and completion and prompt[-1]["role"] == completion[0]["role"] == "assistant"):
        return [*prompt, *completion]
    turn = {**completion[0], "content": _contents([prompt[-1], completion[0]])}
    return [*prompt[:-1], turn, *completion[1:]]


def _contents(messages: list[Message]) -> str:
    return "".join(message.get("content") or "" for message in messages)


def _open_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], kwargs: dict[str, Any] | None) -> str:
    """Render a prompt for the assistant to continue; an assistant turn at its end is left open."""
    if prompt and prompt[-1]["role"] == "assistant":
        return _template(tokenizer, prompt, kwargs, continue_final_message=True)
    return _template(tokenizer, prompt, kwargs, add_generation_prompt=True)


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: dict[str, Any] | None, **fixed: Any
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise InputError(
            f"the data are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use an instruct model, set tokenizer.chat_template, or use plain strings"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **fixed, **(kwargs or {})))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a padding id that is not EOS: the first of pad, unk, BOS, 0 and 1 that differs from it.

    Policies mask padding by position, so the id has no effect there. A sequence-classification model uses it to find
    the end of its input, and must not mistake the EOS token for padding.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    return next(int(i) for i in candidates if i is not None and i != tokenizer.eos_token_id)
