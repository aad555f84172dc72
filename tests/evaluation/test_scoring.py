"""Special tokens in the completions that rewards receive."""

import re

import pytest
import torch
from transformers import TrainerState

from lit_rlhf.evaluation.completions import completion_texts
from lit_rlhf.evaluation.scoring import raw_texts, score
from lit_rlhf.rewards import ExactMatch, RegexMatch, Scorer, to_text
from lit_rlhf.types import Completions, Prompts
from tiny import make_tokenizer

TEXTS = ["<think>a b</think> <answer>4</answer><eos>", "<think>c</think> <answer>5</answer><eos>"]
FORMAT = r"<think>.*</think>\s*<answer>(.*)</answer>"


@pytest.fixture
def tagged():
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<answer>", "</answer>"]})
    return tokenizer


def complete(rewards, tokenizer, texts, prompt="p", answer="4"):
    """Score completions of one prompt."""
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    tokens = torch.nn.utils.rnn.pad_sequence([torch.tensor(row) for row in ids], batch_first=True).unsqueeze(0)
    mask = torch.arange(tokens.shape[2]) < torch.tensor([len(row) for row in ids]).view(1, -1, 1)
    completions = Completions(tokens, mask, torch.zeros(tokens.shape), torch.ones(1, len(ids), dtype=torch.bool))
    prompts = Prompts(
        torch.ones(1, 1).long(), torch.ones(1, 1).bool(), torch.zeros(1).long(), [prompt], {"answer": [answer]}
    )
    shown = completion_texts(tokenizer, prompts, completions)
    return score(Scorer(rewards), tokenizer, prompts, completions, shown, TrainerState())


@pytest.mark.parametrize("prompt", ["p", [{"role": "user", "content": "p"}]])
def test_a_reward_that_asks_receives_special_tokens(tagged, prompt):
    seen = []

    def sees(completions, **kwargs):
        seen.extend(to_text(text) for text in completions)
        return [0.0] * len(completions)

    sees.special_tokens = True
    rewards = [
        sees,
        RegexMatch(FORMAT, full=True, special_tokens=True),
        ExactMatch(pattern=FORMAT, special_tokens=True),
    ]
    scores = complete(rewards, tagged, TEXTS, prompt)
    assert seen == [text.removesuffix("<eos>") for text in TEXTS]
    assert scores.component_rewards["regex_match"].tolist() == [[1, 1]]
    assert scores.component_rewards["exact_match"].tolist() == [[1, 0]]


PATTERN = re.compile(r"<think>")


def by_global(completions):
    return [float(bool(PATTERN.search(text))) for text in completions]


def by_literal(completions):
    return [float(any(tag in text for tag in ("<think>", "</think>"))) for text in completions]


@pytest.mark.parametrize(
    "reward", [by_global, by_literal, RegexMatch(r"^\<think>"), ExactMatch(pattern="<answer>(.*)")]
)
def test_a_reward_that_looks_for_special_tokens_it_does_not_see_warns(tagged, reward):
    with pytest.warns(UserWarning, match=r"rewards don't see <.*special_tokens = True"):
        complete([reward], tagged, ["plain<eos>"])


def test_special_tokens_in_most_completions_warn_once(tagged):
    def blind(completions):
        return [0.0] * len(completions)

    scorer = Scorer([blind])
    tokens = {7: "<tool>"}
    scorer.check_hidden_tokens([[7, 5], [7], [7], [5]], lambda: tokens)  # by chance
    with pytest.warns(UserWarning, match="don't see <tool>: special tokens are left out"):
        scorer.check_hidden_tokens([[7, 5], [5, 7], [7], [7], [5]], lambda: tokens)
    scorer.check_hidden_tokens([[7, 5], [5, 7], [7], [7], [5]], lambda: tokens)


def test_eos_padding_and_the_end_of_a_turn_need_no_warning(tagged):
    def looks(completions):
        return [float("<eos>" in text or "<pad>" in text) for text in completions]

    complete([looks], tagged, ["a<eos>", "b<eos>"])


def test_tags_that_are_no_special_tokens_are_visible():
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<think>", "</think>"])
    assert complete([by_literal], tokenizer, ["<think>x</think><eos>"]).rewards.tolist() == [[1]]


def test_raw_texts_keep_spaces_around_special_tokens(tagged):
    ids = tagged(" a <think> b</think>c ", add_special_tokens=False)["input_ids"]
    assert raw_texts(tagged, ["p"], [[ids, [*ids, 2], []]]) == [[" a <think> b</think>c "] * 2 + [""]]


@pytest.mark.parametrize("special", [False, True])
def test_the_token_that_ends_a_turn_is_no_part_of_the_text(special):
    """Some tokenizers have it as an ordinary added token."""
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["<|user|>", "<|end|>"], special_tokens=special)
    tokenizer.chat_template = "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    for end in ("<|end|>", "<|user|>", "<eos>", ""):
        scores = complete([ExactMatch(special_tokens=end == "<|user|>")], tokenizer, [f"4{end}"])
        assert scores.rewards.tolist() == [[1]]
