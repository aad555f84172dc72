"""Several methods on one task: each trained and tested in processes of its own, then one table and the pictures.

A cell is a method with a seed. It leaves `result.json` in its folder when it is done, and is then not run again; one
that fails is run again the next time, and the others go on.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.progress import Progress

from lit_rlhf import report

LAST_LINES = 15
"""Lines of a failed process to show."""


class CellsFailed(RuntimeError):
    """Some cells failed; all others are done."""


def compare(
    cells: dict[str, list[str] | None],
    common: list[str],
    evaluation: list[str],
    out: str = "runs/compare",
    seeds: Sequence[int] = (1, 2, 3, 4, 5),
    only: Sequence[str] = (),
) -> Path:
    """Train and test every cell, and write `table.md`, `table.csv` and the pictures.

    Args:
        cells: By name, what a method's `lit-rlhf fit` is given beside `common`; null: nothing is trained.
        common: What every `fit` is given, such as `["--config", "quickstart"]`.
        evaluation: What `lit-rlhf test` is given; each cell is tested with its own weights.
        out: The folder; what is done there already is not run again.
        seeds: One cell of each method for each seed.
        only: Names of the methods to run; all where empty. The table holds all that is done.

    Returns:
        Where the table stands, as Markdown.

    Raises:
        ValueError: If a name in `only` is no cell, or there is no seed.
        CellsFailed: At the end, if there is one that failed.
    """
    if unknown := set(only) - set(cells):
        raise ValueError(f"only={sorted(unknown)}: there is no such cell; the cells are {', '.join(cells)}")
    if not seeds:
        raise ValueError("seeds is empty: give at least one")
    folder = Path(out)
    chosen = [name for name in cells if not only or name in only]
    due = [
        (name, seed) for seed in seeds for name in chosen if not (cell_folder(folder, name, seed) / RESULT).is_file()
    ]
    failed: list[str] = []
    with Progress(transient=True) as progress:
        task = progress.add_task("", total=len(due))
        for name, seed in due:
            progress.update(task, description=f"{name}, seed {seed}")
            error = run_cell(cell_folder(folder, name, seed), seed, common, cells[name], evaluation)
            if error is not None:
                failed.append(f"{name}, seed {seed}")
                progress.console.print(f"{name}, seed {seed} failed:\n{error}", soft_wrap=True, markup=False)
            progress.advance(task)
    results = {name: read_results(folder, name, seeds) for name in cells}
    table = report.write(folder, results, len(seeds))
    print(table.read_text(encoding="utf-8"))
    if failed:
        raise CellsFailed(
            f"{len(failed)} of {len(due)} cells failed ({'; '.join(failed)}): see log.txt in their folders"
        )
    return table


RESULT = "result.json"


def cell_folder(out: Path, name: str, seed: int) -> Path:
    """Where a cell writes."""
    plain = "".join(c if c.isalnum() else "-" for c in name).strip("-")
    return out / plain / f"seed-{seed}"


def run_cell(folder: Path, seed: int, common: list[str], given: list[str] | None, evaluation: list[str]) -> str | None:
    """Train and test one cell; return the last lines of what failed, or None."""
    folder.mkdir(parents=True, exist_ok=True)
    place = ["--seed_everything", str(seed), "--trainer.default_root_dir", str(folder)]
    started, log = time.perf_counter(), folder / "log.txt"
    log.unlink(missing_ok=True)
    checkpoint: list[str] = []
    if given is not None:
        if not run_logged(["fit", *common, *given, *place], log):
            return last_lines(log)
        checkpoint = ["--ckpt_path", str(newest(folder, "checkpoints/last.ckpt"))]
    seconds = time.perf_counter() - started
    if not run_logged(["test", *evaluation, *place, *checkpoint], log):
        return last_lines(log)
    tested = [row for row in read_csv(newest(folder, "metrics.csv")) if any(name.startswith("test/") for name in row)]
    metrics = {name.removeprefix("test/"): value for name, value in tested[-1].items() if name.startswith("test/")}
    curves = read_csv(newest(folder, "checkpoints").parent / "metrics.csv") if checkpoint else []
    result = {"seed": seed, "seconds": seconds, "metrics": metrics, "curves": curves}
    partial = folder / f"partial-{RESULT}"
    partial.write_text(json.dumps(result), encoding="utf-8")
    partial.replace(folder / RESULT)
    return None


def run_logged(args: list[str], log: Path) -> bool:
    """Run `lit-rlhf` in a process of its own, its output at the end of a file; return whether it went well."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"lit-rlhf {' '.join(args)}\n")
        file.flush()
        command = [sys.executable, "-m", "lit_rlhf", *args]
        return subprocess.run(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL).returncode == 0


def last_lines(log: Path) -> str:
    """The end of a log."""
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:])


def newest(folder: Path, name: str) -> Path:
    """The file of this name in the newest run below a folder."""
    found = sorted(folder.glob(f"version_*/{name}"), key=lambda path: path.stat().st_mtime)
    return found[-1]


def read_csv(path: Path) -> list[dict[str, float]]:
    """The rows of a `metrics.csv`, without the empty fields."""
    with path.open(encoding="utf-8") as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def read_results(out: Path, name: str, seeds: Sequence[int]) -> list[dict[str, Any]]:
    """The results of a method that are there."""
    paths = [cell_folder(out, name, seed) / RESULT for seed in seeds]
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.is_file()]
