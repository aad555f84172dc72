"""Chat templates that end turns, read contents or begin conversations otherwise than most."""

import pytest

from families import CHATML, HEADERS, make_family
from lit_rlhf.tokenization import encode_completion, encode_prompt, encode_turns, end_ids, end_of_turn, left_out
from test_chat_templates import assistant, ids_of, masked, structure, user

SYSTEM = {"role": "system", "content": "Be brief."}
CALL = assistant("", tool_calls=[{"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}])
RESULT = {"role": "tool", "content": '{"sum": 4}'}


def test_several_tokens_after_an_answer_end_in_eos():
    tokenizer = make_family("command")
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    answers = [encode_completion(tokenizer, [user("q")], [assistant("4")], finished) for finished in (True, False)]
    assert list(map(tokenizer.decode, answers)) == ["4<|END_RESPONSE|><|END_OF_TURN|>", "4"]


@pytest.mark.parametrize("content", ["", "I call it."])
def test_a_turn_that_ends_in_another_control_token_keeps_its_end(content):
    """As calls of tools in LFM2."""
    tokenizer = make_family("chatml", "<|call_start|>", "<|call_end|>")
    tokenizer.chat_template = CHATML.replace("\n<tool_call>", "<|call_start|>").replace("</tool_call>", "<|call_end|>")
    ids = encode_completion(tokenizer, [user("q")], [{**CALL, "content": content}])
    assert structure(tokenizer, ids) == ["<|call_start|>", "<|call_end|>", "<|im_end|>"]


def test_an_empty_answer_keeps_its_header():
    tokenizer = make_family("gptoss")
    ids = encode_completion(tokenizer, [user("q")], [assistant("")])
    assert tokenizer.decode(ids) == "<|channel|>final<|message|><|return|>"


def test_a_turn_that_ends_otherwise_inside_a_conversation_ends_once():
    tokenizer = make_family("gptoss")
    turns = encode_turns(tokenizer, [user("q")], [assistant("one"), user("r"), assistant("two")])
    answers = [f"<|channel|>final<|message|>{text}<|return|>" for text in ("one", "two")]
    assert masked(tokenizer, turns) == "".join(answers) and turns.rebuilt
    assert tokenizer.decode(turns.ids) == "<|start|>user<|message|>r<|end|><|start|>assistant".join(answers)


def test_a_mark_that_a_template_leaves_alone_does_not_hide_the_end():
    """A template may cut an answer at a token, as Gemma 4's."""
    tokenizer = make_family("chatml", "<|channel|>")
    tokenizer.chat_template = CHATML.replace("m.content }}", "m.content.split('<|channel|>')[0] }}")
    ids = encode_completion(tokenizer, [user("q")], [assistant("a<|channel|>b")])
    assert structure(tokenizer, ids) == ["<|im_end|>"]


# Contents in typed blocks


def test_a_template_that_reads_only_typed_blocks_gets_them():
    """Contents that are strings are left out by it, or an error."""
    tokenizer = make_family("smolvlm")
    conversation = [SYSTEM, user("a <end_of_utterance>"), assistant("b"), user("c")]
    ids = encode_prompt(tokenizer, conversation)
    text = "<bos>System: Be brief.<end_of_utterance>\nUser: a <end_of_utterance><end_of_utterance>\n"
    assert tokenizer.decode(ids).startswith(text) and len(structure(tokenizer, ids)) == 5
    assert tokenizer.decode(encode_prompt(tokenizer, [user("a"), assistant("b")])).endswith("Assistant: b")
    turns = encode_turns(tokenizer, [user("a")], [assistant("b"), user("c"), assistant("d")])
    assert masked(tokenizer, turns) == " b<end_of_utterance> d<end_of_utterance>" and not turns.rebuilt


# Prompts rendered beforehand


@pytest.mark.parametrize("header", ["<|start_header_id|>", "### "])
def test_a_rendered_prompt_gets_no_bos_that_its_template_does_not_write(header):
    tokenizer = make_family("llama3")
    tokenizer.chat_template = HEADERS.replace("{{ bos_token }}", "").replace("<|start_header_id|>", header)
    for messages in ([user("a")], [SYSTEM, user("a"), assistant("b"), user("c")]):
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        assert encode_prompt(tokenizer, text) == encode_prompt(tokenizer, messages)
    assert encode_prompt(tokenizer, "plain")[0] == tokenizer.bos_token_id


def test_a_tokenizer_that_splits_special_tokens_does_not_split_those_of_its_template():
    tokenizer, conversation = make_family("llama3"), [user("a")]
    expected = encode_prompt(tokenizer, conversation), encode_prompt(tokenizer, "a<|eot_id|>")
    tokenizer.split_special_tokens = True
    assert (encode_prompt(tokenizer, conversation), encode_prompt(tokenizer, "a<|eot_id|>")) == expected


# Thoughts


@pytest.mark.parametrize("thought", ["<think>\nEasy.\n</think>\n\n4", "<think>\nEasy.</think>4"])
def test_an_empty_thought_that_a_template_writes_before_an_answer_with_one_is_left_out(thought):
    """The template reads thoughts from `reasoning_content` alone, as later ones of Qwen."""
    tokenizer = make_family("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}<think>\n"
        "{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    turns = encode_turns(tokenizer, [user("q")], [assistant(thought)])
    assert tokenizer.decode(turns.ids) == thought.removeprefix("<think>\n") + "<|im_end|>" and turns.rebuilt
    turns = encode_turns(tokenizer, [user("q")], [assistant("4", reasoning_content="Easy.")])
    assert tokenizer.decode(turns.ids) == "Easy.\n</think>\n\n4<|im_end|>" and not turns.rebuilt


# Roles


@pytest.mark.parametrize("role", ["im_end", "im_end|>\n<|im_start|>system", "<|im_start|>"])
def test_a_role_does_not_become_a_control_token(role):
    tokenizer = make_family("chatml")
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|im_end|>{% endfor %}"
    with pytest.raises(ValueError, match="can become a control token"):
        encode_prompt(tokenizer, [{"role": role, "content": "a"}])
    assert "<|critic 2|>a" in tokenizer.decode(encode_prompt(tokenizer, [{"role": "critic 2", "content": "a"}]))


# What a template leaves out


@pytest.mark.parametrize(
    ("family", "prompt", "completion", "expected"),
    [
        ("r1", [SYSTEM, user("q")], [assistant("a")], "the message of 'system'"),
        ("chatml", [SYSTEM, user("q")], [assistant("a")], None),
        ("llama3", [user("q"), CALL, RESULT], [], "the calls of tools"),
        ("llama3", [user("q")], [CALL], "the calls of tools"),
        ("chatml", [user("q"), CALL, RESULT], [CALL], None),
        ("llama3", [user("q")], [assistant("a", reasoning_content="Well.")], "'reasoning_content' of an assistant"),
        ("llama3", [user("q"), assistant("a", reasoning_content="Well."), user("r")], [assistant("b")], None),
        ("qwen3", [user("q")], [assistant("a", reasoning_content="Well.")], None),
    ],
)
def test_what_a_template_leaves_out_is_named(family, prompt, completion, expected):
    tokenizer = make_family(family)
    if family == "r1":
        tokenizer.chat_template = tokenizer.chat_template.replace("{% else %}", "{% elif m.role == 'user' %}")
    assert left_out(tokenizer, prompt, completion) == expected


def test_a_message_that_a_template_writes_as_json_is_not_left_out():
    tokenizer = make_family("chatml")
    tokenizer.chat_template = CHATML.replace("m.content }}", "m.content | tojson }}")
    assert left_out(tokenizer, [user("q"), {**RESULT, "content": '{"ü": "\n"}'}], []) is None


# Ends of completions


def test_ends_of_completions_include_tokens_that_are_not_special():
    tokenizer = make_family("r1")
    expected = ids_of(tokenizer, "<eos>", "<bos>", "<|User|>", "<|Assistant|>")
    assert end_ids(tokenizer) == set(expected) and end_ids(make_family("gpt2")) == {make_family("gpt2").eos_token_id}
