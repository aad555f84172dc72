"""Callbacks of Lightning that would silently spoil a run are refused."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder, ModelPruning, WeightAveraging

from lit_rlhf.errors import InputError

REFUSED = {
    WeightAveraging: "validates other weights than policy/best would hold, and a resume would not continue its average",
    ModelPruning: "replaces the weights by others, which neither exports nor checkpoints would hold",
}


def check_callbacks(trainer: Trainer) -> None:
    """Check the callbacks before anything is written.

    Raises:
        ValueError: If one of them can't work with checkpoints and exports.
    """
    for callback in getattr(trainer, "callbacks", ()):
        for kind, reason in REFUSED.items():
            if isinstance(callback, kind):
                raise InputError(f"{type(callback).__name__} {reason}: train without it")


def check_resumed_callbacks(trainer: Trainer) -> None:
    """Check that no callback loses the progress of the checkpoint that is resumed.

    Raises:
        ValueError: If one tries batch sizes or learning rates first: Lightning drops the checkpoint after that.
    """
    if Path(trainer.ckpt_path or "").name.startswith((".scale_batch_size_", ".lr_find_")):
        return  # the search itself returns to its start
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, BatchSizeFinder | LearningRateFinder):
            raise InputError(
                f"{type(callback).__name__} would lose the progress of the checkpoint: resume without it, with the "
                "data.batch_size or the learning rate that it has found"
            )
