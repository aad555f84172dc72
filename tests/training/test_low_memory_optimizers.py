"""Optimizers with small states: 8-bit Adam (where bitsandbytes is installed) and Adafactor."""

import functools

import pytest
import torch

from lit_rlhf.errors import InputError
from lit_rlhf.training.optimization import check_updates_shards
from runs import differing_tensors, make_data, make_module, make_trainer


def eight_bit_adam(params):
    return pytest.importorskip("bitsandbytes").optim.AdamW8bit(params, lr=1e-3)


adafactor = functools.partial(torch.optim.Adafactor, lr=1e-2)


def fit(optimizer, folder, root, steps, **options):
    module = make_module("PPO", folder, optimizer=optimizer, gradient_checkpointing=True, num_minibatches=2)
    trainer = make_trainer(root, max_steps=steps, limit_val_batches=0)
    trainer.fit(module, datamodule=make_data("PPO"), **options)
    return trainer, {name: value.clone() for name, value in module.state_dict().items()}


def state_bytes(trainer):
    states = trainer.optimizers[0].state.values()
    tensors = {v.data_ptr(): v for state in states for v in state.values() if isinstance(v, torch.Tensor)}
    return sum(v.numel() * v.element_size() for v in tensors.values())


@pytest.mark.parametrize(("optimizer", "share"), [(eight_bit_adam, 0.5), (adafactor, 0.2)])
def test_states_are_small_and_a_run_resumes_bitwise(optimizer, share, tmp_path, wide):
    adam, _ = fit(torch.optim.AdamW, wide, tmp_path, 1)
    whole, expected = fit(optimizer, wide, tmp_path, 3)
    assert state_bytes(whole) < share * state_bytes(adam)
    part, _ = fit(optimizer, wide, tmp_path, 2)
    part.save_checkpoint(tmp_path / "run.ckpt")
    _, resumed = fit(optimizer, wide, tmp_path, 3, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert differing_tensors(resumed, expected) == []


@pytest.mark.parametrize("optimizer", [eight_bit_adam, adafactor])
def test_they_do_not_update_shards(optimizer):
    made = optimizer([torch.nn.Parameter(torch.zeros(2, 2))])
    check_updates_shards(made, sharded=False)
    with pytest.raises(InputError, match=r"(AdamW8bit|Adafactor) can't update sharded weights: use torch.optim.AdamW"):
        check_updates_shards(made, sharded=True)
