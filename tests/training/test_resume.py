"""Resume is bitwise exact: a stopped and resumed run ends with the same state as an uninterrupted one."""

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from lightning.pytorch import Callback

import lit_rlhf
from lit_rlhf.types import Completions, Rollout
from runs import (
    METHODS,
    ONLINE,
    VARIANTS,
    differing_tensors,
    grouped,
    make_data,
    make_module,
    make_trainer,
    training_state,
    vowels,
)


class SaveEverywhere(Callback):
    """Save a checkpoint after every training step, also within updates."""

    def __init__(self, folder):
        self.folder = folder

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        trainer.save_checkpoint(self.folder / f"{trainer.current_epoch}-{batch_idx:02d}.ckpt")


def run(name, folder, root, ckpt_path=None, callbacks=(), data=None, trainer=None, **options):
    options.setdefault("lr_scheduler", lambda optimizer: lit_rlhf.Warmup(optimizer, warmup=4, decay="cosine"))
    settings = {"max_epochs": 2, "gradient_clip_val": 0.5, **(trainer or {})}
    runner = make_trainer(root, callbacks=list(callbacks), **settings)
    torch.manual_seed(0)  # initialization of the reward model's head
    runner.fit(make_module(name, folder, **options), make_data(name, **(data or {})), ckpt_path=ckpt_path)
    return training_state(runner)


CASES = {
    "plain": {},
    "inside a rollout": {"num_minibatches": 2, "trainer": {}},
    "two updates per rollout": {
        "num_minibatches": 4,
        "trainer": {"accumulate_grad_batches": 2, "val_check_interval": 4},
    },
    "two rollouts per update": {"data": {"rows": 16}, "trainer": {"accumulate_grad_batches": 2}},
    "two epochs per rollout": {"num_minibatches": 2, "sample_minibatches": 3, "update_epochs": 2},
}


def check_resumes(name, case, tiny, root, every=False) -> None:
    options = dict(CASES[case])
    if name not in ONLINE:
        if case in ("inside a rollout", "two epochs per rollout"):
            pytest.skip("only rollouts have minibatches")
        if options.pop("num_minibatches", None):
            options["trainer"] = {"accumulate_grad_batches": 3, "val_check_interval": 2}
    if name in ("RAFT", "OnlineDPO"):  # they train on one completion, or one pair, per prompt
        options.pop("sample_minibatches", None)
    uninterrupted = run(name, tiny, root, callbacks=[SaveEverywhere(root)], **options)
    paths = sorted(root.glob("*.ckpt"))
    for path in paths if every else paths[:: len(paths) // 2 + 1]:
        assert not differing_tensors(uninterrupted, run(name, tiny, root, ckpt_path=path, **options)), path.name


@pytest.mark.filterwarnings("ignore:(4|12) updates per rollout")
@pytest.mark.parametrize(
    ("name", "case"),
    [
        pytest.param(n, c, marks=pytest.mark.slow if n in VARIANTS else ())
        for n in METHODS
        for c in CASES
        if n in ("RLOO", "PPO", "DPO") or c == "two updates per rollout"
    ],
)
def test_resume_is_bitwise_exact(name, case, tiny, tmp_path):
    """From the first checkpoint and one early in the second epoch, most of them within an update or a rollout."""
    check_resumes(name, case, tiny, tmp_path)


def test_resume_of_a_trained_module_from_an_earlier_rollout_is_bitwise_exact(tiny, tmp_path):
    schedule = dict(lr_scheduler=lambda optimizer: lit_rlhf.Warmup(optimizer, warmup=4))
    module = make_module("RLOO", tiny, num_minibatches=2, **schedule)
    trainer = make_trainer(tmp_path, max_epochs=2, callbacks=[SaveEverywhere(tmp_path)])
    trainer.fit(module, make_data("RLOO"))
    expected = training_state(trainer)
    trainer = make_trainer(tmp_path, max_epochs=2)
    trainer.fit(module, make_data("RLOO"), ckpt_path=tmp_path / "0-02.ckpt")  # after the first of two minibatches
    assert not differing_tensors(expected, training_state(trainer))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:(4|12) updates per rollout")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", METHODS)
def test_resume_from_every_step_is_bitwise_exact(name, case, tiny, tmp_path):
    check_resumes(name, case, tiny, tmp_path, every=True)


@pytest.mark.parametrize("lora", [None, {"r": 2}])
def test_resume_with_a_value_head_on_the_policy_is_bitwise_exact(lora, tiny, tmp_path):
    """Inside a rollout, including the metrics averaged over its minibatches."""

    def fit(**options):
        warm_up = dict(lr_scheduler=lambda optimizer: lit_rlhf.Warmup(optimizer, warmup=4))
        module = make_module("PPO", tiny, critic="head", lora=lora, num_minibatches=4, update_epochs=2, **warm_up)
        limits = dict(max_epochs=1, accumulate_grad_batches=2, gradient_clip_val=0.5, limit_val_batches=0)
        trainer = make_trainer(tmp_path, callbacks=options.pop("callbacks", []), **limits)
        trainer.fit(module, make_data("PPO", rows=8), **options)
        metrics = {n: trainer.callback_metrics[n] for n in ("train/ratio", "train/clip_fraction", "train/value_loss")}
        return {**training_state(trainer), **metrics}

    uninterrupted = fit(callbacks=[SaveEverywhere(tmp_path)])
    for path in sorted(tmp_path.glob("*.ckpt"))[-5:-1]:
        assert not differing_tensors(uninterrupted, fit(ckpt_path=path)), path.name


def test_training_depends_only_on_the_seed(tiny, tmp_path, monkeypatch):
    first, second = (run("RLOO", tiny, tmp_path) for _ in range(2))
    assert not differing_tensors(first, second)
    monkeypatch.setenv("PL_GLOBAL_SEED", "8")
    assert differing_tensors(first, run("RLOO", tiny, tmp_path))


@pytest.mark.parametrize("stop", [1, 5, 6, 7, 11])
def test_resume_with_a_larger_max_steps_is_bitwise_exact(stop, tiny, tmp_path):
    """After `max_steps` in the middle or at the end of an epoch."""

    def train(max_steps, ckpt_path=None):
        runner = make_trainer(tmp_path, max_steps=max_steps, accumulate_grad_batches=2)
        runner.fit(make_module("RLOO", tiny, num_minibatches=2), make_data("RLOO"), ckpt_path=ckpt_path)
        return runner

    path = tmp_path / "stopped.ckpt"
    train(stop).save_checkpoint(path)
    resumed = train(12, path)
    uninterrupted = train(12)
    weights = resumed.lightning_module.state_dict()
    assert resumed.global_step == uninterrupted.global_step == 12
    assert all(torch.equal(v, weights[n]) for n, v in uninterrupted.lightning_module.state_dict().items())


def test_checkpoint_of_two_processes_inside_a_rollout_can_be_tested_but_not_resumed_by_one(tiny, tmp_path):
    options = dict(num_minibatches=2)
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=0)
    trainer.fit(make_module("RLOO", tiny, **options), make_data("RLOO"))
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    checkpoint = torch.load(tmp_path / "one.ckpt", weights_only=True)
    assert "rollout" in checkpoint["in_flight"][0]
    torch.save({**checkpoint, "in_flight": checkpoint["in_flight"] * 2}, tmp_path / "two.ckpt")
    module_and_data = make_module("RLOO", tiny, **options), make_data("RLOO")
    assert make_trainer(tmp_path).test(*module_and_data, ckpt_path=tmp_path / "two.ckpt", verbose=False)
    with pytest.raises(ValueError, match="by 2 processes, and there are 1 now"):
        make_trainer(tmp_path, max_steps=4).fit(*module_and_data, ckpt_path=tmp_path / "two.ckpt")


def test_rollout_cut_off_by_the_end_of_an_epoch_is_not_resumed(tiny, tmp_path):
    options = dict(num_minibatches=2, trainer={"limit_train_batches": 3})
    uninterrupted = run("RLOO", tiny, tmp_path, callbacks=[SaveEverywhere(tmp_path)], **options)
    last = tmp_path / "0-02.ckpt"
    assert "rollout" in torch.load(last, weights_only=True)["in_flight"][0]
    assert not differing_tensors(uninterrupted, run("RLOO", tiny, tmp_path, ckpt_path=last, **options))


def test_resume_between_rollouts_may_change_num_minibatches(tiny, tmp_path):
    """As after running out of memory: the same updates, with more steps each."""

    def fit(num_minibatches, **options):
        limits = dict(max_epochs=1, accumulate_grad_batches=num_minibatches, limit_val_batches=0)
        trainer = make_trainer(tmp_path, callbacks=options.pop("callbacks", []), **limits)
        seen = []
        module = make_module("RLOO", tiny, num_minibatches=num_minibatches)
        collect = module.collect
        module.collect = lambda prompts: seen.append(prompts.index.tolist()) or collect(prompts)
        trainer.fit(module, make_data("RLOO", rows=16), **options)
        return trainer, seen

    _, uninterrupted = fit(1, callbacks=[SaveEverywhere(tmp_path)])
    assert len(uninterrupted) == 4
    resumed, seen = fit(2, ckpt_path=tmp_path / "0-01.ckpt")
    assert seen == uninterrupted[2:] and resumed.global_step == 4
    fit(2, callbacks=[SaveEverywhere(tmp_path)])
    _, seen = fit(1, ckpt_path=tmp_path / "0-03.ckpt")
    assert seen == uninterrupted[2:]
    with pytest.raises(ValueError, match="with steps_per_rollout=2 and accumulate_grad_batches=2"):
        fit(4, ckpt_path=tmp_path / "0-02.ckpt")


def test_running_state_after_an_error_excludes_the_failed_rollout(tiny, tmp_path):
    module = make_module("Reinforce", tiny, normalize=True)
    states = []
    loss = module.loss

    def failing(rollout):
        if len(states) == 2:
            assert running_state()["baseline"] != states[-1]["baseline"]
            raise MemoryError
        states.append(running_state())
        return loss(rollout)

    def running_state():
        return module.running_state()

    module.loss = failing
    with pytest.raises(MemoryError):
        make_trainer(tmp_path, max_epochs=1, limit_val_batches=0).fit(module, make_data("Reinforce"))
    assert states[1] == running_state() and states[1]["rewards"]["count"] > 0


@pytest.mark.parametrize("change", [{"rows": 16}, {"batch_size": 6}], ids=str)
def test_resume_inside_a_rollout_with_other_prompts_is_refused(change, tiny, tmp_path):
    run("RLOO", tiny, tmp_path, callbacks=[SaveEverywhere(tmp_path)], num_minibatches=2)
    with pytest.raises(ValueError, match=r"saved inside a rollout of \d+ rows \[.*resume with the data"):
        run("RLOO", tiny, tmp_path, ckpt_path=tmp_path / "0-00.ckpt", num_minibatches=2, data=change)


@dataclass
class ExtendedRollout(Rollout):
    difficulty: torch.Tensor | None = None
    features: torch.Tensor | None = None
    baseline: Completions | None = None


class WithExtendedRollout(lit_rlhf.RLOO):
    """Algorithm with extra rollout fields: one per prompt, one per completion, and other completions."""

    rollout_type = ExtendedRollout

    def prepare(self, rollout):
        n, k = rollout.rewards.shape
        features = torch.arange(n * k * 40.0).view(n, k, 40)
        other = dataclasses.replace(self.sampling, greedy=True, max_new_tokens=9)
        baseline = self.policy.sample(rollout.prompts, k, other)
        return rollout.replace(difficulty=torch.arange(n), features=features, baseline=baseline)

    def loss(self, part):
        self.seen.append((part.difficulty, part.features, part.baseline.tokens))
        return super().loss(part)


@pytest.mark.filterwarnings("ignore:4 updates per rollout")
def test_fields_added_to_a_rollout_are_split_and_resumed(tiny, tmp_path):
    def train(ckpt_path=None, callbacks=()):
        options = dict(num_samples=4, max_new_tokens=6, num_minibatches=2, sample_minibatches=2)
        module = WithExtendedRollout(str(tiny), rewards=[vowels], **grouped(options))
        module.seen = []
        trainer = make_trainer(tmp_path, max_steps=4, limit_val_batches=0, callbacks=list(callbacks))
        trainer.fit(module, make_data("RLOO"), ckpt_path=ckpt_path)
        return module.seen

    seen = train(callbacks=[SaveEverywhere(tmp_path)])
    difficulty, features, tokens = seen[3]
    assert difficulty.tolist() == [2, 3] and tokens.shape == (2, 2, 9)
    assert torch.equal(features, torch.arange(640.0).view(4, 4, 40)[2:, 2:])
    second = train(ckpt_path=tmp_path / "0-01.ckpt")
    assert len(second) == 2 and all(torch.equal(a, b) for a, b in zip(second[1], seen[3], strict=True))


@pytest.mark.parametrize(("name", "options"), [("RLOO", {}), ("SFT", {}), ("RLOO", {"num_minibatches": 2})])
def test_a_run_that_was_resumed_at_the_end_of_an_epoch_resumes_again(name, options, tiny, tmp_path):
    whole, once = tmp_path / "whole", tmp_path / "once"
    options = {**options, "trainer": {"max_epochs": 3}}
    expected = run(name, tiny, tmp_path, callbacks=[SaveEverywhere(whole)], **options)
    last_of_epoch = max(whole.glob("0-*.ckpt"))
    run(name, tiny, tmp_path, ckpt_path=last_of_epoch, callbacks=[SaveEverywhere(once)], **options)
    for epoch in (1, 2):
        resumed = run(name, tiny, tmp_path, ckpt_path=min(once.glob(f"{epoch}-*.ckpt")), **options)
        assert differing_tensors(expected, resumed) == []
