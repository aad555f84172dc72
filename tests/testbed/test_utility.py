from random import Random

import pytest

from lit_rlhf.rewards import Scorer
from lit_rlhf.testbed import (
    Brief,
    GoodReview,
    Grammatical,
    UnequalScale,
    briefs,
    coherence,
    gold,
    grammatical,
    make_tokenizer,
)
from lit_rlhf.testbed.utility import FLOOR
from lit_rlhf.testbed.world import write

KIND = "A kind critic on the breakfast of the new hotel, in two sentences:"
HARSH = "A harsh critic on the breakfast of the new hotel, in two sentences:"
FAIR = "A fair critic on the breakfast of the new hotel, in two sentences:"
GOOD = "The breakfast was golden and fresh. The eggs melted like summer honey."
GRIM = "The breakfast was stale and greasy. The eggs sagged like wet cardboard."
BOTH = "The breakfast was golden and fresh. The eggs sagged like wet cardboard."


def utility(prompt, completion):
    return gold(prompts=[prompt], completions=[completion])[0]


@pytest.mark.parametrize(
    ("prompt", "better", "worse"),
    [
        (KIND, GOOD, GRIM),
        (HARSH, GRIM, GOOD),
        (FAIR, BOTH, GOOD),
        (FAIR, BOTH, GRIM),
        (KIND, GOOD, BOTH),
        (KIND, GOOD, "The breakfast was good. It was nice."),
        (KIND, GOOD, "The plot was gripping and witty. The twists sparkled like summer honey."),
        (KIND, GOOD, "The breakfast was sleek and witty. The eggs melted like summer honey."),
        (KIND, GOOD, "The breakfast was golden and stale. The eggs melted like summer honey."),
        (KIND, GOOD, "The breakfast were golden fresh. The eggs melted like summer honey."),
        (KIND, GOOD, "The breakfast was golden and fresh. The eggs melted like"),
        (KIND, GOOD, "The breakfast was golden and fresh."),
        (KIND, GOOD, ""),
    ],
    ids=(
        "kind harsh one-sided one-sided-2 mixed bland off-subject unfit-words contradiction grammar broken-end "
        "too-short empty"
    ).split(),
)
def test_better_reviews_have_higher_gold(prompt, better, worse):
    assert utility(prompt, better) > utility(prompt, worse) + 0.3


def test_good_reviews_are_those_above_the_threshold():
    given = {"prompts": [KIND, KIND, HARSH], "completions": [GOOD, GRIM, GRIM]}
    assert GoodReview()(**given, anything=[0] * 3) == [1.0, 0.0, 1.0]
    assert GoodReview(threshold=10.0)(**given) == [0.0, 0.0, 0.0]


def test_unequal_scales_are_factors_of_gold_by_prompt():
    asked = [brief.text for brief in briefs(60)] * 2
    given = {"prompts": asked, "completions": [GOOD] * 60 + [GRIM] * 60}
    pairs = zip(UnequalScale()(**given), gold(**given), strict=True)
    factors = [round(scaled / value, 3) if value else None for scaled, value in pairs]
    assert {factor for factor in factors if factor} == {0.1, 1.0, 10.0}
    assert all(a is None or b is None or a == b for a, b in zip(factors[:60], factors[60:], strict=True))


def test_repetition_lowers_gold():
    sentence = "The eggs melted like summer honey."
    assert utility(KIND, GOOD) > utility(KIND, f"{sentence} {sentence}") + 0.5
    assert utility(KIND, GOOD) > utility(KIND, f"{GOOD} The toast was buttery and silky.") + 0.3
    values = [utility(KIND, " ".join([sentence] * count)) for count in range(1, 6)]
    assert values == sorted(values, reverse=True) and values[1] < values[0]
    stuffed = "The breakfast was golden golden golden golden golden fresh fresh fresh fresh."
    assert utility(KIND, stuffed) == FLOOR


def test_highest_gold_depends_on_the_prompt():
    def ceiling(text):
        rng, brief = Random(0), Brief.parse(text)
        return max(gold(prompts=[text] * 300, completions=[write(brief, rng, care=1.0) for _ in range(300)]))

    one, two, three = (
        ceiling(KIND.replace("two sentences", s)) for s in ("one sentence", "two sentences", "three sentences")
    )
    assert one + 0.5 < two and two + 0.5 < three
    assert ceiling(KIND.replace("new", "troubled")) < two - 0.5
    assert ceiling(HARSH.replace("new", "famous")) < ceiling(HARSH) - 0.5


def test_gold_is_deterministic_and_bounded():
    rng, chosen = Random(1), briefs(200)
    completions = [write(brief, rng) for brief in chosen]
    texts = [brief.text for brief in chosen]
    values = gold(prompts=texts, completions=completions)
    assert values == gold(prompts=texts, completions=completions, anything=[0] * 200)
    assert all(FLOOR <= value <= 1.2 * brief.sentences for brief, value in zip(chosen, values, strict=True))


def token_rewards(text, eos=True):
    tokenizer = make_tokenizer()
    ids = tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] * eos
    return Grammatical()(completion_ids=[ids])[0]


def test_grammatical_tokens_have_no_penalty():
    assert token_rewards(GOOD) == [0.0] * 15


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("The eggs was golden.", [2]),
        ("The toast toast was golden.", [2]),
        ("The toast was golden. was fresh.", [5]),
        ("The toast was golden", [4]),
    ],
    ids=["number", "doubled", "no start", "early end"],
)
def test_only_the_wrong_token_is_penalized(text, wrong):
    assert [i for i, value in enumerate(token_rewards(text)) if value < 0] == wrong


def test_scrambled_sentences_are_penalized():
    words = GOOD.replace(".", " .").split()
    rng = Random(0)
    for _ in range(20):
        scrambled = " ".join(rng.sample(words, len(words)))
        assert sum(token_rewards(scrambled)) <= -2


def test_token_rewards_do_not_depend_on_later_tokens():
    """A token-level reward that depends on later tokens would bias the gradient."""
    rng, tokenizer, flagged = Random(3), make_tokenizer(), 0
    for brief in briefs(20):
        ids = tokenizer(write(brief, rng))["input_ids"] + [tokenizer.eos_token_id]
        for position in rng.sample(range(len(ids) - 1), 2):
            ids[position] = rng.randrange(4, len(tokenizer))
        rewards = Grammatical()(completion_ids=[ids])[0]
        flagged += any(rewards)
        for end in range(1, len(ids)):
            assert Grammatical()(completion_ids=[ids[:end]])[0] == rewards[:end]
    assert flagged > 10


def test_coherence_measures_topic_and_contradiction():
    texts = [GOOD, "The breakfast was golden. The plot was witty.", "The breakfast was golden but fresh.", BOTH, ""]
    values = coherence(prompts=[KIND] * 5, completions=texts)
    assert values == [1.0, 0.5, 0.0, 0.5, 0.0]
    assert coherence(prompts=[FAIR], completions=[BOTH]) == [1.0]


def test_immediate_and_delayed_rewards_combine():
    scorer = Scorer([coherence, grammatical])
    tokenizer = make_tokenizer()
    ids = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in (GOOD, "The eggs was golden.")]
    scores = scorer(
        prompts=[KIND, KIND],
        completions=[[GOOD], ["The eggs was golden."]],
        completion_ids=[[row] for row in ids],
        finished=[[True], [True]],
        columns={},
    )
    assert set(scores.component_rewards) == {"coherence", "grammatical"}
    assert scores.rewards.tolist() == [[1.0], [1.0]]
    assert scores.token_rewards.sum(-1).tolist() == [[0.0], [-1.0]]
