"""Win rates, opponents and reward weights of the evaluator, and the data columns that it needs."""

import pytest

import lit_rlhf
from judged import OPINIONS, judge, predict, prefers, rows_of, token_sum, validate
from runs import grouped, make_data, make_module, make_trainer

pytestmark = pytest.mark.filterwarnings("ignore:a prompt without a reward")


@pytest.mark.parametrize(
    ("opponents", "rate"),
    [(["same"], 0.5), (["worse"], 1.0), (["worse", "worse", "same", "better", "same"], 0.6)],
)
def test_tie_counts_as_half_a_win(opponents, rate, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judge, compare_to="reference")
    metrics = validate(module, rows_of(*opponents), tmp_path)
    assert metrics["val/win_rate"] == pytest.approx(rate)
    assert metrics["val/judge"] == 0


def test_untrained_policy_ties_with_itself(tiny, tmp_path):
    metrics = validate(make_module("RLOO", tiny, rewards=[token_sum]), rows_of(*"abcde"), tmp_path)
    assert metrics["val/win_rate"] == 0.5
    assert abs(metrics["val/kl"]) < 1e-4


def test_scheduled_reward_weight_is_the_same_for_policy_and_opponent(tiny, tmp_path):
    constant = lit_rlhf.Weighted(lambda completions, **kwargs: [1.0] * len(completions), 1.0, "one", 0.1, updates=2)
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1)
    trainer.fit(make_module("RLOO", tiny, rewards=[constant]), make_data("RLOO"))
    assert trainer.callback_metrics["val/win_rate"] == 0.5
    assert trainer.callback_metrics["val/reward"] == pytest.approx(0.1)


def test_checkpoint_is_tested_with_its_reward_weights(tiny, tmp_path):
    def make():
        reward = lit_rlhf.Weighted(lambda completions, **kwargs: [1.0] * len(completions), 1.0, "one", 0.1, updates=4)
        return make_module("RLOO", tiny, rewards=[reward])

    trainer, data = make_trainer(tmp_path, max_steps=2), make_data("RLOO")
    trainer.fit(make(), data)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    assert trainer.callback_metrics["val/reward"] == pytest.approx(0.55)
    (tested,) = make_trainer(tmp_path).test(make(), data, ckpt_path=tmp_path / "two.ckpt", verbose=False)
    assert tested["test/reward"] == pytest.approx(0.55)


def test_module_from_a_checkpoint_keeps_its_global_step(tiny, tmp_path):
    def step_reward(completions, trainer_state, **kwargs):
        return [float(trainer_state.global_step)] * len(completions)

    trainer, module = make_trainer(tmp_path, max_steps=2), make_module("RLOO", tiny, rewards=[step_reward])
    trainer.fit(module, make_data("RLOO"))
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    options = dict(policy=str(tiny), rewards=[step_reward], sampling=lit_rlhf.Sampling(max_new_tokens=4))
    loaded = lit_rlhf.RLOO.load_from_checkpoint(tmp_path / "two.ckpt", **options, weights_only=False)
    for _ in range(2):
        assert validate(loaded, rows_of("a", "b"), tmp_path)["val/reward"] == 2


@pytest.mark.parametrize("choose", [None, lambda a, b: 0.5], ids=["scores", "pairwise"])
def test_scores_are_not_rounded_for_bfloat16_weights(choose, tiny, tmp_path):
    def constant(completions, **kwargs):
        return [0.7] * len(completions)

    chosen_judge = constant if choose is None else prefers(choose)
    module = make_module("RLOO", tiny, judge=chosen_judge, compare_to="reference")
    metrics = validate(module, rows_of("a", "b"), tmp_path, trainer={"precision": "bf16-true"})
    assert metrics["val/win_rate"] == 0.5


def test_equal_completions_tie_despite_rounding_of_the_judge(tiny, tmp_path):
    calls = []

    def judge(completions, **kwargs):
        calls.append(completions)
        return [1e-6 * len(calls)] * len(completions)

    metrics = validate(make_module("RLOO", tiny, judge=judge), rows_of(*"abcde"), tmp_path)
    assert len(calls) > 1 and metrics["val/win_rate"] == 0.5


@pytest.mark.parametrize("compare_to", ["policy", "reference"])
def test_opponent_is_judged_once_per_fit(compare_to, tiny, tmp_path):
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
    assert len(first) == 5  # four validations, and the opponent once
    if compare_to == "reference":
        assert first.count(["worse", "better", "same"]) == 1
    assert first[0] != first[-1]  # the policy is judged in each validation
    fit()
    assert len(calls) == 5


def test_opponent_is_the_initial_policy(tiny, tmp_path):
    module = make_module("RLOO", tiny, rewards=[token_sum], lr=0.5, kl_coef=0.0)
    make_trainer(tmp_path, max_steps=4).fit(module, make_data("RLOO"))
    rows = rows_of(*"abcdefg")
    before = validate(make_module("RLOO", tiny, rewards=[token_sum]), rows, tmp_path)
    trained = [row["reward"] for row in predict(greedy(tiny, module.policy), rows, tmp_path)]
    untrained = [row["reward"] for row in predict(greedy(tiny), rows, tmp_path)]
    wins = [(a > b) + 0.5 * (a == b) for a, b in zip(trained, untrained, strict=True)]
    after = validate(module, rows, tmp_path)
    assert after["val/reward"] != before["val/reward"]
    assert after["val/win_rate"] == pytest.approx(sum(wins) / len(wins))
    assert after["val/reward"] == pytest.approx(sum(trained) / len(trained))


def greedy(folder, policy=None, **options):
    options = {"rewards": [token_sum], "num_samples": 2, "max_new_tokens": 6, "greedy": True, **options}
    return lit_rlhf.RLOO(policy or str(folder), **grouped(options))


def test_opponent_completions_are_not_reused_for_other_data(tiny, tmp_path):
    """Even if the row indices are equal."""
    module = make_module("RLOO", tiny, rewards=[token_sum])
    first = validate(module, [{"prompt": text} for text in ("film", "book", "play")], tmp_path)
    second = validate(module, [{"prompt": text} for text in ("a long song", "yes?", "42")], tmp_path)
    assert first["val/reward"] != second["val/reward"]
    assert first["val/win_rate"] == second["val/win_rate"] == 0.5


def test_reference_completions_are_not_reused_for_other_data(tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=judge, compare_to="reference")
    rates = [validate(module, rows_of(*[text] * 3), tmp_path)["val/win_rate"] for text in ("better", "worse")]
    assert rates == [0, 1]


# Opponents from a column of the data


@pytest.mark.parametrize("shape", ["strings", "messages"])
def test_judge_receives_messages_for_conversational_data(shape, tiny, tmp_path):
    seen = []

    def recording_judge(prompts, completions, **kwargs):
        seen.extend(zip(prompts, completions, strict=True))
        return [0.0] * len(completions)

    turn = [{"role": "user", "content": "a film"}]
    answer = "great" if shape == "strings" else [{"role": "assistant", "content": "great"}]
    rows = [{"prompt": turn, "reference": answer}, {"prompt": turn, "reference": answer}]
    module = make_module("RLOO", tiny, rewards=[token_sum], judge=recording_judge, compare_to="reference")
    assert validate(module, rows, tmp_path)["val/win_rate"] == 0.5
    (tried, _), *asked = seen
    assert tried == turn and len(asked) == 4
    for prompt, completion in asked:
        assert prompt == turn
        assert [message["role"] for message in completion] == ["assistant"]
    assert [completion[0]["content"] for _, completion in asked[2:]] == ["great", "great"]


@pytest.mark.parametrize("chat", [False, True])
def test_row_without_a_reference_is_ignored(chat, tiny, tmp_path):
    def penalize_empty(completions, **kwargs):
        texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
        return [-9.0 if text == "" else OPINIONS.get(text, 0.0) for text in texts]

    rows = rows_of("better", None, "better", None, None)
    if chat:
        rows = [{**row, "prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    module = make_module("RLOO", tiny, rewards=[token_sum], judge=penalize_empty, compare_to="reference")
    assert validate(module, rows, tmp_path)["val/win_rate"] == 0


def needs_reference(completions, reference):
    assert reference == ["worse", "same", "worse", "same"]
    return judge(completions)


@pytest.mark.parametrize("evaluation_judge", [judge, needs_reference])
def test_columns_for_validation_only_may_be_missing_from_the_training_data(evaluation_judge, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=evaluation_judge, compare_to="reference")
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.fit(module, make_data("RLOO", val=rows_of("worse", "same", "worse", "same")))
    assert trainer.callback_metrics["val/win_rate"] == 0.75


# Missing columns are refused before a model is loaded


class NeverLoaded(lit_rlhf.RLOO):
    def configure_model(self):
        raise AssertionError("a model was loaded")


def needs_answer(completions, answer):
    return [0.0] * len(completions)


@pytest.mark.parametrize("stage", ["fit", "validate"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"compare_to": "refrence"}, r"compare_to='refrence' is not a column .*'reference'"),
        ({"rewards": [needs_answer]}, r"'needs_answer' asks for \['answer'\].*'reference'"),
        ({"judge": needs_answer}, r"'needs_answer' asks for \['answer'\].*'reference'"),
        ({"preferred": "chosen"}, r"evaluation.preferred='chosen' is not a column .*'reference'"),
    ],
    ids=["compare_to", "reward", "judge", "preferred"],
)
def test_missing_column_is_refused_before_a_model_is_loaded(stage, options, message, tiny, tmp_path):
    rows = rows_of(*"abcdefgh")
    data = lit_rlhf.PromptData(train=rows, val=rows, batch_size=2)
    module = NeverLoaded(str(tiny), **grouped({"rewards": [token_sum], **options}))
    with pytest.raises(ValueError, match=message):
        getattr(make_trainer(tmp_path, max_steps=1), stage)(module, datamodule=data)


@pytest.mark.parametrize("part", ["train", "val"])
def test_column_of_a_reward_is_required_in_train_and_val(part, tiny, tmp_path):
    rows = rows_of(*"abcdefgh")
    parts = {"train": [{**row, "answer": "x"} for row in rows], "val": [{**row, "answer": "x"} for row in rows]}
    data = lit_rlhf.PromptData(**{**parts, part: rows}, batch_size=2)
    with pytest.raises(ValueError, match=r"'needs_answer' asks for \['answer'\]"):
        make_trainer(tmp_path, max_steps=1).fit(NeverLoaded(str(tiny), rewards=[needs_answer]), data)


@pytest.mark.parametrize("evaluation_judge", ["rewards", "judge", "pairwise judge"])
def test_reward_and_judge_are_set_up_once(evaluation_judge, tiny, tmp_path):
    class Loading:
        calls = 0

        def __call__(self, completions, **kwargs):
            return [0.5] * len(completions)

        def setup(self, device):
            self.calls += 1

    reward, judge = Loading(), None if evaluation_judge == "rewards" else Loading()
    if judge is not None:
        judge.pairwise = evaluation_judge == "pairwise judge"
    trainer = make_trainer(tmp_path, max_steps=3, val_check_interval=1)
    trainer.fit(make_module("RLOO", tiny, rewards=[reward], judge=judge), make_data("RLOO"))
    assert reward.calls == 1 and (judge is None or judge.calls == 1)


def test_reward_weight_is_kept_for_another_trainer(tiny, tmp_path):
    reward = lit_rlhf.Weighted(lambda completions, **kwargs: [1.0] * len(completions), 1.0, "one", 0.1, updates=2)
    module = make_module("RLOO", tiny, rewards=[reward])
    make_trainer(tmp_path, max_steps=2).fit(module, make_data("RLOO"))
    assert validate(module, rows_of("a", "b"), tmp_path)["val/reward"] == pytest.approx(0.1)


def step_reward(completions, trainer_state):
    return [float(trainer_state.global_step)] * len(completions)


def step_reward_of_any_columns(completions, trainer_state=None, **columns):
    return step_reward(completions, trainer_state)


@pytest.mark.parametrize("step_reward", [step_reward, step_reward_of_any_columns], ids=["named", "with others"])
def test_trainer_state_is_the_same_for_policy_and_opponent(step_reward, tiny, tmp_path):
    trainer = make_trainer(tmp_path, max_steps=2, val_check_interval=1)
    trainer.fit(make_module("RLOO", tiny, rewards=[step_reward]), make_data("RLOO"))
    assert trainer.callback_metrics["val/reward"] == 2
    assert trainer.callback_metrics["val/win_rate"] == 0.5
