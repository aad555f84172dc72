"""Rewards that check an answer or its form."""

import threading

import pytest

import lit_rlhf
from lit_rlhf.errors import InputError
from lit_rlhf.rewards import Format, MathAnswer, SoftOverlong
from runs import make_data, make_module, make_trainer, vowels

ANSWERS = [
    (r"so it is \boxed{\frac{1}{2}}", "0.5", 1.0),
    ("The answer is 1,450.", "1450", 1.0),
    ("First 3, then 4, so the answer is 12", "12", 1.0),
    ("The answer is 13", "12", 0.0),
    ("I do not know", "12", 0.0),
    (r"$x^2 + 2x + 1$", r"(x+1)^2", 1.0),
    (r"\boxed{3x + 2}", "3x+2", 1.0),
    (r"\boxed{3}", "2x + 3", 0.0),
    (r"\boxed{3 + 4i}", "3 + 4i", 1.0),
    (r"\boxed{4}", "3 + 4i", 0.0),
    (r"\boxed{1,-2}", "1,-2", 1.0),
    (r"\boxed{1,2,3}", "1,2,3", 1.0),
    (r"\boxed{2.3}", "2,3", 0.0),
    (r"\boxed{2^{10}}", "2^{10}", 1.0),
    (r"\boxed{1024}", "2^{10}", 1.0),
    (r"\boxed{72}", "The result is 72 apples", 1.0),
    ("It costs 1234 dollars", "1,234", 1.0),
    ("7", "7.0", 1.0),
    ("5", "5 cm", 1.0),
    (r"\boxed{\sin x}", r"\sin x", 1.0),
    (r"\boxed{\{1, 2\}}", r"\{2, 1\}", 1.0),
    ("It is 50%", "0.5", 1.0),
    ("72", "Natalia sold 48/2 = 24 clips in May.\n#### 72", 1.0),
    ("12", ["11", "12"], 1.0),
    ("12", 12.0, 1.0),
    ([{"role": "assistant", "content": "It is 12"}], "12", 1.0),
    ("(1,2)", "(1,2)", 1.0),
    ("x^2+1", "x^2 + 1", 1.0),
    ("x^2+1", "x^2 - 1", 0.0),
    ("sqrt(2)", r"\sqrt{2}", 1.0),
    ("10^{3}", "1000", 1.0),
    ("3:2", "3:2", 1.0),
    ("B", "B", 1.0),
    ("B", "A", 0.0),
    ("2 + 3 = 5", "5", 1.0),
    ("It is $x^2+1$", "x^2+1", 1.0),
    (r"First \boxed{3}. So finally \boxed{4}.", "4", 1.0),
    (r"\boxed{3} and \boxed{4}", r"\{3, 4\}", 1.0),
    ("**42**", "42", 1.0),
    ("**42**.", "42", 1.0),
    ("**Answer:** 42", "42", 1.0),
    ("Therefore, 42", "42", 1.0),
    ("Thus: 42", "42", 1.0),
    ("A: 42", "42", 1.0),
    ("It's 42", "42", 1.0),
    ("42 (a guess)", "42", 1.0),
    ("<answer>42</answer>", "42", 1.0),
    ("*42*", "42", 1.0),
    ("`42`", "42", 1.0),
    (r"\[42\]", "42", 1.0),
    ("Answer:42", "42", 1.0),
    ("Answer:-42", "-42", 1.0),
    ("答案是42", "42", 1.0),
    ("Ответ: 42", "42", 1.0),
    ("\u221242", "-42", 1.0),
    ("x_1 + x_2", "x_1+x_2", 1.0),
    ("2*3*4", "24", 1.0),
    ("Therefore, 41", "42", 0.0),
    ("42", "Answer: 42", 1.0),
    ("2xy", "2xy", 1.0),
    ("2xy", "2x", 0.0),
    ("12", None, None),
    ("nan", float("nan"), None),
    ("12", "no mathematics", None),
]


@pytest.mark.parametrize(("completion", "answer", "expected"), ANSWERS, ids=str)
def test_answers_are_compared_by_value(completion, answer, expected):
    assert MathAnswer(pattern="#### (.+)")([completion], answer=[answer]) == [expected]


def test_answers_are_compared_in_other_threads_too():
    found = []
    thread = threading.Thread(target=lambda: found.extend(MathAnswer()(["so 12"], answer=["12"])))
    thread.start()
    thread.join()
    assert found == [1.0]


@pytest.mark.parametrize(
    ("completion", "options", "expected"),
    [
        ("<think>a\nb</think>\n<answer>4</answer>", {}, 1.0),
        ("<think>a</think> and <answer>4</answer>", {}, 0.0),
        ("<answer>4</answer><think>a</think>", {}, 0.0),
        ("<think>a</think><answer>4", {}, 0.0),
        ("<think> </think><answer>4</answer>", {}, 0.0),
        ("<think>a</think><think>b</think><answer>4</answer>", {}, 0.0),
        ("<think>a<answer>b</think><answer>4</answer>", {}, 0.0),
        ("a</think><answer>4</answer>", {"opened": True}, 1.0),
        ("<think>a</think><answer>4</answer>", {"opened": True}, 0.0),
        ("<a.b>x</a.b>", {"tags": ["a.b"]}, 1.0),
        ("<acb>x</acb>", {"tags": ["a.b"]}, 0.0),
    ],
    ids=str,
)
def test_format_wants_each_tag_once_and_in_order(completion, options, expected):
    assert Format(**options)([completion]) == [expected]
    assert Format(**options)([[{"role": "assistant", "content": completion}]]) == [expected]


def test_format_of_a_long_completion_is_read_in_linear_time():
    assert Format()(["<think>" + "<" * 20_000 + "a" * 20_000]) == [0.0]
    assert Format(opened=True)([" " * 1_000_000]) == [0.0]  # by square time it would not end


def test_soft_overlong_is_the_published_penalty():
    lengths = [0, 80, 81, 90, 100, 101]
    penalties = SoftOverlong(maximum=100, buffer=20)(completion_ids=[[1] * length for length in lengths])
    assert penalties == pytest.approx([0.0, 0.0, -0.05, -0.5, -1.0, -1.0])


@pytest.mark.parametrize("weighted", [False, True])
def test_soft_overlong_refuses_a_limit_at_which_it_has_no_effect(tiny, tmp_path, weighted):
    def fit(maximum: int) -> None:
        reward = SoftOverlong(maximum=maximum, buffer=8)
        rewards = [vowels, lit_rlhf.rewards.Weighted(reward, 0.5) if weighted else reward]
        module = make_module("DAPO", tiny, rewards=rewards, max_new_tokens=4)
        make_trainer(tmp_path, max_steps=1, limit_val_batches=0).fit(module, make_data("DAPO"))

    fit(11)
    with pytest.raises(InputError, match=r"begins above 4 tokens .* at most max_new_tokens=4: set maximum to that"):
        fit(12)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SoftOverlong(10, 11), "buffer=11 must be between 1 and maximum=10"),
        (lambda: Format(tags=[]), r"tags=\[\] must be a list of names"),
        (lambda: MathAnswer(pattern="("), "is not a regular expression"),
        (lambda: MathAnswer(timeout=0), "timeout=0 must be at least 1 second"),
    ],
)
def test_bad_options_are_one_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()
