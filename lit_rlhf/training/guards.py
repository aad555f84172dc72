"""Checks around the loop of every algorithm: the type of a batch, options on loading, updates that change nothing."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lit_rlhf.errors import InputTypeError
from lit_rlhf.training.checkpoint_search import search_by_name
from lit_rlhf.training.checks import DATA_MODULES, check_batch_type
from lit_rlhf.training.diagnosis import MovementCheck
from lit_rlhf.types import Record

LOOPS = {
    TrainerFn.FITTING: "fit_loop",
    TrainerFn.VALIDATING: "validate_loop",
    TrainerFn.TESTING: "test_loop",
    TrainerFn.PREDICTING: "predict_loop",
}
"""The attribute of a Trainer with the loop of what it is doing."""


class Guards(LightningModule):
    """Mixin of `lit_rlhf.Algorithm` with checks that need no knowledge of the method."""

    batch_type: type[Record] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._movement = MovementCheck()

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **options: Any) -> Any:  # type: ignore[override]
        """Build the algorithm with the options of the run, and load the trained weights.

        Raises:
            TypeError: If a required option is missing: checkpoints hold weights and progress, not options.
        """
        missing = [name for name in required_options(cls) if name not in options]
        if missing:
            given = ", ".join(f"{name}=..." for name in missing)
            raise InputTypeError(
                f"a checkpoint holds weights and progress, not options: {cls.__name__}.load_from_checkpoint(path, "
                f"{given}) needs those of the run; the trained policy alone is what `lit-rlhf export` writes"
            )
        return super().load_from_checkpoint(checkpoint_path, *args, **options)

    @property
    def trainer(self) -> Trainer:
        """The Trainer of the run."""
        return super().trainer

    @trainer.setter
    def trainer(self, trainer: Trainer | None) -> None:
        LightningModule.trainer.fset(self, trainer)  # type: ignore[attr-defined]
        search_by_name(trainer)

    @property
    def data_module(self) -> Any:
        """The data module of the run; None without one or outside a run."""
        trainer: Any = self._trainer
        data = getattr(trainer, "datamodule", None)
        if data is None or trainer.state.fn not in LOOPS:
            return data
        source = getattr(trainer, LOOPS[trainer.state.fn])._data_source.instance
        return data if source is data else None  # the Trainer keeps the data module of an earlier call

    def configure_callbacks(self) -> list[Any]:
        """Check the type of the data before they are read.

        Raises:
            ValueError: If the data module yields another type of batch.
        """
        check_batch_type(type(self).__name__, self.batch_type, self.data_module)
        callbacks: Any = super().configure_callbacks()
        return callbacks if isinstance(callbacks, list) else [callbacks]

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Refuse batches that are not the algorithm's, as from a DataLoader over rows.

        Raises:
            TypeError: If the batch is of another type.
        """
        self._check_batch(batch)
        super().on_train_batch_start(batch, batch_idx)

    def on_validation_batch_start(self, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        """Refuse batches that are not the algorithm's."""
        self._check_batch(batch)

    on_test_batch_start = on_predict_batch_start = on_validation_batch_start

    def _check_batch(self, batch: Any) -> None:
        if self.batch_type is not None and not isinstance(batch, self.batch_type):
            module = DATA_MODULES.get(self.batch_type)
            advice = f": give the rows to lit_rlhf.{module}(train=rows), and that to the Trainer" if module else ""
            raise InputTypeError(
                f"{type(self).__name__} takes batches of type lit_rlhf.types.{self.batch_type.__name__}, and the "
                f"loader yields {type(batch).__name__}{advice}"
            )

    def optimizer_step(
        self,
        epoch: int,
        batch_idx: int,
        optimizer: Optimizer | LightningOptimizer,
        optimizer_closure: Callable[[], Any] | None = None,
    ) -> None:
        """Update the weights, and warn if the first updates change nothing."""
        before = self._movement.before(optimizer)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        self._movement.after(optimizer, before)


def required_options(kind: type) -> list[str]:
    """Return the arguments without a default of a class, also those that it hands on to its bases."""
    required: dict[str, None] = {}
    for base in kind.__mro__:
        if "__init__" in vars(base):
            _, *parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
            named = [p for p in parameters if not p.kind.name.startswith("VAR_")]
            required |= {p.name: None for p in named if p.default is p.empty}
            if len(named) == len(parameters):
                break
    return list(required)
