"""Seconds by phase of a rollout, and peak memory."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator

import torch


class PhaseTimer:
    """Adds up the seconds of a rollout by phase. Time outside a phase, such as backward, counts as training.

    Attributes:
        seconds: Seconds of the current rollout by phase, without the step in progress.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started: float | None = None  # set while a step runs

    @contextlib.contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Add the time of the body to a phase."""
        started = now()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now() - started

    def begin_step(self, new_rollout: bool) -> None:
        """Start timing a step; reset the phases at the first step of a rollout."""
        if new_rollout:
            self.seconds = {}
        self._started = now() - sum(self.seconds.values())

    def end_step(self) -> None:
        """Add the rest of the step, including backward and update, to training."""
        self.seconds, self._started = self.so_far(), None

    def so_far(self) -> dict[str, float]:
        """Return the seconds of the rollout by phase, including the step in progress."""
        if self._started is None:
            return dict(self.seconds)
        rest = now() - self._started - sum(self.seconds.values())
        return {**self.seconds, "train": self.seconds.get("train", 0.0) + rest}

    def metrics(self, tokens: int) -> dict[str, float]:
        """Return `time/PHASE` in seconds, and completion tokens per second."""
        total = max(sum(self.seconds.values()), 1e-9)
        seconds = {f"time/{phase}": value for phase, value in self.seconds.items()}
        return {**seconds, "throughput/completion_tokens": tokens / total}


class TrainingTimer:
    """Adds up the seconds of all training steps.

    Args:
        seconds: Seconds before a resume.
    """

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds
        self._started: float | None = None  # set while a step runs

    def start(self) -> None:
        """Start timing a step."""
        self._started = now()

    def stop(self) -> float:
        """Add a step to the total, and return its seconds."""
        before, self.seconds = self.seconds, self.so_far()
        self._started = None
        return self.seconds - before

    def so_far(self) -> float:
        """Return the total including the step in progress."""
        return self.seconds if self._started is None else self.seconds + now() - self._started


def now() -> float:
    """Return a monotonic time in seconds, after waiting for the GPU if this process uses one."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    return time.perf_counter()


def peak_memory(device: torch.device) -> dict[str, float]:
    """Return the peak of the memory allocated on a GPU by this process, in MiB; nothing on a CPU."""
    if device.type != "cuda":
        return {}
    return {"memory/peak_mib": torch.cuda.max_memory_allocated(device) / 2**20}
