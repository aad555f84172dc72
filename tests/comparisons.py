"""Helpers for tests of comparisons: configurations, tables, and fake child processes that write result files."""

import csv
from itertools import accumulate
from pathlib import Path

import yaml

TINY = ["--config", "quickstart", "--data.train_size", "16", "--data.val_size", "4", "--data.batch_size", "4"]
SHORT = ["--model.sampling.max_new_tokens", "4", "--trainer.max_steps", "1"]

SECONDS = [9.0, 9.0, 1.0, 3.0, 2.0]
"""Duration of each update of a fake run."""


def write_config(folder: Path, arms: dict, **options) -> None:
    config = {"out": "here", "seeds": [1], "fit_args": [*TINY, *SHORT], "test_args": [*TINY, *SHORT[:2]], "arms": arms}
    (folder / "mine.yaml").write_text(yaml.safe_dump({**config, **options}, sort_keys=False))


def read_table(folder: Path) -> dict[str, dict[str, str]]:
    with (folder / "here" / "table.csv").open() as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def write_csv(path: Path, rows: list[dict]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row)) or ["step"]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=names)
        writer.writeheader()
        writer.writerows(rows)


def make_result(seed: int, **metrics: float) -> dict:
    return {"seed": seed, "metrics": metrics, "curves": []}


class FakeRuns:
    """Replaces child processes: `fit` logs `updates`, `test` logs one row; `--broken` fails, `--silent` logs nothing.

    Attributes:
        commands: Arguments and environments of all processes.
        updates: Rows of the `metrics.csv` that `fit` writes.
    """

    def __init__(self) -> None:
        self.commands: list[tuple[list[str], dict[str, str]]] = []
        self.updates = [{"step": i, "time/total": total} for i, total in enumerate(accumulate(SECONDS))]

    def run_logged(self, args: list[str], log: Path, environment: dict[str, str]) -> float | None:
        self.commands.append((args, environment))
        with log.open("a") as file:
            file.write(f"{args[0]}: what went wrong\n")
        if "--broken" in args:
            return None
        root = Path(args[args.index("--trainer.default_root_dir") + 1])
        kind = "version" if args[0] == "fit" else args[0]
        folder = root / f"{kind}_{len(list(root.glob(f'{kind}_*')))}"
        folder.mkdir(parents=True)
        if args[0] == "fit":
            (folder / "checkpoints").mkdir()
            (folder / "checkpoints" / "last.ckpt").touch()
        (root / "policy" / "last").mkdir(parents=True, exist_ok=True)
        seed = float(args[args.index("--seed_everything") + 1])
        rows = [{"test/win_rate": seed / 10, "test/return": seed}] if args[0] == "test" else self.updates
        write_csv(folder / "metrics.csv", [] if "--silent" in args else rows)
        return 321.0

    def names(self) -> list[str]:
        """Return the commands that ran: `fit` or `test`."""
        return [args[0] for args, _ in self.commands]
