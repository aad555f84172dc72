"""DPO: learn from pairs directly, without a reward model and without sampling.

Rafailov et al., 2023, arXiv 2305.18290. `IPO` overrides one equation.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.offline import OfflineAlgorithm
from lit_rlhf.evaluation.metrics import pairwise_accuracy
from lit_rlhf.training import method_checks
from lit_rlhf.types import Metrics, Preferences


class DPO(OfflineAlgorithm):
    """Direct preference optimization: loss `-log sigmoid(beta * margin)`.

    The margin is `log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)`.

    Args:
        *args: See `OfflineAlgorithm`.
        **kwargs: See `OfflineAlgorithm`.
    """

    batch_type = Preferences

    def pair_loss(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """Loss of each pair."""
        return F.dpo_loss(margin, self.beta)

    def training_step(self, batch: Preferences, batch_idx: int) -> Tensor:
        """Return the loss of a batch of pairs."""
        log_ratios = self.training_log_ratios(batch)
        metrics = {f"train/{name}": values.mean() for name, values in self._metrics(log_ratios.detach()).items()}
        self.log_dict(metrics, batch_size=1, sync_dist=True)
        terms = self._pair_losses(log_ratios)
        return self.reduce_loss(terms, torch.ones_like(terms, dtype=torch.bool))

    def held_out_metrics(self, batch: Preferences) -> Metrics:
        """Return loss, accuracy (whether the chosen completion has the higher reward) and rewards of each pair."""
        log_ratios = self.held_out_log_ratios(batch)
        metrics = {"loss": self._pair_losses(log_ratios), **self._metrics(log_ratios)}
        return {name: (values, torch.ones_like(values, dtype=torch.bool)) for name, values in metrics.items()}

    def _pair_losses(self, log_ratios: Tensor) -> Tensor:
        losses = self.pair_loss(reward_margin(log_ratios))
        method_checks.check_row_losses(f"{type(self).__name__}.pair_loss", losses, len(log_ratios))
        return losses

    def _metrics(self, log_ratios: Tensor) -> dict[str, Tensor]:
        chosen, rejected = (self.beta * log_ratios).unbind(1)
        accuracy = pairwise_accuracy(chosen, rejected)
        rewards = {"chosen_reward": chosen, "rejected_reward": rejected}
        return {"accuracy": accuracy, "reward_margin": chosen - rejected, **rewards}

    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:
        """Return the implicit rewards of both completions: beta times the log-ratio to the reference."""
        rewards, prompts = (self.beta * self.log_ratios(batch)).tolist(), batch.prompts
        return [
            {"index": int(prompts.index[i]), "prompt": prompts.text[i], "chosen": pair[0], "rejected": pair[1]}
            for i, pair in enumerate(rewards)
        ]


class IPO(DPO):
    """Identity preference optimization: loss `(margin - 1 / (2 beta))^2`. Azar et al., 2024, arXiv 2310.12036."""

    def pair_loss(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """Loss of each pair."""
        return F.ipo_loss(margin, self.beta)


def reward_margin(log_ratios: Float[Tensor, "pairs 2"]) -> Float[Tensor, " pairs"]:
    """Return the log-ratio of the chosen completion minus that of the rejected one."""
    return log_ratios[:, 0] - log_ratios[:, 1]
