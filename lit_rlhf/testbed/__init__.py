"""Embedded testbed: a small synthetic world of reviews with simulated raters and a hidden gold utility.

RLHF in a minute, offline, on a laptop: `policy="testbed"` is a tiny language model fine-tuned on short reviews,
`ReviewReward` is a reward model trained on noisy preferences, and `gold` is the hidden utility that evaluates results.
Both models are shipped; `python -m lit_rlhf.testbed.build` rebuilds them.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from lit_rlhf.data import PreferenceData, PromptData
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.pretrained import SHIPPED
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testbed.pairs import sampled_pairs, with_preferred
from lit_rlhf.testbed.raters import Raters
from lit_rlhf.testbed.tokenizer import make_tokenizer
from lit_rlhf.testbed.utility import GoodReview, Grammatical, UnequalScale, coherence, gold, grammatical
from lit_rlhf.testbed.world import Brief, briefs, demonstrations, prompts

__all__ = [
    "POLICY",
    "REWARD_MODEL",
    "Brief",
    "GoodReview",
    "Grammatical",
    "Raters",
    "ReviewPreferences",
    "ReviewPrompts",
    "ReviewReward",
    "UnequalScale",
    "briefs",
    "coherence",
    "demonstrations",
    "gold",
    "grammatical",
    "make_tokenizer",
    "prompts",
]

POLICY = SHIPPED["testbed"]
"""Folder of the shipped policy: a causal language model after SFT."""

REWARD_MODEL = Path(__file__).parent / "assets" / "reward_model"
"""Folder of the shipped reward model: a sequence-classification model with one label."""


class ReviewPrompts(PromptData):
    """Prompts of the testbed. Held-out prompts are never used in training, for any seed.

    Held-out rows have a column `preferred`: of two reviews by the grammar's writer, the one that the raters prefer.

    Args:
        train_size: Number of training prompts, at most 1016.
        val_size: Number of validation prompts, at most 253.
        batch_size: Prompts per rollout.
        eval_batch_size: Prompts per batch outside training; None means `batch_size`.
        seed: Seed of the selection.
    """

    def __init__(
        self,
        train_size: int = 1000,
        val_size: int = 64,
        batch_size: int = 32,
        eval_batch_size: int | None = None,
        seed: int = 0,
    ) -> None:
        held_out = with_preferred(prompts(val_size, seed, held_out=True), seed)
        rows: dict[str, Any] = dict(train=prompts(train_size, seed), val=held_out)
        super().__init__(**rows, batch_size=batch_size, eval_batch_size=eval_batch_size)


class ReviewPreferences(PreferenceData):
    """Preference pairs: samples of the shipped policy (some paired with a text of the grammar's writer), rated.

    Args:
        train_size: Number of training pairs; the few pairs of equal texts are dropped.
        val_size: Number of validation pairs, on held-out prompts.
        batch_size: Pairs per step.
        seed: Seed of the prompts, the samples and the raters.
    """

    def __init__(self, train_size: int = 4096, val_size: int = 256, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size)
        self.sizes, self.pairs_seed = {"train": train_size, "val": val_size}, seed

    def setup(self, stage: str = "fit") -> None:
        """Sample the pairs and let the raters judge them, once; then see `TextData`."""
        if self.train is None:
            policy = Policy.from_pretrained(POLICY)
            self.train, self.val = (self._rated_pairs(policy, split) for split in ("train", "val"))
        super().setup(stage)

    def _rated_pairs(self, policy: Policy, split: str) -> list[dict[str, str]]:
        size, seed, held_out = self.sizes[split], self.pairs_seed, split == "val"
        rows = prompts(min(253 if held_out else 1016, -(-size // 2)), seed, held_out=held_out)
        pairs = sampled_pairs([policy], rows, -(-size // (2 * len(rows))), seed)
        return Raters().preferences(islice(pairs, size), seed)


class ReviewReward(RewardModel):
    """Shipped reward model, trained on the preferences of the testbed's noisy raters.

    Args:
        model: Folder of the model, such as one that the build command wrote.
        batch_size: Completions per forward pass.
    """

    def __init__(self, model: str | Path = REWARD_MODEL, batch_size: int = 128) -> None:
        super().__init__(model, batch_size=batch_size)
