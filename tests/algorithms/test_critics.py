"""Policy gradients with a critic, and RAFT, by enumeration. See `enumeration`."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lit_rlhf
from enumerable import make_completions, make_prompts, plain_logprobs
from enumeration import (
    ALL,
    BETA,
    DELAYED,
    PROMPT,
    REWARDS,
    assert_same,
    delayed,
    expected_gradient,
    flat_gradient,
    immediate,
    make_module,
    sequence_logprobs,
    step_gradient,
    totals,
    true_gradient,
)
from lit_rlhf.models.scalar import Critic, value_head
from lit_rlhf.types import Demonstrations


def copied_critic(module, spread: float):
    """A critic that shares the policy's architecture, in float64, with an opinion."""
    config = copy.deepcopy(module.policy.causal_lm.config)
    config.num_labels = 1
    torch.manual_seed(3)
    critic = Critic(AutoModelForSequenceClassification.from_config(config, dtype=torch.float64))
    torch.nn.init.normal_(critic.model.score.weight, std=spread)
    return critic


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_vanilla_policy_gradient_is_unbiased_whatever_the_critic_says(critic, rewards):
    module = make_module(lit_rlhf.VanillaPG, rewards, num_samples=1, critic="head", vf_coef=1e-30)
    if critic == "model":
        module.critic = copied_critic(module, 0.5)
    else:
        torch.nn.init.normal_(module.critic.weight, std=0.5)
    of_the_policy = sum(p.numel() for p in module.policy.parameters())
    estimate = expected_gradient(module)
    truth = true_gradient(module, totals(rewards))
    assert_same(estimate[:of_the_policy], truth[:of_the_policy])


def test_a_critic_learns_the_return_that_it_did_not_expect():
    """The critic's gradient is that of the squared error of its values, summed over the tokens."""
    module = make_module(lit_rlhf.VanillaPG, (delayed, immediate), num_samples=1, critic="head", vf_coef=0.7)
    module.critic = copied_critic(module, 0.5)
    group = [ALL[4]]
    step_gradient(module, group)
    actual = torch.cat([p.grad.flatten() for p in module.critic.parameters()])
    prompts = make_prompts(PROMPT)
    completions = make_completions(module.policy, prompts, [group])
    with torch.no_grad():
        kl = completions.logprobs - module.reference.logprobs(prompts, completions)
    rewards = torch.tensor(immediate(completions.ids())[0], dtype=torch.float64) - BETA * kl[0, 0]
    rewards[-1] += DELAYED[ALL[4]]
    returns = torch.stack([rewards[t:].sum() for t in range(len(rewards))])
    module.zero_grad()
    (0.7 * (module.critic.values(prompts, completions)[0, 0] - returns) ** 2 / 2).sum().backward()
    assert_same(actual, torch.cat([p.grad.flatten() for p in module.critic.parameters()]))


@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_without_its_additions_is_vanilla_policy_gradient(critic):
    bare = dict(gae_lambda=1.0, clip_range=None, clip_range_vf=None, importance_ratio=False, whiten=False)
    gradients = []
    for method, options in ((lit_rlhf.VanillaPG, {}), (lit_rlhf.PPO, bare)):
        module = make_module(method, (delayed, immediate), num_samples=2, critic="head", **options)
        if critic == "model":
            module.critic = copied_critic(module, 0.5)
        else:
            torch.nn.init.constant_(module.critic.weight, 0.5)
        gradients.append(step_gradient(module, [ALL[4], ALL[1]]))
    assert_same(*gradients)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_ratio_of_ppo_is_one_in_the_first_update_and_changes_no_gradient(clip):
    gradients = []
    for ratio in (False, True):
        module = make_module(lit_rlhf.PPO, num_samples=2, critic="head", importance_ratio=ratio, clip_range=clip)
        module.critic = copied_critic(module, 0.5)
        logged = {}
        module.log_dict = lambda metrics, logged=logged, **kwargs: logged.update(metrics)
        gradients.append(step_gradient(module, [ALL[4], ALL[1]]))
    assert_same(*gradients)
    assert logged["train/ratio"] == 1 and logged["train/clip_fraction"] == 0


def values_of(module, completion) -> torch.Tensor:
    """The critic's value before each token, by one plain forward of its model, or of the policy's trunk."""
    is_head = isinstance(module.critic, torch.nn.Linear)
    trunk = (module.policy.causal_lm if is_head else module.critic.model).base_model
    hidden = trunk(torch.tensor([[*PROMPT, *completion]])).last_hidden_state[0]
    return (module.critic if is_head else module.critic.model.score)(hidden[len(PROMPT) - 1 : -1]).squeeze(-1)


def ppo_gradient(module, group, sampled, before, rewards) -> tuple[torch.Tensor, int]:
    """PPO's gradient and how many values its clip holds, token by token from the papers' formulas.

    Args:
        module: The method, at the weights of the update.
        group: The completions.
        sampled: What the sampler said of their log-probabilities.
        before: Their log-probabilities and values before the first update.
        rewards: What each is worth at its end.
    """
    rows, held = [], 0
    for y, drawn, (_, values), reward in zip(group, sampled, before, rewards, strict=True):
        earned = -BETA * (drawn - plain_logprobs(module.initial, PROMPT, y).detach())
        earned[-1] += reward
        advantages, ahead = [], 0.0
        for t in reversed(range(len(y))):
            delta = earned[t] + (values[t + 1] if t + 1 < len(y) else 0.0) - values[t]
            ahead = delta + module.gae_lambda * ahead
            advantages.insert(0, ahead)
        rows.append((torch.stack(advantages), values))
    everything = torch.cat([advantages for advantages, _ in rows])
    mean, variance = (everything.mean(), everything.var(correction=0) + 1e-8) if module.whiten else (0.0, 1.0)
    total = 0.0
    for y, (advantages, values), (old, _) in zip(group, rows, before, strict=True):
        ratio = (plain_logprobs(module.policy.causal_lm, PROMPT, y) - old).exp()
        wanted, now = (advantages - mean) / variance**0.5, values_of(module, y)
        total -= torch.minimum(ratio * wanted, ratio.clamp(1 - module.clip_range, 1 + module.clip_range) * wanted).sum()
        miss = (now - advantages - values) ** 2
        if module.clip_range_vf is not None:
            near = values + (now - values).clamp(-module.clip_range_vf, module.clip_range_vf)
            held += int((near != now).sum())
            miss = torch.maximum(miss, (near - advantages - values) ** 2)
        total += module.vf_coef * miss.sum() / 2
    module.zero_grad()
    (total / len(group)).backward()
    return flat_gradient(module), held


@pytest.mark.parametrize(
    "options",
    [{"gae_lambda": 0.5}, {"gae_lambda": 1.0, "whiten": True}, {"gae_lambda": 0.0, "clip_range_vf": 0.05}],
    ids=["lambda", "whitened", "values clipped"],
)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_is_its_formulas_in_the_first_update_and_in_one_after_that(critic, options):
    """What the sampler rounds differently changes the KL that it is rewarded by, but no ratio."""
    settings = {
        "whiten": False,
        "clip_range_vf": None,
        "vf_coef": 0.7,
        "update_epochs": 2,
        "clip_range": 0.2,
        **options,
    }
    module = make_module(lit_rlhf.PPO, num_samples=4, critic="head", **settings)
    if critic == "model":
        module.critic = copied_critic(module, 0.5)
    else:
        torch.nn.init.normal_(module.critic.weight, std=0.5)
    group, prompts = [ALL[4], ALL[1], ALL[5], ALL[0]], make_prompts(PROMPT)
    drawn = make_completions(module.policy, prompts, [group])
    noise = torch.linspace(-0.3, 0.3, drawn.logprobs.numel(), dtype=torch.float64).view_as(drawn.logprobs)
    drawn = drawn.replace(logprobs=drawn.logprobs + noise)
    sampled = [drawn.logprobs[0, i, : len(y)] for i, y in enumerate(group)]
    module.sample, logged = lambda prompts: drawn, {}
    module.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    with torch.no_grad():
        before = [(plain_logprobs(module.policy.causal_lm, PROMPT, y), values_of(module, y)) for y in group]
    for step in range(2):
        module.zero_grad()
        module.training_step(prompts, step).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        actual = flat_gradient(module)
        expected, held = ppo_gradient(module, group, sampled, before, [DELAYED[y] for y in group])
        assert_same(actual, expected)
        assert (held > 0) == (step == 1 and module.clip_range_vf is not None)
        assert (logged["train/clip_fraction"] > 0) == (step == 1)
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)


def best_of_two_gradient(module, rewards: torch.Tensor) -> torch.Tensor:
    """Gradient of the log-likelihood of the better of two, the choice itself held fixed."""
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        returns = rewards - module.kl_coef * (logprobs - sequence_logprobs(module.initial))
        probabilities = logprobs.exp()
    module.zero_grad()
    total = sum(
        probabilities[i] * probabilities[j] * logprobs[i if returns[i] >= returns[j] else j]
        for i, j in itertools.product(range(len(ALL)), repeat=2)
    )
    total.backward()
    return flat_gradient(module)


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_raft_imitates_the_best_of_each_group_and_nothing_else(rewards):
    module = make_module(lit_rlhf.RAFT, rewards, num_samples=2)
    assert_same(expected_gradient(module), best_of_two_gradient(module, totals(rewards)))


def test_values_are_as_precise_as_the_head_under_autocast_too():
    head, features = torch.nn.Linear(64, 1, bias=False), torch.randn(1, 2, 3, 64).bfloat16()
    tokens = torch.ones(1, 2, 3, dtype=torch.long)
    completions = Demonstrations(make_prompts([5]), tokens, tokens.bool())
    expected = head(features.float()).squeeze(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value_head(head, features, completions), expected)
