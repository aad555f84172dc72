"""Sharded models: what is refused, and runs of the command line with two processes."""

import csv
import json
import os
import subprocess
import sys
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

import lit_rlhf
from commands import write_workspace
from lit_rlhf.cli import main
from lit_rlhf.cli.config_files import expand_configs
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.training.checks import check_processes
from lit_rlhf.training.finite import check_finite_weights
from lit_rlhf.training.strategies import FSDP2Strategy, check_sharded
from runs import make_module, make_trainer

AT_EXIT = """
import atexit, pathlib, sys
def say_threads():
    names = {path.read_text().strip() for path in pathlib.Path("/proc/self/task").glob("*/comm")}
    print("THREADS AT EXIT", names, file=sys.stderr)
atexit.register(say_threads)
"""
LORA = "--model.lora={r: 4, lora_alpha: 8, target_modules: all-linear}"
SHARDED = "--trainer.strategy.save_distributed_checkpoint=true"


def test_a_parameter_that_is_not_sharded_is_refused():
    layer = nn.Linear(2, 1)
    layer.bias.requires_grad_(False)
    with pytest.raises(ValueError, match=r"'weight' \(1 in all\) is trainable but not sharded, .* use .*ddp"):
        check_sharded(layer.named_parameters())


def test_fsdp2_has_a_short_name_and_options():
    assert isinstance(make_trainer(".", strategy="fsdp2", devices=2).strategy, FSDP2Strategy)
    args = ["fit", "--trainer.strategy", "fsdp2", "--trainer.strategy.gather", "false"]
    assert expand_configs(args)[2] == "FSDP2Strategy"
    assert expand_configs(args[:3]) == args[:3]
    assert expand_configs(["fit", "--trainer.strategy=ddp", "--trainer.strategy.timeout=0:10:00"])[1] == (
        "--trainer.strategy=DDPStrategy"
    )


def test_fsdp2_is_allowed():
    check_processes(FSDP2Strategy(), world_size=2, devices=2, nodes=1)


def run(folder, root: str, *options: str) -> dict[str, torch.Tensor]:
    """Train in the workspace with two processes and sharded models, and return the exported weights."""
    finished = call(folder, "fit", root, *options)
    assert finished.stderr.count("THREADS AT EXIT") >= 2
    assert "gloo_" not in finished.stderr, "threads of a process group can abort Python while it ends"
    return load_file(next((folder / root / "policy" / "last").glob("*.safetensors")))


def call(folder, command: str, root: str, *options: str) -> subprocess.CompletedProcess:
    """Run a command in the workspace."""
    common = [
        "--model.policy=tiny", "--data.train=prompts.jsonl", "--data.val=4", "--model.rewards=[mine.words]",
        "--model.sampling.max_new_tokens=4", "--data.batch_size=2", "--model.optimizer.lr=0.01",
        "--trainer.accelerator=cpu", "--trainer.devices=2", "--trainer.strategy=fsdp2",
        "--trainer.limit_val_batches=1", f"--trainer.default_root_dir={root}", "--ckpt_path=last",
    ]  # fmt: skip
    path = os.pathsep.join([str(folder), *sys.path])
    called = [sys.executable, "-m", "lit_rlhf", command, "--config=rloo", *common, *options]
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(called, cwd=folder, env=environment, capture_output=True, text=True, timeout=250)
    assert finished.returncode == 0, finished.stderr[-3000:]
    assert "FSDP2-wrapped" not in finished.stderr
    return finished


@pytest.mark.parametrize(
    "options",
    [
        ["--model.lora=null", "--model.updates.num_minibatches=2"],
        pytest.param([LORA, SHARDED], marks=pytest.mark.slow),
        pytest.param([LORA], marks=pytest.mark.slow),
        pytest.param(["--model.lora=null", "--model.updates.num_minibatches=2", SHARDED], marks=pytest.mark.slow),
    ],
    ids=["all weights", "LoRA, a folder", "LoRA", "all weights, a folder"],
)
def test_a_run_resumes_bitwise_and_exports(options, tmp_path):
    write_workspace(tmp_path)
    with (tmp_path / "mine.py").open("a") as file:
        file.write(AT_EXIT)
    whole = run(tmp_path, "whole", *options, "--trainer.max_steps=4")
    half = run(tmp_path, "parts", *options, "--trainer.max_steps=2")
    if SHARDED in options and LORA not in options:  # resumed after the last update
        again = run(tmp_path, "parts", *options, "--trainer.max_steps=2", "--trainer.devices=3")
        assert [name for name, value in half.items() if not torch.equal(value, again[name])] == []
    resumed = run(tmp_path, "parts", *options, "--trainer.max_steps=4")
    assert [name for name, value in whole.items() if not torch.equal(value, resumed[name])] == []
    checkpoint = tmp_path / "whole" / "version_0" / "checkpoints" / "last.ckpt"
    assert len(list(checkpoint.parent.iterdir())) == 1 + (SHARDED in options)
    main(["export", "--ckpt_path", str(checkpoint), "--out", str(tmp_path / "exported")])
    exported = load_file(next((tmp_path / "exported").glob("*.safetensors")))
    assert exported.keys() == whole.keys()
    assert [name for name, value in whole.items() if not torch.equal(value, exported[name])] == []


@pytest.mark.slow
def test_a_folder_of_shards_is_evaluated_by_any_number_of_processes(tmp_path):
    write_workspace(tmp_path)
    call(tmp_path, "fit", "run", "--model.lora=null", SHARDED, "--trainer.max_steps=2")
    assert list(tmp_path.rglob("last.ckpt.shards-*"))
    tested, predicted = [], []
    for options in (["--trainer.devices=1", "--trainer.strategy=auto"], ["--trainer.strategy=ddp"], [], [SHARDED]):
        call(tmp_path, "test", "run", "--model.lora=null", *options)
        call(tmp_path, "predict", "run", "--model.lora=null", *options)
        tested.append(
            metrics(max((tmp_path / "run").glob("test_*/metrics.csv"), key=lambda path: path.stat().st_mtime))
        )
        rows = map(json.loads, (tmp_path / "run" / "predictions.jsonl").read_text().splitlines())
        predicted.append(sorted((row["index"], row["sample"], row["completion"]) for row in rows))
    for other in tested[1:]:
        assert other == pytest.approx(tested[0], abs=1e-5)
    assert predicted == [predicted[0]] * 4


def metrics(path) -> dict[str, float]:
    with path.open() as file:
        rows = list(csv.DictReader(file))
    found = {name: float(value) for row in rows for name, value in row.items() if value}
    assert "test/kl" in found and found["test/kl"] != 0
    return {name: value for name, value in found.items() if name.startswith("test/")}


def test_overriding_save_model_alone_is_refused(tiny):
    sharding = Sharding(Mock(spec=DeviceMesh))

    class Archived(lit_rlhf.SFT):
        def save_model(self, folder):
            (folder / "archive").touch()

    with pytest.raises(ValueError, match=r"Archived overrides save_model.* rebuild_model\(weights, folder\), too, or"):
        Archived(str(tiny)).shard_models(sharding)

    class Rebuilt(Archived):
        def rebuild_model(self, weights, folder):
            self.save_model(folder)

    Rebuilt(str(tiny)).shard_models(sharding)  # nothing is loaded yet


def test_whole_weights_are_checked_without_a_reduction():
    layer = nn.Linear(2, 1)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    check_finite_weights(optimizer, 1, sum_over_ranks=pytest.fail)
    layer.bias.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="update 1 left weights that are not finite"):
        check_finite_weights(optimizer, 1, sum_over_ranks=pytest.fail)


def test_splitting_sampling_is_refused_where_all_ranks_sample_in_step(tiny):
    strategy = FSDP2Strategy(gather=False)
    strategy._lightning_module = make_module("RLOO", tiny, sampling=lit_rlhf.Sampling(max_new_tokens=4, batch_size=2))
    with pytest.raises(ValueError, match=r"sampling.batch_size .* gather=false .* lower data.batch_size"):
        strategy.setup(make_trainer("."))
