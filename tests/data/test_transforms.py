"""Row functions."""

import pytest

from lit_rlhf.data import FirstWords, LastAnswer


def test_the_prompt_and_its_reference_are_the_text():
    row = FirstWords(words=2)({"text": " A fine,\nlong film. ", "stars": 4})
    assert row == {"text": " A fine,\nlong film. ", "stars": 4, "prompt": "A fine,", "reference": "\nlong film."}


@pytest.mark.parametrize("text", ["", "  ", "one", "one two", " one  two\n"])
def test_a_text_with_nothing_after_the_prompt_is_dropped(text):
    assert FirstWords(words=2)({"text": text}) is None


def test_what_can_not_be_cut_gets_a_sentence():
    with pytest.raises(ValueError, match="no column 'body' to take first words of; the data have 'text', 'id'"):
        FirstWords("body")({"text": "a b", "id": 1})
    with pytest.raises(ValueError, match="'text' holds None"):
        FirstWords()({"text": None})
    with pytest.raises(ValueError, match="words=0"):
        FirstWords(words=0)


def test_a_dialogue_is_cut_before_its_last_answer():
    dialogue = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Why?\n\nAssistant: Because."
    row = LastAnswer()({"chosen": dialogue, "rejected": "x"})
    assert row["prompt"] + row["completion"] == row["chosen"] == dialogue
    assert row["prompt"].endswith("Why?\n\nAssistant:") and row["completion"] == " Because." and row["rejected"] == "x"


@pytest.mark.parametrize("text", ["", "Human: Hi", "\n\nHuman: Hi\n\nAssistant: ", "\n\nHuman: Hi\n\nAssistant:"])
def test_a_dialogue_without_an_answer_is_dropped(text):
    assert LastAnswer()({"chosen": text}) is None


def test_what_is_no_dialogue_gets_a_sentence():
    with pytest.raises(ValueError, match="no column 'chosen' to take an answer of"):
        LastAnswer()({"text": "a"})
    with pytest.raises(ValueError, match="'chosen' holds 3: an answer can be taken of a string only"):
        LastAnswer()({"chosen": 3})
