"""Policy gradients with a critic, and RAFT, by enumeration. See `enumeration`."""

import copy
import itertools

import pytest
import torch
from transformers import AutoModelForSequenceClassification

import lit_rlhf
from enumerable import make_completions, make_prompts
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
from lit_rlhf.critic import Critic


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
    module = make_module(lit_rlhf.VanillaPG, rewards, num_samples=1, critic="head", value_coef=1e-30)
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
    module = make_module(lit_rlhf.VanillaPG, (delayed, immediate), num_samples=1, critic="head", value_coef=0.7)
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


def test_ppo_without_its_additions_is_vanilla_policy_gradient():
    bare = dict(gae_lambda=1.0, clip=None, value_clip=None, ratio=False, whiten=False)
    gradients = []
    for method, options in ((lit_rlhf.VanillaPG, {}), (lit_rlhf.PPO, bare)):
        module = make_module(method, (delayed, immediate), num_samples=2, critic="head", **options)
        module.critic = copied_critic(module, 0.5)
        gradients.append(step_gradient(module, [ALL[4], ALL[1]]))
    assert_same(*gradients)


@pytest.mark.parametrize("clip", [None, 0.2])
def test_the_ratio_of_ppo_is_one_in_the_first_update_and_changes_no_gradient(clip):
    gradients = []
    for ratio in (False, True):
        module = make_module(lit_rlhf.PPO, num_samples=2, critic="head", ratio=ratio, clip=clip)
        module.critic = copied_critic(module, 0.5)
        logged = {}
        module.log_dict = lambda metrics, logged=logged, **kwargs: logged.update(metrics)
        gradients.append(step_gradient(module, [ALL[4], ALL[1]]))
    assert_same(*gradients)
    assert logged["train/ratio"] == 1 and logged["train/clip_fraction"] == 0


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
