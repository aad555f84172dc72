"""What validation, test and prediction say of a policy, with rewards and judges whose opinions are known."""

import math

import pytest
import torch

import lit_rlhf
from judged import OPINIONS, prefers, rows_of, validate
from runs import grouped, make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")


def judge(completions, **kwargs):
    """Knows the opponents of the tests; what the policy writes is worth 0."""
    return [OPINIONS.get(text, 0.0) for text in completions]


def worth(completion_ids, **kwargs):
    return [sum(ids) / 100 for ids in completion_ids]


def predict(module, rows, root) -> list[dict]:
    batches = make_trainer(root).predict(module, datamodule=lit_rlhf.PromptData(val=rows, batch_size=2))
    return [row for batch in batches for row in batch]


@pytest.mark.parametrize(
    ("opponents", "rate"),
    [(["same"], 0.5), (["worse"], 1.0), (["worse", "worse", "same", "better", "same"], 0.6)],
)
def test_a_tie_is_half_a_win(opponents, rate, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judge, compare_to="reference")
    metrics = validate(module, rows_of(*opponents), tmp_path)
    assert metrics["val/win_rate"] == pytest.approx(rate)
    assert metrics["val/judge"] == 0


def test_an_untrained_policy_ties_with_itself(tiny, tmp_path):
    metrics = validate(make_module("RLOO", tiny, rewards=[worth]), rows_of(*"abcde"), tmp_path)
    assert metrics["val/win_rate"] == 0.5
    assert abs(metrics["val/kl"]) < 1e-4


def test_weights_that_change_are_the_same_for_both_sides(tiny, tmp_path):
    constant = lit_rlhf.Weighted(lambda completions, **kwargs: [1.0] * len(completions), 1.0, "one", 0.1, updates=2)
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1)
    trainer.fit(make_module("RLOO", tiny, rewards=[constant]), make_data("RLOO"))
    assert trainer.callback_metrics["val/win_rate"] == 0.5
    assert trainer.callback_metrics["val/reward"] == pytest.approx(0.1)


def test_a_checkpoint_is_tested_with_the_weights_that_its_training_had_come_to(tiny, tmp_path):
    def make():
        reward = lit_rlhf.Weighted(lambda completions, **kwargs: [1.0] * len(completions), 1.0, "one", 0.1, updates=4)
        return make_module("RLOO", tiny, rewards=[reward])

    trainer, data = make_trainer(tmp_path, max_steps=2), make_data("RLOO")
    trainer.fit(make(), data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert trainer.callback_metrics["val/reward"] == pytest.approx(0.55)
    (tested,) = make_trainer(tmp_path).test(make(), data, ckpt_path=tmp_path / "two.ckpt", verbose=False)
    assert tested["test/reward"] == pytest.approx(0.55)


def test_a_module_from_a_checkpoint_knows_how_far_its_training_had_come(tiny, tmp_path):
    def counting(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    trainer, module = make_trainer(tmp_path, max_steps=2), make_module("RLOO", tiny, rewards=[counting])
    trainer.fit(module, make_data("RLOO"))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    options = dict(policy=str(tiny), rewards=[counting], sampling=lit_rlhf.Sampling(max_new_tokens=4))
    loaded = lit_rlhf.RLOO.load_from_checkpoint(tmp_path / "two.ckpt", **options, weights_only=False)
    for _ in range(2):
        assert validate(loaded, rows_of("a", "b"), tmp_path)["val/reward"] == 2


@pytest.mark.parametrize("choose", [None, lambda a, b: 0.5], ids=["scores", "pairs"])
def test_scores_are_not_rounded_where_weights_are_bfloat16(choose, tiny, tmp_path):
    def constant(completions, **kwargs):
        return [0.7] * len(completions)

    judged = constant if choose is None else prefers(choose)
    module = make_module("RLOO", tiny, judge=judged, compare_to="reference")
    metrics = validate(module, rows_of("a", "b"), tmp_path, trainer={"precision": "bf16-true"})
    assert metrics["val/win_rate"] == 0.5


def test_equal_completions_tie_however_the_judge_rounds(tiny, tmp_path):
    calls = []

    def judge(completions, **kwargs):
        calls.append(completions)
        return [1e-6 * len(calls)] * len(completions)

    metrics = validate(make_module("RLOO", tiny, judge=judge), rows_of(*"abcde"), tmp_path)
    assert len(calls) > 1 and metrics["val/win_rate"] == 0.5


@pytest.mark.parametrize("compare_to", ["policy", "reference"])
def test_the_opponent_is_judged_once_per_fit(compare_to, tiny, tmp_path):
    calls = []

    def count(completions, **kwargs):
        calls.append(list(completions))
        return judge(completions)

    def fit():
        calls.clear()
        data = lit_rlhf.PromptData(train=rows_of(*"abcdefghi"), val=rows_of("worse", "better", "same"), batch_size=3)
        make_trainer(tmp_path, max_steps=3, val_check_interval=1).fit(module, data)

    module = make_module("RLOO", tiny, judge=count, compare_to=compare_to, lr=0.5)
    fit()
    first = list(calls)
    assert len(first) == 5  # four validations and one opponent
    if compare_to == "reference":
        assert first.count(["worse", "better", "same"]) == 1
    assert first[0] != first[-1]  # the policy itself was judged anew
    fit()
    assert len(calls) == 5


def test_the_opponent_of_a_fit_is_where_the_policy_started(tiny, tmp_path):
    module = make_module("RLOO", tiny, rewards=[worth], lr=0.5, kl_coef=0.0)
    make_trainer(tmp_path, max_steps=4).fit(module, make_data("RLOO"))
    rows = rows_of(*"abcdefg")
    before = validate(make_module("RLOO", tiny, rewards=[worth]), rows, tmp_path)
    trained = [row["reward"] for row in predict(greedy(tiny, module.policy), rows, tmp_path)]
    untrained = [row["reward"] for row in predict(greedy(tiny), rows, tmp_path)]
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(trained, untrained, strict=True)]
    after = validate(module, rows, tmp_path)
    assert after["val/reward"] != before["val/reward"]
    assert after["val/win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert after["val/reward"] == pytest.approx(sum(trained) / len(trained))


def greedy(folder, policy=None, **options):
    options = {"rewards": [worth], "num_samples": 2, "max_new_tokens": 6, "greedy": True, **options}
    return lit_rlhf.RLOO(policy or str(folder), **grouped(options))


def test_other_data_have_opponents_of_their_own(tiny, tmp_path):
    """Though their rows have the same numbers."""
    module = make_module("RLOO", tiny, rewards=[worth])
    first = validate(module, [{"prompt": text} for text in ("film", "book", "play")], tmp_path)
    second = validate(module, [{"prompt": text} for text in ("a long song", "yes?", "42")], tmp_path)
    assert first["val/reward"] != second["val/reward"]
    assert first["val/win_rate"] == second["val/win_rate"] == 0.5


def test_other_data_have_completions_of_their_own_to_compare_with(tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judge, compare_to="reference")
    rates = [validate(module, rows_of(*[text] * 3), tmp_path)["val/win_rate"] for text in ("better", "worse")]
    assert rates == [0, 1]


# More that is measured


def test_the_variance_of_the_reward_is_that_over_prompts(tiny, tmp_path):
    def by_prompt(prompts, **kwargs):
        return [float(prompt[-1]) for prompt in prompts]

    metrics = validate(make_module("RLOO", tiny, rewards=[by_prompt]), rows_of(*"abcde"), tmp_path)
    assert metrics["val/reward"] == 2 and metrics["val/reward_variance"] == 2


def test_perplexity_is_that_of_the_given_completions(tiny, tmp_path):
    module = make_module("RLOO", tiny, rewards=[worth], preferred="reference", temperature=0.7)
    metrics = validate(module, rows_of("good", None, "very good"), tmp_path)
    model, tokenizer = module.policy.model, module.tokenizer
    total, count = 0.0, 0
    for prompt, text in (("film 0", "good"), ("film 2", "very good")):
        ids, given = tokenizer(prompt)["input_ids"], [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]
        logits = model(torch.tensor([ids + given])).logits[0, len(ids) - 1 : -1].detach()
        total += float(logits.log_softmax(-1)[range(len(given)), given].sum())
        count += len(given)
    assert metrics["val/perplexity"] == pytest.approx(math.exp(-total / count), rel=1e-4)


def test_a_given_completion_beyond_the_positions_is_a_sentence(tiny, tmp_path):
    module = make_module("RLOO", tiny, preferred="reference")
    with pytest.raises(ValueError, match=r"row 1 and its 'reference' have 5\d\d tokens, more than the 512 positions"):
        validate(module, rows_of("short", "long " * 105), tmp_path)


def test_a_greedy_method_is_measured_by_samples_too(tiny, tmp_path):
    """Its KL, and the best of several samples, are of what the policy would draw."""
    options = dict(rewards=[worth], best_of=4)
    drawn, greedy = (
        validate(make_module("RLOO", tiny, greedy=way, **options), rows_of(*"abcde"), tmp_path) for way in (False, True)
    )
    assert drawn == greedy


def test_the_best_of_several_is_what_the_rewards_like(tiny, tmp_path):
    rows = rows_of(*"abcdef")
    plain = make_module("RLOO", tiny, rewards=[worth], num_samples=4, greedy=False)
    sampled = {(r["index"], r["sample"]): r["reward"] for r in predict(plain, rows, tmp_path)}
    metrics = {n: validate(make_module("RLOO", tiny, rewards=[worth], best_of=n), rows, tmp_path) for n in (4, 40)}
    assert metrics[40]["val/reward"] > metrics[4]["val/reward"] > sum(sampled.values()) / len(sampled)
    assert metrics[4]["val/kl"] == pytest.approx(math.log(4) - 3 / 4, abs=1e-4)


def test_the_best_of_several_is_never_one_without_an_opinion(tiny, tmp_path):
    def mostly_silent(completion_ids, **kwargs):
        return [-float(sum(ids)) if sum(ids) % 2 else None for ids in completion_ids]

    module = make_module("RLOO", tiny, rewards=[mostly_silent], best_of=30)
    assert validate(module, rows_of(*"abc"), tmp_path)["val/undecided"] < 1
    assert all(example["reward"] == example["reward"] for example in module.examples)


def test_best_of_must_be_at_least_one():
    with pytest.raises(ValueError, match="best_of=0 must be at least 1"):
        lit_rlhf.EvaluationOptions(best_of=0)


# No opinion counts nowhere


@pytest.mark.parametrize("silent", [{"film 0", "film 2"}, {f"film {i}" for i in range(4)}], ids=len)
def test_a_judge_without_an_opinion_counts_nowhere(silent, tiny, tmp_path):
    def choosy(prompts, completions, **kwargs):
        opinions = zip(prompts, judge(completions), strict=True)
        return [None if prompt in silent else opinion - 3 for prompt, opinion in opinions]

    module = make_module("RLOO", tiny, judge=choosy, compare_to="reference")
    metrics = validate(module, rows_of("better", "worse", "better", "worse"), tmp_path)
    if len(silent) == 4:
        assert not {"val/judge", "val/win_rate"} & metrics.keys()
    else:
        assert metrics["val/judge"] == -3
        assert metrics["val/win_rate"] == 1


def test_an_opponent_without_an_opinion_counts_nowhere(tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judge, compare_to="reference")
    metrics = validate(module, rows_of("worse", "nobody can tell", "worse", "nobody can tell"), tmp_path)
    assert metrics["val/win_rate"] == 1
    assert metrics["val/judge"] == 0  # the policy's own were judged


def only_even(prompts, **kwargs):
    return [5.0 if int(prompt[-1]) % 2 == 0 else None for prompt in prompts]


def test_a_reward_without_an_opinion_counts_nowhere_in_validation(tiny, tmp_path):
    metrics = validate(make_module("RLOO", tiny, rewards=[only_even]), rows_of(*"abcde"), tmp_path)
    assert metrics["val/reward"] == metrics["val/reward/only_even"] == 5
    assert metrics["val/win_rate"] == 0.5


def test_a_reward_without_an_opinion_is_no_zero_in_a_prediction(tiny, tmp_path):
    predictions = predict(make_module("RLOO", tiny, rewards=[only_even]), rows_of(*"abcd"), tmp_path)
    assert [(row["index"], row["sample"]) for row in predictions] == [(i, j) for i in range(4) for j in range(3)]
    for row in predictions:
        if row["index"] % 2:
            assert row["reward"] is None or math.isnan(row["reward"])
        else:
            assert row["reward"] == row["component_rewards"]["only_even"] == 5


# Opponents from a column


@pytest.mark.parametrize("shape", ["strings", "messages"])
def test_a_judge_of_conversations_is_given_messages(shape, tiny, tmp_path):
    seen = []

    def look(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    turn = [{"role": "user", "content": "a film"}]
    answer = "great" if shape == "strings" else [{"role": "assistant", "content": "great"}]
    rows = [{"prompt": turn, "reference": answer}, {"prompt": turn, "reference": answer}]
    module = make_module("RLOO", tiny, rewards=[worth], judge=look, compare_to="reference")
    assert validate(module, rows, tmp_path)["val/win_rate"] == 0.5
    assert len(seen) == 4
    for prompt, completion in seen:
        assert prompt == turn
        assert [message["role"] for message in completion] == ["assistant"]
    assert [completion[0]["content"] for _, completion in seen[2:]] == ["great", "great"]


@pytest.mark.parametrize("chat", [False, True])
def test_a_row_without_a_reference_counts_nowhere(chat, tiny, tmp_path):
    def least_of_nothing(completions, **kwargs):
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [-9.0 if text == "" else OPINIONS.get(text, 0.0) for text in texts]

    rows = rows_of("better", None, "better", None, None)
    if chat:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    module = make_module("RLOO", tiny, rewards=[worth], judge=least_of_nothing, compare_to="reference")
    assert validate(module, rows, tmp_path)["val/win_rate"] == 0


def needs_reference(completions, reference):
    assert reference == ["worse", "same", "worse", "same"]
    return judge(completions)


@pytest.mark.parametrize("judged_by", [judge, needs_reference])
def test_what_only_validation_needs_may_stand_in_the_held_out_data_alone(judged_by, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judged_by, compare_to="reference")
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data("RLOO", val=rows_of("worse", "same", "worse", "same")))
    assert trainer.callback_metrics["val/win_rate"] == 0.75


# What does not fit is told before a model is loaded


class Unloaded(lit_rlhf.RLOO):
    def configure_model(self):
        raise AssertionError("a model was loaded")


def needs_answer(completions, answer):
    return [0.0] * len(completions)


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"compare_to": "refrence"}, r"compare_to='refrence' is not a column .*'reference'"),
        ({"rewards": [needs_answer]}, r"'needs_answer' asks for \['answer'\].*'reference'"),
        ({"judge": needs_answer}, r"'needs_answer' asks for \['answer'\].*'reference'"),
        ({"preferred": "chosen"}, r"evaluation.preferred='chosen' is not a column .*'reference'"),
    ],
    ids=["compare_to", "reward", "judge", "preferred"],
)
def test_a_column_that_is_not_there_is_told_before_a_model_is_loaded(stage, options, sentence, tiny, tmp_path):
    rows = rows_of(*"abcdefgh")
    data = lit_rlhf.PromptData(train=rows, val=rows, batch_size=2)
    module = Unloaded(str(tiny), **grouped({"rewards": [worth], **options}))
    with pytest.raises(ValueError, match=sentence):
        getattr(make_trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)


@pytest.mark.parametrize("part", ["train", "val"])
def test_a_reward_needs_its_column_in_every_part_of_the_data(part, tiny, tmp_path):
    rows = rows_of(*"abcdefgh")
    parts = {"train": [{**row, "answer": "x"} for row in rows], "val": [{**row, "answer": "x"} for row in rows]}
    data = lit_rlhf.PromptData(**{**parts, part: rows}, batch_size=2)
    with pytest.raises(ValueError, match=r"'needs_answer' asks for \['answer'\]"):
        make_trainer(tmp_path, max_steps=1).fit(Unloaded(str(tiny), rewards=[needs_answer]), data)


@pytest.mark.parametrize("judged_by", ["the rewards", "a scorer", "a judge of pairs"])
def test_a_reward_is_set_up_once(judged_by, tiny, tmp_path):
    class Loading:
        calls = 0

        def __call__(self, completions, **kwargs):
            return [0.5] * len(completions)

        def setup(self, device):
            self.calls += 1

    reward, judge = Loading(), None if judged_by == "the rewards" else Loading()
    if judge is not None:
        judge.pairwise = judged_by == "a judge of pairs"
    trainer = make_trainer(tmp_path, max_steps=3, val_check_interval=1)
    trainer.fit(make_module("RLOO", tiny, rewards=[reward], judge=judge), make_data("RLOO"))
    assert reward.calls == 1 and (judge is None or judge.calls == 1)


def test_another_trainer_evaluates_what_training_has_come_to(tiny, tmp_path):
    reward = lit_rlhf.Weighted(lambda completions, **kwargs: [1.0] * len(completions), 1.0, "one", 0.1, updates=2)
    module = make_module("RLOO", tiny, rewards=[reward])
    make_trainer(tmp_path, max_steps=2).fit(module, make_data("RLOO"))
    assert validate(module, rows_of("a", "b"), tmp_path)["val/reward"] == pytest.approx(0.1)


def test_what_follows_training_is_the_same_for_both_sides(tiny, tmp_path):
    def rising(completions, trainer_state):
        return [float(trainer_state.global_step)] * len(completions)

    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1)
    trainer.fit(make_module("RLOO", tiny, rewards=[rising]), make_data("RLOO"))
    assert trainer.callback_metrics["val/reward"] == 2
    assert trainer.callback_metrics["val/win_rate"] == 0.5
