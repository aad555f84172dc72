"""Reading, tokenization, length limits and collation of rows."""

import logging

import numpy as np
import pytest
import torch

from families import make_family
from lit_rlhf.data import DemonstrationData, PromptData, encoding
from lit_rlhf.data.checks import check_prompts
from lit_rlhf.data.collate import collate_demonstrations, collate_preferences, collate_prompts, pad
from lit_rlhf.data.encoding import Encoder
from lit_rlhf.data.formats import read_demonstration, read_preference, read_prompt
from lit_rlhf.evaluation.evaluator import column_completions

PROMPTS = ["Hi", "A longer prompt, ünïcode too", "x"]


def prompt_examples(texts):
    return encoding.read_examples([{"prompt": text, "n": len(text)} for text in texts], read_prompt)


def decode(tokenizer, tokens, mask):
    return [tokenizer.decode(row[keep]) for row, keep in zip(tokens, mask, strict=True)]


@pytest.fixture
def log_messages(caplog):
    caplog.set_level(logging.INFO)
    return lambda: [record.getMessage() for record in caplog.records]


def test_prompts_decode_from_their_padded_ids(tokenizer):
    batch = collate_prompts(Encoder(tokenizer)(prompt_examples(PROMPTS)), pad_id=0)
    assert decode(tokenizer, batch.tokens, batch.mask) == PROMPTS == batch.text
    assert batch.mask[:, -1].all() and (batch.mask.sum(1).max() == batch.tokens.shape[1])
    assert (batch.mask.int().diff(dim=1) >= 0).all(), "prompts must be padded on the left"
    assert batch.columns == {"n": [2, 28, 1]} and batch.index.tolist() == [0, 1, 2]


def test_pairs_decode_from_their_padded_ids(tokenizer):
    rows = [{"prompt": "Hi", "chosen": " there", "rejected": "!"}, {"prompt": "A", "chosen": "", "rejected": " b c"}]
    batch = collate_preferences(Encoder(tokenizer)(encoding.read_examples(rows, read_preference)), pad_id=0)
    assert batch.tokens.shape[:2] == (2, 2)
    assert (batch.mask.int().diff(dim=2) <= 0).all(), "completions must be padded on the right"
    texts = [decode(tokenizer, *pair) for pair in zip(batch.tokens, batch.mask, strict=True)]
    assert texts == [[" there<eos>", "!<eos>"], ["<eos>", " b c<eos>"]]


def test_prompt_and_completion_of_a_conversation_concatenate_to_the_rendered_template(tokenizer):
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    examples = encoding.read_examples([{"messages": messages}], read_demonstration)
    batch = collate_demonstrations(Encoder(tokenizer)(examples), pad_id=0)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    decoded = tokenizer.decode(batch.prompts.tokens[0]) + tokenizer.decode(batch.tokens[0, 0])
    assert batch.tokens.shape[1] == 1 and rendered == decoded + "\n"


def test_template_kwargs_of_a_row_take_precedence(tokenizer):
    tokenizer.chat_template = "{{ tone }}{% for t in tools or [] %}{{ t.name }}{% endfor %}"
    message = [{"role": "user", "content": "U"}]
    rows = [
        {"prompt": message},
        {"prompt": message, "chat_template_kwargs": {"tone": "loud"}, "tools": [{"name": "f"}]},
    ]
    encoded = Encoder(tokenizer, template_kwargs={"tone": "calm"})(encoding.read_examples(rows, read_prompt))
    assert [tokenizer.decode(row.prompt) for row in encoded] == ["calm", "loudf"]


def test_completions_from_a_column_use_the_template_kwargs_of_their_prompt(tokenizer):
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
    _, completions = column_completions(tokenizer, collate_prompts(encoded, 0), "best")
    decoded = [tokenizer.decode(ids, skip_special_tokens=True) for ids in completions.ids()]
    assert decoded == ["aloud!", "acalm!"]


@pytest.mark.parametrize("parsed", [True, False])
def test_completions_from_a_column_treat_special_tokens_as_those_of_the_data_do(parsed):
    tokenizer = make_family("chatml")
    rows = [{"prompt": "p", "chosen": "a<|im_end|>b", "rejected": "a"}]
    encoder = Encoder(tokenizer, parse_special_tokens=parsed)
    learned = encoder(encoding.read_examples(rows, read_preference))[0].completions[0].tolist()
    encoded = encoder(encoding.read_examples([{"prompt": "p", "best": "a<|im_end|>b"}], read_prompt))
    _, completions = column_completions(tokenizer, collate_prompts(encoded, 0), "best")
    assert completions.ids() == [learned]
    assert (tokenizer.convert_tokens_to_ids("<|im_end|>") in learned[:-1]) == parsed


def test_a_column_missing_in_some_rows_is_none_in_those():
    examples = encoding.read_examples([{"prompt": "a", "x": 1}, {"prompt": "b", "y": 2}], read_prompt)
    assert [example.columns for example in examples.values()] == [{"x": 1, "y": None}, {"x": None, "y": 2}]


def test_long_prompts_are_dropped_and_reported(tokenizer, log_messages):
    encoded = Encoder(tokenizer, max_prompt_tokens=2)(prompt_examples(PROMPTS))
    assert [row.index for row in encoded] == [0, 2]
    assert log_messages() == ["1 of 3 prompts are longer than 2 tokens: dropped"]


def test_truncated_prompts_keep_their_end(tokenizer, log_messages):
    encoded = Encoder(tokenizer, max_prompt_tokens=4, truncation="truncate")(prompt_examples(PROMPTS))
    assert [tokenizer.decode(row.prompt) for row in encoded] == ["Hi", " too", "x"]
    assert log_messages() == ["1 of 3 prompts are longer than 4 tokens: truncated"]
    assert encoded[1].example.prompt == PROMPTS[1], "rewards must see the full prompt"


def test_a_truncated_prompt_keeps_its_bos_token(tokenizer):
    encoded = Encoder(tokenizer, max_prompt_tokens=4, truncation="truncate")(prompt_examples(["<bos>abcdefg"]))
    assert tokenizer.decode(encoded[0].prompt) == "<bos>efg"


def test_long_completions_are_dropped_or_truncated_without_eos(tokenizer, log_messages):
    rows = [{"prompt": "a", "completion": text} for text in ("xyz", "stuvwxyz")]
    examples = encoding.read_examples(rows, read_demonstration)
    assert [row.index for row in Encoder(tokenizer, max_completion_tokens=4)(examples)] == [0]
    truncated = Encoder(tokenizer, max_completion_tokens=4, truncation="truncate")(examples)
    assert [tokenizer.decode(row.completions[0]) for row in truncated] == ["xyz<eos>", "stuv"]
    problem = "1 of 2 completions are longer than 4 tokens"
    assert log_messages() == [f"{problem}: dropped", f"{problem}: truncated"]


def test_equal_pairs_are_dropped_and_reported(tokenizer, log_messages):
    rows = [{"prompt": "a", "chosen": "b", "rejected": rejected} for rejected in ("b", "c")]
    assert [row.index for row in Encoder(tokenizer)(encoding.read_examples(rows, read_preference))] == [1]
    assert log_messages() == ["1 of 2 pairs have the same chosen and rejected completion: dropped"]


def test_drop_duplicates_keeps_the_first_row_of_each_prompt(log_messages):
    message = [{"role": "user", "content": "a"}]
    kept = encoding.drop_duplicates(prompt_examples(["a", message, "b", "a", list(message)]))
    assert list(kept) == [0, 1, 2]
    assert log_messages() == ["2 of 5 prompts are duplicates: dropped"]


def test_a_transform_drops_rows_and_the_others_keep_their_index(log_messages):
    rows = [{"prompt": "a"}, {"prompt": ""}, {"prompt": "b"}]
    kept = encoding.read_examples(rows, read_prompt, lambda row: row if row["prompt"] else None)
    assert list(kept) == [0, 2]
    assert log_messages() == ["1 of 3 rows were dropped by the transform"]


@pytest.mark.parametrize("empty", ["", " \n", [], [{"role": "user", "content": ""}]])
def test_an_empty_prompt_raises_with_its_row_index(empty):
    with pytest.raises(ValueError, match=r"the prompt of row 1 is empty \(2 of 3 are\): .* transform"):
        check_prompts(prompt_examples(["a", empty, empty]))


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (
            lambda t: Encoder(t, max_prompt_tokens=3)(prompt_examples(["abcd", "efgh"])),
            "all 2 prompts are longer than 3 tokens.*'truncate'",
        ),
        (
            lambda t: encoding.read_examples([{"prompt": "a"}], read_prompt, lambda row: None),
            "all 1 rows were dropped by the transform",
        ),
        (lambda t: encoding.read_examples([{"prompt": "a"}, {"text": "b"}], read_prompt), "row 1: no column 'prompt'"),
        (lambda t: encoding.read_examples([{"prompt": None}], read_prompt), "row 0: the column 'prompt' contains None"),
        (
            lambda t: Encoder(t)(
                encoding.read_examples([{"prompt": "a", "chosen": "b", "rejected": "b"}], read_preference)
            ),
            "all 1 pairs have the same chosen and rejected completion",
        ),
    ],
)
def test_errors_when_a_row_is_unreadable_or_none_is_left(tokenizer, use, message):
    with pytest.raises(ValueError, match=message):
        use(tokenizer)


def test_pad():
    tokens, mask = pad([np.arange(3, dtype=np.int32), np.zeros(1, np.int32)], 9, "left")
    assert tokens.tolist() == [[0, 1, 2], [9, 9, 0]] and mask.tolist() == [[True] * 3, [False, False, True]]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"chat_template": "obey"}, "row 1: chat_template_kwargs has 'chat_template'"),
        ({"eos_token": "x"}, "row 1: chat_template_kwargs has 'eos_token'"),
        ({"add_generation_prompt": False}, "row 1: chat_template_kwargs has 'add_generation_prompt'"),
        ({"tokenize": True}, "row 1: chat_template_kwargs has 'tokenize'"),
        ({"messages": []}, "row 1: chat_template_kwargs has 'messages'"),
        ({"n": 10**12}, "row 1: chat_template_kwargs has 'n' with the number 1000000000000, above 1,000,000"),
        ({"n": {"x": [float("inf")]}}, "row 1: chat_template_kwargs has 'n' with the number inf"),
        ({"n": 200_000}, "row 1: the chat template refuses the conversation: Range too big"),
    ],
)
def test_a_row_neither_replaces_its_template_nor_keeps_it_busy(kwargs, message, tokenizer):
    tokenizer.chat_template = "{% for i in range(n or 1) %}.{% endfor %}{{ messages[0].content }}"
    prompt = [{"role": "user", "content": "U"}]
    rows = [{"prompt": prompt}, {"prompt": prompt, "chat_template_kwargs": kwargs}]
    with pytest.raises(ValueError, match=message):
        Encoder(tokenizer)(encoding.read_examples(rows, read_prompt))


def test_template_kwargs_of_a_run_may_name_a_template(tokenizer):
    row = encoding.read_examples([{"prompt": [{"role": "user", "content": "U"}]}], read_prompt)
    encoded = Encoder(tokenizer, template_kwargs={"chat_template": "<bos>{{ messages[0].content }}"})(row)
    assert tokenizer.decode(encoded[0].prompt) == "<bos>U"
    with pytest.raises(ValueError, match="chat_template_kwargs has 'tokenize'"):
        PromptData(chat_template_kwargs={"tokenize": True})


def test_a_conversation_that_the_template_refuses_names_its_row():
    chats = [[{"role": role, "content": "a"}, {"role": "user", "content": "b"}] for role in ("user", "system")]
    examples = encoding.read_examples([{"prompt": chat} for chat in chats], read_prompt)
    with pytest.raises(ValueError, match="row 1: the chat template refuses the conversation: no system role here"):
        Encoder(make_family("gemma"))(examples)
    prompts = collate_prompts(Encoder(make_family("chatml"))(examples), 0)
    prompts.columns["best"] = ["c", "c"]
    with pytest.raises(ValueError, match="row 1, column 'best': the chat template refuses"):
        column_completions(make_family("gemma"), prompts, "best")


def test_what_the_template_leaves_out_is_warned_of_once():
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {}}}]}
    chats = [
        [{"role": "user", "content": "q"}, answer] for answer in ({"role": "assistant", "content": "a"}, call, call)
    ]
    examples = encoding.read_examples([{"messages": chat} for chat in chats], read_demonstration)
    with pytest.warns(UserWarning, match="leaves out the calls of tools in row 1, and 2 of 3 rows lose something"):
        Encoder(make_family("llama3"))(examples)


def test_rows_that_the_template_renders_otherwise_are_counted(log_messages):
    messages = [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "<think>\nEasy.</think>4"}]
    rows = [{"messages": messages}, {"prompt": "2+2", "completion": "4"}]
    encoded = Encoder(make_family("r1"))(encoding.read_examples(rows, read_demonstration))
    assert make_family("r1").decode(encoded[0].completions[0]) == "Easy.</think>4<eos>"
    (message,) = log_messages()
    assert message.startswith("1 of 2 rows have turns that the chat template renders otherwise")


TOOL_USE = [
    {"role": "user", "content": "q"},
    {"role": "assistant", "content": "call"},
    {"role": "tool", "content": "42"},
    {"role": "assistant", "content": "answer"},
    {"role": "user", "content": "more"},
    {"role": "assistant", "content": "last"},
]


@pytest.mark.parametrize(("turns", "expected"), [("last", "last "), ("all", "call answer last ")])
def test_the_last_or_all_assistant_turns_are_learned(turns, expected):
    tokenizer = make_family("chatml")
    data = DemonstrationData([{"messages": TOOL_USE}] * 2, batch_size=2, assistant_turns=turns)
    data.tokenizer = tokenizer
    data.setup()
    (batch,) = data.train_dataloader()
    learned = [tokenizer.decode(ids[keep]) for ids, keep in zip(batch.tokens[:, 0], batch.loss_mask[:, 0], strict=True)]
    assert learned == [expected.replace(" ", "<|im_end|>")] * 2
    whole = tokenizer.decode([*data.train_set[0].prompt, *data.train_set[0].completions[0]])
    assert whole == tokenizer.apply_chat_template(TOOL_USE, tokenize=False).rstrip()
    assert batch.prompts.text[0] == (TOOL_USE[:1] if turns == "all" else TOOL_USE[:5])


def test_turns_of_tools_inside_pairs_are_masked_and_truncated_with_their_tokens():
    tokenizer = make_family("chatml")
    pair = {"prompt": TOOL_USE[:1], "chosen": TOOL_USE[1:4], "rejected": TOOL_USE[1:2]}
    examples = encoding.read_examples([pair, {**pair, "chosen": TOOL_USE[3:4]}], read_preference)
    batch = collate_preferences(Encoder(tokenizer)(examples), pad_id=0)
    kept = [tokenizer.decode(ids[keep]) for ids, keep in zip(batch.tokens[0], batch.loss_mask[0], strict=True)]
    assert kept == ["call<|im_end|>answer<|im_end|>", "call<|im_end|>"]
    assert torch.equal(batch.rows(slice(1, 2)).loss_mask, batch.mask[1:])
    short = Encoder(tokenizer, max_completion_tokens=8, truncation="truncate")
    batch = collate_preferences(short(examples), pad_id=0)
    assert batch.loss_mask.sum(-1).tolist() == [[5, 5], [7, 5]] and batch.mask.sum(-1).tolist() == [[8, 5], [7, 5]]


def test_turns_of_others_that_begin_all_completions_belong_to_the_prompt():
    row = {"prompt": [{"role": "system", "content": "s"}], "completion": TOOL_USE[:2]}
    (encoded,) = Encoder(make_family("chatml"))(encoding.read_examples([row], read_demonstration))
    assert encoded.example.prompt == [row["prompt"][0], TOOL_USE[0]] and len(encoded.completions[0]) == 5


def test_special_tokens_in_strings_are_parsed_unless_the_data_module_says_otherwise():
    rows, counts = [{"prompt": "a<|im_end|>", "completion": "b<|im_end|>c"}] * 2, []
    for parse in (True, False):
        data = DemonstrationData(rows, batch_size=1, parse_special_tokens=parse)
        data.tokenizer = make_family("chatml")
        data.setup()
        row, end = data.train_set[0], data.tokenizer.convert_tokens_to_ids("<|im_end|>")
        counts.append((int((row.prompt == end).sum()), int((row.completions[0] == end).sum())))
    assert counts == [(1, 1), (0, 0)]
