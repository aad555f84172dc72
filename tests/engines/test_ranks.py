"""Several processes whose completions one vLLM server samples."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import fake_vllm
from commands import write_workspace

pytestmark = pytest.mark.slow
TESTS = Path(__file__).parents[1]


def run(folder: Path, root: str, *options: str) -> dict[str, torch.Tensor]:
    """Train, and return the weights."""
    command = [
        sys.executable, "-m", "lit_rlhf", "fit", "--model=RLOO", "--data=PromptData", "--data.train=prompts.jsonl",
        "--model.policy=tiny", "--model.rewards=[mine.words]", "--model.sampling.max_new_tokens=6", "--data.val=4",
        "--model.optimizer=torch.optim.SGD", "--model.optimizer.lr=0.1", "--trainer.accelerator=cpu",
        "--trainer.max_steps=3", "--trainer.enable_progress_bar=false", f"--trainer.default_root_dir={root}",
    ]  # fmt: skip
    path = os.pathsep.join([str(folder), str(TESTS)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *options], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return load_file(next((folder / root / "policy" / "last").glob("*.safetensors")))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_one_with_one_server(strategy, tmp_path):
    write_workspace(tmp_path)
    servers = [fake_vllm.FakeVLLM(tmp_path / "tiny") for _ in range(2)]
    one, two = (f"--model.engine.url={server.url}" for server in servers)
    expected = run(tmp_path, "one", "--data.batch_size=4", one)
    found = run(tmp_path, "two", "--data.batch_size=2", two, "--trainer.devices=2", f"--trainer.strategy={strategy}")
    assert_near(found, expected, load_file(tmp_path / "tiny" / "model.safetensors"))
    assert servers[0].renewals == servers[1].renewals > 2


def test_two_processes_start_one_server(tmp_path):
    write_workspace(tmp_path)
    vllm, record = tmp_path / "vllm", tmp_path / "record.json"
    vllm.write_text(f'#!/bin/sh\nFAKE_VLLM_RECORD={record} exec {sys.executable} {fake_vllm.__file__} "$@"\n')
    vllm.chmod(0o755)
    start = f"--model.engine.start={vllm}"
    expected = run(tmp_path, "one", "--data.batch_size=4", start)
    found = run(tmp_path, "two", "--data.batch_size=2", start, "--trainer.devices=2", "--trainer.strategy=fsdp2")
    assert_near(found, expected, load_file(tmp_path / "tiny" / "model.safetensors"))
    assert not Path(f"/proc/{json.loads(record.read_text())['pid']}").exists()


def assert_near(found, expected, start):
    assert max(float((expected[name] - start[name]).abs().max()) for name in start) > 1e-3
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, atol=2e-5, rtol=0, msg=name)
