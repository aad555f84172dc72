"""What every method shares: its model, its optimizer, what its checkpoints hold and how it is exported."""

from __future__ import annotations

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from torch import Tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from lit_rlhf.models.export import snapshot, write_folder
from lit_rlhf.models.loading import load_tokenizer
from lit_rlhf.models.policy import Policy
from lit_rlhf.training.checks import check_positions, check_record, data_module
from lit_rlhf.training.monitor import now, peak_memory
from lit_rlhf.training.schedules import Warmup
from lit_rlhf.types import Record


class Algorithm(LightningModule, ABC):
    """A method that trains a language model.

    Args:
        policy: A hub id, a folder (a model or a PEFT adapter), `testbed` for the shipped one, or a
            `lit_rlhf.Policy` in memory.
        lora: Options of `peft.LoraConfig` to train an adapter, such as `{"r": 16, "lora_alpha": 32}`; all weights are
            trained without it.
        load: Options of `from_pretrained`, such as `{"dtype": "bfloat16"}`. Weights are float32 unless told.
        optimizer: Makes the optimizer of the parameters. Typical learning rates: 1e-6 to 1e-5 for all weights, 1e-5 to
            1e-4 for LoRA.
        lr_scheduler: Makes the schedule of the optimizer, stepped at every update; none: a constant rate.
    """

    policy: Policy
    record: type[Record] | None = None
    """What it learns from: what the data module must yield."""
    trained = "policy.model."
    """Prefix in the module's `state_dict` of the model that an export writes."""
    repeats = 1
    """Training steps that share one batch of the data module (R)."""
    max_new_tokens = 0
    """Tokens that it may write behind a prompt."""

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
        self.strict_loading = False  # weights under an adapter are in no checkpoint
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._snapshot: dict[str, Any] | None = None
        self._total, self._counted = 0.0, 0  # the terms of this update so far: their sum, and how many
        self._step_began: float | None = None  # while a step is under way
        self.seconds = 0.0  # of training so far
        self._updates_loaded: int | None = None  # updates of the run whose checkpoint, or whose outcome, is evaluated
        self._planned = 0.0  # what the sum of each step of this update is divided by
        self._resumed: dict[str, Any] = {}  # what a checkpoint holds for this rank, until it is put in place
        self.source = "" if isinstance(policy, Policy) else str(policy)
        if isinstance(policy, Policy):
            if lora is not None or load:
                raise ValueError("`lora` and `load` are for a policy that is loaded here: give them to lit_rlhf.Policy")
            self.policy = policy
            self._tokenizer = policy.tokenizer

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The policy's tokenizer, loaded on first use and without the model."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.source, **self.load_options)
        return self._tokenizer

    def setup(self, stage: str) -> None:
        """Take the run's seed: the address of all randomness, kept in checkpoints. Check that the data fit.

        Raises:
            ValueError: If the data module yields something else than what the method learns from.
        """
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", 0))
        check_record(self)

    def configure_model(self) -> None:
        """Load the policy, once the data have been found fit for use.

        Raises:
            ValueError: If a row of the data is longer than the policy has positions.
        """
        if "policy" not in self._modules:
            self.policy = Policy.from_pretrained(self.source, self.lora, **self.load_options)
        check_positions(self, self.policy.causal_lm.config, "policy")

    def parameter_groups(self) -> list[dict[str, Any]]:
        """What the optimizer trains, as groups with a name; the policy's comes first."""
        return [{"name": "policy", "params": [p for p in self.parameters() if p.requires_grad]}]

    @property
    def updates_done(self) -> int:
        """Updates of the weights so far; outside `fit`, without a count, the checkpoint's or the last fit's."""
        return self.trainer.global_step if self._updates_loaded is None else self._updates_loaded

    @abstractmethod
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        """Return the loss of a batch, made by `reduce`."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Note when a step begins; let go of the gradients of an update that is done, which nothing reads any more.

        Lightning keeps them through the forward pass, where they would come on top of its activations.
        """
        self._step_began = now()
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self.zero_grad(set_to_none=True)

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Log the seconds of a step and of all steps so far, by which those of any number of updates can be told."""
        before, self.seconds = self.seconds, self._seconds_so_far
        self._step_began, took = None, self.seconds - before
        told = {**self.phase_timings(took, batch_idx), "time/total": self.seconds, **peak_memory(self.device)}
        self.log_dict(told, batch_size=1)

    @property
    def _seconds_so_far(self) -> float:
        """Of training, with the step that is under way."""
        return self.seconds if self._step_began is None else self.seconds + now() - self._step_began

    def phase_timings(self, took: float, batch_idx: int) -> dict[str, float]:
        """What to log of the seconds of a step: forward, backward and update."""
        return {"time/train": took}

    def configure_optimizers(self) -> Any:
        """Build the optimizer of the trainable parameters, and its schedule."""
        groups = self.parameter_groups()
        for group in groups:
            if not group["params"]:
                cure = ": give `lora` to train a new adapter"
                if isinstance(self.policy.model, PeftModel):
                    cure = ": load its adapter with is_trainable=True"
                raise ValueError(f"the {group['name']} has no trainable parameter{cure * (group['name'] == 'policy')}")
        optimizer = self.make_optimizer(groups)
        check_precision(optimizer, has_adapter=isinstance(self._trained_model, PeftModel))
        enable_fused_adam(optimizer)
        if self.make_lr_scheduler is None:
            return optimizer
        scheduler = self.make_lr_scheduler(optimizer)
        if isinstance(scheduler, Warmup):
            updates = self.trainer.estimated_stepping_batches
            scheduler.plan(int(updates) if math.isfinite(updates) else 0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    # One mean over all terms of an update, however they are cut into steps and spread over ranks

    def reduce(
        self, terms: Float[Tensor, "*shape"], mask: Bool[Tensor, "*shape"], planned: float | None = None
    ) -> Float[Tensor, ""]:
        """Return the loss of a training step: a share of the mean of the terms that count.

        The mean is over the whole update: every step that accumulates into it, on every rank. How many terms that will
        be is not known yet, so the sum is divided by a planned number, and `on_before_optimizer_step` corrects it.

        Args:
            terms: The loss of each completion, pair or token.
            mask: True where a term counts.
            planned: About how many terms a step has, the same on all ranks; by default as many as rows are asked for.
        """
        self._planned = self._planned or planned or float(getattr(data_module(self), "batch_size", 1))
        total = terms.masked_fill(~mask, 0.0).sum()
        self._total += float(total.detach())
        self._counted += int(mask.sum())
        return total / self._planned

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Turn the planned divisor of the gradients into the counted one; with nothing counted, leave the weights."""
        sums = torch.tensor([self._total, self._counted], dtype=torch.float32, device=self.device)
        total, counted = self.sum_over_ranks(sums).tolist()
        planned, self._planned, self._total, self._counted = self._planned, 0.0, 0.0, 0
        groups = [[p for p in group["params"] if p.grad is not None] for group in optimizer.param_groups]
        if counted == 0:
            rank_zero_warn("no completion of this update counts (no reward has an opinion): the update is skipped")
            optimizer.zero_grad(set_to_none=True)
            return
        factor = planned * self.trainer.accumulate_grad_batches * self.trainer.world_size / counted
        metrics: dict[str, Any] = {"train/loss": total / counted, "train/lr": optimizer.param_groups[0]["lr"]}
        for group, parameters in zip(optimizer.param_groups, groups, strict=True):
            for parameter in parameters:
                if factor != 1:
                    parameter.grad.mul_(factor)
            norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
            owner = "" if group is optimizer.param_groups[0] else f"{group['name']}_"
            metrics[f"train/{owner}grad_norm"] = norm
        self.log_dict(metrics, batch_size=1)

    def sum_over_ranks(self, values: Tensor) -> Tensor:
        """Add up a tensor of all ranks."""
        if self.trainer.world_size == 1:
            return values
        return self.trainer.strategy.reduce(values, reduce_op="sum")

    # What is saved

    def export(self, folder: str | Path) -> None:
        """Write the trained model as a folder that `transformers` or PEFT loads. To be called on all ranks."""
        if self.trainer.is_global_zero:
            write_folder(Path(folder), self.save_model)
        self.trainer.strategy.barrier("export")

    def save_model(self, folder: Path) -> None:
        """Write the model's files into a folder."""
        self.policy.save(folder)

    @property
    def _trained_model(self) -> PreTrainedModel | PeftModel:
        return cast("PreTrainedModel | PeftModel", self.get_submodule(self.trained.removesuffix(".")))

    def snapshot(self) -> dict[str, Any]:
        """Return what an export needs beside the weights."""
        told = snapshot(self._trained_model, self.tokenizer)
        if "policy" in self._modules and not self.policy.loaded:
            return {**told, "source": ""}
        revision = self.load_options.get("revision") if told["source"] == self.source else None  # of an id on the hub
        return {**told, "revision": revision}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the trained model, the seed, what an export needs, and what is under way; no other frozen weights.

        Of an adapter the trained model is the adapter, otherwise all of the model, some layers of which may be frozen.
        """
        frozen = {n for n, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}
        if not isinstance(self._trained_model, PeftModel):
            frozen = {name for name in frozen if not name.startswith(self.trained)}
        checkpoint["state_dict"] = {n: v for n, v in checkpoint["state_dict"].items() if n not in frozen}
        checkpoint["seed"], checkpoint["seconds"], checkpoint["pace"] = self.seed, self._seconds_so_far, self._pace
        self._snapshot = self._snapshot or self.snapshot()
        checkpoint["export"] = {"prefix": self.trained, **self._snapshot}
        checkpoint["ranks"] = self.gather(self.in_flight_state(self._steps_done))

    def in_flight_state(self, steps_done: int) -> dict[str, Any]:
        """Return what this rank must keep to go on from here: inside an update, its gradients."""
        if steps_done % self.trainer.accumulate_grad_batches == 0:
            return {}
        gradients = {n: p.grad.cpu() for n, p in self.named_parameters() if p.grad is not None}
        return {"gradients": gradients, "total": self._total, "counted": self._counted, "planned": self._planned}

    @property
    def _pace(self) -> dict[str, int]:
        """By what steps make up rollouts and updates."""
        return {"repeats": self.repeats, "accumulate_grad_batches": self.trainer.accumulate_grad_batches}

    @property
    def _steps_done(self) -> int:
        """Training steps of this epoch that are done; the Trainer's own count, which a resume continues."""
        return int(cast(Any, self.trainer.fit_loop.epoch_loop.batch_progress.current).processed)

    def gather(self, state: dict[Any, Any]) -> list[dict[Any, Any]]:
        """Return the states of all ranks, by rank."""
        if self.trainer.world_size == 1:
            return [state]
        states: list[Any] = [None] * self.trainer.world_size
        torch.distributed.all_gather_object(states, state)
        return states

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take back what was saved, and mend the place to go on from."""
        self.seed = checkpoint.get("seed", self.seed)
        self.seconds = checkpoint.get("seconds", 0.0)
        self._updates_loaded = checkpoint.get("global_step")
        self._check_weights(checkpoint["state_dict"])
        if "loops" in checkpoint:
            fix_loop_progress(checkpoint["loops"]["fit_loop"])
        ranks = checkpoint.get("ranks", [{}])
        trainer = self._trainer
        if trainer is None or trainer.state.fn != TrainerFn.FITTING:
            return
        before = checkpoint.get("pace", self._pace)
        if not any(ranks):
            if "loops" in checkpoint:
                rescale_progress(checkpoint["loops"]["fit_loop"], before["repeats"], self.repeats)
            return
        if before != self._pace:
            told = [" and ".join(f"{name}={value}" for name, value in pace.items()) for pace in (before, self._pace)]
            raise ValueError(
                f"the checkpoint was saved in the middle of an update or a rollout, with {told[0]} (repeats are "
                f"minibatches x sample_minibatches x epochs), and now it is {told[1]}: resume with what it was, or "
                "from a checkpoint between two rollouts"
            )
        if len(ranks) != trainer.world_size:
            raise ValueError(
                f"the checkpoint was saved in the middle of an update by {len(ranks)} processes, and there are "
                f"{trainer.world_size} now: resume with as many, or from a checkpoint between two updates"
            )
        self._resumed = ranks[trainer.global_rank]

    def on_train_start(self) -> None:
        """Put the gradients of a resumed update back in place; find out now whether the model can be saved."""
        self._updates_loaded = None
        self._snapshot = self._snapshot or self.snapshot()
        if "policy" in self._modules:
            self.policy.new_adapter = False  # to the next method its reference is what this one leaves
        self._total, self._counted = self._resumed.pop("total", 0.0), self._resumed.pop("counted", 0)
        self._planned = self._resumed.pop("planned", 0.0)
        gradients = self._resumed.pop("gradients", {})
        for name, parameter in self.named_parameters():
            if name in gradients:
                parameter.grad = gradients[name].to(parameter.device)

    def on_fit_end(self) -> None:
        """Keep the number of updates, for a Trainer that evaluates what has been trained."""
        self._updates_loaded = self.trainer.global_step

    def _check_weights(self, state_dict: Mapping[str, Tensor]) -> None:
        """Raise if the checkpoint lacks a trained weight: it is of another model, or of other LoRA options."""
        missing = [n for n, p in self.named_parameters() if p.requires_grad and n not in state_dict]
        if missing:
            raise ValueError(
                f"the checkpoint has no weights for {missing[0]!r} ({len(missing)} are missing): it was written by "
                "another method, policy or `lora`; resume with the options of the run that wrote it"
            )


def fix_loop_progress(fit_loop: dict[str, Any]) -> None:
    """Make a checkpoint resume at the very next batch where `max_steps` or a stop has ended the run.

    Lightning then counts the epoch as done when it was cut short, and as begun when its last batch was the last step.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] != epochs["current"]["ready"]:
        return
    if batches["is_last_batch"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    else:
        for progress in (epochs["current"], epochs["total"]):
            progress["processed"] -= 1
    for progress in (epochs["current"], epochs["total"]):
        progress["completed"] = progress["processed"]


def rescale_progress(fit_loop: dict[str, Any], before: int, now: int) -> None:
    """Make a checkpoint from between two rollouts count its epoch in rollouts of as many steps as they have now."""
    done = fit_loop["epoch_loop.batch_progress"]["current"]
    rollouts = done["processed"] // before
    for name in done:  # that a step has begun may be counted, and not yet that it is complete
        done[name] += rollouts * (now - before)


def enable_fused_adam(optimizer: Optimizer) -> None:
    """Let Adam, where the choice is left open, go over weights and moments once, and not once for each operation.

    The result is the same to rounding. That it is not given to the constructor keeps unscaling, and with it the
    clipping of gradients, with Lightning.
    """
    if not isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        return
    for group in optimizer.param_groups:
        plain = all(type(p.data) is Tensor and p.device.type in ("cpu", "cuda") for p in group["params"])
        if plain and group["fused"] is None and group["foreach"] is None and not group["differentiable"]:
            group["fused"] = True


def check_precision(optimizer: Optimizer, has_adapter: bool = False) -> None:
    """Refuse weights in bfloat16 that the learning rate cannot move.

    An Adam step changes a weight by about the learning rate; bfloat16 rounds away changes below 1/512 of the weight.

    Raises:
        ValueError: If most steps would be rounded away.
    """
    for group in optimizer.param_groups:
        weights = [p.detach() for p in group["params"] if p.dtype == torch.bfloat16 and p.numel()]
        medians = [weight.abs().float().median() for weight in weights]
        coarse = [size for size in medians if size > 0]  # half of a new adapter is 0, which any step moves
        if not coarse:
            continue
        needed = float(torch.stack(coarse).median()) / 512
        rate = max(group["lr"], group.get("initial_lr", 0.0))
        if rate < needed:
            raise ValueError(
                f"the trained weights are bfloat16, and a learning rate of {rate:g} is too small to move them (about "
                f"{needed:.1g} is needed): load them in float32 with --trainer.precision bf16-mixed"
                f"{'' if has_adapter else ', or train `lora`'}"
            )
