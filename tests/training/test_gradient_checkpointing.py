"""`gradient_checkpointing: true`: every method learns the same, and a run resumes when the option changes."""

import pytest
import torch

from runs import SLOW_VARIANTS, differing_tensors, make_data, make_module, make_trainer, training_state


def fit(name, folder, root, checkpointing, steps=2, **options):
    torch.manual_seed(0)  # of new heads and adapters
    module = make_module(name, folder, gradient_checkpointing=checkpointing, **options)
    trainer = make_trainer(root, max_steps=steps, limit_val_batches=0)
    return module, trainer


@pytest.mark.parametrize("name", SLOW_VARIANTS)
def test_every_method_learns_the_same(name, tiny, tmp_path):
    states = []
    for checkpointing in (False, True):
        module, trainer = fit(name, tiny, tmp_path, checkpointing)
        trainer.fit(module, datamodule=make_data(name))
        trained = [module._modules[part] for part in ("policy", "critic", "reward_model") if part in module._modules]
        assert all(bool(part.model_forward.recomputed) == checkpointing for part in trained)
        states.append(training_state(trainer))
    assert differing_tensors(*states) == []


@pytest.mark.parametrize("first", [True, False])
def test_a_run_resumes_with_the_option_changed(first, tiny, tmp_path):
    options = dict(lora={"r": 2, "lora_alpha": 4}, num_minibatches=2)
    whole, trainer = fit("PPO", tiny, tmp_path, False, steps=4, **options)
    trainer.fit(whole, datamodule=make_data("PPO"))
    expected = training_state(trainer)
    begun, trainer = fit("PPO", tiny, tmp_path, first, steps=3, **options)
    trainer.fit(begun, datamodule=make_data("PPO"))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    resumed, trainer = fit("PPO", tiny, tmp_path, not first, steps=4, **options)
    trainer.fit(resumed, datamodule=make_data("PPO"), ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert differing_tensors(training_state(trainer), expected) == []
