"""Base of the methods that learn from completions with a label, true or false, without pairs."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf.algorithms.offline import OfflineAlgorithm
from lit_rlhf.training import method_checks
from lit_rlhf.types import Demonstrations, Metrics


class UnpairedAlgorithm(OfflineAlgorithm):
    """An algorithm that compares the log-ratio of each completion with a reference point, by the completion's label.

    Args:
        *args: See `OfflineAlgorithm`.
        label_column: Column of the data that is true for desirable completions.
        **kwargs: See `OfflineAlgorithm`.

    Raises:
        ValueError: At `fit`, if a label is missing or no truth value.
    """

    batch_type = Demonstrations

    def __init__(self, *args: Any, label_column: str = "label", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.label_column = label_column

    # What a method overrides

    @abstractmethod
    def reference_point(self, batch: Demonstrations) -> Float[Tensor, ""]:
        """Return the log-ratio that separates desirable completions from others; called without gradient."""

    def held_out_reference_point(self, batch: Demonstrations) -> Float[Tensor, ""]:
        """Return the reference point in validation and test; override it if `reference_point` depends on the batch."""
        return self.reference_point(batch)

    @abstractmethod
    def completion_loss(
        self, log_ratios: Float[Tensor, " rows"], reference_point: Float[Tensor, ""], desirable: Bool[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Return the loss of each completion."""

    # Training and validation

    def training_step(self, batch: Demonstrations, batch_idx: int) -> Tensor:
        """Return the loss of a batch of completions."""
        desirable = self.labels(batch)
        with torch.no_grad():
            point = self.reference_point(batch)
        self.log("train/reference_point", point, batch_size=1)
        terms = self.completion_loss(self.training_log_ratios(batch)[:, 0], point, desirable)
        method_checks.check_row_losses(f"{type(self).__name__}.completion_loss", terms, len(desirable))
        return self.reduce_loss(terms, torch.ones_like(desirable))

    def held_out_metrics(self, batch: Demonstrations) -> Metrics:
        """Return loss, accuracy (whether the log-ratio is on the label's side of the reference point) and rewards."""
        log_ratios, desirable = self.held_out_log_ratios(batch)[:, 0], self.labels(batch)
        point = self.held_out_reference_point(batch)
        rewards, every = self.beta * log_ratios, torch.ones_like(desirable)
        losses = self.completion_loss(log_ratios, point, desirable)
        method_checks.check_row_losses(f"{type(self).__name__}.completion_loss", losses, len(desirable))
        return {
            "loss": (losses, every),
            "accuracy": (((log_ratios > point) == desirable).to(rewards), every),
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

    # Labels

    def labels(self, batch: Demonstrations) -> Bool[Tensor, " rows"]:
        """Return True for desirable completions."""
        columns, name = batch.prompts.columns, self.label_column
        rows = [{name: label} for label in columns.get(name, ())] or [columns]  # a loader's may have no labels
        for row in rows:
            method_checks.check_label(type(self).__name__, row, name, "a batch")
        return torch.tensor([method_checks.read_label(row[name]) for row in rows], device=batch.tokens.device)

    def setup(self, stage: str) -> None:
        """Check the labels of all rows before a model is loaded."""
        super().setup(stage)
        if stage == "predict":
            return
        name = type(self).__name__
        for which in ("train_set", "val_set"):
            for i, row in enumerate(getattr(self.data_module, which, None) or ()):
                method_checks.check_label(name, row.example.columns, self.label_column, f"row {i} of {which}")
        rows = getattr(self.data_module, "train_set", None) or ()
        labels = {method_checks.read_label(row.example.columns[self.label_column]) for row in rows}
        if stage == "fit" and len(labels) == 1:
            rank_zero_warn(
                f"{self.label_column} is {str(labels.pop()).lower()} in every row of the training data: {name} is "
                "meant for both kinds"
            )
