"""Encode prompts and completions into token ids, and decode completions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, cast

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.tokenization.chat import Chat, EncodedTurns
from lit_rlhf.tokenization.marks import context_ids, encode, encode_after, encode_parts
from lit_rlhf.tokenization.template import NAMED, is_markup, read_template, template_source
from lit_rlhf.tokenization.turns import contents
from lit_rlhf.types import Text


def encode_prompt(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    template_kwargs: dict[str, Any] | None = None,
    parse_special_tokens: bool = True,
) -> list[int]:
    """Return the token ids of a prompt, to be followed by a completion.

    An empty prompt becomes the tokenizer's BOS token, or its EOS token if it has no BOS token.

    Args:
        tokenizer: The tokenizer of the model that reads the ids.
        prompt: A string, or messages, whose special tokens are text.
        template_kwargs: Arguments of the chat template.
        parse_special_tokens: Whether special tokens in a string are encoded as such, not as text. A string that begins
            with the tokens that the tokenizer adds, such as BOS, does not get them twice.

    Raises:
        ValueError: If the prompt is a conversation and the tokenizer has no chat template or its template refuses it,
            or if the prompt is empty and the tokenizer has neither BOS nor EOS.
    """
    if isinstance(prompt, str):
        first, *parts = [prompt] if parse_special_tokens else _split(read_template(tokenizer).special, prompt)
        ids = _encode_start(tokenizer, first) + encode_parts(tokenizer, ["", *parts])
    else:
        ids = Chat(tokenizer, prompt, [], template_kwargs).prompt_ids()
    return ids or [_start_id(tokenizer)]


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    finished: bool = True,
    template_kwargs: dict[str, Any] | None = None,
    parse_special_tokens: bool = True,
) -> list[int]:
    """Return the token ids of a completion, to be appended to the ids of `encode_prompt`; see `encode_turns`."""
    return encode_turns(tokenizer, prompt, completion, finished, template_kwargs, parse_special_tokens).ids


def encode_turns(
    tokenizer: PreTrainedTokenizerBase,
    prompt: Text,
    completion: Text,
    finished: bool = True,
    template_kwargs: dict[str, Any] | None = None,
    parse_special_tokens: bool = True,
) -> EncodedTurns:
    """Return the token ids of a completion, and which of them the assistant wrote.

    Args:
        tokenizer: The tokenizer of the model that reads the ids.
        prompt: The prompt of the completion; messages if the completion is messages.
        completion: A string, or the messages that continue the conversation, the assistant's first. Tokens that
            structure a conversation are text in messages; other tags that were added as special tokens are tokens.
        finished: Whether the completion is complete. If so it ends with exactly one EOS token, or with the token that
            ends a turn in the chat template; if it was truncated, it has none.
        template_kwargs: Arguments of the chat template.
        parse_special_tokens: Whether special tokens in a string are encoded as such, not as text.

    Raises:
        ValueError: If the chat template refuses the conversation, or the completion begins with another's turn.
    """
    if isinstance(prompt, str):
        text = completion if isinstance(completion, str) else contents(completion)
        return EncodedTurns(_encode_string(tokenizer, prompt, text, finished, parse_special_tokens))
    turns = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
    return Chat(tokenizer, prompt, turns, template_kwargs).completion_ids(finished)


def _encode_string(
    tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str, finished: bool, parse_special_tokens: bool
) -> list[int]:
    end, template = tokenizer.eos_token_id, read_template(tokenizer)
    if parse_special_tokens:
        if template.end and template.control.search(template.header) and prompt.endswith(template.header):
            end = tokenizer.convert_tokens_to_ids(template.end)
        for token in (template.end, tokenizer.eos_token):
            if token and completion.rstrip().endswith(token):  # rendered beforehand
                completion, end = completion.rstrip(), tokenizer.convert_tokens_to_ids(token)
                break
        ids = encode_after(tokenizer, completion) if prompt else encode(tokenizer, completion)
        if not prompt and template.special.match(completion) and ids[0] == encode_prompt(tokenizer, "")[0]:
            ids = ids[1:]  # the empty prompt is this token already
    else:
        first, *parts = _split(template.control, completion)
        ids = encode_after(tokenizer, first) if prompt else encode(tokenizer, first)
        ids += encode_parts(tokenizer, ["", *parts])
    while ids and ids[-1] == end:
        ids.pop()
    return [*ids, end] if finished and end is not None else ids


def _split(tokens: re.Pattern[str], text: str) -> list[str]:
    """Split a text into ordinary parts and, in turn, tokens."""
    return re.split(f"({tokens.pattern})", text)


def _encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a text with the tokens that the tokenizer puts before every text, once."""
    template = read_template(tokenizer)
    if text.startswith(template.openings):  # rendered beforehand
        return encode(tokenizer, text)
    ids = list(tokenizer(text, split_special_tokens=False)["input_ids"])
    if text.endswith(tokenizer.eos_token or "\0") or template.special.match(text):
        alone = encode(tokenizer, text)
        for count in range(len(ids) - len(alone) + 1):
            if ids[count : count + len(alone)] == alone:
                return alone if alone[:count] == ids[:count] else ids[:count] + alone
        return ids
    while ids and ids[-1] == tokenizer.eos_token_id:
        ids.pop()  # some tokenizers append EOS to every text
    return ids


def _start_id(tokenizer: PreTrainedTokenizerBase) -> int:
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise InputError(
            f"an empty prompt needs a start token, and the tokenizer {tokenizer.name_or_path!r} has neither BOS nor "
            "EOS: set tokenizer.bos_token"
        )
    return int(start)


def decode_completions(
    tokenizer: PreTrainedTokenizerBase, completions: Sequence[list[int]], skip_special_tokens: bool = True
) -> list[str]:
    """Decode completions as continuations of a prompt, by default without special tokens."""
    before_ids = context_ids(tokenizer)
    before = _decode(tokenizer, [before_ids], skip_special_tokens)[0]
    texts = _decode(tokenizer, [before_ids + ids for ids in completions], skip_special_tokens)
    return [
        text[len(before) :] if text.startswith(before) else _decode(tokenizer, [ids], skip_special_tokens)[0]
        for text, ids in zip(texts, completions, strict=True)
    ]


def _decode(tokenizer: PreTrainedTokenizerBase, rows: Sequence[list[int]], skip_special_tokens: bool) -> list[str]:
    return list(tokenizer.batch_decode(list(rows), skip_special_tokens=skip_special_tokens))


def end_of_turn(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the id of the token that ends an assistant turn in the chat template; None without a template."""
    if template_source(tokenizer) is None:
        return None
    end = read_template(tokenizer).end
    return tokenizer.eos_token_id if end is None else cast(int, tokenizer.convert_tokens_to_ids(end))


def end_ids(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids of EOS and of the tokens that structure a conversation: those with which a completion may end."""
    control = read_template(tokenizer).control
    added = tokenizer.added_tokens_decoder.items()
    return {i for i, token in added if control.fullmatch(token.content)} | {tokenizer.eos_token_id} - {None}


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return a padding id with which no completion ends: a special token that is neither EOS nor ends a turn.

    The first of pad, unk, BOS and the other special tokens; None if the tokenizer has no other, as GPT-2's. Masks
    decide what is padding, so the id has no effect here, but a sequence-classification model of `transformers` reads
    its score at the last token that differs from it.
    """
    added, control = tokenizer.added_tokens_decoder, read_template(tokenizer).control
    special = [i for i, token in sorted(added.items()) if token.special and control.fullmatch(token.content)]
    special = [i for i in special if is_markup(added[i].content)]  # not a word that was made the padding token
    named = [getattr(tokenizer, f"{name}_id", None) for name in ("pad_token", "unk_token", "bos_token", *NAMED)]
    ends = {tokenizer.eos_token_id, end_of_turn(tokenizer)}
    return next((int(i) for i in [*named, *special] if i in special and i not in ends), None)
