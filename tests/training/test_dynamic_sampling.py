"""Dynamic sampling: which prompts a rollout keeps, how many it samples, and how it resumes."""

import functools

import pytest
import torch

import lit_rlhf
from lit_rlhf.errors import InputError
from lit_rlhf.training.dynamic_sampling import concatenate
from lit_rlhf.types import Prompts
from runs import differing_tensors, make_data, make_module, make_trainer, training_state


def evens(prompts, completion_ids, **kwargs):
    """Differ for prompts with an even number, `film 0` to `song 2`; 1 for all others."""
    return [
        float(sum(ids) % 5) if prompt[-1] in "02" else 1.0 for prompt, ids in zip(prompts, completion_ids, strict=True)
    ]


class Record(lit_rlhf.callbacks.KLMonitor):
    """Keeps each rollout, and the logged metrics."""

    def __init__(self):
        super().__init__()
        self.rollouts, self.metrics = [], []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx % module.steps_per_rollout == 0:
            self.rollouts.append(module.rollout)
        self.metrics.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(folder, root, data=None, callbacks=(), ckpt_path=None, name="RLOO", max_epochs=1, **options):
    options = {"rewards": [evens], "reward": "evens", **options}
    module = make_module(name, folder, **options)
    trainer = make_trainer(root, max_epochs=max_epochs, callbacks=[record := Record(), *callbacks], limit_val_batches=0)
    trainer.fit(module, data or make_data(name, rows=12, val=None), ckpt_path=ckpt_path)
    return trainer, record


def test_a_rollout_keeps_the_prompts_whose_completions_differ(tiny, tmp_path):
    _, record = fit(tiny, tmp_path)
    for rollout, metrics in zip(record.rollouts, record.metrics, strict=True):
        differing = [
            text[-1] in "02" and len(set(row)) > 1
            for text, row in zip(rollout.prompts.text, rollout.component_rewards["evens"].tolist(), strict=True)
        ]
        assert rollout.valid.all(1).tolist() == differing and len(differing) == 4
        assert metrics["train/sampled_groups"] == 4 and metrics["train/differing_groups"] == sum(differing) / 4
        assert not rollout.advantages[~rollout.valid].any()


def test_what_is_left_out_does_not_change_the_update(tiny, tmp_path):
    """The mean is over the others: the same update as from a batch of them alone."""
    texts = ["film 0", "book 1", "play 2", "song 1"]
    states = []
    for kept in ([0, 1, 2, 3], [0, 2]):
        data = lit_rlhf.PromptData(train=[{"prompt": texts[i]} for i in kept], batch_size=len(kept), val=None)
        module = make_module("RLOO", tiny, rewards=[evens], reward="evens")
        module.sample = functools.partial(sample_as_rows, module, torch.tensor(kept))
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, data)
        states.append(module.state_dict())
    assert all(torch.allclose(value, states[1][name], atol=1e-6) for name, value in states[0].items())


def sample_as_rows(module, rows, prompts):
    """Sample with the noise of these rows of the data."""
    prompts = prompts.replace(index=rows[prompts.index])
    return module.sampler.sample(prompts, module.num_samples, module.sampling, module.seed)


def test_further_rounds_are_sampled_only_where_prompts_are_missing(tiny, tmp_path):
    data = make_data("RLOO", rows=12, val=None, batch_size=6)
    _, record = fit(tiny, tmp_path, data, rounds=3)
    sampled = [metrics["train/sampled_groups"] for metrics in record.metrics]
    assert set(sampled) <= {2.0, 4.0, 6.0} and len(set(sampled)) > 1
    for rollout, count, metrics in zip(record.rollouts, sampled, record.metrics, strict=True):
        kept = int(rollout.valid.all(1).sum())
        assert len(rollout.prompts) == 2
        assert kept == min(2, round(count * metrics["train/differing_groups"]))
        assert kept == 2 or count == 6


@pytest.mark.filterwarnings("ignore:dynamic_sampling leaves out groups")
@pytest.mark.parametrize("name", ["RLOO", "PPO", "ReMax"])
def test_a_run_resumes_bitwise_inside_a_rollout(name, tiny, tmp_path):
    class Save(lit_rlhf.callbacks.SampleLogger):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            trainer.save_checkpoint(tmp_path / f"{batch_idx}.ckpt")

    options = dict(name=name, rounds=2, num_minibatches=2)
    data = make_data(name, rows=12, val=None, batch_size=6)
    whole, _ = fit(tiny, tmp_path, data, [Save()], **options)
    for step in (0, 3):
        resumed, _ = fit(tiny, tmp_path, data, ckpt_path=tmp_path / f"{step}.ckpt", **options)
        assert not differing_tensors(training_state(whole), training_state(resumed))


@pytest.mark.filterwarnings("ignore:no completion of this update counts")
def test_no_prompt_that_differs_is_a_warning_and_no_update(tiny, tmp_path):
    def same(completions, **kwargs):
        return [1.0] * len(completions)

    before = lit_rlhf.Policy.from_pretrained(str(tiny)).state_dict()
    with pytest.warns(UserWarning, match="found no prompt among 4 whose completions differ in 'same'"):
        trainer, _ = fit(tiny, tmp_path, rewards=[same], reward="same")
    after = trainer.lightning_module.policy.state_dict()
    assert trainer.global_step == 3 and all(torch.equal(value, after[name]) for name, value in before.items())


def test_records_are_joined_with_padding(tiny, tmp_path):
    _, record = fit(tiny, tmp_path)
    parts = record.rollouts[:2]
    joined = concatenate(parts)
    assert joined.texts == parts[0].texts + parts[1].texts
    assert joined.prompts.index.tolist() == [i for part in parts for i in part.prompts.index.tolist()]
    assert joined.completions.ids() == parts[0].completions.ids() + parts[1].completions.ids()
    assert torch.equal(joined.component_rewards["evens"][4:], parts[1].component_rewards["evens"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"reward": "accuracy"}, "there is no reward 'accuracy': give one of 'evens'"),
        ({"num_samples": 1, "name": "Reinforce"}, "give num_samples of 2 or more"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"rounds": 3, "reward": None}, "rounds=3 has no effect without a reward"),
        ({"rounds": 3}, r"data.batch_size=4 is sampled in dynamic_sampling\.rounds=3 parts"),
        ({"rounds": 2, "num_minibatches": 4}, "num_minibatches=4 is more than the 2 prompts of a rollout"),
    ],
    ids=str,
)
def test_bad_options_are_one_sentence(options, message, tiny, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(tiny, tmp_path, **options)


@pytest.mark.parametrize("name", ["Reinforce", "RAFT", "ReinforcePlusPlus", "PPO"])
def test_a_method_without_a_baseline_of_the_group_gives_a_warning(name, tiny):
    with pytest.warns(UserWarning, match="learns from them, since it does not subtract a baseline of the group"):
        make_module(name, tiny, rewards=[evens], reward="evens")


def test_positions_of_records_without_some_of_the_lists():
    prompts = Prompts(
        torch.arange(6).view(3, 2), torch.ones(3, 2, dtype=torch.bool), torch.arange(3), columns={"a": [1, 2, 3]}
    )
    chosen = prompts.at([2, 0])
    assert chosen.tokens.tolist() == [[4, 5], [0, 1]] and chosen.index.tolist() == [2, 0]
    assert chosen.columns == {"a": [3, 1]} and chosen.text == [] and chosen.template_kwargs == []


@pytest.mark.filterwarnings("ignore:no completion of this update counts")
def test_metrics_of_rewards_and_throughput_are_of_all_that_was_sampled(tiny, tmp_path):
    def counted(completion_ids, log_metric, **kwargs):
        calls.append(sum(map(len, completion_ids)))
        log_metric("round", len(calls))
        return [1.0] * len(completion_ids)

    calls = []
    with pytest.warns(UserWarning, match="found no prompt"):
        _, record = fit(tiny, tmp_path, rewards=[counted], reward="counted", rounds=4)
    metrics = record.metrics[1]  # the module logs its timings after the callbacks
    seconds = sum(metrics[f"time/{phase}"] for phase in ("sample", "score", "train"))
    assert record.metrics[0]["train/round"] == 2.5
    assert metrics["throughput/completion_tokens"] * seconds == pytest.approx(sum(calls[:4]), rel=1e-3)
