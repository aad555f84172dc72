"""Properties of sums over completions: padding has no effect, and each completion is what it is alone."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lit_rlhf import functional as F

QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
NUMBERS = st.floats(-10, 10, width=32)


@st.composite
def completions(draw):
    """Draw n x k completions: two numbers per token, padded with NaN, the mask, and one number per completion."""
    n, k = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = [[draw(st.integers(0, 4)) for _ in range(k)] for _ in range(n)]
    width = max(max(row) for row in lengths) + draw(st.integers(0, 2))
    mask = torch.tensor(lengths).unsqueeze(-1) > torch.arange(width)
    first, second = (torch.full((n, k, width), math.nan, dtype=torch.float64) for _ in range(2))
    for values in (first, second):
        values[mask] = torch.tensor([draw(NUMBERS) for _ in range(int(mask.sum()))], dtype=torch.float64)
    return first, second, mask, torch.tensor([[draw(NUMBERS) for _ in range(k)] for _ in range(n)]).double()


FORMULAS = {
    "sum": lambda a, b, mask, r: F.masked_sum(a, mask),
    "mean": lambda a, b, mask, r: F.masked_mean(a, mask),
    "k1": lambda a, b, mask, r: F.kl_of_completions("k1", a, b, mask),
    "k2": lambda a, b, mask, r: F.kl_of_completions("k2", a, b, mask),
    "k3": lambda a, b, mask, r: F.kl_of_completions("k3", a, b, mask),
    "reinforce": lambda a, b, mask, r: F.reinforce_loss(a, r, mask),
    "token rewards": lambda a, b, mask, r: F.token_rewards_with_kl(r, a, mask),
    "reward to go": lambda a, b, mask, r: F.reward_to_go(a, mask),
    "gae": lambda a, b, mask, r: F.gae(a, b, mask, 0.5),
}


@pytest.mark.parametrize("name", FORMULAS)
@QUICK
@given(completions())
def test_a_completion_in_a_batch_is_what_it_is_alone(name, drawn):
    *values, mask, rewards = drawn
    whole = FORMULAS[name](*values, mask, rewards)
    for i, j in torch.cartesian_prod(*map(torch.arange, rewards.shape)).tolist():
        length = int(mask[i, j].sum())
        part = [x[i : i + 1, j : j + 1, :length] for x in (*values, mask)]
        alone = FORMULAS[name](*part, rewards[i : i + 1, j : j + 1])[0, 0]
        found = whole[i, j]
        assert torch.allclose(found[:length] if found.ndim else found, alone, rtol=1e-9, atol=1e-9)
        assert found.ndim == 0 or bool((found[length:] == 0).all())


@QUICK
@given(completions(), st.floats(0, 1))
def test_gae_lies_between_the_temporal_difference_and_the_return_minus_the_value(drawn, lam):
    rewards, values, mask, _ = drawn
    kept = values.masked_fill(~mask, 0.0)
    returns = F.reward_to_go(rewards, mask) - kept
    assert torch.allclose(F.gae(rewards, values, mask, 1.0), returns, rtol=1e-9, atol=1e-9)
    found = F.gae(rewards, values, mask, lam)
    following = torch.nn.functional.pad(found, (0, 1))[..., 1:]
    difference = F.gae(rewards, values, mask, 0.0)
    assert torch.allclose(found, (difference + lam * following).masked_fill(~mask, 0.0), rtol=1e-9, atol=1e-9)


@QUICK
@given(completions())
def test_rewards_of_tokens_sum_to_the_penalized_return(drawn):
    penalties, _, mask, rewards = drawn
    total = F.reward_to_go(F.token_rewards_with_kl(rewards, penalties, mask), mask)
    for i, j in mask.any(-1).nonzero().tolist():
        expected = rewards[i, j] - penalties[i, j][mask[i, j]].sum()
        assert torch.isclose(total[i, j, 0], expected, rtol=1e-9, atol=1e-9)


@QUICK
@given(completions())
def test_k2_and_k3_are_never_negative(drawn):
    logprobs, reference, mask, _ = drawn
    assert F.kl_of_completions("k2", logprobs, reference, mask).min() >= 0
    assert F.kl_of_completions("k3", logprobs, reference, mask).min() >= -1e-9
