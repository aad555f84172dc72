"""Simulated raters: noisy preferences between two reviews."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random

from lit_rlhf.testbed.utility import gold


@dataclass(frozen=True)
class Raters:
    """Bradley-Terry raters: `P(a over b) = sigmoid((gold(a) - gold(b)) / temperature)`, with lapses.

    Attributes:
        temperature: Difference in gold that makes the odds e to 1; lower values give less noise.
        lapse: Probability that a rater chooses at random.
    """

    temperature: float = 0.2
    lapse: float = 0.05

    def probability(self, gold_a: float, gold_b: float) -> float:
        """Return the probability that raters prefer the first of two completions, given the gold of each."""
        bradley_terry = 1 / (1 + math.exp((gold_b - gold_a) / self.temperature))
        return self.lapse / 2 + (1 - self.lapse) * bradley_terry

    def preferences(self, pairs: Iterable[tuple[str, Sequence[str]]], seed: int = 0) -> list[dict[str, str]]:
        """Sample a preference for each pair.

        Args:
            pairs: `(prompt, (completion, completion))` tuples; pairs of equal completions are dropped.
            seed: Seed of the raters' noise.

        Returns:
            Rows `{"prompt": ..., "chosen": ..., "rejected": ...}`.
        """
        rng, rows = Random(f"raters {seed}"), []
        for prompt, (first, second) in pairs:
            if first == second:
                continue
            probability = self.probability(*gold(prompts=[prompt] * 2, completions=[first, second]))
            chosen, rejected = (first, second) if rng.random() < probability else (second, first)
            rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
        return rows
