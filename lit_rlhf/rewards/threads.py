"""Run rewards beside the main thread, so that it can wait for them with a time limit and still act on signals."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import math
import os
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future, wait
from typing import Any, TypeVar

import torch

Item = TypeVar("Item")
Output = TypeVar("Output")


def in_thread(function: Callable[..., Any], *args: Any) -> Future[Any]:
    """Start a function in a thread that does not delay the end of the process, and return its future."""
    future: Future[Any] = Future()
    context, grad = contextvars.copy_context(), torch.is_grad_enabled()

    def work() -> None:
        try:
            with torch.set_grad_enabled(grad):
                future.set_result(context.run(function, *args))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=work, name="reward", daemon=True).start()
    return future


def map_in_threads(
    function: Callable[[Item], Output], items: Sequence[Item], limit: int, stop: threading.Event
) -> list[Output]:
    """Call a function with each item, and return the results in order.

    Args:
        function: Called in threads.
        items: Its arguments.
        limit: Calls at the same time.
        stop: Set by the first call that raises, and at the end: no further call begins.

    Raises:
        Exception: That of the first call that raised.
    """
    pending, outputs, errors = deque(enumerate(items)), dict[int, Output](), list[BaseException]()

    def work() -> None:
        while pending and not stop.is_set():
            try:
                i, item = pending.popleft()
            except IndexError:  # another thread was faster
                return
            try:
                outputs[i] = function(item)
            except BaseException as error:
                errors.append(error)
                stop.set()

    threads = [in_thread(work) for _ in range(min(limit, len(items)))]
    try:
        for thread in threads:
            wait_for(thread)
    finally:
        stop.set()
    if errors:
        raise errors[0]
    return [outputs[i] for i in range(len(items))]


def wait_for(future: Future[Output], end: float = math.inf) -> Output:
    """Return the result of a future, and act on signals meanwhile.

    Args:
        future: What to wait for.
        end: Until when, by `time.monotonic`.

    Raises:
        TimeoutError: If it is not done by then.
    """
    # Python runs the handler of a signal that another thread received, or that came just before the wait, only after it
    while not future.done() and (left := end - time.monotonic()) > 0:
        wait([future], min(left, 1.0))
    return future.result(0.0)


def in_event_loop(waiting: Awaitable[Any]) -> Future[Any]:
    """Start an awaitable in the event loop of async rewards, and return its future."""
    # a thread's loop, since a notebook has a running one; always the same, since network clients keep using it
    return asyncio.run_coroutine_threadsafe(_settled(waiting), _event_loop(os.getpid()))


def call_within(seconds: float | None, function: Callable[..., Any], *args: Any) -> Any:
    """Call a function, sync or async, and return its result.

    Raises:
        TimeoutError: If it does not return within `seconds`. A thread can't be ended, so the call continues in its own.
    """
    end = math.inf if seconds is None else time.monotonic() + seconds
    future = in_thread(function, *args)
    output = _result(future, end, seconds)
    if inspect.isawaitable(output):
        future = in_event_loop(output)
        try:
            output = _result(future, end, seconds)
        except TimeoutError:
            future.cancel()
            _replace_blocked_loop()
            raise
        if isinstance(output, BaseException):
            raise output
    return output


def _result(future: Future[Any], end: float, seconds: float | None) -> Any:
    try:
        return wait_for(future, end)
    except TimeoutError as error:
        if future.done() and future.exception() is error:  # raised by the function itself
            raise
        raise TimeoutError(f"it did not return within {seconds:g} s") from error


async def _settled(waiting: Awaitable[Any]) -> Any:
    try:
        return await waiting
    except BaseException as error:  # a SystemExit would end the loop's thread, and every caller would wait forever
        return error


@functools.cache
def _event_loop(pid: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of async rewards, in its own thread; one per process, as threads don't survive a fork."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name=f"async-rewards-{pid}", daemon=True).start()
    return loop


def _replace_blocked_loop() -> None:
    """Start another event loop if an async reward blocks the current one, for example by `time.sleep`."""
    alive = threading.Event()
    _event_loop(os.getpid()).call_soon_threadsafe(alive.set)
    if not alive.wait(1.0):
        _event_loop.cache_clear()
