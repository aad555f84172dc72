"""Lightning's callbacks work, or are refused before anything is written."""

import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, EMAWeightAveraging, ModelPruning

from lit_rlhf.callbacks import PolicyCheckpoint
from runs import differing_tensors, make_data, make_module, make_trainer, training_state


def fit(name, tiny, root, callbacks=(), batch_size=4, ckpt_path=None, max_steps=3):
    keeper = PolicyCheckpoint(save_best=False, every_n_updates=1)
    options = dict(max_steps=max_steps, limit_val_batches=0, enable_checkpointing=True)
    trainer = make_trainer(root, callbacks=[keeper, *callbacks], **options)
    trainer.fit(make_module(name, tiny), make_data(name, batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer, keeper


@pytest.mark.parametrize("name", ["SFT", "RLOO"])
def test_a_search_for_the_batch_size_leaves_no_trace(name, tiny, tmp_path):
    finder = BatchSizeFinder(init_val=2, max_trials=3, steps_per_trial=2)
    found, _ = fit(name, tiny, tmp_path / "found", [finder])
    expected, _ = fit(name, tiny, tmp_path / "given", batch_size=finder.optimal_batch_size)
    assert finder.optimal_batch_size == 8 and not differing_tensors(training_state(expected), training_state(found))
    names = {path.name for path in (tmp_path / "found").iterdir()}
    assert names == {path.name for path in (tmp_path / "given").iterdir()} == {"version_0", "policy"}


def test_a_search_in_a_resumed_run_is_refused(tiny, tmp_path):
    _, keeper = fit("SFT", tiny, tmp_path / "first")
    with pytest.raises(ValueError, match="BatchSizeFinder would lose the progress of the checkpoint: resume without"):
        fit("SFT", tiny, tmp_path, [BatchSizeFinder()], ckpt_path=keeper.last_path)
    assert not (tmp_path / "policy").exists()


@pytest.mark.filterwarnings("ignore:You're using the WeightAveraging callback")
@pytest.mark.parametrize(
    "callback", [EMAWeightAveraging(decay=0.5), ModelPruning("l1_unstructured")], ids=["averaging", "pruning"]
)
def test_callbacks_that_exchange_weights_are_refused(callback, tiny, tmp_path):
    with pytest.raises(ValueError, match=f"{type(callback).__name__} .*: train without it"):
        fit("SFT", tiny, tmp_path, [callback])
    assert not (tmp_path / "policy").exists()


def test_a_resume_with_other_batches_says_so(tiny, tmp_path, caplog):
    _, keeper = fit("SFT", tiny, tmp_path)
    for size, expected in ((4, False), (6, True)):
        caplog.clear()
        with caplog.at_level("INFO"):
            fit("SFT", tiny, tmp_path, batch_size=size, ckpt_path=keeper.last_path, max_steps=4)
        assert ("12 rows in batches of 4 over all processes" in caplog.text) == expected
    assert torch.load(keeper.last_path, weights_only=True)["rows"] == [12, 4]
