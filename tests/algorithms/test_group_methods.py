"""GRPO and the methods after it against their published losses, written token by token (see `enumeration`)."""

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
COUNT = sum(map(len, GROUP))
Z_SCORE = ("GRPO", "DAPO", "GSPO", "CISPO")
NAMES = [*Z_SCORE, "DrGRPO", "ReinforcePlusPlus", "ReinforcePlusPlusBaseline"]
KL = {"GRPO": "k3", "DrGRPO": "k3", "DAPO": "k3", "GSPO": "k3", "CISPO": "k3", "ReinforcePlusPlusBaseline": "k2"}
CLIP = {"DAPO": (0.8, 1.28), "GSPO": (0.3, 1.45), "CISPO": (-torch.inf, 1.1)}
"""Bounds of the ratio here; 0.8 and 1.2 for the others."""
CLIP_OPTIONS = {"GSPO": dict(clip_range=0.7, clip_range_high=0.45), "CISPO": dict(clip_range_high=0.1)}


def whitened(values: list[float]) -> list[float]:
    return [(v - statistics.mean(values)) / (statistics.pvariance(values) + 1e-8) ** 0.5 for v in values]


def advantages(name: str, old, reference) -> list[list[float]]:
    """Return the advantage of each token of each completion."""
    rewards = [SEQUENCE_REWARDS[y] for y in GROUP]
    centered = [r - statistics.mean(rewards) for r in rewards]
    if name == "ReinforcePlusPlus":
        kl = [(before - ref).tolist() for before, ref in zip(old, reference, strict=True)]
        to_go = [[r - BETA * sum(row[t:]) for t in range(len(row))] for r, row in zip(rewards, kl, strict=True)]
        normalized = iter(whitened([value for row in to_go for value in row]))
        return [[next(normalized) for _ in row] for row in to_go]
    if name in Z_SCORE:
        centered = [c / (statistics.stdev(rewards) + 1e-4) for c in centered]
    if name == "ReinforcePlusPlusBaseline":
        centered = whitened(centered)
    return [[c] * len(y) for c, y in zip(centered, GROUP, strict=True)]


def token_loss(name: str, logprob, log_ratio, advantage: float):
    """Return the policy loss of a token."""
    low, high = CLIP.get(name, (0.8, 1.2))
    ratio = log_ratio.exp()
    if name == "CISPO":
        return -ratio.clamp(low, high).detach() * advantage * logprob
    return -torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)


def token_weight(name: str, length: int) -> float:
    """Return the weight of a token in the loss of the group."""
    if name in ("DAPO", "CISPO"):
        return 1 / COUNT
    return 1 / (len(GROUP) * (LENGTH if name == "DrGRPO" else length))


def expected_group_gradient(module, kl_coef: float, old, given) -> torch.Tensor:
    """Return the gradient of the published loss, with a loop over completions and tokens."""
    name, total = type(module).__name__, 0.0
    for y, of_tokens, before in zip(GROUP, given, old, strict=True):
        now, reference = plain_logprobs(module.policy.causal_lm, PROMPT, y), plain_logprobs(module.initial, PROMPT, y)
        reference = reference.detach()
        for t in range(len(y)):
            log_ratio = (now - before).mean() if name == "GSPO" else now[t] - before[t]
            loss = token_loss(name, now[t], log_ratio, of_tokens[t])
            if KL.get(name) == "k3":
                loss = loss + kl_coef * ((reference[t] - now[t]).exp() - 1 - (reference[t] - now[t]))
            if KL.get(name) == "k2":
                loss = loss + kl_coef * (now - reference).sum() ** 2 / 2 / len(y)
            total = total + loss * token_weight(name, len(y))
    module.zero_grad()
    total.backward()
    return flat_gradient(module)


@pytest.mark.parametrize("kl_coef", [0.0, BETA])
@pytest.mark.parametrize("name", NAMES)
def test_gradient_matches_the_published_loss_in_the_first_update_and_the_next(name, kl_coef):
    options = dict(num_samples=4, kl_coef=kl_coef, update_epochs=2, **CLIP_OPTIONS.get(name, {}))
    module = make_module(getattr(lit_rlhf, name), **options)
    prompts, logged = make_prompts(PROMPT), {}
    completions = make_completions(module.policy, prompts, [GROUP])
    module.sample = lambda prompts: completions
    module.log_dict = lambda metrics, **kwargs: logged.update(metrics)
    models = module.policy.causal_lm, module.initial
    old, reference = ([plain_logprobs(model, PROMPT, y).detach() for y in GROUP] for model in models)
    if kl_coef == 0:
        reference = old
    expected = advantages(name, old, reference)
    for step in range(2):
        module.zero_grad()
        module.training_step(prompts, step).backward()
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        actual, computed = flat_gradient(module), module.rollout.advantages[0]
        rows = zip(computed, GROUP, strict=True)
        exact = [row[: len(y)] if computed.ndim == 2 else row.expand(len(y)) for row, y in rows]
        for row, values in zip(exact, expected, strict=True):
            assert row.tolist() == pytest.approx(values, rel=1e-6)  # float32, as rewards are
        assert_same(actual, expected_group_gradient(module, kl_coef, old, exact))
        assert (logged["train/clip_fraction"] > 0) == (step == 1)
        torch.manual_seed(step)
        for parameter in module.parameters():
            parameter.data += (0.1 if name == "GSPO" else 0.2) * torch.randn_like(parameter)


def test_bounds_of_the_ratio_are_those_of_the_papers():
    published = {"GRPO": (0.2, None), "DAPO": (0.2, 0.28), "GSPO": (3e-4, 4e-4), "CISPO": (None, 4.0)}
    for name, bounds in published.items():
        module = make_module(getattr(lit_rlhf, name), num_samples=2)
        assert (module.clip_range, module.clip_range_high) == bounds


def test_token_level_rewards_are_summed():
    options = dict(num_samples=4, kl_coef=0.0)
    token_level = make_module(lit_rlhf.GRPO, (token_reward,), **options)

    def summed(completion_ids, **kwargs):
        return [sum(row) for row in token_reward(completion_ids)]

    assert_same(
        step_gradient(token_level, GROUP), step_gradient(make_module(lit_rlhf.GRPO, (summed,), **options), GROUP)
    )


# The table of equivalences in lit_rlhf/algorithms/README.md, one line each

PLAIN = dict(advantage_std="none", reduction="sums", kl_penalty="k1_reward")
ONE_LENGTH = [ALL[3], ALL[4], ALL[1], ALL[6]]


def gradients(group, *configurations, rewards=(sequence_reward,), kl_coef=BETA):
    return [
        step_gradient(make_module(method, rewards, num_samples=len(group), kl_coef=kl_coef, **options), group)
        for method, options in configurations
    ]


def test_grpo_without_std_by_sums_is_rloo_times_k_minus_1_over_k():
    grpo, rloo = gradients(GROUP, (lit_rlhf.GRPO, PLAIN), (lit_rlhf.RLOO, {}))
    assert_same(grpo * 4 / 3, rloo)


def test_dr_grpo_is_rloo_times_k_minus_1_over_k_over_the_maximum_length():
    dr_grpo, rloo = gradients(GROUP, (lit_rlhf.DrGRPO, {}), (lit_rlhf.RLOO, {}), kl_coef=0.0)
    assert_same(dr_grpo * LENGTH * 4 / 3, rloo)


def test_dr_grpo_is_grpo_with_two_options():
    options = dict(advantage_std="none", reduction="constant_length")
    assert_same(*gradients(GROUP, (lit_rlhf.DrGRPO, {}), (lit_rlhf.GRPO, options)))


def test_reinforce_plus_plus_with_a_baseline_is_grpo_with_two_options():
    options = dict(advantage_std="batch", kl_penalty="k2_loss")
    assert_same(*gradients(GROUP, (lit_rlhf.ReinforcePlusPlusBaseline, {}), (lit_rlhf.GRPO, options)))


def test_gspo_is_grpo_without_kl_in_the_first_update():
    assert_same(*gradients(GROUP, (lit_rlhf.GSPO, {}), (lit_rlhf.GRPO, {}), kl_coef=0.0))


def test_cispo_is_dapo_in_the_first_update():
    assert_same(*gradients(GROUP, (lit_rlhf.CISPO, {}), (lit_rlhf.DAPO, {}), kl_coef=0.0))


def test_dapo_is_grpo_with_two_options():
    options = dict(clip_range_high=0.28, reduction="tokens")
    assert_same(*gradients(GROUP, (lit_rlhf.DAPO, {}), (lit_rlhf.GRPO, options), kl_coef=0.0))


def test_opo_of_completions_of_one_length_is_rloo_times_k_minus_1_over_k():
    opo, rloo, unequal = (
        *gradients(ONE_LENGTH, (lit_rlhf.OPO, {}), (lit_rlhf.RLOO, {})),
        *gradients(GROUP, (lit_rlhf.OPO, {})),
    )
    assert_same(opo * 4 / 3, rloo)
    assert not torch.allclose(unequal * 4 / 3, gradients(GROUP, (lit_rlhf.RLOO, {}))[0])


def test_the_batch_mean_of_one_prompt_is_rloo_times_k_minus_1_over_k():
    batch_mean, rloo = gradients(GROUP, (lit_rlhf.ReinforceBatchMean, {}), (lit_rlhf.RLOO, {}))
    assert_same(batch_mean * 4 / 3, rloo)


@pytest.mark.parametrize("name", [*NAMES, "OPO", "ReinforceBatchMean"])
def test_group_with_equal_rewards_has_zero_gradient(name):
    def constant(completion_ids, **kwargs):
        return [0.7] * len(completion_ids)

    module = make_module(getattr(lit_rlhf, name), (constant,), num_samples=4, kl_coef=0.0)
    assert not step_gradient(module, GROUP).any()


@pytest.mark.parametrize("reduction", ["sums", "completions", "tokens", "constant_length"])
def test_every_reduction_weighs_the_kl_as_it_weighs_the_policy_loss(reduction):
    """With equal rewards the loss is the KL alone, here of one completion, which shows its weight."""
    weights = {"sums": 1 / 4, "constant_length": 1 / (4 * LENGTH), "tokens": 1 / COUNT}
    module = make_module(lit_rlhf.GRPO, num_samples=4, reduction=reduction)
    actual = step_gradient(module, GROUP)
    module.kl_coef = 0.0
    kl_gradient, total = (actual - step_gradient(module, GROUP)), 0.0
    for y in GROUP:
        log_ratio = plain_logprobs(module.initial, PROMPT, y).detach() - plain_logprobs(
            module.policy.causal_lm, PROMPT, y
        )
        total = total + BETA * (log_ratio.exp() - 1 - log_ratio).sum() * weights.get(reduction, 1 / (4 * len(y)))
    module.zero_grad()
    total.backward()
    torch.testing.assert_close(kl_gradient, flat_gradient(module), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_samples": 1}, "num_samples=1"),
        ({"clip_range": 0.0}, "clip_range=0.0"),
        ({"clip_range": 20.0}, "clip_range=20.0 is no lower bound"),
        ({"clip_range_high": -1.0}, "clip_range_high=-1.0"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        lit_rlhf.GRPO("testbed", rewards=[sequence_reward], **options)
