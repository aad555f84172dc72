import warnings

import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from fake_algorithm import FakeAlgorithm, FakeOnlineAlgorithm
from lit_rlhf.callbacks import PolicyCheckpoint


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


def test_failed_write_keeps_the_last_complete_checkpoint(make_trainer, monkeypatch):
    trainer, _ = fit(make_trainer, checkpoint := PolicyCheckpoint())
    complete = checkpoint.last_path.read_bytes()

    def write_half(path, **_):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(trainer, "save_checkpoint", write_half)
    checkpoint._saved = None
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(trainer)
    assert checkpoint.last_path.read_bytes() == complete


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
    monkeypatch.setattr(trainer, "save_checkpoint", lambda *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.warns(UserWarning, match="disk full"), pytest.raises(ValueError, match="the cause"):
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
    module.scores, module.reward_weights = [0.3, 0.2, 0.1], [1.0]
    fit(make_trainer, PolicyCheckpoint(), module)
    assert module.exports.count("best") == 1

    class DecreasingWeights(FakeAlgorithm):
        @property
        def reward_weights(self):
            return [1.0 - self.global_step / 100]

    decreasing = DecreasingWeights()
    decreasing.scores = module.scores
    fit(make_trainer, PolicyCheckpoint(), decreasing)
    assert decreasing.exports.count("best") > 1


def test_ckpt_path_best_raises(make_trainer):
    trainer, module = fit(make_trainer, PolicyCheckpoint())
    with pytest.raises(ValueError, match="not configured to save the best model"):
        trainer.validate(module, ckpt_path="best")
