import pytest
import torch

from lit_rlhf.rewards import Shaping

EVERYWHERE = torch.ones(2, 3, dtype=torch.bool)


def alone(values):
    return values


def test_without_a_choice_nothing_changes():
    rewards = torch.randn(2, 3)
    assert torch.equal(Shaping()(rewards, EVERYWHERE, alone), rewards)
    assert not Shaping().state_dict()


def test_rewards_are_measured_by_all_that_were_seen():
    shaping, first, second = Shaping(normalize=True), torch.randn(2, 3) * 4 + 7, torch.randn(2, 3) - 2
    shaping(first, EVERYWHERE, alone)
    seen = torch.cat([first, second]).double()
    expected = (second.double() - seen.mean()) / seen.std(correction=0)
    torch.testing.assert_close(shaping(second, EVERYWHERE, alone).double(), expected, atol=1e-5, rtol=0)


def test_what_is_not_valid_counts_in_no_statistic():
    valid = EVERYWHERE.clone()
    valid[0, 1] = False
    rewards = torch.randn(2, 3)
    clean, dirty = (Shaping(normalize=True)(r, valid, alone) for r in (rewards, rewards.masked_fill(~valid, 99.0)))
    assert torch.equal(clean[valid], dirty[valid])


def test_several_processes_measure_together():
    both = torch.randn(4, 3)
    expected = Shaping(normalize=True)(both, torch.ones(4, 3, dtype=torch.bool), alone)
    other = both[2:].double()
    theirs = torch.tensor([other.numel(), other.sum(), (other**2).sum()], dtype=torch.float64)
    actual = Shaping(normalize=True)(both[:2], EVERYWHERE, lambda values: values + theirs)
    torch.testing.assert_close(actual, expected[:2], atol=1e-6, rtol=0)


def test_equal_rewards_are_zero_and_the_clip_holds():
    assert (Shaping(normalize=True)(torch.full((2, 3), 0.7), EVERYWHERE, alone).abs() < 1e-3).all()
    rewards = torch.tensor([[-9.0, -1.0, 0.0], [1.0, 2.0, 9.0]])
    assert Shaping(clip=2.0)(rewards, EVERYWHERE, alone).tolist() == [[-2.0, -1.0, 0.0], [1.0, 2.0, 2.0]]


def test_the_statistics_stay_exact_whatever_the_module_is_cast_to():
    shaping = torch.nn.Sequential(Shaping(normalize=True)).to(torch.bfloat16)[0]
    assert shaping.total.dtype == torch.float64


def test_a_completion_without_a_reward_of_its_own_stays_at_zero():
    valid = EVERYWHERE.clone()
    valid[0, 1] = False
    rewards = torch.full((2, 3), 5.0).masked_fill(~valid, 0.0)
    assert Shaping(normalize=True)(rewards, valid, alone)[0, 1] == 0


def test_the_statistics_are_saved():
    shaping, again = Shaping(normalize=True), Shaping(normalize=True)
    shaping(torch.randn(2, 3), EVERYWHERE, alone)
    again.load_state_dict(shaping.state_dict())
    rewards = torch.randn(2, 3)
    assert torch.equal(again(rewards, EVERYWHERE, alone), shaping(rewards, EVERYWHERE, alone))


def test_a_clip_must_be_positive():
    with pytest.raises(ValueError, match="clip=0 must be above 0"):
        Shaping(clip=0)


def test_noise_is_normal_and_that_of_its_address():
    rewards, everywhere = torch.full((500, 4), 2.0), torch.ones(500, 4, dtype=torch.bool)
    index = list(range(500))
    noisy = Shaping(noise=3.0)(rewards, everywhere, alone, (1, 0, index))
    assert float(noisy.mean()) == pytest.approx(2.0, abs=0.3) and float(noisy.std()) == pytest.approx(3.0, rel=0.1)
    assert float(((noisy - 2).abs() < 3).float().mean()) == pytest.approx(0.683, abs=0.04)
    for address in [(2, 0, index), (1, 1, index), (1, 0, index[::-1])]:
        assert not torch.equal(Shaping(noise=3.0)(rewards, everywhere, alone, address), noisy)
    half = Shaping(noise=3.0)(rewards[250:, :2], everywhere[250:, :2], alone, (1, 0, index[250:]))
    assert torch.equal(half, noisy[250:, :2])


def test_what_is_not_valid_gets_no_noise():
    valid = EVERYWHERE.clone()
    valid[1, 2] = False
    assert float(Shaping(noise=1.0)(torch.zeros(2, 3), valid, alone, (0, 0, [4, 5]))[1, 2]) == 0


def test_noise_is_a_deviation():
    with pytest.raises(ValueError, match="noise=-1"):
        Shaping(noise=-1.0)
