"""Sampling and scoring that run out of memory continue in halves, with the same results and one warning."""

import warnings

import pytest
import torch
from torch import nn
from transformers import LlamaForSequenceClassification

from enumerable import make_prompts
from lit_rlhf.models.out_of_memory import FittingRows, is_out_of_memory
from lit_rlhf.models.policy import Policy
from lit_rlhf.models.reference import Reference
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.models.scalar import Critic
from lit_rlhf.rewards import RewardModel
from tiny import make_llama, make_tokenizer

TOKENIZER = make_tokenizer()
SAMPLING = Sampling(max_new_tokens=8)
PROMPTS = make_prompts(*[list(range(7 + i, 9 + 3 * i)) for i in range(8)])
ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("MPS backend out of memory (MPS allocated: 8.00 GB)."),
    MemoryError(),
]


class Memory:
    """Raises an error in the layer's forward pass if the batch has more rows than fit."""

    def __init__(self, layer: nn.Module, rows: int, error: Exception = ERRORS[0]) -> None:
        self.rows, self.error, self.seen = rows, error, []
        layer.register_forward_pre_hook(self)

    def __call__(self, layer, args) -> None:
        self.seen.append(len(args[0]))
        if len(args[0]) > self.rows:
            raise self.error


def make_policy() -> Policy:
    policy = Policy(make_llama(len(TOKENIZER), initializer_range=0.1), TOKENIZER)
    policy.probe()
    return policy


def embeddings(model) -> nn.Module:
    return model.get_input_embeddings()


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: str(error)[:20])
def test_sampling_continues_in_halves_with_the_same_completions(error):
    expected = make_policy().sample(PROMPTS, 3, SAMPLING, seed=4)
    policy = make_policy()
    Memory(embeddings(policy.causal_lm), 7, error)
    with pytest.warns(UserWarning, match=r"with 8 prompts .* with 2, .* --model.sampling.batch_size") as caught:
        drawn = policy.sample(PROMPTS, 3, SAMPLING, seed=4)
    assert len(caught) == 1
    assert drawn.ids() == expected.ids() and torch.equal(drawn.finished, expected.finished)
    torch.testing.assert_close(drawn.logprobs, expected.logprobs, atol=1e-5, rtol=0)


def test_the_number_of_rows_that_fit_is_remembered():
    policy = make_policy()
    memory = Memory(embeddings(policy.causal_lm), 7)
    with pytest.warns(UserWarning):
        policy.sample(PROMPTS, 3, SAMPLING)
    memory.seen.clear()
    policy.sample(PROMPTS, 3, SAMPLING)  # a warning would be an error
    assert max(memory.seen) == 6
    memory.seen.clear()
    policy.sample(PROMPTS, 1, SAMPLING)  # fewer samples leave room for more prompts
    assert max(memory.seen) == 6


def test_a_single_prompt_that_does_not_fit_gives_a_sentence():
    policy = make_policy()
    Memory(embeddings(policy.causal_lm), 3)
    with warnings.catch_warnings(), pytest.raises(ValueError, match="sampling ran out of memory with a single one"):
        warnings.simplefilter("ignore")
        policy.sample(PROMPTS, 4, SAMPLING)


def test_other_errors_are_not_repeated():
    policy = make_policy()
    memory = Memory(embeddings(policy.causal_lm), 7, RuntimeError("CUDA error: device-side assert triggered"))
    with pytest.raises(RuntimeError, match="device-side assert"):
        policy.sample(PROMPTS, 3, SAMPLING)
    assert memory.seen == [8]
    assert not is_out_of_memory(ValueError("out of memory"))


@pytest.mark.parametrize("scorer", ["policy", "reference", "features", "critic", "score"])
def test_scoring_without_gradient_continues_in_halves(scorer):
    policy = make_policy()
    drawn = policy.sample(PROMPTS, 3, SAMPLING)
    config = make_llama(len(TOKENIZER)).config
    config.num_labels = 1
    critic = Critic(LlamaForSequenceClassification(config))
    critic.probe()
    reference = Reference.of(policy)
    compute, model = {
        "policy": (policy.logprobs, policy.causal_lm),
        "reference": (reference.logprobs, reference._policy.causal_lm),
        "features": (policy.features, policy.causal_lm),
        "critic": (critic.values, critic.classifier),
        "score": (critic.score, critic.classifier),
    }[scorer]
    with torch.no_grad():
        expected = compute(PROMPTS, drawn)
        Memory(embeddings(model), 6)
        with pytest.warns(UserWarning, match="--model.updates.num_minibatches or a smaller --data.batch_size"):
            found = compute(PROMPTS, drawn)
    shown = drawn.mask if found.ndim == 3 else torch.ones_like(drawn.finished)
    shown = drawn.mask.unsqueeze(-1) if found.ndim == 4 else shown
    torch.testing.assert_close(found * shown, expected * shown, atol=1e-5, rtol=0)


def test_a_forward_pass_with_gradient_is_not_repeated():
    policy = make_policy()
    drawn = policy.sample(PROMPTS, 3, SAMPLING)
    Memory(embeddings(policy.causal_lm), 6)
    with pytest.raises(torch.OutOfMemoryError):
        policy.logprobs(PROMPTS, drawn)


@pytest.mark.parametrize("shared", [False, True])
def test_a_reward_model_continues_in_halves(shared):
    config = make_llama(len(TOKENIZER)).config
    config.num_labels = 1
    model = LlamaForSequenceClassification(config)
    prompts = ["a question that is long"] * 8 if shared else [f"question {i}" for i in range(8)]
    reward, completions = RewardModel(model, TOKENIZER), [f"answer {i}" for i in range(8)]
    expected = reward(prompts, completions)
    Memory(model.get_input_embeddings(), 3)
    with pytest.warns(UserWarning, match="completions at a time .* a smaller batch_size of the reward model"):
        found = reward(prompts, completions)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_memory_is_freed_before_the_next_attempt(monkeypatch):
    """The error holds the frames of the failed attempt, and these their tensors."""
    import lit_rlhf.models.out_of_memory as module

    held, alive = [], []

    class Block:
        def __del__(self) -> None:
            held.remove(self.size)

    def compute(part: slice) -> int:
        block = Block()
        block.size = part.stop - part.start
        held.append(block.size)
        if block.size > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return block.size

    monkeypatch.setattr(module, "garbage_collection_cuda", lambda: alive.append(list(held)))
    with pytest.warns(UserWarning):
        assert FittingRows("scoring").in_parts(compute, 8, 1) == [2, 2, 2, 2]
    assert alive == [[], []]
