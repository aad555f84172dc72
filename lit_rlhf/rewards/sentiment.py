"""Sentiment of English text by a lexicon and rules: fast and without a model, but easy to exploit."""

from __future__ import annotations

from lit_rlhf.errors import MissingPackageError
from lit_rlhf.rewards.functions import to_text
from lit_rlhf.types import Text


class Sentiment:
    """The compound score of VADER, from -1 (most negative) to 1 (most positive). Hutto and Gilbert, 2014.

    Args:
        with_prompt: Whether to score prompt and completion as one text, for completions that continue a sentence.

    Raises:
        ImportError: If the package vaderSentiment is not installed.
    """

    def __init__(self, with_prompt: bool = False) -> None:
        try:
            from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
        except ImportError as error:
            raise MissingPackageError(
                "the reward Sentiment needs the package vaderSentiment: pip install 'lit_rlhf[sentiment]'"
            ) from error
        self.with_prompt = with_prompt
        self._analyzer = SentimentIntensityAnalyzer()

    def __call__(self, prompts: list[Text], completions: list[Text]) -> list[float]:
        """Return one number per completion, from -1 to 1."""
        pairs = zip(prompts, completions, strict=True)
        return [self._value(prompt if self.with_prompt else "", completion) for prompt, completion in pairs]

    def _value(self, prompt: Text, completion: Text) -> float:
        separator = "" if isinstance(completion, str) else "\n"  # a string directly continues its prompt
        text = to_text(prompt) + separator + to_text(completion)
        return float(self._analyzer.polarity_scores(text)["compound"])
