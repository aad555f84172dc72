"""Show that memory, seconds an update and the size of a checkpoint don't grow with the length of a run.

    python tests/benchmarks/long_run.py --trainer.max_steps 2000

A small quickstart of `lit-rlhf fit`, with its callbacks and loggers; further arguments are added to it. The updates are
divided into ten parts of equal length, and one line is printed for each.
"""

from __future__ import annotations

import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf.cli import main as lit_rlhf

SMALL = {
    "config": "quickstart",
    "data.train_size": 64,
    "data.val_size": 8,
    "data.batch_size": 8,
    "model.sampling.max_new_tokens": 8,
    "trainer.val_check_interval": 8,
    "trainer.default_root_dir": "runs/benchmarks/long_run",
    "trainer.callbacks+": "long_run.Measure",
}
PARTS = 10


def resident_mib() -> float:
    """Return the memory of this process that is in RAM."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096 / 2**20


class Measure(Callback):
    """Measure each update, and a checkpoint at the end of each part."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the head of the table."""
        print("| updates | seconds an update, median | memory, MiB | checkpoint, KiB |\n|---|---|---|---|", flush=True)

    def on_train_batch_start(self, *args: Any) -> None:
        """Start the clock."""
        self.started = time.perf_counter()

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        """Stop the clock, and print a line at the end of a part."""
        self.seconds.append(time.perf_counter() - self.started)
        if trainer.global_step % max(1, trainer.max_steps // PARTS):
            return
        path = Path(trainer.default_root_dir) / "measured.ckpt"
        trainer.save_checkpoint(path)
        size = path.stat().st_size / 1024
        numbers = f"{statistics.median(self.seconds):.4f} | {resident_mib():.0f} | {size:.0f}"
        print(f"| {trainer.global_step - len(self.seconds)} - {trainer.global_step} | {numbers} |", flush=True)
        self.seconds = []


def main() -> None:
    """Run it."""
    given = {match[1] for arg in sys.argv[1:] if (match := re.match(r"--([\w.+]+)", arg))}
    sys.path.insert(0, str(Path(__file__).parent))  # for `long_run.Measure`
    lit_rlhf(["fit", *(f"--{name}={value}" for name, value in SMALL.items() if name not in given), *sys.argv[1:]])


if __name__ == "__main__":
    main()
