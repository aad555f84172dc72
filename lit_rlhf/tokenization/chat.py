"""Encode conversations: the prompt that is sampled from, and the turns that answer it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.tokenization.marks import Marks, encode, encode_after, encode_parts, strings_of
from lit_rlhf.tokenization.template import RESERVED, SENTINEL, read_template, render
from lit_rlhf.tokenization.thoughts import REASONING, continue_opened, opened_thought
from lit_rlhf.tokenization.turns import check_role, contents, is_answer, join, squash
from lit_rlhf.types import Message


@dataclass(frozen=True)
class EncodedTurns:
    """Token ids of a completion.

    Attributes:
        ids: The ids.
        learned: Which of them an assistant wrote; None if all.
        rebuilt: Whether the ids differ from the rendered conversation, since its template drops thoughts or does not
            continue its own prompt.
    """

    ids: list[int]
    learned: list[bool] | None = None
    rebuilt: bool = False


class Chat:
    """A conversation with its chat template, whose messages' special tokens stay text.

    Args:
        tokenizer: The tokenizer.
        prompt: The messages before the completion.
        completion: The messages that continue them.
        kwargs: Arguments of the chat template.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        prompt: list[Message],
        completion: list[Message],
        kwargs: dict[str, Any] | None,
    ) -> None:
        self.tokenizer, self.template = tokenizer, read_template(tokenizer, kwargs)
        self.kwargs, self.rebuilt = dict(kwargs or {}), False
        self.marks: Marks | None = None
        special, control = self.template.special, self.template.control
        messages = [*prompt, *completion]
        for message in messages:
            check_role(message, control)
        given = {name: value for name, value in self.kwargs.items() if name not in RESERVED}
        if special.search("\n".join(strings_of([messages, given]))):
            marks = self.marks = Marks.absent_from([messages, given])
            self.kwargs.update(marks.wrap(given, special))
            messages = [marks.wrap(m, control if is_answer(m) else special) for m in messages]
        self.prompt, self.completion = messages[: len(prompt)], messages[len(prompt) :]
        self.messages = join(self.prompt, self.completion)
        self.continued = len(self.messages) < len(messages)
        self.start = len(prompt) - self.continued

    def prompt_ids(self) -> list[int]:
        """Return the ids of the prompt."""
        return self._ids(self._opened(self.start), after=False)

    def completion_ids(self, finished: bool) -> EncodedTurns:
        """Return the ids of the completion.

        Raises:
            ValueError: If it does not begin with an assistant's turn.
        """
        if not self.completion or not is_answer(self.completion[0]):
            role = self.completion[0].get("role") if self.completion else "nobody"
            raise InputError(f"the completion begins with a turn of {role!r}: it must begin with one of the assistant")
        turns = [i for i in range(self.start, len(self.messages)) if is_answer(self.messages[i])]
        ids: list[int] = []
        learned: list[bool] = []
        for i, following in zip(turns, [*turns[1:], None], strict=True):
            ended = finished or following is not None
            text, end = self._cut(self._turn(i, ended), ended)
            new = self._ids(text + (end or ""))
            if following is None and ended and end is None and (eos := self.tokenizer.eos_token_id) is not None:
                new = [*_without_end(new, eos), eos]
            ids += new
            learned += [True] * len(new)
            if following is not None:
                between = self._ids(self._between(i, following, text + (end or "")))
                ids += between
                learned += [False] * len(between)
        return EncodedTurns(ids, None if all(learned) else learned, self.rebuilt)

    def _render(self, messages: list[Message], **fixed: Any) -> str:
        text = render(self.tokenizer, messages, self.kwargs, self.template.blocks, **fixed)
        for mark in (self.marks.start, self.marks.end) if self.marks else ():
            text = text.replace(json.dumps(mark)[1:-1], mark)
        return text

    def _opened(self, count: int) -> str:
        """Render the first messages for the assistant to continue; an assistant turn that ends a prompt stays open."""
        if count <= self.start and self.prompt and self.prompt[-1]["role"] == "assistant":
            return self._render(self.prompt, continue_final_message=True)
        return self._render(self.messages[:count], add_generation_prompt=True)

    def _ids(self, text: str, after: bool = True) -> list[int]:
        start = encode_after if after else encode
        if self.marks is None:
            return start(self.tokenizer, text)
        first, *parts = self.marks.split(text, self.template.special)
        return (start(self.tokenizer, first) if first else []) + encode_parts(self.tokenizer, ["", *parts])

    def _turn(self, index: int, finished: bool) -> str:
        """Return what follows the opened prompt in an assistant's turn, up to the end of the conversation."""
        before, full = self._opened(index), self._render(self.messages[: index + 1])
        continued = self.continued and index == self.start
        message = self.completion[0] if continued else self.messages[index]
        content = contents([message])
        reasoning = next((value for name in REASONING if isinstance(value := message.get(name), str)), "")
        if continued or not self.template.thinks:
            reasoning = ""
        opening = opened_thought(before)
        if full.startswith(before):
            text = full[len(before) :]
            written = squash(opening + text)
            dropped = squash(reasoning) not in written or squash(content) not in written
            if not (dropped and self._drops(index, full, content, reasoning)):
                changed = text if continued else continue_opened(opening, text, "", finished)
                self.rebuilt |= changed != text
                return changed
        self.rebuilt = True
        start, end = self._around(index)
        if start is None:
            start, end = before, self.template.lead + (self.template.end or "")
        kept = _between(full, start, end)
        if kept is not None and squash(kept) == squash(content):
            content = kept
        if not continued and before.startswith(start):
            opening = before[len(start) :] or opening
        return (content if continued else continue_opened(opening, content, reasoning, finished)) + end

    def _drops(self, index: int, full: str, content: str, reasoning: str) -> bool:
        """Whether the template leaves out the beginning of an answer, its thoughts."""
        start, end = self._around(index)
        kept = _between(full, start or "", end) if start is not None else None
        if reasoning and squash(reasoning) not in squash(full):
            return True
        return kept is not None and squash(kept) != squash(content) and squash(content).endswith(squash(kept))

    def _around(self, index: int) -> tuple[str | None, str]:
        """Return what the template writes before and after the content of a turn; None if that can't be found."""
        message = {key: value for key, value in self.messages[index].items() if key not in REASONING}
        probe = self._render([*self.messages[:index], {**message, "content": SENTINEL}])
        start, found, end = probe.rpartition(SENTINEL)
        return (start, end) if found else (None, "")

    def _between(self, index: int, following: int, turn: str) -> str:
        """Return what the template writes between an assistant's turn and the text of the next one."""
        start, whole = self._opened(index) + turn, self._render(self.messages[:following], add_generation_prompt=True)
        if whole.startswith(start):
            return whole[len(start) :]
        self.rebuilt = True
        messages = [*self.messages[:following]]
        messages[index] = {**messages[index], "content": SENTINEL}
        _, found, rest = self._render(messages, add_generation_prompt=True).rpartition(SENTINEL)
        if not found:
            raise InputError(
                "the chat template leaves out a turn in the middle of the completion: split the completion"
            )
        text, end = self._cut(self._around(index)[1], True)
        if rest.startswith(last := text + (end or "")):
            return rest[len(last) :]
        other = self.template.control.match(rest)  # which ends a turn that is not the last, as in gpt-oss
        return rest[other.end() :] if end and other else rest

    def _cut(self, text: str, finished: bool) -> tuple[str, str | None]:
        """Split a turn before the token that ends it; drop what the template adds after it, which is never sampled."""
        unmarked = f"(?!{self.marks.end})" if self.marks else ""
        token = f"(?:{self.template.control.pattern}){unmarked}"
        if run := re.search(rf"(?:{token}\s*)+\Z", text):
            tokens = list(self.template.control.finditer(run[0]))
            found = next((token for token in tokens if token[0] == self.template.end), tokens[0])
            text, end = text[: run.start() + found.start()], found[0]
        elif self.template.end and (last := list(re.finditer(re.escape(self.template.end) + unmarked, text))):
            text, end = text[: last[-1].start()], self.template.end
        else:
            end = None
        return (text, end) if finished else (text.removesuffix(self.template.lead), None)


def _between(text: str, start: str, end: str) -> str | None:
    inside = len(text) >= len(start) + len(end) and text.startswith(start) and text.endswith(end)
    return text[len(start) : len(text) - len(end)] if inside else None


def _without_end(ids: list[int], end: int) -> list[int]:
    while ids and ids[-1] == end:
        ids = ids[:-1]
    return ids
