"""Rule-based rewards and the sentiment reward."""

import inspect
import sys

import pytest

from lit_rlhf.data.sources import load_rows
from lit_rlhf.rewards import ExactMatch, Length, RegexMatch, Repetition, Scorer, Sentiment, Weighted, to_text


def messages(text):
    return [{"role": "assistant", "content": text}]


def test_to_text_of_strings_messages_and_content_blocks():
    blocks = [{"type": "text", "text": "a"}, {"type": "image"}, {"type": "text", "text": "b"}]
    assert to_text("abc") == "abc"
    assert to_text(messages("abc")) == "abc"
    assert (
        to_text([*messages("a"), {"role": "tool", "content": None}, {"role": "assistant", "content": blocks}])
        == "a\n\nab"
    )


def test_length_is_zero_within_the_bounds_and_negative_outside():
    reward = Length(minimum=4, maximum=8)
    values = reward(completions=[""] * 5, completion_ids=[[0] * n for n in (0, 2, 4, 8, 16)])
    assert values == [-1, -0.5, 0, 0, -1]


@pytest.mark.parametrize("conversational", [False, True])
def test_length_in_words_and_chars(conversational):
    texts = ["two words", "a b c d"]
    completions = [messages(text) for text in texts] if conversational else texts
    ids = [[0], [0]]
    assert Length(maximum=2, unit="words")(completions, ids) == [0, -1]
    assert Length(minimum=18, unit="chars")(completions, ids) == [-0.5, 7 / 18 - 1]


@pytest.mark.parametrize("bounds", [(0, None), (-1, 3), (5, 4), (0, 0)])
def test_length_rejects_impossible_bounds(bounds):
    with pytest.raises(ValueError, match="Length"):
        Length(*bounds)


def test_length_rejects_an_unknown_unit():
    with pytest.raises(ValueError, match="tokens, words or chars, not 'lines'"):
        inspect.unwrap(Length.__init__)(
            object.__new__(Length), 1, 2, "lines"
        )  # unwrapped, since types are only checked in tests


def test_regex_match_searches_or_matches_the_full_completion():
    completions = ["<a>x\ny</a>", "<a>x</a> and more", messages("<a></a>"), "none"]
    assert RegexMatch(r"(?s)<a>.*</a>")(completions) == [1, 1, 1, 0]
    assert RegexMatch(r"(?s)<a>.*</a>", full=True)(completions) == [1, 0, 1, 0]
    with pytest.raises(ValueError, match=r"'\(' is not a regular expression"):
        RegexMatch("(")


def test_exact_match_compares_with_a_column():
    reward = ExactMatch()
    assert reward(["  The   End", "the", "x"], answer=["the end", "The end", None]) == [1, 0, None]
    assert ExactMatch(normalise=False)([" a"], answer=["a"]) == [0]
    assert reward(["42", "7"], answer=[messages("42")] * 2) == [1, 0]
    gold = ExactMatch("gold", pattern=r"#### (.+)")
    assert gold(["#### 1 no\n#### 42", messages("#### 42 "), "42"], gold=[42, "42", "42"]) == [1, 1, 0]


def test_exact_match_reads_reference_answers_by_the_same_pattern():
    reward = ExactMatch("solution", pattern=r"#### (.+)")
    worked = "3 boxes of 24 are 72 pens.\n#### 72"
    assert reward(["so 72\n#### 72", "#### 71", "72"], solution=[worked] * 3) == [1, 0, 0]
    assert reward(["#### 72", "#### b"], solution=["72", messages("it is\n#### B")]) == [1, 1]
    empty = ExactMatch(pattern=r"<a>(.*?)</a>")
    assert empty(["<a></a>", "<a></a>"], answer=["<a></a>", "<a>x</a>"]) == [0, 0]  # an empty answer is none


def test_exact_match_accepts_any_of_a_list_of_answers():
    assert ExactMatch()(["nyc", "Boston", "5"], answer=[["New York", "NYC"], ["New York", "NYC"], [4, 5.0]]) == [
        1,
        0,
        1,
    ]


def test_exact_match_ignores_the_commas_of_thousands_and_no_other_difference():
    texts = ["1450", "1,234,567", "1,45", "18.0", "$18", "007"]
    answers = ["1,450", "1234567", "145", "18", "18", "7"]
    assert ExactMatch()(texts, answer=answers) == [1, 1, 0, 0, 0, 0]
    assert ExactMatch(normalise=False)(["1450"], answer=["1,450"]) == [0]


def test_exact_match_with_integers_from_a_table_with_an_empty_field(tmp_path):
    (tmp_path / "rows.csv").write_text("prompt,answer\na,42\nb,\nc,7\nd,-1\n")
    answers = [row["answer"] for row in load_rows(str(tmp_path / "rows.csv"))]
    assert ExactMatch()(["42", "x", "7", "-1"], answer=answers) == [1, None, 1, 1]
    assert ExactMatch()(["nan", "x", "5"], answer=[float("nan"), [], [None, "5"]]) == [None, None, 1]


def test_exact_match_reports_a_missing_column_before_the_first_call():
    with pytest.raises(ValueError, match=r"'exact_match' asks for \['gold'\]"):
        Scorer([Weighted(ExactMatch("gold"))]).check(["answer"])


def test_repetition_counts_repeated_ngrams():
    assert Repetition(2)(["a b c d", "great great great great", "", "one"]) == [0, pytest.approx(-2 / 3), 0, 0]
    assert Repetition(1)(["The the cat"]) == [pytest.approx(-1 / 3)]
    with pytest.raises(ValueError, match="not 0"):
        Repetition(0)


def test_sentiment_orders_good_neutral_and_bad():
    prompts, completions = ["It was", "It was", "It was"], [" wonderful!", " terrible.", " a chair."]
    good, bad, neutral = Sentiment()(prompts, completions)
    assert -1 <= bad < -0.3 < neutral == 0 < 0.3 < good <= 1


def test_sentiment_of_prompt_and_completion_as_one_text():
    prompts, completions = ["This film is not"], [" good"]
    assert Sentiment()(prompts, completions)[0] > 0 > Sentiment(with_prompt=True)(prompts, completions)[0]
    joined = Sentiment(with_prompt=True)([[{"role": "user", "content": "I hate it"}]], [messages("So do I")])
    assert joined[0] < 0


def test_sentiment_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "vaderSentiment.vaderSentiment", None)
    with pytest.raises(ImportError, match=r"pip install 'lit_rlhf\[sentiment\]'"):
        Sentiment()


def test_rule_based_rewards_in_the_scorer():
    rewards = [Length(maximum=3), RegexMatch("x"), ExactMatch(), Repetition(), Sentiment(), Weighted(Length(2), 0.5)]
    scores = Scorer(rewards)(["p"], [["x x x"]], [[[1, 2, 3, 4]]], [[True]], {"answer": ["x x x"]})
    expected = ["length", "regex_match", "exact_match", "repetition", "sentiment", "length_2"]
    assert list(scores.component_rewards) == expected
    assert scores.rewards.item() == pytest.approx(-1 / 3 + 1 + 1 - 1 / 2 + 0 + 0)
