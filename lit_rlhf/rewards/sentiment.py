"""Sentiment of English text, from a lexicon and rules: fast, needs no model, and is easily fooled."""

from __future__ import annotations

from lit_rlhf.rewards.functions import to_text
from lit_rlhf.types import Text


class Sentiment:
    """The compound score of VADER, from -1 (most negative) to 1 (most positive). Hutto and Gilbert, 2014.

    Args:
        with_prompt: Whether to score prompt and completion as one text, for completions that go on in mid-sentence.

    Raises:
        ImportError: If the package vaderSentiment is not installed.
    """

    def __init__(self, with_prompt: bool = False) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise ImportError(
                "the reward Sentiment needs the package vaderSentiment: pip install 'lit_rlhf[sentiment]'"
            ) from error
        self.with_prompt = with_prompt
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: list[Text], completions: list[Text]) -> list[float]:
        """Return one number a completion, from -1 to 1."""
        pairs = zip(prompts, completions, strict=True)
        return [self._value(prompt if self.with_prompt else "", completion) for prompt, completion in pairs]

    def _value(self, prompt: Text, completion: Text) -> float:
        blank = "" if isinstance(completion, str) else "\n"  # a string goes on where its prompt stops
        text = to_text(prompt) + blank + to_text(completion)
        return float(self._analyzer.polarity_scores(text)["compound"])
