"""Threads of rewards and of requests, and the signals of a run that waits for them."""

import signal
import threading

import pytest

from lit_rlhf.rewards.threads import call_within, in_event_loop, map_in_threads, wait_for


class Stopped(Exception):
    pass


@pytest.fixture
def stops():
    def stop(*_):
        raise Stopped

    previous = signal.signal(signal.SIGUSR1, stop)
    yield
    signal.signal(signal.SIGUSR1, previous)


async def _call(function):
    return function()


@pytest.mark.parametrize(
    "start",
    [
        lambda function: map_in_threads(lambda _: function(), [0, 1], 1, threading.Event()),
        lambda function: call_within(None, function),
        lambda function: call_within(600.0, function),
        lambda function: wait_for(in_event_loop(_call(function))),
    ],
    ids=["map", "call", "limited call", "async"],
)
def test_a_signal_that_another_thread_receives_ends_the_wait(start, stops):
    over, left = threading.Event(), threading.Event()

    def function():
        over.wait(0.2)  # until the main thread waits
        signal.raise_signal(signal.SIGUSR1)  # to this thread
        if not over.wait(60.0):
            left.set()

    with pytest.raises(Stopped):
        start(function)
    over.set()
    assert not left.is_set()


def test_a_time_limit_of_less_than_a_second_is_kept():
    over = threading.Event()
    with pytest.raises(TimeoutError, match=r"did not return within 0\.05 s"):
        call_within(0.05, over.wait, 60.0)
    over.set()


def test_a_timeout_that_a_function_raises_is_its_own():
    def function():
        raise TimeoutError("the store is slow")

    with pytest.raises(TimeoutError, match="the store is slow"):
        call_within(10.0, function)
