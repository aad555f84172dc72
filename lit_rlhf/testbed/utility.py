"""What a review is really worth: the utility that no training ever sees, and two signals that training may use.

`gold` judges results. The raters of `lit_rlhf.testbed.raters` feel it through noise, and a reward model learns from
them; the difference between the two is reward over-optimisation, and can be measured here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlhf.testbed import grammar
from lit_rlhf.testbed import words as w
from lit_rlhf.testbed.tokenizer import vocabulary, words_of
from lit_rlhf.testbed.world import Brief

FLOOR = -2.0
"""The least that a review is worth: the worst are all alike."""

_WELCOME = {("kind", "troubled"): 0.3, ("harsh", "famous"): 0.3, ("fair", "troubled"): 0.7, ("fair", "famous"): 0.7}
_COMMON = frozenset("The the was were It I This this would a and but like , .".split()).union(w.SUBJECTS)


@dataclass(frozen=True)
class _Sentence:
    """What one sentence says: about what, for or against, and how vividly."""

    words: list[str]
    nouns: list[str]
    subjects: list[str]
    praise: int
    blame: int
    vivid: float

    @classmethod
    def read(cls, words: list[str], aspect: str) -> _Sentence:
        """Read the words of a sentence in a review of this aspect."""
        nouns = [word for word in words if word in w.NOUN_FAMILY]
        simile = [word for word in words if word in w.SIMILE]
        praise = sum(word in w.PRAISE for word in words if word not in simile) + any(s in w.PRAISE for s in simile)
        blame = sum(word in w.BLAME for word in words if word not in simile) + any(s in w.BLAME for s in simile)
        subjects = [word for word in words if word in w.SUBJECTS]
        return cls(words, nouns, subjects, praise, blame, _vividness(words, nouns or [aspect]))

    def topic(self, brief: Brief, known: bool) -> float:
        """1 on the aspect or its parts, less where only the subject is named, below 0 on something else."""
        if self.nouns:
            own = {brief.aspect, *w.PARTS[brief.aspect]}
            return 1.0 if own.issuperset(self.nouns) else -0.3 if own.isdisjoint(self.nouns) else 0.2
        if self.subjects:
            return 0.7 if set(self.subjects) == {brief.subject} else -0.3
        return 0.7 if known else 0.3

    def contradicts_itself(self) -> bool:
        """Praise and blame without a "but" between them, or a "but" without both."""
        return bool(self.praise and self.blame) != ("but" in self.words)


def _vividness(words: Sequence[str], nouns: Sequence[str]) -> float:
    """From 0, bland, to 1: words that suit what they are said of, and an image; unfit ones take it away."""
    special = [word for word in words if any(word in family.fitting for family in w.FAMILIES)]
    fitting = w.NOUN_FAMILY[nouns[0]].fitting
    fit = sum(word in fitting for word in special)
    score = 0.5 * fit - 0.6 * (len(special) - fit) + 0.5 * (len(set(words) & w.SIMILE) == 2)
    return max(-0.5, min(1.0, score))


def _tone(brief: Brief, sentence: _Sentence) -> float:
    """1 where the sentence speaks in the tone asked for, -1 where it speaks against it."""
    if sentence.contradicts_itself():
        return -0.6
    if brief.tone == "fair":
        return 1.0 if sentence.praise or sentence.blame else 0.3
    wanted, unwanted = (sentence.praise, sentence.blame) if brief.tone == "kind" else (sentence.blame, sentence.praise)
    return -1.0 if unwanted else 1.0 if wanted else 0.3


def _merit(brief: Brief, sentence: _Sentence, known: bool) -> float:
    topic, tone = sentence.topic(brief, known), _tone(brief, sentence)
    welcome = _WELCOME.get((brief.tone, brief.standing), 1.0)
    worth = 0.3 + (0.9 * welcome if sentence.vivid > 0 else 0.9) * sentence.vivid
    if min(topic, tone) < 0:
        return -0.4 * (1 + max(0.0, worth))
    return topic * tone * worth


def _repeats(words: Sequence[str]) -> int:
    counts = Counter(word for word in words if word not in _COMMON)
    return sum(count - 1 for count in counts.values())


def utility(prompt: str, completion: str) -> float:
    """What one completion is worth for one prompt; see `gold`."""
    brief, words = Brief.parse(prompt), words_of(completion)
    read = [_Sentence.read(sentence, brief.aspect) for sentence in grammar.sentences(words)]
    known, total = False, 0.0
    for i, sentence in enumerate(read[: brief.sentences]):
        said_before = sentence in read[:i]
        total += -0.5 if said_before else _merit(brief, sentence, known)
        known = known or sentence.topic(brief, known) == 1.0
    if brief.tone == "fair" and not (any(s.praise for s in read) and any(s.blame for s in read)):
        total = min(total, 0.0) - 0.3
    shapes = Counter(" ".join(word for word in s.words if word in _COMMON - set(w.SUBJECTS)) for s in read)
    total -= 0.5 * abs(len(read) - brief.sentences)
    total -= 0.4 * _repeats(words) + 0.15 * (len(read) - len(shapes))
    total -= 0.5 * (grammar.well_placed(words).count(False) + (not grammar.complete(words)))
    return max(FLOOR, total)


def gold(*, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """The hidden utility of each completion: a reward, though nothing should be trained on it.

    Each sentence up to the length asked for earns up to 1.2 by being on the aspect, in the tone and vivid, all three
    at once; off the subject, against the tone or said before it costs. Repeated words, a sentence more or less than
    asked for, ungrammatical words and a broken end cost too, and a fair review needs both praise and blame. Nothing
    is below `FLOOR`.

    Raises:
        ValueError: If a prompt is none of the testbed's.
    """
    return [utility(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


def coherence(*, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """A delayed reward: the share of sentences that stay on the subject and contradict neither themselves nor the rest.

    From 0 to 1; 0 for an empty completion.

    Raises:
        ValueError: If a prompt is none of the testbed's.
    """
    return [_coherence(Brief.parse(p), words_of(c)) for p, c in zip(prompts, completions, strict=True)]


def _coherence(brief: Brief, words: Sequence[str]) -> float:
    read = [_Sentence.read(sentence, brief.aspect) for sentence in grammar.sentences(words)]
    sound = [s.topic(brief, True) > 0 and not s.contradicts_itself() for s in read]
    if brief.tone != "fair":
        praise, blame = sum(s.praise > 0 for s in read), sum(s.blame > 0 for s in read)
        sound = [ok and not (s.blame if praise >= blame else s.praise) for ok, s in zip(sound, read, strict=True)]
    return sum(sound) / len(sound) if sound else 0.0


class Grammatical:
    """An immediate reward, a number a token: 0 where the token may stand there, -1 where it may not.

    Paying for every good token would pay for length, so only the bad ones count. The end of sequence may stand after
    a full stop. Reads the ids of the testbed's own tokenizer.
    """

    token_level = True

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[list[float]]:
        """Judge each token of each completion."""
        return [self._judge([vocabulary()[i] for i in ids]) for ids in completion_ids]

    def _judge(self, tokens: list[str]) -> list[float]:
        ended = bool(tokens) and tokens[-1] == "<eos>"
        words = tokens[:-1] if ended else tokens
        verdicts = grammar.well_placed(words) + [grammar.complete(words)] * ended
        return [0.0 if ok else -1.0 for ok in verdicts]


grammatical = Grammatical()
