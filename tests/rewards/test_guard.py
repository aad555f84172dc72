"""`Guarded`: time-outs, retries, and a limit of failures."""

import asyncio
import threading
import time

import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.evaluation.evaluator import make_judge
from lit_rlhf.rewards import Guarded, Scorer, Weighted
from scoring import TokenObject, component, flat, ones, score


def failing(times, value=1.0):
    """Return a reward whose first calls fail, and the list of its calls."""
    calls = []

    def reward(completions, **kwargs):
        calls.append(completions)
        if len(calls) <= times:
            raise ConnectionError("status 503")
        return [value] * len(completions)

    return reward, calls


def test_a_failed_attempt_is_retried_with_increasing_pauses():
    pauses = []

    class Stop(threading.Event):
        def wait(self, timeout=None):
            pauses.append(timeout)
            return False

    reward, calls = failing(3)
    guarded = Guarded(reward, retries=3, backoff=20)
    arguments = {"completions": ["a"]}
    assert guarded._attempt(lambda given: reward(**given), lambda output, given: output, arguments, Stop()) == [1.0]
    assert pauses == [20, 40, 60] and len(calls) == 4


@pytest.mark.parametrize("hang", ["sync", "async", "blocking"])
def test_a_reward_that_does_not_return_in_time_fails(hang):
    release = threading.Event()

    def sync(completions):
        release.wait(30)

    async def waits(completions):
        await asyncio.sleep(30)

    async def blocks(completions):  # the event loop can't end it
        release.wait(30)

    reward = {"sync": sync, "async": waits, "blocking": blocks}[hang]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"'{reward.__name__}' raised TimeoutError: it did not return within 0.1 s"):
        score([Guarded(reward, timeout=0.1, retries=0)])
    assert time.monotonic() - start < 10
    assert flat(score([Guarded(quick_async, timeout=10)])) == [1, 2, 3]
    release.set()


async def quick_async(completions):
    await asyncio.sleep(0)
    return [1, 2, 3]


def test_only_the_attempt_that_succeeds_is_reported():
    """Not the one that continues after its time-out, nor the one that failed."""
    release, reported, calls = threading.Event(), threading.Event(), []

    def reward(completions, log_extra, log_metric):
        calls.append(number := len(calls))
        log_metric("attempt", number)
        if number == 0:
            release.wait(30)
            log_extra("attempt", ["abandoned"])
            reported.set()
        elif number == 1:
            raise ValueError
        else:
            log_extra("attempt", ["good"])
            release.set()
            reported.wait(30)
        return [float(number)]

    guarded = Guarded(reward, timeout=0.5, retries=2, backoff=0, batch_size=1)
    scores = Scorer([guarded])(["p"], [["c"]], [[[1]]], [[True]])
    assert flat(scores) == [2] and scores.metrics["attempt"] == 2
    assert scores.reward_extras["attempt"] == [["good"]]


def test_a_timeout_error_of_the_reward_itself_is_kept():
    def reward(completions):
        raise TimeoutError("judge")

    with pytest.raises(RuntimeError, match="raised TimeoutError: judge"):
        score([Guarded(reward, timeout=10, retries=0)])


def test_one_failing_completion_has_no_opinion_and_is_counted():
    def reward(completions, log_extra, log_metric):
        if completions == ["c1"]:
            raise ValueError("no number in c1")
        log_extra("seen", completions)
        return [float(completions[0][1])]

    guarded = Guarded(reward, retries=0, batch_size=1, concurrency=2)
    message = r"'reward' failed for 1 of 3 completions, .* \(ValueError: no number in c1\)"
    with pytest.warns(UserWarning, match=message):
        scores = score([Weighted(guarded, 2.0), ones])
    assert flat(scores) == [1, 1, 5]
    assert component(scores, "reward").isnan().tolist() == [False, True, False]
    assert scores.metrics == {"reward_failures/reward": 1}
    assert scores.reward_extras == {"seen": [["c0"], [None], ["c2"]]}
    assert score([guarded]).valid.flatten().tolist() == [True, False, True]  # and no second warning


def test_invalid_results_are_failures():
    def reward(completions):
        return [float("nan") if text == "c1" else 1.0 for text in completions]

    with pytest.warns(UserWarning, match="returned nan at index 0"):
        scores = score([Guarded(reward, retries=0, batch_size=1)])
    assert component(scores, "reward").isnan().tolist() == [False, True, False]


def test_the_run_stops_after_too_many_failed_calls_in_a_row():
    broken = []

    def reward(completions):
        if broken:
            raise ConnectionError("status 503")
        return [1, 1, 1]

    scorer = Scorer([Guarded(reward, retries=0, max_failures=3)])

    def call():
        return scorer(["p"], [["a", "b", "c"]], [[[1], [2], [3]]], [[True] * 3])

    assert call().rewards.tolist() == [[1, 1, 1]]
    broken.append(True)
    with pytest.warns(UserWarning, match="failed for 3 of 3"):
        assert not call().valid.any()
    assert call().metrics == {"reward_failures/reward": 3}
    broken.clear()
    assert call().valid.all()  # counts from 0 again
    broken.append(True)
    assert not call().valid.any() and not call().valid.any()
    with pytest.raises(RuntimeError, match="'reward' raised ConnectionError: status 503") as failure:
        call()
    assert isinstance(failure.value.__cause__, ConnectionError)


def test_a_reward_that_never_worked_stops_the_run_at_once():
    def reward(completions):
        return completions.upper()

    with pytest.raises(RuntimeError, match="'reward' raised AttributeError"):
        score([Guarded(reward, retries=0)])


def test_a_retry_gets_arguments_that_the_first_attempt_did_not_change():
    def reward(completions):
        completions.append("more")
        if len(seen) < 1:
            seen.append(list(completions))
            raise ConnectionError
        return [float(len(completions))] * 3

    seen = []
    assert flat(score([Guarded(reward, backoff=0)])) == [4, 4, 4]


def test_guarded_rewards_run_beside_others():
    both = threading.Barrier(3)

    def first(completions):
        both.wait(10)
        return [1, 1, 1]

    def second(completions):
        both.wait(10)
        return [2, 2, 2]

    def third(completions):
        both.wait(10)
        return [4, 4, 4]

    assert flat(score([first, Guarded(second), Guarded(third)])) == [7, 7, 7]


def test_names_levels_gradient_mode_and_required_columns_are_those_of_the_reward():
    def gradient(completions, answer):
        return [float(torch.is_grad_enabled())] * 3

    gradient.token_level = False
    rewards = [Guarded(Weighted(gradient, 2)), Guarded(TokenObject(), batch_size=3)]
    with torch.no_grad():
        scores = score(rewards, answer=[0, 0, 0])
    assert list(scores.component_rewards) == ["gradient", "token_object"]
    assert flat(scores) == [0, 0, 0]
    assert scores.token_rewards.tolist() == [[[0.5, 0.5, 0.5, 0]], [[0] * 4], [[0, 1, 2, 3]]]
    with pytest.raises(ValueError, match=r"'gradient' asks for \['answer'\]"):
        Scorer(rewards).check([])


def test_system_exit_of_a_guarded_reward_is_a_failure():
    def reward(completions):
        raise SystemExit(1)

    with pytest.raises(RuntimeError, match="'reward' raised SystemExit"):
        score([Guarded(reward, retries=0)])


def test_out_of_memory_is_not_a_failure():
    def reward(completions):
        raise torch.OutOfMemoryError("more")

    with pytest.raises(torch.OutOfMemoryError):
        score([Guarded(reward)])


def test_a_pairwise_judge_can_be_guarded():
    def judge(completions, opponents):
        if completions == ["c1"] or opponents == ["c1"]:
            raise ConnectionError("busy")
        return [1.0 if completions[0] < opponents[0] else 0.0]

    judge.pairwise = True
    symmetric = make_judge(Guarded(judge, retries=0, batch_size=1))
    with pytest.warns(UserWarning, match="the judge 'judge' failed for 1 of 2 completions, which it leaves undecided"):
        wins, _ = symmetric(["p", "p"], ["c0", "c1"], ["d0", "d1"], {}, None)
    assert wins.nan_to_num(-1).tolist() == [1, -1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0.0}, "timeout=0.0 of a reward must be above 0"),
        ({"retries": -1}, "retries=-1"),
        ({"backoff": -1.0}, "backoff=-1.0"),
        ({"batch_size": 0}, "batch_size=0 of a reward must be at least 1"),
        ({"max_failures": 0}, "max_failures=0"),
        ({"concurrency": 0}, "concurrency=0"),
    ],
)
def test_options_out_of_range_raise(options, message):
    with pytest.raises(InputError, match=message):
        Guarded(ones, **options)
