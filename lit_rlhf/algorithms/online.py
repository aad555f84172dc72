"""The loop of every method that samples: collect a rollout, then train on it, slice by slice.

    slice 0:  rollout = collect(prompts)        sample -> score -> reference -> returns
              rollout = prepare(rollout)        a method's own additions
              advantages(rollout)               [prompts, samples] or [prompts, samples, tokens]
    always:   terms, metrics = loss(part)       [prompts, samples] or [prompts, samples, tokens]

A method overrides `advantages` and `loss`, and `prepare` where it needs more than a rollout holds. One rollout lasts
`repeats` training steps, during which the data module hands over the same prompts; `batch_idx` says which slice is
due. Nothing else is counted, so a resumed run goes on with the same slice.
"""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, Literal

import torch
from jaxtyping import Float
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_rlhf import functional as F
from lit_rlhf.algorithms.base import Algorithm
from lit_rlhf.data import TextData
from lit_rlhf.evaluation.evaluator import Evaluation, EvaluationOptions, completion_texts, predict, score
from lit_rlhf.models.policy import Policy, Reference
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.rewards import Scorer, Shaping
from lit_rlhf.training.buffers import unchanged_on_error
from lit_rlhf.training.checks import (
    check_columns,
    check_loader,
    check_minibatches,
    check_plan,
    data_module,
    make_judge,
    make_options,
    read_kl_penalty,
)
from lit_rlhf.training.monitor import (
    Clock,
    Metrics,
    log_loss_metrics,
    log_rollout,
    mean_metrics,
    raise_on_all_ranks,
)
from lit_rlhf.types import Completions, Prompts, Rollout


class OnlineAlgorithm(Algorithm):
    """A method that learns from its own completions.

    Args:
        policy: See `Algorithm`. As it is at the start, it is also the reference of the KL.
        rewards: What a completion is worth: callables, bare or `lit_rlhf.rewards.Weighted`.
        num_samples: Completions of each prompt (k), typically 2 to 8.
        max_new_tokens: A completion is cut here.
        temperature: Divides the logits, in sampling, training and the reference alike.
        kl_coef: Weight of the KL to the reference (beta); typically 0.01 to 0.5.
        kl_penalty: Estimator of the KL, and whether it is taken off the reward or added to the loss. `k1_reward` and
            `k2_loss` have the exact gradient in the first update of a rollout; the others warn of what they do instead.
            `train/kl` is k1 always.
        minibatches: Slices of a rollout along its prompts, one training step each. With as much
            `accumulate_grad_batches` they make one update and only save memory; with less there are several updates a
            rollout, as the paper's two, and all but the first are off-policy, which is not corrected.
        sample_minibatches: Slices of each group along its samples, likewise.
        epochs: Passes over a rollout, each of which is another update at least.
        shaping: Options of `lit_rlhf.rewards.Shaping`: `normalize`, `clip`, `noise`.
        truncated: What becomes of completions that were cut at `max_new_tokens`: `keep` them, `leave_out` (they count
            nowhere), or a number that is subtracted from their reward.
        sampling: More options of `lit_rlhf.models.sampling.Sampling`: `top_p`, `top_k`, `min_new_tokens`, `stop`,
            `batch_size`, `greedy`.
        judge: Decides the win rate in validation: a callable like a reward, or with `pairwise = True` one that compares
            two completions (`lit_rlhf.evaluation.PairJudge`). The rewards themselves by default.
        opponent: Whom the win rate is against: `policy`, the reference policy's greedy completions, or the name of a
            column of completions.
        evaluation: Options of `lit_rlhf.evaluation.evaluator.EvaluationOptions`: `best_of`, `preferred`.
        **options: See `Algorithm`.

    Raises:
        ValueError: If a number is out of its range.
    """

    record = Prompts
    rollout_type: type[Rollout] = Rollout
    corrects_off_policy = False
    """Whether the loss takes into account that the policy has been updated since it sampled."""
    reference: Reference

    def __init__(
        self,
        policy: str | Policy,
        rewards: list[Callable[..., Any]],
        num_samples: int = 4,
        max_new_tokens: int = 64,
        temperature: float = 1.0,
        kl_coef: float = 0.05,
        kl_penalty: str = "k1_reward",
        minibatches: int = 1,
        sample_minibatches: int = 1,
        epochs: int = 1,
        shaping: dict[str, Any] | None = None,
        truncated: Literal["keep", "leave_out"] | float = "keep",
        sampling: dict[str, Any] | None = None,
        judge: Callable[..., Any] | None = None,
        opponent: str = "policy",
        evaluation: dict[str, Any] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(policy, **options)
        counts = {"num_samples": num_samples, "minibatches": minibatches, "epochs": epochs}
        for name, value in {**counts, "sample_minibatches": sample_minibatches}.items():
            if value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if sample_minibatches > num_samples:
            raise ValueError(f"sample_minibatches={sample_minibatches} is more than num_samples={num_samples}")
        if not (kl_coef >= 0 and math.isfinite(kl_coef)):
            raise ValueError(f"kl_coef={kl_coef} must be 0 or more: the KL is subtracted from the reward")
        fine = truncated in ("keep", "leave_out") if isinstance(truncated, str) else 0 <= truncated < math.inf
        if not fine or isinstance(truncated, bool):
            raise ValueError(f"truncated={truncated!r} must be 'keep', 'leave_out', or a number from 0 on to subtract")
        self.kl_estimator, self.kl_place = read_kl_penalty(kl_penalty)
        self.scorer = Scorer(rewards)
        self.shaping = make_options(Shaping, "shaping", shaping)
        self.judge = self.scorer if judge is None else make_judge(judge)
        self.evaluation = make_options(EvaluationOptions, "evaluation", evaluation)
        self.num_samples, self.kl_coef, self.truncated, self.opponent = num_samples, kl_coef, truncated, opponent
        cut = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        self.sampling = make_options(Sampling, "sampling", sampling, **cut)
        self.minibatches, self.sample_minibatches, self.epochs = minibatches, sample_minibatches, epochs
        self.repeats = minibatches * sample_minibatches * epochs
        self.rollout: Rollout | None = None
        self.examples: list[dict[str, Any]] = []  # greedy completions of the first held-out prompts
        self.extra: dict[str, list[Any]] = {}  # what rewards told of each completion with `log_extra`
        self.clock = Clock()
        self.opponents: dict[int, Any] = {}  # by the prompt's index: its completion, and for a judge of one its score
        self.opponent_weights: list[float] = []
        self._evaluation: Evaluation | None = None
        self.metric_sums: dict[str, Tensor] = {}  # of this rollout's slices so far
        self._mismatch: Tensor | None = None
        self._logprobs: Tensor | None = None
        self._validated_at = -1

    @property
    def max_new_tokens(self) -> int:  # type: ignore[override]
        """Tokens that a completion may have."""
        return self.sampling.max_new_tokens

    # What a method overrides

    def prepare(self, rollout: Rollout) -> Rollout:
        """Add to a rollout what the method needs beside it. Called once a rollout, without gradient."""
        return rollout

    @abstractmethod
    def advantages(self, rollout: Rollout) -> Tensor:
        """Return one advantage a completion or one a token, from the whole rollout, without gradient."""

    @abstractmethod
    def loss(self, rollout: Rollout) -> tuple[Tensor, Metrics]:
        """Return the terms of a slice, one a completion or one a token, and metrics to log.

        The base takes the mean of the terms that count: over completions for terms `[prompts, samples]`, over tokens
        for terms `[prompts, samples, tokens]`. A metric is a number, or values and where they count.
        """

    def logprobs(self, rollout: Rollout) -> Float[Tensor, "prompts samples tokens"]:
        """Log-probabilities of the completions' tokens under the policy as it is now, with gradient."""
        return self.logprobs_from(rollout, self.policy.features(rollout.prompts, rollout.completions))

    def logprobs_from(self, rollout: Rollout, features: Tensor) -> Float[Tensor, "prompts samples tokens"]:
        """The same, from the policy's features."""
        completions = rollout.completions
        logprobs = self.policy.logprobs_from(features, completions, self.sampling.temperature)
        self._logprobs = logprobs if self.kl_place == "loss" else None
        self._mismatch = (logprobs.detach() - completions.logprobs).abs()[completions.mask].mean()
        return logprobs

    def kl_terms(self, rollout: Rollout, terms: Tensor) -> Tensor:
        """The KL of each completion with gradient, from the log-probabilities that `loss` has just computed.

        Raises:
            ValueError: If the terms are not one a completion, or are made of other completions.
        """
        completions, logprobs, self._logprobs = rollout.completions, self._logprobs, None
        if terms.ndim != 2 or logprobs is None or logprobs.shape != completions.mask.shape:
            raise ValueError(f"{type(self).__name__} can't take the KL into its loss: use kl_penalty='k1_reward'")
        return F.kl_of_completions(self.kl_estimator, logprobs, rollout.reference_logprobs, completions.mask)

    # Collecting

    def sample(self, prompts: Prompts) -> Completions:
        """Sample `num_samples` completions of each prompt."""
        return self.policy.sample(prompts, self.num_samples, self.sampling, self.seed, self.current_epoch)

    def collect(self, prompts: Prompts) -> Rollout:
        """Sample completions, score them, and take the KL to the reference off their rewards."""
        with self.clock("sample"), raise_on_all_ranks(self):
            completions = self.sample(prompts)
        with self.clock("score"), raise_on_all_ranks(self):
            texts = completion_texts(self.tokenizer, prompts, completions)
            scores = score(self.scorer, prompts, completions, texts, self.trainer_state())
            reference_logprobs = self.score_reference(prompts, completions)
        self.log_dict(mean_metrics(self.gather(scores.metrics)), batch_size=1)
        self.extra = {name: [v for group in groups for v in group] for name, groups in scores.reward_extras.items()}
        rewards, valid = scores.rewards, scores.valid
        if self.truncated == "leave_out":
            valid = valid & completions.finished
        address = (self.seed, self.current_epoch, prompts.index.tolist())
        rewards = self.shaping(rewards, valid & scores.has_sequence_reward, self.sum_over_ranks, address)
        if not isinstance(self.truncated, str):
            rewards = rewards - self.truncated * (~completions.finished).to(rewards)
        kl = torch.zeros_like(rewards)
        if self.kl_place == "reward":
            kl = F.kl_of_completions(self.kl_estimator, completions.logprobs, reference_logprobs, completions.mask)
        rewards = rewards.masked_fill(~valid, 0.0)
        return self.rollout_type(
            prompts=prompts,
            completions=completions,
            reference_logprobs=reference_logprobs,
            rewards=rewards,
            parts=scores.component_rewards,
            valid=valid,
            returns=F.kl_penalized_return(rewards, kl, self.kl_coef).masked_fill(~valid, 0.0),
            token_rewards=scores.token_rewards,
        )

    def score_reference(self, prompts: Prompts, completions: Completions) -> Float[Tensor, "prompts samples tokens"]:
        """Log-probabilities under the reference, of as many prompts at a time as a training step has."""
        blocks = [nth_part(i, self.minibatches, len(prompts)) for i in range(self.minibatches)]
        parts = [
            self.reference.logprobs(prompts.rows(block).trim(), completions.rows(block), self.sampling.temperature)
            for block in blocks
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def _new_rollout(self, prompts: Prompts) -> Rollout:
        check_minibatches(self.minibatches, len(prompts))
        collected = self.collect(prompts)
        rollout = self.prepare(collected)
        advantages = self.advantages(rollout)
        shapes = (rollout.rewards.shape, rollout.completions.tokens.shape)
        if advantages.shape not in shapes or not bool(advantages.isfinite().all()):
            finite = f"{advantages.isfinite().float().mean():.0%} finite"
            raise ValueError(
                f"{type(self).__name__}.advantages must return finite numbers of shape {tuple(shapes[0])} or "
                f"{tuple(shapes[1])}, not {tuple(advantages.shape)}, {finite}"
            )
        if not bool(collected.valid.any(1).all()):
            rank_zero_warn("a prompt none of whose completions has a reward is skipped: see train/skipped_groups")
        rollout = rollout.replace(advantages=advantages)
        log_rollout(self, collected, rollout)
        return rollout

    # Training

    def training_step(self, batch: Prompts, batch_idx: int) -> Tensor:
        """Collect a rollout where a new one is due, and return the loss of the slice that is."""
        with unchanged_on_error([*self.buffers(recurse=False), *self.shaping.buffers()]):
            return self._training_step(batch, batch_idx % self.repeats)

    def _training_step(self, batch: Prompts, step: int) -> Tensor:
        self.clock.seconds = self._resumed.pop("seconds", self.clock.seconds)
        self.clock.begin_step(new=step == 0)
        if step == 0:
            self._resumed.clear()  # of a rollout that the end of its epoch has cut off
            self.rollout = self._new_rollout(batch)
        elif "rollout" in self._resumed:  # in the middle of a rollout
            self.rollout = self.rollout_type.from_state(self._resumed.pop("rollout"), batch.to("cpu")).to(self.device)
            self.metric_sums = {n: sums.to(self.device) for n, sums in self._resumed.pop("metric_sums", {}).items()}
        assert self.rollout is not None
        part = self.slice(self.rollout, step)
        with self.clock("train"):
            terms, mask, metrics = self.terms(part)
            planned = self.rollout.rewards.numel() / (self.minibatches * self.sample_minibatches)
            loss = self.reduce(terms, mask, planned)
        if step == 0 and self._mismatch is not None:
            metrics["logprob_mismatch"] = self._mismatch
        log_loss_metrics(self, metrics, new=step == 0)
        return loss

    def terms(self, part: Rollout) -> tuple[Tensor, Tensor, Metrics]:
        """The terms of a slice with the KL where it belongs to the loss, where they count, and metrics."""
        terms, metrics = self.loss(part)
        shapes = (part.valid.shape, part.counted.shape)
        if terms.shape not in shapes:
            raise ValueError(
                f"{type(self).__name__}.loss must return terms of shape {tuple(shapes[0])} or {tuple(shapes[1])}, one "
                f"a completion or one a token, not {tuple(terms.shape)}: the mean is taken by the base"
            )
        if self.kl_place == "loss":
            terms = terms + self.kl_coef * self.kl_terms(part, terms)
        return terms, part.valid if terms.ndim == 2 else part.counted, metrics

    def slice(self, rollout: Rollout, step: int) -> Rollout:
        """Return the part of a rollout that a training step learns from, cut to its own longest rows."""
        row, column = divmod(step % (self.minibatches * self.sample_minibatches), self.sample_minibatches)
        n, k = rollout.rewards.shape
        part = rollout.rows(nth_part(row, self.minibatches, n))
        return part.samples(nth_part(column, self.sample_minibatches, k)).trim()

    def phase_timings(self, took: float, batch_idx: int) -> dict[str, float]:
        """Where the seconds of a rollout went, once its last slice is done."""
        self.clock.end_step()
        if (batch_idx + 1) % self.repeats or self.rollout is None:
            return {}
        tokens = self.sum_over_ranks(self.rollout.completions.mask.sum().float())
        return self.clock.read(int(tokens))

    def trainer_state(self) -> Any:
        """Where training stands, as rewards are told."""
        from transformers import TrainerState

        trainer = self.trainer
        planned = trainer.estimated_stepping_batches if trainer.state.fn == TrainerFn.FITTING else trainer.max_steps
        max_steps = int(planned) if math.isfinite(planned) else -1
        return TrainerState(global_step=self.updates_done, max_steps=max_steps, epoch=trainer.current_epoch)

    # Start and resume

    def setup(self, stage: str) -> None:
        """Check what can be checked before a model is loaded."""
        super().setup(stage)
        if self.trainer.strategy.root_device.type == "mps":
            raise ValueError(
                f"mps has no float64, which {type(self).__name__} counts in: give --trainer.accelerator cpu"
            )
        self.opponents = {}
        data = data_module(self)
        if isinstance(data, TextData):
            check_columns(self, data)
        if stage == "fit":
            check_plan(self, getattr(data, "batch_size", None))

    def configure_model(self) -> None:
        """Load the policy and keep what it is now as the reference."""
        super().configure_model()
        if not hasattr(self, "reference"):
            self.reference = self.policy.reference()

    @property
    def reward_weights(self) -> list[float]:
        """What the rewards are multiplied by now: scores by other weights do not compare."""
        return self.scorer.weights(self.updates_done)

    def place(self) -> None:
        """Move to the device what is no part of the module, and check what needs the models."""
        self.policy.probe()
        self.reference.to(self.device, next(self.policy.parameters()).dtype)
        self.scorer.setup(self.device)
        self.judge.setup(self.device)

    def on_fit_start(self) -> None:
        """Get ready."""
        self.place()

    on_validation_start = on_test_start = on_predict_start = on_fit_start

    def on_train_start(self) -> None:
        """Validate once before the first update, so that every curve starts where the policy did."""
        super().on_train_start()
        trainer = self.trainer
        check_loader(self)
        at_start = trainer.global_step == 0 and self._steps_done == 0
        if at_start and trainer.enable_validation and not getattr(trainer, "fast_dev_run", False):
            self._validate()

    def on_train_end(self) -> None:
        """Validate what came out, unless that has just been done or the run was told to stop."""
        trainer = self.trainer
        if trainer.enable_validation and not trainer.should_stop and self._validated_at != trainer.global_step:
            self._validate()

    def _validate(self) -> None:
        trainer = self.trainer
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def in_flight_state(self, steps_done: int) -> dict[str, Any]:
        """Return, inside a rollout, the rollout too."""
        state = super().in_flight_state(steps_done)
        if steps_done % self.repeats != 0 and self.rollout is not None:
            state |= {"rollout": self.rollout.state(), "metric_sums": self.metric_sums, "seconds": self.clock.so_far()}
        return state

    # Validation, test, prediction

    def on_validation_epoch_start(self) -> None:
        """Start to evaluate."""
        self._evaluation = Evaluation(self)

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Sample and score completions of held-out prompts."""
        assert self._evaluation is not None
        self._evaluation.update(batch)

    def on_validation_epoch_end(self) -> None:
        """Log `val/reward`, `val/win_rate`, `val/kl`, ... (defined in the README)."""
        self._finish("val")
        self._validated_at = self.trainer.global_step

    on_test_epoch_start, test_step = on_validation_epoch_start, validation_step

    def on_test_epoch_end(self) -> None:
        """Log the same as in validation, under `test/`."""
        self._finish("test")

    def _finish(self, prefix: str) -> None:
        assert self._evaluation is not None
        metrics = {f"{prefix}/{name}": value for name, value in self._evaluation.metrics().items()}
        self.log_dict(metrics, batch_size=1, sync_dist=True)
        self.examples = self._evaluation.examples

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Sample `num_samples` completions of each prompt (one where greedy) and return them with their scores."""
        return predict(self, batch)


def nth_part(i: int, parts: int, total: int) -> slice:
    """The i-th of as many parts of `total` things, as equal as may be."""
    return slice(i * total // parts, (i + 1) * total // parts)
