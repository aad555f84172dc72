"""DPO: learning from pairs directly, without a reward model and without sampling.

Rafailov et al., 2023, arXiv 2305.18290. `IPO` shows how a variant overrides one equation.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.algorithms.reward_modeling import pairwise_accuracy
from lit_rlhf.data import TextData
from lit_rlhf.models.policy import Policy, Reference
from lit_rlhf.training.checks import data_module
from lit_rlhf.training.monitor import raise_on_all_ranks
from lit_rlhf.types import Preferences


class DPO(Algorithm):
    """Direct preference optimization: loss `-log sigmoid(beta * margin)`.

    The margin is `log pi(chosen) / ref(chosen) - log pi(rejected) / ref(rejected)`, of whole completions. The
    reference's log-probabilities are computed once for the data set, before the first step.

    Args:
        policy: See `Algorithm`. As it is at the start, it is also the reference.
        beta: How dear the distance from the reference is, typically 0.05 to 0.5.
        **options: See `Algorithm`.

    Raises:
        ValueError: If beta is not above 0.
    """

    record = Preferences
    reference: Reference

    def __init__(self, policy: str | Policy, beta: float = 0.1, **options: Any) -> None:
        super().__init__(policy, **options)
        if not (beta > 0 and math.isfinite(beta)):
            raise ValueError(f"beta={beta} must be a number above 0: at 0 nothing is learned")
        self.beta = beta
        self.reference_logprobs: dict[int, Tensor] = {}  # by the pair's index
        self.held_out_reference: dict[int, Tensor] = {}

    def pair_loss(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """The term of each pair."""
        return F.dpo_loss(margin, self.beta)

    def training_step(self, batch: Preferences, batch_idx: int) -> Tensor:
        """Return the loss of a batch of pairs."""
        index, reference = batch.prompts.index.tolist(), None
        if self.reference_logprobs:
            reference = torch.stack([self.reference_logprobs[i] for i in index]).to(self.device)
        gained = self.log_ratios(batch, reference)
        self._log("train", gained.detach())
        terms = self.pair_loss(margin(gained))
        return self.reduce(terms, torch.ones_like(terms, dtype=torch.bool))

    def log_ratios(self, batch: Preferences, reference: Tensor | None = None) -> Float[Tensor, "pairs 2"]:
        """`log pi(y|x) / ref(y|x)` of the chosen and of the rejected completions, with gradient."""
        if reference is None:
            reference = F.masked_sum(self.reference.logprobs(batch.prompts, batch), batch.mask)
        return F.masked_sum(self.policy.logprobs(batch.prompts, batch), batch.mask) - reference

    def _log(self, prefix: str, gained: Tensor) -> None:
        chosen, rejected = (self.beta * gained).unbind(1)
        metrics = {
            f"{prefix}/accuracy": pairwise_accuracy(chosen, rejected),
            f"{prefix}/reward_margin": (chosen - rejected).mean(),
            f"{prefix}/chosen_reward": chosen.mean(),
            f"{prefix}/rejected_reward": rejected.mean(),
        }
        if prefix != "train":  # the base logs the loss of an update
            metrics[f"{prefix}/loss"] = self.pair_loss(margin(gained)).mean()
        self.log_dict(metrics, batch_size=len(gained), sync_dist=True)

    # The reference

    def setup(self, stage: str) -> None:
        """See `Algorithm`; forget what the reference said of other data."""
        super().setup(stage)
        self.held_out_reference = {}

    def configure_model(self) -> None:
        """Load the policy and keep what it is now as the reference."""
        super().configure_model()
        if not hasattr(self, "reference"):
            self.reference = self.policy.reference()

    def on_validation_start(self) -> None:
        """Move the reference to the device."""
        self.policy.probe()
        self.reference.to(self.device, next(self.policy.parameters()).dtype)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_start(self) -> None:
        """Compute the reference's log-probabilities, in the order of the data, each rank its share."""
        self.on_validation_start()
        self.reference_logprobs = {}
        data = data_module(self)
        trial = getattr(self.trainer, "fast_dev_run", False)
        if trial or not isinstance(data, TextData):  # or a loader of the user's own: the reference is asked every step
            return
        own: dict[int, Tensor] = {}
        shown = self.trainer.is_global_zero and self.trainer.progress_bar_callback is not None
        batches = track(data.in_order(data.train_set), "scoring pairs", transient=True, disable=not shown)
        with raise_on_all_ranks(self), self.trainer.precision_plugin.train_step_context():
            for batch in batches:
                batch = batch.to(self.device)
                logprobs = F.masked_sum(self.reference.logprobs(batch.prompts, batch), batch.mask)
                own.update(zip(batch.prompts.index.tolist(), logprobs.cpu(), strict=True))
        for rank in self.gather(own):
            self.reference_logprobs.update(rank)
        rank_zero_info(f"the reference has scored {len(self.reference_logprobs)} pairs")

    # Validation

    def validation_step(self, batch: Preferences, batch_idx: int) -> None:
        """Log `val/loss`, `val/accuracy` (the share of pairs whose chosen completion gained more) and the rewards."""
        self._log("val", self.held_out_log_ratios(batch))

    def test_step(self, batch: Preferences, batch_idx: int) -> None:
        """Log the same under `test/`."""
        self._log("test", self.held_out_log_ratios(batch))

    def held_out_log_ratios(self, batch: Preferences) -> Float[Tensor, "pairs 2"]:
        """`log_ratios` of held-out pairs, which are validated again and again: the reference is asked once."""
        index, kept = batch.prompts.index.tolist(), self.held_out_reference
        if any(i not in kept for i in index):
            asked = F.masked_sum(self.reference.logprobs(batch.prompts, batch), batch.mask)
            kept.update(zip(index, asked.cpu(), strict=True))
        return self.log_ratios(batch, torch.stack([kept[i] for i in index]).to(self.device))

    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:
        """Return what the policy makes of both completions: beta times the log-ratio to the reference."""
        rewards, prompts = (self.beta * self.log_ratios(batch)).tolist(), batch.prompts
        return [
            {"index": int(prompts.index[i]), "prompt": prompts.text[i], "chosen": pair[0], "rejected": pair[1]}
            for i, pair in enumerate(rewards)
        ]


class IPO(DPO):
    """Identity preference optimization: loss `(margin - 1 / (2 beta))^2`. Azar et al., 2024, arXiv 2310.12036."""

    def pair_loss(self, margin: Float[Tensor, " pairs"]) -> Float[Tensor, " pairs"]:
        """The term of each pair."""
        return F.ipo_loss(margin, self.beta)


def margin(gained: Float[Tensor, "pairs 2"]) -> Float[Tensor, " pairs"]:
    """How much more the chosen completion gained."""
    return gained[:, 0] - gained[:, 1]
