"""Pairwise judges with known opinions."""

import functools
import math

import pytest

import lit_rlhf
from judged import OPINIONS, prefers, rows_of, validate
from runs import make_module


def opinion(text):
    return OPINIONS.get(text, 0.0)


@pytest.mark.parametrize(
    ("choose", "rate", "bias"),
    [
        (lambda a, b: 0.5 * (opinion(a) == opinion(b)) + (opinion(a) > opinion(b)), 0.625, 0.0),
        (lambda a, b: 1.0, 0.5, 0.5),
        (lambda a, b: 0.0, 0.5, -0.5),
        (lambda a, b: 0.9 if opinion(a) >= opinion(b) else 0.3, 0.575, 0.175),
    ],
    ids=["unbiased", "first", "second", "partly biased"],
)
def test_a_pairwise_judge_is_asked_in_both_orders(choose, rate, bias, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=prefers(choose), compare_to="reference")
    metrics = validate(module, rows_of("worse", "same", "better", "worse"), tmp_path)
    assert metrics["val/win_rate"] == pytest.approx(rate)
    assert metrics["val/position_bias"] == pytest.approx(bias)
    assert metrics["val/win_rate_low"] < rate < metrics["val/win_rate_high"]
    assert metrics["val/undecided"] == 0 and "val/judge" not in metrics


def test_an_undecided_answer_is_ignored_by_the_win_rate(tiny, tmp_path):
    def choose(a, b):
        return None if "nobody can tell" in (a, b) else float(opinion(a) > opinion(b))

    module = make_module("RLOO", tiny, judge=prefers(choose), compare_to="reference")
    metrics = validate(module, rows_of("worse", "nobody can tell", "better", "worse", "nobody can tell"), tmp_path)
    assert metrics["val/win_rate"] == pytest.approx(2 / 3)
    assert metrics["val/undecided"] == pytest.approx(2 / 5)


def test_a_row_without_an_opponent_is_not_compared(tiny, tmp_path):
    seen = []

    def choose(a, b):
        seen.append({a, b})
        return 0.5

    module = make_module("RLOO", tiny, judge=prefers(choose), compare_to="reference")
    metrics = validate(module, rows_of("worse", None, None), tmp_path)
    assert len(seen) == 2 and all("worse" in pair for pair in seen)
    assert metrics["val/undecided"] == pytest.approx(2 / 3)


def test_a_pairwise_judge_compares_with_the_reference_policy(tiny, tmp_path):
    metrics = validate(
        make_module("RLOO", tiny, judge=prefers(lambda a, b: 0.5 + 0.5 * (a != b))), rows_of("a"), tmp_path
    )
    assert metrics["val/win_rate"] == 0.5 and metrics["val/position_bias"] == 0  # the untrained policy writes the same


@pytest.mark.parametrize(
    ("answer", "message"),
    [(2.0, "returned 2 at index 0.*from 0"), ("A", "returned .*'str'"), (math.nan, "returned nan")],
)
def test_an_invalid_answer_raises(answer, message, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=prefers(lambda a, b: answer), compare_to="reference")
    with pytest.raises(ValueError, match=message):
        validate(module, rows_of("worse"), tmp_path)


def test_exceptions_of_a_judge_name_it(tiny, tmp_path):
    def pairs(prompts, completions, opponents):
        raise OSError("no credit left")

    pairs.pairwise = True
    with pytest.raises(RuntimeError, match="the judge 'pairs' raised OSError: no credit left"):
        validate(make_module("RLOO", tiny, judge=pairs), rows_of("a"), tmp_path)


def test_an_async_pairwise_judge_receives_the_columns(tiny, tmp_path):
    second = []

    async def pairs(opponents, reference):
        second.append(opponents == reference)
        return [0.25] * len(opponents)

    pairs.pairwise = True
    module = make_module("RLOO", tiny, judge=pairs, compare_to="reference")
    assert validate(module, rows_of("a", "b"), tmp_path)["val/win_rate"] == 0.5
    assert second == [True, False]


@pytest.mark.parametrize("wrap", [functools.partial, lit_rlhf.Weighted])
def test_a_pairwise_judge_may_be_wrapped(wrap, tiny, tmp_path):
    module = make_module("RLOO", tiny, judge=wrap(prefers(lambda a, b: 1.0)))
    assert validate(module, rows_of("a"), tmp_path)["val/position_bias"] == 0.5
