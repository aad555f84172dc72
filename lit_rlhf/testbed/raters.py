"""Simulated people who say which of two reviews they prefer, and are not always right."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from lit_rlhf.testbed.utility import gold


@dataclass(frozen=True)
class Raters:
    """Raters who prefer by Bradley and Terry: `P(a over b) = sigmoid((gold(a) - gold(b)) / temperature)`.

    Attributes:
        temperature: Gold that is worth e to 1 odds; the lower, the surer they are.
        lapse: How often a rater does not look and tosses a coin.
    """

    temperature: float = 0.2
    lapse: float = 0.05

    def probability(self, gold_a: float, gold_b: float) -> float:
        """Return how likely they prefer the first of two completions, given what each is worth."""
        odds = 1 / (1 + math.exp((gold_b - gold_a) / self.temperature))
        return self.lapse / 2 + (1 - self.lapse) * odds

    def preferences(self, pairs: Iterable[tuple[str, Sequence[str]]], seed: int = 0) -> list[dict[str, str]]:
        """Ask for a preference about each pair.

        Args:
            pairs: A prompt and its two completions each; where the two are equal, nobody is asked.
            seed: Decides the noise.

        Returns:
            Rows `{"prompt": ..., "chosen": ..., "rejected": ...}`.
        """
        rng, rows = Random(f"raters {seed}"), []
        for prompt, (first, second) in pairs:
            if first == second:
                continue
            likely = self.probability(*gold(prompts=[prompt] * 2, completions=[first, second]))
            chosen, rejected = (first, second) if rng.random() < likely else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return rows
