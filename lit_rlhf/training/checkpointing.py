"""Lightning hooks of every algorithm for its checkpoints: what they hold besides weights, and how a run resumes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

from lightning.pytorch import LightningModule
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from lit_rlhf.models.fingerprint import fingerprint
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.quantized import quantized_layers
from lit_rlhf.models.shards import PARTS, fill
from lit_rlhf.training.distributed import gather_on_rank_zero
from lit_rlhf.training.lightning_callbacks import check_resumed_callbacks
from lit_rlhf.training.optimization import LossSums
from lit_rlhf.training.options import OptimizationOptions
from lit_rlhf.training.resume import (
    InFlight,
    StepLayout,
    UpdateStart,
    check_identity,
    check_weights,
    count_begun_epoch,
    fix_loop_progress,
    keep_patience,
    load_progress,
    save_identity,
    save_progress,
)
from lit_rlhf.training.timing import TrainingTimer


class CheckpointHooks(LightningModule):
    """Mixin of `lit_rlhf.Algorithm` with the hooks that write and read checkpoints."""

    policy: Policy
    seed: int
    export_prefix = "policy.model."
    """Prefix in the `state_dict` of the model that `export` writes."""
    steps_per_rollout = 1
    """Training steps on one batch of the data module."""

    def __init__(self) -> None:
        super().__init__()
        self.training_timer = TrainingTimer()
        self.running_statistics: dict[str, Any] = {}  # dataclasses of numbers that training updates, by name
        self._snapshot: dict[str, Any] | None = None
        self._loss_sums = LossSums()
        self._in_flight = InFlight()  # of the checkpoint that is resumed, until it is restored
        self._before_update: UpdateStart | None = None
        self._options: OptimizationOptions | None = None
        self._resumed: dict[str, Any] | None = None  # the checkpoint that is resumed, until training starts
        self._updates_loaded: int | None = None  # updates of the run whose checkpoint or result is evaluated

    def export_snapshot(self) -> dict[str, Any]:
        """Return everything that an export needs besides the weights."""
        raise NotImplementedError

    @property
    def updates_done(self) -> int:
        """Number of updates so far; outside `fit`, that of the loaded checkpoint or of the last fit."""
        return self.trainer.global_step if self._updates_loaded is None else self._updates_loaded

    @property
    def _trained_model(self) -> PreTrainedModel | PeftModel:
        return cast("PreTrainedModel | PeftModel", self.get_submodule(self.export_prefix.removesuffix(".")))

    @property
    def _start(self) -> str:
        """Fingerprints of the weights under an adapter and of the reference, which a checkpoint lacks; may be empty."""
        model, adapted = self._trained_model, isinstance(self._trained_model, PeftModel)
        if "policy" in self._modules:
            reference = getattr(self, "reference", None)
            starts = [self.policy.start] * adapted + ([] if reference is None else [reference.start])
            return " ".join(dict.fromkeys(starts))
        return fingerprint(model, skip={"score", *cast(PeftModel, model).peft_config}) if adapted else ""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained model, the seed, the export snapshot and what is in flight; drop other frozen weights."""
        checkpoint["state_dict"] = self.saved_weights(checkpoint["state_dict"])
        checkpoint["seed"], checkpoint["training_seconds"] = self.seed, self.training_timer.so_far()
        self._snapshot = self._snapshot or self.export_snapshot()
        checkpoint["export"] = {"prefix": self.export_prefix, **self._snapshot}
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]  # restored by a resume
        in_flight = gather_on_rank_zero(self.trainer, self.in_flight_state(progress["processed"]).state_dict())
        save_progress(checkpoint, self._step_layout, in_flight)
        save_identity(checkpoint, type(self).__name__, self._start)
        checkpoint["rows"] = self._rows
        if self._options is not None:
            checkpoint["optimization"] = self._options.state_dict()
        checkpoint["running_state"] = self.running_state()

    def saved_weights(self, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the part of a `state_dict` that checkpoints hold: the trained model and other trained weights.

        The trained model is the adapter with LoRA, if its base model is in a folder; otherwise the whole model,
        including its frozen layers.
        """
        frozen = {n for n, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        in_memory = "policy" in self._modules and not self.policy.loaded
        if in_memory or not isinstance(self._trained_model, PeftModel):
            frozen = {name for name in frozen if not name.startswith(self.export_prefix)}
        scales = quantized_layers(self)  # beside weights that are frozen
        return {n: value for n, value in state_dict.items() if n not in frozen and not n.startswith(scales)}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the saved state and correct Lightning's loop progress."""
        trainer = self._trainer
        resumed = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        if trainer is not None and getattr(trainer.strategy, "sharding", None) is None:
            fill(checkpoint, Path(trainer.ckpt_path or ""), PARTS if resumed else PARTS[:1])
        check_identity(checkpoint, type(self).__name__ if resumed else "", self._start)
        if resumed and checkpoint.get("seed", self.seed) != self.seed:
            rank_zero_info(f"the seed remains {checkpoint['seed']}, that of the checkpoint")
        self.seed = checkpoint.get("seed", self.seed)
        self.training_timer = TrainingTimer(checkpoint.get("training_seconds", 0.0))
        self._updates_loaded = checkpoint.get("global_step")
        self.load_running_state(checkpoint.get("running_state", {}))
        check_weights(self.named_parameters(), checkpoint["state_dict"])
        if "loops" in checkpoint:
            fix_loop_progress(checkpoint["loops"]["fit_loop"])
        if trainer is not None and resumed:
            check_resumed_callbacks(trainer)
            self._say_if_rows_differ(checkpoint)
            keep_patience(trainer, checkpoint)
            self._resumed = {n: checkpoint.get(n) for n in ("optimization", "lr_schedulers")}
            self._in_flight = load_progress(checkpoint, self._step_layout, trainer.world_size, trainer.global_rank)

    def keep_options(self, options: OptimizationOptions) -> None:
        """Keep the options of a new optimizer for checkpoints, and check those of the checkpoint that is resumed."""
        self._options = options
        if self._resumed and self._resumed["optimization"]:
            options.check(self._resumed["optimization"])
            if "lr_scheduler" in options.changes(self._resumed["optimization"]):
                self._resumed["lr_schedulers"].clear()  # of another class

    def running_state(self) -> dict[str, Any]:
        """Return the running statistics as plain data."""
        return {name: dict(vars(record)) for name, record in self.running_statistics.items()}

    def load_running_state(self, state: dict[str, Any]) -> None:
        """Restore what `running_state` returned."""
        for name, record in self.running_statistics.items():
            vars(record).update(state.get(name, {}))

    def in_flight_state(self, steps_done: int) -> InFlight:
        """Return what this rank needs to resume after `steps_done` steps of the epoch."""
        state = InFlight()
        if steps_done % self.trainer.accumulate_grad_batches:
            state.add_update(self.named_parameters(), self._loss_sums)
        return state

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start an update: free the last gradients, which would add to the memory of the forward pass."""
        count_begun_epoch(self.trainer.fit_loop.epoch_progress)
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad(set_to_none=True)
            self._before_update = UpdateStart(
                self.trainer.optimizers, self.buffers(recurse=False), self.running_state()
            )

    def undo_update(self) -> bool:
        """Return to the state before the update in progress, after an error in it, so that a checkpoint can be saved.

        Returns:
            Whether this was possible: not if the optimizer has already changed weights or its own state.
        """
        start = self._before_update
        if start is None or not start.restore_buffers():
            return False
        self.zero_grad(set_to_none=True)
        self._loss_sums = LossSums()
        self.load_running_state(start.running_state)
        return True

    def on_train_start(self) -> None:
        """Restore an update in progress, apply changed options, and fail early if the model cannot be saved."""
        if self._options is not None and self._resumed and self._resumed["optimization"]:
            self._options.apply_changes(self._resumed["optimization"], self.trainer.global_step)
        self._resumed = None
        self._updates_loaded = None
        self._snapshot = self._snapshot or self.export_snapshot()
        if "policy" in self._modules:
            self.policy.new_adapter = False  # the next algorithm's reference is the policy that this one leaves
        self._loss_sums = self._in_flight.restore_update(self.named_parameters())

    def on_fit_end(self) -> None:
        """Keep the number of updates, for a Trainer that evaluates the trained policy."""
        self._updates_loaded = self.trainer.global_step

    @property
    def _rows(self) -> list[int]:
        """Rows of the training data, and of a batch over all processes; 0 where unknown."""
        data = getattr(self.trainer, "datamodule", None)
        return [len(getattr(data, "train_set", None) or ()), getattr(data, "batch_size", 0) * self.trainer.world_size]

    def _say_if_rows_differ(self, checkpoint: dict[str, Any]) -> None:
        if (before := checkpoint.get("rows", self._rows)) != self._rows:
            rank_zero_info(
                f"the checkpoint's run had {before[0]} rows in batches of {before[1]} over all processes, and this one "
                f"has {self._rows[0]} in batches of {self._rows[1]}: its current epoch continues after as many "
                "batches, so it skips or repeats some rows"
            )

    @property
    def _step_layout(self) -> StepLayout:
        return StepLayout(self.steps_per_rollout, self.trainer.accumulate_grad_batches)
