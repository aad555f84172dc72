"""Measure the overhead of an update outside the model: tokenization, text, logging and callbacks of `lit-rlhf fit`.

    python tests/benchmarks/overhead.py --config rloo --model.policy FOLDER --data.train prompts.jsonl ...

All arguments are those of `lit-rlhf fit`, with its callbacks and loggers but without validation. The first update is
left out. Tokenization happens once, before it, and is divided over the updates of an epoch.
"""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loops.fetchers import _PrefetchDataFetcher
from lightning.pytorch.trainer import call
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector

from lit_rlhf.algorithms import online
from lit_rlhf.cli import main as lit_rlhf
from lit_rlhf.data.encoding import Encoder

TIMED = {
    "batching": [(_PrefetchDataFetcher, "__next__")],
    "text of completions": [(online, "completion_texts")],
    "logging": [(LightningModule, "log"), (_LoggerConnector, "update_train_step_metrics")],
    "callbacks": [(call, "_call_callback_hooks")],
}
"""Timed functions with their owners, by kind."""


class Stopwatch:
    """Adds up seconds by kind; a timed call within another counts only there."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.inside = False

    def time_calls(self, kind: str, owner: Any, name: str) -> None:
        """Replace a function by one that is timed."""
        function: Callable[..., Any] = getattr(owner, name)

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            if self.inside:
                return function(*args, **kwargs)
            self.inside, started = True, time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.inside = False
                self.seconds[kind] = self.seconds.get(kind, 0.0) + time.perf_counter() - started

        setattr(owner, name, timed)


class Updates:
    """Counts the updates after the first, and their seconds."""

    def __init__(self, watch: Stopwatch) -> None:
        self.trainer, self.started, self.ended, self.first = None, 0.0, 0.0, 0
        self.seconds: dict[str, float] = {}
        end = _LoggerConnector.update_train_step_metrics  # called at the end of a training step

        @functools.wraps(end)
        def ending(connector: Any) -> None:
            end(connector)
            trainer: Trainer = connector.trainer
            self.trainer, self.ended = trainer, time.perf_counter()
            if self.started == 0 and trainer.global_step > 0:
                self.started, self.first = self.ended, trainer.global_step
                tokenising = watch.seconds.get("tokenising", 0.0)
                watch.seconds.clear()
                watch.seconds["tokenising"] = tokenising
            self.seconds = dict(watch.seconds)

        _LoggerConnector.update_train_step_metrics = ending


def main() -> None:
    """Run, and print a table."""
    watch = Stopwatch()
    for kind, places in TIMED.items():
        for owner, name in places:
            watch.time_calls(kind, owner, name)
    watch.time_calls("tokenising", Encoder, "__call__")
    updates = Updates(watch)
    lit_rlhf(["fit", *sys.argv[1:], "--trainer.limit_val_batches", "0"])
    trainer: Any = updates.trainer
    count = trainer.global_step - updates.first
    if count < 1:
        sys.exit("two updates are needed: the first is left out")
    whole = (updates.ended - updates.started) / count
    of_an_epoch = trainer.num_training_batches / trainer.accumulate_grad_batches
    seconds = {kind: total / count for kind, total in updates.seconds.items()}
    seconds["tokenising"] = updates.seconds["tokenising"] / of_an_epoch
    print(f"\n| of an update of {whole:.3f} s | s | share |\n|---|---|---|")
    for kind, spent in {**seconds, "total": sum(seconds.values())}.items():
        print(f"| {kind} | {spent:.4f} | {spent / whole:.2%} |")


if __name__ == "__main__":
    main()
