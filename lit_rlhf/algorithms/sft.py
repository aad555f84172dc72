"""Supervised fine-tuning on demonstrations, the step before every other algorithm."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.evaluation.completions import completion_texts
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.training.held_out import HeldOutMetrics
from lit_rlhf.types import Demonstrations, Metrics


class SFT(HeldOutMetrics, Algorithm):
    """Supervised fine-tuning: loss `-log pi(y_t | x, y_<t)`, the mean over the tokens of the completions.

    Tokens of the prompt, and turns of others in the completion, have no loss. Back to Basics, appendix C: learning rate
    2e-5, cosine schedule, 3 % warm-up.
    """

    batch_type = Demonstrations

    def training_step(self, batch: Demonstrations, batch_idx: int) -> Tensor:
        """Return the negative log-likelihood of a batch."""
        return self.reduce_loss(-self.policy.logprobs(batch.prompts, batch), batch.loss_mask)

    def held_out_metrics(self, batch: Demonstrations) -> Metrics:
        """Return the loss, in nats per token."""
        return {"loss": (-self.policy.logprobs(batch.prompts, batch), batch.loss_mask)}

    def predict_step(self, batch: Demonstrations, batch_idx: int) -> list[dict[str, Any]]:
        """Return greedy completions, at most as long as the demonstrations, and the demonstrations' loss."""
        sampling = Sampling(max_new_tokens=batch.tokens.shape[-1], greedy=True)
        greedy = self.policy.sample(batch.prompts, 1, sampling)
        texts = completion_texts(self.tokenizer, batch.prompts, greedy)
        losses = -F.masked_mean(self.policy.logprobs(batch.prompts, batch), batch.loss_mask)
        return [
            {
                "index": int(batch.prompts.index[i]),
                "prompt": batch.prompts.text[i],
                "completion": texts[i][0],
                "loss": float(losses[i, 0]),
                "finished": bool(greedy.finished[i, 0]),
            }
            for i in range(len(texts))
        ]
