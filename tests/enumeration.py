"""Expectations of a method's gradient, exactly: every group of completions goes through the real step.

Each group is weighted with its exact probability, so the mean gradient is an expectation without noise, to be compared
with the gradient of `E[r] - beta KL` differentiated directly.
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

DELAYED = {y: (-1) ** i * (i + 1) / 4 for i, y in enumerate(ALL)}  # in eighths: exact in float32 too
PREFIXES = sorted({y[: t + 1] for y in ALL for t in range(len(y))})
IMMEDIATE = {prefix: (i * 3 % 7 - 3) / 4 for i, prefix in enumerate(PREFIXES)}  # of what is written so far, only


def delayed(completion_ids, **kwargs):
    return [DELAYED[tuple(ids)] for ids in completion_ids]


def immediate(completion_ids, **kwargs):
    return [[IMMEDIATE[tuple(ids[: t + 1])] for t in range(len(ids))] for ids in completion_ids]


immediate.token_level = True


def finished_only(completion_ids, **kwargs):
    return [DELAYED[tuple(ids)] if ids[-1] == EOS else None for ids in completion_ids]


def make_module(method=lit_rlhf.RLOO, rewards=(delayed,), moved: float = 0.4, kl_coef: float = BETA, **options):
    """A method on the enumerable policy, its weights moved away from the reference, its Trainer idle."""
    policy = make_policy(VOCABULARY)
    options = grouped({"max_new_tokens": LENGTH, "kl_coef": kl_coef, **options})
    module = method(policy, rewards=list(rewards), **options)
    module.configure_model()
    vars(module)["initial"] = copy.deepcopy(policy.causal_lm)  # hidden from `parameters`
    torch.manual_seed(1)
    for parameter in policy.parameters():
        parameter.data += moved * torch.randn_like(parameter)
    module.trainer = make_trainer(".")
    module.log = module.log_dict = lambda *args, **kwargs: None
    return module


def flat_gradient(module) -> torch.Tensor:
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in module.parameters()])


def step_gradient(module, group) -> torch.Tensor:
    """The gradient that the optimizer would be given for one rollout, of this group alone."""
    prompts = make_prompts(PROMPT)
    module.sample = lambda prompts: make_completions(module.policy, prompts, [list(group)])
    module.zero_grad()
    module.training_step(prompts, 0).backward()
    module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
    return flat_gradient(module)


def sequence_logprobs(model) -> torch.Tensor:
    return torch.stack([plain_logprobs(model, PROMPT, y).sum() for y in ALL])


def expected_gradient(module) -> torch.Tensor:
    """Minus the mean of `step_gradient` over all groups: what the weights climb along."""
    probabilities = dict(zip(ALL, sequence_logprobs(module.policy.causal_lm).exp().tolist(), strict=True))
    state = module.running_state()
    mean = torch.zeros(sum(p.numel() for p in module.parameters()), dtype=torch.float64)
    for group in itertools.product(ALL, repeat=module.num_samples):
        module.load_running_state(state)  # every group follows the same history
        mean -= math.prod(probabilities[y] for y in group) * step_gradient(module, group)
    return mean


def true_gradient(module, rewards: torch.Tensor) -> torch.Tensor:
    """Gradient of `E[r] - beta KL(pi || ref)`."""
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        reference = sequence_logprobs(module.initial)
    module.zero_grad()
    (logprobs.exp() * (rewards - module.kl_coef * (logprobs - reference))).sum().backward()
    return flat_gradient(module)


def totals(rewards) -> torch.Tensor:
    """The whole reward of every completion."""
    parts = [torch.tensor(reward(completion_ids=ALL), dtype=torch.float64) for reward in rewards if reward is delayed]
    parts += [torch.tensor([sum(row) for row in immediate(ALL)], dtype=torch.float64)] * (immediate in rewards)
    return sum(parts)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert expected.abs().max() > 1e-2  # else nothing is shown
    torch.testing.assert_close(actual, expected, atol=1e-9, rtol=0)


REWARDS = {"delayed": (delayed,), "token-level": (immediate,), "both": (delayed, immediate)}
