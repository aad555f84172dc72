"""Row functions."""

import pytest

from lit_rlhf.data import FirstWords


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
