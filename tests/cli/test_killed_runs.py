"""Runs that are killed at random moments, again and again, end with the weights of an uninterrupted run."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from commands import write_workspace
from lit_rlhf.training.checkpoint_files import read_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
UPDATES, KILLS = 24, 3
PREFERENCES = ["--data=PreferenceData", "--data.train=preferences.jsonl"]
DEMONSTRATIONS = ["--data=DemonstrationData", "--data.train=demonstrations.jsonl"]
ONLINE = [
    "--data=PromptData", "--data.train=prompts.jsonl", "--model.rewards=[mine.words]",
    "--model.sampling.max_new_tokens=6",
]  # fmt: skip
LORA = "--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
SHARDS = [
    "--trainer.strategy=fsdp2", "--trainer.strategy.save_distributed_checkpoint=true", "--trainer.devices=2",
]  # fmt: skip
RUNS = {
    "RLOO": ["--model=RLOO", *ONLINE, "--model.updates.num_minibatches=2"],
    "GRPO, two epochs a rollout": ["--model=GRPO", *ONLINE, "--model.updates.update_epochs=2"],
    "PPO": ["--model=PPO", *ONLINE, "--model.updates.update_epochs=2"],
    "VanillaPG": ["--model=VanillaPG", *ONLINE],
    "RAFT, accumulating": ["--model=RAFT", *ONLINE, "--trainer.accumulate_grad_batches=2"],
    "Reinforce, LoRA": ["--model=Reinforce", *ONLINE, LORA],
    "RLOO, bf16-mixed": ["--model=RLOO", *ONLINE, "--trainer.precision=bf16-mixed"],
    "DPO, bfloat16 under an adapter": ["--model=DPO", *PREFERENCES, LORA, "--model.load={dtype: bfloat16}"],
    "RewardModeling": ["--model=RewardModeling", *PREFERENCES],
    "SFT, workers": [
        "--model=SFT",
        "--data=DemonstrationData",
        "--data.train=demonstrations.jsonl",
        "--data.num_workers=2",
    ],
    "RLOO, two processes": ["--model=RLOO", *ONLINE, "--trainer.strategy=ddp", "--trainer.devices=2"],
    "RLOO, shards": ["--model=RLOO", *ONLINE, "--model.updates.num_minibatches=2", *SHARDS],
    "SFT, shards, accumulating": ["--model=SFT", *DEMONSTRATIONS, "--trainer.accumulate_grad_batches=2", *SHARDS],
}


def start(options: list[str], root: str, folder: Path) -> subprocess.Popen:
    common = [
        "--seed_everything=5", "--model.policy=tiny", "--data.val=4", "--data.batch_size=4",
        "--trainer.accelerator=cpu", f"--trainer.max_steps={UPDATES}", "--trainer.max_epochs=-1",
        "--trainer.limit_val_batches=1", "--trainer.val_check_interval=7",
        "--trainer.check_val_every_n_epoch=null", "--trainer.enable_progress_bar=false",
        "--checkpoint.every_n_updates=1", f"--trainer.default_root_dir={root}", "--ckpt_path=last",
    ]  # fmt: skip
    path = os.pathsep.join([str(folder), str(Path(__file__).parents[2])])
    with (folder / f"{root}.log").open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "lit_rlhf", "fit", *options, *common], cwd=folder, stdout=log, stderr=log,
            env={**os.environ, "PYTHONPATH": path}, start_new_session=True,
        )  # fmt: skip


def updates_saved(root: Path) -> int:
    """Return the number of updates of the newest checkpoint."""
    paths = root.glob("version_*/checkpoints/last.ckpt")
    return max((read_checkpoint(path, mmap=True)["global_step"] for path in paths), default=0)


def kill_after(updates: int, process: subprocess.Popen, root: Path, delay: float, number: int) -> bool:
    """Send a signal a moment after a run has saved so many updates; return False if it has ended before that."""
    while process.poll() is None and updates_saved(root) < updates:
        time.sleep(0.02)
    time.sleep(delay)
    if process.poll() is not None:
        return False
    if number == signal.SIGKILL:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=120)
    return True


def finish(process: subprocess.Popen, log: Path) -> None:
    assert process.wait(timeout=300) == 0, log.read_text()[-3000:]


def weights(root: Path) -> dict[str, torch.Tensor]:
    return load_file(next((root / "policy" / "last").glob("*.safetensors")))


@pytest.mark.parametrize("name", RUNS)
def test_a_run_killed_at_random_moments_ends_with_the_weights_of_an_uninterrupted_one(tmp_path, name):
    write_workspace(tmp_path)
    rng = random.Random(name)
    finish(start(RUNS[name], "whole", tmp_path), tmp_path / "whole.log")

    kills, longest = 0, 1.0 if "shards" in name else 0.1  # sharded updates and their checkpoints take longer
    for i, updates in enumerate(sorted(rng.sample(range(1, UPDATES - 3), KILLS))):
        process, number = start(RUNS[name], "killed", tmp_path), signal.SIGTERM if i == 1 else signal.SIGKILL
        kills += kill_after(updates, process, tmp_path / "killed", rng.uniform(0, longest), number)
    finish(start(RUNS[name], "killed", tmp_path), tmp_path / "killed.log")

    expected, found = weights(tmp_path / "whole"), weights(tmp_path / "killed")
    assert kills
    assert expected.keys() == found.keys()
    assert [n for n, value in expected.items() if not torch.equal(value, found[n])] == []
