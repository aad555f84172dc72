"""KL controller, in runs with a real Trainer."""

import pytest
import torch
from lightning.pytorch import Callback

import lit_rlhf
from lit_rlhf import functional as F
from lit_rlhf.callbacks import AdaptiveKL
from runs import grouped, make_data, make_module, make_trainer


class Recorder(Callback):
    """Keep the KL and the coefficient of each rollout; save a checkpoint after the third step."""

    def __init__(self, folder=None):
        self.folder, self.rollouts = folder, []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx % pl_module.steps_per_rollout == 0:
            metrics = trainer.callback_metrics
            self.rollouts.append((float(metrics["train/kl"]), float(metrics["train/kl_coef"])))
        if self.folder is not None and trainer.current_epoch == 0 and batch_idx == 2:
            trainer.save_checkpoint(self.folder / "third.ckpt")


def train(folder, root, ckpt_path=None, save=None, kl_penalty="k1_reward"):
    recorder = Recorder(save)
    module = make_module("RLOO", folder, kl_coef=0.5, num_minibatches=2, kl_penalty=kl_penalty)
    trainer = make_trainer(root, max_epochs=2, callbacks=[AdaptiveKL(target=0.5, gain=2.0), recorder])
    trainer.fit(module, make_data("RLOO"), ckpt_path=ckpt_path)
    return module, recorder.rollouts


@pytest.mark.parametrize("kl_penalty", ["k1_reward", "k2_loss"])
def test_each_coefficient_follows_from_the_previous_kl(kl_penalty, tiny, tmp_path):
    module, rollouts = train(tiny, tmp_path, kl_penalty=kl_penalty)
    coefs = [coef for _, coef in rollouts] + [module.kl_coef]
    assert coefs[0] == pytest.approx(0.5) and min(coefs) < 0.4
    for (kl, coef), next_coef in zip(rollouts, coefs[1:], strict=True):
        assert next_coef == pytest.approx(F.adapted_kl_coef(coef, kl, target=0.5, gain=2.0), rel=1e-4)


@pytest.mark.parametrize("kl_penalty", ["k1_reward", "k2_loss"])
def test_resume_restores_the_coefficient_and_is_exact(kl_penalty, tiny, tmp_path):
    uninterrupted, _ = train(tiny, tmp_path, save=tmp_path, kl_penalty=kl_penalty)
    resumed, rollouts = train(tiny, tmp_path, ckpt_path=tmp_path / "third.ckpt", kl_penalty=kl_penalty)
    assert rollouts and resumed.kl_coef == uninterrupted.kl_coef
    weights = resumed.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in uninterrupted.state_dict().items())


def test_coefficient_is_constant_within_a_rollout(tiny, tmp_path):
    coefs = []

    class RecordCoefficients(lit_rlhf.RLOO):
        def kl_terms(self, rollout, terms):
            coefs.append(self.kl_coef)
            return super().kl_terms(rollout, terms)

    options = dict(rewards=[lambda completions, **kwargs: [1.0 * len(c) for c in completions]], max_new_tokens=4)
    module = RecordCoefficients(
        str(tiny), kl_coef=0.5, kl_penalty="k2_loss", **grouped({"num_minibatches": 2, **options})
    )
    trainer = make_trainer(tmp_path, max_steps=6, callbacks=[AdaptiveKL(target=5.0, gain=2.0)])
    trainer.fit(module, make_data("RLOO"))
    assert coefs[::2] == coefs[1::2] and coefs[0] > coefs[2] > coefs[4]


@pytest.mark.parametrize("options", [{"target": 0.0}, {"gain": -1.0}, {"gain": 5.0}])
def test_invalid_arguments_raise(options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}=.* must be above 0"):
        AdaptiveKL(**options)


@pytest.mark.parametrize(("name", "options"), [("RLOO", {"kl_coef": 0.0}), ("SFT", {})])
def test_algorithms_without_a_kl_coefficient_raise(name, options, tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1, callbacks=[AdaptiveKL()])
    with pytest.raises(ValueError, match=f"{name} has no kl_coef above 0"):
        trainer.fit(make_module(name, tiny, **options), make_data(name))


def test_trainer_test_uses_the_coefficient_of_the_checkpoint(tiny, tmp_path):
    train(tiny, tmp_path, save=tmp_path)
    saved = torch.load(tmp_path / "third.ckpt", weights_only=True)["callbacks"]["AdaptiveKL"]["kl_coef"]
    module = make_module("RLOO", tiny, kl_coef=0.5, num_minibatches=2)
    trainer = make_trainer(tmp_path, callbacks=[AdaptiveKL(target=0.5, gain=2.0)])
    trainer.test(module, make_data("RLOO"), ckpt_path=tmp_path / "third.ckpt", verbose=False)
    assert module.kl_coef == saved != 0.5


def test_second_fit_starts_from_its_own_coefficient(tiny, tmp_path):
    callback = AdaptiveKL(target=1e-3, gain=0.5)
    for kl_coef in (0.5, 0.05):
        trainer = make_trainer(tmp_path, max_steps=2, callbacks=[callback], limit_val_batches=0)
        trainer.fit(make_module("RLOO", tiny, kl_coef=kl_coef), make_data("RLOO"))
        assert abs(callback.kl_coef / kl_coef - 1) < 0.25
