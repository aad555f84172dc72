"""KTO: learn from completions that are marked as desirable or not, one at a time, without pairs and without sampling.

Ethayarajh et al., 2024, arXiv 2402.01306, section 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from jaxtyping import Bool, Float
from lightning.pytorch import Trainer
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.unpaired import UnpairedAlgorithm
from lit_rlhf.data import TextData
from lit_rlhf.data.encoding import EncodedRows
from lit_rlhf.errors import InputError
from lit_rlhf.training import method_checks
from lit_rlhf.training.distributed import gather_over_ranks
from lit_rlhf.types import Demonstrations


class KTO(UnpairedAlgorithm):
    """Kahneman-Tversky optimization: loss `1 - sigmoid(s beta (log pi(y|x) / ref(y|x) - z))`.

    With s = 1 for desirable completions and -1 for others, and z the KL to the reference, without gradient: the mean
    log-ratio over a batch of all ranks of each prompt with the completion of the next row, at least 0.

    Args:
        *args: See `UnpairedAlgorithm`.
        desirable_weight: Weight of desirable completions.
        undesirable_weight: Weight of the others. The paper advises that weight times number of desirable completions
            is 1 to 4/3 times that of the others.
        **kwargs: See `UnpairedAlgorithm`.

    Raises:
        ValueError: If a weight is not above 0; at `fit`, if a batch has one row.
    """

    def __init__(
        self, *args: Any, desirable_weight: float = 1.0, undesirable_weight: float = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        method_checks.check_weight("desirable_weight", desirable_weight)
        method_checks.check_weight("undesirable_weight", undesirable_weight)
        self.desirable_weight, self.undesirable_weight = desirable_weight, undesirable_weight
        self.held_out_kl: Tensor | None = None

    def completion_loss(
        self, log_ratios: Float[Tensor, " rows"], reference_point: Float[Tensor, ""], desirable: Bool[Tensor, " rows"]
    ) -> Float[Tensor, " rows"]:
        """Weighted loss of each completion."""
        losses = F.kto_loss(log_ratios, reference_point, desirable, self.beta)
        return losses * torch.where(desirable, self.desirable_weight, self.undesirable_weight)

    def reference_point(self, batch: Demonstrations) -> Float[Tensor, ""]:
        """Return the KL to the reference, from each prompt with the next row's completion, over all ranks."""
        return self.mismatched_kl([with_next_completions(self.trainer, batch)])

    def on_validation_epoch_start(self) -> None:
        """Start an evaluation, of the current weights."""
        super().on_validation_epoch_start()
        self.held_out_kl = None

    def held_out_reference_point(self, batch: Demonstrations) -> Float[Tensor, ""]:
        """Return the KL over the held-out rows of the data module, once per evaluation; of the batch without one."""
        if not isinstance(self.data_module, TextData):
            return self.reference_point(batch)
        if self.held_out_kl is None:
            self.held_out_kl = self.mismatched_kl(mismatched_rows(self.data_module, self.trainer))
        return self.held_out_kl

    def mismatched_kl(self, batches: Iterable[Demonstrations]) -> Float[Tensor, ""]:
        """Return the mean of `log pi / ref` over batches of all ranks, at least 0; 0 for a lone completion."""
        log_ratios = torch.cat([self.log_ratios(batch.to(self.device)) for batch in batches])
        total, count = self.sum_over_ranks(torch.stack([log_ratios.sum(), torch.ones_like(log_ratios).sum()]))
        return torch.where(count > 1, total / count, 0.0).clamp(min=0)

    def setup(self, stage: str) -> None:
        """Check that a batch has other completions."""
        super().setup(stage)
        if stage == "fit" and getattr(self.data_module, "batch_size", 2) < 2:
            raise InputError("KTO compares with the completions of other prompts: give data.batch_size of 2 or more")

    @property
    def longest_row(self) -> int:
        """Tokens of the longest prompt and the longest completion together: they may become a pair."""
        sets = [getattr(self.data_module, name, None) or () for name in ("train_set", "val_set")]
        lengths = [[(len(row.prompt), len(row.completions[0])) for row in rows] for rows in sets if rows]
        return max((sum(map(max, zip(*rows, strict=True))) for rows in lengths), default=0)


def mismatched_rows(data: TextData, trainer: Trainer) -> Iterable[Demonstrations]:
    """Return as many batches as an evaluation has, of each held-out prompt with a completion of half the rows later.

    The next row would often have the same prompt: that of a pair.
    """
    rows = list(data.val_set or ())
    half = len(rows) // 2
    pairs = zip(rows, rows[half:] + rows[:half], strict=True)
    mixed = [replace(row, completions=other.completions, learned=other.learned) for row, other in pairs]
    limits = trainer.num_test_batches if trainer.testing else trainer.num_val_batches
    limits = trainer.num_sanity_val_batches if trainer.sanity_checking else limits
    return islice(data.in_order(EncodedRows(mixed)), int(limits[0]))


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
