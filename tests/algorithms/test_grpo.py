"""GRPO and Dr. GRPO against their formulas, written token by token (see `enumeration`)."""

import statistics

import pytest
import torch

import lit_rlhf
from enumerable import make_completions, make_prompts, plain_logprobs
from enumeration import (
    ALL,
    BETA,
    LENGTH,
    PROMPT,
    SEQUENCE_REWARDS,
    assert_same,
    flat_gradient,
    make_module,
    sequence_reward,
    step_gradient,
    token_reward,
)

GROUP = [ALL[4], ALL[1], ALL[5], ALL[0]]


def advantages(name: str, returns: list[float]) -> list[float]:
    mean = statistics.mean(returns)
    scale = statistics.stdev(returns) + 1e-4 if name == "GRPO" else 1.0
    return [(value - mean) / scale for value in returns]


def expected_group_gradient(module, old) -> torch.Tensor:
    """Return the gradient of the published loss of GRPO or Dr. GRPO, with a loop over completions and tokens."""
    name, total = type(module).__name__, 0.0
    for y, advantage, before in zip(GROUP, module.rollout.advantages[0].tolist(), old, strict=True):
        now, reference = plain_logprobs(module.policy.causal_lm, PROMPT, y), plain_logprobs(module.initial, PROMPT, y)
        for t in range(len(y)):
            ratio = (now[t] - before[t]).exp()
            clipped = ratio.clamp(1 - module.clip_range, 1 + module.clip_range)
            log_ratio = (reference[t] - now[t]) if module.kl_coef else torch.zeros(())
            k3 = log_ratio.exp() - 1 - log_ratio
            loss = -torch.minimum(ratio * advantage, clipped * advantage) + module.kl_coef * k3
            total = total + loss / (len(y) if name == "GRPO" else LENGTH)
    module.zero_grad()
    (total / len(GROUP)).backward()
    return flat_gradient(module)


@pytest.mark.parametrize("kl_coef", [0.0, BETA])
@pytest.mark.parametrize("name", ["GRPO", "DrGRPO"])
def test_gradient_matches_the_published_loss_in_the_first_update_and_the_next(name, kl_coef):
    module = make_module(getattr(lit_rlhf, name), num_samples=4, kl_coef=kl_coef, update_epochs=2)
    prompts, logged = make_prompts(PROMPT), {}
    completions = make_completions(module.policy, prompts, [GROUP])
    module.sample = lambda prompts: completions
    module.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    old = [plain_logprobs(module.policy.causal_lm, PROMPT, y).detach() for y in GROUP]
    for step in range(2):
        module.zero_grad()
        module.training_step(prompts, step).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        actual = flat_gradient(module)
        expected = advantages(name, [SEQUENCE_REWARDS[y] for y in GROUP])
        assert module.rollout.advantages[0].tolist() == pytest.approx(expected, rel=1e-6)  # float32, as rewards are
        assert_same(actual, expected_group_gradient(module, old))
        assert (logged["train/clip_fraction"] > 0) == (step == 1)
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)


def test_token_level_rewards_are_summed():
    options = dict(num_samples=4, kl_coef=0.0)
    token_level = make_module(lit_rlhf.GRPO, (token_reward,), **options)

    def summed(completion_ids, **kwargs):
        return [sum(row) for row in token_reward(completion_ids)]

    assert_same(
        step_gradient(token_level, GROUP), step_gradient(make_module(lit_rlhf.GRPO, (summed,), **options), GROUP)
    )


def test_dr_grpo_gradient_is_proportional_to_that_of_rloo():
    """With one update per rollout, the factor is `(k - 1) / k`, of the baseline, over the constant maximum length."""
    options = dict(num_samples=4, kl_coef=0.0)
    rloo = step_gradient(make_module(lit_rlhf.RLOO, (sequence_reward,), **options), GROUP)
    dr_grpo = step_gradient(make_module(lit_rlhf.DrGRPO, (sequence_reward,), **options), GROUP)
    assert_same(dr_grpo * LENGTH * 4 / 3, rloo)


@pytest.mark.parametrize("name", ["GRPO", "DrGRPO"])
def test_group_with_equal_rewards_has_zero_gradient(name):
    def constant(completion_ids, **kwargs):
        return [0.7] * len(completion_ids)

    module = make_module(getattr(lit_rlhf, name), (constant,), num_samples=4, kl_coef=0.0)
    assert not step_gradient(module, GROUP).any()


@pytest.mark.parametrize("options", [{"num_samples": 1}, {"clip_range": 0.0}], ids=str)
def test_options_out_of_range_are_refused(options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}={value}"):
        lit_rlhf.GRPO("testbed", rewards=[sequence_reward], **options)
