"""Rewards of the completions of a batch."""

from __future__ import annotations

import dataclasses

import torch
from transformers import TrainerState

from lit_rlhf.rewards import Scorer, Scores
from lit_rlhf.types import Completions, Prompts, Text


def score(
    scorer: Scorer, prompts: Prompts, completions: Completions, texts: list[list[Text]], state: TrainerState
) -> Scores:
    """Return the rewards of every completion, on its device.

    Args:
        scorer: The rewards.
        prompts: The prompts.
        completions: Their completions.
        texts: The completions as text, `[prompt][sample]`.
        state: Progress of training.
    """
    n, k, length = completions.tokens.shape
    ids, finished = completions.ids(), completions.finished.tolist()
    nested = [ids[i * k : (i + 1) * k] for i in range(n)]
    texts_of_prompts = prompts.text or [""] * n
    scores = scorer(texts_of_prompts, texts, nested, finished, prompts.columns, state)
    scores = scores.to(completions.tokens.device)
    if scores.token_rewards is None:
        return scores
    missing = length - scores.token_rewards.shape[-1]  # columns that no completion fills
    return dataclasses.replace(scores, token_rewards=torch.nn.functional.pad(scores.token_rewards, (0, missing)))
