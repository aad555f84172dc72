"""The `Warmup` schedule, alone and in runs."""

import math

import jaxtyping
import pytest
import torch
from lightning.pytorch import Callback

from lit_rlhf import Warmup
from runs import make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

PEAK = 0.5


def make(**options) -> Warmup:
    return Warmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK), **options)


def current_lr(schedule: Warmup) -> float:
    return schedule.optimizer.param_groups[0]["lr"]


def learning_rates(schedule: Warmup, updates: int) -> list[float]:
    """Take updates and return their learning rates, as fractions of the peak."""
    rates = []
    for _ in range(updates):
        rates.append(current_lr(schedule) / PEAK)
        schedule.optimizer.step()
        schedule.step()
    return rates


# Learning rates


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [4, 0.2])
def test_warmup_is_linear_and_starts_above_zero(warmup, decay):
    rates = learning_rates(make(warmup=warmup, decay=decay, total_steps=20), 20)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_warmup_may_be_a_fraction_of_the_updates(decay):
    by_fraction, by_number = (
        learning_rates(make(warmup=warmup, decay=decay, total_steps=40), 40) for warmup in (0.25, 10)
    )
    assert by_fraction == by_number


DECAYS = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x, "cosine": lambda x: math.cos(math.pi * x / 2) ** 2}


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("decay", DECAYS)
def test_decay_after_the_warmup(decay, warmup):
    schedule = make(warmup=warmup, decay=decay, total_steps=10)
    rates = learning_rates(schedule, 10)
    expected = [DECAYS[decay](update / (10 - warmup)) for update in range(10 - warmup)]
    assert rates[warmup:] == pytest.approx(expected)
    assert min(rates) > 0  # every update moves the weights


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_decay_reaches_zero_and_stays_there(decay):
    schedule = make(warmup=2, decay=decay, total_steps=10)
    learning_rates(schedule, 10)
    assert learning_rates(schedule, 3) == pytest.approx([0, 0, 0])


def test_each_parameter_group_has_its_own_peak():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.3)]
    schedule = Warmup(torch.optim.SGD(groups), warmup=1, decay="linear", total_steps=3)
    for fraction in (0.5, 1, 0.5, 0):
        assert [group["lr"] for group in groups] == pytest.approx([0.1 * fraction, 0.3 * fraction])
        schedule.optimizer.step()
        schedule.step()


def test_no_decay_if_the_number_of_updates_is_unknown():
    schedule = make(warmup=2, decay="cosine")
    schedule.plan(0)
    assert learning_rates(schedule, 5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


# Total steps, from the constructor or the Trainer


def schedule_for(total, **options) -> Warmup:
    schedule = make(**options)
    schedule.plan(total)
    return schedule


@pytest.mark.parametrize("warmup", [1, 0.3])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_total_steps_from_the_trainer_and_from_the_constructor_are_equivalent(decay, warmup):
    options = {"warmup": warmup, "decay": decay}
    assert learning_rates(schedule_for(10, **options), 12) == learning_rates(make(**options, total_steps=10), 12)


def test_total_steps_of_the_constructor_take_precedence():
    assert schedule_for(50, decay="linear", total_steps=10).total_steps == 10


@pytest.mark.parametrize("options", [{"warmup": 1, "decay": "linear"}, {"warmup": 0.5, "decay": "cosine"}], ids=str)
def test_resumed_schedule_uses_the_total_steps_of_the_new_run(options):
    stopped = schedule_for(5, **options)
    learning_rates(stopped, 5)
    resumed = schedule_for(8, **options)
    resumed.load_state_dict(stopped.state_dict())
    assert learning_rates(resumed, 3) == pytest.approx(learning_rates(make(**options, total_steps=8), 8)[5:])


@pytest.mark.parametrize("after", [1, 3, 6])
def test_resumed_schedule_continues_like_an_uninterrupted_one(after):
    uninterrupted = make(warmup=2, decay="cosine", total_steps=8)
    learning_rates(uninterrupted, after)
    resumed = make(warmup=2, decay="cosine", total_steps=8)
    resumed.load_state_dict(uninterrupted.state_dict())
    assert learning_rates(resumed, 8 - after) == learning_rates(uninterrupted, 8 - after)


def test_only_total_steps_of_the_constructor_are_in_the_state():
    given, from_trainer = make(total_steps=10), schedule_for(10)
    assert given.state_dict()["total_steps"] == 10
    assert "total_steps" not in from_trainer.state_dict()
    other = make(total_steps=7)
    other.load_state_dict(given.state_dict())
    assert other.total_steps == 10


def test_get_last_lr_is_the_learning_rate_of_the_optimizer():
    schedule = schedule_for(8, warmup=0.25, decay="linear")
    assert schedule.get_last_lr() == [current_lr(schedule)]
    learning_rates(schedule, 5)
    assert schedule.get_last_lr() == [current_lr(schedule)]
    resumed = schedule_for(20, warmup=0.25, decay="linear")
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == [current_lr(resumed)]


# In a run


class LearningRates(Callback):
    """Record the learning rate of every update."""

    def __init__(self):
        self.by_update = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.by_update[trainer.global_step] = optimizer.param_groups[0]["lr"] / PEAK


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), hidden=8, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fit(folder, root, steps, ckpt_path=None, name="SFT", schedule=None, **trainer):
    rates = LearningRates()
    module = make_module(
        name,
        folder,
        optimizer=lambda params: torch.optim.SGD(params, lr=PEAK),
        lr_scheduler=lambda optimizer: Warmup(optimizer, **(schedule or {"warmup": 1, "decay": "linear"})),
    )
    runner = make_trainer(root, max_steps=steps, callbacks=[rates], limit_val_batches=0, **trainer)
    runner.fit(module, make_data(name), ckpt_path=ckpt_path)
    return runner, rates.by_update


def test_resuming_with_more_updates_extends_the_schedule(folder, tmp_path):
    stopped, first = fit(folder, tmp_path, 5)
    assert first == pytest.approx(dict(enumerate(learning_rates(make(warmup=1, decay="linear", total_steps=5), 5))))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed = fit(folder, tmp_path, 8, tmp_path / "stopped.ckpt")
    uninterrupted = dict(enumerate(learning_rates(make(warmup=1, decay="linear", total_steps=8), 8)))
    assert resumed == pytest.approx({update: uninterrupted[update] for update in (5, 6, 7)})


def test_total_steps_of_the_constructor_also_hold_for_a_resumed_run(folder, tmp_path):
    schedule = {"warmup": 1, "decay": "linear", "total_steps": 6}
    stopped, _ = fit(folder, tmp_path, 3, schedule=schedule)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, resumed = fit(folder, tmp_path, 5, tmp_path / "stopped.ckpt", schedule=schedule)
    assert resumed == pytest.approx({3: 0.6, 4: 0.4})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_schedule_counts_updates_and_not_training_steps(accumulate, folder, tmp_path):
    _, by_update = fit(folder, tmp_path, 4, accumulate_grad_batches=accumulate)
    assert by_update == pytest.approx(dict(enumerate(learning_rates(make(warmup=1, decay="linear", total_steps=4), 4))))


def test_total_steps_are_computed_from_max_epochs(folder, tmp_path):
    _, by_update = fit(folder, tmp_path, -1, max_epochs=2)
    assert by_update == pytest.approx(dict(enumerate(learning_rates(make(warmup=1, decay="linear", total_steps=6), 6))))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"decay": "cosin"}, r"decay='cosin' must be one of constant, linear, cosine"),
        ({"warmup": -1}, r"warmup=-1 must not be negative"),
        ({"warmup": -0.1}, r"warmup=-0.1 must not be negative"),
        ({"warmup": math.nan}, r"warmup=nan must not be"),
        ({"warmup": math.inf}, r"warmup=inf must"),
    ],
    ids=str,
)
def test_invalid_options_raise(options, message, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # users have no type checker
    with pytest.raises(ValueError, match=message):
        make(**options)
