"""From human ratings to models: preferences, splits and held-out data."""

import itertools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from lit_rlhf.testbed import ratings
from lit_rlhf.testbed.ratings import Rated

WORDS = ("awful dull plain good lovely".split(), "film book play song tale".split())


def rated_texts(n=60):
    texts = [f"{i} {adjective} {noun}s or more, of many." for i in range(n) for adjective, noun in [pick(i)]]
    return [Rated(text, tuple(float(WORDS[0].index(text.split()[1]) - 2 + d) for d in (-1, 0, 0, 1))) for text in texts]


def pick(i):
    return list(itertools.product(*WORDS))[i * 7 % 25]


def test_held_out_texts_are_in_no_other_split():
    rated = rated_texts()
    for_reward, for_judge, test = ratings.split([*rated, rated[3]], held_out=10)
    parts = [{item.text for item in part} for part in (for_reward, for_judge, test)]
    assert not any(a & b for a, b in itertools.combinations(parts, 2))
    assert rated[3].text in parts[2] and len(test) == 10
    assert abs(len(for_reward) - len(for_judge)) <= 1


def test_duplicate_held_out_texts_are_kept_once():
    rated = rated_texts(20)
    assert len(ratings.split([*rated, rated[-1]], held_out=5)[2]) == 4


@pytest.mark.parametrize(
    ("first", "second", "probability"),
    [
        ((1.0, 2.0), (0.0, -1.0), 1.0),
        ((1.0, 1.0), (1.0, 1.0), 0.5),
        ((0.0, 2.0), (1.0, 1.0), 0.5),
        ((2.0, 1.0), (1.0, 0.0), 0.875),
    ],
)
def test_preference_probability(first, second, probability):
    assert ratings.preference(Rated("a", first), Rated("b", second)) == probability
    assert ratings.preference(Rated("b", second), Rated("a", first)) == 1 - probability


def test_chosen_texts_are_rated_higher_by_most_raters():
    rated = {item.text: item for item in rated_texts()}
    rows = ratings.rated_pairs([*rated.values()], 400, seed=0)
    probability = [ratings.preference(rated[row["chosen"]], rated[row["rejected"]]) for row in rows]
    assert len(rows) == 400 and sum(probability) / len(probability) > 0.75
    assert any(value < 0.5 for value in probability)  # raters disagree
    assert rows == ratings.rated_pairs([*rated.values()], 400, seed=0) != ratings.rated_pairs([*rated.values()], 400, 1)


@pytest.mark.parametrize("sign", [1, -1])
def test_agreement_is_with_the_majority(sign):
    rated = rated_texts()

    def model(prompts, completions):
        means = {item.text: sum(item.ratings) for item in rated}
        return torch.tensor([sign * means[text] for text in completions])

    accuracy, raters = ratings.agreement(model, rated, n=500)
    assert accuracy == (sign + 1) / 2
    assert 0.7 < raters < 1


def test_better_rated_half_has_a_preferred_ending():
    rows = ratings.prompt_rows([Rated("One two three four.", (4.0, 5.0)), Rated("Five six seven eight.", (1.0, 2.0))])
    assert rows == [{"prompt": "One two three", "preferred": " four."}, {"prompt": "Five six seven", "preferred": None}]


def test_tokenizer_round_trips_any_text():
    tokenizer = ratings.make_tokenizer(["a plain film", "a lovely film"] * 5, 300)
    ids = tokenizer("a lovely café!")["input_ids"]
    assert tokenizer.convert_ids_to_tokens(ids)[0] == "<bos>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "a lovely café!"


@pytest.mark.parametrize(
    "row",
    [
        {"text": "a", "ratings": [1, None]},
        {"text": "a", "ratings": [1]},
        {"text": None, "ratings": [1, 2]},
        {"text": "a"},
    ],
)
def test_rows_without_ratings_raise(row, tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_text(json.dumps({"text": "x", "ratings": [1, 2]}) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"row 1 of .*needs a string `text` and a list `ratings`"):
        ratings.read_rated(path)


def test_equal_ratings_raise(tmp_path):
    path = tmp_path / "rated.jsonl"
    path.write_text((json.dumps({"text": "x", "ratings": [3, 3]}) + "\n") * 3)
    with pytest.raises(ValueError, match=r"all ratings in .* are equal"):
        ratings.read_rated(path)


def test_too_few_texts_raise():
    with pytest.raises(ValueError, match="6 rated texts are too few to hold out 4"):
        ratings.split(rated_texts(6), held_out=4)


@pytest.mark.filterwarnings("ignore")
def test_build_writes_models_and_data(tmp_path, capsys):
    path = tmp_path / "rated.jsonl"
    rows = [{"text": item.text, "ratings": item.ratings} for item in rated_texts()]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    small = dict(num_pairs=32, epochs=1, vocabulary=300, hidden=32, layers=1)
    ratings.build(path, tmp_path / "out", held_out=10, **small)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "policy").config.hidden_size == 32
    test = [json.loads(line) for line in (tmp_path / "out" / "test.jsonl").read_text().splitlines()]
    train = [json.loads(line) for line in (tmp_path / "out" / "train.jsonl").read_text().splitlines()]
    assert train and not {row["prompt"] for row in train} & {row["prompt"] for row in test}
    assert len(test) == 10 and {row["preferred"] is None for row in test} == {True, False}
    output = capsys.readouterr().out
    assert "reward_model: agrees with most raters" in output and "judge: agrees with most raters" in output


def test_split_with_equal_ratings_raises():
    with pytest.raises(ValueError, match="all ratings of these 3 texts are equal"):
        ratings.rated_pairs([ratings.Rated(text, (5.0, 5.0)) for text in "abc"], 4, seed=0)


def test_evenly_split_raters_raise():
    split = [ratings.Rated(text, (1.0, 5.0)) for text in "ab"]
    with pytest.raises(ValueError, match="evenly split on every pair"):
        ratings.agreement(lambda prompts, texts: torch.zeros(len(texts)), split)
