"""Bad data and bad options of the data modules: each ends in a sentence that names the row, column, file or option."""

import datasets
import jaxtyping
import pandas
import pytest

from lit_rlhf.data import DemonstrationData, FirstWords, LastAnswer, PreferenceData, PromptData
from lit_rlhf.errors import InputError
from tiny import make_tokenizer

USER, ASSISTANT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
GOOD = {
    PromptData: {"prompt": "Why?"},
    DemonstrationData: {"prompt": "Why?", "completion": " So."},
    PreferenceData: {"prompt": "Why?", "chosen": " So.", "rejected": " No."},
}
HALF = "a \ud83d b"


@pytest.fixture(autouse=True)
def no_type_checks(monkeypatch):
    """Disable jaxtyping, which users don't have and which would reject wrong types first."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def setup(kind, train, **options):
    data = kind(train, batch_size=1, **options)
    data.tokenizer = make_tokenizer()
    data.setup()


TEXTS = {
    "a number": 3,
    "nan": float("nan"),
    "none": None,
    "a truth": True,
    "bytes": b"Why?",
    "a dict": {"a": "b"},
    "an empty list": [],
    "strings": ["a", "b"],
    "an empty message": [{}],
    "a message of nulls": [{"role": None, "content": None}],
    "a message without role": [{"content": "a"}],
    "a message without content": [{"role": "user"}],
    "a role that is a number": [{"role": 3, "content": "a"}],
    "a content that is a number": [{"role": "user", "content": 3}],
    "a content that is a dict": [{"role": "user", "content": {"text": "a"}}],
    "a content of strings": [{"role": "user", "content": ["a"]}],
    "an image": [{"role": "user", "content": [{"type": "image"}]}],
    "a block without text": [{"role": "user", "content": [{"type": "text"}]}],
    "another role of ShareGPT": [{"from": "narrator", "value": "a"}],
    "no value of ShareGPT": [{"from": "human", "value": None}],
    "a call that is no JSON": [{"from": "function_call", "value": "find()"}],
    "a message and a null": [USER, None],
    "lists of messages": [[USER]],
    "columns of messages": {"role": ["user"], "content": ["a"]},
    "calls that are numbers": [{**ASSISTANT, "tool_calls": [1]}],
    "calls that are no JSON": [{**ASSISTANT, "tool_calls": "find()"}],
    "a call of a name only": [{**ASSISTANT, "tool_calls": [{"function": "find"}]}],
    "half of a surrogate pair": HALF,
    "half of a pair in a message": [{"role": "user", "content": HALF}],
    "half of a pair in a call": [{**ASSISTANT, "tool_calls": [{"name": "f", "arguments": {"a": [HALF]}}]}],
    "messages of Python": "[{'role': 'user', 'content': 'a'}]",
    "a table": pandas.DataFrame({"a": [1]}),
}


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("value", TEXTS.values(), ids=TEXTS)
def test_wrong_values_name_the_row_and_the_column(kind, value):
    for column in GOOD[kind]:
        with pytest.raises(InputError, match=rf"row 1.*'{column}'|the prompt of row 1 is empty") as caught:
            setup(kind, [GOOD[kind], {**GOOD[kind], column: value}])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("tools", 3),
        ("tools", "find()"),
        ("tools", {"name": "find"}),
        ("tools", ["find"]),
        ("tools", [1]),
        ("tools", HALF),
        ("chat_template_kwargs", "{"),
        ("chat_template_kwargs", "abc"),
        ("chat_template_kwargs", [1]),
        ("chat_template_kwargs", 1),
        (3, "a"),
        (None, "a"),
        ("other", {"a": [{HALF: 1}]}),
        (f"other {HALF}", 1),
    ],
    ids=ascii,
)
@pytest.mark.parametrize("kind", GOOD)
def test_wrong_columns_are_named(kind, column, value):
    name = repr(column).replace("\\", "\\\\")
    with pytest.raises(InputError, match=f"row 1: the column {name}"):
        setup(kind, [GOOD[kind], {**GOOD[kind], column: value}])


def test_a_wrong_system_message_is_named():
    with pytest.raises(InputError, match="row 0: the column 'system' contains 3: it must be a string"):
        setup(PromptData, [{"messages": [USER], "system": 3}])


def no_dict(row):
    return [row]


def no_column(row):
    return {"prompt": row["question"]}


def no_number(row):
    return {"prompt": row["prompt"] + 1}


class Stops:
    def __call__(self, row):
        raise StopIteration


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (no_dict, r"the transform returned \[\{"),
        (no_column, r"'no_column' raised KeyError: 'question' \(.*.py, line \d+\); the columns are 'prompt'"),
        (no_number, "'no_number' raised TypeError: can only concatenate"),
        (lambda row: row["prompt"].find(), r"'<lambda>' raised TypeError"),
        (lambda row: int(row["prompt"]), r"'<lambda>' raised ValueError: invalid literal"),
        (lambda row: 1 / 0, "ZeroDivisionError"),
        (lambda: {}, r"raised TypeError: .*positional argument"),
        (Stops(), "'Stops' raised StopIteration"),
        ("text", "'str' raised TypeError: 'str' object is not callable"),
        (FirstWords, "the transform returned <"),
        (FirstWords(), "FirstWords needs the column 'text'"),
        (LastAnswer("prompt2"), "LastAnswer needs the column 'prompt2'"),
        (lambda row: {3: "a"}, "the column 3 has no string as its name"),
        (lambda row: {"prompt": HALF}, "the column 'prompt' contains .*surrogate"),
    ],
)
def test_errors_of_a_transform_name_the_row_and_the_transform(transform, message):
    rows = [{"prompt": "a"}]
    with pytest.raises(InputError, match=f"row 0: .*{message}") as caught:
        setup(PromptData, rows, transform=transform)
    cause = caught.value.__cause__
    assert isinstance(cause, InputError) and ("raised" not in message or cause.__cause__ is not None)


def test_a_transform_cannot_change_the_rows_that_it_was_given():
    rows = [{"question": "a"}, {"question": "b"}]
    setup(PromptData, rows, transform=lambda row: {"prompt": row.pop("question")})
    assert rows == [{"question": "a"}, {"question": "b"}]


class NotDecodable(datasets.Dataset):
    def __iter__(self):
        yield {"prompt": "a"}
        raise OSError("no such picture")


@pytest.mark.parametrize(
    ("train", "message"),
    [
        (3, "can't be loaded from 3: give a path"),
        ((GOOD[PromptData],), "can't be loaded from"),
        ({"prompt": ["a"] * 99}, "can't be loaded from"),
        (iter([{"prompt": "a"}]), "can't be loaded from <"),
        (pandas.DataFrame({"prompt": ["a"]}), "can't be loaded from"),
        ([], "the list is empty"),
        (["a"], "row 0 is 'a': rows must be dicts"),
        ([{"prompt": "a"}, None], "row 1 is None: rows must be dicts"),
        ([{}], "row 0: no column 'prompt' in the data, which have no columns"),
        (datasets.Dataset.from_list([{"prompt": "a"}]).with_format("arrow"), "row 0: it is a Table: rows must be"),
        (datasets.Dataset.from_list([{"prompt": "a"}]).with_format("pandas"), "row 0: it is a DataFrame"),
        (
            NotDecodable(datasets.Dataset.from_list([{"prompt": "a"}] * 2).data),
            "row 1 can't be loaded: OSError: no such",
        ),
        ("x" * 300 + ".jsonl", "does not exist"),
        ("a\0b.jsonl", "does not exist"),
        ("~nobody/a.jsonl", "does not exist"),
        ("parts/*.jsonl", "does not exist .give the folder"),
        ("https://host.example/a.jsonl", "does not exist .download it"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_sources_that_are_no_data_are_refused(train, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message) as caught:
        setup(PromptData, train)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"batch_size": 0}, "batch_size=0: it must be at least 1"),
        ({"batch_size": "8"}, "batch_size='8': it must be a whole number"),
        ({"batch_size": 2.5}, "batch_size=2.5: it must be a whole number"),
        ({"batch_size": True}, "batch_size=True: it must be a whole number"),
        ({"batch_size": None}, "batch_size=None: it must be a whole number"),
        ({"eval_batch_size": "8"}, "eval_batch_size='8'"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"chat_template_kwargs": "thinking"}, "chat_template_kwargs='thinking': it must be a dict"),
        ({"max_prompt_tokens": 1.5}, "max_prompt_tokens=1.5"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val": True}, "val=True: give a number of rows"),
        ({"val": 0}, "val=0"),
        ({"val": float("nan")}, "val=nan"),
        ({"split": "first"}, "split='first'"),
        ({"truncation": "cut"}, "truncation='cut'"),
    ],
    ids=str,
)
def test_options_out_of_range_are_refused(option, message):
    with pytest.raises(InputError, match=message):
        PromptData([{"prompt": "a"}], **option)


@pytest.mark.parametrize("option", ["prompt_column", "completion_column"])
def test_a_column_that_is_missing_in_a_row_is_named(option):
    rows = [{"prompt": "a", "completion": "b", "q": "c"}, {"prompt": "a", "completion": "b"}]
    with pytest.raises(InputError, match=f"row 1: no column 'q' in the data, .*set {option}"):
        setup(DemonstrationData, rows, **{option: "q"})
