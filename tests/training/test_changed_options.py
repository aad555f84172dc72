"""Options that a resumed run changes take effect, or are refused."""

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping

import lit_rlhf
from runs import make_data, make_module, make_trainer, vowels


class Rates(Callback):
    """Record the learning rate of each update."""

    def __init__(self):
        self.rates = []

    def on_before_zero_grad(self, trainer, module, optimizer):
        self.rates.append(optimizer.param_groups[0]["lr"])


def train(tiny, root, max_steps, ckpt_path=None, name="SFT", callbacks=(), **options):
    rates = Rates()
    trainer = make_trainer(root, max_steps=max_steps, max_epochs=9, limit_val_batches=0, callbacks=[rates, *callbacks])
    trainer.fit(make_module(name, tiny, **options), make_data(name), ckpt_path=ckpt_path)
    return trainer, rates.rates


def adam(lr, **options):
    return lambda params: torch.optim.AdamW(params, lr=lr, **options)


def warmup(count, decay="constant"):
    return lambda optimizer: lit_rlhf.Warmup(optimizer, warmup=count, decay=decay)


def step_lr(gamma):
    return lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=gamma)


def sequential(optimizer):
    parts = [
        torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5),
        torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5),
    ]
    return torch.optim.lr_scheduler.SequentialLR(optimizer, parts, milestones=[3])


START = {"optimizer": adam(1e-2)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"optimizer": adam(1e-3)}),
        ({"lr_scheduler": warmup(4)}, {"optimizer": adam(1e-3), "lr_scheduler": warmup(4)}),
        ({"lr_scheduler": warmup(4)}, {"lr_scheduler": warmup(6, "cosine")}),
        ({"lr_scheduler": step_lr(0.5)}, {"optimizer": adam(1e-3), "lr_scheduler": step_lr(0.5)}),
        ({"lr_scheduler": step_lr(0.5)}, {"lr_scheduler": step_lr(0.25)}),
        ({"lr_scheduler": warmup(4)}, {"lr_scheduler": sequential}),
        ({"lr_scheduler": sequential}, {"optimizer": adam(1e-3), "lr_scheduler": sequential}),
        ({"lr_scheduler": warmup(4)}, {}),
        ({}, {"lr_scheduler": warmup(8)}),
    ],
    ids=["rate", "rate of a schedule", "schedule", "rate of steps", "steps", "other class", "sequence", "none", "new"],
)
@pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step")
def test_learning_rate_and_schedule_of_a_resumed_run_are_those_that_it_was_given(before, after, tiny, tmp_path):
    """As if the run had had them from its start."""
    train(tiny, tmp_path, 3, **{**START, **before})[0].save_checkpoint(tmp_path / "three.ckpt")
    _, expected = train(tiny, tmp_path, 6, **{**START, **after})
    _, rates = train(tiny, tmp_path, 6, tmp_path / "three.ckpt", **{**START, **after})
    assert rates == pytest.approx(expected[3:], rel=1e-12)


def test_other_options_of_the_optimizer_take_effect(tiny, tmp_path):
    train(tiny, tmp_path, 2, optimizer=adam(1e-2))[0].save_checkpoint(tmp_path / "two.ckpt")
    changed = adam(1e-2, weight_decay=0.5, betas=(0.5, 0.9))
    trainer, rates = train(tiny, tmp_path, 3, tmp_path / "two.ckpt", optimizer=changed)
    group = trainer.optimizers[0].param_groups[0]
    assert group["weight_decay"] == 0.5 and group["betas"] == (0.5, 0.9) and rates == [1e-2]
    assert float(next(iter(trainer.optimizers[0].state.values()))["step"]) == 3


def test_learning_rate_of_the_critic_takes_effect(tiny, tmp_path):
    train(tiny, tmp_path, 1, name="PPO", critic_lr=1e-3)[0].save_checkpoint(tmp_path / "one.ckpt")
    trainer, _ = train(tiny, tmp_path, 2, tmp_path / "one.ckpt", name="PPO", critic_lr=1e-4)
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-2, 1e-4]


def test_patience_of_early_stopping_takes_effect(tiny, tmp_path):
    def stopping(patience):
        return EarlyStopping("train/loss", patience=patience, check_on_train_epoch_end=True)

    train(tiny, tmp_path, 1, callbacks=[stopping(3)])[0].save_checkpoint(tmp_path / "one.ckpt")
    callback = stopping(5)
    train(tiny, tmp_path, 2, tmp_path / "one.ckpt", callbacks=[callback])
    assert callback.patience == 5


def test_kl_coef_of_an_adaptive_controller_takes_effect(tiny, tmp_path):
    def controller():
        return lit_rlhf.callbacks.AdaptiveKL(target=1e-4, gain=4.0)

    options = dict(name="RLOO", callbacks=[controller()])
    trainer, _ = train(tiny, tmp_path, 3, kl_coef=0.05, **options)
    adapted = trainer.lightning_module.kl_coef
    assert adapted != 0.05
    trainer.save_checkpoint(tmp_path / "three.ckpt")
    for given, expected in ((0.05, adapted), (0.5, 0.5)):
        trainer, _ = train(
            tiny, tmp_path, 4, tmp_path / "three.ckpt", name="RLOO", kl_coef=given, callbacks=[controller()]
        )
        assert trainer.callback_metrics["train/kl_coef"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ({}, {"optimizer": lambda params: torch.optim.SGD(params, lr=0.1)}, "state of AdamW, which SGD can't continue"),
        ({"lora": {"r": 2}}, {"lora": {"r": 4}}, r"no weights for .*lora_A.* of shape \(4, 32\)"),
    ],
    ids=["optimizer", "rank"],
)
def test_option_that_a_resume_cannot_change_is_refused(before, after, message, tiny, tmp_path):
    train(tiny, tmp_path, 1, **before)[0].save_checkpoint(tmp_path / "one.ckpt")
    with pytest.raises(ValueError, match=message):
        train(tiny, tmp_path, 2, tmp_path / "one.ckpt", **after)


def test_scores_of_other_rewards_are_not_compared(tmp_path):
    """`policy/best` is found anew where `reward_weights` change."""
    modules = [make_module("RLOO", "nowhere", rewards=[reward]) for reward in (vowels, len)]
    for module in modules:
        module.trainer = make_trainer(tmp_path)
    assert [module.reward_weights for module in modules] == [{"vowels": 1.0}, {"len": 1.0}]
