"""Group-relative advantages (RLOO, GRPO, Dr. GRPO) against hand-computed numbers and loops, in float64."""

import math
import statistics

import pytest
import torch

from lit_rlhf import functional as F
from tensors import double, rewards_of

assert_close = torch.testing.assert_close


def loop_leave_one_out(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """Compute leave-one-out advantages by definition, one completion at a time."""
    result = torch.zeros_like(rewards)
    for i, j in valid.nonzero().tolist():
        siblings = [rewards[i, s] for s in range(rewards.shape[1]) if s != j and valid[i, s]]
        if siblings:
            result[i, j] = rewards[i, j] - sum(siblings) / len(siblings)
    return result


# Leave-one-out advantages


def test_rloo_matches_hand_computed_advantages():
    advantages = F.rloo_advantages(double([2, 0.5, 1.5, -0.5]))
    assert_close(advantages, double([1.5, -0.5, 2.5 / 3, -5.5 / 3]), atol=1e-12, rtol=0)


def test_rloo_with_binary_rewards():
    binary = double([1, 0, 0, 1, 0, 1, 0, 0])
    assert_close(F.rloo_advantages(binary), binary * 5 / 7 - (1 - binary) * 3 / 7, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_equals_k_over_k_minus_1_times_the_centered_reward(k):
    rewards = rewards_of(k=k)
    centered = rewards - rewards.mean(1, keepdim=True)
    assert_close(F.rloo_advantages(rewards), k / (k - 1) * centered, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_sums_to_zero_per_group_and_is_invariant_to_a_shift(k):
    rewards, shift = rewards_of(k=k), double([0.0], [-7.0], [1e3])
    advantages = F.rloo_advantages(rewards)
    assert_close(advantages.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(F.rloo_advantages(rewards + shift), advantages, atol=1e-11, rtol=0)


def test_rloo_loss_for_k_2_is_half_the_reward_difference_times_the_logprob_difference():
    rewards, logprobs = rewards_of(k=2), rewards_of(k=2, seed=1)
    mask = torch.ones(3, 2, 1, dtype=torch.bool)
    terms = F.reinforce_loss(logprobs.unsqueeze(-1), F.rloo_advantages(rewards), mask)
    first, second = rewards.unbind(1)
    pair = (first - second) / 2 * (-logprobs[:, 0] + logprobs[:, 1])
    assert_close(terms.mean(1), pair, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_zero_rloo_advantages(dtype):
    """Otherwise Adam would scale a rounding error up to the size of any other gradient."""
    rewards = torch.tensor([[0.7] * 3, [0.0] * 3, [-1e5 / 3] * 3], dtype=dtype)
    assert (F.rloo_advantages(rewards) == 0).all()
    valid = torch.tensor([True, False, True]).expand(3, 3)
    assert (F.rloo_advantages(rewards.where(valid, torch.nan), valid) == 0).all()


@pytest.mark.parametrize("trial", range(5))
def test_rloo_ignores_invalid_completions(trial):
    """Their advantages are 0, and their values affect neither baselines nor divisors."""
    generator = torch.Generator().manual_seed(trial)
    valid = torch.rand(6, 4, generator=generator) < 0.6
    rewards = rewards_of(6, 4, trial).where(valid, torch.nan)
    assert_close(F.rloo_advantages(rewards, valid), loop_leave_one_out(rewards, valid), atol=1e-12, rtol=0)


def test_rloo_is_zero_without_valid_siblings():
    valid = torch.tensor([[True, False, False], [False, False, False]])
    assert (F.rloo_advantages(double([5, 1, 2], [3, 4, 5]), valid) == 0).all()


def test_token_level_rloo_baseline_is_per_position_and_counts_finished_siblings_as_zero():
    to_go = double([[3, 1, 0], [2, 0, 0], [6, 5, 4]])
    expected = double([[3 - 4, 1 - 2.5, -2], [2 - 4.5, -3, -2], [6 - 2.5, 5 - 0.5, 4]])
    assert_close(F.rloo_advantages(to_go), expected, atol=1e-12, rtol=0)


def test_token_level_rloo_ignores_invalid_completions_at_every_token():
    to_go = rewards_of(2, 12).view(2, 4, 3)
    valid = torch.tensor([[True, True, False, True], [False, True, False, False]])
    expected = torch.stack([loop_leave_one_out(to_go[..., t], valid) for t in range(3)], -1)
    assert_close(F.rloo_advantages(to_go, valid), expected, atol=1e-12, rtol=0)


# GRPO and Dr. GRPO


def loop_group_advantages(returns: torch.Tensor, valid: torch.Tensor, eps: float | None) -> torch.Tensor:
    """Compute advantages by definition, one group at a time; without normalization if `eps` is None."""
    result = torch.zeros_like(returns)
    for i, row in enumerate(returns.tolist()):
        indices = [j for j in range(len(row)) if valid[i, j]]
        if len(indices) < 2:
            continue
        mean = statistics.fmean(row[j] for j in indices)
        scale = 1.0 if eps is None else statistics.stdev([row[j] for j in indices]) + eps
        for j in indices:
            result[i, j] = (row[j] - mean) / scale
    return result


def all_valid(returns: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(returns, dtype=torch.bool)


def test_group_advantages_match_hand_computed_numbers():
    returns = double([2, 0.5, 1.5, -0.5])
    centered = double([1.125, -0.375, 0.625, -1.375])
    std = math.sqrt((1.125**2 + 0.375**2 + 0.625**2 + 1.375**2) / 3)
    assert_close(F.group_centered_advantages(returns, all_valid(returns)), centered, atol=1e-12, rtol=0)
    normalized = F.group_normalized_advantages(returns, all_valid(returns))
    assert_close(normalized, centered / (std + 1e-4), atol=1e-12, rtol=0)


def test_group_advantages_with_binary_rewards():
    binary = double([1, 0, 0, 1, 0, 1, 0, 0])
    valid = all_valid(binary)
    assert_close(F.group_centered_advantages(binary, valid), binary * 0.625 - (1 - binary) * 0.375, atol=1e-12, rtol=0)
    normalized = F.group_normalized_advantages(binary, valid, eps=0.0)
    assert_close(normalized, binary * 1.2076 - (1 - binary) * 0.7246, atol=5e-5, rtol=0)


@pytest.mark.parametrize("trial", range(5))
def test_group_advantages_ignore_invalid_completions(trial):
    generator = torch.Generator().manual_seed(trial)
    valid = torch.rand(6, 4, generator=generator) < 0.6
    returns = rewards_of(6, 4, trial).where(valid, torch.nan)
    centered = F.group_centered_advantages(returns, valid)
    assert_close(centered, loop_group_advantages(returns, valid, None), atol=1e-12, rtol=0)
    for eps in (1e-4, 0.5):
        normalized = F.group_normalized_advantages(returns, valid, eps)
        assert_close(normalized, loop_group_advantages(returns, valid, eps), atol=1e-12, rtol=0)


def test_group_advantages_are_zero_with_fewer_than_two_valid_completions():
    valid = torch.tensor([[True, False, False], [False, False, False]])
    returns = double([5, 1, 2], [3, 4, 5])
    assert (F.group_centered_advantages(returns, valid) == 0).all()
    assert (F.group_normalized_advantages(returns, valid) == 0).all()


@pytest.mark.parametrize("eps", [1e-4, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_returns_give_exactly_zero_group_advantages(dtype, eps):
    returns = torch.tensor([[0.7] * 3, [0.0] * 3, [-1e5 / 3] * 3], dtype=dtype)
    valid = torch.tensor([True, False, True]).expand(3, 3)
    for mask, values in ((all_valid(returns), returns), (valid, returns.where(valid, torch.nan))):
        assert (F.group_centered_advantages(values, mask) == 0).all()
        assert (F.group_normalized_advantages(values, mask, eps) == 0).all()


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_equals_k_over_k_minus_1_times_dr_grpo(k):
    returns = rewards_of(k=k)
    centered = F.group_centered_advantages(returns, all_valid(returns))
    assert_close(F.rloo_advantages(returns), k / (k - 1) * centered, atol=1e-12, rtol=0)


def test_normalized_advantages_are_invariant_to_shift_and_scale():
    returns = rewards_of()
    normalized = F.group_normalized_advantages(returns, all_valid(returns), eps=0.0)
    assert_close(normalized.std(1), torch.ones(3, dtype=torch.float64), atol=1e-12, rtol=0)
    changed = F.group_normalized_advantages(7 * returns - 3, all_valid(returns), eps=0.0)
    assert_close(changed, normalized, atol=1e-12, rtol=0)
