"""VanillaPG, PPO and RAFT against exact gradients by enumeration (see `enumeration`) and the published formulas."""

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
    PROMPT,
    REWARDS,
    SEQUENCE_REWARDS,
    assert_same,
    expected_gradient,
    flat_gradient,
    make_module,
    sequence_logprobs,
    sequence_reward,
    step_gradient,
    token_reward,
    total_rewards,
    true_gradient,
)
from lit_rlhf.models.scalar import Critic, value_head
from lit_rlhf.types import Demonstrations


def make_critic(module, std: float):
    """Return a float64 critic with the policy's architecture and a random value head."""
    config = copy.deepcopy(module.policy.causal_lm.config)
    config.num_labels = 1
    torch.manual_seed(3)
    critic = Critic(AutoModelForSequenceClassification.from_config(config, dtype=torch.float64))
    torch.nn.init.normal_(critic.model.score.weight, std=std)
    return critic


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_vanilla_pg_is_unbiased_for_any_critic(critic, rewards):
    module = make_module(lit_rlhf.VanillaPG, rewards, num_samples=1, critic="head", vf_coef=1e-30)
    if critic == "model":
        module.critic = make_critic(module, 0.5)
    else:
        torch.nn.init.normal_(module.critic.weight, std=0.5)
    policy_size = sum(p.numel() for p in module.policy.parameters())
    estimate = expected_gradient(module)
    truth = true_gradient(module, total_rewards(rewards))
    assert_same(estimate[:policy_size], truth[:policy_size])


def test_critic_gradient_is_that_of_the_squared_error_to_the_returns():
    """The squared errors of the values are summed over the tokens of a completion."""
    module = make_module(lit_rlhf.VanillaPG, (sequence_reward, token_reward), num_samples=1, critic="head", vf_coef=0.7)
    module.critic = make_critic(module, 0.5)
    group = [ALL[4]]
    step_gradient(module, group)
    actual = torch.cat([p.grad.flatten() for p in module.critic.parameters()])
    prompts = make_prompts(PROMPT)
    completions = make_completions(module.policy, prompts, [group])
    with torch.no_grad():
        kl = completions.logprobs - module.reference.logprobs(prompts, completions)
    rewards = torch.tensor(token_reward(completions.ids())[0], dtype=torch.float64) - BETA * kl[0, 0]
    rewards[-1] += SEQUENCE_REWARDS[ALL[4]]
    returns = torch.stack([rewards[t:].sum() for t in range(len(rewards))])
    module.zero_grad()
    (0.7 * (module.critic.values(prompts, completions)[0, 0] - returns) ** 2 / 2).sum().backward()
    assert_same(actual, torch.cat([p.grad.flatten() for p in module.critic.parameters()]))


@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_without_gae_clipping_ratio_and_whitening_equals_vanilla_pg(critic):
    ppo_options = dict(gae_lambda=1.0, clip_range=None, clip_range_vf=None, importance_ratio=False, whiten=False)
    gradients = []
    for algorithm, options in ((lit_rlhf.VanillaPG, {}), (lit_rlhf.PPO, ppo_options)):
        module = make_module(algorithm, (sequence_reward, token_reward), num_samples=2, critic="head", **options)
        if critic == "model":
            module.critic = make_critic(module, 0.5)
        else:
            torch.nn.init.constant_(module.critic.weight, 0.5)
        gradients.append(step_gradient(module, [ALL[4], ALL[1]]))
    assert_same(*gradients)


@pytest.mark.parametrize("clip_range", [None, 0.2])
def test_ppo_ratio_is_one_in_the_first_update_and_does_not_change_the_gradient(clip_range):
    gradients = []
    for ratio in (False, True):
        module = make_module(lit_rlhf.PPO, num_samples=2, critic="head", importance_ratio=ratio, clip_range=clip_range)
        module.critic = make_critic(module, 0.5)
        logged = {}
        module.log_dict = lambda metrics, logged=logged, **kwargs: logged.update(metrics)
        gradients.append(step_gradient(module, [ALL[4], ALL[1]]))
    assert_same(*gradients)
    assert logged["train/ratio"] == 1 and logged["train/clip_fraction"] == 0


def plain_values(module, completion) -> torch.Tensor:
    """Return the critic's value before each token, by one plain forward pass."""
    is_head = isinstance(module.critic, torch.nn.Linear)
    trunk = (module.policy.causal_lm if is_head else module.critic.model).base_model
    hidden = trunk(torch.tensor([[*PROMPT, *completion]])).last_hidden_state[0]
    return (module.critic if is_head else module.critic.model.score)(hidden[len(PROMPT) - 1 : -1]).squeeze(-1)


def ppo_gradient(module, group, sampled_logprobs, old, rewards) -> tuple[torch.Tensor, int]:
    """Return PPO's gradient, token by token from the papers' formulas, and the number of clipped values.

    Args:
        module: The algorithm, with the weights of the update.
        group: Token ids of the completions.
        sampled_logprobs: Log-probabilities that the sampler reported.
        old: Log-probabilities and values before the first update.
        rewards: Sequence reward of each completion.
    """
    rows, clipped = [], 0
    for y, sampled, (_, values), reward in zip(group, sampled_logprobs, old, rewards, strict=True):
        token_rewards = -BETA * (sampled - plain_logprobs(module.initial, PROMPT, y).detach())
        token_rewards[-1] += reward
        advantages, gae = [], 0.0
        for t in reversed(range(len(y))):
            delta = token_rewards[t] + (values[t + 1] if t + 1 < len(y) else 0.0) - values[t]
            gae = delta + module.gae_lambda * gae
            advantages.insert(0, gae)
        rows.append((torch.stack(advantages), values))
    all_advantages = torch.cat([advantages for advantages, _ in rows])
    mean, variance = (all_advantages.mean(), all_advantages.var(correction=0) + 1e-8) if module.whiten else (0.0, 1.0)
    total = 0.0
    for y, (advantages, values), (old_logprobs, _) in zip(group, rows, old, strict=True):
        ratio = (plain_logprobs(module.policy.causal_lm, PROMPT, y) - old_logprobs).exp()
        normalized, new_values = (advantages - mean) / variance**0.5, plain_values(module, y)
        total -= torch.minimum(
            ratio * normalized, ratio.clamp(1 - module.clip_range, 1 + module.clip_range) * normalized
        ).sum()
        error = (new_values - advantages - values) ** 2
        if module.clip_range_vf is not None:
            clipped_values = values + (new_values - values).clamp(-module.clip_range_vf, module.clip_range_vf)
            clipped += int((clipped_values != new_values).sum())
            error = torch.maximum(error, (clipped_values - advantages - values) ** 2)
        total += module.vf_coef * error.sum() / 2
    module.zero_grad()
    (total / len(group)).backward()
    return flat_gradient(module), clipped


@pytest.mark.parametrize(
    "options",
    [{"gae_lambda": 0.5}, {"gae_lambda": 1.0, "whiten": True}, {"gae_lambda": 0.0, "clip_range_vf": 0.05}],
    ids=["lambda 0.5", "whitened", "clipped values"],
)
@pytest.mark.parametrize("critic", ["model", "head"])
def test_ppo_matches_its_formulas_in_the_first_update_and_the_next(critic, options):
    """A mismatch of the sampler's log-probabilities changes the KL in the rewards, but not the ratio."""
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
        module.critic = make_critic(module, 0.5)
    else:
        torch.nn.init.normal_(module.critic.weight, std=0.5)
    group, prompts = [ALL[4], ALL[1], ALL[5], ALL[0]], make_prompts(PROMPT)
    completions = make_completions(module.policy, prompts, [group])
    noise = torch.linspace(-0.3, 0.3, completions.logprobs.numel(), dtype=torch.float64).view_as(completions.logprobs)
    completions = completions.replace(logprobs=completions.logprobs + noise)
    sampled_logprobs = [completions.logprobs[0, i, : len(y)] for i, y in enumerate(group)]
    module.sample, logged = lambda prompts: completions, {}
    module.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    with torch.no_grad():
        old = [(plain_logprobs(module.policy.causal_lm, PROMPT, y), plain_values(module, y)) for y in group]
    for step in range(2):
        module.zero_grad()
        module.training_step(prompts, step).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        actual = flat_gradient(module)
        expected, clipped = ppo_gradient(module, group, sampled_logprobs, old, [SEQUENCE_REWARDS[y] for y in group])
        assert_same(actual, expected)
        assert (clipped > 0) == (step == 1 and module.clip_range_vf is not None)
        assert (logged["train/clip_fraction"] > 0) == (step == 1)
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)


def best_of_two_gradient(module, rewards: torch.Tensor) -> torch.Tensor:
    """Return the expected gradient of the log-likelihood of the better of two, with the choice held fixed."""
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
def test_raft_gradient_is_that_of_the_best_completion_of_each_group(rewards):
    module = make_module(lit_rlhf.RAFT, rewards, num_samples=2)
    assert_same(expected_gradient(module), best_of_two_gradient(module, total_rewards(rewards)))


def test_values_have_the_precision_of_the_head_under_autocast():
    head, features = torch.nn.Linear(64, 1, bias=False), torch.randn(1, 2, 3, 64).bfloat16()
    tokens = torch.ones(1, 2, 3, dtype=torch.long)
    completions = Demonstrations(make_prompts([5]), tokens, tokens.bool())
    expected = head(features.float()).squeeze(-1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(value_head(head, features, completions), expected)
