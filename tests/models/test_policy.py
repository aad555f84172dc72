"""Sampling and scoring against `transformers` itself, for every model family that the fast paths support."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from lit_rlhf.models.policy import Policy
from lit_rlhf.models.sampling import Sampling
from lit_rlhf.types import Completions, Prompts
from tiny import make_tokenizer

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2)
FAMILIES = {
    "llama": SMALL,
    "mistral": {**SMALL, "sliding_window": 6},
    "qwen2": SMALL,
    "qwen3": {**SMALL, "head_dim": 8},
    "gemma": {**SMALL, "head_dim": 8},
    "gemma2": {**SMALL, "head_dim": 8, "sliding_window": 6},
    "gemma3_text": {**SMALL, "head_dim": 8, "sliding_window": 6},
    "granite": {**SMALL, "logits_scaling": 4.0},
    "cohere": {**SMALL, "logit_scale": 0.25},
    "gpt2": dict(n_embd=32, n_layer=3, n_head=4, n_positions=128),
    "gpt_neox": {**SMALL, "max_position_embeddings": 128},
}
OWN_LOGITS = {"gemma2", "granite", "cohere"}


def make_model(family: str, vocab_size: int):
    torch.manual_seed(1)
    settings = {**FAMILIES[family], "vocab_size": vocab_size, "initializer_range": 0.3}
    config = AutoConfig.for_model(family, bos_token_id=1, eos_token_id=2, pad_token_id=0, **settings)
    return AutoModelForCausalLM.from_config(config).eval()


def make_prompts(lengths, vocab_size: int, seed: int = 0) -> Prompts:
    generator = torch.Generator().manual_seed(seed)
    width = max(lengths)
    tokens = torch.randint(7, vocab_size, (len(lengths), width), generator=generator)
    mask = torch.arange(width) >= width - torch.tensor(lengths).unsqueeze(1)
    return Prompts(tokens.where(mask, 0), mask, torch.arange(len(lengths)))


def plain_logprobs(model, prompts: Prompts, completions: Completions, temperature: float) -> torch.Tensor:
    """Compute log-probabilities by one unpadded forward pass per completion."""
    n, k, t = completions.tokens.shape
    result = torch.zeros(n, k, t)
    for i in range(n):
        prompt = prompts.tokens[i][prompts.mask[i]]
        for j in range(k):
            answer = completions.tokens[i, j][completions.mask[i, j]]
            logits = model(torch.cat([prompt, answer]).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
            scores = (logits / temperature).log_softmax(-1).gather(-1, answer.unsqueeze(-1)).squeeze(-1)
            result[i, j, : len(answer)] = scores
    return result


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    tokenizer = make_tokenizer()
    return request.param, Policy(make_model(request.param, len(tokenizer)), tokenizer)


def test_the_fast_paths_are_used_if_the_model_allows_them(family):
    name, policy = family
    policy.probe()
    assert policy.shares_prompt
    assert policy.chunks_logits == (name not in OWN_LOGITS)


def test_greedy_tokens_are_those_of_generate(family):
    _, policy = family
    prompts = make_prompts([3, 9, 6], len(policy.tokenizer))
    ours = policy.sample(prompts, 1, Sampling(max_new_tokens=12, greedy=True))
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    theirs = policy.causal_lm.generate(prompts.tokens, attention_mask=prompts.mask.long(), generation_config=config)[
        :, prompts.tokens.shape[1] :
    ]
    assert torch.equal(ours.tokens[:, 0], theirs)


def test_sampled_logprobs_and_scored_logprobs_are_those_of_a_plain_forward(family):
    _, policy = family
    prompts = make_prompts([2, 8, 5], len(policy.tokenizer))
    completions = policy.sample(prompts, 3, Sampling(max_new_tokens=10, temperature=0.8), seed=3)
    plain = plain_logprobs(policy.causal_lm, prompts, completions, 0.8)
    scored = policy.logprobs(prompts, completions, temperature=0.8)
    torch.testing.assert_close(completions.logprobs, plain, atol=5e-5, rtol=1e-5)
    torch.testing.assert_close(scored, plain, atol=5e-5, rtol=1e-5)


def test_gradients_are_those_of_a_plain_forward(family):
    _, policy = family
    prompts = make_prompts([2, 8, 5], len(policy.tokenizer))
    completions = policy.sample(prompts, 3, Sampling(max_new_tokens=10), seed=4)
    weights = torch.randn(completions.tokens.shape, generator=torch.Generator().manual_seed(0))

    def gradients(logprobs):
        policy.zero_grad()
        (logprobs * weights).sum().backward()
        return torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])

    fast = gradients(policy.logprobs(prompts, completions))
    plain = gradients(plain_logprobs(policy.causal_lm, prompts, completions, 1.0))
    torch.testing.assert_close(fast, plain, atol=1e-4 * float(plain.abs().max()), rtol=0)
