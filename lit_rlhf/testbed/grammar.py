"""Grammar of the testbed: sentence patterns of word classes, parsed one word at a time.

A sentence that matches no pattern is not rejected as a whole: each word is judged in its position, and parsing
continues after a wrong one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from lit_rlhf.testbed import words as w

_VERBS = frozenset(verb for f in w.FAMILIES for verb in f.praise_verbs + f.blame_verbs)
_NOUNS = frozenset(w.NOUN_FAMILY)

CLASSES: dict[str, frozenset[str]] = {
    "ONE": _NOUNS - w.PLURAL,
    "MANY": w.PLURAL,
    "ADJECTIVE": frozenset(word for f in w.FAMILIES for word in f.praise + f.blame).union(
        w.PLAIN_PRAISE, w.PLAIN_BLAME
    ),
    "DEGREE": frozenset(w.DEGREES),
    "VERB": _VERBS,
    "FIRST": frozenset(w.BRIGHT_FIRST + w.GREY_FIRST),
    "SECOND": frozenset(w.BRIGHT_SECOND + w.GREY_SECOND),
    "FELT": frozenset(w.LIKED + w.DISLIKED),
    "RESULT": frozenset(w.JOYS + w.CHORES),
    "ADVISE": frozenset(w.SEEK + w.SHUN),
    "SUBJECT": frozenset(w.SUBJECTS),
    "THING": _NOUNS,
}

_FORMS = """
The NOUN BE ADJECTIVE .
The NOUN BE DEGREE ADJECTIVE .
The NOUN BE ADJECTIVE and ADJECTIVE .
The NOUN BE ADJECTIVE but ADJECTIVE .
The NOUN BE ADJECTIVE , and the THING VERB .
The NOUN BE ADJECTIVE , but the THING VERB .
The NOUN VERB .
The NOUN VERB like FIRST SECOND .
I FELT the NOUN .
I FELT the ADJECTIVE NOUN .
It was ADJECTIVE .
It was DEGREE ADJECTIVE .
It was ADJECTIVE and ADJECTIVE .
This SUBJECT was a RESULT .
I would ADVISE this SUBJECT .
"""


def _numbers(form: str) -> list[tuple[str, ...]]:
    one = form.replace("NOUN", "ONE").replace("BE", "was")
    many = form.replace("NOUN", "MANY").replace("BE", "were")
    return [tuple(text.split()) for text in dict.fromkeys((one, many))]


PATTERNS: tuple[tuple[str, ...], ...] = tuple(p for form in _FORMS.strip().splitlines() for p in _numbers(form))
_START = frozenset((i, 0) for i in range(len(PATTERNS)))
_POSITIONS = frozenset((i, j) for i, pattern in enumerate(PATTERNS) for j in range(len(pattern)))

Positions = frozenset[tuple[int, int]]


@cache
def _read(positions: Positions, word: str) -> Positions:
    """Return the positions after `word`, for those positions that allow it."""
    fits = (p for p in positions if word in CLASSES.get(PATTERNS[p[0]][p[1]], (PATTERNS[p[0]][p[1]],)))
    return frozenset((i, j + 1) for i, j in fits)


def _settle(positions: Positions) -> Positions:
    """Return the start of every pattern if one is complete, else the positions themselves."""
    return _START if any(j == len(PATTERNS[i]) for i, j in positions) else positions


def well_placed(words: Sequence[str]) -> list[bool]:
    """Return for each word whether the grammar allows it in its position.

    After a wrong word, parsing continues from every position of any pattern that allows the word.
    """
    positions, verdicts = _START, []
    for word in words:
        after = _read(positions, word)
        verdicts.append(bool(after))
        positions = _settle(after or _read(_POSITIONS, word) or positions)
    return verdicts


def complete(words: Sequence[str]) -> bool:
    """Return whether the words end with a complete sentence."""
    return bool(words) and words[-1] == "."


def sentences(words: Sequence[str]) -> list[list[str]]:
    """Split words at the full stops; words after the last one are a sentence too."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == ".":
            found.append([])
        else:
            found[-1].append(word)
    return [sentence for sentence in found if sentence]
