"""A progress bar that shows what matters here, and plain lines where there is no terminal."""

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
    """Shows reward and KL beside the bar; into a file or a notebook it writes a plain line now and then instead.

    Args:
        refresh_rate: Redraws per second at most; 0 shows nothing.
        leave: Whether to leave each epoch's bar on the screen.
        seconds: Time between two plain lines, at least.
    """

    def __init__(self, refresh_rate: int = 10, leave: bool = False, seconds: float = 5.0) -> None:
        super().__init__(refresh_rate=refresh_rate, leave=leave)
        self.seconds = seconds
        self._plain = False
        self._started = self._printed = -math.inf

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Choose between a bar and plain lines."""
        super().setup(trainer, pl_module, stage)
        self._plain = trainer.is_global_zero and self.refresh_rate > 0 and not sys.stdout.isatty()
        if self._plain:
            self.disable()
        self._started = time.monotonic()

    @property
    def total_train_batches(self) -> int | float:
        """Batches of this epoch, as many of them as `max_steps` allows; a growing batch changes how many there are."""
        trainer = self.trainer
        if trainer.max_steps == -1:
            return trainer.num_training_batches
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        done = int(progress.processed)
        accumulate = trainer.accumulate_grad_batches
        left = (trainer.max_steps - trainer.global_step) * accumulate - done % accumulate
        return min(trainer.num_training_batches, done + max(0, left))

    def _get_train_description(self, current_epoch: int) -> str:
        endless = self.trainer.max_epochs in (None, -1)  # a number of steps was given instead
        return f"Epoch {current_epoch}" if endless else super()._get_train_description(current_epoch)

    def get_metrics(
        self, trainer: Trainer, pl_module: LightningModule
    ) -> dict[str, int | str | float | dict[str, float]]:
        """Return what to show: reward and KL, tokens a second and the seconds of a rollout by phase."""
        metrics = super().get_metrics(trainer, pl_module)
        if "train/reward" not in metrics and "train/loss" in trainer.callback_metrics:
            metrics["train/loss"] = float(trainer.callback_metrics["train/loss"])
        shown = {name.removeprefix("train/"): value for name, value in metrics.items() if name != "v_num"}
        logged = trainer.callback_metrics
        return shown | {label: float(logged[name]) for name, label in RATES.items() if name in logged}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Move the bar, or write a line."""
        if self.progress is not None and self.train_progress_bar_id is not None:
            self.progress.update(self.train_progress_bar_id, total=self.total_train_batches)
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        if self._due():
            self._line(f"step {trainer.global_step}{self._of(trainer)}", self.get_metrics(trainer, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the result of a validation."""
        super().on_validation_end(trainer, pl_module)
        if validated_in_fit(trainer) and self._due():
            values = scalar_metrics(trainer, "val/")
            shown = {name: values[f"val/{name}"] for name in VALIDATION if f"val/{name}" in values}
            self._line(f"validation at step {trainer.global_step}", shown)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """End the bar: what follows is printed, and should not stand above it."""
        self._stop_progress()

    def _of(self, trainer: Trainer) -> str:
        """How many updates the run has, where that is known: growth shortens one that is given in epochs."""
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
