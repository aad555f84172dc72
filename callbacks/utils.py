"""Helpers that several callbacks share."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_rlhf import functional as F
from lit_rlhf.training.files import run_folder
from lit_rlhf.types import Rollout

__all__ = [
    "RolloutCallback",
    "completion_kl",
    "concatenate_over_ranks",
    "format_number",
    "is_fast_dev_run",
    "run_folder",
    "scalar_metrics",
    "survive_full_disk",
    "validated_in_fit",
]


class RolloutCallback(Callback):
    """Callback with one more hook: `on_rollout`, called once per rollout; never for methods that do not sample."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call `on_rollout` after the training step that collected a rollout."""
        rollout: Rollout | None = getattr(pl_module, "rollout", None)
        if rollout is not None and batch_idx % getattr(pl_module, "steps_per_rollout", 1) == 0:
            self.on_rollout(trainer, pl_module, rollout)

    def on_rollout(self, trainer: Trainer, pl_module: LightningModule, rollout: Rollout) -> None:
        """Handle a new rollout, at the end of its first training step."""


def completion_kl(rollout: Rollout) -> Float[Tensor, "prompts samples"]:
    """KL(policy || reference) of each completion in nats: k1, summed over tokens; NaN without a reference."""
    completions = rollout.completions
    if rollout.reference_logprobs is None:
        return torch.full_like(rollout.rewards, torch.nan)
    return F.masked_sum(F.kl_k1(completions.logprobs, rollout.reference_logprobs), completions.mask)


def concatenate_over_ranks(
    trainer: Trainer, values: Float[Tensor, " completions"]
) -> Float[Tensor, " all_completions"]:
    """Concatenate the values of all ranks, in float32."""
    values = values.detach().float()
    return torch.cat(gather_all_tensors(values)) if trainer.world_size > 1 else values


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Return whether this is a `fast_dev_run`, which writes no files."""
    return bool(getattr(trainer, "fast_dev_run", False))


@contextlib.contextmanager
def survive_full_disk(name: str) -> Iterator[None]:
    """Warn if a file that training can do without can't be written."""
    try:
        yield
    except OSError as error:
        rank_zero_warn(f"{name} could not be written ({error.strerror or error}); training continues")


def validated_in_fit(trainer: Trainer) -> bool:
    """Return whether the validation that just ended belongs to `fit` and is not the sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def format_number(value: float | None) -> str:
    """Format a number for display: three significant digits, or all integer digits from 1000 to 1e7.

    Values below 5e-5 in magnitude show as 0, missing and NaN values as -.
    """
    if value is None or value != value:
        return "-"
    return "0" if abs(value) < 5e-5 else f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def scalar_metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    """Return the metrics logged so far whose names start with `prefix`."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
