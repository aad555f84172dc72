"""Continue what a chat template opens in its generation prompt, such as `<think>`."""

from __future__ import annotations

import re

from lit_rlhf.tokenization.template import THINKING

REASONING = ("reasoning_content", "reasoning", "thinking")
"""Fields of a message with the thoughts before its content."""

OPENED = re.compile(r"([<\[◁])([^<>\[\]◁▷/|\s]+)([>\]▷])(\s*)\Z")
"""A tag that a text leaves open at its end."""


def opened_thought(text: str) -> str:
    """Return the tag of thoughts that a prompt leaves open at its end, with the space after it."""
    tag = OPENED.search(text)
    return tag[0] if tag and THINKING.search(tag[2]) else ""


def continue_opened(opening: str, content: str, reasoning: str, finished: bool) -> str:
    """Return an answer as the continuation of what a prompt opens, such as `<think>`.

    A tag that the prompt has opened is not repeated, also after an empty thought that the template writes itself. An
    answer without thoughts closes it first.
    """
    answer, tag = content.lstrip(), OPENED.search(opening)
    if tag is None:
        if reasoning:
            return f"<think>\n{reasoning}\n</think>\n\n{content}"
        return (
            answer.removeprefix(opening.strip()) if opening.strip() and answer.startswith(opening.strip()) else content
        )
    name, space, close = f"{tag[1]}{tag[2]}{tag[3]}", tag[4], f"{tag[1]}/{tag[2]}{tag[3]}"
    if close in content and (rest := answer.removeprefix(close).lstrip()).startswith(name):
        answer = rest
    if answer.startswith(name):
        return answer.removeprefix(name).removeprefix(space)
    if reasoning:
        return f"{reasoning}\n{close}\n\n{content}"
    if close in content or not finished:
        return content
    return "\n\n".removeprefix(space) + f"{close}\n\n{content}"
