"""The base of every algorithm: its model, its optimizer, its checkpoints and its export."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedTokenizerBase

from lit_rlhf.errors import InputError
from lit_rlhf.models.export import snapshot, write_folder
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.policy import Policy
from lit_rlhf.training.checkpointing import CheckpointHooks
from lit_rlhf.training.checks import check_batch_type, check_positions
from lit_rlhf.training.distributed import sum_over_ranks
from lit_rlhf.training.optimization import (
    LossSums,
    check_step_size,
    check_trainable,
    enable_fused_adam,
    gradient_norms,
    scale_gradients,
)
from lit_rlhf.training.schedules import Warmup
from lit_rlhf.training.timing import peak_memory
from lit_rlhf.types import Record


class Algorithm(CheckpointHooks, ABC):
    """An algorithm that trains a language model.

    Args:
        policy: Hub id or folder of a model or a PEFT adapter, `testbed` for the shipped model, or a `lit_rlhf.Policy`
            in memory.
        lora: Options of `peft.LoraConfig` to train an adapter, such as `{"r": 16, "lora_alpha": 32}`; without it all
            weights are trained.
        load: Options of `from_pretrained`, such as `{"dtype": "bfloat16"}`. Weights load in float32 by default.
        optimizer: Factory of the optimizer. Typical learning rates: 1e-6 to 1e-5 for all weights, 1e-5 to 1e-4 for
            LoRA.
        lr_scheduler: Factory of the learning-rate schedule, stepped at every update; constant by default.
    """

    policy: Policy
    batch_type: type[Record] | None = None
    """Type of the batches that the data module must yield."""
    max_new_tokens = 0
    """Maximum number of tokens sampled after a prompt."""

    def __init__(
        self,
        policy: str | Policy,
        lora: dict[str, Any] | None = None,
        load: dict[str, Any] | None = None,
        optimizer: OptimizerCallable = lambda params: torch.optim.AdamW(params, lr=1e-5, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
    ) -> None:
        super().__init__()
        self.lora, self.load_options = lora, dict(load or {})
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.seed = 0
        self.strict_loading = False  # checkpoints do not hold the weights under an adapter
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self.pretrained = "" if isinstance(policy, Policy) else str(policy)
        if isinstance(policy, Policy):
            if lora is not None or load:
                raise InputError("`lora` and `load` are for a policy loaded here: give them to lit_rlhf.Policy")
            self.policy = policy
            self._tokenizer = policy.tokenizer

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, made by `reduce_loss`."""

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded on first use and without the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.pretrained, **self.load_options)
        return self._tokenizer

    @property
    def data_module(self) -> Any:
        """The data module of the run; None without one or outside a run."""
        return getattr(self._trainer, "datamodule", None)

    def setup(self, stage: str) -> None:
        """Take the run's seed, which determines all randomness, and check the type of the data.

        Raises:
            ValueError: If the data module yields another type of batch.
        """
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        check_batch_type(type(self).__name__, self.batch_type, self.data_module)

    def configure_model(self) -> None:
        """Load the policy, after the data have been checked.

        Raises:
            ValueError: If a row of the data is longer than the policy's positions.
        """
        if "policy" not in self._modules:
            self.policy = Policy.from_pretrained(self.pretrained, self.lora, **self.load_options)
        self._check_positions(self.policy.causal_lm.config, "policy")

    def _check_positions(self, config: Any, role: str) -> None:
        check_positions(config, role, getattr(self.data_module, "max_sequence_length", 0), self.max_new_tokens)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters to train, as groups with a name, the policy's first."""
        return [{"name": "policy", "params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the trainable parameters, and its schedule."""
        groups = self.parameter_groups()
        check_trainable(groups, loaded_adapter=isinstance(self._trained_model, PeftModel))
        optimizer = self.make_optimizer(groups)
        check_step_size(optimizer, has_adapter=isinstance(self._trained_model, PeftModel))
        enable_fused_adam(optimizer)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, Warmup):
            updates = self.trainer.estimated_stepping_batches
            scheduler.plan(int(updates) if math.isfinite(updates) else 0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # The update: one mean over all loss terms, however they are split into steps and ranks

    def reduce_loss(
        self, terms: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], assumed_count: float | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss of a training step: its share of the mean over all terms of the update.

        The mean runs over every step that accumulates into the update, on every rank. Their number is not known yet, so
        the sum is divided by an assumed count, which `on_before_optimizer_step` corrects.

        Args:
            terms: The loss of each completion, pair or token.
            mask: True where a term counts.
            assumed_count: Approximate number of terms per step, equal on all ranks; the batch size by default.
        """
        return self._loss_sums.add(
            terms, mask, assumed_count or float(getattr(self.data_module, "batch_size", None) or 1)
        )

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start timing; free the gradients of the last update, which would add to the memory of the forward pass."""
        self.training_timer.start()
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad(set_to_none=True)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Rescale gradients from the assumed to the actual number of loss terms; skip the update if there are none."""
        sums = torch.tensor([self._loss_sums.total, self._loss_sums.count], dtype=torch.float32, device=self.device)
        total, count = self.sum_over_ranks(sums).tolist()
        assumed_count, self._loss_sums = self._loss_sums.assumed_count, LossSums()
        if count == 0:
            rank_zero_warn("no completion of this update counts (no reward scored one): the update is skipped")
            optimizer.zero_grad(set_to_none=True)
            return
        scale_gradients(
            optimizer, assumed_count * self.trainer.accumulate_grad_batches * self.trainer.world_size / count
        )
        norms = {f"train/{name}": norm for name, norm in gradient_norms(optimizer).items()}
        rate = optimizer.param_groups[0]["lr"]
        self.log_dict({"train/loss": total / count, "train/lr": rate, **norms}, batch_size=1)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log step time, total training time and peak memory."""
        timings = self.phase_timings(self.training_timer.stop(), batch_idx)
        total = {"time/total": self.training_timer.seconds}
        self.log_dict({**timings, **total, **peak_memory(self.device)}, batch_size=1)

    def phase_timings(self, seconds: float, batch_idx: int) -> dict[str, float]:
        """Return the timings to log after a step of this many seconds."""
        return {"time/train": seconds}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        return sum_over_ranks(self.trainer, values)

    def export(self, folder: str | Path) -> None:
        """Write the trained model as a folder that `transformers` or PEFT loads. Call it on all ranks."""
        if self.trainer.is_global_zero:
            write_folder(Path(folder), self.save_model)
        self.trainer.strategy.barrier("export")

    def save_model(self, folder: Path) -> None:
        """Write the model's files into a folder."""
        self.policy.save(folder)

    def export_snapshot(self) -> dict[str, Any]:
        """Return everything that an export needs besides the weights."""
        found = snapshot(self._trained_model, self.tokenizer)
        if "policy" in self._modules and not self.policy.loaded:
            return {**found, "source": ""}
        revision = self.load_options.get("revision") if found["source"] == self.pretrained else None
        return {**found, "revision": revision}
