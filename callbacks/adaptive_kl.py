"""A coefficient of the KL that steers the KL towards a target."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lit_rlhf import functional as F
from lit_rlhf.callbacks.utils import completion_kl, gathered, new_rollout


class AdaptiveKL(Callback):
    """Changes `kl_coef` once a rollout, so that the KL comes near a target; for any method that samples.

    `beta <- beta (1 + K clamp((KL - target) / target, -0.2, 0.2))`, the KL being the mean over the completions of all
    ranks, and the new coefficient in effect from the next rollout. Ziegler et al., 2019, arXiv 1909.08593, section 2.2.
    `train/kl_coef` shows the coefficient that a rollout was collected with; checkpoints hold it.

    Args:
        target: Mean KL to reach, in nats a completion; Ziegler et al. use 6 to 10.
        gain: K, how fast; at most a fifth of it in relative change a rollout.

    Raises:
        ValueError: If `target` or `gain` is out of its range, or at `fit` if the method has no `kl_coef` above 0.
    """

    def __init__(self, target: float = 6.0, gain: float = 0.1) -> None:
        if not target > 0:
            raise ValueError(f"target={target} must be above 0")
        if not 0 < gain < 5:
            raise ValueError(f"gain={gain} must be above 0, and below 5 for the coefficient to stay positive")
        self.target, self.gain = target, gain
        self.kl_coef: float | None = None
        self.following: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit; a resumed run loads its own coefficient."""
        if stage == "fit":
            self.kl_coef = self.following = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the coefficient of the run that is resumed, or the method's own."""
        method: Any = pl_module
        if not getattr(method, "kl_coef", 0.0) > 0:
            raise ValueError(
                f"AdaptiveKL has nothing to start from: {type(pl_module).__name__} has no kl_coef above 0; give one"
            )
        self.kl_coef = method.kl_coef = method.kl_coef if self.kl_coef is None else self.kl_coef

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Outside of training too, measure with the coefficient of the run that a checkpoint is of."""
        method: Any = pl_module
        if self.kl_coef is not None:
            method.kl_coef = self.kl_coef

    on_test_start = on_validation_start

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Find the next coefficient from a new rollout, and put it in place when its last slice is done."""
        method: Any = pl_module
        rollout = new_rollout(pl_module, batch_idx)
        if rollout is not None:
            kl = float(gathered(trainer, completion_kl(rollout).flatten()).mean())
            self.following = F.adapted_kl_coef(method.kl_coef, kl, self.target, self.gain)
        if (batch_idx + 1) % getattr(method, "repeats", 1) == 0 and self.following is not None:
            self.kl_coef = method.kl_coef = self.following

    def state_dict(self) -> dict[str, Any]:
        """Return the coefficient of this rollout and of the next."""
        return {"kl_coef": self.kl_coef, "following": self.following}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take both."""
        self.kl_coef, self.following = state_dict["kl_coef"], state_dict["following"]
