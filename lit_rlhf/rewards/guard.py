"""Rewards that may be slow or fail: time-outs, retries, and a limit of failures."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from functools import partial
from itertools import chain
from typing import Any, SupportsFloat

import torch

from lit_rlhf.errors import InputError
from lit_rlhf.local_warnings import warn_locally
from lit_rlhf.rewards.http_client import attempt
from lit_rlhf.rewards.threads import call_within, map_in_threads


class Guarded:
    """A reward or judge with a time-out, retries, and a limit of failures, such as one that asks a server.

    An attempt fails if it raises, takes too long, or returns something invalid. Completions whose attempts all fail get
    None (no opinion) and are counted in `train/reward_failures/<name>`. The run stops with the reward's own error if
    every completion failed in `max_failures` calls in a row, or in the first call, where a mistake in the reward is
    more likely. The reward runs in a thread, beside the other rewards.

    Args:
        reward: Any reward, sync or async.
        timeout: Seconds that one attempt may take; None for no limit. Python can't end a thread, so a sync reward that
            hangs continues in its thread until the process ends, beside the next attempt.
        retries: Further attempts after one that failed.
        backoff: Seconds before the first retry, doubled before each further one, at most 60.
        max_failures: Number of failed calls in a row that stops the run.
        batch_size: Completions per attempt; None for all at once. With 1, one failing completion costs only its own
            reward.
        concurrency: Attempts at the same time; above 1, or with a `timeout`, the reward must be thread-safe.

    Raises:
        ValueError: If a number is out of its range.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        timeout: float | None = None,
        retries: int = 2,
        backoff: float = 1.0,
        max_failures: int = 3,
        batch_size: int | None = None,
        concurrency: int = 1,
    ) -> None:
        if timeout is not None and not 0 < timeout < math.inf:
            raise InputError(f"timeout={timeout} of a reward must be above 0 seconds, or null for no limit")
        if retries < 0 or not 0 <= backoff < math.inf:
            raise InputError(f"retries={retries} and backoff={backoff} of a reward must be 0 or more")
        for name, value in (("max_failures", max_failures), ("batch_size", batch_size), ("concurrency", concurrency)):
            if value is not None and value < 1:
                raise InputError(f"{name}={value} of a reward must be at least 1")
        self.reward, self.timeout, self.retries, self.backoff = reward, timeout, retries, backoff
        self.max_failures, self.batch_size, self.concurrency = max_failures, batch_size, concurrency
        self._failed_calls = 0
        self._answered = self._warned = False

    def __call__(self, **kwargs: Any) -> Any:
        """Call the reward. The scorer applies the options."""
        return self.reward(**kwargs)

    def run(
        self,
        call: Callable[[dict[str, Any]], Any],
        read: Callable[[Any, dict[str, Any]], list[Any]],
        arguments: dict[str, Any],
        title: str,
        name: str,
    ) -> list[Any]:
        """Call a reward in batches, and return one entry per completion, None where it failed.

        Args:
            call: Calls the reward with the arguments of a batch.
            read: Checks what it returned, and makes a list of it.
            arguments: All arguments of the reward.
            title: Name in messages.
            name: Name in metrics.

        Raises:
            Exception: The reward's own, after too many failures.
        """
        count = len(arguments["completions"])
        size = self.batch_size or max(count, 1)
        errors: dict[int, BaseException] = {}
        extras: dict[str, list[Any]] = {}
        stop = threading.Event()

        def run_batch(start: int) -> list[Any]:
            part = _part(arguments, slice(start, start + size), extras)
            try:
                return self._attempt(call, read, part, stop)
            except torch.OutOfMemoryError:
                raise
            except BaseException as error:  # also the SystemExit of a reward that calls sys.exit
                if getattr(error, "hopeless", False) and not self._answered:
                    raise
                errors[start] = error
                return [None] * len(part["completions"])

        batches = map_in_threads(run_batch, range(0, count, size), self.concurrency, stop)
        for column, values in extras.items():
            arguments["log_extra"](column, values)
        failed = sum(min(size, count - start) for start in errors)
        if "log_metric" in arguments:
            arguments["log_metric"](f"reward_failures/{name}", failed)
        self._count_failure(list(errors.values()), failed, count, title, "log_metric" in arguments)
        return list(chain.from_iterable(batches))

    def _attempt(
        self,
        call: Callable[[dict[str, Any]], Any],
        read: Callable[[Any, dict[str, Any]], list[Any]],
        arguments: dict[str, Any],
        stop: threading.Event,
    ) -> list[Any]:
        def may_retry(error: Exception) -> bool:
            retry = self._answered or getattr(error, "retry", True)
            return retry and not isinstance(error, torch.OutOfMemoryError)

        def once() -> list[Any]:
            given, reports = _with_reports(arguments)
            output = read(call_within(self.timeout, call, given), arguments)
            for report in reports:
                report()
            return output

        return attempt(once, self.retries, self.backoff, may_retry, stop)

    def _count_failure(self, errors: list[BaseException], failed: int, count: int, title: str, logged: bool) -> None:
        if failed < count or not count:
            self._failed_calls, self._answered = 0, True
        else:
            self._failed_calls += 1
            if not self._answered or self._failed_calls == self.max_failures:
                raise errors[-1]
        if errors and not self._warned:
            self._warned = True
            left_out = "which have no reward from it" if logged else "which it leaves undecided"
            further = "are counted in train/reward_failures" if logged else "give no warning"
            warn_locally(
                f"{title} failed for {failed} of {count} completions, {left_out} "
                f"({type(errors[-1]).__name__}: {errors[-1]}); further failures {further}"
            )


def _part(arguments: dict[str, Any], rows: slice, extras: dict[str, list[Any]]) -> dict[str, Any]:
    """Return the arguments of some completions; what they report with `log_extra` goes to `extras`."""
    part = {name: value[rows] if isinstance(value, list) else value for name, value in arguments.items()}
    count = len(arguments["completions"])

    def log_extra(column: str, entries: list[Any]) -> None:
        extras.setdefault(column, [None] * count)[rows] = entries

    return {**part, "log_extra": log_extra} if "log_extra" in arguments else part


def _with_reports(arguments: dict[str, Any]) -> tuple[dict[str, Any], list[Callable[[], None]]]:
    """Return the arguments of an attempt, and what it reports, to be called if the attempt succeeds.

    One that failed, or continues in its thread after the time-out, reports nothing.
    """
    reports: list[Callable[[], None]] = []
    count = len(arguments["completions"])

    def log_extra(column: str, values: Iterable[Any]) -> None:
        entries = list(values)
        if len(entries) != count:
            raise InputError(f"log_extra({column!r}) got {len(entries)} values for {count} completions")
        reports.append(partial(arguments["log_extra"], column, entries))

    def log_metric(name: str, value: SupportsFloat) -> None:
        reports.append(partial(arguments["log_metric"], name, float(value)))

    buffered = {"log_extra": log_extra, "log_metric": log_metric}
    return {**arguments, **{name: log for name, log in buffered.items() if name in arguments}}, reports
