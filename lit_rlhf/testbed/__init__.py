"""The embedded default: a small written world with simulated raters and a gold utility that measures what is asked for.

RLHF in a minute, offline, on a laptop: `policy="testbed"` is a tiny language model fine-tuned on short reviews,
`ReviewReward` a reward model learned from noisy preferences, `gold` the hidden utility that judges. The two models
are shipped; `python -m lit_rlhf.testbed.build` makes them again.
"""

from __future__ import annotations

from itertools import islice
from pathlib import Path
from typing import Any

from lit_rlhf.data import PreferenceData, PromptData
from lit_rlhf.models.loading import SHIPPED
from lit_rlhf.models.policy import Policy
from lit_rlhf.rewards import RewardModel
from lit_rlhf.testbed.pairs import sampled_pairs, with_preferred
from lit_rlhf.testbed.raters import Raters
from lit_rlhf.testbed.tokenizer import make_tokenizer
from lit_rlhf.testbed.utility import Grammatical, coherence, gold, grammatical
from lit_rlhf.testbed.world import Brief, briefs, demonstrations, prompts

__all__ = [
    "POLICY",
    "REWARD_MODEL",
    "Brief",
    "Grammatical",
    "Raters",
    "ReviewPreferences",
    "ReviewPrompts",
    "ReviewReward",
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
    """The prompts of the testbed. Held-out ones are never trained on, whatever the seed.

    Held-out rows have a column `preferred`: the one of two written reviews that the raters prefer.

    Args:
        train_size: Prompts to train on, at most all 1016 of them.
        val_size: Prompts to validate on, at most all 253.
        batch_size: Prompts of a rollout.
        eval_batch_size: The same outside training; as `batch_size` where None.
        seed: Of the choice.
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
    """Pairs of the shipped policy's samples, some beside a text of the grammar's writer, and the raters' judgement.

    Args:
        train_size: Pairs to train on; a few that raters can't tell apart are left out.
        val_size: Pairs to validate on, of held-out prompts.
        batch_size: Pairs a step.
        seed: Of the prompts, the samples and the raters.
    """

    def __init__(self, train_size: int = 4096, val_size: int = 256, batch_size: int = 64, seed: int = 0) -> None:
        super().__init__(batch_size=batch_size)
        self.sizes, self.pairs_seed = {"train": train_size, "val": val_size}, seed

    def setup(self, stage: str = "fit") -> None:
        """Sample the pairs and have them judged, once; then see `TextData`."""
        if self.train is None:
            policy = Policy.from_pretrained(POLICY)
            self.train, self.val = (self._judged(policy, part) for part in ("train", "val"))
        super().setup(stage)

    def _judged(self, policy: Policy, part: str) -> list[dict[str, str]]:
        size, seed, held_out = self.sizes[part], self.pairs_seed, part == "val"
        rows = prompts(min(253 if held_out else 1016, -(-size // 2)), seed, held_out=held_out)
        pairs = sampled_pairs([policy], rows, -(-size // (2 * len(rows))), seed)
        return Raters().preferences(islice(pairs, size), seed)


class ReviewReward(RewardModel):
    """The shipped reward model: what noisy raters of the testbed seem to like.

    Args:
        model: Another folder, such as one that the build command wrote.
        batch_size: Completions a forward pass.
    """

    def __init__(self, model: str | Path = REWARD_MODEL, batch_size: int = 128) -> None:
        super().__init__(model, batch_size=batch_size)
