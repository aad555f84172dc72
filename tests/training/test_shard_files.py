"""Checkpoints with a folder of shards: read by one process, checked, and never half-written."""

import os
import pickle
from unittest.mock import patch

import pytest
import torch
import torch.distributed.checkpoint as dcp
from lightning.pytorch import Callback
from safetensors.torch import load_file

import lit_rlhf
from full_disk import largest_file
from lit_rlhf.callbacks import PolicyCheckpoint
from lit_rlhf.cli.checkpoints import export
from lit_rlhf.models.shards import SHARDS
from lit_rlhf.training.checkpoint_files import read_checkpoint
from lit_rlhf.training.checkpoint_search import find_checkpoint
from lit_rlhf.training.strategies import FSDP2Strategy
from runs import make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore")  # of a single process that shards


class Full(Callback):
    """Let the disk be full while the second checkpoint is written."""

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 2:
            self.full = largest_file(60_000)
            self.full.__enter__()

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 2:
            self.full.__exit__(None, None, None)


def fit(root, folder, *callbacks, steps=3, **options):
    """Train, with a checkpoint after each update; return the module and what keeps the checkpoints."""
    keeper = PolicyCheckpoint(monitor="val/loss", every_n_updates=1, save_best=False)
    strategy = options.pop("strategy", "auto")
    trainer = make_trainer(
        root, max_steps=steps, enable_checkpointing=True, callbacks=[*callbacks, keeper], strategy=strategy, devices=1
    )
    module = make_module("SFT", folder, lora={"r": 4})
    torch.manual_seed(0)  # initialization of the adapter
    try:
        with patch.dict(os.environ):  # the address of the process group
            trainer.fit(module, make_data("SFT"), **options)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    return module, keeper


@pytest.fixture
def sharded(tiny, tmp_path):
    """Return a run of three updates, and what kept its checkpoints."""
    return fit(tmp_path, tiny, strategy=FSDP2Strategy(save_distributed_checkpoint=True))


def test_one_process_resumes(sharded, tiny, tmp_path):
    path = sharded[1].last_path
    assert {file.name for file in path.parent.iterdir()} == {path.name, shards_of(path)["folder"]}
    expected, resumed = (
        load_file(run[1].policies["last"] / "adapter_model.safetensors")
        for run in (
            fit(tmp_path / "whole", tiny, steps=5, strategy="fsdp2"),
            fit(tmp_path, tiny, steps=5, ckpt_path="last"),
        )
    )
    torch.testing.assert_close(resumed, expected, atol=1e-6, rtol=1e-6)


def test_one_process_validates_the_trained_weights(sharded, tiny, tmp_path):
    expected = validate(tmp_path, sharded[1].policies["last"])
    assert validate(tmp_path, tiny, lora={"r": 4}, ckpt_path=sharded[1].last_path) == pytest.approx(expected)


def validate(root, folder, lora=None, ckpt_path=None) -> float:
    module = make_module("SFT", folder, lora=lora)
    return make_trainer(root).validate(module, make_data("SFT"), ckpt_path=ckpt_path, verbose=False)[0]["val/loss"]


def test_an_export_is_that_of_training(sharded, tmp_path):
    folder, trained = export(sharded[1].last_path, tmp_path / "exported"), sharded[1].policies["last"]
    name = "adapter_model.safetensors"
    assert (folder / name).read_bytes() == (trained / name).read_bytes()


def shards_of(path) -> dict:
    return read_checkpoint(path, mmap=True)[SHARDS]


@pytest.mark.parametrize("damage", ["missing", "altered", "truncated"])
def test_a_damaged_folder_is_refused(damage, sharded, tiny, tmp_path):
    path = sharded[1].last_path
    shards = shards_of(path)
    file = path.parent / shards["folder"] / next(name for name in shards["files"] if name.endswith(".distcp"))
    content = bytearray(file.read_bytes())
    file.unlink()
    if damage == "altered":
        content[len(content) // 2] ^= 1
    if damage != "missing":
        file.write_bytes(content[: -1 if damage == "truncated" else None])
    message = r"is missing: copy the folder" if damage == "missing" else r"is damaged \(truncated or altered\)"
    with pytest.raises(ValueError, match=message):
        validate(tmp_path, tiny, {"r": 4}, path)
    with pytest.raises(ValueError, match=message):
        find_checkpoint("last", tmp_path)
    with pytest.raises(ValueError, match=message):
        export(path, tmp_path / "exported")


def test_a_full_disk_keeps_the_previous_checkpoint(tiny, tmp_path):
    strategy = FSDP2Strategy(save_distributed_checkpoint=True)
    _, keeper = fit(tmp_path, tiny, Full(), steps=3, strategy=strategy)
    assert read_checkpoint(keeper.last_path)["global_step"] == 3 and not keeper.unwritten.reasons
    assert len(list(keeper.last_path.parent.iterdir())) == 2


class Command:
    def __reduce__(self):
        return print, ("run",)


def test_the_index_is_read_as_data(tmp_path):
    dcp.save({"a": torch.ones(2)}, storage_writer=dcp.FileSystemWriter(tmp_path), no_dist=True)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Command()))
    with pytest.raises(ValueError, match=r"can't be read: .*holds builtins.print, which could run commands"):
        lit_rlhf.models.shards.read_shards({"a": torch.ones(2)}, tmp_path)
