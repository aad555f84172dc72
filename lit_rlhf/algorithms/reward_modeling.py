"""Reward modelling: a score for completions, learned from pairs in which people preferred one to the other."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.evaluation.metrics import pairwise_accuracy
from lit_rlhf.models.attention import use_cpu_attention
from lit_rlhf.models.loading import add_lora, check_vocabulary, disable_dropout, is_adapter, resolve
from lit_rlhf.models.policy import Policy
from lit_rlhf.tokenization import pad_token_id
from lit_rlhf.types import Preferences


class RewardModeling(Algorithm):
    """Train a reward model: `-log sigmoid(r(chosen) - r(rejected))`, Bradley and Terry, 1952.

    It starts from a causal language model (usually the SFT policy) with a new head of one output, reads the EOS token
    at the end of each completion as policies write it, and exports a sequence-classification folder that
    `lit_rlhf.rewards.RewardModel` and `transformers` load. Back to Basics, appendix C: learning rate 1e-5, one epoch.

    Args:
        policy: What to start from: a hub id or a folder.
        **options: See `Algorithm`.
    """

    batch_type = Preferences
    reward_model: PreTrainedModel | PeftModel
    export_prefix = "reward_model."

    def __init__(self, policy: str, **options: Any) -> None:
        super().__init__(policy, **options)
        if isinstance(policy, Policy):
            raise ValueError("RewardModeling starts from a folder or a hub id: save the policy first, with policy.save")

    def setup(self, stage: str) -> None:
        """Refuse what can't be started from, before it is loaded."""
        super().setup(stage)
        if is_adapter(name := resolve(self.pretrained)):
            raise ValueError(
                f"{name!r} is an adapter, and a reward model starts from a whole model: merge it first, with "
                "lit-rlhf export --ckpt_path last.ckpt --out FOLDER --merge true"
            )

    def configure_model(self) -> None:
        """Load the trunk of the policy and give it a head of one output, near zero at the start."""
        if "reward_model" in self._modules:
            return
        name = resolve(self.pretrained)
        options = {"dtype": torch.float32, **self.load_options, "num_labels": 1}
        model = AutoModelForSequenceClassification.from_pretrained(name, **options)
        model.config.pad_token_id = pad_token_id(self.tokenizer)
        check_vocabulary(model, self.tokenizer)
        self._check_positions(model.config, "model")
        if self.lora is not None:  # the head is trained, for which the bfloat16 of a frozen trunk is too coarse
            model.score.float().register_forward_pre_hook(in_its_own_dtype)
        self.reward_model = model if self.lora is None else add_lora(model, {"task_type": "SEQ_CLS", **self.lora})
        disable_dropout(self.reward_model)
        use_cpu_attention(self.reward_model)
        self.reward_model.train()

    def scores(self, batch: Preferences) -> Float[Tensor, "prompts samples"]:
        """Score both completions of each pair."""
        n, k, _ = batch.tokens.shape
        pad = pad_token_id(self.tokenizer)
        prompts = [ids[mask] for ids, mask in zip(batch.prompts.tokens, batch.prompts.mask, strict=True)]
        rows = [torch.cat([prompts[i], batch.tokens[i, j][batch.mask[i, j]]]) for i in range(n) for j in range(k)]
        ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad)
        lengths = torch.tensor([len(row) for row in rows], device=ids.device)
        mask = torch.arange(ids.shape[1], device=ids.device) < lengths.unsqueeze(1)
        logits = self.reward_model(input_ids=ids, attention_mask=mask.long()).logits
        return F.at_least_float32(logits).view(n, k)

    def training_step(self, batch: Preferences, batch_idx: int) -> Tensor:
        """Return the Bradley-Terry loss of a batch of pairs."""
        chosen, rejected = self.scores(batch).unbind(1)
        self.log("train/accuracy", pairwise_accuracy(chosen, rejected), prog_bar=True, sync_dist=True, batch_size=1)
        return self.reduce_loss(F.bradley_terry_loss(chosen, rejected), torch.ones_like(chosen, dtype=torch.bool))

    def validation_step(self, batch: Preferences, batch_idx: int) -> None:
        """Log `val/loss` and `val/accuracy`, the share of pairs in the right order (a tie is half)."""
        self._evaluate("val", batch)

    def test_step(self, batch: Preferences, batch_idx: int) -> None:
        """Log the same under `test/`."""
        self._evaluate("test", batch)

    def _evaluate(self, prefix: str, batch: Preferences) -> None:
        chosen, rejected = self.scores(batch).unbind(1)
        metrics = {
            f"{prefix}/loss": F.bradley_terry_loss(chosen, rejected).mean(),
            f"{prefix}/accuracy": pairwise_accuracy(chosen, rejected),
        }
        self.log_dict(metrics, batch_size=len(chosen), sync_dist=True, prog_bar=True)

    def predict_step(self, batch: Preferences, batch_idx: int) -> list[dict[str, Any]]:
        """Score both completions of each pair."""
        scores, prompts = self.scores(batch).tolist(), batch.prompts
        return [
            {"index": int(prompts.index[i]), "prompt": prompts.text[i], "chosen": pair[0], "rejected": pair[1]}
            for i, pair in enumerate(scores)
        ]

    def save_model(self, folder: Path) -> None:
        """Write the sequence-classification folder, an adapter merged into its model."""
        model = self.reward_model
        if isinstance(model, PeftModel):
            model = copy.deepcopy(model).merge_and_unload()
        model.save_pretrained(str(folder))
        self.tokenizer.save_pretrained(folder)


def in_its_own_dtype(layer: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
    """Give a layer its input in the precision of its weight."""
    return (args[0].to(next(layer.parameters()).dtype),)
