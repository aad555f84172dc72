"""KL controller: adapt `kl_coef` towards a target KL."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch import LightningModule, Trainer

from lit_rlhf import functional as F
from lit_rlhf.callbacks.utils import RolloutCallback, completion_kl, concatenate_over_ranks
from lit_rlhf.errors import InputError
from lit_rlhf.types import Rollout


class AdaptiveKL(RolloutCallback):
    """Adapt `kl_coef` once per rollout to reach a target KL; for any method that samples.

    `beta <- beta (1 + K clamp((KL - target) / target, -0.2, 0.2))`, where KL is the mean over the completions of all
    ranks. The new coefficient takes effect at the next rollout. Ziegler et al., 2019, arXiv 1909.08593, section 2.2.
    `train/kl_coef` is the coefficient that a rollout was collected with. Checkpoints keep the coefficient.

    Args:
        target: Target for the mean KL in nats per completion; Ziegler et al. use 6 to 10.
        gain: Proportional gain K; the coefficient changes by at most a fifth of it (relative) per rollout.

    Raises:
        ValueError: If `target` or `gain` is out of range; at `fit` if the method has no `kl_coef` above 0.
    """

    def __init__(self, target: float = 6.0, gain: float = 0.1) -> None:
        if not target > 0:
            raise InputError(f"target={target} must be above 0")
        if not 0 < gain < 5:
            raise InputError(f"gain={gain} must be above 0, and below 5 so that the coefficient stays positive")
        self.target, self.gain = target, gain
        self.start: float | None = None  # the method's own coefficient
        self.kl_coef: float | None = None
        self.next_kl_coef: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the state of an earlier fit; a resumed run loads its own coefficient."""
        if stage == "fit":
            self.start = self.kl_coef = self.next_kl_coef = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the coefficient of the resumed run, or start from the method's own, also if that was changed."""
        algorithm: Any = pl_module
        if not getattr(algorithm, "kl_coef", 0.0) > 0:
            raise InputError(
                f"AdaptiveKL has no initial coefficient: {type(pl_module).__name__} has no kl_coef above 0; set kl_coef"
            )
        given = getattr(algorithm, "initial_kl_coef", None)
        if self.start != given:
            self.kl_coef = self.next_kl_coef = None
        self.start = given
        self.kl_coef = algorithm.kl_coef = algorithm.kl_coef if self.kl_coef is None else self.kl_coef

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate a checkpoint with its own coefficient, also outside training."""
        algorithm: Any = pl_module
        if self.kl_coef is not None:
            algorithm.kl_coef = self.kl_coef

    on_test_start = on_validation_start

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Compute the next coefficient from a new rollout; a KL that is not finite changes nothing."""
        algorithm: Any = pl_module
        kl = float(concatenate_over_ranks(trainer, completion_kl(rollout).flatten()).mean())
        if not math.isfinite(kl):
            return
        self.next_kl_coef = F.adapted_kl_coef(algorithm.kl_coef, kl, self.target, self.gain)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Apply the next coefficient after the last minibatch of a rollout."""
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
        algorithm: Any = pl_module
        if (batch_idx + 1) % getattr(algorithm, "steps_per_rollout", 1) == 0 and self.next_kl_coef is not None:
            self.kl_coef = algorithm.kl_coef = self.next_kl_coef

    def state_dict(self) -> dict[str, Any]:
        """Return the method's own coefficient, and those of this rollout and of the next."""
        return {"start": self.start, "kl_coef": self.kl_coef, "next_kl_coef": self.next_kl_coef}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the coefficients."""
        self.start = state_dict["start"]
        self.kl_coef, self.next_kl_coef = state_dict["kl_coef"], state_dict["next_kl_coef"]
