"""Progress bar with RLHF metrics; plain text lines if stdout is not a terminal."""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import RichProgressBar

from lit_rlhf.callbacks.growing_batch import GrowingBatch
from lit_rlhf.callbacks.utils import format_number, scalar_metrics, validated_in_fit

RATES = {
    "throughput/completion_tokens": "tokens/s",
    "time/sample": "sample s",
    "time/score": "score s",
    "time/train": "train s",
}
VALIDATION = ("reward", "win_rate", "kl", "loss", "accuracy", "length")


class RLHFProgressBar(RichProgressBar):
    """Show reward and KL next to the progress bar; print plain lines instead into a file or a notebook.

    Args:
        refresh_rate: Maximum number of redraws per second; 0 disables the display.
        leave: Whether to leave the bar of each epoch on the screen.
        seconds: Minimum time between two plain lines.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False, seconds: float = 5.0) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.seconds = seconds
        self._plain = False
        self._started = self._printed = -math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between the bar and plain lines."""
        super().setup(trainer, pl_module, stage)
        self._plain = trainer.is_global_zero and self.refresh_rate > 0 and not sys.stdout.isatty()
        if self._plain:
            self.disable()
        self._started = time.monotonic()

    @property
    def total_train_batches(self) -> int | float:
        """Number of batches of this epoch, limited by `max_steps`; growing batches change it during the epoch."""
        trainer = self.trainer
        if trainer.max_steps == -1:
            return trainer.num_training_batches
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = int(progress.processed)
        accumulate = trainer.accumulate_grad_batches
        remaining = (trainer.max_steps - trainer.global_step) * accumulate - done % accumulate
        return min(trainer.num_training_batches, done + max(0, remaining))

    def _get_train_description(self, current_epoch: int) -> str:
        endless = self.trainer.max_epochs in (None, -1)  # max_steps limits the run instead
        return f"Epoch {current_epoch}" if endless else super()._get_train_description(current_epoch)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return the metrics to show: reward, KL, tokens per second and the time of each phase of a rollout."""
        metrics = super().get_metrics(trainer, pl_module)
        if "train/reward" not in metrics and "train/loss" in trainer.callback_metrics:
            metrics["train/loss"] = float(trainer.callback_metrics["train/loss"])
        shown = {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}
        logged = trainer.callback_metrics
        return shown | {label: float(logged[name]) for name, label in RATES.items() if name in logged}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the bar or print a line."""
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, total=self.total_train_batches)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due():
            self._line(f"step {trainer.global_step}{self._of_total(trainer)}", self.get_metrics(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the metrics of a validation."""
        super().on_validation_end(trainer, pl_module)
        if validated_in_fit(trainer) and self._due():
            values = scalar_metrics(trainer, "val/")
            shown = {name: values[f"val/{name}"] for name in VALIDATION if f"val/{name}" in values}
            self._line(f"validation at step {trainer.global_step}", shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the bar, so that later output is printed below it."""
        self._stop_progress()

    def _of_total(self, trainer: Trainer) -> str:
        """Return `/N` for the number of updates of the run if known; growing batches shorten a run set in epochs."""
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        grows = any(isinstance(callback, GrowingBatch) for callback in callbacks)
        total = trainer.max_steps if grows else trainer.estimated_stepping_batches
        return f"/{int(total)}" if 0 < total < math.inf else ""

    def _due(self) -> bool:
        return self._plain and time.monotonic() - self._printed >= self.seconds

    def _line(self, head: str, metrics: dict[str, Any]) -> None:
        self._printed = time.monotonic()
        values = [f"{name} {format_number(value)}" for name, value in metrics.items() if isinstance(value, int | float)]
        print(*[head, *values, f"({self._printed - self._started:.0f} s)"], flush=True)
