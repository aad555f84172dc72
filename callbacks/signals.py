"""A run that is told to end saves first."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console

from lit_rlhf.callbacks.checkpoint import PolicyCheckpoint, write_checkpoint
from lit_rlhf.callbacks.utils import run_folder, validated_in_fit

SIGNALS = [signal.SIGTERM, signal.SIGINT, *([signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else [])]


class SaveOnSignal(Callback):
    """Answers SIGTERM, SIGUSR1 and the first Ctrl-C by a checkpoint at the end of the running batch, and stops there.

    Any rank may be signalled: all save together. `min_epochs`, `min_steps` and a validation that is due don't delay it,
    and neither an accumulation window nor a rollout has to be complete. The checkpoint is `PolicyCheckpoint`'s
    `last.ckpt`. `fit` then returns as ever, and `stopped` tells that it was not done: the command line ends with the
    exit code of that signal. A second Ctrl-C interrupts at once. A handler that Slurm's automatic requeueing set on
    SIGUSR1 stays. List this callback after those that keep state.

    Attributes:
        stopped: The signal that ended the run before its end, SIGTERM where another rank got it; None where it went on.
    """

    def __init__(self) -> None:
        self.stopped: int | None = None
        self._received: int | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._limits: tuple[Any, Any, Any] | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where to save."""
        self._folder = run_folder(trainer) / "checkpoints"
        self.stopped = self._received = self._limits = None
        self._put_back()  # after a run that failed, which is not torn down

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the handlers."""
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the handlers, and stop where a signal has come already."""
        self._install()
        self._check(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any rank was signalled."""
        self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop if any rank was signalled."""
        if validated_in_fit(trainer):
            self._check(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Put back handlers and limits as they were."""
        self._put_back()
        if self._limits is not None:
            loop = trainer.fit_loop
            trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = self._limits
            self._limits = None

    def _put_back(self) -> None:
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._previous = {}

    def _install(self) -> None:
        # Lightning sets its own handlers right before, and takes all of them back when the run ends.
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            if number == signal.SIGTERM or signal.getsignal(number) in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = number
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])
            os.write(2, b"\nstopping after this batch; press Ctrl-C again to stop at once\n")

    def _check(self, trainer: Trainer) -> None:
        received = self._received is not None
        if self._limits is None and trainer.strategy.reduce_boolean_decision(received, all=False):
            self.stopped = self._received or signal.SIGTERM
            path = self._save(trainer)
            self._stop(trainer)
            text = (
                f"saved {path}; go on with: lit-rlhf fit ... --ckpt_path {path}"
                if path
                else "stopped before any update"
            )
            if trainer.is_global_zero:
                get_console().print(text, soft_wrap=True, markup=False, highlight=False)

    def _save(self, trainer: Trainer) -> Any:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, PolicyCheckpoint):
                return callback.save(trainer)
        return write_checkpoint(trainer, self._folder / "last.ckpt") if trainer.global_step else None

    def _stop(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop
        self._limits = (trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps)
        trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = 0, 0, None
        trainer.should_stop = True
