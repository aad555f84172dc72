"""After an error in the backward pass or the update, the state of the update's start is saved and resumes exactly."""

import pytest
import torch
from lightning.pytorch import Callback

import lit_rlhf
from runs import ONLINE, differing_tensors, make_data, make_module, make_trainer, training_state


class Fail(Callback):
    """Raise in a hook at the given occurrence of it, as a lack of memory in the middle of backward would."""

    def __init__(self, hook: str, at: int, error: BaseException):
        self.calls, self.at, self.error = 0, at, error
        setattr(self, hook, self.fail)

    def fail(self, *args):
        self.calls += 1
        if self.calls == self.at:
            raise self.error


def fit(name, folder, root, accumulate, callbacks=(), ckpt_path=None, **options):
    options = {"num_minibatches": 2, **options} if name in ONLINE else options
    options.setdefault("lr_scheduler", lambda optimizer: lit_rlhf.Warmup(optimizer, warmup=4))
    checkpoint = lit_rlhf.callbacks.PolicyCheckpoint(save_best=False, save_last=False)
    trainer = make_trainer(
        root,
        max_epochs=2,
        accumulate_grad_batches=accumulate,
        limit_val_batches=0,
        enable_checkpointing=True,
        callbacks=[*callbacks, checkpoint],
    )
    torch.manual_seed(0)
    trainer.fit(make_module(name, folder, **options), make_data(name, rows=16), ckpt_path=ckpt_path)
    return training_state(trainer)


@pytest.mark.parametrize(
    ("name", "accumulate", "hook", "at"),
    [
        ("SFT", 1, "on_after_backward", 3),
        ("SFT", 2, "on_after_backward", 4),
        ("DPO", 2, "on_before_optimizer_step", 2),
        ("RewardModeling", 1, "on_before_zero_grad", 3),
        ("Reinforce", 2, "on_after_backward", 4),
        ("Reinforce", 1, "on_after_backward", 4),
        ("Reinforce", 4, "on_before_optimizer_step", 2),
        ("PPO", 1, "on_before_optimizer_step", 3),
        ("RLOO", 2, "on_before_backward", 5),
    ],
)
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), KeyboardInterrupt()], ids=str)
def test_error_in_an_update_keeps_the_state_before_it(name, accumulate, hook, at, error, tiny, tmp_path):
    options = {"normalize": True} if name == "Reinforce" else {}
    options["callbacks"] = [lit_rlhf.callbacks.AdaptiveKL(1.0)] if name in ONLINE else []
    expected = fit(name, tiny, tmp_path / "whole", accumulate, **options)
    if name in ONLINE:
        options["callbacks"] = [lit_rlhf.callbacks.AdaptiveKL(1.0)]
    failing = {**options, "callbacks": [*options["callbacks"], Fail(hook, at, error)]}
    with pytest.raises((torch.OutOfMemoryError, SystemExit)):
        fit(name, tiny, tmp_path / "failed", accumulate, **failing)
    path = tmp_path / "failed/version_0/checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)
    assert saved["global_step"] >= 1
    assert not any("gradients" in rank for rank in saved["in_flight"])
    if name in ONLINE:
        options["callbacks"] = [lit_rlhf.callbacks.AdaptiveKL(1.0)]
    resumed = fit(name, tiny, tmp_path / "resumed", accumulate, ckpt_path=path, **options)
    assert not differing_tensors(expected, resumed)


@pytest.mark.parametrize("fused", [True, False])
def test_error_after_weights_have_changed_saves_nothing(fused, tiny, tmp_path):
    class Failing(torch.optim.AdamW):
        def step(self, closure=None):
            loss = super().step(closure)
            if self.state and max(int(state["step"]) for state in self.state.values()) == 3:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return loss

    with pytest.raises(torch.OutOfMemoryError):
        fit("SFT", tiny, tmp_path, 1, optimizer=lambda params: Failing(params, lr=1e-2, fused=fused))
    assert not (tmp_path / "version_0/checkpoints/last.ckpt").exists()
