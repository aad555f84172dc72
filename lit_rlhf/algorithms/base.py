"""The base of every algorithm: its model, its optimizer, its checkpoints and its export."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Callable
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
from lit_rlhf.models.loading import check_causal_lm, unwrapped
from lit_rlhf.models.offload import OPTIONS, check_offload
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.pretrained import load_tokenizer
from lit_rlhf.models.quantized import check_can_train, check_unsharded
from lit_rlhf.models.scalar import ScalarModel
from lit_rlhf.training.checkpointing import CheckpointHooks
from lit_rlhf.training.checks import check_positions, check_processes
from lit_rlhf.training.diagnosis import check_chat_prompts
from lit_rlhf.training.distributed import gather_over_ranks, raise_on_all_ranks, sum_over_ranks
from lit_rlhf.training.exporting import ExportHooks
from lit_rlhf.training.finite import (
    SkippedUpdates,
    check_finite_weights,
    scaler_overflows,
    stop_after_skipped_updates,
    update_problems,
)
from lit_rlhf.training.guards import Guards
from lit_rlhf.training.lightning_callbacks import check_callbacks
from lit_rlhf.training.optimization import (
    LossSums,
    check_optimized,
    check_step_size,
    check_trainable,
    check_updates_shards,
    enable_fused_adam,
    gradient_norms,
    scale_gradients,
)
from lit_rlhf.training.options import OptimizationOptions
from lit_rlhf.training.schedules import Warmup, check_schedule
from lit_rlhf.training.strategies import FSDP2Strategy
from lit_rlhf.training.timing import peak_memory
from lit_rlhf.types import Record


class Algorithm(Guards, ExportHooks, CheckpointHooks, ABC):
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
        gradient_checkpointing: Whether layers of trained models keep only their input and are computed again in the
            backward pass: less memory for one more forward pass, with the same result.
        max_skipped_updates: Number of updates in a row without a finite loss and gradient, after which the run stops.
            Each of them is skipped.

    Raises:
        ValueError: If `max_skipped_updates` is below 1.
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
        gradient_checkpointing: bool = False,
        max_skipped_updates: int = 3,
    ) -> None:
        super().__init__()
        policy = getattr(policy, "_orig_mod", policy)  # of torch.compile
        if max_skipped_updates < 1:
            raise InputError(f"max_skipped_updates={max_skipped_updates} must be at least 1")
        self.max_skipped_updates = max_skipped_updates
        self.lora, self.load_options = lora, dict(load or {})
        self.gradient_checkpointing = gradient_checkpointing
        self.make_optimizer, self.make_lr_scheduler = optimizer, lr_scheduler
        self.seed, self._continues_text = 0, False
        self.strict_loading = False  # checkpoints do not hold the weights under an adapter
        self._skipped = self.running_statistics["skipped_updates"] = SkippedUpdates()
        self._problems: list[str] = []  # what was not finite in the last update
        self._suspect: dict[str, Any] | None = None
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
            self.check_pretrained()
            self._tokenizer = load_tokenizer(self.pretrained, **self.load_options)
        return self._tokenizer

    def check_pretrained(self) -> None:
        """Check the model to start from by its configuration, before the data are encoded.

        Raises:
            ValueError: If it is of another kind.
        """
        check_causal_lm(self.pretrained, **self.load_options)

    def setup(self, stage: str) -> None:
        """Take the run's seed, which determines all randomness, and check the Trainer.

        Raises:
            ValueError: If the Trainer's processes or callbacks don't fit.
        """
        trainer = self.trainer
        check_processes(trainer.strategy, trainer.world_size, trainer.num_devices, trainer.num_nodes)
        sharded, device = isinstance(trainer.strategy, FSDP2Strategy), trainer.strategy.root_device
        check_unsharded(self.load_options, sharded)
        check_offload([name for name in OPTIONS if getattr(self, name, False)], device, sharded, trainer.world_size)
        if stage == "fit":
            check_callbacks(trainer)
        self._resumed = None
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        self._continues_text = check_chat_prompts(self.tokenizer, self.data_module, stage)

    def configure_model(self) -> None:
        """Load the policy, after the data have been checked.

        Raises:
            ValueError: If a row of the data is longer than the policy's positions.
        """
        if "policy" not in self._modules:
            self.policy = Policy.from_pretrained(self.pretrained, self.lora, **self.load_options)
        unwrapped(self.policy)
        self._check_positions(self.policy.causal_lm.config, "policy")
        self.checkpoint_layers(self.policy)

    def checkpoint_layers(self, model: Policy | ScalarModel) -> None:
        """Choose gradient checkpointing for a model that is trained."""
        model.model_forward.checkpoint(self.gradient_checkpointing)

    @property
    def longest_row(self) -> int:
        """Tokens of the longest sequence that the models read, without what is sampled."""
        return getattr(self.data_module, "max_sequence_length", 0)

    def _check_positions(self, config: Any, role: str) -> None:
        check_positions(config, role, self.longest_row, self.max_new_tokens)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters to train, as groups with a name, the policy's first."""
        return [{"name": "policy", "params": [p for p in self.parameters() if p.requires_grad]}]

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the trainable parameters, and its schedule."""
        policy = self._modules.get("policy")
        check_can_train(self._trained_model, loaded=not isinstance(policy, Policy) or policy.loaded)
        groups = self.parameter_groups()
        check_trainable(groups, loaded_adapter=isinstance(self._trained_model, PeftModel))
        check_optimized(self.named_parameters(), groups)
        optimizer = self.make_optimizer(groups)
        check_updates_shards(optimizer, sharded=isinstance(self.trainer.strategy, FSDP2Strategy))
        with raise_on_all_ranks(self.trainer):  # which may have different shards
            check_step_size(optimizer, has_adapter=isinstance(self._trained_model, PeftModel))
        enable_fused_adam(optimizer)
        rates = [group["lr"] for group in optimizer.param_groups]
        if self.make_lr_scheduler is None:
            self.keep_options(OptimizationOptions(optimizer, None, rates))
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        check_schedule(scheduler)
        if isinstance(scheduler, Warmup):
            updates = self.trainer.estimated_stepping_batches
            scheduler.plan(int(updates) if math.isfinite(updates) else 0)
        self.keep_options(OptimizationOptions(optimizer, scheduler, rates))
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
        """Start timing."""
        self.training_timer.start()
        super().on_train_batch_start(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Rescale gradients from the assumed to the actual number of loss terms.

        The update is skipped if there are none, or if the loss or a gradient is not finite. A step without gradients
        changes nothing, not even the optimizer's state.
        """
        sums, self._loss_sums = self._loss_sums, LossSums()
        norms = gradient_norms(optimizer, self.device)
        broken = ~torch.stack(list(norms.values())).isfinite().all()
        local = torch.tensor([sums.total, sums.count], dtype=torch.float32, device=self.device)
        total, count, ranks_broken = self.sum_over_ranks(torch.cat([local, broken.float().view(1)])).tolist()
        problems = self.rollout_problems()
        if not math.isfinite(total):  # on all ranks alike
            ranks = gather_over_ranks(self.trainer, {"problems": problems})
            problems = list(dict.fromkeys(name for rank in ranks for name in rank["problems"]))
        self._problems = update_problems(total, ranks_broken == 0, optimizer, problems)
        overflow = scaler_overflows(self.trainer, self._problems)
        if not overflow:
            self._skipped.count(self._problems, self.trainer.global_step)
        metrics: dict[str, Any] = {"train/skipped_updates": float(self._skipped.total)}
        if count == 0 or (self._problems and not overflow):
            if count == 0:
                rank_zero_warn("no completion of this update counts: the update is skipped")
            optimizer.zero_grad(set_to_none=True)
        else:
            factor = sums.assumed_count * self.trainer.accumulate_grad_batches * self.trainer.world_size / count
            scale_gradients(optimizer, factor)
            metrics |= {f"train/{name}": factor * norm for name, norm in norms.items() if not overflow}
            metrics |= {"train/loss": total / count, "train/lr": optimizer.param_groups[0]["lr"]}
        self.log_dict(metrics, batch_size=1)

    def rollout_problems(self) -> list[str]:
        """Return the names of numbers that the update was computed from and that are not finite."""
        return []

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        """Make the update and check the new weights."""
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        check_finite_weights(optimizer, self.trainer.global_step, self.sum_over_ranks)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log step time, total training time and peak memory; stop after too many skipped updates."""
        timings = self.phase_timings(self.training_timer.stop(), batch_idx)
        total = {"time/total": self.training_timer.seconds}
        self.log_dict({**timings, **total, **peak_memory(self.device)}, batch_size=1)
        if not math.isfinite(self._loss_sums.total) and self._suspect is None:
            self._suspect = self.inspected(batch)  # the first of the batches that accumulate into an update
        if self._loss_sums.assumed_count == 0:  # after an update
            suspect, self._suspect = self._suspect or self.inspected(batch), None
            stop_after_skipped_updates(self._skipped, self.max_skipped_updates, self.trainer, self._problems, suspect)

    def inspected(self, batch: Any) -> dict[str, Any]:
        """Return what the loss of a step was computed from, for a file that is written if the run stops."""
        return {"batch": batch}

    def phase_timings(self, seconds: float, batch_idx: int) -> dict[str, float]:
        """Return the timings to log after a step of this many seconds."""
        return {"time/train": seconds}

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        return sum_over_ranks(self.trainer, values)
