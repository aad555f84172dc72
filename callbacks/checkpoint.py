"""The policy as a folder that other libraries load, and the training checkpoint that goes on exactly where it stood."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_rlhf.callbacks.utils import is_fast_dev_run, run_folder, validated_in_fit


class PolicyCheckpoint(Checkpoint):
    """Writes the best and the last policy, and a checkpoint to resume from.

    Below `default_root_dir`: `policy/best` whenever a validation improves `monitor` and `policy/last` at every end of
    `fit`, by the module's own `export`. Below the run's folder: `checkpoints/last.ckpt`, every `every_n_updates`, at
    the end, and when the run fails outside an update; it replaces the one before only when complete.

    Args:
        monitor: The validation metric that says which policy is best; the sanity check does not count. While a schedule
            changes the weights of the rewards, `val/reward` and `val/return` do not compare, and the newest is best.
        mode: Whether the best is the highest or the lowest.
        every_n_updates: Optimizer steps between two checkpoints; None writes one at the end only.
        save_best: Whether to write `policy/best`.
        save_last: Whether to write `policy/last`.

    Attributes:
        best_score: The best value of `monitor` so far; a resumed run keeps it.
        last_path: The newest training checkpoint of this run, None until one is written.
        policies: The policies that this run wrote, `best` and `last`.

    Raises:
        ValueError: If `mode` or `every_n_updates` makes no sense.
        TypeError: When `fit` starts with a module that has no `export`.
    """

    best_model_path = ""
    """No checkpoint of the best is kept, only its policy: tells the Trainer so where it is asked for `best`."""

    def __init__(
        self,
        monitor: str = "val/reward",
        mode: Literal["max", "min"] = "max",
        every_n_updates: int | None = None,
        save_best: bool = True,
        save_last: bool = True,
    ) -> None:
        if mode not in ("max", "min"):
            raise ValueError(f"mode={mode!r} is unknown: the best {monitor} is its 'max' or its 'min'")
        if every_n_updates is not None and every_n_updates < 1:
            raise ValueError(f"every_n_updates={every_n_updates} must be at least 1, or None for the end only")
        self.monitor = monitor
        self.mode = mode
        self.every_n_updates = every_n_updates
        self.save_best = save_best
        self.save_last = save_last
        self.best_score: float | None = None
        self.best_weights: list[float] | None = None  # of the rewards, when that was measured
        self.last_path: Path | None = None
        self.policies: dict[str, Path] = {}
        self._warned = False
        self._step = 0
        # Lightning's loops as they stood when the last batch ended. A checkpoint written later, after a validation or
        # at the end of fit, holds these: the loops' own state would by then resume in the next epoch.
        self._loops: dict[str, Any] | None = None
        self._validations = 0
        self._saved: tuple[int, int] | None = None  # at how many batches and validations
        self._saving = False
        self._updating = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out where to write, and refuse a module that has nothing to write."""
        self._folder = run_folder(trainer) / "checkpoints"
        self._enabled = stage == "fit" and not is_fast_dev_run(trainer)
        self.last_path, self.policies, self._loops, self._saved = None, {}, None, None
        if stage == "fit":
            self.best_score, self.best_weights = None, None  # of an earlier fit; a resumed run loads its own
        if self._enabled and not callable(getattr(pl_module, "export", None)):
            name = type(pl_module).__name__
            raise TypeError(f"PolicyCheckpoint writes through export(folder), which {name} lacks: use ModelCheckpoint")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the number of updates to count from."""
        self._step = trainer.global_step

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note that an update is under way, so that nothing is saved until it is complete."""
        self._updating = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note where the run stands, and save where a checkpoint is due."""
        self._updating = False
        self._loops = trainer.fit_loop.state_dict()
        updated, self._step = trainer.global_step != self._step, trainer.global_step
        if updated and self.every_n_updates and self._step % self.every_n_updates == 0:
            self.save(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write `policy/best` if this is the best so far."""
        self._validations += validated_in_fit(trainer)
        if not (self.save_best and self._enabled and validated_in_fit(trainer)):
            return
        weights = getattr(pl_module, "reward_weights", None) if self.monitor in ("val/reward", "val/return") else None
        if weights != self.best_weights:
            self.best_score, self.best_weights = None, weights
        score = trainer.callback_metrics.get(self.monitor)
        if score is None:
            self._warn_missing(trainer)
        elif trainer.strategy.broadcast(self._improves(float(score))):
            self.best_score = float(score)
            self._export(pl_module, trainer, "best")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the checkpoint and `policy/last`."""
        self.save(trainer)
        if self.save_last and self._enabled:
            self._export(pl_module, trainer, "last")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep what a validation at the end of the run has left; write `policy/last` if nothing was left to train."""
        if self._saved is not None and self._saved[1] != self._validations:
            self.save(trainer)
        if self.save_last and self._enabled and "last" not in self.policies:  # resumed with nothing left to train
            self._export(pl_module, trainer, "last")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what is complete, where every rank can."""
        # Saving takes every rank, and one that failed alone would wait for the others: whoever raises on all ranks
        # together says so on the exception.
        together = trainer.world_size == 1 or getattr(exception, "on_all_ranks", False)
        if trainer.state.fn != TrainerFn.FITTING or self._loops is None or self._updating or not together:
            return
        try:
            path = self.save(trainer)
        except Exception as error:  # the first exception is the one to show
            rank_zero_warn(f"no checkpoint could be written after {type(exception).__name__}: {error}")
        else:
            rank_zero_info(f"saved {path} after {type(exception).__name__}; go on with --ckpt_path {path}")

    def save(self, trainer: Trainer) -> Path | None:
        """Write `last.ckpt` as of the last complete batch, unless it stands there. Call it on all ranks.

        Returns:
            Where it stands; None where nothing has been trained yet.
        """
        batches: Any = trainer.fit_loop.epoch_loop.batch_progress
        if batches.current.processed != batches.current.completed:  # called while a batch ends
            self._loops = trainer.fit_loop.state_dict()
        position = (batches.total.processed, self._validations)
        if self._enabled and self._loops is not None and position != self._saved:
            self._saving = True
            try:
                self.last_path = write_checkpoint(trainer, self._folder / "last.ckpt")
            finally:
                self._saving = False
            self._saved = position
        return self.last_path

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the place of the last complete batch into the checkpoint."""
        if self._saving:
            checkpoint["loops"]["fit_loop"] = self._loops

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, and by which weights of the rewards."""
        return {"best_score": self.best_score, "best_weights": self.best_weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the best score of the run that is resumed."""
        self.best_score, self.best_weights = state_dict["best_score"], state_dict["best_weights"]

    def _improves(self, score: float) -> bool:
        if self.best_score is None:
            return score == score
        return score > self.best_score if self.mode == "max" else score < self.best_score

    def _export(self, module: LightningModule, trainer: Trainer, name: str) -> None:
        path = Path(trainer.default_root_dir) / "policy" / name
        module.export(path)  # type: ignore[operator]
        self.policies[name] = path

    def _warn_missing(self, trainer: Trainer) -> None:
        if not self._warned:
            names = ", ".join(sorted(n for n in trainer.callback_metrics if n.startswith("val/"))) or "nothing"
            rank_zero_warn(
                f"no policy/best is written: the validation logged {names}, and not monitor={self.monitor!r}; "
                "monitor one of those, or set save_best=False"
            )
        self._warned = True


def write_checkpoint(trainer: Trainer, path: Path) -> Path:
    """Write a training checkpoint and move it to `path` once it is complete. Call it on all ranks."""
    partial = path.with_name(f"partial-{path.name}")
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(partial)
    trainer.strategy.barrier()
    trainer.save_checkpoint(partial, weights_only=False)
    if trainer.is_global_zero:
        old = path.with_name(f"old-{path.name}")
        if path.is_dir():  # a sharded checkpoint: a folder can't be replaced in one step
            os.replace(path, old)
        os.replace(partial, path)
        _remove(old)
    trainer.strategy.barrier()
    return path


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
