"""The loop of every algorithm that samples: collect a rollout, then train on it, minibatch by minibatch.

    step 0:  rollout = collect(prompts)           sample -> score -> reference -> returns
             rollout = prepare(rollout)           a method's own additions
             rollout.advantages = advantages(rollout)      [prompts, samples] or [prompts, samples, tokens]
    always:  part = minibatch(rollout, step)
             part = evaluate(part)                log-probabilities with gradient
             terms, metrics = loss(part)          [prompts, samples] or [prompts, samples, tokens]

A method overrides `advantages` and `loss`; `prepare` and `evaluate` if its rollouts hold more. One rollout lasts
`steps_per_rollout` training steps, during which the data module repeats the same prompts. The step within the rollout
follows from `batch_idx` alone, so a resumed run continues with the same minibatch.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.engines import Engine
from lit_rlhf.evaluation.evaluator import check_opponent, make_judge
from lit_rlhf.evaluation.options import EvaluationOptions
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference, check_reference
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.rewards import RewardShaping, Scorer
from lit_rlhf.rewards.shaping import RewardStatistics
from lit_rlhf.training import checks, method_checks
from lit_rlhf.training.collection import Collection
from lit_rlhf.training.dynamic_sampling import DynamicSampling
from lit_rlhf.training.finite import is_finite, nonfinite_fields
from lit_rlhf.training.importance import Importance, check_importance
from lit_rlhf.training.logging import reduce_rollout_metrics
from lit_rlhf.training.resume import restore_on_error
from lit_rlhf.training.updates import Updates
from lit_rlhf.types import Metrics, Prompts, Rollout


class OnlineAlgorithm(Collection, Algorithm):
    """An algorithm that learns from its own completions.

    Args:
        policy: Hub id or folder of a model or a PEFT adapter, `testbed`, or a `lit_rlhf.Policy` in memory.
        rewards: Reward functions: callables, bare or `lit_rlhf.rewards.Weighted`.
        num_samples: Completions of each prompt (k), typically 2 to 8.
        kl_coef: Coefficient of the KL to the reference (beta); typically 0.01 to 0.5.
        reference: What the KL is measured against: `policy`, its initial state; a hub id or folder of a model with the
            same tokenizer; or null, with `kl_coef=0`, for none: nothing is held, and no KL is measured.
        offload_reference: Whether the reference stays in main memory between uses.
        kl_penalty: Estimator of the KL, and whether it is subtracted from the reward or added to the loss:
            `k1_reward` and `k2_loss` have the gradient of the KL in the first update of a rollout, where the method
            divides by no standard deviation or length; `k3_loss` has another. `train/kl` is always k1.
        sampling: How completions are sampled.
        updates: How a rollout is split into minibatches, and how often it is reused.
        shaping: Reward shaping.
        evaluation: What validation and test measure.
        engine: Where completions are sampled.
        importance: Whether and how the loss corrects for completions that the current policy did not sample.
        dynamic_sampling: Whether prompts whose completions all have the same reward are left out, or replaced.
        **options: See `Algorithm`.

    Raises:
        ValueError: If a number is out of its range, or something needs a reference and there is none.
    """

    batch_type = Prompts
    rollout_type: type[Rollout] = Rollout
    uses_importance_ratio = False
    """Whether the loss corrects for updates since sampling by a ratio, for which rollouts keep `old_logprobs`."""
    weighs_advantages = True
    """Whether the loss is linear in the advantages, so that importance weights can scale them."""
    reduction = "sums"
    """How `reduce_tokens`, and a KL in the loss, weigh tokens: one of `functional.REDUCTIONS`."""
    group_baseline = False
    """Whether a prompt whose completions have equal rewards gives no gradient, without a KL."""
    min_samples = 1
    """Smallest `num_samples` that the method learns from."""
    extra_samples = 0
    """Completions of a prompt that are sampled beside `num_samples`, and that nothing is learned from."""
    published_kl_penalty = "k1_reward"
    """The `kl_penalty` of the method's paper, which gives no warning."""
    reference: Reference | None

    def __init__(
        self,
        policy: str | Policy,
        rewards: list[Callable[..., Any]],
        *,
        num_samples: int = 4,
        kl_coef: float = 0.05,
        reference: str | None = "policy",
        offload_reference: bool = False,
        kl_penalty: str = "k1_reward",
        sampling: Sampling = Sampling(),
        updates: Updates = Updates(),
        shaping: RewardShaping = RewardShaping(),
        evaluation: EvaluationOptions = EvaluationOptions(),
        engine: Engine = Engine(),
        importance: Importance = Importance(),
        dynamic_sampling: DynamicSampling = DynamicSampling(),
        **options: Any,
    ) -> None:
        groups: dict[str, Any] = {"sampling": sampling, "updates": updates, "shaping": shaping}
        groups |= {"evaluation": evaluation, "engine": engine, "importance": importance}
        groups |= {"dynamic_sampling": dynamic_sampling}
        checks.check_groups(groups, options)
        super().__init__(policy, **options)
        checks.check_samples(type(self).__name__, num_samples, self.min_samples, updates)
        checks.check_kl_coef(kl_coef)
        self.kl_estimator, self.kl_place = checks.parse_kl_penalty(kl_penalty, self.published_kl_penalty, kl_coef)
        self.num_samples, self.kl_coef = num_samples, kl_coef
        self.initial_kl_coef = kl_coef  # a controller changes the other
        self.reference_source, self.offload_reference = reference, offload_reference
        self.sampling, self.updates, self.shaping, self.evaluation = sampling, updates, shaping, evaluation
        self.engine, self.importance, self.dynamic_sampling = engine, importance, dynamic_sampling
        self.steps_per_rollout = updates.steps_per_rollout
        self.max_new_tokens = sampling.max_new_tokens
        self.scorer = Scorer(rewards)
        dynamic_sampling.check(self.scorer.names, num_samples, self.group_baseline)
        self.judge = self.scorer if evaluation.judge is None else make_judge(evaluation.judge)
        check_importance(type(self).__name__, importance, self.weighs_advantages)
        check_reference(reference, kl_coef, offload_reference)
        check_opponent(self.judge, evaluation, reference is not None)
        self.running_statistics["rewards"] = RewardStatistics()

    # What a method overrides

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Return one advantage per completion or per token, from the whole rollout, without gradient."""

    @abstractmethod
    def loss(self, part: Rollout) -> tuple[Tensor, Metrics]:
        """Return the loss terms of a minibatch, per completion or per token, and metrics. Must depend on `part` only.

        The base takes the mean of the terms that count: over completions for terms `[prompts, samples]`, over tokens
        for terms `[prompts, samples, tokens]`.
        """

    def prepare(self, rollout: Rollout) -> Rollout:
        """Add what the method needs to a new rollout, without gradient.

        The base adds the old log-probabilities for an importance ratio, of the loss or of `importance`. They come from
        the training forward, never from sampling, whose rounding differs: on the first pass over a minibatch they are
        its own log-probabilities, detached; here they are computed for the minibatches that are first trained on after
        an update.
        """
        if not (self.uses_importance_ratio or self.corrects_updates):
            return rollout
        old_logprobs = torch.full_like(rollout.completions.logprobs, torch.nan)
        rollout = rollout.replace(old_logprobs=old_logprobs)
        for step in range(self.trainer.accumulate_grad_batches, self.updates.minibatches_per_epoch):
            part = self.minibatch(rollout, step)
            assert part.old_logprobs is not None
            part.old_logprobs.copy_(self.logprobs(part))  # a view of the rollout's
        return rollout

    def evaluate(self, part: Rollout) -> Rollout:
        """Add the log-probabilities under the current policy, with gradient."""
        return part.replace(logprobs=self.logprobs(part))

    def reduce_tokens(self, terms: Float[Tensor, "prompts samples tokens"], part: Rollout) -> Tensor:
        """Reduce a loss per token as `reduction` says; see `functional.reduce_tokens`."""
        return F.reduce_tokens(terms, part.completions.mask, self.reduction, self.max_new_tokens)

    def token_penalties(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return the KL of each token, if it is in the reward, times `kl_coef`, minus the token's reward, if any."""
        penalties = torch.zeros_like(rollout.completions.logprobs)
        if self.kl_place == "reward" and rollout.reference_logprobs is not None:
            penalties = self.kl_coef * F.kl_k1(rollout.completions.logprobs, rollout.reference_logprobs)
        return penalties if rollout.token_rewards is None else penalties - rollout.token_rewards

    @torch.no_grad()
    def new_rollout(self, prompts: Prompts) -> Rollout:
        """Collect a rollout, compute its advantages, and log its metrics.

        Raises:
            ValueError: If `advantages` returns another shape.
        """
        statistics = self.running_state()
        checks.check_num_minibatches(self.updates.num_minibatches, len(prompts))
        collected, chosen = self.collect_differing(prompts)
        rollout = self.prepare(chosen)
        advantages = self.advantages(rollout)
        method_checks.check_advantages(type(self).__name__, advantages, rollout)
        counted = rollout.valid if advantages.ndim == 2 else rollout.loss_mask
        rollout = rollout.replace(advantages=advantages.masked_fill(~counted, 0.0))
        if not is_finite(self.running_state()):
            self.load_running_state(statistics)
        metrics = reduce_rollout_metrics(collected, rollout, self.sum_over_ranks)
        if metrics["train/skipped_groups"] > 0:
            rank_zero_warn("a prompt without a reward or rank for any completion is skipped: see train/skipped_groups")
        for name, value in metrics.items():
            self.log(name, value, prog_bar=name in ("train/reward", "train/kl"), batch_size=1)
        self.log("train/kl_coef", self.kl_coef, batch_size=1)
        return rollout

    # Training on it

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Collect a rollout at its first step, and return the loss of the step's minibatch."""
        with restore_on_error(list(self.buffers(recurse=False)), self.running_statistics):
            return self._training_step(batch, batch_idx % self.steps_per_rollout)

    def _training_step(self, batch: Prompts, step: int) -> Tensor:
        self.timer.seconds = self._in_flight.phase_seconds or self.timer.seconds
        self.timer.begin_step(new_rollout=step == 0)
        if step == 0:
            self._in_flight.drop_rollout()  # cut off by the end of its epoch
            self.rollout, self.metric_sums = self.new_rollout(batch), {}
            self._rollout_problems = nonfinite_fields(self.rollout)
        elif self._in_flight.rollout is not None:  # resumed in the middle of a rollout
            some = self.dynamic_sampling.reward is not None
            found = self._in_flight.restore_rollout(self.rollout_type, batch, self.device, some)
            self.rollout, self.metric_sums = found
            self._rollout_problems = nonfinite_fields(self.rollout)
        assert self.rollout is not None
        part = self.minibatch(self.rollout, step)
        with self.timer("train"):
            evaluated, terms, mask, metrics = self.loss_terms(part)
            loss = self.reduce_loss(terms, mask, self.rollout.rewards.numel() / self.updates.minibatches_per_epoch)
        if self._rollout_problems:  # on one rank is enough: the sum over all ranks is NaN
            self._loss_sums.total = math.nan
        if part.old_logprobs is not None and evaluated.old_logprobs is not None:
            method_checks.check_same_shape(type(self).__name__, part, evaluated)
            part.old_logprobs.copy_(evaluated.old_logprobs)  # a view of the rollout's, for later epochs
        if step == 0 and evaluated.logprobs is not None:
            completions = evaluated.completions
            mismatch = (evaluated.logprobs.detach() - completions.logprobs).abs()[completions.mask].mean()
            metrics["logprob_mismatch"] = mismatch
        self.log_loss_metrics(metrics)
        return loss

    def minibatch(self, rollout: Rollout, step: int) -> Rollout:
        """Return the part of a rollout that a training step learns from."""
        return self.updates.minibatch(rollout, step)

    def loss_terms(self, part: Rollout) -> tuple[Rollout, Tensor, Tensor, Metrics]:
        """Return the evaluated minibatch, its loss terms including a KL in the loss, their mask, and metrics.

        Raises:
            ValueError: If `loss` returns terms of another shape.
        """
        part = self.evaluate(part)
        if part.old_logprobs is not None and part.logprobs is not None:
            known = ~part.old_logprobs.isnan()
            part = part.replace(old_logprobs=part.old_logprobs.where(known, part.logprobs.detach()))
        weighed, weights = self.importance_weighed(part)
        terms, metrics = method_checks.check_loss(type(self).__name__, self.loss(weighed), part)
        metrics = {**metrics, **weights}
        if self.kl_place == "loss" and self.kl_coef:
            terms = terms + self.kl_coef * self.kl_terms(part, terms)
        return part, terms, part.valid if terms.ndim == 2 else part.loss_mask, metrics

    @property
    def corrects_updates(self) -> bool:
        """Whether `importance` corrects for the updates since the completions were sampled."""
        return self.importance.correction != "none" and not (self.uses_importance_ratio or self.engine.used)

    def importance_weighed(self, part: Rollout) -> tuple[Rollout, Metrics]:
        """Return the minibatch with its advantages times importance weights, if chosen, and metrics of these."""
        if self.importance.correction == "none":
            return part, {}
        assert part.logprobs is not None and part.advantages is not None
        now = part.old_logprobs if self.uses_importance_ratio else part.logprobs.detach()
        then = part.completions.logprobs if self.engine.used else part.old_logprobs
        assert now is not None and then is not None
        weights, cut = self.importance.weights(now, then, part.completions.mask)
        of_advantages, advantages = weights, part.advantages
        if weights.ndim != advantages.ndim:
            of_advantages, advantages = (x.unsqueeze(-1) if x.ndim == 2 else x for x in (weights, advantages))
        mask = part.valid if weights.ndim == 2 else part.loss_mask
        metrics: Metrics = {"importance_weight": (weights, mask), "importance_cut": (cut, mask)}
        return part.replace(advantages=advantages * of_advantages), metrics

    def logprobs(self, part: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Return log-probabilities of the completions' tokens under the current policy, with gradient."""
        return self.policy.logprobs(part.prompts, part.completions, self.sampling.temperature)

    def kl_terms(self, part: Rollout, terms: Tensor) -> Tensor:
        """Return the KL with gradient, reduced as `terms` are, for a KL in the loss."""
        method_checks.check_kl_in_loss(type(self).__name__, part.logprobs is not None)
        assert part.logprobs is not None and part.reference_logprobs is not None
        mask = part.completions.mask
        kl = F.kl_of_completions(self.kl_estimator, part.logprobs, part.reference_logprobs, mask)
        of_tokens = (kl / part.completions.lengths.clamp(min=1)).unsqueeze(-1).expand(mask.shape)
        reduced = self.reduce_tokens(of_tokens, part)
        method_checks.check_kl_in_loss(type(self).__name__, reduced.shape == terms.shape)
        return reduced
