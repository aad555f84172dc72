"""From text to token ids, once for everything that reads text: data, rewards, policies.

A plain string is tokenised as it stands; a list of messages goes through the tokenizer's chat template. A completion
ends with the end-of-sequence token unless it was cut short, in training a reward model exactly as in using it. It is
read and written as what follows a prompt: some tokenizers (of Llama 2, Mistral) put a space before every text that they
are given, and take the first space off every text that they decode.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.types import Message, Text

BEFORE = "\n"
"""Stands before a text that follows another, while it is encoded or decoded."""


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, template_kwargs: dict[str, Any] | None = None
) -> list[int]:
    """Return the token ids of a prompt, ready for the first token of a completion to follow.

    An empty string is the start of a text: the tokenizer's BOS token (or its EOS token where it has none).

    Raises:
        ValueError: If the prompt is a conversation and the tokenizer has no chat template, or if it is empty and the
            tokenizer has neither of the two tokens.
    """
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        while ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(tokenizer.eos_token):
            ids.pop()  # some tokenizers close every text; a prompt is open
    else:
        text = _open_prompt(tokenizer, prompt, template_kwargs)
        ids = _encode(tokenizer, text)
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise ValueError(
            f"an empty prompt needs a token to start with, and the tokenizer {tokenizer.name_or_path!r} has neither "
            "BOS nor EOS: set tokenizer.bos_token"
        )
    return [start]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    finished: bool = True,
    template_kwargs: dict[str, Any] | None = None,
) -> list[int]:
    """Return the token ids of a completion, to follow those of `encode_prompt`.

    Args:
        tokenizer: Of the model that will read the ids.
        prompt: What the completion answers; a conversation where the completion is one.
        completion: A string, or the messages that continue the conversation.
        finished: Whether the completion ended by itself; it then ends with the EOS token, or that with which the chat
            template ends a turn, once, and otherwise has none.
        template_kwargs: Handed to the chat template.
    """
    eos = tokenizer.eos_token_id
    if isinstance(completion, str):
        ids = _encode_after(tokenizer, completion) if prompt else _encode(tokenizer, completion)
    else:
        ids = _encode_after(tokenizer, _continuation(tokenizer, prompt, completion, template_kwargs))
        ids, eos = _split_end(tokenizer, ids)
    while ids and ids[-1] == eos:
        ids.pop()
    return [*ids, eos] if finished and eos is not None else ids


def decode_completions(tokenizer: PreTrainedTokenizerBase, completions: Sequence[list[int]]) -> list[str]:
    """Return the texts of completions, without special tokens, as they stand behind a prompt."""
    before = _before(tokenizer)
    start = _decode(tokenizer, [before])[0]
    texts = _decode(tokenizer, [before + ids for ids in completions])
    return [
        text[len(start) :] if text.startswith(start) else _decode(tokenizer, [ids])[0]
        for text, ids in zip(texts, completions, strict=True)
    ]


def _decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]]) -> list[str]:
    return list(tokenizer.batch_decode(list(rows), skip_special_tokens=True))


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def _encode_after(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """The ids of a text that follows another; as those of the text alone where the two would melt into one token."""
    if before := _before(tokenizer):
        both = _encode(tokenizer, BEFORE + text)
        if both[: len(before)] == before:
            return both[len(before) :]
    return _encode(tokenizer, text)


@functools.lru_cache(maxsize=8)
def _before(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The ids of `BEFORE`, none where a tokenizer of a few words does not know it."""
    try:
        return _encode(tokenizer, BEFORE)
    except Exception:  # nothing narrower is what `tokenizers` raises
        return []


def _split_end(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[int], int | None]:
    """Cut off the token that ends a turn, with what a template writes behind it, which is never sampled."""
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
    """The ids of a tokenizer of this size that are no text."""
    return frozenset(i for i, token in tokenizer.added_tokens_decoder.items() if token.special)


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The id with which the chat template ends a turn of the assistant; None without a template."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    turns = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    try:
        return encode_completion(tokenizer, *turns)[-1]
    except Exception:  # a template may refuse such turns in any way
        return None


def _continuation(
    tokenizer: PreTrainedTokenizerBase, prompt: Text, completion: list[Message], template_kwargs: dict[str, Any] | None
) -> str:
    if isinstance(prompt, str):
        return _contents(completion)
    before = _open_prompt(tokenizer, prompt, template_kwargs)
    after = _template(tokenizer, _joined(prompt, completion), template_kwargs, add_generation_prompt=False)
    if after.startswith(before):
        return after[len(before) :]
    return _contents(completion)  # a template that rewrites earlier turns


def _joined(prompt: list[Message], completion: list[Message]) -> list[Message]:
    """A conversation and how it goes on; a turn of the assistant that the prompt leaves open is continued."""
    if not (prompt and completion and prompt[-1]["role"] == completion[0]["role"] == "assistant"):
        return [*prompt, *completion]
    turn = {**completion[0], "content": _contents([prompt[-1], completion[0]])}
    return [*prompt[:-1], turn, *completion[1:]]


def _contents(messages: list[Message]) -> str:
    return "".join(message.get("content") or "" for message in messages)


def _open_prompt(tokenizer: PreTrainedTokenizerBase, prompt: list[Message], kwargs: dict[str, Any] | None) -> str:
    """A conversation up to where the assistant's next words follow; a last turn of its own is left open."""
    if prompt and prompt[-1]["role"] == "assistant":
        return _template(tokenizer, prompt, kwargs, continue_final_message=True)
    return _template(tokenizer, prompt, kwargs, add_generation_prompt=True)


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], kwargs: dict[str, Any] | None, **fixed: Any
) -> str:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"the data are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use an instruct model, set tokenizer.chat_template, or give plain strings"
        )
    return str(tokenizer.apply_chat_template(messages, tokenize=False, **fixed, **(kwargs or {})))


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return an id to pad with that never ends a completion: the pad token, else unk, bos or 0, whichever is not EOS.

    Policies mask padding by position, so the id changes nothing there. A sequence-classification model finds the end
    of its input by it, and must not take the EOS token for padding.
    """
    candidates = (tokenizer.pad_token_id, tokenizer.unk_token_id, tokenizer.bos_token_id, 0, 1)
    return next(int(i) for i in candidates if i is not None and i != tokenizer.eos_token_id)
