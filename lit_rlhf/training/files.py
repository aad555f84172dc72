"""Folders of a run."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger


def run_folder(trainer: Trainer) -> Path:
    """Return the folder of this run: the first logger's folder, else `default_root_dir`. Call it on all ranks.

    Only local loggers have a folder per run; the folder of a web service's logger may be the working directory.
    """
    local = bool(trainer.loggers) and isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger)
    return Path((trainer.log_dir if local else None) or trainer.default_root_dir)
