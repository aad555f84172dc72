"""Updates whose loss or gradient is not finite: each is skipped and counted; after a few in a row the run stops."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lit_rlhf.errors import InputError
from lit_rlhf.models.sharding import is_sharded, local
from lit_rlhf.training.checkpoint_files import write_durably
from lit_rlhf.training.files import run_folder
from lit_rlhf.types import Record, Rollout

ROLLOUT_FIELDS = (
    "reference_logprobs", "rewards", "token_rewards", "returns", "old_values", "value_targets", "advantages",
)  # fmt: skip
"""Fields of a rollout that are checked. Old log-probabilities are NaN until they are known."""


@dataclass
class SkippedUpdates:
    """Number of updates that were skipped because something was not finite.

    Attributes:
        total: All of them, over the whole run.
        in_a_row: Those since the last update that was made.
    """

    total: int = 0
    in_a_row: int = 0

    def count(self, problems: list[str], update: int) -> None:
        """Count an update by what was not finite in it: nothing if it is made. Warn about the first."""
        if not problems:
            self.in_a_row = 0
            return
        self.total, self.in_a_row = self.total + 1, self.in_a_row + 1
        if self.total == 1:
            rank_zero_warn(
                f"update {update} is skipped: its {' and '.join(problems)} is not finite (NaN or infinite); "
                "train/skipped_updates counts such updates"
            )


def nonfinite_fields(rollout: Rollout) -> list[str]:
    """Return the names of a rollout's numbers that are not finite where they count. Waits for the device once."""
    valid = rollout.valid
    numbers = {"log-probabilities": rollout.completions.logprobs}
    for name in ROLLOUT_FIELDS:
        if (value := getattr(rollout, name, None)) is not None:
            numbers[name.replace("_", " ").replace("logprobs", "log-probabilities")] = value
    finite = [(v.isfinite() | ~(valid if v.ndim == 2 else rollout.loss_mask)).all() for v in numbers.values()]
    return [name for name, ok in zip(numbers, torch.stack(finite).tolist(), strict=True) if not ok]


def is_finite(state: Mapping[str, Any]) -> bool:
    """Return whether all numbers in nested dicts are finite."""
    return all(
        is_finite(v) if isinstance(v, Mapping) else not isinstance(v, float) or math.isfinite(v) for v in state.values()
    )


def update_problems(loss: float, gradients_finite: bool, optimizer: Optimizer, rollout: list[str]) -> list[str]:
    """Return the names of what is not finite in an update; empty on all ranks or on none.

    Args:
        loss: Sum of the loss terms over all ranks; NaN if a rollout has a number that is not finite.
        gradients_finite: Whether all gradients are finite, on all ranks.
        optimizer: Its learning rates are checked.
        rollout: Names of the numbers of the rollout that are not finite, on any rank.
    """
    rates = [group["lr"] for group in optimizer.param_groups]
    checks = {
        "loss": math.isfinite(loss),
        "gradient": gradients_finite,
        "learning rate": all(math.isfinite(rate) for rate in rates if not isinstance(rate, Tensor)),
    }
    return rollout or [name for name, finite in checks.items() if not finite]


def scaler_overflows(trainer: Trainer, problems: list[str]) -> bool:
    """Return whether the gradient only overflows under the loss scale of 16-mixed, which the scaler then lowers.

    At a scale of 1 or less it overflows without the scaler's doing.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return problems == ["gradient"] and scaler is not None and scaler.get_scale() > 1


def check_finite_weights(optimizer: Optimizer, update: int, sum_over_ranks: Callable[[Tensor], Tensor]) -> None:
    """Check the trained weights after an update. Call it on all ranks.

    Args:
        optimizer: Has the weights, or this rank's shards of them.
        update: Its number, for the message.
        sum_over_ranks: Sums a tensor over all ranks; called for shards only.

    Raises:
        ValueError: If one is not finite, on all ranks. It is too late to save a checkpoint.
    """
    parameters = [p.detach() for group in optimizer.param_groups for p in group["params"]]
    weights = [shard for shard in map(local, parameters) if shard.numel()]
    broken = (~torch.nn.utils.get_total_norm(weights, norm_type=math.inf).isfinite()).float()
    if any(map(is_sharded, parameters)):
        broken = sum_over_ranks(broken)
    if broken > 0:
        raise InputError(
            f"update {update} left weights that are not finite (NaN or infinite): resume from an earlier "
            "checkpoint with a lower learning rate, and train float32 weights"
        )


def stop_after_skipped_updates(
    skipped: SkippedUpdates, limit: int, trainer: Trainer, problems: list[str], inspected: Mapping[str, Any]
) -> None:
    """Stop the run if too many updates in a row were skipped, and write what the last one was computed from.

    Call it on all ranks, after a complete training step, so that the state can be saved.

    Args:
        skipped: The count.
        limit: Number in a row that ends the run.
        trainer: The Trainer.
        problems: What was not finite in the last update.
        inspected: What to write.

    Raises:
        ValueError: If `limit` is reached.
    """
    if not problems or skipped.in_a_row < limit:
        return
    path = run_folder(trainer) / f"skipped_update_rank{trainer.global_rank}.pt"
    try:
        write_durably(path, lambda file: torch.save(plain(dict(inspected)), file))
        batch = f"is in {path}"
    except OSError as failed:
        batch = f"could not be written ({failed.strerror})"
    error = InputError(
        f"{limit} updates in a row were skipped, the last because its {' and '.join(problems)} is not finite (NaN or "
        f"infinite): the weights are those before them, and the batch {batch}; lower the learning rate or clip "
        "gradients, and look for extreme rewards and rows; max_skipped_updates sets the limit"
    )
    error.on_all_ranks = True  # type: ignore[attr-defined]  # a checkpoint can be saved together
    raise error


def plain(value: Any) -> Any:
    """Return nested dicts and lists of CPU tensors, numbers and strings for records, which torch.load reads safely."""
    if isinstance(value, Tensor):
        return value.detach().cpu().clone()
    if isinstance(value, Record):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)
