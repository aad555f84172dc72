"""Prompts and completions are read from all of TRL's data set formats."""

import pytest

from lit_rlhf.data import read_demonstration, read_preference, read_prompt


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
SKY = [SYSTEM, user("Hi"), assistant("Hello!"), user("What color is the sky?")]


@pytest.mark.parametrize(
    ("row", "prompt", "columns"),
    [
        ({"prompt": "The sky is"}, "The sky is", {}),
        ({"prompt": SKY, "solution": 3}, SKY, {"solution": 3}),
        ({"prompt": "The sky is", "completion": " blue."}, "The sky is", {"completion": " blue."}),
        ({"prompt": SKY, "completion": [assistant("Blue.")]}, SKY, {"completion": [assistant("Blue.")]}),
        ({"messages": [*SKY, assistant("Blue.")]}, SKY, {"completion": [assistant("Blue.")]}),
        ({"messages": SKY[:1] + SKY[3:], "id": 7}, SKY[:1] + SKY[3:], {"id": 7}),
        (
            {"prompt": "The sky is", "chosen": " blue.", "rejected": " green."},
            "The sky is",
            {"chosen": " blue.", "rejected": " green."},
        ),
        (
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            "The sky is",
            {"chosen": " blue.", "rejected": " green."},
        ),
        ({"prompt": "1 + 1 =", "completion": " 2", "label": True}, "1 + 1 =", {"completion": " 2", "label": True}),
        (
            {"prompt": "Which is larger?", "completions": ["a", "b"], "labels": [True, False]},
            "Which is larger?",
            {"completions": ["a", "b"], "labels": [True, False]},
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]},
            [user("Hi")],
            {"completion": [assistant("Hello!")]},
        ),
        ({"messages": SKY, "chosen": "Blue."}, SKY, {"chosen": [assistant("Blue.")]}),
        ({"messages": [user("Hi"), {"role": "model", "content": "A"}]}, [user("Hi")], {"completion": [assistant("A")]}),
        ({"prompt": SKY[1:], "system": "Be brief."}, SKY, {"system": "Be brief."}),
        (
            {"prompt": "Hi", "completion": {"length": 3}, "images": []},
            "Hi",
            {"completion": {"length": 3}, "images": []},
        ),
    ],
)
def test_read_prompt(row, prompt, columns):
    example = read_prompt(row)
    assert example.prompt == prompt and example.columns == columns and example.completions == ()


def test_prompt_column_keeps_an_existing_prompt_column():
    example = read_prompt({"question": "Why?", "prompt": 3}, prompt_column="question")
    assert example.prompt == "Why?" and example.columns == {"prompt": 3}


@pytest.mark.parametrize(
    ("row", "names", "prompt", "completion"),
    [
        ({"prompt": "The sky is", "completion": " blue."}, {}, "The sky is", " blue."),
        ({"prompt": SKY, "completion": [assistant("Blue.")]}, {}, SKY, [assistant("Blue.")]),
        ({"messages": [*SKY, assistant("Blue.")]}, {}, SKY, [assistant("Blue.")]),
        ({"messages": [*SKY, assistant("Blue."), user("Thanks")]}, {}, SKY, [assistant("Blue.")]),
        ({"text": "The sky is blue."}, {}, "", "The sky is blue."),
        ({"prompt": "Hi", "completion": [assistant("Hello!")]}, {}, [user("Hi")], [assistant("Hello!")]),
        ({"prompt": [user("Hi")], "completion": "Hello!"}, {}, [user("Hi")], [assistant("Hello!")]),
        ({"q": "Hi", "a": "Hello!"}, {"prompt_column": "q", "completion_column": "a"}, "Hi", "Hello!"),
        ({"review": "Great."}, {"completion_column": "review"}, "", "Great."),
        ({"prompt": "Hi", "chosen": "Hello!", "rejected": "No"}, {"completion_column": "chosen"}, "Hi", "Hello!"),
        ({"chosen": [user("Hi"), assistant("A")]}, {"completion_column": "chosen"}, [user("Hi")], [assistant("A")]),
    ],
)
def test_read_demonstration(row, names, prompt, completion):
    example = read_demonstration(row, **names)
    assert example.prompt == prompt and example.completions == (completion,)


BLUE, GREEN = [assistant("Blue.")], [assistant("Green.")]


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "The sky is", "chosen": " blue.", "rejected": " green."}, "The sky is", " blue.", " green."),
        ({"prompt": SKY, "chosen": BLUE, "rejected": GREEN}, SKY, BLUE, GREEN),
        ({"chosen": SKY + BLUE, "rejected": SKY + GREEN}, SKY, BLUE, GREEN),
        # a prompt given twice, as the string and at the start of both conversations
        ({"prompt": SKY[3]["content"], "chosen": SKY + BLUE, "rejected": SKY + GREEN}, SKY, BLUE, GREEN),
        ({"prompt": SKY, "chosen": SKY + BLUE, "rejected": SKY + GREEN}, SKY, BLUE, GREEN),
        ({"prompt": "The sky?", "chosen": BLUE, "rejected": GREEN}, [user("The sky?")], BLUE, GREEN),
        ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "The sky is", " blue.", " green."),
        ({"chosen": "It is bright", "rejected": "It is brown"}, "It is", " bright", " brown"),
        ({"chosen": "Answer:\nYes", "rejected": "Answer:\nNo"}, "Answer:\n", "Yes", "No"),
        ({"chosen": "Yes", "rejected": "Yesterday"}, "", "Yes", "Yesterday"),
        ({"chosen": "Yes, sir", "rejected": "No"}, "", "Yes, sir", "No"),
        ({"chosen": "天空是蓝色", "rejected": "天空是绿色"}, "天空是", "蓝色", "绿色"),
        (
            {"chosen": "\n\nHuman: Hi\n\nAssistant: I am well", "rejected": "\n\nHuman: Hi\n\nAssistant: I am ill"},
            "\n\nHuman: Hi\n\nAssistant:",
            " I am well",
            " I am ill",
        ),
        ({"messages": SKY, "chosen": "Blue.", "rejected": "Green."}, SKY, BLUE, GREEN),
        (
            {
                "conversations": [{"from": "human", "value": "The sky?"}],
                "chosen": {"from": "gpt", "value": "Blue."},
                "rejected": {"from": "gpt", "value": "Green."},
            },
            [user("The sky?")],
            BLUE,
            GREEN,
        ),
        # equal conversations keep their last answers, so that the pair is recognized as a tie
        ({"chosen": SKY + BLUE, "rejected": SKY + BLUE}, SKY, BLUE, BLUE),
    ],
)
def test_read_preference(row, prompt, chosen, rejected):
    example = read_preference(row)
    assert (example.prompt, example.completions) == (prompt, (chosen, rejected))
    assert example.columns == {}


@pytest.mark.parametrize("chosen", ["a b c", "a b", "a bc d", " a b", "héllo wörld", "", "a\tb"])
@pytest.mark.parametrize("rejected", ["a b d", "a b", "a bcd", " a", "héllo wörd", "x"])
def test_an_implicit_prompt_and_its_completions_concatenate_to_the_original_texts(chosen, rejected):
    example = read_preference({"chosen": chosen, "rejected": rejected})
    assert [example.prompt + completion for completion in example.completions] == [chosen, rejected]
    assert not example.prompt.endswith(" ")


@pytest.mark.parametrize(
    "read",
    [
        lambda row: read_preference({**row, "chosen": "The sky is blue.", "rejected": "The sky is green."}),
        lambda row: read_demonstration({**row, "answer": "Blue."}, completion_column="answer"),
        lambda row: read_prompt({**row, "chosen": "The sky is blue.", "rejected": "The sky is green."}),
    ],
    ids=["preference", "demonstration", "prompt"],
)
def test_a_prompt_column_with_another_name_is_not_ignored(read):
    with pytest.raises(ValueError, match="no column 'prompt', but 'question': set prompt_column='question'"):
        read({"question": "What colour is the sky?"})


def test_conversations_with_the_prompt_inside_allow_a_column_with_a_usual_prompt_name():
    example = read_preference({"question": "...", "chosen": SKY + BLUE, "rejected": SKY + GREEN})
    assert example.prompt == SKY and example.columns == {"question": "..."}


def test_a_system_column_beside_a_plain_prompt_is_warned_of():
    with pytest.warns(UserWarning, match="'system' is not a part of prompts that are strings"):
        assert read_prompt({"prompt": "Hi", "system": "Be brief."}).prompt == "Hi"


def test_null_fields_of_messages_are_removed():
    example = read_prompt({"prompt": [{"role": "user", "content": "Hi", "tool_calls": None}]})
    assert example.prompt == [user("Hi")]


def test_template_kwargs_come_from_their_columns():
    row = {"prompt": [user("Hi")], "chat_template_kwargs": {"thinking": False, "x": None}, "tools": '[{"name": "f"}]'}
    assert read_prompt(row).template_kwargs == {"thinking": False, "tools": [{"name": "f"}]}


@pytest.mark.parametrize(
    ("read", "row", "names", "message"),
    [
        (read_prompt, {"text": "a", "id": 1}, {}, "no column 'prompt' in the data, which have 'text', 'id'"),
        (read_prompt, {"text": "a"}, {"prompt_column": "q"}, "no column 'q' .* prompt_column"),
        (read_prompt, {"prompt": 3}, {}, "'prompt' contains 3: it must be a string or a list of messages"),
        (read_prompt, {"prompt": [{"content": "x"}]}, {}, "a message needs 'role' and 'content'"),
        (read_demonstration, {"id": 1}, {}, "no demonstrations: .* the data have 'id'"),
        (read_demonstration, {"prompt": "a"}, {}, "no demonstrations"),
        (read_demonstration, {"completion": "a"}, {}, "no column 'prompt'"),
        (read_demonstration, {"prompt": "a"}, {"completion_column": "b"}, "no column 'b' .* completion_column"),
        (read_demonstration, {"messages": [user("a")]}, {}, "'messages' has no assistant turn"),
        (read_preference, {"prompt": "a", "chosen": "b"}, {}, "no column 'rejected' .* rejected_column"),
        (read_preference, {"chosen": "b", "rejected": BLUE}, {}, "one of 'chosen' and 'rejected' is a string"),
        (read_prompt, {"prompt": "<image> What?", "images": ["a.png"]}, {}, "the column 'images' is not empty"),
        (read_preference, {"prompt": SKY, "chosen": BLUE, "rejected": GREEN, "image": b"1"}, {}, "the column 'image'"),
        (read_prompt, {"instruction": "Add.", "input": "2, 2"}, {"prompt_column": "instruction"}, "has an 'input'"),
    ],
)
def test_unreadable_rows_raise(read, row, names, message):
    with pytest.raises(ValueError, match=message):
        read(row, **names)
