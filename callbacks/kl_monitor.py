"""How far the policy has gone from its reference, completion by completion."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.utils import completion_kl, gathered, new_rollout

QUANTILES = {"train/kl_p05": 0.05, "train/kl_p50": 0.5, "train/kl_p95": 0.95}


class KLMonitor(Callback):
    """Logs percentiles of the KL over the completions of each rollout, and warns or stops beyond a target.

    The mean says little about a policy that leaves its reference on some prompts only: `train/kl_p05`, `train/kl_p50`
    and `train/kl_p95` are percentiles of k1, in nats a completion, over the completions of all ranks.

    Args:
        target: Mean KL, in nats a completion, beyond which to warn (once); typically 5 to 20. None never warns.
        stop: Also end the training there, with a last validation where one is due at the end of every epoch.

    Raises:
        ValueError: If `target` is not positive, or `stop` is asked for without a target.
    """

    def __init__(self, target: float | None = None, stop: bool = False) -> None:
        if target is not None and not target > 0:
            raise ValueError(f"target={target} can't be exceeded sensibly: give a positive number of nats, or None")
        if stop and target is None:
            raise ValueError("stop=True needs to know beyond which KL: give a target in nats, such as target=10")
        self.target = target
        self.stop = stop
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Warn anew in a new run."""
        self._warned = False

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the percentiles of a new rollout, and compare its mean with the target."""
        rollout = new_rollout(pl_module, batch_idx)
        if rollout is None:
            return
        kl = gathered(trainer, completion_kl(rollout).flatten())
        for name, quantile in QUANTILES.items():
            pl_module.log(name, torch.quantile(kl, quantile))
        if self.target is not None and (mean := float(kl.mean())) > self.target:
            self._exceeded(trainer, pl_module, mean, self.target)

    def _exceeded(self, trainer: Trainer, module: LightningModule, mean: float, target: float) -> None:
        if not self._warned:
            end = "the training stops here" if self.stop else "the policy may be exploiting the reward"
            rank_zero_warn(
                f"train/kl is {mean:.3g} nats a completion, beyond the target of {target:g}: {end}. "
                f"Raise kl_coef (now {getattr(module, 'kl_coef', 'unknown')}), lower the learning rate, or train less."
            )
            self._warned = True
        trainer.should_stop = trainer.should_stop or self.stop
