"""Supervised fine-tuning: the log-likelihood of demonstrations. Where every other method starts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf.algorithms.base import Method
from lit_rlhf.types import Demonstrations


class SFT(Method):
    """Supervised fine-tuning: `-log pi(y_t | x, y_<t)`, the mean over the tokens of the completions.

    The prompt is read and not learned. Back to Basics, appendix C: learning rate 2e-5, cosine, 3 % warm-up.

    Args:
        **options: See `Method`.
    """

    def __init__(self, policy: Any, **options: Any) -> None:
        super().__init__(policy, **options)

    def training_step(self, batch: Demonstrations, batch_idx: int) -> Tensor:
        """Return the negative log-likelihood of a batch."""
        return self.reduce(-self.policy.logprobs(batch.prompts, batch), batch.mask)

    def validation_step(self, batch: Demonstrations, batch_idx: int) -> None:
        """Log `val/loss`, in nats a token."""
        self._log_likelihood("val/loss", batch)

    def test_step(self, batch: Demonstrations, batch_idx: int) -> None:
        """Log `test/loss`, in nats a token."""
        self._log_likelihood("test/loss", batch)

    def _log_likelihood(self, name: str, batch: Demonstrations) -> None:
        logprobs = self.policy.logprobs(batch.prompts, batch)[batch.mask]
        self.log(name, -logprobs.mean(), batch_size=logprobs.numel(), sync_dist=True, prog_bar=True)
