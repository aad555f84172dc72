"""Several methods on one task: each trained and tested in processes of its own, then tables and pictures.

A cell is a method with a seed. It leaves `result.json` in its folder when it is done, and is then not run again; one
that fails or is interrupted is run again the next time, and the others go on. What a method costs is measured
afterwards, by short runs with nothing beside them.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress

from lit_rlhf.comparison import report
from lit_rlhf.comparison.processes import ended_with, last_lines, run_logged

RESULT, TRAINED, LAST = "result.json", "trained.json", "checkpoints/last.ckpt"
"""What a run leaves in its folder when it is done, once its training is, and what is tested then."""

Arguments = dict[str, list[str] | None]
"""By command, what `lit-rlhf` is given; no `fit` where nothing is trained."""


class CellsFailed(RuntimeError):
    """Some cells failed; all others are done."""


@dataclass(frozen=True)
class Cell:
    """What a method is given.

    Attributes:
        fit: Arguments of `lit-rlhf fit` beside those that all cells share; None: nothing is trained.
        test: Arguments of `lit-rlhf test`, likewise.
    """

    fit: list[str] | None = None
    test: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Cost:
    """How to measure what an update costs.

    Attributes:
        fit: Arguments of `lit-rlhf fit`, after all others: few updates, no validation.
        rounds: Runs of each method, one after the other and then all again, so that what disturbs one disturbs all.
    """

    fit: list[str]
    rounds: int = 3

    def __post_init__(self) -> None:
        if self.rounds < 1:
            raise ValueError(f"cost.rounds={self.rounds} must be at least 1")


@dataclass(frozen=True)
class Run:
    """A cell with a seed, or a measurement of its cost.

    Attributes:
        cell: The cell's name.
        label: What the progress bar calls it.
        folder: Where it writes.
        seed: Its seed.
        given: What its commands are given, beside seed and folder.
    """

    cell: str
    label: str
    folder: Path
    seed: int
    given: Arguments

    def result(self) -> dict[str, Any] | None:
        """What it left; None where it is not done.

        Raises:
            ValueError: If that is of other arguments.
        """
        if not (self.folder / RESULT).is_file():
            return None
        found: dict[str, Any] = json.loads((self.folder / RESULT).read_text(encoding="utf-8"))
        if found.get("arguments") != self.given:
            raise ValueError(
                f"{str(self.folder)!r} holds the result of other arguments ({found.get('arguments')}; now they are "
                f"{self.given}): delete that folder, or give another --out"
            )
        return found

    def leave(self, **result: Any) -> None:
        """Write the result, whole or not at all."""
        partial = self.folder / f"partial-{RESULT}"
        partial.write_text(json.dumps({"seed": self.seed, "arguments": self.given, **result}), encoding="utf-8")
        partial.replace(self.folder / RESULT)

    def is_trained(self) -> bool:
        """Whether it was trained with these arguments, and only its test is missing."""
        noted = self.folder / TRAINED
        if not noted.is_file() or not any(self.folder.glob(f"version_*/{LAST}")):
            return False
        return bool(json.loads(noted.read_text(encoding="utf-8")) == self.given["fit"])


def compare(
    cells: dict[str, Cell],
    common: list[str],
    evaluation: list[str],
    out: str = "runs/compare",
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    only: Sequence[str] = (),
    rates: Sequence[float] = (),
    pairs: Sequence[tuple[str, str]] = (),
    completions: int = 1,
    cost: Cost | None = None,
    jobs: int = 1,
) -> Path:
    """Train and test every cell, and write `table.md`, `table.csv` and the pictures.

    Args:
        cells: What each method is given beside `common` and `evaluation`, by its name.
        common: What every `fit` is given, such as `["--config", "quickstart"]`.
        evaluation: What `lit-rlhf test` is given; each cell is tested with its own weights.
        out: The folder; what is done there already is not run again.
        seeds: One cell of each method for each seed; may be empty where only costs are measured.
        only: Names of the methods to run; all where empty. The table holds all that is done with these seeds.
        rates: Learning rates to try with every method that is trained; the table says which gives the best return.
        pairs: Names of methods whose difference is to be shown, with its interval over the seeds.
        completions: How many an update samples, for the axis of a picture.
        cost: Measures seconds and memory afterwards, where given.
        jobs: Cells to run at a time; they share the processor's cores.

    Returns:
        Where the table stands, as Markdown.

    Raises:
        ValueError: If a name in `only` or `pairs` is no cell, two cells or seeds can't be told apart, a number is out
            of its range, the command line would not take a cell's arguments, or a result that is there was made with
            other ones.
        CellsFailed: At the end, if there is one that failed.
        KeyboardInterrupt: If it was interrupted; the cells under way are lost.
    """
    check_names(cells, {*only, *(name for pair in pairs for name in pair)})
    chosen = {name: cell for name, cell in cells.items() if not only or name in only}
    if rates:
        chosen, cells, pairs, cost = sweep(chosen, rates), sweep(cells, rates), (), None
    check_numbers(seeds, jobs, len(chosen), bool(cost))
    folder, environment = Path(out), threads(jobs)
    all_runs = list(cell_runs(folder, cells, seeds, common, evaluation))
    all_measurements = list(cost_runs(folder / "cost", cells, common, cost))
    done = {run.folder for run in (*all_runs, *all_measurements) if run.result() is not None}
    runs = [run for run in all_runs if run.cell in chosen and run.folder not in done]
    measurements = [run for run in all_measurements if run.cell in chosen and run.folder not in done]
    check_arguments([*runs, *measurements])
    failed = run_all(runs, lambda run: run_cell(run, environment), jobs) + run_all(measurements, measure, 1)
    found = read_results(all_runs)
    costs: report.Results = {run.cell: [] for run in all_measurements} | read_results(all_measurements)
    results = {name: found.get(name, []) for name in cells if name in found or name in chosen or costs.get(name)}
    table = report.write(folder, results, costs, len(seeds), pairs, completions, cost.rounds if cost else 0)
    if rates:
        report.add_best_rates(table, results)
    print(table.read_text(encoding="utf-8"))
    check_failed(failed, len(runs) + len(measurements))
    return table


def check_failed(failed: list[str], count: int) -> None:
    """Raise `CellsFailed` if some of the cells have."""
    if failed:
        raise CellsFailed(f"{len(failed)} of {count} cells failed ({'; '.join(failed)}): see log.txt in their folders")


def check_names(cells: Iterable[str], named: set[str]) -> None:
    """Raise a ValueError if a name is no cell's, or two cells would write into one folder."""
    if unknown := named - set(cells):
        raise ValueError(f"{sorted(unknown)}: there is no such cell; the cells are {', '.join(cells)}")
    places: dict[Path, str] = {}
    for name in cells:
        other = places.setdefault(cell_folder(Path(), name, 0), name)
        if other != name:
            raise ValueError(f"the cells {other!r} and {name!r} would write into one folder: rename one")


def check_numbers(seeds: Sequence[int], jobs: int, num_cells: int, measures: bool) -> None:
    """Raise a ValueError if there is nothing to do, or a seed stands twice."""
    if jobs < 1 or not (seeds or measures) or num_cells < 1:
        raise ValueError(f"seeds={list(seeds)}, jobs={jobs} and {num_cells} cells: give at least one of each")
    if len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}: one of them stands twice")


def cell_runs(
    folder: Path, cells: dict[str, Cell], seeds: Sequence[int], common: list[str], evaluation: list[str]
) -> Iterator[Run]:
    """Every cell with every seed."""
    for seed in seeds:
        for name, cell in cells.items():
            fit = None if cell.fit is None else [*common, *cell.fit]
            given: Arguments = {"fit": fit, "test": [*evaluation, *cell.test]}
            yield Run(name, f"{name}, seed {seed}", cell_folder(folder, name, seed), seed, given)


def cost_runs(folder: Path, cells: dict[str, Cell], common: list[str], cost: Cost | None) -> Iterator[Run]:
    """Every cell that is trained, round by round; its number is the seed."""
    if cost is None:
        return
    for number in range(1, cost.rounds + 1):
        for name, cell in cells.items():
            if cell.fit is not None:
                given: Arguments = {"fit": [*common, *cell.fit, *cost.fit]}
                place = cell_folder(folder, name, number)
                yield Run(name, f"cost of {name}, round {number}", place, number, given)


def check_arguments(runs: Iterable[Run]) -> None:
    """Raise a ValueError if the command line would not take what a run is given, before any has taken its time."""
    from lit_rlhf.cli import parse_error  # late: it knows this module

    commands = {(command, *args): run.cell for run in runs for command, args in run.given.items() if args is not None}
    for command, cell in commands.items():
        if said := parse_error(command):
            raise ValueError(f"the cell {cell!r}: lit-rlhf {command[0]} does not take what it is given: {said}")


def sweep(cells: dict[str, Cell], rates: Sequence[float]) -> dict[str, Cell]:
    """Every cell that is trained, with every learning rate.

    Raises:
        ValueError: If a rate is none.
    """
    if wrong := [rate for rate in rates if not (rate > 0 and math.isfinite(rate))]:
        raise ValueError(f"rates={wrong} must be above 0")
    return {
        f"{name}, lr {rate:g}": replace(cell, fit=[*cell.fit, "--model.optimizer.lr", f"{rate:g}"])
        for name, cell in cells.items()
        if cell.fit is not None
        for rate in rates
    }


def run_all(runs: Sequence[Run], run_one: Callable[[Run], str | None], jobs: int) -> list[str]:
    """Do runs, some at a time, and show how far it is; return the labels of those that failed."""
    failed: list[str] = []
    with Progress(transient=True) as progress, ThreadPoolExecutor(jobs) as pool, ended_with(pool):
        task = progress.add_task("", total=len(runs))
        waiting = {pool.submit(run_one, run): run.label for run in runs}
        for done in as_completed(waiting):
            name, raised = waiting[done], done.exception()
            error = done.result() if raised is None else f"{type(raised).__name__}: {raised}"
            progress.update(task, advance=1, description=name)
            if error is not None:
                failed.append(name)
                progress.console.print(f"{name} failed:\n{error}", soft_wrap=True, markup=False)
    return failed


def threads(jobs: int) -> dict[str, str]:
    """The environment of a process that shares the threads that this one has with others."""
    return {} if jobs == 1 else {"OMP_NUM_THREADS": str(max(1, torch.get_num_threads() // jobs))}


def cell_folder(out: Path, name: str, seed: int) -> Path:
    """Where a cell writes."""
    plain = "".join(c if c.isalnum() or c in ".-" else "-" for c in name).strip("-")
    return out / plain / f"seed-{seed}"


def run_cell(run: Run, environment: dict[str, str]) -> str | None:
    """Train and test one cell; return the last lines of what failed, or None."""
    place, log = prepare(run)
    checkpoint: list[str] = []
    fit, test = run.given["fit"], run.given["test"] or []
    if fit is not None:
        if not run.is_trained():
            log.unlink(missing_ok=True)
            (run.folder / TRAINED).unlink(missing_ok=True)
            if run_logged(["fit", *fit, *place], log, environment) is None:
                return last_lines(log)
            (run.folder / TRAINED).write_text(json.dumps(fit), encoding="utf-8")
        checkpoint = ["--ckpt_path", str(newest(run.folder, LAST))]
    if run_logged(["test", *test, *place, *checkpoint], log, environment) is None:
        return last_lines(log)
    tested = [row for row in read_csv(newest(run.folder, "metrics.csv")) if any(n.startswith("test/") for n in row)]
    if not tested:
        return f"{newest(run.folder, 'metrics.csv')} holds no result of the test"
    metrics = {name.removeprefix("test/"): value for name, value in tested[-1].items() if name.startswith("test/")}
    curves = read_csv(newest(run.folder, "checkpoints").parent / "metrics.csv") if checkpoint else []
    run.leave(metrics=metrics, curves=curves)
    return None


def measure(run: Run) -> str | None:
    """Do a few updates and note their seconds and the peak memory of the process; return what failed, or None.

    The first half of the updates does not count: memory is taken then.
    """
    place, log = prepare(run)
    log.unlink(missing_ok=True)
    given = run.given["fit"] or []
    peak = run_logged(["fit", *given, *place], log, {})
    if peak is None:
        return last_lines(log)
    rows = read_csv(newest(run.folder, "metrics.csv"))
    told = report.trained(rows)
    if len(told) < 2:
        return f"{' '.join(given)}: two updates at least are needed to measure one"
    (before, start), (after, end) = told[len(told) // 2 - 1], told[-1]
    peak = max((row["memory/peak_mib"] for row in rows if "memory/peak_mib" in row), default=peak)
    run.leave(metrics={"seconds": (end - start) / (after - before), "peak_mib": peak})
    for folder in [run.folder / "policy", *run.folder.glob("version_*/checkpoints")]:
        shutil.rmtree(folder, ignore_errors=True)  # gigabytes, of a policy that no one wants after a few updates
    return None


def prepare(run: Run) -> tuple[list[str], Path]:
    """Make a run's folder; return the arguments that send its commands there, and where their output goes."""
    run.folder.mkdir(parents=True, exist_ok=True)
    return ["--seed_everything", str(run.seed), "--trainer.default_root_dir", str(run.folder)], run.folder / "log.txt"


def newest(folder: Path, name: str) -> Path:
    """The file of this name in the newest run below a folder.

    Raises:
        FileNotFoundError: If no run has left one.
    """
    found = sorted(folder.glob(f"version_*/{name}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"there is no {name} in {str(folder)!r}: was checkpointing or logging switched off?")
    return found[-1]


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without the empty fields."""
    with path.open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_results(runs: Iterable[Run]) -> report.Results:
    """By method, the results that are there."""
    found: report.Results = {}
    for run in runs:
        if (result := run.result()) is not None:
            found.setdefault(run.cell, []).append(result)
    return found
