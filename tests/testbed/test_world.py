from random import Random

import pytest

from lit_rlhf.testbed import Brief, briefs, demonstrations, gold, make_tokenizer, prompts
from lit_rlhf.testbed.grammar import well_placed
from lit_rlhf.testbed.tokenizer import vocabulary, words_of
from lit_rlhf.testbed.world import write


@pytest.mark.parametrize("sample", [prompts, demonstrations])
def test_samples_depend_on_the_seed_only(sample):
    assert sample(50, seed=1) == sample(50, seed=1)
    assert sample(50, seed=1) != sample(50, seed=2)


def test_held_out_prompts_are_in_no_training_set():
    held_out = {row["prompt"] for row in prompts(253, held_out=True)}
    assert len(held_out) == 253
    assert held_out.isdisjoint(row["prompt"] for row in prompts(1016, seed=3))
    assert held_out.isdisjoint(row["prompt"] for row in demonstrations(3000, seed=4))


def test_too_many_prompts_raise():
    with pytest.raises(ValueError, match="can't sample 254 held-out prompts: the testbed has 253"):
        prompts(254, held_out=True)


def test_briefs_round_trip_through_their_prompts():
    for brief in briefs(300):
        assert Brief.parse(brief.text) == brief


@pytest.mark.parametrize(
    "text", ["Hello", "A kind critic on the plot of the new phone, in two sentences:", "A kind critic on the plot"]
)
def test_other_prompts_raise(text):
    with pytest.raises(ValueError, match="not a prompt of the testbed: write it like 'A kind critic"):
        Brief.parse(text)


def test_demonstrations_vary_in_quality():
    rows = demonstrations(1000)
    utilities = gold(prompts=[row["prompt"] for row in rows], completions=[row["completion"] for row in rows])
    shares = [sum(low <= w < high for w in utilities) / 1000 for low, high in ((-9, -0.5), (-0.5, 0.5), (0.5, 9))]
    assert min(shares) > 0.15
    assert len({row["completion"] for row in rows}) > 900


def test_care_raises_gold_and_keeps_reviews_grammatical():
    rng, careful, careless = Random(0), [], []
    for brief in briefs(200):
        review = write(brief, rng, care=1.0)
        assert all(well_placed(words_of(review))), review
        careful += gold(prompts=[brief.text], completions=[review])
        careless += gold(prompts=[brief.text], completions=[write(brief, rng, care=0.0)])
    assert sum(careful) / 200 > sum(careless) / 200 + 1


def test_lengths_of_demonstrations():
    lengths = [len(words_of(row["completion"])) for row in demonstrations(1000)]
    assert 3 <= min(lengths) and max(lengths) <= 48
    assert 8 < sum(lengths) / 1000 < 24


def test_tokenizer_round_trips_every_word_and_text():
    tokenizer = make_tokenizer()
    assert 300 <= len(tokenizer) == len(vocabulary()) <= 500
    for i, word in enumerate(vocabulary()[4:], start=4):
        assert tokenizer(word)["input_ids"] == [i]
        assert tokenizer.decode([i]) == word
    for row in demonstrations(300):
        for text in row.values():
            ids = tokenizer(text)["input_ids"]
            assert tokenizer.unk_token_id not in ids
            assert tokenizer.decode(ids) == text


def test_tokenizer_is_unchanged_by_saving_and_loading(tmp_path):
    from transformers import AutoTokenizer

    make_tokenizer().save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = "A fair critic on the plot of the new film, in one sentence:"
    assert loaded(text)["input_ids"] == make_tokenizer()(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert (loaded.pad_token, loaded.bos_token, loaded.eos_token, loaded.unk_token) == vocabulary()[:4]
