import math

import jaxtyping
import pytest
import torch
from lightning.pytorch import Callback

from lit_rlhf import Warmup
from runs import make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

RATE = 0.5


def make(**options) -> Warmup:
    return Warmup(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=RATE), **options)


def rate(schedule: Warmup) -> float:
    return schedule.optimizer.param_groups[0]["lr"]


def go(schedule: Warmup, updates: int) -> list[float]:
    """The rates of the next updates, as shares of the full one."""
    rates = []
    for _ in range(updates):
        rates.append(rate(schedule) / RATE)
        schedule.optimizer.step()
        schedule.step()
    return rates


# The formula


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
@pytest.mark.parametrize("warmup", [4, 0.2])
def test_the_warm_up_rises_in_equal_steps_from_above_zero(warmup, decay):
    rates = go(make(warmup=warmup, decay=decay, total_steps=20), 20)
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert max(rates) == 1


@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_share_of_the_updates_is_their_number(decay):
    shares, numbers = (go(make(warmup=warmup, decay=decay, total_steps=40), 40) for warmup in (0.25, 10))
    assert shares == numbers


COURSES = {"constant": lambda x: 1.0, "linear": lambda x: 1 - x, "cosine": lambda x: math.cos(math.pi * x / 2) ** 2}


@pytest.mark.parametrize("warmup", [0, 2])
@pytest.mark.parametrize("decay", COURSES)
def test_the_course_after_the_warm_up(decay, warmup):
    schedule = make(warmup=warmup, decay=decay, total_steps=10)
    rates = go(schedule, 10)
    course = [COURSES[decay](step / (10 - warmup)) for step in range(10 - warmup)]
    assert rates[warmup:] == pytest.approx(course)
    assert min(rates) > 0  # every update moves the weights


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_a_decay_ends_at_zero_and_stays_there(decay):
    schedule = make(warmup=2, decay=decay, total_steps=10)
    go(schedule, 10)
    assert go(schedule, 3) == pytest.approx([0, 0, 0])


def test_every_group_keeps_its_own_rate():
    groups = [{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (0.1, 0.3)]
    schedule = Warmup(torch.optim.SGD(groups), warmup=1, decay="linear", total_steps=3)
    for share in (0.5, 1, 0.5, 0):
        assert [group["lr"] for group in groups] == pytest.approx([0.1 * share, 0.3 * share])
        schedule.optimizer.step()
        schedule.step()


def test_where_no_end_is_known_the_rate_stays():
    schedule = make(warmup=2, decay="cosine")
    schedule.plan(0)
    assert go(schedule, 5) == pytest.approx([1 / 3, 2 / 3, 1, 1, 1])


# The number of updates: given, or planned by the Trainer


def planned(total, **options) -> Warmup:
    schedule = make(**options)
    schedule.plan(total)
    return schedule


@pytest.mark.parametrize("warmup", [1, 0.3])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_a_planned_number_is_as_good_as_a_given_one(decay, warmup):
    options = {"warmup": warmup, "decay": decay}
    assert go(planned(10, **options), 12) == go(make(**options, total_steps=10), 12)


def test_a_given_number_is_not_planned_anew():
    assert planned(50, decay="linear", total_steps=10).total_steps == 10


@pytest.mark.parametrize("options", [{"warmup": 1, "decay": "linear"}, {"warmup": 0.5, "decay": "cosine"}], ids=str)
def test_a_schedule_goes_on_by_the_plan_of_its_own_run(options):
    stopped = planned(5, **options)
    go(stopped, 5)
    resumed = planned(8, **options)
    resumed.load_state_dict(stopped.state_dict())
    assert go(resumed, 3) == pytest.approx(go(make(**options, total_steps=8), 8)[5:])


@pytest.mark.parametrize("after", [1, 3, 6])
def test_a_schedule_that_was_saved_goes_on_as_if_it_had_not_been(after):
    straight = make(warmup=2, decay="cosine", total_steps=8)
    go(straight, after)
    resumed = make(warmup=2, decay="cosine", total_steps=8)
    resumed.load_state_dict(straight.state_dict())
    assert go(resumed, 8 - after) == go(straight, 8 - after)


def test_a_given_number_stays_in_the_state_and_a_planned_one_does_not():
    given, of_plan = make(total_steps=10), planned(10)
    assert given.state_dict()["total_steps"] == 10
    assert "total_steps" not in of_plan.state_dict()
    other = make(total_steps=7)
    other.load_state_dict(given.state_dict())
    assert other.total_steps == 10


def test_what_the_schedule_tells_is_the_rate_of_the_optimizer():
    schedule = planned(8, warmup=0.25, decay="linear")
    assert schedule.get_last_lr() == [rate(schedule)]
    go(schedule, 5)
    assert schedule.get_last_lr() == [rate(schedule)]
    resumed = planned(20, warmup=0.25, decay="linear")
    resumed.load_state_dict(schedule.state_dict())
    assert resumed.get_last_lr() == [rate(resumed)]


# In a run


class Rates(Callback):
    """Keeps the rate of every update."""

    def __init__(self):
        self.used = {}

    def on_before_optimizer_step(self, trainer, module, optimizer):
        self.used[trainer.global_step] = optimizer.param_groups[0]["lr"] / RATE


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = make_tokenizer()
    make_llama(len(tokenizer), hidden=8, layers=1).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def fit(folder, root, steps, ckpt_path=None, name="SFT", schedule=None, **trainer):
    rates = Rates()
    module = make_module(
        name,
        folder,
        optimizer=lambda params: torch.optim.SGD(params, lr=RATE),
        lr_scheduler=lambda optimizer: Warmup(optimizer, **(schedule or {"warmup": 1, "decay": "linear"})),
    )
    runner = make_trainer(root, max_steps=steps, callbacks=[rates], limit_val_batches=0, **trainer)
    runner.fit(module, make_data(name), ckpt_path=ckpt_path)
    return runner, rates.used


def test_a_run_that_is_allowed_more_updates_plans_anew(folder, tmp_path):
    stopped, first = fit(folder, tmp_path, 5)
    assert first == pytest.approx(dict(enumerate(go(make(warmup=1, decay="linear", total_steps=5), 5))))
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, then = fit(folder, tmp_path, 8, tmp_path / "stopped.ckpt")
    straight = dict(enumerate(go(make(warmup=1, decay="linear", total_steps=8), 8)))
    assert then == pytest.approx({update: straight[update] for update in (5, 6, 7)})


def test_a_number_that_was_given_holds_for_the_resumed_run_too(folder, tmp_path):
    schedule = {"warmup": 1, "decay": "linear", "total_steps": 6}
    stopped, _ = fit(folder, tmp_path, 3, schedule=schedule)
    stopped.save_checkpoint(tmp_path / "stopped.ckpt")
    _, then = fit(folder, tmp_path, 5, tmp_path / "stopped.ckpt", schedule=schedule)
    assert then == pytest.approx({3: 0.6, 4: 0.4})


@pytest.mark.parametrize("accumulate", [1, 3])
def test_the_schedule_counts_updates_and_not_steps(accumulate, folder, tmp_path):
    _, used = fit(folder, tmp_path, 4, accumulate_grad_batches=accumulate)
    assert used == pytest.approx(dict(enumerate(go(make(warmup=1, decay="linear", total_steps=4), 4))))


def test_a_run_of_epochs_is_planned_by_their_updates(folder, tmp_path):
    _, used = fit(folder, tmp_path, -1, max_epochs=2)
    assert used == pytest.approx(dict(enumerate(go(make(warmup=1, decay="linear", total_steps=6), 6))))


# What can not be


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"decay": "cosin"}, r"decay='cosin' must be one of constant, linear, cosine"),
        ({"warmup": -1}, r"warmup=-1 must not be negative"),
        ({"warmup": -0.1}, r"warmup=-0.1 must not be negative"),
        ({"warmup": math.nan}, r"warmup=nan must not be"),
        ({"warmup": math.inf}, r"warmup=inf must"),
    ],
    ids=str,
)
def test_what_can_not_be_is_a_sentence(options, sentence, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as for users, who have no type checker
    with pytest.raises(ValueError, match=sentence):
        make(**options)
