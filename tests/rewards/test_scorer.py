import asyncio
import functools
import inspect
import math

import pytest
import torch
from transformers import TrainerState

from lit_rlhf.rewards import Scorer, Weighted

IDS = [[5, 6, 2], [7, 2], [8, 9, 9, 9]]


def score(rewards, state=None, **columns):
    count = len(IDS)
    prompts = [f"p{i}" for i in range(count)]
    completions = [f"c{i}" for i in range(count)]
    return Scorer(rewards)(prompts, completions, IDS, [True, True, False], columns, state)


def ones(completions, **kwargs):
    return [1.0] * len(completions)


# Functions as TRL's users write them.


def by_kwargs(prompts, completions, completion_ids, answer, **kwargs):
    assert kwargs["trainer_state"].global_step == 7
    assert kwargs["other"] == ["x", "y", "z"]
    assert prompts == ["p0", "p1", "p2"] and completion_ids == IDS
    return [float(a) for a in answer]


def by_name(completions, answer):
    return answer


async def asynchronous(completions, **kwargs):
    await asyncio.sleep(0)
    return [None, 2, 3.0]


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


class TokenObject:
    token_level = True

    def __call__(self, completion_ids, **kwargs):
        return [[0.5] * len(completion_ids[0]), None, torch.arange(4)]


def test_trl_functions_run_unchanged():
    state = TrainerState(global_step=7, max_steps=10, epoch=0.5)
    rewards = [by_kwargs, by_name, asynchronous, logging_reward, needs_finished, AsyncObject()]
    scores = score(rewards, state, answer=[1, 2, 3], other=["x", "y", "z"])
    assert list(scores.parts) == [
        "by_kwargs", "by_name", "asynchronous", "logging_reward", "needs_finished", "async_object",
    ]  # fmt: skip
    assert scores.parts["asynchronous"].isnan().tolist() == [True, False, False]
    assert scores.rewards.tolist() == [1 + 1 + 0 + 1 + 1 + 0.5, 2 + 2 + 2 + 1 + 1 + 0.5, 3 + 3 + 3 + 1 + 0 + 0.5]
    assert scores.valid.all()
    assert scores.token_rewards is None
    assert scores.metrics == {"mean": 1.5}
    assert scores.extra == {"upper": ["C0", "C1", "C2"]}


def test_state_is_given_even_when_the_caller_has_none():
    def step(completions, trainer_state):
        return [trainer_state.global_step] * len(completions)

    assert score([step]).rewards.tolist() == [0, 0, 0]


def test_weights_multiply_the_sum_and_not_the_parts():
    scores = score([Weighted(by_name, 0.5), Weighted(ones, -2, name="bias")], answer=[1, None, 3])
    assert scores.rewards.tolist() == [-1.5, -2.0, -0.5]
    assert scores.parts["bias"].tolist() == [1, 1, 1]
    assert scores.parts["by_name"][[0, 2]].tolist() == [1, 3] and scores.parts["by_name"][1].isnan()
    nested = score([Weighted(Weighted(ones, 3, name="inner"), 2)])
    assert nested.rewards.tolist() == [6, 6, 6] and list(nested.parts) == ["inner"]


def test_a_completion_is_valid_when_any_reward_has_an_opinion():
    def some(completions):
        return [None, 1, None]

    scores = score([some, by_name], answer=[2, None, None])
    assert scores.valid.tolist() == [True, True, False]
    assert scores.rewards.tolist() == [2, 1, 0]


def test_a_reward_that_weighs_nothing_makes_no_completion_valid():
    def some(completions):
        return [None, 1, None]

    scores = score([some, Weighted(by_name, 0.0)], answer=[2, None, None])
    assert scores.valid.tolist() == scores.whole.tolist() == [False, True, False]
    assert scores.parts["by_name"].tolist()[0] == 2
    assert score([Weighted(some, 0.0)]).valid.tolist() == [False, True, False]  # nothing else to go by


def test_names_of_partials_lambdas_and_twins():
    half = functools.partial(by_name)
    scores = score([ones, ones, half, lambda completions: [0, 0, 0], Weighted(ones, name="ones")], answer=[1, 1, 1])
    assert list(scores.parts) == ["ones", "ones_2", "by_name", "lambda", "ones_3"]


def test_token_rewards_add_up_with_their_weights():
    def length_so_far(completion_ids):
        return [list(range(len(ids))) for ids in completion_ids]

    length_so_far.token_level = True
    scores = score([Weighted(TokenObject(), 2.0), length_so_far, ones])
    assert [row.tolist() for row in scores.token_rewards] == [[1, 2, 3], [0, 1], [0, 3, 6, 9]]
    assert scores.parts["length_so_far"].tolist() == [3, 1, 6]
    assert scores.parts["token_object"][[0, 2]].tolist() == [1.5, 6] and scores.parts["token_object"][1].isnan()
    assert scores.rewards.tolist() == [1, 1, 1]  # of the whole completion only
    alone = score([TokenObject()])
    assert alone.valid.tolist() == [True, False, True]
    assert alone.rewards.tolist() == [0, 0, 0]


def test_async_rewards_wait_for_each_other():
    both = asyncio.Barrier(2)  # passed only when two wait at once

    async def first(completions):
        await asyncio.wait_for(both.wait(), 10)
        return [1, 1, 1]

    async def second(completions):
        await asyncio.wait_for(both.wait(), 10)
        return [2, 2, 2]

    assert score([first, ones, second]).rewards.tolist() == [4, 4, 4]


def test_async_rewards_work_inside_a_running_loop_and_keep_theirs():
    loops = []

    async def reward(completions):
        loops.append(asyncio.get_running_loop())
        return [1, 1, 1]

    async def notebook():
        loops.append(asyncio.get_running_loop())
        return score([reward])

    assert asyncio.run(notebook()).rewards.tolist() == [1, 1, 1]
    assert score([reward]).rewards.tolist() == [1, 1, 1]
    assert loops[0] is not loops[1] and loops[1] is loops[2]


def test_setup_reaches_the_reward_inside():
    devices = []

    class Holder:
        def setup(self, device):
            devices.append(device)

        def __call__(self, completions):
            return [0.0] * len(completions)

    Scorer([Weighted(Holder(), 2), ones, Holder()]).setup("cpu")
    assert devices == ["cpu", "cpu"]


class Returns:
    def __init__(self, output):
        self.output = output

    def __call__(self, completions):
        return self.output


@pytest.mark.parametrize(
    "output",
    [
        [True, 2, 0.5],
        (1, 2, 0.5),
        torch.tensor([1, 2, 0.5], requires_grad=True),
        torch.tensor([1, 2, 0.5], dtype=torch.bfloat16),
        torch.tensor([1, 2, 0.5]).numpy(),
        list(torch.tensor([1, 2, 0.5], requires_grad=True)),
        list(torch.tensor([1, 2, 0.5]).numpy()),
    ],
)
def test_numbers_of_any_kind(output):
    rewards = score([Returns(output)]).rewards
    assert rewards.tolist() == [1, 2, 0.5]
    assert rewards.dtype == torch.float32 and not rewards.requires_grad


def test_numbers_keep_float32_whatever_the_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        scores = score([Returns([0.1, 0.2, 0.3]), Weighted(TokenObject(), 0.1)])
    finally:
        torch.set_default_dtype(torch.float32)
    assert scores.rewards.dtype == scores.token_rewards[0].dtype == torch.float32
    assert torch.equal(scores.rewards, torch.tensor([0.1, 0.2, 0.3]))


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ([1, 2], "'returns' returned 2 values for 3 completions"),
        (1.0, "returned float, not 3 numbers"),
        (None, "returned NoneType, not 3 numbers"),
        ("abc", "returned str, not 3 numbers"),
        (torch.tensor(1.0), "returned Tensor, not 3 numbers"),
        ([1, math.nan, 2], "returned nan at place 1; for no opinion return None"),
        (torch.tensor([1, 2, math.inf]), "returned inf at place 2"),
        ([None, 1e300, None], r"returned 1e\+300 at place 1"),
        ([1, "2", 3], r"returned \['int', 'str'\]: it must return plain numbers"),
        (torch.ones(3, 1), r"returned the shape \(3, 1\)"),
        ([torch.ones(2)] * 3, "must return plain numbers"),
    ],
)
def test_wrong_results_are_sentences(output, sentence):
    with pytest.raises(ValueError, match=sentence) as failure:
        score([ones, Returns(output)])
    assert "'returns'" in str(failure.value)


@pytest.mark.parametrize(
    ("output", "sentence"),
    [
        ([[0.0] * 3, [0.0] * 2, [0.0] * 3], "'tokens' returned 3 values for 4 tokens of completion 2"),
        ([1.0, 2.0, 3.0], "returned float, not 3 numbers: one for each of the tokens of completion 0"),
        ([[0.0] * 3, [0.0] * 2], "returned 2 values for 3 completions"),
        ([[0.0, None, 0.0], None, None], "returned None for a token"),
        ([[0.0, math.inf, 0.0], None, None], "returned inf at place 1"),
    ],
)
def test_wrong_token_rewards_are_sentences(output, sentence):
    reward = Returns(output)
    reward.token_level = True
    with pytest.raises(ValueError, match=sentence):
        score([Weighted(reward, name="tokens")])


async def async_raises(completions, **kwargs):
    raise KeyError("judge")


async def exits(completions, **kwargs):
    raise SystemExit(1)


def raises(completions, **kwargs):
    raise KeyError("judge")


@pytest.mark.parametrize("reward", [raises, async_raises, exits])
def test_what_a_reward_raises_is_named_and_chained(reward):
    with pytest.raises(RuntimeError, match=f"the reward '{reward.__name__}' raised") as failure:
        score([asynchronous, reward])  # the other one must not be left waiting: that would be a warning
    assert isinstance(failure.value.__cause__, (KeyError, SystemExit))


def test_out_of_memory_stays_what_it_is():
    def hungry(completions):
        raise torch.OutOfMemoryError("more")

    with pytest.raises(torch.OutOfMemoryError, match="more"):
        score([hungry])


def test_extra_columns_have_one_entry_a_completion():
    def reward(completions, log_extra):
        log_extra("short", [1])
        return [0, 0, 0]

    with pytest.raises(RuntimeError, match=r"'reward' raised .*log_extra\('short'\) got 1 values for 3 completions"):
        score([reward])


def test_a_missing_column_is_found_before_the_first_call():
    scorer = Scorer([ones, by_name])
    scorer.check(["answer", "other"])
    with pytest.raises(ValueError, match=r"'by_name' asks for \['answer'\], but .* are \['other'\]"):
        scorer.check(["other"])
    with pytest.raises(ValueError, match=r"'by_name' asks for \['answer'\]"):
        score([by_name])


@pytest.mark.parametrize(
    ("rewards", "error", "sentence"),
    [
        ([], ValueError, "rewards is empty"),
        ("mine.words", TypeError, "must be a list of callables, not 'mine.words'"),
        (ones, TypeError, "must be a list of callables"),
        (["mine.words"], TypeError, "'mine.words' is not a reward: import the function"),
        ([3], TypeError, "3 is not a reward: give a function"),
        ([TokenObject], TypeError, r"make an instance: TokenObject\(\.\.\.\)"),
    ],
)
def test_what_is_no_reward_is_refused_at_once(rewards, error, sentence):
    unchecked = inspect.unwrap(Scorer.__init__)  # as outside of the tests, where nothing checks types
    with pytest.raises(error, match=sentence):
        unchecked(object.__new__(Scorer), rewards)


def test_a_bare_model_is_refused(llama):
    with pytest.raises(TypeError, match="wrap it: RewardModel"):
        Scorer([llama])


def test_a_weight_is_a_finite_number():
    with pytest.raises(ValueError, match="finite number, not inf"):
        Weighted(ones, weight=math.inf)


# Weights that change


def constant(completions, **kwargs):
    return [1.0] * len(completions)


@pytest.mark.parametrize(("step", "weight"), [(0, 2.0), (5, 1.25), (10, 0.5), (99, 0.5)])
def test_a_weight_goes_to_its_final_value_in_a_straight_line(step, weight):
    scorer = Scorer([Weighted(constant, weight=2.0, final_weight=0.5, updates=10)])
    state = TrainerState(global_step=step)
    scores = scorer(prompts=["a"], completions=["b"], completion_ids=[[1]], finished=[True], state=state)
    assert scores.rewards.tolist() == [weight]
    assert scores.parts["constant"].tolist() == [1.0]


@pytest.mark.parametrize("options", [{"final_weight": 1.0}, {"updates": 3}, {"final_weight": 1.0, "updates": 0}])
def test_half_a_schedule_is_refused(options):
    with pytest.raises(ValueError, match="give both"):
        Weighted(constant, **options)
