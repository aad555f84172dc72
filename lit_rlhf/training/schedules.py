"""Learning-rate schedules."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau

from lit_rlhf.errors import InputError


class Warmup(LRScheduler):
    """Linear warmup, then a constant, linear or cosine schedule. Stepped once per update.

    Back to Basics, appendix C: 3 % warmup, then constant for online methods and cosine for SFT and reward models.

    Args:
        optimizer: Its `lr` is the peak learning rate, reached after the warmup.
        warmup: Warmup updates (1 or more), or their share of all updates (below 1).
        decay: Schedule after the warmup. `linear` and `cosine` decay to 0.
        total_steps: Total number of updates. Defaults to the Trainer's.

    Raises:
        ValueError: If `warmup` is negative or infinite, or `decay` is unknown.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.03,
        decay: Literal["constant", "linear", "cosine"] = "constant",
        total_steps: int | None = None,
    ) -> None:
        if not 0 <= warmup < math.inf:
            raise InputError(
                f"warmup={warmup} must not be negative or infinite: give a number of updates, or their share of all"
            )
        if decay not in (known := ("constant", "linear", "cosine")):
            raise InputError(f"decay={decay!r} must be one of {', '.join(known)}")
        self.warmup, self.decay, self.total_steps = warmup, decay, total_steps
        self._uses_trainer_steps = total_steps is None
        super().__init__(optimizer)

    def plan(self, total_steps: int) -> None:
        """Set the total number of updates, unless the constructor was given it. 0: unknown, so there is no decay."""
        if self._uses_trainer_steps:
            self.total_steps = total_steps
            self._set_lr()

    def _set_lr(self) -> None:
        self._last_lr = self.get_lr()
        for group, lr in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = lr

    def state_dict(self) -> dict[str, Any]:
        """Return the state, without the Trainer's `total_steps`, since a resumed run may have more updates."""
        state: dict[str, Any] = super().state_dict()
        return {
            name: value for name, value in state.items() if not (name == "total_steps" and self._uses_trainer_steps)
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the state and set the optimizer's learning rates."""
        super().load_state_dict(state_dict)
        self._set_lr()

    def factor(self, step: int) -> float:
        """Return the fraction of the peak learning rate at an update, counted from 0."""
        total = self.total_steps or 0
        warmup = self.warmup if self.warmup >= 1 else self.warmup * total
        if step < warmup:
            return (step + 1) / (math.ceil(warmup) + 1)
        if self.decay == "constant" or total <= warmup:
            return 1.0
        progress = min(1.0, (step - warmup) / (total - warmup))
        return 1 - progress if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * progress))

    def get_lr(self) -> list[float | Tensor]:
        """Return the learning rate of each parameter group at the current update."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]


def check_schedule(scheduler: Any) -> None:
    """Check that a schedule depends on the number of updates alone.

    Raises:
        ValueError: If it follows a metric, which is not there after every update.
    """
    if isinstance(scheduler, ReduceLROnPlateau):
        raise InputError(
            f"lr_scheduler={type(scheduler).__name__} follows a metric, and schedules are stepped at every update: use "
            "lit_rlhf.Warmup or a schedule of torch.optim.lr_scheduler that counts steps"
        )
