"""Fused Adam and gradient clipping."""

import pytest
import torch

from runs import make_data, make_module, make_trainer


def fit(tiny, root, precision="32-true", max_steps=2, **options):
    def optimizer(params):
        return torch.optim.AdamW(params, lr=1e-2, **options)

    module = make_module("PPO", tiny, optimizer=optimizer)
    trainer = make_trainer(root, max_steps=max_steps, limit_val_batches=0, gradient_clip_val=0.5, precision=precision)
    trainer.fit(module, make_data("PPO"))
    return module, trainer.optimizers[0]


def test_fused_adam_is_the_default_and_matches_the_loop(tiny, tmp_path):
    """Given the same gradients. Two training runs would not compare: they amplify rounding differences."""
    _, fused = fit(tiny, tmp_path, max_steps=1)
    _, loop = fit(tiny, tmp_path, max_steps=1, foreach=False)
    assert all(group["fused"] for group in fused.param_groups)
    assert not any(group["fused"] for group in loop.param_groups)
    pairs = [
        pair
        for groups in zip(fused.param_groups, loop.param_groups, strict=True)
        for pair in zip(groups[0]["params"], groups[1]["params"], strict=True)
    ]
    torch.manual_seed(0)
    for _ in range(4):
        for weight, reference in pairs:
            weight.grad = torch.randn_like(weight)
            reference.grad = weight.grad.clone()
        fused.step()
        loop.step()
    for weight, reference in pairs:
        torch.testing.assert_close(weight, reference, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("options", [{"fused": False}, {"foreach": True}], ids=str)
def test_options_of_the_user_disable_fused_adam(options, tiny, tmp_path):
    _, optimizer = fit(tiny, tmp_path, **options)
    assert not any(group["fused"] for group in optimizer.param_groups)


def test_gradients_are_clipped_with_fused_adam_and_bf16_mixed(tiny, tmp_path):
    _, optimizer = fit(tiny, tmp_path, precision="bf16-mixed")
    assert all(group["fused"] for group in optimizer.param_groups)
    for group in optimizer.param_groups:
        norm = torch.nn.utils.get_total_norm([p.grad for p in group["params"] if p.grad is not None])
        assert 0 < norm <= 0.5001
