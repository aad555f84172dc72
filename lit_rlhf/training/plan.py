"""What a run will do, in a few lines, and whether the CPU has room for it."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from lit_rlhf.errors import counted


@dataclass(frozen=True)
class Plan:
    """The sizes of a run.

    Attributes:
        rows: Rows of a step on all devices; for methods that sample, the prompts of a rollout. 0 if unknown.
        accumulate: Training steps of an update.
        updates: Updates of the run; infinite if only time limits it.
        done: Updates that the resumed run has already made.
        num_samples: Completions of each prompt; 0 for methods that do not sample.
        max_new_tokens: Maximum length of a completion.
        steps_per_rollout: Training steps on one rollout.
        corrected: Whether the loss corrects for updates since sampling.
        rounds: Parts of the rows that dynamic sampling may need for a rollout, which is one of them.
        extra_samples: Completions of each prompt that are sampled and not learned from.
        grows: Whether a callback changes the size of a rollout.
        trained: Number of weights that are trained.
        weights: Number of weights of the models that are trained, frozen ones under LoRA included.
    """

    rows: int
    accumulate: int
    updates: float
    done: int = 0
    num_samples: int = 0
    max_new_tokens: int = 0
    steps_per_rollout: int = 1
    corrected: bool = False
    rounds: int = 1
    extra_samples: int = 0
    grows: bool = False
    trained: int = 0
    weights: int = 0

    def lines(self) -> dict[str, str]:
        """Return the lines of the block, by label."""
        trained = {"trained": f"{self.trained:,} of {self.weights:,} weights"} if self.weights else {}
        updates = counted(self.updates, "update") if math.isfinite(self.updates) else "updates until the time is over"
        updates += f", of which {self.done:,} are done" if self.done else ""
        if not self.num_samples:
            rows = counted(self.rows * self.accumulate, "row") if self.rows else "rows of your loader"
            return {**trained, "each update": rows, "this run": updates}
        completions = self.rows * (self.num_samples + self.extra_samples)
        prompts = counted(self.rows // self.rounds, "prompt") if self.rows else "prompts of your loader"
        prompts += f" of up to {self.rows:,} sampled" if self.rounds > 1 else ""
        prompts += f" x {counted(self.num_samples, 'completion')} of at most {counted(self.max_new_tokens, 'token')}"
        lines = {
            "each rollout": f"{prompts}{', growing' if self.grows else ''}",
            "updates": self._updates_per_rollout(),
        }
        if math.isfinite(self.updates) and not self.grows:
            rollouts = math.ceil(self.updates * self.accumulate / self.steps_per_rollout)
            updates += f", {counted(rollouts, 'rollout')}"
            if total := rollouts * completions:
                updates += f", {counted(total, 'completion')}"
                lines["sampled"] = f"at most {counted(total * self.max_new_tokens, 'token')}"
        return {**trained, **lines, "this run": updates}

    def _updates_per_rollout(self) -> str:
        count, rest = divmod(self.steps_per_rollout, self.accumulate)
        if count == 0 or (count == 1 and not rest):
            rollouts = self.accumulate // self.steps_per_rollout
            return f"1 per {'rollout' if rollouts == 1 else f'{rollouts} rollouts'}: on-policy"
        correction = "corrected by a ratio" if self.corrected else "not corrected"
        return f"{count} per rollout: off-policy after the first, {correction}"


def cpu_advice(threads: int, own_load: float = 0.0) -> str:
    """Return what to do if the CPU has no room for this many threads, or nothing.

    Threads that wait for each other make two runs on the same cores several times slower than one after the other.

    Args:
        threads: Threads of this process.
        own_load: What this process adds to the load.
    """
    cores, usable = os.cpu_count() or 1, math.ceil(usable_cores())
    load = os.getloadavg()[0] - own_load if hasattr(os, "getloadavg") else 0.0
    if threads > usable:
        return f"{threads} threads on {usable} usable cores: set OMP_NUM_THREADS={usable}"
    if threads > 1 and load > 0.9 * cores:
        return f"busy, other processes have a load of {load:.1f} on {cores} cores: set OMP_NUM_THREADS=1"
    return ""


def usable_cores(limit: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Return the number of cores that this process may use: of its affinity and its container's limit."""
    cores = float(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)
    try:
        quota, period = limit.read_text().split()
        return min(cores, int(quota) / int(period))
    except (OSError, ValueError):  # no such file, or no limit
        return cores
