"""Properties of the reward sum and of the group advantages, for arbitrary values, missing opinions and sizes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf import functional as F
from lit_rlhf.rewards import Guarded, Scorer, Weighted

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
NUMBERS = st.floats(-100, 100, width=32)
OPINIONS = st.none() | NUMBERS


@st.composite
def groups(draw, entries=NUMBERS):
    """Draw n prompts with k entries each."""
    n, k = draw(st.integers(1, 4)), draw(st.integers(1, 5))
    return [[draw(entries) for _ in range(k)] for _ in range(n)]


@st.composite
def mixtures(draw):
    """Draw one to three rewards with their weights, for the same completions."""
    n, k, count = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 3))
    opinions = [[draw(OPINIONS) for _ in range(n * k)] for _ in range(count)]
    return n, k, opinions, [draw(st.sampled_from([-2.0, 0.0, 0.5, 1.0])) for _ in range(count)]


def mix(n, k, opinions, weights, wrap=lambda reward: reward):
    rewards = [
        Weighted(wrap(lambda completions, values=values: [values[int(i)] for i in completions]), weight)
        for values, weight in zip(opinions, weights, strict=True)
    ]
    texts = [[str(i * k + j) for j in range(k)] for i in range(n)]
    return Scorer(rewards)(["p"] * n, texts, [[[1]] * k] * n, [[True] * k] * n)


@QUICK
@given(mixtures())
def test_the_sum_is_weighted_over_the_rewards_with_an_opinion(mixture):
    n, k, opinions, weights = mixture
    scores = mix(*mixture)
    counted = [i for i, weight in enumerate(weights) if weight] or range(len(weights))
    for i in range(n * k):
        parts = [weights[j] * opinions[j][i] for j in range(len(weights)) if opinions[j][i] is not None]
        assert scores.rewards.flatten()[i].item() == pytest.approx(sum(parts), rel=1e-5, abs=1e-3)
        assert bool(scores.valid.flatten()[i]) == any(opinions[j][i] is not None for j in counted)
    for values, got in zip(opinions, scores.component_rewards.values(), strict=True):
        assert got.flatten().isnan().tolist() == [value is None for value in values]


@QUICK
@given(mixtures(), st.integers(1, 3))
def test_batches_of_a_guarded_reward_change_nothing(mixture, size):
    plain, guarded = mix(*mixture), mix(*mixture, wrap=lambda reward: Guarded(reward, batch_size=size, concurrency=2))
    assert torch.equal(plain.rewards, guarded.rewards) and torch.equal(plain.valid, guarded.valid)


ADVANTAGES = [F.rloo_advantages, F.group_centered_advantages, F.group_normalized_advantages]


def split(entries):
    valid = torch.tensor([[entry is not None for entry in row] for row in entries])
    return torch.tensor([[entry or 0.0 for entry in row] for row in entries]), valid


@pytest.mark.parametrize("advantages", ADVANTAGES)
@QUICK
@given(groups(OPINIONS))
def test_advantages_of_a_group_sum_to_0_and_ignore_what_is_not_valid(advantages, entries):
    returns, valid = split(entries)
    found = advantages(returns, valid)
    assert torch.equal(found[~valid], torch.zeros_like(found[~valid]))
    assert found.sum(1).abs().max() <= 1e-3 and bool(found.isfinite().all())
    assert torch.equal(advantages(returns.masked_fill(~valid, 1e6), valid), found)
    for row, keep, whole in zip(returns, valid, found, strict=True):  # as if the others had not been sampled
        if keep.any():
            alone = advantages(row[keep].unsqueeze(0), torch.ones(1, int(keep.sum()), dtype=torch.bool))[0]
            assert torch.allclose(alone, whole[keep], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("advantages", ADVANTAGES)
@QUICK
@given(groups(), st.integers(-8, 8), st.sampled_from([0.25, 2.0]))
def test_advantages_do_not_depend_on_an_offset_or_on_the_order_and_scale_with_the_returns(
    advantages, entries, offset, scale
):
    returns = torch.tensor(entries)
    valid = torch.ones(returns.shape, dtype=torch.bool)
    found = advantages(returns, valid)
    assert torch.allclose(advantages(returns + offset, valid), found, rtol=1e-3, atol=1e-3)
    assert torch.allclose(advantages(returns.flip(0, 1), valid).flip(0, 1), found, rtol=1e-4, atol=1e-4)
    if advantages is not F.group_normalized_advantages:
        assert torch.allclose(advantages(scale * returns, valid), scale * found, rtol=1e-4, atol=1e-4)


@QUICK
@given(groups())
def test_leave_one_out_advantages_are_centered_ones_rescaled(entries):
    returns = torch.tensor(entries)
    valid, k = torch.ones(returns.shape, dtype=torch.bool), returns.shape[1]
    expected = F.group_centered_advantages(returns, valid) * (k / (k - 1) if k > 1 else 0.0)
    assert torch.allclose(F.rloo_advantages(returns, valid), expected, rtol=1e-4, atol=1e-3)


@QUICK
@given(groups(OPINIONS))
def test_the_best_of_a_group_is_one_valid_completion_with_the_highest_return(entries):
    returns, valid = split(entries)
    best = F.best_of_group_mask(returns, valid)
    for row, keep, chosen in zip(returns.tolist(), valid.tolist(), best.tolist(), strict=True):
        highest = max((value for value, kept in zip(row, keep, strict=True) if kept), default=-math.inf)
        assert sum(chosen) == any(keep)
        assert all(row[i] == highest and keep[i] for i, taken in enumerate(chosen) if taken)
