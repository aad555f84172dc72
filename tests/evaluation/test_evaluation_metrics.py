"""Metrics of validation and prediction: variance, perplexity, best of n, and missing opinions or rewards."""

import math

import pytest
import torch
from transformers import TrainerState

import lit_rlhf
from enumerable import make_prompts
from judged import judge, predict, rows_of, token_sum, validate
from lit_rlhf.evaluation.scoring import score
from lit_rlhf.types import Completions
from runs import make_module
from tiny import make_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")


# Metrics


def test_reward_variance_is_over_prompts(tiny, tmp_path):
    def by_prompt(prompts, **kwargs):
        return [float(prompt[-1]) for prompt in prompts]

    metrics = validate(make_module("RLOO", tiny, rewards=[by_prompt]), rows_of(*"abcde"), tmp_path)
    assert metrics["val/reward"] == 2 and metrics["val/reward_variance"] == 2


def test_perplexity_is_that_of_the_preferred_completions(tiny, tmp_path):
    module = make_module("RLOO", tiny, rewards=[token_sum], preferred="reference", temperature=0.7)
    metrics = validate(module, rows_of("good", None, "very good"), tmp_path)
    model, tokenizer = module.policy.model, module.tokenizer
    total, count = 0.0, 0
    for prompt, text in (("film 0", "good"), ("film 2", "very good")):
        ids, completion = tokenizer(prompt)["input_ids"], [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([ids + completion])).logits[0, len(ids) - 1 : -1].detach()
        total += float(logits.log_softmax(-1)[range(len(completion)), completion].sum())
        count += len(completion)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)


def test_preferred_completion_beyond_the_positions_is_refused(tiny, tmp_path):
    module = make_module("RLOO", tiny, preferred="reference")
    with pytest.raises(ValueError, match=r"row 1 and its 'reference' have 5\d\d tokens, more than the 512 positions"):
        validate(module, rows_of("short", "long " * 105), tmp_path)


def test_greedy_sampling_does_not_change_kl_and_best_of_metrics(tiny, tmp_path):
    """Both are computed from random samples."""
    modules = [make_module("RLOO", tiny, rewards=[token_sum], best_of=4, greedy=greedy) for greedy in (False, True)]
    with_sampling, with_greedy = (validate(module, rows_of(*"abcde"), tmp_path) for module in modules)
    assert with_sampling == with_greedy


def test_best_of_n_increases_the_reward_and_logs_its_kl(tiny, tmp_path):
    rows = rows_of(*"abcdef")
    plain = make_module("RLOO", tiny, rewards=[token_sum], num_samples=4, greedy=False)
    sampled = {(r["index"], r["sample"]): r["reward"] for r in predict(plain, rows, tmp_path)}
    metrics = {n: validate(make_module("RLOO", tiny, rewards=[token_sum], best_of=n), rows, tmp_path) for n in (4, 40)}
    assert metrics[40]["val/reward"] > metrics[4]["val/reward"] > sum(sampled.values()) / len(sampled)
    assert metrics[4]["val/kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-4)


def test_best_of_n_never_selects_a_completion_without_a_reward(tiny, tmp_path):
    def mostly_none(completion_ids, **kwargs):
        return [-float(sum(ids)) if sum(ids) % 2 else None for ids in completion_ids]

    module = make_module("RLOO", tiny, rewards=[mostly_none], best_of=30)
    assert validate(module, rows_of(*"abc"), tmp_path)["val/undecided"] < 1
    assert all(example["reward"] == example["reward"] for example in module.examples)


def test_best_of_must_be_at_least_one():
    with pytest.raises(ValueError, match="best_of=0 must be at least 1"):
        lit_rlhf.EvaluationOptions(best_of=0)


# Missing opinions and rewards are ignored


@pytest.mark.parametrize("undecided", [{"film 0", "film 2"}, {f"film {i}" for i in range(4)}], ids=len)
def test_undecided_judge_is_ignored(undecided, tiny, tmp_path):
    def partial_judge(prompts, completions, **kwargs):
        opinions = zip(prompts, judge(completions), strict=True)
        return [None if prompt in undecided else opinion - 3 for prompt, opinion in opinions]

    module = make_module("RLOO", tiny, judge=partial_judge, compare_to="reference")
    metrics = validate(module, rows_of("better", "worse", "better", "worse"), tmp_path)
    if len(undecided) == 4:
        assert not {"val/judge", "val/win_rate"} & metrics.keys()
    else:
        assert metrics["val/judge"] == -3
        assert metrics["val/win_rate"] == 1


def test_opponent_without_a_score_is_ignored(tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judge, compare_to="reference")
    metrics = validate(module, rows_of("worse", "nobody can tell", "worse", "nobody can tell"), tmp_path)
    assert metrics["val/win_rate"] == 1
    assert metrics["val/judge"] == 0  # the policy's completions have scores


def reward_even_prompts(prompts, **kwargs):
    return [5.0 if int(prompt[-1]) % 2 == 0 else None for prompt in prompts]


def test_reward_of_none_is_ignored_in_validation(tiny, tmp_path):
    metrics = validate(make_module("RLOO", tiny, rewards=[reward_even_prompts]), rows_of(*"abcde"), tmp_path)
    assert metrics["val/reward"] == metrics["val/reward/reward_even_prompts"] == 5
    assert metrics["val/win_rate"] == 0.5


def test_reward_of_none_is_not_zero_in_predictions(tiny, tmp_path):
    predictions = predict(make_module("RLOO", tiny, rewards=[reward_even_prompts]), rows_of(*"abcd"), tmp_path)
    assert [(row["index"], row["sample"]) for row in predictions] == [(i, j) for i in range(4) for j in range(3)]
    for row in predictions:
        if row["index"] % 2:
            assert row["reward"] is None or math.isnan(row["reward"])
        else:
            assert row["reward"] == row["component_rewards"]["reward_even_prompts"] == 5


def test_prompts_without_text_are_scored():
    """Those of a loader that gives token ids only."""
    scorer = lit_rlhf.rewards.Scorer([lambda completions, **kwargs: [float(len(text)) for text in completions]])
    prompts = make_prompts([5, 6], [7]).replace(text=[])
    ones = torch.ones(2, 3, 4)
    completions = Completions(ones.long(), ones.bool(), ones, torch.ones(2, 3, dtype=torch.bool))
    scores = score(scorer, make_tokenizer(), prompts, completions, [["a", "bb", "ccc"]] * 2, TrainerState())
    assert scores.total().tolist() == [[1.0, 2.0, 3.0]] * 2
