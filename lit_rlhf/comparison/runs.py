"""Runs of a comparison: an arm with a seed, trained and tested in child processes, or a measurement of its cost.

A finished run leaves `result.json` in its folder and isn't repeated. A failed or interrupted one is repeated next time.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lit_rlhf.comparison.processes import kill_on_interrupt, last_lines, run_logged
from lit_rlhf.comparison.results import Results, newest_file, read_csv, update_times
from lit_rlhf.errors import InputError

RESULT, TRAINED, LAST = "result.json", "trained.json", "checkpoints/last.ckpt"
"""Files in a run's folder: written when it is done, when its training is done, and the checkpoint to test."""

Arguments = dict[str, list[str] | None]
"""Arguments of `lit-rlhf` by command; `fit` is None or missing if nothing is trained."""


@dataclass(frozen=True)
class Arm:
    """Arguments that distinguish one method of a comparison.

    Attributes:
        fit: Arguments of `lit-rlhf fit` after those that all arms share. None: no training.
        test: Arguments of `lit-rlhf test` after those that all arms share.
        completions: Completions sampled per update, for the axis of a figure. None: as all arms.
    """

    fit: list[str] | None = None
    test: list[str] = field(default_factory=list)
    completions: float | None = None

    def __post_init__(self) -> None:
        if self.completions is not None and not (0 <= self.completions < math.inf):
            raise InputError(f"completions={self.completions} of an arm must be 0 or more")


@dataclass(frozen=True)
class Cost:
    """Measurement of the cost of an update.

    Attributes:
        fit: Arguments of `lit-rlhf fit`, after all others: few updates, no validation.
        rounds: Measurements of each arm. The rounds interleave the arms, so that a disturbance affects all of them.
    """

    fit: list[str]
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise InputError(f"cost.rounds={self.rounds} must be at least 1")


@dataclass(frozen=True)
class Run:
    """An arm with a seed, or one measurement of its cost.

    Attributes:
        arm: Name of the arm.
        label: Name in the progress bar.
        folder: Output folder.
        seed: Random seed.
        arguments: Arguments of its commands, without seed and folder.
    """

    arm: str
    label: str
    folder: Path
    seed: int
    arguments: Arguments

    def result(self) -> dict[str, Any] | None:
        """Read the result; None if the run isn't done.

        Raises:
            ValueError: If the result was made with other arguments.
        """
        if not (self.folder / RESULT).is_file():
            return None
        try:
            found: dict[str, Any] = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        except ValueError:  # the machine went down while it was written
            return None
        if found.get("arguments") != self.arguments:
            raise InputError(
                f"{str(self.folder)!r} holds the result of other arguments ({found.get('arguments')}; now they are "
                f"{self.arguments}): delete that folder, or give another --out"
            )
        return found

    def write_result(self, **result: Any) -> None:
        """Write the result."""
        self._write(RESULT, {"seed": self.seed, "arguments": self.arguments, **result})

    def write_trained(self) -> None:
        """Write that training is done."""
        self._write(TRAINED, self.arguments["fit"])

    def _write(self, name: str, content: Any) -> None:
        partial = self.folder / f"partial-{name}"  # no reader sees half of it
        partial.write_text(json.dumps(content), encoding="utf-8")
        partial.replace(self.folder / name)

    def is_trained(self) -> bool:
        """Return whether training with these arguments is done, so that only the test is missing."""
        record = self.folder / TRAINED
        if not record.is_file() or not any(self.folder.glob(f"version_*/{LAST}")):
            return False
        try:
            return bool(json.loads(record.read_text(encoding="utf-8")) == self.arguments["fit"])
        except ValueError:  # the machine went down while it was written
            return False

    def prepare(self) -> tuple[list[str], Path]:
        """Create the folder; return the arguments with seed and folder, and the path of the log."""
        self.folder.mkdir(parents=True, exist_ok=True)
        location = ["--seed_everything", str(self.seed), "--trainer.default_root_dir", str(self.folder)]
        return location, self.folder / "log.txt"


def arm_runs(
    folder: Path, arms: dict[str, Arm], seeds: Sequence[int], fit_args: list[str], test_args: list[str]
) -> Iterator[Run]:
    """Yield every arm with every seed."""
    for seed in seeds:
        for name, arm in arms.items():
            fit = None if arm.fit is None else [*fit_args, *arm.fit]
            arguments: Arguments = {"fit": fit, "test": [*test_args, *arm.test]}
            yield Run(name, f"{name}, seed {seed}", run_folder(folder, name, seed), seed, arguments)


def cost_runs(folder: Path, arms: dict[str, Arm], fit_args: list[str], cost: Cost | None) -> Iterator[Run]:
    """Yield the cost measurements of every trained arm, round by round; the round is the seed."""
    if cost is None:
        return
    for number in range(1, cost.rounds + 1):
        for name, arm in arms.items():
            if arm.fit is not None:
                arguments: Arguments = {"fit": [*fit_args, *arm.fit, *cost.fit]}
                label = f"cost of {name}, round {number}"
                yield Run(name, label, run_folder(folder, name, number), number, arguments)


def run_folder(out: Path, name: str, seed: int) -> Path:
    """Return the folder of an arm with a seed."""
    plain = "".join(c if c.isalnum() or c in ".-+" else "-" for c in name).strip("-")
    return out / plain / f"seed-{seed}"


def thread_limit(jobs: int) -> dict[str, str]:
    """Return the environment of a process that shares the available threads with others."""
    return {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}


def run_all(runs: Sequence[Run], run_one: Callable[[Run], str | None], jobs: int) -> list[str]:
    """Execute runs in parallel with a progress bar; return the labels of the failed ones.

    Args:
        runs: Runs to execute.
        run_one: Executes a run; returns the error of a failed one, or None.
        jobs: Number of runs at a time.
    """
    failed: list[str] = []
    with Progress(transient=True) as progress, ThreadPoolExecutor(jobs) as pool, kill_on_interrupt(pool):
        task = progress.add_task("", total=len(runs))
        labels = {pool.submit(run_one, run): run.label for run in runs}
        for done in as_completed(labels):
            label, raised = labels[done], done.exception()
            error = done.result() if raised is None else f"{type(raised).__name__}: {raised}"
            progress.update(task, advance=1, description=label)
            if error is not None:
                failed.append(label)
                progress.console.print(f"{label} failed:\n{error}", soft_wrap=True, markup=False)
    return failed


def run_arm(run: Run, environment: dict[str, str]) -> str | None:
    """Train and test an arm; return the last lines of the log if a command failed, otherwise None."""
    location, log = run.prepare()
    checkpoint: list[str] = []
    fit, test = run.arguments["fit"], run.arguments["test"] or []
    if fit is not None:
        if not run.is_trained():
            log.unlink(missing_ok=True)
            (run.folder / TRAINED).unlink(missing_ok=True)
            if run_logged(["fit", *fit, *location], log, environment) is None:
                return last_lines(log)
            run.write_trained()
        checkpoint = ["--ckpt_path", str(newest_file(run.folder, LAST))]
    if run_logged(["test", *test, *location, *checkpoint], log, environment) is None:
        return last_lines(log)
    path = newest_file(run.folder, "metrics.csv", "test")
    tested = [row for row in read_csv(path) if any(name.startswith("test/") for name in row)]
    if not tested:
        return f"{path} holds no result of the test"
    metrics = {name.removeprefix("test/"): value for name, value in tested[-1].items() if name.startswith("test/")}
    curves = read_csv(newest_file(run.folder, "checkpoints").parent / "metrics.csv") if checkpoint else []
    run.write_result(metrics=metrics, curves=curves)
    return None


def measure_cost(run: Run) -> str | None:
    """Measure the seconds per update and the peak memory of a few updates; return the error, or None.

    The first half of the updates doesn't count: they allocate the memory.
    """
    location, log = run.prepare()
    log.unlink(missing_ok=True)
    fit = run.arguments["fit"] or []
    peak = run_logged(["fit", *fit, *location], log, {})
    if peak is None:
        return last_lines(log)
    rows = read_csv(newest_file(run.folder, "metrics.csv"))
    times = update_times(rows)
    if len(times) < 2:
        return f"{' '.join(fit)}: the cost of an update needs at least two updates"
    (before, start), (after, end) = times[len(times) // 2 - 1], times[-1]
    peak = max((row["memory/peak_mib"] for row in rows if "memory/peak_mib" in row), default=peak)
    run.write_result(metrics={"seconds": (end - start) / (after - before), "peak_mib": peak})
    for folder in [run.folder / "policy", *run.folder.glob("version_*/checkpoints")]:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes of a policy after only a few updates
    return None


def read_results(runs: Iterable[Run]) -> Results:
    """Read the available results by arm."""
    results: Results = {}
    for run in runs:
        if (result := run.result()) is not None:
            results.setdefault(run.arm, []).append(result)
    return results
