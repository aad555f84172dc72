"""Rewards, and a scorer call on three prompts, for tests of rewards."""

import asyncio

import torch

from lit_rlhf.rewards import Scorer

IDS = [[5, 6, 2], [7, 2], [8, 9, 9, 9]]


def score(rewards, state=None, **columns):
    """Score three prompts with one completion each; the scores have shape [3, 1]."""
    prompts, completions = ["p0", "p1", "p2"], [["c0"], ["c1"], ["c2"]]
    ids = [[row] for row in IDS]
    return Scorer(rewards)(prompts, completions, ids, [[True], [True], [False]], columns, state)


def flat(scores):
    """Return the weighted sums as a list with one entry per completion."""
    return scores.rewards.flatten().tolist()


def component(scores, name):
    return scores.component_rewards[name].flatten()


def ones(completions, **kwargs):
    return [1.0] * len(completions)


def by_name(completions, answer):
    return answer


async def asynchronous(completions, **kwargs):
    await asyncio.sleep(0)
    return [None, 2, 3.0]


class TokenObject:
    token_level = True

    def __call__(self, completion_ids, **kwargs):
        return [[0.5] * len(completion_ids[0]), None, torch.arange(4)]
