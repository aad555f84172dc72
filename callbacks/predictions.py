"""Output of `predict`: completions and their scores as JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.callbacks.samples import jsonable
from lit_rlhf.callbacks.utils import is_fast_dev_run


class PredictionWriter(Callback):
    """Write one JSON object per completion, batch by batch, sorted in the order of the data at the end.

    Args:
        path: Output file; `predictions.jsonl` in `default_root_dir` by default. An existing file is replaced once
            the new one is complete.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")

    def _part(self, trainer: Trainer, rank: int) -> Path:
        target = self._target(trainer)
        return target.with_name(f".{target.name}.{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the partial file of this rank."""
        if is_fast_dev_run(trainer):
            return
        part = self._part(trainer, trainer.global_rank)
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text("")

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Append the predictions of a batch."""
        if is_fast_dev_run(trainer):
            return
        with self._part(trainer, trainer.global_rank).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in outputs or ())

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Merge the partial files of all ranks."""
        if is_fast_dev_run(trainer):
            return
        trainer.strategy.barrier("predictions")
        if not trainer.is_global_zero:
            return
        parts = [self._part(trainer, rank) for rank in range(trainer.world_size)]
        texts = [part.read_text(encoding="utf-8") for part in parts]
        # not splitlines: strings may contain other line separators
        lines = [line for text in texts for line in text.split("\n") if line]
        lines.sort(key=lambda line: json.loads(line).get("index", 0))
        parts[0].write_text("".join(line + "\n" for line in lines), encoding="utf-8")
        parts[0].replace(self._target(trainer))
        for part in parts[1:]:
            part.unlink()
        rank_zero_info(f"wrote {len(lines)} completions to {self._target(trainer)}")
