"""`lit-rlhf compare`: several methods on one task, each trained and tested with several seeds."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

from lit_rlhf.comparison import report
from lit_rlhf.comparison.results import Results
from lit_rlhf.comparison.runs import (
    Arm,
    Cost,
    Run,
    arm_runs,
    cost_runs,
    measure_cost,
    read_results,
    run_all,
    run_arm,
    run_folder,
    thread_limit,
)
from lit_rlhf.errors import InputError


class RunsFailed(RuntimeError):
    """Some runs of a comparison failed; all others are done."""


def compare(
    arms: dict[str, Arm],
    fit_args: list[str],
    test_args: list[str],
    out: str = "runs/compare",
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    only: Sequence[str] = (),
    learning_rates: Sequence[float] = (),
    pairs: Sequence[tuple[str, str]] = (),
    contrasts: report.Contrasts | None = None,
    completions: float = 1,
    cost: Cost | None = None,
    jobs: int = 1,
    parse_error: Callable[[Sequence[str]], str | None] | None = None,
) -> Path:
    """Train and test every arm, write `table.md`, `table.csv`, `runs.csv` and figures, and return the first's path.

    Args:
        arms: Methods by name: the arguments of each, added to `fit_args` and `test_args`.
        fit_args: Arguments of every `lit-rlhf fit`, such as `["--config", "quickstart"]`.
        test_args: Arguments of every `lit-rlhf test`, which runs on the trained weights of each arm.
        out: Output folder. Finished runs in it aren't repeated.
        seeds: Seeds of each arm. May be empty to measure only costs.
        only: Names of the arms to run; empty: all. The table shows all finished runs with these seeds.
        learning_rates: Sweep: learning rates to try with every trained arm. The table shows which has the best return.
        pairs: Pairs of arms whose difference to show, with its interval over the seeds.
        contrasts: Further differences, by title: the mean of several arms minus that of others, seed by seed.
        completions: Completions sampled per update, for the axis of a figure, where an arm has no other number.
        cost: If given, measure seconds and memory of an update after all runs.
        jobs: Number of runs at a time. They share the processor's cores.
        parse_error: Returns the error of a `lit-rlhf` command line, or None, without running it; None: no check.

    Raises:
        ValueError: If an option names no arm or an unknown one, two arms share a folder, a number is out of range, the
            command line rejects an arm's arguments, or a finished result was made with other arguments.
        RunsFailed: At the end, if runs failed.
    """
    differences: report.Contrasts = {f"{a} - {b}": ([a], [b]) for a, b in pairs} | (contrasts or {})
    check_names(arms, {*only, *compared_arms(differences)})
    chosen = {name: arm for name, arm in arms.items() if not only or name in only}
    if learning_rates:
        chosen, arms, differences, cost = sweep(chosen, learning_rates), sweep(arms, learning_rates), {}, None
    check_numbers(seeds, jobs, len(chosen), bool(cost))
    folder, environment = Path(out).expanduser(), thread_limit(jobs)
    all_runs = list(arm_runs(folder, arms, seeds, fit_args, test_args))
    all_measurements = list(cost_runs(folder / "cost", arms, fit_args, cost))
    runs, measurements = unfinished(all_runs, chosen), unfinished(all_measurements, chosen)
    if parse_error is not None:
        check_arguments([*runs, *measurements], parse_error)
    failed = run_all(runs, lambda run: run_arm(run, environment), jobs) + run_all(measurements, measure_cost, 1)
    costs: Results = {run.arm: [] for run in all_measurements} | read_results(all_measurements)
    results, counts = shown_results(arms, chosen, read_results(all_runs), costs), sampled(arms, completions)
    table = report.write(folder, results, costs, len(seeds), differences, counts, cost.rounds if cost else 0)
    if learning_rates:
        report.add_best_rates(table, results)
    print(table.read_text(encoding="utf-8"))
    if failed:
        count = f"{len(failed)} of {len(runs) + len(measurements)}"
        raise RunsFailed(f"{count} runs failed ({'; '.join(failed)}): see log.txt in their folders")
    return table


def unfinished(runs: Iterable[Run], chosen: Iterable[str]) -> list[Run]:
    """Return the runs of the chosen arms without a result.

    Raises:
        ValueError: If a result of any arm was made with other arguments: all share one table.
    """
    return [run for run in runs if run.result() is None and run.arm in chosen]


def shown_results(arms: Iterable[str], chosen: Iterable[str], results: Results, costs: Results) -> Results:
    """Return the results for the table: of the chosen arms, and of all others that have results or costs."""
    return {name: results.get(name, []) for name in arms if name in results or name in chosen or costs.get(name)}


def sampled(arms: dict[str, Arm], completions: float) -> dict[str, float]:
    """Return the completions per update of each arm."""
    return {name: completions if arm.completions is None else arm.completions for name, arm in arms.items()}


def sweep(arms: dict[str, Arm], learning_rates: Sequence[float]) -> dict[str, Arm]:
    """Return every trained arm with every learning rate.

    Raises:
        ValueError: If a learning rate isn't positive and finite.
    """
    if wrong := [rate for rate in learning_rates if not (rate > 0 and math.isfinite(rate))]:
        raise InputError(f"learning_rates={wrong} must be above 0")
    return {
        f"{name}, lr {rate!r}": replace(arm, fit=[*arm.fit, "--model.optimizer.lr", f"{rate!r}"])
        for name, arm in arms.items()
        if arm.fit is not None
        for rate in learning_rates
    }


def compared_arms(contrasts: report.Contrasts) -> set[str]:
    """Return the names in contrasts.

    Raises:
        ValueError: If a side has none.
    """
    if empty := [title for title, sides in contrasts.items() if not all(sides)]:
        raise InputError(f"contrasts {empty}: name at least one arm on each side")
    return {name for sides in contrasts.values() for side in sides for name in side}


def check_names(arms: Iterable[str], names: set[str]) -> None:
    """Raise a ValueError if a name isn't an arm, or two arms would write into one folder."""
    if unknown := names - set(arms):
        raise InputError(f"{sorted(unknown)}: there is no such arm; the arms are {', '.join(arms)}")
    owners: dict[Path, str] = {}
    for name in arms:
        if not any(c.isalnum() for c in name):
            raise InputError(f"the arm {name!r} needs a letter or a digit in its name, which its folder has")
        other = owners.setdefault(run_folder(Path(), name, 0), name)
        if other != name:
            raise InputError(f"the arms {other!r} and {name!r} would write into one folder: rename one")


def check_numbers(seeds: Sequence[int], jobs: int, num_arms: int, has_cost: bool) -> None:
    """Raise a ValueError if there is nothing to run, or a seed occurs twice."""
    if jobs < 1 or not (seeds or has_cost) or num_arms < 1:
        raise InputError(f"seeds={list(seeds)}, jobs={jobs} and {num_arms} arms: give at least one of each")
    if len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={list(seeds)}: a seed occurs twice")


def check_arguments(runs: Iterable[Run], parse_error: Callable[[Sequence[str]], str | None]) -> None:
    """Raise a ValueError if the command line rejects the arguments of a run, before any run starts."""
    commands = {
        (command, *args): run.arm for run in runs for command, args in run.arguments.items() if args is not None
    }
    for command, arm in commands.items():
        if error := parse_error(command):
            raise InputError(f"the arm {arm!r}: lit-rlhf {command[0]} rejects its arguments: {error}")
