"""`ckpt_path="last"` and `"best"` of a Trainer in Python."""

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lit_rlhf.callbacks import PolicyCheckpoint
from runs import differing_tensors, make_data, make_module, make_trainer, training_state


def fit(tiny, root, max_steps, ckpt_path=None, callbacks=()):
    keeper = PolicyCheckpoint(monitor="val/loss", mode="min", save_best=False, save_last=False)
    trainer = make_trainer(root, max_steps=max_steps, enable_checkpointing=True, callbacks=[keeper, *callbacks])
    trainer.fit(make_module("SFT", tiny), make_data("SFT"), ckpt_path=ckpt_path)
    return trainer


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("kind", ["PolicyCheckpoint", "ModelCheckpoint", "ModelCheckpoint without any"])
def test_last_continues_the_newest_run(kind, tiny, tmp_path):
    expected = training_state(fit(tiny, tmp_path / "whole", 5))
    callbacks = {
        "ModelCheckpoint": [ModelCheckpoint(tmp_path / "elsewhere", save_last=True, every_n_train_steps=3)],
        "ModelCheckpoint without any": [ModelCheckpoint(tmp_path / "elsewhere", every_n_train_steps=99)],
    }.get(kind, [])
    root = tmp_path / "a root"
    fit(tiny, root, 2)
    fit(tiny, root, 3, "last", callbacks)
    if kind == "ModelCheckpoint":
        (root / "version_1/checkpoints/last.ckpt").unlink()
    resumed = fit(tiny, root, 5, "last", callbacks)
    assert not differing_tensors(expected, training_state(resumed))
    assert (root / "version_2").is_dir()


def test_last_without_a_checkpoint_starts_anew_and_says_so(tiny, tmp_path, caplog):
    with caplog.at_level("INFO"):
        trainer = fit(tiny, tmp_path, 1, "last")
    assert trainer.global_step == 1 and "there is no checkpoint in" in caplog.text
    with pytest.raises(ValueError, match="there is no checkpoint in"):
        make_trainer(tmp_path / "new").test(make_module("SFT", tiny), make_data("SFT"), ckpt_path="last")


def test_best_is_found_or_says_what_is_kept(tiny, tmp_path):
    fit(tiny, tmp_path, 2)
    with pytest.raises(ValueError, match="validated no policy: give `last` or a file"):
        fit(tiny, tmp_path, 3, "best")
