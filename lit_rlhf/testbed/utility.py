"""Gold utility of a review, hidden from training, and two rewards that training may use.

`gold` evaluates results. The raters of `lit_rlhf.testbed.raters` prefer by gold plus noise, and a reward model is
trained on their preferences. So reward over-optimization, a rising reward with falling gold, can be measured.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lit_rlhf.testbed import grammar
from lit_rlhf.testbed import words as w
from lit_rlhf.testbed.tokenizer import vocabulary, words_of
from lit_rlhf.testbed.world import Brief

FLOOR = -2.0
"""Lower bound of the gold utility."""

_CREDIBILITY = {("kind", "troubled"): 0.3, ("harsh", "famous"): 0.3, ("fair", "troubled"): 0.7, ("fair", "famous"): 0.7}
_COMMON = frozenset("The the was were It I This this would a and but like , .".split()).union(w.SUBJECTS)


@dataclass(frozen=True)
class _Sentence:
    """Content of one sentence: its nouns and subjects, counts of praise and blame, and vividness."""

    words: list[str]
    nouns: list[str]
    subjects: list[str]
    praise: int
    blame: int
    vivid: float

    @classmethod
    def read(cls, words: list[str], aspect: str) -> _Sentence:
        """Parse the words of a sentence in a review of this aspect."""
        nouns = [word for word in words if word in w.NOUN_FAMILY]
        simile = [word for word in words if word in w.SIMILE]
        praise = sum(word in w.PRAISE for word in words if word not in simile) + any(s in w.PRAISE for s in simile)
        blame = sum(word in w.BLAME for word in words if word not in simile) + any(s in w.BLAME for s in simile)
        subjects = [word for word in words if word in w.SUBJECTS]
        return cls(words, nouns, subjects, praise, blame, _vividness(words, nouns or [aspect]))

    def topic(self, brief: Brief, known: bool) -> float:
        """Topic score: 1 for the aspect or its parts, less if only the subject is named, below 0 off topic."""
        if self.nouns:
            own = {brief.aspect, *w.PARTS[brief.aspect]}
            return 1.0 if own.issuperset(self.nouns) else -0.3 if own.isdisjoint(self.nouns) else 0.2
        if self.subjects:
            return 0.7 if set(self.subjects) == {brief.subject} else -0.3
        return 0.7 if known else 0.3

    def contradicts_itself(self) -> bool:
        """Return whether praise and blame occur without a "but", or a "but" without both."""
        return bool(self.praise and self.blame) != ("but" in self.words)


def _vividness(words: Sequence[str], nouns: Sequence[str]) -> float:
    """Vividness in [-0.5, 1]: words that fit the noun and a simile raise it, words that do not fit lower it."""
    special = [word for word in words if any(word in family.fitting for family in w.FAMILIES)]
    fitting = w.NOUN_FAMILY[nouns[0]].fitting
    fit = sum(word in fitting for word in special)
    score = 0.5 * fit - 0.6 * (len(special) - fit) + 0.5 * (len(set(words) & w.SIMILE) == 2)
    return max(-0.5, min(1.0, score))


def _tone(brief: Brief, sentence: _Sentence) -> float:
    """Tone score: 1 for the tone of the prompt, -1 for the opposite."""
    if sentence.contradicts_itself():
        return -0.6
    if brief.tone == "fair":
        return 1.0 if sentence.praise or sentence.blame else 0.3
    wanted, unwanted = (sentence.praise, sentence.blame) if brief.tone == "kind" else (sentence.blame, sentence.praise)
    return -1.0 if unwanted else 1.0 if wanted else 0.3


def _merit(brief: Brief, sentence: _Sentence, known: bool) -> float:
    topic, tone = sentence.topic(brief, known), _tone(brief, sentence)
    credibility = _CREDIBILITY.get((brief.tone, brief.reputation), 1.0)
    quality = 0.3 + (0.9 * credibility if sentence.vivid > 0 else 0.9) * sentence.vivid
    if min(topic, tone) < 0:
        return -0.4 * (1 + max(0.0, quality))
    return topic * tone * quality


def _repeats(words: Sequence[str]) -> int:
    counts = Counter(word for word in words if word not in _COMMON)
    return sum(count - 1 for count in counts.values())


def utility(prompt: str, completion: str) -> float:
    """Return the gold utility of one completion; see `gold`."""
    brief, words = Brief.parse(prompt), words_of(completion)
    read = [_Sentence.read(sentence, brief.aspect) for sentence in grammar.sentences(words)]
    known, total = False, 0.0
    for i, sentence in enumerate(read[: brief.sentences]):
        repeated = sentence in read[:i]
        total += -0.5 if repeated else _merit(brief, sentence, known)
        known = known or sentence.topic(brief, known) == 1.0
    if brief.tone == "fair" and not (any(s.praise for s in read) and any(s.blame for s in read)):
        total = min(total, 0.0) - 0.3
    shapes = Counter(" ".join(word for word in s.words if word in _COMMON - set(w.SUBJECTS)) for s in read)
    total -= 0.5 * abs(len(read) - brief.sentences)
    total -= 0.4 * _repeats(words) + 0.15 * (len(read) - len(shapes))
    total -= 0.5 * (grammar.well_placed(words).count(False) + (not grammar.complete(words)))
    return max(FLOOR, total)


def gold(*, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Hidden utility of each completion: has the signature of a reward, but is meant for evaluation only.

    Each sentence, up to the requested length, earns up to 1.2 if it is on the aspect, in the right tone and vivid, all
    three at once. Sentences that are off topic, in the opposite tone or repeated cost. Repeated words, each sentence
    more or less than requested, ungrammatical words and an incomplete last sentence cost too. A fair review needs both
    praise and blame. The lower bound is `FLOOR`.

    Raises:
        ValueError: If a prompt is not from the testbed.
    """
    return [utility(prompt, completion) for prompt, completion in zip(prompts, completions, strict=True)]


class GoodReview:
    """Reward that can be verified: 1 if the hidden utility of a completion is above a threshold, else 0.

    Args:
        threshold: The policy after SFT exceeds 0.5 with three of ten samples.
    """

    def __init__(self, threshold: float = 0.5) -> None:
        self.threshold = threshold

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Return 1 or 0 per completion."""
        return [float(value > self.threshold) for value in gold(prompts=prompts, completions=completions)]


class UnequalScale:
    """Hidden utility times a factor that depends on the prompt: prompts differ in the scale of their rewards alone.

    Args:
        factors: Each is that of an equal share of the prompts.
    """

    def __init__(self, factors: Sequence[float] = (0.1, 1.0, 10.0)) -> None:
        self.factors = list(factors)

    def __call__(self, *, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
        """Return one number per completion."""
        factors = [self.factors[zlib.crc32(prompt.encode()) % len(self.factors)] for prompt in prompts]
        values = gold(prompts=prompts, completions=completions)
        return [factor * value for factor, value in zip(factors, values, strict=True)]


def coherence(*, prompts: Sequence[str], completions: Sequence[str], **columns: Any) -> list[float]:
    """Delayed reward: fraction of sentences that are on topic and contradict neither themselves nor the majority.

    In [0, 1]; 0 for an empty completion.

    Raises:
        ValueError: If a prompt is not from the testbed.
    """
    return [_coherence(Brief.parse(p), words_of(c)) for p, c in zip(prompts, completions, strict=True)]


def _coherence(brief: Brief, words: Sequence[str]) -> float:
    read = [_Sentence.read(sentence, brief.aspect) for sentence in grammar.sentences(words)]
    coherent = [s.topic(brief, True) > 0 and not s.contradicts_itself() for s in read]
    if brief.tone != "fair":
        praise, blame = sum(s.praise > 0 for s in read), sum(s.blame > 0 for s in read)
        coherent = [ok and not (s.blame if praise >= blame else s.praise) for ok, s in zip(coherent, read, strict=True)]
    return sum(coherent) / len(coherent) if coherent else 0.0


class Grammatical:
    """Immediate reward, one number per token: 0 if the grammar allows the token in its position, else -1.

    A positive reward for each correct token would reward length, so only wrong tokens count. The EOS token is allowed
    after a full stop. The ids are those of the testbed's tokenizer.
    """

    token_level = True

    def __call__(self, *, completion_ids: Sequence[Sequence[int]], **columns: Any) -> list[list[float]]:
        """Return the rewards of each token of each completion."""
        return [self._judge([vocabulary()[i] for i in ids]) for ids in completion_ids]

    def _judge(self, tokens: list[str]) -> list[float]:
        ended = bool(tokens) and tokens[-1] == "<eos>"
        words = tokens[:-1] if ended else tokens
        verdicts = grammar.well_placed(words) + [grammar.complete(words)] * ended
        return [0.0 if ok else -1.0 for ok in verdicts]


grammatical = Grammatical()
