"""Unbiasedness by enumeration (see `enumeration`): the real training step, averaged over all possible groups."""

import copy
import itertools

import pytest
import torch
from torch.utils.data import DataLoader

import lit_rlhf
from enumerable import EOS, make_completions, make_policy, make_prompts, plain_logprobs
from enumeration import (
    ALL,
    BETA,
    LENGTH,
    PROMPT,
    REWARDS,
    SEQUENCE_REWARDS,
    VOCABULARY,
    assert_same,
    expected_gradient,
    flat_gradient,
    make_module,
    reward_if_finished,
    sequence_logprobs,
    sequence_reward,
    step_gradient,
    token_reward,
    total_rewards,
    true_gradient,
)
from lit_rlhf import functional as F
from lit_rlhf.testbed.tokenizer import vocabulary
from lit_rlhf.types import Rollout
from runs import make_trainer


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_rloo_is_unbiased(rewards):
    module = make_module(rewards=rewards, num_samples=2)
    assert_same(expected_gradient(module), true_gradient(module, total_rewards(rewards)))


WORDS = {0: "<eos>", 1: "golden", 2: "but"}
"""Words for the tokens of the enumerable policy, which continue `The breakfast was`."""


def to_words(completion_ids):
    return [["The", "breakfast", "was", *(WORDS[i] for i in ids)] for ids in completion_ids]


def grammar_reward(completion_ids, **kwargs):
    rows = [[vocabulary().index(word) for word in words] for words in to_words(completion_ids)]
    return [grammatical[3:] for grammatical in lit_rlhf.testbed.Grammatical()(completion_ids=rows)]


grammar_reward.token_level = True


def coherence_reward(completion_ids, **kwargs):
    texts = [" ".join(word for word in words if word != "<eos>") for words in to_words(completion_ids)]
    prompt = "A kind critic on the breakfast of the new hotel, in one sentence:"
    return lit_rlhf.testbed.coherence(prompts=[prompt] * len(texts), completions=texts)


def test_rloo_is_unbiased_for_token_level_grammar_and_sequence_level_coherence():
    """The rewards of `configs/shaping.yaml`, with its weights."""
    grammar = lit_rlhf.Weighted(grammar_reward, weight=0.5, final_weight=0.1, updates=60)
    module = make_module(rewards=(grammar, coherence_reward), num_samples=2)
    grammatical = torch.tensor([sum(row) for row in grammar_reward(ALL)], dtype=torch.float64)
    coherence = torch.tensor(coherence_reward(ALL), dtype=torch.float64)
    assert len(grammatical.unique()) > 1 and len(coherence.unique()) > 1
    assert_same(expected_gradient(module), true_gradient(module, 0.5 * grammatical + coherence))


@pytest.mark.slow
def test_rloo_with_three_samples_is_unbiased():
    module = make_module(rewards=(sequence_reward, token_reward), num_samples=3)
    assert_same(expected_gradient(module), true_gradient(module, total_rewards((sequence_reward, token_reward))))


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("baseline", ["none", "mean", "exponential"])
def test_reinforce_is_unbiased(baseline, rewards):
    module = make_module(lit_rlhf.Reinforce, rewards, num_samples=1, baseline=baseline)
    for earlier in (ALL[3:4], ALL[5:6]):
        step_gradient(module, earlier)
    assert (module.baseline_average.value != 0) == (baseline != "none")
    assert_same(expected_gradient(module), true_gradient(module, total_rewards(rewards)))


def test_sample_minibatches_do_not_change_the_gradient():
    """One update of two steps: each is computed on half of a group, with the advantages of the full group."""
    module = make_module(num_samples=2, sample_minibatches=2)
    module._trainer.accumulate_grad_batches = 2

    def two_steps(group):
        prompts = make_prompts(PROMPT)
        module.sample = lambda prompts: make_completions(module.policy, prompts, [list(group)])
        module.zero_grad()
        for batch_idx in range(2):
            (module.training_step(prompts, batch_idx) / 2).backward()  # as the Trainer does for accumulation
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        return flat_gradient(module)

    one_step = make_module(num_samples=2)
    for group in itertools.product(ALL[::2], repeat=2):
        torch.testing.assert_close(two_steps(group), step_gradient(one_step, group), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:no completion of this update counts", "ignore:a prompt without a reward")
@pytest.mark.parametrize(
    "options", [{"mask_truncated_completions": True}, {"rewards": (reward_if_finished,)}], ids=["masked", "no reward"]
)
def test_rloo_with_invalid_completions_is_unbiased_for_the_valid_ones(options):
    """With two valid completions, RLOO estimates the gradient of the expected return given validity."""
    module = make_module(num_samples=2, **options)
    estimate = expected_gradient(module)
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        log_ratio = logprobs - sequence_logprobs(module.initial)
    valid = torch.tensor([y[-1] == EOS for y in ALL])
    returns = (total_rewards((sequence_reward,)) - BETA * log_ratio)[valid]
    probabilities = logprobs.exp()[valid]
    valid_probability = probabilities.sum()
    module.zero_grad()
    (returns * probabilities / valid_probability).sum().backward()
    assert_same(estimate / valid_probability.detach() ** 2, flat_gradient(module))


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_masked_truncated_completion_does_not_affect_its_group(rewards):
    three = make_module(rewards=rewards, num_samples=3, mask_truncated_completions=True)
    two = make_module(rewards=rewards, num_samples=2)
    finished, truncated = ([y for y in ALL if (y[-1] == EOS) == end] for end in (True, False))
    for first, second in itertools.permutations(finished, 2):
        group = [first, second]
        group.insert(len(first), truncated[1])
        assert_same(step_gradient(three, group), step_gradient(two, [first, second]))


def test_missing_eos_penalty_acts_as_a_reward():
    module = make_module(num_samples=2, missing_eos_penalty=0.75)
    penalty = torch.tensor([0.75 * (y[-1] != EOS) for y in ALL], dtype=torch.float64)
    assert_same(expected_gradient(module), true_gradient(module, total_rewards((sequence_reward,)) - penalty))


# Biased estimators are detected


class MeanBaseline(lit_rlhf.RLOO):
    def advantages(self, rollout):
        return rollout.returns - rollout.returns.mean(1, keepdim=True)


class DividedByStd(lit_rlhf.RLOO):
    def advantages(self, rollout):
        return super().advantages(rollout) / (rollout.returns.std(1, keepdim=True) + 1e-8)


class LongerSiblings(lit_rlhf.RLOO):
    """Compares each token only with siblings that are at least as long; without any, the advantage is 0."""

    def advantages(self, rollout):
        mask = rollout.completions.mask
        to_go = F.reward_to_go(rollout.token_rewards, mask)
        by_token = [F.rloo_advantages(to_go[..., t], mask[..., t]) for t in range(mask.shape[-1])]
        return F.rloo_advantages(rollout.returns).unsqueeze(-1) + torch.stack(by_token, -1)


def test_baseline_that_includes_the_sample_scales_the_gradient():
    module = make_module(MeanBaseline, num_samples=2)
    assert_same(expected_gradient(module), true_gradient(module, total_rewards((sequence_reward,))) * (1 - 1 / 2))


def test_dividing_by_the_standard_deviation_changes_the_direction():
    module = make_module(DividedByStd, num_samples=2)
    estimate, truth = expected_gradient(module), true_gradient(module, total_rewards((sequence_reward,)))
    assert torch.cosine_similarity(estimate, truth, dim=0) < 0.999


def test_baseline_of_unfinished_siblings_only_is_biased():
    module = make_module(LongerSiblings, (token_reward,), num_samples=2)
    assert (expected_gradient(module) - true_gradient(module, total_rewards((token_reward,)))).abs().max() > 1e-3


# Exact variance


def total_variance(module, level: float) -> torch.Tensor:
    """Return the variance of the gradient estimate from four samples of one prompt, summed over the weights.

    `level` is added to every reward of the prompt.
    """
    k = module.num_samples
    logprobs = sequence_logprobs(module.policy.causal_lm)
    scores = torch.stack(
        [
            torch.cat([g.flatten() for g in torch.autograd.grad(logprob, list(module.parameters()), retain_graph=True)])
            for logprob in logprobs
        ]
    )
    groups = torch.tensor(list(itertools.product(range(len(ALL)), repeat=k)))
    rewards = (total_rewards((sequence_reward,)) / 16 + level)[groups]
    zeros = torch.zeros(*groups.shape, 1, dtype=torch.float64)
    mask = torch.ones(*groups.shape, 1, dtype=torch.bool)
    completions = lit_rlhf.types.Completions(zeros.long(), mask, zeros, mask[..., 0])
    prompts = make_prompts(*[PROMPT] * len(groups))
    rollout = Rollout(prompts, completions, zeros, rewards, {}, mask[..., 0], returns=rewards)
    estimates = (module.advantages(rollout).unsqueeze(-1) * scores[groups]).mean(1)
    probabilities = logprobs.detach()[groups].sum(1).exp().unsqueeze(-1)
    mean = (probabilities * estimates).sum(0)
    return (probabilities * (estimates - mean) ** 2).sum() / (4 / k)


def variance_of_rloo(k: int, levels: list[float]) -> float:
    return sum(float(total_variance(make_module(num_samples=k), level)) for level in levels)


def variance_of_converged_moving_average(levels: list[float]) -> float:
    result = 0.0
    for level in levels:
        module = make_module(lit_rlhf.Reinforce, num_samples=1)
        probabilities = sequence_logprobs(module.policy.causal_lm).exp().detach()
        total = float((probabilities * total_rewards((sequence_reward,)) / 16).sum()) + sum(levels) / len(levels)
        vars(module.baseline_average).update(total=total, weight=1.0)
        result += float(total_variance(module, level))
    return result


@pytest.mark.parametrize("levels", [[0.0], [0.0, 10.0]])
def test_rloo_has_lower_variance_with_one_group_of_4_than_with_two_of_2(levels):
    assert variance_of_rloo(4, levels) < variance_of_rloo(2, levels)


def test_rloo_has_lower_variance_than_a_moving_average_if_prompts_differ_in_mean_reward():
    assert variance_of_rloo(4, [-2.0, 2.0]) < variance_of_converged_moving_average([-2.0, 2.0])


def test_moving_average_has_lower_variance_than_rloo_if_prompts_have_similar_mean_rewards():
    assert variance_of_converged_moving_average([4.0, 4.01]) < variance_of_rloo(4, [4.0, 4.01])


# With a Trainer


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
@pytest.mark.parametrize("name", ["RLOO", "Reinforce"])
def test_update_of_a_trainer_is_the_learning_rate_times_the_gradient(name, tmp_path):
    prompts = make_prompts([1, 2, 1], [2], [1, 1])
    lr, k = 0.5, 4
    policy = make_policy(VOCABULARY)
    module = getattr(lit_rlhf, name)(
        policy,
        rewards=[sequence_reward],
        num_samples=k,
        sampling=lit_rlhf.Sampling(max_new_tokens=LENGTH),
        kl_coef=BETA,
        optimizer=lambda params: torch.optim.SGD(params, lr=lr),
    )
    before = copy.deepcopy(policy.causal_lm)
    make_trainer(tmp_path, max_steps=1).fit(module, DataLoader([prompts], batch_size=None))
    completions = module.rollout.completions
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        sampled = [tuple(completions.tokens[i, j][completions.mask[i, j]].tolist()) for j in range(k)]
        rewards = torch.tensor([SEQUENCE_REWARDS[y] for y in sampled], dtype=torch.float64)
        advantages = F.rloo_advantages(rewards.unsqueeze(0))[0] if name == "RLOO" else rewards
        prompt = prompts.tokens[i][prompts.mask[i]].tolist()
        logprobs = torch.stack([plain_logprobs(before, prompt, y).sum() for y in sampled])
        loss = loss - (advantages * logprobs).sum() / (3 * k)
    loss.backward()
    for old, new in zip(before.parameters(), policy.causal_lm.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), (old - lr * old.grad).detach(), atol=1e-9, rtol=0)
    assert any((p.grad != 0).any() for p in before.parameters())
