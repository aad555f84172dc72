"""Exact expectation of an algorithm's gradient: the real training step on every possible group of completions.

Each group is weighted by its exact probability, so the weighted mean is the expected gradient without sampling noise.
The reference is the gradient of `E[r] - beta KL` by automatic differentiation.
"""

import copy
import itertools
import math

import torch

import lit_rlhf
from enumerable import EOS, every_completion, make_completions, make_policy, make_prompts, plain_logprobs
from runs import grouped, make_trainer

VOCABULARY, LENGTH, BETA = 3, 2, 0.3
PROMPT = [1, 2, 1]
ALL = every_completion(VOCABULARY, LENGTH)

SEQUENCE_REWARDS = {y: (-1) ** i * (i + 1) / 4 for i, y in enumerate(ALL)}  # multiples of 1/4: exact in float32 too
PREFIXES = sorted({y[: t + 1] for y in ALL for t in range(len(y))})
TOKEN_REWARDS = {prefix: (i * 3 % 7 - 3) / 4 for i, prefix in enumerate(PREFIXES)}  # depends only on the prefix


def sequence_reward(completion_ids, **kwargs):
    return [SEQUENCE_REWARDS[tuple(ids)] for ids in completion_ids]


def token_reward(completion_ids, **kwargs):
    return [[TOKEN_REWARDS[tuple(ids[: t + 1])] for t in range(len(ids))] for ids in completion_ids]


token_reward.token_level = True


def reward_if_finished(completion_ids, **kwargs):
    return [SEQUENCE_REWARDS[tuple(ids)] if ids[-1] == EOS else None for ids in completion_ids]


def make_module(
    algorithm=lit_rlhf.RLOO, rewards=(sequence_reward,), perturbation: float = 0.4, kl_coef: float = BETA, **options
):
    """Return an algorithm with the enumerable policy, perturbed so that it differs from the reference."""
    policy = make_policy(VOCABULARY)
    options = grouped({"max_new_tokens": LENGTH, "kl_coef": kl_coef, **options})
    module = algorithm(policy, rewards=list(rewards), **options)
    module.configure_model()
    vars(module)["initial"] = copy.deepcopy(policy.causal_lm)  # not registered: excluded from `parameters()`
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += perturbation * torch.randn_like(parameter)
    module.trainer = make_trainer(".")
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def flat_gradient(module) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def step_gradient(module, group) -> torch.Tensor:
    """Return the gradient that the optimizer receives for a rollout of this group only."""
    prompts, extra = make_prompts(PROMPT), [greedy_completion(module)] * isinstance(module, lit_rlhf.ReMax)
    module.sample = lambda prompts: make_completions(module.policy, prompts, [[*group, *extra]])
    module.zero_grad()
    module.training_step(prompts, 0).backward()
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    return flat_gradient(module)


def greedy_completion(module) -> tuple[int, ...]:
    """Return the completion of the most likely tokens."""
    tokens: list[int] = []
    while len(tokens) < LENGTH and EOS not in tokens:
        with torch.no_grad():
            tokens.append(int(module.policy.causal_lm(torch.tensor([[*PROMPT, *tokens]])).logits[0, -1].argmax()))
    return tuple(tokens)


def sequence_logprobs(model) -> torch.Tensor:
    return torch.stack([plain_logprobs(model, PROMPT, y).sum() for y in ALL])


def expected_gradient(module) -> torch.Tensor:
    """Return minus the mean of `step_gradient` over all groups: the expected ascent direction."""
    probabilities = dict(zip(ALL, sequence_logprobs(module.policy.causal_lm).exp().tolist(), strict=True))
    state = module.running_state()
    mean = torch.zeros(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    for group in itertools.product(ALL, repeat=module.num_samples):
        module.load_running_state(state)  # the same running statistics for each group
        mean -= math.prod(probabilities[y] for y in group) * step_gradient(module, group)
    return mean


def true_gradient(module, rewards: torch.Tensor) -> torch.Tensor:
    """Return the gradient of `E[r] - beta KL(pi || ref)`."""
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        reference = sequence_logprobs(module.initial)
    module.zero_grad()
    (logprobs.exp() * (rewards - module.kl_coef * (logprobs - reference))).sum().backward()
    return flat_gradient(module)


def total_rewards(rewards) -> torch.Tensor:
    """Return the total reward of every completion, token rewards summed."""
    parts = [
        torch.tensor(reward(completion_ids=ALL), dtype=torch.float64) for reward in rewards if reward is sequence_reward
    ]
    parts += [torch.tensor([sum(row) for row in token_reward(ALL)], dtype=torch.float64)] * (token_reward in rewards)
    return sum(parts)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1e-2  # otherwise the comparison is trivial
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


REWARDS = {
    "sequence-level": (sequence_reward,),
    "token-level": (token_reward,),
    "both": (sequence_reward, token_reward),
}
