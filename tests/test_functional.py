"""`functional` against hand-computed numbers and mathematical properties, in float64."""

import itertools
import math

import pytest
import torch

from lit_rlhf import functional as F
from tensors import double, rewards_of

assert_close = torch.testing.assert_close


# Sums over tokens


def test_masked_mean_averages_unmasked_tokens_and_is_0_without_any():
    mask = torch.tensor([[[True, True, False], [False, False, False]]])
    assert torch.equal(F.masked_mean(double([[1, 2, 99], [99, 99, 99]]), mask), double([1.5, 0]))


def test_reward_to_go():
    rewards = double([1, 2, 4, 99], [8, 99, 99, 99])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert torch.equal(F.reward_to_go(rewards, mask), double([7, 6, 4, 0], [8, 0, 0, 0]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_padding_affects_neither_value_nor_gradient(poison):
    mask = torch.tensor([[[True, True, False], [True, False, False]]])
    values = rewards_of(1, 6).view(1, 2, 3)
    poisoned = values.where(mask, poison)

    def value_and_gradient(function, tokens):
        leaf = tokens.clone().requires_grad_()
        value = function(leaf)
        value.sum().backward()
        return value.detach(), leaf.grad

    functions = {
        "masked_sum": lambda x: F.masked_sum(x, mask),
        "masked_mean": lambda x: F.masked_mean(x, mask),
        "reward_to_go": lambda x: F.reward_to_go(x, mask),
        "per-completion loss": lambda x: F.reinforce_loss(x, double([2, -3]), mask),
        "per-token loss": lambda x: F.reinforce_loss(x, poisoned * 2, mask),
        "kl": lambda x: F.masked_sum(F.kl_k1(x, poisoned), mask),
    }
    for name, function in functions.items():
        value, gradient = value_and_gradient(function, poisoned)
        assert value.isfinite().all(), name
        assert (gradient[~mask] == 0).all(), name
        clean, clean_gradient = value_and_gradient(function, values)
        assert torch.equal(value, clean) and torch.equal(gradient[mask], clean_gradient[mask]), name


def test_reinforce_loss_is_minus_the_advantage_times_the_logprob_of_each_token():
    logprobs = double([[-1, -2, -4], [-8, -16, -32]])
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    assert torch.equal(F.reinforce_loss(logprobs, double([1, -1]), mask), double([3, -56]))
    by_token = double([[1, 2, 9], [0, 0, 1]])
    assert torch.equal(F.reinforce_loss(logprobs, by_token, mask), double([5, 32]))


def test_padding_does_not_affect_k3():
    mask = torch.tensor([[[True, True, False]]])
    logprobs, reference = double([[-1, -2, math.nan]]), double([[-2, -1, math.inf]])
    expected = F.kl_k3(logprobs[..., :2], reference[..., :2]).sum(-1)
    assert torch.equal(F.masked_sum(F.kl_k3(logprobs, reference), mask), expected)


# Distributions


def near_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probabilities of five tokens under a policy and a nearby reference, and the exact KL."""
    logits, change = rewards_of(2, 5)
    logprobs, reference = logits.log_softmax(-1), (logits + 0.3 * change).log_softmax(-1)
    return logprobs, reference, (logprobs.exp() * (logprobs - reference)).sum()


@pytest.mark.parametrize("estimator", [F.kl_k1, F.kl_k3])
def test_kl_estimators_are_unbiased(estimator):
    logprobs, reference, kl = near_pair()
    assert_close((logprobs.exp() * estimator(logprobs, reference)).sum(), kl, atol=1e-12, rtol=0)


def test_k3_is_never_negative_and_has_lower_variance():
    logprobs, reference, kl = near_pair()
    k1, k3 = F.kl_k1(logprobs, reference), F.kl_k3(logprobs, reference)
    assert (k1 < 0).any() and (k3 >= 0).all()
    variances = [(logprobs.exp() * (k - kl) ** 2).sum() for k in (k3, k1)]
    assert variances[0] < variances[1] / 10
    assert torch.equal(F.kl_k3(logprobs, logprobs), torch.zeros_like(logprobs))


def test_k1_in_the_reward_gives_the_exact_kl_gradient():
    logits = rewards_of(2, 5)[0].clone().requires_grad_()
    reference = rewards_of(2, 5)[1].log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    (exact_gradient,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    k1 = F.kl_k1(logprobs, reference).detach()
    (estimated,) = torch.autograd.grad((logprobs.exp().detach() * k1 * logprobs).sum(), logits)
    assert_close(estimated, exact_gradient, atol=1e-12, rtol=0)


def test_kl_penalized_return_subtracts_the_kl():
    returns = F.kl_penalized_return(double([1, 2]), double([10, -20]), 0.1)
    assert_close(returns, double([0, 4]), atol=1e-12, rtol=0)


def test_token_logprobs_and_entropy():
    logits = rewards_of(3, 5)
    tokens = torch.tensor([4, 0, 2])
    logprobs = logits.log_softmax(-1)
    assert_close(F.token_logprobs(logits, tokens), logprobs[torch.arange(3), tokens], atol=1e-12, rtol=0)
    assert_close(F.entropy(logprobs.exp(), logprobs), -(logprobs.exp() * logprobs).sum(-1), atol=1e-12, rtol=0)


def test_token_logprobs_gradient():
    logits = rewards_of(3, 5).mul(20).requires_grad_()
    tokens = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda logits: F.token_logprobs(logits, tokens), logits)
    assert torch.autograd.gradcheck(lambda logits: F.token_logprobs(logits[0], tokens[0]), logits)
    (actual,) = torch.autograd.grad(F.token_logprobs(logits, tokens) @ double([1, -2, 3])[0], logits)
    (expected,) = torch.autograd.grad(logits.log_softmax(-1)[torch.arange(3), tokens] @ double([1, -2, 3])[0], logits)
    assert_close(actual, expected, atol=1e-12, rtol=0)


def test_entropy_with_zero_probability_tokens():
    logits = double([0, 0, -math.inf, -math.inf])
    logprobs = logits.log_softmax(-1)
    assert_close(F.entropy(logprobs.exp(), logprobs), double([math.log(2)])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_at_least_float32_upcasts_16_bit_only_and_token_logprobs_keep_the_dtype(dtype):
    upcast = F.at_least_float32(torch.zeros(2, 3, dtype=dtype))
    assert upcast.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert F.token_logprobs(upcast, torch.tensor([0, 1])).dtype == upcast.dtype


# Preferences


def test_bradley_terry_matches_hand_computed_losses():
    chosen, rejected = double([0, 2, -1]), double([0, 0, 1])
    expected = double([math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
    assert_close(F.bradley_terry_loss(chosen, rejected), expected, atol=1e-12, rtol=0)


def test_bradley_terry_depends_on_the_difference_only_and_does_not_overflow():
    chosen, rejected = double([1, 2, 3]), double([3, 2, 1])
    loss = F.bradley_terry_loss(chosen, rejected)
    assert_close(F.bradley_terry_loss(chosen + 50, rejected + 50), loss, atol=1e-12, rtol=0)
    assert_close(loss - F.bradley_terry_loss(rejected, chosen), rejected - chosen, atol=1e-12, rtol=0)
    assert_close(F.bradley_terry_loss(double([-1e4]), double([1e4])), double([2e4]), atol=1e-9, rtol=0)


# PPO


def make_mask(*lengths) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).unsqueeze(0)


MASK = make_mask(4, 2, 1)
TOKEN_REWARDS = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_gae_with_lambda_1_is_the_return_minus_the_value():
    expected = F.reward_to_go(TOKEN_REWARDS, MASK) - VALUES.masked_fill(~MASK, 0.0)
    assert_close(F.gae(TOKEN_REWARDS, VALUES, MASK, 1.0), expected, atol=1e-12, rtol=0)


def test_gae_with_lambda_0_is_the_temporal_difference():
    next_values = torch.zeros_like(VALUES)
    for i, t in itertools.product(range(3), range(3)):
        next_values[0, i, t] = VALUES[0, i, t + 1] if MASK[0, i, t + 1] else 0.0
    expected = (TOKEN_REWARDS + next_values - VALUES).masked_fill(~MASK, 0.0)
    assert_close(F.gae(TOKEN_REWARDS, VALUES, MASK, 0.0), expected, atol=1e-12, rtol=0)


def test_gae_matches_its_definition():
    delta = F.gae(TOKEN_REWARDS, VALUES, MASK, 0.0)
    expected = torch.stack([sum(0.7**s * delta[..., t + s] for s in range(4 - t)) for t in range(4)], -1)
    assert_close(F.gae(TOKEN_REWARDS, VALUES, MASK, 0.7), expected.masked_fill(~MASK, 0.0), atol=1e-12, rtol=0)


def test_padding_does_not_affect_gae():
    dirty = TOKEN_REWARDS.masked_fill(~MASK, math.nan), VALUES.masked_fill(~MASK, math.nan)
    assert torch.equal(F.gae(*dirty, MASK, 0.9), F.gae(TOKEN_REWARDS, VALUES, MASK, 0.9))


def test_sequence_reward_goes_to_the_last_token():
    token_rewards = F.token_rewards_with_kl(double([1, 2, 3]), torch.full((1, 3, 4), 0.25, dtype=torch.float64), MASK)
    expected = double([[-0.25, -0.25, -0.25, 0.75], [-0.25, 1.75, 0, 0], [2.75, 0, 0, 0]])
    assert torch.equal(token_rewards, expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "is_clipped"),
    [
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),
        (0.5, 2.0, -1.0, False),
    ],
)
def test_ppo_clip_loss_is_pessimistic(ratio, advantage, loss, is_clipped):
    actual, clipped = F.ppo_clip_loss(double(ratio), double(advantage), 0.2)
    assert_close(actual, double(loss), atol=1e-12, rtol=0)
    assert clipped.tolist() == [is_clipped]
    unclipped, clipped = F.ppo_clip_loss(double(ratio), double(advantage), None)
    assert_close(unclipped, -double(ratio * advantage))
    assert clipped.tolist() == [False]


def test_importance_ratio_within_the_bound_is_the_plain_exponential():
    logprobs, old = (rewards_of(1, 2000, seed).mul(3).float().requires_grad_() for seed in (0, 1))
    log_ratio = logprobs - old
    assert log_ratio.abs().max() < F.MAX_LOG_RATIO
    plain, ratio = log_ratio.exp(), F.importance_ratio(logprobs, old)
    assert torch.equal(ratio, plain)
    (expected,), (actual,) = (torch.autograd.grad(x.sum(), logprobs, retain_graph=True) for x in (plain, ratio))
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("clip_range", [None, 0.2])
@pytest.mark.parametrize("log_ratio", [90.0, -90.0])
@pytest.mark.parametrize("advantage", [1.5, -1.5])
def test_extreme_log_ratio_gives_a_finite_loss_and_zero_gradient(log_ratio, advantage, clip_range):
    """In float32, `exp(90)` is infinite."""
    logprobs = torch.tensor([log_ratio, 0.0], requires_grad=True)
    advantages = torch.full((2,), advantage)
    loss, _ = F.ppo_clip_loss(F.importance_ratio(logprobs, torch.zeros(2)), advantages, clip_range)
    (gradient,) = torch.autograd.grad(loss.sum(), logprobs)
    assert loss.isfinite().all()
    assert gradient.tolist() == [0.0, -advantage]
    ratio = F.importance_ratio(logprobs, torch.zeros(2))
    assert ratio.tolist() == [pytest.approx(math.exp(math.copysign(F.MAX_LOG_RATIO, log_ratio))), 1.0]


def test_value_loss_takes_the_larger_of_the_clipped_and_unclipped_error():
    values, targets, old = double(2.0, 2.0), double(0.0, 3.0), double(1.0, 1.0)
    assert_close(F.value_loss(values, targets, old), double(2.0, 0.5))
    assert_close(F.value_loss(values, targets, old, clip_range=0.5), double(2.0, 1.125))


def test_whiten_gives_mean_0_and_variance_1():
    values = rewards_of()
    white = F.whiten(values, values.mean(), values.var(correction=0))
    assert white.mean().abs() < 1e-12 and (white.var(correction=0) - 1).abs() < 1e-6


# RAFT, DPO and IPO, adaptive KL


def test_best_of_group_mask_takes_the_first_tie_and_ignores_invalid_completions():
    valid = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    best = F.best_of_group_mask(double([1, 3, 3], [1, 9, 2], [1, 2, 3]), valid)
    assert best.int().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_dpo_loss_at_zero_margin_is_log_2():
    assert_close(F.dpo_loss(double(0.0), 0.3), double(math.log(2)))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_dpo_gradient_and_ipo_minimum(beta):
    margin = double(-3.0, 0.0, 3.0).requires_grad_()
    F.dpo_loss(margin, beta).sum().backward()
    assert_close(margin.grad, -beta * torch.sigmoid(-beta * margin.detach()), atol=1e-12, rtol=0)
    assert F.ipo_loss(double(1 / (2 * beta)), beta) == 0
    assert_close(F.ipo_loss(double(0.0), beta), double(1 / (4 * beta**2)))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (-3.0, 0.98)])
def test_adapted_kl_coef_changes_by_at_most_a_fifth_of_the_gain(kl, factor):
    assert F.adapted_kl_coef(0.05, kl, target=6.0, gain=0.1) == pytest.approx(0.05 * factor)


def test_float64_is_on_the_cpu_for_devices_without_it():
    assert F.float64_device(torch.device("mps")) == torch.device("cpu")
    assert F.float64_device(torch.device("cuda:1")) == torch.device("cuda:1")
    assert F.to_float64(torch.ones(2, dtype=torch.bool)).dtype == torch.float64
