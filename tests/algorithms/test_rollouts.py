"""Contents of a rollout: returns, baselines, masks, EOS and precision, in runs with a Trainer."""

import pytest
import torch

import lit_rlhf
from lit_rlhf import functional as F
from lit_rlhf.models.policy import Policy
from recorded_runs import (
    checksum_reward,
    make_batch,
    make_module,
    reward_with_none,
    sgd,
    token_reward,
    train,
)
from runs import grouped, make_data

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")


# Returns and baselines


class WithoutBaseline(lit_rlhf.RLOO):
    """Algorithm of a user that overrides `advantages`."""

    def advantages(self, rollout):
        return rollout.returns


def make_perturbed_module(algorithm, folder, **options):
    """Return an algorithm whose policy differs from its reference."""
    options = {"rewards": [checksum_reward], "optimizer": sgd, **options}
    module = algorithm(str(folder), **grouped({"num_samples": 3, "max_new_tokens": 6, **options}))
    module.configure_model()
    torch.manual_seed(2)
    for parameter in module.policy.parameters():
        parameter.data += 0.02 * torch.randn_like(parameter)
    return module


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_returns_include_the_kl_penalty(temperature, ending, tmp_path):
    """It is summed over the tokens of a completion, including EOS, at the sampling temperature."""
    beta = 0.5
    module = make_perturbed_module(WithoutBaseline, ending, kl_coef=beta, temperature=temperature)
    base = Policy.from_pretrained(ending)
    _, recorder = train("RLOO", ending, tmp_path, module=module)
    (rollout,) = recorder.rollouts
    assert rollout.completions.finished.any() and not rollout.completions.finished.all()
    reference = base.logprobs(rollout.prompts, rollout.completions, temperature).detach()
    expected = rollout.rewards.clone()
    for i, j, t in rollout.completions.mask.nonzero().tolist():
        expected[i, j] -= beta * (rollout.completions.logprobs[i, j, t] - reference[i, j, t])
    assert (expected - rollout.rewards).abs().max() > 0.05
    torch.testing.assert_close(rollout.returns, expected, atol=1e-4, rtol=0)
    assert torch.equal(rollout.advantages, rollout.returns)
    kl = (rollout.rewards - rollout.returns).mean() / beta
    torch.testing.assert_close(recorder.metrics[0]["train/kl"], kl.item(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("baseline", ["mean", "exponential"])
def test_moving_average_baseline_uses_earlier_rollouts_only(baseline, ending, tmp_path):
    decay = {"baseline_decay": 0.75} if baseline == "exponential" else {}
    _, recorder = train(
        "Reinforce", ending, tmp_path, updates=3, baseline=baseline, rewards=[reward_with_none], **decay
    )
    first, second, third = recorder.rollouts
    means = [rollout.returns[rollout.valid].double().mean() for rollout in recorder.rollouts]
    counts = [rollout.valid.sum() for rollout in recorder.rollouts]
    assert counts[0] != counts[1]
    weights = counts[:2] if baseline == "mean" else [0.75 * 0.25, 0.25]
    third_baseline = (weights[0] * means[0] + weights[1] * means[1]) / sum(weights)
    for rollout, expected_baseline in [(first, 0.0), (second, means[0]), (third, third_baseline)]:
        expected = (rollout.returns - expected_baseline)[rollout.valid].float()
        torch.testing.assert_close(rollout.advantages[rollout.valid].float(), expected, atol=1e-6, rtol=0)


def test_moving_average_baseline_includes_token_rewards(ending, tmp_path):
    _, recorder = train("Reinforce", ending, tmp_path, updates=2, rewards=[checksum_reward, token_reward])
    first, second = recorder.rollouts
    total = first.returns + F.masked_sum(first.token_rewards, first.completions.mask)
    to_go = F.reward_to_go(second.token_rewards, second.completions.mask)
    expected = second.returns.unsqueeze(-1) + to_go - total.double().mean()
    mask = second.completions.mask
    torch.testing.assert_close(second.advantages[mask].float(), expected[mask].float(), atol=1e-5, rtol=0)


# Masks, EOS and sampling


def test_padding_does_not_change_advantages_or_loss(ending, tmp_path):
    module = make_module("RLOO", ending, optimizer=sgd, rewards=[checksum_reward, token_reward])
    _, recorder = train("RLOO", ending, tmp_path, module=module)
    (rollout,) = recorder.rollouts
    padding = ~rollout.completions.mask
    assert padding.any()
    poisoned = rollout.replace(
        completions=rollout.completions.replace(
            tokens=rollout.completions.tokens.masked_fill(padding, 77),
            logprobs=rollout.completions.logprobs.masked_fill(padding, torch.nan),
        ),
        reference_logprobs=rollout.reference_logprobs.masked_fill(padding, torch.nan),
        token_rewards=rollout.token_rewards.masked_fill(padding, torch.nan),
    )
    poisoned = poisoned.replace(advantages=module.advantages(poisoned))
    assert torch.equal(module.advantages(rollout), poisoned.advantages)
    assert torch.equal(*(module.loss(module.evaluate(part))[0] for part in (rollout, poisoned)))


def test_rewards_receive_completions_up_to_and_including_eos(ending, tmp_path):
    seen = []

    def recording_reward(completion_ids, finished, **kwargs):
        seen.extend(zip(completion_ids, finished, strict=True))
        return [0.0] * len(finished)

    train("RLOO", ending, tmp_path, rewards=[recording_reward])
    eos = set(range(2, 262, 4))
    assert {finished for _, finished in seen} == {True, False}
    for ids, finished in seen:
        assert not eos & set(ids[:-1])
        assert (ids[-1] in eos) == finished
        assert finished or len(ids) == 6


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_kl_of_the_first_rollout_is_zero_and_the_logprob_mismatch_is_logged(temperature, ending, tmp_path):
    _, recorder = train("RLOO", ending, tmp_path, temperature=temperature)
    metrics = recorder.metrics[0]
    assert abs(metrics["train/kl"]) < 1e-4
    assert 0 <= metrics["train/logprob_mismatch"] < 1e-5


def test_top_k_sampling_warns_and_logs_the_sampled_mass(ending, tmp_path):
    with pytest.warns(UserWarning, match="bias the gradient"):
        _, recorder = train("RLOO", ending, tmp_path, top_k=20)
    assert 0.01 < recorder.metrics[0]["train/sampled_mass"] < 0.99


# EOS in reward models


def test_reward_model_gives_the_same_scores_in_use_as_in_training(ending, tmp_path):
    """A finished completion includes EOS, and its score differs from that of a truncated one."""
    module = make_module("RewardModeling", ending, optimizer=sgd)
    train("RewardModeling", ending, tmp_path, module=module)
    module.save_model(tmp_path / "model")
    data = make_data("RewardModeling")
    data.tokenizer = module.tokenizer
    data.setup()
    batch = next(iter(data.train_dataloader()))
    expected = module.scores(batch).detach()
    reward = lit_rlhf.rewards.RewardModel(tmp_path / "model")
    for column, text in enumerate(("good {}", "bad -{}")):
        completions = [text.format(i).replace("-0", "0") for i in batch.prompts.index.tolist()]
        torch.testing.assert_close(reward(batch.prompts.text, completions), expected[:, column], atol=1e-4, rtol=1e-4)
        truncated = reward(batch.prompts.text, completions, finished=[False] * len(completions))
        assert ((truncated - expected[:, column]).abs() > 1e-3).any()


# Precision


def test_logprobs_of_a_bfloat16_policy_are_float32(ending):
    policy = Policy.from_pretrained(ending, dtype="bfloat16")
    prompts = make_batch("film", "a book")
    completions = policy.sample(prompts, 2, lit_rlhf.models.sampling.Sampling(max_new_tokens=4))
    logprobs = policy.logprobs(prompts, completions)
    assert completions.logprobs.dtype == logprobs.dtype == torch.float32
    assert not torch.equal(logprobs, logprobs.bfloat16().float())


def test_moving_average_baseline_is_float64_for_bfloat16_weights(ending):
    module = make_module("Reinforce", ending, optimizer=sgd).to(torch.bfloat16)
    module.sum_over_ranks = lambda values: values
    for _ in range(300):
        module.update_baseline(torch.ones(1, 1, dtype=torch.bfloat16), torch.ones(1, 1, dtype=torch.bool))
    assert module.baseline_average.weight == 300  # a count in bfloat16 stops growing at 256
