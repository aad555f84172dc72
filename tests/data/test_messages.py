"""Messages are read in the forms that data sets have: blocks, ShareGPT's names, nulls of tables, JSON."""

import json

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from lit_rlhf.data import PromptData, load_rows, read_demonstration, read_preference, read_prompt
from lit_rlhf.data.encoding import Encoder, read_examples
from lit_rlhf.data.messages import read_text


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def blocks(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (blocks("Good ", "day"), "Good day"),
        ([{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}], "ab"),
        ([{"text": "a"}, {"type": "text", "text": "b", "image_url": None, "cache_control": {"type": "short"}}], "ab"),
        ([], ""),
    ],
)
def test_text_blocks_are_joined_wherever_messages_are_read(content, text):
    hello, bye = user(content), assistant(content)
    assert read_prompt({"prompt": [hello]}).prompt == [user(text)]
    for column in ("messages", "conversations"):
        example = read_demonstration({column: [hello, bye]})
        assert (example.prompt, example.completions) == ([user(text)], ([assistant(text)],))
    pair = read_preference({"prompt": [hello], "chosen": [bye], "rejected": [assistant("x")]})
    assert pair.completions == ([assistant(text)], [assistant("x")])
    pair = read_preference({"chosen": [hello, bye], "rejected": [hello, assistant("x")]})
    assert (pair.prompt, pair.completions[0]) == ([user(text)], [assistant(text)])


@pytest.mark.parametrize(
    "block",
    [
        {"type": "image"},
        {"type": "image_url", "image_url": {"url": "bird.png"}},
        {"type": "input_audio", "input_audio": {"data": "UklG"}},
        {"type": "video", "video": "bird.mp4", "text": "a bird"},
        {"type": "thinking", "thinking": "hm"},
        {"type": "text", "text": None},
        {"type": "text", "text": 3},
        {"type": "text"},
        {"image": "bird.png"},
        "bird",
    ],
    ids=str,
)
@pytest.mark.parametrize("column", ["prompt", "messages", "chosen"])
def test_other_blocks_are_refused_with_row_and_column(block, column):
    good = {"prompt": "Hi", "messages": [user("Hi"), assistant("Ho")], "chosen": [assistant("Ho")], "rejected": "x"}
    bad = {**good, column: [user([*blocks("What?"), block])]}
    read = read_preference if column == "chosen" else lambda row: read_prompt(row, column)
    with pytest.raises(ValueError, match=f"row 1: the column '{column}' has a message with the block .*only text"):
        read_examples([good, bad], read)


def call(**arguments):
    return {"type": "function", "function": {"name": "find", "arguments": arguments}}


def tool(*names, **extra):
    properties = {name: {"type": "string"} for name in names}
    return {"type": "function", "function": {"name": "find", "parameters": {"properties": properties, **extra}}}


TOOL_ROWS = [
    {
        "messages": [user("Where?"), {**assistant(""), "tool_calls": [call(place="Oslo", near=[])]}],
        "tools": [tool("place", strict=False, limit=0)],
    },
    {
        "messages": [user("When?"), {**assistant(""), "tool_calls": [call(day="today")]}],
        "tools": [tool("day", required=["day"])],
    },
]


@pytest.mark.parametrize("source", ["jsonl", "parquet", "Dataset"])
def test_tool_calls_and_tools_are_the_same_from_every_source(source, tmp_path):
    path = tmp_path / f"rows.{source}"
    if source == "jsonl":
        path.write_text("\n".join(map(json.dumps, TOOL_ROWS)))
    elif source == "parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(TOOL_ROWS), path)
    rows = load_rows(datasets.Dataset.from_list(TOOL_ROWS) if source == "Dataset" else str(path))
    examples = list(read_examples(rows, read_demonstration).values())
    for example, row in zip(examples, TOOL_ROWS, strict=True):
        assert [*example.prompt, *example.completions[0]] == row["messages"]
        assert example.template_kwargs == {"tools": row["tools"]}
    assert examples[0].completions[0][0]["tool_calls"][0]["function"]["arguments"]["near"] == []


def test_items_of_lists_keep_their_nulls():
    choice = {"role": "user", "content": "a", "extra": {"choices": ["a", None, {"b": None, "c": False}], "d": None}}
    assert read_prompt({"prompt": [choice]}).prompt[0]["extra"] == {"choices": ["a", None, {"c": False}]}
    assert choice["extra"]["d"] is None, "the row itself is not changed"


@pytest.mark.parametrize(
    "tools", [json.dumps([tool("a")]), [json.dumps(tool("a"))], [tool("a")], [{**tool("a"), "strict": None}]], ids=str
)
def test_tools_are_read_as_dicts_or_json(tools):
    assert read_prompt({"prompt": [user("a")], "tools": tools}).template_kwargs == {"tools": [tool("a")]}


@pytest.mark.parametrize("tools", ["", "[]", "null", None, []])
def test_no_tools(tools):
    assert read_prompt({"prompt": [user("a")], "tools": tools}).template_kwargs == {}


@pytest.mark.parametrize(
    ("arguments", "read"),
    [
        ('{"place": "Oslo", "day": null}', {"place": "Oslo", "day": None}),
        ("", {}),
        ({"place": "Oslo"}, {"place": "Oslo"}),
        ("{broken", "{broken"),
        ("3", "3"),
    ],
)
@pytest.mark.parametrize("form", ["nested", "flat", "json"])
def test_arguments_of_tool_calls_are_parsed(arguments, read, form):
    function = {"name": "find", "arguments": arguments}
    calls = [function] if form == "flat" else [{"type": "function", "function": function}]
    turn = {**assistant(""), "tool_calls": json.dumps(calls) if form == "json" else calls}
    (result,) = read_demonstration({"messages": [user("Where?"), turn]}).completions[0][0]["tool_calls"]
    assert result.get("function", result) == {"name": "find", "arguments": read}


CHAT = [user("Hi"), assistant("Hello!")]


@pytest.mark.parametrize("text", [json.dumps(CHAT), f"\n {json.dumps(CHAT, indent=2)} "])
def test_conversations_given_as_json_are_parsed(text):
    for column in ("messages", "conversations"):
        example = read_demonstration({column: text})
        assert (example.prompt, example.completions) == (CHAT[:1], (CHAT[1:],))
    assert read_prompt({"prompt": text}).prompt == CHAT
    example = read_preference({"chosen": text, "rejected": json.dumps([CHAT[0], assistant("No.")])})
    assert (example.prompt, example.completions) == (CHAT[:1], (CHAT[1:], [assistant("No.")]))


@pytest.mark.parametrize(
    "text",
    [
        "[INST] Hi [/INST]",
        "[1, 2, 3]",
        "[]",
        "[x for x in y]",
        '[{"name": "a"}]',
        '[{"role": "admin", "id": 3}]',
        '[{"role": "user", "content": "Hi"}] Convert this list to YAML.',
        '{"role": "user", "content": "Hi"}',
        "[" * 100_000 + "]" * 100_000,
    ],
    ids=lambda text: text[:20],
)
def test_a_string_that_looks_like_a_list_stays_text(text):
    assert read_prompt({"prompt": text}).prompt == text
    assert read_demonstration({"prompt": "a", "completion": text}).completions == (text,)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"messages": "Hello"}, "'messages' contains 'Hello': it must be a list of messages, or its JSON"),
        ({"messages": str(CHAT)}, r"messages in Python's notation, .*json\.dumps"),
        ({"prompt": f"[{CHAT[0]}\n {CHAT[1]}]"}, "'prompt' has messages in Python's notation"),
    ],
)
def test_conversations_in_other_notations_are_refused(row, message):
    with pytest.raises(ValueError, match=message):
        read_prompt(row)


def turn(speaker, value):
    return {"from": speaker, "value": value}


def test_sharegpt_with_tools_and_a_system_column():
    conversation = [
        turn("human", "Weather?"),
        turn("function_call", '{"name": "weather", "arguments": {"place": "Oslo"}}'),
        turn("observation", "rain"),
        turn("gpt", "It rains."),
    ]
    example = read_demonstration({"conversations": conversation, "system": "Be brief.", "tools": "[]"})
    system, question, request, answer = example.prompt
    assert (system, question) == ({"role": "system", "content": "Be brief."}, user("Weather?"))
    function = {"name": "weather", "arguments": {"place": "Oslo"}}
    assert request == {**assistant(""), "tool_calls": [{"type": "function", "function": function}]}
    assert answer == {"role": "tool", "content": "rain"} and example.completions == ([assistant("It rains.")],)


@pytest.mark.parametrize(
    ("speaker", "role"),
    [
        ("Human", "user"),
        ("user", "user"),
        ("GPT", "assistant"),
        ("chatgpt", "assistant"),
        ("system", "system"),
        ("tool", "tool"),
        ("function", "tool"),
    ],
)
def test_roles_of_sharegpt(speaker, role):
    assert read_text([turn(speaker, "a")], "conversations") == [{"role": role, "content": "a"}]


def test_roles_with_capitals_and_of_sharegpt_in_messages():
    messages = [{"role": role, "content": "a"} for role in ("Human", "ASSISTANT", "ipython")]
    assert [message["role"] for message in read_prompt({"prompt": messages}).prompt] == ["user", "assistant", "ipython"]


def test_a_system_message_of_the_conversation_takes_precedence():
    messages = [{"role": "system", "content": "In full."}, *CHAT]
    for system in ("Be brief.", "", None):
        assert read_demonstration({"messages": messages, "system": system}).prompt == messages[:2]


def test_a_column_of_table_nulls_gives_the_tokens_of_json(tokenizer):
    tokenizer.chat_template = "{% for t in tools %}{{ t | tojson }}{% endfor %}{{ messages[0].content }}"
    rows = [{"prompt": [user("a")], "tools": [tool("x")]}, {"prompt": [user("a")], "tools": [tool("y", deep={})]}]
    ids = [
        [row.prompt.tolist() for row in Encoder(tokenizer)(read_examples(source, PromptData().read))]
        for source in (rows, datasets.Dataset.from_list(rows))
    ]
    assert ids[0] == ids[1]
