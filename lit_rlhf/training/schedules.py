"""Learning-rate schedules that a configuration can name."""

from __future__ import annotations

import math
from typing import Any, Literal

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler


class Warmup(LRScheduler):
    """A linear warm-up, then a constant, linear or cosine course. Stepped once an update.

    Back to Basics, appendix C: 3 % of warm-up, then constant for the methods that sample, cosine for SFT and the
    reward model.

    Args:
        optimizer: Its `lr` is the rate at the end of the warm-up.
        warmup: Updates of warm-up (1 or more), or their share of all updates (below 1).
        decay: What follows; `linear` and `cosine` end at 0.
        total_steps: All updates; taken from the Trainer where not given.

    Raises:
        ValueError: If `warmup` is negative, or `decay` is none of the three.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup: float = 0.03,
        decay: Literal["constant", "linear", "cosine"] = "constant",
        total_steps: int | None = None,
    ) -> None:
        if not 0 <= warmup < math.inf:
            raise ValueError(
                f"warmup={warmup} must not be negative or infinite: a number of updates, or their share of all"
            )
        if decay not in (known := ("constant", "linear", "cosine")):
            raise ValueError(f"decay={decay!r} must be one of {', '.join(known)}")
        self.warmup, self.decay, self.total_steps = warmup, decay, total_steps
        self._planned = total_steps is None
        super().__init__(optimizer)

    def plan(self, total_steps: int) -> None:
        """Set the number of all updates, unless it was given."""
        if self._planned:
            self.total_steps = total_steps
            self._set_rates()

    def _set_rates(self) -> None:
        self._last_lr = self.get_lr()
        for group, rate in zip(self.optimizer.param_groups, self._last_lr, strict=True):
            group["lr"] = rate

    def state_dict(self) -> dict[str, Any]:
        """Return where the schedule stands; a planned number of updates is left out, for a resumed run plans anew."""
        state: dict[str, Any] = super().state_dict()
        return {name: value for name, value in state.items() if not (name == "total_steps" and self._planned)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from where the schedule stood."""
        super().load_state_dict(state_dict)
        self._set_rates()

    def factor(self, step: int) -> float:
        """Share of the full rate at an update, counted from 0."""
        total = self.total_steps or 0
        warmup = self.warmup if self.warmup >= 1 else self.warmup * total
        if step < warmup:
            return (step + 1) / (math.ceil(warmup) + 1)
        if self.decay == "constant" or total <= warmup:
            return 1.0
        course = min(1.0, (step - warmup) / (total - warmup))
        return 1 - course if self.decay == "linear" else 0.5 * (1 + math.cos(math.pi * course))

    def get_lr(self) -> list[float | Tensor]:
        """The rate of each parameter group at this update."""
        return [float(base) * self.factor(self.last_epoch) for base in self.base_lrs]
