"""Exact resume: everything that a checkpoint needs to continue bitwise from any training step.

Between two updates that are also between two rollouts, weights, optimizer state and Lightning's counters are enough.
Elsewhere something is in flight: accumulated gradients and loss sums inside an update, the rollout and its running
metrics inside a rollout. `InFlight` is that record, one per rank. Lightning's own counters need two corrections,
`fix_loop_progress` and `rescale_progress`.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping
from torch import Tensor, nn
from torch.optim import Optimizer

from lit_rlhf import functional as F
from lit_rlhf.errors import InputError
from lit_rlhf.models.sharding import from_local, local
from lit_rlhf.training.optimization import LossSums
from lit_rlhf.types import Prompts, Rollout


@dataclass(frozen=True)
class StepLayout:
    """How training steps make up rollouts and updates.

    Attributes:
        steps_per_rollout: Training steps on one rollout: minibatches x sample minibatches x update epochs.
        accumulate_grad_batches: Training steps per update.
    """

    steps_per_rollout: int
    accumulate_grad_batches: int

    def __str__(self) -> str:
        return " and ".join(f"{name}={value}" for name, value in dataclasses.asdict(self).items())


@dataclass
class InFlight:
    """What one rank needs beyond weights, optimizer state and loop counters.

    Attributes:
        gradients: Accumulated gradients by parameter name; empty between two updates.
        loss_sums: Loss terms of the update in progress; None between two updates.
        rollout: The rollout in progress, as `Rollout.state` returns it; None between two rollouts.
        metric_sums: Sums and counts of the loss metrics of the rollout so far.
        phase_seconds: Seconds of the rollout so far, by phase.
    """

    gradients: dict[str, Tensor] = field(default_factory=dict)
    loss_sums: LossSums | None = None
    rollout: dict[str, Any] | None = None
    metric_sums: dict[str, Tensor] = field(default_factory=dict)
    phase_seconds: dict[str, float] = field(default_factory=dict)

    def add_update(self, parameters: Iterable[tuple[str, nn.Parameter]], loss_sums: LossSums) -> None:
        """Capture the update in progress: copies of the gradients on the CPU, and the loss sums."""
        self.gradients = {name: local(p.grad).cpu().clone() for name, p in parameters if p.grad is not None}
        self.loss_sums = dataclasses.replace(loss_sums)

    def add_rollout(
        self, rollout: Rollout, metric_sums: Mapping[str, Tensor], phase_seconds: Mapping[str, float]
    ) -> None:
        """Capture the rollout in progress."""
        self.rollout = rollout.state()
        self.metric_sums = {name: sums.cpu() for name, sums in metric_sums.items()}
        self.phase_seconds = dict(phase_seconds)

    def restore_update(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> LossSums:
        """Put the gradients back in place and return the loss sums; empty ones between two updates."""
        for name, parameter in parameters:
            if name in self.gradients:
                parameter.grad = from_local(self.gradients[name], parameter)
        self.gradients, loss_sums, self.loss_sums = {}, self.loss_sums, None
        return loss_sums or LossSums()

    def restore_rollout(
        self, rollout_type: type[Rollout], prompts: Prompts, device: torch.device, some: bool = False
    ) -> tuple[Rollout, dict[str, Tensor]]:
        """Return the rollout of these prompts, or of `some` of them, and the metric sums.

        Raises:
            ValueError: If the rollout was collected for other prompts.
        """
        assert self.rollout is not None
        rollout = rollout_type.from_state(self.rollout, prompts.to("cpu"), some).to(device)
        metric_sums = {name: sums.to(F.float64_device(device)) for name, sums in self.metric_sums.items()}
        self.drop_rollout()
        return rollout, metric_sums

    def drop_rollout(self) -> None:
        """Drop the rollout: it has been restored, or the end of its epoch has cut it off."""
        self.rollout, self.metric_sums, self.phase_seconds = None, {}, {}

    def state_dict(self) -> dict[str, Any]:
        """Return plain data for a checkpoint, without the fields that are empty."""
        state = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        if self.loss_sums is not None:
            state["loss_sums"] = dataclasses.asdict(self.loss_sums)
        return {name: value for name, value in state.items() if value}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Any]) -> InFlight:
        """Rebuild the record."""
        loss_sums = LossSums(**state["loss_sums"]) if "loss_sums" in state else None
        return cls(**{**state, "loss_sums": loss_sums})


def save_progress(checkpoint: dict[str, Any], layout: StepLayout, in_flight: list[dict[str, Any]]) -> None:
    """Add the step layout and what is in flight on each rank to a checkpoint."""
    checkpoint["step_layout"] = dataclasses.asdict(layout)
    checkpoint["in_flight"] = in_flight


def load_progress(checkpoint: dict[str, Any], layout: StepLayout, world_size: int, rank: int) -> InFlight:
    """Return what was in flight on this rank, and make Lightning's counters fit the layout of the resumed run.

    Raises:
        ValueError: If something was in flight, and the number of processes or the layout has changed.
    """
    if "in_flight" not in checkpoint:
        raise InputError("the checkpoint was written by an older or another program, so its run can't be resumed")
    ranks = checkpoint["in_flight"]
    before = StepLayout(**checkpoint.get("step_layout", dataclasses.asdict(layout)))
    if not any(ranks):
        if "loops" in checkpoint:
            steps = before.steps_per_rollout, layout.steps_per_rollout
            rescale_progress(checkpoint["loops"]["fit_loop"], *steps)
        return InFlight()
    if before != layout:
        raise InputError(
            f"the checkpoint was saved in the middle of an update or a rollout, with {before} (steps_per_rollout is "
            f"num_minibatches x sample_minibatches x update_epochs), and this run has {layout}: resume with the same "
            "options, or from a checkpoint between two rollouts"
        )
    if len(ranks) != world_size:
        raise InputError(
            f"the checkpoint was saved in the middle of an update by {len(ranks)} processes, and there are "
            f"{world_size} now: resume with as many, or from a checkpoint between two updates"
        )
    return InFlight.from_state_dict(ranks[rank])


def save_identity(checkpoint: dict[str, Any], algorithm: str, start: str) -> None:
    """Add the algorithm and the fingerprint of the model that its training started from to a checkpoint."""
    checkpoint["algorithm"], checkpoint["start"] = algorithm, start


def check_identity(checkpoint: Mapping[str, Any], algorithm: str, start: str) -> None:
    """Check that a checkpoint belongs to this run.

    Args:
        checkpoint: The checkpoint.
        algorithm: Name of the algorithm that resumes; empty if the checkpoint is only evaluated.
        start: Fingerprints of the models that this run starts from, as far as anything depends on them.

    Raises:
        ValueError: If it was written by another algorithm, or its run started from other weights.
    """
    written_by, started = checkpoint.get("algorithm", algorithm), checkpoint.get("start", "")
    if algorithm and written_by != algorithm:
        raise InputError(
            f"the checkpoint was written by {written_by}, and this run is {algorithm}: resume with --model "
            f"{written_by}, or start from its policy by --model.policy"
        )
    now, before = set(start.split()), set(started.split())
    if not (now <= before or before <= now):
        raise InputError(
            "the checkpoint's run started from a policy, or a reference, with other weights than this one's, and the "
            "KL is measured against them: give the --model.policy, --model.reference and --model.load of that run; if "
            "a folder has been replaced, restore it"
        )


def check_weights(parameters: Iterable[tuple[str, nn.Parameter]], state_dict: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint holds every trained weight: else it is of another model or of other LoRA options.

    Raises:
        ValueError: If one is missing or has another shape.
    """
    trained = {name: p for name, p in parameters if p.requires_grad}
    missing = [name for name, p in trained.items() if name not in state_dict or state_dict[name].shape != p.shape]
    if missing:
        raise InputError(
            f"the checkpoint has no weights for {missing[0]!r} of shape {tuple(trained[missing[0]].shape)} "
            f"({len(missing)} are missing): it was written by another algorithm, policy or `lora`; resume with the "
            "options of the run that wrote it"
        )


def keep_patience(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Keep the patience that `EarlyStopping` was given, which its state in a checkpoint would replace."""
    for callback in getattr(trainer, "callbacks", ()):
        if isinstance(callback, EarlyStopping) and callback.state_key in checkpoint.get("callbacks", {}):
            checkpoint["callbacks"][callback.state_key]["patience"] = callback.patience


def fix_loop_progress(fit_loop: dict[str, Any]) -> None:
    """Make a checkpoint resume at the very next batch if `max_steps` or a stop has ended the run.

    Lightning counts the epoch as complete if it was cut short, and as begun if its last batch was the last step.
    """
    epochs, batches = fit_loop["epoch_progress"], fit_loop["epoch_loop.batch_progress"]
    if epochs["current"]["processed"] != epochs["current"]["ready"] or not epochs["current"]["ready"]:
        return  # in the middle of an epoch, or before the first one
    if batches["is_last_batch"]:
        batches["current"] = dict.fromkeys(batches["current"], 0)
        batches["is_last_batch"] = False
    else:
        for progress in (epochs["current"], epochs["total"]):
            progress["processed"] -= 1
    for progress in (epochs["current"], epochs["total"]):
        progress["completed"] = progress["processed"]


def count_begun_epoch(epochs: Any) -> None:
    """Count the epoch of the batch that starts as begun.

    Lightning forgets that where a run resumes after the last batch of the epoch before: its next checkpoint would seem
    to be of a complete epoch.
    """
    for progress in (epochs.current, epochs.total):
        if progress.ready == progress.processed:
            progress.ready += 1
            progress.started += 1


def rescale_progress(fit_loop: dict[str, Any], before: int, now: int) -> None:
    """Convert the step count of the epoch to another number of steps per rollout, between two rollouts.

    Args:
        fit_loop: The state of Lightning's fit loop, changed in place.
        before: Steps per rollout of the run that wrote the checkpoint.
        now: Steps per rollout of this run.
    """
    done = fit_loop["epoch_loop.batch_progress"]["current"]
    rollouts = done["processed"] // before
    for name in done:  # "ready" and "started" may be one step ahead of "completed"
        done[name] += rollouts * (now - before)


class UpdateStart:
    """The state at the start of an update, to return to after an error before its optimizer step.

    Args:
        optimizers: Weights and optimizer states are not copied, only watched.
        buffers: Tensors that training changes in place.
        running_state: Numbers that training changes.
    """

    def __init__(
        self, optimizers: Sequence[Optimizer], buffers: Iterable[Tensor], running_state: dict[str, Any]
    ) -> None:
        self.running_state = running_state
        self._buffers = [(buffer, buffer.clone()) for buffer in buffers]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        states = [state for optimizer in optimizers for state in optimizer.state.values()]
        tensors = [p for group in groups for p in group["params"]]
        tensors += [value for state in states for value in state.values() if isinstance(value, Tensor)]
        self._versions = [(shard, shard._version) for shard in map(local, tensors)]

    def restore_buffers(self) -> bool:
        """Restore the buffers; return False if a weight or an optimizer state has changed."""
        for buffer, kept in self._buffers:
            buffer.copy_(kept)
        return all(tensor._version == version for tensor, version in self._versions)


@contextlib.contextmanager
def restore_on_error(buffers: Sequence[Tensor], statistics: Mapping[str, Any]) -> Iterator[None]:
    """Restore the state if the body raises, so that a checkpoint saved then holds nothing of the failed step.

    Args:
        buffers: Tensors that the body may change in place.
        statistics: Dataclasses of numbers that the body may change in place.
    """
    before = [buffer.clone() for buffer in buffers]
    numbers = {name: dict(vars(record)) for name, record in statistics.items()}
    try:
        yield
    except BaseException:
        for buffer, kept in zip(buffers, before, strict=True):
            buffer.copy_(kept)
        for name, record in statistics.items():
            vars(record).update(numbers[name])
        raise
