"""16-mixed: the loss scale of a GradScaler and our rescaled gradients, with a real scaler on the CPU."""

import math

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision

from runs import make_data, make_module, make_trainer


class Scales(Callback):
    """Record the loss scale after each update."""

    def __init__(self):
        self.scales = []

    def on_train_batch_end(self, trainer, module, *args):
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def fit(name, folder, root, scale, max_steps=1, data=None, optimizer=None, broken=False, **options):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))
    torch.manual_seed(0)
    optimizer = optimizer or (lambda params: torch.optim.SGD(params, lr=0.1))
    module = make_module(name, folder, optimizer=optimizer, **options)
    if broken:
        module.on_after_backward = lambda: (
            next(p for p in module.parameters() if p.grad is not None).grad.view(-1)[:1].fill_(math.nan)
        )
    scales = Scales()
    limits = dict(max_steps=max_steps, max_epochs=9, limit_val_batches=0, gradient_clip_val=0.5)
    trainer = make_trainer(root, plugins=[plugin], callbacks=[scales], accumulate_grad_batches=2, **limits)
    trainer.fit(module, make_data(name, rows=16))
    return module, trainer, scales.scales


@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize("name", ["PPO", "SFT"])
def test_update_does_not_depend_on_the_loss_scale(name, fused, tiny, tmp_path):
    """Also where the user sets `fused`, with which an optimizer usually unscales by itself, after the clipping."""
    options = {"fused": True} if fused else {}

    def optimizer(params):
        return torch.optim.SGD(params, lr=0.1, **options)

    extra = {"num_minibatches": 2} if name == "PPO" else {}
    one, trainer, _ = fit(name, tiny, tmp_path, 1.0, optimizer=optimizer, **extra)
    scaled, scaled_trainer, _ = fit(name, tiny, tmp_path, 256.0, optimizer=optimizer, **extra)
    norms = [t.callback_metrics["train/grad_norm"] for t in (trainer, scaled_trainer)]
    assert norms[1] == pytest.approx(float(norms[0]), rel=1e-2) and norms[0] > 0.5
    start = make_module(name, tiny)
    start.configure_model()
    before = dict(start.policy.named_parameters())
    for (key, a), b in zip(one.policy.named_parameters(), scaled.policy.parameters(), strict=True):
        change = float((a - before[key]).detach().abs().max())
        torch.testing.assert_close(b, a, atol=0.05 * change + 1e-6, rtol=0)


def test_overflow_of_the_loss_scale_lowers_it_and_is_not_counted(tiny, tmp_path):
    """Each lowers the scale by half; more of them than `max_skipped_updates` don't stop the run."""
    module, trainer, scales = fit("SFT", tiny, tmp_path, 2.0**30, max_steps=5, max_skipped_updates=1)
    assert scales[-1] == 2.0**25
    assert trainer.callback_metrics["train/skipped_updates"] == 0
    start = make_module("SFT", tiny)
    start.configure_model()
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), start.parameters(), strict=True))


def test_gradient_that_is_not_finite_at_any_scale_is_counted_and_stops_the_run(tiny, tmp_path):
    with (
        pytest.warns(UserWarning, match="update 2 is skipped: its gradient is not finite"),
        pytest.raises(ValueError, match="2 updates in a row were skipped"),
    ):
        fit("SFT", tiny, tmp_path, 4.0, max_steps=9, broken=True, max_skipped_updates=2)
