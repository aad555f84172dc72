"""Updates that are not finite are skipped and counted, and after a few in a row the run stops with its last state."""

import math

import pytest
import torch
from lightning.pytorch import Callback

import lit_rlhf
from runs import METHODS, ONLINE, make_data, make_module, make_trainer


class State(Callback):
    """Record weights and optimizer state before and after each update, and metrics."""

    def __init__(self):
        self.states, self.metrics = [], []

    def on_train_start(self, trainer, module):
        self.states.append(self.copy(trainer, module))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.states.append(self.copy(trainer, module))
        self.metrics.append({n: float(v) for n, v in trainer.callback_metrics.items()})

    def copy(self, trainer, module):
        weights = {n: p.detach().clone() for n, p in module.named_parameters() if p.requires_grad}
        moments = trainer.optimizers[0].state_dict()["state"]
        return weights, {f"{i}.{n}": v.clone() for i, state in moments.items() for n, v in state.items()}


def equal(a, b) -> bool:
    return all(x.keys() == y.keys() and all(torch.equal(x[n], y[n]) for n in x) for x, y in zip(a, b, strict=True))


def break_gradients(module, updates, value=math.nan):
    """Set one number of one gradient in these updates."""

    def on_after_backward():
        if module.trainer.global_step in updates:
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[3] = value

    module.on_after_backward = on_after_backward


@pytest.mark.filterwarnings("ignore:update 1 is skipped")
@pytest.mark.parametrize("value", [math.nan, -math.inf])
@pytest.mark.parametrize("name", ["RLOO", "PPO", "SFT", "DPO", "RewardModeling"])
def test_update_with_a_gradient_that_is_not_finite_changes_nothing(name, value, tiny, tmp_path):
    module, state = make_module(name, tiny), State()
    break_gradients(module, {1}, value)
    make_trainer(tmp_path, max_steps=3, limit_val_batches=0, callbacks=[state]).fit(module, make_data(name))
    start, first, second, third = state.states
    assert equal(first, second)
    assert not equal(start[:1], first[:1]) and not equal(second[:1], third[:1])
    assert [metrics["train/skipped_updates"] for metrics in state.metrics] == [0, 1, 1]
    assert all(weight.isfinite().all() for weight in third[0].values())


@pytest.mark.parametrize("name", METHODS)
def test_run_stops_after_updates_in_a_row_that_are_not_finite(name, tiny, tmp_path):
    """With the last finite state, and the batch in the folder of the run."""
    module, state = make_module(name, tiny, max_skipped_updates=2), State()
    break_gradients(module, range(1, 9))
    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint(save_best=False)
    trainer = make_trainer(
        tmp_path, enable_checkpointing=True, max_epochs=3, limit_val_batches=0, callbacks=[state, checkpoint]
    )
    with (
        pytest.warns(UserWarning, match=r"update 1 is skipped: its gradient is not finite"),
        pytest.raises(ValueError, match=r"2 updates in a row were skipped, .* gradient is not .*skipped_update_rank0"),
    ):
        trainer.fit(module, make_data(name))
    assert trainer.global_step == 3
    saved = torch.load(tmp_path / "version_0/checkpoints/last.ckpt", weights_only=True)
    expected = state.states[1][0]
    assert saved["global_step"] == 3
    assert all(torch.equal(saved["state_dict"][name], weight) for name, weight in expected.items())
    inspected = torch.load(tmp_path / "version_0/skipped_update_rank0.pt", weights_only=True)
    prompts = inspected["batch"] if name in ONLINE else inspected["batch"]["prompts"]
    assert len(prompts["text"]) == 4 and prompts["tokens"].shape[0] == 4
    if name in ONLINE:
        assert inspected["rollout"]["rewards"].shape == (4, 3)


@pytest.mark.parametrize("name", ["RLOO", "SFT"])
def test_updates_that_are_not_finite_now_and_then_do_not_stop_a_run(name, tiny, tmp_path):
    module = make_module(name, tiny, max_skipped_updates=2)
    break_gradients(module, {0, 2, 4})
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    with pytest.warns(UserWarning, match="update 0 is skipped") as caught:
        trainer.fit(module, make_data(name))
    assert trainer.global_step == 6 and trainer.callback_metrics["train/skipped_updates"] == 3
    assert sum("is skipped" in str(warning.message) for warning in caught) == 1


def nan_advantages(rollout):
    return torch.full_like(rollout.rewards, math.nan)


@pytest.mark.parametrize(
    ("name", "replaced", "problem"),
    [
        ("RLOO", "advantages", "advantages"),
        ("RAFT", "reference", "reference log-probabilities and returns"),
        ("PPO", "values", "old values"),
    ],
)
def test_rollout_that_is_not_finite_is_named_and_not_learned_from(name, replaced, problem, tiny, tmp_path):
    """Even if the loss is finite, as RAFT's, which takes the first completion as the best if every return is NaN."""
    module, state = make_module(name, tiny), State()
    trainer = make_trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=[state])
    original = module.collect

    def collect(prompts):
        rollout = original(prompts)
        if replaced == "reference":
            reference = rollout.reference_logprobs.clone()
            reference[0, 0, 0] = math.nan
            broken = rollout.replace(reference_logprobs=reference, returns=rollout.returns * math.nan)
            return broken
        return rollout

    module.collect = collect
    if replaced == "advantages":
        module.advantages = nan_advantages
    if replaced == "values":
        module.values = lambda part: torch.full_like(part.completions.logprobs, math.nan)
    with (
        pytest.warns(UserWarning, match=f"update 0 is skipped: its {problem}"),
        pytest.raises(ValueError, match=f"3 updates in a row were skipped, the last because its {problem}"),
    ):
        trainer.fit(module, make_data(name))
    assert equal(state.states[0][:1], state.states[-1][:1])


def test_running_statistics_keep_no_rollout_that_is_not_finite(tiny, tmp_path):
    module = make_module("Reinforce", tiny, normalize=True)
    original, states = module.collect, []

    def collect(prompts):
        rollout = original(prompts)
        states.append(module.running_state())
        return rollout.replace(returns=rollout.returns * math.nan) if len(states) == 2 else rollout

    module.collect = collect
    with pytest.warns(UserWarning, match="update 1 is skipped: its returns and advantages is not finite"):
        make_trainer(tmp_path, max_steps=3, limit_val_batches=0).fit(module, make_data("Reinforce"))
    statistics = module.running_state()
    assert statistics["rewards"]["count"] == 24 and math.isfinite(statistics["baseline"]["total"])


@pytest.mark.filterwarnings("ignore:update 1 is skipped")
def test_skipped_updates_are_counted_across_a_resume(tiny, tmp_path):
    def fit(max_steps, ckpt_path=None):
        module = make_module("SFT", tiny)
        break_gradients(module, {1, 2, 3})
        trainer = make_trainer(tmp_path, max_steps=max_steps, max_epochs=9, limit_val_batches=0)
        trainer.fit(module, make_data("SFT"), ckpt_path=ckpt_path)
        return trainer

    fit(3).save_checkpoint(tmp_path / "two.ckpt")
    with pytest.raises(ValueError, match="3 updates in a row were skipped"):
        fit(9, tmp_path / "two.ckpt")


def test_first_batch_with_a_broken_loss_is_written(tiny, tmp_path):
    """Not the last of those that accumulate into the update."""
    module = make_module("SFT", tiny, max_skipped_updates=1)
    logprobs = []

    class Broken(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == 1:
                original = module.policy.logprobs
                logprobs.append(batch.prompts.text)
                module.policy.logprobs = lambda *a: original(*a) * math.nan
            elif batch_idx == 2:
                del module.policy.logprobs

    trainer = make_trainer(tmp_path, max_steps=1, accumulate_grad_batches=3, limit_val_batches=0, callbacks=[Broken()])
    with (
        pytest.warns(UserWarning, match="update 0 is skipped: its loss and gradient"),
        pytest.raises(ValueError, match="1 updates in a row were skipped"),
    ):
        trainer.fit(module, make_data("SFT"))
    inspected = torch.load(tmp_path / "version_0/skipped_update_rank0.pt", weights_only=True)
    assert inspected["batch"]["prompts"]["text"] == logprobs[0]


def test_learning_rate_that_is_not_finite_skips_the_update(tiny, tmp_path):
    def schedule(optimizer):
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: math.nan if step else 1.0)

    module = make_module("SFT", tiny, lr_scheduler=schedule)
    with (
        pytest.warns(UserWarning, match="update 1 is skipped: its learning rate"),
        pytest.raises(ValueError, match=r"3 updates in a row .* learning rate"),
    ):
        make_trainer(tmp_path, max_epochs=3, limit_val_batches=0).fit(module, make_data("SFT"))
    assert all(p.isfinite().all() for p in module.parameters())


def test_update_that_leaves_weights_that_are_not_finite_stops_the_run_before_it_is_saved(tiny, tmp_path):
    class Broken(torch.optim.SGD):
        def step(self, closure=None):
            loss = super().step(closure)
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[-1] = math.inf
            return loss

    module = make_module("SFT", tiny, optimizer=lambda params: Broken(params, lr=0.1))
    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint(every_n_updates=1)
    trainer = make_trainer(
        tmp_path, max_steps=3, limit_val_batches=0, callbacks=[checkpoint], enable_checkpointing=True
    )
    with pytest.raises(ValueError, match="update 0 left weights that are not finite"):
        trainer.fit(module, make_data("SFT"))
    assert not (tmp_path / "version_0/checkpoints/last.ckpt").exists()


def test_max_skipped_updates_below_1_is_refused(tiny):
    with pytest.raises(ValueError, match="max_skipped_updates=0 must be at least 1"):
        make_module("SFT", tiny, max_skipped_updates=0)
