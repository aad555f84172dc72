"""From examples to ids and padded batches, and back."""

import logging

import numpy as np
import pytest

from lit_rlhf.data import encoding
from lit_rlhf.data.encoding import Encoder, collate_demonstrations, collate_preferences, collate_prompts
from lit_rlhf.data.formats import read_demonstration, read_preference, read_prompt
from lit_rlhf.evaluation.evaluator import column_completions

PROMPTS = ["Hi", "A longer prompt, ünïcode too", "x"]


def prompts(texts):
    return encoding.read_examples([{"prompt": text, "n": len(text)} for text in texts], read_prompt)


def decode(tokenizer, tokens, mask):
    return [tokenizer.decode(row[keep]) for row, keep in zip(tokens, mask, strict=True)]


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_prompts_come_back_from_their_padded_ids(tokenizer):
    batch = collate_prompts(Encoder(tokenizer)(prompts(PROMPTS)), pad_id=0)
    assert decode(tokenizer, batch.tokens, batch.mask) == PROMPTS == batch.text
    assert batch.mask[:, -1].all() and (batch.mask.sum(1).max() == batch.tokens.shape[1])
    assert (batch.mask.int().diff(dim=1) >= 0).all(), "padding is on the left"
    assert batch.columns == {"n": [2, 28, 1]} and batch.index.tolist() == [0, 1, 2]


def test_pairs_come_back_from_their_padded_ids(tokenizer):
    rows = [{"prompt": "Hi", "chosen": " there", "rejected": "!"}, {"prompt": "A", "chosen": "", "rejected": " b c"}]
    batch = collate_preferences(Encoder(tokenizer)(encoding.read_examples(rows, read_preference)), pad_id=0)
    assert batch.tokens.shape[:2] == (2, 2)
    assert (batch.mask.int().diff(dim=2) <= 0).all(), "padding is on the right"
    texts = [decode(tokenizer, *pair) for pair in zip(batch.tokens, batch.mask, strict=True)]
    assert texts == [[" there<eos>", "!<eos>"], ["<eos>", " b c<eos>"]]


def test_a_conversation_goes_through_the_template_once(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    examples = encoding.read_examples([{"messages": messages}], read_demonstration)
    batch = collate_demonstrations(Encoder(tokenizer)(examples), pad_id=0)
    whole = tokenizer.apply_chat_template(messages, tokenize=False)
    written = tokenizer.decode(batch.prompts.tokens[0]) + tokenizer.decode(batch.tokens[0, 0])
    assert batch.tokens.shape[1] == 1 and whole == written + "\n"


def test_keyword_arguments_reach_the_template_and_a_row_has_the_last_word(tokenizer):
    tokenizer.chat_template = "{{ tone }}{% for t in tools or [] %}{{ t.name }}{% endfor %}"
    message = [{"role": "user", "content": "U"}]
    rows = [
        {"prompt": message},
        {"prompt": message, "chat_template_kwargs": {"tone": "loud"}, "tools": [{"name": "f"}]},
    ]
    encoded = Encoder(tokenizer, template_kwargs={"tone": "calm"})(encoding.read_examples(rows, read_prompt))
    assert [tokenizer.decode(row.prompt) for row in encoded] == ["calm", "loudf"]


def test_completions_in_a_column_go_through_the_same_template_as_their_prompt(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }}{{ tone if m.role == 'assistant' }}{% endfor %}"
        "{% if not add_generation_prompt and tone %}!{% endif %}"
    )
    message = [{"role": "user", "content": "U"}]
    rows = [
        {"prompt": message, "best": "a", "chat_template_kwargs": {"tone": "loud"}},
        {"prompt": message, "best": "a"},
    ]
    encoded = Encoder(tokenizer, template_kwargs={"tone": "calm"})(encoding.read_examples(rows, read_prompt))
    _, completions = column_completions(tokenizer, encoding.collate_prompts(encoded, 0), "best")
    written = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions.ids()]
    assert written == ["aloud!", "acalm!"]


def test_a_column_that_some_rows_lack_is_none_there():
    examples = encoding.read_examples([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}], read_prompt)
    assert [example.columns for example in examples.values()] == [{"x": 1, "y": None}, {"x": None, "y": 2}]


def test_long_prompts_are_dropped_and_counted(tokenizer, said):
    encoded = Encoder(tokenizer, max_prompt_tokens=2)(prompts(PROMPTS))
    assert [row.index for row in encoded] == [0, 2]
    assert said() == ["1 of 3 prompts are longer than 2 tokens: dropped"]


def test_long_prompts_keep_their_end(tokenizer, said):
    encoded = Encoder(tokenizer, max_prompt_tokens=4, truncation="truncate")(prompts(PROMPTS))
    assert [tokenizer.decode(row.prompt) for row in encoded] == ["Hi", " too", "x"]
    assert said() == ["1 of 3 prompts are longer than 4 tokens: truncated"]
    assert encoded[1].example.prompt == PROMPTS[1], "rewards see the whole prompt"


def test_a_truncated_prompt_keeps_its_first_token_where_that_is_bos(tokenizer):
    encoded = Encoder(tokenizer, max_prompt_tokens=4, truncation="truncate")(prompts(["<bos>abcdefg"]))
    assert tokenizer.decode(encoded[0].prompt) == "<bos>efg"


def test_long_completions_are_dropped_or_keep_their_beginning_without_eos(tokenizer, said):
    rows = [{"prompt": "a", "completion": text} for text in ("xyz", "stuvwxyz")]
    examples = encoding.read_examples(rows, read_demonstration)
    assert [row.index for row in Encoder(tokenizer, max_completion_tokens=4)(examples)] == [0]
    cut = Encoder(tokenizer, max_completion_tokens=4, truncation="truncate")(examples)
    assert [tokenizer.decode(row.completions[0]) for row in cut] == ["xyz<eos>", "stuv"]
    problem = "1 of 2 completions are longer than 4 tokens"
    assert said() == [f"{problem}: dropped", f"{problem}: truncated"]


def test_equal_pairs_are_dropped_and_counted(tokenizer, said):
    rows = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("b", "c")]
    assert [row.index for row in Encoder(tokenizer)(encoding.read_examples(rows, read_preference))] == [1]
    assert said() == ["1 of 2 pairs have the same chosen and rejected completion: dropped"]


def test_duplicates_leave_their_first(said):
    message = [{"role": "user", "content": "a"}]
    kept = encoding.drop_duplicates(prompts(["a", message, "b", "a", list(message)]))
    assert list(kept) == [0, 1, 2]
    assert said() == ["2 of 5 prompts are duplicates: dropped"]


def test_a_transform_drops_rows_and_the_rest_keep_their_numbers(said):
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}]
    kept = encoding.read_examples(rows, read_prompt, lambda row: row if row["prompt"] else None)
    assert list(kept) == [0, 2]
    assert said() == ["1 of 3 rows are dropped by the transform"]


@pytest.mark.parametrize("empty", ["", " \n", [], [{"role": "user", "content": ""}]])
def test_an_empty_prompt_is_refused_by_its_number(empty):
    with pytest.raises(ValueError, match=r"the prompt of row 1 is empty \(2 of 3 are\): .* transform"):
        encoding.refuse_empty(prompts(["a", empty, empty]))


@pytest.mark.parametrize(
    ("problem", "sentence"),
    [
        (
            lambda t: Encoder(t, max_prompt_tokens=3)(prompts(["abcd", "efgh"])),
            "all 2 prompts are longer than 3 tokens.*'truncate'",
        ),
        (
            lambda t: encoding.read_examples([{"prompt": "a"}], read_prompt, lambda row: None),
            "all 1 rows are dropped by the transform",
        ),
        (lambda t: encoding.read_examples([{"prompt": "a"}, {"text": "b"}], read_prompt), "row 1: no column 'prompt'"),
        (lambda t: encoding.read_examples([{"prompt": None}], read_prompt), "row 0: the column 'prompt' holds None"),
        (
            lambda t: Encoder(t)(
                encoding.read_examples([{"prompt": "a", "chosen": "b", "rejected": "b"}], read_preference)
            ),
            "all 1 pairs have the same chosen and rejected completion",
        ),
    ],
)
def test_what_leaves_nothing_gets_a_sentence(tokenizer, problem, sentence):
    with pytest.raises(ValueError, match=sentence):
        problem(tokenizer)


def test_padding_never_counts():
    tokens, mask = encoding.pad([np.arange(3, dtype=np.int32), np.zeros(1, np.int32)], 9, "left")
    assert tokens.tolist() == [[0, 1, 2], [9, 9, 0]] and mask.tolist() == [[True] * 3, [False, False, True]]
