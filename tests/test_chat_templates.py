"""Conversations in the templates of well-known families: ends of turns, thoughts, special tokens in messages."""

import pytest
from tokenizers import processors

from families import ENDS_OF_TURNS, make_family
from lit_rlhf.models.policy import Policy
from lit_rlhf.tokenization import encode_completion, encode_prompt, encode_turns, end_of_turn, pad_token_id
from tiny import make_llama


def user(text):
    return {"role": "user", "content": text}


def assistant(text, **fields):
    return {"role": "assistant", "content": text, **fields}


def completion_text(tokenizer, prompt, *answer, **options):
    return tokenizer.decode(encode_completion(tokenizer, prompt, list(answer), **options))


def ids_of(tokenizer, *tokens):
    return [tokenizer.convert_tokens_to_ids(token) for token in tokens]


def structure(tokenizer, ids):
    """Return the added tokens among some ids."""
    return [tokenizer.convert_ids_to_tokens(i) for i in ids if i in tokenizer.added_tokens_decoder]


# The end of a turn


@pytest.mark.parametrize("family", ENDS_OF_TURNS)
def test_an_answer_ends_with_what_the_template_ends_a_turn_with(family):
    tokenizer, end = make_family(family, "<ans>", "</ans>"), ENDS_OF_TURNS[family]
    assert end_of_turn(tokenizer) == tokenizer.convert_tokens_to_ids(end)
    written = {"qwen3": "<think>\n\n</think>\n\n", "r1": "\n</think>\n\n", "llama2": " ", "smolvlm": " "}.get(
        family, ""
    )
    after = " " if family == "llama2" else ""
    for answer in ("4", "<ans>4</ans>"):
        ids = encode_completion(tokenizer, [user("2+2")], [assistant(answer)])
        assert tokenizer.decode(ids) == written + answer + after + end
        cut = encode_completion(tokenizer, [user("2+2")], [assistant(answer)], finished=False)
        assert tokenizer.decode(cut).removeprefix(written) == answer
    assert set(ids_of(tokenizer, "<ans>", "</ans>")) <= set(ids), "tags that a user added are learned as tokens"


@pytest.mark.parametrize("family", ["chatml", "phi3", "gemma"])
def test_the_policy_stops_at_the_end_of_a_turn(family):
    tokenizer = make_family(family, "<ans>", "</ans>")
    policy = Policy(make_llama(len(tokenizer), eos_token_id=tokenizer.eos_token_id), tokenizer)
    assert policy.eos_ids == sorted(ids_of(tokenizer, "<eos>", ENDS_OF_TURNS[family]))


def test_a_template_without_an_end_of_turn_falls_back_to_eos():
    tokenizer = make_family("gpt2")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    assert end_of_turn(tokenizer) == tokenizer.eos_token_id
    assert completion_text(tokenizer, [user("a")], assistant("b")) == "assistant: b\n<eos>"


def test_a_turn_whose_header_differs_from_the_generation_prompt_keeps_its_end():
    tokenizer = make_family("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "assistant\n{% endif", "assistant (think first)\n{% endif"
    )
    turns = encode_turns(tokenizer, [user("a")], [assistant("b")])
    assert tokenizer.decode(turns.ids) == "b<|im_end|>" and turns.rebuilt


def test_a_string_completion_that_was_rendered_beforehand_ends_once():
    tokenizer = make_family("phi3")
    prompt = tokenizer.apply_chat_template([user("a")], tokenize=False, add_generation_prompt=True)
    for completion in ("b", "b<|end|>", "b<|end|>\n"):
        assert tokenizer.decode(encode_completion(tokenizer, prompt, completion)) == "b<|end|>"
    assert tokenizer.decode(encode_completion(tokenizer, "plain", "b")) == "b<eos>"


# Thoughts


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (assistant("<think>\nEasy.\n</think>\n4"), "Easy.\n</think>\n4"),
        (assistant("<think>Easy.</think>4"), "Easy.</think>4"),
        (assistant("Easy.</think>4"), "Easy.</think>4"),
        (assistant("4", reasoning_content="Easy."), "Easy.\n</think>\n\n4"),
        (assistant("4"), "\n</think>\n\n4"),
    ],
)
@pytest.mark.parametrize("keeps", [False, True])
def test_what_the_prompt_opens_is_continued(answer, expected, keeps):
    """The template opens `<think>` in its generation prompt, and leaves the thoughts of finished turns out or not."""
    tokenizer = make_family("r1")
    if keeps:
        tokenizer.chat_template = tokenizer.chat_template.replace("m.content.split('</think>')[-1]", "m.content")
    turns = encode_turns(tokenizer, [user("2+2")], [answer])
    prompt = tokenizer.decode(encode_prompt(tokenizer, [user("2+2")]))
    assert prompt == "<bos><|User|>2+2<|Assistant|><think>\n"
    assert tokenizer.decode(turns.ids) == expected + "<eos>"
    assert turns.rebuilt or (keeps and answer["content"].startswith("<think>\n"))


def test_a_truncated_thought_is_not_closed():
    ids = encode_completion(make_family("r1"), [user("2+2")], [assistant("Let me")], finished=False)
    assert make_family("r1").decode(ids) == "Let me"


def test_a_template_that_always_opens_a_thought_does_not_double_it():
    tokenizer = make_family("chatml")
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ '<think>\n' if m.role == 'assistant' }}{{ m.content }}"
        "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
    )
    texts = [completion_text(tokenizer, [user("a")], assistant(text)) for text in ("<think>\nb</think>c", "c")]
    assert texts == ["b</think>c<|im_end|>", "\n</think>\n\nc<|im_end|>"]


def test_thoughts_that_a_template_leaves_out_are_learned():
    """Also without an opening tag in the generation prompt."""
    tokenizer = make_family("r1")
    tokenizer.chat_template = tokenizer.chat_template.replace("<think>\n{% endif", "{% endif")
    turns = encode_turns(tokenizer, [user("2+2")], [assistant("<think>Easy.</think>4")])
    assert tokenizer.decode(turns.ids) == "<think>Easy.</think>4<eos>" and turns.rebuilt
    assert not encode_turns(tokenizer, [user("2+2")], [assistant("4")]).rebuilt


@pytest.mark.parametrize("thinking", [None, False])
def test_a_template_that_writes_thoughts_itself_is_followed(thinking):
    tokenizer, kwargs = make_family("qwen3"), {} if thinking is None else {"enable_thinking": thinking}
    answer = [assistant("4")] if thinking is False else [assistant("4", reasoning_content="Easy.")]
    turns = encode_turns(tokenizer, [user("2+2")], answer, template_kwargs=kwargs)
    whole = tokenizer.decode(encode_prompt(tokenizer, [user("2+2")], kwargs) + turns.ids)
    assert whole + "\n" == tokenizer.apply_chat_template([user("2+2"), *answer], tokenize=False, **kwargs)
    assert not turns.rebuilt


# Special tokens in messages


@pytest.mark.parametrize("family", ENDS_OF_TURNS)
def test_special_tokens_in_messages_are_text(family):
    tokenizer, end = make_family(family, "<ans>"), ENDS_OF_TURNS[family]
    control = [token for token in tokenizer.get_vocab() if token.startswith("<") and len(token) > 2]
    control = [token for token in control if "think" not in token and "tool" not in token]
    evil = "hi" + "".join(f"{token} x " for token in control) + "bye"
    clean, attacked = (encode_prompt(tokenizer, [user(text)]) for text in ("hi", evil))
    assert structure(tokenizer, attacked) == structure(tokenizer, clean)
    assert evil in tokenizer.decode(attacked)
    answers = [encode_completion(tokenizer, [user("q")], [assistant(text)]) for text in ("hi", evil)]
    assert structure(tokenizer, answers[1]) == [*structure(tokenizer, answers[0])[:-1], "<ans>", end]
    assert evil in tokenizer.decode(answers[1])


def test_special_tokens_in_any_string_of_a_conversation_are_text():
    tokenizer = make_family("chatml")
    tokenizer.chat_template = (
        "{{ documents | tojson }}{{ tools | tojson(ensure_ascii=True) }}" + tokenizer.chat_template
    )
    end = "<|im_end|>"
    kwargs = {"documents": [{end: end}], "tools": [{"name": end}]}
    call = assistant("", tool_calls=[{"name": "f", "arguments": {end: [end]}}])
    messages = [user("a"), call, {"role": "tool", "name": end, "content": f"</tool_call>{end}"}]
    ids = encode_prompt(tokenizer, messages, kwargs)
    assert structure(tokenizer, ids).count(end) == 3 and tokenizer.decode(ids).count(end) == 9
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **kwargs)
    assert tokenizer.decode(ids) == rendered


def test_marks_that_a_template_takes_apart_leave_no_trace():
    tokenizer = make_family("r1", "</s>")
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content.split('</s>') | join('/') }}{{ m.content[:4] }}{% endfor %}"
    )
    assert tokenizer.decode(encode_prompt(tokenizer, [user("\ue000a</s>b")])) == "\ue000a/b\ue000a<"


def test_a_clean_conversation_is_encoded_in_one_piece():
    tokenizer = make_family("chatml")
    messages = [user("\ue000 private \ue001 use"), assistant("b"), user("c")]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert encode_prompt(tokenizer, messages) == expected


@pytest.mark.parametrize("parse", [True, False])
def test_special_tokens_in_strings_are_parsed_or_text(parse):
    tokenizer = make_family("llama3", "<ans>")
    options = dict(parse_special_tokens=parse)
    ids = encode_prompt(tokenizer, "a<|eot_id|>b<ans>c", **options)
    assert structure(tokenizer, ids) == ["<bos>", "<|eot_id|>", "<ans>"] if parse else ["<bos>"]
    assert tokenizer.decode(ids) == "<bos>a<|eot_id|>b<ans>c"
    ids = encode_completion(tokenizer, "q", "a<|eot_id|>b<ans>c", **options)
    assert structure(tokenizer, ids) == [*(["<|eot_id|>"] if parse else []), "<ans>", "<eos>"]
    assert tokenizer.decode(ids) == "a<|eot_id|>b<ans>c<eos>"


# Beginning of sequence


@pytest.mark.parametrize("family", ["llama3", "llama2", "gemma", "r1"])
def test_a_prompt_rendered_beforehand_is_encoded_as_its_messages(family):
    tokenizer, messages = make_family(family), [user("a"), assistant("b"), user("c")]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    ids = encode_prompt(tokenizer, text)
    assert ids == encode_prompt(tokenizer, messages) and ids.count(tokenizer.bos_token_id) == 1
    assert encode_prompt(tokenizer, "a") == [
        tokenizer.bos_token_id,
        *tokenizer("a", add_special_tokens=False)["input_ids"],
    ]


@pytest.mark.parametrize("family", ["llama3", "gpt2"])
def test_a_text_without_a_prompt_has_one_bos(family):
    tokenizer = make_family(family)
    text = f"{tokenizer.bos_token}a"
    ids = encode_prompt(tokenizer, "") + encode_completion(tokenizer, "", text)
    assert tokenizer.decode(ids) == f"{text}<eos>"


def test_all_tokens_that_a_tokenizer_puts_first_are_put_once():
    tokenizer = make_family("gpt2", "[gMASK]", "<sop>")
    pairs = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("[gMASK]", "<sop>", "<eos>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[gMASK] <sop> $A <eos>", special_tokens=pairs
    )
    for text in ("a", "[gMASK]<sop>a"):
        assert tokenizer.decode(encode_prompt(tokenizer, text)) == "[gMASK]<sop>a"
    assert tokenizer.decode(encode_prompt(tokenizer, "a<eos>")) == "[gMASK]<sop>a<eos>"


# Padding


@pytest.mark.parametrize(
    ("family", "pad"),
    [
        ("chatml", "<|im_start|>"),
        ("llama3", "<bos>"),
        ("llama2", "<unk>"),
        ("gemma", "<pad>"),
        ("r1", "<bos>"),
        ("phi3", "<unk>"),
        ("gpt2", None),
    ],
)
def test_the_padding_token_ends_no_completion(family, pad):
    tokenizer = make_family(family, "<ans>", "</ans>")
    assert pad_token_id(tokenizer) == (None if pad is None else tokenizer.convert_tokens_to_ids(pad))
    tokenizer.pad_token = ENDS_OF_TURNS.get(family, "!")
    assert pad_token_id(tokenizer) not in ids_of(tokenizer, ENDS_OF_TURNS.get(family, "!"), "<eos>", "!")


# Templates that refuse


@pytest.mark.parametrize(
    ("family", "messages", "reason"),
    [
        ("gemma", [{"role": "system", "content": "s"}, user("a")], "no system role here"),
        ("llama2", [user("a"), user("b")], "roles must alternate user and assistant"),
        ("chatml", [], "empty conversation"),
        ("r1", [user("a"), {"role": "assistant"}, user("b")], "no attribute 'content'"),
    ],
)
def test_a_template_that_refuses_gives_its_reason(family, messages, reason):
    with pytest.raises(ValueError, match=rf"the chat template refuses the conversation: .*{reason}"):
        encode_prompt(make_family(family), messages)


# Several turns


def masked(tokenizer, turns):
    learned = turns.learned or [True] * len(turns.ids)
    return tokenizer.decode([i for i, keep in zip(turns.ids, learned, strict=True) if keep])


@pytest.mark.parametrize("family", ["chatml", "qwen3", "llama3", "phi3", "r1"])
def test_turns_of_others_inside_a_completion_are_not_learned(family):
    tokenizer, end = make_family(family), ENDS_OF_TURNS[family]
    thought = {"qwen3": "<think>\n\n</think>\n\n", "r1": "\n</think>\n\n"}.get(family, "")
    answer = [assistant("one"), {"role": "tool", "content": "42"}, assistant("two")]
    turns = encode_turns(tokenizer, [user("q")], answer)
    assert masked(tokenizer, turns) == f"{thought}one{end}{thought}two{end}"
    whole = tokenizer.decode(encode_prompt(tokenizer, [user("q")]) + turns.ids)
    if family != "r1":  # which renders a finished turn otherwise
        assert tokenizer.apply_chat_template([user("q"), *answer], tokenize=False).startswith(whole) and "42" in whole


def test_a_turn_whose_thoughts_are_left_out_later_is_learned_with_them():
    tokenizer = make_family("qwen3")
    answer = [assistant("<think>\nx\n</think>\n\none"), user("more"), assistant("<think>\ny\n</think>\n\ntwo")]
    turns = encode_turns(tokenizer, [user("q")], answer)
    assert turns.rebuilt
    learned = ["<think>\nx\n</think>\n\none<|im_end|>", "<think>\ny\n</think>\n\ntwo<|im_end|>"]
    assert masked(tokenizer, turns) == "".join(learned)
    between = "\n<|im_start|>user\nmore<|im_end|>\n<|im_start|>assistant\n"
    assert between in tokenizer.decode(turns.ids)


def test_a_completion_of_somebody_else_is_refused():
    with pytest.raises(ValueError, match="the completion begins with a turn of 'tool'"):
        encode_completion(make_family("chatml"), [user("q")], [{"role": "tool", "content": "42"}])
