"""Where a run of the command line writes: all below `trainer.default_root_dir`, by run, whatever the loggers."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.utils import is_fast_dev_run
from lit_rlhf.cli.errors import import_object
from lit_rlhf.training.files import claim_run_folder

FOLDER_OPTIONS = ("save_dir", "offline_directory")
"""Options of Lightning's loggers that say where they write."""


class MetricsLogger(CSVLogger):
    """Lightning's CSV logger, for a disk that may be full for a while: it warns and keeps the rows for later."""

    _warned = False

    def save(self) -> None:
        """Write the rows since the last time."""
        try:
            super().save()
        except OSError as error:
            if not self._warned:
                rank_zero_warn(f"metrics.csv can't be written ({error.strerror}); training continues")
            self._warned = True


class EventsLogger(TensorBoardLogger):
    """Lightning's TensorBoard logger, which stops with a warning where its file can't be written."""

    @property
    def experiment(self) -> Any:
        """TensorBoard's writer; whoever writes through it, a full disk ends the events and not the run."""
        writer = super().experiment
        file: Any = self._experiment and self._experiment.file_writer  # None on other ranks, and after the end of a run
        if file is not None and not isinstance(file.event_writer, _SurvivingWriter):
            file.event_writer = _SurvivingWriter(file.event_writer)
        return writer

    def save(self) -> None:
        """Flush to the disk and write `hparams.yaml`."""
        with contextlib.suppress(OSError):  # the writer has warned
            super().save()


class _SurvivingWriter:
    """An `EventFileWriter` that warns once of a disk that can't be written, and ignores all that follows."""

    def __init__(self, writer: Any) -> None:
        self._writer = writer
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._writer, name)
        return functools.partial(self._attempt, value) if callable(value) else value

    def _attempt(self, call: Any, *args: Any) -> Any:
        if self._failed:
            return None
        try:
            return call(*args)
        except OSError as error:
            self._failed = True
            rank_zero_warn(f"TensorBoard's events can't be written ({error.strerror}); training continues")


def place_loggers(config: Any, root: Path) -> None:
    """Let loggers that would write into the working directory by default write below `root`.

    Args:
        config: The parsed `trainer.logger`, changed in place.
        root: The run's `default_root_dir`.
    """
    for entry in config if isinstance(config, list) else [config]:
        options = getattr(entry, "init_args", None)
        if options is None:
            continue
        parameters = inspect.signature(import_object(entry.class_path)).parameters
        for name in FOLDER_OPTIONS:
            default = parameters[name].default if name in parameters else None
            if isinstance(default, str) and options.get(name, default) == default and not os.path.isabs(default):
                options[name] = os.path.normpath(root / default)


def give_folder(trainer: Trainer, kind: str, default_loggers: bool) -> Path | None:
    """Claim the run's folder and let its loggers write there.

    Args:
        trainer: The Trainer of the run.
        kind: The folder's name without its number.
        default_loggers: Whether the run logs to TensorBoard and `metrics.csv`.
    """
    if is_fast_dev_run(trainer):
        return None
    root = Path(trainer.default_root_dir)
    folder = claim_run_folder(trainer, kind) if trainer.is_global_zero else None
    version = folder.name if folder else None
    if default_loggers:
        trainer.loggers = [EventsLogger(root, name="", version=version), MetricsLogger(root, name="", version=version)]
    for logger in trainer.loggers:
        if folder and isinstance(logger, CSVLogger | TensorBoardLogger):
            _use_folder(logger, root, folder.name)
    return folder


def _use_folder(logger: CSVLogger | TensorBoardLogger, root: Path, version: str) -> None:
    """Let a logger of the user's that writes below `root` without a chosen version use the run's."""
    place = Path(logger.save_dir).expanduser().resolve()
    if logger._version is None and place.is_relative_to(root.resolve()):  # not yet chosen
        logger._version = version
        if place == root.resolve() and logger.name == "lightning_logs":
            logger._name = ""
