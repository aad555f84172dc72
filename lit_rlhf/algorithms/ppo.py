"""PPO: policy gradient a token, with a critic, and several safe steps on the same completions.

Schulman et al., 2017, arXiv 1707.06347; for language models Ziegler et al., 2019, arXiv 1909.08593, and Ouyang et al.,
2022, arXiv 2203.02155. One departure from most implementations: old log-probabilities come from the training forward,
never from sampling, whose rounding differs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.vanilla_pg import ValuedRollout, VanillaPG
from lit_rlhf.training.monitor import Metrics
from lit_rlhf.types import Rollout


@dataclass
class PPORollout(ValuedRollout):
    """A rollout that is trained on more than once.

    Attributes:
        old_logprobs: Log-probability of each token before the first update; NaN until it is known.
    """

    old_logprobs: Float[Tensor, "prompts samples tokens"] | None = None


class PPO(VanillaPG):
    """PPO: `A_t` by GAE(lambda), loss `-min(w_t A_t, clamp(w_t) A_t) + c (V - G)^2 / 2`, `w_t = pi / pi_old`.

    With `gae_lambda=1`, no clips, no ratio and no whitening it is `VanillaPG`.

    Args:
        *args: See `VanillaPG`.
        gae_lambda: From 0, one-step advantages that trust the critic, to 1, whole returns. Typically 0.95 or 1.
        clip: How far the ratio w may leave 1 before it stops to count (epsilon); None: anywhere.
        clip_range_vf: How far the critic's values may move at once; None: anywhere.
        ratio: Whether to correct by w what was sampled before the last updates; without it there is no clip either.
        whiten: Whether to bring a rollout's advantages to mean 0 and variance 1, over all ranks.
        **kwargs: See `VanillaPG`.

    Raises:
        ValueError: If a number is out of its range.
    """

    rollout_type = PPORollout

    def __init__(
        self,
        *args: Any,
        gae_lambda: float = 0.95,
        clip: float | None = 0.2,
        clip_range_vf: float | None = 0.2,
        ratio: bool = True,
        whiten: bool = True,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        if not 0 <= gae_lambda <= 1:
            raise ValueError(f"gae_lambda={gae_lambda} must be between 0 and 1")
        for name, value in {"clip": clip, "clip_range_vf": clip_range_vf}.items():
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0, or null for none")
        self.gae_lambda, self.clip, self.clip_range_vf = gae_lambda, clip, clip_range_vf
        self.ratio = self.corrects_off_policy = ratio
        self.whiten = whiten

    def prepare(self, rollout: Rollout) -> PPORollout:
        """Add values, returns, and where updates come before a slice's first turn its log-probabilities as they are."""
        assert isinstance(rollout, PPORollout)
        unknown = torch.full_like(rollout.completions.logprobs, torch.nan)
        prepared = super().prepare(rollout.replace(old_logprobs=unknown))
        assert isinstance(prepared, PPORollout)
        return prepared

    def prepare_slice(self, part: ValuedRollout, step: int) -> None:
        """Write values, and log-probabilities where the training forward will not come before an update."""
        if not self.ratio or step < self.trainer.accumulate_grad_batches:
            super().prepare_slice(part, step)
            return
        assert isinstance(part, PPORollout) and part.old_logprobs is not None and part.values is not None
        logprobs, values = self.logprobs_and_values(part)
        part.old_logprobs.copy_(logprobs)
        part.values.copy_(values)

    def returns(self, rollout: Rollout, values: Tensor) -> Float[Tensor, "prompts samples tokens"]:
        """What the critic should have expected: its own values, set right by GAE."""
        mask = rollout.completions.mask
        return values + F.gae(self.token_rewards(rollout), values, mask, self.gae_lambda)

    def advantages(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return the advantages by GAE, whitened if asked for."""
        advantages = super().advantages(rollout)
        if not self.whiten:
            return advantages
        counted = rollout.counted
        kept = advantages.double().masked_fill(~counted, 0.0)
        count, total, squares = self.sum_over_ranks(torch.stack([counted.sum().double(), kept.sum(), (kept**2).sum()]))
        mean = total / count.clamp(min=1)
        variance = (squares / count.clamp(min=1) - mean**2).clamp(min=0)
        return F.whiten(advantages, mean.to(advantages), variance.to(advantages)).masked_fill(~counted, 0.0)

    def policy_terms(self, rollout: ValuedRollout, logprobs: Tensor) -> tuple[Tensor, Metrics]:
        """The clipped term of each completion, and how often the clip holds."""
        if not self.ratio:
            return super().policy_terms(rollout, logprobs)
        assert isinstance(rollout, PPORollout) and rollout.old_logprobs is not None and rollout.advantages is not None
        mask, old = rollout.completions.mask, rollout.old_logprobs
        old.copy_(old.where(~old.isnan(), logprobs.detach()))  # a view of the whole rollout's, for later passes
        terms, held = F.ppo_clip_loss(logprobs, old, rollout.advantages, self.clip)
        ratio = (logprobs.detach() - old).exp()
        metrics: Metrics = {"clip_fraction": (held, rollout.counted), "ratio": (ratio, rollout.counted)}
        return F.masked_sum(terms, mask), metrics

    def value_terms(self, rollout: ValuedRollout, values: Tensor) -> Tensor:
        """The clipped term of each token."""
        assert rollout.values is not None and rollout.targets is not None
        return F.value_loss(values, rollout.targets, rollout.values, self.clip_range_vf)
