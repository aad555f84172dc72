"""KTO: learn from completions that are marked as desirable or not, one at a time, without pairs and without sampling.

Ethayarajh et al., 2024, arXiv 2402.01306, section 4.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.dpo import DPO
from lit_rlhf.errors import InputError
from lit_rlhf.training import method_checks
from lit_rlhf.training.distributed import gather_over_ranks
from lit_rlhf.types import Demonstrations, Metrics


class KTO(DPO):
    """Kahneman-Tversky optimization: loss `1 - sigmoid(s beta (log pi(y|x) / ref(y|x) - z))`.

    With s = 1 for desirable completions and -1 for others, and z the KL to the reference, without gradient: the mean
    log-ratio of completions of other prompts, at least 0.

    Args:
        *args: See `DPO`.
        label_column: Column of the data that is true for desirable completions.
        desirable_weight: Weight of desirable completions.
        undesirable_weight: Weight of the others. The paper advises that weight times number of desirable completions
            is 1 to 4/3 times that of the others.
        **kwargs: See `DPO`.

    Raises:
        ValueError: If a weight is not above 0; at `fit`, if a label is missing or no truth value, or a batch has one
            row.
    """

    batch_type = Demonstrations

    def __init__(
        self,
        *args: Any,
        label_column: str = "label",
        desirable_weight: float = 1.0,
        undesirable_weight: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
        for name, value in weights.items():
            if not (value > 0 and math.isfinite(value)):
                raise InputError(f"{name}={value} must be a number above 0")
        self.label_column = label_column
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight

    def setup(self, stage: str) -> None:
        """Check the labels of all rows before a model is loaded."""
        super().setup(stage)
        data = self.data_module
        for name in ("train_set", "val_set"):
            for i, row in enumerate(getattr(data, name, None) or ()):
                method_checks.check_label(row.example.columns, self.label_column, f"row {i} of {name}")
        rows = getattr(data, "train_set", None) or ()
        labels = {method_checks.read_label(row.example.columns[self.label_column]) for row in rows}
        if stage == "fit" and len(labels) == 1:
            rank_zero_warn(
                f"{self.label_column} is {str(labels.pop()).lower()} in every row of the training data: KTO is meant "
                "for both kinds, and the weight of the other has no effect"
            )
        if stage == "fit" and getattr(data, "batch_size", 2) < 2:
            raise InputError("KTO compares with the completions of other prompts: give data.batch_size of 2 or more")

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt and the longest completion together: they may become a pair."""
        sets = [getattr(self.data_module, name, None) or () for name in ("train_set", "val_set")]
        lengths = [[(len(row.prompt), len(row.completions[0])) for row in rows] for rows in sets if rows]
        return max((sum(map(max, zip(*rows, strict=True))) for rows in lengths), default=0)

    def training_step(self, batch: Demonstrations, batch_idx: int) -> Tensor:
        """Return the loss of a batch of completions."""
        kl = self.mismatched_kl(batch)
        self.log("train/kl_estimate", kl, batch_size=1)
        log_ratios, desirable = self.training_log_ratios(batch)[:, 0], self.labels(batch)
        terms = self.completion_loss(log_ratios, kl, desirable)
        return self.reduce_loss(terms, torch.ones_like(desirable))

    def completion_loss(
        self, log_ratios: Float[Tensor, " rows"], kl: Float[Tensor, ""], desirable: Bool[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Loss of each completion."""
        losses = F.kto_loss(log_ratios, kl, desirable, self.beta)
        return losses * torch.where(desirable, self.desirable_weight, self.undesirable_weight)

    @torch.no_grad()
    def mismatched_kl(self, batch: Demonstrations) -> Float[Tensor, ""]:
        """Return the mean over all ranks of `log pi / ref` of the next prompt's completion, at least 0."""
        log_ratios = self.log_ratios(with_next_completions(self.trainer, batch))[:, 0]
        total, count = self.sum_over_ranks(torch.stack([log_ratios.sum(), torch.ones_like(log_ratios).sum()]))
        kl: Tensor = torch.where(count > 1, total / count, 0.0)  # a lone completion has no other
        return kl.clamp(min=0)

    def labels(self, batch: Demonstrations) -> Bool[Tensor, " rows"]:
        """Return True for desirable completions."""
        labels = [method_checks.read_label(label) for label in batch.prompts.columns[self.label_column]]
        return torch.tensor(labels, device=batch.tokens.device)

    def held_out_metrics(self, batch: Demonstrations) -> Metrics:
        """Return loss, accuracy (whether the log-ratio is on the label's side of the KL) and rewards of completions."""
        log_ratios, desirable = self.held_out_log_ratios(batch)[:, 0], self.labels(batch)
        kl = self.mismatched_kl(batch)
        rewards, every = self.beta * log_ratios, torch.ones_like(desirable)
        return {
            "loss": (self.completion_loss(log_ratios, kl, desirable), every),
            "accuracy": (((log_ratios > kl) == desirable).to(rewards), every),
            "desirable_reward": (rewards, desirable),
            "undesirable_reward": (rewards, ~desirable),
        }

    def predict_step(self, batch: Demonstrations, batch_idx: int) -> list[dict[str, Any]]:
        """Return the implicit reward of each completion: beta times the log-ratio to the reference."""
        rewards, prompts = (self.beta * self.log_ratios(batch)[:, 0]).tolist(), batch.prompts
        return [
            {"index": int(prompts.index[i]), "prompt": prompts.text[i], "reward": reward}
            for i, reward in enumerate(rewards)
        ]


def with_next_completions(trainer: Trainer, batch: Demonstrations) -> Demonstrations:
    """Return a batch with the completion of each next row, in the batch of all ranks; the first follows the last.

    Collective.
    """
    own = {"tokens": batch.tokens, "mask": batch.mask, "learned": batch.loss_mask}
    ranks = gather_over_ranks(trainer, {name: tensor[:1].cpu() for name, tensor in own.items()})
    following = ranks[(trainer.global_rank + 1) % len(ranks)]
    length = max(batch.tokens.shape[2], following["tokens"].shape[2])
    rows = {name: (tensor[1:], following[name].to(tensor.device)) for name, tensor in own.items()}
    padded = {
        name: [torch.nn.functional.pad(tensor, (0, length - tensor.shape[2])) for tensor in parts]
        for name, parts in rows.items()
    }
    return batch.replace(**{name: torch.cat(parts) for name, parts in padded.items()})
