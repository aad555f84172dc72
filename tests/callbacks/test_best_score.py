"""A resumed run compares its scores only with those of the same metric."""

import pytest

from fake_algorithm import FakeAlgorithm
from lit_rlhf.callbacks import PolicyCheckpoint


class TwoScores(FakeAlgorithm):
    """The reward rises with the updates, and so does a loss, which is larger than every reward."""

    def __init__(self):
        super().__init__()
        self.reward_weights = {"style": 1.0}

    def validation_step(self, batch, batch_idx):
        self.log("val/reward", self.global_step / 100)
        self.log("val/loss", 5.0 + self.global_step)


def fit(make_trainer, module, epochs, ckpt_path=None, **options):
    checkpoint = PolicyCheckpoint(**options)
    make_trainer(checkpoint, max_epochs=epochs, val_check_interval=12).fit(module, ckpt_path=ckpt_path)
    return checkpoint


@pytest.mark.parametrize(
    ("before", "after", "kept"),
    [
        ({}, {}, True),
        ({"monitor": "val/loss"}, {"monitor": "val/reward"}, False),
        ({"monitor": "val/loss", "mode": "min"}, {"monitor": "val/loss", "mode": "max"}, False),
    ],
    ids=["the same", "monitor", "mode"],
)
def test_another_metric_starts_a_new_comparison(before, after, kept, make_trainer, caplog):
    path = fit(make_trainer, TwoScores(), 1, **before).last_path
    with caplog.at_level("INFO"):
        resumed = fit(make_trainer, module := TwoScores(), 2, ckpt_path=path, **after)
    assert resumed.best_step == 24 and module.exports == ["best", "last"]
    assert ("replaces it" in caplog.text) is not kept


def test_another_reward_starts_a_new_comparison(make_trainer):
    class Falling(TwoScores):
        def validation_step(self, batch, batch_idx):
            self.log("val/reward", 1.0 - self.global_step / 100)

    path = fit(make_trainer, Falling(), 1).last_path
    for weights, best in (({"style": 1.0}, 12), ({"tone": 1.0}, 24)):
        module = Falling()
        module.reward_weights = weights
        assert fit(make_trainer, module, 2, ckpt_path=path).best_step == best
