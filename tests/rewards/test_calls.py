"""Calls of rewards: async ones, the types that they may return, and errors that name the reward."""

import asyncio
import math
import threading

import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.rewards import Weighted
from lit_rlhf.rewards.threads import map_in_threads
from scoring import TokenObject, asynchronous, flat, ones, score

# Async rewards


def test_async_rewards_run_concurrently():
    both = asyncio.Barrier(2)  # released only when two rewards wait at the same time

    async def first(completions):
        await asyncio.wait_for(both.wait(), 10)
        return [1, 1, 1]

    async def second(completions):
        await asyncio.wait_for(both.wait(), 10)
        return [2, 2, 2]

    assert flat(score([first, ones, second])) == [4, 4, 4]


def test_async_rewards_run_in_their_own_loop_inside_a_running_one():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1, 1, 1]

    async def notebook():
        loops.append(asyncio.get_running_loop())
        return score([reward])

    assert flat(asyncio.run(notebook())) == [1, 1, 1]
    assert flat(score([reward])) == [1, 1, 1]
    assert loops[0] is not loops[1] and loops[1] is loops[2]


# Returned values


class Returns:
    def __init__(self, output):
        self.output = output

    def __call__(self, completions):
        return self.output


@pytest.mark.parametrize(
    "output",
    [
        [True, 2, 0.5],
        (1, 2, 0.5),
        torch.tensor([1, 2, 0.5], requires_grad=True),
        torch.tensor([1, 2, 0.5], dtype=torch.bfloat16),
        torch.tensor([1, 2, 0.5]).numpy(),
        list(torch.tensor([1, 2, 0.5], requires_grad=True)),
        list(torch.tensor([1, 2, 0.5]).numpy()),
    ],
)
def test_numeric_types_that_a_reward_may_return(output):
    rewards = score([Returns(output)]).rewards.flatten()
    assert rewards.tolist() == [1, 2, 0.5]
    assert rewards.dtype == torch.float32 and not rewards.requires_grad


def test_scores_are_float32_with_any_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        scores = score([Returns([0.1, 0.2, 0.3]), Weighted(TokenObject(), 0.1)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.rewards.dtype == scores.token_rewards.dtype == torch.float32
    assert torch.equal(scores.rewards.flatten(), torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([1, 2], "'returns' returned 2 values for 3 completions"),
        (1.0, "returned float, not 3 numbers"),
        (None, "returned NoneType, not 3 numbers"),
        ("abc", "returned str, not 3 numbers"),
        (b"abc", "returned bytes, not 3 numbers"),
        ({1.0, 2.0, 3.0}, "returned set, not 3 numbers"),
        ({1.0: 1, 2.0: 2, 3.0: 3}, "returned dict, not 3 numbers"),
        ((x for x in [1, 2, 3]), "returned generator, not 3 numbers"),
        ([1, 10**400, 3], "it must return plain numbers"),
        ([1, 2j, 3], "it must return plain numbers"),
        (torch.tensor(1.0), "returned Tensor, not 3 numbers"),
        ([1, math.nan, 2], "returned nan at index 1: return a finite number, or None for no opinion"),
        (torch.tensor([1, 2, math.inf]), "returned inf at index 2"),
        ([None, 1e300, None], r"returned 1e\+300 at index 1"),
        ([1, "2", 3], r"returned \['int', 'str'\]: it must return plain numbers"),
        (torch.ones(3, 1), r"returned the shape \(3, 1\)"),
        ([torch.ones(2)] * 3, "must return plain numbers"),
    ],
)
def test_invalid_rewards_raise(output, message):
    with pytest.raises(ValueError, match=message) as failure:
        score([ones, Returns(output)])
    assert "'returns'" in str(failure.value)


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ([[0.0] * 3, [0.0] * 2, [0.0] * 3], "'tokens' returned 3 values for 4 tokens of completion 2"),
        ([1.0, 2.0, 3.0], "returned float, not 3 numbers: one for each of the tokens of completion 0"),
        ([[0.0] * 3, [0.0] * 2], "returned 2 values for 3 completions"),
        ([[0.0, None, 0.0], None, None], "returned None for a token"),
        ([[0.0, math.inf, 0.0], None, None], "returned inf at index 1"),
    ],
)
def test_invalid_token_rewards_raise(output, message):
    reward = Returns(output)
    reward.token_level = True
    with pytest.raises(ValueError, match=message):
        score([Weighted(reward, name="tokens")])


# Exceptions


async def async_raises(completions, **kwargs):
    raise KeyError("judge")


async def exits(completions, **kwargs):
    raise SystemExit(1)


def raises(completions, **kwargs):
    raise KeyError("judge")


@pytest.mark.parametrize("reward", [raises, async_raises, exits])
def test_exceptions_of_a_reward_name_it_and_are_chained(reward):
    with pytest.raises(RuntimeError, match=f"the reward '{reward.__name__}' raised") as failure:
        score([asynchronous, reward])  # the other coroutine must be closed: otherwise Python warns
    assert isinstance(failure.value.__cause__, (KeyError, SystemExit))


def test_out_of_memory_errors_are_not_wrapped():
    def hungry(completions):
        raise torch.OutOfMemoryError("more")

    with pytest.raises(torch.OutOfMemoryError, match="more"):
        score([hungry])


def test_log_extra_needs_one_entry_per_completion():
    def reward(completions, log_extra):
        log_extra("short", [1])
        return [0, 0, 0]

    with pytest.raises(InputError, match=r"'reward': log_extra\('short'\) got 1 values for 3 completions"):
        score([reward])


def test_the_first_error_is_raised_also_if_it_ends_the_pause_of_an_earlier_call():
    stop = threading.Event()

    def call(item):
        if item == 0:
            assert stop.wait(30)
            raise TimeoutError("given up")
        raise ValueError("the cause")

    with pytest.raises(ValueError, match="the cause"):
        map_in_threads(call, range(4), 4, stop)
    assert map_in_threads(str, range(5), 2, threading.Event()) == ["0", "1", "2", "3", "4"]
