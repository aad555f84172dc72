"""Metrics of held-out rows: means over all rows of all ranks, however the rows are split into batches and ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor

from lit_rlhf.training.distributed import sum_over_ranks
from lit_rlhf.training.logging import add_loss_metrics, mean_metrics
from lit_rlhf.types import Metrics


class HeldOutMetrics(LightningModule, ABC):
    """Mixin that logs the means of what `held_out_metrics` returns, in validation and test."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._held_out_sums: dict[str, Tensor] = {}

    @abstractmethod
    def held_out_metrics(self, batch: Any) -> Metrics:
        """Return the metrics of a batch, as values and mask."""

    def on_validation_epoch_start(self) -> None:
        """Start the sums."""
        self._held_out_sums = {}

    def on_test_epoch_start(self) -> None:
        """Start the sums."""
        self.on_validation_epoch_start()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Add a batch to the metrics, which are defined in `callbacks/README.md`."""
        self._held_out_sums = add_loss_metrics(self._held_out_sums, self.held_out_metrics(batch))

    test_step = validation_step

    def on_validation_epoch_end(self) -> None:
        """Log the metrics under `val/`."""
        self._log_held_out("val")

    def on_test_epoch_end(self) -> None:
        """Log the same metrics under `test/`."""
        self._log_held_out("test")

    def _log_held_out(self, prefix: str) -> None:
        means = mean_metrics(prefix, self._held_out_sums, lambda sums: sum_over_ranks(self.trainer, sums))
        self.log_dict(means, prog_bar=True, batch_size=1)
