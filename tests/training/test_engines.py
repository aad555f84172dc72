"""Runs whose completions a vLLM server samples."""

import os
import signal
import threading

import pytest
import torch
from lightning.pytorch import Callback

from fake_vllm import FakeVLLM
from lit_rlhf import Engine, Policy
from lit_rlhf.callbacks import PolicyCheckpoint, SaveOnSignal, signals
from lit_rlhf.errors import InputError
from lit_rlhf.rewards.base import RewardInterrupted
from runs import differing_tensors, make_data, make_module, make_trainer, training_state
from tiny import make_llama, make_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    tokenizer = make_tokenizer(chat=False)
    path = tmp_path_factory.mktemp("model")
    make_llama(len(tokenizer), tie_word_embeddings=True).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


class Metrics(Callback):
    def __init__(self):
        self.rows = []

    def on_train_batch_end(self, trainer, *args):
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})


def fit(name, folder, root, server, ckpt_path=None, max_steps=3, engine=None, callbacks=(), **options):
    metrics = Metrics()
    engine = Engine(url=server.url, retries=1, backoff=0.01, **(engine or {}))
    module = make_module(name, folder, engine=engine, **options)
    trainer = make_trainer(
        root,
        max_steps=max_steps,
        callbacks=[metrics, *callbacks],
        num_sanity_val_steps=0,
        enable_checkpointing=any(isinstance(callback, PolicyCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, make_data(name, val=None), ckpt_path=ckpt_path)
    return trainer, metrics.rows


@pytest.mark.parametrize("name", ["RLOO", "GRPO", "PPO", "RAFT"])
def test_log_probabilities_are_the_policys_after_every_update(name, folder, tmp_path):
    server = FakeVLLM(folder)
    _, rows = fit(name, folder, tmp_path, server)
    assert server.renewals == 3
    assert all(row["train/logprob_mismatch"] < 1e-5 for row in rows)
    assert "train/entropy" not in rows[-1]


def test_validation_and_prediction_use_the_server(folder, tmp_path):
    server = FakeVLLM(folder)
    module = make_module("RLOO", folder, engine=Engine(url=server.url, retries=1, backoff=0.01))
    trainer = make_trainer(tmp_path)
    data = make_data("RLOO")
    trainer.validate(module, data, verbose=False)
    asked = len(server.requests)
    assert asked > 0 and server.renewals == 1
    assert abs(float(trainer.callback_metrics["val/kl"])) < 1e-4
    rows = trainer.predict(module, data)
    assert len(server.requests) > asked and server.renewals == 2
    assert rows[0][0]["completion"]


def test_a_run_whose_server_fails_resumes_exactly(folder, tmp_path):
    whole, _ = fit("RLOO", folder, tmp_path / "whole", FakeVLLM(folder), max_steps=4, num_minibatches=2)
    server = FakeVLLM(folder)

    class Down(Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step == 2:
                server.failures = [503] * 20
            trainer.save_checkpoint(tmp_path / f"{trainer.global_step}.ckpt")

    with pytest.raises(InputError, match="resume from the last checkpoint"):
        fit("RLOO", folder, tmp_path / "cut", server, max_steps=4, num_minibatches=2, callbacks=[Down()])
    for step, renewals in ((1, 1), (2, 1)):  # inside a rollout, which the checkpoint holds, and between two
        again_server, path = FakeVLLM(folder), tmp_path / f"{step}.ckpt"
        again, _ = fit("RLOO", folder, tmp_path, again_server, path, max_steps=4, num_minibatches=2)
        assert not differing_tensors(training_state(whole), training_state(again))
        assert again_server.renewals == renewals


def test_a_signal_ends_a_run_that_waits_for_the_server(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "REWARD_SECONDS", 0.3)
    server, waits, done = FakeVLLM(folder), threading.Event(), []

    class Count(Callback):
        def on_train_batch_end(self, *args):
            done.append(1)

    def hang(number):
        if len(done) == 2 and not waits.is_set():  # later requests come after the run, which handles signals
            os.kill(os.getpid(), signal.SIGTERM)
            waits.wait(250)

    server.before_completion = hang
    keeper = PolicyCheckpoint()
    with pytest.raises(
        RewardInterrupted, match=r"SIGTERM ended the run while it waited for the vLLM server http://127"
    ):
        fit("RLOO", folder, tmp_path, server, callbacks=[Count(), keeper, SaveOnSignal()], max_steps=5)
    waits.set()
    assert torch.load(keeper.last_path, weights_only=True)["global_step"] == 2


def sgd(parameters):
    return torch.optim.SGD(parameters, lr=0.1)


def test_importance_weights_are_one_where_the_server_has_the_policy(folder, tmp_path):
    options = {"max_steps": 2, "optimizer": sgd}  # Adam turns a gradient that is rounding into a full update
    plain, _ = fit("RLOO", folder, tmp_path, FakeVLLM(folder), **options)
    capped, rows = fit("RLOO", folder, tmp_path, FakeVLLM(folder), **options, correction="truncate")
    assert rows[0]["train/importance_weight"] == pytest.approx(1.0, abs=1e-4)
    assert rows[0]["train/importance_cut"] == 0.0
    for name, value in training_state(plain).items():
        assert torch.allclose(value, training_state(capped)[name], rtol=0, atol=1e-5), name


@pytest.mark.parametrize("name", ["RLOO", "PPO"])
def test_importance_weights_are_truncated_ratios(name, folder, tmp_path):
    """The server has the weights of the start, and the policy's are others; tokens for PPO, completions for RLOO."""
    server = FakeVLLM(folder, ignores_renewals=True)
    with torch.no_grad():
        for parameter in server.policy.parameters():
            parameter.mul_(1.05)
    seen = {}
    options = {"correction": "truncate", "cap": 1.1, "level": "token" if name == "PPO" else "sequence"}
    module = make_module(name, folder, engine=Engine(url=server.url, tolerance=9.0), **options)

    class Seen(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen["rollout"] = module.rollout

    module.policy = Policy.from_pretrained(str(folder))
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[Seen(), metrics := Metrics()])
    reference = Policy.from_pretrained(str(folder))
    trainer.fit(module, make_data(name, val=None))
    rollout = seen["rollout"]
    own = reference.logprobs(rollout.prompts, rollout.completions).detach()
    ratio, theirs = own, rollout.completions.logprobs
    ratio = (own - theirs).exp() if name == "PPO" else (own.sum(-1) - theirs.sum(-1)).exp()
    mask = rollout.loss_mask if name == "PPO" else rollout.valid
    row = metrics.rows[0]
    assert row["train/importance_weight"] == pytest.approx(float(ratio.clamp(max=1.1)[mask].mean()), abs=1e-4)
    assert row["train/importance_cut"] == pytest.approx(float((ratio > 1.1)[mask].float().mean()), abs=1e-6)
    assert 0 < row["train/importance_cut"] < 1


def test_correction_where_it_is_not_defined_is_refused(folder, tmp_path):
    server = FakeVLLM(folder)
    with pytest.raises(InputError, match=r"importance\.correction needs sampling without top_p"):
        fit("RLOO", folder, tmp_path, server, correction="truncate", top_p=0.9)
    with pytest.raises(InputError, match="RAFT learns from completions, whoever sampled them"):
        make_module("RAFT", folder, correction="truncate")
