"""A prompt that string completions repeat at their start is cut off there, if the data do so throughout."""

import logging

import pytest

from lit_rlhf.data import read_demonstration, read_preference, read_prompt
from lit_rlhf.data.encoding import read_examples


def pair(prompt, chosen, rejected):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def completions(rows, read=read_preference):
    return [example.completions for example in read_examples(rows, read).values()]


def test_a_repeated_prompt_is_cut_and_reported(caplog):
    caplog.set_level(logging.INFO)
    rows = [pair(f"Question {i}:", f"Question {i}: yes", f"Question {i}:\nno") for i in range(3)]
    assert completions(rows) == [(" yes", "\nno")] * 3
    assert "3 of 3 rows repeat the prompt at the start of their completions: cut off" in caplog.messages
    rows = [{"prompt": f"2+{i}=", "completion": f"2+{i}={2 + i}"} for i in range(3)]
    assert completions(rows, read_demonstration) == [("2",), ("3",), ("4",)]
    assert completions([pair("天空是", "天空是蓝", "天空是绿")]) == [("蓝", "绿")]


def test_answers_of_prompts_are_cut_too():
    rows = [{**pair("Why?", "Why? So.", "Why? No."), "other": "Why? Me."}]
    (example,) = read_examples(rows, read_prompt).values()
    assert example.columns == {"chosen": " So.", "rejected": " No.", "other": "Why? Me."}


@pytest.mark.parametrize(
    "row",
    [
        pair("The sky is", "The sky is blue", "green"),
        pair("The sky is", "The sky was", "The sky is green"),
        pair("The cat", "The cats sleep", "The catalogue"),
        pair("Why?", "Why?", "Why? No."),
        pair("", "a", "b"),
    ],
)
def test_a_prompt_that_is_repeated_in_part_stays(row):
    assert completions([row]) == [(row["chosen"], row["rejected"])]


def test_a_few_answers_that_begin_like_their_prompt_stay():
    rows = [{"prompt": "Hello", "completion": "Hello, you!"}] + [{"prompt": "a b", "completion": "c"}] * 2
    assert completions(rows, read_demonstration) == [("Hello, you!",), ("c",), ("c",)]
