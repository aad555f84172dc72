"""`Scorer`: TRL's reward interface, weighted sums, shapes, and errors at construction."""

import functools
import inspect
import math

import pytest
import torch
from transformers import TrainerState

from lit_rlhf.errors import InputError
from lit_rlhf.models.sharding import Sharding
from lit_rlhf.rewards import Guarded, Scorer, Weighted
from scoring import IDS, TokenObject, asynchronous, by_name, component, flat, ones, score

# Reward functions as written for TRL


def by_kwargs(prompts, completions, completion_ids, answer, **kwargs):
    assert kwargs["trainer_state"].global_step == 7
    assert kwargs["other"] == ["x", "y", "z"]
    assert prompts == ["p0", "p1", "p2"] and completion_ids == IDS
    return [float(a) for a in answer]


def logging_reward(completions, log_extra=None, log_metric=None, **kwargs):
    log_extra("upper", [c.upper() for c in completions])
    log_metric("mean", 1.0)
    log_metric("mean", torch.tensor(2.0))
    return torch.ones(len(completions))


def needs_finished(finished):
    return [float(f) for f in finished]


class AsyncObject:
    async def __call__(self, completions, **kwargs):
        return [0.5] * len(completions)


def test_trl_reward_functions_run_unchanged():
    state = TrainerState(global_step=7, max_steps=10, epoch=0.5)
    rewards = [by_kwargs, by_name, asynchronous, logging_reward, needs_finished, AsyncObject()]
    scores = score(rewards, state, answer=[1, 2, 3], other=["x", "y", "z"])
    assert list(scores.component_rewards) == [
        "by_kwargs", "by_name", "asynchronous", "logging_reward", "needs_finished", "async_object",
    ]  # fmt: skip
    assert component(scores, "asynchronous").isnan().tolist() == [True, False, False]
    assert flat(scores) == [1 + 1 + 0 + 1 + 1 + 0.5, 2 + 2 + 2 + 1 + 1 + 0.5, 3 + 3 + 3 + 1 + 0 + 0.5]
    assert scores.valid.all()
    assert scores.token_rewards is None
    assert scores.metrics == {"mean": 1.5}
    assert scores.reward_extras == {"upper": [["C0"], ["C1"], ["C2"]]}


def test_trainer_state_defaults_to_step_0():
    def step(completions, trainer_state):
        return [trainer_state.global_step] * len(completions)

    assert flat(score([step])) == [0, 0, 0]


def test_weights_apply_to_the_sum_and_not_to_component_rewards():
    scores = score([Weighted(by_name, 0.5), Weighted(ones, -2, name="bias")], answer=[1, None, 3])
    assert flat(scores) == [-1.5, -2.0, -0.5]
    assert component(scores, "bias").tolist() == [1, 1, 1]
    assert component(scores, "by_name")[[0, 2]].tolist() == [1, 3] and component(scores, "by_name")[1].isnan()
    nested = score([Weighted(Weighted(ones, 3, name="inner"), 2)])
    assert flat(nested) == [6, 6, 6] and list(nested.component_rewards) == ["inner"]


def test_a_completion_is_valid_if_any_reward_has_an_opinion():
    def some(completions):
        return [None, 1, None]

    scores = score([some, by_name], answer=[2, None, None])
    assert scores.valid.flatten().tolist() == [True, True, False]
    assert flat(scores) == [2, 1, 0]


def test_a_reward_with_weight_0_makes_no_completion_valid():
    def some(completions):
        return [None, 1, None]

    scores = score([some, Weighted(by_name, 0.0)], answer=[2, None, None])
    assert scores.valid.flatten().tolist() == scores.has_sequence_reward.flatten().tolist() == [False, True, False]
    assert component(scores, "by_name").tolist()[0] == 2
    assert score([Weighted(some, 0.0)]).valid.flatten().tolist() == [
        False,
        True,
        False,
    ]  # no reward has a nonzero weight


def test_names_of_partials_lambdas_and_repeated_rewards():
    half = functools.partial(by_name)
    scores = score([ones, ones, half, lambda completions: [0, 0, 0], Weighted(ones, name="ones")], answer=[1, 1, 1])
    assert list(scores.component_rewards) == ["ones", "ones_2", "by_name", "lambda", "ones_3"]


def test_token_rewards_are_a_weighted_sum_padded_with_0():
    def length_so_far(completion_ids):
        return [list(range(len(ids))) for ids in completion_ids]

    length_so_far.token_level = True
    scores = score([Weighted(TokenObject(), 2.0), length_so_far, ones])
    assert scores.token_rewards.tolist() == [[[1, 2, 3, 0]], [[0, 1, 0, 0]], [[0, 3, 6, 9]]]
    assert component(scores, "length_so_far").tolist() == [3, 1, 6]
    assert (
        component(scores, "token_object")[[0, 2]].tolist() == [1.5, 6] and component(scores, "token_object")[1].isnan()
    )
    assert flat(scores) == [1, 1, 1]  # sequence-level rewards only
    alone = score([TokenObject()])
    assert alone.valid.flatten().tolist() == [True, False, True]
    assert flat(alone) == [0, 0, 0]


# Groups of several completions

GROUPS = dict(
    prompts=["p0", "p1"],
    completions=[["a", "b", "c"], ["d", "e", "f"]],
    completion_ids=[[[1], [2, 2], [3]], [[4], [], [6, 6, 6]]],
    finished=[[True, False, True], [True, True, False]],
    columns={"answer": [10, 20]},
)


def test_rewards_receive_flat_lists_with_prompts_and_columns_repeated():
    received = {}

    def reward(**kwargs):
        received.update(kwargs)
        return [0.0] * len(kwargs["completions"])

    Scorer([reward])(**GROUPS)
    del received["trainer_state"], received["log_extra"], received["log_metric"]
    assert received == {
        "prompts": ["p0"] * 3 + ["p1"] * 3,
        "completions": ["a", "b", "c", "d", "e", "f"],
        "completion_ids": [[1], [2, 2], [3], [4], [], [6, 6, 6]],
        "finished": [True, False, True, True, True, False],
        "answer": [10] * 3 + [20] * 3,
    }


def test_scores_have_one_row_per_prompt():
    def reward(answer, log_extra):
        log_extra("place", list(range(6)))
        return [None, *range(1, 6)]

    def ids(completion_ids):
        return [None if row == [3] else row for row in completion_ids]

    ids.token_level = True
    scores = Scorer([reward, Weighted(ids, 10)])(**GROUPS)
    assert scores.rewards.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert component(scores, "ids").view(2, 3).nan_to_num(-1).tolist() == [[1, 4, -1], [4, 0, 18]]
    assert scores.token_rewards.tolist() == [
        [[10, 0, 0], [20, 20, 0], [0, 0, 0]],
        [[40, 0, 0], [0, 0, 0], [60, 60, 60]],
    ]
    assert scores.has_sequence_reward.tolist() == [[False, True, True], [True, True, True]]
    assert scores.valid.all()
    assert scores.total().tolist() == [[10, 41, 2], [43, 4, 185]]
    assert scores.reward_extras == {"place": [[0, 1, 2], [3, 4, 5]]}


def test_total_is_nan_without_a_valid_reward():
    def some(completions):
        return [None, 1, None, 2, 3, None]

    total = Scorer([some])(**GROUPS).total()
    assert total.isnan().tolist() == [[True, False, True], [False, False, True]]
    assert total.nan_to_num().tolist() == [[0, 1, 0], [2, 3, 0]]


def test_empty_completions_have_token_rewards_without_tokens():
    def ids(completion_ids):
        return completion_ids

    ids.token_level = True
    empty = {"completions": [["", ""]], "completion_ids": [[[], []]], "finished": [[False, False]]}
    scores = Scorer([ids])(prompts=["p"], **empty)
    assert scores.token_rewards.shape == (1, 2, 0) and scores.total().tolist() == [[0, 0]]


def test_ragged_groups_raise():
    with pytest.raises(ValueError, match=r"finished has groups of \[3, 2\] entries: it must have 3 for each of the 2"):
        Scorer([ones])(**{**GROUPS, "finished": [[True] * 3, [True] * 2]})


# Setup, columns, errors at construction


def test_setup_is_forwarded_to_the_wrapped_reward():
    devices = []

    class Holder:
        def setup(self, device):
            devices.append(device)

        def __call__(self, completions):
            return [0.0] * len(completions)

    Scorer([Weighted(Holder(), 2), ones, Holder()]).setup("cpu")
    assert devices == ["cpu", "cpu"]


def test_only_a_reward_that_is_called_once_on_all_ranks_is_sharded():
    given = []

    class Model:
        def setup(self, device, sharding=None):
            given.append(sharding)

        def __call__(self, completions):
            return [0.0] * len(completions)

    sharding = object.__new__(Sharding)
    Scorer([Weighted(Model(), 2), Guarded(Model())]).setup("cpu", sharding)
    assert given == [sharding, None]


def test_an_attribute_of_a_reward_is_no_guard():
    class Safety:
        guard = "the name of a model"

        def __call__(self, completions):
            return [1.0] * len(completions)

    assert flat(score([Safety()])) == [1, 1, 1]


def test_an_error_that_is_a_sentence_stays_one():
    def short(completions):
        raise InputError("the input is too long")

    with pytest.raises(InputError, match=r"^the reward 'short': the input is too long$"):
        score([short])


def test_a_missing_column_raises_before_the_first_call():
    scorer = Scorer([ones, by_name])
    scorer.check(["answer", "other"])
    with pytest.raises(ValueError, match=r"'by_name' asks for \['answer'\], but .* are \['other'\]"):
        scorer.check(["other"])
    with pytest.raises(ValueError, match=r"'by_name' asks for \['answer'\]"):
        score([by_name])
    with pytest.raises(ValueError, match=r"the columns of the data are \['anwser'\]: did you mean 'anwser'\?"):
        scorer.check(["anwser"])


@pytest.mark.parametrize(
    ("reward", "hint"),
    [
        (lambda completion: [0.0], r"did you mean 'completions'\?"),
        (lambda text: [0.0], "take `completions`, add the column to the data, or give the parameter a default"),
    ],
)
def test_a_reward_without_completions_is_given_their_name(reward, hint):
    with pytest.raises(ValueError, match=rf"asks for \[.*\], but the columns of the data are \['gold'\]: {hint}"):
        Scorer([reward]).check(["gold"])


@pytest.mark.parametrize(
    ("rewards", "error", "message"),
    [
        ([], ValueError, "rewards is empty"),
        ("mine.words", TypeError, "must be a list of callables, not 'mine.words'"),
        (ones, TypeError, "must be a list of callables"),
        (["mine.words"], TypeError, "'mine.words' is not a reward: import the function"),
        ([3], TypeError, "3 is not a reward: give a function"),
        ([TokenObject], TypeError, r"create an instance: TokenObject\(\.\.\.\)"),
    ],
)
def test_invalid_rewards_raise_at_construction(rewards, error, message):
    unchecked = inspect.unwrap(Scorer.__init__)  # types are only checked in tests
    with pytest.raises(error, match=message):
        unchecked(object.__new__(Scorer), rewards)


def test_a_bare_model_raises(llama):
    with pytest.raises(TypeError, match="wrap it: RewardModel"):
        Scorer([llama])


def test_a_weight_must_be_finite():
    with pytest.raises(ValueError, match="finite number, not inf"):
        Weighted(ones, weight=math.inf)


# Weight schedules


def constant(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(("step", "weight"), [(0, 2.0), (5, 1.25), (10, 0.5), (99, 0.5)])
def test_a_weight_changes_linearly_to_its_final_value(step, weight):
    scorer = Scorer([Weighted(constant, weight=2.0, final_weight=0.5, updates=10)])
    state = TrainerState(global_step=step)
    scores = scorer(prompts=["a"], completions=[["b"]], completion_ids=[[[1]]], finished=[[True]], state=state)
    assert flat(scores) == [weight]
    assert component(scores, "constant").tolist() == [1.0]


@pytest.mark.parametrize("options", [{"final_weight": 1.0}, {"updates": 3}, {"final_weight": 1.0, "updates": 0}])
def test_an_incomplete_weight_schedule_raises(options):
    with pytest.raises(ValueError, match="give both"):
        Weighted(constant, **options)
