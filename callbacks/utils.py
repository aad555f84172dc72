"""What several callbacks need."""

from __future__ import annotations

from pathlib import Path

import torch
from jaxtyping import Float
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torchmetrics.utilities.distributed import gather_all_tensors

from lit_rlhf import functional as F
from lit_rlhf.types import Rollout


def run_folder(trainer: Trainer) -> Path:
    """Where this run writes: the first logger's folder, else `default_root_dir`. Call it on all ranks.

    Loggers of a service have no folder of a run's own: what they call theirs may be the working directory.
    """
    local = bool(trainer.loggers) and isinstance(trainer.loggers[0], TensorBoardLogger | CSVLogger)
    return Path((trainer.log_dir if local else None) or trainer.default_root_dir)


def new_rollout(module: LightningModule, batch_idx: int) -> Rollout | None:
    """Return the rollout that this training step collected, None at a later slice or where nothing is sampled."""
    rollout: Rollout | None = getattr(module, "rollout", None)
    return rollout if batch_idx % getattr(module, "repeats", 1) == 0 else None


def completion_kl(rollout: Rollout) -> Float[Tensor, "prompts samples"]:
    """The estimate k1 of KL(policy || reference), summed over each completion, in nats."""
    completions = rollout.completions
    return F.masked_sum(F.kl_k1(completions.logprobs, rollout.reference_logprobs), completions.mask)


def gathered(trainer: Trainer, values: Float[Tensor, " completions"]) -> Float[Tensor, " all_completions"]:
    """The values of all ranks, in float32."""
    values = values.detach().float()
    return torch.cat(gather_all_tensors(values)) if trainer.world_size > 1 else values


def is_fast_dev_run(trainer: Trainer) -> bool:
    """Tell whether this is a `fast_dev_run`, which writes nothing."""
    return bool(getattr(trainer, "fast_dev_run", False))


def validated_in_fit(trainer: Trainer) -> bool:
    """Tell whether the validation that just ended belongs to `fit` and is not the sanity check."""
    return trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking


def format_number(value: float | None) -> str:
    """Write a number for a person: three digits, or all before the point; rounding errors as 0, a missing one as -."""
    if value is None or value != value:
        return "-"
    return "0" if abs(value) < 5e-5 else f"{value:.0f}" if 1000 <= abs(value) < 1e7 else f"{value:.3g}"


def scalar_metrics(trainer: Trainer, prefix: str) -> dict[str, float]:
    """The metrics logged so far whose names start with `prefix`."""
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
