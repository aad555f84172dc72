"""Unbiased, by enumeration (see `enumeration`): what the real collect, advantages, loss and step make of all groups."""

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
    DELAYED,
    LENGTH,
    PROMPT,
    REWARDS,
    VOCABULARY,
    assert_same,
    delayed,
    expected_gradient,
    finished_only,
    flat_gradient,
    immediate,
    make_module,
    sequence_logprobs,
    step_gradient,
    totals,
    true_gradient,
)
from lit_rlhf import functional as F
from lit_rlhf.testbed.tokenizer import vocabulary
from lit_rlhf.types import Rollout
from runs import make_trainer


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_rloo_of_two_is_unbiased(rewards):
    module = make_module(rewards=rewards, num_samples=2)
    assert_same(expected_gradient(module), true_gradient(module, totals(rewards)))


WORDS = {0: "<eos>", 1: "golden", 2: "but"}
"""What the enumerable policy says, behind `The breakfast was`."""


def in_words(completion_ids):
    return [["The", "breakfast", "was", *(WORDS[i] for i in ids)] for ids in completion_ids]


def grammar_signal(completion_ids, **kwargs):
    rows = [[vocabulary().index(word) for word in words] for words in in_words(completion_ids)]
    return [verdicts[3:] for verdicts in lit_rlhf.testbed.Grammatical()(completion_ids=rows)]


grammar_signal.token_level = True


def coherence_signal(completion_ids, **kwargs):
    texts = [" ".join(word for word in words if word != "<eos>") for words in in_words(completion_ids)]
    prompt = "A kind critic on the breakfast of the new hotel, in one sentence:"
    return lit_rlhf.testbed.coherence(prompts=[prompt] * len(texts), completions=texts)


def test_grammar_by_the_token_and_coherence_at_the_end_are_unbiased_together():
    """The signals of `configs/shaping.yaml`, with its weights."""
    grammar = lit_rlhf.Weighted(grammar_signal, weight=0.5, final_weight=0.1, updates=60)
    module = make_module(rewards=(grammar, coherence_signal), num_samples=2)
    verdicts = torch.tensor([sum(row) for row in grammar_signal(ALL)], dtype=torch.float64)
    coherent = torch.tensor(coherence_signal(ALL), dtype=torch.float64)
    assert len(verdicts.unique()) > 1 and len(coherent.unique()) > 1
    assert_same(expected_gradient(module), true_gradient(module, 0.5 * verdicts + coherent))


@pytest.mark.slow
def test_rloo_of_three_is_unbiased():
    module = make_module(rewards=(delayed, immediate), num_samples=3)
    assert_same(expected_gradient(module), true_gradient(module, totals((delayed, immediate))))


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
@pytest.mark.parametrize("baseline", ["none", "mean", "exponential"])
def test_reinforce_is_unbiased(baseline, rewards):
    module = make_module(lit_rlhf.Reinforce, rewards, num_samples=1, baseline=baseline)
    for earlier in (ALL[3:4], ALL[5:6]):
        step_gradient(module, earlier)
    assert (module.baseline_average.value != 0) == (baseline != "none")
    assert_same(expected_gradient(module), true_gradient(module, totals(rewards)))


def test_slices_along_the_samples_are_unbiased_together():
    """One update of two steps: each step's gradient is of half a group, its advantages are of the whole."""
    module = make_module(num_samples=2, sample_minibatches=2)
    module._trainer.accumulate_grad_batches = 2

    def two_steps(group):
        prompts = make_prompts(PROMPT)
        module.sample = lambda prompts: make_completions(module.policy, prompts, [list(group)])
        module.zero_grad()
        for batch_idx in range(2):
            (module.training_step(prompts, batch_idx) / 2).backward()  # the Trainer divides by the accumulation
        module.on_before_optimizer_step(torch.optim.SGD(module.parameters()))
        return flat_gradient(module)

    whole = make_module(num_samples=2)
    for group in itertools.product(ALL[::2], repeat=2):
        torch.testing.assert_close(two_steps(group), step_gradient(whole, group), atol=1e-12, rtol=0)


@pytest.mark.filterwarnings("ignore:no completion of this update counts", "ignore:a prompt without a reward")
@pytest.mark.parametrize(
    "options", [{"mask_truncated_completions": True}, {"rewards": (finished_only,)}], ids=["left out", "no opinion"]
)
def test_what_is_left_out_leaves_the_gradient_of_the_rest(options):
    """Where two completions count, RLOO estimates the gradient of their expected return given that they count."""
    module = make_module(num_samples=2, **options)
    estimate = expected_gradient(module)
    logprobs = sequence_logprobs(module.policy.causal_lm)
    with torch.no_grad():
        log_ratio = logprobs - sequence_logprobs(module.initial)
    counts = torch.tensor([y[-1] == EOS for y in ALL])
    returns = (totals((delayed,)) - BETA * log_ratio)[counts]
    probabilities = logprobs.exp()[counts]
    share = probabilities.sum()
    module.zero_grad()
    (returns * probabilities / share).sum().backward()
    assert_same(estimate / share.detach() ** 2, flat_gradient(module))


@pytest.mark.parametrize("rewards", REWARDS.values(), ids=REWARDS)
def test_a_group_with_a_completion_left_out_is_the_group_without_it(rewards):
    three = make_module(rewards=rewards, num_samples=3, mask_truncated_completions=True)
    two = make_module(rewards=rewards, num_samples=2)
    ended, cut = ([y for y in ALL if (y[-1] == EOS) == end] for end in (True, False))
    for first, second in itertools.permutations(ended, 2):
        group = [first, second]
        group.insert(len(first), cut[1])
        assert_same(step_gradient(three, group), step_gradient(two, [first, second]))


def test_a_penalty_for_truncated_completions_is_a_reward():
    module = make_module(num_samples=2, missing_eos_penalty=0.75)
    penalty = torch.tensor([0.75 * (y[-1] != EOS) for y in ALL], dtype=torch.float64)
    assert_same(expected_gradient(module), true_gradient(module, totals((delayed,)) - penalty))


# The enumeration can tell a biased estimator


class Centred(lit_rlhf.RLOO):
    def advantages(self, rollout):
        return rollout.returns - rollout.returns.mean(1, keepdim=True)


class Scaled(lit_rlhf.RLOO):
    def advantages(self, rollout):
        return super().advantages(rollout) / (rollout.returns.std(1, keepdim=True) + 1e-8)


class AliveSiblings(lit_rlhf.RLOO):
    """Compares a token with the siblings that are as long, and not at all where there are none."""

    def advantages(self, rollout):
        mask = rollout.completions.mask
        to_go = F.reward_to_go(rollout.token_rewards, mask)
        by_token = [F.rloo_advantages(to_go[..., t], mask[..., t]) for t in range(mask.shape[-1])]
        return F.rloo_advantages(rollout.returns).unsqueeze(-1) + torch.stack(by_token, -1)


def test_a_baseline_that_includes_the_sample_scales_the_gradient():
    module = make_module(Centred, num_samples=2)
    assert_same(expected_gradient(module), true_gradient(module, totals((delayed,))) * (1 - 1 / 2))


def test_dividing_by_the_standard_deviation_changes_the_direction():
    module = make_module(Scaled, num_samples=2)
    estimate, truth = expected_gradient(module), true_gradient(module, totals((delayed,)))
    assert torch.cosine_similarity(estimate, truth, dim=0) < 0.999


def test_averaging_over_siblings_that_are_still_alive_is_biased():
    module = make_module(AliveSiblings, (immediate,), num_samples=2)
    assert (expected_gradient(module) - true_gradient(module, totals((immediate,)))).abs().max() > 1e-3


# Variance, exactly, with the real advantages


def total_variance(module, level: float) -> torch.Tensor:
    """Variance of the gradient estimate of one prompt, summed over the weights, at four samples of it.

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
    rewards = (totals((delayed,)) / 16 + level)[groups]
    blank = torch.zeros(*groups.shape, 1, dtype=torch.float64)
    mask = torch.ones(*groups.shape, 1, dtype=torch.bool)
    completions = lit_rlhf.types.Completions(blank.long(), mask, blank, mask[..., 0])
    prompts = make_prompts(*[PROMPT] * len(groups))
    rollout = Rollout(prompts, completions, blank, rewards, {}, mask[..., 0], returns=rewards)
    estimates = (module.advantages(rollout).unsqueeze(-1) * scores[groups]).mean(1)
    weights = logprobs.detach()[groups].sum(1).exp().unsqueeze(-1)
    mean = (weights * estimates).sum(0)
    return (weights * (estimates - mean) ** 2).sum() / (4 / k)


def variance_of_rloo(k: int, levels: list[float]) -> float:
    return sum(float(total_variance(make_module(num_samples=k), level)) for level in levels)


def variance_of_converged_moving_average(levels: list[float]) -> float:
    result = 0.0
    for level in levels:
        module = make_module(lit_rlhf.Reinforce, num_samples=1)
        probabilities = sequence_logprobs(module.policy.causal_lm).exp().detach()
        total = float((probabilities * totals((delayed,)) / 16).sum()) + sum(levels) / len(levels)
        vars(module.baseline_average).update(total=total, weight=1.0)
        result += float(total_variance(module, level))
    return result


@pytest.mark.parametrize("levels", [[0.0], [0.0, 10.0]])
def test_four_samples_in_one_group_vary_less_than_in_two(levels):
    assert variance_of_rloo(4, levels) < variance_of_rloo(2, levels)


def test_rloo_varies_less_than_a_moving_average_where_prompts_differ_in_level():
    assert variance_of_rloo(4, [-2.0, 2.0]) < variance_of_converged_moving_average([-2.0, 2.0])


def test_a_moving_average_varies_less_than_rloo_where_prompts_are_alike():
    assert variance_of_converged_moving_average([4.0, 4.01]) < variance_of_rloo(4, [4.0, 4.01])


# The Trainer


@pytest.mark.filterwarnings("ignore:You defined a `validation_step` but")
@pytest.mark.parametrize("name", ["RLOO", "Reinforce"])
def test_an_update_of_a_real_trainer_is_the_rate_times_the_gradient(name, tmp_path):
    prompts = make_prompts([1, 2, 1], [2], [1, 1])
    rate, k = 0.5, 4
    policy = make_policy(VOCABULARY)
    module = getattr(lit_rlhf, name)(
        policy,
        rewards=[delayed],
        num_samples=k,
        sampling=lit_rlhf.Sampling(max_new_tokens=LENGTH),
        kl_coef=BETA,
        optimizer=lambda params: torch.optim.SGD(params, lr=rate),
    )
    before = copy.deepcopy(policy.causal_lm)
    make_trainer(tmp_path, max_steps=1).fit(module, DataLoader([prompts], batch_size=None))
    completions = module.rollout.completions
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(3):
        drawn = [tuple(completions.tokens[i, j][completions.mask[i, j]].tolist()) for j in range(k)]
        rewards = torch.tensor([DELAYED[y] for y in drawn], dtype=torch.float64)
        advantages = F.rloo_advantages(rewards.unsqueeze(0))[0] if name == "RLOO" else rewards
        prompt = prompts.tokens[i][prompts.mask[i]].tolist()
        logprobs = torch.stack([plain_logprobs(before, prompt, y).sum() for y in drawn])
        loss = loss - (advantages * logprobs).sum() / (3 * k)
    loss.backward()
    for old, new in zip(before.parameters(), policy.causal_lm.parameters(), strict=True):
        torch.testing.assert_close(new.detach(), (old - rate * old.grad).detach(), atol=1e-9, rtol=0)
    assert any((p.grad != 0).any() for p in before.parameters())
