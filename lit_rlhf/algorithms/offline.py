"""Base of the methods that compare the policy with a reference on completions of a data set."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_info
from rich.progress import track
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.data import TextData
from lit_rlhf.errors import InputError
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference, load_reference
from lit_rlhf.training import method_checks
from lit_rlhf.training.distributed import gather_over_ranks, raise_on_all_ranks
from lit_rlhf.training.held_out import HeldOutMetrics
from lit_rlhf.types import Demonstrations


class OfflineAlgorithm(HeldOutMetrics, Algorithm):
    """An algorithm that learns from given completions by the log-ratio of the policy to a reference.

    The log-ratio is `log pi(y|x) / ref(y|x)`, of whole completions without turns of others in between. The reference's
    log-probabilities are computed once for the data set, before the first step.

    Args:
        policy: Hub id or folder of a model or a PEFT adapter, `testbed`, or a `lit_rlhf.Policy` in memory.
        beta: Strength of the KL constraint, typically 0.05 to 0.5.
        reference: `policy`, its initial state, or a hub id or folder of a model with the same tokenizer.
        offload_reference: Whether the reference stays in main memory between uses.
        **options: See `Algorithm`.

    Raises:
        ValueError: If beta is not above 0, or there is no reference.
    """

    batch_type: type[Demonstrations]
    reference: Reference

    def __init__(
        self,
        policy: str | Policy,
        beta: float = 0.1,
        reference: str | None = "policy",
        offload_reference: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(policy, **options)
        if getattr(self, "batch_type", None) is None:
            raise InputError(f"{type(self).__name__} must name its batch_type, such as lit_rlhf.Preferences")
        method_checks.check_beta(beta)
        if reference is None:
            raise InputError(
                f"{type(self).__name__} compares the policy with a reference, so reference can't be null: leave it out "
                "for the policy's initial state, or give a model"
            )
        self.beta, self.reference_source, self.offload_reference = beta, reference, offload_reference
        self.reference_logprobs: dict[int, Tensor] = {}  # by the row's index
        self.held_out_reference_logprobs: dict[int, Tensor] = {}

    def training_log_ratios(self, batch: Demonstrations) -> Float[Tensor, "prompts samples"]:
        """Return `log_ratios` of a training batch, whose reference log-probabilities are known."""
        reference = None
        if self.reference_logprobs:
            index = batch.prompts.index.tolist()
            reference = torch.stack([self.reference_logprobs[i] for i in index]).to(self.device)
        return self.log_ratios(batch, reference)

    def held_out_log_ratios(self, batch: Demonstrations) -> Float[Tensor, "prompts samples"]:
        """Return `log_ratios` of held-out rows; the reference's log-probabilities are cached across validations."""
        index, cache = batch.prompts.index.tolist(), self.held_out_reference_logprobs
        if any(i not in cache for i in index):
            cache.update(zip(index, self._reference_logprobs(batch).cpu(), strict=True))
        return self.log_ratios(batch, torch.stack([cache[i] for i in index]).to(self.device))

    def log_ratios(self, batch: Demonstrations, reference: Tensor | None = None) -> Float[Tensor, "prompts samples"]:
        """Return `log pi(y|x) / ref(y|x)` of each completion, with gradient; of pairs the chosen one first."""
        if reference is None:
            reference = self._reference_logprobs(batch)
        return F.masked_sum(self.policy.logprobs(batch.prompts, batch), batch.loss_mask) - reference

    def _reference_logprobs(self, batch: Demonstrations) -> Float[Tensor, "prompts samples"]:
        return F.masked_sum(self.reference.logprobs(batch.prompts, batch), batch.loss_mask)

    def setup(self, stage: str) -> None:
        """Drop cached reference log-probabilities, which may be of other held-out data."""
        super().setup(stage)
        self.held_out_reference_logprobs = {}

    def configure_model(self) -> None:
        """Load the policy and the reference."""
        super().configure_model()
        if not hasattr(self, "reference"):
            reference = load_reference(self.policy, self.reference_source, **self.load_options)
            assert reference is not None
            self.reference = reference

    def on_validation_start(self) -> None:
        """Move the reference to the device."""
        self.policy.probe()
        self.reference.to(self.policy, self.offload_reference)

    on_test_start = on_predict_start = on_validation_start

    def on_fit_start(self) -> None:
        """Compute the reference's log-probabilities of all rows, each rank its share.

        In a `fast_dev_run`, or with a loader instead of a data module, the reference runs in every step instead.
        """
        self.on_validation_start()
        self.reference_logprobs = {}
        data, trainer = self.data_module, self.trainer
        if getattr(trainer, "fast_dev_run", False) or not isinstance(data, TextData):
            return
        own: dict[int, Tensor] = {}
        visible = trainer.is_global_zero and trainer.progress_bar_callback is not None
        batches = track(data.in_order(data.train_set), "scoring the data", transient=True, disable=not visible)
        precision, together = trainer.precision_plugin.train_step_context(), self.reference.without_gradient()
        with raise_on_all_ranks(trainer), precision, together:
            for batch in batches:
                batch = batch.to(self.device)
                own.update(zip(batch.prompts.index.tolist(), self._reference_logprobs(batch).cpu(), strict=True))
        for rank in gather_over_ranks(trainer, own):
            self.reference_logprobs.update(rank)
        rank_zero_info(f"the reference has scored {len(self.reference_logprobs)} rows")
