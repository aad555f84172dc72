"""Count the operations of an update, so that a regression is found without timing."""

import pytest
import torch
from lightning.pytorch import Callback
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from lit_rlhf.models import logprobs as logprobs_module
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.types import Prompts
from runs import make_data, make_module, make_trainer
from tiny import make_llama, make_tokenizer

N, K, T = 4, 3, 6
"""Prompts, completions of each, and their tokens."""

pytestmark = pytest.mark.filterwarnings("ignore:top_p, top_k and min_new_tokens bias the gradient")


class Operations(TorchDispatchMode):
    """Records the tokens of each call of each embedding, and the size of the largest tensor."""

    def __init__(self):
        super().__init__()
        self.lookups, self.largest = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        if function is torch.ops.aten.embedding.default:
            self.lookups.setdefault(args[0].data_ptr(), []).append(args[1].numel())
        made = [leaf.numel() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self.largest = max([self.largest, *made])
        return result


class Counts(Callback):
    """Counts the first step of the second rollout; the first also probes the model."""

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        if batch_idx == module.steps_per_rollout:
            self.flops, self.operations = FlopCounterMode(display=False), Operations()
            self.flops.__enter__()
            self.operations.__enter__()

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        if batch_idx == module.steps_per_rollout:
            self.operations.__exit__(None, None, None)
            self.flops.__exit__(None, None, None)
            self.rollout, self.model = module.rollout, module.policy.causal_lm
            models = {"policy": module.policy.model, "reference": module.reference._policy.model}
            if hasattr(module, "critic"):
                models["critic"] = module.critic.model
            pointers = {name: model.get_input_embeddings().weight.data_ptr() for name, model in models.items()}
            self.lookups = {name: self.operations.lookups.pop(pointer) for name, pointer in pointers.items()}


@pytest.fixture
def folder(tmp_path):
    """A model in which attention costs little, and every fourth token ends a completion."""
    tokenizer = make_tokenizer()
    model = make_llama(len(tokenizer), hidden=128)
    model.generation_config.eos_token_id = list(range(2, 262, 4))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def count(name, folder, root, ends_early=False, **options):
    """Count an update; every completion has all its tokens unless it may end early."""
    counts, options["min_new_tokens"] = Counts(), 0 if ends_early else T
    module = make_module(name, folder, num_samples=K, max_new_tokens=T, **options)
    trainer = make_trainer(root, max_steps=module.steps_per_rollout + 1, callbacks=[counts], limit_val_batches=0)
    trainer.fit(module, make_data(name, batch_size=N))
    return counts


def scored(rollout):
    """Return the tokens of the two forward passes that score completions: prompts, and all but the last tokens."""
    n, k, t = rollout.completions.tokens.shape
    return [rollout.prompts.tokens.numel(), n * k * (t - 1)]


def test_a_prompt_is_computed_once_and_nothing_is_scored_twice(folder, tmp_path):
    counts = count("RLOO", folder, tmp_path)
    decoded = [counts.rollout.prompts.tokens.numel(), *[N * K] * (T - 1)]
    assert counts.lookups == {"policy": decoded + scored(counts.rollout), "reference": scored(counts.rollout)}
    assert not counts.operations.lookups


def test_finished_rows_are_not_decoded_any_more(folder, tmp_path):
    counts = count("RLOO", folder, tmp_path, ends_early=True)
    lengths = counts.rollout.completions.lengths
    assert 1 in lengths and T in lengths
    alive = [int((lengths > t).sum()) for t in range(1, T)]
    assert counts.lookups["policy"] == [counts.rollout.prompts.tokens.numel(), *alive, *scored(counts.rollout)]


@pytest.mark.parametrize("name", ["RLOO", "Reinforce", "VanillaPG", "PPO"])
def test_an_update_has_no_unnecessary_multiplications(name, folder, tmp_path):
    """Five passes over every token, nine with a critic: sampling, reference, training (three); values, training."""
    counts = count(name, folder, tmp_path)
    model = counts.model
    layers = sum(weight.numel() for weight in model.model.layers.parameters() if weight.ndim == 2)
    output = model.lm_head.weight.numel()
    tokens, completions = sum(scored(counts.rollout)), N * K * T
    passes = 5 * layers * tokens + output * (N + N * K * (T - 1) + 4 * completions)
    if "critic" in counts.lookups:
        assert counts.lookups["critic"] == 2 * scored(counts.rollout)
        passes += 4 * (layers * tokens + model.config.hidden_size * completions)
    assert counts.flops.get_total_flops() == 2 * passes


@pytest.mark.parametrize("cut", [{"num_minibatches": 2}, {}], ids=["two slices an update", "two rollouts an update"])
def test_gradients_of_an_update_are_not_held_while_the_next_samples(cut, folder, tmp_path):
    held = []

    def reward(completions, **kwargs):
        held.append(any(parameter.grad is not None for parameter in module.parameters()))
        return [float(len(text)) for text in completions]

    module = make_module("RLOO", folder, rewards=[reward], **cut)
    trainer = make_trainer(tmp_path, max_steps=2, accumulate_grad_batches=2, limit_val_batches=0)
    trainer.fit(module, make_data("RLOO", batch_size=N))
    assert held == ([False, False] if cut else [False, True, False, True])


def test_logits_of_all_positions_are_never_held_at_once(monkeypatch):
    vocabulary, at_once = 4096, 2**17
    monkeypatch.setattr(logprobs_module, "LOGITS_AT_ONCE", at_once)
    policy = Policy(make_llama(vocabulary, hidden=16), make_tokenizer())
    prompts = Prompts(torch.arange(7, 27).view(4, 5), torch.ones(4, 5, dtype=torch.bool), torch.arange(4))
    policy.probe()
    with Operations() as operations:
        completions = policy.sample(prompts, K, Sampling(max_new_tokens=30, min_new_tokens=30))
        policy.logprobs(prompts, completions).sum().backward()
    assert completions.tokens.numel() * vocabulary > 8 * at_once
    assert operations.largest <= at_once


@pytest.mark.parametrize("name", ["RLOO", "VanillaPG"])
def test_scoring_uses_batches_no_larger_than_those_of_training(name, folder, tmp_path):
    counts = count(name, folder, tmp_path, num_minibatches=2)
    prompts, k, t = counts.rollout.completions.tokens.shape
    assert prompts == N and max(counts.lookups["reference"]) == N // 2 * k * (t - 1)
    if name == "VanillaPG":
        assert max(counts.lookups["critic"]) == N // 2 * k * (t - 1)
