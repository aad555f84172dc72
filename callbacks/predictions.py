"""Output of `predict`: completions and their scores as JSON lines."""

from __future__ import annotations

import glob
import json
import os
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from lit_rlhf.callbacks.samples import jsonable
from lit_rlhf.callbacks.utils import is_fast_dev_run
from lit_rlhf.errors import InputError

DAY = 86400.0
"""Seconds after which a part that no run has written to is a leftover of one that was killed."""


class PredictionWriter(Callback):
    """Write one JSON object per completion, batch by batch, sorted in the order of the data at the end.

    Args:
        path: Output file; `predictions.jsonl` in `default_root_dir` by default. An existing file is replaced once
            the new one is complete; of runs that end at the same time, the last one's remains.

    Raises:
        ValueError: While predicting, if the file can't be written.
    """

    def __init__(self, path: str | None = None) -> None:
        self.path = path
        self._run = ""

    def _target(self, trainer: Trainer) -> Path:
        return Path(self.path or Path(trainer.default_root_dir) / "predictions.jsonl")

    def _part(self, trainer: Trainer, rank: int | str) -> Path:
        target = self._target(trainer)
        return target.with_name(f".{target.name}.{self._run}.{rank}")

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Create the partial file of this rank; its name is of this run alone."""
        if is_fast_dev_run(trainer):
            return
        self._run = trainer.strategy.broadcast(uuid.uuid4().hex)
        target = self._target(trainer)
        if trainer.is_global_zero:
            for part in target.parent.glob(f".{glob.escape(target.name)}.*"):
                if part.stat().st_mtime < time.time() - DAY:
                    part.unlink(missing_ok=True)
        self._append(trainer, self._part(trainer, trainer.global_rank), [])

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int, *_: Any
    ) -> None:
        """Append the predictions of a batch."""
        if is_fast_dev_run(trainer):
            return
        lines = [json.dumps(jsonable(row), ensure_ascii=False) + "\n" for row in outputs or ()]
        self._append(trainer, self._part(trainer, trainer.global_rank), lines)

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
        lines = [f"{line}\n" for text in texts for line in text.split("\n") if line]
        lines.sort(key=lambda line: json.loads(line).get("index", 0))
        merged = self._part(trainer, "merged")
        self._append(trainer, merged, lines)
        merged.replace(self._target(trainer))
        for part in parts:
            part.unlink()
        rank_zero_info(f"wrote {len(lines)} completions to {self._target(trainer)}")

    def _append(self, trainer: Trainer, part: Path, lines: Iterable[str]) -> None:
        try:
            part.parent.mkdir(parents=True, exist_ok=True)
            with part.open("a", encoding="utf-8") as file:
                file.writelines(lines)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(
                f"{str(self._target(trainer))!r} can't be written ({error.strerror}): make room, or give another "
                f"--predictions.path; the completions until then are in {str(self._part(trainer, '*'))!r}"
            ) from error
