"""Graceful stop: save a checkpoint on Ctrl-C, and on the signals of batch systems and of a terminal that closes."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from rich import get_console

from lit_rlhf.callbacks.checkpoint import PolicyCheckpoint
from lit_rlhf.callbacks.saving import SavingFailed, use_checkpoint_files, write_checkpoint
from lit_rlhf.callbacks.utils import run_folder, validated_in_fit
from lit_rlhf.errors import InputError
from lit_rlhf.rewards.calls import interrupt_rewards
from lit_rlhf.training.files import is_removed, release_if_empty
from lit_rlhf.training.processes import peers, send_signal

REWARD_SECONDS = 5.0
"""Seconds that rewards may take after a signal, before they are interrupted."""
NAMES = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP", "SIGXCPU")
SIGNALS = [signal.Signals[name] for name in NAMES if name in signal.Signals.__members__]  # not all are on Windows


class SaveOnSignal(Callback):
    """Save a checkpoint at the end of the current batch and stop, on the first Ctrl-C or a signal that ends a job.

    These are SIGTERM, SIGUSR1, SIGUSR2, SIGXCPU, and SIGHUP of a terminal or connection that closes (not under nohup).

    A signal to any rank makes all ranks save together. `min_epochs`, `min_steps` and a pending validation don't delay
    it, and the accumulation window and the rollout need not be complete. The checkpoint is `PolicyCheckpoint`'s
    `last.ckpt`. `fit` then returns normally, and `stopped` shows that the run is not complete: the command line exits
    with the exit code of the signal. Rewards that have not returned 5 to 6 s after the signal are interrupted: the
    batch in progress is dropped, `PolicyCheckpoint` saves the state before it, and `fit` raises `RewardInterrupted`.
    Other ranks of the machine, which may hang in a reward, then get a SIGTERM.

    A second Ctrl-C interrupts immediately. Lightning's automatic requeueing under Slurm is replaced: its handler saves
    at once, wherever the run is, inside an update too. Requeue in the batch script, on the exit code of SIGUSR1. List
    this callback after the callbacks that keep state.

    Attributes:
        stopped: The signal that stopped the run (SIGTERM if another rank received it); None if the run was not stopped.
    """

    def __init__(self) -> None:
        self.stopped: int | None = None
        self._received: int | None = None
        self._peers: tuple[int, ...] = ()  # process ids of the other ranks on this machine
        self._previous: dict[signal.Signals, Any] = {}
        self._limits: tuple[Any, Any, Any] | None = None
        self._alarm: tuple[Any, tuple[float, float]] | None = None  # handler and timer that were there before

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder and restore the handlers of an earlier run."""
        use_checkpoint_files(trainer)
        self._folder = run_folder(trainer)
        self.stopped = self._received = self._limits = None
        self._restore_handlers()  # a run that failed skips teardown

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers."""
        self._meet(trainer)
        self._install()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Install the signal handlers, and stop if a signal was already received."""
        self._meet(trainer)
        self._install()
        self._check(trainer)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save and stop if any rank received a signal."""
        self._check(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save and stop if any rank received a signal."""
        if validated_in_fit(trainer):
            self._check(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Restore the previous handlers and the Trainer's limits."""
        self._restore_handlers()
        release_if_empty(self._folder)
        if self._limits is not None:
            loop = trainer.fit_loop
            trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = self._limits
            self._limits = None

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop interrupting rewards."""
        self._restore_alarm()

    def _restore_handlers(self) -> None:
        self._restore_alarm()
        for number, handler in self._previous.items():
            if signal.getsignal(number) == self._receive:
                signal.signal(number, handler)
        self._previous = {}

    def _install(self) -> None:
        # Lightning installs its own handlers just before, and restores all handlers at the end of the run.
        if self._previous or threading.current_thread() is not threading.main_thread():
            return
        for number in SIGNALS:
            handler = signal.getsignal(number)
            replaced = number == signal.SIGTERM or type(handler).__module__.startswith("lightning.")
            if replaced or handler in (signal.SIG_DFL, signal.default_int_handler):
                self._previous[number] = signal.signal(number, self._receive)

    def _restore_alarm(self) -> None:
        if self._alarm is not None:
            signal.signal(signal.SIGALRM, self._alarm[0])
            signal.setitimer(signal.ITIMER_REAL, *self._alarm[1])
            self._alarm = None

    def _meet(self, trainer: Trainer) -> None:
        if trainer.world_size > 1:
            self._peers = peers(trainer).pids

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self._received = self._received or number
        if hasattr(signal, "setitimer") and self._alarm is None:
            handler = signal.signal(signal.SIGALRM, lambda *_: self._interrupt(number))
            self._alarm = handler, signal.setitimer(signal.ITIMER_REAL, REWARD_SECONDS, 1.0)
        if number == signal.SIGINT:
            signal.signal(number, self._previous[signal.SIGINT])
            os.write(2, b"\nstopping after this batch; press Ctrl-C again to stop immediately\n")

    def _interrupt(self, number: int) -> None:
        others, self._peers = self._peers, ()  # which may not know of the signal
        send_signal(others, signal.SIGTERM)
        interrupt_rewards(number, REWARD_SECONDS)

    def _check(self, trainer: Trainer) -> None:
        removed = trainer.is_global_zero and is_removed(self._folder)
        received = self._received is not None or removed
        if self._limits is None and trainer.strategy.reduce_boolean_decision(received, all=False):
            self._restore_alarm()
            removed = trainer.strategy.broadcast(removed)
            self.stopped = self._received or signal.SIGTERM
            text = self._save(trainer)
            if removed:
                raise InputError(f"the folder of this run, {str(self._folder)!r}, was removed or moved: {text}")
            self._stop(trainer)
            if trainer.is_global_zero:
                get_console().print(text, soft_wrap=True, markup=False, highlight=False)

    def _save(self, trainer: Trainer) -> str:
        """Save, and return the line that says how to resume."""
        path, failed = None, ""
        keeper = next((c for c in trainer.callbacks if isinstance(c, PolicyCheckpoint)), None)  # type: ignore[attr-defined]
        if keeper is not None:
            path = keeper.save(trainer)
            failed = keeper.unwritten.reasons.get("last.ckpt", "")
        elif trainer.global_step:
            try:
                path = write_checkpoint(trainer, self._folder / "checkpoints" / "last.ckpt")
            except SavingFailed as error:
                failed = str(error)
        if failed:
            return f"stopped; the state could not be saved ({failed}), the last checkpoint is {path}"
        if path is None:
            return "stopped before the first update; there is nothing to save"
        return f"saved {path}; resume with: lit-rlhf fit ... --ckpt_path {path}"

    def _stop(self, trainer: Trainer) -> None:
        loop = trainer.fit_loop
        self._limits = (trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps)
        trainer.limit_val_batches, loop.min_epochs, loop.epoch_loop.min_steps = 0, 0, None
        trainer.should_stop = True
