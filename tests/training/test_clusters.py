"""Runs on two machines, and under Slurm, each played by processes with the variables of its launcher."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import write_workspace

REWARD = """
import os, pathlib, time
def slow(completions, trainer_state, **kwargs):
    if trainer_state.global_step == 2 and (here := pathlib.Path("wait")).exists():
        rank = os.environ.get("SLURM_PROCID") or os.environ["RANK"]
        pathlib.Path("waiting" + rank).write_text(str(os.getpid()))
        while here.exists():
            time.sleep(0.05)
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""
FIT = [
    "fit", "--config=rloo", "--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=4",
    "--model.rewards=[slow.slow]", "--model.sampling.max_new_tokens=4", "--data.batch_size=2", "--model.lora=null",
    "--model.optimizer.lr=0.01", "--model.updates.num_minibatches=2", "--trainer.accelerator=cpu",
    "--trainer.max_steps=4", "--ckpt_path=last",
]  # fmt: skip
TWO_DEVICES = ["--trainer.devices=2"]
TWO_NODES = ["--trainer.devices=1", "--trainer.num_nodes=2"]
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path):
    write_workspace(tmp_path)
    (tmp_path / "slow.py").write_text(REWARD)
    return tmp_path


def start(folder: Path, root: str, strategy: str, launcher: list[str], options: list[str], **variables: str):
    path = os.pathsep.join([str(folder), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **variables}
    command = [sys.executable, "-m", *launcher, "lit_rlhf", *FIT, *options]
    command += [f"--trainer.strategy={strategy}", f"--trainer.default_root_dir={root}"]
    with (folder / f"{root}.{len(list(folder.iterdir()))}.txt").open("w") as log:
        return subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)


def finish(*processes: subprocess.Popen) -> list[int]:
    return [process.wait(timeout=200) for process in processes]


def weights(folder: Path, root: str) -> dict[str, torch.Tensor]:
    return load_file(next((folder / root / "policy" / "last").glob("*.safetensors")))


def differing(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_machines_started_by_torchrun_train_as_one_with_two_devices(strategy, folder):
    assert finish(start(folder, "one", strategy, [], TWO_DEVICES)) == [0]
    assert finish(*torchrun(folder, "two", strategy)) == [0, 0]
    assert differing(weights(folder, "one"), weights(folder, "two")) == []


def torchrun(folder: Path, root: str, strategy: str, *options: str) -> list[subprocess.Popen]:
    """Start a run on two machines."""
    port = str(29600 + os.getpid() % 300)
    return [
        start(
            folder, root, strategy,
            ["torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", f"--node-rank={rank}",
             "--master-addr=127.0.0.1", f"--master-port={port}", "-m"],
            [*TWO_NODES, *options],
        )
        for rank in range(2)
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("strategy", "often"),
    [("ddp", "--checkpoint.every_n_updates=null"), ("fsdp2", "--checkpoint.every_n_updates=1")],
    ids=["ddp", "fsdp2"],
)
def test_a_process_killed_on_one_machine_ends_the_other_and_the_run_resumes_bitwise(strategy, often, folder):
    """Under DDP rank 0 has all of the model, and saves alone."""
    assert finish(*torchrun(folder, "whole", strategy, often)) == [0, 0]
    (folder / "wait").touch()
    nodes = torchrun(folder, "parts", strategy, often)
    wait_for_both(folder, nodes)
    pids = [int((folder / f"waiting{rank}").read_text()) for rank in range(2)]
    os.kill(pids[1], signal.SIGKILL)
    (folder / "wait").unlink()
    killed = time.monotonic()
    assert all(code != 0 for code in finish(*nodes)) and time.monotonic() - killed < 60
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    (checkpoint,) = folder.glob("parts/**/last.ckpt")
    assert strategy == "fsdp2" or torch.load(checkpoint, weights_only=False)["global_step"] == 2
    assert finish(*torchrun(folder, "parts", strategy, often)) == [0, 0]
    assert differing(weights(folder, "whole"), weights(folder, "parts")) == []


def wait_for_both(folder: Path, processes: list[subprocess.Popen]) -> None:
    """Wait until both ranks wait in the reward."""
    while not all((path := folder / f"waiting{rank}").exists() and path.read_text() for rank in range(2)):
        assert [process.poll() for process in processes] == [None, None]
        time.sleep(0.1)


def slurm(folder: Path, root: str, strategy: str) -> list[subprocess.Popen]:
    """Start two tasks as `srun` does, on one machine."""
    port = str(29900 + os.getpid() % 90)
    job = {"SLURM_JOB_ID": "77", "SLURM_JOB_NAME": "train", "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2"}
    job |= {"SLURM_NNODES": "1", "SLURM_NODEID": "0", "SLURM_NODELIST": "127.0.0.1", "MASTER_ADDR": "127.0.0.1"}
    ranks = [{"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank), "MASTER_PORT": port} for rank in range(2)]
    return [start(folder, root, strategy, [], TWO_DEVICES, **job, **rank) for rank in ranks]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_job_that_slurm_signals_saves_ends_with_its_code_and_resumes_bitwise(strategy, folder):
    """`#SBATCH --signal=SIGUSR1@...` signals every task, and the batch script requeues on the exit code."""
    assert finish(*slurm(folder, "whole", strategy)) == [0, 0]
    (folder / "wait").touch()
    tasks = slurm(folder, "parts", strategy)
    wait_for_both(folder, tasks)
    for task in tasks:
        task.send_signal(signal.SIGUSR1)
    (folder / "wait").unlink()
    assert finish(*tasks) == [128 + signal.SIGUSR1] * 2
    assert not list(folder.rglob("hpc_ckpt*"))
    assert finish(*slurm(folder, "parts", strategy)) == [0, 0]
    assert differing(weights(folder, "whole"), weights(folder, "parts")) == []
