"""From people's ratings to models: what is asked of whom, and what is held out."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.testbed import ratings
from lit_rlhf.testbed.ratings import Rated

WORDS = ("awful dull plain fine lovely".split(), "film book play song tale".split())


def rated_texts(n=60):
    texts = [f"{i} {worth} {noun}s or more, of many." for i in range(n) for worth, noun in [pick(i)]]
    return [Rated(text, tuple(float(WORDS[0].index(text.split()[1]) - 2 + d) for d in (-1, 0, 0, 1))) for text in texts]


def pick(i):
    return list(itertools.product(*WORDS))[i * 7 % 25]


def test_nothing_that_is_held_out_stands_anywhere_else():
    rated = rated_texts()
    for_reward, for_judge, test = ratings.split([*rated, rated[3]], held_out=10)
    parts = [{one.text for one in part} for part in (for_reward, for_judge, test)]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert rated[3].text in parts[2] and len(test) == 10
    assert abs(len(for_reward) - len(for_judge)) <= 1


def test_a_text_repeated_among_the_held_out_counts_once():
    rated = rated_texts(20)
    assert len(ratings.split([*rated, rated[-1]], held_out=5)[2]) == 4


@pytest.mark.parametrize(
    ("first", "second", "likely"),
    [
        ((1.0, 2.0), (0.0, -1.0), 1.0),
        ((1.0, 1.0), (1.0, 1.0), 0.5),
        ((0.0, 2.0), (1.0, 1.0), 0.5),
        ((2.0, 1.0), (1.0, 0.0), 0.875),
    ],
)
def test_how_likely_raters_prefer(first, second, likely):
    assert ratings.preference(Rated("a", first), Rated("b", second)) == likely
    assert ratings.preference(Rated("b", second), Rated("a", first)) == 1 - likely


def test_the_chosen_text_is_what_a_rater_of_each_put_higher_more_often():
    rated = {one.text: one for one in rated_texts()}
    rows = ratings.asked_pairs([*rated.values()], 400, seed=0)
    likely = [ratings.preference(rated[row["chosen"]], rated[row["rejected"]]) for row in rows]
    assert len(rows) == 400 and sum(likely) / len(likely) > 0.75
    assert any(value < 0.5 for value in likely)  # raters are not always of one mind
    assert rows == ratings.asked_pairs([*rated.values()], 400, seed=0) != ratings.asked_pairs([*rated.values()], 400, 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_agreement_is_that_with_the_majority(sign):
    rated = rated_texts()

    def model(prompts, completions):
        means = {one.text: sum(one.ratings) for one in rated}
        return torch.tensor([sign * means[text] for text in completions])

    right, raters = ratings.agreement(model, rated, n=500)
    assert right == (sign + 1) / 2
    assert 0.7 < raters < 1


def test_what_is_liked_is_what_has_a_preferred_ending():
    rows = ratings.prompt_rows([Rated("One two three four.", (4.0, 5.0)), Rated("Five six seven eight.", (1.0, 2.0))])
    assert rows == [{"prompt": "One two three", "preferred": " four."}, {"prompt": "Five six seven", "preferred": None}]


def test_the_tokenizer_writes_any_text_again():
    tokenizer = ratings.make_tokenizer(["a plain film", "a fine film"] * 5, 300)
    ids = tokenizer("a fine café!")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<bos>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a fine café!"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "ratings": [1, None]},
        {"text": "a", "ratings": [1]},
        {"text": None, "ratings": [1, 2]},
        {"text": "a"},
    ],
)
def test_what_is_not_rated_gets_a_sentence(row, tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_text(json.dumps({"text": "x", "ratings": [1, 2]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"row 1 of .*needs a string `text` and a list `ratings`"):
        ratings.read_rated(path)


def test_ratings_that_are_all_equal_get_a_sentence(tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_text((json.dumps({"text": "x", "ratings": [3, 3]}) + "\n") * 3)
    with pytest.raises(ValueError, match=r"all ratings in .* are equal"):
        ratings.read_rated(path)


def test_too_few_texts_get_a_sentence():
    with pytest.raises(ValueError, match="6 rated texts are too few to hold 4"):
        ratings.split(rated_texts(6), held_out=4)


@pytest.mark.filterwarnings("ignore")
def test_the_whole_way(tmp_path, capsys):
    path = tmp_path / "rated.jsonl"
    rows = [{"text": one.text, "ratings": one.ratings} for one in rated_texts()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = dict(num_pairs=32, epochs=1, vocabulary=300, hidden=32, layers=1)
    ratings.build(path, tmp_path / "out", held_out=10, **small)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "policy").config.hidden_size == 32
    test = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert train and not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len(test) == 10 and {row["preferred"] is None for row in test} == {True, False}
    told = capsys.readouterr().out
    assert "reward_model: with the majority" in told and "judge: with the majority" in told


def test_one_half_of_equal_ratings_gets_a_sentence():
    with pytest.raises(ValueError, match="all ratings of these 3 texts are equal"):
        ratings.asked_pairs([ratings.Rated(text, (5.0, 5.0)) for text in "abc"], 4, seed=0)


def test_raters_who_lean_to_neither_side_get_a_sentence():
    split = [ratings.Rated(text, (1.0, 5.0)) for text in "ab"]
    with pytest.raises(ValueError, match="do the raters lean to one side"):
        ratings.agreement(lambda prompts, texts: torch.zeros(len(texts)), split)
