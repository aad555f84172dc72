"""When a run validates, and what it tells of its groups."""

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


def worth(completion_ids, **kwargs):
    return [sum(ids) / 100 for ids in completion_ids]


class Validations(Callback):
    def __init__(self):
        self.steps, self.metrics = [], []

    def on_validation_end(self, trainer, module):
        self.steps.append(trainer.global_step)
        self.metrics.append({n: float(v) for n, v in trainer.callback_metrics.items() if n.startswith("val/")})


def by_updates(interval, **options):
    return {"val_check_interval": interval, "check_val_every_n_epoch": None, **options}


@pytest.mark.parametrize(
    ("options", "steps"),
    [
        (by_updates(2, max_steps=3), [0, 2, 3]),
        (by_updates(2, max_steps=4), [0, 2, 4]),
        (by_updates(9, max_steps=2), [0, 2]),
        (by_updates(4, max_steps=3, accumulate_grad_batches=2), [0, 2, 3]),
        ({"max_epochs": 1}, [0, 3]),
        ({"max_steps": 4, "limit_val_batches": 0}, []),
    ],
    ids=str,
)
def test_a_fit_ends_with_a_validation_of_what_came_out(options, steps, tiny, tmp_path):
    validations = Validations()
    module = make_module("RLOO", tiny, rewards=[worth], lr=0.1)
    data = make_data("RLOO")
    trainer = make_trainer(tmp_path, callbacks=[validations], **options)
    trainer.fit(module, data)
    assert validations.steps == steps
    if steps:
        (after,) = make_trainer(tmp_path).validate(module, datamodule=make_data("RLOO"), verbose=False)
        assert validations.metrics[-1] == pytest.approx(after, abs=1e-5)
        assert trainer.callback_metrics["val/reward"] == pytest.approx(after["val/reward"], abs=1e-5)


@pytest.mark.parametrize("steps", [2, 3])
def test_the_last_checkpoint_knows_the_score_of_the_last_validation(steps, tiny, tmp_path):
    """So that a resumed run writes over the best policy only what is better."""

    def progress(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint()
    options = by_updates(2, max_steps=steps, callbacks=[checkpoint], enable_checkpointing=True)
    make_trainer(tmp_path, **options).fit(make_module("RLOO", tiny, rewards=[progress]), make_data("RLOO"))
    saved = torch.load(checkpoint.last_path, weights_only=True)["callbacks"]
    assert checkpoint.best_score == steps
    assert [state["best_score"] for state in saved.values() if "best_score" in state] == [steps]


def test_the_last_checkpoint_knows_of_a_validation_that_was_no_better(tiny, tmp_path):
    class Remembers(Validations):
        def state_dict(self):
            return {"steps": self.steps}

    checkpoint, seen = lit_rlhf.callbacks.PolicyCheckpoint(mode="min"), Remembers()

    def progress(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    options = by_updates(2, max_steps=3, callbacks=[seen, checkpoint], enable_checkpointing=True)
    make_trainer(tmp_path, **options).fit(make_module("RLOO", tiny, rewards=[progress]), make_data("RLOO"))
    saved = torch.load(checkpoint.last_path, weights_only=True)["callbacks"]
    assert checkpoint.best_score == 0
    assert [state["steps"] for state in saved.values() if "steps" in state] == [seen.steps] == [[0, 2, 3]]


def scores_by_sample(*scores):
    """A reward that gives the samples of each group these scores."""

    def reward(completions, **kwargs):
        return [scores[i % len(scores)] for i in range(len(completions))]

    return reward


@pytest.mark.parametrize(
    ("scores", "share"),
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
def test_equal_groups_are_told_by_the_samples_that_count(scores, share, tiny, tmp_path):
    module = make_module("RLOO", tiny, rewards=[scores_by_sample(*scores)], kl_coef=0.0)
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(module, make_data("RLOO"))
    assert trainer.callback_metrics["train/zero_variance_groups"] == share
    assert trainer.callback_metrics["train/skipped_groups"] == (scores == (None,) * 3)


@pytest.mark.parametrize("samples", [1, 2])
def test_one_sample_is_no_group(samples, tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module("Reinforce", tiny, num_samples=samples), make_data("Reinforce"))
    assert ("train/zero_variance_groups" in trainer.callback_metrics) == (samples > 1)


@pytest.mark.parametrize(
    ("options", "accumulate", "pauses"),
    [({"num_minibatches": 2}, 1, [1, 1, 2, 2]), ({}, 2, [2, 4]), ({}, 1, [1, 2, 3])],
    ids=["two updates a rollout", "two rollouts an update", "one of each"],
)
def test_the_seconds_so_far_are_those_of_all_rollouts_so_far(options, accumulate, pauses, tiny, tmp_path):
    def slow(completions, **kwargs):
        time.sleep(0.2)
        return [float(len(text)) for text in completions]

    began, logger = time.perf_counter(), CSVLogger(tmp_path, name="", version="")
    trainer = make_trainer(
        tmp_path, logger=logger, max_steps=len(pauses), accumulate_grad_batches=accumulate, limit_val_batches=0
    )
    trainer.fit(make_module("RLOO", tiny, rewards=[slow], **options), make_data("RLOO"))
    told = update_times(read_csv(tmp_path / "metrics.csv"))
    assert [step for step, _ in told] == [i + 1 for i in range(len(pauses))]
    seconds = [0.0, *(total for _, total in told)]
    assert all(after > before for before, after in pairwise(seconds))
    assert all(total >= 0.2 * count for total, count in zip(seconds[1:], pauses, strict=True))
    assert seconds[-1] < time.perf_counter() - began


class Fails(Callback):
    """Ends a run before its next step."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if trainer.global_step == self.after:
            raise RuntimeError("that is enough")


@pytest.mark.parametrize("after", [1, 2], ids=["inside a rollout", "between two"])
def test_the_clock_of_a_resumed_run_goes_on(after, tiny, tmp_path):
    def slow(completions, **kwargs):
        time.sleep(0.3)
        return [float(len(text)) for text in completions]

    def fit(logger, callbacks, **options):
        given = dict(logger=logger, callbacks=callbacks, enable_checkpointing=bool(callbacks), limit_val_batches=0)
        trainer = make_trainer(tmp_path, max_steps=4, **given)
        trainer.fit(make_module("RLOO", tiny, rewards=[slow], num_minibatches=2), make_data("RLOO"), **options)

    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint(every_n_updates=1, save_last=False)  # while a step ends
    with pytest.raises(RuntimeError, match="enough"):
        fit(False, [checkpoint, Fails(after)])
    saved = torch.load(checkpoint.last_path, weights_only=True)["training_seconds"]
    assert saved > 0.3  # the step it was saved in counts
    fit(
        CSVLogger(tmp_path, name="log", version=""),
        [lit_rlhf.callbacks.PolicyCheckpoint()],
        ckpt_path=checkpoint.last_path,
    )
    rows = read_csv(tmp_path / "log" / "metrics.csv")
    (_, first), *_ = update_times(rows)
    assert saved < first and first - saved > (0 if after == 1 else 0.3)
    told = next(row for row in rows if "time/score" in row)
    assert told["time/score"] > 0.3 and told["time/sample"] > 0


def test_a_reward_without_an_opinion_is_not_one_of_zero(tiny, tmp_path):
    def silent(completions, **kwargs):
        return [None] * len(completions)

    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(make_module("RLOO", tiny, rewards=[worth, silent]), make_data("RLOO"))
    assert math.isnan(trainer.callback_metrics["train/reward/silent"])
    assert trainer.callback_metrics["train/reward"] == trainer.callback_metrics["train/reward/worth"]


def test_a_reward_is_told_how_many_updates_there_will_be(tiny, tmp_path):
    seen = set()

    def progress(completions, trainer_state, **kwargs):
        seen.add((trainer_state.global_step, trainer_state.max_steps))
        return [0.5] * len(completions)

    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    trainer.fit(make_module("RLOO", tiny, rewards=[progress], num_minibatches=2), make_data("RLOO"))
    total = trainer.global_step
    assert seen == {(step, total) for step in range(0, total, 2)} and total == 12


class Counting(lit_rlhf.RLOO):
    def loss(self, rollout):
        terms, metrics = super().loss(rollout)
        return terms, {**metrics, "half": 0.5, "third": torch.tensor(1 / 3)}


def test_a_loss_may_tell_numbers_and_tensors(tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, limit_val_batches=0)
    trainer.fit(Counting(str(tiny), rewards=[worth], sampling=lit_rlhf.Sampling(max_new_tokens=4)), make_data("RLOO"))
    told = trainer.callback_metrics
    assert told["train/half"] == 0.5 and told["train/third"] == pytest.approx(1 / 3)
