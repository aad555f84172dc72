"""Transforms of data modules."""

import pytest

from lit_rlhf.data import AsChat, FirstWords, LastAnswer


def test_first_words_splits_the_text_into_prompt_and_reference():
    row = FirstWords(words=2)({"text": " A slow,\nlong film. ", "stars": 4})
    assert row == {"text": " A slow,\nlong film. ", "stars": 4, "prompt": "A slow,", "reference": "\nlong film."}


@pytest.mark.parametrize("text", ["", "  ", "one", "one two", " one  two\n"])
def test_first_words_drops_a_text_without_words_after_the_prompt(text):
    assert FirstWords(words=2)({"text": text}) is None


def test_first_words_errors():
    with pytest.raises(ValueError, match="FirstWords needs the column 'body'; the data have 'text', 'id'"):
        FirstWords("body")({"text": "a b", "id": 1})
    with pytest.raises(ValueError, match="FirstWords needs a string in the column 'text', not None"):
        FirstWords()({"text": None})
    with pytest.raises(ValueError, match="words=0"):
        FirstWords(words=0)


def test_last_answer_splits_before_the_last_answer():
    dialogue = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: Because."
    row = LastAnswer()({"chosen": dialogue, "rejected": "x"})
    assert row["prompt"] + row["completion"] == row["chosen"] == dialogue
    assert row["prompt"].endswith("Why?\n\nAssistant:") and row["completion"] == " Because." and row["rejected"] == "x"


@pytest.mark.parametrize("text", ["", "Human: Hi", "\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"])
def test_last_answer_drops_a_dialogue_without_an_answer(text):
    assert LastAnswer()({"chosen": text}) is None


def test_last_answer_errors():
    with pytest.raises(ValueError, match="LastAnswer needs the column 'chosen'"):
        LastAnswer()({"text": "a"})
    with pytest.raises(ValueError, match="LastAnswer needs a string in the column 'chosen', not 3"):
        LastAnswer()({"chosen": 3})


def test_as_chat_makes_messages_of_a_question():
    row = {"question": "2 + 2?", "answer": "4"}
    assert AsChat()(row) == {**row, "prompt": [{"role": "user", "content": "2 + 2?"}]}
    messages = AsChat(instruction="Be brief.", system="You count.")(row)["prompt"]
    assert messages == [
        {"role": "system", "content": "You count."},
        {"role": "user", "content": "2 + 2?\nBe brief."},
    ]
    with pytest.raises(ValueError, match="AsChat needs the column 'task'"):
        AsChat("task")(row)
