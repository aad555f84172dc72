"""Rewards of completions, shaped like a rollout."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lit_rlhf.rewards import Scorer
from lit_rlhf.types import Completions, Prompts, Text


@dataclass(frozen=True)
class Scores:
    rewards: Float[Tensor, "prompts samples"]
    component_rewards: dict[str, Float[Tensor, "prompts samples"]]
    valid: Bool[Tensor, "prompts samples"]
    has_sequence_reward: Bool[Tensor, "prompts samples"]
    token_rewards: Float[Tensor, "prompts samples tokens"] | None
    metrics: dict[str, float]
    reward_extras: dict[str, list[list[Any]]]

    def total(self) -> Float[Tensor, "prompts samples"]:
        total = self.rewards if self.token_rewards is None else self.rewards + self.token_rewards.sum(-1)
        return total.where(self.valid, torch.nan)


def score(
    scorer: Scorer, prompts: Prompts, completions: Completions, texts: list[list[Text]], state: Any = None
) -> Scores:
    n, k, t = completions.tokens.shape
    device = completions.tokens.device
    scores = scorer(
        prompts=[text for text in prompts.text for _ in range(k)],
        completions=[text for row in texts for text in row],
        completion_ids=completions.ids(),
        finished=completions.finished.flatten().tolist(),
        columns={name: [value for value in column for _ in range(k)] for name, column in prompts.columns.items()},
        state=state,
    )

    def grouped(values: Tensor) -> Tensor:
        return values.view(n, k, *values.shape[1:]).to(device)

    token_rewards = None
    if scores.token_rewards is not None:
        rows = torch.nn.utils.rnn.pad_sequence(scores.token_rewards, batch_first=True)
        token_rewards = grouped(torch.nn.functional.pad(rows, (0, t - rows.shape[1])))
    return Scores(
        rewards=grouped(scores.rewards),
        component_rewards={name: grouped(part) for name, part in scores.parts.items()},
        valid=grouped(scores.valid),
        has_sequence_reward=grouped(scores.whole),
        token_rewards=token_rewards,
        metrics=scores.metrics,
        reward_extras={name: [column[i * k : (i + 1) * k] for i in range(n)] for name, column in scores.extra.items()},
    )
