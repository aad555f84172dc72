import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from fake_algorithm import FakeAlgorithm, FakeOnlineAlgorithm
from lit_rlhf.callbacks import PolicyCheckpoint, SaveOnSignal

HANDLED = [signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU, signal.SIGHUP, signal.SIGINT]


@pytest.fixture(autouse=True)
def interruptible():
    """Handle Ctrl-C also in a background job, whose shell makes it ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


class Kill(Callback):
    def __init__(self, number, batch=None, in_validation=False):
        self.number, self.batch, self.in_validation = number, batch, in_validation

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == self.batch:
            os.kill(os.getpid(), self.number)

    def on_validation_start(self, trainer, pl_module):
        if self.in_validation:
            os.kill(os.getpid(), self.number)


class Validations(Callback):
    count = 0

    def on_validation_start(self, trainer, pl_module):
        self.count += 1


@pytest.mark.parametrize("number", HANDLED, ids=str)
def test_signal_saves_and_stops_at_the_end_of_the_batch(make_trainer, number, capsys):
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup ignores it
    handlers = [signal.getsignal(n) for n in HANDLED]
    callbacks = PolicyCheckpoint(), Kill(number, batch=4), SaveOnSignal(), (validations := Validations())
    trainer = make_trainer(*callbacks, accumulate_grad_batches=4, min_epochs=2, min_steps=8, max_epochs=3)
    trainer.fit(module := FakeOnlineAlgorithm())
    path = callbacks[0].last_path
    progress = torch.load(path, weights_only=True)["loops"]["fit_loop"]["epoch_loop.batch_progress"]["current"]
    assert progress["processed"] == 5 and trainer.global_step == 1  # within an accumulation window and a rollout
    assert validations.count == 1 and module.exports == ["best", "last"]
    assert f"saved {path}; resume with: lit-rlhf fit ... --ckpt_path {path}" in capsys.readouterr().out
    assert [signal.getsignal(n) for n in HANDLED] == handlers
    assert (trainer.limit_val_batches, trainer.fit_loop.min_epochs, trainer.min_steps) == (1.0, 2, 8)


def test_resume_after_a_signal_is_exact(make_trainer):
    uninterrupted, stopped, resumed = FakeAlgorithm(), FakeAlgorithm(), FakeAlgorithm()
    make_trainer(PolicyCheckpoint()).fit(uninterrupted)
    make_trainer(checkpoint := PolicyCheckpoint(), Kill(signal.SIGTERM, batch=6), SaveOnSignal()).fit(stopped)
    assert not torch.equal(stopped.weights, uninterrupted.weights)
    make_trainer(PolicyCheckpoint(), SaveOnSignal()).fit(resumed, ckpt_path=checkpoint.last_path)
    assert torch.equal(resumed.weights, uninterrupted.weights)


def test_signal_during_validation_stops_without_another_batch(make_trainer):
    checkpoint = PolicyCheckpoint()
    trainer = make_trainer(checkpoint, Kill(signal.SIGTERM, in_validation=True), SaveOnSignal())
    trainer.fit(FakeAlgorithm())
    saved = torch.load(checkpoint.last_path, weights_only=True)
    assert trainer.global_step == saved["global_step"] == 4
    assert next(v["best_score"] for k, v in saved["callbacks"].items() if "PolicyCheckpoint" in k) == pytest.approx(0.3)


def test_signal_saves_without_a_policy_checkpoint(make_trainer, tmp_path):
    make_trainer(Kill(signal.SIGTERM, batch=2), SaveOnSignal()).fit(FakeAlgorithm())
    assert torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_signal_before_the_first_update_saves_nothing(make_trainer, tmp_path, capsys):
    trainer = make_trainer(Kill(signal.SIGTERM, in_validation=True), SaveOnSignal(), num_sanity_val_steps=1)
    trainer.fit(FakeAlgorithm())
    assert trainer.global_step == 0 and not list(tmp_path.iterdir())
    assert "stopped before the first update" in capsys.readouterr().out


def test_second_interrupt_stops_immediately_and_saves(make_trainer):
    class Twice(Kill):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)

    checkpoint = PolicyCheckpoint()
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(SystemExit):
        make_trainer(checkpoint, Twice(signal.SIGINT, batch=2), SaveOnSignal()).fit(FakeAlgorithm())
    assert torch.load(checkpoint.last_path, weights_only=True)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) == handler


SCRIPT = """
import os, signal, sys, torch
from fake_algorithm import FakeOnlineAlgorithm
from lightning.pytorch import Callback, Trainer
from lit_rlhf.callbacks import PolicyCheckpoint, SaveOnSignal

class Kill(Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == int(sys.argv[2]):
            os.kill(os.getpid(), signal.SIGTERM)

class Distributed(FakeOnlineAlgorithm):
    def export(self, folder):
        if self.global_rank == 0:
            super().export(folder)
        self.trainer.strategy.barrier()

trainer = Trainer(
    default_root_dir=sys.argv[1], accelerator="cpu", devices=2, strategy="ddp", use_distributed_sampler=False,
    max_epochs=3, logger=False, enable_progress_bar=False, callbacks=[PolicyCheckpoint(), Kill(), SaveOnSignal()],
)
trainer.fit(Distributed())
open(f"{sys.argv[1]}/steps-{trainer.global_rank}", "w").write(str(trainer.global_step))
"""  # fmt: skip


@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_signal_to_either_process_saves_on_both(tmp_path, rank):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    paths = [str(Path(__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(script), str(tmp_path), str(rank)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    assert [(tmp_path / f"steps-{i}").read_text() for i in (0, 1)] == ["3", "3"]
    assert torch.load(tmp_path / "version_0" / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 3
    assert (tmp_path / "policy" / "last" / "weights.pt").exists()
