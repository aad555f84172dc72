"""A signal while a reward hangs: the run saves what it has and ends within seconds."""

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch

from fake_algorithm import FakeAlgorithm
from lit_rlhf.callbacks import SaveOnSignal, signals
from lit_rlhf.rewards import Scorer, calls

REWARDS = """
import asyncio, re, time
from lit_rlhf.rewards import Guarded

def wait(trainer_state):
    if trainer_state.global_step == 2:
        print("HANGING", flush=True)
        return True

def sync(completions, trainer_state, **kwargs):
    if wait(trainer_state):
        time.sleep(1000)
    return [1.0 * i for i in range(len(completions))]

def pattern(completions, trainer_state, **kwargs):
    if wait(trainer_state):
        re.match(r"(a+)+b", "a" * 60)
    return [1.0 * i for i in range(len(completions))]

async def asynchronous(completions, trainer_state, **kwargs):
    if wait(trainer_state):
        await asyncio.sleep(1000)
    return [1.0 * i for i in range(len(completions))]

guarded = Guarded(sync)
"""
RUN = """
import sys
import lit_rlhf, mine
from lit_rlhf.cli import main
main(["fit", "--config=quickstart", "--data.train_size=40", "--data.val_size=4", "--data.batch_size=4",
      "--model.num_samples=2", "--model.sampling.max_new_tokens=4", f"--model.rewards=[mine.{sys.argv[1]}]",
      "--trainer.limit_val_batches=0", "--trainer.max_steps=4", "--trainer.default_root_dir=here"])
"""


@pytest.mark.parametrize(
    "name", ["sync", *(pytest.param(n, marks=pytest.mark.slow) for n in ("asynchronous", "pattern"))]
)
def test_a_signal_during_a_hanging_reward_saves_and_ends_the_run(tmp_path, name):
    (tmp_path / "mine.py").write_text(REWARDS)
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", textwrap.dedent(RUN), name]
    options = dict(cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, text=True)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        for line in process.stdout:
            if "HANGING" in line:
                break
        process.send_signal(signal.SIGTERM)
        start = time.monotonic()
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM, errors
    assert time.monotonic() - start < 30  # 6 s, and the end of the process
    assert f"SIGTERM ended the run while it waited for the reward '{name}'" in errors
    saved = torch.load(next(tmp_path.rglob("last.ckpt")), weights_only=True)
    assert saved["global_step"] == 2


def test_a_reward_that_returns_in_time_is_not_interrupted(make_trainer, monkeypatch):
    monkeypatch.setattr(signals, "REWARD_SECONDS", 0.2)
    callback = SaveOnSignal()
    before = signal.getsignal(signal.SIGALRM)

    def quick(completions):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)
        return [0.0]

    def hangs(completions):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(10)

    def call(reward):
        return Scorer([reward])(["p"], [["a"]], [[[1]]], [[True]])

    callback._install()
    try:
        call(quick)
        time.sleep(0.3)  # the alarm outside a reward does nothing
        with pytest.raises(
            calls.RewardInterrupted, match="SIGTERM ended the run while it waited for the reward 'hangs'"
        ):
            call(hangs)
        callback.on_exception(make_trainer(), FakeAlgorithm(), RuntimeError())
        time.sleep(0.3)
        assert signal.getsignal(signal.SIGALRM) == before
    finally:
        callback._restore_handlers()
