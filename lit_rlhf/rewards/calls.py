"""Call rewards and judges, sync or async, so that a signal can interrupt one that hangs."""

from __future__ import annotations

import contextlib
import inspect
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from typing import Any

from lit_rlhf.rewards.base import RewardInterrupted, RewardSpec
from lit_rlhf.rewards.threads import in_event_loop, in_thread, wait_for

_calls: list[tuple[float, str]] = []
"""When the main thread began to wait for rewards or an engine, and for which; at most one entry."""


def call_all(specs: Sequence[RewardSpec], arguments: Sequence[dict[str, Any]]) -> list[Any]:
    """Call each reward with its arguments; async and guarded rewards run concurrently.

    Raises:
        RuntimeError: If a reward raises.
    """
    pairs = list(zip(specs, arguments, strict=True))
    outputs: list[Any] = []
    with interruptible(" or ".join(spec.title for spec in specs)):
        try:
            running = {i: in_thread(spec.call, given) for i, (spec, given) in enumerate(pairs) if spec.guard}
            outputs.extend(running.get(i) or spec.call(given) for i, (spec, given) in enumerate(pairs))
        except BaseException:
            for output in filter(inspect.iscoroutine, outputs):
                output.close()
            raise
        waiting = {i: in_event_loop(output) for i, output in enumerate(outputs) if inspect.isawaitable(output)}
        for i, future in waiting.items():
            result = wait_for(future)
            if isinstance(result, BaseException):
                pairs[i][0].raise_error(result, pairs[i][1])
            outputs[i] = result
        return [wait_for(output) if isinstance(output, Future) else output for output in outputs]


@contextlib.contextmanager
def interruptible(title: str) -> Iterator[None]:
    """Let a signal interrupt what the main thread waits for within this context, once it has taken too long.

    Args:
        title: What it waits for, in the message.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    _calls.append((time.monotonic(), title))
    try:
        yield
    finally:
        _calls.pop()


def interrupt_rewards(number: int, seconds: float) -> None:
    """Raise `RewardInterrupted` if the main thread has waited for some time. For signal handlers.

    Args:
        number: The signal that ends the run.
        seconds: How long what it waits for may take.
    """
    if _calls and time.monotonic() - _calls[-1][0] >= seconds:
        raise RewardInterrupted(
            f"{signal.Signals(number).name} ended the run while it waited for {_calls[-1][1]}", number
        )
