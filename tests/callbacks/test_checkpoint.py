import errno
import os
import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fake_algorithm import FakeAlgorithm, FakeOnlineAlgorithm
from lit_rlhf.callbacks import PolicyCheckpoint
from lit_rlhf.training import checkpoint_files


def fit(make_trainer, checkpoint, module=None, *others, ckpt_path=None, **flags):
    trainer = make_trainer(checkpoint, *others, **flags)
    module = module or FakeAlgorithm()
    trainer.fit(module, ckpt_path=ckpt_path, weights_only=True)
    return trainer, module


def weights_and_adam(trainer, module):
    moments = trainer.optimizers[0].state_dict()["state"][0]
    return torch.cat([module.weights.detach(), moments["exp_avg"], moments["exp_avg_sq"], moments["step"].reshape(1)])


def test_lightning_adds_no_default_checkpoint_callback(make_trainer):
    assert not [c for c in make_trainer(PolicyCheckpoint()).callbacks if isinstance(c, ModelCheckpoint)]


def test_best_follows_the_monitor_and_last_is_the_final_policy(make_trainer, tmp_path):
    checkpoint = PolicyCheckpoint()
    _, module = fit(make_trainer, checkpoint, num_sanity_val_steps=1)
    assert module.exports == ["best", "best", "last"]  # 0.3, 0.2 and 0.4 after 4, 8 and 12 updates
    assert checkpoint.best_score == pytest.approx(0.4)
    module.scores = [0.0, 0.1, 0.3, 0.2]  # 0.0 would be the score of the sanity check
    fit(make_trainer, checkpoint := PolicyCheckpoint(mode="min"), module)
    assert checkpoint.best_score == pytest.approx(0.1)
    assert torch.equal(torch.load(tmp_path / "policy" / "last" / "weights.pt"), module.weights.detach())
    assert checkpoint.policies == {name: tmp_path / "policy" / name for name in ("best", "last")}


def test_missing_monitor_warns_once(make_trainer):
    with pytest.warns(UserWarning, match="val/rewards") as record:
        _, module = fit(make_trainer, PolicyCheckpoint(monitor="val/rewards"))
    assert sum("val/rewards" in str(w.message) for w in record) == 1
    assert module.exports == ["last"]


def test_nan_is_never_the_best(make_trainer):
    module = FakeAlgorithm()
    module.scores = [float("nan")]
    fit(make_trainer, checkpoint := PolicyCheckpoint(), module)
    assert checkpoint.best_score is None and module.exports == ["last"]


class StopAt(Callback):
    def __init__(self, batches, error=None):
        self.batches, self.error = batches, error

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if self.error and trainer.fit_loop.total_batch_idx == self.batches:
            raise self.error

    def on_train_batch_end(self, trainer, *args):
        if not self.error and trainer.fit_loop.total_batch_idx + 1 == self.batches:
            trainer.should_stop = True


@pytest.mark.parametrize("flags", [{}, {"limit_train_batches": 5}, {"accumulate_grad_batches": 3}], ids=str)
@pytest.mark.parametrize("how", ["max_steps", "should_stop", "exception"])
@pytest.mark.parametrize("where", [1, 4, 6, 13])
def test_resume_is_exact_wherever_the_run_ended(make_trainer, flags, how, where):
    flags = {"max_epochs": 3, "max_steps": -1, **flags}
    accumulated = flags.get("accumulate_grad_batches", 1)
    uninterrupted = weights_and_adam(*fit(make_trainer, PolicyCheckpoint(), **flags))
    if accumulated > 1 and how != "max_steps":
        where -= where % accumulated  # the module itself saves the gradients of an incomplete window
    stop = StopAt(where, ValueError("stop") if how == "exception" else None)
    stopped = {**flags, "max_steps": where} if how == "max_steps" else flags
    others = [] if how == "max_steps" else [stop]
    try:
        fit(make_trainer, checkpoint := PolicyCheckpoint(), None, *others, **stopped)
    except ValueError:
        assert how == "exception"
    if checkpoint.last_path is None:
        assert where == 0 and how != "max_steps"
        return
    resumed = fit(make_trainer, PolicyCheckpoint(), ckpt_path=checkpoint.last_path, **flags)
    assert torch.equal(weights_and_adam(*resumed), uninterrupted)


class StopAfterValidation(Callback):
    def on_validation_end(self, trainer, pl_module):
        trainer.should_stop = True


def test_stop_after_validation_resumes_in_the_same_epoch_and_keeps_the_best_score(make_trainer):
    uninterrupted = weights_and_adam(*fit(make_trainer, PolicyCheckpoint(), max_epochs=2))
    trainer, _ = fit(make_trainer, checkpoint := PolicyCheckpoint(), None, StopAfterValidation(), max_epochs=2)
    assert trainer.global_step == 4
    resumed = fit(make_trainer, again := PolicyCheckpoint(), ckpt_path=checkpoint.last_path, max_epochs=2)
    assert torch.equal(weights_and_adam(*resumed), uninterrupted)
    assert again.best_score == pytest.approx(0.4)
    module = FakeAlgorithm()
    module.scores = [0.2]  # lower than the best score of the run
    fit(make_trainer, PolicyCheckpoint(), module, ckpt_path=checkpoint.last_path, max_epochs=2)
    assert module.exports == ["last"]


def test_resuming_a_complete_run_exports_the_policy_and_trains_nothing(make_trainer):
    first = fit(make_trainer, checkpoint := PolicyCheckpoint())
    trainer, module = fit(make_trainer, PolicyCheckpoint(), ckpt_path=checkpoint.last_path)
    assert trainer.global_step == 12 and torch.equal(module.weights, first[1].weights)
    assert module.exports == ["last"]


def test_checkpoints_are_written_every_n_updates_only(make_trainer):
    saves = []

    class RecordSaves(PolicyCheckpoint):
        def save(self, trainer):
            saves.append((trainer.global_step, trainer.fit_loop.total_batch_idx + 1))
            return super().save(trainer)

    fit(make_trainer, RecordSaves(every_n_updates=2), accumulate_grad_batches=2)
    assert saves == [(2, 4), (4, 8), (6, 12), (6, 12)]


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class FullDisk:
    """A disk that is full for some of the saves: flushing a checkpoint fails."""

    def __init__(self, monkeypatch, *failing):
        self.saves, self.failing = 0, failing
        monkeypatch.setattr(checkpoint_files.torch, "save", self.save)
        self.write = torch.serialization.save

    def save(self, content, file):
        checkpoint = isinstance(content, dict)  # not an export
        self.saves += checkpoint
        self.write(content, file)
        if checkpoint and self.saves in self.failing:
            raise FULL


def test_failed_save_warns_and_the_run_continues(make_trainer, monkeypatch, tmp_path):
    disk = FullDisk(monkeypatch, 2, 3)
    with pytest.warns(UserWarning, match=r"last.ckpt could not be written: No space .* training continues") as record:
        trainer, _ = fit(make_trainer, checkpoint := PolicyCheckpoint(every_n_updates=2))
    assert len([w for w in record if "could not be written" in str(w.message)]) == 1
    assert disk.saves == 7 and trainer.global_step == 12
    assert torch.load(checkpoint.last_path, weights_only=True)["global_step"] == 12
    assert not checkpoint.unwritten.reasons and not list(tmp_path.rglob("partial-*"))


def test_failed_last_save_keeps_the_previous_checkpoint_and_is_reported(make_trainer, monkeypatch, tmp_path):
    FullDisk(monkeypatch, 3, 4)  # the end of training, and the attempt after it
    with (
        pytest.warns(UserWarning, match="last.ckpt could not be written"),
        pytest.warns(UserWarning, match="not written at the end of the run: last.ckpt: No space left"),
    ):
        _, module = fit(make_trainer, checkpoint := PolicyCheckpoint(every_n_updates=5))
    assert torch.load(checkpoint.last_path, weights_only=True)["global_step"] == 10
    assert set(checkpoint.unwritten.reasons) == {"last.ckpt"} and module.exports[-1] == "last"


def test_failed_export_is_reported(make_trainer, monkeypatch):
    class NoSpace(FakeAlgorithm):
        def export(self, folder):
            raise FULL

    with (
        pytest.warns(UserWarning, match="policy/best could not be written: No space"),
        pytest.warns(UserWarning, match="not written at the end of the run: policy/best: .*; policy/last: No space"),
    ):
        fit(make_trainer, checkpoint := PolicyCheckpoint(), NoSpace())
    assert checkpoint.best_score is None and not checkpoint.policies


def test_weights_that_are_not_finite_never_replace_finite_ones(make_trainer):
    class Explodes(FakeAlgorithm):
        def on_train_batch_end(self, outputs, batch, batch_idx):
            if self.global_step == 7:
                self.weights.data[1] = torch.inf

    with pytest.warns(UserWarning, match="the weight 'weights' is not finite any more"):
        _, module = fit(make_trainer, checkpoint := PolicyCheckpoint(every_n_updates=3), Explodes())
    saved = torch.load(checkpoint.last_path, weights_only=True)
    assert saved["global_step"] == 6 and saved["state_dict"]["weights"].isfinite().all()
    assert module.exports == ["best"] and checkpoint.best_step == 4
    assert set(checkpoint.unwritten.reasons) == {"last.ckpt", "policy/best", "policy/last"}


@pytest.mark.parametrize("scores", [[0.2, 0.2, 0.2], [float("nan"), 0.3, 0.3], [0.1, 0.5, float("inf")]], ids=str)
def test_ties_take_the_later_and_the_end_says_which(make_trainer, scores, caplog):
    module = FakeAlgorithm()
    module.scores = [*scores[:1], *scores]  # after 4, 8 and 12 updates
    with caplog.at_level("INFO"):
        _, module = fit(make_trainer, checkpoint := PolicyCheckpoint(), module)
    assert checkpoint.best_step == (8 if scores[-1] == float("inf") else 12)
    assert f"is of update {checkpoint.best_step} (val/reward" in caplog.text


def test_a_checkpoint_before_the_first_update_resumes(make_trainer, tmp_path):
    class SaveAtStart(Callback):
        def on_train_start(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / "start.ckpt")

    uninterrupted = weights_and_adam(*fit(make_trainer, PolicyCheckpoint(), None, SaveAtStart(), max_epochs=2))
    resumed = fit(make_trainer, PolicyCheckpoint(), ckpt_path=tmp_path / "start.ckpt", max_epochs=2)
    assert torch.equal(weights_and_adam(*resumed), uninterrupted)


def test_exception_within_an_update_writes_no_checkpoint(make_trainer):
    class FailsAfterBackward(FakeAlgorithm):
        def on_after_backward(self):
            if self.global_step == 3:
                raise ValueError("after backward")

    with pytest.raises(ValueError, match="after backward"):
        fit(make_trainer, checkpoint := PolicyCheckpoint(every_n_updates=2), FailsAfterBackward())
    assert torch.load(checkpoint.last_path, weights_only=True)["global_step"] == 2


def test_failed_save_does_not_hide_the_first_exception(make_trainer, monkeypatch):
    checkpoint = PolicyCheckpoint()
    trainer = make_trainer(checkpoint, StopAt(3, ValueError("the cause")))
    FullDisk(monkeypatch, 1)
    with pytest.warns(UserWarning, match="No space left"), pytest.raises(ValueError, match="the cause"):
        trainer.fit(FakeAlgorithm())


def test_fast_dev_run_writes_nothing(make_trainer, tmp_path):
    _, module = fit(make_trainer, PolicyCheckpoint(), FakeOnlineAlgorithm(), fast_dev_run=2)
    assert module.exports == [] and not list(tmp_path.iterdir())


def test_every_n_updates_below_1_raises():
    with pytest.raises(ValueError, match="every_n_updates=0"):
        PolicyCheckpoint(every_n_updates=0)


def test_module_without_export_raises_at_start(make_trainer):
    class NoExport(FakeAlgorithm):
        export = None

    with pytest.raises(TypeError, match="NoExport"), warnings.catch_warnings():
        fit(make_trainer, PolicyCheckpoint(), NoExport())


def test_second_fit_resets_the_best_score(make_trainer, tmp_path):
    checkpoint = PolicyCheckpoint()
    fit(make_trainer, checkpoint)
    lower = FakeAlgorithm()
    lower.scores = [-1.0]
    fit(make_trainer, checkpoint, lower, default_root_dir=tmp_path / "second")
    assert "best" in lower.exports and checkpoint.best_score == -1


def test_scores_with_different_reward_weights_are_not_compared(make_trainer):
    module = FakeAlgorithm()
    module.scores, module.reward_weights = [0.3, 0.2, 0.1], {"style": 1.0}
    fit(make_trainer, PolicyCheckpoint(), module)
    assert module.exports.count("best") == 1

    class DecreasingWeights(FakeAlgorithm):
        @property
        def reward_weights(self):
            return {"style": 1.0 - self.global_step / 100}

    decreasing = DecreasingWeights()
    decreasing.scores = module.scores
    fit(make_trainer, PolicyCheckpoint(), decreasing)
    assert decreasing.exports.count("best") > 1


def test_ckpt_path_best_raises(make_trainer):
    trainer, module = fit(make_trainer, PolicyCheckpoint())
    with pytest.raises(ValueError, match="not configured to save the best model"):
        trainer.validate(module, ckpt_path="best")
