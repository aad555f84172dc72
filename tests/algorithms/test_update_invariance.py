"""An update does not depend on minibatches, accumulation, or groups without a learning signal."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils.data import DataLoader

from recorded_runs import (
    LEARNING_RATE,
    assert_same_update,
    checksum_reward,
    initial_weights,
    make_batch,
    make_module,
    reward_with_none,
    token_reward,
    train,
)
from runs import make_data, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")


# Minibatches and accumulation

MINIBATCHES = [
    {"num_minibatches": 2},
    {"num_minibatches": 4},
    {"sample_minibatches": 3},
    {"num_minibatches": 3, "sample_minibatches": 2},
]
REWARDS = {
    "all valid": {},
    "some without a reward": {"rewards": [reward_with_none]},
    "truncated masked": {"mask_truncated_completions": True},
    "token-level": {"rewards": [checksum_reward, token_reward]},
}


@pytest.fixture(scope="module")
def without_minibatches():
    """Return a cache of the results of `train` without minibatches, by case."""
    return {}


@pytest.mark.parametrize("case", REWARDS)
@pytest.mark.parametrize("minibatches", MINIBATCHES, ids=str)
def test_update_does_not_depend_on_minibatches(minibatches, case, without_minibatches, ending, tmp_path):
    accumulate = minibatches.get("num_minibatches", 1) * minibatches.get("sample_minibatches", 1)
    if case not in without_minibatches:
        without_minibatches[case] = train("RLOO", ending, tmp_path, updates=2, **REWARDS[case])
    weights, recorder = without_minibatches[case]
    accumulation = {"accumulate_grad_batches": accumulate}
    actual, _ = train("RLOO", ending, tmp_path, updates=2, trainer=accumulation, **minibatches, **REWARDS[case])
    if case in ("some without a reward", "truncated masked"):
        counts = recorder.rollouts[0].valid.sum(1)
        assert 0 < counts.sum() < 12 and counts.unique().numel() > 1
    assert_same_update(actual, weights, initial_weights("RLOO", ending))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("RLOO", {"rewards": [reward_with_none]}),
        ("Reinforce", {"baseline": "none", "mask_truncated_completions": True}),
        ("SFT", {}),
        ("RewardModeling", {}),
    ],
)
def test_one_batch_of_8_equals_8_accumulated_batches_of_1(name, options, ending, tmp_path):
    one_batch, _ = train(name, ending, tmp_path, data={"batch_size": 8}, **options)
    accumulated, _ = train(
        name, ending, tmp_path, data={"batch_size": 1}, trainer={"accumulate_grad_batches": 8}, **options
    )
    assert_same_update(accumulated, one_batch, initial_weights(name, ending))


def test_gradient_clipping_does_not_depend_on_minibatches(ending, tmp_path):
    """The clipped norm is that of the gradient of the mean over all loss terms of the update."""
    options = {"rewards": [reward_with_none]}
    clip = {"gradient_clip_val": 0.05}
    expected, _ = train("RLOO", ending, tmp_path, trainer=clip, **options)
    trainer_options = {**clip, "accumulate_grad_batches": 4}
    with_minibatches, _ = train("RLOO", ending, tmp_path, trainer=trainer_options, num_minibatches=4, **options)
    start = initial_weights("RLOO", ending)
    change = torch.cat([(expected[n] - start[n]).flatten() for n in expected]).norm()
    torch.testing.assert_close(change.item(), LEARNING_RATE * 0.05, atol=1e-5, rtol=0)
    for name, weight in expected.items():
        torch.testing.assert_close(with_minibatches[name], weight, atol=1e-6, rtol=0)


def test_loss_divisor_does_not_depend_on_the_batch_size(ending, tmp_path):
    """Ranks may have batches of different sizes, and gradients are averaged before the divisor is corrected."""
    losses = []
    for rows in (2, 4):
        module = make_module("SFT", ending)
        module.trainer = make_trainer(tmp_path)
        losses.append(float(module.reduce_loss(torch.ones(rows), torch.ones(rows, dtype=torch.bool))))
    assert losses[0] / 2 == losses[1] / 4


# Groups without a learning signal


def test_equal_rewards_give_no_update_and_are_logged(ending, tmp_path):
    def constant(completions, **kwargs):
        return [0.7] * len(completions)

    weights, recorder = train("RLOO", ending, tmp_path, rewards=[constant], kl_coef=0.0)
    assert (recorder.rollouts[0].advantages == 0).all()
    assert recorder.metrics[0]["train/zero_variance_groups"] == 1
    assert recorder.metrics[0]["train/advantage_std"] == 0
    assert all(torch.equal(weights[n], p) for n, p in initial_weights("RLOO", ending).items())


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_group_without_rewards_is_skipped_and_logged(ending, tmp_path):
    """The update equals that of the other prompts alone."""

    def reward_except_plays(prompts, completion_ids, **kwargs):
        pairs = zip(prompts, checksum_reward(completion_ids), strict=True)
        return [None if prompt == "a play" else score for prompt, score in pairs]

    words = ["film", "a book", "song"]

    def train_on(batch):
        loader = DataLoader([batch], batch_size=None)
        return train("RLOO", ending, tmp_path, loader=loader, rewards=[reward_except_plays])

    expected, _ = train_on(make_batch(*words))
    with pytest.warns(UserWarning, match="a prompt without a reward or rank for any completion is skipped"):
        weights, recorder = train_on(make_batch(*words, "a play"))
    assert recorder.metrics[0]["train/skipped_groups"] == 0.25
    assert_same_update(weights, expected, initial_weights("RLOO", ending))


@pytest.mark.parametrize("minibatches", [{}, {"num_minibatches": 2, "sample_minibatches": 2}], ids=str)
def test_update_without_valid_completions_keeps_the_weights_and_warns(minibatches, ending, tmp_path):
    """Bitwise, even with momentum and weight decay: the previous update has filled AdamW's moments."""
    calls = []

    def no_rewards_in_the_second_call(completion_ids, **kwargs):
        calls.append(len(completion_ids))
        return [None if len(calls) == 2 else score for score in checksum_reward(completion_ids)]

    class Snapshots(Callback):
        weights: list = []  # noqa: RUF012

        def on_before_zero_grad(self, trainer, module, optimizer):
            self.weights = [*self.weights, [p.detach().clone() for p in module.parameters()]]

    snapshots = Snapshots()
    module = make_module(
        "RLOO",
        ending,
        rewards=[no_rewards_in_the_second_call],
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.01, weight_decay=0.1),
        **minibatches,
    )
    data = make_data("RLOO", val=None)
    accumulate = minibatches.get("num_minibatches", 1) * minibatches.get("sample_minibatches", 1)
    runner = make_trainer(tmp_path, max_steps=3, accumulate_grad_batches=accumulate, callbacks=[snapshots])
    with pytest.warns(UserWarning, match="no completion of this update counts"):
        runner.fit(module, data)
    before = snapshots.weights  # weights before each update
    after_first, after_second = before[1], before[2]
    assert all(torch.equal(a, b) for a, b in zip(after_first, after_second, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(before[0], after_first, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(after_second, module.parameters(), strict=True))
