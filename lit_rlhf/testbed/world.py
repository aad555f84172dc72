"""Prompts and demonstrations of the testbed: briefs that ask for a review, and synthetic reviews of varying quality.

    A kind critic on the breakfast of the famous hotel, in two sentences:
    The eggs melted like summer honey. I adored the golden toast.

A brief names a tone, an aspect, the reputation of a subject and a length. The highest gold differs between briefs: one
sentence earns less than three, and so does praise of a troubled subject or blame of a famous one.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from itertools import product
from random import Random

from lit_rlhf.errors import InputError
from lit_rlhf.testbed import words as w

_PATTERN = re.compile(r"A (\w+) critic on the (\w+) of the (\w+) (\w+), in (\w+) sentences?:")


@dataclass(frozen=True)
class Brief:
    """Content of a prompt.

    Attributes:
        tone: "kind" wants praise, "harsh" wants blame, "fair" wants both.
        aspect: Topic of the review.
        reputation: "famous", "new" or "troubled".
        subject: The subject that the aspect belongs to.
        length: Requested number of sentences: "one", "two" or "three".
    """

    tone: str
    aspect: str
    reputation: str
    subject: str
    length: str

    @property
    def text(self) -> str:
        """The prompt as the policy reads it."""
        sentences = "sentence" if self.length == "one" else "sentences"
        of = f"the {self.aspect} of the {self.reputation} {self.subject}"
        return f"A {self.tone} critic on {of}, in {self.length} {sentences}:"

    @property
    def sentences(self) -> int:
        """Requested number of sentences."""
        return w.LENGTHS.index(self.length) + 1

    @classmethod
    def parse(cls, text: str) -> Brief:
        """Parse a prompt.

        Raises:
            ValueError: If it is not a prompt of the testbed.
        """
        found = _PATTERN.fullmatch(text.strip())
        brief = cls(*found.groups()) if found else None
        if brief is None or brief not in _BRIEF_SET:
            raise InputError(
                f"{text!r} is not a prompt of the testbed: write it like {_BRIEFS[0].text!r}, "
                "or use your own rewards with your own prompts"
            )
        return brief


_BRIEFS = [
    Brief(tone, aspect, reputation, subject, length)
    for subject, aspects in w.SUBJECTS.items()
    for aspect, tone, reputation, length in product(aspects, w.TONES, w.REPUTATIONS, w.LENGTHS)
]
_BRIEF_SET = frozenset(_BRIEFS)
_HELD_OUT = frozenset(Random("held out").sample(_BRIEFS, len(_BRIEFS) // 5))


def briefs(n: int, seed: int = 0, held_out: bool = False) -> list[Brief]:
    """Sample `n` different briefs; held-out and training briefs are disjoint for all seeds.

    Raises:
        ValueError: If the testbed has fewer.
    """
    pool = [brief for brief in _BRIEFS if (brief in _HELD_OUT) == held_out]
    if not 0 < n <= len(pool):
        kind = "held-out" if held_out else "training"
        raise InputError(f"can't sample {n} {kind} prompts: the testbed has {len(pool)}; ask for 1 to {len(pool)}")
    return Random(f"briefs {seed}").sample(pool, n)


def prompts(n: int, seed: int = 0, held_out: bool = False) -> list[dict[str, str]]:
    """Sample `n` different prompts as rows `{"prompt": ...}`; see `briefs`."""
    return [{"prompt": brief.text} for brief in briefs(n, seed, held_out)]


def demonstrations(n: int, seed: int = 0, held_out: bool = False) -> list[dict[str, str]]:
    """Sample `n` rows `{"prompt": ..., "completion": ...}` of varying quality, prompts with replacement."""
    pool = [brief for brief in _BRIEFS if (brief in _HELD_OUT) == held_out]
    rng = Random(f"demonstrations {seed}")
    sampled = rng.choices(pool, k=n)
    return [{"prompt": brief.text, "completion": write(brief, rng)} for brief in sampled]


def write(brief: Brief, rng: Random, care: float | None = None) -> str:
    """Write a review of a quality set by `care`.

    Args:
        brief: Content of the prompt.
        rng: Source of all randomness.
        care: Quality in [0, 1]; 0 is off topic, bland, in the wrong tone and too long. None samples it uniformly.
    """
    writer = _Writer(brief, rng, rng.random() if care is None else care)
    count = brief.sentences
    if not writer.careful(0.3):
        count = rng.randint(1, 4)
    lines: list[str] = []
    for i in range(count):
        lines.append(lines[-1] if lines and not writer.careful(0.4) else writer.sentence(i))
    return " ".join(lines)


@dataclass
class _Writer:
    brief: Brief
    rng: Random
    care: float

    def careful(self, slip: float) -> bool:
        """Return False with probability `slip * (1 - care)`."""
        return self.rng.random() >= slip * (1 - self.care)

    def sentence(self, index: int) -> str:
        """Write the sentence with this index, from 0."""
        praise = self._tone(index)
        shapes = (self._was, self._was, self._was, self._verb, self._felt, self._pair, self._it, self._closing)
        weights = (3, 2, 2, 3, 2, 2, 2 if index else 0.3, 2 if index else 0.3)
        text = self.rng.choices(shapes, weights)[0](praise)
        if self.brief.tone == "fair" and self.careful(0.7) and self.rng.random() < 0.4:
            text = self._contrast(praise)
        return text if self.careful(0.12) else self._slip(text)

    def _tone(self, index: int) -> bool:
        if not self.careful(0.35):
            return self.rng.random() < 0.5
        if self.brief.tone == "fair":
            return index % 2 == 0
        return self.brief.tone == "kind"

    def _noun(self) -> str:
        aspect = self.brief.aspect
        if not self.careful(0.3):
            aspect = self.rng.choice(w.SUBJECTS[self.brief.subject] if self.careful(0.5) else list(w.PARTS))
        return aspect if self.rng.random() < 0.45 else self.rng.choice(w.PARTS[aspect])

    def _adjective(self, noun: str, praise: bool) -> str:
        if not self.careful(0.85):
            return self.rng.choice(w.PLAIN_PRAISE if praise else w.PLAIN_BLAME)
        family = self._family(noun)
        return self.rng.choice(family.praise if praise else family.blame)

    def _family(self, noun: str) -> w.Family:
        return w.NOUN_FAMILY[noun] if self.careful(0.4) else self.rng.choice(w.FAMILIES)

    def _was(self, praise: bool) -> str:
        noun = self._noun()
        degree = f"{self.rng.choice(w.DEGREES)} " if self.rng.random() < 0.5 else ""
        return f"The {noun} {_be(noun)} {degree}{self._adjective(noun, praise)}."

    def _pair(self, praise: bool) -> str:
        noun = self._noun()
        first, second = self._adjective(noun, praise), self._adjective(noun, praise)
        if self.rng.random() < 0.5:
            return f"The {noun} {_be(noun)} {first} and {second}."
        other = self._noun()
        return f"The {noun} {_be(noun)} {first}, and the {other} {self._action(other, praise)}."

    def _contrast(self, praise: bool) -> str:
        noun = self._noun()
        first = self._adjective(noun, praise)
        if self.rng.random() < 0.5:
            return f"The {noun} {_be(noun)} {first} but {self._adjective(noun, not praise)}."
        other = self._noun()
        return f"The {noun} {_be(noun)} {first}, but the {other} {self._action(other, not praise)}."

    def _action(self, noun: str, praise: bool) -> str:
        family = self._family(noun)
        return self.rng.choice(family.praise_verbs if praise else family.blame_verbs)

    def _verb(self, praise: bool) -> str:
        noun = self._noun()
        text = f"The {noun} {self._action(noun, praise)}"
        if not self.careful(0.7):
            return f"{text}."
        bright = praise if self.careful(0.3) else not praise
        first, second = (w.BRIGHT_FIRST, w.BRIGHT_SECOND) if bright else (w.GREY_FIRST, w.GREY_SECOND)
        return f"{text} like {self.rng.choice(first)} {self.rng.choice(second)}."

    def _felt(self, praise: bool) -> str:
        noun, felt = self._noun(), self.rng.choice(w.LIKED if praise else w.DISLIKED)
        adjective = f"{self._adjective(noun, praise)} " if self.rng.random() < 0.5 else ""
        return f"I {felt} the {adjective}{noun}."

    def _it(self, praise: bool) -> str:
        degree = f"{self.rng.choice(w.DEGREES)} " if self.rng.random() < 0.5 else ""
        return f"It was {degree}{self._adjective(self.brief.aspect, praise)}."

    def _closing(self, praise: bool) -> str:
        subject = self.brief.subject if self.careful(0.2) else self.rng.choice(list(w.SUBJECTS))
        if self.rng.random() < 0.5:
            return f"This {subject} was a {self.rng.choice(w.JOYS if praise else w.CHORES)}."
        return f"I would {self.rng.choice(w.SEEK if praise else w.SHUN)} this {subject}."

    def _slip(self, text: str) -> str:
        """Drop or double a random word."""
        parts = text[:-1].split()
        i = self.rng.randrange(len(parts))
        parts[i : i + 1] = [] if self.rng.random() < 0.5 else [parts[i], parts[i]]
        return " ".join(parts) + "."


def _be(noun: str) -> str:
    return "were" if noun in w.PLURAL else "was"
