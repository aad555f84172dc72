"""RAFT trains only on the best completion of each group."""

import torch

import lit_rlhf
from lit_rlhf import models
from runs import make_trainer
from tiny import make_llama, make_tokenizer


def length(completions, **kwargs):
    return [float(len(text)) for text in completions]


def test_training_forward_computes_only_the_best_completions(tmp_path, monkeypatch):
    """Even if prompts are shorter than groups."""
    policy, forwards = lit_rlhf.Policy(make_llama(len(make_tokenizer())), make_tokenizer()), []
    module = lit_rlhf.RAFT(policy, rewards=[length], num_samples=5, sampling=lit_rlhf.Sampling(max_new_tokens=4))
    features = models.policy.completion_features

    def recording(forward, prompts, completions):
        forwards.append((tuple(completions.mask.shape[:2]), torch.is_grad_enabled()))
        return features(forward, prompts, completions)

    monkeypatch.setattr(models.policy, "completion_features", recording)
    data = lit_rlhf.PromptData(train=[{"prompt": c} for c in "abcdefgh"], batch_size=4)
    make_trainer(tmp_path, max_steps=1).fit(module, data)
    assert [shape for shape, with_gradient in forwards if with_gradient] == [(4, 1)]
    assert module.rollout.valid.all(), "rewards of all completions are kept"
    assert module.rollout.advantages.sum(1).tolist() == [1, 1, 1, 1]
    assert (module.rollout.returns.argmax(1) == module.rollout.advantages.argmax(1)).all()
