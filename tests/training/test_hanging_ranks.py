"""A process of several that hangs, fails or is killed: all of them end, save what they can, and say why."""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

REWARDS = """
import ctypes, os, signal, time
from unittest.mock import Mock
import torch

def here(trainer_state):
    rank = os.environ["LOCAL_RANK"]
    if trainer_state.global_step == 2:
        os.write(1, f"PROCESS {rank} {os.getpid()}\\n".encode())  # whole, where both write at once
    return trainer_state.global_step == 2 and rank == os.environ["HANGS"]

def sleeps(completions, trainer_state, **kwargs):
    if here(trainer_state):
        time.sleep(1000)
    return [1.0 * i for i in range(len(completions))]

def holds_interpreter(completions, trainer_state, **kwargs):
    if here(trainer_state):
        signal.pthread_sigmask(signal.SIG_BLOCK, signal.valid_signals())
        ctypes.PyDLL(None).sleep(1000)
    return [1.0 * i for i in range(len(completions))]

def raises(completions, trainer_state, **kwargs):
    if here(trainer_state):
        raise OSError("no judge today")
    return [1.0 * i for i in range(len(completions))]

def runs_out_of_memory(completions, trainer_state, **kwargs):
    if here(trainer_state):  # in the update, while the other process waits for its gradients
        torch.Tensor.backward = Mock(side_effect=torch.OutOfMemoryError("CUDA out of memory"))
    return [1.0 * i for i in range(len(completions))]

def exits(completions, trainer_state, **kwargs):
    if here(trainer_state):
        os._exit(3)
    return [1.0 * i for i in range(len(completions))]
"""
RUN = """
from lit_rlhf.callbacks import signals
from lit_rlhf.training import processes
signals.REWARD_SECONDS, processes.GRACE_SECONDS = 1.0, 3.0
Peers = processes.Peers
processes.Peers = lambda group, pids, seconds: Peers(group, pids, seconds / SHORTER)  # not at the start
from lit_rlhf.cli import main
if __name__ == "__main__":
    main(["fit", "--config=quickstart", "--data.train_size=40", "--data.val_size=4", "--data.batch_size=4",
          "--model.num_samples=2", "--model.sampling.max_new_tokens=4", "--model.rewards=[mine.REWARD]",
          "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=DDPStrategy",
          "--trainer.strategy.timeout=0:05:00",
          "--trainer.limit_val_batches=0", "--trainer.max_steps=4", "--trainer.default_root_dir=here"])
"""


class Run:
    """A run of two processes, in which one process hangs in the reward of the third update."""

    def __init__(self, folder: Path, reward: str, hangs: int, shorter: int = 1) -> None:
        (folder / "mine.py").write_text(REWARDS)
        (folder / "run.py").write_text(RUN.replace("REWARD]", f"{reward}]").replace("SHORTER", str(shorter)))
        path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
        environment = {**os.environ, "PYTHONPATH": path, "HANGS": str(hangs), "OMP_NUM_THREADS": "1"}
        options = dict(cwd=folder, env=environment, text=True)
        self.folder, self.errors = folder, folder / "errors.txt"  # a pipe that nobody reads fills and stops the run
        with self.errors.open("w") as errors:
            pipes = dict(stdout=subprocess.PIPE, stderr=errors)
            self.launcher = subprocess.Popen([sys.executable, "run.py"], **pipes, **options)

    def wait_until_it_hangs(self) -> dict[int, int]:
        """Return the process ids, by rank."""
        found = {}
        for line in self.launcher.stdout:
            found |= {int(rank): int(pid) for rank, pid in re.findall(r"PROCESS (\d) (\d+)", line)}
            if len(found) == 2:
                return found
        raise AssertionError(self.errors.read_text()[-3000:])

    def end(self, seconds: float = 60) -> str:
        """Wait for the end of both processes, which both hold the pipe of the output; return their errors.

        By their timeout alone they would end after five minutes, or 20 seconds where it is shorter.
        """
        start = time.monotonic()
        self.launcher.communicate(timeout=90)
        errors = self.errors.read_text()
        assert time.monotonic() - start < seconds, errors
        return errors

    def saved_step(self) -> int:
        return torch.load(next(self.folder.rglob("last.ckpt")), weights_only=True)["global_step"]


@pytest.fixture
def run(tmp_path):
    runs = []

    def start(*args, **options):
        runs.append(Run(tmp_path, *args, **options))
        return runs[0]

    yield start
    for started in runs:
        with contextlib.suppress(OSError):
            started.launcher.kill()
        started.launcher.wait()
        started.launcher.stdout.close()
        print(started.errors.read_text()[-3000:])


def test_a_reward_that_hangs_on_one_process_ends_all_after_the_timeout(run):
    started = run("sleeps", hangs=1, shorter=15)
    started.wait_until_it_hangs()
    errors = started.end(seconds=40)
    assert started.launcher.returncode == 1, errors
    assert "not finished within 20 s of the other processes (the timeout of trainer.strategy)" in errors
    assert "waited for the reward 'sleeps'" in errors and "Traceback" not in errors
    assert started.saved_step() == 2


@pytest.mark.slow
@pytest.mark.parametrize(("hangs", "signalled"), [(1, 0), (0, 1), (1, 1)])
def test_a_signal_to_one_process_ends_all(run, hangs, signalled):
    started = run("sleeps", hangs=hangs)
    os.kill(started.wait_until_it_hangs()[signalled], signal.SIGTERM)
    errors = started.end()
    assert started.launcher.returncode == 128 + signal.SIGTERM, errors
    assert "SIGTERM ended the run while it waited for the reward 'sleeps'" in errors and "Traceback" not in errors
    assert started.saved_step() == 2


@pytest.mark.slow
def test_a_process_whose_launcher_is_killed_ends(run):
    started = run("sleeps", hangs=1)
    started.wait_until_it_hangs()
    started.launcher.kill()
    assert "process 1 ends: the one that started it is gone" in started.end()


@pytest.mark.slow
def test_a_process_that_cannot_be_interrupted_is_ended(run):
    started = run("holds_interpreter", hangs=1, shorter=15)
    started.wait_until_it_hangs()
    errors = started.end(seconds=40)
    assert started.launcher.returncode not in (0, None)
    assert "did not finish within 20 s of this one" in errors and "Traceback" not in errors


@pytest.mark.slow
@pytest.mark.parametrize(
    ("reward", "sentence"),
    [
        ("raises", "no judge today"),
        ("exits", "another process of this run has ended"),
        ("runs_out_of_memory", "CUDA out of memory: train on fewer rows at a time by"),
    ],
)
def test_a_failure_on_one_process_ends_all(run, reward, sentence):
    started = run(reward, hangs=1)
    started.wait_until_it_hangs()
    errors = started.end()
    assert started.launcher.returncode not in (0, None)
    assert sentence in errors
    if reward == "raises":
        assert started.saved_step() == 2
