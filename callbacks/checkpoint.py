"""Policy export (a folder that other libraries load) and training checkpoints for an exact resume."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_rlhf.callbacks.saving import (
    SavingFailed,
    Unwritten,
    export_policy,
    is_last_with_all_weights,
    use_checkpoint_files,
    write_checkpoint,
    write_checkpoint_alone,
)
from lit_rlhf.callbacks.sources import is_source, model_folders
from lit_rlhf.callbacks.utils import is_fast_dev_run, run_folder, validated_in_fit
from lit_rlhf.errors import InputError, InputTypeError

STATE = ("best_score", "best_weights", "best_step", "best_path", "monitor", "mode")
"""What a checkpoint keeps of `PolicyCheckpoint`."""


class PolicyCheckpoint(Checkpoint):
    """Export the best and the last policy, and write a training checkpoint to resume from.

    Under `default_root_dir`: `policy/best` after each validation that is at least as good by `monitor` as all before,
    and `policy/last` at the end of every `fit`, written by the module's `export`; in the run's folder instead if one of
    the run's models was read from there. In the run's folder: `checkpoints/last.ckpt`, written every
    `every_n_updates`, at the end, and on an exception, as of the start of an update that fails. Each replaces the
    previous one only once it is complete and on the disk, and never with weights that are not finite. What can't be
    written gives a warning, and `unwritten` lists it at the end.

    Args:
        monitor: Validation metric that selects the best policy; the sanity check does not count. While a schedule
            changes the reward weights, `val/reward` and `val/return` are not comparable, and the latest policy is best.
        mode: Whether the highest ("max") or the lowest ("min") value is best.
        every_n_updates: Optimizer steps between two checkpoints; None writes only one at the end.
        save_best: Whether to write `policy/best`.
        save_last: Whether to write `policy/last`.

    Attributes:
        best_score: Best value of `monitor` so far; a resumed run with the same `monitor` and `mode` keeps it.
        best_step: Number of updates at which it was measured.
        last_path: Latest training checkpoint of this run; None until one is written.
        policies: Folders of the policies that this run exported, by name: `best` and `last`.
        unwritten: What could not be written, with the reasons.

    Raises:
        ValueError: If `mode` or `every_n_updates` is invalid.
        TypeError: At `fit` if the module has no `export`.
    """

    best_model_path = ""
    """Empty, so that the Trainer refuses `ckpt_path="best"`: only the best policy is kept, not its checkpoint."""

    def __init__(
        self,
        monitor: str = "val/reward",
        mode: Literal["max", "min"] = "max",
        every_n_updates: int | None = None,
        save_best: bool = True,
        save_last: bool = True,
    ) -> None:
        if mode not in ("max", "min"):
            raise InputError(f"mode={mode!r} must be 'max' or 'min'")
        if every_n_updates is not None and every_n_updates < 1:
            raise InputError(f"every_n_updates={every_n_updates} must be at least 1, or None to save only at the end")
        self.monitor = monitor
        self.mode = mode
        self.every_n_updates = every_n_updates
        self.save_best = save_best
        self.save_last = save_last
        self.best_score: float | None = None
        self.best_weights: dict[str, float] | None = None  # of the rewards, when best_score was measured
        self.best_step, self.best_path = 0, ""
        self.last_path: Path | None = None
        self.policies: dict[str, Path] = {}
        self.unwritten = Unwritten()
        self._warned = False
        self._step = 0
        # State of Lightning's loops at the end of the last batch. A checkpoint written later, after a validation or at
        # the end of fit, stores this state: by then, the loops' current state would resume in the next epoch.
        self._loops: dict[str, Any] | None = None
        self._validations = 0
        self._saved: tuple[int, int] | None = None  # (batches, validations) at the last save
        self._saving = self._updating = False
        self._resumed_at = 0.0
        self._before_update: tuple[Any, dict[str, Any]] | None = None  # loops and callbacks when an update began
        self._callback_states: dict[str, Any] | None = None  # to save in place of the current ones

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the output folder and check that the module can be exported."""
        use_checkpoint_files(trainer)
        self._folder = run_folder(trainer)
        self._policies = Path(trainer.default_root_dir) / "policy"
        self._enabled = stage == "fit" and not is_fast_dev_run(trainer)
        self.last_path, self.policies, self._loops, self._saved = None, {}, None, None
        self._before_update, self._callback_states, self._resumed_at = None, None, 0.0
        self.unwritten.clear()
        if stage == "fit":  # a resumed run loads its own
            self.best_score, self.best_weights, self.best_step, self.best_path = None, None, 0, ""
        if self._enabled and not callable(getattr(pl_module, "export", None)):
            name = type(pl_module).__name__
            raise InputTypeError(
                f"PolicyCheckpoint needs a module with export(folder), not {name}: use ModelCheckpoint"
            )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the folders that the run's models were read from: they are its reference, also after a resume."""
        names = ("pretrained", "critic_pretrained", "policy", "scorer", "judge")
        sources = model_folders([getattr(pl_module, name, None) for name in names])
        if any(is_source(self._policies / name, sources) for name in ("best", "last")):
            kept, self._policies = self._policies, self._folder / "policy"
            if self._enabled:
                rank_zero_info(f"this run started from a model in {kept}, which it keeps: it writes {self._policies}")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Record the number of updates at the start."""
        self._step = trainer.global_step

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Keep the state of loops and callbacks at the start of an update."""
        if batch_idx % trainer.accumulate_grad_batches == 0:
            callbacks: list[Any] = trainer.callbacks  # type: ignore[attr-defined]
            states = {callback.state_key: callback.state_dict() for callback in callbacks}
            self._before_update = self._loops, {key: state for key, state in states.items() if state}

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Mark that an update is in progress, so that nothing is saved until it is complete."""
        self._updating = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Record the loop state and save if a checkpoint is due."""
        self._updating = False
        self._loops = trainer.fit_loop.state_dict()
        updated, self._step = trainer.global_step != self._step, trainer.global_step
        if updated and self.every_n_updates and self._step % self.every_n_updates == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Export `policy/best` if this validation is the best so far."""
        self._validations += validated_in_fit(trainer)
        if not (self.save_best and self._enabled and validated_in_fit(trainer)):
            return
        weights = getattr(pl_module, "reward_weights", None) if self.monitor in ("val/reward", "val/return") else None
        if weights != self.best_weights:
            self.best_score, self.best_weights = None, weights
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            self._warn_missing(trainer)
        elif trainer.strategy.broadcast(self._improves(float(score))) and self._export(pl_module, trainer, "best"):
            self.best_score, self.best_step = float(score), trainer.global_step
            self.best_path = str(self.policies["best"])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint and export `policy/last`."""
        self.save(trainer)
        if self.save_last and self._enabled:
            self._export(pl_module, trainer, "last")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the state after a final validation; report which policy is the best, and what could not be written."""
        late = self._saved is not None and self._saved[1] != self._validations
        if late or "last.ckpt" in self.unwritten.reasons:
            self.save(trainer)
        if self.save_last and self._enabled and "last" not in self.policies:  # also resumed after the last step
            self._export(pl_module, trainer, "last")
        if self._enabled and self.best_path and self.best_score is not None:
            updates = f"update {self.best_step}" if self.best_step else "the start: no validation after it was as good"
            rank_zero_info(f"{self.best_path} is of {updates} ({self.monitor} {self.best_score:.4g})")
        if self.unwritten.reasons:
            rank_zero_warn(f"not written at the end of the run: {self.unwritten}")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the last complete state if all ranks can take part, or if rank 0 has all of it."""
        # Saving is collective: a rank that failed alone would wait for the others. Code that raises on all ranks
        # together sets `on_all_ranks` on the exception.
        on_all_ranks = trainer.world_size == 1 or getattr(exception, "on_all_ranks", False)
        alone = is_last_with_all_weights(trainer, exception)
        trained = self._loops is not None and trainer.state.fn == TrainerFn.FITTING
        if not trained or not self._enabled or not (on_all_ranks or alone):
            return
        if self._updating and not self._undo_update(pl_module):
            return
        try:
            path = self._write(trainer, write_checkpoint_alone) if alone else self.save(trainer)
        except Exception as error:  # do not hide the first exception
            rank_zero_warn(f"no checkpoint could be written after {type(exception).__name__}: {error}")
        else:
            if "last.ckpt" not in self.unwritten.reasons:
                rank_zero_info(f"saved {path} after {type(exception).__name__}; resume with --ckpt_path {path}")

    def save(self, trainer: Trainer) -> Path | None:
        """Write `last.ckpt` as of the last complete batch unless it is up to date. Call it on all ranks.

        Returns:
            Path of the latest checkpoint; None if no training step is complete. If it can't be written, that is the
            previous one, and `unwritten` names `last.ckpt`.
        """
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        if batches.current.processed != batches.current.completed:  # called from a hook at the end of a batch
            self._loops = trainer.fit_loop.state_dict()
        position = (batches.total.processed, self._validations)
        if self._enabled and self._loops is not None and position != self._saved:
            try:
                self._write(trainer, write_checkpoint)
            except SavingFailed as error:
                self.unwritten.add("last.ckpt", error, f"the last one is {self.last_path}")
            else:
                self._saved = position
                self.unwritten.remove("last.ckpt")
        return self.last_path

    def _write(self, trainer: Trainer, write: Callable[[Trainer, Path], Path]) -> Path:
        """Write `last.ckpt` as of the last complete batch."""
        self._saving = True
        try:
            self.last_path = write(trainer, self._folder / "checkpoints" / "last.ckpt")
        finally:
            self._saving = False
        return self.last_path

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store the time, and the loop state of the last complete batch, in the checkpoint."""
        checkpoint["saved_at"] = max(time.time(), self._resumed_at)  # a clock may be set back
        if self._saving:
            checkpoint["loops"]["fit_loop"] = self._loops
            checkpoint["callbacks"] = self._callback_states or checkpoint["callbacks"]

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note when the checkpoint that is resumed was saved."""
        self._resumed_at = checkpoint.get("saved_at", 0.0)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, how it was measured, and which policy it is of."""
        return {name: getattr(self, name) for name in STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score of the resumed run, unless it is of another metric."""
        if all(state_dict.get(name, getattr(self, name)) == getattr(self, name) for name in ("monitor", "mode")):
            vars(self).update({name: state_dict[name] for name in STATE if name in state_dict})
        elif state_dict.get("best_score") is not None:
            rank_zero_info(
                f"policy/best was chosen by {state_dict['monitor']} ({state_dict['mode']}); the best policy from here "
                f"on, by {self.monitor} ({self.mode}), replaces it"
            )

    def _undo_update(self, pl_module: LightningModule) -> bool:
        """Return to the start of the update in progress, if the module can."""
        undo = getattr(pl_module, "undo_update", None)
        if self._before_update is None or self._before_update[0] is None or undo is None or not undo():
            return False
        self._loops, self._callback_states = self._before_update
        return True

    def _improves(self, score: float) -> bool:
        if self.best_score is None or not math.isfinite(score):
            return math.isfinite(score)
        return score >= self.best_score if self.mode == "max" else score <= self.best_score

    def _export(self, module: LightningModule, trainer: Trainer, name: str) -> bool:
        """Export a policy; return whether it could be written."""
        path = self._policies / name
        try:
            export_policy(trainer, module.export, path)  # type: ignore[arg-type]
        except SavingFailed as error:
            self.unwritten.add(f"policy/{name}", error, "an earlier one is kept")
            return False
        self.policies[name] = path
        self.unwritten.remove(f"policy/{name}")
        return True

    def _warn_missing(self, trainer: Trainer) -> None:
        if not self._warned:
            names = ", ".join(sorted(n for n in trainer.callback_metrics if n.startswith("val/"))) or "no metric"
            rank_zero_warn(
                f"policy/best is not written: monitor={self.monitor!r} was not logged in validation, which logged "
                f"{names}; monitor one of these, or set save_best=False"
            )
        self._warned = True
