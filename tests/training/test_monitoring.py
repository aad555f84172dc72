"""Validation during a fit, logged group metrics, timings, and the state that rewards receive."""

import math
import time
from itertools import pairwise

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import CSVLogger

import lit_rlhf
from lit_rlhf.comparison.results import read_csv, update_times
from runs import make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")


def token_sum(completion_ids, **kwargs):
    return [sum(ids) / 100 for ids in completion_ids]


class Validations(Callback):
    def __init__(self):
        self.steps, self.metrics = [], []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)
        self.metrics.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")})


def validate_every(interval, **options):
    return {"val_check_interval": interval, "check_val_every_n_epoch": None, **options}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (validate_every(2, max_steps=3), [0, 2, 3]),
        (validate_every(2, max_steps=4), [0, 2, 4]),
        (validate_every(9, max_steps=2), [0, 2]),
        (validate_every(4, max_steps=3, accumulate_grad_batches=2), [0, 2, 3]),
        ({"max_epochs": 1}, [0, 3]),
        ({"max_steps": 4, "limit_val_batches": 0}, []),
    ],
    ids=str,
)
def test_fit_ends_with_a_validation_of_the_final_weights(options, steps, tiny, tmp_path):
    validations = Validations()
    module = make_module("RLOO", tiny, rewards=[token_sum], lr=0.1)
    data = make_data("RLOO")
    trainer = make_trainer(tmp_path, callbacks=[validations], **options)
    trainer.fit(module, data)
    assert validations.steps == steps
    if steps:
        (after,) = make_trainer(tmp_path).validate(module, datamodule=make_data("RLOO"), verbose=False)
        assert validations.metrics[-1] == pytest.approx(after, abs=1e-5)
        assert trainer.callback_metrics["val/reward"] == pytest.approx(after["val/reward"], abs=1e-5)


@pytest.mark.parametrize("steps", [2, 3])
def test_last_checkpoint_has_the_score_of_the_last_validation(steps, tiny, tmp_path):
    """So that a resumed run replaces the best policy only by a better one."""

    def progress(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint()
    options = validate_every(2, max_steps=steps, callbacks=[checkpoint], enable_checkpointing=True)
    make_trainer(tmp_path, **options).fit(make_module("RLOO", tiny, rewards=[progress]), make_data("RLOO"))
    saved = torch.load(checkpoint.last_path, weights_only=True)["callbacks"]
    assert checkpoint.best_score == steps
    assert [state["best_score"] for state in saved.values() if "best_score" in state] == [steps]


def test_last_checkpoint_is_saved_after_a_last_validation_without_improvement(tiny, tmp_path):
    class ValidationsWithState(Validations):
        def state_dict(self):
            return {"steps": self.steps}

    checkpoint, validations = lit_rlhf.callbacks.PolicyCheckpoint(mode="min"), ValidationsWithState()

    def progress(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    options = validate_every(2, max_steps=3, callbacks=[validations, checkpoint], enable_checkpointing=True)
    make_trainer(tmp_path, **options).fit(make_module("RLOO", tiny, rewards=[progress]), make_data("RLOO"))
    saved = torch.load(checkpoint.last_path, weights_only=True)["callbacks"]
    assert checkpoint.best_score == 0
    assert [state["steps"] for state in saved.values() if "steps" in state] == [validations.steps] == [[0, 2, 3]]


def scores_by_sample(*scores):
    """Return a reward that gives these scores to the samples of each group."""

    def reward(completions, **kwargs):
        return [scores[i % len(scores)] for i in range(len(completions))]

    return reward


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ((None, 1.0, 1.0), 1),
        ((None, 1.0, 0.0), 0),
        ((1.0, None, 1.0), 1),
        ((0.0, None, 1.0), 0),
        ((-1.0, None, -1.0), 1),
        ((None, None, None), 0),
    ],
)
@pytest.mark.filterwarnings("ignore:no completion of this update counts")
def test_zero_variance_groups_are_those_with_equal_valid_rewards(scores, expected, tiny, tmp_path):
    module = make_module("RLOO", tiny, rewards=[scores_by_sample(*scores)], kl_coef=0.0)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, make_data("RLOO"))
    assert trainer.callback_metrics["train/zero_variance_groups"] == expected
    assert trainer.callback_metrics["train/skipped_groups"] == (scores == (None,) * 3)


@pytest.mark.parametrize("samples", [1, 2])
def test_zero_variance_groups_are_logged_only_with_several_samples(samples, tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module("Reinforce", tiny, num_samples=samples), make_data("Reinforce"))
    assert ("train/zero_variance_groups" in trainer.callback_metrics) == (samples > 1)


@pytest.mark.parametrize(
    ("options", "accumulate", "rollouts"),
    [({"num_minibatches": 2}, 1, [1, 1, 2, 2]), ({}, 2, [2, 4]), ({}, 1, [1, 2, 3])],
    ids=["two updates per rollout", "two rollouts per update", "one update per rollout"],
)
def test_total_time_includes_all_rollouts_so_far(options, accumulate, rollouts, tiny, tmp_path):
    def slow(completions, **kwargs):
        time.sleep(0.2)
        return [float(len(text)) for text in completions]

    start, logger = time.perf_counter(), CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(
        tmp_path, logger=logger, max_steps=len(rollouts), accumulate_grad_batches=accumulate, limit_val_batches=0
    )
    trainer.fit(make_module("RLOO", tiny, rewards=[slow], **options), make_data("RLOO"))
    times = update_times(read_csv(tmp_path / "metrics.csv"))
    assert [step for step, _ in times] == [i + 1 for i in range(len(rollouts))]
    seconds = [0.0, *(total for _, total in times)]
    assert all(later > earlier for earlier, later in pairwise(seconds))
    assert all(total >= 0.2 * count for total, count in zip(seconds[1:], rollouts, strict=True))
    assert seconds[-1] < time.perf_counter() - start


class StopAfter(Callback):
    """Raise an error before the next step, after some updates."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise RuntimeError("that is enough")


@pytest.mark.parametrize("after", [1, 2], ids=["inside a rollout", "between rollouts"])
def test_resumed_run_continues_the_total_time(after, tiny, tmp_path):
    def slow(completions, **kwargs):
        time.sleep(0.3)
        return [float(len(text)) for text in completions]

    def fit(logger, callbacks, **options):
        settings = dict(logger=logger, callbacks=callbacks, enable_checkpointing=bool(callbacks), limit_val_batches=0)
        trainer = make_trainer(tmp_path, max_steps=4, **settings)
        trainer.fit(make_module("RLOO", tiny, rewards=[slow], num_minibatches=2), make_data("RLOO"), **options)

    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint(every_n_updates=1, save_last=False)  # saved at the end of a step
    with pytest.raises(RuntimeError, match="enough"):
        fit(False, [checkpoint, StopAfter(after)])
    saved = torch.load(checkpoint.last_path, weights_only=True)["training_seconds"]
    assert saved > 0.3  # includes the step in which it was saved
    fit(
        CSVLogger(tmp_path, name="log", version=""),
        [lit_rlhf.callbacks.PolicyCheckpoint()],
        ckpt_path=checkpoint.last_path,
    )
    rows = read_csv(tmp_path / "log" / "metrics.csv")
    (_, first), *_ = update_times(rows)
    assert saved < first and first - saved > (0 if after == 1 else 0.3)
    row = next(row for row in rows if "time/score" in row)
    assert row["time/score"] > 0.3 and row["time/sample"] > 0


def test_reward_of_none_is_not_logged_as_zero(tiny, tmp_path):
    def none_reward(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module("RLOO", tiny, rewards=[token_sum, none_reward]), make_data("RLOO"))
    assert math.isnan(trainer.callback_metrics["train/reward/none_reward"])
    assert trainer.callback_metrics["train/reward"] == trainer.callback_metrics["train/reward/token_sum"]


def test_trainer_state_of_rewards_has_the_total_number_of_updates(tiny, tmp_path):
    seen = set()

    def progress(completions, trainer_state, **kwargs):
        seen.add((trainer_state.global_step, trainer_state.max_steps))
        return [0.5] * len(completions)

    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    trainer.fit(make_module("RLOO", tiny, rewards=[progress], num_minibatches=2), make_data("RLOO"))
    total = trainer.global_step
    assert seen == {(step, total) for step in range(0, total, 2)} and total == 12


class WithCustomMetrics(lit_rlhf.RLOO):
    def loss(self, rollout):
        terms, metrics = super().loss(rollout)
        return terms, {**metrics, "half": 0.5, "third": torch.tensor(1 / 3)}


def test_loss_metrics_may_be_numbers_or_tensors(tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(
        WithCustomMetrics(str(tiny), rewards=[token_sum], sampling=lit_rlhf.Sampling(max_new_tokens=4)),
        make_data("RLOO"),
    )
    metrics = trainer.callback_metrics
    assert metrics["train/half"] == 0.5 and metrics["train/third"] == pytest.approx(1 / 3)
