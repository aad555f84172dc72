import pytest
import torch

from fake_algorithm import ByteTokenizer, FakeAlgorithm, FakeOnlineAlgorithm, make_rollout
from lit_rlhf.callbacks import KLMonitor
from lit_rlhf.callbacks.utils import completion_kl


def test_percentiles_over_all_completions(make_trainer):
    trainer = make_trainer(KLMonitor())
    trainer.fit(FakeOnlineAlgorithm())
    kl = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    for name, quantile in {"p05": 0.05, "p50": 0.5, "p95": 0.95}.items():
        assert trainer.callback_metrics[f"train/kl_{name}"] == pytest.approx(float(kl.quantile(quantile)))


def test_kl_ignores_padding():
    assert completion_kl(make_rollout(ByteTokenizer())).tolist() == [
        pytest.approx(row) for row in [[1, 2], [3, 4], [5, 6]]
    ]


def test_kl_above_the_target_warns_once_and_can_stop(make_trainer):
    with pytest.warns(UserWarning, match=r"3\.5 nats .* 2\.5: .*Raise kl_coef \(now 0\.05\)") as record:
        make_trainer(KLMonitor(target=2.5)).fit(FakeOnlineAlgorithm())
    assert sum("nats" in str(w.message) for w in record) == 1
    with pytest.warns(UserWarning, match="stops here"):
        trainer = make_trainer(KLMonitor(target=2.5, stop=True))
        trainer.fit(FakeOnlineAlgorithm())
    assert trainer.global_step == 1


def test_kl_below_the_target_does_not_warn_or_stop(make_trainer):
    trainer = make_trainer(KLMonitor(target=3.6, stop=True))
    trainer.fit(FakeOnlineAlgorithm())
    assert trainer.global_step == 12


def test_algorithms_without_rollouts_are_ignored(make_trainer):
    trainer = make_trainer(KLMonitor(target=1.0))
    trainer.fit(FakeAlgorithm())
    assert "train/kl_p50" not in trainer.callback_metrics


@pytest.mark.parametrize("arguments", [{"target": -1.0}, {"target": float("nan")}, {"stop": True}])
def test_invalid_arguments_raise(arguments):
    with pytest.raises(ValueError, match="target"):
        KLMonitor(**arguments)


def test_second_fit_warns_again(make_trainer):
    monitor = KLMonitor(target=2.5)
    for _ in range(2):
        with pytest.warns(UserWarning, match="nats per completion"):
            make_trainer(monitor).fit(FakeOnlineAlgorithm())
