"""DPO and IPO: loss, gradient, and reference log-probabilities."""

import math

import pytest
import torch

import lit_rlhf
from lit_rlhf.types import Preferences
from runs import make_data, make_module, make_trainer


def sgd(params):
    return torch.optim.SGD(params, lr=0.1)


def fit(module, root, **options):
    trainer = make_trainer(root, **options)
    trainer.fit(module, make_data("DPO"))
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_initial_loss_is_log_2(precision, tiny, tmp_path):
    metrics = fit(make_module("DPO", tiny, optimizer=sgd), tmp_path, max_steps=1, precision=precision)
    assert metrics["train/loss"] == pytest.approx(math.log(2), abs=1e-5)
    assert metrics["train/reward_margin"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize("name", ["DPO", "IPO"])
def test_gradient_matches_the_published_loss(name, tiny, tmp_path):
    module = make_module(name, tiny, optimizer=sgd, beta=0.3)
    fit(module, tmp_path, max_steps=1)  # so that the policy differs from its reference
    data = make_data(name)
    data.tokenizer = module.tokenizer
    data.setup()
    batch = next(iter(data.train_dataloader()))

    def sequence_logprobs(model):
        prompts, rows = batch.prompts, []
        for i, j in [(i, j) for i in range(len(prompts)) for j in range(2)]:
            prompt, tokens = prompts.tokens[i][prompts.mask[i]], batch.tokens[i, j][batch.mask[i, j]]
            logits = model(torch.cat([prompt, tokens]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
            rows.append(logits.log_softmax(-1)[torch.arange(len(tokens)), tokens].sum())
        return torch.stack(rows).view(-1, 2)

    with torch.no_grad():
        reference = sequence_logprobs(module.reference._policy.causal_lm)
    log_ratios = sequence_logprobs(module.policy.causal_lm) - reference
    margin = log_ratios[:, 0] - log_ratios[:, 1]
    loss = -torch.nn.functional.logsigmoid(0.3 * margin) if name == "DPO" else (margin - 1 / 0.6) ** 2
    module.zero_grad()
    loss.mean().backward()
    expected = {n: p.grad.clone() for n, p in module.named_parameters()}
    module.zero_grad()
    log, module.log_dict = module.log_dict, lambda *args, **kwargs: None
    module.training_step(batch, 0).backward()
    module.log_dict = log
    assert max(g.abs().max() for g in expected.values()) > 1e-2
    for n, p in module.named_parameters():
        torch.testing.assert_close(p.grad, expected[n], atol=1e-4, rtol=1e-3, msg=n)


def test_reference_logprobs_are_computed_once_per_pair(tiny, tmp_path, monkeypatch):
    indices = []
    original = lit_rlhf.models.reference.Reference.logprobs

    def recording(self, prompts, completions, temperature=1.0):
        indices.extend(prompts.index.tolist())
        return original(self, prompts, completions, temperature)

    monkeypatch.setattr(lit_rlhf.models.reference.Reference, "logprobs", recording)
    module = make_module("DPO", tiny)
    fit(module, tmp_path, max_epochs=3)
    held_out = module.held_out_reference_logprobs
    assert sorted(indices) == sorted(set(indices)) == sorted([*module.reference_logprobs, *held_out])
    assert len(held_out) == 3


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
def test_dataloader_and_data_module_train_the_same_weights(tiny, tmp_path):
    """Without a data module, the reference log-probabilities are computed in every step."""
    options = dict(max_steps=3, limit_val_batches=0)
    expected = make_module("DPO", tiny, optimizer=sgd)
    make_trainer(tmp_path, **options).fit(expected, data := make_data("DPO"))
    batches = list(data.train_dataloader())
    assert all(isinstance(batch, Preferences) for batch in batches)
    module = make_module("DPO", tiny, optimizer=sgd)
    make_trainer(tmp_path, **options).fit(module, torch.utils.data.DataLoader(batches, batch_size=None))
    assert expected.reference_logprobs and not module.reference_logprobs
    torch.testing.assert_close(module.policy.state_dict(), expected.policy.state_dict())
    before = make_module("DPO", tiny)
    before.configure_model()
    moved = [(p - q).abs().max() for p, q in zip(module.parameters(), before.parameters(), strict=True)]
    assert max(moved) > 1e-3


def test_training_prefers_the_chosen_completions(tiny, tmp_path):
    module = make_module("DPO", tiny, lr=1e-3)
    metrics = fit(module, tmp_path, max_epochs=8)
    assert metrics["val/accuracy"] == 1.0
    assert metrics["val/loss"] < 0.6 and metrics["val/chosen_reward"] > metrics["val/rejected_reward"]


def test_beta_must_be_positive(tiny):
    with pytest.raises(ValueError, match="beta=0 must be a finite number above 0"):
        lit_rlhf.DPO(str(tiny), beta=0)


def test_fast_dev_run_does_not_compute_reference_logprobs_of_all_pairs(tiny, tmp_path):
    module = make_module("DPO", tiny)
    make_trainer(tmp_path, fast_dev_run=True).fit(module, make_data("DPO"))
    assert not module.reference_logprobs
