"""Lightning hooks of algorithms that sample: checks, setup of the models, timing, validation, test and prediction."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from transformers import PreTrainedTokenizerBase, TrainerState

from lit_rlhf.evaluation.completions import completion_texts
from lit_rlhf.evaluation.evaluator import Evaluator
from lit_rlhf.evaluation.judges import SymmetricJudge
from lit_rlhf.evaluation.options import EvaluationOptions
from lit_rlhf.evaluation.scoring import prediction_rows, score
from lit_rlhf.models.reference import Reference, load_reference
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.rewards import Scorer
from lit_rlhf.training import checks, diagnosis
from lit_rlhf.training.distributed import gather_over_ranks, raise_on_all_ranks, sum_over_ranks
from lit_rlhf.training.dynamic_sampling import DynamicSampling
from lit_rlhf.training.engines import EngineHooks
from lit_rlhf.training.importance import Importance, check_correction
from lit_rlhf.training.logging import add_loss_metrics, mean_metrics
from lit_rlhf.training.resume import InFlight
from lit_rlhf.training.timing import PhaseTimer
from lit_rlhf.training.updates import Updates
from lit_rlhf.types import Metrics, Prompts, Rollout


class OnlineHooks(EngineHooks):
    """Mixin of `lit_rlhf.OnlineAlgorithm` with the hooks around its training loop.

    Attributes:
        examples: Greedy completions of the first held-out prompts, from the last evaluation.
    """

    reference: Reference | None
    reference_source: str | None
    offload_reference: bool
    tokenizer: PreTrainedTokenizerBase
    scorer: Scorer
    judge: Scorer | SymmetricJudge
    evaluation: EvaluationOptions
    sampling: Sampling
    updates: Updates
    num_samples: int
    kl_coef: float
    load_options: dict[str, Any]
    uses_importance_ratio: bool
    min_samples: int
    learns_from_rewards = True
    importance: Importance
    dynamic_sampling: DynamicSampling
    data_module: Any
    _movement: diagnosis.MovementCheck
    _continues_text: bool

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.examples: list[dict[str, Any]] = []
        self._evaluator: Evaluator | None = None
        self._validated_at = -1
        self.rollout: Rollout | None = None  # the current one, collected at its first training step
        self.timer = PhaseTimer()
        self.sampled_tokens = 0  # of the rollout so far
        self.reward_metrics: list[dict[str, float]] = []  # of its rounds
        self.metric_sums: dict[str, Tensor] = {}  # of the loss, over the minibatches of the rollout so far
        self._metric_sums_before: dict[str, Tensor] = {}
        self._rollout_problems: list[str] = []  # names of its numbers that are not finite
        self._diagnosis, self._updates_before = diagnosis.RolloutDiagnosis(), 0

    @property
    def reward_weights(self) -> dict[str, float]:
        """Current weight of each reward; scores under other weights are not comparable."""
        return dict(zip(self.scorer.names, self.scorer.weights(self.updates_done), strict=True))

    def trainer_state(self) -> TrainerState:
        """Return the progress of training, for rewards that ask for `trainer_state`."""
        trainer = self.trainer
        planned = trainer.estimated_stepping_batches if trainer.state.fn == TrainerFn.FITTING else trainer.max_steps
        max_steps = int(planned) if math.isfinite(planned) else -1
        return TrainerState(global_step=self.updates_done, max_steps=max_steps, epoch=trainer.current_epoch)

    def setup(self, stage: str) -> None:
        """Check the configuration before a model is loaded."""
        super().setup(stage)
        self._evaluator = None
        data, accumulate = self.data_module, self.trainer.accumulate_grad_batches
        if callable(columns := getattr(data, "columns", None)):
            checks.check_columns(self.scorer, self.judge, self.evaluation, columns("train"), columns("val"))
        if rows := getattr(data, "train_set", None) or getattr(data, "val_set", None):
            for scored in dict.fromkeys((self.scorer, self.judge)):
                scored.check_on_row(rows[0].example.prompt, rows[0].example.columns)
        if stage == "fit":
            self.scorer.check_max_new_tokens(self.sampling.max_new_tokens)
            callbacks: Sequence[Any] = getattr(self.trainer, "callbacks", ())
            batch_size = getattr(data, "batch_size", None)
            checks.check_updates(self.updates, accumulate, batch_size, callbacks)
            if batch_size is not None:
                self.dynamic_sampling.check_batch(batch_size, self.updates.num_minibatches)
            ratio, corrected = self.uses_importance_ratio, self.importance.correction != "none"
            checks.check_on_policy(self.updates, accumulate, ratio or corrected)
            check_correction(self.importance, self.updates, accumulate, self.sampling, self.engine.used, ratio)
            checks.check_sampling(self.sampling)

    def configure_model(self) -> None:
        """Load the policy and the reference."""
        super().configure_model()
        if not hasattr(self, "reference"):
            self.reference = load_reference(self.policy, self.reference_source, **self.load_options)

    def setup_models(self) -> None:
        """Move models outside the module tree to the device, and check what needs the loaded models."""
        self.policy.probe()
        self.setup_engine()
        if self.reference is not None:
            self.reference.to(self.policy, self.offload_reference)
        sharding = getattr(self.trainer.strategy, "sharding", None)
        self.scorer.setup(self.device, sharding)
        self.judge.setup(self.device, sharding)

    def on_fit_start(self) -> None:
        """Set up the models."""
        self.setup_models()

    on_validation_start = on_test_start = on_fit_start

    def on_predict_start(self) -> None:
        """Set up the models, and give an engine the weights."""
        self.setup_models()
        self.renew_engine()

    def on_train_start(self) -> None:
        """Check the loader, and validate the initial policy, so that every curve starts there."""
        super().on_train_start()
        trainer = self.trainer
        checks.check_loader(trainer, self.steps_per_rollout)
        progress: Any = trainer.fit_loop.epoch_loop.batch_progress.current
        at_start = trainer.global_step == 0 and progress.processed == 0
        if at_start and trainer.enable_validation and not getattr(trainer, "fast_dev_run", False):
            self._validate()

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Look at the first rollouts for signs that nothing is learned."""
        super().on_train_batch_end(outputs, batch, batch_idx)
        if self.rollout is None or batch_idx % self.steps_per_rollout or self._diagnosis.done:
            return
        facts = gather_over_ranks(self.trainer, diagnosis.rollout_facts(self.rollout))
        self._diagnosis.hopeless |= self._movement.nothing_moves
        self._diagnosis.kl_known |= self.reference is None
        self._diagnosis.compares_groups = self.min_samples > 1
        teacher = bool(self.kl_coef) and self.reference_source != "policy"
        self._diagnosis.has_teacher = teacher or not self.learns_from_rewards
        ends = not self._continues_text and self.sampling.min_new_tokens != self.sampling.max_new_tokens
        group, longest = self.trainer.optimizers[0].param_groups[0], self.sampling.max_new_tokens if ends else 0
        warms_up = group["lr"] < group.get("initial_lr", 0.0) / 2
        self._diagnosis.add(facts, self._updates_before, longest, group["lr"], warms_up)

    def on_train_end(self) -> None:
        """Validate the final policy, unless that has just been done or the run was stopped."""
        trainer = self.trainer
        if trainer.enable_validation and not trainer.should_stop and self._validated_at != trainer.global_step:
            self._validate()

    def _validate(self) -> None:
        trainer = self.trainer
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def on_validation_epoch_start(self) -> None:
        """Start an evaluation."""
        if self._evaluator is None:
            models = self.policy, self.reference, self.tokenizer, self.scorer, self.judge
            together = functools.partial(raise_on_all_ranks, self.trainer)
            self._evaluator = Evaluator(*models, self.evaluation, self.sampling, self.seed, self.sampler, together)
        self.renew_engine()
        self._evaluator.start(self.updates_done)

    def validation_step(self, batch: Prompts, batch_idx: int) -> None:
        """Complete and score held-out prompts."""
        assert self._evaluator is not None
        with raise_on_all_ranks(self.trainer):
            self._evaluator.update(batch, self.trainer_state())

    def on_validation_epoch_end(self) -> None:
        """Log `val/reward`, `val/win_rate`, `val/kl` and the other metrics of `callbacks/README.md`."""
        self._log_evaluation("val")
        self._validated_at = self.trainer.global_step

    def on_test_epoch_start(self) -> None:
        """Start an evaluation."""
        self.on_validation_epoch_start()

    def test_step(self, batch: Prompts, batch_idx: int) -> None:
        """Complete and score held-out prompts."""
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        """Log the same metrics as in validation, under `test/`."""
        self._log_evaluation("test")

    def _log_evaluation(self, prefix: str) -> None:
        assert self._evaluator is not None
        self.rest_engine()
        metrics = {f"{prefix}/{name}": value for name, value in self._evaluator.compute(self.kl_coef).items()}
        self.log_dict(metrics, batch_size=1, sync_dist=True)
        self.examples = self._evaluator.examples

    def predict_step(self, batch: Prompts, batch_idx: int) -> list[dict[str, Any]]:
        """Sample `num_samples` completions of each prompt (one if greedy) and return them with their rewards."""
        k = 1 if self.sampling.greedy else self.num_samples
        completions = self.sampler.sample(batch, k, self.sampling, self.seed)
        texts = completion_texts(self.tokenizer, batch, completions)
        scores = score(self.scorer, self.tokenizer, batch, completions, texts, self.trainer_state())
        return prediction_rows(batch, completions, texts, scores)

    def on_predict_epoch_end(self) -> None:
        """Let an engine rest."""
        self.rest_engine()

    def phase_timings(self, seconds: float, batch_idx: int) -> dict[str, float]:
        """Return the seconds of a rollout by phase after its last step, and nothing before."""
        self.timer.end_step()
        if (batch_idx + 1) % self.steps_per_rollout or self.rollout is None:
            return {}
        sampled = self.sampled_tokens or int(self.rollout.completions.mask.sum())  # not known after a resume
        tokens = sum_over_ranks(self.trainer, torch.tensor(float(sampled), device=self.device))
        self.sampled_tokens = 0
        return self.timer.metrics(int(tokens))

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Start a step, and keep the metrics at the start of an update."""
        super().on_train_batch_start(batch, batch_idx)
        self._updates_before = self.trainer.global_step
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            self._metric_sums_before = self.metric_sums

    def log_loss_metrics(self, metrics: Metrics) -> None:
        """Log the metrics of a step's loss: the masked ones as means over the rollout so far."""
        scalars = {f"train/{name}": value for name, value in metrics.items() if not isinstance(value, tuple)}
        self.log_dict(scalars, sync_dist=True, batch_size=1)
        self.metric_sums = add_loss_metrics(self.metric_sums, metrics)
        self.log_dict(
            mean_metrics("train", self.metric_sums, functools.partial(sum_over_ranks, self.trainer)), batch_size=1
        )

    def undo_update(self) -> bool:
        """Return to the state before the update in progress; its metrics too."""
        self.metric_sums = self._metric_sums_before
        return super().undo_update()

    def rollout_problems(self) -> list[str]:
        """Return the names of the rollout's numbers that are not finite."""
        return self._rollout_problems

    def inspected(self, batch: Any) -> dict[str, Any]:
        """Return the prompts and the rollout that the loss of a step was computed from."""
        return {"batch": batch, "rollout": self.rollout}

    def in_flight_state(self, steps_done: int) -> InFlight:
        """Return what this rank needs to resume: inside a rollout, the rollout too."""
        state = super().in_flight_state(steps_done)
        if steps_done % self.steps_per_rollout and self.rollout is not None:
            state.add_rollout(self.rollout, self.metric_sums, self.timer.so_far())
        return state
