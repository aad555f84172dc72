"""Which sentences the world knows: patterns of word classes, read one word at a time.

A sentence that follows no pattern is not thrown away: each word is judged in its place, and reading goes on after it.
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
_PLACES = frozenset((i, j) for i, pattern in enumerate(PATTERNS) for j in range(len(pattern)))

Places = frozenset[tuple[int, int]]


@cache
def _read(places: Places, word: str) -> Places:
    """Return the places after `word`, of those where it may stand."""
    fits = (p for p in places if word in CLASSES.get(PATTERNS[p[0]][p[1]], (PATTERNS[p[0]][p[1]],)))
    return frozenset((i, j + 1) for i, j in fits)


def _settle(places: Places) -> Places:
    """A pattern read to its full stop is followed by the start of any other."""
    return _START if any(j == len(PATTERNS[i]) for i, j in places) else places


def well_placed(words: Sequence[str]) -> list[bool]:
    """Say of each word whether it may stand where it stands.

    After a word that may not, reading goes on from every place where that word could have stood.
    """
    places, verdicts = _START, []
    for word in words:
        after = _read(places, word)
        verdicts.append(bool(after))
        places = _settle(after or _read(_PLACES, word) or places)
    return verdicts


def complete(words: Sequence[str]) -> bool:
    """Say whether the words end where a sentence ends."""
    return bool(words) and words[-1] == "."


def sentences(words: Sequence[str]) -> list[list[str]]:
    """Cut words at the full stops; what follows the last one is a sentence too."""
    found: list[list[str]] = [[]]
    for word in words:
        if word == ".":
            found.append([])
        else:
            found[-1].append(word)
    return [sentence for sentence in found if sentence]
