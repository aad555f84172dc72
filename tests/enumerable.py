"""A float64 policy so small that all its completions can be enumerated, and expectations computed exactly."""

import functools
import itertools

import torch
from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from lit_rlhf.models.policy import Policy
from lit_rlhf.types import Completions, Prompts

EOS = 0


@functools.cache
def make_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    vocabulary = {token: i for i, token in enumerate(["<eos>", *"abcdefg"][:vocab_size])}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary)), eos_token="<eos>")


def make_policy(vocab_size: int, seed: int = 2, spread: float = 0.6) -> Policy:
    """Return a one-layer GPT-2: unlike other models, no part of it computes in float32 regardless of its dtype."""
    torch.manual_seed(seed)
    config = AutoConfig.for_model(
        "gpt2",
        vocab_size=vocab_size,
        n_embd=8,
        n_layer=1,
        n_head=2,
        n_positions=16,
        initializer_range=spread,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    return Policy(AutoModelForCausalLM.from_config(config, dtype=torch.float64), make_tokenizer(vocab_size))


def every_completion(vocab_size: int, length: int) -> list[tuple[int, ...]]:
    """Return all completions of at most `length` tokens; those without EOS have exactly `length` tokens."""
    words = range(1, vocab_size)
    ended = [(*body, EOS) for t in range(length) for body in itertools.product(words, repeat=t)]
    return [*ended, *itertools.product(words, repeat=length)]


def make_prompts(*rows: list[int]) -> Prompts:
    width = max(map(len, rows))
    tokens = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[False] * (width - len(row)) + [True] * len(row) for row in rows])
    return Prompts(tokens, mask, torch.arange(len(rows)), text=["" for _ in rows])


def make_completions(policy: Policy, prompts: Prompts, groups: list[list[tuple[int, ...]]]) -> Completions:
    """Return these completions in the form that the sampler returns."""
    length = max(len(y) for group in groups for y in group)
    tokens = torch.tensor([[[*y, *[0] * (length - len(y))] for y in group] for group in groups])
    lengths = torch.tensor([[len(y) for y in group] for group in groups])
    mask = torch.arange(length) < lengths.unsqueeze(-1)
    finished = torch.tensor([[y[-1] == EOS for y in group] for group in groups])
    completions = Completions(tokens, mask, torch.zeros(tokens.shape, dtype=torch.float64), finished)
    with torch.no_grad():
        return completions.replace(logprobs=policy.logprobs(prompts, completions))


def plain_logprobs(model: torch.nn.Module, prompt: list[int], completion: tuple[int, ...]) -> torch.Tensor:
    """Return the log-probability of each token of a completion, with gradient, by one plain forward pass."""
    logits = model(torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
    return logits.log_softmax(-1)[torch.arange(len(completion)), torch.tensor(completion)]
