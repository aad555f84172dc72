"""The operating system refuses to write more: runs continue, and what was there is kept."""

import json

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lit_rlhf
from full_disk import largest_file
from lit_rlhf.callbacks import PolicyCheckpoint
from lit_rlhf.training.checkpoint_files import CheckpointFiles
from runs import make_data, make_module, make_trainer


@pytest.mark.parametrize("size", [0, 1, 200, 5000, 60_000, 200_000, 399_000])
def test_a_checkpoint_that_does_not_fit_raises_and_keeps_the_old_one(size, tmp_path):
    path = tmp_path / "last.ckpt"
    CheckpointFiles().save_checkpoint({"step": 1, "w": torch.zeros(100_000)}, path)
    with pytest.raises(OSError, match="File too large"), largest_file(size):
        CheckpointFiles().save_checkpoint({"step": 2, "w": torch.ones(100_000)}, path)
    assert torch.load(path, weights_only=True)["step"] == 1
    assert [file.name for file in tmp_path.iterdir()] == ["last.ckpt"]


class Fill(Callback):
    """Let the disk be full in the second and third update."""

    def __init__(self, size):
        self.size, self.full = size, None

    def on_train_batch_start(self, trainer, *args):
        if trainer.global_step == 1:
            self.full = largest_file(self.size)
            self.full.__enter__()

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 3:
            self.full.__exit__(None, None, None)


@pytest.mark.filterwarnings("ignore:not written at the end of the run. policy/best")  # if later ones are no better
@pytest.mark.parametrize(
    ("lora", "size"), [*((None, size) for size in (0, 50, 3000, 15_000, 50_000)), ({"r": 2}, 0), ({"r": 2}, 4000)]
)
def test_a_run_survives_a_disk_that_is_full_for_a_while(lora, size, tiny, tmp_path):
    """Whichever file of a policy or a checkpoint is the first that does not fit."""
    keeper = PolicyCheckpoint(monitor="val/loss", mode="max", every_n_updates=1)
    callbacks = [Fill(size), lit_rlhf.callbacks.Curves(every_n_seconds=0), keeper]
    trainer = make_trainer(tmp_path, max_steps=5, val_check_interval=1, enable_checkpointing=True, callbacks=callbacks)
    with pytest.warns(UserWarning, match=r"could not be written.*training continues"):
        trainer.fit(make_module("SFT", tiny, lora=lora, lr=0.3), make_data("SFT", rows=20))
    assert trainer.global_step == 5 and keeper.unwritten.reasons.keys() <= {"policy/best"}
    assert torch.load(keeper.last_path, weights_only=True)["global_step"] == 5
    assert {"best", "last"} == {path.name for path in (tmp_path / "policy").iterdir()}
    assert json.loads((tmp_path / "policy/last/lit_rlhf.json").read_text())
