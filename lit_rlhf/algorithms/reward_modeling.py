"""Reward modelling: learn a score for completions from pairs of a preferred and a rejected one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.errors import InputError
from lit_rlhf.evaluation.metrics import pairwise_accuracy
from lit_rlhf.models.adapters import merged
from lit_rlhf.models.classifiers import read_config
from lit_rlhf.models.loading import check_vocabulary
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.scalar import ScalarModel
from lit_rlhf.tokenization import pad_token_id
from lit_rlhf.training.held_out import HeldOutMetrics
from lit_rlhf.types import Metrics, Preferences


class RewardModeling(HeldOutMetrics, Algorithm):
    """Train a reward model: `-log sigmoid(r(chosen) - r(rejected))`, Bradley and Terry, 1952.

    Training starts from a causal language model (usually the SFT policy) with a new head of one output, which is read
    at the EOS token of each completion. The export is a sequence-classification folder that
    `lit_rlhf.rewards.RewardModel` and `transformers` load. Back to Basics, appendix C: learning rate 1e-5, one epoch.

    Args:
        policy: The model to start from: a hub id or a folder.
        **options: See `Algorithm`.
    """

    batch_type = Preferences
    reward_model: ScalarModel
    export_prefix = "reward_model.model."
    merges_adapter = True

    def __init__(self, policy: str, **options: Any) -> None:
        super().__init__(policy, **options)
        if isinstance(policy, Policy):
            raise InputError("RewardModeling starts from a folder or a hub id: save the policy first, with policy.save")

    def check_pretrained(self) -> None:
        """Check that the model to start from is a decoder, and has one label if it is a reward model."""
        read_config(self.pretrained, f"the model {self.pretrained!r}", **self.load_options)

    def configure_model(self) -> None:
        """Load the trunk of the policy and give it a head of one output, near zero at the start."""
        if "reward_model" in self._modules:
            return
        reward_model = ScalarModel.from_pretrained(self.pretrained, self.lora, **self.load_options)
        reward_model.config.pad_token_id = pad_token_id(self.tokenizer)
        check_vocabulary(reward_model.classifier, self.tokenizer)
        self._check_positions(reward_model.config, "model")
        self.reward_model = reward_model
        self.checkpoint_layers(reward_model)

    def scores(self, batch: Preferences) -> Float[Tensor, "prompts samples"]:
        """Score both completions of each pair, with their prompt computed once."""
        return self.reward_model.score(batch.prompts, batch)

    def training_step(self, batch: Preferences, batch_idx: int) -> Tensor:
        """Return the Bradley-Terry loss of a batch of pairs."""
        chosen, rejected = self.scores(batch).unbind(1)
        accuracy = pairwise_accuracy(chosen, rejected).mean()
        self.log("train/accuracy", accuracy, prog_bar=True, sync_dist=True, batch_size=1)
        return self.reduce_loss(F.bradley_terry_loss(chosen, rejected), torch.ones_like(chosen, dtype=torch.bool))

    def held_out_metrics(self, batch: Preferences) -> Metrics:
        """Return the loss and the accuracy, the fraction of pairs in the right order (a tie counts half)."""
        chosen, rejected = self.scores(batch).unbind(1)
        pairs = torch.ones_like(chosen, dtype=torch.bool)
        accuracy = pairwise_accuracy(chosen, rejected)
        return {"loss": (F.bradley_terry_loss(chosen, rejected), pairs), "accuracy": (accuracy, pairs)}

    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:
        """Score both completions of each pair."""
        scores, prompts = self.scores(batch).tolist(), batch.prompts
        return [
            {"index": int(prompts.index[i]), "prompt": prompts.text[i], "chosen": pair[0], "rejected": pair[1]}
            for i, pair in enumerate(scores)
        ]

    def save_model(self, folder: Path) -> None:
        """Write the sequence-classification folder, an adapter merged into its model."""
        model = self.reward_model.model
        model = merged(model) if isinstance(model, PeftModel) else model
        model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(folder)
