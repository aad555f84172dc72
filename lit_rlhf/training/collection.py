"""Collecting a rollout: sample, score, compare with the reference, and put together the returns."""

from __future__ import annotations

import functools

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.evaluation.completions import completion_texts
from lit_rlhf.evaluation.scoring import score
from lit_rlhf.models.reference import Reference
from lit_rlhf.rewards import RewardShaping
from lit_rlhf.rewards.shaping import shape_rewards
from lit_rlhf.training.distributed import gather_over_ranks, raise_on_all_ranks, sum_over_ranks
from lit_rlhf.training.dynamic_sampling import DynamicSampling, concatenate
from lit_rlhf.training.hooks import OnlineHooks
from lit_rlhf.training.logging import mean_reward_metrics
from lit_rlhf.training.updates import nth_part
from lit_rlhf.types import Completions, Prompts, Rollout


class Collection(OnlineHooks):
    """Mixin of `lit_rlhf.OnlineAlgorithm` that collects rollouts."""

    rollout_type: type[Rollout] = Rollout
    shaping: RewardShaping
    kl_estimator: str
    kl_place: str
    dynamic_sampling: DynamicSampling

    def sample(self, prompts: Prompts) -> Completions:
        """Sample `num_samples` completions of each prompt."""
        return self.sampler.sample(prompts, self.num_samples, self.sampling, self.seed, self.current_epoch)

    def collect(self, prompts: Prompts) -> Rollout:
        """Sample completions, score them, and subtract the KL to the reference from their rewards."""
        with self.timer("sample"):
            self.renew_engine()
        with self.timer("sample"), raise_on_all_ranks(self.trainer):
            completions = self.sample(prompts)
        self.rest_engine()
        with self.timer("score"), raise_on_all_ranks(self.trainer):
            texts = completion_texts(self.tokenizer, prompts, completions)
            scores = score(self.scorer, self.tokenizer, prompts, completions, texts, self.trainer_state())
        reference_logprobs = None
        if self.reference is not None:
            with self.timer("score"), self.reference.without_gradient(), raise_on_all_ranks(self.trainer):
                reference_logprobs = self._reference_logprobs(self.reference, prompts, completions)
        self.reward_metrics.append(scores.metrics)
        self.sampled_tokens += int(completions.mask.sum())

        valid = scores.valid
        if self.shaping.mask_truncated_completions:
            valid = valid & completions.finished
        rewards = shape_rewards(
            scores.rewards,
            valid & scores.has_sequence_reward,
            self.shaping,
            self.running_statistics["rewards"],
            functools.partial(sum_over_ranks, self.trainer),
            noise_counter=(self.seed, self.current_epoch, prompts.index.tolist()),
        )
        rewards = rewards - self.shaping.missing_eos_penalty * (~completions.finished).to(rewards)
        rewards = rewards.masked_fill(~valid, 0.0)

        kl = torch.zeros_like(rewards)
        if self.kl_place == "reward" and reference_logprobs is not None:
            kl = F.kl_of_completions(self.kl_estimator, completions.logprobs, reference_logprobs, completions.mask)
        return self.rollout_type(
            prompts=prompts,
            completions=completions,
            reference_logprobs=reference_logprobs,
            rewards=rewards,
            component_rewards=scores.component_rewards,
            valid=valid,
            returns=F.kl_penalized_return(rewards, kl, self.kl_coef).masked_fill(~valid, 0.0),
            token_rewards=scores.token_rewards,
            texts=texts,
            reward_extras=scores.reward_extras,
        )

    def collect_differing(self, prompts: Prompts) -> tuple[Rollout, Rollout]:
        """Collect a rollout, by choice of prompts whose completions differ in a reward.

        Returns:
            Everything that was sampled, and the rollout to learn from.
        """
        options, self.reward_metrics, self.sampled_tokens = self.dynamic_sampling, [], 0
        if options.reward is None:
            collected = self.collect(prompts)
            self._log_reward_metrics()
            return collected, collected
        parts: list[Rollout] = []
        wanted, missing, sampled = len(prompts) // options.rounds, 1.0, 0
        while missing and sampled < options.rounds:
            parts.append(self.collect(prompts.rows(nth_part(sampled, options.rounds, len(prompts)))))
            sampled += 1
            found = torch.stack([options.differing(part).sum() for part in parts]).sum()
            missing = float(sum_over_ranks(self.trainer, (wanted - found).clamp(min=0).float()))
        self._log_reward_metrics()
        collected = concatenate(parts)
        chosen = options.choose(collected, wanted)
        groups = len(collected.prompts) * self.trainer.world_size
        share = float(sum_over_ranks(self.trainer, options.differing(collected).sum().float())) / groups
        self.log_dict({"train/sampled_groups": float(groups), "train/differing_groups": share}, batch_size=1)
        if share == 0:
            rank_zero_warn(
                f"dynamic sampling found no prompt among {groups} whose completions differ in {options.reward!r}: "
                "nothing is learned from them"
            )
        return collected, chosen

    def _log_reward_metrics(self) -> None:
        """Log the means of what rewards reported in the rounds of a rollout, on all ranks."""
        ranks = gather_over_ranks(self.trainer, dict(enumerate(self.reward_metrics)))
        self.reward_metrics = []
        self.log_dict(mean_reward_metrics([metrics for rank in ranks for metrics in rank.values()]), batch_size=1)

    def _reference_logprobs(self, reference: Reference, prompts: Prompts, completions: Completions) -> Tensor:
        temperature, parts = self.sampling.temperature, self.updates.prompt_slices(len(prompts))
        return torch.cat([reference.logprobs(prompts.rows(i).trim(), completions.rows(i), temperature) for i in parts])
