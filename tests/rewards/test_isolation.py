"""Rewards get copies: what one changes reaches neither another reward nor the data."""

import copy
import threading

import pytest

from lit_rlhf.evaluation.judges import SymmetricJudge
from lit_rlhf.rewards import Scorer


def spoil(**arguments):
    """Change everything in place, at every depth."""
    for value in arguments.values():
        if isinstance(value, list):
            for item in value:
                _spoil(item)
            value.append("spoilt")
    arguments.get("trainer_state").global_step = 99
    return [0.0] * (len(arguments["completions"]) - 1)


def _spoil(item):
    if isinstance(item, list):
        for part in item:
            _spoil(part)
        item.append(99)
    elif isinstance(item, dict):
        for part in item.values():
            _spoil(part)
        item["content"] = "spoilt"


def turn(role, text):
    return [{"role": role, "content": [{"type": "text", "text": text}]}]


def chat():
    return dict(
        prompts=[turn("user", "a"), turn("user", "b")],
        completions=[
            [turn("assistant", "c"), turn("assistant", "d")],
            [turn("assistant", "e"), turn("assistant", "f")],
        ],
        completion_ids=[[[1, 2], [3]], [[4], []]],
        finished=[[True, False], [True, True]],
        columns={"tools": [[{"name": "x"}], [{"name": "y"}]], "answer": ["7", None]},
    )


async def spoil_async(**arguments):
    return spoil(**arguments)


@pytest.mark.parametrize("first", [spoil, spoil_async])
def test_what_a_reward_changes_does_not_reach_the_next_one(first):
    received = []

    def reward(**arguments):
        received.append(copy.deepcopy({k: v for k, v in arguments.items() if isinstance(v, list)}))
        assert arguments["trainer_state"].global_step == 0
        return [0.0] * len(arguments["completions"])

    given = chat()
    Scorer([first, reward])(**given)
    assert given == chat()
    Scorer([reward])(**chat())
    assert received[0] == received[1]


def test_completions_of_a_prompt_do_not_share_its_messages():
    def extends(prompts, completions):
        for prompt, completion in zip(prompts, completions, strict=True):
            prompt.extend(completion)
        return [float(len(prompt)) for prompt in prompts]

    assert Scorer([extends])(**chat()).rewards.tolist() == [[2, 2], [2, 2]]


def test_what_a_reward_logs_is_kept_as_it_was():
    buffer = [{"n": 0}] * 4

    def reward(completions, log_extra):
        log_extra("note", buffer)
        buffer[0]["n"] = 1
        return [0.0] * 4

    assert Scorer([reward])(**chat()).reward_extras == {"note": [[{"n": 0}, {"n": 0}], [{"n": 0}, {"n": 0}]]}


def test_an_object_that_cannot_be_copied_is_passed_as_it_is():
    lock = threading.Lock()

    def reward(completions, lock):
        return [float(item is held) for item in lock]

    held = lock
    assert Scorer([reward])(**{**chat(), "columns": {"lock": [lock, lock]}}).rewards.tolist() == [[1, 1], [1, 1]]


def test_what_a_judge_changes_does_not_reach_the_other_order():
    def judge(prompts, completions, opponents):
        sizes = [len(text) for texts in (prompts, completions, opponents) for text in texts]
        for text in (*prompts, *completions, *opponents):
            text.append({"role": "user", "content": ""})
        return [0.5 if sizes == [1, 1, 1] else 1.0]

    given = turn("user", "a"), turn("assistant", "b"), turn("assistant", "c")
    wins, bias = SymmetricJudge(judge)([given[0]], [given[1]], [given[2]], {}, None)
    assert wins.tolist() == [0.5] and bias.tolist() == [0]
    assert given == (turn("user", "a"), turn("assistant", "b"), turn("assistant", "c"))
