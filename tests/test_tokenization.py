"""Tokenization of prompts and completions, with tokenizers and chat templates that differ at text boundaries."""

import pytest
from tokenizers import Tokenizer, decoders, models, normalizers
from transformers import AutoModelForCausalLM, ByT5Tokenizer, PreTrainedTokenizerFast

from lit_rlhf.models.policy import Policy
from lit_rlhf.testbed.tokenizer import make_tokenizer as make_word_tokenizer
from lit_rlhf.tokenization import decode_completions, encode_completion, encode_prompt
from tiny import make_llama

DIALOGUE = "Human: hi\n\nAssistant:"


@pytest.fixture
def llama_2_style():
    """Return a tokenizer that, like Llama 2's, prepends a space to each text and strips the first one on decoding."""
    characters = "▁\n:;</>" + "".join(map(chr, range(ord("A"), ord("z") + 1)))
    vocabulary = {token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *characters, "▁g", "▁go"])}
    backend = Tokenizer(models.BPE(vocabulary, [("▁", "g"), ("▁g", "o")], unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@pytest.mark.parametrize("completion", [" good", "good", "\ngood"])
def test_prompt_and_completion_ids_concatenate_to_the_ids_of_the_full_text(completion, llama_2_style):
    ids = encode_prompt(llama_2_style, DIALOGUE) + encode_completion(
        llama_2_style, DIALOGUE, completion, finished=False
    )
    assert ids == llama_2_style(DIALOGUE + completion)["input_ids"]


def test_decoding_a_completion_does_not_depend_on_the_batch(llama_2_style, monkeypatch):
    """Even if one text of the batch merges with its context."""
    ids = [encode_completion(llama_2_style, DIALOGUE, text) for text in (" good", "merging")]
    original = type(llama_2_style).batch_decode

    def merge(self, rows, **kwargs):
        return [text.replace("\nmerging", "?") for text in original(self, rows, **kwargs)]

    monkeypatch.setattr(type(llama_2_style), "batch_decode", merge)
    assert decode_completions(llama_2_style, ids) == [" good", "merging"]


@pytest.mark.parametrize("completion", [" good", "good", "\ngood"])
def test_completions_round_trip_as_continuations_of_a_prompt(completion, llama_2_style):
    ids = encode_completion(llama_2_style, DIALOGUE, completion)
    assert ids[-1] == llama_2_style.eos_token_id
    assert decode_completions(llama_2_style, [ids, ids[:-1]]) == [completion] * 2


def test_completion_without_a_prompt_is_encoded_as_a_standalone_text(llama_2_style):
    assert encode_completion(llama_2_style, "", "good", finished=False) == llama_2_style("good")["input_ids"]


def test_turn_ends_with_the_end_token_of_the_chat_template(tokenizer):
    """It differs from the tokenizer's EOS, as in Gemma and Phi. What the template adds after it is never sampled."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompt, answer = [{"role": "user", "content": "U"}], [{"role": "assistant", "content": "good"}]
    decoded = {
        finished: tokenizer.decode(encode_completion(tokenizer, prompt, answer, finished)) for finished in (True, False)
    }
    assert decoded == {True: "good<end>", False: "good"}


def test_assistant_turn_at_the_end_of_the_prompt_is_continued(tokenizer):
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<eos>{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    prompt = [{"role": "user", "content": "U"}, {"role": "assistant", "content": "a good"}]
    answer = [{"role": "assistant", "content": " film"}]
    encoded = encode_prompt(tokenizer, prompt), encode_completion(tokenizer, prompt, answer)
    assert [tokenizer.decode(ids) for ids in encoded] == ["<|user|>U<eos><|assistant|>a good", " film<eos>"]


@pytest.mark.parametrize("suffix", ["", "\n", "\n<eos>"])
def test_policy_stops_at_the_end_token_of_its_chat_template(suffix, tokenizer, tmp_path):
    """Even if the base model's generation config lacks it. The saved generation config contains it."""
    tokenizer.add_special_tokens({"additional_special_tokens": ["<end>"]})
    tokenizer.chat_template = (
        "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<end>" + suffix + "{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>{% endif %}"
    )
    policy = Policy(make_llama(len(tokenizer)), tokenizer)
    end = tokenizer.convert_tokens_to_ids("<end>")
    assert policy.eos_ids == [tokenizer.eos_token_id, end]
    policy.save(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.eos_token_id == [2, end]


def test_special_token_inside_a_turn_does_not_end_it(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    prompt, answer = [{"role": "user", "content": "U"}], [{"role": "assistant", "content": "a<bos>b"}]
    assert tokenizer.decode(encode_completion(tokenizer, prompt, answer)).endswith("a<bos>b<eos>")


def test_special_tokens_in_text_get_no_space_before_them(llama_2_style):
    text = "go</s>go </s>"
    options = dict(finished=False, parse_special_tokens=False)
    ids = encode_completion(llama_2_style, DIALOGUE, text, **options)
    assert llama_2_style.eos_token_id not in ids
    assert decode_completions(llama_2_style, [ids]) == [text]


@pytest.mark.parametrize("make", [ByT5Tokenizer, make_word_tokenizer])
def test_special_tokens_in_messages_are_text_for_other_kinds_of_tokenizers(make):
    """One in Python, and one whose vocabulary of words contains its special tokens."""
    tokenizer = make()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}{% if add_generation_prompt %} :{% endif %}"
    )
    eos, clean = tokenizer.eos_token_id, [{"role": "user", "content": "A"}]
    attacked = [{"role": "user", "content": f"A {tokenizer.eos_token} A {tokenizer.pad_token}"}]
    ids = encode_prompt(tokenizer, attacked)
    assert ids.count(eos) == 1 and tokenizer.pad_token_id not in ids
    assert len(ids) > len(encode_prompt(tokenizer, clean)) + 1
