"""The formulas against numbers worked out by hand, and the properties that they must have, in float64."""

import itertools
import math

import pytest
import torch

from lit_rlhf import functional as F

assert_close = torch.testing.assert_close


def double(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def rewards_of(n=3, k=4, seed=0) -> torch.Tensor:
    return torch.randn(n, k, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def loop_leave_one_out(rewards: torch.Tensor, valid: torch.Tensor) -> torch.Tensor:
    """The definition, one completion at a time."""
    result = torch.zeros_like(rewards)
    for i, j in valid.nonzero().tolist():
        siblings = [rewards[i, s] for s in range(rewards.shape[1]) if s != j and valid[i, s]]
        if siblings:
            result[i, j] = rewards[i, j] - sum(siblings) / len(siblings)
    return result


# Leave-one-out advantages


def test_rloo_of_four_rewards():
    advantages = F.rloo_advantages(double([2, 0.5, 1.5, -0.5]))
    assert_close(advantages, double([1.5, -0.5, 2.5 / 3, -5.5 / 3]), atol=1e-12, rtol=0)


def test_rloo_of_eight_with_three_right():
    right = double([1, 0, 0, 1, 0, 1, 0, 0])
    assert_close(F.rloo_advantages(right), right * 5 / 7 - (1 - right) * 3 / 7, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_is_the_centred_reward_times_k_over_k_minus_1(k):
    rewards = rewards_of(k=k)
    centred = rewards - rewards.mean(1, keepdim=True)
    assert_close(F.rloo_advantages(rewards), k / (k - 1) * centred, atol=1e-12, rtol=0)


@pytest.mark.parametrize("k", [2, 3, 8])
def test_rloo_sums_to_zero_in_each_group_and_ignores_its_level(k):
    rewards, level = rewards_of(k=k), double([0.0], [-7.0], [1e3])
    advantages = F.rloo_advantages(rewards)
    assert_close(advantages.sum(1), torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)
    assert_close(F.rloo_advantages(rewards + level), advantages, atol=1e-11, rtol=0)


def test_rloo_of_two_is_half_the_difference_times_the_difference_of_log_probabilities():
    rewards, logprobs = rewards_of(k=2), rewards_of(k=2, seed=1)
    mask = torch.ones(3, 2, 1, dtype=torch.bool)
    terms = F.reinforce_loss(logprobs.unsqueeze(-1), F.rloo_advantages(rewards), mask)
    first, second = rewards.unbind(1)
    pair = (first - second) / 2 * (-logprobs[:, 0] + logprobs[:, 1])
    assert_close(terms.mean(1), pair, atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_have_no_advantage_at_all(dtype):
    """Not even by rounding, which Adam would make as large as any other gradient."""
    rewards = torch.tensor([[0.7] * 3, [0.0] * 3, [-1e5 / 3] * 3], dtype=dtype)
    assert (F.rloo_advantages(rewards) == 0).all()
    valid = torch.tensor([True, False, True]).expand(3, 3)
    assert (F.rloo_advantages(rewards.where(valid, torch.nan), valid) == 0).all()


@pytest.mark.parametrize("trial", range(5))
def test_a_missing_completion_is_missing_everywhere(trial):
    """Not in its place, its siblings' baseline or the divisor, whatever number stands there."""
    generator = torch.Generator().manual_seed(trial)
    valid = torch.rand(6, 4, generator=generator) < 0.6
    rewards = rewards_of(6, 4, trial).where(valid, torch.nan)
    assert_close(F.rloo_advantages(rewards, valid), loop_leave_one_out(rewards, valid), atol=1e-12, rtol=0)


def test_a_completion_without_valid_siblings_has_no_advantage():
    valid = torch.tensor([[True, False, False], [False, False, False]])
    assert (F.rloo_advantages(double([5, 1, 2], [3, 4, 5]), valid) == 0).all()


def test_the_token_level_baseline_is_of_the_same_place_and_counts_ended_siblings_as_zero():
    to_go = double([[3, 1, 0], [2, 0, 0], [6, 5, 4]])
    expected = double([[3 - 4, 1 - 2.5, -2], [2 - 4.5, -3, -2], [6 - 2.5, 5 - 0.5, 4]])
    assert_close(F.rloo_advantages(to_go), expected, atol=1e-12, rtol=0)


def test_the_token_level_baseline_leaves_a_missing_completion_out_at_every_token():
    to_go = rewards_of(2, 12).view(2, 4, 3)
    valid = torch.tensor([[True, True, False, True], [False, True, False, False]])
    expected = torch.stack([loop_leave_one_out(to_go[..., t], valid) for t in range(3)], -1)
    assert_close(F.rloo_advantages(to_go, valid), expected, atol=1e-12, rtol=0)


# Sums over tokens


def test_reward_to_go():
    rewards = double([1, 2, 4, 99], [8, 99, 99, 99])
    mask = torch.tensor([[True, True, True, False], [True, False, False, False]])
    assert torch.equal(F.reward_to_go(rewards, mask), double([7, 6, 4, 0], [8, 0, 0, 0]))


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
def test_padding_reaches_neither_value_nor_gradient(poison):
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
        "reward_to_go": lambda x: F.reward_to_go(x, mask),
        "loss of a completion": lambda x: F.reinforce_loss(x, double([2, -3]), mask),
        "loss of a token": lambda x: F.reinforce_loss(x, poisoned * 2, mask),
        "kl": lambda x: F.masked_sum(F.kl_k1(x, poisoned), mask),
    }
    for name, function in functions.items():
        value, gradient = value_and_gradient(function, poisoned)
        assert value.isfinite().all(), name
        assert (gradient[~mask] == 0).all(), name
        clean, clean_gradient = value_and_gradient(function, values)
        assert torch.equal(value, clean) and torch.equal(gradient[mask], clean_gradient[mask]), name


def test_a_single_advantage_stands_at_every_token_and_the_sign_is_minus():
    logprobs = double([[-1, -2, -4], [-8, -16, -32]])
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    assert torch.equal(F.reinforce_loss(logprobs, double([1, -1]), mask), double([3, -56]))
    by_token = double([[1, 2, 9], [0, 0, 1]])
    assert torch.equal(F.reinforce_loss(logprobs, by_token, mask), double([5, 32]))


def test_padding_does_not_reach_the_value_of_the_monitor():
    mask = torch.tensor([[[True, True, False]]])
    logprobs, reference = double([[-1, -2, math.nan]]), double([[-2, -1, math.inf]])
    expected = F.kl_k3(logprobs[..., :2], reference[..., :2]).sum(-1)
    assert torch.equal(F.masked_sum(F.kl_k3(logprobs, reference), mask), expected)


# Distributions


def near_pair() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probabilities of five tokens under a policy and a reference near it, and the KL between the two."""
    logits, change = rewards_of(2, 5)
    logprobs, reference = logits.log_softmax(-1), (logits + 0.3 * change).log_softmax(-1)
    return logprobs, reference, (logprobs.exp() * (logprobs - reference)).sum()


@pytest.mark.parametrize("estimator", [F.kl_k1, F.kl_k3])
def test_the_kl_estimators_are_unbiased(estimator):
    logprobs, reference, kl = near_pair()
    assert_close((logprobs.exp() * estimator(logprobs, reference)).sum(), kl, atol=1e-12, rtol=0)


def test_k3_is_never_negative_and_varies_less():
    logprobs, reference, kl = near_pair()
    k1, k3 = F.kl_k1(logprobs, reference), F.kl_k3(logprobs, reference)
    assert (k1 < 0).any() and (k3 >= 0).all()
    variances = [(logprobs.exp() * (k - kl) ** 2).sum() for k in (k3, k1)]
    assert variances[0] < variances[1] / 10
    assert torch.equal(F.kl_k3(logprobs, logprobs), torch.zeros_like(logprobs))


def test_the_gradient_of_the_kl_is_that_of_k1_in_the_reward():
    logits = rewards_of(2, 5)[0].clone().requires_grad_()
    reference = rewards_of(2, 5)[1].log_softmax(-1)
    logprobs = logits.log_softmax(-1)
    (exact_gradient,) = torch.autograd.grad((logprobs.exp() * (logprobs - reference)).sum(), logits, retain_graph=True)
    k1 = F.kl_k1(logprobs, reference).detach()
    (estimated,) = torch.autograd.grad((logprobs.exp().detach() * k1 * logprobs).sum(), logits)
    assert_close(estimated, exact_gradient, atol=1e-12, rtol=0)


def test_the_kl_is_subtracted():
    returns = F.kl_penalized_return(double([1, 2]), double([10, -20]), 0.1)
    assert_close(returns, double([0, 4]), atol=1e-12, rtol=0)


def test_token_logprobs_and_entropy():
    logits = rewards_of(3, 5)
    tokens = torch.tensor([4, 0, 2])
    logprobs = logits.log_softmax(-1)
    assert_close(F.token_logprobs(logits, tokens), logprobs[torch.arange(3), tokens], atol=1e-12, rtol=0)
    assert_close(F.entropy(logprobs.exp(), logprobs), -(logprobs.exp() * logprobs).sum(-1), atol=1e-12, rtol=0)


def test_gradient_of_token_logprobs():
    logits = rewards_of(3, 5).mul(20).requires_grad_()
    tokens = torch.tensor([4, 0, 2])
    assert torch.autograd.gradcheck(lambda logits: F.token_logprobs(logits, tokens), logits)
    assert torch.autograd.gradcheck(lambda logits: F.token_logprobs(logits[0], tokens[0]), logits)
    (found,) = torch.autograd.grad(F.token_logprobs(logits, tokens) @ double([1, -2, 3])[0], logits)
    (expected,) = torch.autograd.grad(logits.log_softmax(-1)[torch.arange(3), tokens] @ double([1, -2, 3])[0], logits)
    assert_close(found, expected, atol=1e-12, rtol=0)


def test_entropy_of_few_tokens_out_of_many():
    logits = double([0, 0, -math.inf, -math.inf])
    logprobs = logits.log_softmax(-1)
    assert_close(F.entropy(logprobs.exp(), logprobs), double([math.log(2)])[0], atol=1e-12, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_log_softmax_is_at_least_float32_and_otherwise_in_the_dtype_given(dtype):
    raised = F.at_least_float32(torch.zeros(2, 3, dtype=dtype))
    assert raised.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert F.token_logprobs(raised, torch.tensor([0, 1])).dtype == raised.dtype


# Preferences


def test_bradley_terry():
    chosen, rejected = double([0, 2, -1]), double([0, 0, 1])
    expected = double([math.log(2), math.log(1 + math.exp(-2)), math.log(1 + math.exp(2))])
    assert_close(F.bradley_terry_loss(chosen, rejected), expected, atol=1e-12, rtol=0)


def test_bradley_terry_sees_the_difference_only_and_does_not_overflow():
    chosen, rejected = double([1, 2, 3]), double([3, 2, 1])
    loss = F.bradley_terry_loss(chosen, rejected)
    assert_close(F.bradley_terry_loss(chosen + 50, rejected + 50), loss, atol=1e-12, rtol=0)
    assert_close(loss - F.bradley_terry_loss(rejected, chosen), rejected - chosen, atol=1e-12, rtol=0)
    assert_close(F.bradley_terry_loss(double([-1e4]), double([1e4])), double([2e4]), atol=1e-9, rtol=0)


# Critics


def make_mask(*lengths) -> torch.Tensor:
    return (torch.arange(max(lengths)) < torch.tensor(lengths).unsqueeze(1)).unsqueeze(0)


MASK = make_mask(4, 2, 1)
TOKEN_REWARDS = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
VALUES = torch.randn(1, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def test_gae_that_looks_ahead_to_the_end_is_the_return_minus_the_value():
    expected = F.reward_to_go(TOKEN_REWARDS, MASK) - VALUES.masked_fill(~MASK, 0.0)
    assert_close(F.gae(TOKEN_REWARDS, VALUES, MASK, 1.0), expected, atol=1e-12, rtol=0)


def test_gae_that_does_not_look_ahead_is_the_temporal_difference():
    following = torch.zeros_like(VALUES)
    for i, t in itertools.product(range(3), range(3)):
        following[0, i, t] = VALUES[0, i, t + 1] if MASK[0, i, t + 1] else 0.0
    expected = (TOKEN_REWARDS + following - VALUES).masked_fill(~MASK, 0.0)
    assert_close(F.gae(TOKEN_REWARDS, VALUES, MASK, 0.0), expected, atol=1e-12, rtol=0)


def test_gae_in_between_is_the_sum_of_its_definition():
    delta = F.gae(TOKEN_REWARDS, VALUES, MASK, 0.0)
    expected = torch.stack([sum(0.7**s * delta[..., t + s] for s in range(4 - t)) for t in range(4)], -1)
    assert_close(F.gae(TOKEN_REWARDS, VALUES, MASK, 0.7), expected.masked_fill(~MASK, 0.0), atol=1e-12, rtol=0)


def test_padding_reaches_no_advantage():
    dirty = TOKEN_REWARDS.masked_fill(~MASK, math.nan), VALUES.masked_fill(~MASK, math.nan)
    assert torch.equal(F.gae(*dirty, MASK, 0.9), F.gae(TOKEN_REWARDS, VALUES, MASK, 0.9))


def test_the_reward_of_a_completion_is_credited_to_its_last_token():
    credited = F.token_rewards_with_kl(double([1, 2, 3]), torch.full((1, 3, 4), 0.25, dtype=torch.float64), MASK)
    expected = double([[-0.25, -0.25, -0.25, 0.75], [-0.25, 1.75, 0, 0], [2.75, 0, 0, 0]])
    assert torch.equal(credited, expected)


@pytest.mark.parametrize(
    ("ratio", "advantage", "term", "held"),
    [
        (1.1, 2.0, -2.2, False),
        (1.5, 2.0, -2.4, True),
        (1.5, -2.0, 3.0, False),
        (0.5, -2.0, 1.6, True),
        (0.5, 2.0, -1.0, False),
    ],
)
def test_the_clip_takes_the_worse_of_two_and_only_stops_what_goes_too_far(ratio, advantage, term, held):
    terms, where = F.ppo_clip_loss(double(ratio).log(), double(0.0), double(advantage), 0.2)
    assert_close(terms, double(term), atol=1e-12, rtol=0)
    assert where.tolist() == [held]
    assert_close(
        F.ppo_clip_loss(double(ratio).log(), double(0.0), double(advantage), None)[0], -double(ratio * advantage)
    )


def test_a_clipped_value_pays_for_the_larger_error():
    values, targets, old = double(2.0, 2.0), double(0.0, 3.0), double(1.0, 1.0)
    assert_close(F.value_loss(values, targets, old), double(2.0, 0.5))
    assert_close(F.value_loss(values, targets, old, clip=0.5), double(2.0, 1.125))


def test_whitened_values_have_mean_zero_and_variance_one():
    values = rewards_of()
    white = F.whiten(values, values.mean(), values.var(correction=0))
    assert white.mean().abs() < 1e-12 and (white.var(correction=0) - 1).abs() < 1e-6


# The best of a group, pairs, the coefficient of the KL


def test_the_best_is_the_first_of_equals_and_none_where_none_is_valid():
    valid = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])
    best = F.best_of(double([1, 3, 3], [1, 9, 2], [1, 2, 3]), valid)
    assert best.int().tolist() == [[0, 1, 0], [0, 0, 1], [0, 0, 0]]


def test_a_pair_without_a_margin_costs_log_two():
    assert_close(F.dpo_loss(double(0.0), 0.3), double(math.log(2)))


@pytest.mark.parametrize("beta", [0.1, 1.0])
def test_pairs_pull_the_margin_up_or_to_its_mark(beta):
    margin = double(-3.0, 0.0, 3.0).requires_grad_()
    F.dpo_loss(margin, beta).sum().backward()
    assert_close(margin.grad, -beta * torch.sigmoid(-beta * margin.detach()), atol=1e-12, rtol=0)
    assert F.ipo_loss(double(1 / (2 * beta)), beta) == 0
    assert_close(F.ipo_loss(double(0.0), beta), double(1 / (4 * beta**2)))


@pytest.mark.parametrize(("kl", "factor"), [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.4, 0.99), (-3.0, 0.98)])
def test_the_coefficient_of_the_kl_follows_it_by_a_fifth_of_the_gain_at_most(kl, factor):
    assert F.adapted_kl_coef(0.05, kl, target=6.0, gain=0.1) == pytest.approx(0.05 * factor)
