import dataclasses

import pytest
import torch

from lit_rlhf.rewards import RewardShaping
from lit_rlhf.rewards.shaping import RewardStatistics, shape_rewards

ALL_VALID = torch.ones(2, 3, dtype=torch.bool)


def one_rank(values):
    return values


def shape(rewards, valid=ALL_VALID, statistics=None, sum_over_ranks=one_rank, counter=(0, 0, []), **options):
    statistics = statistics or RewardStatistics()
    return shape_rewards(rewards, valid, RewardShaping(**options), statistics, sum_over_ranks, counter)


def test_default_options_change_nothing():
    rewards = torch.randn(2, 3)
    assert torch.equal(shape(rewards), rewards)


def test_rewards_are_normalized_by_all_rewards_so_far():
    statistics, first, second = RewardStatistics(), torch.randn(2, 3) * 4 + 7, torch.randn(2, 3) - 2
    shape(first, statistics=statistics, normalize=True)
    seen = torch.cat([first, second]).double()
    expected = (second.double() - seen.mean()) / seen.std(correction=0)
    actual = shape(second, statistics=statistics, normalize=True)
    torch.testing.assert_close(actual.double(), expected, atol=1e-5, rtol=0)


def test_invalid_rewards_are_excluded_from_the_statistics():
    valid = ALL_VALID.clone()
    valid[0, 1] = False
    rewards = torch.randn(2, 3)
    clean, dirty = (shape(r, valid, normalize=True) for r in (rewards, rewards.masked_fill(~valid, 99.0)))
    assert torch.equal(clean[valid], dirty[valid])


def test_statistics_are_summed_over_ranks():
    both = torch.randn(4, 3)
    expected = shape(both, torch.ones(4, 3, dtype=torch.bool), normalize=True)
    other = both[2:].double()
    theirs = torch.tensor([other.numel(), other.sum(), (other**2).sum()], dtype=torch.float64)
    actual = shape(both[:2], sum_over_ranks=lambda values: values + theirs, normalize=True)
    torch.testing.assert_close(actual, expected[:2], atol=1e-6, rtol=0)


def test_equal_rewards_are_normalized_to_zero_and_large_ones_clipped():
    assert (shape(torch.full((2, 3), 0.7), normalize=True).abs() < 1e-3).all()
    rewards = torch.tensor([[-9.0, -1.0, 0.0], [1.0, 2.0, 9.0]])
    assert shape(rewards, clip=2.0).tolist() == [[-2.0, -1.0, 0.0], [1.0, 2.0, 2.0]]


def test_statistics_are_float64_for_rewards_in_bfloat16():
    statistics = RewardStatistics()
    for _ in range(300):
        shape(torch.ones(2, 3, dtype=torch.bfloat16), statistics=statistics, normalize=True)
    assert statistics.count == statistics.total == 1800  # a sum in bfloat16 stops growing at 256


def test_a_completion_without_a_reward_stays_at_zero():
    valid = ALL_VALID.clone()
    valid[0, 1] = False
    rewards = torch.full((2, 3), 5.0).masked_fill(~valid, 0.0)
    assert shape(rewards, valid, normalize=True)[0, 1] == 0


def test_statistics_restored_from_plain_data_continue_identically():
    statistics = RewardStatistics()
    shape(torch.randn(2, 3), statistics=statistics, normalize=True)
    restored = RewardStatistics(**dataclasses.asdict(statistics))
    rewards = torch.randn(2, 3)
    both = [shape(rewards, statistics=s, normalize=True) for s in (statistics, restored)]
    assert torch.equal(*both)


@pytest.mark.parametrize("options", [{"clip": 0}, {"noise": -1.0}, {"missing_eos_penalty": -0.5}], ids=str)
def test_options_out_of_range_are_refused(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"shaping: {name}={value} must be"):
        RewardShaping(**options)


def test_a_penalty_of_completions_that_are_left_out_is_refused():
    with pytest.raises(ValueError, match=r"missing_eos_penalty=0.5 has no effect with mask_truncated_completions"):
        RewardShaping(mask_truncated_completions=True, missing_eos_penalty=0.5)


def test_noise_is_gaussian_and_depends_on_its_counter_only():
    rewards, valid = torch.full((500, 4), 2.0), torch.ones(500, 4, dtype=torch.bool)
    index = list(range(500))
    noisy = shape(rewards, valid, counter=(1, 0, index), noise=3.0)
    assert float(noisy.mean()) == pytest.approx(2.0, abs=0.3) and float(noisy.std()) == pytest.approx(3.0, rel=0.1)
    assert float(((noisy - 2).abs() < 3).float().mean()) == pytest.approx(0.683, abs=0.04)
    for counter in [(2, 0, index), (1, 1, index), (1, 0, index[::-1])]:
        assert not torch.equal(shape(rewards, valid, counter=counter, noise=3.0), noisy)
    half = shape(rewards[250:, :2], valid[250:, :2], counter=(1, 0, index[250:]), noise=3.0)
    assert torch.equal(half, noisy[250:, :2])


def test_invalid_rewards_get_no_noise():
    valid = ALL_VALID.clone()
    valid[1, 2] = False
    assert float(shape(torch.zeros(2, 3), valid, counter=(0, 0, [4, 5]), noise=1.0)[1, 2]) == 0
