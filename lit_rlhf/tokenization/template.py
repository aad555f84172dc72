"""Render chat templates, and find out what they write around a turn."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError, InputTypeError, brief
from lit_rlhf.tokenization.marks import any_of
from lit_rlhf.types import Message

SENTINEL = "\uf8feanswer\uf8fe"
"""Content of a turn whose surroundings are looked for."""

SEPARATOR = "\0"

THINKING = re.compile(r"think|thought|reason", re.IGNORECASE)
"""Names of tags that enclose a policy's thoughts, inside its turn."""

NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")

SPECIAL_TOKENS = {*NAMED, "additional_special_tokens", "extra_special_tokens"}
RESERVED = SPECIAL_TOKENS | {
    "add_generation_prompt", "chat_template", "continue_final_message", "conversation", "max_length", "messages",
    "padding", "return_assistant_tokens_mask", "return_dict", "return_tensors", "sanitize_control_tokens", "tokenize",
    "tokenizer_kwargs", "truncation",
}  # fmt: skip
"""Arguments of `apply_chat_template` that are not the template's own, or that replace it or its tokens."""

LARGEST_NUMBER = 1_000_000
"""Largest number in a row's arguments: a template may repeat something that often."""


@dataclass(frozen=True)
class Template:
    """What the special tokens of a tokenizer mean in its chat template.

    Attributes:
        special: All special tokens, and the other added tokens that separate turns: text inside a prompt's messages.
        control: Those that structure a conversation: text in an assistant's turns too. Tags that were added as special
            tokens (`<answer>` and `</answer>`) are not among them, so that a policy can learn to write them.
        end: The token that ends an assistant's turn; None if the template writes none.
        lead: What the template writes between an answer and that token.
        header: What the template writes between a user's message and the answer.
        thinks: Whether the template mentions `<think>` or `</think>`.
        openings: What conversations begin with: a special token, or else the text before the first message.
        blocks: Whether the template reads contents only in typed blocks, as some of vision models do.
    """

    special: re.Pattern[str]
    control: re.Pattern[str]
    end: str | None
    lead: str
    header: str
    thinks: bool
    openings: tuple[str, ...] = ()
    blocks: bool = False


def read_template(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None = None) -> Template:
    """Return what the special tokens of a tokenizer mean, with or without a chat template; cached."""
    source = template_source(tokenizer, kwargs)
    named = tuple(str(token) for name in NAMED if (token := getattr(tokenizer, name, None)) is not None)
    return _read_template(tokenizer, source, named, len(tokenizer))


def template_source(tokenizer: PreTrainedTokenizerBase, kwargs: dict[str, Any] | None = None) -> str | None:
    """Return the source of the chat template, or None."""
    if not getattr(tokenizer, "chat_template", None) and not (kwargs or {}).get("chat_template"):
        return None
    try:
        return str(tokenizer.get_chat_template((kwargs or {}).get("chat_template"), (kwargs or {}).get("tools")))
    except ValueError as error:
        raise InputError(f"the tokenizer {tokenizer.name_or_path!r}: {error}") from error


@functools.lru_cache(maxsize=16)
def _read_template(
    tokenizer: PreTrainedTokenizerBase, source: str | None, named: tuple[str, ...], size: int
) -> Template:
    """`named` and `size` are part of the cache key, since tokens can be added and replaced."""
    added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
    special = {token for token, is_special in added.items() if is_special}.union(named)
    if source is None:
        return Template(any_of(special), any_of(special - _pairs(special) | set(named)), None, "", "", False)
    blocks = _needs_blocks(tokenizer, source)
    texts = _probe(tokenizer, source, blocks)
    turns = SEPARATOR.join(text.partition(SENTINEL)[2] for text in texts[:3])
    everything = SEPARATOR.join([source, *texts])
    structure = set(named)
    for token, is_special in added.items():
        between_turns = token in turns and (is_special or is_markup(token))
        elsewhere = is_special and token in everything and token not in _pairs(added)
        if (between_turns or elsewhere) and not THINKING.search(token):
            structure.add(token)
    control, special_text = any_of(structure), any_of(special | structure)
    tail = _tail(tokenizer, source, blocks)
    end = _end(tokenizer, control, tail, "".join(texts[2].split(SENTINEL)[2:3]))
    lead = tail[: tail.index(end)] if end else ""
    header = turns.partition(SEPARATOR)[0]
    starts = (text.partition(SENTINEL)[0] for text in (texts[0], texts[3]))
    openings = {found[0] if (found := special_text.match(start)) else start for start in starts if start.strip()}
    thinks = "think>" in source
    return Template(special_text, control, end, lead, header, thinks, tuple(sorted(openings)), blocks)


def _end(tokenizer: PreTrainedTokenizerBase, control: re.Pattern[str], tail: str, between: str) -> str | None:
    """Return the token that ends an answer: the first after it, or EOS if it directly follows between turns, too."""
    if (found := control.search(tail)) is None:
        return None
    run = re.match(rf"(?:{control.pattern})+", tail[found.start() :])
    eos = tokenizer.eos_token
    return str(eos) if eos and run and eos in run[0] and eos in between else found[0]


def _needs_blocks(tokenizer: PreTrainedTokenizerBase, source: str) -> bool:
    """Whether a template writes a content that is given in typed blocks, and not one that is a string."""
    texts = (
        _try_render(tokenizer, source, [{"role": "user", "content": SENTINEL}], blocks) for blocks in (False, True)
    )
    return [SENTINEL in text for text in texts] == [False, True]


def is_markup(token: str) -> bool:
    """Whether a token looks like the ones that separate turns, and unlike a word."""
    return token[0] in "<[{" and token[-1] in ">]}"


def _pairs(tokens: set[str] | dict[str, bool]) -> set[str]:
    """Return the tokens that are tags which open and close, such as `<answer>` and `</answer>`."""
    names = {token[1:-1] for token in tokens if re.fullmatch(r"<[^/|<>]+>", token)}
    return {token for name in names if f"</{name}>" in tokens for token in (f"<{name}>", f"</{name}>")}


def _probe(tokenizer: PreTrainedTokenizerBase, source: str, blocks: bool) -> list[str]:
    """Render a question, with its answer, with another question, and with a system message; "" if it is refused."""
    user, answer = {"role": "user", "content": SENTINEL}, {"role": "assistant", "content": SENTINEL}
    chats = ([user], [user, answer], [user, answer, user], [{"role": "system", "content": SENTINEL}, user, answer])
    return [_try_render(tokenizer, source, chat, blocks, add_generation_prompt=chat[-1] is user) for chat in chats]


def _tail(tokenizer: PreTrainedTokenizerBase, source: str, blocks: bool) -> str:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": SENTINEL}]
    _, found, tail = _try_render(tokenizer, source, turns, blocks).rpartition(SENTINEL)
    return tail if found else ""


def _try_render(
    tokenizer: PreTrainedTokenizerBase, source: str, messages: list[Message], blocks: bool, **fixed: Any
) -> str:
    try:
        return render(tokenizer, messages, {"chat_template": source}, blocks, **fixed)
    except InputError:  # the template refuses such a conversation
        return ""


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Message],
    kwargs: dict[str, Any] | None,
    blocks: bool = False,
    **fixed: Any,
) -> str:
    """Render a conversation, with contents as strings or in typed blocks.

    Raises:
        ValueError: If there is no chat template, or if it refuses the conversation, with its reason.
    """
    if template_source(tokenizer, kwargs) is None:
        raise InputError(
            f"the data are conversations, but the tokenizer {tokenizer.name_or_path!r} has no chat template: "
            "use an instruct model, set tokenizer.chat_template, or use plain strings"
        )
    if blocks:
        messages = [
            {**m, "content": [{"type": "text", "text": m["content"]}]} if "content" in m else m for m in messages
        ]
    try:
        return str(tokenizer.apply_chat_template(messages, tokenize=False, **fixed, **(kwargs or {})))
    except Exception as error:  # a template may fail with any error
        raise InputError(
            f"the chat template{f' of {name!r}' if (name := tokenizer.name_or_path) else ''} refuses the conversation: "
            f"{str(error) or type(error).__name__}"
        ) from error


def check_template_kwargs(kwargs: dict[str, Any], of_a_row: bool = False) -> None:
    """Check arguments of the chat template.

    Args:
        kwargs: The arguments.
        of_a_row: Whether they come with the data, and so may neither replace the template nor keep it busy.

    Raises:
        TypeError: If they are no dict.
        ValueError: If a name is reserved, or a number of a row is too large.
    """
    if not isinstance(kwargs, dict):
        raise InputTypeError(f"chat_template_kwargs={brief(kwargs)}: it must be a dict")
    reserved = RESERVED if of_a_row else RESERVED - SPECIAL_TOKENS - {"chat_template"}
    if names := sorted(reserved & kwargs.keys()):
        raise InputError(f"chat_template_kwargs has {names[0]!r}, which is not an argument of the template: remove it")
    if not of_a_row:
        return
    for name, value in kwargs.items():
        for number in () if name in ("tools", "documents") else _numbers(value):
            if not abs(number) <= LARGEST_NUMBER:
                raise InputError(
                    f"chat_template_kwargs has {name!r} with the number {number}, above {LARGEST_NUMBER:,}: give it as "
                    "a string"
                )


def _numbers(value: Any) -> list[int | float]:
    if isinstance(value, dict | list | tuple):
        return [number for item in (value.values() if isinstance(value, dict) else value) for number in _numbers(item)]
    return [value] if isinstance(value, int | float) else []
