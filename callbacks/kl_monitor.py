"""KL monitoring: percentiles over completions, and a warning or early stop above a target."""

from __future__ import annotations

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from lit_rlhf.callbacks.utils import RolloutCallback, completion_kl, concatenate_over_ranks
from lit_rlhf.errors import InputError
from lit_rlhf.types import Rollout

QUANTILES = {"train/kl_p05": 0.05, "train/kl_p50": 0.5, "train/kl_p95": 0.95}


class KLMonitor(RolloutCallback):
    """Log percentiles of the KL over the completions of each rollout; warn or stop above a target.

    The mean hides a policy that departs from its reference on a few prompts only. `train/kl_p05`, `train/kl_p50` and
    `train/kl_p95` are percentiles of k1, in nats per completion, over the completions of all ranks.

    Args:
        target: Mean KL in nats per completion above which to warn (once); typically 5 to 20. None never warns.
        stop: Also stop training there; the validation at the end of the epoch still runs if one is due.

    Raises:
        ValueError: If `target` is not positive, or if `stop` is set without a target; at `fit` if there is a target and
            no reference.
    """

    def __init__(self, target: float | None = None, stop: bool = False) -> None:
        if target is not None and not target > 0:
            raise InputError(f"target={target} must be a positive number of nats, or None")
        if stop and target is None:
            raise InputError("stop=True needs a target: set it in nats, such as target=10")
        self.target = target
        self.stop = stop
        self._warned = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Reset the warning for a new run, and check that a KL is measured if there is a target."""
        self._warned = False
        if stage == "fit" and self.target is not None and getattr(pl_module, "reference_source", "") is None:
            raise InputError(f"kl_monitor.target={self.target} needs a reference, and reference is null: leave one out")

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Log the percentiles of a new rollout and compare its mean with the target."""
        if rollout.reference_logprobs is None:
            return
        kl = concatenate_over_ranks(trainer, completion_kl(rollout).flatten())
        for name, quantile in QUANTILES.items():
            pl_module.log(name, torch.quantile(kl, quantile))
        if self.target is not None and (mean := float(kl.mean())) > self.target:
            if not self._warned:
                consequence = "training stops here" if self.stop else "the policy may be exploiting the reward"
                rank_zero_warn(
                    f"train/kl is {mean:.3g} nats per completion, above the target of {self.target:g}: {consequence}. "
                    f"Raise kl_coef (now {getattr(pl_module, 'kl_coef', 'unknown')}), lower the learning rate, or "
                    "train for fewer updates."
                )
                self._warned = True
            trainer.should_stop = trainer.should_stop or self.stop
