"""Save so that a run survives a full or missing disk, and never over something it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins import CheckpointIO, TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError
from torch import nn

from lit_rlhf.training.checkpoint_files import CheckpointFiles
from lit_rlhf.training.distributed import without_others
from lit_rlhf.training.processes import ProcessLost


class SavingFailed(Exception):
    """What should be saved could not be; raised on all ranks."""


def use_checkpoint_files(trainer: Trainer) -> None:
    """Let the Trainer write and read its checkpoints by `CheckpointFiles`, unless it was given a plugin."""
    if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
        trainer.strategy.checkpoint_io = CheckpointFiles()


def write_checkpoint(trainer: Trainer, path: Path) -> Path:
    """Write a training checkpoint and move it to `path` once it is complete. Call it on all ranks.

    Raises:
        SavingFailed: If it can't be written, or a trained weight is not finite; the previous checkpoint is kept.
    """
    check_finite(trainer.lightning_module.named_parameters())
    inner = trainer.strategy.checkpoint_io
    trainer.strategy.checkpoint_io = holder = _ErrorHolder(inner)
    try:  # an error on the first rank must not leave the others waiting
        trainer.save_checkpoint(path, weights_only=False)
    except OSError as failed:
        if not getattr(failed, "on_all_ranks", False):
            raise
        raise SavingFailed(describe(failed)) from failed
    finally:
        trainer.strategy.checkpoint_io = inner
    if error := trainer.strategy.broadcast(holder.error):
        raise SavingFailed(error)
    return path


def is_last_with_all_weights(trainer: Trainer, error: BaseException) -> bool:
    """Return whether another rank was lost, and this one is the first and has a whole model."""
    whole = getattr(trainer.strategy, "sharding", None) is None
    return isinstance(error, ProcessLost) and trainer.is_global_zero and whole


def write_checkpoint_alone(trainer: Trainer, path: Path) -> Path:
    """Write a training checkpoint on this rank, which has all weights, after another one was lost.

    Raises:
        ProcessLost: If the lost rank had a part of the state.
    """
    check_finite(trainer.lightning_module.named_parameters())
    with without_others(trainer):
        checkpoint = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
    trainer.strategy.checkpoint_io.save_checkpoint(checkpoint, path)
    return path


def export_policy(trainer: Trainer, export: Callable[[Path], None], path: Path) -> None:
    """Export the policy to a folder. Call it on all ranks.

    Raises:
        SavingFailed: If it can't be written, or a trained weight is not finite; the previous folder is kept.
    """
    check_finite(trainer.lightning_module.named_parameters())
    try:
        export(path)
    except Exception as error:
        if trainer.world_size > 1 and not getattr(error, "on_all_ranks", False):
            raise
        reason = trainer.strategy.broadcast(describe(error) if is_disk_error(error) else None)
        if reason is None:
            raise
        raise SavingFailed(reason) from error


def check_finite(parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
    """Check that no trained weight is NaN or infinite.

    Each update is checked, too, which ends a run at once; this is for what changes weights outside of updates, such as
    a callback that averages them.

    Raises:
        SavingFailed: If one is.
    """
    trained = [(name, p.detach().isfinite().all()) for name, p in parameters if p.requires_grad]
    if trained and not bool(torch.stack([finite.cpu() for _, finite in trained]).all()):
        name = next(name for name, finite in trained if not finite)
        raise SavingFailed(f"the weight {name!r} is not finite any more")


def describe(error: BaseException) -> str:
    """Return the reason of a failed write, without the file's name."""
    return (error.strerror if isinstance(error, OSError) else None) or str(error)


def is_disk_error(error: Exception) -> bool:
    """Return whether an error is of a full, read-only or missing disk; tokenizers raise a plain Exception then."""
    return isinstance(error, OSError | SafetensorError) or "(os error" in str(error)


class Unwritten:
    """What a run could not write, by name: one warning during the run, and the list at its end."""

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}
        self._warned = False

    def clear(self) -> None:
        """Forget the failures of an earlier run."""
        self.reasons, self._warned = {}, False

    def add(self, name: str, error: BaseException, kept: str) -> None:
        """Record a failure, and warn of the first one."""
        self.reasons[name] = str(error)
        if not self._warned:
            rank_zero_warn(f"{name} could not be written: {error}; {kept}, and training continues")
        self._warned = True

    def remove(self, name: str) -> None:
        """Record that a later attempt succeeded."""
        self.reasons.pop(name, None)

    def __str__(self) -> str:
        return "; ".join(f"{name}: {reason}" for name, reason in self.reasons.items())


class _ErrorHolder(CheckpointIO):
    """Keeps the error of a failed write instead of raising it on one rank alone."""

    def __init__(self, inner: CheckpointIO) -> None:
        self.inner = inner
        self.error: str | None = None

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        try:
            self.inner.save_checkpoint(checkpoint, path, storage_options)
        except OSError as error:
            self.error = describe(error)

    def load_checkpoint(self, *args: Any, **options: Any) -> dict[str, Any]:
        return self.inner.load_checkpoint(*args, **options)

    def remove_checkpoint(self, path: Any) -> None:
        self.inner.remove_checkpoint(path)
